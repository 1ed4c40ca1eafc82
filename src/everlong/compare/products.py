"""How fast a few rows are multiplied by a matrix, by format of the weights, beside PyTorch's own product.

``python -m everlong.compare.products`` prints a table. Every call takes another copy of the matrix, so that the weights
come from memory, as they do while a model generates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.native.product import FORMATS, Packed, pack, product

SHAPES = ((3072, 768), (768, 3072), (50280, 768))
ROWS = (1, 4, 16, 64)
BYTES = 3e8  # of all copies: several times the largest cache
SECONDS = 0.5  # for each figure


def fastest(call: Callable[[int], Tensor]) -> float:
    """Seconds of the fastest of many calls; ``call`` gets their number."""
    best, number, end = float("inf"), 0, time.perf_counter() + SECONDS
    while number < 5 or time.perf_counter() < end:
        began = time.perf_counter()
        call(number)
        best, number = min(best, time.perf_counter() - began), number + 1
    return best


def nbytes(packed: Packed) -> int:
    """Bytes that a product reads."""
    return sum(t.nbytes for t in (packed.weight, packed.scale) if t is not None)


def measure(weight: Tensor, name: str) -> str:
    """A line of the table: bandwidth at one row, and the throughput at more rows as a multiple of that."""
    if name.startswith("torch"):
        one = Packed(weight.to(torch.bfloat16 if "bf16" in name else torch.float32), None, *weight.shape)
    else:
        one = pack(weight, name)
    copies = [one]
    while len(copies) * nbytes(one) < BYTES:
        scale = None if one.scale is None else one.scale.clone()
        copies.append(one._replace(weight=one.weight.clone(), scale=scale))
    times = []
    for rows in ROWS:
        x = torch.randn(rows, weight.shape[1], dtype=torch.float32)
        if name.startswith("torch"):
            x = x.to(one.weight.dtype)
            times.append(fastest(lambda i, x=x: F.linear(x, copies[i % len(copies)].weight)))  # type: ignore[misc]
        else:
            times.append(fastest(lambda i, x=x: product(x, copies[i % len(copies)])))  # type: ignore[misc]
    more = " | ".join(f"{rows * times[0] / t:.1f}" for rows, t in zip(ROWS[1:], times[1:], strict=True))
    size = "x".join(str(n) for n in weight.shape)
    return f"| {size} | {name} | {times[0] * 1e6:.0f} | {nbytes(one) / times[0] / 1e9:.1f} | {more} |"


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m everlong.compare.products", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(f"| matrix | weights | us for 1 row | GB/s | {' | '.join(f'throughput of {n} rows' for n in ROWS[1:])} |")
    print("|---" * (4 + len(ROWS) - 1) + "|")
    for shape in SHAPES:
        weight = torch.randn(shape, dtype=torch.float32)
        for name in ("torch fp32", "torch bf16", *FORMATS):
            print(measure(weight, name), flush=True)


if __name__ == "__main__":
    main()
