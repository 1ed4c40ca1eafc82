"""Interleaved timing:  every round runs all contenders, one after the other, so that what disturbs one disturbs all.

A contender is a function that does its work and returns the seconds it took, one entry per unit (a prompt, a token,
a training step). Ratios are formed within each round, and then their minimum, median and maximum.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..arguments import check

Contender = Callable[[], Sequence[float]]


@dataclass(frozen=True)
class Pace:
    """How long a comparison may take: ``seconds`` in all, but at least ``least`` rounds and at most ``most``.

    A contender whose warm-up alone takes longer than ``seconds`` takes part in one round only; one that takes longer
    than ``patience`` is not run again, and its warm-up counts.
    """

    seconds: float = 3.0
    least: int = 3
    most: int = 50
    patience: float = 30.0

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Laps:
    """The rounds of a contender: seconds of every unit."""

    rounds: tuple[tuple[float, ...], ...]

    def totals(self) -> list[float]:
        """Seconds of each round."""
        return [sum(units) for units in self.rounds]

    def units(self) -> list[float]:
        """Seconds of all units, in ascending order."""
        return sorted(unit for units in self.rounds for unit in units)


def stopwatch(work: Callable[[], object]) -> Contender:
    """A contender of one unit: a call of ``work``."""

    def run() -> list[float]:
        began = time.perf_counter()
        work()
        return [time.perf_counter() - began]

    return run


def interleave(contenders: Mapping[str, Contender], pace: Pace) -> dict[str, Laps]:
    """Time the contenders in turn. Each runs once to warm up; then come as many rounds as ``pace`` allows."""
    warm = {name: tuple(run()) for name, run in contenders.items()}
    took = {name: sum(units) for name, units in warm.items()}
    rounds = {name: [warm[name]] if took[name] > max(pace.patience, pace.seconds) else [] for name in contenders}
    steady = [name for name in contenders if took[name] <= pace.seconds]
    turn = sum(took[name] for name in steady)
    count = max(pace.least, min(pace.most, int(pace.seconds / max(turn, 1e-9))))
    for _ in range(count):
        for name, run in contenders.items():
            if name in steady or not rounds[name]:
                rounds[name].append(tuple(run()))
        if not steady:
            break
    return {name: Laps(tuple(laps)) for name, laps in rounds.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum, and of how many."""
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "rounds": len(values),
    }


def asked(measured: float, most: float, unit: str = "") -> str:
    """The words for what a measurement should be at most, and whether it is: "asked: at most 1.25; holds"."""
    return f"asked: at most {most:g}{unit}; {'holds' if measured <= most else 'does NOT hold'}"


def figure(value: float) -> str:
    """Three digits, and no exponent for large numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def rates(laps: Laps, amount: float) -> dict[str, float]:
    """``amount`` per second, over the rounds: of a round that handles ``amount``."""
    return spread([amount / total for total in laps.totals()])


def ratios(ours: Laps, theirs: Laps) -> dict[str, float]:
    """How many times faster ours is, round by round; what was measured once is compared with every round."""
    mine, other = ours.totals(), theirs.totals()
    count = max(len(mine), len(other)) if 1 in (len(mine), len(other)) else min(len(mine), len(other))
    return spread([other[min(i, len(other) - 1)] / mine[min(i, len(mine) - 1)] for i in range(count)])


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the ordered ones lie, between the two nearest. ``ValueError`` for none."""
    if not ordered:
        raise ValueError("no values to take a quantile of; time at least one unit")
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def latencies(laps: Laps) -> dict[str, Any]:
    """Milliseconds of a unit: P50, P99 and P99.9 (None where there are too few units to tell), and the units seen."""
    units = [1000 * unit for unit in laps.units()]
    tails = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    known = {
        name: quantile(units, share) if len(units) * (1 - share) >= 1 or share == 0.5 else None
        for name, share in tails.items()
    }
    return {**known, "units": len(units)}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The exponent of ``y ~ x^e``: least squares on logarithms; None for fewer than two places."""
    import math

    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points]).slope
