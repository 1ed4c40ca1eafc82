"""The diagonal scan as a native kernel, registered so that autograd and torch.compile see through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..transforms import custom_op
from . import call, refusal, threads_for

REAL, PAIRED, COMPLEX = range(3)  # as in diagonal_scan.cpp: both real; h complex and g real; both complex


def refuse(**inputs: Any) -> str | None:
    """Why the kernel cannot run on these inputs, or None."""
    return refusal({name: x.real if isinstance(x, Tensor) and x.is_complex() else x for name, x in inputs.items()})


@custom_op("everlong::diagonal_scan_native", mutates_args=(), device_types="cpu")
def _forward(
    b: Tensor, g: Tensor, state: Tensor, starts: Tensor | None, kind: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, final state and, where y is not fp32 itself and with ``keep``, all h in fp32; complex numbers as pairs."""
    y, final = b.new_empty(b.shape), state.new_empty(state.shape)
    kept = state.new_empty(_kept(b, keep))
    sizes = (int(b.dtype == torch.bfloat16), kind, int(g.dim() == 1), *b.shape)
    outputs = (y, final, kept if len(kept) else None)
    call("ev_diagonal_scan", *sizes, b, g, state, starts, *outputs, threads_for(b.numel()))
    return y, final, kept


def _kept(b: Tensor, keep: bool) -> tuple[int, ...]:
    return (len(b) if keep and b.dtype == torch.bfloat16 else 0, *b.shape[1:])


@_forward.register_fake
def _(
    b: Tensor, g: Tensor, state: Tensor, starts: Tensor | None, kind: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return b.new_empty(b.shape), state.new_empty(state.shape), state.new_empty(_kept(b, keep))


@custom_op("everlong::diagonal_scan_native_backward", mutates_args=(), device_types="cpu")
def _backward(
    gy: Tensor, gfinal: Tensor | None, g: Tensor, state: Tensor, starts: Tensor | None, h: Tensor, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of b and g (in their dtype; fp32 where g does not change in time), and of the state (fp32)."""
    fixed = g.dim() == 1
    gb, gstate = gy.new_empty(gy.shape), state.new_empty(state.shape)
    gg = state.new_empty(len(gy), *g.shape) if fixed else g.new_empty(g.shape)
    sizes = (int(gy.dtype == torch.bfloat16), kind, int(fixed), *gy.shape)
    threads = threads_for(gy.numel())
    call("ev_diagonal_scan_backward", *sizes, g, state, starts, h, gy, gfinal, gb, gg, gstate, threads)
    return gb, gg.sum(0) if fixed else gg, gstate


@_backward.register_fake
def _(
    gy: Tensor, gfinal: Tensor | None, g: Tensor, state: Tensor, starts: Tensor | None, h: Tensor, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    gg = g.new_empty(g.shape, dtype=torch.float32 if g.dim() == 1 else g.dtype)
    return gy.new_empty(gy.shape), gg, state.new_empty(state.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, g, state, starts, ctx.kind, _ = inputs
    y, _, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(g, state, starts, kept if y.dtype == torch.bfloat16 else y)


def _gradient(ctx: Any, gy: Tensor | None, gfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    g, state, starts, h = ctx.saved_tensors
    gy = h.new_zeros(h.shape, dtype=g.dtype) if gy is None else gy.contiguous()
    gfinal = None if gfinal is None else gfinal.contiguous()
    gb, gg, gstate = _backward(gy, gfinal, g, state, starts, h, ctx.kind)
    return gb, gg.to(g.dtype), gstate, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup)


def diagonal_scan_native(b: Tensor, g: Tensor, *, state: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One walk through memory. The backward pass reads y, which is h; for bf16 inputs h is kept in fp32."""
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (b, g, state))
    starts = None if starts is None else starts.contiguous()
    if not state.is_complex():
        dtype = torch.bfloat16 if b.dtype == g.dtype == torch.bfloat16 else torch.float32
        real = (b.to(dtype).contiguous(), g.to(dtype).contiguous(), state.contiguous())
        y, final, _ = _forward(*real, starts, REAL, tracked)
        return y.to(b.dtype), final
    kind = COMPLEX if g.is_complex() else PAIRED
    decays = _pairs(g) if g.is_complex() else g.float().contiguous()
    y, final, _ = _forward(_pairs(b.to(state.dtype)), decays, _pairs(state), starts, kind, tracked)
    return _numbers(y), _numbers(final)


def _pairs(x: Tensor) -> Tensor:
    """Complex [... C] as real [... 2C]."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2).contiguous()


def _numbers(x: Tensor) -> Tensor:
    """Real [... 2C] as complex [... C]."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
