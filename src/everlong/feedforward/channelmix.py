"""RWKV-7's channel mix; stands where other models have an MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixers import base
from ..ops.common import previous
from ..ops.linear import Linear
from ..state import state


class ChannelMix(base.Mixer):
    """RWKV-7's feed-forward:  ``W_v relu(W_k (x_t + (x_{t-1} - x_t) mix))^2``  (arXiv 2503.14456)."""

    equation = "W relu(W x')², x' mixes two tokens"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """Inner width ``hidden``, or ``expand * D``."""

        expand: float = 4.0
        hidden: int | None = None

    @state
    class State:
        """What a channel mix keeps."""

        last: Tensor  # [B D] the previous input

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        hidden = cfg.hidden or int(cfg.expand * d_model)
        share = (1 - depth.layer / depth.total) ** 4
        self.mix = nn.Parameter(1 - (torch.arange(d_model) / d_model) ** share)
        self.in_proj = Linear(d_model, hidden, bias=False)
        self.out_proj = Linear(hidden, d_model, bias=False)
        nn.init.uniform_(self.in_proj.weight, -0.5 * d_model**-0.5, 0.5 * d_model**-0.5)
        nn.init.zeros_(self.out_proj.weight)

    def init_state(self, batch: int) -> State:
        """No previous token: zeros."""
        return self.State(last=torch.zeros(batch, self.d_model, **self.factory))

    def _transform(self, x: Tensor, shifted: Tensor) -> Tensor:
        return self.out_proj(F.relu(self.in_proj(torch.addcmul(x, shifted - x, self.mix))).square())

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        before = self.begin(x, state, starts)
        return self._transform(x, previous(x, before.last, starts)), self.State(last=x[:, -1].clone())

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        before = self.begin(x, state)
        return self._transform(x, before.last), self.State(last=x.clone())
