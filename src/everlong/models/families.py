"""The recipes of published families, each written once: the layers that are repeated, and all that stands around them.

``presets`` (published sizes), ``compare`` (a given number of parameters) and ``bench`` (training at one width) build
their models here, so that they differ in sizes alone. Sources: state-spaces/mamba (Mamba, Mamba-2), BlinkDL/RWKV-LM
(RWKV-7), google-deepmind/recurrentgemma (Griffin), ai21labs Jamba, Meta's Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import find, suggest
from ..feedforward.channelmix import ChannelMix
from .blocks import Layer, Norm, SwiGLU
from .lm import LanguageModel

Unit = tuple[Layer.Config, ...]  # the layers that are repeated
_LAYER_NORM, _GRIFFIN_NORM = Norm.Config(style="layer"), Norm.Config(eps=1e-6)


def _mixer(name: str, **options: Any) -> Any:
    return find(name).Config(**options)


def llama(*, n_heads: int, hidden: int) -> Unit:
    """Attention with rotations, then SwiGLU."""
    return (Layer.Config(mixer=_mixer("attention", n_heads=n_heads), mlp=SwiGLU.Config(hidden=hidden)),)


def mamba() -> Unit:
    """The mixer alone."""
    return (Layer.Config(mixer=_mixer("mamba")),)


def mamba2(**sizes: int) -> Unit:
    """The mixer alone; ``sizes`` are its ``head_dim`` and ``d_state``."""
    return (Layer.Config(mixer=_mixer("mamba2", **sizes)),)


def rwkv7(*, hidden: int | None = None, **sizes: int) -> Unit:
    """Time mixing and channel mixing, behind layer norms; ``sizes`` are ``head_size`` and the ranks of the mixer."""
    return (Layer.Config(mixer=_mixer("rwkv7", **sizes), mlp=ChannelMix.Config(hidden=hidden), norm=_LAYER_NORM),)


def griffin(*, n_heads: int, hidden: int, window: int, head_dim: int | None = None) -> Unit:
    """Two layers of the RG-LRU and one of local attention with a single key head, each followed by GeGLU."""
    mlp = SwiGLU.Config(hidden=hidden, activation="gelu_tanh", bias=True)
    heads = {"n_heads": n_heads, "n_kv_heads": 1, "head_dim": head_dim}
    local = _mixer("attention", **heads, window=window, rope_fraction=0.5, out_bias=True)
    recurrent = Layer.Config(mixer=_mixer("rg_lru", n_heads=n_heads), mlp=mlp, norm=_GRIFFIN_NORM)
    return (recurrent, recurrent, Layer.Config(mixer=local, mlp=mlp, norm=_GRIFFIN_NORM))


def jamba(*, n_heads: int, hidden: int, **sizes: int) -> Unit:
    """Mamba-2 in three of four layers, attention without positions in the third, each followed by SwiGLU."""
    mlp = SwiGLU.Config(hidden=hidden)
    mamba = Layer.Config(mixer=_mixer("mamba2", **sizes), mlp=mlp)
    mixing = Layer.Config(mixer=_mixer("attention", n_heads=n_heads, rope_theta=None), mlp=mlp)
    return (mamba, mamba, mixing, mamba)


AROUND: dict[str, Callable[[int], dict[str, Any]]] = {  # width -> embedding, last norm, head and residual stream
    "llama": lambda width: {},
    "mamba": lambda width: {"residual_fp32": True},
    "mamba2": lambda width: {"residual_fp32": True},
    "rwkv7": lambda width: {"norm": _LAYER_NORM, "embed_norm": _LAYER_NORM, "tied": False, "embed_std": 1e-4},
    "griffin": lambda width: {
        "norm": _GRIFFIN_NORM,
        "embed_scale": width**0.5,
        "embed_std": width**-0.5,
        "logit_cap": 30.0,
    },
    "jamba": lambda width: {},
}


def model(family: str, layers: Unit, *, vocab_size: int, d_model: int) -> LanguageModel.Config:
    """A language model of ``family`` with these layers. ``ValueError`` with a suggestion for unknown families."""
    if family not in AROUND:
        raise ValueError(f"no family {family!r}{suggest(family, AROUND)}")
    return LanguageModel.Config(vocab_size=vocab_size, d_model=d_model, layers=layers, **AROUND[family](d_model))
