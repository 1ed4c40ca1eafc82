"""The project's own goals, for the scripts in ``runs/``: what is asked, what was measured, and whether it holds.

Ratios are judged by their median over rounds, and printed with minimum and maximum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import clock

Row = dict[str, Any]
Line = dict[str, Any]

PREFILL = {("bf16", "transformers bf16"): 15.0, ("bf16", "llama.cpp f16"): 4.0}
DECODE = {
    ("fp32", "llama.cpp f32"): 1.1,
    ("bf16", "llama.cpp f16"): 1.4,
    ("int8", "llama.cpp Q8_0"): 2.0,
    ("int4", "llama.cpp Q4_0"): 1.5,
}
PREFILL_LENGTH, BATCH, SHORT, LONG = 2048, 16, 2048, 131072
ATTENTION = ("llama", "griffin", "jamba")  # models with attention, which read keys and values beside their weights
PEER, HISTORIES = 1.0, 0.75  # what is asked of them at every context
READ_SHARE, BATCH_GAIN, SLOWDOWN, EXPONENT, MEMORY = 0.8, 5.0, 1.05, 0.05, 1.1
SCAN_GAIN, SCAN_BOTH, LLAMA_GAIN, MAMBA_GAIN, LOGITS = 45.0, 3.5, 1.0, 100.0, 0.5


def lines(kind: str, rows: list[Row]) -> list[Line]:
    """All claims for which ``rows`` have the figures."""
    timed = [row for row in rows if row["status"] == "timed"]
    if kind == "ops":
        return list(_scan(timed))
    makers = (_prefill, _decode, _batch, _training, _growth, _memory, _loss)
    return [line for make in makers for line in make(timed)]


def _line(claim: str, asked: str, spread: dict[str, float], holds: bool, unit: str = "x") -> Line:
    low, middle, high = (f"{clock.figure(spread[key])}{unit}" for key in ("min", "median", "max"))
    told = middle if spread["rounds"] == 1 else f"{middle} ({low} to {high}, {spread['rounds']:.0f} rounds)"
    return {"claim": claim, "asked": asked, "measured": told, "holds": holds}


def _at_least(claim: str, spread: dict[str, float], least: float) -> Line:
    return _line(claim, f"≥ {least:g}x", spread, spread["median"] >= least)


def _scan(rows: list[Row]) -> Iterator[Line]:
    """The selective scan of Mamba-130M in fp32, in its default form: beside the loop, and what its gradient costs."""
    wanted = {"op": "selective_scan", "variant": "D", "case": "mamba-130m", "dtype": "fp32"}
    ours = [row for row in rows if wanted.items() <= row.items() and row["backend"] != "reference"]
    first = {name: next((row for row in ours if row["pass"] == name), None) for name in ("forward", "forward+backward")}
    forward, both = first.values()
    claim = "selective scan 1 x 2048 x 1536 x 16, fp32"
    if forward and "reference" in forward["against"]:
        yield _at_least(f"{claim}: forward against the reference loop", forward["against"]["reference"], SCAN_GAIN)
    if forward and both and both["backend"] == forward["backend"]:
        cost = both["ms"]["median"] / forward["ms"]["median"]
        yield {
            "claim": f"{claim}: forward and backward against forward",
            "asked": f"≤ {SCAN_BOTH:g}x",
            "measured": f"{cost:.3g}x (medians {both['ms']['median']:.3g} and {forward['ms']['median']:.3g} ms)",
            "holds": cost <= SCAN_BOTH,
        }


def _ours(rows: list[Row], measure: str) -> list[Row]:
    return [row for row in rows if row["measure"] == measure and row["engine"] == "everlong"]


def _prefill(rows: list[Row]) -> Iterator[Line]:
    for row in _ours(rows, "prefill"):
        for (weights, other), least in PREFILL.items():
            if row["length"] == PREFILL_LENGTH and row["weights"] == weights and other in row["ratios"]:
                yield _at_least(
                    f"{row['model']} prefill {row['length']}, {weights}, against {other}", row["ratios"][other], least
                )


def _decode(rows: list[Row]) -> Iterator[Line]:
    """At the shortest context beside peers and memory; at the longest beside the shortest."""
    ours = _ours(rows, "decode")
    shortest = min((row["context"] for row in ours), default=0)
    for row in ours:
        about = f"{row['model']} decode at {row['context']:,}, {row['weights']}"
        if row["context"] == shortest or row["model"].startswith(ATTENTION):
            yield from _beside(row, about)
        if row.get("against_shortest") and row["context"] >= LONG:
            slower, other = row["against_shortest"]["slowdown"], row["against_shortest"]["context"]
            claim, holds = f"{about}, against a context of {other:,}", slower["median"] <= SLOWDOWN
            yield _line(claim, f"≤ {SLOWDOWN:g}x the time", slower, holds)


def _beside(row: Row, about: str) -> Iterator[Line]:
    mixed = row["model"].startswith(ATTENTION)
    for (weights, other), least in DECODE.items():
        if row["weights"] == weights and other in row["ratios"]:
            yield _at_least(f"{about}, against {other}", row["ratios"][other], PEER if mixed else least)
    if row["weights"] in ("fp32", "bf16") or mixed:
        share = {key: value * (1 if key == "rounds" else 100) for key, value in row["share_of_read"].items()}
        what, least = ("weights, keys and values", HISTORIES) if mixed else ("weights", READ_SHARE)
        claim, least = f"{about}: {what} read, of the memory's limit", 100 * least
        yield _line(claim, f"≥ {least:g} %", share, share["median"] >= least, " %")


def _batch(rows: list[Row]) -> Iterator[Line]:
    for row in _ours(rows, "batch"):
        if row["batch"] == BATCH and "scaling" in row:
            about = f"{row['model']} {row['weights']}, {BATCH} rows decoded together against one at a time"
            yield _at_least(about, row["scaling"], BATCH_GAIN)


def _training(rows: list[Row]) -> Iterator[Line]:
    for row in _ours(rows, "training"):
        about = f"training {row['model']}, {row['weights']}"
        if row["weights"] == "fp32":
            for other, ratio in row["ratios"].items():
                least = MAMBA_GAIN if "mamba" in other else LLAMA_GAIN
                yield _at_least(f"{about}, against {other}", ratio, least)
        elif "against_fp32" in row:
            ratio = row["against_fp32"]
            yield _line(f"{about} against fp32", "> 1x", ratio, ratio["median"] > 1)


def _growth(rows: list[Row]) -> Iterator[Line]:
    """The exponent of prefill time against length, where lengths reach from 2K to 128K."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in _ours(rows, "prefill"):
        if SHORT <= row["length"] <= LONG:
            groups.setdefault((row["model"], row["weights"]), []).append((row["length"], row["seconds"]["median"]))
    for (model, weights), points in groups.items():
        found = clock.slope(points)
        if found is not None and {SHORT, LONG} <= {length for length, _ in points}:
            yield {
                "claim": f"{model} {weights}: prefill time grows with length, {SHORT:,} to {LONG:,}, to the power of",
                "asked": f"1.00 ± {EXPONENT:g}",
                "measured": f"{found:.3f}",
                "holds": abs(found - 1) <= EXPONENT,
            }


def _memory(rows: list[Row]) -> Iterator[Line]:
    """Peak memory of the longest text beside that of the shortest."""
    for model in dict.fromkeys(row["model"] for row in _ours(rows, "memory")):
        points = sorted((r["length"], r["peak_bytes"]) for r in _ours(rows, "memory") if r["model"] == model)
        if len(points) > 1:
            (short, small), (long, large) = points[0], points[-1]
            yield {
                "claim": f"{model}: peak memory of reading {long:,} tokens against {short:,}",
                "asked": f"≤ {MEMORY:g}x",
                "measured": f"{large / small:.3f}x ({large / 2**20:,.0f} and {small / 2**20:,.0f} MiB)",
                "holds": large <= MEMORY * small,
            }


def _loss(rows: list[Row]) -> Iterator[Line]:
    for row in _ours(rows, "loss"):
        taken, logits = row["taken_bytes"], row["logits_bytes"]
        yield {
            "claim": f"loss and gradients of {row['length']:,} tokens, {row['model']}: memory, of that of all logits",
            "asked": f"< {100 * LOGITS:g} %",
            "measured": f"{100 * taken / logits:.0f} % ({taken / 2**20:,.0f} of {logits / 2**20:,.0f} MiB)",
            "holds": taken < LOGITS * logits,
        }
