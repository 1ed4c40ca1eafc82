"""The gates of the RG-LRU as a native kernel, registered so that autograd and torch.compile see through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..transforms import custom_op
from . import call, refusal, threads_for
from .prepare import common_dtype, flat


def refuse(**inputs: Any) -> str | None:
    """Why the kernel cannot run on these inputs, or None."""
    return refusal(inputs)


def _call(name: str, inputs: tuple[Any, ...], *outputs: Tensor | int) -> None:
    x, r, i, r_bias, i_bias, decay, first = inputs
    (a, *r_steps), (b, *i_steps) = _heads(r), _heads(i)
    sizes = (int(x.dtype == torch.bfloat16), first.numel(), *r.shape[-2:])
    fixed = (r_bias, i_bias, decay, first)
    call(name, *sizes, x, a, *r_steps, b, *i_steps, *fixed, *outputs)


def _heads(x: Tensor) -> tuple[Tensor, int, int]:
    """x [... H n] with the steps in memory from token to token and from head to head; copied where there are none."""
    step, expected = 0, 0
    for size, stride in zip(x.shape[-3::-1], x.stride()[-3::-1], strict=True):
        if size > 1 and not step:
            step = expected = stride
        if x.stride(-1) != 1 or (size > 1 and stride != expected):
            return x.contiguous(), x.shape[-2] * x.shape[-1], x.shape[-1]
        expected *= size
    return x, step, x.stride(-2)


@custom_op("everlong::rg_lru_gates_native", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor, r: Tensor, i: Tensor, r_bias: Tensor, i_bias: Tensor, decay: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """g and b [... C], fp32; x [... C], r and i [... H n] in one dtype, the others in fp32."""
    g, b = (x.new_empty(x.shape, dtype=torch.float32) for _ in range(2))
    _call("ev_rg_lru_gates", (x, r, i, r_bias, i_bias, decay, first), g, b, threads_for(x.numel()))
    return g, b


@custom_op("everlong::rg_lru_gates_native_backward", mutates_args=(), device_types="cpu")
def _backward(
    gg: Tensor,
    gb: Tensor,
    x: Tensor,
    r: Tensor,
    i: Tensor,
    r_bias: Tensor,
    i_bias: Tensor,
    decay: Tensor,
    first: Tensor,
) -> list[Tensor]:
    """Gradients of x, r, i (in their dtype), and of r_bias, i_bias and decay, one after the other [3 C] (fp32)."""
    gx, gr, gi = (x.new_empty(part.shape) for part in (x, r, i))
    parts = threads_for(x.numel())
    sums = decay.new_empty(parts, 3, decay.numel())
    inputs = (x, r, i, r_bias, i_bias, decay, first)
    _call("ev_rg_lru_gates_backward", inputs, gg.contiguous(), gb.contiguous(), gx, gr, gi, sums, parts)
    return [gx, gr, gi, sums.sum(0)]


@_forward.register_fake
def _(
    x: Tensor, r: Tensor, i: Tensor, r_bias: Tensor, i_bias: Tensor, decay: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty(x.shape, dtype=torch.float32)


@_backward.register_fake
def _(
    gg: Tensor,
    gb: Tensor,
    x: Tensor,
    r: Tensor,
    i: Tensor,
    r_bias: Tensor,
    i_bias: Tensor,
    decay: Tensor,
    first: Tensor,
) -> list[Tensor]:
    return [*(part.new_empty(part.shape) for part in (x, r, i)), decay.new_empty(3, decay.numel())]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, gg: Tensor, gb: Tensor) -> tuple[Tensor | None, ...]:
    gx, gr, gi, sums = _backward(gg, gb, *ctx.saved_tensors)
    r_bias, i_bias, decay = (part.view(fixed.shape) for part, fixed in zip(sums, ctx.saved_tensors[3:6], strict=True))
    return gx, gr, gi, r_bias, i_bias, decay, None


_forward.register_autograd(_gradient, setup_context=_setup)


def rg_lru_gates_native(
    x: Tensor, r: Tensor, i: Tensor, *, r_bias: Tensor, i_bias: Tensor, decay: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """One pass; the backward pass keeps nothing but the inputs."""
    dtype = common_dtype(x, r, i)
    tokens = (x.to(dtype).contiguous(), r.to(dtype), i.to(dtype))
    return _forward(*tokens, flat(r_bias), flat(i_bias), flat(decay), first.contiguous())
