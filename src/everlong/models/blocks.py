"""What stands around the mixers and feed-forward blocks: norms, and the residual layer.

A feed-forward block (``feedforward/``) obeys the contract of a mixer, ``(x, state) -> (y, state)``; one without memory
has the empty tuple as its state. A layer is ``x + mixer(norm(x))``, then optionally ``x + mlp(norm(x))``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import config
from ..config import suggest
from ..feedforward.base import FeedForward
from ..feedforward.mlp import MLP
from ..feedforward.swiglu import SwiGLU
from ..mixers import base
from ..ops.norm import STYLES, norm

__all__ = ["MLP", "FeedForward", "Layer", "Norm", "SwiGLU", "pattern"]


class Norm(nn.Module):
    """RMSNorm ``w x / rms(x)`` or LayerNorm ``w (x - mean) / std + b`` over the last axis.

    Computed at least in the dtype of x (fp32 for an fp32 residual), returned in the dtype of the weights.
    """

    KIND = "norm"

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """``style`` is "rms" or "layer"."""

        style: str = "rms"
        eps: float = 1e-5

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.style not in STYLES:
                raise ValueError(f"no norm {self.style!r}{suggest(self.style, STYLES)}")

    def __init__(self, cfg: Config, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if cfg.style == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """x [... D] -> [... D]."""
        return norm(x, weight=self.weight, bias=self.bias, eps=self.cfg.eps, style=self.cfg.style)


Norm.Config.owner = Norm


class Layer(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))`` where there is an mlp. State: a pair of their states."""

    KIND = "layer"

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Any mixer, and any feed-forward block or none."""

        mixer: base.Config
        mlp: base.Config | None = None
        norm: Norm.Config = field(default_factory=Norm.Config)

        def build(self, d_model: int, depth: base.Depth = base.Depth()) -> Layer:
            """The layer for inputs of width ``d_model``."""
            return Layer(self, d_model, depth)

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__()
        self.mixer_norm = cfg.norm.build(d_model)
        self.mixer = cfg.mixer.build(d_model, depth)
        self.mlp_norm = cfg.norm.build(d_model) if cfg.mlp else None
        self.mlp = cfg.mlp.build(d_model, depth) if cfg.mlp else None

    def _blocks(self) -> list[tuple[Any, Any]]:
        return [(self.mixer_norm, self.mixer)] + ([(self.mlp_norm, self.mlp)] if self.mlp else [])

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The states of the mixer and of the mlp before the first token."""
        return tuple(block.init_state(batch) for _, block in self._blocks())

    def forward(
        self, x: Tensor, state: tuple[Any, ...], *, starts: Tensor | None, side: dict[str, Tensor]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """x [B T D] -> y [B T D], state. ``side`` travels from layer to layer of one call."""
        after = []
        for (prenorm, block), before in zip(self._blocks(), state, strict=True):
            extra = {"side": side} if block.side else {}
            y, kept = block(prenorm(x), before, starts=starts, **extra)
            x = x + y
            after.append(kept)
        return x, tuple(after)

    def step(self, x: Tensor, state: tuple[Any, ...], *, side: dict[str, Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
        """x [B D] -> y [B D], state."""
        after = []
        for (prenorm, block), before in zip(self._blocks(), state, strict=True):
            y, kept = block.step(prenorm(x), before, **({"side": side} if block.side else {}))
            x = x + y
            after.append(kept)
        return x, tuple(after)

    def workspace(self, state: tuple[Any, ...]) -> list[base.Workspace]:
        """The workspaces of the blocks, which begin with ``state``."""
        return [block.workspace(before) for (_, block), before in zip(self._blocks(), state, strict=True)]

    def step_(self, x: Tensor, work: list[base.Workspace], *, side: dict[str, Tensor]) -> Tensor:
        """``step`` for the owner of a workspace, in place: x [B D] -> y [B D]."""
        for (prenorm, block), own in zip(self._blocks(), work, strict=True):
            x = x + block.step_(prenorm(x), own, **({"side": side} if block.side else {}))
        return x


Layer.Config.owner = Layer


def pattern(letters: str, **layers: Any) -> tuple[Layer.Config, ...]:
    """A tuple of layers from a string of single letters: ``pattern("mmma", m=..., a=...) * 4``.

    Each letter names a ``Layer.Config``, or a mixer's config that becomes a layer without an mlp.
    ``ValueError`` for a letter that is not given.
    """
    made = {}
    for letter, layer in layers.items():
        made[letter] = layer if isinstance(layer, Layer.Config) else Layer.Config(mixer=layer)
    for letter in letters:
        if letter not in made:
            raise ValueError(f"pattern {letters!r} uses {letter!r}, which is not given{suggest(letter, made)}")
    return tuple(made[letter] for letter in letters)
