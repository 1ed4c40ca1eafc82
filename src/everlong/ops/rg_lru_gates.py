"""What drives the RG-LRU:  g = decay R,  b = sqrt(1 - exp(2 g)) I x,  R = sigmoid(r + r_bias), I = sigmoid(i + i_bias).

``h_t = exp(g_t) h_{t-1} + b_t`` is ``ops/diagonal_scan``. At the first token of a text g is -inf and b is ``I x``, not
scaled. Gradients see a slope of the root of at most 1000: its own is infinite where nothing decays.
Source: arXiv 2402.19427 sec. 2.4 (decay = -c softplus(Lambda)); the first tokens as in google-deepmind/recurrentgemma.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shapes import state_dtype
from . import dispatch
from .cases import Case
from .native.rg_lru_gates import refuse, rg_lru_gates_native

STEEPEST = 1000.0  # largest slope of the square root that gradients use


def rg_lru_gates_reference(
    x: Tensor, r: Tensor, i: Tensor, *, r_bias: Tensor, i_bias: Tensor, decay: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """The equations as the paper writes them, with a itself, in fp64: there ``1 - a^2`` keeps digits enough."""
    out = state_dtype(x)
    x, r, i, r_bias, i_bias, decay = (part.double() for part in (x, r, i, r_bias, i_bias, decay))
    R, I = (1 / (1 + torch.exp(-(gate + bias).reshape(x.shape))) for gate, bias in ((r, r_bias), (i, i_bias)))  # noqa: E741
    start = first[..., None].expand(x.shape)
    a = torch.where(start, torch.zeros_like(x), torch.exp(decay * R))
    square = 1 - a * a
    flat = square < 1 / (2 * STEEPEST) ** 2  # where the root is steeper than gradients may see
    line = square.detach().sqrt() + STEEPEST * (square - square.detach())
    b = torch.where(flat, line, torch.where(flat, 1.0, square).sqrt()) * I * x
    g = torch.where(start, -torch.inf, decay * R)
    return g.to(out), b.to(out)


def rg_lru_gates_torch(
    x: Tensor, r: Tensor, i: Tensor, *, r_bias: Tensor, i_bias: Tensor, decay: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """The equations, in fp32 or fp64."""
    wide = state_dtype(x)
    r, i = (torch.sigmoid((gate + bias).flatten(-2).to(wide)) for gate, bias in ((r, r_bias), (i, i_bias)))
    g = r * decay.to(wide)
    g = g.masked_fill(first[..., None], float("-inf"))  # so that a = 0 and the input keeps its size
    return g, input_scale(g) * i * x


def input_scale(g: Tensor) -> Tensor:
    """sqrt(1 - a^2) from g = log a; gradients see a slope of at most 1000, and second ones that of the slope."""
    square = -torch.expm1(2 * g)
    gentle = square >= 0.25 / STEEPEST**2
    root = torch.where(gentle, square, 1.0).sqrt()
    still = square.detach()
    return torch.where(gentle, root, still.sqrt() + STEEPEST * (square - still))


def operations(inputs: dict[str, Any]) -> float:
    """Two sigmoids, an exponential, a root and what joins them."""
    return float(15 * inputs["x"].numel())


TABLE = dispatch.Table(
    "rg_lru_gates",
    dispatch.Impl("native", rg_lru_gates_native, refuse, dispatch.avoid_few),
    dispatch.Impl("torch", rg_lru_gates_torch),
    dispatch.Impl("reference", rg_lru_gates_reference),
)


@dispatch.op(TABLE, operations=operations)
def rg_lru_gates(
    x: Tensor,
    r: Tensor,
    i: Tensor,
    *,
    r_bias: Tensor,
    i_bias: Tensor,
    decay: Tensor,
    first: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log decays g and inputs b of the recurrence (see the module for the equations).

    x [... C], r and i [... H n] before bias and sigmoid, r_bias and i_bias [H n], decay [C] ``<= 0`` with C = H n,
    first bool [...]. Returns g and b [... C] in fp32 (fp64 for fp64). ``ValueError`` for sizes that do not fit.
    """
    heads, lead = r_bias.shape, x.shape[:-1]
    found = [tuple(part.shape) for part in (r, i, i_bias, decay, first)]
    if x.shape[-1] != heads.numel() or found != [(*lead, *heads), (*lead, *heads), (*heads,), x.shape[-1:], (*lead,)]:
        raise ValueError(
            f"x has shape {list(x.shape)} and r_bias {list(heads)}, but r, i, i_bias, decay and first have "
            f"{', '.join(str(list(shape)) for shape in found)}; see the documentation of rg_lru_gates"
        )
    fixed = dict(r_bias=r_bias, i_bias=i_bias, decay=decay, first=first)
    if dispatch.few(x, backend):
        return rg_lru_gates_torch(x, r, i, **fixed)
    return dispatch.run(TABLE, dict(x=x, r=r, i=i, **fixed), backend)


def inputs(case: Case) -> dict[str, Tensor]:
    """Random inputs for tests and benchmarks; a tenth of the tokens are first ones."""
    lead, heads = (case.batch, case.time), (case.heads, case.keys)
    return dict(
        x=case.randn(*lead, case.heads * case.keys),
        r=2 * case.randn(*lead, *heads),
        i=2 * case.randn(*lead, *heads),
        r_bias=case.randn(*heads),
        i_bias=case.randn(*heads),
        decay=case.log_decay(case.heads * case.keys),
        first=torch.rand(*lead, dtype=torch.float32) < 0.1,
    )
