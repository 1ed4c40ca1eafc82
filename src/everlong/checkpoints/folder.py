"""Models in folders: ``config.json`` and ``model.safetensors`` (and ``tokenizer.json`` where it is not bytes).

Bit-equal, never pickle. The config records the length and checksum of the weights, so that a truncated or
altered file is refused.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_together, read_tensors, save_tensors
from ..models.lm import LanguageModel
from ..models.quantize import prepare, quantized
from ..ops.native.product import check_format
from ..tokenizer import FILE, ByteTokenizer, FileTokenizer, open_tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: LanguageModel, folder: str | Path, tokenizer: FileTokenizer | ByteTokenizer | None = None) -> None:
    """Write ``model`` to ``folder`` (made where missing): all of its files, or none.

    Without ``tokenizer`` the one that lies there stays. ``OSError`` where a file cannot be written; those of an
    earlier save are then intact.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    names = [WEIGHTS, CONFIG, *([FILE] if isinstance(tokenizer, FileTokenizer) else [])]
    with atomic_together(*(folder / name for name in names)) as (weights, config, *vocabulary):
        save_tensors(weights, tensors, {"format": "pt"})
        size, checksum = _fingerprint(weights)
        quantised = {} if model.weights is None else {"quantized": model.weights}
        fingerprint = {"bytes": size, "crc32": checksum}
        data = {"format": "everlong-1", "weights": fingerprint, **quantised, "model": model.cfg.to_dict()}
        config.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        for path in vocabulary:
            path.write_text(tokenizer.library.to_str(), encoding="utf-8")  # type: ignore[union-attr]
    if isinstance(tokenizer, ByteTokenizer):
        (folder / FILE).unlink(missing_ok=True)


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    weights: str | None = None,
) -> LanguageModel:
    """The model saved in ``folder``, in evaluation mode; ``dtype`` converts its weights.

    ``weights`` instead says in which format they are used: "fp32", "bf16", or quantised, "int8" or "int4" (see
    ``models.quantize``). A model that was saved quantised is loaded as it was. ``ValueError`` for a folder without a
    model, an unknown config key or format, weights that are truncated, altered, of another shape, or not finite.
    """
    data = read_config(folder)
    saved = data.get("quantized")
    _check_formats(folder, saved, weights, dtype)
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} holds a {CONFIG} but no {WEIGHTS}; copy it there, or save the model again")
    size, checksum = _fingerprint(path)
    expected = data.get("weights", {})
    if (size, checksum) != (expected.get("bytes", size), expected.get("crc32", checksum)):
        raise ValueError(
            f"{path} is not the file that was saved ({size} bytes, checksum {checksum}; expected "
            f"{expected.get('bytes')}, {expected.get('crc32')}); it was truncated or altered, copy it again"
        )
    tensors = read_tensors(path)
    with torch.device("meta"):
        model = LanguageModel.Config.from_dict(data["model"]).build()
        if saved is not None:
            prepare(model.float(), saved)  # packed weights stay beside fp32, whatever the default
    _check_tensors(model, tensors, path)
    model.load_state_dict(tensors, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(saved is None and parameter.is_floating_point())
    model = model.to(device=device, dtype=dtype).eval()
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
    """The tokenizer saved beside a model: its ``tokenizer.json``, or bytes."""
    read_config(folder)
    return open_tokenizer(folder)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked contents of ``config.json``."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"no model in {folder} ({CONFIG} is missing); give a folder written by everlong.save")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it was truncated or altered") from error
    if not isinstance(data, dict) or data.get("format") != "everlong-1" or "model" not in data:
        raise ValueError(f"{path} does not describe an Everlong model (format 'everlong-1' and a 'model')")
    return data


def _fingerprint(path: Path) -> tuple[int, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def _check_tensors(model: LanguageModel, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = model.state_dict()
    odd = sorted(set(wanted) ^ set(tensors))
    if odd:
        raise ValueError(f"{path} does not fit its config: {len(odd)} tensors differ, first {odd[0]!r}")
    for name, want in wanted.items():
        got = tensors[name]
        if got.shape != want.shape:
            raise ValueError(
                f"{path} does not fit its config: {name} has shape {list(got.shape)}, expected {list(want.shape)}"
            )
        if model.weights is not None and got.dtype != want.dtype:
            raise ValueError(f"{path} does not fit its config: {name} has dtype {got.dtype}, expected {want.dtype}")
        if got.is_floating_point() and not bool(torch.isfinite(got).all()):
            raise ValueError(f"{path}: {name} holds NaN or infinity; training diverged or the file was altered")
