"""The page of a bench: goals, limits, plots, tables; one HTML file that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import atomic_write
from .bench_plots import figures, looks, names
from .bench_tables import Results, details, tables
from .html import facts, fill, terms
from .measures import comma

HEADINGS = {"ops": "Every op, every form", "models": "Whole models, beside their peers"}


def write_page(results: Results, path: Path) -> None:
    """Write the page on the results of ``everlong bench`` to ``path``, atomically."""
    atomic_write(path, render(results))


def render(results: Results) -> str:
    """The page as text."""
    page = {
        "verb": f"bench {results['kind']}",
        "heading": HEADINGS[results["kind"]],
        "headline": headline(results),
        "facts": facts(results),
        "notice": notice(results),
        "claims": results["lines"],
        "threads": results["machine"].get("threads"),
        "limits": limits(results),
        "tables": tables(results),
        "details": details(results),
        "made": [("Settings", terms(results["settings"])), ("Machine and versions", terms(results["machine"]))],
        "command": results["command"],
    }
    plots = figures(results)
    drawn = {series["model"] for plot in plots for series in plot["series"]}
    shown = {name: title for name, title in names(results).items() if name in drawn}
    return fill("bench.html.j2", plots, looks(results), shown, page)


def headline(results: Results) -> str:
    """How much was timed, how many goals hold, and what did not match."""
    counted: dict[str, int] = {}
    for row in results["rows"]:
        counted[row["status"]] = counted.get(row["status"], 0) + 1
    told = [f"{counted.get('timed', 0):,} rows timed"]
    if results["lines"]:
        told.append(f"{sum(line['holds'] for line in results['lines'])} of {len(results['lines'])} goals hold")
    if wrong := counted.get("mismatch", 0):
        told.append(f"{wrong} not timed because {'it does' if wrong == 1 else 'they do'} not match the reference")
    return "; ".join(told) + "."


def notice(results: Results) -> str:
    """What is missing, empty for a whole run."""
    parts = [f"{stage['label']} failed: {stage['reason']}" for stage in results["failed"]]
    if results["skipped"]:
        parts.append(f"no time was left for {', '.join(results['skipped'])}")
    return ". ".join(parts)


def limits(results: Results) -> list[dict[str, str]]:
    """The limits as cards: name, value, note."""
    found: dict[str, Any] = results["limits"]
    shown = (
        ("Reading memory", "read_gbs", "GB/s", f"best of three ways: {found.get('read_by')}"),
        ("Copying memory", "copy_gbs", "GB/s", "both directions counted"),
        ("Products in fp32", "matmul_fp32_gflops", "GFLOP/s", "2048 x 2048 x 2048, PyTorch"),
        ("Products in bf16", "matmul_bf16_gflops", "GFLOP/s", "2048 x 2048 x 2048, PyTorch"),
    )
    return [
        {"name": name, "value": f"{comma(found[key])} {unit}", "note": note}
        for name, key, unit, note in shown
        if key in found
    ]
