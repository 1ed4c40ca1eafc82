"""One table of implementations per op: rows that run or refuse with a reason.

``run(TABLE, inputs, backend)`` takes the first row that neither refuses nor would rather not. A named backend runs or
raises; ``with backend("reference"):`` names one for a block of code, ``EVERLONG_BACKEND`` for the whole process.
A verb is an ``Op``: ``linear_attention.explain(q=q, k=k, v=v)`` shows the choice.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

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
    """One row: ``run`` has the op's signature without ``backend``; ``refuse`` returns why it cannot run, or None.

    ``avoid`` returns why another row is better where none is named, or None.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None] = never
    avoid: Callable[..., str | None] = never


class Table(tuple[Impl, ...]):
    """The rows of an op, best first, with its name."""

    name: str

    def __new__(cls, name: str, *rows: Impl) -> Table:
        """``Table("gate", Impl(...), ...)``."""
        made = super().__new__(cls, rows)
        made.name = name
        return made


P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class Op(Protocol[P, R]):
    """A verb with its ``table``, the ``step`` for one token and the ``reference``, where it has them."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The op."""

    table: Table
    step: Any
    reference: Any
    explain: Callable[..., list[Choice]]


def op(table: Table, *, step: Any = None) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make a function an ``Op``; it stays the function that it is."""

    def mark(verb: Any) -> Any:
        verb.table, verb.step = table, step
        verb.reference = next((row.run for row in table if row.name == "reference"), None)
        verb.explain = functools.partial(explain, verb)
        return verb

    return mark


class Choice(NamedTuple):
    """One line of ``explain``: does this backend run here, and why not."""

    backend: str
    runs: bool
    reason: str


_NAMED: dict[int, str] = {}  # by thread; a context variable is nothing that a compiled graph can look at


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Every op inside takes the row ``name``, or raises ``ValueError`` where it has none; for this thread."""
    thread = threading.get_ident()
    before = _NAMED.get(thread)
    _NAMED[thread] = name
    try:
        yield
    finally:
        del _NAMED[thread]
        if before is not None:
            _NAMED[thread] = before


def named() -> str | None:
    """The backend that is asked for here, by ``with backend(...)`` or by EVERLONG_BACKEND."""
    mine = _NAMED.get(threading.get_ident()) if _NAMED else None
    return mine or os.environ.get("EVERLONG_BACKEND") or None


def choose(table: tuple[Impl, ...], inputs: dict[str, Any], backend: str | None) -> Impl:
    """The row that runs. ``ValueError`` where the named backend is unknown or refuses."""
    name, op = backend or named(), getattr(table, "name", "this op")
    if name is None:
        able = [row for row in table if row.refuse(**inputs) is None]
        return next((row for row in able if row.avoid(**inputs) is None), able[0])
    for row in table:
        if row.name == name:
            reason = row.refuse(**inputs)
            if reason is None:
                return row
            raise ValueError(
                f"backend {name!r} of {op} cannot run here: {reason}; leave backend=None to let the op choose"
            )
    raise ValueError(f"{op} has no backend {name!r}{suggest(name, [row.name for row in table])}")


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

    The native rows of such ops avoid the same inputs, so ``explain`` names the form that runs.
    """
    return backend is None and x.numel() < FEW and not _NAMED and _BACKEND not in _ENVIRONMENT


def avoid_few(**inputs: Any) -> str | None:
    """Why a kernel is not worth its call for so few numbers ``x``, or None."""
    x = inputs["x"]
    return f"{x.numel()} numbers are few: PyTorch's own calls cost less" if x.numel() < FEW else None


def explain(op: Any, **inputs: Any) -> list[Choice]:
    """Which implementation of ``op`` would run on ``inputs``, and why the rows before it do not.

    ``explain(linear_attention, q=q, k=k, v=v)``; the first line that ``runs`` is the one chosen.
    """
    reasons = [(row, row.refuse(**inputs) or row.avoid(**inputs)) for row in op.table]
    return [Choice(row.name, reason is None, reason or "") for row, reason in reasons]
