"""Peak memory, each point in a process of its own:  ``python -m everlong.bench.memory read|loss < settings.json``.

``read`` reads a text of random tokens in pieces; ``loss`` takes the loss of a small model with a large vocabulary,
forward and backward, without ever holding all its logits. Both print JSON.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..config import find
from ..models.blocks import Layer
from ..models.lm import LanguageModel

Row = dict[str, Any]
LOSS_TOKENS, LOSS_VOCABULARY = 8192, 50280


def by_length(name: str, cfg: LanguageModel.Config, lengths: tuple[int, ...]) -> list[Row]:
    """Peak memory of a process that builds the model (fp32, random weights) and reads a text of each length."""
    rows = []
    for length in lengths:
        settings = {"model": cfg.to_dict(), "length": length, "threads": torch.get_num_threads()}
        about = {"measure": "memory", "model": name, "engine": "everlong", "weights": "fp32", "length": length}
        rows.append({**about, "status": "timed", "reason": None, "error": None, **measured("read", settings)})
    return rows


def loss_rows() -> list[Row]:
    """The memory that the loss and its gradients take, beside that of all logits at once."""
    layer = Layer.Config(mixer=find("lru").Config())
    cfg = LanguageModel.Config(vocab_size=LOSS_VOCABULARY, d_model=64, layers=(layer,))
    settings = {"model": cfg.to_dict(), "length": LOSS_TOKENS, "threads": torch.get_num_threads()}
    about = {"measure": "loss", "model": f"width 64, vocabulary {LOSS_VOCABULARY:,}", "engine": "everlong"}
    fixed = {"weights": "fp32", "length": LOSS_TOKENS, "status": "timed", "reason": None, "error": None}
    return [{**about, **fixed, **measured("loss", settings), "logits_bytes": 4 * LOSS_TOKENS * LOSS_VOCABULARY}]


def measured(what: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The figures of a process of its own. ``RuntimeError`` with its last words where it failed."""
    start = f"import sys; sys.path[:] = filter(None, sys.path); from {__name__} import main; main()"
    done = subprocess.run(  # the folder one is in is not on the path of that process
        [sys.executable, "-c", start, what], input=json.dumps(settings), capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"measuring memory ({what}) failed: {last}")
    return json.loads(done.stdout)


def peak_bytes() -> int:
    """The most memory this process has held so far.

    From Linux itself where it says so: ``getrusage`` there counts what the process that started this one held.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return held if sys.platform == "darwin" else held * 1024


def forget_peak() -> None:
    """Let the peak begin anew, where Linux allows it: building a model may take more than using it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _read(model: LanguageModel, length: int) -> dict[str, Any]:
    tokens = torch.randint(0, model.cfg.vocab_size, (1, length))
    forget_peak()
    model.read(tokens)
    return {"peak_bytes": peak_bytes()}


def _loss(model: LanguageModel, length: int) -> dict[str, Any]:
    tokens = torch.randint(0, model.cfg.vocab_size, (1, length + 1))
    model.loss(tokens[:, :64], tokens[:, 1:65]).backward()
    forget_peak()
    before = peak_bytes()
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    return {"peak_bytes": peak_bytes(), "taken_bytes": peak_bytes() - before}


def main() -> None:
    """Measure what the command line says on the settings in standard input."""
    settings = json.load(sys.stdin)
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    model = LanguageModel.Config.from_dict(settings["model"]).build()
    print(json.dumps({"read": _read, "loss": _loss}[sys.argv[1]](model, settings["length"])))


if __name__ == "__main__":
    main()
