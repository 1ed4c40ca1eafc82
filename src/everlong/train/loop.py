"""The training loop: for texts and for synthetic tasks alike, killed at any moment and resumed exactly.

A run in a folder keeps ``checkpoint.safetensors`` (replaced whole) and ``metrics.jsonl`` (a line per step). After
``kill -9`` the run goes on from the checkpoint, and the curve is bit for bit that of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import config
from ..arguments import COUNT, SEED, SHARE, TOTAL
from ..files import atomic_write
from . import checkpoint
from .data import Batch, Corpus
from .divergence import first_broken
from .optim import learning_rate, make_optimizer, set_learning_rate

METRICS = "metrics.jsonl"
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)


class Progress(NamedTuple):
    """The run after a step. ``bits_per_byte`` is None for data that is not text."""

    step: int  # steps done
    steps: int
    tokens: int  # tokens seen
    loss: float  # nats per token
    bits_per_byte: float | None
    tokens_per_second: float  # of this step
    seconds: float  # of training so far, pauses and checkpoints left out


class Data(Protocol):
    """What the loop asks of data: ``Corpus``, or any task of your own. It may also have ``vocab_size`` (checked
    against the model's), ``tokens_per_byte``, ``fingerprint`` (a text compared when a run resumes) and ``where`` (see
    ``Corpus.where``).
    """

    def batch(self, step: int, cfg: Any) -> Batch:
        """The data of a step: a pure function of ``cfg`` and ``step``."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C ended the run after a step; ``curve`` holds what was done, and the message says how to go on."""

    def __init__(self, message: str, curve: list[Progress]) -> None:
        super().__init__(message)
        self.curve = curve


class Trainer:
    """Trains ``model`` (anything with ``loss(tokens, targets, starts=, reduction=)``) on ``data``."""

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """``batch`` rows of ``context`` tokens make a step, in ``accumulate`` parts that do not change the result.

        ``tokens`` in all; ``warmup`` is a share of the steps; ``clip`` bounds the norm of the gradient (0: no bound);
        ``save_every`` steps the run is saved (0: only at the end).
        """

        tokens: int = 2_000_000
        context: int = 256
        batch: int = 16
        lr: float = 2e-3
        warmup: float = 0.05
        weight_decay: float = 0.1
        betas: tuple[float, ...] = (0.9, 0.95)
        clip: float = 1.0
        accumulate: int = 1
        seed: int = 0
        bf16: bool = False
        save_every: int = 100

        bounds: ClassVar = {
            "tokens": TOTAL,
            "lr": (1e-12, 1e3),
            "warmup": SHARE,
            "weight_decay": (0.0, 1e3),
            "betas": (0.0, 1 - 1e-9),
            "clip": (0.0, 1e12),
            "seed": SEED,
            "save_every": (0, COUNT[1]),
        }

        def __post_init__(self) -> None:
            super().__post_init__()
            if len(self.betas) != 2:
                raise ValueError(f"betas must be two numbers, got {list(self.betas)}")
            if self.batch % self.accumulate:
                raise ValueError(
                    f"a batch of {self.batch} rows cannot be split into {self.accumulate} equal parts; "
                    "choose accumulate so that it divides batch"
                )

        @property
        def steps(self) -> int:
            """Steps of the whole run."""
            return -(-self.tokens // (self.batch * self.context))

    def __init__(self, model: nn.Module, data: Data, cfg: Config, folder: str | Path | None = None) -> None:
        self.model, self.data, self.cfg = model, data, cfg
        self.folder = Path(folder) if folder is not None else None
        self.optimizer = make_optimizer(model, cfg)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.curve: list[Progress] = []
        self.saved: int | None = None  # the step of the checkpoint in the folder
        self.random: dict[str, Tensor] = {}  # random states of the checkpoint
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        ours = getattr(getattr(self.model, "cfg", None), "vocab_size", None)
        theirs = getattr(self.data, "vocab_size", None)
        if ours is not None and theirs is not None and theirs > ours:
            raise ValueError(
                f"the data has token ids up to {theirs - 1}, the model a vocabulary of {ours}; "
                f"build the model with vocab_size={theirs}"
            )

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.curve)

    def run(self, on_step: Callable[[Progress], Any] | None = None) -> list[Progress]:
        """Train to the end, from the folder's checkpoint where there is one; the whole curve, resumed part included.

        ``ValueError`` where the checkpoint is of another run or the loss is not finite, ``OSError`` where it cannot be
        saved (the previous checkpoint is intact), ``Stopped`` after Ctrl-C (a second Ctrl-C stops at once).
        """
        training = self.model.training
        self.model.train()
        try:
            with self._own_randomness(), self._metrics() as write, _ctrl_c() as asked_to_stop, _mixed_norms():
                while self.step < self.cfg.steps:
                    self.curve.append(self._advance())
                    with self._explained():
                        write(self.curve[-1])
                        if self._due():
                            self.save()
                    if on_step is not None:
                        on_step(self.curve[-1])
                    if asked_to_stop() and self.step < self.cfg.steps:
                        with self._explained():
                            self.save()
                        raise Stopped(self._how_to_go_on(), self.curve)
        finally:
            self.model.train(training)
        return self.curve

    def _due(self) -> bool:
        every = self.cfg.save_every
        return self.step == self.cfg.steps or (every > 0 and self.step % every == 0)

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """The run's random state, from its seed or checkpoint; the caller's is put back afterwards."""
        with torch.random.fork_rng([self.device.index or 0] if self.device.type == "cuda" else []):
            self.resume()
            torch.manual_seed(self.cfg.seed)
            checkpoint.restore_random(self.random)
            yield

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[Callable[[Progress], Any]]:
        """A function that adds a line to ``metrics.jsonl``, which first is made to hold exactly the curve so far."""
        if self.folder is None:
            yield lambda progress: None
            return
        atomic_write(self.folder / METRICS, "".join(map(_line, self.curve)))
        with (self.folder / METRICS).open("ab", buffering=0) as file:
            yield lambda progress: file.write(_line(progress).encode())

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """An error of the disk says what is kept and what to do."""
        try:
            yield
        except OSError as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            advice = "See to that" if error.errno in LOCKED else "Make room"
            raise OSError(
                error.errno,
                f"step {self.step}: could not write to {self.folder}: {cause.strerror or cause}; {self._kept()}. "
                f"{advice} and run it again",
            ) from error

    def _kept(self) -> str:
        return "there is no checkpoint yet" if self.saved is None else f"the checkpoint of step {self.saved} is intact"

    def _advance(self) -> Progress:
        began = time.perf_counter()
        loss = self._update()
        seconds = time.perf_counter() - began
        step, size = self.step + 1, self.cfg.batch * self.cfg.context
        past = self.curve[-1].seconds if self.curve else 0.0
        return self._progress(step, loss, size / seconds, past + seconds)

    def _update(self) -> float:
        """One step of the optimiser; returns the loss before it. The step's only wait for the device is ``tolist``."""
        set_learning_rate(self.optimizer, learning_rate(self.step, self.cfg.steps, self.cfg))
        batch = self.data.batch(self.step, self.cfg)
        loss = self._gradients(batch)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.cfg.clip or math.inf, foreach=True)
        value, size = torch.stack([loss.double(), norm.double()]).tolist()
        if not (math.isfinite(value) and math.isfinite(size)):
            raise ValueError(self._diverged(value, size, batch))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def _gradients(self, batch: Batch) -> Tensor:
        """Add the gradient of the mean loss over all targets, part by part, and return that loss."""
        tokens, targets, starts = self._here(batch)
        count = (targets != -100).sum().clamp_min(1)
        total, rows = torch.zeros((), dtype=torch.float32, device=self.device), len(tokens) // self.cfg.accumulate
        for at in range(0, len(tokens), rows):
            part = slice(at, at + rows)
            loss = self._loss(tokens[part], targets[part], None if starts is None else starts[part]) / count
            loss.backward()
            total = total + loss.detach()
        return total

    def _here(self, batch: Batch) -> Batch:
        """The batch on the device, without starts that change nothing."""
        tokens, targets, starts = (None if t is None else t.to(self.device, non_blocking=True) for t in batch)
        assert tokens is not None and targets is not None
        if starts is not None and not bool(batch.starts[:, 1:].any()):  # type: ignore[index]
            starts = None  # rows begin with an empty state anyway
        return Batch(tokens, targets, starts)

    def _loss(self, tokens: Tensor, targets: Tensor, starts: Tensor | None) -> Tensor:
        """The loss of some rows, summed."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.cfg.bf16):
            return self.model.loss(tokens, targets, starts=starts, reduction="sum")  # type: ignore[operator]

    def _began(self, batch: Batch) -> str:
        """The token and the document with which it began, as a sentence; nothing where no row is broken by itself."""
        place = first_broken(self._loss, self.parameters, self._here(batch))
        if place is None:
            return ""
        where = getattr(self.data, "where", None)
        named = f", {where(self.step, self.cfg, *place)}" if where is not None else ""
        return f". It began in row {place[0]} of the batch at token {place[1]}{named}"

    def _diverged(self, loss: float, norm: float, batch: Batch) -> str:
        bad = next((n for n, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())), None)
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        if bad is not None:
            what += f", and the weights {bad} are not finite"
        lower = self.cfg.lr / 3
        advice = f"try a lower lr ({lower:.1e}), a longer warmup, or a smaller clip"
        if bad is not None and self.step == 0:
            advice = "the model was not finite before training; load or build it again"
        began = "" if bad is not None else self._began(batch)
        what = f"step {self.step + 1} of {self.cfg.steps}: {what}; {self._kept()}"
        return f"{what}. To go on, {advice}, in a new folder{began}"

    def _how_to_go_on(self) -> str:
        done = f"stopped after step {self.step} of {self.cfg.steps}"
        return f"{done}; saved in {self.folder}, and the same call goes on from there" if self.folder else done

    def _described(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        settings = {name: value for name, value in self.cfg.to_dict().items() if name != "save_every"}
        described = getattr(self.model, "cfg", None)
        model = described.to_dict() if isinstance(described, config.Config) else type(self.model).__qualname__
        data = getattr(self.data, "fingerprint", type(self.data).__qualname__)
        return json.loads(json.dumps({"train": settings, "model": model, "data": data}))

    def save(self) -> None:
        """Replace the folder's checkpoint by the present moment, whole or not at all; nothing without a folder."""
        if self.folder is None or self.saved == self.step:
            return
        history = torch.tensor([(p.loss, p.tokens_per_second, p.seconds) for p in self.curve], dtype=torch.float64)
        tensors = checkpoint.collect(self.model, self.optimizer, history)
        checkpoint.save(self.folder / checkpoint.FILE, tensors, self._described())
        self.saved = self.step

    def resume(self) -> int:
        """Take over the folder's checkpoint, if there is one; the steps done. ``run`` does this by itself.

        ``ValueError`` where the checkpoint is damaged, or of a run with other settings, model or data.
        """
        path = self.folder / checkpoint.FILE if self.folder else None
        if path is None or self.step:
            return self.step
        checkpoint.remove_leftovers(path.parent)
        if not path.is_file():
            return 0
        tensors, described = checkpoint.load(path)
        found = list(checkpoint.differences(described, self._described()))
        if found:
            raise ValueError(
                f"{self.folder} holds a run that differs: {'; '.join(found[:5])}. "
                "Go on with its own settings, choose another folder, or delete this one to begin anew"
            )
        history, self.random = checkpoint.restore(tensors, self.model, self.optimizer)
        self.curve = [self._progress(step, *row) for step, row in enumerate(history.tolist(), 1)]
        self.saved = self.step
        return self.step

    def _progress(self, step: int, loss: float, speed: float, seconds: float) -> Progress:
        density = getattr(self.data, "tokens_per_byte", None)
        bits = None if density is None else loss / math.log(2) * density
        return Progress(step, self.cfg.steps, step * self.cfg.batch * self.cfg.context, loss, bits, speed, seconds)


def _line(progress: Progress) -> str:
    return json.dumps(progress._asdict()) + "\n"


@contextlib.contextmanager
def _mixed_norms() -> Iterator[None]:
    """Under autocast norms get bf16 inputs and fp32 weights, which is meant; PyTorch warns that this is not fused."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed since; a second one interrupts at once. Only the main thread can be asked."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before == signal.SIG_IGN:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


@torch.no_grad()
def evaluate(model: nn.Module, data: Corpus, context: int, limit: int = 2**18) -> tuple[float, float]:
    """Loss (nats per token) and bits per byte on the first ``limit`` tokens of ``data``, each row beginning anew."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    for batch in data.in_order(context, max(1, 4096 // context)):
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        starts = None if batch.starts is None else batch.starts.to(device)
        total += float(model.loss(tokens, targets, starts=starts, reduction="sum"))  # type: ignore[operator]
        count += targets.numel()
        if count >= limit:
            break
    model.train(training)
    return total / count, total / count / math.log(2) * data.tokens_per_byte
