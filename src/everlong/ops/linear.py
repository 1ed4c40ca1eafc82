"""The linear map  y = x W^T + b,  on the fastest product that PyTorch carries.

PyTorch hands fp32 products on a CPU to MKL, which on many processors leaves the AVX-512 units idle; oneDNN, which it
carries too, uses them (LOG.md: 2.2 times the speed). So fp32 products on a CPU with AVX-512 go to oneDNN, forward and
backward, and everything else to ``torch.nn.functional.linear``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .record import leaf

ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


@leaf
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + b``: x [... I], weight [O I], bias [O] -> y [... O]. Obeys autocast as PyTorch's own does."""
    if not _for_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _for_onednn(*tensors: Tensor | None) -> bool:
    if not ONEDNN or torch.is_autocast_enabled("cpu"):
        return False
    given = [t for t in tensors if t is not None]
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given) and given[0].numel() > 0


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _onednn(x, _dense(weight), bias)


def _dense(weight: Tensor) -> Tensor:
    """oneDNN takes a matrix or its transpose; from a matrix with gaps it computes a thousand times slower."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The same with its gradients:  dx = dy W,  dW = dy^T x,  db = the sum of dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = linear(dy, weight.t()) if needs_x else None
        dw = linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None
        return dx, dw, rows.sum(0) if ctx.biased and needs_bias else None


class Linear(nn.Linear):
    """``torch.nn.Linear``, computed by ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """x [... I] -> y [... O]."""
        return linear(x, self.weight, self.bias)
