"""sLSTM, the scalar memory of xLSTM (arXiv 2405.04517).   c_t = f c_{t-1} + i tanh(z),  h_t = o c_t / n_t

n_t = f n_{t-1} + i normalises. Input gates are exponential, and all is kept divided by exp(m_t) as ``ops/slstm_scan``
says; R, block-diagonal over the heads, feeds h_{t-1} into all four gates. i and f read x after a convolution of width 4
and SiLU, z and o read x itself; each head's output is normalised. The feed-forward of the paper's block is a block
of its own. Official code: NX-AI/xlstm, blocks/slstm (whose ``fgate`` feeds i and whose ``igate`` feeds f);
``norm_weight`` holds what is stored there plus one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.norm import norm
from ..ops.slstm_scan import slstm_scan, slstm_scan_step
from ..state import state
from . import base


class SLSTM(base.Mixer):
    """A vector memory with exponential gates that read the output before, so training runs token by token."""

    equation = "c = σ(f) c + exp(i) tanh(z), n = σ(f) n + exp(i), h = σ(o) c / n"
    no_decay = ("bias", "recurrent")

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``n_heads`` must divide the width."""

        n_heads: int = 4
        conv_width: int = 4
        norm_eps: float = 1e-5

    @state
    class State:
        """What an sLSTM layer keeps."""

        conv: Tensor  # [B W-1 D]
        cell: Tensor  # [B 4 H K] fp32: h, c, n, m

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        self.head = base.split_heads(d_model, cfg.n_heads)
        self.conv = nn.Conv1d(d_model, d_model, cfg.conv_width, groups=d_model)
        self.if_weight = nn.Parameter(torch.empty(cfg.n_heads, 2 * self.head, self.head))
        self.zo_weight = nn.Parameter(torch.empty(cfg.n_heads, 2 * self.head, self.head))
        self.recurrent = nn.Parameter(torch.empty(cfg.n_heads, self.head, 4, self.head))  # from h to i, f, z, o
        self.bias = nn.Parameter(torch.empty(cfg.n_heads, 4, self.head))
        self.norm_weight = nn.Parameter(torch.ones(d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of the official code: forget biases from 5 down to -7 in each head, faster in early layers."""
        for weight in (self.if_weight, self.zo_weight):
            weight.normal_(std=math.sqrt(2 / (5 * self.d_model)))
        self.recurrent.zero_()
        self.bias.zero_()
        across = torch.arange(self.head) / max(self.head - 1, 1)
        self.bias[:, 1] = 5 - 12 * across ** (0.3 + 1.3 * self.depth.ratio)

    def init_state(self, batch: int) -> State:
        """Nothing remembered: zeros."""
        return self.State(
            conv=torch.zeros(batch, self.cfg.conv_width - 1, self.d_model, **self.factory),
            cell=torch.zeros(batch, 4, self.cfg.n_heads, self.head, **self.memory_factory),
        )

    def _project(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Pre-activations [... H 4 K] without the recurrent part, from x and its convolved branch."""
        heads = (self.cfg.n_heads, 2, self.head)
        i_f = base.block_diagonal(mixed, self.if_weight).unflatten(-1, heads)
        z_o = base.block_diagonal(x, self.zo_weight).unflatten(-1, heads)
        return torch.cat([i_f, z_o], dim=-2) + self.bias

    def _finish(self, h: Tensor) -> Tensor:
        weight = self.norm_weight.unflatten(0, h.shape[-2:])
        return norm(h, weight=weight, eps=self.cfg.norm_eps, style="layer").flatten(-2)

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        before = self.begin(x, state, starts)
        mixed, conv = base.convolve(self.conv, x, state=before.conv, starts=starts)
        pre = self._project(x, mixed)
        h, cell = slstm_scan(pre, recurrent=self.recurrent, state=before.cell, starts=starts)
        return self._finish(h), self.State(conv=conv, cell=cell)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        before = self.begin(x, state)
        mixed, conv = base.convolve_step(self.conv, x, state=before.conv)
        h, cell = slstm_scan_step(self._project(x, mixed), recurrent=self.recurrent, state=before.cell)
        return self._finish(h), self.State(conv=conv, cell=cell)
