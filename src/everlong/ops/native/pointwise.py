"""Gated products and norms as native kernels, registered so that autograd and torch.compile see through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..transforms import custom_op
from . import call, refusal, rows, threads_for

ACTIVATIONS = ("silu", "sigmoid", "gelu_tanh", "relu2")  # in the order of pointwise.cpp
PLAIN, GATE_FIRST, GATE_LAST = range(3)


def refuse(**inputs: Any) -> str | None:
    """Why the kernels cannot run on these inputs, or None."""
    return refusal(inputs)


def refuse_gate(**inputs: Any) -> str | None:
    """Why the kernel cannot run on these inputs, or None."""
    if inputs["activation"] not in ACTIVATIONS:
        return f"the kernel has no {inputs['activation']}"
    return refuse(**inputs)


def _is_half(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _layout(x: Tensor, z: Tensor | None, group: int) -> tuple[Any, ...]:
    """Groups of rows, rows of a group, numbers of a row; then for x and z the tensor and the step between groups."""
    x, mine, step = rows(x, group)
    z, theirs, z_step = (None, mine, 0) if z is None else rows(z, group)
    if z is not None and mine != theirs:  # what is contiguous follows the other; else it is made so
        if z.is_contiguous():
            z, _, z_step = rows(z, mine)
        else:
            x, mine, step = rows(x.contiguous(), theirs)
    count = x.numel() // max(1, x.shape[-1])
    return count // max(1, mine), mine, x.shape[-1], x, step, z, z_step


def _call_gate(name: str, x: Tensor, z: Tensor, act: int, *outputs: Tensor) -> None:
    *sizes, a, step, b, z_step = _layout(x, z, 1)
    halves, threads = (_is_half(x), _is_half(z)), threads_for(x.numel())
    call(name, *halves, act, *sizes, a, step, b, z_step, *outputs, threads)


@custom_op("everlong::gate_native", mutates_args=(), device_types="cpu")
def _gate(x: Tensor, z: Tensor, act: int) -> Tensor:
    """x act(z) in the dtype of z."""
    y = _empty(z)
    _call_gate("ev_gate", x, z, act, y)
    return y


@custom_op("everlong::gate_native_backward", mutates_args=(), device_types="cpu")
def _gate_backward(gy: Tensor, x: Tensor, z: Tensor, act: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and z in their dtypes."""
    gx, gz = _empty(x), _empty(z)
    _call_gate("ev_gate_backward", x, z, act, gy.contiguous(), gx, gz)
    return gx, gz


@_gate.register_fake
def _(x: Tensor, z: Tensor, act: int) -> Tensor:
    return z.new_empty(z.shape)


@_gate_backward.register_fake
def _(gy: Tensor, x: Tensor, z: Tensor, act: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), z.new_empty(z.shape)


def _setup_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _gate_gradient(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    return *_gate_backward(gy, *ctx.saved_tensors, ctx.act), None


_gate.register_autograd(_gate_gradient, setup_context=_setup_gate)


def gate_native(x: Tensor, z: Tensor, *, activation: str) -> Tensor:
    """One pass; the backward pass keeps nothing but the inputs."""
    x = x.float() if z.dtype == torch.float32 else x
    return _gate(x, z, ACTIVATIONS.index(activation))


def _call_norm(name: str, inputs: tuple[Any, ...], y_half: int, *outputs: Tensor | int | None) -> None:
    x, z, weight, bias, eps, center, order = inputs
    period = x.shape[-1] if weight is None else weight.numel()
    *sizes, a, step, b, z_step = _layout(x, z, period // max(1, x.shape[-1]))
    flags = (_is_half(x), y_half, order, int(center), eps)
    call(name, *flags, period, *sizes, a, step, b, z_step, weight, bias, *outputs)


@custom_op("everlong::norm_native", mutates_args=(), device_types="cpu")
def _norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    order: int,
    half: bool,
) -> Tensor:
    """y in bf16 with ``half``, else in fp32; z in the dtype of x, weight and bias [period] in fp32."""
    y = x.new_empty(x.shape, dtype=torch.bfloat16 if half else torch.float32)
    _call_norm("ev_norm", (x, z, weight, bias, eps, center, order), int(half), y, threads_for(x.numel()))
    return y


@custom_op("everlong::norm_native_backward", mutates_args=(), device_types="cpu")
def _norm_backward(
    gy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    order: int,
) -> list[Tensor]:
    """Gradients of x, z (in their dtype), weight and bias (fp32)."""
    gx, gz = _empty(x), _empty(x[:0] if z is None else z)
    period, groups = x.shape[-1] if weight is None else weight.numel(), threads_for(x.numel())
    gw, gb = (x.new_empty(groups, period, dtype=torch.float32) for _ in range(2))
    inputs = (x, z, weight, bias, eps, center, order)
    _call_norm("ev_norm_backward", inputs, _is_half(gy), gy.contiguous(), gx, gz, gw, gb, groups)
    return [gx, gz, gw.sum(0), gb.sum(0)]


@_norm.register_fake
def _(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    order: int,
    half: bool,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16 if half else torch.float32)


@_norm_backward.register_fake
def _(
    gy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    order: int,
) -> list[Tensor]:
    period = x.shape[-1] if weight is None else weight.numel()
    gw, gb = (x.new_empty(period, dtype=torch.float32) for _ in range(2))
    return [x.new_empty(x.shape), x.new_empty(x[:0].shape if z is None else z.shape), gw, gb]


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.center, ctx.order, _ = inputs
    ctx.save_for_backward(*tensors)


def _norm_gradient(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    x, z, weight, bias = ctx.saved_tensors
    gx, gz, gw, gb = _norm_backward(gy, x, z, weight, bias, ctx.eps, ctx.center, ctx.order)
    optional = [None if given is None else g for given, g in ((z, gz), (weight, gw), (bias, gb))]
    return gx, *optional, None, None, None, None


_norm.register_autograd(_norm_gradient, setup_context=_setup_norm)


def norm_native(x: Tensor, *, weight: Tensor | None, bias: Tensor | None, eps: float, style: str) -> Tensor:
    """One pass over x; the backward pass keeps nothing but the inputs."""
    return _normed(x, None, weight, bias, eps, style == "layer", PLAIN)


def gated_norm_native(x: Tensor, z: Tensor, *, weight: Tensor | None, eps: float, first: str) -> Tensor:
    """One pass over x and z; the backward pass keeps nothing but the inputs."""
    return _normed(x, z.to(x.dtype), weight, None, eps, False, GATE_FIRST if first == "gate" else GATE_LAST)


def _normed(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    order: int,
) -> Tensor:
    half = (x if weight is None else weight).dtype == torch.bfloat16
    if not half:
        x, z = x.float(), None if z is None else z.float()
    if bias is not None and weight is None:
        weight = torch.ones_like(bias)
    weight, bias = (None if part is None else part.float().flatten() for part in (weight, bias))
    return _norm(x, z, weight, bias, eps, center, order, half)
