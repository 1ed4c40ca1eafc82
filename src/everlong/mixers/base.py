"""The contract of every mixing layer: ``(x, state) -> (y, state)``.

A mixer is one file with one class. It declares ``Config`` (its options), ``State`` (what it keeps),
``memory`` (how that grows) and writes ``init_state``, ``forward`` and ``step``. Nothing is registered:
the file name is its name, and ``everlong check`` tests the laws of the contract on it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import arguments, config, shapes
from .. import state as states
from ..ops.gate import gate
from ..ops.gated_norm import gated_norm
from ..ops.linear import Linear, linear, precise_linear
from ..ops.norm import norm
from ..ops.short_conv import short_conv, short_conv_step, windows

__all__ = [
    "Config",
    "Depth",
    "Memory",
    "Mixer",
    "Mixing",
    "RMSNorm",
    "Workspace",
    "block_diagonal",
    "convolve",
    "convolve_step",
    "dt_bias",
    "identity_values",
    "listed",
    "norm_then_gate",
    "precise",
    "spared",
    "split_heads",
    "weights_and_bias",
]

NARROW = (torch.bfloat16, torch.float16)
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
    """Base of mixer options. ``build(d_model, depth)`` makes the layer.

    Numbers must be positive unless the class says otherwise: ``bounds = {"shift": (0.0, 1.0)}``. What is named
    ``expand...`` is a multiple of the model's width.
    """

    def build(self, d_model: int, depth: Depth = Depth()) -> Mixer:
        """The layer for inputs of width ``d_model``."""
        return self.owner(self, d_model, depth)

    def reads(self, depth: Depth) -> tuple[str, ...]:
        """Names of the values that it cannot do without at ``depth``; a block before it must hand them on."""
        return ()

    def writes(self, depth: Depth) -> tuple[str, ...]:
        """Names of the values that it hands on to the blocks behind it."""
        return ()


class Mixing(NamedTuple):
    """``output_i = sum_j matrix_ij values_j`` per head, before any output gate, norm or projection."""

    matrix: Tensor  # [B H T T]
    values: Tensor  # [B T H V]
    output: Tensor  # [B T H V], computed by the op that forward uses


class Workspace:
    """A state that one owner goes on from in place, token by token (``Mixer.step_``).

    Mixers that can save copies have their own kind, with buffers that ``state`` trims.
    """

    def __init__(self, state: Any) -> None:
        self.held = state

    def state(self) -> Any:
        """A copy of the state, as ``step`` would return it."""
        return states.map_leaves(torch.clone, self.held)


class Mixer(nn.Module):
    """Base of all mixing layers. Subclasses define ``Config``, ``State``, ``init_state``, ``forward``, ``step``."""

    Config: ClassVar[type[Config]] = Config
    memory: ClassVar[Memory] = "constant"
    equation: ClassVar[str] = ""  # one line for tables
    values: ClassVar[tuple[str, ...]] = ()  # names of what it reads, hands on or reports as losses (see ``call``)
    no_decay: ClassVar[tuple[str, ...]] = ()  # parts that weight decay must spare, beside all vectors
    cfg: Any  # the class's own Config
    lr_scales: ClassVar[dict[str, float]] = {}  # parameters that learn at a multiple of the learning rate
    full_precision: ClassVar[tuple[str, ...]] = ()  # decays and steps: fp32 in bf16, fp16, int8 and int4 models too
    int8_at_least: ClassVar[tuple[str, ...]] = ()  # linear maps that are int8 in an int4 model

    def __init__(self, cfg: Any, d_model: int, depth: Depth = Depth()) -> None:
        super().__init__()
        if not isinstance(cfg, type(self).Config):
            raise ValueError(f"{type(self).__name__} needs its own Config, got {type(cfg).__qualname__}")
        _check_widths(cfg, d_model)
        self.cfg, self.d_model, self.depth = cfg, d_model, depth

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" not in vars(cls):  # a subclass builds itself, not its parent
            cls.Config = type("Config", (cls.Config,), {"__module__": cls.__module__, "__doc__": cls.Config.__doc__})
            cls.Config.__qualname__ = f"{cls.__qualname__}.Config"
        cls.Config.owner = cls
        if "side" in vars(cls):
            raise TypeError(
                f"{cls.__name__} declares side; values are declared as values = {vars(cls)['side']!r}, given as "
                "values=..., and what is handed on is returned behind the state (see everlong.call.Handed)"
            )

    def step_outputs(self) -> dict[str, int]:
        """Linear maps whose last outputs are decays or steps, and how many: quantisation spares those outputs."""
        return {}

    def check_names(self) -> None:
        """``ValueError`` for a name in the lists above that nothing in this mixer bears, wrapped or not."""
        known = [name for name, _ in (*self.named_modules(), *self.named_parameters(), *self.named_buffers())]
        for table in ("no_decay", "lr_scales", "full_precision", "int8_at_least", "step_outputs"):
            entries = self.step_outputs() if table == "step_outputs" else getattr(self, table)
            for entry in entries:
                if not any(listed(name, [entry]) for name in known):
                    where = f"{type(self).__name__}.{table} names {entry!r}, which it does not have"
                    raise ValueError(where + config.suggest(entry, filter(None, known)))

    def init_state(self, batch: int) -> Any:
        """The state before the first token, for ``batch`` rows, on the device of the parameters."""
        raise NotImplementedError(f"{type(self).__name__} defines no init_state")

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, Any]:
        """Many tokens: x [B T D] -> y [B T D] and the state after them. ``starts`` bool [B T] begins documents."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token: x [B D] -> y [B D] and the state after it. ``state`` is not changed."""
        raise NotImplementedError(f"{type(self).__name__} defines no step")

    def workspace(self, state: Any) -> Workspace:
        """A workspace that begins with ``state``, which is not changed."""
        return Workspace(state)

    def step_(self, x: Tensor, work: Any, **values: Any) -> Any:
        """``step`` for the owner of a ``workspace``, whose buffers are written in place: x [B D] -> y [B D]."""
        made: Any = self.step(x, work.held, **values)
        work.held = made[1]
        return made[0] if len(made) == 2 else (made[0], made[2])

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``.to``, ``.half`` and the like: what ``full_precision`` names becomes fp32 where they would narrow it."""
        before = {name: tensor.data for name, tensor in self._spared()}
        super()._apply(fn, recurse)
        for name, tensor in self._spared():
            if tensor.dtype in NARROW and before[name].dtype not in NARROW:
                tensor.data = before[name].to(tensor.device, torch.float32)
                if tensor.grad is not None:
                    tensor.grad = tensor.grad.float()
        return self

    def _spared(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that ``full_precision`` names, themselves or as parts of a module."""
        return ((name, p) for name, p in self.named_parameters() if listed(name, self.full_precision))

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
        """A parameter in the dtype of the model; where quantisation has left none, one in fp32."""
        for name, own in self._parameters.items():  # asked for at every step, so the nearest first
            if own is not None and name not in self.full_precision:
                return own
        for name, parameter in self.named_parameters():
            if not listed(name, self.full_precision):
                return parameter
        device = next(itertools.chain(self.buffers(), self.parameters())).device
        return torch.empty(0, dtype=torch.float32, device=device)

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


def _check_widths(cfg: Config, d_model: int) -> None:
    """``ValueError`` for a width that is none, of the model or where it is multiplied."""
    arguments.whole("d_model", d_model)
    for field in dataclasses.fields(cfg):
        factor = getattr(cfg, field.name) if field.name.startswith("expand") else None
        if factor is not None and not 1 <= factor * d_model <= arguments.COUNT[1]:
            raise ValueError(f"{field.name} = {factor:g} of a width of {d_model} leaves no channel, or too many")


def spared(model: nn.Module) -> set[str]:
    """The names of the parameters of a model that stay in fp32 when it is converted: those of full precision."""
    mixers = ((path, part) for path, part in model.named_modules() if isinstance(part, Mixer))
    return {f"{path}.{name}".lstrip(".") for path, mixer in mixers for name, _ in mixer._spared()}


def identity_values(batch: int, time: int, heads: int, *, like: Tensor) -> Tensor:
    """Values [B T H T] with ``v_t`` the t-th unit vector: an op linear in v applied to them returns its own matrix."""
    return torch.eye(time, dtype=like.dtype, device=like.device)[None, :, None].expand(batch, time, heads, time)


def split_heads(width: int, n_heads: int, what: str = "heads; choose a multiple of n_heads") -> int:
    """The width of one head; ``ValueError`` where the heads do not divide it."""
    if n_heads < 1 or width < n_heads or width % n_heads:
        raise ValueError(f"width {width} cannot be split into {n_heads} {what}")
    return width // n_heads


def listed(name: str, entries: Iterable[str]) -> str | None:
    """The entry that means the part ``name`` of a mixer, or what is inside that: its parts occur there in this order.

    ``dt_proj.bias`` also means ``dt_proj.base_layer.bias``: an adapter may stand between.
    """
    parts = name.split(".")
    for entry in entries:
        rest = iter(parts)
        if all(part in rest for part in entry.split(".")):
            return entry
    return None


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether reading the parameters of ``module`` says as much as calling it.

    It does where the module computes what ``kind`` does (a parametrisation changes what is read, not what is computed)
    and bears no hook. Wrappers, adapters and replacements must be called.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooks or nn.modules.module._has_any_global_hook():
        return False
    return type(module).forward is kind.forward and "forward" not in module.__dict__


def weights_and_bias(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """``W x`` and ``b`` of a linear map whose bias an op adds itself, in its own precision.

    For a wrapper or a map with hooks, all that it gives, and zeros. Computed as ``precise`` does; ``W x`` like x.
    """
    if not plain(module, Linear):
        y = precise(module, x)
        return y, y.new_zeros(y.shape[-1:])
    if x.dtype in NARROW:
        return precise_linear(x, module.weight), module.bias
    return linear(x, module.weight), module.bias


def convolve(
    conv: Any, x: Tensor, *, state: Tensor, starts: Tensor | None = None, activation: str | None = "silu"
) -> tuple[Tensor, Tensor]:
    """``act(conv(x))`` of a depthwise ``nn.Conv1d``, x [B T C], and its last inputs (see ``ops/short_conv``).

    A wrapper, or a convolution with hooks, is called with the window [B*T C W] of each token, which takes W times the
    memory.
    """
    if plain(conv, nn.Conv1d):
        fixed: dict[str, Any] = {"weight": conv.weight[:, 0], "bias": conv.bias, "activation": activation}
        return short_conv(x, **fixed, state=state, starts=starts)
    seen, after = windows(x, state, starts)
    y = conv(seen.flatten(0, 1)).squeeze(-1).unflatten(0, x.shape[:2]).to(x.dtype)
    return (y if activation is None else nn.functional.silu(y)), after


def convolve_step(conv: Any, x: Tensor, *, state: Tensor, activation: str | None = "silu") -> tuple[Tensor, Tensor]:
    """``convolve`` for one token, x [B C]."""
    if plain(conv, nn.Conv1d):
        fixed: dict[str, Any] = {"weight": conv.weight[:, 0], "bias": conv.bias, "activation": activation}
        return short_conv_step(x, **fixed, state=state)
    y, after = convolve(conv, x[:, None], state=state, activation=activation)
    return y[:, 0], after


def norm_then_gate(norm: Any, x: Tensor, z: Tensor) -> Tensor:
    """``norm(x) silu(z)``, in one pass where the norm is an ``RMSNorm`` without wrapper and hooks."""
    if plain(norm, RMSNorm):
        return gated_norm(x, z, weight=norm.weight, eps=norm.eps, first="norm")
    y = norm(x)
    return gate(y, z.to(y.dtype))


def precise(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` in fp32 (fp64 for fp64): the linear maps of decays and steps, also under bf16 inputs.

    Weights that were made narrower (those that came so from a file) are widened for the call.
    """
    wide = shapes.state_dtype(x)
    if x.dtype != wide or next(module.parameters()).dtype != wide:
        narrow = {name: p.to(wide) for name, p in module.named_parameters() if p.dtype != wide}
        return torch.func.functional_call(module, narrow, (x.to(wide),)) if narrow else module(x.to(wide))
    return module(x)


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
