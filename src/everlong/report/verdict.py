"""Which architecture for which need, in plain words: the figures decide, and what is within noise is called a tie.

A need is decided on one figure (``measures.MEASURES``). Models whose figure is not behind the best one by more than the
noise of that measure share the first place. The all-round verdict averages places: quality and cost count half each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .measures import (
    COST,
    MEASURES,
    QUALITY,
    Measure,
    Model,
    Reading,
    Results,
    comma,
    decode_points,
    entry,
    milliseconds,
    models,
    number,
    percent,
    points,
    titles,
    undertrained,
)

Finding = dict[str, Any]
ALL_ROUND_TIE = 0.25  # places


def verdict(results: Results) -> list[Finding]:
    """One finding per need, and the all-rounder last.

    Each finding holds ``key``, ``need``, ``kind`` (``"win"``, ``"tie"``, ``"only"``: just one model was measured,
    ``"none"``: nobody earned it, ``"missing"``: not measured), ``winner`` (a name, None unless one model wins),
    ``winners`` (names that share the first place), ``headline`` (the winners in words), ``figure``, ``reason``, and
    ``runner_up`` (the best model behind the winners, or None).
    """
    found = [_decide(measure, results) for measure in MEASURES]
    return [*found, _all_round(results)]


def listing(names: Sequence[str]) -> str:
    """``["a", "b", "c"]`` -> ``"a, b and c"``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def first_places(measure: Measure, reading: Reading) -> list[str]:
    """Names within noise of the best, best first."""
    best = measure.best(reading.values.values())
    near = [name for name, value in reading.values.items() if not measure.worse(value, best)]
    return sorted(near, key=lambda name: reading.values[name], reverse=not measure.low)


def _decide(measure: Measure, results: Results) -> Finding:
    reading, names = measure.read(results), titles(results)
    if not reading.values:
        return _finding(measure.key, measure.need, "missing", "not measured", reason=_absent(reading, names))
    if measure.key == "recall" and (refusal := _recall_unlearnt(reading, results)):
        return _finding(measure.key, measure.need, "none", "no model yet", reason=refusal)
    winners = first_places(measure, reading)
    figure = f"{measure.full(reading.values[winners[0]])}{_where(measure, reading)}"
    if len(reading.values) == 1:
        reason = f"Only {names[winners[0]]} was measured ({figure}), so there is nothing to compare it with."
        return _finding(measure.key, measure.need, "only", f"only {names[winners[0]]}", winners, figure, reason)
    behind = [name for name in _ordered(measure, reading) if name not in winners]
    told = _tie(measure, reading, winners, names) if len(winners) > 1 else _win(measure, reading, winners[0], names)
    parts = [told, _next(measure, reading, winners, behind, names), _extra(measure, reading, winners, results)]
    parts.append(_left_out(reading, names))
    kind, head = ("tie", f"a tie: {_named(winners, names)}") if len(winners) > 1 else ("win", names[winners[0]])
    text = " ".join(part for part in parts if part)
    return _finding(measure.key, measure.need, kind, head, winners, figure, text, next(iter(behind), None))


def _finding(
    key: str,
    need: str,
    kind: str,
    headline: str,
    winners: Sequence[str] = (),
    figure: str = "",
    reason: str = "",
    runner_up: str | None = None,
) -> Finding:
    winner = winners[0] if kind in ("win", "only") else None
    return {
        "key": key,
        "need": need,
        "kind": kind,
        "winner": winner,
        "winners": list(winners),
        "headline": headline,
        "figure": figure,
        "reason": reason,
        "runner_up": runner_up,
    }


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
        return f"{comma(more)} times as much" if measure.low else f"1/{comma(more)} of that"
    behind = abs(value - best) / best
    return f"{100 * behind:.{1 if behind < 0.1 else 0}f} % {'more' if measure.low else 'less'}"


def _extra(measure: Measure, reading: Reading, winners: Sequence[str], results: Results) -> str:
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
    told = [f"{names[n]} changes by {100 * changes[n]:+.1f} % from its own figure at {_start(results, n)}" for n in winners[:1] if n in changes]
    broken = [f"{names[name]} ({100 * rise:+.0f} %)" for name, rise in changes.items() if rise > 0.10]
    if broken:
        told.append(f"more than 10 % worse than at that length: {listing(broken)}")
    return "; ".join(told) + "." if told else ""


def _start(results: Results, name: str) -> str:
    row = next(points(model, "text", "by_length") for model in models(results) if model["name"] == name)
    return f"{row[0][0]:,.0f} tokens"


def _recall_unlearnt(reading: Reading, results: Results) -> str:
    """A refusal to name a winner where nobody is above chance."""
    best, chance = max(reading.values.values()), _chance(results)
    if best >= chance + 0.05:
        return ""
    return (
        f"The best accuracy is {percent(best)} where guessing gives {100 * chance:.1f} %: "
        "in so short a training no model learnt the task, which says nothing about any of them."
    )


def _chance(results: Results) -> float:
    return max((entry(model, "recall", "chance") or 0.0 for model in models(results)), default=0.0)


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
    told = [f"The state of {listing(still)} stops growing"] if still else []
    told += [f"that of {listing(grown)} grows with every token"] if grown else []
    text = "; ".join(told)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _steadiness(reading: Reading, winners: Sequence[str], results: Results) -> str:
    """P99 of the winner, and how each model's latency changes from the shortest to the longest context."""
    names, told, growth = titles(results), [], {}
    for model in models(results):
        row, slow = decode_points(model), dict(decode_points(model, "p99_ms"))
        if model["name"] == winners[0] and reading.at in slow:
            told.append(f"one token in a hundred of {names[winners[0]]} takes {milliseconds(slow[reading.at])} ms or more")
        if model["name"] in reading.values and len(row) > 1 and row[0][1] > 0:
            growth[model["name"]] = dict(row)[reading.at] / row[0][1]
    if len(growth) > 1:
        calm, wild = min(growth, key=lambda name: growth[name]), max(growth, key=lambda name: growth[name])
        if growth[wild] > 1.1 * growth[calm]:
            told.append(
                f"steadiest from the shortest to the longest context is {names[calm]} ({growth[calm]:.2f} times the "
                f"latency), least steady {names[wild]} ({growth[wild]:.2f} times)"
            )
    text = "; ".join(told)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


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
    """Mean place over the measured needs among ``keys``, for models measured in all of them."""
    tables = [_places(m, readings[m.key]) for m in MEASURES if m.key in keys and readings[m.key].values]
    if not tables:
        return {}
    everywhere = set.intersection(*(set(table) for table in tables))
    return {name: sum(table[name] for table in tables) / len(tables) for name in everywhere}


def _all_round(results: Results) -> Finding:
    key, need, names = "all_round", "Best all-round", titles(results)
    readings = {measure.key: measure.read(results) for measure in MEASURES}
    quality, cost = _half(QUALITY, readings), _half(COST, readings)
    places = {name: (quality[name] + cost[name]) / 2 for name in names if name in quality and name in cost}
    if len(places) < 2:
        told = "This takes at least two models measured in quality and in cost."
        return _finding(key, need, "missing", "not decided", reason=told)
    order = sorted(places, key=lambda name: places[name])
    winners = [name for name in order if places[name] - places[order[0]] <= ALL_ROUND_TIE + 1e-9]
    behind = [name for name in order if name not in winners]
    kind, head = ("tie", f"a tie: {_named(winners, names)}") if len(winners) > 1 else ("win", names[winners[0]])
    figure = f"average place {places[order[0]]:.1f} of {len(places)}"
    return _finding(key, need, kind, head, winners, figure, _weighed(order, places, quality, cost, names), next(iter(behind), None))


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


def headline(results: Results) -> str:
    """The finding in one sentence: quality, then the memory it costs."""
    found = {finding["key"]: finding for finding in verdict(results)}
    parts = []
    text, memory = found["text"], found["memory"]
    names = titles(results)
    if text["kind"] == "win":
        parts.append(f"{text['headline']} predicts the text best ({text['figure']})")
    elif text["kind"] == "tie":
        parts.append(f"{_named(text['winners'], names)} predict the text equally well ({text['figure']})")
    if memory["kind"] in ("win", "tie"):
        verb = "needs" if memory["kind"] == "win" else "need"
        parts.append(f"{_named(memory['winners'], names)} {verb} the least memory per session ({memory['figure']})")
    if parts:
        return "; ".join(parts) + "."
    if len(names) == 1:
        return f"Only {next(iter(names.values()))} was measured, so there is nothing to compare yet."
    return "Nothing has been measured in two models yet."


def caveats(results: Results) -> list[str]:
    """What such a small run cannot show, with this run's own figures."""
    told = [_tiny(results), _luck(results), _task(results), _hardware(results), _scale()]
    if gone := sorted(titles(results)[name] for name in undertrained(results)):
        told.insert(0, f"The training of {listing(gone)} was cut short; its text quality is not ranked.")
    pending = [model for model in models(results) if model.get("status", "complete") != "complete"]
    if pending or results.get("complete") is False:
        told.insert(0, _unfinished(pending, results))
    return told


def _unfinished(pending: Sequence[Model], results: Results) -> str:
    names = titles(results)
    who = f" ({listing([names[m['name']] for m in pending])})" if pending else ""
    return f"These results are partial{who}: a verdict may change when the run is finished; run the same command again to go on."


def _tiny(results: Results) -> str:
    settings = results.get("settings") or {}
    params = [value for model in models(results) if (value := number(model.get("params"))) is not None]
    seconds = [value for model in models(results) if (value := entry(model, "training", "seconds")) is not None]
    tokens = number(settings.get("train_tokens"))
    text = "The models are tiny"
    if params:
        low, high = min(params) / 1e6, max(params) / 1e6
        span = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
        text += f" ({span} million parameters)"
    text += " and hardly trained"
    if seconds:
        text += f" ({min(seconds):.0f} to {max(seconds):.0f} seconds each"
        text += f", {tokens:,.0f} tokens)" if tokens else ")"
    return f"{text}: this shows who learns fastest from little, not who ends up best after long training."


def _luck(results: Results) -> str:
    noise = "; ".join(f"{m.noise()} for {what}" for m, what in zip(MEASURES[:4], _NOISY, strict=True) if what)
    return (
        f"One seed was trained per model, with one learning rate for all. Differences are called ties within {noise}; "
        "these thresholds are judgement, not measured variation between seeds."
    )


_NOISY = ("bits per byte", "", "recall", "speed and memory")


def _task(results: Results) -> str:
    rows = [points(model, "recall", "pairs") for model in models(results)]
    most = max((row[-1][0] for row in rows if row), default=None)
    upto = f" of up to {most:,.0f} pairs" if most else ""
    return (
        f"Recall is a small synthetic task{upto} and the text is of one kind; neither stands for questions about real "
        "documents. Lengths beyond the training length are tested on held-out text of the same kind."
    )


def _hardware(results: Results) -> str:
    machine = results.get("machine") or {}
    where = f" ({machine['cpu']}, {machine['threads']} threads)" if machine.get("cpu") and machine.get("threads") else ""
    return (
        f"Speeds hold for this machine{where} and this library's code, at batch sizes and widths far below those of "
        "real models; other hardware and tuned kernels change the order."
    )


def _scale() -> str:
    return (
        "At larger scale, published comparisons (Arora et al. 2023; Jelassi et al. 2024; Waleffe et al. 2024) find "
        "recurrent models close to attention in predicting text, behind it in recalling and copying from the context, "
        "and hybrids with some attention recovering most of that difference; the order seen here need not carry over."
    )
