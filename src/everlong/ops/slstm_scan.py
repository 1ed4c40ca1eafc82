"""The recurrence of sLSTM, exponential gates with memory mixing (xLSTM, arXiv 2405.04517 eq. 8-17), per head:

    i~, f~, z~, o~ = x_t + R h_{t-1}          m_t = max(log f + m_{t-1}, i~),  log f = log sigmoid(f~)
    i = exp(i~ - m_t),  f = exp(log f + m_{t-1} - m_t)
    c_t = f c_{t-1} + i tanh(z~),   n_t = f n_{t-1} + i,   h_t = sigmoid(o~) c_t / n_t

The state ``[B 4 H K]`` holds h, c, n, m. Zeros are the empty state: where n = 0 nothing is remembered, and m_t = i~.
h enters its own gates, so no parallel form exists. The fast form is a loop of few operations per token with
its backward pass written out: what does not depend on the recurrence is computed for all tokens at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..shapes import check_starts, dims, state_dtype
from . import dispatch
from .cases import Case
from .common import log_sigmoid, loop
from .transforms import custom_op

SEQUENCE = ("x",)


def slstm_scan_step(x: Tensor, *, recurrent: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, the definition. x [B H 4 K] (i, f, z, o), recurrent [H K 4 K], state [B 4 H K] -> h [B H K], state."""
    h, c, n, m = state.unbind(1)
    mixed = torch.einsum("bhk,hkgj->bhgj", h, recurrent.to(state.dtype))
    i, f, z, o = (x.to(state.dtype) + mixed).unbind(2)
    decayed = log_sigmoid(f) + m
    top = torch.where(n == 0, i, torch.maximum(decayed, i))
    write, keep = (i - top).exp(), torch.where(n == 0, float("-inf"), decayed - top).exp()
    c, n = keep * c + write * z.tanh(), keep * n + write
    h = o.sigmoid() * c / n
    return h.to(x.dtype), torch.stack([h, c, n, top], dim=1)


def slstm_scan_reference(
    x: Tensor, *, recurrent: Tensor, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop over ``slstm_scan_step``."""
    return loop(slstm_scan_step, {"x": x}, recurrent=recurrent, state=state, starts=starts)


def slstm_scan_fused(
    x: Tensor, *, recurrent: Tensor, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop in few operations per token, its backward pass written out (differentiable once)."""
    y, last = _Scan.apply(x.to(state.dtype), recurrent.to(state.dtype), state, starts)
    return y.to(x.dtype), last


class Tape(NamedTuple):
    """What the forward pass writes and the backward pass reads: [T H B (gate) K], or T + 1 with the state before."""

    pre: Tensor  # i~, f~, z~, sigmoid(o~)
    gates: Tensor  # i, f
    written: Tensor  # tanh(z~), 1
    memory: Tensor  # T+1: c, n
    hidden: Tensor  # T+1: h
    top: Tensor  # T+1: m

    @classmethod
    def blank(cls, x: Tensor, state: Tensor) -> Tape:
        """Buffers for x [B T H 4 K], the state in its place."""
        batch, time, heads, _, width = x.shape
        sizes = ((time, 4), (time, 2), (time, 2), (time + 1, 2), (time + 1,), (time + 1,))
        tape = cls(*(x.new_empty(length, heads, batch, *gates, width) for length, *gates in sizes))
        h, c, n, m = state.permute(1, 2, 0, 3).unbind(0)
        tape.hidden[0], tape.memory[0, :, :, 0], tape.memory[0, :, :, 1] = h, c, n
        tape.top[0] = m.masked_fill(n == 0, float("-inf"))
        tape.written[:, :, :, 1] = 1.0
        return tape

    @property
    def state(self) -> Tensor:
        """The state after the last token, [B 4 H K]."""
        last = [self.hidden[-1], *self.memory[-1].unbind(2), self.top[-1]]
        return torch.stack(last).permute(2, 0, 1, 3).contiguous()


def _record(tape: Tape, x: Tensor, recurrent: Tensor, starts: Tensor | None) -> None:
    """The forward loop: fills the tape. Resets hide h, and send the log forget gate to -inf."""
    inputs, products = x.permute(1, 2, 0, 3, 4).flatten(3), tape.pre.flatten(3)
    begins = None if starts is None else starts.t()[:, None, :, None].unbind(0)
    steps = zip(
        inputs.unbind(0),
        products.unbind(0),
        tape.pre.unbind(0),
        tape.gates.unbind(0),
        tape.written.unbind(0),
        strict=True,
    )
    memory, hidden, top = tape.memory.unbind(0), tape.hidden.unbind(0), tape.top.unbind(0)
    for t, (given, product, pre, gates, written) in enumerate(steps):
        h = hidden[t] if begins is None else hidden[t].masked_fill(begins[t], 0.0)
        torch.baddbmm(given, h, recurrent, out=product)
        i, f, z, o = pre.unbind(2)
        write, keep = gates.unbind(2)
        decayed = log_sigmoid(f).add_(top[t])
        if begins is not None:
            decayed.masked_fill_(begins[t], float("-inf"))
        torch.maximum(decayed, i, out=top[t + 1])
        torch.sub(i, top[t + 1], out=write)
        torch.sub(decayed, top[t + 1], out=keep)
        gates.exp_()
        torch.tanh(z, out=written[:, :, 0])
        torch.mul(memory[t], keep[:, :, None], out=memory[t + 1]).addcmul_(written, write[:, :, None])
        c, n = memory[t + 1].unbind(2)
        torch.div(c, n, out=hidden[t + 1]).mul_(o.sigmoid_())


class Factors(NamedTuple):
    """Derivatives that do not depend on the recurrence, for all tokens; m is held constant."""

    output: Tensor  # [T H B 2 K] of h by c and n
    c: Tensor  # [T H B 3 K] of c by i~, f~, z~
    n: Tensor  # [T H B 2 K] of n by i~, f~
    o: Tensor  # [T H B K] of h by o~

    @classmethod
    def of(cls, tape: Tape) -> Factors:
        """From what the forward pass left."""
        _, f, _, o = tape.pre.unbind(3)
        (write, keep), z, (c, n) = tape.gates.unbind(3), tape.written[:, :, :, 0], tape.memory[1:].unbind(3)
        per_n = o / n
        held = tape.memory[:-1] * (keep * torch.sigmoid(-f))[:, :, :, None]
        return cls(
            output=torch.stack([per_n, -per_n * c / n], dim=3),
            c=torch.stack([write * z, held[:, :, :, 0], write * (1 - z * z)], dim=3),
            n=torch.stack([write, held[:, :, :, 1]], dim=3),
            o=(1 - o) * per_n * c,
        )


def _replay(
    tape: Tape, dy: Tensor, dstate: Tensor, recurrent: Tensor, starts: Tensor | None, *, top: bool
) -> tuple[Tensor, Tensor]:
    """The backward loop: gradients of the pre-activations [T H B 4 K] and of the state [4 H B K].

    h does not depend on the choice of m, so m is held constant, unless ``top`` says that ``dstate`` has one of m.
    """
    factors, grads = Factors.of(tape), torch.empty_like(tape.pre)
    begins = None if starts is None else starts.t()[:, None, :, None].unbind(0)
    outputs, by_c, by_n, by_o = (factor.unbind(0) for factor in factors)
    keeps, dys, back = tape.gates[:, :, :, 1:].unbind(0), dy.permute(1, 2, 0, 3).unbind(0), recurrent.mT
    dh, dmemory, dm = dstate[0] + (dys[-1] if dys else 0), dstate[1:3].permute(1, 2, 0, 3).contiguous(), dstate[3]
    by_m, decays = _winners(tape) if top else ((), ())
    for t in range(len(dys) - 1, -1, -1):
        grad = grads[t]
        dmemory.addcmul_(dh[:, :, None], outputs[t])
        torch.mul(dmemory[:, :, :1], by_c[t], out=grad[:, :, :3])
        grad[:, :, :2].addcmul_(dmemory[:, :, 1:], by_n[t])
        torch.mul(dh, by_o[t], out=grad[:, :, 3])
        if top:
            grad[:, :, :2].addcmul_(dm[:, :, None], by_m[t])
            dm = dm * decays[t]
        dmemory.mul_(keeps[t])
        dh = torch.bmm(grad.flatten(2), back)
        if begins is not None:
            dh.masked_fill_(begins[t], 0.0)
        if t:
            dh.add_(dys[t - 1])
    return grads, torch.stack([dh, *dmemory.unbind(2), dm])


def _winners(tape: Tape) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Derivatives of m by i~ and f~ [T H B 2 K], and by the m before it [T H B K]: where the larger one came from."""
    decays = (tape.pre[:, :, :, 0] < tape.top[1:]).to(tape.pre.dtype)
    inside = torch.sigmoid(-tape.pre[:, :, :, 1])
    return torch.stack([1 - decays, decays * inside], dim=3).unbind(0), decays.unbind(0)


class _Scan(torch.autograd.Function):
    """Both loops, and what frames them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recurrent: Tensor, state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        tape = Tape.blank(x, state)
        _record(tape, x, recurrent.flatten(2), starts)
        ctx.save_for_backward(*tape, recurrent, state, starts)
        ctx.set_materialize_grads(False)
        return tape.hidden[1:].permute(2, 0, 1, 3), tape.state

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *tape, recurrent, state, starts = ctx.saved_tensors
        return *_gradients(dy, dlast, tape, recurrent, state, starts), None


@custom_op("everlong::slstm_scan_backward", mutates_args=())
def _gradients(
    dy: Tensor | None,
    dlast: Tensor | None,
    saved: list[Tensor],
    recurrent: Tensor,
    state: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, recurrent and the state."""
    tape, first = Tape(*saved), state.permute(1, 2, 0, 3)
    dstate = torch.zeros_like(first) if dlast is None else dlast.permute(1, 2, 0, 3).clone()
    dy = torch.zeros_like(tape.hidden[1:]).permute(2, 0, 1, 3) if dy is None else dy
    if dlast is not None:  # c and n are what was written, divided by exp(m)
        dstate[3] -= (dstate[1:3] * tape.memory[-1].permute(2, 0, 1, 3)).sum(0)
    grads, dfirst = _replay(tape, dy, dstate, recurrent.flatten(2), starts, top=dlast is not None)
    dfirst[3] += (dfirst[1:3] * first[1:3]).sum(0)
    before = tape.hidden[:-1]
    if starts is not None:
        before = before.masked_fill(starts.t()[:, None, :, None], 0.0)
    drecurrent = before.transpose(0, 1).flatten(1, 2).mT @ grads.transpose(0, 1).flatten(1, 2).flatten(2)
    return grads.permute(2, 0, 1, 3, 4), drecurrent.view_as(recurrent), dfirst.permute(2, 0, 1, 3)


def operations(inputs: dict[str, Any]) -> float:
    """The recurrent map, and seven for each of its outputs."""
    return float(inputs["x"].numel() * (2 * inputs["recurrent"].shape[1] + 7))


TABLE = dispatch.Table(
    "slstm_scan",
    dispatch.Impl("torch", slstm_scan_fused, dispatch.when_traced),
    dispatch.Impl("reference", slstm_scan_reference),
    sequence=SEQUENCE,
)


@dispatch.op(TABLE, step=slstm_scan_step, operations=operations)
def slstm_scan(
    x: Tensor,
    *,
    recurrent: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of sLSTM (see the module for the equations).

    x [B T H 4 K] pre-activations of i, f, z, o without the recurrent part, recurrent [H K 4 K] (from h to the gates),
    state [B 4 H K] in fp32 or fp64 (h, c, n, m; zeros before the text), starts bool [B T].
    Returns h [B T H K] in the dtype of x, and the final state. ``ValueError`` for shapes or dtypes that do not fit.
    """
    batch, time, heads, width = dims("x B T H 4 K, recurrent H K 4 K", x, recurrent)
    check_starts(starts, batch, time)
    if state is None:
        state = x.new_zeros(batch, 4, heads, width, dtype=state_dtype(x))
    dims("x B T H 4 K, state B 4 H K", x, state)
    return dispatch.run(TABLE, dict(x=x, recurrent=recurrent, state=state, starts=starts), backend)


def inputs(case: Case) -> dict[str, Tensor | None]:
    """Random inputs for tests and benchmarks; the case's gates are the log forget gates before recurrence."""
    shape, width = (case.batch, case.time, case.heads), case.keys
    x = case.randn(*shape, 4, width)
    g = case.log_decay(*shape, width).clamp(max=-1e-12)
    x[..., 1, :] = g - torch.log(-torch.expm1(g))  # log sigmoid of this is g
    return dict(x=x, recurrent=0.5 * case.randn(case.heads, width, 4, width) * width**-0.5)
