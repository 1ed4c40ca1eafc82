"""``everlong bench models``: whole models at random weights, Everlong's engine and its peers in turn.

- prefill: reading a prompt of each length up to the id of the next token, which is the time to the first token;
- decode: one token after the other at each context; latencies, and weights read per second beside the memory's limit;
- batch: decoding several rows at once, against one;
- training, memory, loss: see ``training.py`` and ``memory.py``.

No engine is timed before its logits, after a prompt and after single tokens, equal the functional forward in fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..config import suggest
from ..models.lm import LanguageModel
from . import checks, clock, memory, peers, training
from .engines import Engine, Everlong, Unavailable, history_bytes, randomized
from .limits import Limits

Row = dict[str, Any]
MEASURES = ("prefill", "decode", "batch", "training", "memory", "loss")
LIMIT = "memory"  # the contender that reads memory and does nothing else
PASSES = 4  # over the buffer, in a round of decoding


@dataclass(frozen=True)
class ModelsPlan:
    """What is timed. ``models`` are named configurations; ``steps`` tokens are decoded in each round.

    A peer is left out where reading a prompt once would take it longer than ``patience`` seconds.
    """

    models: dict[str, LanguageModel.Config]
    measures: tuple[str, ...] = MEASURES
    weights: tuple[str, ...] = ("fp32", "bf16")
    lengths: tuple[int, ...] = (512, 2048)
    contexts: tuple[int, ...] = (512,)
    batches: tuple[int, ...] = (1, 4, 16)
    reads: tuple[int, ...] = (10_000, 100_000)
    against: tuple[str, ...] = ()
    steps: int = 64
    pace: clock.Pace = field(default_factory=lambda: clock.Pace(seconds=20.0))
    patience: float = 60.0
    training: training.Shape = field(default_factory=training.Shape)

    def __post_init__(self) -> None:
        arguments.check(self)


@dataclass(frozen=True)
class Stage:
    """A piece of the work: what it is called, and the function that gives its rows."""

    label: str
    run: Callable[[], list[Row]]


def chosen_measures(names: Sequence[str]) -> tuple[str, ...]:
    """``names``, or all for none. ``ValueError`` with a suggestion."""
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"no measure {name!r}{suggest(name, MEASURES)}")
    return tuple(names or MEASURES)


def stages(stand: Stand, limits: Limits) -> list[Stage]:
    """The work, model by model and format by format; each model is built and checked when its first stage begins."""
    plan, found = stand.plan, []

    def add(label: str, work: Callable[..., list[Row]], *args: Any) -> None:
        found.append(Stage(label, partial(work, *args)))

    for name in plan.models:
        for weights in plan.weights:
            if "prefill" in plan.measures:
                add(f"{name} {weights}, prefill", stand.prefill, name, weights)
            for context in plan.contexts if "decode" in plan.measures else ():
                add(f"{name} {weights}, decode at {context:,}", stand.decode, name, weights, context, limits)
            if "batch" in plan.measures:
                add(f"{name} {weights}, batches", stand.batches, name, weights)
        if "memory" in plan.measures:
            add(f"{name}, memory", memory.by_length, name, plan.models[name], plan.reads)
    if "training" in plan.measures:
        add("training", training.throughput, plan.training, plan.against, plan.pace)
    if "loss" in plan.measures:
        add("loss over a large vocabulary", memory.loss_rows)
    return found


class Stand:
    """Holds the engines of one model and format at a time; a context manager that closes them."""

    def __init__(self, plan: ModelsPlan) -> None:
        self.plan = plan
        self._key = ("", "")
        self._rig: Rig | None = None

    def at(self, name: str, weights: str) -> Rig:
        """The engines of this model and format; those of another are closed."""
        if self._rig is None or self._key != (name, weights):
            self.close()
            self._rig, self._key = Rig(name, self.plan.models[name], weights, self.plan), (name, weights)
        return self._rig

    def prefill(self, name: str, weights: str) -> list[Row]:
        """See ``prefill``."""
        return prefill(self.at(name, weights))

    def decode(self, name: str, weights: str, context: int, limits: Limits) -> list[Row]:
        """See ``decode``."""
        return decode(self.at(name, weights), context, limits)

    def batches(self, name: str, weights: str) -> list[Row]:
        """See ``batches``."""
        return batches(self.at(name, weights))

    def close(self) -> None:
        """Give back the engines."""
        if self._rig is not None:
            self._rig.close()
        self._rig = None

    def __enter__(self) -> Stand:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Rig:
    """One model and format: our engine and those of the peers, each checked; what failed is kept as ``failures``."""

    def __init__(self, name: str, cfg: LanguageModel.Config, weights: str, plan: ModelsPlan) -> None:
        self.name, self.weights, self.plan = name, weights, plan
        self.model = randomized(cfg)
        self.engines: dict[str, Engine] = {}
        self.errors: dict[str, float] = {}
        self.speed: dict[str, float] = {}  # tokens of a short prompt read per second
        self.failures: list[Row] = []
        self._add("everlong", weights, partial(Everlong, self.model, weights))
        most = max([*plan.lengths, *plan.contexts, checks.PROMPT]) + 64 + plan.steps * (plan.pace.most + 1)
        for peer in plan.against:
            form = peers.counterpart(peer, weights)
            if form is not None:
                self._add(peer, form, partial(peers.engine, peer, self.model, form, tokens=most))

    def _add(self, title: str, weights: str, make: Callable[[], Engine]) -> None:
        """Build an engine and hold it to the reference; it is timed only if it passes."""
        try:
            engine = make()
        except Unavailable as error:
            self._fail(title, weights, "unavailable", str(error))
            return
        verdict = checks.check_engine(engine, self.tokens(1, checks.PROMPT + checks.MORE))
        if verdict.reason is not None:
            self._fail(title, weights, "mismatch", verdict.reason, verdict.error)
            engine.close()
            return
        self.engines[engine.label], self.errors[engine.label] = engine, verdict.error
        began = time.perf_counter()
        engine.read(self.tokens(1, checks.PROMPT))
        self.speed[engine.label] = checks.PROMPT / (time.perf_counter() - began)

    def _fail(self, engine: str, weights: str, status: str, reason: str, error: float | None = None) -> None:
        row = {"model": self.name, "engine": engine, "weights": weights, "status": status, "reason": reason}
        self.failures.append({**row, "error": error})

    @property
    def ours(self) -> Everlong | None:
        """Our engine, if it passed."""
        return next((engine for engine in self.engines.values() if isinstance(engine, Everlong)), None)

    def tokens(self, batch: int, length: int) -> Tensor:
        """Random ids [B T], always the same ones."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.model.cfg.vocab_size, (batch, length), generator=generator)

    def row(self, measure: str, label: str, **fields: Any) -> Row:
        """A row of an engine that is timed."""
        engine = self.engines[label]
        about = {"model": self.name, "engine": engine.title, "weights": engine.weights}
        return {"measure": measure, **about, **fields, "status": "timed", "reason": None, "error": self.errors[label]}

    def failed(self, measure: str, **fields: Any) -> list[Row]:
        """The rows of the engines that are not timed."""
        return [{"measure": measure, **row, **fields} for row in self.failures]

    def too_slow(self, label: str, tokens: int) -> str | None:
        """Why a peer is not asked to read this much, or None."""
        seconds = tokens / self.speed[label]
        if self.engines[label] is self.ours or seconds < self.plan.patience:
            return None
        return f"reading {tokens:,} tokens would take about {seconds:,.0f} s"

    def close(self) -> None:
        """Close all engines."""
        for engine in self.engines.values():
            engine.close()


def prefill(rig: Rig) -> list[Row]:
    """Reading prompts of all lengths, all engines in turn; the longest first warms up nothing but itself."""
    contenders: dict[str, clock.Contender] = {}
    rows = rig.failed("prefill", length=None)
    places = {}
    for length in rig.plan.lengths:
        prompt = rig.tokens(1, length)
        for label, engine in rig.engines.items():
            row = rig.row("prefill", label, length=length, batch=1)
            if reason := rig.too_slow(label, length):
                row.update(status="skipped", reason=reason)
            else:
                places[f"{label} {length}"] = (row, label, length)
                contenders[f"{label} {length}"] = clock.stopwatch(partial(_first_token, engine, prompt))
            rows.append(row)
    laps = clock.interleave(contenders, rig.plan.pace)
    for key, (row, label, length) in places.items():
        row["seconds"] = clock.spread(laps[key].totals())
        row["tokens_per_second"] = clock.rates(laps[key], length)
        if rig.engines[label] is rig.ours:
            row["ratios"] = {
                other: clock.ratios(laps[key], laps[f"{other} {length}"])
                for other in rig.engines
                if other != label and f"{other} {length}" in laps
            }
    return rows


def _first_token(engine: Engine, prompt: Tensor) -> int:
    return int(engine.read(prompt).argmax())


def decode(rig: Rig, context: int, limits: Limits) -> list[Row]:
    """Single tokens after ``context`` tokens, all engines in turn, beside a contender that only reads memory."""
    rows = rig.failed("decode", context=context)
    contenders: dict[str, clock.Contender] = {LIMIT: lambda: [limits.read()[0] for _ in range(PASSES)]}
    first = min(rig.plan.contexts)
    places: dict[str, Row] = {}
    for label, engine in rig.engines.items():
        row = rig.row("decode", label, context=context, batch=1)
        if reason := rig.too_slow(label, context):
            row.update(status="skipped", reason=reason)
        else:
            contenders[label] = _stepping(engine, rig.tokens(1, context), rig.tokens(1, rig.plan.steps))
            places[label] = row
        rows.append(row)
    baseline = None
    if rig.ours and context != first:
        baseline = f"{rig.ours.label} at {first}"
        contenders[baseline] = _stepping(rig.ours.fork(), rig.tokens(1, first), rig.tokens(1, rig.plan.steps))
    laps = clock.interleave(contenders, rig.plan.pace)
    for label, row in places.items():
        row["tokens_per_second"] = clock.rates(laps[label], rig.plan.steps)
        row["latency_ms"] = clock.latencies(laps[label])
        if rig.ours and label == rig.ours.label:
            row.update(_beside(rig, rig.ours, laps, limits, context))
            if baseline:
                row["against_shortest"] = {"context": first, "slowdown": clock.ratios(laps[baseline], laps[label])}
    return rows


def _beside(rig: Rig, ours: Everlong, laps: dict[str, clock.Laps], limits: Limits, context: int) -> Row:
    """Our decoding beside the peers' and the memory's limit: weights, and the histories that a token reads."""
    own, amount = laps[ours.label], (ours.nbytes + history_bytes(ours.model, context)) * rig.plan.steps
    rates = [amount / total for total in own.totals()]
    read = [PASSES * limits.buffer.nbytes / total for total in laps[LIMIT].totals()]
    return {
        "gbs": clock.spread([rate / 1e9 for rate in rates]),
        "share_of_read": clock.spread([rate / limit for rate, limit in zip(rates, read, strict=False)]),
        "ratios": {
            other: clock.ratios(own, laps[other]) for other in rig.engines if other in laps and other != ours.label
        },
        "in_python": ours.in_python,
    }


def _stepping(engine: Engine, prompt: Tensor, tokens: Tensor) -> clock.Contender:
    """A contender that takes ``tokens`` [B steps] one by one, first after ``prompt`` [B T], then on and on."""
    engine.read(prompt)
    columns = list(tokens.unbind(dim=1))

    def run() -> list[float]:
        seconds = []
        for column in columns:
            began = time.perf_counter()
            engine.step(column)
            seconds.append(time.perf_counter() - began)
        return seconds

    return run


def batches(rig: Rig) -> list[Row]:
    """Decoding batches of several sizes with our engine, in turn; ``scaling`` is tokens/s against one row."""
    ours, context, sizes = rig.ours, min(rig.plan.contexts), sorted({1, *rig.plan.batches})
    if ours is None:
        return [row for row in rig.failed("batch") if row["engine"] == Everlong.title]
    rows: list[Row] = []
    contenders: dict[int, clock.Contender] = {}
    engines = {size: ours.fork() for size in sizes}
    for size, engine in engines.items():
        row = rig.row("batch", engine.label, context=context, batch=size)
        verdict = checks.check_engine(engine, rig.tokens(size, 64))
        row.update(error=verdict.error, reason=verdict.reason)
        if verdict.reason is not None:
            row["status"] = "mismatch"
        else:
            contenders[size] = _stepping(engine, rig.tokens(size, context), rig.tokens(size, rig.plan.steps))
        rows.append(row)
    laps = clock.interleave({str(size): run for size, run in contenders.items()}, rig.plan.pace)
    for row in rows:
        if own := laps.get(str(size := row["batch"])):
            row["tokens_per_second"] = clock.rates(own, size * rig.plan.steps)
            row["latency_ms"] = clock.latencies(own)
            row["in_python"] = engines[size].in_python
            if "1" in laps:
                scaled = clock.ratios(own, laps["1"])
                row["scaling"] = {key: value * (1 if key == "rounds" else size) for key, value in scaled.items()}
    return rows
