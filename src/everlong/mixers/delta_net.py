"""DeltaNet (arXiv 2406.06484).   S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,  y_t = S_t^T q_t

Each token first erases what its key recalls, then writes. q, k, v pass a convolution of width 4 and SiLU; q and k are
brought to norm 1, and q is scaled by K^(-1/2). beta = sigmoid(W x) per head, or twice that with
``negative_eigenvalues`` (arXiv 2411.12537), so that a state can flip its sign. Each head is RMS-normalised and
projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.common import unit
from ..ops.delta_rule import delta_rule, delta_rule_step, plain
from ..ops.linear import Linear
from ..state import state
from . import base


class DeltaNet(base.Mixer):
    """The delta rule; keys of width ``expand_k * D``, values of width ``expand_v * D``."""

    equation = "S = S + β k (v − Sᵀk)ᵀ"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``n_heads`` must divide both widths."""

        n_heads: int = 4
        expand_k: float = 1.0
        expand_v: float = 1.0
        conv_width: int = 4
        negative_eigenvalues: bool = False
        norm_eps: float = 1e-5

    @state
    class State:
        """What a DeltaNet layer keeps."""

        conv: Tensor  # [B W-1 C] of q, k and v
        memory: Tensor  # [B H K V] fp32

    full_precision = ("beta_proj",)

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        keys, values = int(cfg.expand_k * d_model), int(cfg.expand_v * d_model)
        self.head_k, self.head_v = base.split_heads(keys, cfg.n_heads), base.split_heads(values, cfg.n_heads)
        self.widths = [keys, keys, values]
        self.qkv_proj = Linear(d_model, sum(self.widths), bias=False)
        self.conv = nn.Conv1d(sum(self.widths), sum(self.widths), cfg.conv_width, groups=sum(self.widths), bias=False)
        self.beta_proj = Linear(d_model, cfg.n_heads, bias=False)
        self.norm = base.RMSNorm(self.head_v, eps=cfg.norm_eps)
        self.out_proj = Linear(values, d_model, bias=False)

    def init_state(self, batch: int) -> State:
        """No memory: zeros."""
        return self.State(
            conv=torch.zeros(batch, self.cfg.conv_width - 1, sum(self.widths), **self.factory),
            memory=torch.zeros(batch, self.cfg.n_heads, self.head_k, self.head_v, **self.memory_factory),
        )

    def _rule(self, mixed: Tensor, x: Tensor) -> dict[str, Any]:
        """Inputs of the delta rule, [... H K] or [... H V], from the convolved q, k, v and x."""
        q, k, v = (part.unflatten(-1, (self.cfg.n_heads, -1)) for part in mixed.split(self.widths, dim=-1))
        beta = base.precise(self.beta_proj, x).sigmoid()
        if self.cfg.negative_eigenvalues:
            beta = 2 * beta
        return {"q": unit(q) * self.head_k**-0.5, "v": v, **plain(unit(k), beta)}

    def _finish(self, y: Tensor) -> Tensor:
        return self.out_proj(self.norm(y).flatten(-2))

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        before = self.begin(x, state, starts)
        mixed, conv = base.convolve(self.conv, self.qkv_proj(x), state=before.conv, starts=starts)
        y, memory = delta_rule(**self._rule(mixed, x), state=before.memory, starts=starts)
        return self._finish(y), self.State(conv=conv, memory=memory)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        before = self.begin(x, state)
        mixed, conv = base.convolve_step(self.conv, self.qkv_proj(x), state=before.conv)
        y, memory = delta_rule_step(**self._rule(mixed, x), state=before.memory)
        return self._finish(y), self.State(conv=conv, memory=memory)

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; one matrix per head."""
        mixed, _ = base.convolve(self.conv, self.qkv_proj(x), state=self.init_state(len(x)).conv)
        rule = self._rule(mixed, x)
        eye = base.identity_values(*rule["v"].shape[:3], like=rule["v"])
        matrix, _ = delta_rule(**{**rule, "v": eye})
        return base.Mixing(matrix.transpose(1, 2), rule["v"], delta_rule(**rule)[0])

    @classmethod
    def examples(cls) -> dict[str, Any]:
        """The paper's form, and one whose states may flip their sign."""
        return {"default": cls.Config(), "negative": cls.Config(n_heads=2, expand_v=0.5, negative_eigenvalues=True)}
