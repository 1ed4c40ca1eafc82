"""A training run on disk: one safetensors file, replaced whole, with everything that the next step depends on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..files import atomic_save_tensors, read_tensors

FILE = "checkpoint.safetensors"
_MODEL, _OPTIMIZER, _RANDOM, _HISTORY = "model.", "optimizer.", "random.", "history"


def collect(model: nn.Module, optimizer: Optimizer, history: Tensor) -> dict[str, Tensor]:
    """All that a run is made of: weights, the optimiser's moments, random states, and the curve so far."""
    tensors = {_MODEL + name: value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_OPTIMIZER}{key}:{name}"] = value
    tensors[_RANDOM + "cpu"] = torch.get_rng_state()
    if next(model.parameters()).is_cuda:
        tensors[_RANDOM + "cuda"] = torch.cuda.get_rng_state()
    tensors[_HISTORY] = history
    return {name: value.detach().contiguous().cpu() for name, value in tensors.items()}


def restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: Optimizer) -> tuple[Tensor, dict[str, Tensor]]:
    """Put back what ``collect`` gathered; the history, and the random states for ``restore_random``.

    Values are copied into memory of PyTorch's own: the alignment of a tensor may change how its sums are rounded.
    """
    weights = {name[len(_MODEL) :]: value for name, value in tensors.items() if name.startswith(_MODEL)}
    model.load_state_dict(weights)
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name.startswith(_OPTIMIZER):
            key, _, parameter_name = name[len(_OPTIMIZER) :].partition(":")
            parameter = parameters[parameter_name]
            optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
    random = {name[len(_RANDOM) :]: value.clone() for name, value in tensors.items() if name.startswith(_RANDOM)}
    return tensors[_HISTORY].clone(), random


def restore_random(states: dict[str, Tensor]) -> None:
    """Set PyTorch's random states to those of a checkpoint; nothing for an empty dict."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save(path: Path, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Replace the checkpoint, whole or not at all; ``described`` is plain JSON data that says what the run is."""
    meta = {"format": "everlong-run-1", "run": json.dumps(described), "crc32": str(_checksum(tensors))}
    atomic_save_tensors(path, tensors, meta)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a checkpoint; ``ValueError`` where it is truncated or altered."""
    from safetensors import safe_open

    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
    if meta.get("format") != "everlong-run-1":
        raise ValueError(f"{path} is not the checkpoint of a training run; give the folder of one")
    if meta.get("crc32") != str(_checksum(tensors)):
        raise ValueError(
            f"{path} was altered since it was written (its checksum differs); "
            "restore it from a copy, or delete it to train anew"
        )
    return tensors, json.loads(meta["run"])


def _checksum(tensors: dict[str, Tensor]) -> int:
    checksum = 0
    for _, value in sorted(tensors.items()):
        checksum = zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished files that a killed process left behind."""
    for name in (FILE, "metrics.jsonl"):
        for leftover in folder.glob(f".{name}.*"):
            leftover.unlink(missing_ok=True)


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Where two pieces of JSON data differ: ``"train.lr was 0.001, is 0.002"``."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from differences(old, new, f"{path}[{index}]")
    elif before != now:
        yield f"{path} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"a {value['kind']}" if isinstance(value, dict) and "kind" in value else repr(value)
