"""The one table of tolerances per dtype, and the comparison that uses it, row by row and as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest relative error allowed between two forms of the same computation.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# How many times that a single row may err: where products cancel and a norm follows, rounded inputs are magnified.
ROW = {torch.float64: 1, torch.float32: 1, torch.bfloat16: 3, torch.float16: 3}


def relative_errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """The relative L2 error of the whole tensor, and the worst one of a row (last axis).

    A row's error is divided by its norm, but by no less than a tenth of the average row's, so
    that rows that happen to be nearly zero are judged on the scale of the others.
    """
    if got.shape != want.shape:
        raise ValueError(f"compared shapes {list(got.shape)} and {list(want.shape)}")
    if not want.numel():
        return 0.0, 0.0
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want = torch.atleast_1d(got.detach().to(wide)), torch.atleast_1d(want.detach().to(wide))
    error, size = (got - want).norm(dim=-1), want.norm(dim=-1)
    if not bool(torch.isfinite(error).all()):
        return float("inf"), float("inf")
    mean = size.square().mean().sqrt()
    if mean == 0:
        return float(error.max()), float(error.max())
    return float(error.square().mean().sqrt() / mean), float((error / size.clamp_min(mean / 10)).max())


def assert_close(got: Tensor, want: Tensor, what: str, tolerance: float | None = None) -> None:
    """Raise ``AssertionError`` naming ``what`` unless ``got`` equals ``want`` within the table's tolerance."""
    dtype = want.real.dtype if want.is_complex() else want.dtype
    whole = TOLERANCE.get(dtype, 0.0) if tolerance is None else tolerance
    limits = whole, whole * ROW.get(dtype, 1)
    for error, limit, part in zip(relative_errors(got, want), limits, ("", " of a row"), strict=True):
        if not error <= limit:
            raise AssertionError(f"{what}: relative error{part} {error:.2e} exceeds {limit:.0e}")
