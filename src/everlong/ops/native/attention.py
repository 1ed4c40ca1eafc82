"""One token of attention over a cache as a native kernel, which writes the token into the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..transforms import custom_op
from . import call, count, refusal, threads_for
from .guards import Unsupported
from .program import Buffer, Ref

if TYPE_CHECKING:
    from .lowering import Lowering


def refuse(**inputs: Any) -> str | None:
    """Why the kernel cannot run on these inputs, or None."""
    state = inputs["state"]
    tensors = {name: inputs[name] for name in "qkv"} | {"state.k": state.k, "state.v": state.v}
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        return "a step in place has no gradients; call it under torch.no_grad()"
    if state.k.dtype != state.v.dtype:
        return f"the kernel reads keys and values of one dtype, got {state.k.dtype} and {state.v.dtype}"
    return refusal(tensors)


@custom_op("everlong::attention_decode_native", mutates_args=("keys", "values"), device_types="cpu")
def _decode(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """y [B H V] fp32; q scaled, fp32; k and v in the dtype of the cache, written at their slots of it."""
    (batch, heads, width), (_, slots, groups, depth) = q.shape, values.shape
    y = q.new_empty(batch, heads, depth)
    sizes = (int(keys.dtype == torch.bfloat16), batch, slots, groups, heads // groups, width, depth)
    call("ev_attention_decode", *sizes, q, k, v, keys, values, position, y, threads_for(keys.numel()))
    return y


@_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:2], values.shape[-1])


def decode(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float) -> Tensor:
    """y [B H V] in fp32, for caches [B S G K] and [B S G V] in one piece; they take k and v at ``position mod S``."""
    new = (x.to(keys.dtype).contiguous() for x in (k, v))
    return _decode((q.float() * scale).contiguous(), *new, keys, values, position.contiguous())


# ---- one token in a program ----


def lower_step(to: Lowering, out: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, state: Any) -> None:
    """The instructions of ``attention_step``: parts of all rows, then their sum."""
    y, after = out
    (batch, heads, keys), (_, groups, values) = q.shape, v.shape
    half = state.k.dtype == torch.bfloat16
    if state.k.dtype != state.v.dtype or (not half and state.k.dtype != torch.float32):
        raise Unsupported(f"keys and values of {state.k.dtype} and {state.v.dtype}")
    tables = [to.table(state.k, after.k), to.table(state.v, after.v)]
    tokens, position = [to.lined(t) for t in (q, k, v)], to.advance(state.position, after.position)
    ring = 0 if to.grows(tables[0]) else state.k.shape[1]
    space = Ref(Buffer(batch * count("ev_attention_space", heads, keys, values)))
    kind, numbers, scalars = " of bf16" if half else "", [groups, ring], [keys**-0.5 if scale is None else scale]
    inputs, size = (*tokens, position, *tables, space), (batch, heads, keys, values)
    to.add("slots" + kind, size, space, *inputs, numbers=numbers, scalars=scalars, shared=True)
    to.add("merge" + kind, size, to.new(y), *inputs, numbers=numbers, scalars=scalars, shared=True)
    to.add("count", (batch,), position, position, numbers=[1])
