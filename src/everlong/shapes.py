"""Check tensor shapes at public boundaries and return the sizes.

One legend for the whole library: ``B`` batch, ``T`` time, ``D`` model, ``H`` heads, ``K`` key or
state size (papers' N), ``V`` value size (papers' P), ``W`` convolution width, ``C`` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dims(spec: str, *tensors: Tensor | None) -> list[int]:
    """Sizes named by ``spec``, in order of first appearance; ``ValueError`` where a shape differs.

    ``spec`` holds one comma-separated entry per tensor, its name first and then its axes:
    ``B, T, H, K, V = dims("q B T H K, k B T H K, v B T H V", q, k, v)``.
    An axis written as a number must have that size; a tensor that is ``None`` is skipped.
    """
    entries = [entry.split() for entry in spec.split(",")]
    assert len(entries) == len(tensors), f"{len(entries)} entries in {spec!r}, {len(tensors)} tensors"
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for (name, *axes), tensor in zip(entries, tensors, strict=True):
        if tensor is None:
            continue
        legend = f"[{' '.join(axes)}]"
        if tensor.dim() != len(axes):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {len(axes)} axes {legend}")
        for axis, size in zip(axes, tensor.shape, strict=True):
            if axis.isdigit():
                if size != int(axis):
                    raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {legend}")
            elif axis not in sizes:
                sizes[axis], owner[axis] = size, name
            elif sizes[axis] != size:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}, expected {legend} "
                    f"with {axis} = {sizes[axis]} (from {owner[axis]}), got {axis} = {size}"
                )
    return list(sizes.values())


def extent(x: Tensor) -> int:
    """Numbers from the first of ``x`` in memory to its last, gaps included."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def check_starts(starts: Tensor | None, batch: int, time: int) -> None:
    """``starts`` must be ``None`` or bool ``[B T]``: True at the first token of each document."""
    if starts is None:
        return
    if starts.dtype != torch.bool:
        raise ValueError(f"starts has dtype {starts.dtype}, expected torch.bool (True at each first token)")
    if tuple(starts.shape) != (batch, time):
        raise ValueError(f"starts has shape {list(starts.shape)}, expected [B T] = [{batch}, {time}]")


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and accumulation for inputs like ``x``: fp32, or fp64 for fp64 inputs."""
    if x.dtype not in FLOATS:
        raise ValueError(f"got dtype {x.dtype}, expected a floating dtype; convert with .float()")
    return torch.float64 if x.dtype == torch.float64 else torch.float32
