"""Our ops under the transforms of PyTorch: ``torch.func``, and ``torch.autograd.forward_ad``.

Kernels and written-out backward passes know the plain gradient, in reverse, of plain tensors. Under ``grad``, ``vmap``,
``jvp`` and their like the ops therefore run as PyTorch's own operations, through which every transform sees
(``transforming``). A graph that was built outside may still be asked for several gradients at once
(``is_grads_batched``, ``jacobian(vectorize=True)``): ``custom_op`` answers one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

_LIBRARY = torch.library.Library("everlong", "FRAGMENT")
REASON = (
    "a transform of torch.func, or forward-mode differentiation, is at work: it sees through PyTorch's own operations"
)


def transforming() -> bool:
    """Whether a transform of ``torch.func`` is under way, or differentiation in forward mode."""
    if torch.compiler.is_compiling():
        return under_torch_func()
    return forward_ad._current_level >= 0 or under_torch_func()


def under_torch_func() -> bool:
    """Whether a transform of ``torch.func`` is under way."""
    return torch._C._functorch.maybe_current_level() is not None


under_torch_func._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a graph asks while it is being traced


def several_gradients(*tensors: Tensor) -> bool:
    """Whether one of these stands for a batch of gradients (``is_grads_batched``)."""
    return not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))


def when_transforming(**inputs: Any) -> str | None:
    """The refusal of a row that hides what it does from transforms."""
    return REASON if transforming() else None


def custom_op(name: str, *, mutates_args: tuple[str, ...], device_types: str | None = None) -> Callable[..., Any]:
    """``torch.library.custom_op``, which ``vmap`` calls on each slice in turn, unless it mutates arguments."""

    def made(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(name, function, mutates_args=mutates_args, device_types=device_types)
        if not mutates_args:
            op.register_vmap(partial(_one_by_one, op))
            _LIBRARY.impl(name.split("::")[1], partial(_several_gradients, op), "Batched")
        return op

    return made


def _one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    whole = _stack([op(*_slice(args, in_dims, i)) for i in range(info.batch_size)])
    return whole, tree_map(lambda _: 0, whole)


def _several_gradients(op: Any, *args: Any) -> Any:
    """The same for ``is_grads_batched``, whose batches are of an older kind than those of ``torch.func.vmap``."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    is_batch = torch._C._functorch.is_legacy_batchedtensor
    dims = tree_map(lambda x: 0 if isinstance(x, Tensor) and is_batch(x) else None, args)
    whole = tree_map(
        lambda x: torch._remove_batch_dim(x, level, 1, 0) if isinstance(x, Tensor) and is_batch(x) else x, args
    )
    sizes = [len(x) for x, dim in zip(tree_leaves(whole), tree_leaves(dims), strict=True) if dim == 0]
    made = _stack([op(*_slice(whole, dims, i)) for i in range(sizes[0])])
    return tree_map(lambda x: torch._add_batch_dim(x, 0, level), made)


def _slice(args: Any, dims: Any, index: int) -> Any:
    if isinstance(args, (tuple, list)):
        return [_slice(arg, dim, index) for arg, dim in zip(args, dims, strict=True)]
    return args if dims is None or not isinstance(args, Tensor) else args.select(dims, index)


def _stack(made: list[Any]) -> Any:
    if isinstance(made[0], Tensor):
        return torch.stack(made)
    return type(made[0])(_stack(list(column)) for column in zip(*made, strict=True))
