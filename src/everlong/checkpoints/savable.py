"""What a folder can give back: the weights of a model by name, or the reason why it cannot be saved."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import shared
from ..models.identity import plain, plain_name
from ..models.lm import LanguageModel
from ..models.quantize import prepare
from ..shapes import extent

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def hollow(cfg: LanguageModel.Config, format: str | None) -> LanguageModel:
    """A model of this configuration whose weights, in ``format`` or None for floating ones, are still to be loaded."""
    with torch.device("meta"):
        model = cfg.build()
        if format is not None:
            prepare(model.float(), format)  # packed weights stay beside fp32, whatever the default
    return model


def savable(model: nn.Module) -> tuple[LanguageModel, dict[str, Tensor]]:
    """The model behind wrappers, and its tensors by the names that its configuration gives them.

    ``ValueError`` where loading would give another model: a class of its own, parts that the configuration does not
    name, shared tensors, tensors without values, dtypes that do not work together.
    """
    found: Any = plain(model)
    if not isinstance(found, LanguageModel) or type(found) is not found.cfg.owner:
        raise ValueError(
            f"a {type(found).__name__} cannot be saved, because its folder would be loaded as a LanguageModel; give "
            "the LanguageModel inside it, with adapters merged"
        )
    _check_config(found)
    tensors = {plain_name(name): tensor.detach() for name, tensor in found.state_dict().items()}
    wanted = found._built
    if odd := sorted(set(wanted) ^ set(tensors)):
        raise ValueError(
            f"{odd[0]} {'is not what the config describes' if odd[0] in tensors else 'is missing'} "
            f"({len(odd)} such tensors), so loading would give another model; undo or merge what was changed in it"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name]:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but the config says {list(wanted[name])}")
        if tensor.is_meta:
            raise ValueError(f"{name} has no values (it is on the device 'meta'); load or initialise them first")
    tensors = _once(found, tensors)
    _check_shared(tensors)
    check_dtypes(found)
    return found, tensors


def _once(model: LanguageModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what blocks of one name share, but for the first of them."""
    stands_for = {plain_name(name): plain_name(first) for name, first in shared.stands_for(model).items()}
    for name, first in stands_for.items():
        if tensors[name].data_ptr() != tensors[first].data_ptr():
            raise ValueError(
                f"{name} and {first} belong to blocks that share their weights and are two tensors, and loading would "
                "give one; change the shared one in place, or name it among the block's own parts"
            )
    return {name: tensor for name, tensor in tensors.items() if name not in stands_for}


def _check_config(model: LanguageModel) -> None:
    """The config of the model is that of its layers."""
    if len(model.layers) != len(model.cfg.layers):
        raise ValueError(f"the model has {len(model.layers)} layers, its config {len(model.cfg.layers)}")
    for index, (layer, cfg) in enumerate(zip(map(plain, model.layers), model.cfg.layers, strict=True)):
        parts: list[tuple[str, Any, Any]] = [("mixer", layer.mixer, cfg.mixer), ("mlp", layer.mlp, cfg.mlp)]
        if cfg.blocks:
            blocks: Any = layer.blocks
            parts = [("blocks", layer, cfg)] if len(blocks) != len(cfg.blocks) else []
            parts += [(f"blocks.{i}", *pair) for i, pair in enumerate(zip(blocks, cfg.blocks, strict=False))]
        for part, ours, theirs in parts:
            if getattr(ours, "cfg", None) != theirs:
                raise ValueError(
                    f"layers.{index}.{part} was built with another config than the model's cfg says, so loading would "
                    "give another model; build a model of the new config and copy the weights"
                )


def _check_shared(tensors: dict[str, Tensor]) -> None:
    """No tensor shares memory with another: loading would give two."""
    spans = []
    for name, x in tensors.items():
        if x.numel():
            spans.append((str(x.device), x.data_ptr(), x.data_ptr() + extent(x) * x.element_size(), name))
    spans.sort()
    for (device, _, end, first), (other, begin, _, second) in itertools.pairwise(spans):
        if device == other and begin < end:
            raise ValueError(
                f"{first} and {second} share memory, and loading would give two tensors; share the embedding with "
                "the head by tied=True in the config, and give other parts values of their own (copy.deepcopy)"
            )


@torch.no_grad()
def check_dtypes(model: LanguageModel) -> None:
    """``ValueError`` for weights in dtypes that are not computed with, or not with one another."""
    dtypes = set()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            dtypes.add(tensor.dtype)
            if tensor.dtype not in FLOATS:
                words = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
                raise ValueError(f"{name} has dtype {tensor.dtype}, expected one of {words}; convert the model")
    if len(dtypes) < 2 or model.weights is not None:
        return
    try:  # which mixtures work is the business of the layers: two tokens tell
        ids = torch.zeros(1, 1, dtype=torch.int64, device=model.norm.weight.device)
        _, state = model(ids)
        model.step(ids[0], state)
    except (RuntimeError, ValueError) as error:
        words = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"the weights are of several dtypes ({words}) that do not work together "
            f"({str(error).splitlines()[0][:200]}); convert the model to one"
        ) from error
