"""The law of isolation: what is not finite in one document of a packed row reaches no other document.

A document is promised more than to be close to itself alone, which is the law of resets: whatever finite numbers, NaN
or infinity its neighbours hold, its outputs, its final state and the gradients of its inputs are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import state as states

ENDS = (0, 30, 50, 70)  # of the three documents in the first row; the first was under way


def isolation(subject: Any) -> None:
    """What is not finite stays in its document: the others of the row, and the other rows, are equal to the bit.

    Outputs, final states and the gradients of the inputs from a loss on the others, whatever the broken document holds.
    """
    for dtype in (torch.float64, torch.float32):
        module = subject.module(dtype)
        with torch.no_grad():
            old = module(subject.input(2, 9, dtype))[1]
        x, starts = subject.input(2, ENDS[-1], dtype), torch.zeros(2, ENDS[-1], dtype=torch.bool)
        starts[0, list(ENDS[1:-1])] = True
        cotangent = torch.randn(x.shape, dtype=dtype)
        clean = _run(module, x, old, starts)
        for value, token, broken in _broken(x):
            run, what = _run(module, broken, old, starts), f"{value:g} at token {token} of {ENDS[-1]} ({dtype})"
            last = token >= ENDS[-2]
            good = ~_document_of(token, starts)
            _untouched(_outcome(run, cotangent, good, last), _outcome(clean, cotangent, good, last), what)
            if value != value and bool(torch.isfinite(run[1][0, token]).all()):
                raise AssertionError(f"the output hides {what}")
        run, good = _run(module, x, states.map_leaves(_first_row_nan, old), starts), ~_document_of(0, starts)
        what = f"a state of NaN before the first document ({dtype})"
        _untouched(_outcome(run, cotangent, good, False), _outcome(clean, cotangent, good, False), what)


def _broken(x: Tensor) -> Iterator[tuple[float, int, Tensor]]:
    """Values, their tokens, and x with them in its first row: NaN, infinity, and numbers whose products overflow."""
    nan, inf, huge = float("nan"), float("inf"), torch.finfo(x.dtype).max ** 0.8
    for token, value in ((17, nan), (17, huge), (40, inf), (40, huge), (69, nan), (69, -inf)):
        broken = x.clone()
        broken[0, token] = value
        yield value, token, broken


def _document_of(token: int, starts: Tensor) -> Tensor:
    """The tokens [B T] of the document of a token of the first row."""
    document = starts.long().cumsum(1)
    mine = document == document[0, token]
    mine[1:] = False
    return mine


def _run(module: Any, x: Tensor, state: Any, starts: Tensor) -> tuple[Tensor, Tensor, Any]:
    """The input, as a leaf that wants gradients, the output and the final state."""
    x = x.clone().requires_grad_()
    return x, *module(x, state, starts=starts)


def _outcome(run: tuple[Tensor, Tensor, Any], cotangent: Tensor, good: Tensor, last: bool) -> dict[str, Tensor]:
    """What ``good`` tokens are promised; the first row's final state is not theirs where the ``last`` one is broken."""
    x, y, final = run
    loss = (y[good] * cotangent[good]).sum()
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = {f"final state, leaf {name}": leaf[int(last) :] for name, leaf, _ in states.leaves(final)}
    return {"output": y[good], "gradient of the input": grad[good], **kept}


def _untouched(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    for name, theirs in want.items():
        if not torch.equal(got[name], theirs):
            raise AssertionError(f"{name} of other documents changes with {what}")


def _first_row_nan(leaf: Tensor) -> Tensor:
    if not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    return torch.cat([torch.full_like(leaf[:1], float("nan")), leaf[1:]])
