"""RMS norm with a gate:  u = x silu(z), y = w u / rms(u)   or, norm first,   y = (w x / rms(x)) silu(z).

``rms(u) = sqrt(mean(u^2) + eps)`` over the last axis. The gate comes first in Mamba-2 (groups of channels are the last
axis), the norm in GLA, RetNet and Gated DeltaNet (heads are). w has the shape of the last axis or of the last two.
Sources: arXiv 2405.21060 (Mamba-2), 2312.06635 (GLA).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..config import suggest
from ..shapes import state_dtype
from . import dispatch
from .cases import Case
from .native.pointwise import gated_norm_native, refuse
from .norm import check_weights, norm_reference, norm_torch, output_dtype

FIRST = ("gate", "norm")


def gated_norm_reference(x: Tensor, z: Tensor, *, weight: Tensor | None, eps: float, first: str) -> Tensor:
    """The equations, in fp32 or fp64."""
    out, wide = output_dtype(x, weight), state_dtype(x)
    x, gate = x.to(wide), F.silu(z.to(wide))
    weight = None if weight is None else weight.to(wide)
    if first == "gate":
        return norm_reference(x * gate, weight=weight, bias=None, eps=eps, style="rms").to(out)
    return (norm_reference(x, weight=weight, bias=None, eps=eps, style="rms") * gate).to(out)


def gated_norm_torch(x: Tensor, z: Tensor, *, weight: Tensor | None, eps: float, first: str) -> Tensor:
    """PyTorch's norm and SiLU; in fp32 or fp64 where the gate is a part of what is normalised."""
    if first == "gate":
        wide, out = state_dtype(x), output_dtype(x, weight)
        gated = x.to(wide) * F.silu(z.to(wide))
        return norm_torch(gated, weight=weight, bias=None, eps=eps, style="rms").to(out)
    y = norm_torch(x, weight=weight, bias=None, eps=eps, style="rms")
    return y * F.silu(z).to(y.dtype)


def operations(inputs: dict[str, Any]) -> float:
    """A gate and a norm."""
    return float(inputs["x"].numel() * (8 + (inputs.get("weight") is not None)))


TABLE = dispatch.Table(
    "gated_norm",
    dispatch.Impl("native", gated_norm_native, refuse, dispatch.avoid_few),
    dispatch.Impl("torch", gated_norm_torch),
    dispatch.Impl("reference", gated_norm_reference),
)


@dispatch.op(TABLE, operations=operations)
def gated_norm(
    x: Tensor,
    z: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    first: str = "gate",
    backend: str | None = None,
) -> Tensor:
    """RMS norm over the last axis, with a gate before or behind it (see the module for the equations).

    x, z [... D], weight [D] or, for x [... H D], [H D]; ``first`` "gate" or "norm". Returns y like x, in the dtype of
    weight (of x without one). ``ValueError`` for shapes that do not fit and unknown orders.
    """
    if x.shape != z.shape:
        raise ValueError(f"x has shape {list(x.shape)} and z {list(z.shape)}, expected the same")
    check_weights(x, weight)
    if first not in FIRST:
        raise ValueError(f"no order that begins with {first!r}{suggest(first, FIRST)}")
    if dispatch.few(x, backend):
        return gated_norm_torch(x, z, weight=weight, eps=eps, first=first)
    return dispatch.run(TABLE, dict(x=x, z=z, weight=weight, eps=eps, first=first), backend)


def inputs(case: Case) -> dict[str, object]:
    """Random inputs for tests and benchmarks; ``case.variant`` is one of VARIANTS."""
    variant = case.variant or "gate"
    x, z = (2 * case.randn(case.batch, case.time, case.heads, case.keys) for _ in range(2))
    weight = None if "plain" in variant else case.randn(*x.shape[-2 if "heads" in variant else -1 :])
    return dict(x=x, z=z, weight=weight, eps=1e-5, first="norm" if "norm" in variant else "gate")


VARIANTS = ("gate", "gate, plain", "gate, heads", "norm", "norm, plain", "norm, heads")
"""``case.variant`` of ``inputs``."""
