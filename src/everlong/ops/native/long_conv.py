"""One token of a long convolution in a program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .guards import Unsupported
from .program import Buffer, Form, Ref

if TYPE_CHECKING:
    from .lowering import Lowering


def lower_step(to: Lowering, out: Any, x: Tensor, lags: Any, state: Any) -> None:
    """The instruction of ``history_step``."""
    y, after = out
    batch, channels = x.shape
    past = to.table(state.x, after.x)
    if not to.grows(past) or state.x.dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"a history {list(state.x.shape)} of {state.x.dtype}")
    held = Ref(Buffer(0, brought=Form("held", (), torch.int64, of=past.buffer)))
    kernel = Ref(Buffer(0, brought=Form("lags", (channels,), torch.float32, lags=lags)))
    source, kind = to.ref(x), "history of bf16" if state.x.dtype == torch.bfloat16 else "history"
    to.add(kind, (batch, channels), to.new(y), source, held, past, kernel, shared=True)
