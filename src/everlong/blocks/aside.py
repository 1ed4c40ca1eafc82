"""A block whose output is handed on to later blocks instead of being added to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..call import EMBEDDINGS, Call, Handed
from ..mixers import base as contract
from . import base


class Aside(base.Around):
    """``values[name] = branch(x)``, x as it was: later blocks name it in ``reads`` (Zamba, arXiv 2405.16712)."""

    additive = False

    @dataclass(frozen=True, kw_only=True)
    class Config(base.AroundConfig):
        """Under which name, and the block whose branch it is."""

        name: str

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.name or self.name == EMBEDDINGS:
                raise ValueError(f"name is {self.name!r}, expected one of your own ({EMBEDDINGS!r} is the model's)")

        def gives(self, depth: contract.Depth) -> tuple[str, ...]:
            """What the block hands on, and its output."""
            return (*super().gives(depth), self.name)

    cfg: Config

    def branch(self, x: Tensor, state: Any, call: Call) -> tuple[Tensor, Any, Handed]:
        """x [... D] -> the block's branch [... D], its state, and that under its name."""
        y, state, handed = super().branch(x, state, call)
        return y, state, handed.plus(Handed({self.cfg.name: y}))

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """x as it is."""
        return x


Aside.Config.owner = Aside
