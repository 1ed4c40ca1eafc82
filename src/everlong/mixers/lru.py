"""Linear recurrent unit (LRU, arXiv 2303.06349).   h_t = lambda h_{t-1} + gamma (B u_t),   y_t = Re(C h_t) + D u_t

Paper letters: lambda = exp(-exp(nu) + i exp(theta)), one complex number per state, and gamma = exp(gamma_log), which
starts at sqrt(1 - |lambda|^2). As in the paper's block the output goes through GELU and a GLU; the norm and the
residual belong to the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import SHARE
from ..ops.common import as_complex
from ..ops.diagonal_scan import diagonal_scan, diagonal_scan_step
from ..ops.linear import Linear, linear
from ..shapes import state_dtype
from ..state import state
from . import base


class LRU(base.Mixer):
    """Linear recurrent unit: complex states with constant decays, mixed densely on the way in and out."""

    equation = "h = λ h + γ B u"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``d_state`` complex states, None for as many as the model is wide; |lambda| in [r_min, r_max] at first."""

        d_state: int | None = None
        r_min: float = 0.0
        r_max: float = 1.0
        max_phase: float = 2 * math.pi

        bounds: ClassVar = {"r_min": SHARE, "r_max": SHARE}

    @state
    class State:
        """What an LRU layer keeps."""

        memory: Tensor  # [B N 2] fp32, real and imaginary parts

    no_decay = ("nu_log", "theta_log", "gamma_log")
    full_precision = ("nu_log", "theta_log", "gamma_log")

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        if not 0 <= cfg.r_min <= cfg.r_max <= 1:
            raise ValueError(f"got r_min = {cfg.r_min:g}, r_max = {cfg.r_max:g}, expected 0 <= r_min <= r_max <= 1")
        self.d_state = cfg.d_state or d_model
        self.nu_log = nn.Parameter(torch.empty(self.d_state))
        self.theta_log = nn.Parameter(torch.empty(self.d_state))
        self.gamma_log = nn.Parameter(torch.empty(self.d_state))
        self.B = nn.Parameter(torch.empty(self.d_state, 2, d_model))  # real and imaginary parts
        self.C = nn.Parameter(torch.empty(d_model, self.d_state, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.out_proj = Linear(d_model, 2 * d_model)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """lambda uniform in area on a ring of the unit disc; B, C, D normal."""
        cfg, tiny = self.cfg, 1e-6  # keeps both logarithms finite
        square = torch.rand(self.d_state) * (cfg.r_max**2 - cfg.r_min**2) + cfg.r_min**2
        self.nu_log.copy_(torch.log(-0.5 * torch.log(square.clamp(tiny, 1 - tiny))))
        self.theta_log.copy_(torch.log(cfg.max_phase * torch.rand(self.d_state).clamp(min=tiny)))
        self.gamma_log.copy_(0.5 * torch.log(-torch.expm1(-2 * self.nu_log.exp())))
        nn.init.normal_(self.B, std=(2 * self.d_model) ** -0.5)
        nn.init.normal_(self.C, std=self.d_state**-0.5)
        nn.init.normal_(self.D)

    def init_state(self, batch: int) -> State:
        """Zeros."""
        return self.State(memory=torch.zeros(batch, self.d_state, 2, **self.memory_factory))

    def _read_in(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """gamma B u [... N] complex, and log lambda [N], both computed in fp32 or fp64."""
        wide = state_dtype(u)
        nu, theta, gamma, B = (p.to(wide) for p in (self.nu_log, self.theta_log, self.gamma_log, self.B))
        inputs = linear(u.to(wide), (gamma.exp()[:, None, None] * B).flatten(0, 1))
        return torch.view_as_complex(inputs.to(wide).unflatten(-1, (-1, 2))), torch.complex(-nu.exp(), theta.exp())

    def _finish(self, h: Tensor, u: Tensor) -> Tensor:
        """Re(C h) + D u, then GELU and GLU."""
        parts = torch.view_as_real(h).flatten(-2)
        C = self.C.to(parts.dtype)
        y = linear(parts, torch.stack([C[..., 0], -C[..., 1]], dim=-1).flatten(1)) + self.D.to(parts.dtype) * u
        return F.glu(self.out_proj(F.gelu(y.to(u.dtype))), dim=-1)

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        memory = as_complex(self.begin(x, state, starts).memory)
        h, memory = diagonal_scan(*self._read_in(x), state=memory, starts=starts)
        return self._finish(h, x), self.State(memory=torch.view_as_real(memory))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        memory = as_complex(self.begin(x, state).memory)
        h, memory = diagonal_scan_step(*self._read_in(x), state=memory)
        return self._finish(h, x), self.State(memory=torch.view_as_real(memory))

    @classmethod
    def examples(cls) -> dict[str, Any]:
        """The default, and the ring near the circle that long tasks want."""
        return {"default": cls.Config(), "ring": cls.Config(d_state=40, r_min=0.9, r_max=0.999, max_phase=math.pi / 10)}
