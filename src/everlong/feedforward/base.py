"""What feed-forward blocks share: blocks that treat every token alone, widths and initial values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..mixers import base


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


def hidden_width(cfg: Any, d_model: int) -> int:
    """The inner width: given, or ``expand * D`` rounded up to a multiple of 8."""
    return cfg.hidden or -(-int(cfg.expand * d_model) // 8) * 8


@torch.no_grad()
def initialise(inner: nn.Linear, outer: nn.Linear, depth: base.Depth) -> None:
    """Normal weights of 0.02, those of the outer map less in deep models; no biases."""
    for linear in (inner, outer):
        nn.init.normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    outer.weight.mul_((2 * depth.total) ** -0.5)
