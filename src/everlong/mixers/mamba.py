"""Mamba (S6, arXiv 2312.00752).   h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t^T,  y_t = h_t C_t + D x_t

Each of the ``expand * D`` channels keeps ``d_state`` numbers; the step dt and the vectors B, C depend on the
token. Parameters are named as in the official code (``in_proj``, ``conv1d``, ``x_proj``, ``dt_proj``, ``A_log``,
``D``, ``out_proj``); Jamba's norms as there (``dt_layernorm``, ``b_layernorm``, ``c_layernorm``).
Paper letters: Delta = dt, N = K = d_state, E = expand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import suggest
from ..ops.gate import gate
from ..ops.linear import Linear
from ..ops.selective_scan import selective_scan, selective_scan_step
from ..shapes import state_dtype
from ..state import state
from . import base

NORMS = ("none", "rms")


class Mamba(base.Mixer):
    """Selective state space layer of Mamba-1, Jamba and Falcon-Mamba."""

    equation = "h = exp(dt A) h + dt x Bᵀ,  A diagonal per channel"
    no_decay = ("A_log", "D", "dt_proj.bias")
    full_precision = ("dt_proj", "A_log")
    int8_at_least = ("x_proj",)

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``dt_rank`` None means ceil(D / 16). ``norms="rms"`` normalises dt, B and C with weights, as Jamba does."""

        d_state: int = 16
        d_conv: int = 4
        expand: float = 2.0
        dt_rank: int | None = None
        dt_min: float = 1e-3
        dt_max: float = 0.1
        norms: str = "none"
        norm_eps: float = 1e-6
        conv_bias: bool = True
        bias: bool = False

    @state
    class State:
        """What a Mamba layer keeps."""

        conv: Tensor  # [B W-1 C] the last inputs of the convolution
        memory: Tensor  # [B C K] fp32

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        if cfg.norms not in NORMS:
            raise ValueError(f"norms = {cfg.norms!r} is not a choice{suggest(cfg.norms, NORMS)}")
        channels = int(cfg.expand * d_model)
        self.rank = math.ceil(d_model / 16) if cfg.dt_rank is None else cfg.dt_rank
        self.in_proj = Linear(d_model, 2 * channels, bias=cfg.bias)
        self.conv1d = nn.Conv1d(channels, channels, cfg.d_conv, groups=channels, bias=cfg.conv_bias)
        self.x_proj = Linear(channels, self.rank + 2 * cfg.d_state, bias=False)
        self.dt_proj = Linear(self.rank, channels)
        self.A_log = nn.Parameter(torch.arange(1.0, cfg.d_state + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = Linear(channels, d_model, bias=cfg.bias)
        widths = (self.rank, cfg.d_state, cfg.d_state)
        norms = [base.RMSNorm(n, eps=cfg.norm_eps) if cfg.norms == "rms" else nn.Identity() for n in widths]
        self.dt_layernorm, self.b_layernorm, self.c_layernorm = norms
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """dt starts log-uniform between dt_min and dt_max; the output shrinks with the number of layers."""
        self.dt_proj.weight.uniform_(-(self.rank**-0.5), self.rank**-0.5)
        self.dt_proj.bias.copy_(base.dt_bias(len(self.D), self.cfg.dt_min, self.cfg.dt_max))
        self.out_proj.weight /= math.sqrt(self.depth.total)

    def init_state(self, batch: int) -> State:
        """Zeros: no inputs yet, no memory."""
        channels, keys = self.A_log.shape
        return self.State(
            conv=torch.zeros(batch, self.cfg.d_conv - 1, channels, **self.factory),
            memory=torch.zeros(batch, channels, keys, **self.memory_factory),
        )

    def _select(self, x: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
        """The inputs of the scan that depend on the token (dt before its bias and softplus), and those that do not."""
        low, B, C = self.x_proj(x).split([self.rank, self.cfg.d_state, self.cfg.d_state], dim=-1)
        dt, bias = base.weights_and_bias(self.dt_proj, self.dt_layernorm(low))
        tokens = {"x": x, "dt": dt, "B": self.b_layernorm(B), "C": self.c_layernorm(C)}
        return tokens, {"A": -self.A_log.to(state_dtype(x)).exp(), "D": self.D, "dt_bias": bias}

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        state = self.begin(x, state, starts)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, conv = base.convolve(self.conv1d, x, state=state.conv, starts=starts)
        tokens, fixed = self._select(x)
        y, memory = selective_scan(**tokens, **fixed, state=state.memory, starts=starts)
        return self.out_proj(gate(y, z)), self.State(conv=conv, memory=memory)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        state = self.begin(x, state)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, conv = base.convolve_step(self.conv1d, x, state=state.conv)
        tokens, fixed = self._select(x)
        y, memory = selective_scan_step(**tokens, **fixed, state=state.memory)
        return self.out_proj(gate(y, z)), self.State(conv=conv, memory=memory)

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; one matrix per channel, values of width 1 after convolution and SiLU."""
        batch, time = x.shape[:2]
        x = self.in_proj(x).chunk(2, dim=-1)[0]
        tokens, fixed = self._select(base.convolve(self.conv1d, x, state=self.init_state(batch).conv)[0])
        values, output = tokens["x"], selective_scan(**tokens, **fixed)[0]
        repeated = {name: tensor.repeat_interleave(time, dim=0) for name, tensor in tokens.items()}
        impulses = torch.eye(time, dtype=x.dtype, device=x.device).repeat(batch, 1)[..., None].expand_as(repeated["x"])
        responses, _ = selective_scan(**{**repeated, "x": impulses}, **fixed)  # row b*T + j: to an impulse at j
        matrix = responses.unflatten(0, (batch, time)).permute(0, 3, 2, 1)
        return base.Mixing(matrix, values[..., None], output[..., None])

    @classmethod
    def examples(cls) -> dict[str, Any]:
        """The paper's layer, and Jamba's."""
        return {"default": cls.Config(), "jamba": cls.Config(norms="rms", d_conv=3, d_state=8)}
