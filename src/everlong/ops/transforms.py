"""Our ops under the transforms of PyTorch: ``torch.func``, and ``torch.autograd.forward_ad``.

Kernels and written-out backward passes know the plain gradient, in reverse, of plain tensors. Under ``grad``, ``vmap``,
``jvp`` and their like the ops therefore run as PyTorch's own operations, through which every transform sees
(``transforming``). A graph that was built outside may still be asked for several gradients at once
(``is_grads_batched``, ``jacobian(vectorize=True)``): ``batched`` answers one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

REASON = (
    "a transform of torch.func, or forward-mode differentiation, is at work: it sees through PyTorch's own operations"
)


def transforming() -> bool:
    """Whether a transform of ``torch.func`` is under way, or differentiation in forward mode."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def when_transforming(**inputs: Any) -> str | None:
    """The refusal of a row that hides what it does from transforms."""
    return REASON if transforming() else None


def batched(op: Any) -> Any:
    """Let ``op``, a custom op, be called under ``vmap``: on each slice in turn. Returns it."""

    def run(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        made = [op(*_slice(args, in_dims, i)) for i in range(info.batch_size)]
        whole = _stack(made)
        return whole, tree_map(lambda _: 0, whole)

    op.register_vmap(run)
    return op


def _slice(args: Any, dims: Any, index: int) -> Any:
    if isinstance(args, (tuple, list)):
        return [_slice(arg, dim, index) for arg, dim in zip(args, dims, strict=True)]
    return args if dims is None or not isinstance(args, Tensor) else args.select(dims, index)


def _stack(made: list[Any]) -> Any:
    if isinstance(made[0], Tensor):
        return torch.stack(made)
    return type(made[0])(_stack(list(column)) for column in zip(*made, strict=True))
