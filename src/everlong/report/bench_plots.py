"""The plots of a bench as plain data, for the same script that draws those of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .bench_tables import Results, Row, named, rows_of
from .measures import comma, milliseconds, short
from .plots import LOOKS, Figure, Look, line_axis, upright

Series = dict[str, list[tuple[float, float]]]
FORMATS = ("fp32", "f32", "bf16", "f16", "int8", "Q8_0", "int4", "Q4_0")
FORMS = ("native", "torch", "reference")
BARS = 24  # of an op plot; beyond, the tables hold the rest


def names(results: Results) -> dict[str, str]:
    """Key -> title of everything that has a colour: the forms of ops, or engines with their weights."""
    if results["kind"] == "ops":
        forms = dict.fromkeys(row["backend"] for row in results["rows"] if row["status"] == "timed")
        return {form: form for form in sorted(forms, key=lambda form: FORMS.index(form) if form in FORMS else 9)}
    timed = [row for row in results["rows"] if row["status"] == "timed"]
    return {engine: engine for engine in sorted({_who(row) for row in timed}, key=_order)}


def looks(results: Results) -> dict[str, Look]:
    """A colour, marker and dash for each; ours come first and are the same in every run."""
    made = {}
    for index, name in enumerate(names(results)):
        place = _OURS[name] if name in _OURS else _OTHERS[index % len(_OTHERS)]
        made[name] = dict(zip(("light", "dark", "marker", "dash"), LOOKS[place], strict=True))
    return made


_OURS = {
    "everlong fp32": 2,
    "everlong bf16": 1,
    "everlong int8": 4,
    "everlong int4": 7,
    "native": 2,
    "torch": 3,
    "reference": 0,
}
_OTHERS = (3, 5, 6, 8, 9, 0)


def _who(row: Row) -> str:
    return f"{row['engine']} {row['weights']}"


def _order(name: str) -> tuple[bool, str, int]:
    """Ours first, then by name, the widest format first."""
    engine, _, weights = name.rpartition(" ")
    return engine != "everlong", engine, FORMATS.index(weights) if weights in FORMATS else len(FORMATS)


def figures(results: Results) -> list[Figure]:
    """Every plot for which there are figures."""
    if results["kind"] == "ops":
        return [made for title in ("forward", "forward+backward") if (made := _speedups(results, title))]
    every: list[Figure | None] = []
    for model in dict.fromkeys(row["model"] for row in results["rows"]):
        every += [_prefill(results, model), _decode(results, model), _latency(results, model), _batch(results, model)]
        every.append(_memory(results, model))
    every.append(_training(results))
    return [made for made in every if made is not None]


def _speedups(results: Results, title: str) -> Figure | None:
    """How many times faster than the loop each form is, op by op, on the first dtype and case of each."""
    rows: dict[str, dict[str, float]] = {}
    cases: dict[str, tuple[str, str]] = {}
    for row in rows_of(results, status="timed", **{"pass": title}):
        gain, name = row["against"].get("reference"), named(row)
        if gain and cases.setdefault(name, (row["case"], row["dtype"])) == (row["case"], row["dtype"]):
            rows.setdefault(name, {})[row["backend"]] = gain["median"]
    shown = dict(list(rows.items())[:BARS])
    if not shown:
        return None
    forms = [form for form in names(results) if any(form in row for row in shown.values())]
    where = ", ".join(sorted({" in ".join(pair) for pair in cases.values()}))
    told = f"How many times faster than the reference loop: {where}; higher is better."
    heading = {"forward": "Forward", "forward+backward": "Forward and backward"}[title]
    body = [[name, *(f"{row[form]:.3g}" if form in row else "–" for form in forms)] for name, row in shown.items()]
    return {
        "key": title.replace("+", "-"),
        "title": heading,
        "explain": told,
        "alt": f"{heading}: " + "; ".join(f"{line[0]} {', '.join(line[1:])}" for line in body[:6]),
        "series": [_bars(form, [(row[form], name) for name, row in shown.items() if form in row]) for form in forms],
        "x": _decades("times the loop", [gain for row in shown.values() for gain in row.values()]),
        "y": {"title": "", "reversed": True},
        "grouped": True,
        "height": 120 + 30 * len(shown),
        "unit": "times the loop",
        "table": {"head": ["op", *forms], "body": body},
    }


def _decades(label: str, values: list[float]) -> dict[str, Any]:
    """A log axis for bars, with ticks at powers of ten and room for the figure at the end of the longest."""
    low, high = math.log10(min(1.0, *values)), math.log10(max(2.0, *values))
    ticks = [10.0**power for power in range(math.floor(low), math.ceil(high) + 1)]
    span = [low - 0.02, high + 0.25 * max(1.0, high - low)]
    return {
        "title": label,
        "log": True,
        "range": span,
        "tickvals": ticks,
        "ticktext": [f"{tick:,.10g}" for tick in ticks],
    }


def _bars(form: str, points: list[tuple[float, str]]) -> dict[str, Any]:
    values = [value for value, _ in points]
    return {
        "model": form,
        "mode": "bar",
        "x": values,
        "y": [name for _, name in points],
        "hover": [f"{v:.3g}" for v in values],
    }


def _lines(
    key: str, title: str, explain: str, series: Series, across: str, up: str, show: Callable[[float], str]
) -> Figure | None:
    """A plot of lines, one for each engine; None where there is nothing, or only single points."""
    series = {name: sorted(points) for name, points in series.items() if points}
    if not series:
        return None
    places = sorted({x for points in series.values() for x, _ in points})
    body = [
        [name, *(show(dict(points)[x]) if x in dict(points) else "–" for x in places)]
        for name, points in series.items()
    ]
    ends = "; ".join(f"{name} {show(points[-1][1])}" for name, points in series.items())
    return {
        "key": key,
        "title": title,
        "explain": explain,
        "alt": f"{title}. Last point, in {up}: {ends}.",
        "series": [
            {
                "model": name,
                "mode": "lines+markers",
                "x": [x for x, _ in points],
                "y": [y for _, y in points],
                "hover": [f"{show(y)} {up}" for _, y in points],
            }
            for name, points in series.items()
        ],
        "x": line_axis(across, places, show=short),
        "y": upright(up, [y for points in series.values() for _, y in points], show),
        "across": across.partition(",")[0],
        "table": {"head": [across, *(short(x) for x in places)], "body": body},
    }


def _collect(results: Results, measure: str, model: str, x: str, y: Callable[[Row], float]) -> Series:
    found: Series = {}
    for row in rows_of(results, measure=measure, status="timed", model=model):
        found.setdefault(_who(row), []).append((row[x], y(row)))
    return dict(sorted(found.items(), key=lambda pair: _order(pair[0])))


def _speed(row: Row) -> float:
    return row["tokens_per_second"]["median"]


def _prefill(results: Results, model: str) -> Figure | None:
    series = _collect(results, "prefill", model, "length", _speed)
    if len({x for points in series.values() for x, _ in points}) < 2:
        return _bar_chart(
            f"prefill-{model}", f"{model}: reading a prompt", "Tokens of a prompt read per second", series
        )
    told = "Tokens of a prompt read per second, by its length; higher is better."
    return _lines(f"prefill-{model}", f"{model}: reading a prompt", told, series, "tokens", "tokens/s", comma)


def _decode(results: Results, model: str) -> Figure | None:
    series = _collect(results, "decode", model, "context", _speed)
    if len({x for points in series.values() for x, _ in points}) < 2:
        return _bar_chart(
            f"decode-{model}", f"{model}: decoding", "Tokens made per second, one after the other", series
        )
    told = "Tokens made per second, by how much was read before; higher is better."
    return _lines(f"decode-{model}", f"{model}: decoding", told, series, "tokens", "tokens/s", comma)


def _bar_chart(key: str, title: str, explain: str, series: Series) -> Figure | None:
    """One bar for each engine, at the only place there is."""
    if not series:
        return None
    speeds = {name: points[0][1] for name, points in reversed(list(series.items()))}
    at = short(next(iter(series.values()))[0][0])
    body = [[name, comma(value)] for name, value in reversed(list(speeds.items()))]
    return {
        "key": key,
        "title": title,
        "explain": f"{explain}, at {at} tokens; higher is better.",
        "alt": f"{title}, tokens/s: " + "; ".join(" ".join(line) for line in body),
        "series": [
            {"model": name, "mode": "bar", "x": [value], "y": [name], "hover": [comma(value)]}
            for name, value in speeds.items()
        ],
        "x": {"title": "tokens/s", "zero": True},
        "y": {"title": ""},
        "table": {"head": ["engine", "tokens/s"], "body": body},
    }


def _latency(results: Results, model: str) -> Figure | None:
    """Percentiles of the time between two tokens, at the shortest context."""
    rows = rows_of(results, measure="decode", status="timed", model=model)
    first = min((row["context"] for row in rows), default=0)
    series: Series = {}
    for row in rows:
        if row["context"] == first:
            tails = zip((1, 2, 3), (row["latency_ms"][name] for name in ("p50", "p99", "p999")), strict=True)
            series[_who(row)] = [(place, value) for place, value in tails if value is not None]
    series = dict(sorted(series.items(), key=lambda pair: _order(pair[0])))
    told = f"Time from one token to the next after {first:,}: the median, and what one in 100 and in 1,000 exceeds."
    figure = _lines(f"latency-{model}", f"{model}: latency of a token", told, series, "tokens", "ms", milliseconds)
    if figure is not None:
        words = ["P50", "P99", "P99.9"]
        figure["x"] = {"title": "", "tickvals": [1, 2, 3], "ticktext": words, "range": [0.8, 3.2]}
        figure["across"], figure["named"] = "", words
        figure["table"]["head"] = ["engine", *words[: len(figure["table"]["head"]) - 1]]
    return figure


def _batch(results: Results, model: str) -> Figure | None:
    series = _collect(results, "batch", model, "batch", _speed)
    told = "Tokens per second of all rows of a batch together; higher is better."
    return _lines(f"batch-{model}", f"{model}: batches", told, series, "rows", "tokens/s", comma)


def _training(results: Results) -> Figure | None:
    rows = rows_of(results, measure="training", status="timed")
    if not rows:
        return None
    engines = sorted({_who(row) for row in rows}, key=_order)
    models = list(dict.fromkeys(f"{row['model']}{'' if row['engine'] == 'everlong' else ' (theirs)'}" for row in rows))
    points: dict[str, list[tuple[float, str]]] = {engine: [] for engine in engines}
    for row in rows:
        points[_who(row)].append((_speed(row), f"{row['model']}{'' if row['engine'] == 'everlong' else ' (theirs)'}"))
    return {
        "key": "training",
        "title": "Training",
        "explain": "Tokens trained per second: forward, backward, clipping, update; higher is better. Log scale.",
        "alt": "Training: " + "; ".join(f"{_who(row)} {row['model']} {comma(_speed(row))} tokens/s" for row in rows),
        "series": [{**_bars(engine, points[engine]), **_labels(engine, points[engine])} for engine in engines],
        "x": _decades("tokens/s", [_speed(row) for row in rows]),
        "y": {"title": "", "reversed": True},
        "grouped": True,
        "height": 120 + 46 * len(models),
        "table": {
            "head": ["model", "engine", "tokens/s"],
            "body": [[r["model"], _who(r), comma(_speed(r))] for r in rows],
        },
    }


def _labels(engine: str, points: list[tuple[float, str]]) -> dict[str, Any]:
    """Tokens per second as text, and bars of one format in the same place of their group."""
    return {"hover": [comma(value) for value, _ in points], "group": engine.rpartition(" ")[2]}


def _memory(results: Results, model: str) -> Figure | None:
    series = _collect(results, "memory", model, "length", lambda row: row["peak_bytes"] / 2**20)
    told = "Peak memory of a process that reads a text of this length in pieces; lower is better."
    return _lines(f"memory-{model}", f"{model}: memory", told, series, "tokens", "MiB", comma)
