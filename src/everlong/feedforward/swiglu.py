"""Gated feed-forward (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..mixers import base
from ..ops.gate import check_activation, gate
from ..ops.linear import Linear
from .base import FeedForward, hidden_width, initialise


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
        hidden = hidden_width(cfg, d_model)
        self.in_proj = Linear(d_model, 2 * hidden, bias=cfg.bias)  # gate, then value
        self.out_proj = Linear(hidden, d_model, bias=cfg.bias)
        initialise(self.in_proj, self.out_proj, depth)

    def transform(self, x: Tensor) -> Tensor:
        """[... D] -> [... D]."""
        z, value = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(gate(value, z, activation=self.cfg.activation))
