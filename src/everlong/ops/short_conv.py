"""Short causal depthwise convolution:  y_t = bias + sum_{j=0}^{W-1} weight[:, W-1-j] x_{t-j}   per channel.

``weight [C W]`` is laid out as ``torch.nn.Conv1d`` stores it (last column = current token), so published
weights load as they are. The state is the last W-1 inputs, ``[B W-1 C]``, oldest first, zeros before the text.
Used by Mamba, Mamba-2, DeltaNet, Griffin, xLSTM, Hyena (width 3 or 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shapes import check_starts, dims
from . import dispatch
from .cases import Case
from .common import loop

SEQUENCE = ("x",)
WIDTH = 4


def short_conv_step(x: Tensor, *, weight: Tensor, bias: Tensor | None = None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, the definition. x [B C], weight [C W], bias [C], state [B W-1 C] -> y [B C], state."""
    window = torch.cat([state, x.to(state.dtype)[:, None]], dim=1)
    y = torch.einsum("bwc,cw->bc", window, weight.to(state.dtype))
    if bias is not None:
        y = y + bias.to(state.dtype)
    return y.to(x.dtype), window[:, 1:]


def short_conv_reference(x: Tensor, *, weight: Tensor, bias: Tensor | None = None, state: Tensor,
                         starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loop over ``short_conv_step``."""
    return loop(short_conv_step, {"x": x}, weight=weight, bias=bias, state=state, starts=starts)


def short_conv_chunk(x: Tensor, *, weight: Tensor, bias: Tensor | None = None, state: Tensor,
                     starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All tokens at once: W shifted products, each masked where it would reach into an earlier document."""
    length, width, dtype = x.shape[1], weight.shape[1], state.dtype
    padded = torch.cat([state, x.to(dtype)], dim=1)
    taps = weight.to(dtype).unbind(dim=1)
    document = None
    if starts is not None:
        document = torch.cat([starts.new_zeros(len(x), width - 1).long(), starts.long().cumsum(1)], dim=1)
    y = padded[:, width - 1 :] * taps[-1]
    for j in range(width - 1):
        tap = padded[:, j : j + length] * taps[j]
        if document is not None:
            tap = tap * (document[:, j : j + length] == document[:, width - 1 :])[..., None]
        y = y + tap
    if bias is not None:
        y = y + bias.to(dtype)
    last = padded[:, length:]
    if document is not None:
        last = last * (document[:, length:] == document[:, -1:])[..., None]
    return y.to(x.dtype), last


TABLE = (
    dispatch.Impl("torch", short_conv_chunk),
    dispatch.Impl("reference", short_conv_reference),
)


def short_conv(x: Tensor, *, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None,
               starts: Tensor | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
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
