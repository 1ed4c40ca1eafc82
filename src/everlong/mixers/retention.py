"""Retention (RetNet, arXiv 2307.08621).   S_t = gamma S_{t-1} + k_t v_t^T,  y_t = norm(S_t^T q_t)

gamma_h = 1 - 2^(-5-h) per head. q and k are rotated by their position (pairs of neighbouring channels, angles from 1
to 1/10000 radians per token, no growing or shrinking of magnitudes), so scores depend on differences of positions only.
The paper divides scores by running sums to keep magnitudes even; the RMS norm of each head undoes any
scale, so they are left out: the output is the same up to the eps of the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import shapes
from ..ops.common import token_positions
from ..ops.gated_norm import gated_norm
from ..ops.linear import Linear
from ..ops.linear_attention import linear_attention, linear_attention_step
from ..ops.rotary import cos_sin
from ..state import counted, state
from . import base


class Retention(base.Mixer):
    """Multi-scale retention; values of width ``expand_v * D``."""

    equation = "S = γ S + R(t)k vᵀ, γ fixed per head"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``n_heads`` must divide both widths, and leave an even number of keys per head."""

        n_heads: int = 4
        expand_v: float = 2.0
        norm_eps: float = 1e-6

    @state
    class State:
        """What a retention layer keeps."""

        memory: Tensor  # [B H K V] fp32
        position: Tensor = counted()  # [B] int64, tokens since the document began

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        values = int(cfg.expand_v * d_model)
        self.head_k, self.head_v = base.split_heads(d_model, cfg.n_heads), base.split_heads(values, cfg.n_heads)
        if self.head_k % 2:
            raise ValueError(
                f"each head has {self.head_k} keys, expected an even number to rotate in pairs; "
                f"choose another n_heads than {cfg.n_heads}"
            )
        self.q_proj = Linear(d_model, d_model, bias=False)
        self.k_proj = Linear(d_model, d_model, bias=False)
        self.v_proj = Linear(d_model, values, bias=False)
        self.gate_proj = Linear(d_model, values, bias=False)
        self.out_proj = Linear(values, d_model, bias=False)
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj):
            nn.init.xavier_uniform_(proj.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def init_state(self, batch: int) -> State:
        """No memory, position 0."""
        memory = torch.zeros(batch, self.cfg.n_heads, self.head_k, self.head_v, **self.memory_factory)
        return self.State(memory=memory, position=torch.zeros(batch, dtype=torch.int64, device=memory.device))

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rotated q and k, v and log decays. x [... D], position [...] -> [... H K], [... H V] and [... H]."""
        heads = (self.cfg.n_heads, -1)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        theta = 10000.0 ** -torch.linspace(0, 1, self.head_k // 2, dtype=torch.float64, device=x.device)
        cos, sin = (part[..., None, :] for part in cos_sin(position, theta, q.dtype))
        return _rotate(q, cos, sin), _rotate(k * self.head_k**-0.5, cos, sin), v, self._log_decay(x)

    def _log_decay(self, x: Tensor) -> Tensor:
        """log gamma, [... H] in fp32 or fp64."""
        head = torch.arange(self.cfg.n_heads, dtype=torch.float64, device=x.device)
        return torch.log1p(-torch.exp2(-5 - head)).to(shapes.state_dtype(x)).expand(*x.shape[:-1], -1)

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        z = self.gate_proj(x).unflatten(-1, y.shape[-2:])
        return self.out_proj(gated_norm(y, z, eps=self.cfg.norm_eps, first="norm").flatten(-2))

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        before = self.begin(x, state, starts)
        position = token_positions(before.position, x.shape[1], starts)
        y, memory = linear_attention(*self._project(x, position), state=before.memory, starts=starts)
        return self._finish(y, x), self.State(memory=memory, position=position[:, -1] + 1)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        before = self.begin(x, state)
        y, memory = linear_attention_step(*self._project(x, before.position), state=before.memory)
        return self._finish(y, x), self.State(memory=memory, position=before.position + 1)

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; one matrix per head."""
        q, k, v, g = self._project(x, token_positions(self.init_state(len(x)).position, x.shape[1], None))
        eye = base.identity_values(*v.shape[:3], like=v)
        matrix, _ = linear_attention(q, k, eye, g)
        return base.Mixing(matrix.transpose(1, 2), v, linear_attention(q, k, v, g)[0])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbouring channels of x [... H K] turned by angles [... 1 K/2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
