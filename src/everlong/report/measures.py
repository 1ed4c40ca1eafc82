"""Single figures out of the results of a comparison: what is read, at which length, which way is better, the noise.

Every block of the results may be missing; what is not there, or is not a finite number, is left out and never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Results = dict[str, Any]
Model = dict[str, Any]
Point = tuple[float, float]

SESSION_TOKENS = 100_000  # the length at which the memory of a session is compared


def models(results: Results) -> list[Model]:
    """The models of the results, in the order trained; those without a name are dropped."""
    return [model for model in results.get("models") or [] if model.get("name")]


def title(model: Model) -> str:
    """The name people read."""
    return str(model.get("title") or model["name"])


def titles(results: Results) -> dict[str, str]:
    """Name of each model -> its title."""
    return {model["name"]: title(model) for model in models(results)}


def number(value: Any) -> float | None:
    """``value`` where it is a finite number, otherwise None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def points(model: Model, block: str, key: str | None = None) -> list[Point]:
    """The pairs of a block (of its ``key``), finite ones only, sorted by the first."""
    rows: Any = model.get(block)
    if key is not None:
        rows = (rows or {}).get(key)
    pairs = [(number(row[0]), number(row[1])) for row in rows or [] if row and len(row) == 2]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def decode_points(model: Model, key: str = "p50_ms") -> list[Point]:
    """(context, milliseconds) of a percentile of the decode latency."""
    rows = [(number(row.get("context")), number(row.get(key))) for row in model.get("decode") or []]
    return sorted((x, y) for x, y in rows if x is not None and y is not None)


def entry(model: Model, block: str, key: str) -> float | None:
    """One number of a block, None where either is missing."""
    return number((model.get(block) or {}).get(key))


def engine(model: Model) -> str | None:
    """What decoded: ``native``, ``python``, ``mixed`` (some blocks in Python), or None where it was not recorded."""
    python, blocks = entry(model, "engine", "in_python"), entry(model, "engine", "blocks")
    if python is None or not blocks:
        return None
    return "native" if python == 0 else "python" if python >= blocks else "mixed"


def engine_in_words(model: Model) -> str:
    """``"with 2 of 4 blocks in Python"``."""
    if engine(model) is None:
        return "on an engine that was not recorded"
    python, blocks = entry(model, "engine", "in_python"), entry(model, "engine", "blocks")
    return f"with {python or 0:.0f} of {blocks or 0:.0f} blocks in Python"


def one_engine(results: Results) -> set[str]:
    """Names of the models whose decoding may be compared: native programs, or Python where none is native."""
    kinds = {model["name"]: engine(model) for model in models(results) if decode_points(model)}
    wanted = "native" if "native" in kinds.values() else "python"
    return {name for name, kind in kinds.items() if kind == wanted}


def finished(model: Model) -> bool:
    """Whether recall was learnt as far as it can be, rather than cut off at the end of its tokens."""
    return (model.get("recall") or {}).get("finished") is True


def undertrained(results: Results) -> set[str]:
    """Names of models that saw fewer tokens than the others: their loss may not be compared."""
    seen = {model["name"]: entry(model, "training", "tokens") for model in models(results)}
    most = max((tokens for tokens in seen.values() if tokens is not None), default=0.0)
    return {name for name, tokens in seen.items() if tokens is not None and tokens < 0.98 * most}


def shared(rows: Iterable[list[Point]]) -> list[float]:
    """The first coordinates that all non-empty lists of points have in common, ascending."""
    sets = [{x for x, _ in row} for row in rows if row]
    return sorted(set.intersection(*sets)) if sets else []


def listing(names: Sequence[str]) -> str:
    """``["a", "b", "c"]`` -> ``"a, b and c"``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def comma(value: float) -> str:
    """``12345.6`` -> ``12,346``; three digits are kept below one hundred."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(value: float) -> str:
    """Bytes in binary units: ``98304`` -> ``96 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:,.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError


def short(value: float) -> str:
    """A count of tokens for an axis: ``256``, ``1,024``, ``16K``, ``1M``."""
    for unit, big in (("M", 1_000_000), ("M", 1 << 20), ("K", 1000), ("K", 1024)):
        if value >= max(big, 10_000) and value % big == 0:
            return f"{value / big:,.0f}{unit}"
    return f"{value:,.0f}"


def bits(value: float) -> str:
    """Bits per byte with the digits that carry information."""
    return f"{value:.3f}"


def percent(value: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.0f} %"


def milliseconds(value: float) -> str:
    """A latency; the unit is not written."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Reading:
    """What a measure gives: a value per model, the length it was read at, and who had to be left out.

    ``aside`` holds what was measured and may be shown, but not compared with ``values``; ``why`` says it in words.
    """

    values: dict[str, float] = field(default_factory=dict)
    at: float | None = None
    excluded: frozenset[str] = frozenset()
    aside: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def shown(self, name: str) -> float | None:
        """The value of a model, compared or not."""
        return self.values.get(name, self.aside.get(name))

    def part(self, comparable: set[str], why: dict[str, str]) -> Reading:
        """The same with all but ``comparable`` put aside."""
        aside = {name: value for name, value in self.values.items() if name not in comparable}
        kept = {name: value for name, value in self.values.items() if name in comparable}
        return replace(self, values=kept, aside=aside, why={name: why[name] for name in aside})


@dataclass(frozen=True)
class Measure:
    """One column of the comparison; ``tolerance`` is what counts as noise: relative, or absolute for accuracies."""

    key: str
    need: str
    column: str
    unit: str
    low: bool
    tolerance: float
    read: Callable[[Results], Reading]
    show: Callable[[float], str]
    absolute: bool = False

    def worse(self, value: float, best: float) -> bool:
        """Whether ``value`` is behind ``best`` by more than noise."""
        behind = value - best if self.low else best - value
        margin = self.tolerance * (1.0 if self.absolute else min(abs(value), abs(best)))
        return behind > margin + 1e-12

    def best(self, values: Iterable[float]) -> float:
        """The best of some values."""
        return min(values) if self.low else max(values)

    def noise(self) -> str:
        """The threshold in words."""
        return f"{100 * self.tolerance:g} {'percentage points' if self.absolute else '%'}"

    def full(self, value: float) -> str:
        """The value with its unit."""
        return f"{self.show(value)} {self.unit}".strip()


def _entries(block: str, key: str) -> Callable[[Results], Reading]:
    def read(results: Results) -> Reading:
        found = {model["name"]: entry(model, block, key) for model in models(results)}
        return Reading({name: value for name, value in found.items() if value is not None})

    return read


def _at_shared(results: Results, rows: dict[str, list[Point]], target: float) -> Reading:
    """Values at the shared coordinate nearest to ``target`` (on a log scale)."""
    common = [x for x in shared(rows.values()) if x > 0]
    if not common:
        return Reading()
    at = min(common, key=lambda x: abs(math.log(x) - math.log(target))) if math.isfinite(target) else common[-1]
    return Reading({name: dict(row)[at] for name, row in rows.items() if row}, at)


def _text(results: Results) -> Reading:
    reading, out = _entries("text", "bits_per_byte")(results), undertrained(results)
    kept = {name: value for name, value in reading.values.items() if name not in out}
    return Reading(kept, excluded=frozenset(out & set(reading.values)))


def _beyond(results: Results) -> Reading:
    """Bits per byte at the longest shared length, where that is beyond the length trained on."""
    rows, out = {m["name"]: points(m, "text", "by_length") for m in models(results)}, undertrained(results)
    reading = _at_shared(results, {name: row for name, row in rows.items() if name not in out}, math.inf)
    context = number((results.get("settings") or {}).get("context"))
    shortest = context or min((row[0][0] for row in rows.values() if row), default=0)
    if reading.at is None or reading.at <= shortest:
        return Reading()
    return Reading(reading.values, reading.at, frozenset(name for name in out if rows[name]))


def _recall(results: Results) -> Reading:
    """Accuracy averaged over the numbers of pairs that every measured model has."""
    rows = {model["name"]: points(model, "recall", "pairs") for model in models(results)}
    common = shared(rows.values())
    if not common:
        return Reading()
    means = {n: sum(dict(row)[x] for x in common) / len(common) for n, row in rows.items() if row}
    spent = {model["name"]: entry(model, "recall", "train_tokens") for model in models(results)}
    why = {name: f"after {spent[name]:,.0f} tokens" if spent[name] else "" for name in means}
    return Reading(means, common[-1]).part({m["name"] for m in models(results) if finished(m)}, why)


def _memory(results: Results) -> Reading:
    rows = {model["name"]: points(model, "state_bytes", "computed") for model in models(results)}
    return _at_shared(results, rows, SESSION_TOKENS)


def _prefill(results: Results) -> Reading:
    return _at_shared(results, {model["name"]: points(model, "prefill") for model in models(results)}, math.inf)


def _decode(results: Results) -> Reading:
    found = _at_shared(results, {model["name"]: decode_points(model) for model in models(results)}, math.inf)
    return found.part(one_engine(results), {model["name"]: engine_in_words(model) for model in models(results)})


_train = _entries("training", "tokens_per_second")
_BPB, _ENDS, _SPEED = "bits per byte", "bits per byte of the ends", "tokens/s"

MEASURES: tuple[Measure, ...] = (
    Measure("text", "Best text quality", "Bits per byte", _BPB, True, 0.02, _text, bits),
    Measure("beyond", "Text beyond the training length", "Bits per byte of the ends", _ENDS, True, 0.02, _beyond, bits),
    Measure("recall", "Recall of facts from the context", "Recall", "", False, 0.05, _recall, percent, absolute=True),
    Measure("memory", "Smallest memory per session", "State", "", True, 0.10, _memory, size),
    Measure("prefill", "Fastest reading of a prompt", "Prefill, tokens/s", _SPEED, False, 0.10, _prefill, comma),
    Measure("decode", "Fastest decoding at long context", "Decode, ms", "ms", True, 0.10, _decode, milliseconds),
    Measure("train", "Fastest to train", "Training, tokens/s", _SPEED, False, 0.10, _train, comma),
)
QUALITY, COST = ("text", "beyond", "recall"), ("memory", "prefill", "decode", "train")
