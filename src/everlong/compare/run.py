"""The main job: train each architecture on the same text, measure what it learnt, remembers and costs, and report.

Everything lies in one folder: ``results.json``, written anew after every stage; ``report.html``; and a folder for each
model, which ``everlong generate`` opens. A run that is interrupted reports what it has, and the same call goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..arguments import folder, texts
from ..checkpoints import folder as folders
from ..files import atomic_write, read_sealed, sealed
from ..generation.generate import generate
from ..generation.sampler import Sampling
from ..machine import machine
from ..models.lm import LanguageModel
from ..report.html import write_report
from ..report.terminal import STATE_AT, Board, summary
from ..tokenizer import ByteTokenizer
from ..train.checkpoint import FILE, differences
from ..train.data import Corpus, default_paths
from ..train.loop import Progress, Stopped, Trainer
from . import cost, measure
from .architectures import DEFAULT, architecture, count, describe, equation, sized
from .settings import Settings

RESULTS, REPORT = "results.json", "report.html"
POINTS = 120  # of a learning curve
PROMPTS = ("def read_csv(", "import os\nimport ", "class Stack:\n    ")
BLOCKS = ("training", "text", "samples", "recall", "state_bytes", "prefill", "decode")


class Comparison:
    """A comparison in the folder ``out``; ``run()`` does what is not done yet.

    ``data`` None is the source of the running Python's standard library. ``ValueError`` for unknown names, numbers of
    parameters that cannot be had, text that is too short, and a folder with the results of other settings.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        names: str | Sequence[str] = DEFAULT,
        data: str | Path | Sequence[str | Path] | None = None,
        settings: Settings = Settings(),
        command: str = "",
        console: Console | None = None,
    ) -> None:
        data = [data] if isinstance(data, (str, Path)) else data
        self.out, self.names, self.settings = folder(out), _checked(texts("names", names)), settings
        self.console = console or Console()
        self.configs = {
            name: sized(name, settings.params, vocab_size=256, context=settings.context) for name in self.names
        }
        corpus = Corpus.from_paths(default_paths() if data is None else data)
        self.train, self.held_out, self.runs = _divided(corpus, settings)
        self.prompts = PROMPTS if data is None else _openings(self.held_out)
        self.results = self._opened()
        self.results.update(command=command, machine=machine(), settings=self._described(corpus, data))
        self._shown: dict[str, dict[str, Any]] = {}
        self.board = Board({name: architecture(name).title for name in self.names}, self.console)

    def _described(self, corpus: Corpus, data: Sequence[str | Path] | None) -> dict[str, Any]:
        cfg = self.settings
        return {
            "data": ["the Python standard library's source"] if data is None else [str(path) for path in data],
            "data_bytes": corpus.nbytes,
            "data_files": corpus.documents,
            "train_tokens": cfg.training().steps * cfg.batch * cfg.context,
            "context": cfg.context,
            "batch": cfg.batch,
            "params": cfg.params,
            "seed": cfg.seed,
            "quick": cfg.quick,
            "optimizer": cfg.optimizer,
            "held_out_bytes": self.held_out.nbytes,
        }

    def _opened(self) -> dict[str, Any]:
        """The results so far, or new ones; models of an earlier call that are not asked for now are kept."""
        run = {"settings": self.settings.to_dict(), "text": self.train.fingerprint}
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        new: dict[str, Any] = {"version": 1, "created": now, "complete": False, "run": run, "models": []}
        results = _read(self.out / RESULTS) or new
        if found := list(differences(results["run"], json.loads(json.dumps(run)))):
            raise ValueError(
                f"{self.out} holds a comparison with other settings: {'; '.join(found[:5])}. "
                "Give the same settings to go on with it, or a new folder with --out"
            )
        known = {model["name"] for model in results["models"]}
        results["models"] += [self._pending(name) for name in self.names if name not in known]
        return results

    def _pending(self, name: str) -> dict[str, Any]:
        cfg = self.configs[name]
        with torch.device("meta"):
            memory = cfg.build().memory
        return {
            "name": name,
            "title": architecture(name).title,
            "layers": describe(cfg),
            "equation": equation(cfg),
            "memory": memory,
            "params": count(cfg),
            "status": "pending",
        }

    def run(self) -> dict[str, Any]:
        """The results, also in ``results.json`` and ``report.html``; ``complete`` is False after Ctrl-C."""
        try:
            with self.board:
                for name in self.names:
                    self._show(name)
                for stages in ((self._train, self._text, self._samples), (self._recall,), (self._state, self._speed)):
                    for name in self.names:
                        for stage in stages:
                            stage(name)
                        self._show(name)
        except KeyboardInterrupt:
            self.console.print("interrupted; writing the report of what there is", style="yellow")
        self.save()
        write_report(self.results, self.out / REPORT)
        return self.results

    def save(self) -> None:
        """Write ``results.json``, whole or not at all."""
        for model in self.results["models"]:
            model["status"] = self._status(model)
        self.results["complete"] = all(model["status"] == "complete" for model in self.results["models"])
        self.results = sealed(self.results)
        atomic_write(self.out / RESULTS, json.dumps(self.results, indent=1) + "\n")

    def _status(self, model: dict[str, Any]) -> str:
        if all(block in model for block in BLOCKS) and self._trained(model):
            return "complete"
        return "partial" if any(block in model for block in BLOCKS) else "pending"

    def _trained(self, model: dict[str, Any]) -> bool:
        return model.get("training", {}).get("tokens", 0) >= self.results["settings"]["train_tokens"]

    def _model(self, name: str) -> dict[str, Any]:
        return next(model for model in self.results["models"] if model["name"] == name)

    def _folder(self, name: str) -> Path:
        return self.out / name.replace(":", "-")

    def _show(self, name: str) -> None:
        """What is newly known of a model, on the board, under the stage that made it; then the stage is over."""
        model = self._model(name)
        text, speed, decode = model.get("text", {}), model.get("prefill"), model.get("decode")
        columns = {
            "params": model["params"],
            "train": model.get("training", {}).get("tokens_per_second"),
            "held_out": text.get("bits_per_byte"),
            "recall": _mean([right for _, right in model.get("recall", {}).get("pairs", [])]),
            "state": dict(model.get("state_bytes", {}).get("computed", [])).get(STATE_AT),
            "prefill": speed[-1][1] if speed else None,
            "decode": decode[-1]["p50_ms"] if decode else None,
        }
        shown = self._shown.setdefault(name, {})
        self.board.update(name, **{key: value for key, value in columns.items() if value not in (None, shown.get(key))})
        shown.update(columns)
        self.board.update(name, status={"partial": "waiting", "complete": "done"}.get(self._status(model), "waiting"))

    def _train(self, name: str) -> None:
        """Learn the text, from the last checkpoint; the model is saved for ``everlong generate``."""
        if self._trained(self._model(name)):
            return
        torch.manual_seed(self.settings.seed)
        model, path = self.configs[name].build(), self._folder(name) / "training"
        trainer = Trainer(model, self.train, self.settings.training(), path)
        try:
            curve = trainer.run(self._watch(name, "training"))
        except Stopped as stopped:
            self._model(name)["training"] = _training(stopped.curve)
            raise
        folders.save(model, self._folder(name))
        self._store(name, training=_training(curve))
        (path / FILE).unlink(missing_ok=True)  # the curve stays, in metrics.jsonl

    def _watch(self, name: str, stage: str) -> Callable[[Progress], None]:
        def watch(progress: Progress) -> None:
            columns = (
                {}
                if progress.bits_per_byte is None
                else {"train": progress.tokens_per_second, "loss": progress.bits_per_byte}
            )
            self.board.update(name, status=stage, progress=progress.step / progress.steps, **columns)

        return watch

    def _store(self, name: str, **blocks: Any) -> None:
        self._model(name).update(blocks)
        self.save()

    def _begin(self, name: str, status: str, block: str) -> LanguageModel | None:
        """The trained model if ``block`` is still to be measured."""
        if block in self._model(name):
            return None
        self.board.update(name, status=status)
        return folders.load(self._folder(name))

    def _text(self, name: str) -> None:
        if model := self._begin(name, "testing", "text"):
            self._store(name, text=measure.text(model, self.runs))

    def _samples(self, name: str) -> None:
        if model := self._begin(name, "writing", "samples"):
            written = [{"prompt": prompt, "text": self._sample(model, prompt)} for prompt in self.prompts]
            self._store(name, samples=written)

    def _sample(self, model: LanguageModel, prompt: str) -> str:
        """A continuation of ``prompt``; every model draws with the same seed."""
        tokenizer, cfg = ByteTokenizer(), self.settings
        sampling = Sampling(temperature=0.7, top_p=0.9, seed=cfg.seed)
        ids = [0, *tokenizer.encode(prompt)]  # a document begins with its separator
        made = generate(model, ids, max_tokens=cfg.sample_tokens, sampling=sampling, stop_ids=(0,))
        return tokenizer.decode(list(made))

    def _recall(self, name: str) -> None:
        """A small model of the same architecture learns MQAR anew; it takes seconds, so it is not resumed within."""
        if "recall" in self._model(name):
            return
        cfg, seed = self.settings.recall, self.settings.seed
        torch.manual_seed(seed)
        shape = sized(name, cfg.params, vocab_size=cfg.vocab_size, context=4 * max(cfg.tests))
        model = cfg.model(shape).build()
        watch = self._watch(name, "recall")
        learnt = measure.learn(Trainer(model, cfg.task().build(), cfg.training(seed)), cfg.enough, watch)
        self._store(
            name,
            recall={
                "chance": measure.chance(cfg.task()),
                "train_tokens": learnt.tokens,
                "finished": learnt.finished,
                "train_pairs": max(cfg.pairs),
                "pairs": [[n, measure.recall_accuracy(model, cfg.test(n), cfg.sequences, seed)] for n in cfg.tests],
            },
        )

    def _state(self, name: str) -> None:
        if model := self._begin(name, "measuring", "state_bytes"):
            lengths = tuple(length for length in self.settings.lengths if 1024 <= length <= 4096)
            measured = cost.measured_bytes(model, self._prompt(), lengths)
            self._store(name, state_bytes={"computed": cost.computed_bytes(model), "measured": measured})

    def _speed(self, name: str) -> None:
        if model := self._begin(name, "measuring", "decode"):
            cfg = self.settings
            found = cost.speed(model, self._prompt(), cfg.lengths, seconds=cfg.seconds, steps=cfg.decode_steps)
            self._store(name, **found._asdict())

    def _prompt(self) -> torch.Tensor:
        """Held-out text [1 T]."""
        return self.runs.batch.tokens.flatten()[None]


def compare(
    out: str | Path | None = None,
    *,
    names: str | Sequence[str] = DEFAULT,
    data: str | Path | Sequence[str | Path] | None = None,
    settings: Settings = Settings(),
    command: str = "",
) -> bool:
    """Run a comparison (see ``Comparison``), print its summary, and say whether it is complete.

    ``out`` None is ``runs/compare``, or ``runs/quick`` for quick settings.
    """
    folder = Path(out) if out is not None else Path("runs", "quick" if settings.quick else "compare")
    console = Console()
    comparison = Comparison(folder, names=names, data=data, settings=settings, command=command, console=console)
    results = comparison.run()
    console.print()
    summary(results, folder / REPORT, console)
    return results["complete"]


def _divided(corpus: Corpus, cfg: Settings) -> tuple[Corpus, Corpus, measure.Runs]:
    """Text to learn, text held out (more than ``held_out`` of a short one), and its stretches to measure on."""
    share = max(cfg.held_out, min(0.25, 8 * cfg.context / len(corpus)))
    try:
        train, held_out = corpus.split(share, cfg.seed)
        train.windows(cfg.context)
        return train, held_out, measure.held_out_runs(held_out, cfg.context, cfg.runs, cfg.seed)
    except ValueError as error:
        raise ValueError(
            f"the text has {corpus.nbytes:,} bytes, too few to train on sequences of {cfg.context} tokens and to hold "
            f"out a quarter for measuring; give at least {8 * cfg.context:,} bytes with --data"
        ) from error


def _checked(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each known and only once."""
    if not names:
        raise ValueError("no architectures to compare; name at least one, as in --mixers attention,mamba2")
    for name in names:
        architecture(name)
        if names.count(name) > 1:
            raise ValueError(f"{name} is named twice; name each architecture once")
    return tuple(names)


def _read(path: Path) -> dict[str, Any] | None:
    """The results in a file, None where there is none. ``ValueError`` where it is something else."""
    if not path.exists():
        return None
    try:
        results = read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as results ({error}); give another folder with --out") from error
    models = results.get("models")
    named = isinstance(models, list) and all(isinstance(m, dict) and isinstance(m.get("name"), str) for m in models)
    if type(results.get("version")) is not int or results["version"] != 1 or "run" not in results or not named:
        raise ValueError(f"{path} does not hold the results of a comparison; give another folder with --out")
    return results


def _training(curve: Sequence[Progress]) -> dict[str, Any]:
    """The block ``training``: the speed is the median of the steps, the curve the means of ``POINTS`` equal parts."""
    if not curve:
        return {"tokens": 0, "seconds": 0.0, "tokens_per_second": None, "curve": []}
    speeds = sorted(progress.tokens_per_second for progress in curve)
    size = max(1, len(curve) // POINTS)
    parts = [curve[at : at + size] for at in range(0, len(curve), size)]
    means = [[part[-1].tokens, _mean([p.bits_per_byte for p in part if p.bits_per_byte is not None])] for part in parts]
    return {
        "tokens": curve[-1].tokens,
        "seconds": curve[-1].seconds,
        "tokens_per_second": speeds[len(speeds) // 2],
        "curve": means,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _openings(held_out: Corpus, size: int = 40) -> tuple[str, ...]:
    """The first characters of three held-out documents, the separator left out."""
    tokenizer = held_out.tokenizer
    skipped = 0 if tokenizer.eos is None else 1
    texts = (
        tokenizer.decode(held_out.document(index)[skipped : size + skipped].tolist())
        for index in range(min(3, held_out.documents))
    )
    return tuple(text for text in texts if text.strip())
