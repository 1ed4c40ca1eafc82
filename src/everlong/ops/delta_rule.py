"""The generalised delta rule:  S_t = diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,   y_t = S_t^T q_t.

The decay ``g <= 0`` is absent, per head ``[B T H]`` or per key channel ``[B T H K]``; ``a_t`` reads the state
before it decays. Without ``b`` the correction is written where the value is, ``b = k``, which halves the work:

- delta rule (DeltaNet): ``S_t = S_{t-1} + beta k (v - S_{t-1}^T k)^T``, made by ``plain``;
- gated delta rule: the same after a decay ``exp g``, made by ``gated``;
- RWKV-7: ``a = -kappa``, ``b = kappa * alpha`` with kappa of norm 1, and a decay per key channel.

Inside a chunk ``u_i = a_i^T S_{i-1}`` obeys ``(I - A_ab) U = A S_0 + A_ak V``, with the strictly lower scores of
a against b and k. One triangular solve for all chunks at once makes the chunk affine in the state it starts from.
Sources: arXiv 2406.06484 (WY form), arXiv 2412.06464 sec. 3 (gated), arXiv 2503.14456 (RWKV-7).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import check_starts, dims, state_dtype
from . import dispatch
from .cases import Case
from .common import chunk_size, heads_first, heads_last, loop, suffix_sum
from .decay import decayed
from .key_decay import Decayed, decay_pairs
from .native.delta_rule import delta_rule_native, lower_step, refuse
from .record import leaf

SEQUENCE = ("q", "k", "v", "a", "b", "g")
CHUNK = 64


def plain(k: Tensor, beta: Tensor) -> dict[str, Tensor]:
    """Inputs k and a of the delta rule with unit keys ``k [... H K]`` and rates ``beta [... H]``."""
    return {"k": beta[..., None] * k, "a": -k}


def gated(k: Tensor, beta: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Inputs k, a and g of the gated delta rule: the state first decays by ``exp g``, ``g [... H] <= 0``."""
    return {"k": beta[..., None] * k, "a": -g.exp()[..., None].to(k.dtype) * k, "g": g}


@leaf(lower_step)
def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor | None = None, g: Tensor | None = None, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, the definition. q, k, a, b [B H K], v [B H V], g [B H] or [B H K], state [B H K V] -> y, state."""
    dtype = state.dtype
    q, k, value, a = (x.to(dtype) for x in (q, k, v, a))
    read = (a[..., None, :] @ state).squeeze(-2)
    if g is not None:
        decay = g.to(dtype).exp()
        state = state * (decay[..., None, None] if g.dim() == 2 else decay[..., None])
    if b is None:
        state = state + k[..., None] * (value + read)[..., None, :]
    else:
        state = state + b.to(dtype)[..., None] * read[..., None, :] + k[..., None] * value[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2).to(v.dtype), state


def delta_rule_reference(
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
    """The loop over ``delta_rule_step``."""
    return loop(delta_rule_step, {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g}, state=state, starts=starts)


def delta_rule_chunk(
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
    """Chunk-parallel form: a triangular solve inside chunks of 64 tokens, an affine recurrence between them.

    A document that starts reads nothing through a, and decays by exp(-inf) = 0: no masks are needed.
    """
    length, dtype = q.shape[1], state.dtype
    size = chunk_size(length, CHUNK)
    if starts is not None:
        a = a.masked_fill(starts[..., None, None], 0.0)
        g = torch.zeros_like(q[..., 0]) if g is None else g
        g = g.masked_fill(starts.reshape(*starts.shape, *[1] * (g.dim() - 2)), float("-inf"))
    q, a = heads_first(q.to(dtype), size), heads_first(a.to(dtype), size)
    writes = torch.stack([heads_first(x.to(dtype), size) for x in (b, k) if x is not None], dim=3)
    gate = None if g is None else heads_first(g.to(dtype), size)
    parts = _per_key(q, a, writes, gate) if gate is not None and gate.dim() == 5 else _per_head(q, a, writes, gate)
    y, state = _solve(parts, heads_first(v.to(dtype), size), state)
    return heads_last(y, length).to(v.dtype), state


def _per_key(q: Tensor, a: Tensor, writes: Tensor, g: Tensor) -> Decayed:
    """Decays per key channel, g [B H N C K], for q, a [B H N C K] and writes [B H N S C K]."""
    decay = g.exp()
    own = (q[:, :, :, None] * writes).sum(-1)  # only q sees what its own token writes
    own = torch.stack([own, torch.zeros_like(own)], dim=3)
    return decay_pairs(torch.stack([q * decay, a], dim=3), writes, decay, own)


def _per_head(q: Tensor, a: Tensor, writes: Tensor, g: Tensor | None) -> Decayed:
    """Decays per head, g [B H N C], or none."""
    reads, size = torch.stack([q, a], dim=3), q.shape[-2]
    products = reads.flatten(3, 4) @ writes.flatten(3, 4).transpose(-1, -2)
    products = products.view(*products.shape[:3], 2, size, -1, size)
    ones = torch.ones(size, size, dtype=q.dtype, device=q.device)
    if g is None:
        masks = torch.stack([ones.tril(), ones.tril(-1)])[:, :, None]
        return Decayed(products * masks, reads, writes, q.new_ones(1))
    after, reach = decayed(ones, g), g.cumsum(dim=-1)
    before = F.pad(after, (0, 0, 1, -1))  # what reads before token i's decay sees what token i-1 left
    return Decayed(
        products * torch.stack([after, before], dim=3)[..., None, :],
        reads * torch.stack([reach, F.pad(reach, (1, -1))], dim=3).exp()[..., None],
        writes * suffix_sum(g, dim=-1).exp()[:, :, :, None, :, None],
        g.sum(dim=-1, keepdim=True).exp(),
    )


def _solve(parts: Decayed, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y [B H N C V] and the final state, from the values [B H N C V] and the first state [B H K V].

    ``parts`` holds the reads q, a against the writes b, k inside each chunk, or k alone where b is k.
    """
    sizes, (q, a), (q_scores, a_scores) = state.shape[-2:], parts.reads.unbind(3), parts.scores.unbind(3)
    matrix, *direct = a_scores.unbind(-2)
    write, *direct_write = parts.keys.transpose(-1, -2).unbind(3)
    known = direct[0] @ v if direct else v
    # U, or U + V where b is k, is affine in the state that enters: [C K] times it, plus [C V]
    solved = torch.linalg.solve_triangular(-matrix, torch.cat([a, known], dim=-1), upper=False, unitriangular=True)
    move, add = (write @ solved).split(sizes, dim=-1)
    if direct:
        add = add + direct_write[0] @ v
    keep = parts.keep.expand(*move.shape[:-1])
    entered, state = _sweep(move + torch.diag_embed(keep), add, state)
    slope, offset = solved.split(sizes, dim=-1)
    u = slope @ entered + offset
    return q @ entered + q_scores.flatten(-2) @ (torch.cat([u, v], dim=-2) if direct else u), state


def _sweep(move: Tensor, add: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states [B H N K V] that enter each chunk, and the one that leaves the last:  S = move S + add."""
    entered = []
    for m, n in zip(move.unbind(2), add.unbind(2), strict=True):
        entered.append(state)
        state = m @ state + n
    return torch.stack(entered, dim=2), state


def operations(inputs: dict[str, Any]) -> float:
    """A number of the state decays, is read along a, takes one product or two, and is read along q."""
    written = 2 if inputs.get("b") is None else 4
    return float(inputs["v"].numel() * inputs["q"].shape[-1] * (4 + written + (inputs.get("g") is not None)))


TABLE = dispatch.Table(
    "delta_rule",
    dispatch.Impl("native", delta_rule_native, refuse),
    dispatch.Impl("torch", delta_rule_chunk),
    dispatch.Impl("reference", delta_rule_reference),
    sequence=SEQUENCE,
)


@dispatch.op(TABLE, step=delta_rule_step, operations=operations)
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    g: Tensor | None = None,
    *,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The generalised delta rule (see the module for the equations).

    q, k, a, b [B T H K] (b = k where absent), v [B T H V], g [B T H] or [B T H K] log decays ``<= 0``,
    state [B H K V] in fp32 or fp64, starts bool [B T]. Returns y [B T H V] in the dtype of v, and the final
    state. ``ValueError`` for shapes or dtypes that do not fit.
    """
    gate = "g B T H" if g is not None and g.dim() == 3 else "g B T H K"
    batch, time, heads, keys, values = dims(
        f"q B T H K, k B T H K, v B T H V, a B T H K, b B T H K, {gate}", q, k, v, a, b, g
    )
    check_starts(starts, batch, time)
    if state is None:
        state = q.new_zeros(batch, heads, keys, values, dtype=state_dtype(q))
    dims("q B T H K, v B T H V, state B H K V", q, v, state)
    return dispatch.run(TABLE, dict(q=q, k=k, v=v, a=a, b=b, g=g, state=state, starts=starts), backend)


def inputs(case: Case) -> dict[str, Tensor | None]:
    """Random contractions for tests and benchmarks; ``case.variant`` is one of ``VARIANTS``."""
    shape = (case.batch, case.time, case.heads)
    wide, variant = (*shape, case.keys), case.variant or "key"
    unit, rate = F.normalize(case.randn(*wide), dim=-1), case.randn(*wide).sigmoid()
    made: dict[str, Tensor] = dict(q=case.randn(*wide), v=case.randn(*shape, case.values))
    if variant == "plain":
        return {**made, **plain(unit, rate[..., 0]), "b": None, "g": None}
    if variant == "gated":
        return {**made, **gated(unit, rate[..., 0], case.log_decay(*shape)), "b": None}
    g = case.log_decay(*(shape if variant == "head" else wide))
    return {**made, "k": case.randn(*wide) * case.keys**-0.5, "a": -unit, "b": unit * rate, "g": g}


VARIANTS = ("plain", "gated", "head", "key")
