"""Which architecture for which need, in plain words: the figures decide, and what is within noise is called a tie.

A need is decided on one figure (``measures.MEASURES``). Models whose figure is not behind the best one by more than the
noise of that measure share the first place. The all-round verdict averages places: quality and cost count half each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .caveats import busy, caveats
from .measures import (
    COST,
    MEASURES,
    QUALITY,
    Measure,
    Reading,
    Results,
    comma,
    entry,
    listing,
    models,
    percent,
    titles,
)
from .reasons import extra

__all__ = ["caveats", "first_places", "headline", "verdict"]

Finding = dict[str, Any]
ALL_ROUND_TIE = 0.25  # places
SPEEDS = ("prefill", "decode", "train")  # not judged where the machine was busy


def verdict(results: Results) -> list[Finding]:
    """One finding per need, and the all-rounder last.

    Each finding holds ``key``, ``need``, ``kind`` (``"win"``, ``"tie"``, ``"only"``: just one model was measured,
    ``"none"``: nobody earned it, ``"missing"``: not measured), ``winner`` (a name, None unless one model wins),
    ``winners`` (names that share the first place), ``headline`` (the winners in words), ``figure``, ``behind`` (the
    distance of the next in words), ``reason``, and ``runner_up`` (the best model behind the winners, or None).
    """
    found = [_decide(measure, results) for measure in MEASURES]
    return [*found, _all_round(results)]


def first_places(measure: Measure, reading: Reading) -> list[str]:
    """Names within noise of the best, best first."""
    best = measure.best(reading.values.values())
    near = [name for name, value in reading.values.items() if not measure.worse(value, best)]
    return sorted(near, key=lambda name: reading.values[name], reverse=not measure.low)


def _decide(measure: Measure, results: Results) -> Finding:
    reading, names = measure.read(results), titles(results)
    if measure.key == "recall" and (refusal := _recall_unlearnt(reading, results)):
        return _finding(measure.key, measure.need, "none", "no model yet", reason=refusal)
    if reading.aside and len(reading.values) < 2:
        return _finding(measure.key, measure.need, "none", "no winner", reason=_nobody(measure, reading, results))
    if not reading.values:
        return _finding(measure.key, measure.need, "missing", "not measured", reason=_absent(reading, names))
    if measure.key in SPEEDS and len(reading.values) > 1 and (told := busy(results)):
        rows = [f"{names[n]} {measure.full(reading.values[n])}" for n in _ordered(measure, reading)]
        reason = (
            f"{told} Measured{_where(measure, reading)}: {'; '.join(rows)}. {_aside(measure, reading, names)}".strip()
        )
        return _finding(measure.key, measure.need, "none", "not judged on a busy machine", reason=reason)
    winners = first_places(measure, reading)
    apart = f" ({len(reading.aside)} not compared)" if reading.aside else ""
    figure = f"{_span_of(measure, reading, winners)}{_where(measure, reading)}{apart}"
    if len(reading.values) == 1:
        name = names[winners[0]]
        reason = " ".join(
            part
            for part in (f"Only {name} was measured ({figure}): nothing to compare it with.", _left_out(reading, names))
            if part
        )
        return _finding(
            measure.key, measure.need, "only", f"only {name}", winners=winners, figure=figure, reason=reason
        )
    return _compare(measure, reading, winners, figure, results)


def _compare(measure: Measure, reading: Reading, winners: Sequence[str], figure: str, results: Results) -> Finding:
    """The finding where at least two models were measured."""
    names = titles(results)
    behind = [name for name in _ordered(measure, reading) if name not in winners]
    told = _tie(measure, reading, winners, names) if len(winners) > 1 else _win(measure, reading, winners[0], names)
    parts = [told, _next(measure, reading, winners, behind, names), extra(measure, reading, winners, results)]
    parts += [_aside(measure, reading, names), _left_out(reading, names)]
    kind, head = ("tie", f"a tie: {_named(winners, names)}") if len(winners) > 1 else ("win", names[winners[0]])
    second = ""
    if behind:
        distance = gap(measure, reading.values[behind[0]], reading.values[winners[0]])
        second = f"Next: {names[behind[0]]}, {distance}"
    return _finding(
        measure.key,
        measure.need,
        kind,
        head,
        winners=winners,
        figure=figure,
        behind=second,
        reason=" ".join(part for part in parts if part),
        runner_up=next(iter(behind), None),
    )


def _nobody(measure: Measure, reading: Reading, results: Results) -> str:
    """What was measured where fewer than two models can be compared."""
    names = titles(results)
    told = [f"{names[n]}: {measure.full(value)}{_where(measure, reading)}." for n, value in reading.values.items()]
    parts = [*told, extra(measure, reading, list(reading.values), results), _aside(measure, reading, names)]
    return " ".join(part for part in parts if part)


_WHY_ASIDE = {
    "recall": "Had not finished learning, so neither win nor lose",
    "decode": "Not compared, since these figures are in part those of Python",
}


def _aside(measure: Measure, reading: Reading, names: dict[str, str]) -> str:
    """Who was measured but cannot be compared, and why."""
    rows = [f"{names[n]} {measure.full(value)} {reading.why[n]}".strip() for n, value in reading.aside.items()]
    return f"{_WHY_ASIDE[measure.key]}: {'; '.join(rows)}." if rows else ""


def _span_of(measure: Measure, reading: Reading, names: Sequence[str]) -> str:
    """The figure of the winner, or the range of those that tie, with the unit."""
    shown = [measure.show(reading.values[name]) for name in names]
    if shown[0] == shown[-1]:
        return measure.full(reading.values[names[0]])
    return f"{shown[0]} to {shown[-1]} {measure.unit}".strip()


def _finding(key: str, need: str, kind: str, headline: str, **more: Any) -> Finding:
    """A finding with every key there."""
    found: Finding = {"key": key, "need": need, "kind": kind, "winner": None, "winners": [], "headline": headline}
    found = {**found, "figure": "", "behind": "", "reason": "", "runner_up": None, **more}
    return {**found, "winner": found["winners"][0] if kind in ("win", "only") else None}


def _named(winners: Sequence[str], names: dict[str, str]) -> str:
    return listing([names[name] for name in winners])


def _ordered(measure: Measure, reading: Reading) -> list[str]:
    return sorted(reading.values, key=lambda name: reading.values[name], reverse=not measure.low)


def _where(measure: Measure, reading: Reading) -> str:
    """The length at which the measure was read, in words."""
    if reading.at is None:
        return ""
    at = f"{reading.at:,.0f}"
    return {
        "beyond": f" over {at} tokens",
        "recall": " of answers right",
        "memory": f" at {at} tokens",
        "prefill": f" on a prompt of {at}",
        "decode": f" per token after {at}",
    }.get(measure.key, "")


def _win(measure: Measure, reading: Reading, winner: str, names: dict[str, str]) -> str:
    return f"{names[winner]}: {measure.full(reading.values[winner])}{_where(measure, reading)}."


def _tie(measure: Measure, reading: Reading, winners: Sequence[str], names: dict[str, str]) -> str:
    values = listing([f"{names[name]} {measure.show(reading.values[name])}" for name in winners])
    unit = f" {measure.unit}" if measure.unit else ""
    return f"{values}{unit}{_where(measure, reading)}: within {measure.noise()}, which one run cannot tell apart."


def _next(
    measure: Measure, reading: Reading, winners: Sequence[str], behind: Sequence[str], names: dict[str, str]
) -> str:
    """The runner-up and its distance, then the last."""
    if not behind:
        return ""
    best = reading.values[winners[0]]
    told = [_distance(measure, reading.values[behind[0]], best, f"Next is {names[behind[0]]} with")]
    if len(behind) > 1:
        told.append(_distance(measure, reading.values[behind[-1]], best, f"last {names[behind[-1]]} with"))
    return "; ".join(told) + "."


def _distance(measure: Measure, value: float, best: float, opening: str) -> str:
    return f"{opening} {measure.full(value)}, {gap(measure, value, best)}"


def gap(measure: Measure, value: float, best: float) -> str:
    """How far ``value`` is behind ``best``, in words."""
    if measure.absolute:
        return f"{100 * (best - value):.0f} points lower"
    more = value / best if measure.low else best / value if value else float("inf")
    if more >= 1.5:
        return f"{comma(more)} times {'as much' if measure.low else 'slower'}"
    behind = abs(value - best) / best
    return f"{100 * behind:.{1 if behind < 0.1 else 0}f} % {'more' if measure.low else 'slower'}"


def _recall_unlearnt(reading: Reading, results: Results) -> str:
    """A refusal to name a winner where nobody is above chance."""
    best, chance = max([*reading.values.values(), *reading.aside.values()], default=math.inf), _chance(results)
    if best >= chance + 0.05:
        return ""
    return (
        f"The best accuracy is {percent(best)} where guessing gives {100 * chance:.1f} %: "
        "in so short a training no model learnt the task, which says nothing about any of them."
    )


def _chance(results: Results) -> float:
    return max((entry(model, "recall", "chance") or 0.0 for model in models(results)), default=0.0)


def _left_out(reading: Reading, names: dict[str, str]) -> str:
    if not reading.excluded:
        return ""
    return f"Left out because its training was cut short: {listing(sorted(names[n] for n in reading.excluded))}."


def _absent(reading: Reading, names: dict[str, str]) -> str:
    return " ".join(part for part in ("These results hold no such measurement.", _left_out(reading, names)) if part)


def _places(measure: Measure, reading: Reading) -> dict[str, float]:
    """Place of each model: one more than the number of models that beat it by more than noise."""
    values = reading.values
    return {name: 1.0 + sum(measure.worse(value, other) for other in values.values()) for name, value in values.items()}


def _half(keys: Sequence[str], readings: dict[str, Reading]) -> dict[str, float]:
    """Mean place over the needs among ``keys`` in which all can be compared, for models measured in all of them."""
    fair = [m for m in MEASURES if m.key in keys and readings[m.key].values and not readings[m.key].aside]
    tables = [_places(m, readings[m.key]) for m in fair]
    if not tables:
        return {}
    everywhere = set.intersection(*(set(table) for table in tables))
    return {name: sum(table[name] for table in tables) / len(tables) for name in everywhere}


def _all_round(results: Results) -> Finding:
    key, need, names = "all_round", "Best all-round", titles(results)
    readings = {measure.key: measure.read(results) for measure in MEASURES}
    crowded = SPEEDS if busy(results) else ()
    quality, cost = _half(QUALITY, readings), _half([need for need in COST if need not in crowded], readings)
    places = {name: (quality[name] + cost[name]) / 2 for name in names if name in quality and name in cost}
    if len(places) < 2:
        told = "This takes at least two models measured in quality and in cost."
        return _finding(key, need, "missing", "not decided", reason=told)
    order = sorted(places, key=lambda name: places[name])
    winners = [name for name in order if places[name] - places[order[0]] <= ALL_ROUND_TIE + 1e-9]
    behind = [name for name in order if name not in winners]
    kind, head = ("tie", f"a tie: {_named(winners, names)}") if len(winners) > 1 else ("win", names[winners[0]])
    return _finding(
        key,
        need,
        kind,
        head,
        winners=winners,
        figure=f"average place {places[order[0]]:.1f} of {len(places)}",
        behind=f"Next: {names[behind[0]]}, {places[behind[0]]:.1f}" if behind else "",
        reason=_weighed(order, places, quality, cost, names) + _uncounted(readings, crowded),
        runner_up=next(iter(behind), None),
    )


def _weighed(
    order: Sequence[str],
    places: dict[str, float],
    quality: dict[str, float],
    cost: dict[str, float],
    names: dict[str, str],
) -> str:
    rows = [f"{names[n]} {places[n]:.1f} (quality {quality[n]:.1f}, cost {cost[n]:.1f})" for n in order]
    return (
        f"Average place, quality and cost counting half each: {'; '.join(rows)}. "
        f"Within {ALL_ROUND_TIE} places is a tie. Your weights may differ: choose by the need that binds you."
    )


def _uncounted(readings: dict[str, Reading], crowded: Sequence[str]) -> str:
    """The needs that could not count, since not all models can be compared in them."""
    left = [m.need.lower() for m in MEASURES if readings[m.key].aside and m.key not in crowded]
    told = f" Not counted, since not all models can be compared: {listing(left)}." if left else ""
    return told + (" Not counted, since the machine was busy: the speeds." if crowded else "")


def headline(results: Results) -> str:
    """The finding in one sentence: quality, then the memory it costs."""
    found, names = {finding["key"]: finding for finding in verdict(results)}, titles(results)
    parts = []
    text, memory = found["text"], found["memory"]
    if text["kind"] == "win":
        parts.append(f"{text['headline']} predicts the text best ({text['figure']})")
    elif text["kind"] == "tie":
        parts.append(f"{_named(text['winners'], names)} tie for text quality ({text['figure']})")
    if memory["kind"] in ("win", "tie"):
        verb = "needs" if memory["kind"] == "win" else "need"
        who = _named(memory["winners"], names)
        parts.append(f"{who} {verb} the least memory per session ({memory['figure']}{_largest(memory, results)})")
    if parts:
        return "; ".join(parts) + "."
    if len(names) == 1:
        return f"Only {next(iter(names.values()))} was measured, so there is nothing to compare yet."
    return "Nothing has been measured in two models yet."


def _largest(memory: Finding, results: Results) -> str:
    """``, Attention 293 MiB``: the model that needs most, where it is not among the winners."""
    measure = next(measure for measure in MEASURES if measure.key == "memory")
    values = measure.read(results).values
    most = max(values, key=lambda name: values[name])
    return "" if most in memory["winners"] else f"; {titles(results)[most]}: {measure.show(values[most])}"
