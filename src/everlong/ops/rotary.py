"""Rotary positions (RoPE, arXiv 2104.09864):  pair i of a head at position p is turned by the angle p theta^(-2i/R).

R is the rotated width (the first ``fraction`` of the head); pair i is the channels i and i + R/2, as in Llama and
most published weights (the paper pairs neighbours, which is the same up to a permutation of the projection).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .native.rotary import lower_cos_sin, lower_rotate
from .record import leaf


@leaf(lower_cos_sin)
def cos_sin(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``positions [...]`` int64 times ``frequencies [F]`` fp64, each ``[... F]`` of ``dtype``.

    Computed in fp64, because an angle of a million radians has lost two digits in fp32.
    """
    angle = positions[..., None] * frequencies
    return angle.cos().to(dtype), angle.sin().to(dtype)


def angles(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines ``[... 1 R]`` for ``positions [...]``, where the first ``width`` channels turn."""
    pairs = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    cos, sin = (part[..., None, :] for part in cos_sin(positions, theta ** (-pairs / width), dtype))
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@leaf(lower_rotate)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R channels of each head.  x [... H K], cos and sin [... 1 R] -> [... H K] in the dtype of x."""
    width = cos.shape[-1]
    turned = x[..., :width].to(cos.dtype)
    turned = torch.addcmul(turned * cos, turned.roll(width // 2, dims=-1), sin).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)
