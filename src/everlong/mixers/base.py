"""The contract of every mixing layer: ``(x, state) -> (y, state)``.

A mixer is one file with one class. It declares ``Config`` (its options), ``State`` (what it keeps),
``memory`` (how that grows) and writes ``init_state``, ``forward`` and ``step``. Nothing is registered:
the file name is its name, and ``everlong check`` tests the laws of the contract on it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import config, shapes
from .. import state as states
from ..ops.norm import norm

__all__ = [
    "Config",
    "Depth",
    "Memory",
    "Mixer",
    "Mixing",
    "RMSNorm",
    "block_diagonal",
    "conv_silu",
    "dt_bias",
    "identity_values",
    "split_heads",
]

Memory = Literal["none", "constant", "window", "linear"]


class Depth(NamedTuple):
    """Where a layer stands: ``layer`` of ``total``, for initial values that depend on it."""

    layer: int = 0
    total: int = 1

    @property
    def ratio(self) -> float:
        """0 at the first layer, 1 at the last (RWKV's r01)."""
        return self.layer / max(self.total - 1, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config.Config):
    """Base of mixer options. ``build(d_model, depth)`` makes the layer."""

    def build(self, d_model: int, depth: Depth = Depth()) -> Mixer:
        """The layer for inputs of width ``d_model``."""
        return self.owner(self, d_model, depth)


class Mixing(NamedTuple):
    """``output_i = sum_j matrix_ij values_j`` per head, before any output gate, norm or projection."""

    matrix: Tensor  # [B H T T]
    values: Tensor  # [B T H V]
    output: Tensor  # [B T H V], computed by the op that forward uses


class Mixer(nn.Module):
    """Base of all mixing layers. Subclasses define ``Config``, ``State``, ``init_state``, ``forward``, ``step``."""

    Config: ClassVar[type[Config]] = Config
    memory: ClassVar[Memory] = "constant"
    equation: ClassVar[str] = ""  # one line for tables
    side: ClassVar[tuple[str, ...]] = ()  # values read from, or written for, other layers of the same call
    no_decay: ClassVar[tuple[str, ...]] = ()  # parts that weight decay must spare, beside all vectors
    cfg: Any  # the class's own Config
    lr_scales: ClassVar[dict[str, float]] = {}  # parameters that learn at a multiple of the learning rate
    full_precision: ClassVar[tuple[str, ...]] = ()  # linear maps that quantisation spares: those of decays and steps
    int8_at_least: ClassVar[tuple[str, ...]] = ()  # linear maps that are int8 in an int4 model

    def __init__(self, cfg: Any, d_model: int, depth: Depth = Depth()) -> None:
        super().__init__()
        if not isinstance(cfg, type(self).Config):
            raise ValueError(f"{type(self).__name__} needs its own Config, got {type(cfg).__qualname__}")
        self.cfg, self.d_model, self.depth = cfg, d_model, depth

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" not in vars(cls):  # a subclass builds itself, not its parent
            cls.Config = type("Config", (cls.Config,), {"__module__": cls.__module__, "__doc__": cls.Config.__doc__})
            cls.Config.__qualname__ = f"{cls.__qualname__}.Config"
        cls.Config.owner = cls

    def step_outputs(self) -> dict[str, int]:
        """Linear maps whose last outputs are decays or steps, and how many: quantisation spares those outputs."""
        return {}

    def init_state(self, batch: int) -> Any:
        """The state before the first token, for ``batch`` rows, on the device of the parameters."""
        raise NotImplementedError(f"{type(self).__name__} defines no init_state")

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, Any]:
        """Many tokens: x [B T D] -> y [B T D] and the state after them. ``starts`` bool [B T] begins documents."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token: x [B D] -> y [B D] and the state after it. ``state`` is not changed."""
        raise NotImplementedError(f"{type(self).__name__} defines no step")

    def step_(self, x: Tensor, state: Any, **side: Any) -> tuple[Tensor, Any]:
        """``step`` for a caller that owns ``state`` alone and gives it up: buffers may be written in place."""
        return self.step(x, state, **side)

    def begin(self, x: Tensor, state: Any, *starts: Tensor | None) -> Any:
        """Check the arguments of a call and return the state to begin with.

        ``forward`` gives its ``starts``, None or not, and x is then [B T D]; ``step`` gives none, and x is [B D].
        """
        shapes.dims(f"x B {'T ' if starts else ''}{self.d_model}", x)
        if not x.numel():
            raise ValueError(f"x has shape {list(x.shape)}; give at least one row and one token")
        if x.dtype not in shapes.FLOATS:
            raise ValueError(f"x has dtype {x.dtype}, expected a floating dtype; embed token ids first")
        if starts:
            shapes.check_starts(starts[0], x.shape[0], x.shape[1])
        if state is None:
            return self.init_state(x.shape[0])
        states.check_like(state, self.init_state(0), x.shape[0], f"state of {type(self).__name__}")
        return state

    @property
    def factory(self) -> dict[str, Any]:
        """``device`` and ``dtype`` of the parameters, for convolution and key-value caches."""
        tensor = self._example()
        return {"device": tensor.device, "dtype": tensor.dtype}

    @property
    def memory_factory(self) -> dict[str, Any]:
        """``device`` and ``dtype`` for recurrent states: fp32, or fp64 where the parameters are fp64."""
        tensor = self._example()
        return {"device": tensor.device, "dtype": shapes.state_dtype(tensor)}

    def _example(self) -> Tensor:
        """A parameter; where quantisation has left none, an fp32 tensor on the device of the weights."""
        parameter = next(self.parameters(), None)
        if parameter is not None:
            return parameter
        return torch.empty(0, dtype=torch.float32, device=next(self.buffers()).device)

    def mixing(self, x: Tensor) -> Mixing:
        """The token mixing of ``forward(x)`` from an empty state, taken apart (see ``Mixing``).

        ``ValueError`` for mixers that are not linear in their values.
        """
        raise ValueError(f"{type(self).__name__} is not linear in its values, so it has no mixing matrix")

    def mixing_matrix(self, x: Tensor) -> Tensor:
        """The matrices M [B H T T] of a mixer that is linear in its values: ``y_i = sum_j M_ij v_j``.

        H counts the heads (or channels) that mix differently. ``ValueError`` where there is no such matrix.
        """
        return self.mixing(x).matrix

    @classmethod
    def examples(cls) -> dict[str, Any]:
        """Configurations that ``everlong check`` and the tests try; one per variant worth testing."""
        return {"default": cls.Config()}


class RMSNorm(nn.Module):
    """``nn.RMSNorm`` over the last axis, by the op ``norm``: its kernel is one pass where PyTorch has five."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x [... D] -> [... D], in the dtype of the weights."""
        return norm(x, weight=self.weight, eps=self.eps)


def identity_values(batch: int, time: int, heads: int, *, like: Tensor) -> Tensor:
    """Values [B T H T] with ``v_t`` the t-th unit vector: an op linear in v applied to them returns its own matrix."""
    return torch.eye(time, dtype=like.dtype, device=like.device)[None, :, None].expand(batch, time, heads, time)


def split_heads(width: int, n_heads: int) -> int:
    """The width of one head; ``ValueError`` where the heads do not divide it."""
    if n_heads < 1 or width < n_heads or width % n_heads:
        raise ValueError(f"width {width} cannot be split into {n_heads} heads; choose a multiple of n_heads")
    return width // n_heads


def conv_silu(conv: nn.Conv1d) -> dict[str, Any]:
    """The arguments with which ``ops/short_conv`` computes ``silu(conv(x))``: weight [C W], bias [C] or None."""
    return {"weight": conv.weight[:, 0], "bias": conv.bias, "activation": "silu"}


def block_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    """A linear map that mixes channels within blocks only: x [... N*I], weight [N O I] -> [... N*O].

    Small blocks are multiplied several at a time, padded with zeros to about 32 channels: batched products of tiny
    matrices run far below the speed of the machine.
    """
    blocks, wide, narrow = weight.shape
    group = math.gcd(blocks, max(1, 32 // max(wide, narrow)))
    eye = torch.eye(group, dtype=weight.dtype, device=weight.device)[:, None, :, None]
    weight = (weight.unflatten(0, (-1, group))[:, :, :, None] * eye).flatten(3).flatten(1, 2)
    return torch.einsum("...ni,noi->...no", x.unflatten(-1, (-1, group * narrow)), weight).flatten(-2)


def dt_bias(count: int, low: float, high: float, floor: float = 1e-4) -> Tensor:
    """Biases [count] such that dt = softplus(bias) is log-uniform between ``low`` and ``high``, at least ``floor``."""
    if not 0 < low <= high:
        raise ValueError(f"dt_min = {low} and dt_max = {high}, expected 0 < dt_min <= dt_max")
    dt = torch.empty(count).uniform_(math.log(low), math.log(high)).exp().clamp_min(floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
