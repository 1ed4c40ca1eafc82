"""Multi-query associative recall (MQAR; Arora et al., arXiv 2312.04927): read pairs, then answer with values by key.

A sequence of length L over V tokens: ``k_1 v_1 ... k_n v_n``, then (L - 2n) / 2 slots of two positions. Every key is
asked for once, at the beginning of a slot; slot i (from 1) is drawn with probability proportional to ``a i^(a-1)``,
without replacement. **The target stands at the position of the query** (no shift) and is the key's value; the value
itself is not written after it. All other targets are -100. Keys are distinct ids of 1 .. V/2 - 1, values distinct ids
of V/2 .. V - 1; the rest is filled with random tokens, or zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..arguments import SEED, whole
from ..train.data import Batch

IGNORED = -100
_STREAM = 0x4D514152  # keeps these random numbers apart from those of other uses of the same seed


class MQAR:
    """Batches of MQAR, without end, for the training loop: ``batch(step, cfg)`` is a function of (cfg.seed, step)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """``pairs``: each batch has one of these numbers of pairs, drawn evenly. ``power`` is a above.

        ``length`` None is the shortest for the pairs of the batch, 4 n, in as many more rows: most queries per token.
        ``random_non_queries`` fills the gaps with random tokens (False: zeros, as in the paper's figure).
        ``ValueError`` unless 4 n <= length and there are n keys, vocab_size >= 2 n + 2 (the paper also has more tokens
        than the length).
        """

        vocab_size: int = 8192
        length: int | None = 64
        pairs: tuple[int, ...] = (4,)
        power: float = 0.01
        random_non_queries: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.pairs:
                raise ValueError("pairs must be numbers >= 1, got none")
            most = max(self.pairs)
            length = 4 * most if self.length is None else self.length
            if length < 4 * most:
                raise ValueError(f"{most} pairs and their queries need a length of {4 * most}, got {length}")
            if self.vocab_size < 2 * most + 2 or self.vocab_size % 2:
                raise ValueError(
                    f"{most} pairs need an even vocab_size of at least {2 * most + 2}, got {self.vocab_size}"
                )

        def build(self) -> MQAR:
            """The task."""
            return MQAR(self)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.cfg.vocab_size

    @property
    def fingerprint(self) -> str:
        """A short text that another task does not have."""
        return config.dumps(self.cfg)

    def batch(self, step: int, cfg: Any) -> Batch:
        """Batch ``step`` for training with ``cfg``, whose ``batch``, ``context`` and ``seed`` are used.

        [batch length]; with a length of None [batch * context / 4n 4n].
        """
        generator = torch.Generator().manual_seed(_seed(whole("seed", cfg.seed, *SEED), step))
        chosen = self.cfg.pairs[int(torch.randint(len(self.cfg.pairs), (), generator=generator))]
        rows = cfg.batch if self.cfg.length else max(1, cfg.batch * cfg.context // (4 * chosen))
        return sample(self.cfg, rows, chosen, generator)


MQAR.Config.owner = MQAR


def _seed(seed: int, step: int) -> int:
    """One 63-bit number from two (splitmix64's mixing, so neighbouring steps have nothing in common)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + _STREAM) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


def sample(task: MQAR.Config, batch: int, pairs: int, generator: torch.Generator) -> Batch:
    """``batch`` sequences with ``pairs`` pairs each, drawn from ``generator``."""
    half, length = task.vocab_size // 2, task.length or 4 * pairs
    keys = 1 + _distinct(torch.ones(half - 1, dtype=torch.float32), batch, pairs, generator)
    values = half + _distinct(torch.ones(half, dtype=torch.float32), batch, pairs, generator)
    space = (length - 2 * pairs) // 2
    slots = _distinct(torch.arange(1, space + 1).double() ** (task.power - 1), batch, pairs, generator)
    places = 2 * pairs + 2 * slots
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], dim=-1).flatten(1)
    tokens.scatter_(1, places, keys)
    if task.random_non_queries:
        noise = torch.randint(task.vocab_size, tokens.shape, generator=generator)
        tokens = torch.where(tokens == 0, noise, tokens)
    targets = torch.full_like(tokens, IGNORED).scatter_(1, places, values)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    return Batch(tokens, targets, starts)


def _distinct(weights: Tensor, batch: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different indices per row [batch count], drawn one after the other in proportion to ``weights``.

    The largest of ``log w + Gumbel noise`` in falling order are such a draw.
    """
    uniform = torch.rand(batch, len(weights), generator=generator, dtype=torch.float64)
    noise = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
    return (weights.double().log() + noise).topk(count, dim=1).indices
