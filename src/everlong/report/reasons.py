"""What a verdict says beside the ranking: how a figure changes, up to where it holds, what grows and what cannot."""

from __future__ import annotations

from collections.abc import Sequence

from .measures import (
    Measure,
    Reading,
    Results,
    decode_points,
    engine,
    listing,
    milliseconds,
    models,
    points,
    titles,
)


def extra(measure: Measure, reading: Reading, winners: Sequence[str], results: Results) -> str:
    """What else there is to say of a measure: change, span, growth, steadiness."""
    told = {"beyond": _rise, "recall": _span, "memory": _growth, "decode": _steadiness}.get(measure.key)
    return told(reading, winners, results) if told else ""


def _rise(reading: Reading, winners: Sequence[str], results: Results) -> str:
    """How the loss at the longest length compares with the model's own at the shortest; who falls apart."""
    changes = {}
    for model in models(results):
        row = points(model, "text", "by_length")
        if model["name"] in reading.values and len(row) > 1:
            changes[model["name"]] = reading.values[model["name"]] / row[0][1] - 1
    names = titles(results)
    told = [
        f"{names[n]} changes by {signed(changes[n], 1)} % from its own figure at {_start(results, n)}"
        for n in winners[:1]
        if n in changes
    ]
    broken = [f"{names[name]} ({signed(rise, 0)} %)" for name, rise in changes.items() if rise > 0.10]
    if broken:
        told.append(f"more than 10 % worse than at that length: {listing(broken)}")
    return "; ".join(told) + "." if told else ""


def signed(fraction: float, digits: int) -> str:
    """A change in percent with a true minus sign."""
    return f"{100 * fraction:+.{digits}f}".replace("-", "\u2212")


def _start(results: Results, name: str) -> str:
    row = next(points(model, "text", "by_length") for model in models(results) if model["name"] == name)
    return f"{row[0][0]:,.0f} tokens"


def _span(reading: Reading, winners: Sequence[str], results: Results) -> str:
    """Up to how many pairs the winners answer nine questions in ten."""
    told, names = [], titles(results)
    for model in models(results):
        good = [pairs for pairs, accuracy in points(model, "recall", "pairs") if accuracy >= 0.9]
        if model["name"] in winners and good:
            told.append(f"{names[model['name']]} answers nine in ten up to {max(good):,.0f} pairs")
    mean = f"The figure is the mean over the numbers of pairs asked, up to {reading.at:,.0f}."
    return f"{listing(told)}. {mean}" if told else mean


def _growth(reading: Reading, winners: Sequence[str], results: Results) -> str:
    """Which of the winners stay at this size, and which grow."""
    kinds = {model["name"]: model.get("memory") for model in models(results)}
    names = titles(results)
    still = [names[name] for name in reading.values if kinds[name] in ("constant", "window")]
    grown = [names[name] for name in reading.values if kinds[name] == "linear"]
    told = [f"The state of {listing(still)} is bounded"] if still else []
    told += [f"that of {listing(grown)} grows with every token"] if grown else []
    text = "; ".join(told)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _steadiness(reading: Reading, winners: Sequence[str], results: Results) -> str:
    """The engine and P99 of the winner, then how the latency of growing states grows; constant ones cannot grow."""
    names, at, told = titles(results), reading.at or 0.0, []
    rows = {m["name"]: decode_points(m) for m in models(results) if reading.shown(m["name"]) is not None}
    if winners:
        told.append(f"Decoded by {'a native program' if _is_native(winners[0], results) else 'Python'}.")
        slow = dict(next(decode_points(m, "p99_ms") for m in models(results) if m["name"] == winners[0]))
        if at in slow:
            told.append(f"One token in a hundred takes {names[winners[0]]} {milliseconds(slow[at])} ms or more.")
    memory = {model["name"]: model.get("memory") for model in models(results)}
    if fixed := [names[name] for name in rows if memory[name] in ("constant", "window")]:
        told.append(f"The work of a token does not grow with the context for {listing(fixed)}, by construction.")
    start = min((row[0][0] for row in rows.values()), default=at)
    growing = [name for name, row in rows.items() if memory[name] == "linear" and row[0][0] == start < at and row[0][1]]
    rises = [(names[name], dict(rows[name])[at] / rows[name][0][1]) for name in growing]
    if rises:
        grown = [
            f"{who} takes {rise:.2g} times as long"
            if rise > 1.1
            else f"{who} stays within 10 %"
            if rise >= 0.9
            else f"{who} was timed faster, which is noise"
            for who, rise in rises
        ]
        told.append(f"From {start:,.0f} to {at:,.0f} tokens of context, {'; '.join(grown)}.")
    return " ".join(told)


def _is_native(name: str, results: Results) -> bool:
    return next(engine(model) for model in models(results) if model["name"] == name) == "native"
