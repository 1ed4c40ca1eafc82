"""One table of implementations per op: rows that run or refuse with a reason.

``run(TABLE, inputs, backend)`` takes the first row that does not refuse. A named backend runs or
raises. ``EVERLONG_BACKEND`` names one for the whole process; ``explain(op, ...)`` shows the choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..config import suggest
from .quarantine import isolated
from .transforms import when_transforming

_ENVIRONMENT = getattr(os.environ, "_data", os.environ)  # what os.environ asks: a look at it costs a hundredth
_BACKEND = os.environ.encodekey("EVERLONG_BACKEND") if hasattr(os.environ, "encodekey") else "EVERLONG_BACKEND"
FEW = 1 << 14  # numbers that one pass takes about as long for as a choice and a call of a kernel


def never(**inputs: Any) -> str | None:
    """The refusal of a row that runs on everything."""
    return None


def when_traced(**inputs: Any) -> str | None:
    """The refusal of a row whose own autograd function hides it from compiled graphs and transforms."""
    return "a compiled graph traces the plain loop" if torch.compiler.is_compiling() else when_transforming()


class Impl(NamedTuple):
    """One row: ``run`` has the op's signature without ``backend``; ``refuse`` returns why not, or None."""

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None] = never


class Choice(NamedTuple):
    """One line of ``explain``: does this backend run here, and why not."""

    backend: str
    runs: bool
    reason: str


def choose(table: tuple[Impl, ...], inputs: dict[str, Any], backend: str | None) -> Impl:
    """The row that runs. ``ValueError`` where the named backend is unknown or refuses."""
    name = backend or os.environ.get("EVERLONG_BACKEND")
    if name is None:
        return next(row for row in table if row.refuse(**inputs) is None)
    for row in table:
        if row.name == name:
            reason = row.refuse(**inputs)
            if reason is None:
                return row
            raise ValueError(f"backend {name!r} cannot run here: {reason}; leave backend=None to let the op choose")
    raise ValueError(f"no backend {name!r} for this op{suggest(name, [row.name for row in table])}")


def run(table: tuple[Impl, ...], inputs: dict[str, Any], backend: str | None, sequence: tuple[str, ...] = ()) -> Any:
    """Run the op of ``table`` on ``inputs`` with the chosen row, outside autocast (accumulation stays fp32).

    An op whose inputs have ``starts`` names its ``sequence``, the inputs with a time axis: NaN and infinity then stay
    in the document that they are in. ``ValueError`` for tensors without strides: PyTorch computes wrong numbers from
    some of them.
    """
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.layout is not torch.strided:
            raise ValueError(f"{name} is {x.layout}, an op takes tensors with strides; hand it {name}.to_dense()")
    device = next(x.device.type for x in inputs.values() if isinstance(x, torch.Tensor))
    with torch.autocast(device, enabled=False):
        if inputs.get("starts") is None:
            return choose(table, inputs, backend).run(**inputs)
        return isolated(lambda **given: choose(table, given, backend).run(**given), inputs, sequence)


def few(x: torch.Tensor, backend: str | None) -> bool:
    """Whether an op of one pass may take its torch form unasked: x is small, so that choosing costs more than it saves.

    The native rows of such ops refuse the same inputs, so ``explain`` names the form that runs.
    """
    return backend is None and x.numel() < FEW and _BACKEND not in _ENVIRONMENT


def explain(op: Callable[..., Any], **inputs: Any) -> list[Choice]:
    """Which implementation of ``op`` would run on ``inputs``, and why the rows before it do not.

    ``explain(linear_attention, q=q, k=k, v=v)``; the first line that ``runs`` is the one chosen.
    """
    table = op.__globals__["TABLE"]
    return [Choice(row.name, reason is None, reason or "") for row in table for reason in [row.refuse(**inputs)]]
