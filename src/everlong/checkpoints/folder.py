"""Models in folders: ``config.json`` and ``model.safetensors`` (and ``tokenizer.json`` where it is not bytes).

Bit-equal, never pickle. The config records length and checksum of the other files, and a fingerprint of itself and the
weights, so that what was truncated or altered is refused.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import shown
from ..blocks import shared
from ..config import reading, suggest
from ..files import atomic_together, json_checksum, locked, read_json, read_tensors, save_tensors, versions
from ..machine import require_memory
from ..models.identity import fingerprint, record
from ..models.lm import LanguageModel
from ..models.quantize import quantized
from ..models.sizes import size
from ..ops.native.product import check_format
from ..tokenizer import FILE, ByteTokenizer, FileTokenizer, open_tokenizer
from .savable import FLOATS, check_dtypes, hollow, savable

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ALIKE = 64  # layers for one with tensors of its own, where blocks share theirs
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
ENTRIES = {"format", "fingerprint", "weights", "quantized", "tokenizer", "model"}


def save(model: nn.Module, folder: str | Path, tokenizer: FileTokenizer | ByteTokenizer | None = None) -> None:
    """Write ``model`` to ``folder`` (made where missing); a kill meanwhile leaves the earlier model, or this one.

    Compiled and parallel wrappers are taken off. Without ``tokenizer`` the one that lies there stays. ``ValueError``
    for a model that loading would not give back (see ``savable``); ``OSError`` where a file cannot be written;
    those of an earlier save are then intact.
    """
    folder = Path(folder)
    found, tensors = savable(model)
    tensors = {name: _compact(tensor) for name, tensor in tensors.items()}
    names = [WEIGHTS, *([FILE] if isinstance(tokenizer, FileTokenizer) else []), CONFIG]
    removed = [folder / FILE] if isinstance(tokenizer, ByteTokenizer) else []
    with atomic_together(*(folder / name for name in names), removed=removed) as (weights, *vocabulary, config):
        save_tensors(weights, tensors, {"format": "pt"})
        for path in vocabulary:
            path.write_text(tokenizer.library.to_str(), encoding="utf-8")  # type: ignore[union-attr]
        if tokenizer is None:
            entry = _tokenizer_entry(folder)
        else:
            entry = {"tokenizer": _described(vocabulary[0]) if vocabulary else None}
        data = {
            "format": "everlong-1",
            "fingerprint": f"{json_checksum(found.cfg.to_dict())}-{fingerprint(found).partition('-')[2]}",
            "weights": _described(weights),
            **({} if found.weights is None else {"quantized": found.weights}),
            **entry,
            "model": found.cfg.to_dict(),
        }
        config.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _tokenizer_entry(folder: Path) -> dict[str, Any]:
    """What the config in ``folder`` says of the tokenizer that lies there: its description, None for bytes, or nothing.

    Where it does not know the file, the file counts.
    """
    with contextlib.suppress(ValueError):
        data = read_config(folder)
        if "tokenizer" in data and (data["tokenizer"] is None or _saved_file(folder / FILE, data["tokenizer"])):
            return {"tokenizer": data["tokenizer"]}
    return {"tokenizer": _described(folder / FILE)} if (folder / FILE).is_file() else {}


def _compact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, alone in its memory."""
    whole = tensor.contiguous().cpu()
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    weights: str | None = None,
    trust_code: bool = False,
) -> LanguageModel:
    """The model saved in ``folder``, in evaluation mode; ``dtype`` converts its weights.

    ``weights`` instead says in which format they are used: "fp32", "bf16", or quantised, "int8" or "int4" (see
    ``models.quantize``). A model that was saved quantised is loaded as it was. A folder is data: where its config names
    code that is not Everlong's, that code runs only with ``trust_code``. ``ValueError`` for a folder without a model,
    an unknown config key or format, weights that are truncated, altered, of another shape, or not finite.
    """
    with locked(Path(folder)):
        data = read_config(folder)
        saved, known = data.get("quantized"), data.get("fingerprint")
        _check_formats(folder, saved, weights, dtype)
        path = _saved_file(Path(folder) / WEIGHTS, data.get("weights"))
        with reading(Path(folder) / CONFIG, trust_code=trust_code):
            cfg = LanguageModel.Config.from_dict(data["model"])
        tensors = read_tensors(path)
    _check_size(cfg, tensors, path)
    model = hollow(cfg, saved)
    tensors |= {name: tensors[first] for name, first in shared.stands_for(model).items() if first in tensors}
    _check_tensors(model, tensors, path)
    model.load_state_dict(tensors, assign=True)
    check_dtypes(model)
    for parameter in model.parameters():
        parameter.requires_grad_(saved is None and parameter.is_floating_point())
    bits = 8 * dtype.itemsize if dtype is not None else BITS.get(weights or "", 0) if weights != saved else 0
    require_memory(sum(x.numel() for x in tensors.values()) * bits // 8, "to convert the weights", "use them as saved")
    model = model.to(device=device, dtype=dtype).eval()
    if known is not None and "weights" in data:
        record(model, known)
    return model if weights in (None, saved) else quantized(model, weights)


def _check_formats(folder: str | Path, saved: str | None, weights: str | None, dtype: torch.dtype | None) -> None:
    if saved is not None:
        check_format(saved)
    if weights is not None:
        check_format(weights)
        if dtype is not None:
            raise ValueError(f"give weights = {weights!r} or dtype = {dtype}, not both")
    if saved is not None and (weights not in (None, saved) or dtype not in (None, torch.float32)):
        wanted = f"weights = {weights!r}" if weights else f"dtype = {dtype}"
        raise ValueError(
            f"the weights in {folder} were saved as {saved} and cannot be loaded with {wanted}; "
            "load the folder of the model in full precision"
        )


def load_tokenizer(folder: str | Path) -> FileTokenizer | ByteTokenizer:
    """The tokenizer saved beside a model: its ``tokenizer.json``, or bytes. ``ValueError`` where it was altered."""
    with locked(Path(folder)):
        data = read_config(folder)
        if "tokenizer" not in data:
            return open_tokenizer(folder)
        recorded = data["tokenizer"]
        return ByteTokenizer() if recorded is None else FileTokenizer(_saved_file(Path(folder) / FILE, recorded))


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked contents of ``config.json``."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"no model in {folder} ({CONFIG} is missing); give a folder written by everlong.save")
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != "everlong-1" or "model" not in data:
        raise ValueError(f"{path} does not describe an Everlong model (format 'everlong-1' and a 'model')")
    if odd := sorted(set(data) - ENTRIES):
        raise ValueError(f"{path} has an entry {shown(odd[0])}{suggest(odd[0], ENTRIES)}")
    for name in ("weights", "tokenizer"):
        if name in data and not (_is_description(data[name]) or (name == "tokenizer" and data[name] is None)):
            raise ValueError(f"{path}: {name} is {shown(data[name])}, expected its length and checksum")
    for name in ("quantized", "fingerprint"):
        if name in data and not isinstance(data[name], str):
            raise ValueError(f"{path}: {name} is {shown(data[name])}, expected a text")
    if "fingerprint" in data and data["fingerprint"].partition("-")[0] != json_checksum(data["model"]):
        raise ValueError(
            f"{path} was altered since it was saved: its model is not that of its fingerprint; copy it again, or, "
            "where you changed it on purpose, delete the line of the fingerprint"
        )
    return data


def _is_description(data: Any) -> bool:
    """Whether this is what ``_described`` gives."""
    return isinstance(data, dict) and set(data) == {"bytes", "crc32"} and all(type(n) is int for n in data.values())


def _described(path: Path) -> dict[str, int]:
    """Length and checksum of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": checksum}


def _saved_file(path: Path, expected: dict[str, int] | None) -> Path:
    """Where the file lies that was described, or any of that name where none was; ``ValueError`` where it does not."""
    found = None
    for candidate in versions(path):
        if candidate.is_file():
            described = _described(candidate)
            if expected in (None, described):
                return candidate
            found = found or described
    if found is None or expected is None:
        raise ValueError(f"{path.parent} holds a {CONFIG} but no {path.name}; copy it there, or save the model again")
    raise ValueError(
        f"{path} is not the file that was saved ({found['bytes']} bytes, checksum {found['crc32']}; expected "
        f"{expected['bytes']}, {expected['crc32']}); it was truncated or altered, copy it again"
    )


def _check_size(cfg: LanguageModel.Config, tensors: dict[str, Tensor], path: Path) -> None:
    """The config is of about the size of the file: what it asks for is bounded before any of it is made."""
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    most = len(layers) * (ALIKE if any(layer.blocks for layer in cfg.layers) else 1)
    if not len(layers) <= len(cfg.layers) <= most:
        raise ValueError(f"{path} does not fit its config: it has {len(layers)} layers, expected {len(cfg.layers)}")
    try:
        needed = size(cfg, 4 * sum(x.numel() for x in tensors.values()))
    except ValueError as error:
        raise ValueError(f"{path} does not fit its config: {error}") from error
    require_memory(needed.state, "the state of one text", "the config is not that of a model for this machine")


def _check_tensors(model: LanguageModel, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = model.state_dict()
    odd = sorted(set(wanted) ^ set(tensors))
    if odd:
        raise ValueError(f"{path} does not fit its config: {len(odd)} tensors differ, first {shown(odd[0])}")
    for name, want in wanted.items():
        got = tensors[name]
        if got.shape != want.shape:
            raise ValueError(
                f"{path} does not fit its config: {name} has shape {list(got.shape)}, expected {list(want.shape)}"
            )
        exact = model.weights is not None or not want.is_floating_point()
        if got.dtype != want.dtype if exact else got.dtype not in FLOATS:
            raise ValueError(f"{path} does not fit its config: {name} has dtype {got.dtype}, expected {want.dtype}")
        if got.is_floating_point() and not bool(torch.isfinite(got).all()):
            raise ValueError(f"{path}: {name} holds NaN or infinity; training diverged or the file was altered")
