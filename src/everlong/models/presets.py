"""Architectures at their published sizes. ``preset(name)`` gives the configuration; weights are loaded or trained.

The recipes are those of ``families``; here are the sizes.
"""

from __future__ import annotations

from collections.abc import Callable

from ..config import suggest
from . import families
from .lm import LanguageModel

Config = LanguageModel.Config


def _mamba(name: str, vocab_size: int, layers: int, d_model: int) -> Config:
    unit = families.mamba() if name == "mamba" else families.mamba2()
    return families.model(name, unit * layers, vocab_size=vocab_size, d_model=d_model)


def _rwkv7(layers: int, d_model: int, *ranks: int) -> Config:
    decay, rate, value, gate = ranks
    unit = families.rwkv7(decay_rank=decay, rate_rank=rate, value_rank=value, gate_rank=gate)
    return families.model("rwkv7", unit * layers, vocab_size=65536, d_model=d_model)


def _recurrent_gemma() -> Config:
    unit = families.griffin(n_heads=10, hidden=3 * 2560, window=2049, head_dim=256)
    return families.model("griffin", (unit * 9)[:26], vocab_size=256000, d_model=2560)


def _llama() -> Config:
    return families.model("llama", families.llama(n_heads=12, hidden=2048) * 12, vocab_size=50280, d_model=768)


def _griffin_200m() -> Config:
    unit = families.griffin(n_heads=8, hidden=3 * 1024, window=2049, head_dim=128)
    return families.model("griffin", unit * 4, vocab_size=32000, d_model=1024)


def _jamba_200m() -> Config:
    unit = families.jamba(n_heads=16, hidden=2816, head_dim=64, d_state=64)
    return families.model("jamba", unit * 3, vocab_size=32000, d_model=1024)


PRESETS: dict[str, Callable[[], Config]] = {
    "mamba-130m": lambda: _mamba("mamba", 50280, 24, 768),
    "mamba-370m": lambda: _mamba("mamba", 50280, 48, 1024),
    "mamba-790m": lambda: _mamba("mamba", 50280, 48, 1536),
    "mamba-1.4b": lambda: _mamba("mamba", 50280, 48, 2048),
    "mamba-2.8b": lambda: _mamba("mamba", 50280, 64, 2560),
    "mamba2-130m": lambda: _mamba("mamba2", 50288, 24, 768),
    "mamba2-370m": lambda: _mamba("mamba2", 50288, 48, 1024),
    "mamba2-780m": lambda: _mamba("mamba2", 50288, 48, 1536),
    "mamba2-1.3b": lambda: _mamba("mamba2", 50288, 48, 2048),
    "mamba2-2.7b": lambda: _mamba("mamba2", 50288, 64, 2560),
    "rwkv7-0.1b": lambda: _rwkv7(12, 768, 64, 64, 32, 128),
    "rwkv7-0.4b": lambda: _rwkv7(24, 1024, 64, 64, 32, 128),
    "rwkv7-1.5b": lambda: _rwkv7(24, 2048, 96, 96, 64, 256),
    "rwkv7-2.9b": lambda: _rwkv7(32, 2560, 96, 96, 64, 320),
    "recurrentgemma-2b": _recurrent_gemma,
    "llama-124m": _llama,
    "griffin-200m": _griffin_200m,  # not published: shaped like RecurrentGemma and Jamba, of a size to measure with
    "jamba-200m": _jamba_200m,
}


def preset(name: str) -> Config:
    """The configuration of a published model: ``preset("mamba-130m")``. ``ValueError`` with a suggestion."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}{suggest(name, PRESETS)}")
    return PRESETS[name]()
