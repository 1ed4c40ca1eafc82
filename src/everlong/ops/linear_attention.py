"""Linear attention with decay:  S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,   y_t = S_t^T q_t.

The decay ``g <= 0`` is absent, per head ``[B T H]`` or per key channel ``[B T H K]``. With ``bonus`` u
``[H K]`` the current token is read with its own weight: ``y_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t``
(RWKV-5/6). With ``normalizer`` eps, ``y_t`` is divided by ``q_t . z_t + eps``, where z accumulates k as
S does k v^T; the state then has one more column, z. Groups of heads may share q and k, ``[B T G K]``.

Serves linear attention (Katharopoulos et al. 2020), RetNet, GLA, Mamba-2 (k = B, v = dt x, q = C), mLSTM.
Sources: arXiv 2006.16236 eq. 16-20; arXiv 2312.06635 sec. 4; arXiv 2405.21060 sec. 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shapes import check_starts, dims, state_dtype
from . import dispatch
from .cases import Case
from .common import chunk_size, heads_first, heads_last, loop, suffix_sum
from .decay import decayed
from .key_decay import decay_pairs
from .native.linear_attention import linear_attention_native, lower_step, refuse
from .record import leaf

SEQUENCE = ("q", "k", "v", "g")
CHUNK = 64


@leaf(lower_step)
def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, bonus: Tensor | None = None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, the definition. q, k [B G K], v [B H V], g [B H] or [B H K], state [B H K V] -> y [B H V], state."""
    dtype, shared = state.dtype, v.shape[1] // q.shape[1]
    if shared > 1:
        q, k = (x.repeat_interleave(shared, dim=1) for x in (q, k))
    update = k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
    decayed = state
    if g is not None:
        decay = g.to(dtype).exp()
        decayed = state * (decay[..., None, None] if g.dim() == 2 else decay[..., None])
    after = decayed + update
    read = after if bonus is None else state + bonus.to(dtype)[..., None] * update
    return torch.einsum("bhk,bhkv->bhv", q.to(dtype), read).to(v.dtype), after


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    state: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop over ``linear_attention_step``."""
    return loop(linear_attention_step, {"q": q, "k": k, "v": v, "g": g}, bonus=bonus, state=state, starts=starts)


def linear_attention_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    state: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunk-parallel form: scores inside chunks of 64 tokens, a recurrence over chunk states between them."""
    dtype = state.dtype
    wide = [None if x is None else x.to(dtype) for x in (q, k, v, g)]
    if bonus is None and (g is None or g.dim() == 3):
        y, state = _per_head(*wide, state=state, starts=starts)  # type: ignore[arg-type]
    else:
        y, state = _per_key(*wide, bonus=bonus, state=state, starts=starts)  # type: ignore[arg-type]
    return y.to(v.dtype), state


def _per_head(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decay per head, or none. Heads of a group (R of them) lie side by side, so that one product serves all.

    Decays are applied to values and outputs, which each head has of its own. A document that starts is a
    decay of exp(-inf) = 0: it needs no masks.
    """
    (length, groups), size = q.shape[1:3], chunk_size(q.shape[1], CHUNK)
    q, k, v = heads_first(q, size), heads_first(k, size), heads_first(v.unflatten(2, (groups, -1)), size)
    g = _log_decays(g, starts, v)
    scores = (q @ k.transpose(-1, -2))[:, :, :, None]  # [B G N 1 C C]
    scores = scores.tril() if g is None else decayed(scores, g)
    inner = (scores @ v.transpose(3, 4)).transpose(3, 4)  # [B G N C R V]
    updates = k.transpose(-1, -2) @ (v if g is None else v * _column(suffix_sum(g, dim=-1))).flatten(-2)
    keep = None if g is None else g.sum(-1).exp().repeat_interleave(v.shape[-1], dim=-1)[:, :, :, None]
    side = state.unflatten(1, (groups, -1)).transpose(2, 3)  # [B G K R V]
    before, after = _carry(updates, keep, side.flatten(-2))
    outer = (q @ before).view_as(inner)
    y = inner + (outer if g is None else outer * _column(g.cumsum(-1)))
    return heads_last(y.flatten(-2), length).unflatten(-1, (v.shape[-2], -1)).flatten(2, 3), _heads(after, side)


def _heads(after: Tensor, side: Tensor) -> Tensor:
    """The state ``[B G K R*V]`` as ``[B H K V]``."""
    return after.view_as(side).transpose(2, 3).flatten(1, 2)


def _log_decays(g: Tensor | None, starts: Tensor | None, v: Tensor) -> Tensor | None:
    """g as ``[B G N R C]`` for v ``[B G N C R V]``, -inf where a document starts; None where nothing decays."""
    if g is None and starts is None:
        return None
    if g is None:
        g = v.new_zeros(*starts.shape, v.shape[1] * v.shape[4])  # type: ignore[union-attr]
    if starts is not None:
        g = g.masked_fill(starts[..., None], float("-inf"))
    return heads_first(g.unflatten(2, (v.shape[1], -1)), v.shape[3]).transpose(-1, -2)


def _column(g: Tensor) -> Tensor:
    """exp(g) of g ``[B G N R C]`` as a factor of ``[B G N C R V]``."""
    return g.exp().transpose(-1, -2)[..., None]


def _carry(updates: Tensor, keep: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks: the states before each, ``[B H N K V]``, and the last."""
    before = []
    for n, update in enumerate(updates.unbind(2)):
        before.append(state)
        state = state + update if keep is None else torch.addcmul(update, keep[:, :, n], state)
    return torch.stack(before, dim=2), state


def _per_key(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *, bonus: Tensor | None, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decay per key channel, or a bonus."""
    length = q.shape[1]
    g = torch.zeros_like(q) if g is None else g if g.dim() == 4 else g[..., None].expand_as(q)
    own = (q * k if bonus is None else q * bonus.to(q.dtype) * k).sum(-1, keepdim=True)
    if starts is not None:  # a document that starts decays by exp(-inf) = 0, and reads nothing from before its decay
        q, g = q.masked_fill(starts[..., None, None], 0.0), g.masked_fill(starts[..., None, None], float("-inf"))
    q, k, v, g, own = (heads_first(x, chunk_size(length, CHUNK)) for x in (q, k, v, g, own))
    decay = g.exp()
    parts = decay_pairs(
        (q if bonus is not None else q * decay)[:, :, :, None],
        k[:, :, :, None],
        decay,
        own.squeeze(-1)[:, :, :, None, None],
    )
    scores, read, write = parts.scores[:, :, :, 0, :, 0], parts.reads[:, :, :, 0], parts.keys[:, :, :, 0]
    before, state = _carry(write.transpose(-1, -2) @ v, parts.keep[..., None], state)
    return heads_last(scores @ v + read @ before, length), state


def operations(inputs: dict[str, Any]) -> float:
    """A number of the state decays, takes a product, and is read by another."""
    keys = inputs["q"].shape[-1]
    per_state = 4 + (inputs.get("g") is not None) + 2 * (inputs.get("bonus") is not None) / inputs["v"].shape[-1]
    return float(inputs["v"].numel() * keys * per_state)


TABLE = dispatch.Table(
    "linear_attention",
    dispatch.Impl("native", linear_attention_native, refuse),
    dispatch.Impl("torch", linear_attention_chunk),
    dispatch.Impl("reference", linear_attention_reference),
    sequence=SEQUENCE,
)


@dispatch.op(TABLE, step=linear_attention_step, operations=operations)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    normalizer: float | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention with decay (see the module for the equations).

    q, k [B T H K], v [B T H V], g [B T H] or [B T H K] log decays ``<= 0``, bonus [H K], state [B H K V]
    in fp32 or fp64 (V + 1 columns with ``normalizer``), starts bool [B T]. Where g has no K axis and there is no
    bonus, q and k may be [B T G K]: each of the G groups of heads that lie side by side shares one.
    Returns y [B T H V] in the dtype of v, and the final state. ``ValueError`` for shapes or dtypes that do not fit.
    """
    gate = "g B T H" if g is not None and g.dim() == 3 else "g B T H K"
    batch, time, groups, keys, heads, _ = dims(f"q B T G K, k B T G K, v B T H V, {gate}, bonus H K", q, k, v, g, bonus)
    check_starts(starts, batch, time)
    _check_groups(groups, heads, plain=bonus is None and (g is None or g.dim() == 3))
    if normalizer is not None:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if state is None:
        state = q.new_zeros(batch, heads, keys, v.shape[-1], dtype=state_dtype(q))
    dims("q B T G K, v B T H V, state B H K V", q, v, state)
    inputs = dict(q=q, k=k, v=v, g=g, bonus=bonus, state=state, starts=starts)
    y, state = dispatch.run(TABLE, inputs, backend)
    return (y if normalizer is None else y[..., :-1] / (y[..., -1:] + normalizer)), state


def _check_groups(groups: int, heads: int, *, plain: bool) -> None:
    if groups == heads or (plain and heads % groups == 0):
        return
    if plain:
        raise ValueError(f"q and k have {groups} heads and v has {heads}; expected a divisor of {heads}")
    raise ValueError(f"q and k have {groups} heads and v has {heads}; with a decay per key or a bonus expected {heads}")


def inputs(case: Case) -> dict[str, Tensor | None]:
    """Random inputs for tests and benchmarks; ``case.variant`` picks the decay: none, head, key or bonus;
    with ``group`` all heads share q and k."""
    shape = (case.batch, case.time, case.heads)
    groups = 1 if case.variant == "group" else case.heads
    q, k = (case.randn(case.batch, case.time, groups, case.keys) for _ in range(2))
    gates = {"none": None, "head": shape, "group": shape, "key": (*shape, case.keys), "bonus": (*shape, case.keys)}
    gate = gates[case.variant or "head"]
    return dict(
        q=q,
        k=k * case.keys**-0.5,
        v=case.randn(*shape, case.values),
        g=None if gate is None else case.log_decay(*gate),
        bonus=case.randn(case.heads, case.keys) if case.variant == "bonus" else None,
    )


VARIANTS = ("none", "head", "group", "key", "bonus")
