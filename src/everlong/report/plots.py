"""The plots of the report as plain data: series, axes, explanations and tables; the page draws and themes them.

One look (colour pair for light and dark, marker, dash) belongs to each architecture and is the same in every plot.
Colours are told apart by the colour-blind (after Okabe and Ito); markers and dashes differ as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .measures import (
    Model,
    Point,
    Results,
    bits,
    comma,
    decode_points,
    engine,
    engine_in_words,
    entry,
    finished,
    listing,
    milliseconds,
    models,
    number,
    percent,
    points,
    short,
    size,
    title,
)

Look = dict[str, str]
Figure = dict[str, Any]

LOOKS: tuple[tuple[str, str, str, str], ...] = (  # light, dark, marker, dash
    ("#3f4752", "#d5dae1", "circle", "dash"),
    ("#2f96cf", "#74c3f2", "triangle-up", "solid"),
    ("#0b4f94", "#4d8fe0", "square", "solid"),
    ("#cc5500", "#f58a45", "diamond", "solid"),
    ("#00805f", "#30c79b", "triangle-down", "longdash"),
    ("#ad4a8c", "#e58fc8", "cross", "dashdot"),
    ("#8a6d00", "#e0bd3f", "star", "solid"),
    ("#6b4fc0", "#ab97f2", "x", "dot"),
    ("#7a3e22", "#c99a80", "hexagon", "longdashdot"),
    ("#b3243c", "#f27e90", "pentagon", "dash"),
)
_HOME = {"attention": 0, "mamba": 1, "mamba2": 2, "rwkv7": 3, "griffin": 4, "jamba": 5}
_CALM = 8.0  # an axis whose values span more than this is drawn on a log scale


def looks(results: Results) -> dict[str, Look]:
    """Name of each model -> its colour in light and in dark, marker and dash. Known names keep theirs."""
    names = [model["name"] for model in models(results)]
    taken = {_HOME[name] for name in names if name in _HOME}
    free = [i for i in range(len(LOOKS)) if i not in taken] or list(range(len(LOOKS)))
    chosen, fresh = {}, 0
    for name in names:
        if name not in _HOME:
            index, fresh = free[fresh % len(free)], fresh + 1
        else:
            index = _HOME[name]
        chosen[name] = dict(zip(("light", "dark", "marker", "dash"), LOOKS[index], strict=True))
    return chosen


def figures(results: Results) -> list[Figure]:
    """Every plot for which there are data, in the order of the page."""
    makers = (_learning, _by_position, _by_length, _recall, _state, _prefill, _decode, _training)
    return [figure for make in makers if (figure := make(results)) is not None]


def _rows(results: Results, read: Callable[[Model], list[Point]]) -> list[tuple[Model, list[Point]]]:
    return [(model, row) for model in models(results) if (row := read(model))]


def _line(
    model: Model, row: Sequence[Point], show: Callable[[float], str], mode: str = "lines+markers"
) -> dict[str, Any]:
    return {
        "model": model["name"],
        "mode": mode,
        "x": [x for x, _ in row],
        "y": [y for _, y in row],
        "hover": [show(y) for _, y in row],
    }


def line_axis(label: str, values: Sequence[float], *, show: Callable[[float], str] | None = None) -> dict[str, Any]:
    """An axis with ticks at the values themselves (on a log scale) where ``show`` is given."""
    axis: dict[str, Any] = {"title": label}
    if show is None:
        return axis
    ticks = sorted(set(values))
    if len(ticks) > 9:
        ticks = ticks[:: math.ceil(len(ticks) / 8)]
    return {**axis, "log": True, "tickvals": ticks, "ticktext": [show(tick) for tick in ticks]}


def _wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > _CALM


def upright(label: str, values: Sequence[float], show: Callable[[float], str]) -> dict[str, Any]:
    """The vertical axis of a speed: from zero, or on a log scale with ticks at 1, 2, 5 where values lie far apart."""
    if not _wide(values):
        return {"title": label, "zero": True}
    powers = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return {"title": label, "log": True, "tickvals": ticks, "ticktext": [show(tick) for tick in ticks]}


def _decades(values: Sequence[float], base: int, show: Callable[[float], str]) -> dict[str, Any]:
    """A log axis with ticks at powers of ``base``, at most nine."""
    low, high = math.floor(math.log(min(values), base)), math.ceil(math.log(max(values), base))
    ticks = [float(base**power) for power in range(low, high + 1, math.ceil((high - low + 1) / 9))]
    return {"log": True, "tickvals": ticks, "ticktext": [show(tick) for tick in ticks]}


def _all_x(rows: Sequence[tuple[Model, list[Point]]]) -> list[float]:
    return [x for _, row in rows for x, _ in row]


def _all_y(rows: Sequence[tuple[Model, list[Point]]]) -> list[float]:
    return [y for _, row in rows for _, y in row]


def _table(rows: Sequence[tuple[Model, list[Point]]], show: Callable[[float], str], head: str) -> dict[str, Any]:
    """The numbers behind a plot, at no more than seven of its places."""
    places = sorted(set(_all_x(rows)))
    if len(places) > 7:
        places = [places[round(i * (len(places) - 1) / 6)] for i in range(7)]
    body = [[title(m), *(show(dict(row)[x]) if x in dict(row) else "–" for x in places)] for m, row in rows]
    return {"head": [head, *(short(x) for x in places)], "body": body}


def _alt(heading: str, rows: Sequence[tuple[Model, list[Point]]], show: Callable[[float], str], unit: str) -> str:
    """What the plot shows at its right end, in one sentence for those who do not see it."""
    ends = "; ".join(f"{title(model)} {show(row[-1][1])}" for model, row in rows)
    return f"{heading}. Last point of each model, in {unit}: {ends}."


def _plot(
    key: str,
    heading: str,
    explain: str,
    rows: Sequence[tuple[Model, list[Point]]],
    show: Callable[[float], str],
    unit: str,
    head: str,
) -> Figure:
    """What all plots share; ``unit`` closes the hover line, ``head`` names the first coordinate."""
    hover = unit if not unit or unit.startswith("%") else f" {unit}"
    return {
        "key": key,
        "title": heading,
        "explain": explain,
        "alt": _alt(heading, rows, show, unit or "the unit shown"),
        "series": [_line(model, row, lambda y: f"{show(y)}{hover}") for model, row in rows],
        "x": {"title": head},
        "y": {"title": unit},
        "table": _table(rows, show, head),
    }


def _learning(results: Results) -> Figure | None:
    rows = _rows(results, lambda model: points(model, "training", "curve"))
    if not rows:
        return None
    told = "How fast each model learns; lower is better. All see the same text in the same order."
    figure = _plot("learning", "Learning", told, rows, bits, "bits per byte", "tokens trained")
    early = [next((y for x, y in row if x >= 0.05 * row[-1][0]), row[-1][1]) for _, row in rows]
    low, high = min(_all_y(rows)), max(early)
    if max(_all_y(rows)) > 1.15 * high > low:
        figure["y"]["range"] = [low - 0.06 * (high - low), high + 0.04 * (high - low)]
        figure["explain"] += " The first steps lie above the frame; a double click shows them where there is a mouse."
    for series in figure["series"]:
        series["mode"] = "lines" if len(series["x"]) > 25 else "lines+markers"
    return figure


def _by_position(results: Results) -> Figure | None:
    rows = _rows(results, lambda model: points(model, "text", "by_position"))
    if not rows:
        return None
    told = (
        "Bits per byte at each place of the context; lower is better. A curve that keeps falling to the right belongs "
        "to a model that makes use of what it read before."
    )
    return _plot("position", "Use of the context", told, rows, bits, "bits per byte", "position in the context, tokens")


def _by_length(results: Results) -> Figure | None:
    rows = _rows(results, lambda model: points(model, "text", "by_length"))
    if not rows:
        return None
    context = number((results.get("settings") or {}).get("context")) or min(_all_x(rows))
    told = (
        f"Held-out text in pieces of 1 to {max(_all_x(rows)) / context:g} times the {context:,.0f} tokens trained on; "
        "lower is better. Only the ends count, the same bytes for every length, so these are other figures than those "
        "over all held-out text. A rising curve belongs to a model that loses its footing beyond that length."
    )
    unit, head = "bits per byte of the ends", "length of the text, tokens"
    figure = _plot("length", "Beyond the training length", told, rows, bits, unit, head)
    figure["x"] = line_axis("length of the text, tokens", _all_x(rows), show=lambda x: f"{short(x)} ({x / context:g}×)")
    if _wide(_all_y(rows)):
        figure["y"] = upright(unit, _all_y(rows), lambda y: f"{y:g}")
    return figure


def _recall(results: Results) -> Figure | None:
    rows = _rows(results, lambda model: points(model, "recall", "pairs"))
    if not rows:
        return None
    told = (
        "The model reads pairs of key and value and is then asked for the values; higher is better, and the dotted "
        "line is guessing."
    )
    trained = max((entry(model, "recall", "train_pairs") or 0 for model, _ in rows), default=0)
    if trained:
        told += f" Training had up to {trained:,.0f} pairs."
    if unfinished := [title(model) for model, _ in rows if not finished(model)]:
        told += f" Not finished with learning when the training ended: {listing(unfinished)}."
    figure = _plot("recall", "Recall from the context", told, rows, percent, "", "pairs in the context")
    figure["x"] = line_axis("pairs in the context", _all_x(rows), show=short)
    figure["y"] = {"title": "answers right", "range": [-0.03, 1.03], "percent": True}
    chance = max((entry(model, "recall", "chance") or 0.0 for model, _ in rows), default=0.0)
    figure["lines"] = [{"y": chance, "text": f"guessing, {100 * chance:.1f} %"}]
    return figure


def _state(results: Results) -> Figure | None:
    rows = _rows(results, lambda model: points(model, "state_bytes", "computed"))
    seen = _rows(results, lambda model: points(model, "state_bytes", "measured"))
    both = [*rows, *seen]
    if not both:
        return None
    told = (
        "What one session must keep to go on, in fp32 and at batch size one; lower is better. Lines are computed from "
        "the configuration, markers are states that were really made."
    )
    figure = _plot("state", "Memory of a session", told, rows or seen, size, "", "tokens read")
    figure["series"] = [_line(model, row, size, "lines") for model, row in rows]
    figure["series"] += [{**_line(model, row, size, "markers"), "quiet": True} for model, row in seen]
    figure["x"] = {"title": "tokens read", **_decades(_all_x(both), 10, short)}
    figure["y"] = {"title": "size of the state", **_decades([y for y in _all_y(both) if y > 0] or [1.0], 4, size)}
    return figure


def _prefill(results: Results) -> Figure | None:
    rows = _rows(results, lambda model: points(model, "prefill"))
    if not rows:
        return None
    told = (
        "Tokens of a prompt read per second, by its length; higher is better. A model whose cost is linear keeps its "
        "speed; attention slows down as the prompt grows."
    )
    figure = _plot("prefill", "Reading a prompt", told, rows, comma, "tokens/s", "length of the prompt, tokens")
    figure["x"] = line_axis("length of the prompt, tokens", _all_x(rows), show=short)
    figure["y"] = upright("tokens/s", _all_y(rows), comma)
    return figure


def _decode(results: Results) -> Figure | None:
    rows = _rows(results, decode_points)
    if not rows:
        return None
    told = (
        "Time for one more token, by how much was read before; lower is better. The line is the median, the band "
        "reaches to the slowest one in a hundred (P99)."
    )
    if apart := [f"{title(model)} {engine_in_words(model)}" for model, _ in rows if engine(model) != "native"]:
        told += f" Lines that hold the cost of Python: {'; '.join(apart)}."
    figure = _plot("decode", "Decoding", told, rows, milliseconds, "ms per token", "tokens in the context")
    slow = _rows(results, lambda model: decode_points(model, "p99_ms"))
    bands = {model["name"]: dict(row) for model, row in slow}
    for series in figure["series"]:
        band = bands.get(series["model"], {})
        series["band"] = [band.get(x, y) for x, y in zip(series["x"], series["y"], strict=True)]
        tails = zip(series["hover"], series["x"], strict=True)
        series["hover"] = [f"{h}, P99 {milliseconds(band[x])}" if x in band else h for h, x in tails]
    figure["x"] = line_axis("tokens in the context", _all_x(rows), show=short)
    figure["y"] = upright("ms per token", [*_all_y(rows), *_all_y(slow)], milliseconds)
    return figure


def _training(results: Results) -> Figure | None:
    found = [(model, entry(model, "training", "tokens_per_second")) for model in models(results)]
    speeds = sorted(((model, speed) for model, speed in found if speed is not None), key=lambda pair: pair[1])
    if not speeds:
        return None
    bars = [{"model": m["name"], "mode": "bar", "x": [v], "y": [title(m)], "hover": [comma(v)]} for m, v in speeds]
    ends = "; ".join(f"{title(model)} {comma(speed)}" for model, speed in reversed(speeds))
    return {
        "key": "training",
        "title": "Training",
        "explain": "Tokens trained per second, forward, backward and optimizer together; higher is better.",
        "alt": f"Training speed in tokens per second: {ends}.",
        "series": bars,
        "x": {"title": "tokens/s", "zero": True},
        "y": {"title": ""},
        "table": {"head": ["model", "tokens/s"], "body": [[title(m), comma(v)] for m, v in reversed(speeds)]},
    }
