"""The results of a bench as tables, for the terminal and the page: heads, rows of text, and which rows are red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..bench.clock import figure
from .measures import comma, milliseconds, short, size

Results = dict[str, Any]
Row = dict[str, Any]
NOTHING = "–"


@dataclass(frozen=True)
class Line:
    """A row of a table; ``bad`` ones did not match their reference, ``note`` says why there is no figure."""

    cells: tuple[str, ...]
    bad: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """``words`` is how many columns at the left hold words and not figures."""

    key: str
    title: str
    intro: str
    head: tuple[str, ...]
    words: int
    lines: list[Line] = field(default_factory=list)


def tables(results: Results) -> list[Table]:
    """All tables for which there are rows."""
    made = _ops(results) if results["kind"] == "ops" else _models(results)
    return [table for table in made if table.lines]


def details(results: Results) -> list[Table]:
    """For ops: every row, a table for each op. For models nothing, as their tables hold every row."""
    if results["kind"] != "ops":
        return []
    return [
        _every_form(name, rows_of(results, op=name)) for name in dict.fromkeys(row["op"] for row in results["rows"])
    ]


def rows_of(results: Results, **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in results["rows"] if all(row.get(key) == value for key, value in wanted.items())]


def ratio(spread: dict[str, float] | None) -> str:
    """``3.10x (2.9 to 3.4)``, or the median alone of a single round."""
    if spread is None:
        return NOTHING
    low, middle, high = (figure(spread[key]) for key in ("min", "median", "max"))
    return f"{middle}x" if spread["rounds"] == 1 else f"{middle}x ({low} to {high})"


def among(spread: dict[str, float] | None, show: Any = comma) -> str:
    """``1,234 (1,100 to 1,300)``."""
    if spread is None:
        return NOTHING
    middle = show(spread["median"])
    return middle if spread["rounds"] == 1 else f"{middle} ({show(spread['min'])} to {show(spread['max'])})"


def _plain(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def named(row: Row) -> str:
    """An op with its variant."""
    return f"{row['op']}, {row['variant']}" if row["variant"] else row["op"]


def _ops(results: Results) -> list[Table]:
    """The form that would run, op by op: the first that was timed."""
    head = ("op", "case", "dtype", "form", "fwd ms", "both ms", "GFLOP/s", "GB/s", "x loop")
    told = (
        "The form that runs by default: milliseconds forward, and forward and backward; GFLOP/s and GB/s of the "
        "forward pass (useful work, compulsory bytes); how many times faster than the loop that defines the op."
    )
    table = Table("ops", "Ops", told, head, 4)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results["rows"]:
        groups.setdefault((row["op"], row["variant"], row["case"], row["dtype"]), []).append(row)
    for rows in groups.values():
        if line := _default_form(rows):
            table.lines.append(line)
    return [table]


def _default_form(rows: list[Row]) -> Line | None:
    """The line of the first form that was timed; red where a form before it is wrong, None where none was tried."""
    forward = [row for row in rows if row["pass"] == "forward"]
    wrong = next((row for row in rows if row["status"] == "mismatch"), None)
    best = next((row for row in forward if row["status"] == "timed"), None)
    if best is None:
        return (
            None
            if wrong is None
            else Line(
                (named(wrong), wrong["case"], wrong["dtype"], wrong["backend"], *[NOTHING] * 5), True, wrong["reason"]
            )
        )
    both = next(
        (r for r in rows if r["backend"] == best["backend"] and r["pass"] != "forward" and r["status"] == "timed"), None
    )
    note = f"{wrong['backend']}, {wrong['pass']}: {wrong['reason']}" if wrong else ""
    cells = (
        named(best),
        best["case"],
        best["dtype"],
        best["backend"],
        among(best["ms"], figure),
        among(both["ms"], figure) if both else NOTHING,
        _plain(best["gflops"]),
        _plain(best["gbs"]),
        ratio(best["against"].get("reference")),
    )
    return Line(cells, wrong is not None, note)


def _every_form(name: str, rows: list[Row]) -> Table:
    head = ("variant", "case", "dtype", "pass", "form", "ms", "GFLOP/s", "GB/s", "x loop", "error")
    table = Table(name, name, "", head, 5)
    for row in rows:
        table.lines.append(
            Line(
                (
                    row["variant"] or NOTHING,
                    row["case"],
                    row["dtype"],
                    row["pass"],
                    row["backend"],
                    among(row.get("ms"), figure),
                    _plain(row.get("gflops")),
                    _plain(row.get("gbs")),
                    ratio(row.get("against", {}).get("reference")),
                    _error(row),
                ),
                row["status"] == "mismatch",
                row["reason"] or "",
            )
        )
    return table


def _error(row: Row) -> str:
    return NOTHING if row["error"] is None else f"{row['error']:.0e}"


def _models(results: Results) -> list[Table]:
    """A table for each measure of each model, and those of training and of the loss."""
    made = []
    for model in dict.fromkeys(row["model"] for row in results["rows"]):
        made += [make(rows_of(results, model=model), model) for make in (_prefill, _decode, _batch, _memory)]
    return [*made, _training(results), _loss(results["rows"])]


Columns = dict[str, Callable[[Row], str]]


def _table(rows: list[Row], measure: str, title: str, intro: str, words: Columns, figures: Columns) -> Table:
    """The table of one measure; ``words`` describe a row, ``figures`` are a dash where it was not timed."""
    model = rows[0]["model"] if len({row["model"] for row in rows}) == 1 else ""
    table = Table(f"{measure}-{model}".rstrip("-"), title, intro, (*words, *figures), len(words))
    for row in rows:
        if row["measure"] == measure:
            shown = [show(row) if row["status"] == "timed" else NOTHING for show in figures.values()]
            cells = (*(show(row) for show in words.values()), *shown)
            table.lines.append(Line(cells, row["status"] == "mismatch", row["reason"] or ""))
    return table


def _engine(row: Row) -> str:
    return f"{row['engine']} {row['weights']}"


def _slower(rows: list[Row], place: str) -> Callable[[Row], str]:
    """How many times slower a row's engine is than ours, where ours was timed beside it."""

    def show(row: Row) -> str:
        alike = (other for other in rows if (other["measure"], other.get(place)) == (row["measure"], row[place]))
        found = [other["ratios"][_engine(row)] for other in alike if _engine(row) in other.get("ratios", {})]
        return ratio(found[0]) if found else NOTHING

    return show


def _prefill(rows: list[Row], model: str) -> Table:
    told = (
        "Reading a prompt and choosing the next token: the time to the first token. Medians, minimum to maximum; "
        "slower: how many times slower than ours, round by round."
    )
    words: Columns = {"engine": _engine, "prompt": lambda row: short(row["length"]) if row["length"] else NOTHING}
    figures: Columns = {
        "tokens/s": lambda row: among(row["tokens_per_second"]),
        "first token, s": lambda row: among(row["seconds"], figure),
        "slower": _slower(rows, "length"),
    }
    return _table(rows, "prefill", f"{model}: reading a prompt", told, words, figures)


def _decode(rows: list[Row], model: str) -> Table:
    told = (
        "One token after the other. GB/s count the weights alone; the share is that of the speed at which memory was "
        "read in the same rounds. A dash under P99.9: fewer than 1,000 tokens."
    )
    words: Columns = {"engine": _engine, "context": lambda row: short(row["context"])}
    figures: Columns = {
        "tokens/s": lambda row: among(row["tokens_per_second"]),
        "P50 ms": lambda row: milliseconds(row["latency_ms"]["p50"]),
        "P99": lambda row: _tail(row, "p99"),
        "P99.9": lambda row: _tail(row, "p999"),
        "GB/s": lambda row: among(row.get("gbs"), _plain),
        "of limit": lambda row: among(row.get("share_of_read"), lambda value: f"{100 * value:.0f} %"),
        "slower": _slower(rows, "context"),
    }
    return _table(rows, "decode", f"{model}: decoding", told, words, figures)


def _tail(row: Row, name: str) -> str:
    value = row["latency_ms"][name]
    return NOTHING if value is None else milliseconds(value)


def _batch(rows: list[Row], model: str) -> Table:
    told = "Several rows decoded together by our engine; tokens per second of all rows, and against one row."
    words: Columns = {"engine": _engine, "rows": lambda row: str(row.get("batch", NOTHING))}
    figures: Columns = {
        "tokens/s": lambda row: among(row["tokens_per_second"]),
        "P50 ms": lambda row: milliseconds(row["latency_ms"]["p50"]),
        "against one row": lambda row: ratio(row.get("scaling")),
    }
    return _table(rows, "batch", f"{model}: batches", told, words, figures)


def _memory(rows: list[Row], model: str) -> Table:
    told = "Peak memory of a process of its own that builds the model and reads a text in pieces."
    words: Columns = {"engine": _engine, "text": lambda row: short(row["length"])}
    return _table(rows, "memory", f"{model}: memory", told, words, {"peak": lambda row: size(row["peak_bytes"])})


def _training(results: Results) -> Table:
    told = f"Steps of the optimiser on random bytes: {results['settings'].get('training', '')}. bf16 means autocast."
    words: Columns = {"engine": _engine, "model": lambda row: row["model"]}
    figures: Columns = {
        "tokens/s": lambda row: among(row["tokens_per_second"]),
        "x fp32": lambda row: ratio(row.get("against_fp32")),
        "x their Llama": lambda row: ratio(_other(row, "llama")),
        "x their Mamba": lambda row: ratio(_other(row, "mamba")),
    }
    return _table(results["rows"], "training", "Training", told, words, figures)


def _other(row: Row, name: str) -> dict[str, float] | None:
    """Our ratio to the peer's model of this name."""
    return next((found for other, found in row.get("ratios", {}).items() if name in other), None)


def _loss(rows: list[Row]) -> Table:
    told = "What the loss and its gradients take beyond a short text's, beside all logits at once."
    words: Columns = {"engine": _engine, "model": lambda row: row["model"]}
    figures: Columns = {
        "text": lambda row: short(row["length"]),
        "taken": lambda row: size(row["taken_bytes"]),
        "all logits": lambda row: size(row["logits_bytes"]),
    }
    return _table(rows, "loss", "The loss over a large vocabulary", told, words, figures)
