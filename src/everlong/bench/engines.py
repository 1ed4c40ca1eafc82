"""What is timed on whole models: an engine reads a prompt and then takes one token at a time.

Everlong's engine and those of the peers hold the same random weights, in fp32, bf16, int8 or int4.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import state as states
from ..config import suggest
from ..generation.decoder import Decoder
from ..models.lm import LanguageModel
from ..models.packed import PackedLinear
from ..models.presets import PRESETS, preset
from ..models.quantize import quantized, weight_bytes


class Unavailable(ValueError):
    """This engine, model or format cannot be had here; the message says why and what to do."""


class Engine(ABC):
    """A language model behind two verbs. ``title`` names the engine, ``weights`` the format in its own words."""

    title: ClassVar[str]
    weights: str

    @property
    def label(self) -> str:
        """Engine and format: ``llama.cpp Q8_0``."""
        return f"{self.title} {self.weights}"

    @abstractmethod
    def read(self, tokens: Tensor) -> Tensor:
        """Read prompts [B T] from an empty state, which is kept: logits [B vocab] after the last token."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """One more token per row, [B]: logits [B vocab]. May be overwritten by the next call."""

    @abstractmethod
    def truth(self) -> LanguageModel:
        """The model in fp32 that this engine must equal."""

    def close(self) -> None:  # noqa: B027
        """Give back what the engine holds; nothing, unless it says otherwise."""


class Everlong(Engine):
    """Our own engine: ``read`` in pieces, then a ``Decoder`` that owns the state."""

    title = "everlong"

    def __init__(self, model: LanguageModel, weights: str) -> None:
        self.weights, self._original = weights, model
        self.model = quantized(model, weights)
        self._state: Any = None
        self._decoder: Decoder | None = None

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """See ``Engine.read``."""
        logits, self._state = self.model.read(tokens)
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """See ``Engine.step``."""
        if self._decoder is None or self._decoder.batch != len(tokens):
            self._decoder = Decoder(self.model, len(tokens))
        if self._state is not None:
            self._decoder.load(self._state)
            self._state = None
        return self._decoder.step(tokens)

    @torch.no_grad()
    def truth(self) -> LanguageModel:
        """See ``Engine.truth``: where weights are integers, with the values that these stand for."""
        packed = {path: map for path, map in self.model.named_modules() if isinstance(map, PackedLinear)}
        if not packed:
            return self._original
        made = copy.deepcopy(self._original)
        for path, module in packed.items():
            made.get_submodule(path).weight.copy_(module.weight)  # type: ignore[operator,union-attr]
        return made

    def fork(self) -> Everlong:
        """Another engine on the same weights, with a state of its own."""
        other = copy.copy(self)
        other._state = other._decoder = None
        return other

    @property
    def in_python(self) -> int | None:
        """Blocks of the model's step that have no native form here; None before the first step."""
        return None if self._decoder is None else len(self._decoder.explain())

    @property
    def nbytes(self) -> int:
        """Bytes of weights that every token reads: all of them, but for a table of embeddings that is not the head."""
        unread = 0 if self.model.head is None else weight_bytes(self.model.embedding)
        return weight_bytes(self.model) - unread


def history_bytes(model: LanguageModel, length: int) -> int:
    """Bytes of keys, values and other histories that the token after ``length`` others reads, for one row."""
    total = 0
    for block in (mixer for layer in model.layers for mixer in layer.mixers()):
        empty = block.init_state(1)
        if block.memory == "linear":
            total += states.nbytes_after(empty, length) - states.nbytes(empty)
        elif block.memory == "window":
            slots = max(leaf.shape[1] for _, leaf, _ in states.leaves(empty) if leaf.dim() > 1)
            total += states.nbytes(empty) * min(length, slots) // slots
    return total


def random_model(name: str, seed: int = 0) -> LanguageModel:
    """The preset ``name`` in fp32 at random weights. ``ValueError`` with a suggestion for unknown names."""
    return randomized(preset(name), seed)


def randomized(cfg: LanguageModel.Config, seed: int = 0) -> LanguageModel:
    """A model at random weights: where initial values are constant (zeros, ones), noise is added.

    Otherwise blocks whose last matrix begins at zero (RWKV-7) would hide every mistake inside them.
    """
    torch.manual_seed(seed)
    model = cfg.build().float().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.numel() > 1 and float(parameter.std()) == 0:
            scale = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.05
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model


def check_models(names: list[str]) -> list[str]:
    """``names`` if all are presets; ``ValueError`` with a suggestion."""
    for name in names:
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}{suggest(name, PRESETS)}")
    return names
