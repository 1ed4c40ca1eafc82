"""The contract of the blocks of a layer, and the norms in them.

A block turns the residual stream x into ``join(x, y)``, where y is its branch:
``branch(x, state, call) -> (y, state, handed)``. ``call`` (see ``everlong.call``) says in which way the mixers inside
are called and what earlier blocks have handed on; ``handed`` is what this one hands on. State: a pytree of tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import config
from ..call import Call, Handed
from ..config import suggest
from ..mixers import base
from ..ops.norm import STYLES, norm

ORDER = ("none", "constant", "window", "linear")  # how memory grows, slowest first


class Norm(nn.Module):
    """RMSNorm ``w x / rms(x)`` or LayerNorm ``w (x - mean) / std + b`` over the last axis.

    Computed at least in the dtype of x (fp32 for an fp32 residual), returned in the dtype of the weights.
    """

    KIND = "norm"

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """``style`` is "rms" or "layer"."""

        style: str = "rms"
        eps: float = 1e-5

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.style not in STYLES:
                raise ValueError(f"no norm {self.style!r}{suggest(self.style, STYLES)}")

    def __init__(self, cfg: Config, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if cfg.style == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """x [... D] -> [... D]."""
        return norm(x, weight=self.weight, bias=self.bias, eps=self.cfg.eps, style=self.cfg.style)


Norm.Config.owner = Norm


@dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """Base of block options. ``build(d_model, depth)`` makes the block."""

    def build(self, d_model: int, depth: base.Depth = base.Depth()) -> Any:
        """The block in a model of width ``d_model``."""
        return self.owner(self, d_model, depth)

    def mixers(self) -> Iterator[base.Config]:
        """The configurations of the mixers and feed-forwards inside."""
        raise NotImplementedError(f"{type(self).__qualname__} defines no mixers")

    def needs(self, depth: base.Depth) -> tuple[str, ...]:
        """Names of the values that it cannot do without; a block before it must hand them on."""
        return tuple(name for inner in self.mixers() for name in inner.reads(depth))

    def gives(self, depth: base.Depth) -> tuple[str, ...]:
        """Names of the values that it hands on."""
        return tuple(name for inner in self.mixers() for name in inner.writes(depth))


class Block:
    """The methods of every block. Subclasses define ``branch``, ``mixers``, ``init_state`` and ``workspace``."""

    Config: ClassVar[Any] = Config
    additive = True  # join(x, y) is x + y

    def mixers(self) -> Iterator[base.Mixer]:
        """The mixers and feed-forwards inside."""
        raise NotImplementedError(f"{type(self).__name__} defines no mixers")

    def init_state(self, batch: int) -> Any:
        """The state before the first token, for ``batch`` rows."""
        raise NotImplementedError(f"{type(self).__name__} defines no init_state")

    def workspace(self, state: Any) -> Any:
        """A workspace that begins with ``state``, for calls in the way "step_"."""
        raise NotImplementedError(f"{type(self).__name__} defines no workspace")

    def branch(self, x: Tensor, state: Any, call: Call) -> tuple[Tensor, Any, Handed]:
        """x [... D] -> y [... D], the state after it, what is handed on."""
        raise NotImplementedError(f"{type(self).__name__} defines no branch")

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream after the block."""
        return x + y

    def forward(self, x: Tensor, state: Any, call: Call = Call()) -> tuple[Tensor, Any, Handed]:
        """x [B T D] -> x [B T D], state, what is handed on; without T where ``call`` is one of single tokens."""
        y, state, handed = self.branch(x, state, call)
        return self.join(x, y), state, handed

    def widened(self) -> Any:
        """A copy of it in fp32."""
        assert isinstance(self, nn.Module)
        return copy.deepcopy(self).float()

    @property
    def memory(self) -> str:
        """The fastest growth among its mixers."""
        return max((mixer.memory for mixer in self.mixers()), key=ORDER.index, default="none")

    def called(self) -> Iterator[tuple[str, nn.Module, bool]]:
        """Modules that a step uses, by name, and whether it calls them themselves (a mixer's ``step`` is called)."""
        assert isinstance(self, nn.Module)
        stepped = {id(mixer) for mixer in self.mixers()}
        for name, module in self.named_modules():
            yield name or type(self).__name__, module, id(module) not in stepped


@dataclass(frozen=True, kw_only=True)
class AroundConfig(Config):
    """Base of the options of a block around another one."""

    block: Config

    def mixers(self) -> Iterator[base.Config]:
        """Those of the block inside."""
        return self.block.mixers()

    def needs(self, depth: base.Depth) -> tuple[str, ...]:
        """What the block inside needs."""
        return self.block.needs(depth)

    def gives(self, depth: base.Depth) -> tuple[str, ...]:
        """What the block inside hands on."""
        return self.block.gives(depth)


class Around(Block, nn.Module):
    """A block around another one, ``block``, which it computes, and whose state is its own."""

    def __init__(self, cfg: Any, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__()
        self.cfg, self.block = cfg, cfg.block.build(d_model, depth)

    def mixers(self) -> Iterator[base.Mixer]:
        """Those of the block inside."""
        return self.block.mixers()  # type: ignore[no-any-return]

    def init_state(self, batch: int) -> Any:
        """The state of the block inside before the first token."""
        return self.block.init_state(batch)

    def workspace(self, state: Any) -> Any:
        """The workspace of the block inside."""
        return self.block.workspace(state)

    def branch(self, x: Tensor, state: Any, call: Call) -> tuple[Tensor, Any, Handed]:
        """x [... D] -> what the branch of the block inside gives."""
        return self.block.branch(x, state, call)  # type: ignore[no-any-return]


class Workspaces:
    """The workspaces of several blocks, one after another."""

    def __init__(self, blocks: Iterable[Any], state: tuple[Any, ...]) -> None:
        self.parts = [block.workspace(kept) for block, kept in zip(blocks, state, strict=True)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def state(self) -> tuple[Any, ...]:
        """A copy of the states, as a step would return them."""
        return tuple(part.state() for part in self.parts)
