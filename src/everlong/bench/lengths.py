"""What texts of new lengths cost:  ``python -m everlong.bench.lengths [prompts] [rounds]``.

The memory that prompts of all lengths add to a process (a compiled program kept for each shape would show), and the
time of a training step on texts of lengths not seen before, beside steps on one length with as many tokens.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from ..config import find
from ..models.blocks import Layer
from ..models.lm import LanguageModel
from . import clock

ALLOWED_MIB, ALLOWED_RATIO = 20.0, 1.2
LONGEST, BATCH, STEPS = 2048, 4, 12


def model(width: int = 128, layers: int = 2) -> LanguageModel:
    """A small Mamba on bytes."""
    layer = Layer.Config(mixer=find("mamba").Config())
    return LanguageModel.Config(vocab_size=256, d_model=width, layers=(layer,) * layers).build()


def resident_mib() -> float:
    """What the process holds in memory now, without what it has freed but not given back (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@torch.no_grad()
def memory_of_prompts(count: int) -> float:
    """MiB that ``count`` prompts of different lengths add, after the longest one has been read."""
    reader = model().eval()
    lengths = torch.linspace(8, LONGEST - 1, count).long().tolist()
    for _ in range(3):
        reader(torch.zeros(1, LONGEST, dtype=torch.long))
    before = resident_mib()
    for length in lengths:
        reader(torch.zeros(1, length, dtype=torch.long))
    return resident_mib() - before


def train_on(learner: LanguageModel, lengths: list[int]) -> float:
    """Seconds of one training step per length, without the optimiser."""
    texts: list[Tensor] = [torch.randint(0, 256, (BATCH, length)) for length in lengths]
    began = time.perf_counter()
    for text in texts:
        learner.zero_grad()
        learner.loss(text, text).backward()
    return time.perf_counter() - began


def slowdown(rounds: int) -> dict[str, float]:
    """Time of new lengths as a multiple of one length's, the same tokens in each round, in turn."""
    learner = model()
    torch.manual_seed(0)
    lengths = (torch.randperm(384)[: rounds * STEPS] + 128).tolist()
    train_on(learner, [512, 320])
    ratios = []
    for begin in range(0, rounds * STEPS, STEPS):
        mixed = lengths[begin : begin + STEPS]
        one = [sum(mixed) // STEPS] * STEPS
        train_on(learner, one[:1])
        fixed = min(train_on(learner, one) for _ in range(2))
        ratios.append(train_on(learner, mixed) / fixed)
    return clock.spread(ratios)


def main() -> None:
    """Measure and print two lines."""
    count, rounds = (int(given) for given in (sys.argv[1:] + ["200", "9"][len(sys.argv) - 1 :]))
    added = memory_of_prompts(count)
    print(f"{count} prompts of different lengths: {added:+.1f} MiB; {clock.asked(added, ALLOWED_MIB, ' MiB')}")
    ratio = slowdown(rounds)
    print(
        f"training on new lengths: {ratio['median']:.2f} times the time of one length "
        f"({ratio['min']:.2f} to {ratio['max']:.2f}, {ratio['rounds']:.0f} rounds); "
        f"{clock.asked(ratio['median'], ALLOWED_RATIO)}"
    )


if __name__ == "__main__":
    main()
