"""A block whose output is handed on to later blocks instead of being added to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..call import EMBEDDINGS, Call, Handed
from ..mixers import base as contract
from . import base


class Aside(base.Block, nn.Module):
    """``values[name] = branch(x)``, x as it was: later blocks name it in ``reads`` (Zamba, arXiv 2405.16712)."""

    additive = False

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """Under which name, and the block whose branch it is."""

        name: str
        block: base.Config

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.name or self.name == EMBEDDINGS:
                raise ValueError(f"name is {self.name!r}, expected one of your own ({EMBEDDINGS!r} is the model's)")

        def mixers(self) -> Iterator[contract.Config]:
            """Those of the block."""
            return self.block.mixers()

        def needs(self, depth: contract.Depth) -> tuple[str, ...]:
            """What the block needs."""
            return self.block.needs(depth)

        def gives(self, depth: contract.Depth) -> tuple[str, ...]:
            """What the block hands on, and its output."""
            return (*self.block.gives(depth), self.name)

    cfg: Config

    def __init__(self, cfg: Config, d_model: int, depth: contract.Depth = contract.Depth()) -> None:
        super().__init__()
        self.cfg, self.block = cfg, cfg.block.build(d_model, depth)

    def mixers(self) -> Iterator[contract.Mixer]:
        """Those of the block."""
        return self.block.mixers()  # type: ignore[no-any-return]

    def init_state(self, batch: int) -> Any:
        """The state of the block before the first token."""
        return self.block.init_state(batch)

    def workspace(self, state: Any) -> Any:
        """The workspace of the block."""
        return self.block.workspace(state)

    def branch(self, x: Tensor, state: Any, call: Call) -> tuple[Tensor, Any, Handed]:
        """x [... D] -> the block's branch [... D], its state, and that under its name."""
        y, state, handed = self.block.branch(x, state, call)
        return y, state, handed.plus(Handed({self.cfg.name: y}))

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """x as it is."""
        return x


Aside.Config.owner = Aside
