"""Training on a machine that others use too:  ``python -m everlong.bench.busy [busy processes] [seconds]``.

Each contender trains a model of width 128 and four layers in a process of its own, first on the quiet machine and then
beside processes that keep the cores busy. A fair share of the busy machine is what the threads of the contender get
where every thread gets the same: cores / (threads + busy processes) of its speed on the quiet one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

from ..machine import usable_cores

CONTENDERS = {
    "Mamba": ("mamba", "adaptive"),
    "Mamba, threads spin": ("mamba", "spin"),
    "Llama of transformers": ("llama", "spin"),
}
ROUNDS = 3
BURN = "import os\nwhile os.getppid() == {parent}: sum(range(10_000))"


def worker(model: str, seconds: float, busy: int) -> float:
    """Tokens per second of training, over all steps, beside ``busy`` processes that begin after the warm-up."""
    import time

    from .training import Shape, _our_step, _their_step, llama, models

    shape = Shape(d_model=128, layers=4, batch=4, context=256)
    ours = models(shape).get(model)
    step = _their_step(llama(shape), shape, "fp32") if ours is None else _our_step(ours, shape, "fp32")
    for _ in range(5):
        step()
    code = BURN.format(parent=os.getpid())
    others = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(busy)]
    try:
        laps: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(laps) < 5:
            laps += step()
    finally:
        for other in others:
            other.kill()
            other.wait()
    return shape.tokens * len(laps) / sum(laps)


def measure(busy: int, seconds: float) -> dict[str, dict[str, float]]:
    """Medians of ``ROUNDS`` rounds in turn, tokens per second: quiet and busy, by contender."""
    speeds: dict[str, dict[str, list[float]]] = {name: {"quiet": [], "busy": []} for name in CONTENDERS}
    for _ in range(ROUNDS):
        for place, others in (("quiet", 0), ("busy", busy)):
            for name, (model, wait) in CONTENDERS.items():
                speeds[name][place].append(_in_a_process(model, wait, seconds, others))
    return {name: {place: statistics.median(laps) for place, laps in rows.items()} for name, rows in speeds.items()}


def _in_a_process(model: str, wait: str, seconds: float, busy: int) -> float:
    arguments: list[Any] = [model, seconds, busy]
    done = subprocess.run(
        [sys.executable, "-m", "everlong.bench.busy", "--worker", json.dumps(arguments)],
        env={**os.environ, "EVERLONG_WAIT": wait},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure and print a line for each contender."""
    import torch

    if sys.argv[1:2] == ["--worker"]:
        print(worker(*json.loads(sys.argv[2])))
        return
    busy, seconds = int((sys.argv[1:] or ["6"])[0]), float((sys.argv[2:] or ["6"])[0])
    threads, cores = torch.get_num_threads(), usable_cores()
    share = min(1.0, cores / (threads + busy))
    print(f"{cores} cores, {threads} threads, {busy} busy processes: a fair share is {share:.0%} of the quiet speed")
    for name, row in measure(busy, seconds).items():
        fair = row["busy"] / (share * row["quiet"])
        print(f"{name:24} quiet {row['quiet']:8,.0f} tok/s, busy {row['busy']:8,.0f} tok/s, {fair:.0%} of a fair share")


if __name__ == "__main__":
    main()
