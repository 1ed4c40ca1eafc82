"""Linear attention with decay as a native kernel, registered so that autograd and torch.compile see through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..transforms import custom_op
from . import call, refusal
from .guards import Unsupported
from .prepare import common_dtype, flat, total, wants_gradient

if TYPE_CHECKING:
    from .lowering import Lowering

EVERY = 64  # tokens between two states kept for the backward pass, a multiple of the kernel's chunk of 16
LANES = 64  # values of a block, as in heads.h


def refuse(**inputs: Any) -> str | None:
    """Why the kernel cannot run on these inputs, or None."""
    return refusal(inputs)


def _sizes(q: Tensor, v: Tensor, g: Tensor | None) -> tuple[int, ...]:
    """Whether inputs are bf16, B, T, G, H, K, V, whether the decay is per key: the first arguments of both kernels."""
    batch, time, groups, keys = q.shape
    per_key = int(g is not None and g.dim() == 4)
    return int(q.dtype == torch.bfloat16), batch, time, groups, v.shape[2], keys, v.shape[3], per_key


def _kept(time: int, keep: bool) -> int:
    return -(-time // EVERY) if keep else 0


def _blocks(v: Tensor) -> int:
    return -(-v.shape[3] // LANES)


@custom_op("everlong::linear_attention_native", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    state: Tensor,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, final state, and the states at every 64th token (none unless ``keep``)."""
    y, final = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)
    kept = state.new_empty(q.shape[0], _kept(q.shape[1], keep), *state.shape[1:])
    call(
        "ev_linear_attention",
        *_sizes(q, v, g),
        q,
        k,
        v,
        g,
        bonus,
        state,
        starts,
        y,
        final,
        kept,
        EVERY if keep else 0,
        min(v.shape[2] * _blocks(v), max(4, 2 * torch.get_num_threads())),
        torch.get_num_threads(),
    )
    return y, final, kept


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    state: Tensor,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = state.new_empty(q.shape[0], _kept(q.shape[1], keep), *state.shape[1:])
    return torch.empty_like(v), torch.empty_like(state), kept


@custom_op("everlong::linear_attention_native_backward", mutates_args=(), device_types="cpu")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    kept: Tensor,
    starts: Tensor | None,
    gy: Tensor,
    gfinal: Tensor,
) -> list[Tensor]:
    """Gradients of v (in its dtype), and in fp32 of q, k, g, bonus (empty where absent) and the initial state."""
    groups, heads, keys = q.shape[2], v.shape[2], q.shape[3]
    blocks, threads = _blocks(v), torch.get_num_threads()
    parts = min(heads // groups * blocks, max(4, threads))
    gv, gstate = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(gfinal)
    gq, gk = (gfinal.new_empty(parts, *q.shape) for _ in range(2))
    gg = gfinal.new_empty(blocks, *(v.shape[:3] if g is None else g.shape))
    gbonus = gfinal.new_empty(blocks, q.shape[0], 0 if bonus is None else heads, keys)
    call(
        "ev_linear_attention_backward",
        *_sizes(q, v, g),
        q,
        k,
        v,
        g,
        bonus,
        starts,
        kept,
        EVERY,
        gy,
        gfinal,
        gv,
        gq,
        gk,
        gg,
        gbonus,
        gstate,
        parts,
        threads,
    )
    return [total(gq), total(gk), gv, total(gg)[: 0 if g is None else None], gbonus.sum((0, 1)), gstate]


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    kept: Tensor,
    starts: Tensor | None,
    gy: Tensor,
    gfinal: Tensor,
) -> list[Tensor]:
    gate = (0, *v.shape[1:3]) if g is None else g.shape
    lent = (0, q.shape[3]) if bonus is None else bonus.shape
    gq, gk, gg, gbonus = (gfinal.new_empty(shape) for shape in (q.shape, k.shape, gate, lent))
    return [gq, gk, torch.empty_like(v), gg, gbonus, torch.empty_like(gfinal)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, bonus, _, starts, _ = inputs
    ctx.save_for_backward(q, k, v, g, bonus, output[2], starts)


def _gradient(ctx: Any, gy: Tensor, gfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, g, bonus, kept, starts = ctx.saved_tensors
    assert kept.shape[1] or not q.shape[1], "no states were kept for the backward pass"
    gy = gy.to(v.dtype).contiguous()
    gq, gk, gv, gg, gbonus, gstate = _backward(q, k, v, g, bonus, kept, starts, gy, gfinal.contiguous())
    half = q.dtype
    return (
        gq.to(half),
        gk.to(half),
        gv,
        None if g is None else gg,
        None if bonus is None else gbonus,
        gstate,
        None,
        None,
    )


_forward.register_autograd(_gradient, setup_context=_setup)


def linear_attention_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    state: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel, forward and backward. q, k, v in bf16 are read as they are where all three are; the rest is fp32."""
    if bonus is not None and (g is None or g.dim() == 3):  # the kernel reads a bonus beside a decay per key
        g = q.new_zeros(q.shape, dtype=torch.float32) if g is None else g[..., None].expand_as(q)
    dtype, keep = common_dtype(q, k, v), wants_gradient(q, k, v, g, bonus, state)
    fixed = (flat(g), flat(bonus), flat(state), None if starts is None else starts.contiguous())
    y, final, _ = _forward(*(x.to(dtype).contiguous() for x in (q, k, v)), *fixed, keep)
    return y.to(v.dtype), final


# ---- one token in a program ----


def lower_step(
    to: Lowering,
    out: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    state: Tensor,
) -> None:
    """The instruction of ``linear_attention_step``."""
    y, after = out
    batch, heads, keys, values = state.shape
    groups = q.shape[1]
    if heads % groups:
        raise Unsupported(f"{heads} heads that share {groups} queries")
    tokens = to.heads((q, k), (batch, groups, keys)) + to.heads((v,), (batch, heads, values))
    tokens += to.heads((g,), (batch, heads, keys))
    extra = None if bonus is None else to.constant(bonus.expand(heads, keys))
    memory, gates = to.own(state, after), 0 if g is None else g.dim() - 1
    to.add("attend", state.shape, to.new(y), *tokens, extra, memory, numbers=[gates, groups], shared=True)
