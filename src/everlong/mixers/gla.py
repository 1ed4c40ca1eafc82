"""Gated linear attention (GLA, arXiv 2312.06635).   S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  y_t = S_t^T q_t

Paper letters: alpha_t = exp(g_t), with g_t = log sigmoid(x W1 W2 + b) / 16 per key channel, W1 of rank 16.
The output of each head is RMS-normalised, gated by SiLU(x W_r) and projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.linear import Linear
from ..ops.linear_attention import linear_attention, linear_attention_step
from ..state import state
from . import base


class GLA(base.Mixer):
    """Gated linear attention; keys of width ``expand_k * D``, values of width ``expand_v * D``."""

    equation = "S = diag(exp g) S + k vᵀ"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``n_heads`` must divide both widths."""

        n_heads: int = 4
        expand_k: float = 0.5
        expand_v: float = 1.0
        gate_rank: int = 16
        gate_scale: float = 16.0
        norm_eps: float = 1e-5

    @state
    class State:
        """What a GLA layer keeps."""

        memory: Tensor  # [B H K V] fp32

    full_precision = ("decay_proj",)

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        keys, values = int(cfg.expand_k * d_model), int(cfg.expand_v * d_model)
        self.head_k, self.head_v = base.split_heads(keys, cfg.n_heads), base.split_heads(values, cfg.n_heads)
        self.q_proj = Linear(d_model, keys, bias=False)
        self.k_proj = Linear(d_model, keys, bias=False)
        self.v_proj = Linear(d_model, values, bias=False)
        self.decay_proj = nn.Sequential(Linear(d_model, cfg.gate_rank, bias=False), Linear(cfg.gate_rank, keys))
        self.gate_proj = Linear(d_model, values, bias=False)
        self.norm = base.RMSNorm(self.head_v, eps=cfg.norm_eps)
        self.out_proj = Linear(values, d_model, bias=False)

    def init_state(self, batch: int) -> State:
        """No memory: zeros."""
        return self.State(memory=torch.zeros(batch, self.cfg.n_heads, self.head_k, self.head_v, **self.memory_factory))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and log decays, [... H K] or [... H V]."""
        heads = (self.cfg.n_heads, -1)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        g = F.logsigmoid(base.precise(self.decay_proj, x))
        return q * self.head_k**-0.5, k, v, (g / self.cfg.gate_scale).unflatten(-1, heads)

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        z = self.gate_proj(x).unflatten(-1, y.shape[-2:])
        return self.out_proj(base.norm_then_gate(self.norm, y, z).flatten(-2))

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        memory = self.begin(x, state, starts).memory
        y, memory = linear_attention(*self._project(x), state=memory, starts=starts)
        return self._finish(y, x), self.State(memory=memory)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        memory = self.begin(x, state).memory
        y, memory = linear_attention_step(*self._project(x), state=memory)
        return self._finish(y, x), self.State(memory=memory)

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; one matrix per head."""
        q, k, v, g = self._project(x)
        eye = base.identity_values(*v.shape[:3], like=v)
        matrix, _ = linear_attention(q, k, eye, g)
        return base.Mixing(matrix.transpose(1, 2), v, linear_attention(q, k, v, g)[0])
