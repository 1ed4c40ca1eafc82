"""What so small a comparison cannot show, told with its own figures."""

from __future__ import annotations

from collections.abc import Sequence

from .measures import (
    MEASURES,
    Model,
    Results,
    decode_points,
    entry,
    listing,
    models,
    number,
    points,
    title,
    titles,
    undertrained,
)

CROWDED, ABSURD = 1.25, 5.0  # load per core, and P99 per median, above which something else was running
_NOISY = ("bits per byte", "", "recall", "speed and memory")  # what the thresholds of the first measures stand for


def caveats(results: Results) -> list[str]:
    """What such a small run cannot show, with this run's own figures."""
    told = [
        *filter(None, [busy(results)]),
        _tiny(results),
        _luck(results),
        _task(results),
        _hardware(results),
        _scale(),
    ]
    if gone := sorted(titles(results)[name] for name in undertrained(results)):
        told.insert(0, f"The training of {listing(gone)} was cut short; its text quality is not ranked.")
    pending = [model for model in models(results) if model.get("status", "complete") != "complete"]
    if pending or results.get("complete") is False:
        told.insert(0, _unfinished(pending, results))
    return told


def _unfinished(pending: Sequence[Model], results: Results) -> str:
    names = titles(results)
    who = f" ({listing([names[m['name']] for m in pending])})" if pending else ""
    return (
        f"These results are partial{who}: a verdict may change when the run is finished; run the same command again "
        "to go on."
    )


def busy(results: Results) -> str:
    """A sentence where the speeds were taken on a busy machine, by its load or by latencies far above their median."""
    signs, cores = [], number((results.get("machine") or {}).get("cores"))
    loads = [load for model in models(results) if (load := number(model.get("load"))) is not None]
    if cores and max(loads, default=0.0) > CROWDED * cores:
        signs.append(f"a load of {max(loads):.1f} on {cores:.0f} cores")
    tails = [
        (slow / dict(row)[at], title(model))
        for model in models(results)
        if (row := [pair for pair in decode_points(model) if pair[1] > 0])
        for at, slow in decode_points(model, "p99_ms")
        if at in dict(row)
    ]
    worst, who = max(tails, default=(0.0, ""))
    if worst > ABSURD:
        signs.append(f"one token in a hundred took {who} {worst:,.0f} times the median or more")
    return f"The machine was busy with other work ({'; '.join(signs)}): the speeds say little." if signs else ""


def _tiny(results: Results) -> str:
    settings = results.get("settings") or {}
    params = [value for model in models(results) if (value := number(model.get("params"))) is not None]
    seconds = [value for model in models(results) if (value := entry(model, "training", "seconds")) is not None]
    tokens = number(settings.get("train_tokens"))
    text = "The models are tiny"
    if params:
        text += f" ({_span([count / 1e6 for count in params], 2)} million parameters)"
    text += " and hardly trained"
    if seconds:
        text += f" ({_span(seconds, 0)} seconds each{f', {tokens:,.0f} tokens' if tokens else ''})"
    return f"{text}: this shows who learns fastest from little, not who ends up best after long training."


def _span(values: Sequence[float], digits: int) -> str:
    """``"33 to 80"``, or one number where both ends read alike."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _luck(results: Results) -> str:
    noise = "; ".join(f"{m.noise()} for {what}" for m, what in zip(MEASURES[:4], _NOISY, strict=True) if what)
    return (
        "One seed was trained per model, with one learning rate and one number of steps for all, not searched for "
        f"each. Differences are called ties within {noise}; these thresholds are judgement, not measured variation "
        "between seeds."
    )


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
    where = (
        f" ({machine['cpu']}, {machine['threads']} threads)" if machine.get("cpu") and machine.get("threads") else ""
    )
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
