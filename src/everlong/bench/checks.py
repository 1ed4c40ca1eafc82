"""Nothing is timed that does not match its reference: the comparison, and its tolerance for every format of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import state as states
from ..numerics import LOGITS, ROW, relative_errors
from .engines import Engine

PROMPT, MORE = 300, 4  # tokens read, and then taken one by one, to compare an engine's logits

# Largest relative error of logits, by the name that an engine gives its weights. Integers are compared with a model in
# fp32 of the values that they stand for; llama.cpp rounds what they multiply to 8 bits as well, in every layer, and our
# long prompts go through products in bf16.


class Verdict(NamedTuple):
    """``error`` is the largest relative error found; ``reason`` says what differs too much, or is None."""

    error: float
    reason: str | None


def compare(pairs: Iterator[tuple[str, Tensor, Tensor, float]]) -> Verdict:
    """Compare (what, got, want, tolerance), the whole tensor and row by row; a row may err as ``numerics.ROW`` says."""
    worst = 0.0
    for what, got, want, tolerance in pairs:
        real = got.real.dtype if got.is_complex() else got.dtype
        same = want.isinf() & (got == want)  # decays of -inf, where a text begins
        got, want = got.masked_fill(same, 0), want.masked_fill(same, 0)
        errors = relative_errors(got, want.to(torch.complex128 if want.is_complex() else torch.float64))
        worst = max(worst, *errors)
        for error, limit, part in zip(
            errors, (tolerance, tolerance * ROW.get(real, 1)), ("", " of a row"), strict=True
        ):
            if not error <= limit:
                return Verdict(error, f"{what}: relative error{part} {error:.1e}, allowed {limit:.0e}")
    return Verdict(worst, None)


def check_engine(engine: Engine, tokens: Tensor) -> Verdict:
    """Hold an engine to the functional forward of its model in fp32, after a prompt and after single tokens.

    tokens [B T] with T > MORE; all but the last ``MORE`` are the prompt.
    """
    tolerance, prompt = LOGITS[engine.weights], tokens.shape[1] - MORE
    with torch.no_grad():
        model = engine.truth()
        hidden = model.hidden(tokens)[0]
        want = model.logits(hidden[:, prompt - 1 :])

    def pairs() -> Iterator[tuple[str, Tensor, Tensor, float]]:
        yield "logits after the prompt", engine.read(tokens[:, :prompt]).float(), want[:, 0], tolerance
        for i in range(MORE):
            got = engine.step(tokens[:, prompt + i]).float()
            yield f"logits after {i + 1} more", got, want[:, i + 1], tolerance

    return compare(pairs())


def gradients(run: Callable[..., Any], inputs: dict[str, Any], seed: int = 1) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs (y and the leaves of the final state) of ``run(**inputs)``, and gradients of a random sum of them.

    ``seed`` is not that of the inputs: a norm whose gradient lies along what it normalised passes almost nothing on.
    """
    grown = {name: x.detach().requires_grad_() if is_real(x) else x for name, x in inputs.items()}
    outputs = outputs_of(run(**grown))
    torch.manual_seed(seed)
    loss = sum((out * weights_like(out)).real.sum() for out in outputs if out.requires_grad)
    wanted = {name: x for name, x in grown.items() if is_real(x)}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)  # type: ignore[arg-type]
    return [out.detach() for out in outputs], {n: g for n, g in zip(wanted, found, strict=True) if g is not None}


def weights_like(out: Tensor) -> Tensor:
    """Random weights of a sum over ``out``, the same for every dtype."""
    wide = torch.complex128 if out.is_complex() else torch.float64
    return torch.randn(out.shape, dtype=wide).to(out.dtype)


def outputs_of(result: Tensor | tuple[Tensor, Any]) -> list[Tensor]:
    """y, and the leaves of the final state that are no integers; of an op without a state all that it returns."""
    if isinstance(result, Tensor):
        return [result]
    y, final = result
    return [y, *(leaf for _, leaf, _ in states.leaves(final) if is_real(leaf))]


def is_real(x: Any) -> bool:
    """A tensor of real or complex numbers, not of integers."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
