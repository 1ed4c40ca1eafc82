"""What is timed on whole models: an engine reads a prompt and then takes one token at a time.

Everlong's engine and those of the peers hold the same random weights, in one of ``FORMATS``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from importlib import import_module, util
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import state as states
from ..config import suggest
from ..models.lm import LanguageModel
from ..models.presets import PRESETS, preset

FORMATS = ("fp32", "bf16", "int8", "int4")


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
    """Our own engine: ``read`` in pieces, then steps on one owned state."""

    title = "everlong"

    def __init__(self, model: LanguageModel, weights: str) -> None:
        self.weights, self._truth = weights, model
        self.model: Any = in_format(model, weights)
        self._state: Any = None
        self._decoder: Any = None

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """See ``Engine.read``."""
        logits, self._state = self.model.read(tokens)
        self._decoder = None
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """See ``Engine.step``."""
        if self._decoder is None:
            self._decoder = decoder(self.model, self._state)
        return self._decoder(tokens)

    def truth(self) -> LanguageModel:
        """See ``Engine.truth``."""
        return self._truth

    def fork(self) -> Everlong:
        """Another engine on the same weights, with a state of its own."""
        other = copy.copy(self)
        other._state = other._decoder = None
        return other


def decoder(model: Any, state: Any) -> Any:
    """A function of tokens [B] -> logits [B vocab] that goes on from ``state`` on a copy of its own."""
    owned = states.map_leaves(torch.clone, state)

    def step(tokens: Tensor) -> Tensor:
        nonlocal owned
        logits, owned = model.step_(tokens, owned)
        return logits

    return step


def in_format(model: LanguageModel, weights: str) -> Any:
    """A copy of ``model`` with its weights in one of ``FORMATS``. ``Unavailable`` where this build has none."""
    if weights == "fp32":
        return model
    if weights == "bf16":
        return copy.deepcopy(model).bfloat16()
    if util.find_spec("everlong.models.quantize") is None:
        raise Unavailable(f"{weights} weights need everlong.models.quantize, which this build does not have")
    return import_module("everlong.models.quantize").quantized(model, weights)


def check_weights(weights: str) -> str:
    """``weights`` if it is one of ``FORMATS``; ``ValueError`` with a suggestion."""
    if weights not in FORMATS:
        raise ValueError(f"no format of weights {weights!r}{suggest(weights, FORMATS)}")
    return weights


def random_model(name: str, seed: int = 0) -> LanguageModel:
    """The preset ``name`` in fp32 at random weights. ``ValueError`` with a suggestion for unknown names."""
    return randomized(preset(name), seed)


def randomized(cfg: LanguageModel.Config, seed: int = 0) -> LanguageModel:
    """A model at random weights: where initial values are constant (zeros, ones), noise is added.

    Otherwise blocks whose last matrix begins at zero (RWKV-7) would hide every mistake inside them.
    """
    torch.manual_seed(seed)
    model = cfg.build().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.numel() > 1 and float(parameter.std()) == 0:
            scale = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.05
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model


def weight_bytes(model: LanguageModel, weights: str) -> float:
    """Bytes of weights that every token must read, at the width of the format (scales of int8 and int4 left out).

    A table of embeddings that is not also the head gives one row a token and is not counted.
    """
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}[check_weights(weights)]
    unread = 0 if model.head is None else model.embedding.weight.numel()
    return (parameters(model) - unread) * bits / 8


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_models(names: list[str]) -> list[str]:
    """``names`` if all are presets; ``ValueError`` with a suggestion."""
    for name in names:
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}{suggest(name, PRESETS)}")
    return names
