"""What the machine can do, measured in the same run: reading memory, copying it, products of matrices."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

BYTES = 512 * 2**20  # of the buffer that is read: far more than any cache holds
SIZE = 2048  # of the matrices that are multiplied


class Limits:
    """The limits of this machine at PyTorch's number of threads; keeps a buffer of ``nbytes`` to read."""

    def __init__(self, nbytes: int = BYTES) -> None:
        self.buffer = torch.ones(nbytes // 8, dtype=torch.int64)
        ways = _ways(self.buffer)
        self.way = min(ways, key=lambda name: best(ways[name], 3))
        self._read = ways[self.way]

    def read(self) -> list[float]:
        """A contender for ``clock.interleave``: the seconds of one pass over the buffer, by the fastest way."""
        began = time.perf_counter()
        self._read()
        return [time.perf_counter() - began]

    def measure(self, size: int = SIZE, repeats: int = 7) -> dict[str, float | str]:
        """GB/s of reading and copying (both directions counted), GFLOP/s of square products in fp32 and bf16."""
        other = torch.empty_like(self.buffer)
        found: dict[str, float | str] = {
            "read_gbs": self.buffer.nbytes / best(self._read, repeats) / 1e9,
            "read_by": self.way,
            "copy_gbs": 2 * self.buffer.nbytes / best(lambda: other.copy_(self.buffer), repeats) / 1e9,
        }
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = torch.ones(2, size, size, dtype=dtype).unbind()
            out = torch.empty(size, size, dtype=dtype)
            seconds = best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), repeats)  # type: ignore[misc]
            found[f"matmul_{name}_gflops"] = 2 * size**3 / seconds / 1e9
        return found


def _ways(buffer: Tensor) -> dict[str, Callable[[], object]]:
    """Ways of reading a whole buffer of int64; which is fastest differs between machines."""
    single = buffer.view(torch.float32)
    halves = single.chunk(2)
    return {
        "torch.sum of int64": buffer.sum,
        "torch.max of fp32": single.max,
        "torch.dot of two halves": lambda: torch.dot(*halves),
    }


def best(work: Callable[[], object], repeats: int) -> float:
    """The shortest of ``repeats`` times, after one call to warm up."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)
