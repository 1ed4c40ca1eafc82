"""Where a run that diverged began to: the first row, and its first token, whose loss or gradient is not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .data import Batch

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # tokens, targets, starts, all [1 T] -> their sum


def first_broken(loss: Loss, parameters: list[nn.Parameter], batch: Batch) -> tuple[int, int] | None:
    """(row, token) of ``batch`` where it begins, or None where no row is broken by itself.

    Rows are tried one by one; in the first that is broken, halving finds a token with which it is, and without which,
    and all that follows, it is not. So the answer is exact for forms that spread a NaN to earlier tokens, too.
    """

    def broken(row: int, tokens: int) -> bool:
        parts = (None if x is None else x[row : row + 1, :tokens] for x in batch)
        value = loss(*parts)  # type: ignore[arg-type]
        if not bool(torch.isfinite(value)):
            return True
        grads = torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else ()
        return not all(bool(torch.isfinite(grad).all()) for grad in grads if grad is not None)

    length = batch.tokens.shape[1]
    row = next((row for row in range(len(batch.tokens)) if broken(row, length)), None)
    if row is None:
        return None
    sound, known = 0, length  # prefixes of so many tokens
    while known - sound > 1:
        middle = (sound + known) // 2
        sound, known = (sound, middle) if broken(row, middle) else (middle, known)
    return row, known - 1
