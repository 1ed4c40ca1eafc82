"""The one table of tolerances per dtype, and the comparison that uses it, row by row and as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest relative error allowed between two forms of the same computation.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# Bounds beside that table: tighter ones that hold, and looser ones with their reasons (docs/numerics.md).
BOUNDS = {
    "fp64 number": 1e-12,  # one and the same sum, taken in tiles
    "fp64 pass": 1e-10,  # norms and gates, in fp64
    "fp64 gradient": 1e-7,  # sums over all tokens, in which products cancel
    "fp32 underflow": 1e-33,  # exp near the smallest number of fp32, absolute
    "fp32 cancelled": 1e-7,  # slopes that are differences of numbers near 1, absolute
    "fp32 number": 4e-7,  # a function of each number alone
    "fp32 angle": 1e-6,  # rotations whose angles are fp32 on one side, and compiled graphs
    "fp32 pass": 2e-6,  # norms, gates and scans without products
    "fp32 product": 1e-5,  # products that are summed in another order
    "fp32 scan": 1e-4,  # a kernel over a whole sequence, against fp64
    "fp32 gradient": 1e-3,  # its gradients: sums over all tokens, in which products cancel
    "bf16 output": 1e-2,  # one op on rounded inputs, against fp64 on the same
    "bf16 state": 2e-2,  # a state or a gradient after many rounded inputs
    "bf16 gradient": 4e-2,  # a gradient through a recurrence whose outputs were rounded
    "bf16 training": 1e-1,  # the whole gradient of a model, every layer rounded
    "bf16 losses": 0.05,  # of a short training under autocast
    "int8 decoding": 1e-3,  # two paths to one product may round an input to different digits
    "int8 inputs": 2e-3,  # logits, from the rounding of inputs to two digits
    "int4 inputs": 0.15,  # logits, from the rounding of inputs to one digit
    "int8 weights": 1e-2,
    "int4 weights": 0.1,
    "another machine": 0.05,  # logits of integer weights by the form without kernels, whose inputs are not rounded
    "eps of a norm": 1e-4,  # two published equations that differ in an eps of 1e-6
    "operations": 0.02,  # operations counted one by one, and by the rule of the table of architectures
    "sample": 0.01,  # shares counted in thousands of draws, absolute
}
# Logits of a whole model, by the format of the weights: of engines under test beside the fp32 model.
LOGITS = {
    "fp32": TOLERANCE[torch.float32],
    "f32": TOLERANCE[torch.float32],
    "f16": TOLERANCE[torch.float16],
    "bf16": TOLERANCE[torch.bfloat16],
    "Q8_0": 2 * TOLERANCE[torch.bfloat16],
    "Q4_0": 2 * TOLERANCE[torch.bfloat16],
    "int8": TOLERANCE[torch.bfloat16],
    "int4": TOLERANCE[torch.bfloat16],
}
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
