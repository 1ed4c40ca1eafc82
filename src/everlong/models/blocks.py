"""What stands around the mixers: norms, feed-forward blocks, and the residual layer.

A feed-forward block obeys the contract of a mixer, ``(x, state) -> (y, state)``; one without memory has
the empty tuple as its state. A layer is ``x + mixer(norm(x))``, then optionally ``x + mlp(norm(x))``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import config
from ..config import suggest
from ..mixers import base
from ..ops.gate import ACTIVATIONS, check_activation, gate
from ..ops.linear import Linear
from ..ops.norm import STYLES, norm


class Norm(nn.Module):
    """RMSNorm ``w x / rms(x)`` or LayerNorm ``w (x - mean) / std + b`` over the last axis.

    Computed at least in the dtype of x (fp32 for an fp32 residual), returned in the dtype of the weights.
    """

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


class FeedForward(base.Mixer):
    """Base of blocks that treat every token alone and keep nothing."""

    memory = "none"

    def init_state(self, batch: int) -> tuple[()]:
        """Nothing is kept."""
        return ()

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, tuple[()]]:
        """x [B T D] -> y [B T D], ()."""
        self.begin(x, state, starts)
        return self.transform(x), ()

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, tuple[()]]:
        """x [B D] -> y [B D], ()."""
        return self.transform(x), ()

    def transform(self, x: Tensor) -> Tensor:
        """The function applied to every token: [... D] -> [... D]."""
        raise NotImplementedError


def _hidden(cfg: Any, d_model: int) -> int:
    """The inner width: given, or ``expand * D`` rounded up to a multiple of 8."""
    return cfg.hidden or -(-int(cfg.expand * d_model) // 8) * 8


@torch.no_grad()
def _initialise(inner: nn.Linear, outer: nn.Linear, depth: base.Depth) -> None:
    for linear in (inner, outer):
        nn.init.normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    outer.weight.mul_((2 * depth.total) ** -0.5)


class SwiGLU(FeedForward):
    """Gated feed-forward:  ``W_2 (act(W_g x) * W_1 x)``  (Shazeer, arXiv 2002.05202)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """Inner width ``hidden``, or ``expand * D``; ``activation`` silu, sigmoid, gelu, gelu_tanh or relu2."""

        expand: float = 8 / 3
        hidden: int | None = None
        activation: str = "silu"
        bias: bool = False

        def __post_init__(self) -> None:
            super().__post_init__()
            check_activation(self.activation)

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        hidden = _hidden(cfg, d_model)
        self.in_proj = Linear(d_model, 2 * hidden, bias=cfg.bias)  # gate, then value
        self.out_proj = Linear(hidden, d_model, bias=cfg.bias)
        _initialise(self.in_proj, self.out_proj, depth)

    def transform(self, x: Tensor) -> Tensor:
        """[... D] -> [... D]."""
        z, value = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(gate(value, z, activation=self.cfg.activation))


class MLP(FeedForward):
    """Plain feed-forward:  ``W_2 act(W_1 x)``."""

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """Inner width ``hidden``, or ``expand * D``; ``activation`` silu, sigmoid, gelu, gelu_tanh or relu2."""

        expand: float = 4.0
        hidden: int | None = None
        activation: str = "gelu"
        bias: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            check_activation(self.activation)

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        hidden = _hidden(cfg, d_model)
        self.in_proj = Linear(d_model, hidden, bias=cfg.bias)
        self.out_proj = Linear(hidden, d_model, bias=cfg.bias)
        _initialise(self.in_proj, self.out_proj, depth)

    def transform(self, x: Tensor) -> Tensor:
        """[... D] -> [... D]."""
        return self.out_proj(ACTIVATIONS[self.cfg.activation](self.in_proj(x)))


class Layer(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))`` where there is an mlp. State: a pair of their states."""

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
