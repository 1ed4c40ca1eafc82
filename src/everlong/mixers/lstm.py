"""LSTM (Hochreiter and Schmidhuber 1997), one layer, as ``torch.nn.LSTM``.   c_t = f c_{t-1} + i g,  h_t = o tanh(c_t)

i, f, o = sigmoid and g = tanh of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh. The weights have the names (less ``_l0``),
the layout and the initial values of ``torch.nn.LSTM``, and the hidden state is as wide as the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear import linear
from ..ops.lstm_scan import lstm_scan, lstm_scan_step
from ..state import state
from . import base


class LSTM(base.Mixer):
    """The classic: gates read the output of the token before, so training runs token by token."""

    equation = "c = σ(f) c + σ(i) tanh(g), h = σ(o) tanh(c)"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """No options."""

    @state
    class State:
        """What an LSTM layer keeps."""

        cell: Tensor  # [B 2 D] fp32: h, c

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        self.weight_ih = nn.Parameter(torch.empty(4 * d_model, d_model))
        self.weight_hh = nn.Parameter(torch.empty(4 * d_model, d_model))
        self.bias_ih = nn.Parameter(torch.empty(4 * d_model))
        self.bias_hh = nn.Parameter(torch.empty(4 * d_model))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(d_model**-0.5), d_model**-0.5)

    def init_state(self, batch: int) -> State:
        """Zeros."""
        return self.State(cell=torch.zeros(batch, 2, self.d_model, **self.memory_factory))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations [... 4 D] without the recurrent part, and the recurrent weights [4 D D]."""
        pre = linear(x, self.weight_ih, self.bias_ih + self.bias_hh)
        return pre.unflatten(-1, (4, -1)), self.weight_hh.unflatten(0, (4, -1))

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        cell = self.begin(x, state, starts).cell
        pre, recurrent = self._project(x)
        y, cell = lstm_scan(pre, recurrent=recurrent, state=cell, starts=starts)
        return y, self.State(cell=cell)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        cell = self.begin(x, state).cell
        pre, recurrent = self._project(x)
        y, cell = lstm_scan_step(pre, recurrent=recurrent, state=cell)
        return y, self.State(cell=cell)
