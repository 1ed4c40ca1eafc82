"""Diagonal linear recurrence:  h_t = exp(g_t) h_{t-1} + b_t   per channel, real or complex.

``g`` holds log decays with real part ``<= 0``, ``[B T C]`` or, where they do not change in time, ``[C]``;
``-inf`` forgets everything. The fast form splits time into chunks, sums every chunk up, runs the same
recurrence over the sums (log-depth), and walks through all chunks at once from the states that enter them.
Its gradient is the same scan from the right:  l_t = dh_t + conj(exp g_{t+1}) l_{t+1},  db = l,
dg_t = l_t conj(exp(g_t) h_{t-1}).

Serves RG-LRU, LRU and S5. Sources: Blelloch, Prefix sums and their applications (1990), sec. 1.4;
Martin and Cundy, arXiv 1709.04057, sec. 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shapes import check_starts, dims, state_dtype
from . import dispatch
from .cases import Case
from .common import loop
from .native.diagonal_scan import diagonal_scan_native, refuse
from .transforms import custom_op, transforming

SEQUENCE = ("b", "g")
CHUNKS = range(12, 25)  # lengths of a chunk to choose from; the fewest left-over tokens win
ALL = slice(None)
WALK = 32  # sequences up to this length are walked through directly


def diagonal_scan_step(b: Tensor, g: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, the definition. b [B C], g [B C] or [C], state [B C] -> y [B C], state."""
    after = g.to(_wide(g, state)).exp() * state + b.to(_wide(b, state))
    return _as_output(after, b), after


def diagonal_scan_reference(
    b: Tensor, g: Tensor, *, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop over ``diagonal_scan_step``."""
    if g.dim() == 1:  # widened once: the gradients of all tokens are then summed in fp32, not in bf16
        g = g if g.is_complex() else g.to(state_dtype(g))
        return loop(diagonal_scan_step, {"b": b}, g=g, state=state, starts=starts)
    return loop(diagonal_scan_step, {"b": b, "g": g}, state=state, starts=starts)


def diagonal_scan_chunk(b: Tensor, g: Tensor, *, state: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Chunk-parallel form, O(T) work in O(log T) sweeps; one node of a compiled graph, with its own gradient.

    Transforms see the plain loop.
    """
    if transforming():
        return diagonal_scan_reference(b, g, state=state, starts=starts)
    if state.is_complex() and not g.is_complex():  # the two parts of each channel decay alike: a real recurrence
        parts = (torch.view_as_real(x.to(state.dtype)).flatten(-2) for x in (b, state))
        h, final = diagonal_scan_chunk(next(parts), g.repeat_interleave(2, dim=-1), state=next(parts), starts=starts)
        return torch.view_as_complex(h.unflatten(-1, (-1, 2))), torch.view_as_complex(final.unflatten(-1, (-1, 2)))
    h, _ = _scan_op(b.to(state.dtype), g.to(state.dtype), state, starts)
    final = h[:, -1] if b.shape[1] else state
    return _as_output(h, b), final.clone()  # a view would keep all of h alive with the state


def _wide(x: Tensor, state: Tensor) -> torch.dtype:
    """The state's dtype, or the real one of the same width where ``x`` is real."""
    return state.dtype if x.is_complex() else state.real.dtype


def _as_output(h: Tensor, b: Tensor) -> Tensor:
    return h if h.is_complex() else h.to(b.dtype)


def _exp(g: Tensor) -> Tensor:
    """exp(g); for complex numbers from real functions, which PyTorch vectorises (20 times the speed of its own)."""
    if not g.is_complex():
        return g.exp()
    decay = torch.empty_like(g, memory_format=torch.contiguous_format)
    size, phase, parts = g.real.exp(), g.imag.contiguous(), torch.view_as_real(decay)
    torch.mul(size, phase.cos(), out=parts[..., 0])
    torch.mul(size, phase.sin(), out=parts[..., 1])
    return decay


@custom_op("everlong::diagonal_scan", mutates_args=())
def _scan_op(b: Tensor, g: Tensor, state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """All h [B T C] and the decays exp(g), zero at ``starts``. All inputs in the dtype of the state."""
    decay = _exp(g)
    if starts is not None:
        decay = decay.expand(b.shape).masked_fill(starts[..., None], 0.0)
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    _sweep(b, decay, state, h)
    return h, decay


@custom_op("everlong::diagonal_scan_backward", mutates_args=())
def _backward_op(dh: Tensor, h: Tensor, decay: Tensor, state: Tensor, invariant: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of b, g and state from that of all h."""
    if not dh.shape[1]:
        return torch.empty_like(dh), dh.new_zeros(dh.shape[2:] if invariant else dh.shape), torch.zeros_like(state)
    decay = decay.conj().resolve_conj()
    db = torch.empty_like(dh, memory_format=torch.contiguous_format)
    db[:, -1] = dh[:, -1]
    _sweep(dh[:, :-1], _cut(decay, ALL, slice(1, None)), dh[:, -1], db[:, :-1], reverse=True)
    dg = torch.empty_like(db)
    torch.mul(db[:, 0], state.conj(), out=dg[:, 0])
    torch.mul(db[:, 1:], h[:, :-1].conj(), out=dg[:, 1:])
    if decay.dim() == 1:
        dg = dg.sum(dim=(0, 1)).mul_(decay)
    else:
        dg = dg.mul_(decay).sum(dim=(0, 1)) if invariant else dg.mul_(decay)
    return db, dg, db[:, 0] * _cut(decay, ALL, 0)


@_scan_op.register_fake
def _(b: Tensor, g: Tensor, state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), (g if starts is None else b).new_empty(g.shape if starts is None else b.shape)


@_backward_op.register_fake
def _(dh: Tensor, h: Tensor, decay: Tensor, state: Tensor, invariant: bool) -> tuple[Tensor, Tensor, Tensor]:
    return dh.new_empty(dh.shape), dh.new_empty(dh.shape[2:] if invariant else dh.shape), state.new_empty(state.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, g, state, _ = inputs
    h, decay = output
    ctx.invariant = g.dim() == 1
    ctx.mark_non_differentiable(decay)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, decay, state)


def _gradients(ctx: Any, dh: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dh is None:
        return None, None, None, None
    return *_backward_op(dh, *ctx.saved_tensors, ctx.invariant), None


_scan_op.register_autograd(_gradients, setup_context=_save)


def _cut(decay: Tensor, *index: Any) -> Tensor:
    """``decay[index]``, or all of a decay [C] that does not change in time."""
    return decay if decay.dim() == 1 else decay[index]


def _sweep(b: Tensor, decay: Tensor, state: Tensor, out: Tensor, reverse: bool = False) -> None:
    """Write ``out_t = decay_t out_{t-1} + b_t`` (``out_{t+1}`` in reverse); b, out [B T C], decay the same or [C]."""
    time = b.shape[1]
    if time <= WALK:
        _walk(b, decay, state, out, reverse)
        return
    size = min(CHUNKS, key=lambda chunk: time % chunk)
    rest, even = time % size, time - time % size
    whole, left = (slice(rest, None), slice(0, rest)) if reverse else (slice(0, even), slice(even, None))
    sums, decays, outs = (x if x.dim() == 1 else x[:, whole].unflatten(1, (-1, size)) for x in (b, decay, out))
    enter = torch.empty_like(outs[:, :, 0], memory_format=torch.contiguous_format)  # states entering the chunks
    enter[:, -1 if reverse else 0] = state
    earlier, later = (slice(1, None), slice(0, -1)) if reverse else (slice(0, -1), slice(1, None))
    total, reach = _totals(sums[:, earlier], _cut(decays, ALL, earlier), reverse)
    _sweep(total, reach, state, enter[:, later], reverse)
    tokens = (x if x.dim() == 1 else x.movedim(2, 1) for x in (sums, decays, outs))
    _walk(next(tokens), next(tokens), enter, next(tokens), reverse)
    last = out[:, rest if reverse else even - 1]
    _walk(b[:, left], _cut(decay, ALL, left), last, out[:, left], reverse)


def _walk(b: Tensor, decay: Tensor, state: Tensor, out: Tensor, reverse: bool) -> None:
    """The recurrence token by token along axis 1, for everything behind it at once."""
    steps = range(b.shape[1])
    for t in reversed(steps) if reverse else steps:
        state = torch.addcmul(b[:, t], _cut(decay, ALL, t), state, out=out[:, t])


def _totals(b: Tensor, decay: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """What each chunk of b [B N S C] adds to the state, [B N C], and the product of its decays."""
    first, *others = reversed(range(b.shape[2])) if reverse else range(b.shape[2])
    total, reach = b[:, :, first].clone(), _cut(decay, ALL, ALL, first).clone()
    for t in others:
        now = _cut(decay, ALL, ALL, t)
        torch.addcmul(b[:, :, t], now, total, out=total)
        reach.mul_(now)
    return total, reach


def operations(inputs: dict[str, Any]) -> float:
    """An exponential, a product and a sum for each number."""
    return float(inputs["b"].numel() * (10 if inputs["b"].is_complex() or inputs["g"].is_complex() else 3))


TABLE = dispatch.Table(
    "diagonal_scan",
    dispatch.Impl("native", diagonal_scan_native, refuse),
    dispatch.Impl("torch", diagonal_scan_chunk),
    dispatch.Impl("reference", diagonal_scan_reference),
    sequence=SEQUENCE,
)


@dispatch.op(TABLE, step=diagonal_scan_step, operations=operations)
def diagonal_scan(
    b: Tensor, g: Tensor, *, state: Tensor | None = None, starts: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Diagonal linear recurrence (see the module for the equation).

    b [B T C]; g [B T C] or [C], log decays with real part ``<= 0``; state [B C] in fp32 or fp64, complex where b or g
    is; starts bool [B T]. Returns y [B T C] in the dtype of b (in that of the state where it is complex) and the
    final state. ``ValueError`` for shapes or dtypes that do not fit.
    """
    batch, time, channels = dims(f"b B T C, g {'C' if g.dim() == 1 else 'B T C'}, state B C", b, g, state)
    check_starts(starts, batch, time)
    if state is None:
        real = state_dtype(b.real)
        state = b.new_zeros(batch, channels, dtype=real.to_complex() if b.is_complex() or g.is_complex() else real)
    elif state.is_complex() != (b.is_complex() or g.is_complex()):
        raise ValueError(
            f"state has dtype {state.dtype}, b {b.dtype} and g {g.dtype}; "
            "the state must be complex where b or g is, and real otherwise"
        )
    return dispatch.run(TABLE, dict(b=b, g=g, state=state, starts=starts), backend)


def inputs(case: Case) -> dict[str, Tensor | None]:
    """Random inputs for tests and benchmarks, ``keys * heads`` channels; ``case.variant`` is one of VARIANTS."""
    kind, channels = case.variant or "real", case.heads * case.keys
    shape = (case.batch, case.time, channels)
    b, g = case.randn(*shape), case.log_decay(*(shape[-1:] if "invariant" in kind else shape))
    if "complex" in kind:
        b = torch.complex(b, case.randn(*shape))
    if "complex" in kind and "real decay" not in kind:
        g = torch.complex(g, 3 * case.randn(*g.shape))
    return dict(b=b, g=g)


VARIANTS = ("real", "complex", "complex, real decay", "invariant", "complex, invariant")
