"""Gated product:  y = x * act(z)   number by number, as mixers and feed-forward blocks end.

``activation``: silu ``z sigmoid(z)``, sigmoid, gelu ``z Phi(z)``, gelu_tanh (its form by tanh), relu2 ``max(z, 0)^2``.
x and z may be halves of one projection: the kernel reads them where they lie. Its backward pass keeps nothing but
x and z, where PyTorch's two calls keep ``act(z)`` too. Sources: arXiv 2002.05202 (gates), 1606.08415 (gelu).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import suggest
from ..shapes import state_dtype
from . import dispatch
from .cases import Case
from .native.pointwise import gate_native, refuse_gate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu2": lambda z: F.relu(z).square(),
}
EQUATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda z: z * torch.sigmoid(z),
    "sigmoid": torch.sigmoid,
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "relu2": lambda z: z.clamp(min=0) ** 2,
}


def check_activation(name: str) -> None:
    """``ValueError`` for a name that is none of ``ACTIVATIONS``."""
    if name not in ACTIVATIONS:
        raise ValueError(f"no activation {name!r}{suggest(name, ACTIVATIONS)}")


def gate_reference(x: Tensor, z: Tensor, *, activation: str) -> Tensor:
    """The equations, in fp32 or fp64."""
    wide = state_dtype(z)
    return (x.to(wide) * EQUATIONS[activation](z.to(wide))).to(z.dtype)


def gate_torch(x: Tensor, z: Tensor, *, activation: str) -> Tensor:
    """PyTorch's activation, and a product."""
    return x.to(z.dtype) * ACTIVATIONS[activation](z)


def operations(inputs: dict[str, Any]) -> float:
    """Four for the activation, and a product."""
    return float(5 * inputs["x"].numel())


TABLE = dispatch.Table(
    "gate",
    dispatch.Impl("native", gate_native, refuse_gate, dispatch.avoid_few),
    dispatch.Impl("torch", gate_torch),
    dispatch.Impl("reference", gate_reference),
)


@dispatch.op(TABLE, operations=operations)
def gate(x: Tensor, z: Tensor, *, activation: str = "silu", backend: str | None = None) -> Tensor:
    """``x * act(z)`` in the dtype of z; x and z [...] of one shape.

    ``ValueError`` for shapes that differ and unknown activations.
    """
    if x.shape != z.shape:
        raise ValueError(f"x has shape {list(x.shape)} and z {list(z.shape)}, expected the same")
    check_activation(activation)
    if dispatch.few(z, backend):
        return gate_torch(x, z, activation=activation)
    return dispatch.run(TABLE, dict(x=x, z=z, activation=activation), backend)


def inputs(case: Case) -> dict[str, object]:
    """Random inputs for tests and benchmarks; ``case.variant`` is an activation."""
    shape = (case.batch, case.time, case.heads * case.keys)
    return dict(x=case.randn(*shape), z=3 * case.randn(*shape), activation=case.variant)


VARIANTS = tuple(ACTIVATIONS)
"""``case.variant`` of ``inputs``."""
