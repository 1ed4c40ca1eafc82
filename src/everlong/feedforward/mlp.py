"""Plain feed-forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..mixers import base
from ..ops.gate import ACTIVATIONS, check_activation
from ..ops.linear import Linear
from .base import FeedForward, hidden_width, initialise


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
        hidden = hidden_width(cfg, d_model)
        self.in_proj = Linear(d_model, hidden, bias=cfg.bias)
        self.out_proj = Linear(hidden, d_model, bias=cfg.bias)
        initialise(self.in_proj, self.out_proj, depth)

    def transform(self, x: Tensor) -> Tensor:
        """[... D] -> [... D]."""
        return self.out_proj(ACTIVATIONS[self.cfg.activation](self.in_proj(x)))
