"""What a trained model is worth: bits per byte of held-out text, by position and by length, and recall of pairs.

**Held-out text.** ``Runs`` are stretches of 8 training contexts, inside single documents where some are that long.
- ``bits_per_byte``: every run is cut into windows of the training context, each read from an empty state. All models
  predict the same bytes from the same context, which is the one they were trained on.
- ``by_position``: the same windows up to the training context; beyond it, whole runs read as one stream with the state
  carried from piece to piece, as a model reads a long text. Positions count the tokens read, in buckets of sqrt 2.
- ``by_length``: always the same bytes, those of the last half context of each run. Length L means that the model began
  with an empty state L tokens before the end of the run, so only the text before those bytes grows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.lm import LanguageModel
from ..tasks.mqar import IGNORED, MQAR
from ..train.data import Batch, Corpus
from ..train.loop import Progress, Trainer

LENGTHS = (1, 2, 4, 8)  # times the training context
ROWS = 32  # windows read at once
TEST_SEED = 1 << 40  # keeps test sequences apart from those of training


class Runs(NamedTuple):
    """Held-out text to be measured on: ``batch`` [N factor*context], and bits per nat (per byte)."""

    batch: Batch
    factor: int
    context: int
    scale: float


def held_out_runs(corpus: Corpus, context: int, count: int, seed: int = 0) -> Runs:
    """At most ``count`` stretches that do not overlap, of 8 contexts, or of fewer where the text is that short.

    ``ValueError`` for a text shorter than one context.
    """
    factor = next((f for f in reversed(LENGTHS) if f * context < len(corpus)), 1)
    offsets = _inside_documents(corpus, factor * context)
    if not len(offsets):
        offsets = torch.arange(corpus.windows(factor * context)) * factor * context
    chosen = torch.randperm(len(offsets), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    batch = corpus.rows(offsets[chosen], factor * context)
    return Runs(batch, factor, context, corpus.tokens_per_byte / math.log(2))


def _inside_documents(corpus: Corpus, length: int) -> Tensor:
    """Offsets of the stretches of ``length`` tokens (and one target) that lie inside one document."""
    begins, sizes = corpus.offsets[:-1].tolist(), corpus.offsets.diff().tolist()
    pairs = zip(begins, sizes, strict=True)
    found = [begin + index * length for begin, size in pairs for index in range((size - 1) // length)]
    return torch.tensor(found, dtype=torch.int64)


@torch.no_grad()
def losses(model: LanguageModel, batch: Batch, piece: int) -> Tensor:
    """Nats of every target [B T], read as a stream: in pieces, from an empty state, with the state carried on."""
    state, found = None, []
    for begin in range(0, batch.tokens.shape[1], piece):
        part = slice(begin, begin + piece)
        hidden, state, _ = model.hidden(batch.tokens[:, part], state, starts=_starts(batch, part))
        logits = model.logits(hidden).float()
        found.append(F.cross_entropy(logits.transpose(1, 2), batch.targets[:, part], reduction="none"))
    return torch.cat(found, dim=1)


def _starts(batch: Batch, part: slice) -> Tensor | None:
    """The starts of a piece, or None where there are none; a start at the very first token changes nothing."""
    if batch.starts is None:
        return None
    starts = batch.starts[:, part]
    return starts if bool(starts[:, 0 if part.start else 1 :].any()) else None


def _each(change: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """A batch with ``change`` applied to its tensors."""
    return Batch(*(tensor if tensor is None else change(tensor) for tensor in batch))  # type: ignore[arg-type]


def _losses(model: LanguageModel, batch: Batch, piece: int) -> Tensor:
    """``losses`` of many rows, ``ROWS`` at a time."""
    groups = (slice(at, at + ROWS) for at in range(0, len(batch.tokens), ROWS))
    return torch.cat([losses(model, _each(itemgetter(rows), batch), piece) for rows in groups])


def text(model: LanguageModel, runs: Runs) -> dict[str, Any]:
    """``bits_per_byte``, ``by_position`` and ``by_length`` (see the module)."""
    context, last = runs.context, slice(-(runs.context // 2), None)
    windows = _losses(model, _each(lambda tensor: tensor.reshape(-1, context), runs.batch), context)
    whole = windows.view(-1, runs.factor * context)
    means, stream = {1: whole[:, last].mean()}, whole[:, :context]
    for factor in (f for f in LENGTHS if 1 < f <= runs.factor):
        ends = itemgetter((slice(None), slice(-factor * context, None)))
        stream = _losses(model, _each(ends, runs.batch), context)
        means[factor] = stream[:, last].mean()
    by_place = torch.cat([windows.mean(0), stream.mean(0)[context:]])
    return {
        "bits_per_byte": float(windows.mean()) * runs.scale,
        "by_position": [[place, value * runs.scale] for place, value in _buckets(by_place)],
        "by_length": [[factor * context, float(mean) * runs.scale] for factor, mean in means.items()],
    }


def _buckets(values: Tensor) -> list[tuple[int, float]]:
    """Means of ``values [T]`` over buckets that grow by sqrt 2, each at its middle (counted from 1)."""
    edges = sorted({min(round(2 ** (k / 2)), len(values) + 1) for k in range(2 * len(values).bit_length() + 2)})
    if len(edges) > 2 and edges[-1] - edges[-2] < (edges[-2] - edges[-3]) / 2:
        del edges[-2]  # a rest of few positions would only show their noise
    return [
        (round(math.sqrt(low * (high - 1))), float(values[low - 1 : high - 1].mean())) for low, high in pairwise(edges)
    ]


class _Enough(Exception):
    """Nothing is left to learn."""


class Learnt(NamedTuple):
    """The tokens it took, and whether nothing was left to learn when training ended."""

    tokens: int
    finished: bool


def learn(trainer: Trainer, enough: float, on_step: Callable[[Progress], Any]) -> Learnt:
    """Train to the end, or until the mean loss of 100 steps is below ``enough``."""
    latest: deque[float] = deque(maxlen=100)

    def watch(progress: Progress) -> None:
        on_step(progress)
        latest.append(progress.loss)
        if len(latest) == latest.maxlen and sum(latest) < enough * len(latest):
            raise _Enough

    finished = True
    try:
        trainer.run(watch)
        finished = False
    except _Enough:
        pass
    trainer.model.eval()
    return Learnt(trainer.curve[-1].tokens, finished)


def recall_accuracy(model: LanguageModel, task: MQAR.Config, sequences: int, seed: int) -> float:
    """The share of queries answered right, over ``sequences`` sequences that training has not seen."""
    made, right, asked, step = task.build(), 0, 0, 0
    length = task.length or 4 * max(task.pairs)
    wanted = SimpleNamespace(batch=min(sequences, max(8, 2**15 // length)), context=length, seed=seed + TEST_SEED)
    while step * wanted.batch < sequences:
        tokens, targets, _ = made.batch(step, wanted)
        with torch.no_grad():
            hidden = model.hidden(tokens)[0]
            counted = targets != IGNORED
            answers = model.logits(hidden[counted]).argmax(dim=-1)
        right, asked, step = right + int((answers == targets[counted]).sum()), asked + int(counted.sum()), step + 1
    return right / asked


def chance(task: MQAR.Config) -> float:
    """The accuracy of guessing a value."""
    return 2 / task.vocab_size
