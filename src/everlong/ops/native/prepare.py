"""What the Python sides of the kernels share: one dtype for the inputs, contiguous tensors, whether to keep states."""

from __future__ import annotations

import torch
from torch import Tensor


def common_dtype(*inputs: Tensor) -> torch.dtype:
    """bf16 where all inputs are, so that the kernel reads them as they are; else fp32."""
    return torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in inputs) else torch.float32


def flat(x: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """``x`` contiguous in ``dtype``; None stays None."""
    return None if x is None else x.to(dtype).contiguous()


def wants_gradient(*inputs: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these, so that the forward pass has to keep states."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def total(parts: Tensor) -> Tensor:
    """The sum over the first axis, in order; one part is handed on as it is."""
    return parts[0] if len(parts) == 1 else parts.sum(0)
