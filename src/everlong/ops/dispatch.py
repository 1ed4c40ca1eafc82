"""One table of implementations per op: rows that run or refuse with a reason.

``run(TABLE, inputs, backend)`` takes the first row that neither refuses nor would rather not. A named backend runs or
raises; ``with backend("reference"):`` names one for a block of code, ``EVERLONG_BACKEND`` for the whole process.
A verb is an ``Op``: ``linear_attention.explain(q, k, v)`` shows the choice.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
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
    """The rows of an op, best first, with its name and ``sequence``, its inputs with a time axis (none: no state)."""

    name: str
    sequence: tuple[str, ...]

    def __new__(cls, name: str, *rows: Impl, sequence: tuple[str, ...] = ()) -> Table:
        """``Table("gate", Impl(...), ...)``."""
        made = super().__new__(cls, rows)
        made.name, made.sequence = name, sequence
        return made


P = ParamSpec("P")
R = TypeVar("R", covariant=True)


Count = Callable[[dict[str, Any]], float]  # of an op's inputs


class Op(Protocol[P, R]):
    """A verb with its ``table``, the ``step`` for one token (where it has one) and the ``reference``.

    ``operations(inputs)`` counts the arithmetic of the recurrence that defines the op: a multiplication, an addition,
    a root and an exponential are one operation each, a complex product is six. A form may do more (a chunk form trades
    arithmetic for matrix products) or less, so operations a second compare the forms of an op. ``graph(inputs)``: about
    how many numbers the reference keeps for its gradients, where that is something else than a few states a token.
    """

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The op."""

    table: Table
    step: Any
    reference: Any
    operations: Count
    graph: Count | None
    explain: Callable[P, list[Choice]]


def op(
    table: Table, *, operations: Count, step: Any = None, graph: Count | None = None
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make a function an ``Op``; it stays the function that it is."""

    def mark(verb: Any) -> Any:
        verb.table, verb.step, verb.operations, verb.graph = table, step, operations, graph
        verb.reference = next((row.run for row in table if row.name == "reference"), None)
        verb.explain = functools.partial(explain, verb)
        return verb

    return mark


class Choice(NamedTuple):
    """One line of ``explain``: does this backend run here, and why not."""

    backend: str
    runs: bool
    reason: str


class _Here(threading.local):
    """What ``backend`` says in this thread: nothing (None), a name, or "" for no name whatever the environment says.

    Set in ``__init__``, it is an attribute of each thread's own object, which compiled graphs guard.
    """

    def __init__(self) -> None:
        self.name: str | None = None


_HERE = _Here()


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Every op inside takes the row ``name``, or raises ``ValueError`` where it has none; None lets each op choose.

    For this thread. It goes before EVERLONG_BACKEND, and an op's own ``backend=`` before both. A graph that was
    compiled under another name is compiled again.
    """
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"backend is {name!r}, expected the name of a row ('native', 'torch', 'reference') or None")
    before, _HERE.name = _HERE.name, name or ""
    try:
        yield
    finally:
        _HERE.name = before


def named() -> str | None:
    """The backend that is asked for here, by ``with backend(...)`` or by EVERLONG_BACKEND."""
    if _HERE.name is not None:
        return _HERE.name or None
    return (os.environ.get("EVERLONG_BACKEND") or None) if _BACKEND in _ENVIRONMENT else None


def choose(table: Table, inputs: dict[str, Any], backend: str | None) -> Impl:
    """The row that runs. ``ValueError`` where the named backend is unknown or refuses."""
    name = backend or named()
    if name is None:
        able = [row for row in table if row.refuse(**inputs) is None]
        return next((row for row in able if row.avoid(**inputs) is None), able[0])
    for row in table:
        if row.name == name:
            reason = row.refuse(**inputs)
            if reason is None:
                return row
            raise ValueError(
                f"backend {name!r} of {table.name} cannot run here: {reason}; leave backend=None to let the op choose"
            )
    raise ValueError(f"{table.name} has no backend {name!r}{suggest(name, [row.name for row in table])}")


def run(table: Table, inputs: dict[str, Any], backend: str | None) -> Any:
    """Run the op of ``table`` on ``inputs`` with the chosen row, outside autocast (accumulation stays fp32).

    Where ``inputs`` have ``starts``, NaN and infinity stay in the document that they are in. ``ValueError`` for tensors
    without strides: PyTorch computes wrong numbers from some of them.
    """
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.layout is not torch.strided:
            raise ValueError(f"{name} is {x.layout}, an op takes tensors with strides; hand it {name}.to_dense()")
    device = next(x.device.type for x in inputs.values() if isinstance(x, torch.Tensor))
    with torch.autocast(device, enabled=False):
        if inputs.get("starts") is None:
            return choose(table, inputs, backend).run(**inputs)
        return isolated(lambda **given: choose(table, given, backend).run(**given), inputs, table.sequence)


def few(x: torch.Tensor, backend: str | None) -> bool:
    """Whether an op of one pass may take its torch form unasked: x is small, so that choosing costs more than it saves.

    The native rows of such ops avoid the same inputs, so ``explain`` names the form that runs.
    """
    return backend is None and x.numel() < FEW and _HERE.name is None and _BACKEND not in _ENVIRONMENT


def avoid_few(**inputs: Any) -> str | None:
    """Why a kernel is not worth its call for so few numbers ``x``, or None."""
    x = inputs["x"]
    return f"{x.numel()} numbers are few: PyTorch's own calls cost less" if x.numel() < FEW else None


def explain(op: Any, *args: Any, **kwargs: Any) -> list[Choice]:
    """Which implementation would run if ``op`` were called so, and why the others would not.

    ``explain(linear_attention, q, k, v)`` or ``linear_attention.explain(q, k, v)``; the first line that ``runs`` is the
    one chosen. Where a backend is named, only its row can be. ``ValueError`` for arguments that the op does not take.
    """
    if not isinstance(getattr(op, "table", None), Table):
        raise ValueError(f"{getattr(op, '__name__', op)!r} has no table of implementations, expected an op like norm")
    try:
        given = inspect.signature(op).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{op.table.name}: {error}; explain it with what it is called with") from None
    given.apply_defaults()
    name, lines = given.arguments.pop("backend") or named(), []
    for row in op.table:
        if name is None:
            reason = row.refuse(**given.arguments) or row.avoid(**given.arguments)
        else:
            reason = row.refuse(**given.arguments) if row.name == name else f"backend {name!r} is asked for"
        lines.append(Choice(row.name, reason is None, reason or ""))
    return lines
