"""Everlong: sequence models whose cost stays linear, behind one contract, ``(x, state) -> (y, state)``.

Names are loaded on first use, so that ``import everlong`` costs ``import torch`` and nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.folder import load, load_tokenizer, save
    from .checkpoints.session import load_session, save_session
    from .generation.generate import generate, generate_batch
    from .generation.sampler import Sampling
    from .generation.session import Session
    from .generation.text import stream_text
    from .models.blocks import Layer, pattern
    from .models.lm import LanguageModel
    from .models.presets import preset
    from .ops.dispatch import explain

__version__ = "0.1.0"

_HOMES = {
    "load": "checkpoints.folder",
    "load_tokenizer": "checkpoints.folder",
    "save": "checkpoints.folder",
    "load_session": "checkpoints.session",
    "save_session": "checkpoints.session",
    "Layer": "models.blocks",
    "pattern": "models.blocks",
    "LanguageModel": "models.lm",
    "Sampling": "generation.sampler",
    "Session": "generation.session",
    "generate": "generation.generate",
    "generate_batch": "generation.generate",
    "stream_text": "generation.text",
    "preset": "models.presets",
    "explain": "ops.dispatch",
}

__all__ = [
    "LanguageModel",
    "Layer",
    "Sampling",
    "Session",
    "explain",
    "generate",
    "generate_batch",
    "load",
    "load_session",
    "load_tokenizer",
    "pattern",
    "preset",
    "save",
    "save_session",
    "stream_text",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'everlong' has no attribute {name!r}")
    return getattr(importlib.import_module(f"everlong.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
