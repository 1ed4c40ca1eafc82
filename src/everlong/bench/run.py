"""A bench from beginning to end: the machine's limits, then stage by stage, within a time that is said beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..arguments import folder, number, whole
from ..machine import usable_cores
from . import claims, clock, models, ops, results
from .limits import Limits
from .models import ModelsPlan, Stage
from .ops import OpsPlan

Results = dict[str, Any]
Watch = Callable[[int, int, str], None]  # stages done, stages in all, what comes now


class Terms(NamedTuple):
    """How a bench is run: where its results go, on how many threads, and after how many minutes no stage begins.

    ``goals``: whether the project's own goals (``claims``) are held to the figures.
    """

    out: Path
    threads: int | None = None
    minutes: float = 30.0
    command: str = ""
    goals: bool = False

    def check(self) -> None:
        """``ValueError`` for a folder that is a file, and for numbers out of their bounds."""
        folder(self.out)
        number("minutes", self.minutes, 1e-3, 1e6)
        whole("threads", usable_cores() if self.threads is None else self.threads, 1, 4096)


def run_ops(plan: OpsPlan, terms: Terms, watch: Watch) -> Results:
    """Time ops as ``plan`` says; the results, also in ``results.json``. ``complete`` is False after Ctrl-C."""
    settings = {
        "ops": list(plan.ops) or list(ops.modules()),
        "cases": [case.name for case in plan.cases],
        "dtypes": list(plan.dtypes),
        "backends": list(plan.backends or ["all"]),
        **_timing(plan.pace, terms),
    }

    def stages(limits: Limits) -> list[Stage]:
        return [Stage(item.label, partial(ops.time_item, item, plan)) for item in ops.items(plan)]

    return _run("ops", stages, settings, terms, watch)


def run_models(plan: ModelsPlan, terms: Terms, watch: Watch) -> Results:
    """Time models as ``plan`` says; the results, also in ``results.json``. ``complete`` is False after Ctrl-C."""
    settings = {
        "models": list(plan.models),
        "measures": list(plan.measures),
        "weights": list(plan.weights),
        "prompts": list(plan.lengths),
        "contexts": list(plan.contexts),
        "batches": list(plan.batches),
        "texts read": list(plan.reads),
        "against": list(plan.against) or ["nobody"],
        "tokens of a round": plan.steps,
        "training": f"width {plan.training.d_model}, {plan.training.layers} layers, "
        f"{plan.training.batch} x {plan.training.context} bytes",
        **_timing(plan.pace, terms),
    }
    with models.Stand(plan) as stand:
        return _run("models", partial(models.stages, stand), settings, terms, watch)


def _timing(pace: clock.Pace, terms: Terms) -> dict[str, Any]:
    return {"seconds of a comparison": pace.seconds, "least rounds": pace.least, "minutes at most": terms.minutes}


def _run(
    kind: str, stages: Callable[[Limits], Sequence[Stage]], settings: dict[str, Any], terms: Terms, watch: Watch
) -> Results:
    with threads(terms.threads):
        found = results.begin(kind, terms.command, settings)
        try:
            watch(0, 0, "the machine's limits")
            limits = Limits()
            found["limits"] = limits.measure()
            _work(found, stages(limits), terms, watch)
            found["complete"] = not found["skipped"] and not found["failed"]
        except KeyboardInterrupt:
            found["skipped"].append("what came after Ctrl-C")
        if terms.goals:
            found["lines"] = claims.lines(kind, found["rows"])
        results.save(found, terms.out)
    return found


def _work(found: Results, stages: Sequence[Stage], terms: Terms, watch: Watch) -> None:
    """Run the stages; a failed one is recorded and the others go on."""
    end = time.monotonic() + 60 * terms.minutes
    for index, stage in enumerate(stages):
        watch(index, len(stages), stage.label)
        if time.monotonic() > end:
            found["skipped"].append(stage.label)
            continue
        try:
            found["rows"] += stage.run()
        except (RuntimeError, ValueError) as error:
            found["failed"].append({"label": stage.label, "reason": f"{type(error).__name__}: {error}"})
        results.save(found, terms.out)
    watch(len(stages), len(stages), "done")


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """PyTorch at ``count`` threads (None: one for each core that this process may use), and back at the end.

    ``ValueError`` for less than one.
    """
    count = usable_cores() if count is None else count
    whole("threads", count, 1, 4096)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
