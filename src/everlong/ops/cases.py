"""Named shapes and gates, shared by the tests and the benchmarks of every op."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """One set of sizes. ``gate`` fixes every log decay (0, -5, -50); None draws them at random, all scales."""

    name: str
    batch: int = 2
    time: int = 63
    heads: int = 2
    keys: int = 16
    values: int = 8
    gate: float | None = None
    variant: str | None = None  # the op's own switch, one of its VARIANTS
    dtype: torch.dtype = torch.float64

    def but(self, **changes: object) -> Case:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def randn(self, *shape: int) -> Tensor:
        """Signed normal inputs from torch's global generator (seed it first)."""
        return torch.randn(*shape, dtype=self.dtype)

    def log_decay(self, *shape: int) -> Tensor:
        """Log decays <= 0: the fixed ``gate``, or -softplus of wide normals (from about 0 to -10)."""
        if self.gate is not None:
            return torch.full(shape, self.gate, dtype=self.dtype)
        return -F.softplus(3 * self.randn(*shape))


LENGTHS = [Case(f"length {time}", time=time) for time in (1, 2, 3, 63, 64, 65, 100, 257)]
GATES = [Case(f"gate {gate:g}", time=100, gate=gate) for gate in (0.0, -5.0, -50.0)]
SIZES = [
    Case("keys 16, values 128", batch=1, time=70, keys=16, values=128),
    Case("keys 128, values 128", batch=3, time=70, heads=1, keys=128, values=128),
    Case("long", batch=1, time=4096, heads=1, keys=16, values=16),
]
CASES = [*LENGTHS, *GATES, *SIZES]
TIMED = [  # sizes of real layers, for the benchmarks
    Case("mamba-130m", batch=1, time=2048, heads=24, keys=16, values=64),
    Case("mamba2-130m", batch=1, time=2048, heads=24, keys=128, values=64),
    Case("rwkv7-0.1b", batch=1, time=2048, heads=12, keys=64, values=64),
    Case("training", batch=4, time=512, heads=4, keys=64, values=64),
]
