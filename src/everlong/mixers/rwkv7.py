"""RWKV-7 time mixing (arXiv 2503.14456).   S_t = diag(w_t) S_{t-1} + (alpha_t kappa_t) (-kappa_t^T S_{t-1}) + k_t v_t^T

The state is [key, value] here, the transpose of the paper's. Six mixtures of a token and its predecessor make
r, w, k, v, alpha and the gate; w = exp(-e^(-1/2) sigmoid(.)) per key channel, kappa = k k_k brought to norm 1 per
head, k is then scaled by ``1 + (alpha - 1) k_a``. Low-rank maps (LoRAs) make w, alpha, the gate, and in all
layers but the first a mixing of v with the values of the first layer, which travel as the value "v_first".
``y = S^T r`` is normalised per head, ``(r . k r_k) v`` is added, the sum is gated and projected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..call import NOTHING, Handed
from ..ops.common import previous
from ..ops.delta_rule import delta_rule, delta_rule_step
from ..ops.linear import Linear, linear
from ..ops.norm import norm
from ..shapes import state_dtype
from ..state import state
from . import base

LOG_DECAY = -math.exp(-0.5)  # the strongest decay of one token, w > exp(-0.607)


class Parts(NamedTuple):
    """What one call makes of its tokens; all [... H K] but the gate [... D]."""

    rule: dict[str, Any]  # q (= r), k, v, a, b, g of the delta rule
    gate: Tensor


class LoRA(nn.Module):
    """``act(x down) up + bias``: down [D R] begins at 0, up [R D] orthogonal / 10."""

    def __init__(self, d_model: int, rank: int, act: Callable[[Tensor], Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.act = act
        self.down = nn.Parameter(torch.zeros(d_model, rank))
        self.up = nn.Parameter(_orthogonal(rank, d_model))
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [... D] -> [... D]; with a bias in fp32, or fp64 for fp64, as gates are."""
        y = linear(self.act(linear(x, self.down.t())), self.up.t())
        if self.bias is None:
            return y
        dtype = state_dtype(x)
        return y.to(dtype) + self.bias.to(dtype)


class RWKV7(base.Mixer):
    """RWKV-7 "Goose" time mixing."""

    equation = "S = diag(w) S − (α⊙κ)(κᵀS) + k vᵀ"
    values = ("v_first",)
    no_decay = ("mix", "r_k", "down", "up")
    lr_scales: ClassVar[dict[str, float]] = {"decay.bias": 2.0}
    full_precision = ("decay.bias",)

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """Ranks of the LoRAs follow the width unless given.

        ``value_residual`` mixes v with the first layer's; unless given, all layers but the first of the model do.
        """

        head_size: int = 64
        decay_rank: int | None = None
        rate_rank: int | None = None
        value_rank: int | None = None
        gate_rank: int | None = None
        value_residual: bool | None = None
        norm_eps: float = 64e-5

        def reads(self, depth: base.Depth) -> tuple[str, ...]:
            """The first layer's values, where v is mixed with them."""
            mixes = depth.layer > 0 if self.value_residual is None else self.value_residual
            return RWKV7.values if mixes else ()

        def writes(self, depth: base.Depth) -> tuple[str, ...]:
            """Its own values, where it does not read others'."""
            return () if self.reads(depth) else RWKV7.values

    @state
    class State:
        """What an RWKV-7 layer keeps."""

        last: Tensor  # [B D] the previous input
        memory: Tensor  # [B H K V] fp32

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        if cfg.head_size < 1 or d_model % cfg.head_size:
            raise ValueError(f"width {d_model} is no multiple of head_size {cfg.head_size}; choose another head_size")
        self.n_heads = d_model // cfg.head_size
        self.reads_first = bool(cfg.reads(depth))
        self.mix = nn.Parameter(_token_mixes(d_model, depth))  # rows r, w, k, v, a, g
        self.k_k, self.k_a = nn.Parameter(0.71 - 0.1 * _ramp(d_model)), nn.Parameter(torch.full((d_model,), 1.02))
        self.r_k = nn.Parameter(torch.full((self.n_heads, cfg.head_size), -0.04))
        self._make_loras()
        self.r_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(d_model, d_model, bias=False) for _ in range(4))
        self.norm_weight = nn.Parameter(torch.full((d_model,), ((1 + depth.layer) / depth.total) ** 0.7))
        self.norm_bias = nn.Parameter(torch.zeros(d_model))
        for proj, bound in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5), (self.out_proj, 0.0)):
            nn.init.uniform_(proj.weight, -bound * d_model**-0.5, bound * d_model**-0.5)

    def _make_loras(self) -> None:
        cfg, width, ramp = self.cfg, self.d_model, _ramp(self.d_model)
        zigzag = torch.linspace(-1, 1, cfg.head_size).repeat(self.n_heads) if cfg.head_size > 1 else torch.zeros(width)
        zigzag = zigzag * zigzag.abs()
        decay = -5.5 + 6 * (ramp + 0.5) ** (1 + self.depth.ratio**0.3) + 2.5 * zigzag
        self.decay = LoRA(width, cfg.decay_rank or _rank(2.5, width), torch.tanh, decay)
        self.rate = LoRA(width, cfg.rate_rank or _rank(2.5, width), _same, -0.19 + 0.3 * zigzag + 0.4 * ramp)
        self.gate = LoRA(width, cfg.gate_rank or _rank(5.0, width), torch.sigmoid, None)
        if self.reads_first:
            self.value = LoRA(width, cfg.value_rank or _rank(1.7, width), _same, 0.73 - 0.4 * ramp)

    def init_state(self, batch: int) -> State:
        """No memory: zeros."""
        size = self.cfg.head_size
        return self.State(
            last=torch.zeros(batch, self.d_model, **self.factory),
            memory=torch.zeros(batch, self.n_heads, size, size, **self.memory_factory),
        )

    def _parts(self, x: Tensor, shifted: Tensor, values: Mapping[str, Tensor] | None) -> Parts:
        """From x [... D] and the tokens before, in the dtype of the state."""
        mix = self.mix.reshape(6, *[1] * (x.dim() - 1), -1)
        x_r, x_w, x_k, x_v, x_a, x_g = torch.addcmul(x, shifted - x, mix).unbind(0)
        dtype = state_dtype(x)
        r, k, v = self.r_proj(x_r).to(dtype), self.k_proj(x_k).to(dtype), self._values(x_v, values)
        g, alpha = LOG_DECAY * self.decay(x_w).sigmoid(), self.rate(x_a).sigmoid()
        kappa = F.normalize(self._heads(k * self.k_k), dim=-1, eps=1e-12)
        rule: dict[str, Any] = {
            "q": self._heads(r),
            "k": self._heads(k * (1 + (alpha - 1) * self.k_a)),
            "v": self._heads(v),
            "a": -kappa,
            "b": kappa * self._heads(alpha),
            "g": self._heads(g),
        }
        return Parts(rule, self.gate(x_g))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1))

    def _values(self, x: Tensor, values: Mapping[str, Tensor] | None) -> Tensor:
        """v [... D] in the dtype of the state, mixed with those of the first layer."""
        v = self.v_proj(x).to(state_dtype(x))
        if not self.reads_first:
            return v
        if values is None or "v_first" not in values:
            raise ValueError(
                f"RWKV-7 at layer {self.depth.layer} needs values['v_first'], the values of the first RWKV-7 layer; "
                "give it what that one handed on, or build it with value_residual=False where it comes first"
            )
        return v + (values["v_first"] - v) * self.value(x).sigmoid()

    def _returned(self, y: Tensor, after: State, parts: Parts, values: Mapping[str, Tensor] | None) -> Any:
        """y and the state; for who gave values also what is handed on: v, where no layer before has."""
        if values is None:
            return y, after
        mine = not self.reads_first and "v_first" not in values
        return y, after, Handed({"v_first": parts.rule["v"].flatten(-2)}) if mine else NOTHING

    def _finish(self, y: Tensor, parts: Parts) -> Tensor:
        """Norm per head, the bonus of the current token, gate, projection."""
        rule, shape = parts.rule, (self.n_heads, self.cfg.head_size)
        weight, bias = (part.to(y.dtype).view(shape) for part in (self.norm_weight, self.norm_bias))
        y = norm(y, weight=weight, bias=bias, eps=self.cfg.norm_eps, style="layer")
        y = y + (rule["q"] * rule["k"] * self.r_k).sum(-1, keepdim=True) * rule["v"]
        return self.out_proj(y.flatten(-2).to(parts.gate.dtype) * parts.gate)

    def forward(
        self, x: Tensor, state: Any = None, *, starts: Tensor | None = None, values: Mapping[str, Tensor] | None = None
    ) -> Any:
        """x [B T D] -> y [B T D], state; where ``values`` (of the first layer [B T D]) are given, what it hands on."""
        before = self.begin(x, state, starts)
        parts = self._parts(x, previous(x, before.last, starts), values)
        y, memory = delta_rule(**parts.rule, state=before.memory, starts=starts)
        after = self.State(last=x[:, -1].clone(), memory=memory)
        return self._returned(self._finish(y, parts), after, parts, values)

    def step(self, x: Tensor, state: State, *, values: Mapping[str, Tensor] | None = None) -> Any:
        """x [B D] -> y [B D], state; see ``forward``."""
        before = self.begin(x, state)
        parts = self._parts(x, before.last, values)
        y, memory = delta_rule_step(**parts.rule, state=before.memory)
        after = self.State(last=x.clone(), memory=memory)
        return self._returned(self._finish(y, parts), after, parts, values)

    def mixing(self, x: Tensor, values: Mapping[str, Tensor] | None = None) -> base.Mixing:
        """See ``base.Mixer.mixing``: y before its norm, without the bonus; one matrix per head."""
        last = self.init_state(len(x)).last
        rule = self._parts(x, previous(x, last, None), values).rule
        eye = base.identity_values(*rule["v"].shape[:3], like=rule["v"])
        matrix, _ = delta_rule(**{**rule, "v": eye})
        return base.Mixing(matrix.transpose(1, 2), rule["v"], delta_rule(**rule)[0])

    @classmethod
    def examples(cls) -> dict[str, Any]:
        """The paper's head size, and several heads."""
        return {"default": cls.Config(), "small heads": cls.Config(head_size=16, decay_rank=8, gate_rank=16)}


def _same(x: Tensor) -> Tensor:
    return x


def _rank(factor: float, width: int) -> int:
    """The official rank of a LoRA: ``factor * sqrt(D)`` to the nearest multiple of 32."""
    return max(32, round(factor * width**0.5 / 32) * 32)


def _orthogonal(rank: int, width: int) -> Tensor:
    """Rows [rank D] at right angles, of size 0.1; made in fp32, as PyTorch factors nothing narrower."""
    wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return nn.init.orthogonal_(torch.zeros(rank, width, dtype=wide), gain=0.1).to(torch.get_default_dtype())


def _ramp(width: int) -> Tensor:
    """From -1/2 to 1/2 over the channels."""
    return torch.linspace(-0.5, 0.5, width)


def _token_mixes(width: int, depth: base.Depth) -> Tensor:
    """The share of the previous token in r, w, k, v, a, g, [6 D]: from all to none over the channels."""
    exponents = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2]) * (1 - depth.layer / depth.total)
    return 1 - (torch.arange(width) / width) ** exponents[:, None]
