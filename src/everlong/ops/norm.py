"""Norms over the last axis:  rms  y = w x / sqrt(mean(x^2) + eps) + b,   layer  y = w (x - mean) / sqrt(var + eps) + b.

w and b have the shape of the last axis, or of the last two: x ``[... H V]`` with w ``[H V]`` has its heads normalised
one by one, and weights of their own for each. Sums in fp32 (fp64 for fp64). Sources: arXiv 1910.07467 eq. 4 (rms),
1607.06450 eq. 4 (layer).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import suggest
from ..shapes import state_dtype
from . import dispatch
from .cases import Case
from .native.pointwise import norm_native, refuse

STYLES = ("rms", "layer")


def norm_reference(x: Tensor, *, weight: Tensor | None, bias: Tensor | None, eps: float, style: str) -> Tensor:
    """The equations, in fp32 or fp64."""
    out, x = output_dtype(x, weight), x.to(state_dtype(x))
    if style == "layer":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.to(y.dtype)
    return (y if bias is None else y + bias.to(y.dtype)).to(out)


def norm_torch(x: Tensor, *, weight: Tensor | None, bias: Tensor | None, eps: float, style: str) -> Tensor:
    """PyTorch's norms in the dtype of x; a weight for several heads is multiplied afterwards."""
    shape, out = x.shape[-1:], output_dtype(x, weight)
    weight, bias = None if weight is None else weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    fits = weight is not None and weight.dim() == 1
    if style == "rms":
        y = F.rms_norm(x, shape, weight if fits else None, eps)
    else:
        y = F.layer_norm(x, shape, weight if fits else None, bias if fits else None, eps)
        bias = None if fits else bias
    y = y if fits or weight is None else y * weight
    return (y if bias is None else y + bias).to(out)


def output_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype of y: that of the weights, or of x where there are none."""
    return x.dtype if weight is None else weight.dtype


def operations(inputs: dict[str, Any]) -> float:
    """A square, its sum and a product for each number; a mean, a weight and a bias where there are any."""
    weights = (inputs.get("weight") is not None) + (inputs.get("bias") is not None)
    return float(inputs["x"].numel() * (3 + (inputs.get("style") == "layer") + weights))


TABLE = dispatch.Table(
    "norm",
    dispatch.Impl("native", norm_native, refuse, dispatch.avoid_few),
    dispatch.Impl("torch", norm_torch),
    dispatch.Impl("reference", norm_reference),
)


@dispatch.op(TABLE, operations=operations)
def norm(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    style: str = "rms",
    backend: str | None = None,
) -> Tensor:
    """RMS or layer norm over the last axis (see the module for the equations).

    x [... D], weight and bias [D] or, for x [... H D], [H D]; ``style`` "rms" or "layer". Returns y like x, in the
    dtype of weight (of x without one). ``ValueError`` for shapes that do not fit and unknown styles.
    """
    check_weights(x, weight, bias)
    if style not in STYLES:
        raise ValueError(f"no norm {style!r}{suggest(style, STYLES)}")
    if dispatch.few(x, backend):
        return norm_torch(x, weight=weight, bias=bias, eps=eps, style=style)
    return dispatch.run(TABLE, dict(x=x, weight=weight, bias=bias, eps=eps, style=style), backend)


def check_weights(x: Tensor, *weights: Tensor | None) -> None:
    """``ValueError`` unless weight and bias have the shape of the last axis of x, or of the last two."""
    for index, part in enumerate(weights):
        if part is not None and (not 1 <= part.dim() <= 2 or part.shape != x.shape[-part.dim() :]):
            raise ValueError(
                f"{('weight', 'bias')[index]} has shape {list(part.shape)}, expected {list(x.shape[-1:])} or "
                f"{list(x.shape[-2:])} for x of shape {list(x.shape)}"
            )


def inputs(case: Case) -> dict[str, object]:
    """Random inputs for tests and benchmarks; ``case.variant`` is one of VARIANTS."""
    variant = case.variant or "rms"
    x = 1 + 2 * case.randn(case.batch, case.time, case.heads, case.keys)
    shape = x.shape[-2:] if "heads" in variant else x.shape[-1:]
    return dict(
        x=x,
        weight=None if "plain" in variant else case.randn(*shape),
        bias=case.randn(*shape) if "bias" in variant else None,
        eps=1e-5,
        style="layer" if "layer" in variant else "rms",
    )


VARIANTS = (
    "rms",
    "rms, plain",
    "rms, heads",
    "layer, bias",
    "layer, plain",
    "layer, heads, bias",
    "layer, plain, bias",
)
"""``case.variant`` of ``inputs``."""
