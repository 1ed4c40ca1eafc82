"""The native form of each operation that a recorded step may hold. Those of PyTorch by name, then the leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops.native.product import Packed
from .lowering import BIG, TOKENS, WEIGHTS, Lowering, Unsupported, _aten, _leaf

SAME = {
    "bitwise_not": "not",
    "logical_not": "not",
    "bitwise_and": "and",
    "logical_and": "and",
    "bitwise_or": "or",
    "logical_or": "or",
    "clone": "copy",
    "_to_copy": "copy",
    "contiguous": "copy",
}


@_aten("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sigmoid", "silu", "tanh", "relu")
@_aten("sin", "cos", "bitwise_not", "logical_not", "clone", "_to_copy")
def _unary(to: Lowering, name: str, out: Tensor, x: Tensor, **ignored: Any) -> None:
    to.elementwise(SAME.get(name, name), out, x)


@_aten("mul")
def _mul(to: Lowering, name: str, out: Tensor, x: Any, y: Any) -> None:
    if not out.is_complex():
        return to.elementwise("mul", out, x, y)
    (re, im), (a, b), (c, d) = to.new_parts(out), to.parts(x, out.shape), to.parts(y, out.shape)
    for target, first, second, sign in ((re, (a, c), (b, d), "sub"), (im, (a, d), (b, c), "add")):
        to.map("mul", out.shape, target, first)
        if to.zero.buffer not in (b.buffer, d.buffer):
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
def _binary(to: Lowering, name: str, out: Tensor, x: Any, y: Any) -> None:
    to.elementwise(SAME.get(name, name), out, x, y)


@_aten("add", "sub")
def _sum(to: Lowering, name: str, out: Tensor, x: Any, y: Any, *, alpha: float = 1) -> None:
    if alpha != 1:
        raise Unsupported(f"{name} with a factor")
    if not out.is_complex():
        return to.elementwise(name, out, x, y)
    for target, a, b in zip(to.new_parts(out), to.parts(x, out.shape), to.parts(y, out.shape), strict=True):
        to.map(name, out.shape, target, (a, b))
    return None


@_aten("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full")
def _constant(to: Lowering, name: str, out: Tensor, *args: Any, **rest: Any) -> None:
    """What does not depend on the numbers of its input stays a constant."""


@_aten("rsub")
def _rsub(to: Lowering, name: str, out: Tensor, x: Any, y: Any, alpha: float = 1) -> None:
    _sum(to, "sub", out, y, x, alpha=alpha)


@_aten("div")
def _div(to: Lowering, name: str, out: Tensor, x: Any, y: Any, *, rounding_mode: str | None = None) -> None:
    if rounding_mode is not None:
        raise Unsupported("division with rounding")
    to.elementwise("div", out, x, y)


@_aten("pow")
def _pow(to: Lowering, name: str, out: Tensor, x: Any, power: Any) -> None:
    if isinstance(power, Tensor) or not isinstance(x, Tensor):
        raise Unsupported("a power that depends on the token")
    to.elementwise("power", out, x, scalars=[power])


@_aten("square")
def _square(to: Lowering, name: str, out: Tensor, x: Tensor) -> None:
    to.elementwise("mul", out, x, x)


@_aten("gelu")
def _gelu(to: Lowering, name: str, out: Tensor, x: Tensor, *, approximate: str = "none") -> None:
    to.elementwise("gelu" if approximate == "none" else "gelu_tanh", out, x)


@_aten("softplus")
def _softplus(to: Lowering, name: str, out: Tensor, x: Tensor, beta: float = 1, threshold: float = 20) -> None:
    if abs(beta) != 1:
        raise Unsupported("softplus with a factor")
    to.elementwise("softplus" if beta == 1 else "log_sigmoid", out, x)


@_aten("log_sigmoid_forward")
def _log_sigmoid(to: Lowering, name: str, out: tuple[Tensor, Tensor], x: Tensor) -> None:
    to.elementwise("log_sigmoid", out[0], x)


@_aten("elu")
def _elu(to: Lowering, name: str, out: Tensor, x: Tensor, *factors: float) -> None:
    if any(f != 1 for f in factors):
        raise Unsupported("elu with factors")
    to.elementwise("elu", out, x)


@_aten("clamp", "clamp_min", "clamp_max")
def _clamp(to: Lowering, name: str, out: Tensor, x: Tensor, low: Any = None, high: Any = None) -> None:
    low, high = (None, low) if name == "clamp_max" else (low, high)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        raise Unsupported("clamp between tensors")
    bounds = [-math.inf if low is None else low, math.inf if high is None else high]
    to.elementwise("clamp", out, x, scalars=bounds)


@_aten("where")
def _where(to: Lowering, name: str, out: Tensor, mask: Tensor, yes: Any, no: Any) -> None:
    to.elementwise("where", out, mask, yes, no)


@_aten("masked_fill")
def _masked_fill(to: Lowering, name: str, out: Tensor, x: Tensor, mask: Tensor, value: Any) -> None:
    to.elementwise("where", out, mask, value, x)


@_aten("addcmul")
def _addcmul(to: Lowering, name: str, out: Tensor, x: Tensor, y: Tensor, z: Tensor, *, value: float = 1) -> None:
    if value != 1:
        raise Unsupported("addcmul with a factor")
    to.elementwise("addcmul", out, x, y, z)


@_aten("copy")
def _copy(to: Lowering, name: str, out: Tensor, x: Tensor, source: Tensor, non_blocking: bool = False) -> None:
    if not to.known(x):
        raise Unsupported("writing into a constant")
    to.elementwise("copy", out, source)


@_aten("cat")
def _cat(to: Lowering, name: str, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> None:
    to.new(out)
    for part, space in zip(parts, out.split([p.shape[dim] for p in parts], dim), strict=True):
        if part.numel():
            to.elementwise("copy", space, part)


@_aten("stack")
def _stack(to: Lowering, name: str, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> None:
    to.new(out)
    for part, space in zip(parts, out.unbind(dim), strict=True):
        to.elementwise("copy", space, part)


@_aten("sum", "mean", "amax")
def _reduce(
    to: Lowering, name: str, out: Tensor, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> None:
    to.reduce("max" if name == "amax" else name, out, x, [dims] if isinstance(dims, int) else list(dims or []))


@_aten("linalg_vector_norm")
def _norm(
    to: Lowering, name: str, out: Tensor, x: Tensor, order: float = 2, dims: Any = None, *args: Any, **rest: Any
) -> None:
    if order != 2:
        raise Unsupported("a norm other than the second")
    to.reduce("norm", out, x, list(dims or []))


@_aten("glu")
def _glu(to: Lowering, name: str, out: Tensor, x: Tensor, dim: int = -1) -> None:
    value, gate = x.chunk(2, dim)
    to.elementwise("sigmoid", out, gate)
    to.elementwise("mul", out, out, value)


@_aten("native_layer_norm")
def _layer_norm(
    to: Lowering, name: str, out: Any, x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> None:
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
def _mm(to: Lowering, name: str, out: Tensor, a: Tensor, b: Tensor) -> None:
    if to.known(b):
        to.matmul(out[None], a[None], b[None])
    else:
        to.linear(out, a, b.t(), None)


@_aten("addmm")
def _addmm(to: Lowering, name: str, out: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> None:
    _mm(to, name, out, a, b)
    to.elementwise("add", out, out, bias)


@_aten("bmm")
def _bmm(to: Lowering, name: str, out: Tensor, a: Tensor, b: Tensor) -> None:
    to.new(out)
    to.matmul(out, a, b)


@_aten("embedding")
def _embedding(to: Lowering, name: str, out: Tensor, weight: Tensor, tokens: Tensor, *rest: Any) -> None:
    _look_up(to, out, tokens, [weight.detach().contiguous()], (WEIGHTS.get(weight.dtype, -1), *weight.shape))


def _look_up(to: Lowering, out: Tensor, tokens: Tensor, raw: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """Rows of a matrix of any format: those of the token ids, which ``run`` is given."""
    if to.places[tokens.untyped_storage().data_ptr()] is not TOKENS or numbers[0] < 0:
        raise Unsupported("a table that is looked up by something else than token ids")
    to.add("embed", (tokens.numel(),), to.new(out), numbers=numbers, raw=raw)


# ---- the leaves: their arguments by name, as in ops/*.py ----


@_leaf
def _linear(to: Lowering, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    to.linear(out, x, weight, bias)


@_leaf
def _product(to: Lowering, out: Tensor, x: Tensor, packed: Packed) -> None:
    raw = [packed.weight] if packed.scale is None else [packed.weight, packed.scale]
    to.product(out, x, packed.kind, raw, (packed.out, packed.width))


@_leaf
def _unpack(to: Lowering, out: Tensor, packed: Packed, rows: Tensor, dtype: Any) -> None:
    raw = [packed.weight] if packed.scale is None else [packed.weight, packed.scale]
    _look_up(to, out, rows, raw, (packed.kind, packed.out, packed.width))


@_leaf
def _short_conv_step(
    to: Lowering, out: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None = None
) -> None:
    y, after = out
    if activation not in (None, "silu"):
        raise Unsupported(f"a convolution followed by {activation}")
    source, taps = to.ref(x), to.constant(weight.t())
    shift, window = None if bias is None else to.constant(bias), to.own(state, after)
    shared = x.numel() >= BIG // 16  # its memory is cold: one thread alone would wait for all of it
    rest = {"numbers": [activation is not None], "shared": shared}
    to.add("conv", (*x.shape, weight.shape[1]), to.new(y), source, taps, shift, window, **rest)


@_leaf
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
    step = to.ref(dt)
    if dt_bias is not None:
        given, step = step, to.temporary(dt.shape)
        to.map("add", dt.shape, step, [given, to.repeat(dt_bias, dt.shape)])
        to.map("softplus", dt.shape, step, [step])
    tokens = [to.ref(x), step, *(to.ref(t) if t.stride(-1) == 1 else to.dense(t) for t in (B, C))]
    fixed = [to.constant(A), None if D is None else to.constant(D)]
    memory = to.own(state, after)
    to.add("scan", (*x.shape, A.shape[1]), to.new(y), *tokens, *fixed, memory, shared=True)


@_leaf
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
    tokens = [None if t is None else to.ref(t) for t in (q, k, v, g)]
    extra = None if bonus is None else to.constant(bonus)
    memory, gates = to.own(state, after), 0 if g is None else g.dim() - 1
    _check_keys(state)
    to.add("attend", state.shape, to.new(y), *tokens, extra, memory, numbers=[gates, q.shape[1]], shared=True)


@_leaf
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
    tokens = [None if t is None else to.ref(t) for t in (q, k, v, a, b, g)]
    memory, gates = to.own(state, after), 0 if g is None else g.dim() - 1
    _check_keys(state)
    to.add("delta", state.shape, to.new(y), *tokens, memory, numbers=[gates], shared=True)


def _check_keys(state: Tensor) -> None:
    if state.shape[2] > 1024:
        raise Unsupported("heads with more than 1024 keys")
