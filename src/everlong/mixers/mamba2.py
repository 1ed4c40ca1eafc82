"""Mamba-2 (SSD, arXiv 2405.21060).   h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T,  y_t = h_t^T C_t + D x_t

Linear attention with one decay per head: k = B, q = C, v = dt x, g = dt A. Parameters are named as in the
official code; ``in_proj`` gives [z, x, B, C, dt]. Paper letters: N = K = d_state, P = V = head_dim, G = n_groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.gated_norm import gated_norm
from ..ops.linear import Linear
from ..ops.linear_attention import linear_attention, linear_attention_step
from ..shapes import state_dtype
from ..state import state
from . import base


class GatedNorm(nn.Module):
    """RMS norm of ``y * silu(z)`` within each group of channels, with one weight per channel."""

    def __init__(self, width: int, n_groups: int, eps: float) -> None:
        super().__init__()
        self.weight, self.n_groups, self.eps = nn.Parameter(torch.ones(width)), n_groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z [... C] -> [... C]."""
        y, z, weight = (part.unflatten(-1, (self.n_groups, -1)) for part in (y, z, self.weight))
        return gated_norm(y, z, weight=weight, eps=self.eps, first="gate").flatten(-2)


class Mamba2(base.Mixer):
    """State space duality layer; heads of width ``head_dim`` share B and C within a group."""

    equation = "S = exp(dt A) S + B (dt x)ᵀ,  A scalar per head"
    no_decay = ("A_log", "D", "dt_bias")
    full_precision = ("A_log", "dt_bias")

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``head_dim`` must divide ``expand * D``, and ``n_groups`` the number of heads."""

        d_state: int = 128
        d_conv: int = 4
        expand: float = 2.0
        head_dim: int = 64
        n_groups: int = 1
        A_min: float = 1.0
        A_max: float = 16.0
        dt_min: float = 1e-3
        dt_max: float = 0.1
        norm_eps: float = 1e-5
        conv_bias: bool = True
        bias: bool = False

    @state
    class State:
        """What a Mamba-2 layer keeps."""

        conv: Tensor  # [B W-1 C] the last inputs of the convolution: x, B and C
        memory: Tensor  # [B H K V] fp32

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        self.channels = int(cfg.expand * d_model)
        if cfg.head_dim < 1 or self.channels % cfg.head_dim:
            raise ValueError(
                f"head_dim is {cfg.head_dim}, expected a divisor of the inner width {self.channels} (expand)"
            )
        self.n_heads = self.channels // cfg.head_dim
        base.split_heads(self.n_heads, cfg.n_groups, "groups of heads; n_groups must divide their number")
        self.keys = cfg.n_groups * cfg.d_state
        mixed = self.channels + 2 * self.keys
        self.in_proj = Linear(d_model, self.channels + mixed + self.n_heads, bias=cfg.bias)
        self.conv1d = nn.Conv1d(mixed, mixed, cfg.d_conv, groups=mixed, bias=cfg.conv_bias)
        self.dt_bias = nn.Parameter(base.dt_bias(self.n_heads, cfg.dt_min, cfg.dt_max))
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(cfg.A_min, cfg.A_max).log())
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = GatedNorm(self.channels, cfg.n_groups, cfg.norm_eps)
        self.out_proj = Linear(self.channels, d_model, bias=cfg.bias)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth.total)

    def step_outputs(self) -> dict[str, int]:
        """dt, the last of what ``in_proj`` gives."""
        return {"in_proj": self.n_heads}

    def init_state(self, batch: int) -> State:
        """Zeros: no inputs yet, no memory."""
        cfg, mixed = self.cfg, self.channels + 2 * self.keys
        return self.State(
            conv=torch.zeros(batch, cfg.d_conv - 1, mixed, **self.factory),
            memory=torch.zeros(batch, self.n_heads, cfg.d_state, cfg.head_dim, **self.memory_factory),
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate z, what is convolved (x, B, C), and the step dt in fp32."""
        mixed = self.channels + 2 * self.keys
        z, mixed, dt = self.in_proj(x).split([self.channels, mixed, self.n_heads], dim=-1)
        wide = state_dtype(x)
        return z, mixed, F.softplus(dt.to(wide) + self.dt_bias.to(wide))

    def _heads(self, mixed: Tensor, dt: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """x [... H V], and q, k, v, g of the linear attention."""
        x, B, C = mixed.split([self.channels, self.keys, self.keys], dim=-1)
        x = x.unflatten(-1, (self.n_heads, -1))
        B, C = (tensor.unflatten(-1, (self.cfg.n_groups, -1)) for tensor in (B, C))
        return x, (C, B, x * dt[..., None].to(x.dtype), -dt * self.A_log.to(dt.dtype).exp())

    def _finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        y = y + self.D[:, None] * x
        return self.out_proj(self.norm(y.flatten(-2), z))

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        state = self.begin(x, state, starts)
        z, mixed, dt = self._project(x)
        mixed, conv = base.convolve(self.conv1d, mixed, state=state.conv, starts=starts)
        x, qkvg = self._heads(mixed, dt)
        y, memory = linear_attention(*qkvg, state=state.memory, starts=starts)
        return self._finish(y, x, z), self.State(conv=conv, memory=memory)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        state = self.begin(x, state)
        z, mixed, dt = self._project(x)
        mixed, conv = base.convolve_step(self.conv1d, mixed, state=state.conv)
        x, qkvg = self._heads(mixed, dt)
        y, memory = linear_attention_step(*qkvg, state=state.memory)
        return self._finish(y, x, z), self.State(conv=conv, memory=memory)

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; one matrix per head, values after convolution and SiLU, before dt."""
        _, mixed, dt = self._project(x)
        x, (q, k, v, g) = self._heads(base.convolve(self.conv1d, mixed, state=self.init_state(len(x)).conv)[0], dt)
        eye = base.identity_values(*v.shape[:3], like=v)
        matrix, _ = linear_attention(q, k, eye * dt[..., None].to(eye.dtype), g)
        skip = self.D[:, None]
        return base.Mixing((matrix + skip * eye).transpose(1, 2), x, linear_attention(q, k, v, g)[0] + skip * x)

    @classmethod
    def examples(cls) -> dict[str, Any]:
        """Small heads; two groups."""
        return {
            "default": cls.Config(d_state=16, head_dim=32),
            "groups": cls.Config(d_state=8, head_dim=16, n_groups=2, d_conv=3),
        }
