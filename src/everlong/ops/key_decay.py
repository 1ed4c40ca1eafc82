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
from torch.nn import functional as F

from .transforms import custom_op, transforming


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
    run = _plain if transforming() else _decay_pairs
    made = run(*(x.flatten(0, last) for x in (reads, keys, decay, own)))
    return Decayed(*(x.unflatten(0, leading) for x in made[:4]))


class _Level(NamedTuple):
    """What the merge of blocks of h tokens multiplied; M chunks of N pairs of blocks."""

    reads: Tensor  # [M R N h K] of the later blocks
    keys: Tensor  # [M S N h K] of the earlier blocks
    keep: Tensor  # [M 2*N K] decays over all blocks


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
    dense = torch.contiguous_format
    level = _Level(late_reads.clone(memory_format=dense), early_keys.clone(memory_format=dense), keep)
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
    early, late = level.keep.unflatten(1, (-1, 2)).unbind(2)
    grad_early = grad_keep * late + (late_reads * level.reads).sum((1, 3))
    grad_late = grad_keep * early + (early_keys * level.keys).sum((1, 3))
    cross = _borders(grad_scores, size).movedim(-1, 1).flatten(4, 5).flatten(2, 3).flatten(0, 1)
    late_reads.mul_(early[:, None, :, None]).add_(_kinds(cross @ _rows(level.keys), level.reads))
    early_keys.mul_(late[:, None, :, None])
    early_keys.add_(_kinds(cross.transpose(-1, -2) @ _rows(level.reads), level.keys))
    return torch.stack([grad_early, grad_late], dim=2).flatten(1, 2)


@custom_op("everlong::decay_pairs", mutates_args=())
def _decay_pairs(reads: Tensor, keys: Tensor, decay: Tensor, own: Tensor) -> list[Tensor]:
    """The fields of ``Decayed``, then those of each ``_Level``. reads [M R C K], keys [M S C K], decay [M C K]."""
    reads, keys, keep = (x.clone(memory_format=torch.contiguous_format) for x in (reads, keys, decay))
    scores = reads.new_zeros(_score_shape(reads, keys))
    scores.diagonal(dim1=2, dim2=4).copy_(own)
    levels: list[Tensor] = []
    size = 1
    while size < reads.shape[2]:
        keep, level = _merge(reads, keys, keep, scores, size)
        levels += level
        size *= 2
    return [scores, reads, keys, keep.squeeze(1), *levels]


def _plain(reads: Tensor, keys: Tensor, decay: Tensor, own: Tensor) -> tuple[Tensor, ...]:
    """The fields of ``Decayed`` in PyTorch's own operations, for transforms: the same merging, not in place."""
    scores, reads, keys, keep = _merged(reads, keys, decay)
    return scores + torch.diag_embed(own).transpose(2, 3), reads, keys, keep


def _merged(reads: Tensor, keys: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = reads.shape[2]
    if size == 1:
        return reads.new_zeros(_score_shape(reads, keys)), reads, keys, decay[:, 0]
    halves = [x.unflatten(-2, (2, -1)).movedim(-3, 1).flatten(0, 1) for x in (reads, keys, decay)]
    (first, second), (early, reads), (keys, late), (kept, keep) = (
        x.unflatten(0, (-1, 2)).unbind(1) for x in _merged(*halves)
    )
    cross = torch.einsum("mrik,msjk->mrisj", reads, keys)
    scores = torch.cat([F.pad(first, (0, size // 2)), torch.cat([cross, second], dim=4)], dim=2)
    reads = torch.cat([early, reads * kept[:, None, None]], dim=2)
    return scores, reads, torch.cat([keys * keep[:, None, None], late], dim=2), kept * keep


def _score_shape(reads: Tensor, keys: Tensor) -> tuple[int, ...]:
    return (*reads.shape[:3], *keys.shape[1:3])


@_decay_pairs.register_fake
def _(reads: Tensor, keys: Tensor, decay: Tensor, own: Tensor) -> list[Tensor]:
    made = [
        reads.new_empty(_score_shape(reads, keys)),
        reads.new_empty(reads.shape),
        keys.new_empty(keys.shape),
        decay.new_empty(decay.shape[0], decay.shape[2]),
    ]
    size, length = 1, reads.shape[2]
    while size < length:
        pairs = length // size // 2
        for x in (reads, keys):
            made.append(x.new_empty(*x.shape[:2], pairs, size, x.shape[3]))
        made.append(decay.new_empty(decay.shape[0], 2 * pairs, decay.shape[2]))
        size *= 2
    return made


@custom_op("everlong::decay_pairs_backward", mutates_args=())
def _decay_pairs_backward(grads: list[Tensor], levels: list[Tensor]) -> list[Tensor]:
    """Gradients of reads, keys, decay and own, from those of the fields of ``Decayed``."""
    scores = grads[0]
    reads, keys, keep = (x.clone(memory_format=torch.contiguous_format) for x in (*grads[1:3], grads[3][:, None]))
    for end in range(len(levels), 0, -3):
        keep = _unmerge(_Level(*levels[end - 3 : end]), (scores, reads, keys), keep)
    return [reads, keys, keep, scores.diagonal(dim1=2, dim2=4).clone()]


@_decay_pairs_backward.register_fake
def _(grads: list[Tensor], levels: list[Tensor]) -> list[Tensor]:
    scores, reads, keys, keep = grads
    length = reads.shape[2]
    decay = keep.new_empty(keep.shape[0], length, keep.shape[1])
    own = scores.new_empty(*scores.shape[:2], scores.shape[3], length)
    return [torch.empty_like(reads), torch.empty_like(keys), decay, own]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)  # of the levels, which have none
    ctx.save_for_backward(*output[4:])
    ctx.shapes = [x.shape for x in output[:4]]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    like = next((grad for grad in grads if grad is not None), None)
    if like is None:
        return None, None, None, None
    given = [like.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, ctx.shapes, strict=False)]
    return tuple(_decay_pairs_backward(given, list(ctx.saved_tensors)))


_decay_pairs.register_autograd(_backward, setup_context=_save)
