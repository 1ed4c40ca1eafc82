"""The table of architectures, made from the code: equation, memory, sizes, backends."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch

from .. import state as states
from ..config import find, mixer_names

WIDTH = 768  # the width at which sizes are given


class Row(NamedTuple):
    """One architecture at width 768: parameters and state bytes of a layer, fp32."""

    name: str
    equation: str
    memory: str
    parameters: int
    state_1k: int
    state_1m: int
    cost_1k: float  # operations of a token, in millions
    cost_1m: float
    backends: str


def rows() -> list[Row]:
    """One row for every file in ``mixers/``."""
    return [_row(name) for name in mixer_names()]


def _row(name: str) -> Row:
    mixer = find(name)
    with torch.device("meta"):
        layer = mixer.Config().build(WIDTH).float()
    parameters = sum(p.numel() for p in layer.parameters())
    small, large = (state_bytes(layer, length) for length in (1024, 1024**2))
    cost_1k, cost_1m = ((2 * parameters + held) / 1e6 for held in (small, large))  # 4 operations per number of 4 bytes
    names = ", ".join(backends(mixer))
    return Row(name, mixer.equation, layer.memory, parameters, small, large, cost_1k, cost_1m, names)


def state_bytes(module: Any, length: int, batch: int = 1) -> int:
    """Bytes of the state after ``length`` tokens, computed from shapes: growing leaves hold one entry per token."""
    total = 0
    for _, leaf, pad in states.leaves(module.init_state(batch)):
        entries = leaf.numel() if pad is None else leaf.shape[0] * length * math.prod(leaf.shape[2:])
        total += entries * leaf.element_size()
    return total


def backends(mixer: type) -> list[str]:
    """The backends of the ops that a mixer's file imports, fastest first."""
    names: dict[str, None] = {}
    for value in vars(sys.modules[mixer.__module__]).values():
        for row in getattr(value, "__globals__", {}).get("TABLE", ()):
            names[row.name] = None
    slow = ("torch", "reference")
    return sorted(names, key=lambda name: slow.index(name) + 1 if name in slow else 0) or ["torch"]


def size(count: int) -> str:
    """Bytes for people: 512 B, 24 KiB, 1.5 MiB, 3.0 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _pair(small: str, large: str) -> str:
    """Both values, or one where the length of the text changes nothing."""
    return small if small == large else f"{small} → {large}"


def _cost(row: Row) -> str:
    return _pair(f"{row.cost_1k:.1f}", f"{row.cost_1m:.1f}" if row.cost_1m < 100 else f"{row.cost_1m:,.0f}")


def markdown() -> str:
    """The table for the README."""
    lines = [
        "| architecture | equation | memory | state of a layer, 1K → 1M tokens | Mop per token | backends |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows():
        lines.append(
            f"| `{row.name}` | {row.equation.replace('|', chr(92) + '|')} | {row.memory} "
            f"| {_pair(size(row.state_1k), size(row.state_1m))} | {_cost(row)} | {row.backends} |"
        )
    return "\n".join(lines) + "\n"


NOTE = (
    f"One layer at width {WIDTH}, fp32. Operations: about 2 per parameter and 4 per number of state, "
    "after 1K and after 1M tokens where they differ."
)


def show() -> None:
    """Print the table in the terminal."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=NOTE, caption_justify="left")
    table.add_column("architecture, backends, equation", min_width=31, max_width=31 if Console().width < 100 else None)
    table.add_column("memory")
    for column in ("state of a layer", "Mop / token"):
        table.add_column(column, justify="right")
    colours = {"constant": "green", "window": "cyan", "linear": "yellow"}
    for row in rows():
        colour = colours.get(row.memory, "white")
        table.add_row(
            f"[bold]{row.name}[/]  [dim]{row.backends}[/]\n{escape(row.equation)}",
            f"[{colour}]{row.memory}[/]",
            _pair(size(row.state_1k), size(row.state_1m)),
            _cost(row),
        )
    Console().print(table)
