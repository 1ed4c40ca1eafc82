"""Rotary positions in a program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .guards import Unsupported

if TYPE_CHECKING:
    from .lowering import Lowering


def lower_cos_sin(
    to: Lowering, out: tuple[Tensor, Tensor], positions: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> None:
    """The instruction of ``cos_sin``, in fp64."""
    cos, sin = out
    raw = frequencies.detach().double().contiguous()
    if to.known(frequencies) or not (cos.is_contiguous() and sin.is_contiguous()):
        raise Unsupported("angles of frequencies that depend on the token")
    to.add("turn", (positions.numel(), raw.numel()), to.new(cos), to.counts(positions), to.new(sin), raw=[raw])


def lower_rotate(to: Lowering, out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The instruction of ``rotate``."""
    width = cos.shape[-1]
    if x.dim() != 3 or cos.shape != (len(x), 1, width) or width % 2 or sin.shape != cos.shape:
        raise Unsupported(f"a rotation of {list(x.shape)} by {list(cos.shape)}")
    source, turn = to.lined(x), [to.lined(part) for part in (cos, sin)]
    to.add("rotate", (*x.shape, width), to.new(out), source, *turn)
