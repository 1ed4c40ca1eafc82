"""Short causal depthwise convolution:  y_t = bias + sum_{j=0}^{W-1} weight[:, W-1-j] x_{t-j}   per channel.

``weight [C W]`` is laid out as ``torch.nn.Conv1d`` stores it (last column = current token), so published
weights load as they are. The state is the last W-1 inputs, ``[B W-1 C]``, oldest first, zeros before the text.
Used by Mamba, Mamba-2, DeltaNet, Griffin, xLSTM, Hyena (width 3 or 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shapes import check_starts, dims
from . import dispatch
from .cases import Case
from .common import loop
from .record import leaf

SEQUENCE = ("x",)
WIDTH = 4
TILE = 1 << 17  # numbers of one tile of rows


@leaf
def short_conv_step(x: Tensor, *, weight: Tensor, bias: Tensor | None = None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, the definition. x [B C], weight [C W], bias [C], state [B W-1 C] -> y [B C], state."""
    window = torch.cat([state, x.to(state.dtype)[:, None]], dim=1)
    y = torch.einsum("bwc,cw->bc", window, weight.to(state.dtype))
    if bias is not None:
        y = y + bias.to(state.dtype)
    return y.to(x.dtype), window[:, 1:]


def short_conv_reference(
    x: Tensor, *, weight: Tensor, bias: Tensor | None = None, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop over ``short_conv_step``."""
    return loop(short_conv_step, {"x": x}, weight=weight, bias=bias, state=state, starts=starts)


def short_conv_chunk(
    x: Tensor, *, weight: Tensor, bias: Tensor | None = None, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens at once: W shifted products, each masked where it would reach into an earlier document."""
    length, width, dtype = x.shape[1], weight.shape[1], state.dtype
    padded = torch.cat([state, x.to(dtype)], dim=1)
    last, same = padded[:, length:].clone(), None  # a view would keep all inputs in memory
    if starts is not None:
        before = starts.new_zeros(len(x), width - 1).long()
        document = torch.cat([before, starts.long().cumsum(1)], dim=1)
        same = torch.stack([document[:, j : j + length] == document[:, width - 1 :] for j in range(width)])
        last = last * (document[:, length:] == document[:, -1:])[..., None]
    y = _convolve(padded, weight.to(dtype), None if bias is None else bias.to(dtype), same)
    return y.to(x.dtype), last


def _tiles(x: Tensor) -> list[slice]:
    """Rows of the batch taken together: as many as stay in the cache through all taps."""
    size = max(1, TILE // x[0].numel())
    return [slice(row, row + size) for row in range(0, len(x), size)]


@torch.library.custom_op("everlong::short_conv", mutates_args=())
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


@_convolve.register_fake
def _(padded: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor | None) -> Tensor:
    return padded.new_empty(len(padded), padded.shape[1] - weight.shape[1] + 1, padded.shape[2])


@torch.library.custom_op("everlong::short_conv_backward", mutates_args=())
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

TABLE = (
    dispatch.Impl("torch", short_conv_chunk),
    dispatch.Impl("reference", short_conv_reference),
)


def short_conv(
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Short causal depthwise convolution (see the module for the equation).

    x [B T C], weight [C W], bias [C], state [B W-1 C] (the last W-1 inputs), starts bool [B T].
    Returns y [B T C] in the dtype of x, and the state. ``ValueError`` for shapes that do not fit.
    """
    batch, time, channels, width = dims("x B T C, weight C W, bias C", x, weight, bias)
    check_starts(starts, batch, time)
    if state is None:
        state = x.new_zeros(batch, width - 1, channels)
    dims(f"x B T C, state B {width - 1} C", x, state)
    return dispatch.run(TABLE, dict(x=x, weight=weight, bias=bias, state=state, starts=starts), backend)


def inputs(case: Case) -> dict[str, Tensor | None]:
    """Random inputs for tests and benchmarks: ``keys * heads`` channels, with and without bias."""
    channels = case.heads * case.keys
    bias = None if case.variant == "no bias" else case.randn(channels)
    return dict(x=case.randn(case.batch, case.time, channels), weight=case.randn(channels, WIDTH), bias=bias)


VARIANTS = ("bias", "no bias")
