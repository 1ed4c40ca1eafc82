"""A whole training job: text, model and settings in; a folder with the run and the trained model out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from .. import arguments, config
from ..checkpoints import folder as folders
from ..files import atomic_write, read_json
from ..models.blocks import FeedForward, Layer, SwiGLU
from ..models.lm import LanguageModel
from ..models.sizes import check_training
from ..tokenizer import open_tokenizer
from . import checkpoint
from .data import Corpus, default_paths
from .loop import Progress, Trainer, evaluate

JOB = "job.json"


@dataclass(frozen=True, kw_only=True)
class Job(config.Config):
    """Everything a run is made of. No ``paths``: the sources of Python's standard library. ``held_out`` of the text
    is not trained on, and judges the model at the end.
    """

    model: LanguageModel.Config
    train: Trainer.Config = field(default_factory=Trainer.Config)
    paths: tuple[str, ...] = ()
    tokenizer: str | None = None
    held_out: float = 0.02

    bounds: ClassVar = {"held_out": (1e-6, 1 - 1e-6)}


class Result(NamedTuple):
    """What a job ended with; loss (nats per token) and bits per byte are of the held-out text."""

    folder: Path
    model: LanguageModel
    curve: list[Progress]
    loss: float
    bits_per_byte: float
    opening: str  # the first words of the held-out text


def simple_model(mixer: str, d_model: int, layers: int, vocab_size: int) -> LanguageModel.Config:
    """Layers of a mixer and a SwiGLU each. ``mixer`` is a name or your own dotted path, else ``ValueError``."""
    arguments.whole("layers", layers, 1, 10_000)
    found = config.find(mixer)
    if issubclass(found, FeedForward):
        raise ValueError(
            f"{mixer} is a feed-forward block that mixes no tokens" + config.suggest("", config.mixer_names())
        )
    layer = Layer.Config(mixer=found.Config(), mlp=SwiGLU.Config())
    return LanguageModel.Config(vocab_size=vocab_size, d_model=d_model, layers=(layer,) * layers)


def read_model_config(path: str | Path, *, trust_code: bool = False) -> LanguageModel.Config:
    """A model's configuration from a JSON file: the bare one, or the ``config.json`` of a saved model.

    ``trust_code`` as in ``everlong.load``.
    """
    path = Path(path)
    if path.is_dir():
        path = path / folders.CONFIG
    data = read_json(path)
    with config.reading(path, trust_code=trust_code):
        return LanguageModel.Config.from_dict(data.get("model", data) if isinstance(data, dict) else data)


def read_job(folder: str | Path, *, trust_code: bool = False) -> Job:
    """The job of a folder that ``train`` began; ``ValueError`` where there is none. ``trust_code`` as in ``load``."""
    path = Path(folder) / JOB
    if not path.is_file():
        raise ValueError(f"no training run in {folder} ({JOB} is missing); give the --out folder of `everlong train`")
    with config.reading(path, trust_code=trust_code):
        return Job.from_dict(read_json(path))


def train(
    job: Job,
    folder: str | Path,
    *,
    on_step: Callable[[Progress], Any] | None = None,
    on_ready: Callable[[Trainer], Any] | None = None,
    device: str = "auto",
) -> Result:
    """Run a job in a folder, or go on with the one that is there, and save the model beside it.

    Same job, same folder: it goes on from the last checkpoint. Errors are those of ``Corpus.from_paths`` and
    ``Trainer.run``. ``device`` "auto" is the GPU where there is one.
    """
    folder, cfg = arguments.folder(folder), job.train
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        check_training(job.model, cfg.batch // cfg.accumulate, cfg.batch, cfg.context)
    tokenizer = open_tokenizer(job.tokenizer)
    corpus = Corpus.from_paths(job.paths or default_paths(), tokenizer)
    corpus.windows(job.train.context)
    text, held_out = corpus.split(job.held_out, job.train.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.train.seed)
        model = job.model.build().to(device)
    trainer = Trainer(model, text, job.train, folder)
    trainer.resume()
    if not (folder / checkpoint.FILE).is_file():
        atomic_write(folder / JOB, config.dumps(_anywhere(job)))
    if on_ready is not None:
        on_ready(trainer)
    curve = trainer.run(on_step)
    folders.save(model, folder, tokenizer)
    loss, bits = evaluate(model, held_out, min(job.train.context, len(held_out) - 1))
    return Result(folder, model, curve, loss, bits, _opening(held_out))


def _anywhere(job: Job) -> Job:
    """The job with absolute paths, so that it goes on from any folder."""
    paths = tuple(str(Path(path).expanduser().absolute()) for path in job.paths)
    bytewise = job.tokenizer in (None, "bytes")
    return job.replace(paths=paths, tokenizer=job.tokenizer if bytewise else str(Path(job.tokenizer or "").absolute()))


def _opening(text: Corpus) -> str:
    """The first three words or so of a text, to begin a sample with."""
    words = text.tokenizer.decode(text.document(0)[:400].tolist()).replace("\0", "").split()
    return " ".join(words[:3])[:40]
