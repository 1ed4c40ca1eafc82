"""How long ``import everlong`` takes beside ``import torch``:  ``python -m everlong.bench.startup [rounds]``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from . import clock

ALLOWED = 0.15  # seconds more than PyTorch alone


def importing(statement: str) -> Callable[[], object]:
    """A new Python that runs ``statement``."""
    clean = "import sys; sys.path[:] = filter(None, sys.path); "  # without the folder one is in
    return lambda: subprocess.run([sys.executable, "-c", clean + statement], check=True, capture_output=True)


def measure(rounds: int) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Seconds of ``import torch``, of ``import torch, everlong``, and of the difference, round by round."""
    work = {"torch": "import torch", "both": "import torch, everlong"}
    contenders = {name: clock.stopwatch(importing(statement)) for name, statement in work.items()}
    laps = clock.interleave(contenders, clock.Pace(seconds=600.0, least=rounds, most=rounds))
    alone, both = laps["torch"].totals(), laps["both"].totals()
    extra = [with_us - torch for torch, with_us in zip(alone, both, strict=True)]
    return clock.spread(alone), clock.spread(both), clock.spread(extra)


def main() -> None:
    """Measure and print the line."""
    alone, both, extra = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
    print(
        f"import torch {alone['median']:.2f} s, with everlong {both['median']:.2f} s: "
        f"{extra['median']:+.3f} s ({extra['min']:+.3f} to {extra['max']:+.3f}, {extra['rounds']:.0f} rounds); "
        f"{clock.asked(extra['median'], ALLOWED, ' s')}"
    )


if __name__ == "__main__":
    main()
