"""The report: one HTML file that opens offline, with everything it needs inside.

The page is a Jinja2 template with its style and script beside it; plotly.js comes from the installed plotly package.
A content security policy in the page forbids every request, so nothing can be loaded by accident.
"""

from __future__ import annotations

import json
import math
import re
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from ..files import atomic_write
from .measures import (
    MEASURES,
    SESSION_TOKENS,
    Measure,
    Model,
    Reading,
    Results,
    entry,
    models,
    number,
    size,
    title,
    titles,
)
from .plots import Figure, Look, figures, looks
from .verdict import caveats, first_places, headline, verdict

_SHARED = ("base.html.j2", "parts.html.j2", "report.css", "report.js")
_MEMORY = {
    "constant": "state of constant size",
    "window": "state bounded by a window",
    "linear": "state grows with every token",
}


def write_report(results: Results, path: Path) -> None:
    """Write the report on ``results`` (the content of results.json, whole or partial) to ``path``, atomically."""
    atomic_write(Path(path), render(results))


def render(results: Results) -> str:
    """The page as text."""
    return fill(
        "report.html.j2", figures(results), looks(results), titles(results), {"verb": "compare", **_page(results)}
    )


def fill(
    template: str, plots: list[Figure], looks: dict[str, Look], names: dict[str, str], page: dict[str, Any]
) -> str:
    """A page from a template beside this file: its plots, the looks and titles of what they draw, and the rest."""
    folder = resources.files(__package__)
    sources = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in (*_SHARED, template)}
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tidy"] = tidy
    return environment.get_template(template).render(
        style=Markup(sources["report.css"]),
        script=Markup(sources["report.js"]),
        plotly=Markup(_plotly()),
        data=embed({"looks": looks, "titles": names, "plots": plots}),
        plots=plots,
        looks=looks,
        names=names,
        **page,
    )


def _plotly() -> str:
    """The packaged plotly.js; imported here because only a written report needs it."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def embed(data: Any) -> Markup:
    """JSON that cannot end its script element nor open a comment; what is not finite becomes null."""
    text = json.dumps(_finite(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def printable(text: str) -> str:
    """Text whose control characters and lone surrogates are made visible; line breaks and tabs stay."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n")
    return "".join(_visible(char) for char in text)


def tidy(text: str) -> str:
    """Text whose names and percentages do not break across lines."""
    return re.sub(r"(?<=\w)-(?=\d)", "\u2011", text).replace(" %", "\u00a0%")


def _visible(char: str) -> str:
    code = ord(char)
    if char in "\n\t" or 0x20 <= code < 0x7F or code > 0x9F:
        return char
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def _page(results: Results) -> dict[str, Any]:
    """Everything the template shows, apart from the plots."""
    found = verdict(results)
    return {
        "heading": _heading(results),
        "headline": headline(results),
        "facts": facts(results),
        "notice": _notice(results),
        "models": [_introduce(model) for model in models(results)],
        "findings": found,
        "reasons": [finding for finding in found if finding["kind"] not in ("missing", "only")],
        "lonely": [finding["need"] for finding in found if finding["kind"] == "only"],
        "missing": [f["need"] for f in found if f["kind"] == "missing" and f["key"] != "all_round"],
        "caveats": caveats(results),
        "columns": _columns(results),
        "rows": _rows(results),
        "samples": _samples(results),
        "made": _made(results),
        "command": str(results.get("command") or ""),
    }


_WORDS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")


def _heading(results: Results) -> str:
    count = len(models(results))
    if not count:
        return "Nothing compared yet"
    word = _WORDS[count] if count < len(_WORDS) else str(count)
    return f"{word} architecture{'s' if count != 1 else ''}, one text, one recipe"


def facts(results: Results) -> list[str]:
    """The line under the finding: when, on what machine, trained on how much."""
    machine, settings = results.get("machine") or {}, results.get("settings") or {}
    tokens = number(settings.get("train_tokens"))
    told = [_date(results), machine.get("cpu"), f"{machine['cores']} cores" if machine.get("cores") else None]
    told.append(f"{tokens:,.0f} tokens of training each" if tokens else None)
    return [str(fact) for fact in told if fact]


def _date(results: Results) -> str:
    created = str(results.get("created") or "")
    try:
        moment = datetime.fromisoformat(created.replace("Z", "+00:00"))
    except ValueError:
        return created
    moment = moment.astimezone(timezone.utc) if moment.tzinfo else moment
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _notice(results: Results) -> str:
    """The visible sign of partial results, empty for a whole run."""
    everyone = models(results)
    open_ones = [model for model in everyone if model.get("status", "complete") != "complete"]
    if not open_ones and results.get("complete", True):
        return ""
    who = ", ".join(f"{title(model)} ({model.get('status')})" for model in open_ones)
    done = f"{len(everyone) - len(open_ones)} of {len(everyone)} models are complete"
    return f"{done}{f'; not yet: {who}' if who else ''}. Run the same command again to go on where it stopped."


def _introduce(model: Model) -> dict[str, str]:
    return {
        "name": model["name"],
        "title": title(model),
        "layers": str(model.get("layers") or ""),
        "equation": str(model.get("equation") or ""),
        "memory": _MEMORY.get(str(model.get("memory")), ""),
        "status": str(model.get("status") or "complete"),
    }


def _columns(results: Results) -> list[dict[str, str]]:
    """Heads of the summary table: label, what is better, and where it was read."""
    fixed = [{"label": "Model", "note": "", "better": ""}, {"label": "Size", "note": "parameters", "better": ""}]
    better = {True: "lower is better", False: "higher is better"}
    return fixed + [
        {"label": _label(measure), "note": _note(measure, measure.read(results)), "better": better[measure.low]}
        for measure in MEASURES
    ]


def _label(measure: Measure) -> str:
    return measure.column.split(",")[0]


def _note(measure: Measure, reading: Reading) -> str:
    unit = {"text": "held-out text", "train": "tokens/s", "prefill": "tokens/s", "decode": "ms"}.get(measure.key, "")
    at = f"{reading.at:,.0f}" if reading.at else ""
    where = {
        "beyond": "{} tokens",
        "recall": "to {} pairs",
        "memory": "{} tokens",
        "prefill": "at {}",
        "decode": "at {}",
    }
    place = where.get(measure.key, "").format(at) if at else ""
    return ", ".join(part for part in (unit, place) if part)


def _rows(results: Results) -> list[dict[str, Any]]:
    """One row per model: cells with the text, the value to sort by, and the mark of the best."""
    readings = [(measure, measure.read(results)) for measure in MEASURES]
    marks = [_marks(measure, reading) for measure, reading in readings]
    rows = []
    for model in models(results):
        name, params = model["name"], number(model.get("params"))
        cells = [{"text": f"{params / 1e6:.2f} M" if params else "–", "value": params, "mark": ""}]
        for (measure, reading), mark in zip(readings, marks, strict=True):
            value = reading.shown(name)
            shown = "–" if value is None else measure.show(value)
            cells.append({"text": shown, "value": value, "mark": mark.get(name, "")})
        rows.append({"model": _introduce(model), "cells": cells})
    return rows


def _marks(measure: Measure, reading: Reading) -> dict[str, str]:
    """``best`` for the best of a column, ``near`` for those within noise of it; nothing for one model alone.

    ``aside`` for those that cannot be compared.
    """
    aside = dict.fromkeys(reading.aside, "aside")
    if len(reading.values) < 2:
        return aside
    places = first_places(measure, reading)
    return {name: "best" if i == 0 else "near" for i, name in enumerate(places)} | aside


def _samples(results: Results) -> list[dict[str, Any]]:
    """Samples grouped by prompt, so that the models stand side by side."""
    groups: dict[str, list[dict[str, str]]] = {}
    for model in models(results):
        for sample in model.get("samples") or []:
            text = {"name": model["name"], "title": title(model), "text": printable(str(sample.get("text") or ""))}
            groups.setdefault(printable(str(sample.get("prompt") or "")), []).append(text)
    return [{"prompt": prompt, "texts": texts} for prompt, texts in groups.items()]


def _made(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings, machine and thresholds as lists of terms."""
    settings, machine = results.get("settings") or {}, results.get("machine") or {}
    seconds = [value for model in models(results) if (value := entry(model, "training", "seconds")) is not None]
    spent = {"training took": f"{min(seconds):.0f} to {max(seconds):.0f} seconds per model"} if seconds else {}
    noise = {measure.need: f"within {measure.noise()}" for measure in MEASURES}
    noise["Memory of a session"] = f"compared at the measured length nearest to {SESSION_TOKENS:,} tokens"
    return [
        ("Settings", terms({**settings, **spent})),
        ("Machine and versions", terms(machine)),
        ("What counts as a tie", terms(noise)),
    ]


_LABELS = {
    "train_tokens": "tokens trained",
    "context": "training length, tokens",
    "batch": "batch, sequences",
    "params": "parameters aimed at",
    "data_files": "files",
    "data_bytes": "bytes of text",
    "held_out_bytes": "bytes held out",
    "cpu": "processor",
    "memory_gib": "memory",
    "torch": "PyTorch",
    "python": "Python",
    "everlong": "Everlong",
    "quick": "quick run",
}


def terms(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Names for people, and values as they write them; what is None is left out."""
    return [(_LABELS.get(key, key), _term(key, value)) for key, value in values.items() if value is not None]


def _term(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "memory_gib":
        return f"{value:.3g} GiB"
    if key in ("data_bytes", "held_out_bytes"):
        return f"{value:,} ({size(value)})"
    if isinstance(value, int) and key != "seed":
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
