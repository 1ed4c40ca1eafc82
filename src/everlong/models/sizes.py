"""How large a model would be: counted without memory, each kind of layer once, before anything is allocated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import state as states
from ..blocks import shared
from ..config import Config
from ..machine import available_memory, in_words, require_memory
from ..mixers import base

if TYPE_CHECKING:
    from .lm import LanguageModel

MOST_TENSORS = 10_000  # of one layer: an option that asks for more is a slip, and counting them would take long


class Size(NamedTuple):
    """Parameters of a model, bytes of their initial values, and bytes of one row's state before the first token."""

    parameters: int
    nbytes: int
    state: int

    def plus(self, other: Size) -> Size:
        """Both together."""
        return Size(*(a + b for a, b in zip(self, other, strict=True)))


def size(cfg: LanguageModel.Config, most: int | None = None) -> Size:
    """The size of a model, quickly: equal layers are built once. ``ValueError`` where a layer cannot be built, or
    where there are more than ``most`` parameters.
    """
    rows = cfg.vocab_size * (1 if cfg.tied else 2)
    rows += sum(2 if norm.style == "layer" else 1 for norm in (cfg.norm, cfg.embed_norm) if norm is not None)
    total = Size(rows * cfg.d_model, rows * cfg.d_model * torch.get_default_dtype().itemsize, 8)
    seen: dict[Any, tuple[Size, dict[str, Size]]] = {}
    common: dict[str, Size] = {}  # of shared blocks, which are there once
    for index, layer in enumerate(cfg.layers):
        key = (_key(layer), index > 0)  # RWKV-7's first layer differs from the others
        if key not in seen:
            seen[key] = _layer(layer, index, cfg.d_model, most)
        total = total.plus(seen[key][0])
        common |= seen[key][1]
    for part in common.values():
        total = total.plus(part)
    if most is not None and total.parameters > most:
        raise ValueError(f"it asks for {total.parameters:,} parameters, where there are at most {most:,}")
    return total


def _key(layer: Any) -> Any:
    try:
        hash(layer)
    except TypeError:  # an option of a user's own that is a list
        return id(layer)
    return layer


def _layer(layer: Any, index: int, d_model: int, most: int | None) -> tuple[Size, dict[str, Size]]:
    build = _built if _key(layer) is layer else _built.__wrapped__
    try:
        return build(layer, index > 0, d_model, most, torch.get_default_dtype())
    except (RuntimeError, ArithmeticError, MemoryError, TypeError) as error:
        if isinstance(error, TypeError) and "verflow" not in str(error):
            raise  # a fault in the layer's own code
        said = str(error).strip().partition("\n")[0][:200]
        kinds = ", ".join(mixer.kind for mixer in layer.mixers())
        raise ValueError(
            f"layer {index} ({kinds}) cannot be built at width {d_model:,}: {said}; are its options of a sensible size?"
        ) from error


@lru_cache(4096)  # a search for a model of some size asks for hundreds that share their layers
def _built(layer: Any, later: bool, d_model: int, most: int | None, dtype: torch.dtype) -> tuple[Size, dict[str, Size]]:
    """The sizes of a first layer, or of a later one, and of what it shares by name; made without memory."""
    with torch.device("meta"), _few_tensors():
        built = layer.build(d_model, base.Depth(1 if later else 0, 2))
        shared.tie(built)
        common: dict[str, list[nn.Parameter]] = {}
        for module in built.modules():
            if isinstance(module, shared.Shared):
                names = set(module.common())
                common[module.cfg.name] = [p for name, p in module.named_parameters() if name in names]
        inside = {id(p) for found in common.values() for p in found}
        parameters = [p for p in built.parameters() if id(p) not in inside]
        parts = {name: _size(found, 0) for name, found in common.items()}
        count = sum(p.numel() for p in built.parameters())
        kept = 0 if most is not None and count > most else states.nbytes(built.init_state(1))
    return _size(parameters, kept), parts


def _size(parameters: list[nn.Parameter], kept: int) -> Size:
    return Size(sum(p.numel() for p in parameters), sum(p.numel() * p.dtype.itemsize for p in parameters), kept)


@contextmanager
def _few_tensors() -> Iterator[None]:
    """Refuse, on this thread, to make more parameters than ``MOST_TENSORS``."""
    mine, made = threading.get_ident(), 0

    def note(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal made
        made += threading.get_ident() == mine
        if made > MOST_TENSORS:
            raise ValueError(f"a layer of more than {MOST_TENSORS:,} tensors; are its options of a sensible size?")

    handle = nn.modules.module.register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


def check_fits(cfg: LanguageModel.Config) -> None:
    """``ValueError``, with the sizes, where the model or the state of one row is larger than the memory that is free.

    Nothing is refused where models are built without memory (the device "meta") or on another device's.
    """
    if torch.empty(0).device.type != "cpu" or _surely_small(cfg):
        return
    needed = size(cfg)
    remedy = f"choose a smaller width ({cfg.d_model:,}), vocabulary ({cfg.vocab_size:,}) or fewer layers"
    what = f"a model of {needed.parameters:,} parameters in {len(cfg.layers):,} layers"
    require_memory(needed.nbytes, what, remedy)
    require_memory(needed.state, f"the state of one text, beside {in_words(needed.nbytes)} of weights,", remedy)


def _surely_small(cfg: LanguageModel.Config) -> bool:
    """Whether a generous bound fits twice: exact counting takes PyTorch seconds, the first time in a process.

    A block has at most as many numbers as four square matrices of its largest width; a width is an option, or an
    option up to 16 times the model's, and four times the model's at least.
    """
    bound = 2 * cfg.vocab_size * cfg.d_model
    kinds = {id(layer): layer for layer in cfg.layers}
    widest = {key: max(4 * cfg.d_model, *_widths(layer, cfg.d_model)) for key, layer in kinds.items()}
    bound += sum(8 * widest[id(layer)] ** 2 for layer in cfg.layers)
    free = available_memory()
    return free is not None and 2 * bound * torch.get_default_dtype().itemsize <= free


def _widths(value: Any, d_model: int) -> Iterator[int]:
    """The widths that the numbers among the options may stand for."""
    if isinstance(value, Config):
        value = tuple(option for name, option in vars(value).items() if not name.endswith("theta"))  # an angle
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _widths(item, d_model)
    elif isinstance(value, float):
        yield int(abs(value) * d_model) if abs(value) < 2**40 else 2**62  # NaN and infinity too
    elif isinstance(value, int):
        yield abs(value) * d_model if abs(value) <= 16 else abs(value)


def check_training(cfg: LanguageModel.Config, rows: int, batch: int, context: int) -> None:
    """``check_fits`` for training: weights, gradients, two moments, and at least what backward must keep of each block.

    ``rows`` of a batch are computed at once.
    """
    if 4 * rows * context * cfg.d_model * len(cfg.layers) < 2**28 and _surely_small(cfg):
        return
    parameters = size(cfg).parameters
    blocks = sum(len(list(layer.mixers())) for layer in cfg.layers)
    held = rows * context * cfg.d_model * blocks * 2  # the input of every norm, in bf16 or more
    data = batch * context * 17  # ids, targets, and where documents begin
    require_memory(
        16 * parameters + held + data,
        f"to train {parameters:,} parameters takes {in_words(16 * parameters)} for weights, gradients and moments; a "
        f"batch of {batch:,} x {context:,} tokens takes {in_words(held + data)} and more; together that",
        "choose a smaller model, batch or context, or compute a batch in parts (accumulate)",
    )
