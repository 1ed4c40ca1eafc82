"""How the next token is drawn: settings, filters, and a sampler for rows of different settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..arguments import COUNT, SEED, SHARE, check

COLD = 1e-6  # temperatures below take the most likely token: dividing by them would overflow
DRAWS = 64  # random numbers of a row that are made at once


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 takes the most likely one; 0, None and 1.0 switch the rest off.

    The random numbers of ``seed``, and the tokens that ``repetition_penalty`` has seen, begin anew with every call of
    ``generate``, also where that goes on from a session. ``ValueError`` for numbers out of ``bounds``.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    bounds: ClassVar = {
        "temperature": (0.0, 100.0),
        "top_k": (0, COUNT[1]),
        "top_p": SHARE,
        "min_p": SHARE,
        "repetition_penalty": (1e-6, 1e6),
        "seed": SEED,
    }

    def __post_init__(self) -> None:
        check(self)


def filtered(logits: Tensor, sampling: Sequence[Sampling]) -> Tensor:
    """Logits [B V] after each row's temperature, top-k, min-p (arXiv 2407.01082), top-p (1904.09751); -inf is out."""

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(s, name) for s in sampling], device=logits.device)[:, None]

    logits = logits / column("temperature").to(logits.dtype)
    if any(0 < s.top_k < logits.shape[1] for s in sampling):
        kept = column("top_k")
        kept = kept.where((kept > 0) & (kept < logits.shape[1]), logits.shape[1])
        best = logits.topk(int(kept.where(kept < logits.shape[1], 1).max())).values
        least = best.gather(1, (kept - 1).clamp_max(best.shape[1] - 1))
        logits = logits.masked_fill((logits < least) & (kept < logits.shape[1]), -math.inf)
    if any(s.min_p > 0 for s in sampling):
        odds = logits - logits.amax(1, keepdim=True)
        logits = logits.masked_fill(odds < column("min_p").to(logits.dtype).log(), -math.inf)
    if any(s.top_p < 1 for s in sampling):
        ordered, order = logits.softmax(-1).sort(descending=True)
        share = column("top_p").to(logits.dtype)
        drop = (ordered.cumsum(-1) - ordered >= share) & (share < 1)
        drop[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -math.inf)
    return logits


def penalised(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Logits with those of ``seen`` (bool, of their shape) made less likely (CTRL, arXiv 1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class Sampler:
    """Draws the next token of rows, each by its own ``Sampling``; what a row draws does not depend on the others.

    ``put(row, sampling, tokens)`` begins a row that has read ``tokens``, ``free`` ends it.
    """

    def __init__(self, vocabulary: int, device: torch.device | str = "cpu") -> None:
        self.vocabulary, self.device = vocabulary, device
        self._sampling: dict[int, Sampling] = {}
        self._seen: dict[int, Tensor] = {}  # bool [V], of rows with a penalty
        self._numbers: dict[int, torch.Generator] = {}
        self._drawn: dict[int, list[float]] = {}

    def put(self, row: int, sampling: Sampling, tokens: Tensor) -> None:
        """Begin a row; ``tokens`` int64 [T] are those that its repetition penalty has seen."""
        self.free(row)
        self._sampling[row] = sampling
        if sampling.repetition_penalty != 1.0:
            self._seen[row] = torch.zeros(self.vocabulary, dtype=torch.bool, device=self.device)
            self._seen[row][tokens.to(self.device)] = True
        if sampling.seed is not None:
            self._numbers[row] = torch.Generator("cpu").manual_seed(sampling.seed)

    def free(self, row: int) -> None:
        """End a row."""
        for table in (self._sampling, self._seen, self._numbers, self._drawn):
            table.pop(row, None)

    @torch.no_grad()
    def draw(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """One token for each of ``rows`` from logits [B V]. ``ValueError`` where they are not finite."""
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the model's logits are not finite; its weights hold NaN or overflow in this dtype")
        logits, settings = logits.float(), [self._sampling[row] for row in rows]
        if any(row in self._seen for row in rows):
            logits = self._penalised(logits, rows)
        warm = [place for place, s in enumerate(settings) if s.temperature >= COLD]
        if len(warm) < len(rows):
            tokens = logits.argmax(-1).tolist()
            if not warm:
                return self._note(rows, tokens)
            logits = logits[warm]
        else:
            tokens = [0] * len(rows)
        uniform = torch.tensor([self._uniform(rows[place]) for place in warm], dtype=torch.float64, device="cpu")
        drawn = _inverse(filtered(logits, [settings[place] for place in warm]), uniform)
        for place, token in zip(warm, drawn.tolist(), strict=True):
            tokens[place] = token
        return self._note(rows, tokens)

    def _penalised(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        places = [place for place, row in enumerate(rows) if row in self._seen]
        seen = torch.stack([self._seen[rows[place]] for place in places])
        penalties = [self._sampling[rows[place]].repetition_penalty for place in places]
        penalty = torch.tensor(penalties, dtype=torch.float32, device=logits.device)[:, None]
        logits = logits.clone()
        logits[places] = penalised(logits[places], seen, penalty)
        return logits

    def _note(self, rows: Sequence[int], tokens: list[int]) -> list[int]:
        if self._seen:
            for row, token in zip(rows, tokens, strict=True):
                if row in self._seen:
                    self._seen[row][token] = True
        return tokens

    def _uniform(self, row: int) -> float:
        """The next random number of a row, in [0, 1); PyTorch's own where it has no seed."""
        if row not in self._numbers:
            return float(torch.rand((), dtype=torch.float64, device="cpu"))
        left = self._drawn.get(row)
        if not left:
            numbers = torch.rand(DRAWS, dtype=torch.float64, generator=self._numbers[row], device="cpu")
            left = self._drawn[row] = numbers.flip(0).tolist()
        return left.pop()


def _inverse(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token of each row at which the sum of the odds passes ``uniform [B]`` of them all.  [B V] -> [B]."""
    sums = logits.softmax(-1).double().cumsum(-1)
    total = sums[:, -1:].contiguous()
    last = torch.searchsorted(sums, total)  # the last token that has any odds
    return torch.minimum(torch.searchsorted(sums, uniform.to(sums.device)[:, None] * total, right=True), last)[:, 0]
