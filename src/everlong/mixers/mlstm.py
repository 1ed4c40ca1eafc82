"""mLSTM, the matrix memory of xLSTM (arXiv 2405.04517).   C_t = f_t C_{t-1} + i_t k_t v_t^T,  y_t = C_t^T q_t / n

i_t = exp(i~_t) and f_t = sigmoid(f~_t) per head; n_t accumulates k as C does k v^T, and the output is divided by
``max(|n_t . q_t|, 1)``. Everything is kept divided by exp(m_t), with ``m_t = max(log f_t + m_{t-1}, i~_t)``, which
makes every exponent <= 0. The block around the cell: x is widened and split in two; one half passes a convolution of
width 4 and SiLU before it makes q and k, and is added once more after the cell's norm; the other half gates.
Official code: NX-AI/xlstm, blocks/mlstm. ``norm_weight`` holds what is stored there plus one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.common import log_sigmoid
from ..ops.gate import gate
from ..ops.linear import Linear
from ..ops.linear_attention import linear_attention, linear_attention_step
from ..ops.max_plus_scan import max_plus_scan, max_plus_scan_step
from ..ops.norm import norm
from ..state import state
from . import base


class Parts(NamedTuple):
    """What enters the cell: q, k, v [... H V], i~ and log f [... H], in the dtype of the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor
    f: Tensor


class MLSTM(base.Mixer):
    """A matrix memory with exponential input gates, inside a widened block."""

    equation = "C = σ(f) C + exp(i) k vᵀ, y = Cᵀq / max(|nᵀq|, 1)"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """The inner width is ``expand * D``, rounded up to a multiple of 64; q, k and v mix ``block`` channels each."""

        n_heads: int = 4
        expand: float = 2.0
        conv_width: int = 4
        block: int = 4
        eps: float = 1e-6
        norm_eps: float = 1e-5

    @state
    class State:
        """What an mLSTM layer keeps."""

        conv: Tensor  # [B W-1 C]
        memory: Tensor  # [B H K V+1] fp32, C and n, both divided by exp(m)
        m: Tensor  # [B H] fp32

    full_precision = ("gates",)

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        inner = 64 * math.ceil(cfg.expand * d_model / 64)
        self.inner, self.head = inner, base.split_heads(inner, cfg.n_heads)
        if cfg.block < 1 or inner % cfg.block:
            raise ValueError(f"inner width {inner} cannot be split into blocks of {cfg.block}; choose a power of two")
        blocks = (inner // cfg.block, cfg.block, cfg.block)
        self.up_proj = Linear(d_model, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, cfg.conv_width, groups=inner)
        self.q_weight, self.k_weight, self.v_weight = (nn.Parameter(torch.empty(blocks)) for _ in range(3))
        self.gates = Linear(3 * inner, 2 * cfg.n_heads)  # i~ of all heads, then f~
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.skip = nn.Parameter(torch.ones(inner))
        self.down_proj = Linear(inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of the official code: input gates near 1, half-lives of 14 to 280 tokens."""
        for weight in (self.up_proj.weight, self.q_weight, self.k_weight, self.v_weight):
            weight.normal_(std=math.sqrt(2 / (5 * self.d_model)))
        self.down_proj.weight.normal_(std=2 / (self.depth.total * math.sqrt(self.d_model)))
        self.gates.weight.zero_()
        self.gates.bias[: self.cfg.n_heads].normal_(std=0.1)
        self.gates.bias[self.cfg.n_heads :] = torch.linspace(3.0, 6.0, self.cfg.n_heads)

    def init_state(self, batch: int) -> State:
        """No memory: zeros."""
        heads = self.cfg.n_heads
        return self.State(
            conv=torch.zeros(batch, self.cfg.conv_width - 1, self.inner, **self.factory),
            memory=torch.zeros(batch, heads, self.head, self.head + 1, **self.memory_factory),
            m=torch.zeros(batch, heads, **self.memory_factory),
        )

    def _project(self, u: Tensor, mixed: Tensor) -> Parts:
        """The cell's inputs from the widened input u and its convolved branch, both [... C]."""
        q, k = base.block_diagonal(mixed, self.q_weight), base.block_diagonal(mixed, self.k_weight)
        v = base.block_diagonal(u, self.v_weight)
        dtype = self.memory_factory["dtype"]
        i, f = base.precise(self.gates, torch.cat([q, k, v], dim=-1)).to(dtype).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.cfg.n_heads, -1)).to(dtype) for part in (q, k, v))
        return Parts(q, k, v, i, log_sigmoid(f))

    def _scale(self, log_gate: Tensor) -> Tensor:
        """The factor of k: the input gate and 1 / sqrt(K)."""
        return log_gate.exp()[..., None] * self.head**-0.5

    def _read(self, y: Tensor, m: Tensor) -> Tensor:
        """The numerator y[..., :-1] over max(|y[..., -1]|, exp(-m)) + eps, both scaled by exp(min(m, 0))."""
        down, floor = m.clamp(max=0).exp()[..., None], (-m.clamp(min=0)).exp()[..., None]
        y = y * down
        return y[..., :-1] / (torch.maximum(y[..., -1:].abs(), floor) + self.cfg.eps * down)

    def _cell(self, parts: Parts, memory: Tensor, m: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Many tokens from a state: outputs [B T H V], memory, m."""
        q, k, v, i, f = parts
        before = m.detach()[:, None]
        # the output does not depend on the choice of m, so no gradient needs to pass through it
        tops, last = max_plus_scan(i.detach(), f.detach(), state=before[:, 0], starts=starts)
        before = torch.cat([before, tops[:, :-1]], dim=1)
        if starts is not None:
            before = before.masked_fill(starts[..., None], 0.0)
        # summed in this order, the decay is exact where m stays or only decays
        g = f + (before - tops)
        k = k * self._scale(i - tops)
        y, memory = linear_attention(q, k, _with_ones(v), g, state=memory, starts=starts)
        return self._read(y, tops), memory, last

    def _finish(self, h: Tensor, mixed: Tensor, z: Tensor) -> Tensor:
        weight = self.norm_weight.unflatten(0, h.shape[-2:])
        h = norm(h, weight=weight, eps=self.cfg.norm_eps, style="layer").flatten(-2)
        return self.down_proj(gate(h + self.skip * mixed, z))

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        before = self.begin(x, state, starts)
        u, z = self.up_proj(x).chunk(2, dim=-1)
        mixed, conv = base.convolve(self.conv, u, state=before.conv, starts=starts)
        h, memory, m = self._cell(self._project(u, mixed), before.memory, before.m, starts)
        return self._finish(h, mixed, z), self.State(conv=conv, memory=memory, m=m)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        before = self.begin(x, state)
        u, z = self.up_proj(x).chunk(2, dim=-1)
        mixed, conv = base.convolve_step(self.conv, u, state=before.conv)
        q, k, v, i, f = self._project(u, mixed)
        last = before.m.detach()
        m, _ = max_plus_scan_step(i.detach(), f.detach(), state=last)
        k = k * self._scale(i - m)
        y, memory = linear_attention_step(q, k, _with_ones(v), f + (last - m), state=before.memory)
        return self._finish(self._read(y, m), mixed, z), self.State(conv=conv, memory=memory, m=m)

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; one matrix per head, divided by the normaliser."""
        before = self.begin(x, None, None)
        u, _ = self.up_proj(x).chunk(2, dim=-1)
        parts = self._project(u, base.convolve(self.conv, u, state=before.conv)[0])
        eye = base.identity_values(*parts.v.shape[:3], like=parts.v)
        empty = before.memory.new_zeros(*before.memory.shape[:3], eye.shape[-1] + 1)
        matrix, _, _ = self._cell(parts._replace(v=eye), empty, before.m, None)
        return base.Mixing(matrix.transpose(1, 2), parts.v, self._cell(parts, before.memory, before.m, None)[0])


def _with_ones(v: Tensor) -> Tensor:
    """One more value, 1, whose memory is the normaliser n."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
