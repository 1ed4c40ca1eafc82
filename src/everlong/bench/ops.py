"""``everlong bench ops``: every form of every op on shared cases, forward and backward, beside the machine's limits.

A form is timed only where its outputs, final state and gradients equal those of the reference in fp64 on the same
inputs. Inputs are rounded to bf16 once, so that fp32 and bf16 forms are held to the same reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import arguments, ops
from ..config import suggest
from ..numerics import BOUNDS, TOLERANCE
from ..ops.cases import CASES, TIMED, Case
from ..ops.dispatch import Impl, Op
from . import clock
from .checks import Verdict, compare, gradients, is_real, outputs_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLOPES = BOUNDS["fp32 gradient"]  # least tolerance of a gradient: sums over all tokens cancel
GRAPH = 2**31  # bytes that the graph of a reference may hold; beyond, only its forward pass is timed
CHECKED = 2**30  # the same for checking gradients, which takes as many of the first tokens as fit
PASSES = ("forward", "forward+backward")
BACKWARD = 2  # a backward pass counts as two forward passes: a product has two factors to differentiate
Row = dict[str, Any]


@dataclass(frozen=True)
class OpsPlan:
    """What is timed. ``backends`` None means all."""

    ops: tuple[str, ...] = ()
    cases: tuple[Case, ...] = tuple(TIMED)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    backends: tuple[str, ...] | None = None
    pace: clock.Pace = field(default_factory=clock.Pace)

    def __post_init__(self) -> None:
        arguments.check(self)


@dataclass(frozen=True)
class Item:
    """One op on one case: its forms are timed against each other."""

    op: str
    case: Case

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.op}{f' ({self.case.variant})' if self.case.variant else ''}, {self.case.name}"


def modules() -> dict[str, ModuleType]:
    """The ops: every file in ``ops/`` with a table and inputs (one token of attention is timed by ``bench models``)."""
    folder = Path(ops.__file__).parent
    found = {path.stem: importlib.import_module(f"{ops.__name__}.{path.stem}") for path in sorted(folder.glob("*.py"))}
    return {name: module for name, module in found.items() if hasattr(module, "TABLE") and hasattr(module, "inputs")}


def chosen_ops(names: list[str]) -> tuple[str, ...]:
    """``names``, or all for none. ``ValueError`` with a suggestion."""
    known = modules()
    for name in names:
        if name not in known:
            raise ValueError(f"no op {name!r}{suggest(name, known)}")
    return tuple(names or known)


def chosen_cases(names: list[str]) -> tuple[Case, ...]:
    """The timed cases of these names, ``tests`` for those of the tests, all timed ones for none."""
    named = {case.name: (case,) for case in TIMED} | {"tests": tuple(CASES)}
    for name in names:
        if name not in named:
            raise ValueError(f"no case {name!r}{suggest(name, named)}")
    return tuple(case for name in names for case in named[name]) or tuple(TIMED)


def chosen_dtypes(names: list[str]) -> tuple[str, ...]:
    """``names`` if they are dtypes that ops are timed in. ``ValueError`` with a suggestion."""
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"no dtype {name!r}{suggest(name, DTYPES)}")
    return tuple(names or DTYPES)


def chosen_backends(names: list[str]) -> tuple[str, ...] | None:
    """``names`` if some op has each of them, None for none. ``ValueError`` with a suggestion."""
    known = {row.name for module in modules().values() for row in module.TABLE}
    for name in names:
        if name not in known:
            raise ValueError(f"no backend {name!r}{suggest(name, known)}")
    return tuple(names) or None


def items(plan: OpsPlan) -> list[Item]:
    """The work, op by op."""
    known = modules()
    return [
        Item(name, case.but(variant=variant))
        for name in plan.ops or known
        for case in plan.cases
        for variant in getattr(known[name], "VARIANTS", (None,))
    ]


def time_item(item: Item, plan: OpsPlan) -> list[Row]:
    """All rows of an op on a case: dtypes x passes x forms, checked and then timed in turn."""
    subject = Subject(item)
    rows = []
    for dtype in plan.dtypes:
        forms = [row for row in subject.module.TABLE if plan.backends is None or row.name in plan.backends]
        for number, name in enumerate(PASSES):
            rows += _time_pass(subject, forms, dtype, backward=bool(number), pace=plan.pace, name=name)
    return rows


class Subject:
    """An op on a case: its inputs, and what the reference in fp64 makes of them."""

    def __init__(self, item: Item) -> None:
        self.item, self.module = item, modules()[item.op]
        self.op: Op[..., Any] = getattr(self.module, item.op)
        self.recurrent = hasattr(self.module, "SEQUENCE")  # else a gate or a norm, of all channels and without a state
        case = item.case.but(dtype=torch.float64)
        if not self.recurrent:
            case = case.but(heads=1, keys=case.heads * (case.values or case.keys))
        torch.manual_seed(0)
        made = self.module.inputs(case)
        self.sequence = self.module.SEQUENCE if self.recurrent else _alike(made, case)
        self.inputs = {name: _rounded(x, name in self.sequence) for name, x in made.items()}
        self.complex = any(x.is_complex() for x in self.inputs.values() if isinstance(x, Tensor))
        with torch.no_grad():
            self.truth = outputs_of(self.op(**self.inputs, backend="reference"))
        self._slopes: tuple[list[Tensor], dict[str, Tensor]] | None = None

    def cast(self, dtype: torch.dtype, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
        """The inputs in fp32, or with what varies in time in bf16."""
        halves = self.sequence if dtype == torch.bfloat16 else ()
        return {name: _cast(x, name in halves) for name, x in (inputs or self.inputs).items()}

    def check(self, form: str, dtype: torch.dtype, *, backward: bool) -> Verdict:
        """Compare a form with the reference."""
        tolerance = TOLERANCE[dtype]
        if not backward:
            with torch.no_grad():
                got = outputs_of(self.op(**self.cast(dtype), backend=form))
            return compare(
                (f"output {i}", g, w, tolerance) for i, (g, w) in enumerate(zip(got, self.truth, strict=True))
            )
        outputs, slopes = self.slopes
        mine, ours = gradients(self._bound(form), self.cast(dtype, self.first))

        def pairs() -> Iterator[tuple[str, Tensor, Tensor, float]]:
            for i, (got, want) in enumerate(zip(mine, outputs, strict=True)):
                yield f"output {i}", got, want, tolerance
            for name, want in slopes.items():
                if name in ours:
                    yield f"gradient of {name}", ours[name], want, max(tolerance, SLOPES)

        return compare(pairs())

    def per_token(self, outputs: list[Tensor]) -> list[Tensor]:
        """Those of ``outputs`` that have tokens: y of a recurrence, not its final state; all of a gate or a norm."""
        return outputs[:1] if self.recurrent else outputs

    def _bound(self, form: str) -> Callable[..., Any]:
        return lambda **inputs: self.op(**inputs, backend=form)

    @property
    def first(self) -> dict[str, Any]:
        """The inputs of the first tokens, as many as the graph of a reference in fp64 can hold."""
        count = self.item.case.time
        while count > 32 and self.graph_bytes(count, 8) > CHECKED:
            count //= 2
        return self.part(count)

    def part(self, count: int) -> dict[str, Any]:
        """The inputs of the first ``count`` tokens; a vector has no time axis."""
        sequence = {n for n in self.sequence if self.inputs[n] is not None and self.inputs[n].dim() > 1}
        return {name: x[:, :count] if name in sequence else x for name, x in self.inputs.items()}

    @property
    def slopes(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs and gradients of the reference, on ``first``."""
        if self._slopes is None:
            self._slopes = gradients(self._bound("reference"), self.first)
        return self._slopes

    def graph_bytes(self, time: int, itemsize: int) -> float:
        """Roughly what the graph of the reference holds after ``time`` tokens: a few states a token, unless it says."""
        if self.op.graph is not None:
            return itemsize * self.op.graph(self.part(time))
        if not self.recurrent:
            return 8.0 * itemsize * time * self.truth[0][:, 0].numel()
        held = sum(x.numel() for x in self.truth[1:]) * (2 if self.complex else 1)
        return 6.0 * itemsize * held * time

    def forward(self, form: str, dtype: torch.dtype) -> clock.Contender:
        """A contender: the op without gradients."""
        inputs = self.cast(dtype)

        def run() -> object:
            with torch.no_grad():
                return self.op(**inputs, backend=form)

        return clock.stopwatch(run)

    def both(self, form: str, dtype: torch.dtype) -> clock.Contender:
        """A contender: forward, and the gradients of all inputs for given gradients of what is made for each token."""
        inputs = {name: x.requires_grad_() if is_real(x) else x for name, x in self.cast(dtype).items()}
        wanted = [x for x in inputs.values() if is_real(x)]
        upstream: list[Tensor] = []

        def run() -> object:
            made = self.per_token(outputs_of(self.op(**inputs, backend=form)))
            if not upstream:
                upstream.extend(torch.randn_like(y) for y in made)
            return torch.autograd.grad(made, wanted, upstream, allow_unused=True)

        return clock.stopwatch(run)


def _alike(inputs: dict[str, Any], case: Case) -> tuple[str, ...]:
    """The inputs with an axis of tokens."""
    return tuple(n for n, x in inputs.items() if isinstance(x, Tensor) and x.shape[:2] == (case.batch, case.time))


def _rounded(x: Any, varies: bool) -> Any:
    """Values that fp32, and where they vary in time bf16, hold exactly."""
    if not is_real(x):
        return x
    if x.is_complex():
        return x.to(torch.complex64).to(torch.complex128)
    return x.to(torch.bfloat16 if varies else torch.float32).double()


def _cast(x: Any, half: bool) -> Any:
    if not is_real(x):
        return x
    if x.is_complex():
        return x.to(torch.complex64).clone()
    return x.to(torch.bfloat16 if half else torch.float32).clone()


def _time_pass(
    subject: Subject, forms: list[Impl], dtype: str, *, backward: bool, pace: clock.Pace, name: str
) -> list[Row]:
    """The rows of one dtype and pass."""
    kind, rows, contenders = DTYPES[dtype], [], {}
    for form in forms:
        row = _described(subject, form.name, dtype, name)
        if reason := _refusal(subject, form, kind, backward=backward):
            row.update(status="refused", reason=reason)
        else:
            verdict = subject.check(form.name, kind, backward=backward)
            row.update(
                error=verdict.error, status="timed" if verdict.reason is None else "mismatch", reason=verdict.reason
            )
            if verdict.reason is None:
                contenders[form.name] = (subject.both if backward else subject.forward)(form.name, kind)
        rows.append(row)
    laps = clock.interleave(contenders, pace)
    given = subject.cast(kind)
    work = subject.op.operations(given) * (1 + BACKWARD * backward)
    moved = _traffic(
        given,
        [x if x.is_complex() else x.to(kind) for x in subject.per_token(subject.truth)],
        backward=backward,
    )
    for row in rows:
        if row["backend"] in laps:
            row.update(_figures(row["backend"], laps, work, moved))
    return rows


def _described(subject: Subject, form: str, dtype: str, name: str) -> Row:
    case = subject.item.case
    return {
        "op": subject.item.op,
        "variant": case.variant,
        "case": case.name,
        "batch": case.batch,
        "time": case.time,
        "dtype": dtype,
        "backend": form,
        "pass": name,
        "status": "pending",
        "reason": None,
        "error": None,
    }


def _refusal(subject: Subject, form: Impl, dtype: torch.dtype, *, backward: bool) -> str | None:
    """Why a form is not even tried."""
    if subject.complex and dtype == torch.bfloat16:
        return "there are no complex numbers in bf16"
    try:
        with torch.no_grad():
            subject.op(**subject.cast(dtype, subject.part(2) if subject.recurrent else None), backend=form.name)
    except ValueError as error:
        return str(error).partition("cannot run here: ")[2].partition("; leave backend")[0] or str(error)
    held = subject.graph_bytes(subject.item.case.time, 4)
    if backward and form.name == "reference" and held > GRAPH:
        return f"the graph of the loop would hold about {held / 2**30:.0f} GiB"
    return None


def _traffic(inputs: dict[str, Any], outputs: list[Tensor], *, backward: bool) -> float:
    """Bytes that must be moved: inputs read and outputs written; backward reads both again and writes gradients."""
    given = sum(x.nbytes for x in inputs.values() if isinstance(x, Tensor))
    made = sum(x.nbytes for x in outputs)
    return float(3 * given + 2 * made if backward else given + made)


def _figures(form: str, laps: dict[str, clock.Laps], work: float, moved: float) -> Row:
    """Times, rates and, where the reference was timed, how many times faster this form is."""
    own = laps[form]
    found: Row = {"ms": clock.spread([1000 * total for total in own.totals()])}
    found["gflops"] = work / 1e6 / found["ms"]["median"]
    found["gbs"] = moved / 1e6 / found["ms"]["median"]
    found["against"] = {other: clock.ratios(own, laps[other]) for other in laps if other != form}
    return found
