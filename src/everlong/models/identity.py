"""Which model this is: the module itself behind wrappers, and a fingerprint of its configuration and weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..files import json_checksum, tensor_checksum
from .lm import LanguageModel


def plain(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``; any other as it is."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in getattr(model, "__dict__", {}).get("_modules", ()):  # torch.compile, not imported here
            model = vars(model)["_modules"]["_orig_mod"]
        else:
            return model


def plain_name(name: str) -> str:
    """The name of a tensor without the traces of ``torch.compile`` on parts of a model."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def fingerprint(model: nn.Module) -> str:
    """A short text that another configuration or other weights (almost surely) do not have.

    A model from a folder has the fingerprint recorded there, in whatever format its weights are used, until they are
    changed; else it is computed, a second for each gigabyte or so, and remembered as long as the weights stay.
    """
    found: Any = plain(model)
    if (known := recorded(found)) is not None:
        return known
    tensors = {plain_name(name): tensor for name, tensor in found.state_dict().items()}
    made = f"{json_checksum(found.cfg.to_dict())}-{tensor_checksum(tensors):08x}"
    record(found, made)
    return made


def recorded(model: LanguageModel) -> str | None:
    """The fingerprint where it is known and the weights are those it was taken of."""
    known, marks, cfg = model._fingerprint or (None, None, None)
    return known if marks is not None and cfg is model.cfg and marks == _marks(model) else None


def record(model: LanguageModel, known: str) -> None:
    """Remember that the model, as it now is, has this fingerprint."""
    model._fingerprint = (known, _marks(model), model.cfg)


def _marks(model: nn.Module) -> list[tuple[int, int]] | None:
    """Where every tensor lies and how often it was written; None where PyTorch does not count."""
    tensors = model.state_dict().values()
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
