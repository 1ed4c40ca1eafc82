"""The table of architectures, made from the code: equation, memory, sizes, cost, and what runs natively."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch

from .. import state as states
from ..config import find, mixer_names
from ..generation.decoder import Decoder
from ..mixers.base import Mixer
from ..models.blocks import Layer
from ..models.lm import LanguageModel
from ..ops import native
from ..ops.dispatch import Table
from .measures import size

WIDTH = 768  # the width at which sizes are given
LOCAL = ("short_conv",)  # ops over time that stand before the mixing itself: a filter of three or four tokens


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
    trains: str  # whether the mixing over time has a kernel, forward and backward: yes, in part, no
    decodes: str  # whether a token is decoded by the recorded program alone: yes, no


def rows() -> list[Row]:
    """One row for every file in ``mixers/``."""
    return [_row(name) for name in mixer_names()]


@torch.no_grad()
def _row(name: str) -> Row:
    mixer = find(name)
    cfg = LanguageModel.Config(vocab_size=2, d_model=WIDTH, layers=(Layer.Config(mixer=mixer.Config()),))
    model = cfg.build().float()
    layer = model.layers[0].mixer
    parameters = sum(p.numel() for p in layer.parameters())
    small, large = (states.nbytes_after(layer.init_state(1), length) for length in (1024, 1024**2))
    cost_1k, cost_1m = (operations(layer, length) / 1e6 for length in (1024, 1024**2))
    decodes = "no" if Decoder(model).explain() else "yes"
    return Row(name, mixer.equation, layer.memory, parameters, small, large, cost_1k, cost_1m, trains(mixer), decodes)


def operations(layer: Mixer, length: int) -> int:
    """Operations of the token after ``length`` others, about: a multiplication and an addition count as two.

    A parameter takes 2. A number of a recurrent state takes 4: it decays, something is added, and it is read. A number
    of what grows with the text (keys, values, inputs) is only read, and takes 2.
    """
    held = list(states.leaves(layer.init_state(1)))
    fixed = sum(leaf.numel() for _, leaf, pad in held if pad is None and leaf.is_floating_point())
    a_token = sum(math.prod(leaf.shape[2:]) for _, leaf, pad in held if pad is not None)
    return 2 * sum(p.numel() for p in layer.parameters()) + 4 * fixed + 2 * a_token * length


def mixing(mixer: type) -> dict[str, Any]:
    """The ops over time by which a mixer's file mixes tokens, by name: those that walk along the sequence."""
    tables = {op: getattr(op, "table", None) for op in vars(sys.modules[mixer.__module__]).values() if callable(op)}
    over_time = {table.name: op for op, table in tables.items() if isinstance(table, Table) and table.sequence}
    return {name: op for name, op in over_time.items() if name not in LOCAL}


def trains(mixer: type) -> str:
    """Whether the ops that mix tokens have a kernel (each has its backward pass): ``yes``, ``in part`` or ``no``."""
    found = [any(row.name == "native" for row in op.table) for op in mixing(mixer).values()]
    return "yes" if found and all(found) else "in part" if any(found) else "no"


def _pair(small: str, large: str) -> str:
    """Both values, or one where the length of the text changes nothing."""
    return small if small == large else f"{small} → {large}"


def _state(row: Row) -> str:
    return _pair(size(row.state_1k), size(row.state_1m))


def _cost(row: Row) -> str:
    return _pair(f"{row.cost_1k:.1f}", f"{row.cost_1m:.1f}" if row.cost_1m < 100 else f"{row.cost_1m:,.0f}")


def markdown() -> str:
    """The table for the README. ``ValueError`` where no kernels were built: nothing would be native."""
    if native.MISSING is not None:
        raise ValueError(
            f"the table says what runs natively, but {native.MISSING}; make it where the kernels are built"
        )
    lines = [
        "| architecture | equation | memory | state of a layer, 1K → 1M tokens | Mop per token | native training "
        "| native decoding |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        lines.append(
            f"| `{row.name}` | {row.equation.replace('|', chr(92) + '|')} | {row.memory} "
            f"| {_state(row)} | {_cost(row)} | {row.trains} | {row.decodes} |"
        )
    return "\n".join(lines) + "\n"


NOTE = (
    f"One layer at width {WIDTH}, fp32; two figures are those after 1K and after 1M tokens. Mop: millions of "
    "operations, 2 per parameter, 4 per number of a recurrent state, 2 per number kept for each token. Native: trains, "
    "the mixing of tokens has C++ kernels, forward and backward; decodes, no block of a token's step runs in Python."
)
HEADS = ("architecture", "memory", "state of a layer", "Mop per token", "trains", "decodes")


def show() -> None:
    """Print the table in the terminal: two lines for each architecture, which fit into 80 columns."""
    from rich.console import Console
    from rich.text import Text

    console, colours = Console(), {"constant": "green", "window": "cyan", "linear": "yellow"}
    found = rows()
    cells = [(row.name, row.memory, _state(row), _cost(row), row.trains, row.decodes) for row in found]
    widths = [max(map(len, column)) for column in zip(HEADS, *cells, strict=True)]

    def line(values: tuple[str, ...], *styles: str) -> None:
        padded = [value.ljust(width) for value, width in zip(values, widths, strict=True)]
        cell = Text("  ").join(Text(text, style) for text, style in zip(padded, styles, strict=True))
        console.print(cell, no_wrap=True, overflow="ignore", crop=False)

    line(("", "", "", "", "native", ""), *("bold",) * len(HEADS))
    line(HEADS, *("bold",) * len(HEADS))
    for row, shown in zip(found, cells, strict=True):
        line(shown, "bold", colours.get(row.memory, "white"), "", "", "", "")
        console.print(Text(f"  {row.equation}", "dim"), soft_wrap=True)
    console.print(Text(f"\n{NOTE}", "dim"))
    if native.MISSING is not None:
        console.print(Text(f"Nothing is native here: {native.MISSING}.", "yellow"))
