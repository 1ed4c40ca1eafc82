"""Hyena (arXiv 2302.10866).   v <- h_i * (x_i v) + b_i x_i v  for i = N-1 ... 1,   y = W (x_0 v)

Order N: N gates x_0 ... x_N-1 and v are projections of the input through a short convolution; h_i are long filters
made by a small network from the lag, times a window that fades. Paper letters: D the width of v.
The filter is a function of the lag: texts longer than ``max_length`` continue it (and its window keeps fading).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import shapes
from ..arguments import COUNT
from ..ops.linear import Linear
from ..ops.long_conv import History, history_step, long_conv, newest
from ..state import state
from . import base

SHORT = 3  # width of the short convolution
Convolve = Callable[[int, Tensor, History], tuple[Tensor, History]]


class Filter(nn.Module):
    """The implicit filter:  h(t) = (exp(-d_c t / (L-1)) + shift) MLP([t / (L-1), cos f w_t, -sin f w_t]).

    w_t = 2 pi t / L with L = ``max_length``, f are ``(emb_dim - 1) / 2`` bands; each layer but the last is followed by
    ``sin(frequency z)``.
    """

    def __init__(self, cfg: Any, channels: int) -> None:
        super().__init__()
        self.cfg, self.channels = cfg, channels
        width = cfg.filter_width
        self.frequency = nn.Parameter(torch.full((width,), cfg.frequency))  # one sine for all layers, as published
        inner = [Linear(width, width) for _ in range(cfg.filter_layers)]
        self.layers = nn.ModuleList([Linear(cfg.emb_dim, width), *inner])
        self.out = Linear(width, channels, bias=False)

    def forward(self, lags: int) -> Tensor:
        """The values at lags 0 to ``lags - 1``, in fp32 (fp64 for fp64 parameters): [C lags]."""
        device, wide = self.frequency.device, shapes.state_dtype(self.frequency)
        with torch.autocast(device.type, enabled=False):
            lag = torch.arange(lags, device=device, dtype=torch.float64)[:, None]
            z = self._positions(lag).to(wide)
            for layer in self.layers:
                z = torch.sin(self.frequency.to(wide) * base.precise(layer, z))
            return (base.precise(self.out, z) * self._window(lag).to(wide)).t()

    def _positions(self, lag: Tensor) -> Tensor:
        """[L 1] -> [L emb_dim]: the lag as a fraction of the longest, and waves of it."""
        bands = (self.cfg.emb_dim - 1) // 2
        waves = torch.linspace(1e-4, bands - 1, bands, dtype=lag.dtype, device=lag.device)
        angle = waves * (2 * math.pi / self.cfg.max_length) * lag
        return torch.cat([lag / (self.cfg.max_length - 1), angle.cos(), -angle.sin()], dim=1)

    def _window(self, lag: Tensor) -> Tensor:
        """[L 1] -> [L C]: slow channels fade to 1 % in 1.5 times ``max_length``, fast ones in 0.3 times."""
        slow, fast = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
        decay = torch.linspace(slow, fast, self.channels, dtype=lag.dtype, device=lag.device)
        return torch.exp(decay * lag / (self.cfg.max_length - 1)) + self.cfg.shift


class Hyena(base.Mixer):
    """The Hyena operator; keeps the history of each of its N-1 long convolutions."""

    memory = "linear"
    equation = "v ← h * (x₁ v) + b x₁ v,  y = x₀ v"
    no_decay = ("bias", "filter")
    full_precision = ("filter",)

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``max_length`` is the length that the filter's positions and windows are scaled to.

        ``frequency`` is the initial one of the sines, ``emb_dim`` (odd) the features of a lag, as in the published
        language model; ``filter_layers`` counts the inner layers of the filter network.
        """

        order: int = 2
        max_length: int = 2048
        filter_width: int = 64
        filter_layers: int = 2
        emb_dim: int = 33
        frequency: float = 14.0
        shift: float = 0.0

        bounds: ClassVar = {
            "order": (2, 64),
            "max_length": (2, COUNT[1]),
            "filter_layers": (0, COUNT[1]),
            "emb_dim": (3, COUNT[1]),
            "shift": (-1e6, 1e6),
        }

    @state
    class State:
        """What a Hyena layer keeps."""

        conv: Tensor  # [B 2 (N+1)D]
        histories: tuple[History, ...]  # N-1 of [B S D], in the order of use

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        _refuse(cfg)
        self.streams, self.filters = cfg.order + 1, cfg.order - 1
        self.in_proj = Linear(d_model, self.streams * d_model)
        self.conv = nn.Conv1d(self.streams * d_model, self.streams * d_model, SHORT, groups=self.streams * d_model)
        self.filter = Filter(cfg, self.filters * d_model)
        self.bias = nn.Parameter(torch.randn(self.filters, d_model))
        self.out_proj = Linear(d_model, d_model)

    def init_state(self, batch: int) -> State:
        """Nothing heard yet."""
        conv = torch.zeros(batch, SHORT - 1, self.streams * self.d_model, **self.factory)
        histories = tuple(History(torch.zeros(batch, 0, self.d_model, **self.factory)) for _ in range(self.filters))
        return self.State(conv=conv, histories=histories)

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        state = self.begin(x, state, starts)
        z, conv = base.convolve(self.conv, self.in_proj(x), state=state.conv, starts=starts, activation=None)
        gates, v = self._split(z)
        kernels = self._kernels(state.histories[0].x.shape[1] + x.shape[1])
        histories = []
        for gate, kernel, bias, old in zip(gates[:0:-1], kernels, self.bias, state.histories, strict=True):
            u = gate * v
            y, history = long_conv(u, kernel=kernel, state=old, starts=starts)
            v = y + bias * u
            histories.append(history)
        return self.out_proj(gates[0] * v), self.State(conv=conv, histories=tuple(histories))

    def _split(self, z: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The N gates and v."""
        *gates, v = z.chunk(self.streams, dim=-1)
        return tuple(gates), v

    def _kernels(self, lags: int) -> tuple[Tensor, ...]:
        """The N-1 filters, each [D lags], in the order of use."""
        return self.filter(lags).unflatten(0, (-1, self.filters)).unbind(1)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        state = self.begin(x, state)
        return self._step(x, state, lambda i, u, old: history_step(u, partial(self._kernel, i), old))

    def _kernel(self, index: int, lags: int) -> Tensor:
        """The filter ``index`` in the order of use, [D lags]."""
        return self._kernels(lags)[index]

    def _step(self, x: Tensor, state: State, convolve: Convolve) -> tuple[Tensor, State]:
        z, conv = base.convolve_step(self.conv, self.in_proj(x), state=state.conv, activation=None)
        gates, v = self._split(z)
        histories = []
        for i, (gate, old) in enumerate(zip(gates[:0:-1], state.histories, strict=True)):
            u = gate * v
            y, history = convolve(i, u, old)
            v = y + self.bias[i] * u
            histories.append(history)
        return self.out_proj(gates[0] * v), self.State(conv=conv, histories=tuple(histories))

    def workspace(self, state: State) -> Desk:
        """The histories with spare room, and the filters at all their lags; made anew only to grow.

        Don't change the weights while it is in use.
        """
        return Desk(self, state)

    def step_(self, x: Tensor, work: Desk) -> Tensor:
        """``step`` in place: nothing of the past is copied, and no filter evaluated, but when the room is full."""
        self.begin(x, work.held)
        y, work.held = self._step(x, work.held, work.convolve(work.held.histories[0].x.shape[1]))
        return y

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; one matrix per channel, between v and the last gated output."""
        empty = self.init_state(len(x)).conv
        z, _ = base.convolve(self.conv, self.in_proj(x), state=empty, activation=None)
        gates, v = self._split(z)
        batch, time, width = x.shape
        eye = base.identity_values(batch, time, width, like=v).permute(3, 0, 1, 2)  # [T B T D], one unit each
        units = [gate.expand(time, -1, -1, -1).flatten(0, 1) for gate in gates]
        matrix = self._mix(tuple(units), eye.flatten(0, 1)).unflatten(0, (time, batch))
        return base.Mixing(matrix.permute(1, 3, 2, 0), v[..., None], self._mix(gates, v)[..., None])

    def _mix(self, gates: tuple[Tensor, ...], v: Tensor) -> Tensor:
        """The recurrence over gates from an empty history: [B T D] each."""
        for gate, kernel, bias in zip(gates[:0:-1], self._kernels(v.shape[1]), self.bias, strict=True):
            u = gate * v
            v = long_conv(u, kernel=kernel)[0] + bias * u
        return gates[0] * v

    @classmethod
    def examples(cls) -> dict[str, Any]:
        """Order 2, and order 3 on texts longer than ``max_length``."""
        return {
            "default": cls.Config(),
            "order 3": cls.Config(order=3, max_length=40, emb_dim=5, frequency=10.0, shift=0.05),
        }


class Desk(base.Workspace):
    """Histories with spare room, and the filters at all their lags; ``held`` are views of what is filled."""

    def __init__(self, hyena: Hyena, state: Hyena.State) -> None:
        super().__init__(state)
        self.hyena, self.room = hyena, 0

    def convolve(self, length: int) -> Convolve:
        """The long convolutions of the token behind ``length`` others."""
        if self.room <= length:
            self._grow(max((length + 1) * 3 // 2, 64))

        def newest_of(index: int, u: Tensor, old: History) -> tuple[Tensor, History]:
            past = self.pasts[index]
            past[:, length] = u.to(past.dtype)
            past = past[:, : length + 1]
            return newest(past, self.weights[index][self.room - length - 1 :]).to(u.dtype), History(past)

        return newest_of

    def _grow(self, room: int) -> None:
        self.room, histories = room, self.held.histories
        self.pasts = [F.pad(old.x, [0, 0, 0, room - old.x.shape[1]]) for old in histories]  # [B room D]
        self.weights = [kernel.flip(1).t().contiguous() for kernel in self.hyena._kernels(room)]  # [room D], lag 0 last


def _refuse(cfg: Hyena.Config) -> None:
    """``ValueError`` for sizes that make no filter."""
    if cfg.emb_dim % 2 == 0:
        raise ValueError(f"emb_dim is {cfg.emb_dim}, expected an odd number: the lag, and pairs of waves")
