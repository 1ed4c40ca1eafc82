"""What a comparison does and how long it takes: every number in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .. import config
from ..arguments import SEED, TOTAL
from ..models.lm import LanguageModel
from ..tasks.mqar import MQAR
from ..train.loop import Trainer


@dataclass(frozen=True, kw_only=True)
class Recall(config.Config):
    """Recall: a small model of each architecture learns MQAR and is tested on as many pairs as ``tests`` says.

    It learns on a mix of ``pairs`` in the shortest sequences for them (what few pairs teach soon is what many need),
    and is tested in sequences of 4 tokens per pair, the longest beyond those seen. Training ends after ``tokens``, or
    once the mean loss of 100 steps is below ``enough`` (the paper, too, stops where nothing is left to learn).
    Embeddings begin at ``embed_std`` and the head is its own: tied and small, attention takes ten times as long.
    """

    params: int = 50_000
    vocab_size: int = 66
    context: int = 32
    pairs: tuple[int, ...] = (2, 4, 8)
    tokens: int = 1_000_000
    batch: int = 16
    lr: float = 5e-3
    enough: float = 0.01
    embed_std: float = 0.5
    tests: tuple[int, ...] = (2, 4, 8, 16, 32)
    sequences: int = 256

    bounds: ClassVar = {"params": TOTAL, "tokens": TOTAL, "lr": (1e-12, 1e3), "embed_std": (0.0, 1e6)}

    def model(self, cfg: LanguageModel.Config) -> LanguageModel.Config:
        """An architecture as it learns this task."""
        return cfg.replace(embed_std=self.embed_std, tied=False)

    def task(self) -> MQAR.Config:
        """What is learnt."""
        return MQAR.Config(vocab_size=self.vocab_size, length=None, pairs=self.pairs, random_non_queries=False)

    def test(self, pairs: int) -> MQAR.Config:
        """What is asked: ``pairs`` pairs."""
        return self.task().replace(pairs=(pairs,))

    def training(self, seed: int) -> Trainer.Config:
        """How it is learnt."""
        return Trainer.Config(
            tokens=self.tokens, context=self.context, batch=self.batch, lr=self.lr, seed=seed, save_every=0
        )


@dataclass(frozen=True, kw_only=True)
class Settings(config.Config):
    """One comparison. The defaults are the full run; ``quick()`` is the short one.

    ``params`` of every model within 5 %; ``tokens`` of training, in batches of ``batch`` rows of ``context`` tokens;
    ``held_out`` is a share of the text, of which at most ``runs`` stretches are measured on; a prompt of each of
    ``lengths`` is read (ascending), for about ``seconds`` each; ``decode_steps`` tokens are timed after it.
    """

    params: int = 400_000
    tokens: int = 500_000
    context: int = 256
    batch: int = 4
    lr: float = 3e-3
    seed: int = 0
    quick: bool = False
    held_out: float = 0.02
    runs: int = 24
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    seconds: float = 0.6
    decode_steps: int = 150
    sample_tokens: int = 160
    recall: Recall = field(default_factory=Recall)

    bounds: ClassVar = {"params": TOTAL, "tokens": TOTAL, "lr": (1e-12, 1e3), "seed": SEED, "held_out": (1e-6, 0.5)}

    def training(self) -> Trainer.Config:
        """How every model learns the text."""
        return Trainer.Config(
            tokens=self.tokens, context=self.context, batch=self.batch, lr=self.lr, seed=self.seed, save_every=50
        )

    @property
    def optimizer(self) -> str:
        """The optimiser in a line."""
        cfg = self.training()
        return (
            f"AdamW, lr {cfg.lr:g}, betas {cfg.betas[0]:g} and {cfg.betas[1]:g}, weight decay {cfg.weight_decay:g}, "
            f"warm-up {cfg.warmup:.0%} then cosine, clipped at {cfg.clip:g}"
        )


def quick() -> Settings:
    """A short run: it shows that everything works and the rough order, no more."""
    return Settings(
        params=150_000,
        tokens=120_000,
        quick=True,
        runs=8,
        lengths=(256, 1024, 4096),
        seconds=0.25,
        decode_steps=60,
        sample_tokens=100,
        recall=Recall(tokens=320_000, sequences=96),
    )


def profile(short: bool, *, seed: int = 0, params: int | None = None, tokens: int | None = None) -> Settings:
    """The full or the short settings with some of them chosen. ``ValueError`` for numbers out of their bounds."""
    chosen = quick() if short else Settings()
    given = {"params": params, "tokens": tokens}
    return chosen.replace(seed=seed, **{name: value for name, value in given.items() if value is not None})
