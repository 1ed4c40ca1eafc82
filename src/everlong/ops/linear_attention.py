"""Linear attention with decay:  S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,   y_t = S_t^T q_t.

The decay ``g <= 0`` is absent, per head ``[B T H]`` or per key channel ``[B T H K]``. With ``bonus`` u
``[H K]`` the current token is read with its own weight: ``y_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t``
(RWKV-5/6). With ``normalizer`` eps, ``y_t`` is divided by ``q_t . z_t + eps``, where z accumulates k as
S does k v^T; the state then has one more column, z.

Serves linear attention (Katharopoulos et al. 2020), RetNet, GLA, Mamba-2 (k = B, v = dt x, q = C), mLSTM.
Sources: arXiv 2006.16236 eq. 16-20; arXiv 2312.06635 sec. 4; arXiv 2405.21060 sec. 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shapes import check_starts, dims, state_dtype
from . import dispatch
from .cases import Case
from .common import Resets, decayed_scores, heads_first, heads_last, loop, segsum, suffix_sum

SEQUENCE = ("q", "k", "v", "g")
CHUNK = 64


def linear_attention_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, bonus: Tensor | None = None,
                          state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, the definition. q, k [B H K], v [B H V], g [B H] or [B H K], state [B H K V] -> y [B H V], state."""
    dtype = state.dtype
    update = k.to(dtype)[..., None] * v.to(dtype)[..., None, :]
    decayed = state
    if g is not None:
        decay = g.to(dtype).exp()
        decayed = state * (decay[..., None, None] if g.dim() == 2 else decay[..., None])
    after = decayed + update
    read = after if bonus is None else state + bonus.to(dtype)[..., None] * update
    return torch.einsum("bhk,bhkv->bhv", q.to(dtype), read).to(v.dtype), after


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *,
                               bonus: Tensor | None = None, state: Tensor,
                               starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loop over ``linear_attention_step``."""
    return loop(linear_attention_step, {"q": q, "k": k, "v": v, "g": g}, bonus=bonus, state=state, starts=starts)


def linear_attention_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *,
                           bonus: Tensor | None = None, state: Tensor,
                           starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Chunk-parallel form: scores inside chunks of 64 tokens, a recurrence over chunk states between them."""
    length, out_dtype, dtype = q.shape[1], v.dtype, state.dtype
    q, k, v = (heads_first(x.to(dtype), CHUNK) for x in (q, k, v))
    g = torch.zeros_like(q[..., 0]) if g is None else heads_first(g.to(dtype), CHUNK)
    resets = None if starts is None else Resets.of(starts, CHUNK)
    scores = _scores(q, k, g, bonus)
    if g.dim() == 4:
        g = g[..., None]
    reach, total = g.cumsum(dim=-2), g.sum(dim=-2)
    if bonus is not None:
        reach = torch.cat([torch.zeros_like(reach[..., :1, :]), reach[..., :-1, :]], dim=-2)
    read, write, keep = q * reach.exp(), k * suffix_sum(g, dim=-2).exp(), total.exp()
    if resets is not None:
        scores = scores * resets.pair[:, None]
        read = read * resets.carry[:, None, ..., None]
        write = write * resets.last[:, None, ..., None]
        keep = keep * resets.keep[:, None, :, None]
    updates = write.transpose(-1, -2) @ v
    before = []
    for update, decay in zip(updates.unbind(2), keep.unbind(2), strict=True):
        before.append(state)
        state = decay[..., None] * state + update
    y = scores @ v + read @ torch.stack(before, dim=2)
    return heads_last(y, length).to(out_dtype), state


def _scores(q: Tensor, k: Tensor, g: Tensor, bonus: Tensor | None) -> Tensor:
    """The causal score matrix inside each chunk, [B H N C C]."""
    if g.dim() == 5:
        scores = decayed_scores(q, k, g, before=bonus is not None)
    elif bonus is None:
        scores = segsum(g).exp() * (q @ k.transpose(-1, -2))
    else:
        scores = decayed_scores(q, k, g[..., None].expand_as(k), before=True)
    if bonus is None:
        return scores
    own = (q * bonus.to(q.dtype)[:, None, None] * k).sum(-1)
    return scores + torch.diag_embed(own)


TABLE = (
    dispatch.Impl("torch", linear_attention_chunk),
    dispatch.Impl("reference", linear_attention_reference),
)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, bonus: Tensor | None = None,
                     normalizer: float | None = None, state: Tensor | None = None, starts: Tensor | None = None,
                     backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Linear attention with decay (see the module for the equations).

    q, k [B T H K], v [B T H V], g [B T H] or [B T H K] log decays ``<= 0``, bonus [H K], state [B H K V]
    in fp32 or fp64 (V + 1 columns with ``normalizer``), starts bool [B T]. Returns y [B T H V] in the dtype of v,
    and the final state. ``ValueError`` for shapes or dtypes that do not fit.
    """
    gate = "g B T H" if g is not None and g.dim() == 3 else "g B T H K"
    batch, time, heads, keys, values = dims(
        f"q B T H K, k B T H K, v B T H V, {gate}, bonus H K", q, k, v, g, bonus)
    check_starts(starts, batch, time)
    if normalizer is not None:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if state is None:
        state = q.new_zeros(batch, heads, keys, v.shape[-1], dtype=state_dtype(q))
    dims("q B T H K, v B T H V, state B H K V", q, v, state)
    inputs = dict(q=q, k=k, v=v, g=g, bonus=bonus, state=state, starts=starts)
    y, state = dispatch.run(TABLE, inputs, backend)
    return (y if normalizer is None else y[..., :-1] / (y[..., -1:] + normalizer)), state


def inputs(case: Case) -> dict[str, Tensor | None]:
    """Random inputs for tests and benchmarks; ``case.variant`` picks the decay: none, head, key or bonus."""
    shape = (case.batch, case.time, case.heads)
    q, k = case.randn(*shape, case.keys), case.randn(*shape, case.keys) * case.keys**-0.5
    gates = {"none": None, "head": shape, "key": (*shape, case.keys), "bonus": (*shape, case.keys)}
    gate = gates[case.variant or "head"]
    return dict(
        q=q, k=k, v=case.randn(*shape, case.values), g=None if gate is None else case.log_decay(*gate),
        bonus=case.randn(case.heads, case.keys) if case.variant == "bonus" else None,
    )


VARIANTS = ("none", "head", "key", "bonus")
