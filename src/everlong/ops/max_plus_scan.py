"""The running maximum with decay:  m_t = max(g_t + m_{t-1}, x_t)   per channel, with log decays ``g <= 0``.

The scan of the (max, +) semiring: m is the largest logarithm of anything still remembered, the stabiliser of
exponential gates. m_0 = 0, so zeros are the empty state, and resets mean what they mean in the other ops.

Used by mLSTM (xLSTM, arXiv 2405.04517 eq. 15). The log-depth form is Hillis and Steele's scan (1986).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shapes import check_starts, dims, state_dtype
from . import dispatch
from .cases import Case
from .common import loop

SEQUENCE = ("x", "g")


def max_plus_scan_step(x: Tensor, g: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, the definition. x, g, state [B C] -> m [B C], state [B C], the same values."""
    m = torch.maximum(g.to(state.dtype) + state, x.to(state.dtype))
    return m.to(x.dtype), m


def max_plus_scan_reference(
    x: Tensor, g: Tensor, *, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop over ``max_plus_scan_step``."""
    return loop(max_plus_scan_step, {"x": x, "g": g}, state=state, starts=starts)


def max_plus_scan_chunk(x: Tensor, g: Tensor, *, state: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All tokens in log2(T) passes, each of which doubles the window that ``m`` has seen and ``reach`` has summed.

    Sums of decays grow by adding windows, never as a difference of long sums.
    """
    out_dtype, dtype = x.dtype, state.dtype
    m, reach = x.to(dtype), g.to(dtype)
    if starts is not None:
        m = torch.where(starts[..., None], torch.maximum(reach, m), m)  # the state before a document is 0
        reach = reach.masked_fill(starts[..., None], float("-inf"))
    m = torch.cat([torch.maximum(reach[:, :1] + state[:, None], m[:, :1]), m[:, 1:]], dim=1)
    span = 1
    while span < m.shape[1]:
        longer = torch.maximum(reach[:, span:] + m[:, :-span], m[:, span:])
        m = torch.cat([m[:, :span], longer], dim=1)
        reach = torch.cat([reach[:, :span], reach[:, span:] + reach[:, :-span]], dim=1)
        span *= 2
    return m.to(out_dtype), (m[:, -1] if x.shape[1] else state).clone()  # a view would keep all of m in memory


def operations(inputs: dict[str, Any]) -> float:
    """A sum and a maximum for each number."""
    return float(2 * inputs["x"].numel())


TABLE = dispatch.Table(
    "max_plus_scan",
    dispatch.Impl("torch", max_plus_scan_chunk),
    dispatch.Impl("reference", max_plus_scan_reference),
    sequence=SEQUENCE,
)


@dispatch.op(TABLE, step=max_plus_scan_step, operations=operations)
def max_plus_scan(
    x: Tensor, g: Tensor, *, state: Tensor | None = None, starts: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The running maximum with decay (see the module for the equation).

    x [B T C], g [B T C] log decays ``<= 0``, state [B C] in fp32 or fp64 (zeros before the text), starts bool [B T].
    Returns m [B T C] in the dtype of x, and the final state. ``ValueError`` for shapes or dtypes that do not fit.
    """
    batch, time, channels = dims("x B T C, g B T C", x, g)
    check_starts(starts, batch, time)
    if state is None:
        state = x.new_zeros(batch, channels, dtype=state_dtype(x))
    dims("x B T C, state B C", x, state)
    return dispatch.run(TABLE, dict(x=x, g=g, state=state, starts=starts), backend)


def inputs(case: Case) -> dict[str, Tensor | None]:
    """Random inputs for tests and benchmarks: one channel per head, inputs of all signs."""
    shape = (case.batch, case.time, case.heads)
    return dict(x=5 * case.randn(*shape), g=case.log_decay(*shape))
