"""One token of attention in place:  ``attention_step`` of ``ops/attention`` for a caller that owns the cache alone.

The new key and value are written into the cache, which is not copied: only a cache without a free slot is, into one
with half as many slots again, so n tokens cost O(n) copying in all. No gradients. The kernel reads the slots that a row
has filled, once, and sums in fp32; rows may stand at different positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dispatch
from .attention import Cache, Ring, attention_step, sdpa
from .native import attention as native


def step_native(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, state: Cache) -> tuple[Tensor, Cache]:
    """One call of the kernel, which writes and reads the cache."""
    most = _bounds(state)[1] + 1
    keys, values = (with_room(x, 0 if isinstance(state, Ring) else most).contiguous() for x in (state.k, state.v))
    y = native.decode(q, k, v, keys, values, state.position, q.shape[-1] ** -0.5 if scale is None else scale)
    return y.to(v.dtype), type(state)(keys, values, state.position + 1)


def step_torch(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, state: Cache) -> tuple[Tensor, Cache]:
    """scaled_dot_product_attention, with a mask where rows stand at different positions."""
    fewest, most = (bound + 1 for bound in _bounds(state))
    keys, values = (with_room(x, 0 if isinstance(state, Ring) else most) for x in (state.k, state.v))
    at = torch.arange(len(q), device=q.device), state.position % keys.shape[1]
    keys[at], values[at] = k.to(keys.dtype), v.to(values.dtype)
    position, filled = state.position + 1, min(most, keys.shape[1])
    seen = None
    if fewest < filled:  # rows stand at different positions
        seen = (torch.arange(filled, device=q.device) < position[:, None])[:, None, None]
    y = sdpa(q[:, None], keys[:, :filled], values[:, :filled], seen, scale)
    return y[:, 0].to(v.dtype), type(state)(keys, values, position)


def step_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, state: Cache) -> tuple[Tensor, Cache]:
    """The definition, which copies."""
    _bounds(state)
    return attention_step(q, k, v, scale=scale, state=state)


def _bounds(state: Cache) -> tuple[int, int]:
    """The least and the largest position. ``ValueError`` where one points outside of the slots."""
    fewest, most = (int(bound) for bound in state.position.aminmax())
    slots = state.k.shape[1]
    if fewest < 0 or (most > slots and not isinstance(state, Ring)) or state.v.shape[1] != slots:
        raise ValueError(
            f"state.position runs from {fewest} to {most}, with {slots} keys and {state.v.shape[1]} values held; "
            "no call makes such a state: begin with init_state(batch), or read the text again"
        )
    return fewest, most


def with_room(x: Tensor, slots: int) -> Tensor:
    """``x [B S ...]`` itself, or where S < ``slots`` a longer copy."""
    return x if x.shape[1] >= slots else F.pad(x, [0, 0, 0, 0, 0, max(slots * 3 // 2, 16) - x.shape[1]])


def operations(inputs: dict[str, Any]) -> float:
    """Scores, their softmax and the sum of values, over all slots of the cache."""
    (batch, heads, keys), (slots, values) = inputs["q"].shape, (inputs["state"].k.shape[1], inputs["v"].shape[-1])
    return float(batch * heads * slots * (2 * keys + 2 * values + 3))


TABLE = dispatch.Table(
    "attention_step_",
    dispatch.Impl("native", step_native, native.refuse),
    dispatch.Impl("torch", step_torch),
    dispatch.Impl("reference", step_reference),
)


@dispatch.op(TABLE, operations=operations)
def attention_step_(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, state: Cache, backend: str | None = None
) -> tuple[Tensor, Cache]:
    """``attention_step`` for a caller that owns ``state`` alone and gives it up: its buffers are written in place.

    q [B H K], k [B G K], v [B G V] -> y [B H V] in the dtype of v, state. Call it under ``torch.no_grad()``.
    """
    inputs: dict[str, Any] = dict(q=q, k=k, v=v, scale=scale, state=state)
    return dispatch.run(TABLE, inputs, backend)
