"""The selective scan as a native kernel, registered so that autograd and torch.compile see through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..transforms import custom_op
from . import call, refusal
from .prepare import common_dtype, flat, wants_gradient

if TYPE_CHECKING:
    from .lowering import Lowering

CHUNK = 32  # tokens between two states kept for the backward pass, as in selective_scan.cpp


def refuse(**inputs: Any) -> str | None:
    """Why the kernel cannot run on these inputs, or None."""
    if inputs["A"].shape[1] > 256:
        return f"the kernel keeps at most 256 states a channel, got {inputs['A'].shape[1]}"
    return refusal(inputs)


def _kept_shape(x: Tensor, A: Tensor, keep: bool) -> tuple[int, ...]:
    """States kept for the backward pass, in the kernel's own order; room for whole vectors of channels."""
    batch, time, channels = x.shape
    return (batch, -(-time // CHUNK) if keep else 0, -(-channels // 16) * 16, A.shape[1])


@custom_op("everlong::selective_scan_native", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    state: Tensor,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, final state, and the states at every 32nd token (none unless ``keep``)."""
    (batch, time, channels), keys = x.shape, A.shape[1]
    y, final = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(state)
    kept = state.new_empty(_kept_shape(x, A, keep))
    call(
        "ev_selective_scan",
        int(x.dtype == torch.bfloat16),
        batch,
        time,
        channels,
        keys,
        x,
        dt,
        dt_bias,
        A,
        B,
        C,
        D,
        state,
        starts,
        y,
        final,
        kept if keep else None,
        torch.get_num_threads(),
    )
    return y, final, kept


@_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    state: Tensor,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(state), state.new_empty(_kept_shape(x, A, keep))


@custom_op("everlong::selective_scan_native_backward", mutates_args=(), device_types="cpu")
def _backward(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    kept: Tensor,
    starts: Tensor | None,
    gy: Tensor,
    gfinal: Tensor,
) -> list[Tensor]:
    """Gradients of x, dt (as given), B, C, A, D and the initial state, fp32."""
    (batch, time, channels), keys = x.shape, A.shape[1]
    groups = max(1, min(torch.get_num_threads(), channels // 16))
    gx, gdt = (x.new_empty(x.shape, dtype=torch.float32) for _ in range(2))
    gB, gC = (A.new_empty(groups, batch, time, keys) for _ in range(2))
    gA, gD, gstate = A.new_empty(batch, channels, keys), A.new_empty(batch, channels), A.new_empty(gfinal.shape)
    call(
        "ev_selective_scan_backward",
        int(x.dtype == torch.bfloat16),
        batch,
        time,
        channels,
        keys,
        x,
        dt,
        dt_bias,
        A,
        B,
        C,
        D,
        kept,
        starts,
        gy,
        gfinal,
        gx,
        gdt,
        gA,
        gB,
        gC,
        gD,
        gstate,
        groups,
        torch.get_num_threads(),
    )
    return [gx, gdt, gB.sum(0), gC.sum(0), gA.sum(0), gD.sum(0), gstate]


@_backward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    kept: Tensor,
    starts: Tensor | None,
    gy: Tensor,
    gfinal: Tensor,
) -> list[Tensor]:
    shapes = (x.shape, x.shape, B.shape, B.shape, A.shape, A.shape[:1], gfinal.shape)
    return [A.new_empty(shape) for shape in shapes]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, dt, B, C, dt_bias, A, D, _, starts, _ = inputs
    ctx.save_for_backward(x, dt, B, C, dt_bias, A, D, output[2], starts)


def _gradient(ctx: Any, gy: Tensor, gfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, dt, B, C, dt_bias, A, D, kept, starts = ctx.saved_tensors
    gy = gy.to(x.dtype).contiguous()
    gx, gdt, gB, gC, gA, gD, gstate = _backward(x, dt, B, C, dt_bias, A, D, kept, starts, gy, gfinal.contiguous())
    gbias = None if dt_bias is None else gdt.sum((0, 1))
    half = x.dtype
    return (gx.to(half), gdt.to(half), gB, gC, gbias, gA, None if D is None else gD, gstate, None, None)


_forward.register_autograd(_gradient, setup_context=_setup)


def selective_scan_native(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    A: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel, forward and backward. x and dt are read in bf16 where both are; everything else is fp32."""
    dtype, keep = common_dtype(x, dt), wants_gradient(x, dt, B, C, A, D, dt_bias, state)
    fixed = [flat(i) for i in (B, C, dt_bias, A, D, state)]
    tokens = [i.to(dtype).contiguous() for i in (x, dt)]
    y, final, _ = _forward(*tokens, *fixed, None if starts is None else starts.contiguous(), keep)
    return y.to(x.dtype), final


# ---- one token in a program ----


def lower_step(
    to: Lowering,
    out: Any,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
) -> None:
    """The instruction of ``selective_scan_step``."""
    y, after = out
    batch, channels, keys = state.shape
    x, dt, A = x.expand(batch, channels), dt.expand(batch, channels), A.expand(channels, keys)
    step = to.ref(dt)
    if dt_bias is not None:
        given, step = step, to.temporary(dt.shape)
        to.map("add", dt.shape, step, [given, to.repeat(dt_bias, dt.shape)])
        to.map("softplus", dt.shape, step, [step])
    tokens = [to.ref(x), step, *(to.lined(t.expand(batch, keys)) for t in (B, C))]
    fixed = [to.constant(A), None if D is None else to.constant(D.expand(channels))]
    memory = to.own(state, after)
    to.add("scan", state.shape, to.new(y), *tokens, *fixed, memory, shared=True)
