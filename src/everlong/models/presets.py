"""Architectures at their published sizes. ``preset(name)`` gives the configuration; weights are loaded or trained.

Sources: state-spaces/mamba (Mamba, Mamba-2), BlinkDL/RWKV-LM (RWKV-7 "World"), google-deepmind/recurrentgemma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..config import find, suggest
from .blocks import Layer, Norm, SwiGLU, pattern
from .channel_mix import ChannelMix
from .lm import LanguageModel

Config = LanguageModel.Config


def _mixer(name: str, **options: Any) -> Any:
    return find(name).Config(**options)


def _mamba(name: str, vocab_size: int, layers: int, d_model: int) -> Config:
    layer = Layer.Config(mixer=_mixer(name))
    return Config(vocab_size=vocab_size, d_model=d_model, layers=(layer,) * layers, residual_fp32=True)


def _rwkv7(layers: int, d_model: int, *ranks: int) -> Config:
    decay, rate, value, gate = ranks
    norm = Norm.Config(style="layer")
    mixer = _mixer("rwkv7", decay_rank=decay, rate_rank=rate, value_rank=value, gate_rank=gate)
    layer = Layer.Config(mixer=mixer, mlp=ChannelMix.Config(), norm=norm)
    return Config(
        vocab_size=65536,
        d_model=d_model,
        layers=(layer,) * layers,
        norm=norm,
        embed_norm=norm,
        tied=False,
        embed_std=1e-4,
    )


def _recurrent_gemma() -> Config:
    width, norm = 2560, Norm.Config(eps=1e-6)
    mlp = SwiGLU.Config(hidden=3 * width, activation="gelu_tanh", bias=True)
    local = _mixer("attention", n_heads=10, n_kv_heads=1, head_dim=256, window=2049, rope_fraction=0.5, out_bias=True)
    layers = pattern(
        "rra" * 8 + "rr",
        r=Layer.Config(mixer=_mixer("rg_lru", n_heads=10), mlp=mlp, norm=norm),
        a=Layer.Config(mixer=local, mlp=mlp, norm=norm),
    )
    return Config(
        vocab_size=256000, d_model=width, layers=layers, norm=norm, embed_scale=math.sqrt(width), logit_cap=30.0
    )


def _llama() -> Config:
    layer = Layer.Config(mixer=_mixer("attention", n_heads=12), mlp=SwiGLU.Config(hidden=2048))
    return Config(vocab_size=50280, d_model=768, layers=(layer,) * 12)


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
}


def preset(name: str) -> Config:
    """The configuration of a published model: ``preset("mamba-130m")``. ``ValueError`` with a suggestion."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}{suggest(name, PRESETS)}")
    return PRESETS[name]()
