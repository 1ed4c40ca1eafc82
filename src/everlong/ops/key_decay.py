"""Scores inside a chunk under one decay per key channel:  ``s_ij = sum_k r_ik k_jk (d_j+1 ... d_i-1)_k`` for ``i > j``.

Neighbouring blocks meet at their common border and merge, from 1 token up to the chunk: the later block's reads against
the earlier block's keys are one matrix product, then the reads are decayed over the earlier block and the keys over
the later one. Decays are only multiplied, never divided, so nothing overflows or cancels, and underflow is an
exact 0. The merging happens in place, and the backward pass is written out: it keeps what each level multiplied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Decayed(NamedTuple):
    """What ``decay_pairs`` returns: scores inside a chunk, and reads, keys and decay as seen from its borders."""

    scores: Tensor  # [... R C S C] with zeros above the diagonal
    reads: Tensor  # [... R C K] reads decayed from the start of the chunk
    keys: Tensor  # [... S C K] keys decayed to the end of the chunk
    keep: Tensor  # [... K] the decay over the whole chunk


def decay_pairs(reads: Tensor, keys: Tensor, decay: Tensor, own: Tensor) -> Decayed:
    """R kinds of ``reads [... R C K]`` against S kinds of ``keys [... S C K]`` under ``decay [... C K]`` in ``[0, 1]``.

    C is a power of two. Token i reads the state before its own decay (multiply ``reads`` by it for the state
    after it), and ``own [... R S C]`` is the diagonal of the scores.
    """
    leading = decay.shape[:-2]
    last = len(leading) - 1
    made = _DecayPairs.apply(*(x.flatten(0, last) for x in (reads, keys, decay, own)))
    return Decayed(*(x.unflatten(0, leading) for x in made))


class _Level(NamedTuple):
    """What the merge of blocks of h tokens multiplied; M chunks of N pairs of blocks."""

    reads: Tensor  # [M R N h K] of the later blocks
    keys: Tensor  # [M S N h K] of the earlier blocks
    early: Tensor  # [M N K] decay over the earlier blocks
    late: Tensor  # [M N K]


def _halves(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """``[M R C K]`` as the earlier and the later block of each pair, views ``[M R N h K]``."""
    return x.unflatten(2, (-1, 2, size)).unbind(3)


def _borders(scores: Tensor, size: int) -> Tensor:
    """The later block's rows, the earlier one's columns, of each pair: a view ``[M R h S h N]`` of ``[M R C S C]``."""
    split = scores.unflatten(4, (-1, 2, size)).unflatten(2, (-1, 2, size))
    return split[:, :, :, 1, :, :, :, 0].diagonal(dim1=2, dim2=5)


def _rows(x: Tensor) -> Tensor:
    """``[M R N h K] -> [M*N R*h K]``, all kinds of a block together."""
    return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _kinds(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``_rows``, a view."""
    chunks, kinds, blocks, size, width = like.shape
    return x.view(chunks, blocks, kinds, size, width).transpose(1, 2)


def _merge(reads: Tensor, keys: Tensor, keep: Tensor, scores: Tensor, size: int) -> tuple[Tensor, _Level]:
    """Merge pairs of blocks of ``size`` tokens in place; returns their decay [M N K] and what was multiplied."""
    (_, late_reads), (early_keys, _) = _halves(reads, size), _halves(keys, size)
    early, late = keep.unflatten(1, (-1, 2)).unbind(2)
    level = _Level(late_reads.clone(), early_keys.clone(), early, late)
    cross = _rows(level.reads) @ _rows(level.keys).transpose(-1, -2)
    (chunks, kinds, blocks), others = late_reads.shape[:3], keys.shape[1]
    cross = cross.view(chunks, blocks, kinds, size, others, size)
    _borders(scores, size).copy_(cross.movedim(1, -1))
    late_reads.mul_(early[:, None, :, None])
    early_keys.mul_(late[:, None, :, None])
    return early * late, level


def _unmerge(level: _Level, grads: tuple[Tensor, Tensor, Tensor], grad_keep: Tensor) -> Tensor:
    """The backward pass of ``_merge``: gradients of reads, keys in place; returns that of the blocks' decays."""
    grad_scores, grad_reads, grad_keys = grads
    size = level.reads.shape[3]
    (_, late_reads), (early_keys, _) = _halves(grad_reads, size), _halves(grad_keys, size)
    early = grad_keep * level.late + (late_reads * level.reads).sum((1, 3))
    late = grad_keep * level.early + (early_keys * level.keys).sum((1, 3))
    cross = _borders(grad_scores, size).movedim(-1, 1).flatten(4, 5).flatten(2, 3).flatten(0, 1)
    late_reads.mul_(level.early[:, None, :, None]).add_(_kinds(cross @ _rows(level.keys), level.reads))
    early_keys.mul_(level.late[:, None, :, None])
    early_keys.add_(_kinds(cross.transpose(-1, -2) @ _rows(level.reads), level.keys))
    return torch.stack([early, late], dim=2).flatten(1, 2)


class _DecayPairs(torch.autograd.Function):
    """reads [M R C K], keys [M S C K], decay [M C K], own [M R S C] -> the fields of ``Decayed``."""

    @staticmethod
    def forward(ctx: Any, reads: Tensor, keys: Tensor, decay: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        chunks, kinds, length, _ = reads.shape
        reads, keys, keep = (x.clone(memory_format=torch.contiguous_format) for x in (reads, keys, decay))
        scores = reads.new_zeros(chunks, kinds, length, keys.shape[1], length)
        scores.diagonal(dim1=2, dim2=4).copy_(own)
        levels: list[Tensor] = []
        size = 1
        while size < length:
            keep, level = _merge(reads, keys, keep, scores, size)
            levels += level
            size *= 2
        ctx.save_for_backward(*levels)
        return scores, reads, keys, keep.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        scores, reads, keys, keep = grads
        reads, keys, keep = (x.clone(memory_format=torch.contiguous_format) for x in (reads, keys, keep[:, None]))
        levels = ctx.saved_tensors
        for end in range(len(levels), 0, -4):
            keep = _unmerge(_Level(*levels[end - 4 : end]), (scores, reads, keys), keep)
        return reads, keys, keep, scores.diagonal(dim1=2, dim2=4)
