"""Scores inside a chunk under one decay per head:  ``P_ij = S_ij exp(g_j+1 + ... + g_i)`` for ``i >= j``, else 0.

The decay matrix is built row by row as a product of decays: C exponentials instead of C^2 / 2, no sum
whose terms cancel, and a log decay of -inf (a document starts) gives exact zeros. Forward and backward each keep two
matrices where a chain of elementwise functions would keep six: on a CPU the memory they touch is their cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import segsum
from .transforms import custom_op, transforming


def decayed(scores: Tensor, g: Tensor) -> Tensor:
    """``scores [... 1 C C]`` (the axis of size 1 may be R) under ``g [... R C] <= 0``: ``[... R C C]``."""
    return scores * segsum(g).exp() if transforming() else _decayed(scores, g)[0]


@custom_op("everlong::decayed", mutates_args=())
def _decayed(scores: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The decayed scores and the decay matrix."""
    matrix, decay = g.new_zeros(*g.shape, g.shape[-1]), g.exp()
    matrix.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    for i in range(1, g.shape[-1]):
        torch.mul(matrix[..., i - 1, :i], decay[..., i, None], out=matrix[..., i, :i])
    return scores * matrix, matrix


@_decayed.register_fake
def _(scores: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return g.new_empty(*g.shape, g.shape[-1]), g.new_empty(*g.shape, g.shape[-1])


@custom_op("everlong::decayed_backward", mutates_args=())
def _decayed_backward(grad: Tensor, product: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the scores, before they are summed over R, and of g: ``sum of grad_ij P_ij over i >= l > j``."""
    through = (grad * product).tril_(-1)
    for i in range(through.shape[-1] - 2, 0, -1):
        through[..., i, :i] += through[..., i + 1, :i]
    return grad * matrix, through.sum(-1)


@_decayed_backward.register_fake
def _(grad: Tensor, product: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(matrix), torch.empty_like(matrix[..., 0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(*output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    grad_scores, grad_g = _decayed_backward(grad, *ctx.saved_tensors)
    return grad_scores.sum_to_size(ctx.shape), grad_g


_decayed.register_autograd(_backward, setup_context=_save)
