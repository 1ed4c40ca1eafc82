"""The architectures that are compared, each built as its paper builds it, and brought to a given number of parameters.

A name is one of ``ARCHITECTURES``, or any other mixer (``gla``, ``my_package.my_mixer``), which is followed by SwiGLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..arguments import TOTAL, whole
from ..config import Config, find, mixer_names, suggest
from ..mixers import base
from ..models import families
from ..models.blocks import Layer, SwiGLU
from ..models.lm import LanguageModel
from ..models.sizes import size

DEFAULT = ("attention", "mamba", "mamba2", "rwkv7", "griffin", "jamba")
TOLERANCE = 0.05
ASPECT = 40  # preferred width per layer
MAX_LAYERS = 96


@dataclass(frozen=True)
class Shape:
    """What an architecture is built at: width, width of a head, MLP widths times ``mlp``, and the training context."""

    d_model: int
    head: int
    mlp: float = 1.0
    context: int = 256

    @property
    def heads(self) -> int:
        """Heads of width ``head``."""
        return self.d_model // self.head

    def hidden(self, expand: float) -> int:
        """The inner width of an MLP, a multiple of 8."""
        return max(8, round(self.mlp * expand * self.d_model / 8) * 8)


@dataclass(frozen=True)
class Architecture:
    """``unit`` makes the layers that are repeated; the width is a multiple of ``grain`` heads.

    ``family`` says what stands around them (``models.families``).
    """

    title: str
    unit: Callable[[Shape], families.Unit]
    grain: float = 1.0
    family: str = "llama"


def _llama(shape: Shape) -> families.Unit:
    return families.llama(n_heads=shape.heads, hidden=shape.hidden(8 / 3))


def _mamba2_sizes(shape: Shape) -> dict[str, int]:
    return {"head_dim": shape.head, "d_state": min(128, 2 * shape.head)}


def _griffin(shape: Shape) -> families.Unit:
    return families.griffin(n_heads=shape.heads, hidden=shape.hidden(3), window=max(16, shape.context // 4))


def _jamba(shape: Shape) -> families.Unit:
    return families.jamba(n_heads=shape.heads, hidden=shape.hidden(8 / 3), **_mamba2_sizes(shape))


def _other(name: str) -> Architecture:
    def unit(shape: Shape) -> families.Unit:
        return (Layer.Config(mixer=find(name).Config(), mlp=SwiGLU.Config(hidden=shape.hidden(8 / 3))),)

    title = getattr(find(name), "__name__", name)
    return Architecture(title, unit)


ARCHITECTURES: dict[str, Architecture] = {
    "attention": Architecture("Transformer", _llama),
    "mamba": Architecture("Mamba", lambda shape: families.mamba(), 0.25, "mamba"),
    "mamba2": Architecture("Mamba-2", lambda shape: families.mamba2(**_mamba2_sizes(shape)), 0.5, "mamba2"),
    "rwkv7": Architecture(
        "RWKV-7", lambda shape: families.rwkv7(head_size=shape.head, hidden=shape.hidden(4)), 1.0, "rwkv7"
    ),
    "griffin": Architecture("Griffin", _griffin, 1.0, "griffin"),
    "jamba": Architecture("Jamba (Mamba-2 + attention)", _jamba, 1.0, "jamba"),
}


def architecture(name: str) -> Architecture:
    """The architecture of a name. ``ValueError`` with a suggestion where there is none."""
    if not isinstance(name, str):
        raise ValueError(f"no architecture {name!r}{suggest('', {*ARCHITECTURES, *mixer_names()})}")
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if "." not in name and ":" not in name and name not in mixer_names():
        raise ValueError(f"no architecture {name!r}{suggest(name, {*ARCHITECTURES, *mixer_names()})}")
    if not (isinstance(mixer := find(name), type) and issubclass(mixer, base.Mixer)):
        raise ValueError(f"{name} is not a mixer (a class with the contract of everlong.mixers.base.Mixer)")
    return _other(name)


class Sized(NamedTuple):
    """A candidate of the search: its configuration, parameters, and how far its proportions are from the usual ones."""

    cfg: LanguageModel.Config
    params: int
    oddness: float


def make(name: str, shape: Shape, repeats: int, vocab_size: int = 256) -> LanguageModel.Config:
    """The model of an architecture at a shape, its unit of layers ``repeats`` times."""
    chosen = architecture(name)
    layers = chosen.unit(shape) * repeats
    return families.model(chosen.family, layers, vocab_size=vocab_size, d_model=shape.d_model)


def count(cfg: LanguageModel.Config) -> int:
    """Parameters of a model, which is built without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in cfg.build().parameters())


def _params(cfg: LanguageModel.Config) -> int:
    """``count``, of which equal layers are built once: the search asks for hundreds of models."""
    return size(cfg).parameters


def sized(
    name: str, params: int, *, vocab_size: int = 256, context: int = 256, min_layers: int = 2
) -> LanguageModel.Config:
    """The model of an architecture with ``params`` parameters, within 5 %.

    Width, depth and the width of the MLPs are chosen, as near as possible to the usual proportions (width 40 times the
    depth). ``ValueError`` names the nearest possible number where none fits.
    """
    whole("params", params, *TOTAL)
    found = list(_candidates(name, params, vocab_size, context, min_layers))
    fitting = [one for one in found if abs(one.params / params - 1) <= TOLERANCE]
    if not fitting:
        near = min(found, key=lambda one: abs(math.log(one.params / params)))
        raise ValueError(
            f"{name} cannot have {params:,} parameters within {TOLERANCE:.0%}; the nearest is {near.params:,} "
            f"(width {near.cfg.d_model}, {len(near.cfg.layers)} layers)"
        )
    best = min(fitting, key=lambda one: one.oddness + abs(one.params / params - 1)).cfg
    assert abs(count(best) / params - 1) <= TOLERANCE, f"{name}: layers differ in more than the first"
    return best


def _candidates(name: str, params: int, vocab_size: int, context: int, min_layers: int) -> Iterator[Sized]:
    ideal = (ASPECT * params / 12) ** (1 / 3)
    problem = None
    for shape in _shapes(architecture(name), ideal, context):

        def build(repeats: int, mlp: float = 1.0, shape: Shape = shape) -> LanguageModel.Config:
            return make(name, Shape(shape.d_model, shape.head, mlp, context), repeats, vocab_size)

        try:
            one, two = build(1), build(2)
            first, unit = _params(one), _params(two) - _params(one)
        except ValueError as error:  # a width that this mixer cannot have
            problem = error
            continue
        least = -(-min_layers // len(one.layers))
        for repeats in sorted({max(least, round(1 + (params - first) / unit) + more) for more in (-1, 0, 1)}):
            if repeats * len(one.layers) <= MAX_LAYERS:
                cfg = _with_mlp(build, repeats, params)
                yield Sized(cfg, _params(cfg), _oddness(cfg, build(repeats), shape.d_model / ideal))
    if problem is not None:
        raise problem


def _shapes(chosen: Architecture, ideal: float, context: int) -> Iterator[Shape]:
    """Widths around the ideal one, in multiples that the heads allow."""
    head = 64 if ideal >= 256 else 32 if ideal >= 80 else 16
    grain = max(1, int(head * chosen.grain))
    step = max(grain, int(ideal / 32) // grain * grain)
    low = max(grain, int(ideal / 2.5) // grain * grain)
    for d_model in range(low, max(int(ideal * 2.5), low + 1), step):
        yield Shape(d_model, head, context=context)


def _with_mlp(build: Callable[..., LanguageModel.Config], repeats: int, params: int) -> LanguageModel.Config:
    """The model with its MLPs widened or narrowed (by half at most) to come nearest to ``params``."""
    plain, wide = build(repeats), build(repeats, 1.5)
    now, more = _params(plain), _params(wide)
    if more == now:
        return plain
    return build(repeats, min(1.5, max(0.5, 1 + 0.5 * (params - now) / (more - now))))


def _oddness(cfg: LanguageModel.Config, plain: LanguageModel.Config, width: float) -> float:
    """0 for the usual proportions: log of the width over the ideal one, and of the MLP's over the usual one."""
    pairs: list[tuple[Any, Any]] = [(a.mlp, b.mlp) for a, b in zip(cfg.layers, plain.layers, strict=True)]
    ratios = [ours.hidden / usual.hidden for ours, usual in pairs if ours is not None and usual is not None]
    return abs(math.log(width)) + max((abs(math.log(ratio)) for ratio in ratios), default=0.0)


def describe(cfg: LanguageModel.Config) -> str:
    """The layers in a few words: ``"mamba2 + swiglu, x3"``."""
    labels = [_label(layer) for layer in cfg.layers]
    size = next(n for n in range(1, len(labels) + 1) if labels == labels[:n] * (len(labels) // n))
    unit: list[tuple[str, int]] = []
    for label in labels[:size]:
        if unit and unit[-1][0] == label:
            unit[-1] = (label, unit[-1][1] + 1)
        else:
            unit.append((label, 1))
    words = ", ".join(label if times == 1 else f"{times} {label}" for label, times in unit)
    return f"({words}) x{len(labels) // size}" if len(unit) > 1 else f"{labels[0]}, x{len(labels)}"


def _label(layer: Layer.Config) -> str:
    return " + ".join(map(_named, layer.mixers()))


def _named(mixer: Any) -> str:
    window = getattr(mixer, "window", None)
    return _short(mixer) + (f" (window {window})" if window else "")


def _short(cfg: Config) -> str:
    """The kind, without the modules of a dotted path."""
    return cfg.kind.rpartition(":")[2].rpartition(".")[2].lower()


def equation(cfg: LanguageModel.Config) -> str:
    """The equations of the mixers, each once."""
    mixers = [next(layer.mixers()) for layer in cfg.layers]
    seen: dict[str, Config] = {mixer.owner.equation: mixer for mixer in mixers}
    return " · ".join(filter(None, seen))
