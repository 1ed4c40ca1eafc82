"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236).   y_t = phi(q_t) S_t / (phi(q_t) . z_t + 1e-6)

S_t = S_{t-1} + phi(k_t) v_t^T and z_t = z_{t-1} + phi(k_t), with phi = elu + 1 and no scaling of q or k.
It forgets nothing. Sums run in fp32, since they grow with the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.linear import Linear
from ..ops.linear_attention import linear_attention
from ..state import state
from . import base


class LinearAttention(base.Mixer):
    """Softmax attention's kernel replaced by phi(q) . phi(k), so that the past folds into one matrix."""

    equation = "S = S + φ(k) vᵀ, z = z + φ(k), y = φ(q) S / φ(q)·z"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``n_heads`` must divide the width; ``normalizer`` is added to the denominator."""

        n_heads: int = 4
        normalizer: float = 1e-6

    @state
    class State:
        """What a linear attention layer keeps."""

        memory: Tensor  # [B H K V+1] fp32, the last column is z

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        self.head = base.split_heads(d_model, cfg.n_heads)
        self.q_proj = Linear(d_model, d_model, bias=False)
        self.k_proj = Linear(d_model, d_model, bias=False)
        self.v_proj = Linear(d_model, d_model, bias=False)
        self.out_proj = Linear(d_model, d_model, bias=False)

    def init_state(self, batch: int) -> State:
        """No memory: zeros."""
        return self.State(memory=torch.zeros(batch, self.cfg.n_heads, self.head, self.head + 1, **self.memory_factory))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k), v, all [B T H K]."""
        q, k, v = (proj(x).unflatten(-1, (self.cfg.n_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return F.elu(q) + 1, F.elu(k) + 1, v

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        memory = self.begin(x, state, starts).memory
        q, k, v = self._project(x)
        y, memory = linear_attention(q, k, v, normalizer=self.cfg.normalizer, state=memory, starts=starts)
        return self.out_proj(y.flatten(-2)), self.State(memory=memory)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        memory = self.begin(x, state).memory
        q, k, v = (part[:, None] for part in self._project(x))
        y, memory = linear_attention(q, k, v, normalizer=self.cfg.normalizer, state=memory, backend="reference")
        return self.out_proj(y[:, 0].flatten(-2)), self.State(memory=memory)

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; one matrix per head, its rows normalised."""
        q, k, v = self._project(x)
        eye = base.identity_values(*v.shape[:3], like=v)
        matrix, _ = linear_attention(q, k, eye, normalizer=self.cfg.normalizer)
        y, _ = linear_attention(q, k, v, normalizer=self.cfg.normalizer)
        return base.Mixing(matrix.transpose(1, 2), v, y)
