"""The generalised delta rule as a native kernel, registered so that autograd and torch.compile see through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..transforms import custom_op
from . import call, refusal
from .prepare import common_dtype, flat, total, wants_gradient

if TYPE_CHECKING:
    from .lowering import Lowering

EVERY = 16  # tokens between two states kept for the backward pass
LANES = 64  # values of a block, as in heads.h


def refuse(**inputs: Any) -> str | None:
    """Why the kernel cannot run on these inputs, or None."""
    return refusal(inputs)


def _sizes(q: Tensor, v: Tensor, g: Tensor | None) -> tuple[int, ...]:
    """Whether inputs are bf16, B, T, H, K, V, whether the decay is per key: the first arguments of both kernels."""
    batch, time, heads, keys = q.shape
    per_key = int(g is not None and g.dim() == 4)
    return int(q.dtype == torch.bfloat16), batch, time, heads, keys, v.shape[3], per_key


def _kept(time: int, keep: bool) -> int:
    return -(-time // EVERY) if keep else 0


@custom_op("everlong::delta_rule_native", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor | None,
    g: Tensor | None,
    state: Tensor,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, final state, and for the backward pass (else empty) the states at every 16th token and all a^T S."""
    (batch, time, heads, keys), values = q.shape, v.shape[3]
    y, final = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)
    kept = state.new_empty(batch, _kept(time, keep), heads, keys, values)
    u = state.new_empty(batch, time if keep else 0, heads, values)
    threads = torch.get_num_threads()
    call(
        "ev_delta_rule",
        *_sizes(q, v, g),
        q,
        k,
        v,
        a,
        b,
        g,
        state,
        starts,
        y,
        final,
        kept,
        u if keep else None,
        EVERY if keep else 0,
        min(heads * -(-values // LANES), max(4, 2 * threads)),
        threads,
    )
    return y, final, kept, u


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor | None,
    g: Tensor | None,
    state: Tensor,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, time), (heads, values) = q.shape[:2], v.shape[2:]
    kept = state.new_empty(batch, _kept(time, keep), *state.shape[1:])
    return (
        torch.empty_like(v),
        torch.empty_like(state),
        kept,
        state.new_empty(batch, time if keep else 0, heads, values),
    )


@custom_op("everlong::delta_rule_native_backward", mutates_args=(), device_types="cpu")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor | None,
    g: Tensor | None,
    kept: Tensor,
    u: Tensor,
    starts: Tensor | None,
    gy: Tensor,
    gfinal: Tensor,
) -> list[Tensor]:
    """Gradients of q, k, a, b, g (empty where absent) and the initial state in fp32, and of v in its dtype."""
    heads, blocks, threads = q.shape[2], -(-v.shape[3] // LANES), torch.get_num_threads()
    parts = min(blocks, -(-2 * threads // heads))
    gv, gstate = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(gfinal)
    gq, gk, ga = (gfinal.new_empty(parts, *q.shape) for _ in range(3))
    gb = gfinal.new_empty(parts, *((0,) if b is None else b.shape))
    gg = gfinal.new_empty(parts, *((0,) if g is None else g.shape))
    call(
        "ev_delta_rule_backward",
        *_sizes(q, v, g),
        q,
        k,
        v,
        a,
        b,
        g,
        starts,
        kept,
        u,
        EVERY,
        gy,
        gfinal,
        gv,
        gq,
        gk,
        ga,
        gb,
        gg,
        gstate,
        parts,
        threads,
    )
    return [total(gq), total(gk), gv, total(ga), total(gb), total(gg), gstate]


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor | None,
    g: Tensor | None,
    kept: Tensor,
    u: Tensor,
    starts: Tensor | None,
    gy: Tensor,
    gfinal: Tensor,
) -> list[Tensor]:
    gb, gg = (gfinal.new_empty((0,) if x is None else x.shape) for x in (b, g))
    gq, gk, ga = (gfinal.new_empty(q.shape) for _ in range(3))
    return [gq, gk, torch.empty_like(v), ga, gb, gg, torch.empty_like(gfinal)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, a, b, g, _, starts, _ = inputs
    ctx.save_for_backward(q, k, v, a, b, g, *output[2:], starts)


def _gradient(ctx: Any, gy: Tensor, gfinal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, a, b, g, kept, u, starts = ctx.saved_tensors
    assert kept.shape[1] or not q.shape[1], "no states were kept for the backward pass"
    gy = gy.to(v.dtype).contiguous()
    gq, gk, gv, ga, gb, gg, gstate = _backward(q, k, v, a, b, g, kept, u, starts, gy, gfinal.contiguous())
    half = q.dtype
    return (
        gq.to(half),
        gk.to(half),
        gv,
        ga.to(half),
        None if b is None else gb.to(half),
        None if g is None else gg,
        gstate,
        None,
        None,
    )


_forward.register_autograd(_gradient, setup_context=_setup)


def delta_rule_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    g: Tensor | None = None,
    *,
    state: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel, forward and backward. q, k, v, a, b in bf16 are read as they are where all are; the rest is fp32."""
    dtype = common_dtype(*(x for x in (q, k, v, a, b) if x is not None))
    keep = wants_gradient(q, k, v, a, b, g, state)
    wide = (flat(x, dtype) for x in (q, k, v, a, b))
    y, final, _, _ = _forward(*wide, flat(g), flat(state), None if starts is None else starts.contiguous(), keep)
    return y.to(v.dtype), final


# ---- one token in a program ----


def lower_step(
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
    """The instruction of ``delta_rule_step``."""
    y, after = out
    batch, heads, keys, values = state.shape
    tokens = to.heads((q, k), (batch, heads, keys)) + to.heads((v,), (batch, heads, values))
    tokens += to.heads((a, b, g), (batch, heads, keys))
    memory, gates = to.own(state, after), 0 if g is None else g.dim() - 1
    to.add("delta", state.shape, to.new(y), *tokens, memory, numbers=[gates], shared=True)
