"""Gated DeltaNet (arXiv 2412.06464).   S_t = e^{g_t} S_{t-1};  S_t += beta_t k_t (v_t - S_t^T k_t)^T;  y_t = S_t^T q_t

The state first decays, then erases and writes as in the delta rule. Per value head ``g = -exp(A_log) softplus(a x +
dt_bias)`` and ``beta = sigmoid(W x)``. q, k, v pass a convolution and SiLU, q and k have norm 1, q is scaled by
K^(-1/2). Each head is RMS-normalised, gated by SiLU(W_z x) and projected. With ``n_key_heads`` neighbouring
value heads share q and k, as in Qwen3-Next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.common import unit
from ..ops.delta_rule import delta_rule, delta_rule_step, gated
from ..ops.linear import Linear
from ..state import state
from . import base


class GatedDelta(base.Mixer):
    """The gated delta rule; keys of width ``expand_k * D``, values of width ``expand_v * D``."""

    equation = "S = eᵍS + β k (v − eᵍSᵀk)ᵀ"
    no_decay = ("A_log", "dt_bias")

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``n_heads`` counts value heads; ``n_key_heads`` (the same unless given) must divide it."""

        n_heads: int = 4
        n_key_heads: int | None = None
        expand_k: float = 0.75
        expand_v: float = 1.5
        conv_width: int = 4
        dt_min: float = 0.001
        dt_max: float = 0.1
        norm_eps: float = 1e-5

    @state
    class State:
        """What a Gated DeltaNet layer keeps."""

        conv: Tensor  # [B W-1 C] of q, k and v
        memory: Tensor  # [B H K V] fp32

    full_precision = ("beta_proj", "decay_proj", "A_log", "dt_bias")

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        keys, values = int(cfg.expand_k * d_model), int(cfg.expand_v * d_model)
        self.key_heads = cfg.n_heads if cfg.n_key_heads is None else cfg.n_key_heads
        groups = "groups; n_key_heads must divide n_heads"
        self.shared = base.split_heads(cfg.n_heads, self.key_heads, groups)  # value heads that share one q and k
        self.head_k, self.head_v = base.split_heads(keys, self.key_heads), base.split_heads(values, cfg.n_heads)
        self.widths = [keys, keys, values]
        self.qkv_proj = Linear(d_model, sum(self.widths), bias=False)
        self.conv = nn.Conv1d(sum(self.widths), sum(self.widths), cfg.conv_width, groups=sum(self.widths), bias=False)
        self.beta_proj = Linear(d_model, cfg.n_heads, bias=False)
        self.decay_proj = Linear(d_model, cfg.n_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(cfg.n_heads).uniform_(1e-3, 16.0).log())
        self.dt_bias = nn.Parameter(base.dt_bias(cfg.n_heads, cfg.dt_min, cfg.dt_max))
        self.gate_proj = Linear(d_model, values, bias=False)
        self.norm = base.RMSNorm(self.head_v, eps=cfg.norm_eps)
        self.out_proj = Linear(values, d_model, bias=False)

    def init_state(self, batch: int) -> State:
        """No memory: zeros."""
        return self.State(
            conv=torch.zeros(batch, self.cfg.conv_width - 1, sum(self.widths), **self.factory),
            memory=torch.zeros(batch, self.cfg.n_heads, self.head_k, self.head_v, **self.memory_factory),
        )

    def _rule(self, mixed: Tensor, x: Tensor) -> dict[str, Any]:
        """Inputs of the gated delta rule, [... H K] or [... H V], from the convolved q, k, v and x."""
        q, k, v = mixed.split(self.widths, dim=-1)
        q, k = (unit(part.unflatten(-1, (self.key_heads, -1))) for part in (q, k))
        if self.shared > 1:
            q, k = (part.repeat_interleave(self.shared, dim=-2) for part in (q, k))
        beta, dt = base.precise(self.beta_proj, x), base.precise(self.decay_proj, x)
        g = -self.A_log.to(dt.dtype).exp() * F.softplus(dt + self.dt_bias.to(dt.dtype))
        v = v.unflatten(-1, (self.cfg.n_heads, -1))
        return {"q": q * self.head_k**-0.5, "v": v, **gated(k, beta.sigmoid(), g)}

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        z = self.gate_proj(x).unflatten(-1, y.shape[-2:])
        return self.out_proj(base.norm_then_gate(self.norm, y, z).flatten(-2))

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        before = self.begin(x, state, starts)
        mixed, conv = base.convolve(self.conv, self.qkv_proj(x), state=before.conv, starts=starts)
        y, memory = delta_rule(**self._rule(mixed, x), state=before.memory, starts=starts)
        return self._finish(y, x), self.State(conv=conv, memory=memory)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        before = self.begin(x, state)
        mixed, conv = base.convolve_step(self.conv, self.qkv_proj(x), state=before.conv)
        y, memory = delta_rule_step(**self._rule(mixed, x), state=before.memory)
        return self._finish(y, x), self.State(conv=conv, memory=memory)

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; one matrix per value head."""
        mixed, _ = base.convolve(self.conv, self.qkv_proj(x), state=self.init_state(len(x)).conv)
        rule = self._rule(mixed, x)
        eye = base.identity_values(*rule["v"].shape[:3], like=rule["v"])
        matrix, _ = delta_rule(**{**rule, "v": eye})
        return base.Mixing(matrix.transpose(1, 2), rule["v"], delta_rule(**rule)[0])

    @classmethod
    def examples(cls) -> dict[str, Any]:
        """The paper's form, and value heads that share keys."""
        return {"default": cls.Config(), "shared keys": cls.Config(n_heads=4, n_key_heads=2, expand_k=0.5)}
