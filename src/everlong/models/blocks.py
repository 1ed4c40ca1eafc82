"""A layer: a sequence of blocks (``blocks/``), most often a residual mixer and a residual feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import config
from ..blocks import base as block_base
from ..blocks.base import Norm
from ..blocks.residual import Branch, Residual
from ..call import Call, Handed, through
from ..config import suggest
from ..feedforward.base import FeedForward
from ..feedforward.mlp import MLP
from ..feedforward.swiglu import SwiGLU
from ..mixers import base

__all__ = ["MLP", "FeedForward", "Layer", "Norm", "SwiGLU", "pattern"]


class Layer(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))`` where there is an mlp; or any sequence of ``blocks``.

    State: a tuple of the states of its blocks.
    """

    KIND = "layer"

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Any mixer, and any feed-forward block or none; or ``blocks`` instead of them."""

        mixer: base.Config | None = None
        mlp: base.Config | None = None
        norm: Norm.Config = field(default_factory=Norm.Config)
        blocks: tuple[block_base.Config, ...] = ()

        def __post_init__(self) -> None:
            super().__post_init__()
            if bool(self.blocks) == (self.mixer is not None) or (self.blocks and self.mlp is not None):
                raise ValueError(
                    "a layer is a mixer, with an mlp or without, or a tuple of blocks; give one of the two"
                )

        def sequence(self) -> tuple[block_base.Config, ...]:
            """The blocks, written out."""
            inner = (part for part in (self.mixer, self.mlp) if part is not None)
            return self.blocks or tuple(Residual.Config(inner=part, norm=self.norm) for part in inner)

        def mixers(self) -> Iterator[base.Config]:
            """The configurations of the mixers and feed-forwards, in order."""
            for block in self.sequence():
                yield from block.mixers()

        def to_dict(self) -> dict[str, Any]:
            """Plain JSON data: the mixer with what belongs to it, or the blocks."""
            unused = ("mixer", "mlp", "norm") if self.blocks else ("blocks",)
            return {name: value for name, value in super().to_dict().items() if name not in unused}

        def build(self, d_model: int, depth: base.Depth = base.Depth()) -> Layer:
            """The layer for inputs of width ``d_model``."""
            return Layer(self, d_model, depth)

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__()
        self.blocks = self.mixer_norm = self.mixer = self.mlp_norm = self.mlp = None
        if cfg.blocks:
            self.blocks = nn.ModuleList(block.build(d_model, depth) for block in cfg.blocks)
            return
        assert cfg.mixer is not None
        self.mixer_norm, self.mixer = cfg.norm.build(d_model), cfg.mixer.build(d_model, depth)
        if cfg.mlp is not None:
            self.mlp_norm, self.mlp = cfg.norm.build(d_model), cfg.mlp.build(d_model, depth)

    def sequence(self) -> list[Any]:
        """The blocks, in order, of either form."""
        if self.blocks is not None:
            return list(self.blocks)
        pairs = [(self.mixer_norm, self.mixer), (self.mlp_norm, self.mlp)]
        return [Branch(norm, inner) for norm, inner in pairs if inner is not None]

    def mixers(self) -> Iterator[base.Mixer]:
        """The mixers and feed-forwards inside, in order."""
        for block in self.sequence():
            yield from block.mixers()

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The states of the blocks before the first token."""
        return tuple(block.init_state(batch) for block in self.sequence())

    def workspace(self, state: tuple[Any, ...]) -> block_base.Workspaces:
        """The workspaces of the blocks, which begin with ``state``."""
        return block_base.Workspaces(self.sequence(), state)

    def forward(self, x: Tensor, state: Any, call: Call = Call()) -> tuple[Tensor, Any, Handed]:
        """x [B T D] -> x [B T D], state, what its blocks hand on; [B D] in a call of single tokens.

        In the way "step_", ``state`` is a workspace, which is written in place.
        """
        x, after, handed = through(self.sequence(), x, state, call)
        return x, state if call.way == "step_" else after, handed


Layer.Config.owner = Layer


def pattern(letters: str, **layers: Any) -> tuple[Layer.Config, ...]:
    """A tuple of layers from a string of single letters: ``pattern("mmma", m=..., a=...) * 4``.

    Each letter names a ``Layer.Config``, a block's config that becomes a layer alone, or a mixer's config that becomes
    a layer without an mlp. ``ValueError`` for a letter that is not given.
    """
    made = {}
    for letter, layer in layers.items():
        if isinstance(layer, block_base.Config):
            layer = Layer.Config(blocks=(layer,))
        made[letter] = layer if isinstance(layer, Layer.Config) else Layer.Config(mixer=layer)
    for letter in letters:
        if letter not in made:
            raise ValueError(f"pattern {letters!r} uses {letter!r}, which is not given{suggest(letter, made)}")
    return tuple(made[letter] for letter in letters)
