"""Diagonal state space model (S4D, arXiv 2206.11893).   h_t = exp(dt A) h_{t-1} + x_t,   y_t = 2 Re(w h_t) + D x_t

Paper letters: w = C (exp(dt A) - 1) / A is the zero-order hold with B folded into C; A = -exp(log_A_real) + i A_imag
and one step size dt per channel, N/2 complex states standing for N real ones. The layer is the paper's minimal
one: the model per channel, GELU, a linear map to twice the width, GLU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import suggest
from ..ops.common import as_complex
from ..ops.diagonal_ssm import diagonal_ssm, diagonal_ssm_step
from ..ops.linear import Linear
from ..shapes import state_dtype
from ..state import state
from . import base


class S4D(base.Mixer):
    """S4D: a time-invariant diagonal state space model in every channel."""

    equation = "h = exp(dt A) h + x,  y = 2 Re(C h) + D x"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``d_state`` is the paper's N (real numbers per channel); ``init`` one of lin, inv, legs, real."""

        d_state: int = 64
        init: str = "lin"
        dt_min: float = 0.001
        dt_max: float = 0.1

    @state
    class State:
        """What an S4D layer keeps."""

        memory: Tensor  # [B D N/2 2] fp32, real and imaginary parts

    no_decay = ("log_dt", "log_A_real", "A_imag", "D")
    full_precision = ("log_dt", "log_A_real", "A_imag")

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        half = base.split_heads(cfg.d_state, 2, "parts, real and imaginary; choose an even d_state")
        poles, size = initial_poles(cfg.init, cfg.d_state)
        low, high = math.log(cfg.dt_min), math.log(cfg.dt_max)
        self.log_dt = nn.Parameter(torch.rand(d_model) * (high - low) + low)
        self.log_A_real = nn.Parameter((-poles.real).log().to(self.log_dt.dtype).repeat(d_model, 1))
        self.A_imag = nn.Parameter(poles.imag.to(self.log_dt.dtype).repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, half, 2) * (size.to(self.log_dt.dtype)[:, None] / math.sqrt(2)))
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = Linear(d_model, 2 * d_model)

    def init_state(self, batch: int) -> State:
        """Zeros."""
        return self.State(memory=torch.zeros(batch, *self.C.shape, **self.memory_factory))

    def _system(self) -> tuple[Tensor, Tensor]:
        """Log decays g and output weights w, [D N/2] complex, computed in fp32 or fp64."""
        wide = state_dtype(self.C)
        log_dt, real, imag, C = (p.to(wide) for p in (self.log_dt, self.log_A_real, self.A_imag, self.C))
        A = torch.complex(-real.exp(), imag)
        g = log_dt.exp()[:, None] * A
        return g, 2 * torch.view_as_complex(C) * torch.expm1(g) / A

    def _finish(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y)), dim=-1)

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """x [B T D] -> y [B T D], state."""
        memory = as_complex(self.begin(x, state, starts).memory)
        y, memory = diagonal_ssm(x, *self._system(), state=memory, starts=starts)
        return self._finish(y + self.D * x), self.State(memory=torch.view_as_real(memory))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x [B D] -> y [B D], state."""
        memory = as_complex(self.begin(x, state).memory)
        y, memory = diagonal_ssm_step(x, *self._system(), state=memory)
        return self._finish(y + self.D * x), self.State(memory=torch.view_as_real(memory))

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; one matrix per channel, the same for all rows, D on its diagonal."""
        y, _ = diagonal_ssm(x, *self._system())
        unit = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[..., None].expand(-1, -1, self.d_model)
        columns = diagonal_ssm(unit, *self._system())[0] + self.D * unit  # row j of the batch is column j
        matrix = columns.permute(2, 1, 0).expand(len(x), -1, -1, -1)
        return base.Mixing(matrix, x[..., None], (y + self.D * x)[..., None])

    @classmethod
    def examples(cls) -> dict[str, Any]:
        """One per initial value."""
        return {"default": cls.Config(), **{kind: cls.Config(init=kind, d_state=16) for kind in POLES if kind != "lin"}}


def _legs(n: Tensor) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: eigenvalues of the normal part of its matrix, and the size of its B in their basis, at most 2."""
    order = torch.arange(2 * len(n), dtype=torch.float64)
    root = (2 * order + 1).sqrt()
    skew = -0.5 * (root[:, None] * root).tril(-1)
    frequencies, basis = torch.linalg.eigh(-1j * (skew - skew.T))  # half are negative: the conjugates
    size = (basis.mH @ root.to(basis)).abs()[len(n) :].clamp(max=2.0)  # C has random phases, so only the size matters
    return torch.complex(torch.full_like(n, -0.5), frequencies[len(n) :]), size


def _inv(n: Tensor) -> tuple[Tensor, Tensor]:
    size = 2 * len(n)
    return torch.complex(torch.full_like(n, -0.5), size / math.pi * (size / (2 * n + 1) - 1)), torch.ones_like(n)


POLES = {
    "lin": lambda n: (torch.complex(torch.full_like(n, -0.5), math.pi * n), torch.ones_like(n)),
    "inv": _inv,
    "legs": _legs,
    "real": lambda n: (torch.complex(-(n + 1), torch.zeros_like(n)), torch.ones_like(n)),
}


def initial_poles(kind: str, d_state: int) -> tuple[Tensor, Tensor]:
    """The diagonal of A [N/2] complex, fp64, and the size of B [N/2], for one of the paper's four initial values."""
    if kind not in POLES:
        raise ValueError(f"no initial value {kind!r} for S4D{suggest(kind, POLES)}")
    return POLES[kind](torch.arange(d_state // 2, dtype=torch.float64))
