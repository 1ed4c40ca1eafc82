"""What the ops share: the loop that defines them, and chunking along time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import state_dtype
from .dispatch import few
from .norm import norm
from .transforms import transforming


def as_complex(x: Tensor) -> Tensor:
    """``torch.view_as_complex`` of x [... 2], of a copy where x does not lie in pairs in memory."""
    odd = torch.compiler.is_compiling() or x.storage_offset() % 2  # a graph cannot ask where memory begins
    if x.stride(-1) != 1 or odd or any(step % 2 for step in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x)


def loop(
    step: Callable[..., Any], sequence: dict[str, Tensor | None], *, state: Tensor, starts: Tensor | None, **fixed: Any
) -> tuple[Tensor, Tensor]:
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


def token_positions(position: Tensor, time: int, starts: Tensor | None) -> Tensor:
    """The positions of the next ``time`` tokens within their documents.  ``position [B] -> [B T]``."""
    index = torch.arange(time, device=position.device)
    if starts is None:
        return position[:, None] + index
    first = torch.where(starts, index, -1).cummax(dim=1).values
    return torch.where(first < 0, position[:, None] + index, index - first)


def chunk_size(length: int, most: int) -> int:
    """The length of a chunk: ``most``, or the smallest power of two that holds a shorter text."""
    return min(most, 1 << (length - 1).bit_length())


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


def previous(x: Tensor, last: Tensor, starts: Tensor | None) -> Tensor:
    """Token shift: the token before each of x [B T D], ``last [B D]`` before the first, 0 where a document starts."""
    shifted = torch.cat([last[:, None], x[:, :-1]], dim=1)
    return shifted if starts is None else shifted.masked_fill(starts[..., None], 0.0)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / |x| over the last axis, eps under the root; in fp32, or fp64 for fp64."""
    x, width = x.to(state_dtype(x)), x.shape[-1]
    if few(x, None):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
    return norm(x, weight=x.new_full((width,), width**-0.5), eps=eps / width)


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


def windows(x: Tensor) -> Tensor:
    """``w[..., r, c] = x[..., r + c]`` of x [... 2S-1]: [... S S], a view; for transforms, made of copies."""
    size = (x.shape[-1] + 1) // 2
    if not transforming():
        return x.unfold(-1, size, 1)
    rows = F.pad(x[..., None, :].expand(*x.shape[:-1], size, -1), (0, 1)).flatten(-2)  # each row moves by one
    return F.pad(rows, (0, size)).unflatten(-1, (size, -1))[..., :size]


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigmoid(x), by softplus: ``F.logsigmoid`` wakes all threads for a handful of numbers, once per token."""
    return F.softplus(x, beta=-1, threshold=50)
