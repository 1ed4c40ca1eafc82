"""The short convolution as a native kernel, registered so that autograd and torch.compile see through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..transforms import custom_op
from . import call, last_axis_whole, refusal, threads_for
from .guards import Unsupported

if TYPE_CHECKING:
    from .lowering import Lowering


def refuse(**inputs: Any) -> str | None:
    """Why the kernel cannot run on these inputs, or None."""
    return refusal(inputs)


@custom_op("everlong::short_conv_native", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, starts: Tensor | None, silu: bool
) -> Tensor:
    """y [B T C]; x and state in one dtype, weight and bias in fp32."""
    y = x.new_empty(x.shape)
    _call("ev_short_conv", (x, weight, bias, state, starts, silu), y, threads_for(x.numel()))
    return y


def _call(name: str, inputs: tuple[Any, ...], *outputs: Any) -> None:
    x, weight, bias, state, starts, silu = inputs
    x, state, taps = last_axis_whole(x), state.contiguous(), weight.t().contiguous()
    bias = taps.new_zeros(x.shape[2]) if bias is None else bias
    half = int(x.dtype == torch.bfloat16)
    sizes = (*x.shape, weight.shape[1])
    call(name, half, int(silu), *sizes, x, *x.stride()[:2], state, taps, bias, starts, *outputs)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, starts: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("everlong::short_conv_native_backward", mutates_args=(), device_types="cpu")
def _backward(
    gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, starts: Tensor | None, silu: bool
) -> list[Tensor]:
    """Gradients of x (in its dtype), weight, bias and the state (fp32)."""
    (channels, width), threads = weight.shape, threads_for(x.numel())
    gx, gstate = x.new_empty(x.shape), weight.new_zeros(state.shape)  # the kernel writes it where there are tokens
    gtaps, gbias = weight.new_empty(threads, width, channels), weight.new_empty(threads, channels)
    inputs = (x, weight, bias, state, starts, silu)
    _call("ev_short_conv_backward", inputs, gy.contiguous(), gx, gtaps, gbias, gstate, threads, threads)
    return [gx, gtaps.sum(0).t().contiguous(), gbias.sum(0), gstate]


@_backward.register_fake
def _(
    gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, starts: Tensor | None, silu: bool
) -> list[Tensor]:
    return [x.new_empty(x.shape), *(weight.new_empty(s) for s in (weight.shape, weight.shape[:1], state.shape))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, starts = ctx.saved_tensors
    gx, gweight, gbias, gstate = _backward(gy, x, weight, bias, state, starts, ctx.silu)
    return gx, gweight, None if bias is None else gbias, gstate.to(state.dtype), None, None


_forward.register_autograd(_gradient, setup_context=_setup)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, starts: Tensor | None, activation: str | None
) -> Tensor:
    """y [B T C] in the dtype of x: the kernel, forward and backward. Where x and state differ, in the wider dtype."""
    dtype = torch.promote_types(x.dtype, state.dtype)
    weight, bias = weight.float(), None if bias is None else bias.float().contiguous()
    starts = None if starts is None else starts.contiguous()
    return _forward(x.to(dtype), weight, bias, state.to(dtype), starts, activation == "silu").to(x.dtype)


COLD = 1 << 10  # numbers of a window from which all threads share: one alone would wait for memory that is cold


# ---- one token in a program ----


def lower_step(
    to: Lowering, out: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None = None
) -> None:
    """The instruction of ``short_conv_step``."""
    y, after = out
    if activation not in (None, "silu"):
        raise Unsupported(f"a convolution followed by {activation}")
    batch, window_length, channels = state.shape
    source, taps = to.ref(x.expand(batch, channels)), to.constant(weight.expand(channels, window_length + 1).t())
    shift, window = None if bias is None else to.constant(bias.expand(channels)), to.own(state, after)
    shared = x.numel() >= COLD  # its memory is cold: one thread alone would wait for all of it
    rest = {"numbers": [activation is not None], "shared": shared}
    to.add("conv", (batch, channels, weight.shape[1]), to.new(y), source, taps, shift, window, **rest)
