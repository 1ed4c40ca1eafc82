"""The native form of each operation of PyTorch that a recorded step may hold, by name.

A rule names the arguments that it honours as PyTorch's schema does (``x`` is ``self``); ``guards.options`` refuses all
others unless they are at rest. Functions marked with ``leaf`` carry their own form (``ops/record.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .guards import Unsupported
from .lowering import WEIGHTS, Lowering

RULES: dict[str, Callable[..., None]] = {}
SAME = {
    "bitwise_not": "not",
    "logical_not": "not",
    "bitwise_and": "and",
    "logical_and": "and",
    "bitwise_or": "or",
    "logical_or": "or",
}


def _aten(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def note(rule: Callable[..., None]) -> Callable[..., None]:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return note


@_aten("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sigmoid", "silu", "tanh", "relu")
@_aten("sin", "cos", "bitwise_not", "logical_not")
def _unary(to: Lowering, name: str, out: Tensor, x: Tensor) -> None:
    to.elementwise(SAME.get(name, name), out, x)


@_aten("clone", "_to_copy")
def _converted(to: Lowering, name: str, out: Tensor, x: Tensor) -> None:
    """What the values of a program may be (``Lowering.dtypes``) keeps its digits in fp32; truth is ``x != 0``."""
    if x.dtype == torch.int64 and out.dtype == torch.int64:
        to.count(out, x, 0)
    elif x.dtype == torch.int64 and out.dtype == torch.float32 and out.is_contiguous():
        to.add("number", (out.numel(),), to.new(out), to.counts(x))
    elif out.dtype == torch.bool and x.dtype != torch.bool:
        to.elementwise("ne", out, x, 0)
    else:
        to.elementwise("copy", out, x)


@_aten("mul")
def _mul(to: Lowering, name: str, out: Tensor, x: Any, other: Any) -> None:
    if not out.is_complex():
        return to.elementwise("mul", out, x, other)
    (re, im), (a, b), (c, d) = to.new_parts(out), to.parts(x, out.shape), to.parts(other, out.shape)
    for target, first, second, sign in ((re, (a, c), (b, d), "sub"), (im, (a, d), (b, c), "add")):
        to.map("mul", out.shape, target, first)
        if to.zero.buffer not in (second[0].buffer, second[1].buffer):
            product = to.temporary(out.shape)
            to.map("mul", out.shape, product, second)
            to.map(sign, out.shape, target, (target, product))
    return None


@_aten("complex")
def _complex(to: Lowering, name: str, out: Tensor, real: Tensor, imag: Tensor) -> None:
    for target, part in zip(to.new_parts(out), (real, imag), strict=True):
        to.map("copy", out.shape, target, [to.parts(part, out.shape)[0]])


@_aten("maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne")
@_aten("bitwise_and", "logical_and", "bitwise_or", "logical_or")
def _binary(to: Lowering, name: str, out: Tensor, x: Any, other: Any) -> None:
    to.elementwise(SAME.get(name, name), out, x, other)


@_aten("add", "sub")
def _sum(to: Lowering, name: str, out: Tensor, x: Any, other: Any) -> None:
    if out.dtype == torch.int64 and isinstance(x, Tensor) and type(other) is int:
        return to.count(out, x, other if name == "add" else -other)
    if not out.is_complex():
        return to.elementwise(name, out, x, other)
    parts = to.parts(x, out.shape), to.parts(other, out.shape)
    for target, a, b in zip(to.new_parts(out), *parts, strict=True):
        to.map(name, out.shape, target, (a, b))
    return None


@_aten("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full")
def _constant(to: Lowering, name: str, out: Tensor, x: Tensor, size: Any = None, fill_value: Any = None) -> None:
    """What does not depend on the numbers of its input stays a constant."""


@_aten("rsub")
def _rsub(to: Lowering, name: str, out: Tensor, x: Any, other: Any) -> None:
    _sum(to, "sub", out, other, x)


@_aten("div")
def _div(to: Lowering, name: str, out: Tensor, x: Any, other: Any) -> None:
    to.elementwise("div", out, x, other)


@_aten("pow")
def _pow(to: Lowering, name: str, out: Tensor, x: Any, exponent: Any) -> None:
    if isinstance(exponent, Tensor) or not isinstance(x, Tensor):
        raise Unsupported("a power that is a tensor")
    to.elementwise("power", out, x, scalars=[exponent])


@_aten("square")
def _square(to: Lowering, name: str, out: Tensor, x: Tensor) -> None:
    to.elementwise("mul", out, x, x)


@_aten("gelu")
def _gelu(to: Lowering, name: str, out: Tensor, x: Tensor, approximate: str = "none") -> None:
    to.elementwise("gelu" if approximate == "none" else "gelu_tanh", out, x)


@_aten("softplus")
def _softplus(to: Lowering, name: str, out: Tensor, x: Tensor, beta: float = 1, threshold: float = 20) -> None:
    if abs(beta) != 1 or threshold < 16:  # beyond 16 the function and the straight line are one in fp32
        raise Unsupported(f"softplus with beta {beta} and threshold {threshold}")
    to.elementwise("softplus" if beta == 1 else "log_sigmoid", out, x)


@_aten("log_sigmoid_forward")
def _log_sigmoid(to: Lowering, name: str, out: tuple[Tensor, Tensor], x: Tensor) -> None:
    to.elementwise("log_sigmoid", out[0], x)


@_aten("elu")
def _elu(to: Lowering, name: str, out: Tensor, x: Tensor) -> None:
    to.elementwise("elu", out, x)


@_aten("clamp", "clamp_min", "clamp_max")
def _clamp(to: Lowering, name: str, out: Tensor, x: Tensor, min: Any = None, max: Any = None) -> None:
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    if isinstance(low, Tensor) or isinstance(high, Tensor) or math.isnan(low) or math.isnan(high):
        raise Unsupported("clamp between tensors")
    to.elementwise("clamp", out, x, scalars=[low if low < high else high, high])  # PyTorch applies the upper bound last


@_aten("where")
def _where(to: Lowering, name: str, out: Tensor, condition: Tensor, x: Any, other: Any) -> None:
    to.elementwise("where", out, condition, x, other)


@_aten("masked_fill")
def _masked_fill(to: Lowering, name: str, out: Tensor, x: Tensor, mask: Tensor, value: Any) -> None:
    to.elementwise("where", out, mask, value, x)


@_aten("addcmul")
def _addcmul(to: Lowering, name: str, out: Tensor, x: Tensor, tensor1: Tensor, tensor2: Tensor) -> None:
    to.elementwise("addcmul", out, x, tensor1, tensor2)


@_aten("copy")
def _copy(to: Lowering, name: str, out: Tensor, x: Tensor, src: Tensor) -> None:
    _converted(to, name, out, src)


@_aten("cat")
def _cat(to: Lowering, name: str, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    to.new(out)
    parts = [part for part in tensors if part.numel()]
    for part, space in zip(parts, out.split([p.shape[dim] for p in parts], dim), strict=True):
        to.elementwise("copy", space, part)


@_aten("stack")
def _stack(to: Lowering, name: str, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    to.new(out)
    for part, space in zip(tensors, out.unbind(dim), strict=True):
        to.elementwise("copy", space, part)


@_aten("sum", "mean", "amax")
def _reduce(to: Lowering, name: str, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False) -> None:
    to.reduce("max" if name == "amax" else name, out, x, [dim] if isinstance(dim, int) else list(dim or []))


@_aten("linalg_vector_norm")
def _norm(to: Lowering, name: str, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False) -> None:
    to.reduce("norm", out, x, [dim] if isinstance(dim, int) else list(dim or []))


@_aten("glu")
def _glu(to: Lowering, name: str, out: Tensor, x: Tensor, dim: int = -1) -> None:
    value, gate = x.chunk(2, dim)
    to.elementwise("sigmoid", out, gate)
    to.elementwise("mul", out, out, value)


@_aten("native_layer_norm")
def _layer_norm(
    to: Lowering,
    name: str,
    out: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Any,
    bias: Any,
    eps: float,
) -> None:
    x, shape = input, normalized_shape
    if len(shape) != 1:
        raise Unsupported("a layer norm over several axes")
    y, mean, scale = out  # mean and scale keep the normalised axis, of size 1
    to.reduce("mean", mean, x, [-1])
    to.elementwise("sub", y, x, mean)
    to.reduce("norm", scale, y, [-1])
    for step, factor in (("mul", shape[0] ** -0.5), ("power", 2.0), ("add", eps)):
        scalars, others = ([factor], []) if step == "power" else ([], [factor])
        to.elementwise(step, scale, scale, *others, scalars=scalars)
    to.elementwise("rsqrt", scale, scale)
    to.elementwise("mul", y, y, scale)
    if weight is not None:
        to.elementwise("mul", y, y, weight)
    if bias is not None:
        to.elementwise("add", y, y, bias)


@_aten("mm")
def _mm(to: Lowering, name: str, out: Tensor, x: Tensor, mat2: Tensor) -> None:
    if to.known(mat2):
        to.matmul(out[None], x[None], mat2[None])
    else:
        to.linear(out, x, mat2.t(), None)


@_aten("addmm")
def _addmm(to: Lowering, name: str, out: Tensor, x: Tensor, mat1: Tensor, mat2: Tensor) -> None:
    _mm(to, name, out, mat1, mat2)
    to.elementwise("add", out, out, x)


@_aten("bmm")
def _bmm(to: Lowering, name: str, out: Tensor, x: Tensor, mat2: Tensor) -> None:
    to.matmul(out, x, mat2)


@_aten("embedding")
def _embedding(to: Lowering, name: str, out: Tensor, weight: Tensor, indices: Tensor) -> None:
    if to.known(weight):
        raise Unsupported("a table that depends on the token")
    to.look_up(out, indices, [weight.detach().contiguous()], (WEIGHTS.get(weight.dtype, -1), *weight.shape))
