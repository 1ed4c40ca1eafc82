"""Branches side by side on one input: GPT-J's attention and MLP, Hymba's and Falcon-H1's attention and state space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..call import NOTHING, Call, Handed
from ..config import suggest
from ..mixers import base as contract
from . import base
from .base import Norm

MIXES = ("sum", "mean", "learned")


class Parallel(base.Block, nn.Module):
    """``x <- x + sum_i w_i branch_i(norm(x))``, each branch a block with norms and scales of its own.

    ``norm`` stands before all of them (GPT-J: one norm for both; its branches then have None). ``mix``: w_i is 1
    ("sum"), 1 / N ("mean"), or a vector [D] of each branch that is learned from 1 / N on ("learned", Hymba,
    arXiv 2411.13676). What a branch hands on, no other branch of the block reads.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """The branches: blocks that only add to the stream."""

        branches: tuple[base.Config, ...]
        norm: Norm.Config | None = None
        mix: str = "sum"

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.mix not in MIXES:
                raise ValueError(f"mix is {self.mix!r}{suggest(self.mix, MIXES)}")
            if not self.branches:
                raise ValueError("branches is empty; give at least one block")

        def mixers(self) -> Iterator[contract.Config]:
            """Those of the branches, in order."""
            for branch in self.branches:
                yield from branch.mixers()

        def needs(self, depth: contract.Depth) -> tuple[str, ...]:
            """What the branches need."""
            return tuple(name for branch in self.branches for name in branch.needs(depth))

        def gives(self, depth: contract.Depth) -> tuple[str, ...]:
            """What the branches hand on."""
            return tuple(name for branch in self.branches for name in branch.gives(depth))

    cfg: Config

    def __init__(self, cfg: Config, d_model: int, depth: contract.Depth = contract.Depth()) -> None:
        super().__init__()
        self.cfg = cfg
        self.norm = cfg.norm.build(d_model) if cfg.norm else None
        self.branches: Any = nn.ModuleList(branch.build(d_model, depth) for branch in cfg.branches)
        for index, branch in enumerate(self.branches):
            if not branch.additive:
                raise ValueError(
                    f"branches[{index}] ({cfg.branches[index].kind}) does not only add to the stream; leave out its "
                    "skip and sum_norm"
                )
        share, count = 1 / len(cfg.branches), len(cfg.branches) if cfg.mix == "learned" else 0
        self.mix = nn.ParameterList(torch.full((d_model,), share) for _ in range(count))

    def mixers(self) -> Iterator[contract.Mixer]:
        """Those of the branches, in order."""
        for branch in self.branches:
            yield from branch.mixers()

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The states of the branches before the first token."""
        return tuple(branch.init_state(batch) for branch in self.branches)

    def workspace(self, state: tuple[Any, ...]) -> base.Workspaces:
        """The workspaces of the branches."""
        return base.Workspaces(self.branches, state)

    def branch(self, x: Tensor, state: Any, call: Call) -> tuple[Tensor, Any, Handed]:
        """x [... D] -> the weighted sum of the branches [... D], their states, what they hand on."""
        x = x if self.norm is None else self.norm(x)
        total, after, handed = None, [], NOTHING
        for index, (branch, kept) in enumerate(zip(self.branches, state, strict=True)):
            y, kept, more = branch.branch(x, kept, call)
            y = self.mix[index] * y if len(self.mix) else y
            total, handed = y if total is None else total + y, handed.plus(more)
            after.append(kept)
        assert total is not None
        total = total / len(self.branches) if self.cfg.mix == "mean" else total
        return total, state if call.way == "step_" else tuple(after), handed


Parallel.Config.owner = Parallel
