"""Selective scan (Mamba-1):  h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t^T,   y_t = h_t C_t (+ D x_t)   per channel.

``x, dt [B T C]`` with ``dt > 0``, or with a ``dt_bias [C]`` any ``dt``, which then stands for
``softplus(dt + dt_bias)``; ``A [C K] <= 0``, ``D [C]``; ``B, C [B T K]`` are shared by all
channels. The state h is ``[B C K]``. B is discretised as ``dt B`` (Euler), as published weights expect, not by the
zero-order hold of the paper's text. Source: arXiv 2312.00752, sec. 3.2-3.3 and algorithm 2.

The chunk form keeps h of one chunk at a time. Its backward pass computes h again from the states at the
chunks' borders, so memory is O(B T C) and never O(B T C K).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import check_starts, dims, state_dtype
from . import dispatch
from .cases import Case
from .common import loop
from .native.selective_scan import lower_step, refuse, selective_scan_native
from .record import leaf
from .transforms import custom_op, when_transforming

SEQUENCE = ("x", "dt", "B", "C")
TILE = 1 << 16  # states of the rows of one tile
LOG2E = 1 / math.log(2)


@leaf(lower_step)
def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    A: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token, the definition. x, dt [B C], B, C [B K], A [C K], D, dt_bias [C], state [B C K] -> y [B C], state."""
    dtype = state.dtype
    wide, dt = x.to(dtype), _positive(dt.to(dtype), dt_bias)
    decay = (dt[..., None] * A.to(dtype)).exp()
    state = decay * state + (dt * wide)[..., None] * B.to(dtype)[:, None]
    y = torch.einsum("bck,bk->bc", state, C.to(dtype))
    if D is not None:
        y = y + D.to(dtype) * wide
    return y.to(x.dtype), state


def _positive(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    return dt if dt_bias is None else F.softplus(dt + dt_bias.to(dt.dtype))


def selective_scan_reference(
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
    """The loop over ``selective_scan_step``."""
    sequence: dict[str, Tensor | None] = {"x": x, "dt": dt, "B": B, "C": C}
    return loop(selective_scan_step, sequence, A=A, D=D, dt_bias=dt_bias, state=state, starts=starts)


def selective_scan_chunk(
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
    """Chunks one after the other; inside a chunk all but one multiply-add per token is done for all tokens at once."""
    dtype = state.dtype
    wide, dt, B, C, A = (tensor.to(dtype) for tensor in (x, dt, B, C, A))
    dt = _positive(dt, dt_bias)
    u = dt * wide
    tensors = (dt, u, A, B, C, state)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    y, final, _ = _scan(*tensors, starts, keep)
    if D is not None:
        y = torch.addcmul(y, D.to(dtype), wide)
    return y.to(x.dtype), final


class _Chunk:
    """N consecutive tokens, time first. Inputs are rows ``[N*B 1 C]`` or ``[N*B 1 K]``, states ``[N*B K C]``.

    Channels are the last axis because dt, x and A all have it: every product then runs along memory.
    Buffers are handed in: a new one for each result would cost more than the arithmetic.
    """

    def __init__(self, part: slice, dt: Tensor, u: Tensor, B: Tensor, C: Tensor, starts: Tensor | None) -> None:
        """All inputs ``[T B ...]``."""
        self.length, self.batch = dt[part].shape[:2]
        self.dt, self.u, self.B, self.C = (rows(tensor, part) for tensor in (dt, u, B, C))
        self.resets = None if starts is None else starts[part].flatten().nonzero()[:, 0]

    def decays(self, A: Tensor, out: Tensor) -> Tensor:
        """exp(dt A), 0 where a document starts. ``A [K C]`` comes divided by log 2, as exp2 is 3 times faster."""
        torch.mul(self.dt, A, out=out).exp2_()
        return out if self.resets is None else out.index_fill_(0, self.resets, 0.0)

    def states(self, decays: Tensor, before: Tensor, out: Tensor) -> Tensor:
        """h of every token, given the one before the first ``[B K C]``."""
        torch.mul(self.u, self.B.transpose(1, 2), out=out)
        for decay, h in zip(self.tokens(decays), self.tokens(out), strict=True):
            before = h.addcmul_(decay, before)
        return out

    def adjoints(self, grad_y: Tensor, decays: Tensor, after: Tensor, out: Tensor) -> Tensor:
        """dL/dh of every token, given what the tokens behind the chunk add to that of the last, ``[B K C]``."""
        torch.mul(grad_y, self.C.transpose(1, 2), out=out)
        tokens, decay = self.tokens(out), self.tokens(decays)
        tokens[-1].add_(after)
        for t in range(self.length - 2, -1, -1):
            tokens[t].addcmul_(decay[t + 1], tokens[t + 1])
        return out

    def tokens(self, states: Tensor) -> tuple[Tensor, ...]:
        """``[N*B K C]`` as N views ``[B K C]``."""
        return states.view(self.length, self.batch, *states.shape[1:]).unbind()


def rows(x: Tensor, part: slice) -> Tensor:
    """Tokens ``part`` of x ``[T B C]`` as a view ``[N*B 1 C]``."""
    return x[part].flatten(0, 1)[:, None]


def _chunk_length(batch: int, channels: int, keys: int) -> int:
    """Tokens per chunk: 16, or down to 8 so that the buffers of a tile stay in the cache."""
    return min(16, max(8, 8 * TILE // (min(batch, _tile(channels * keys)) * channels * keys)))


def _tile(size: int) -> int:
    """Rows of the batch taken together: enough to keep two threads busy, few enough for the cache."""
    return max(1, TILE // size)


def _parts(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _time_first(part: slice, *tensors: Tensor | None) -> list[Any]:
    """Rows ``part`` of ``[B T ...]`` as ``[T B ...]``."""
    return [None if tensor is None else tensor[part].transpose(0, 1).contiguous() for tensor in tensors]


@custom_op("everlong::selective_scan", mutates_args=())
def _scan(
    dt: Tensor, u: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B T C], the final state and, with ``keep``, the states [n B K C] before each chunk; ``u = dt x``."""
    batch, length, channels = u.shape
    keys = A.shape[1]
    size = _chunk_length(batch, channels, keys)
    chunks = _parts(length, size)
    y, final = torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty_like(state)
    kept = u.new_empty((len(chunks), batch, keys, channels) if keep else (0,))
    A = A.t().contiguous() * LOG2E
    buffers = u.new_empty(2, size * min(batch, _tile(channels * keys)), keys, channels).unbind()
    for part in _parts(batch, _tile(channels * keys)):
        before = state[part].transpose(1, 2).contiguous()
        borders = kept[:, part].unbind() if keep else [None] * len(chunks)
        plan = list(zip(chunks, borders, strict=True))
        out, last = _scan_tile(_time_first(part, dt, u, B, C, starts), A, before, buffers, plan)
        y[part], final[part] = out.transpose(0, 1), last.transpose(1, 2)
    return y, final, kept


def _scan_tile(
    inputs: list[Any], A: Tensor, before: Tensor, buffers: tuple[Tensor, ...], plan: list[tuple[slice, Tensor | None]]
) -> tuple[Tensor, Tensor]:
    """y ``[T B C]`` and the last state of some rows; ``plan``: the chunks, and where to write the state before each."""
    y = torch.empty_like(inputs[1])
    for part, border in plan:
        if border is not None:
            border.copy_(before)
        chunk = _Chunk(part, *inputs)
        decays, h = (buffer[: len(chunk.u)] for buffer in buffers)
        chunk.states(chunk.decays(A, decays), before, h)
        torch.bmm(chunk.C, h, out=rows(y, part))
        before = chunk.tokens(h)[-1].clone()
    return y, before


@_scan.register_fake
def _(
    dt: Tensor, u: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    chunks = _parts(length, _chunk_length(batch, channels, A.shape[1]))
    kept = u.new_empty((len(chunks), batch, A.shape[1], channels) if keep else (0,))
    return torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty_like(state), kept


@custom_op("everlong::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    dt: Tensor,
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    borders: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of dt, u, A, B, C and the initial state; the states are computed again chunk by chunk, last first."""
    batch, length, channels = u.shape
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (dt, u, B, C)]
    before, A = torch.empty_like(grad_state), A.t().contiguous()
    grad_A, size = torch.zeros_like(A), _chunk_length(batch, channels, len(A))
    buffers = u.new_empty(3, size * min(batch, _tile(A.numel())), *A.shape).unbind()
    for part in _parts(batch, _tile(A.numel())):
        inputs = _time_first(part, dt, u, B, C, starts)
        after = grad_state[part].transpose(1, 2).contiguous()
        found = [torch.empty_like(x) for x in inputs[:4]]
        tile = _Adjoint(inputs, A, _time_first(part, grad_y)[0], buffers)
        for where, border in reversed(list(zip(_parts(length, size), borders[:, part].unbind(), strict=True))):
            after = tile.chunk(where, border, after, found, grad_A)
        for grad, tile_grad in zip(grads, found, strict=True):
            grad[part] = tile_grad.transpose(0, 1)
        before[part] = after.transpose(1, 2)
    return grads[0], grads[1], grad_A.t().contiguous(), grads[2], grads[3], before


class _Adjoint:
    """The backward pass of one tile of rows."""

    def __init__(self, inputs: list[Any], A: Tensor, grad_y: Tensor, buffers: tuple[Tensor, ...]) -> None:
        self.inputs, self.A, self.scaled, self.grad_y, self.buffers = inputs, A, A * LOG2E, grad_y, buffers

    def chunk(self, part: slice, before: Tensor, after: Tensor, grads: list[Tensor], grad_A: Tensor) -> Tensor:
        """Write the gradients of dt, u, B, C of the tokens ``part``, add that of A; dL/dh before the first token."""
        chunk, grad_y = _Chunk(part, *self.inputs), rows(self.grad_y, part)
        decays, h, adjoint = (buffer[: len(chunk.u)] for buffer in self.buffers)
        chunk.states(chunk.decays(self.scaled, decays), before, h)
        chunk.adjoints(grad_y, decays, after, adjoint)
        grad_dt, grad_u, grad_B, grad_C = (rows(grad, part) for grad in grads)
        torch.bmm(grad_y, h.transpose(1, 2), out=grad_C)
        torch.bmm(chunk.u, adjoint.transpose(1, 2), out=grad_B)
        torch.bmm(chunk.B, adjoint, out=grad_u)
        carried = adjoint.mul_(decays)  # what each token hands to the one before it
        after = chunk.tokens(carried)[0].clone()
        carried[chunk.batch :].mul_(h[: -chunk.batch])
        carried[: chunk.batch].mul_(before)  # now dL/d(dt A)
        torch.sum(torch.mul(carried, self.A, out=h), 1, keepdim=True, out=grad_dt)
        grad_A += carried.mul_(chunk.dt).sum(0)
        return after


@_scan_backward.register_fake
def _(
    grad_y: Tensor,
    grad_state: Tensor,
    dt: Tensor,
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    borders: Tensor,
) -> tuple[Tensor, ...]:
    shapes = (x.shape for x in (dt, u, A, B, C, grad_state))
    return tuple(u.new_empty(shape) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    dt, u, A, B, C, _, starts, _ = inputs
    ctx.save_for_backward(dt, u, A, B, C, starts, output[2])


def _backward(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_scan_backward(grad_y, grad_state, *ctx.saved_tensors), None, None)


_scan.register_autograd(_backward, setup_context=_save)


def operations(inputs: dict[str, Any]) -> float:
    """Seven for a number of the state, an exponential among them."""
    return float(inputs["x"].numel() * (7 * inputs["A"].shape[1] + 1 + 2 * (inputs.get("D") is not None)))


TABLE = dispatch.Table(
    "selective_scan",
    dispatch.Impl("native", selective_scan_native, refuse),
    dispatch.Impl("torch", selective_scan_chunk, when_transforming),
    dispatch.Impl("reference", selective_scan_reference),
    sequence=SEQUENCE,
)


@dispatch.op(TABLE, step=selective_scan_step, operations=operations)
def selective_scan(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    A: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective scan (see the module for the equations).

    x, dt [B T C] with ``dt > 0`` unless there is a dt_bias [C], B, C [B T K], A [C K] ``<= 0``, D [C],
    state [B C K] in fp32 or fp64, starts bool [B T]. Returns y [B T C] in the dtype of x, and the final state.
    ``ValueError`` for shapes or dtypes that do not fit.
    """
    spec = "x B T C, dt B T C, B B T K, C B T K, A C K, D C, dt_bias C"
    batch, time, channels, keys = dims(spec, x, dt, B, C, A, D, dt_bias)
    check_starts(starts, batch, time)
    if state is None:
        state = x.new_zeros(batch, channels, keys, dtype=state_dtype(x))
    dims("x B T C, A C K, state B C K", x, A, state)
    inputs = dict(x=x, dt=dt, B=B, C=C, A=A, D=D, dt_bias=dt_bias, state=state, starts=starts)
    return dispatch.run(TABLE, inputs, backend)


def inputs(case: Case) -> dict[str, Tensor | None]:
    """Random inputs for tests and benchmarks: ``heads * values`` channels; ``dt A`` is the gate. See VARIANTS."""
    channels = case.heads * case.values
    tokens = (case.batch, case.time)
    dt, A = -case.log_decay(*tokens, channels), -torch.rand(channels, case.keys, dtype=case.dtype)
    if case.gate is not None:
        dt, A = torch.full_like(dt, 0.5), torch.full_like(A, 2 * case.gate)
    bias = case.randn(channels) if case.variant == "softplus" else None
    if bias is not None:  # the dt whose softplus is the one above
        dt = dt + torch.log(-torch.expm1(-dt)) - bias
    return dict(
        x=case.randn(*tokens, channels),
        dt=dt,
        B=case.randn(*tokens, case.keys),
        C=case.randn(*tokens, case.keys),
        A=A,
        D=None if case.variant == "no D" else case.randn(channels),
        dt_bias=bias,
    )


VARIANTS = ("D", "no D", "softplus")
