"""The native form of each operation that a recorded step may hold. Those of PyTorch by name, then the leaves.

A rule names the arguments that it honours as PyTorch's schema does (``x`` is ``self``); ``guards.options`` refuses all
others unless they are at rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.delta_rule import delta_rule_step
from ..ops.linear import linear
from ..ops.linear_attention import linear_attention_step
from ..ops.native.product import Packed, product, unpack
from ..ops.native.program import Ref
from ..ops.selective_scan import selective_scan_step
from ..ops.short_conv import short_conv_step
from .guards import Unsupported
from .lowering import BIG, WEIGHTS, Lowering, Rules

RULES = Rules({}, {})
SAME = {
    "bitwise_not": "not",
    "logical_not": "not",
    "bitwise_and": "and",
    "logical_and": "and",
    "bitwise_or": "or",
    "logical_or": "or",
}


def _leaf(function: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def note(rule: Callable[..., None]) -> Callable[..., None]:
        RULES.leaves[function] = rule
        return rule

    return note


def _aten(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def note(rule: Callable[..., None]) -> Callable[..., None]:
        RULES.aten.update(dict.fromkeys(names, rule))
        return rule

    return note


@_aten("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sigmoid", "silu", "tanh", "relu")
@_aten("sin", "cos", "bitwise_not", "logical_not")
def _unary(to: Lowering, name: str, out: Tensor, x: Tensor) -> None:
    to.elementwise(SAME.get(name, name), out, x)


@_aten("clone", "_to_copy")
def _converted(to: Lowering, name: str, out: Tensor, x: Tensor) -> None:
    """What the values of a program may be (``Lowering.dtypes``) keeps its digits in fp32; truth is ``x != 0``."""
    if out.dtype == torch.bool and x.dtype != torch.bool:
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
    _look_up(to, out, indices, [weight.detach().contiguous()], (WEIGHTS.get(weight.dtype, -1), *weight.shape))


def _look_up(to: Lowering, out: Tensor, tokens: Tensor, raw: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """Rows of a matrix of any format: those of the token ids, which ``run`` is given."""
    if not to.is_tokens(tokens) or not tokens.is_contiguous() or numbers[0] < 0:
        raise Unsupported("a table that is looked up by something else than token ids")
    to.add("embed", (tokens.numel(),), to.new(out), numbers=numbers, raw=raw)


# ---- the leaves: their arguments by name, as in ops/*.py ----


@_leaf(linear)
def _linear(to: Lowering, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    to.linear(out, x, weight, bias)


@_leaf(product)
def _product(to: Lowering, out: Tensor, x: Tensor, packed: Packed) -> None:
    raw = [packed.weight] if packed.scale is None else [packed.weight, packed.scale]
    to.product(out, x, packed.kind, raw, (packed.out, packed.width))


@_leaf(unpack)
def _unpack(to: Lowering, out: Tensor, packed: Packed, rows: Tensor, dtype: Any) -> None:
    raw = [packed.weight] if packed.scale is None else [packed.weight, packed.scale]
    _look_up(to, out, rows, raw, (packed.kind, packed.out, packed.width))


@_leaf(short_conv_step)
def _short_conv_step(
    to: Lowering, out: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None = None
) -> None:
    y, after = out
    if activation not in (None, "silu"):
        raise Unsupported(f"a convolution followed by {activation}")
    batch, window_length, channels = state.shape
    source, taps = to.ref(x.expand(batch, channels)), to.constant(weight.expand(channels, window_length + 1).t())
    shift, window = None if bias is None else to.constant(bias.expand(channels)), to.own(state, after)
    shared = x.numel() >= BIG // 16  # its memory is cold: one thread alone would wait for all of it
    rest = {"numbers": [activation is not None], "shared": shared}
    to.add("conv", (batch, channels, weight.shape[1]), to.new(y), source, taps, shift, window, **rest)


@_leaf(selective_scan_step)
def _selective_scan_step(
    to: Lowering,
    out: Any,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
) -> None:
    y, after = out
    batch, channels, keys = state.shape
    x, dt, A = x.expand(batch, channels), dt.expand(batch, channels), A.expand(channels, keys)
    step = to.ref(dt)
    if dt_bias is not None:
        given, step = step, to.temporary(dt.shape)
        to.map("add", dt.shape, step, [given, to.repeat(dt_bias, dt.shape)])
        to.map("softplus", dt.shape, step, [step])
    tokens = [to.ref(x), step, *(_lined(to, t.expand(batch, keys)) for t in (B, C))]
    fixed = [to.constant(A), None if D is None else to.constant(D.expand(channels))]
    memory = to.own(state, after)
    to.add("scan", state.shape, to.new(y), *tokens, *fixed, memory, shared=True)


@_leaf(linear_attention_step)
def _linear_attention_step(
    to: Lowering,
    out: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    state: Tensor,
) -> None:
    y, after = out
    batch, heads, keys, values = state.shape
    groups = q.shape[1]
    if heads % groups:
        raise Unsupported(f"{heads} heads that share {groups} queries")
    tokens = _heads(to, (q, k), (batch, groups, keys)) + _heads(to, (v,), (batch, heads, values))
    tokens += _heads(to, (g,), (batch, heads, keys))
    extra = None if bonus is None else to.constant(bonus.expand(heads, keys))
    memory, gates = to.own(state, after), 0 if g is None else g.dim() - 1
    to.add("attend", state.shape, to.new(y), *tokens, extra, memory, numbers=[gates, groups], shared=True)


@_leaf(delta_rule_step)
def _delta_rule_step(
    to: Lowering,
    out: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor | None,
    g: Tensor | None,
    state: Tensor,
) -> None:
    y, after = out
    batch, heads, keys, values = state.shape
    tokens = _heads(to, (q, k), (batch, heads, keys)) + _heads(to, (v,), (batch, heads, values))
    tokens += _heads(to, (a, b, g), (batch, heads, keys))
    memory, gates = to.own(state, after), 0 if g is None else g.dim() - 1
    to.add("delta", state.shape, to.new(y), *tokens, memory, numbers=[gates], shared=True)


def _heads(to: Lowering, given: Sequence[Tensor | None], shape: tuple[int, int, int]) -> list[Ref | None]:
    """Where q, k, v or gates of the heads lie; a gate may be one for all keys."""
    return [None if t is None else to.ref(t.expand(shape[: t.dim()])) for t in given]


def _lined(to: Lowering, x: Tensor) -> Ref:
    """Where x lies, its last axis number by number."""
    return to.ref(x) if x.stride(-1) == 1 else to.dense(x)
