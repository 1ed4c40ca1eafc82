"""A training run on disk: one safetensors file, replaced whole, with everything that the next step depends on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import shown
from ..files import atomic_save_tensors, parse_json, read_metadata, read_tensors, tensor_checksum
from ..models.identity import plain, plain_name

FILE = "checkpoint.safetensors"
_MODEL, _OPTIMIZER, _RANDOM, _HISTORY = "model.", "optimizer.", "random.", "history"


def collect(model: nn.Module, optimizer: Optimizer, history: Tensor) -> dict[str, Tensor]:
    """All that a run is made of: weights, the optimiser's moments, random states, and the curve so far.

    Names are those of the module inside ``torch.compile`` and the like. Shared parameters are written under each name.
    """
    model = plain(model)
    tensors = {_MODEL + plain_name(name): value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_OPTIMIZER}{key}:{plain_name(name)}"] = value
    tensors[_RANDOM + "cpu"] = torch.get_rng_state()
    if next(model.parameters()).is_cuda:
        tensors[_RANDOM + "cuda"] = torch.cuda.get_rng_state()
    tensors[_HISTORY] = history
    places: set[int] = set()
    return {name: _alone(value, places) for name, value in tensors.items()}


def _alone(tensor: Tensor, places: set[int]) -> Tensor:
    """The tensor on the CPU, in memory that no other one of the file has."""
    whole = tensor.detach().contiguous().cpu()
    place = whole.untyped_storage().data_ptr()
    if place in places or whole.untyped_storage().nbytes() != whole.nbytes:
        return whole.clone()
    places.add(place)
    return whole


def restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: Optimizer) -> tuple[Tensor, dict[str, Tensor]]:
    """Put back what ``collect`` gathered; the history, and the random states for ``restore_random``.

    ``ValueError``, before anything is changed, for tensors that are not those of such a run. Values are copied into
    memory of PyTorch's own: the alignment of a tensor may change how its sums are rounded.
    """
    model = plain(model)
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    _check(tensors, model, parameters)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(tensors[_MODEL + plain_name(name)])
    for name, value in tensors.items():
        if name.startswith(_OPTIMIZER):
            key, _, parameter_name = name[len(_OPTIMIZER) :].partition(":")
            parameter = parameters[parameter_name]
            optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
    random = {name[len(_RANDOM) :]: value.clone() for name, value in tensors.items() if name.startswith(_RANDOM)}
    return tensors[_HISTORY].clone(), random


def _check(tensors: dict[str, Tensor], model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """``ValueError`` unless the tensors are those of a run of this model: names, shapes and dtypes."""
    wanted = {_MODEL + plain_name(name): (value.shape, value.dtype) for name, value in model.state_dict().items()}
    cpu = torch.get_rng_state()
    wanted[_RANDOM + "cpu"] = (cpu.shape, cpu.dtype)
    for name, (shape, dtype) in wanted.items():
        if name not in tensors or tensors[name].shape != shape or tensors[name].dtype != dtype:
            found = f"{list(tensors[name].shape)} of {tensors[name].dtype}" if name in tensors else "nothing"
            raise ValueError(
                f"the checkpoint is of another model: {name} is {found}, expected {list(shape)} of {dtype}"
            )
    for name, value in tensors.items():
        if name.startswith(_OPTIMIZER):
            parameter = parameters.get(name.partition(":")[2])
            right = (
                parameter is not None
                and value.dtype in (torch.float32, parameter.dtype)
                and value.shape in ((), parameter.shape)
                and bool(torch.isfinite(value).all())
            )
            if not right:
                raise ValueError(f"the checkpoint holds {shown(name)}, which is no moment of a parameter of this model")
        elif name != _HISTORY and name not in wanted and name != _RANDOM + "cuda":
            raise ValueError(f"the checkpoint holds {shown(name)}, which no run of this model has")
    history = tensors.get(_HISTORY)
    if history is None or history.dim() != 2 or history.shape[1] != 3 or history.dtype != torch.float64:
        raise ValueError("the checkpoint holds no curve (history [steps 3] in fp64); it was altered")


def restore_random(states: dict[str, Tensor]) -> None:
    """Set PyTorch's random states to those of a checkpoint; nothing for an empty dict."""
    if "cpu" in states:
        try:
            torch.set_rng_state(states["cpu"])
        except RuntimeError as error:
            raise ValueError("the random state of the checkpoint was altered; restore it from a copy") from error
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save(path: Path, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Replace the checkpoint, whole or not at all; ``described`` is plain JSON data that says what the run is."""
    run = json.dumps(described)
    meta = {"format": "everlong-run-2", "run": run, "crc32": str(tensor_checksum(tensors, zlib.crc32(run.encode())))}
    atomic_save_tensors(path, tensors, meta)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a checkpoint; ``ValueError`` where it is truncated or altered."""
    tensors, meta = read_tensors(path), read_metadata(path)
    if meta.get("format") != "everlong-run-2":
        raise ValueError(
            f"{path} is not the checkpoint of a training run of this version; give the folder of one, or train anew"
        )
    run = meta.get("run", "")
    if meta.get("crc32") != str(tensor_checksum(tensors, zlib.crc32(run.encode()))):
        raise ValueError(
            f"{path} was altered since it was written (its checksum differs); "
            "restore it from a copy, or delete it to train anew"
        )
    return tensors, parse_json(run, f"{path}: run")


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
