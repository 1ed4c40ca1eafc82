"""Softmax attention with grouped queries, rotary positions and a sliding window.   y_t = softmax(q_t K^T / sqrt K) V

The full form is that of Llama (arXiv 2302.13971), the windowed one that of Mistral (arXiv 2310.06825) and of Griffin's
local attention (arXiv 2402.19427), which rotates half of each head. Keys are kept rotated by their position in the
document. ``window`` counts the keys a token sees, its own included (Griffin's window of 2048 is ``window=2049``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import shapes
from .. import state as states
from ..arguments import SHARE
from ..ops import rotary
from ..ops.attention import Cache, Ring, attention, attention_step
from ..ops.attention_decode import attention_step_
from ..ops.common import token_positions
from ..ops.linear import Linear
from . import base

Turn = tuple[Tensor, Tensor]  # cosines and sines


class Attention(base.Mixer):
    """Attention; keeps every key and value, or with ``window`` the last ones."""

    equation = "y = softmax(q Kᵀ) V"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """``n_kv_heads`` (default ``n_heads``) must divide ``n_heads``; ``head_dim`` defaults to ``D / n_heads``.

        ``window`` None sees everything; ``rope_theta`` None uses no positions (Jamba); ``rope_fraction`` is
        the part of each head that is rotated.
        """

        n_heads: int = 4
        n_kv_heads: int | None = None
        head_dim: int | None = None
        window: int | None = None
        rope_theta: float | None = 10000.0
        rope_fraction: float = 1.0
        qkv_bias: bool = False
        out_bias: bool = False

        bounds: ClassVar = {"rope_fraction": SHARE}

    State = Cache  # with a window: Ring, its form of fixed size

    def __init__(self, cfg: Config, d_model: int, depth: base.Depth = base.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        groups = cfg.n_heads if cfg.n_kv_heads is None else cfg.n_kv_heads
        self.head_dim = base.split_heads(d_model, cfg.n_heads) if cfg.head_dim is None else cfg.head_dim
        self.rotated = 0 if cfg.rope_theta is None else int(cfg.rope_fraction * self.head_dim)
        self.groups = groups
        self._refuse()
        self.q_proj = Linear(d_model, cfg.n_heads * self.head_dim, bias=cfg.qkv_bias)
        self.k_proj = Linear(d_model, groups * self.head_dim, bias=cfg.qkv_bias)
        self.v_proj = Linear(d_model, groups * self.head_dim, bias=cfg.qkv_bias)
        self.out_proj = Linear(cfg.n_heads * self.head_dim, d_model, bias=cfg.out_bias)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)  # tensor2tensor's, the code of the paper
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def _refuse(self) -> None:
        """``ValueError`` for options that do not fit together."""
        cfg = self.cfg
        if self.groups < 1 or cfg.n_heads % self.groups:
            raise ValueError(f"n_kv_heads is {self.groups}, expected a divisor of n_heads = {cfg.n_heads}")
        if cfg.window is not None and cfg.window < 1:
            raise ValueError(f"window is {cfg.window}, expected at least 1 (the token itself) or None for no window")
        if not 0 <= self.rotated <= self.head_dim or self.rotated % 2:
            raise ValueError(
                f"rope_fraction {cfg.rope_fraction} of heads of {self.head_dim} rotates {self.rotated} channels "
                "(of head_dim, or D / n_heads), expected an even number of at most all; rope_theta=None is no positions"
            )

    @property
    def memory(self) -> base.Memory:
        """``window`` where there is one, else ``linear``."""
        return "linear" if self.cfg.window is None else "window"

    def init_state(self, batch: int) -> Cache:
        """No keys yet."""
        return states.map_leaves(torch.clone, self._empty(batch))

    def _empty(self, batch: int) -> Cache:
        """``init_state`` with all zeros in one place of memory: to read and compare, not to write."""
        zero = torch.zeros((), **self.factory).expand(batch, self.cfg.window or 0, self.groups, self.head_dim)
        position = torch.zeros((), dtype=torch.long, device=zero.device).expand(batch)
        return Cache(zero, zero, position) if self.cfg.window is None else Ring(zero, zero, position)

    def _project(self, x: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [... H K] and k, v [... G K] of x [... D]; q and k turned."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return (q, k, v) if turn is None else (rotary.rotate(q, *turn), rotary.rotate(k, *turn), v)

    def _turn(self, x: Tensor, positions: Tensor) -> Turn | None:
        """Cosines and sines for tokens at these positions."""
        if not self.rotated:
            return None
        return rotary.angles(positions, self.rotated, self.cfg.rope_theta, shapes.state_dtype(x))

    def _turn_anew(self, x: Tensor, starts: Tensor | None) -> Turn | None:
        """The same for the beginning of a text x [B T D]: one table of T angles serves all rows."""
        table = self._turn(x, torch.arange(x.shape[1], device=x.device))
        if starts is None or table is None:
            return table
        positions = token_positions(torch.zeros_like(starts[:, 0], dtype=torch.long), x.shape[1], starts)
        return table[0][positions], table[1][positions]

    def _kept(self, state: Cache) -> Cache:
        """The state in the dtype of ``init_state`` (under autocast keys come in another)."""
        dtype = self.factory["dtype"]
        return type(state)(state.k.to(dtype), state.v.to(dtype), state.position)

    def forward(self, x: Tensor, state: Any = None, *, starts: Tensor | None = None) -> tuple[Tensor, Cache]:
        """x [B T D] -> y [B T D], state."""
        begun = self.begin(x, self._empty(len(x)) if state is None else state, starts)
        if state is None:
            turn, begun = self._turn_anew(x, starts), None
        else:
            turn = self._turn(x, token_positions(begun.position, x.shape[1], starts))
        y, after = attention(*self._project(x, turn), window=self.cfg.window, state=begun, starts=starts)
        return self.out_proj(y.flatten(-2)), self._kept(after)

    def step(self, x: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        """x [B D] -> y [B D], state."""
        begun = self.begin(x, state)
        y, after = attention_step(*self._project(x, self._turn(x, begun.position)), state=begun)
        return self.out_proj(y.flatten(-2)), after

    def workspace(self, state: Cache) -> Room:
        """The cache with spare slots, which are added only when it is full."""
        return Room(self.begin(state.k.new_zeros(len(state.k), self.d_model), state))

    def step_(self, x: Tensor, work: Room) -> Tensor:
        """``step`` in place: nothing of the past is copied but when the cache runs full."""
        begun = self.begin(x, work.held)
        y, work.held = attention_step_(*self._project(x, self._turn(x, begun.position)), state=begun)
        work.length += 1
        return self.out_proj(y.flatten(-2))

    def mixing(self, x: Tensor) -> base.Mixing:
        """See ``base.Mixer.mixing``; the probabilities, one matrix per query head."""
        q, k, v = self._project(x, self._turn_anew(x, None))
        batch, time, groups, _ = k.shape
        eye = base.identity_values(batch, time, groups, like=v)
        matrix, _ = attention(q, k, eye, window=self.cfg.window)
        values = v.repeat_interleave(self.cfg.n_heads // self.groups, dim=2)
        return base.Mixing(matrix.transpose(1, 2), values, attention(q, k, v, window=self.cfg.window)[0])

    @classmethod
    def examples(cls) -> dict[str, Any]:
        """Full, grouped, windowed and without positions."""
        return {
            "default": cls.Config(),
            "gqa": cls.Config(n_kv_heads=2, head_dim=24, qkv_bias=True),
            "window": cls.Config(n_kv_heads=1, window=9, rope_fraction=0.5, out_bias=True),
            "nope": cls.Config(n_kv_heads=2, rope_theta=None),
        }


class Room(base.Workspace):
    """A cache with more slots than tokens; the state is trimmed to one slot for each token read."""

    held: Cache

    def __init__(self, state: Cache) -> None:
        super().__init__(states.map_leaves(torch.clone, state))
        self.length = state.k.shape[1]  # of a cache that grows

    def state(self) -> Cache:
        """A copy of the cache, as ``step`` would return it."""
        held, slots = self.held, self.held.k.shape[1] if isinstance(self.held, Ring) else self.length
        keys, values = (F.pad(x[:, :slots], [0, 0, 0, 0, 0, max(slots - x.shape[1], 0)]) for x in (held.k, held.v))
        return type(held)(keys.clone(), values.clone(), held.position.clone())
