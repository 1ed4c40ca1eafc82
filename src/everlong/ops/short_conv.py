"""Short causal depthwise convolution:  y_t = act(bias + sum_{j=0}^{W-1} weight[:, W-1-j] x_{t-j})   per channel.

``act`` is SiLU or, with ``activation=None``, nothing. ``weight [C W]`` is laid out as ``torch.nn.Conv1d`` stores it
(last column = current token), so published weights load as they are. The state is the last W-1 inputs, ``[B W-1 C]``,
oldest first, zeros before the text.
Used by Mamba, Mamba-2, DeltaNet, Griffin, xLSTM, Hyena (width 3 or 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import suggest
from ..shapes import check_starts, dims
from . import dispatch
from .cases import Case
from .common import loop
from .native import short_conv as native
from .record import leaf
from .transforms import custom_op, transforming

SEQUENCE = ("x",)
TILE = 1 << 17  # numbers of one tile of rows


@leaf(native.lower_step)
def short_conv_step(
    x: Tensor, *, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, the definition. x [B C], weight [C W], bias [C], state [B W-1 C] -> y [B C], state."""
    window = torch.cat([state, x.to(state.dtype)[:, None]], dim=1)
    y = torch.einsum("bwc,cw->bc", window, weight.to(state.dtype))
    if bias is not None:
        y = y + bias.to(state.dtype)
    return _act(y.to(x.dtype), activation), window[:, 1:]


def _act(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else F.silu(y)


def short_conv_reference(
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop over ``short_conv_step``."""
    fixed: dict[str, Any] = {"weight": weight, "bias": bias, "activation": activation}
    return loop(short_conv_step, {"x": x}, **fixed, state=state, starts=starts)


def short_conv_chunk(
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All tokens at once: W shifted products, each masked where it would reach into an earlier document."""
    length, width, dtype = x.shape[1], weight.shape[1], state.dtype
    padded, same = torch.cat([state, x.to(dtype)], dim=1), None
    if starts is not None:
        document = _documents(starts, width)
        same = torch.stack([document[:, j : j + length] == document[:, width - 1 :] for j in range(width)])
    convolve = _convolve_plain if transforming() else _convolve
    y = convolve(padded, weight.to(dtype), None if bias is None else bias.to(dtype), same)
    return _act(y.to(x.dtype), activation), _last(x, state, starts)


def short_conv_native(
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One pass over memory, summed in fp32; the backward pass keeps nothing but the inputs."""
    return native.convolve(x, weight, bias, state, starts, activation), _last(x, state, starts)


def _documents(starts: Tensor, width: int) -> Tensor:
    """The number of the document of each input, those of the state included.  [B W-1+T]"""
    before = starts.new_zeros(len(starts), width - 1).long()
    return torch.cat([before, starts.long().cumsum(1)], dim=1)


def _last(x: Tensor, state: Tensor, starts: Tensor | None) -> Tensor:
    """The last W-1 inputs, zero where they are of an earlier document; a copy, as a view would keep all of x alive."""
    length, kept = x.shape[1], state.shape[1]
    last = torch.cat([state[:, length:], x[:, max(length - kept, 0) :].to(state.dtype)], dim=1)
    if starts is None:
        return last
    document = _documents(starts, kept + 1)
    return last * (document[:, length:] == document[:, -1:])[..., None]


def windows(x: Tensor, state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each token's product sees, [B T C W], zero where it is of an earlier document; and the state after x."""
    width = state.shape[1] + 1
    seen = torch.cat([state, x.to(state.dtype)], dim=1).unfold(1, width, 1)
    if starts is not None:
        document = _documents(starts, width).unfold(1, width, 1)
        seen = seen * (document == document[..., -1:])[:, :, None]
    return seen, _last(x, state, starts)


def _tiles(x: Tensor) -> list[slice]:
    """Rows of the batch taken together: as many as stay in the cache through all taps."""
    size = max(1, TILE // max(1, x.shape[1:].numel()))
    return [slice(row, row + size) for row in range(0, len(x), size)]


@custom_op("everlong::short_conv", mutates_args=())
def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor | None) -> Tensor:
    """``padded [B W-1+T C]``, ``same`` bool [W B T]: tap j of token t lies in its document. y [B T C]."""
    batch, width = len(padded), weight.shape[1]
    length = padded.shape[1] - width + 1
    y, taps = padded.new_empty(batch, length, padded.shape[2]), weight.t().contiguous()
    y.copy_(torch.zeros_like(taps[0]) if bias is None else bias)
    for rows in _tiles(y):
        for j in range(width):
            tap = padded[rows, j : j + length]
            y[rows].addcmul_(tap if same is None else tap * same[j, rows, :, None], taps[j])
    return y


def _convolve_plain(padded: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor | None) -> Tensor:
    """The same in PyTorch's own operations, for transforms."""
    length = padded.shape[1] - weight.shape[1] + 1
    taps = [padded[:, j : j + length] * weight[:, j] for j in range(weight.shape[1])]
    if same is not None:
        taps = [tap * same[j, :, :, None] for j, tap in enumerate(taps)]
    y = torch.stack(taps).sum(0)
    return y if bias is None else y + bias


@_convolve.register_fake
def _(padded: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor | None) -> Tensor:
    return padded.new_empty(len(padded), padded.shape[1] - weight.shape[1] + 1, padded.shape[2])


@custom_op("everlong::short_conv_backward", mutates_args=())
def _convolve_backward(grad: Tensor, padded: Tensor, weight: Tensor, same: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of ``padded`` and ``weight``; a tile's products are summed while they are in the cache."""
    length, taps = grad.shape[1], weight.t().contiguous()
    grad_padded, grad_taps = torch.zeros_like(padded), torch.zeros_like(taps)
    for rows in _tiles(grad):
        for j in range(len(taps)):
            part = grad[rows] if same is None else grad[rows] * same[j, rows, :, None]
            grad_padded[rows, j : j + length].addcmul_(part, taps[j])
            grad_taps[j] += (part * padded[rows, j : j + length]).sum((0, 1))
    return grad_padded, grad_taps.t().contiguous()


@_convolve_backward.register_fake
def _(grad: Tensor, padded: Tensor, weight: Tensor, same: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(padded), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    padded, weight, bias, same = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(padded, weight, same)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_convolve_backward(grad, *ctx.saved_tensors), grad.sum((0, 1)) if ctx.has_bias else None, None)


_convolve.register_autograd(_backward, setup_context=_save)


def operations(inputs: dict[str, Any]) -> float:
    """A product and a sum for each lag."""
    return float(inputs["x"].numel() * 2 * inputs["weight"].shape[1])


TABLE = dispatch.Table(
    "short_conv",
    dispatch.Impl("native", short_conv_native, native.refuse),
    dispatch.Impl("torch", short_conv_chunk),
    dispatch.Impl("reference", short_conv_reference),
    sequence=SEQUENCE,
)


@dispatch.op(TABLE, step=short_conv_step, operations=operations)
def short_conv(
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Short causal depthwise convolution (see the module for the equation).

    x [B T C], weight [C W], bias [C], ``activation`` None or "silu", state [B W-1 C] (the last W-1 inputs),
    starts bool [B T]. Returns y [B T C] in the dtype of x, and the state. ``ValueError`` for shapes that do not fit
    and unknown activations.
    """
    batch, time, channels, width = dims("x B T C, weight C W, bias C", x, weight, bias)
    check_starts(starts, batch, time)
    if state is None:
        state = x.new_zeros(batch, width - 1, channels)
    dims(f"x B T C, state B {width - 1} C", x, state)
    if activation not in (None, "silu"):
        raise ValueError(f"no activation {activation!r} here, expected None or 'silu'{suggest(activation, ['silu'])}")
    inputs = dict(x=x, weight=weight, bias=bias, activation=activation, state=state, starts=starts)
    return dispatch.run(TABLE, inputs, backend)


def inputs(case: Case) -> dict[str, Any]:
    """Random inputs for tests and benchmarks: ``keys * heads`` channels; ``case.variant`` is one of VARIANTS."""
    channels, variant = case.heads * case.keys, case.variant or ""
    return dict(
        x=case.randn(case.batch, case.time, channels),
        weight=case.randn(channels, next((width for name, width in WIDTHS.items() if name in variant), 4)),
        bias=None if "no bias" in variant else case.randn(channels),
        activation="silu" if "silu" in variant else None,
    )


WIDTHS = {"width 1": 1, "width 3": 3, "width 6": 6}  # and 4 where nothing is said
VARIANTS = ("bias", "no bias", "silu", "silu, no bias, width 3", "silu, width 6", "width 1")
