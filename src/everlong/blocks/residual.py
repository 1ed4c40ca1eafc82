"""A mixer or feed-forward beside the residual stream, with norms, scales and what it reads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..call import Call, Handed, ask
from ..config import suggest
from ..mixers import base as contract
from ..ops.linear import Linear
from . import base
from .base import Norm

COMBINE = ("add", "concat")


class Inner(base.Block):
    """A block around one mixer or feed-forward, ``inner``, whose state is its own."""

    inner: Any

    def mixers(self) -> Iterator[contract.Mixer]:
        """The one inside."""
        yield self.inner

    def init_state(self, batch: int) -> Any:
        """The state of the mixer before the first token."""
        return self.inner.init_state(batch)

    def workspace(self, state: Any) -> Any:
        """The workspace of the mixer."""
        return self.inner.workspace(state)


class Branch(Inner):
    """``x + inner(norm(x))`` over a norm and a mixer that are parts of another module."""

    def __init__(self, norm: Any, inner: Any) -> None:
        self.norm, self.inner = norm, inner

    def branch(self, x: Tensor, state: Any, call: Call) -> tuple[Tensor, Any, Handed]:
        """x [... D] -> inner(norm(x)) [... D], state, what the mixer hands on."""
        return ask(self.inner, self.norm(x), state, call)

    __call__ = Inner.forward

    def widened(self) -> Branch:
        """A copy of it in fp32."""
        return Branch(*(copy.deepcopy(part).float() for part in (self.norm, self.inner)))

    def called(self) -> Iterator[tuple[str, nn.Module, bool]]:
        """The norm and the mixer with all their parts; of the mixer itself the ``step`` alone."""
        yield from ((f"norm.{name}".rstrip("."), part, True) for name, part in self.norm.named_modules())
        what = type(self.inner).__name__
        yield from ((f"{what}.{name}".rstrip("."), part, bool(name)) for name, part in self.inner.named_modules())


class Residual(Inner, nn.Module):
    """``x <- sum_norm(skip x + scale out_norm(inner(norm(x))))``; every norm may be left out.

    Norm before: GPT-2, Mamba. Behind: OLMo 2 (``out_norm``); both: Gemma 2. ``sum_norm``: the Transformer of 2017.
    ``scale``: Granite. ``skip`` and ``scale``: DeepNorm. ``layer_scale``: a learned scale of each channel that begins
    there (CaiT, arXiv 2103.17239). ``reads`` names values of earlier blocks, or "embeddings", which are added to x
    before the norm, or put beside it (``combine="concat"``): the mixer is then so much wider, and a linear map leads
    back to D (Zamba, arXiv 2405.16712).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """What is inside, the norms (None for no norm), scales, and the values that are read."""

        inner: contract.Config
        norm: Norm.Config | None = field(default_factory=Norm.Config)
        out_norm: Norm.Config | None = None
        sum_norm: Norm.Config | None = None
        scale: float = 1.0
        skip: float = 1.0
        layer_scale: float | None = None
        reads: tuple[str, ...] = ()
        combine: str = "add"

        bounds: ClassVar = {"layer_scale": (0.0, 1e6), "skip": (0.0, 1e6)}

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.combine not in COMBINE:
                raise ValueError(f"combine is {self.combine!r}{suggest(self.combine, COMBINE)}")

        def mixers(self) -> Iterator[contract.Config]:
            """The one inside."""
            yield self.inner

        def needs(self, depth: contract.Depth) -> tuple[str, ...]:
            """The values that it reads itself, and those that its mixer does."""
            return (*self.reads, *self.inner.reads(depth))

    cfg: Config
    layer_scale: nn.Parameter | None

    def __init__(self, cfg: Config, d_model: int, depth: contract.Depth = contract.Depth()) -> None:
        super().__init__()
        self.cfg, wide = cfg, d_model * (1 + len(cfg.reads) if cfg.combine == "concat" else 1)
        self.norm = cfg.norm.build(wide) if cfg.norm else None
        self.inner = cfg.inner.build(wide, depth)
        self.down = Linear(wide, d_model, bias=False) if wide > d_model else None
        self.out_norm = cfg.out_norm.build(d_model) if cfg.out_norm else None
        self.sum_norm = cfg.sum_norm.build(d_model) if cfg.sum_norm else None
        scales = None if cfg.layer_scale is None else nn.Parameter(torch.full((d_model,), float(cfg.layer_scale)))
        self.register_parameter("layer_scale", scales)
        self.additive = cfg.sum_norm is None and cfg.skip == 1.0

    def branch(self, x: Tensor, state: Any, call: Call) -> tuple[Tensor, Any, Handed]:
        """x [... D] -> y [... D], state, what the mixer hands on."""
        given = [call.values[name].to(x.dtype) for name in self.cfg.reads]
        if given:
            x = torch.cat([x, *given], dim=-1) if self.cfg.combine == "concat" else sum(given, x)
        x = x.to(self.inner.factory["dtype"]) if self.norm is None else self.norm(x)
        y, state, handed = ask(self.inner, x, state, call)
        for change in (self.down, self.out_norm):
            y = y if change is None else change(y)
        y = y if self.cfg.scale == 1.0 else self.cfg.scale * y
        return (y if self.layer_scale is None else y * self.layer_scale), state, handed

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """``sum_norm(skip x + y)``, in the dtype of the stream."""
        total = (x if self.cfg.skip == 1.0 else self.cfg.skip * x) + y
        return total if self.sum_norm is None else self.sum_norm(total).to(total.dtype)


Residual.Config.owner = Residual
