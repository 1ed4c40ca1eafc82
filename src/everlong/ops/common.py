"""What the ops share: the loop that defines them, chunking along time, and resets inside a chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import state_dtype


def loop(step: Callable[..., Any], sequence: dict[str, Tensor | None], *, state: Tensor, starts: Tensor | None,
         **fixed: Any) -> tuple[Tensor, Tensor]:
    """The definition of an op: ``step`` applied to each token in turn, the state zeroed where one starts.

    ``sequence`` holds the inputs with a time axis ``[B T ...]``; ``fixed`` those without.
    """
    tokens = {name: x.unbind(dim=1) for name, x in sequence.items() if x is not None}
    outputs = []
    for t, token in enumerate(zip(*tokens.values(), strict=True)):
        if starts is not None:
            state = torch.where(per_row(starts[:, t], state), 0.0, state)
        y, state = step(**dict(zip(tokens, token, strict=True)), **fixed, state=state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def per_row(flags: Tensor, like: Tensor) -> Tensor:
    """``[B]`` reshaped to broadcast over the trailing axes of ``like``."""
    return flags.reshape(-1, *[1] * (like.dim() - 1))


def to_chunks(x: Tensor, size: int) -> Tensor:
    """``[B T ...] -> [B N C ...]``, the last chunk padded with zeros."""
    batch, length = x.shape[:2]
    missing = -length % size
    if missing:
        x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, missing])
    return x.reshape(batch, (length + missing) // size, size, *x.shape[2:])


def heads_first(x: Tensor, size: int) -> Tensor:
    """``[B T H ...] -> [B H N C ...]`` for batched matrix products over chunks."""
    return to_chunks(x, size).movedim(3, 1)


def heads_last(y: Tensor, length: int) -> Tensor:
    """``[B H N C V] -> [B T H V]``, the padding dropped."""
    return y.movedim(1, 3).flatten(1, 2)[:, :length]


class Resets(NamedTuple):
    """Which tokens of a chunk see which, given document starts. All bool; ``[B N ...]``."""

    pair: Tensor  # [B N C C] token i and token j are of the same document
    carry: Tensor  # [B N C] token i still sees the state that entered the chunk
    last: Tensor  # [B N C] token j is of the document that leaves the chunk
    keep: Tensor  # [B N] the state that entered also leaves

    @classmethod
    def of(cls, starts: Tensor, size: int) -> Resets:
        """From ``starts`` bool ``[B T]`` for chunks of ``size`` tokens."""
        document = to_chunks(starts.long(), size).cumsum(dim=2)
        return cls(
            pair=document[..., :, None] == document[..., None, :],
            carry=document == 0,
            last=document == document[..., -1:],
            keep=document[..., -1] == 0,
        )


def previous(x: Tensor, last: Tensor, starts: Tensor | None) -> Tensor:
    """Token shift: the token before each of x [B T D], ``last [B D]`` before the first, 0 where a document starts."""
    shifted = torch.cat([last[:, None], x[:, :-1]], dim=1)
    return shifted if starts is None else shifted.masked_fill(starts[..., None], 0.0)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / |x| over the last axis, eps under the root; in fp32, or fp64 for fp64."""
    x = x.to(state_dtype(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def segsum(g: Tensor) -> Tensor:
    """``s[..., i, j] = g[j+1] + ... + g[i]`` for ``i >= j``, ``-inf`` above the diagonal.  ``[... C] -> [... C C]``.

    Summed as a masked cumulative sum, never as a difference of two sums, which would cancel (Mamba-2, sec. 6).
    """
    size = g.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=g.device)
    below = g[..., :, None].expand(*g.shape, size).masked_fill(~ones.tril(-1), 0.0)
    return below.cumsum(dim=-2).masked_fill(~ones.tril(), float("-inf"))


def suffix_sum(g: Tensor, dim: int) -> Tensor:
    """Sum of what comes after each entry: ``s[j] = g[j+1] + ... + g[C-1]`` (0 for the last)."""
    after = g.narrow(dim, 1, g.shape[dim] - 1).flip(dim).cumsum(dim).flip(dim)
    return torch.cat([after, torch.zeros_like(g.narrow(dim, 0, 1))], dim=dim)


class Decayed(NamedTuple):
    """What ``decay_pairs`` returns: scores inside a chunk, and reads, keys and decay as seen from its borders."""

    scores: Tensor  # [... R C S C] with zeros above the diagonal
    reads: Tensor  # [... R C K] reads decayed from the start of the chunk
    keys: Tensor  # [... S C K] keys decayed to the end of the chunk
    keep: Tensor  # [... K] the decay over the whole chunk


def decay_pairs(reads: Tensor, keys: Tensor, decay: Tensor, own: Tensor) -> Decayed:
    """Masked products with a decay per key channel:  ``s_ij = sum_k r_ik k_jk (d_j+1 ... d_i-1)_k`` for ``i > j``.

    R kinds of ``reads [... C R K]`` meet S kinds of ``keys [... C S K]`` under one ``decay [... C K]`` in ``[0, 1]``, C a
    power of two. Token i reads the state before its own decay (multiply ``reads`` by it for the state after), and
    ``own [... C R S]`` is the diagonal. Neighbouring blocks meet at their common border and merge, from 1 token
    up to C: decays are only multiplied, never divided, so nothing overflows or cancels, and underflow is an exact 0.
    """
    scores, keep = own[..., None, :, None], decay[..., None, None, :]
    reads, keys = reads[..., None, :], keys[..., None, :]
    while reads.shape[-4] > 1:  # [... N R C K], N blocks of C tokens
        (r1, r2), (k1, k2), (d1, d2) = (x.unflatten(-4, (-1, 2)).unbind(dim=-4) for x in (reads, keys, keep))
        s1, s2 = scores.unflatten(-5, (-1, 2)).unbind(dim=-5)
        cross = (r2.flatten(-3, -2) @ k1.flatten(-3, -2).transpose(-1, -2)).view(s1.shape)
        scores = torch.cat([F.pad(s1, (0, s1.shape[-1])), torch.cat([cross, s2], dim=-1)], dim=-3)
        reads, keys, keep = torch.cat([r1, r2 * d1], dim=-2), torch.cat([k1 * d2, k2], dim=-2), d1 * d2
    return Decayed(scores.squeeze(-5), reads.squeeze(-4), keys.squeeze(-4), keep.squeeze(-4)[..., 0, 0, :])


def decayed_scores(q: Tensor, k: Tensor, g: Tensor, *, before: bool = False) -> Tensor:
    """Masked products with a log decay ``g <= 0`` per key channel: ``s_ij = sum_k q_ik k_jk exp(g_j+1 + ... + g_i)_k``.

    ``q, k, g [... C K] -> [... C C]`` for ``i >= j``, C a power of two; with ``before`` token ``i`` reads
    the state before its own decay, ``exp(g_j+1 + ... + g_i-1)`` for ``i > j``. See ``decay_pairs``.
    """
    decay = g.exp()
    own = torch.zeros_like(q[..., 0]) if before else (q * k).sum(-1)
    parts = decay_pairs((q if before else q * decay)[..., None, :], k[..., None, :], decay, own[..., None, None])
    return parts.scores[..., 0, :, 0, :]


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigmoid(x), by softplus: ``F.logsigmoid`` wakes all threads for a handful of numbers, once per token."""
    return F.softplus(x, beta=-1, threshold=50)
