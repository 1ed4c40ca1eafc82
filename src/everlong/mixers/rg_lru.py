"""Griffin's recurrent block (arXiv 2402.19427, sec. 2.3-2.4).   h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)

Paper letters: r_t = sigmoid(W_a x_t + b_a), i_t = sigmoid(W_x x_t + b_x) with block-diagonal weights, and
log a_t = -c r_t softplus(Lambda), c = 8. The block is  gelu(linear_y u) * RG-LRU(conv(linear_x u)),  projected.
At the first token of a text a is 0 and its input is not scaled, as published models were trained (google-deepmind/
recurrentgemma); the state therefore knows which rows have begun.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.common import segsum
from ..ops.diagonal_scan import diagonal_scan, diagonal_scan_step
from ..ops.gate import gate
from ..ops.linear import Linear
from ..ops.rg_lru_gates import rg_lru_gates
from ..ops.short_conv import short_conv, short_conv_step
from ..shapes import state_dtype
from ..state import state
from . import base

DECAY_SCALE = 8.0  # the paper's c


class RGLRU(base.Mixer):
    """Griffin's recurrent block: a gated linear recurrence per channel behind a short convolution."""

    equation = "h = a h + √(1 − a²) (i x)"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``width`` of the recurrence, None for that of the model; ``n_heads`` blocks of the gates must divide it."""

        width: int | None = None
        n_heads: int = 4
        conv_width: int = 4

    @state
    class State:
        """What a recurrent block keeps."""

        conv: Tensor  # [B W-1 C]
        memory: Tensor  # [B C] fp32
        begun: Tensor  # [B] bool, False before the first token

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        self.width = cfg.width or d_model
        block = base.split_heads(self.width, cfg.n_heads)
        self.linear_x, self.linear_y = Linear(d_model, self.width), Linear(d_model, self.width)
        self.linear_out = Linear(self.width, d_model)
        self.conv_weight = nn.Parameter(torch.empty(self.width, cfg.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(self.width))
        self.input_gate_weight = nn.Parameter(torch.empty(cfg.n_heads, block, block))
        self.input_gate_bias = nn.Parameter(torch.empty(cfg.n_heads, block))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(cfg.n_heads, block, block))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(cfg.n_heads, block))
        self.recurrent_param = nn.Parameter(torch.empty(self.width))
        self._initialise()

    no_decay = ("input_gate_bias", "recurrent_gate_bias")
    full_precision = ("recurrent_param",)

    @torch.no_grad()
    def _initialise(self) -> None:
        """As in the official code: exp(-softplus(recurrent_param)) is between 0.9 and 0.999, uniform in its square."""
        for linear, variance in ((self.linear_x, 1.0), (self.linear_y, 1.0), (self.linear_out, 2 / self.depth.total)):
            nn.init.normal_(linear.weight, std=math.sqrt(variance / linear.in_features))
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.conv_weight, std=math.sqrt(0.01 / self.cfg.conv_width))
        for weight in (self.input_gate_weight, self.recurrent_gate_weight):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for bias in (self.conv_bias, self.input_gate_bias, self.recurrent_gate_bias):
            nn.init.zeros_(bias)
        square = torch.empty_like(self.recurrent_param).uniform_(0.9**2, 0.999**2)
        self.recurrent_param.copy_(torch.log(torch.expm1(-0.5 * torch.log(square))))

    def init_state(self, batch: int) -> State:
        """Zeros, and no row has begun."""
        return self.State(
            conv=torch.zeros(batch, self.cfg.conv_width - 1, self.width, **self.factory),
            memory=torch.zeros(batch, self.width, **self.memory_factory),
            begun=torch.zeros(batch, dtype=torch.bool, device=self.recurrent_param.device),
        )

    def _drive(self, x: Tensor, first: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Log decays g and scaled ``values``, [... C], with the gates that x [... C] makes; ``first`` marks tokens."""
        heads = x.unflatten(-1, self.input_gate_bias.shape)
        weights = self.recurrent_gate_weight, self.input_gate_weight
        r, i = (torch.einsum("...hi,hio->...ho", heads, weight) for weight in weights)
        decay = -DECAY_SCALE * F.softplus(self.recurrent_param.to(state_dtype(x)))
        r_bias, i_bias = self.recurrent_gate_bias, self.input_gate_bias
        return rg_lru_gates(values, r, i, r_bias=r_bias, i_bias=i_bias, decay=decay, first=first)

    def _finish(self, h: Tensor, u: Tensor) -> Tensor:
        return self.linear_out(gate(h, self.linear_y(u), activation="gelu_tanh"))

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        old = self.begin(x, state, starts)
        values, conv = short_conv(
            self.linear_x(x), weight=self.conv_weight, bias=self.conv_bias, state=old.conv, starts=starts
        )
        g, driven = self._drive(values, _first(x, old.begun, starts), values)
        h, memory = diagonal_scan(driven, g, state=old.memory, starts=starts)
        return self._finish(h, x), self.State(conv=conv, memory=memory, begun=torch.ones_like(old.begun))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        old = self.begin(x, state)
        values, conv = short_conv_step(self.linear_x(x), weight=self.conv_weight, bias=self.conv_bias, state=old.conv)
        g, driven = self._drive(values, ~old.begun, values)
        h, memory = diagonal_scan_step(driven, g, state=old.memory)
        return self._finish(h, x), self.State(conv=conv, memory=memory, begun=torch.ones_like(old.begun))

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; one matrix per channel, the values are what the convolution gives."""
        empty = self.init_state(len(x))
        values, _ = short_conv(self.linear_x(x), weight=self.conv_weight, bias=self.conv_bias, state=empty.conv)
        g, scale = self._drive(values, _first(x, empty.begun, None), torch.ones_like(values))
        matrix = segsum(g.movedim(1, -1)).exp() * scale.movedim(1, -1)[:, :, None]
        h, _ = diagonal_scan(scale * values, g, state=empty.memory)
        return base.Mixing(matrix, values[..., None], h[..., None])

    @classmethod
    def examples(cls) -> dict[str, Any]:
        """The default, and a wider recurrence."""
        return {"default": cls.Config(), "wide": cls.Config(width=96, n_heads=2, conv_width=3)}


def _first(x: Tensor, begun: Tensor, starts: Tensor | None) -> Tensor:
    """Which tokens are the first of a text, bool [B T]."""
    first = F.pad(~begun[:, None], (0, x.shape[1] - 1))
    return first if starts is None else first | starts
