"""The recurrence of the LSTM (Hochreiter and Schmidhuber 1997, with forget gates; equations of ``torch.nn.LSTM``):

    i~, f~, g~, o~ = x_t + W h_{t-1}
    c_t = sigmoid(f~) c_{t-1} + sigmoid(i~) tanh(g~),   h_t = sigmoid(o~) tanh(c_t)

The state ``[B 2 C]`` holds h and c. h enters its own gates, so no parallel form exists. The fast form is a loop of few
operations per token with its backward pass written out: what does not depend on the recurrence is computed for
all tokens at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..shapes import check_starts, dims, state_dtype
from . import dispatch
from .cases import Case
from .common import loop
from .transforms import custom_op

SEQUENCE = ("x",)


def lstm_scan_step(x: Tensor, *, recurrent: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, the definition. x [B 4 C] (i, f, g, o), recurrent [4 C C], state [B 2 C] -> h [B C], state [B 2 C]."""
    h, c = state.unbind(1)
    i, f, g, o = (x.to(state.dtype) + torch.einsum("bc,gjc->bgj", h, recurrent.to(state.dtype))).unbind(1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h.to(x.dtype), torch.stack([h, c], dim=1)


def lstm_scan_reference(
    x: Tensor, *, recurrent: Tensor, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop over ``lstm_scan_step``."""
    return loop(lstm_scan_step, {"x": x}, recurrent=recurrent, state=state, starts=starts)


def lstm_scan_fused(
    x: Tensor, *, recurrent: Tensor, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop in few operations per token, its backward pass written out (differentiable once)."""
    y, last = _Scan.apply(x.to(state.dtype), recurrent.to(state.dtype), state, starts)
    return y.to(x.dtype), last


class Tape(NamedTuple):
    """What the forward pass writes and the backward pass reads: [T B (gate) C], or T + 1 with the state before."""

    gates: Tensor  # i, f, g, o after their nonlinearities; f is 0 where a document starts
    bent: Tensor  # tanh(c)
    memory: Tensor  # T+1: c
    hidden: Tensor  # T+1: h

    @classmethod
    def blank(cls, x: Tensor, state: Tensor) -> Tape:
        """Buffers for x [B T 4 C], the state in its place."""
        batch, time, _, width = x.shape
        sizes = ((time, batch, 4), (time, batch), (time + 1, batch), (time + 1, batch))
        tape = cls(*(x.new_empty(*size, width) for size in sizes))
        tape.hidden[0], tape.memory[0] = state.unbind(1)
        return tape


def _record(tape: Tape, x: Tensor, recurrent: Tensor, starts: Tensor | None) -> None:
    """The forward loop: fills the tape. recurrent [C 4C]."""
    inputs, products = x.transpose(0, 1).flatten(2), tape.gates.flatten(2)
    begins = None if starts is None else starts.t()[..., None].unbind(0)
    memory, hidden = tape.memory.unbind(0), tape.hidden.unbind(0)
    steps = zip(inputs.unbind(0), products.unbind(0), tape.gates.unbind(0), tape.bent.unbind(0), strict=True)
    for t, (given, product, gates, bent) in enumerate(steps):
        h = hidden[t] if begins is None else hidden[t].masked_fill(begins[t], 0.0)
        torch.addmm(given, h, recurrent, out=product)
        i, f, g, o = gates.unbind(1)
        gates[:, :2].sigmoid_()
        if begins is not None:
            f.masked_fill_(begins[t], 0.0)
        torch.mul(f, memory[t], out=memory[t + 1]).addcmul_(i, g.tanh_())
        torch.tanh(memory[t + 1], out=bent)
        torch.mul(o.sigmoid_(), bent, out=hidden[t + 1])


def _replay(tape: Tape, dy: Tensor, dstate: Tensor, recurrent: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The backward loop: gradients of the pre-activations [T B 4 C] and of the state [B 2 C]. recurrent [4C C]."""
    i, f, g, o = tape.gates.unbind(2)
    by_c = torch.stack([g * i * (1 - i), tape.memory[:-1] * f * (1 - f), i * (1 - g * g)], dim=2).unbind(0)
    by_o, outputs = (tape.bent * o * (1 - o)).unbind(0), (o * (1 - tape.bent.square())).unbind(0)
    begins = None if starts is None else starts.t()[..., None].unbind(0)
    grads, dys, keeps = torch.empty_like(tape.gates), dy.unbind(1), f.unbind(0)
    dh, dc = dstate[:, 0] + (dys[-1] if dys else 0), dstate[:, 1].clone()
    for t in range(len(dys) - 1, -1, -1):
        dc.addcmul_(dh, outputs[t])
        torch.mul(dc[:, None], by_c[t], out=grads[t, :, :3])
        torch.mul(dh, by_o[t], out=grads[t, :, 3])
        dc.mul_(keeps[t])
        dh = grads[t].flatten(1) @ recurrent
        if begins is not None:
            dh.masked_fill_(begins[t], 0.0)
        if t:
            dh.add_(dys[t - 1])
    return grads, torch.stack([dh, dc], dim=1)


class _Scan(torch.autograd.Function):
    """Both loops, and what frames them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recurrent: Tensor, state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        tape = Tape.blank(x, state)
        _record(tape, x, recurrent.flatten(0, 1).t(), starts)
        ctx.save_for_backward(*tape, recurrent, starts)
        return tape.hidden[1:].transpose(0, 1), torch.stack([tape.hidden[-1], tape.memory[-1]], dim=1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        *tape, recurrent, starts = ctx.saved_tensors
        return *_gradients(dy, dlast, tape, recurrent, starts), None


@custom_op("everlong::lstm_scan_backward", mutates_args=())
def _gradients(
    dy: Tensor, dlast: Tensor, saved: list[Tensor], recurrent: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, recurrent and the state."""
    tape = Tape(*saved)
    grads, dstate = _replay(tape, dy, dlast, recurrent.flatten(0, 1), starts)
    before = tape.hidden[:-1]
    if starts is not None:
        before = before.masked_fill(starts.t()[..., None], 0.0)
    drecurrent = grads.flatten(0, 1).flatten(1).t() @ before.flatten(0, 1)
    return grads.transpose(0, 1), drecurrent.view_as(recurrent), dstate


def operations(inputs: dict[str, Any]) -> float:
    """The recurrent map, and five for each of its outputs."""
    return float(inputs["x"].numel() * (2 * inputs["recurrent"].shape[-1] + 5))


TABLE = dispatch.Table(
    "lstm_scan",
    dispatch.Impl("torch", lstm_scan_fused, dispatch.when_traced),
    dispatch.Impl("reference", lstm_scan_reference),
    sequence=SEQUENCE,
)


@dispatch.op(TABLE, step=lstm_scan_step, operations=operations)
def lstm_scan(
    x: Tensor,
    *,
    recurrent: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of the LSTM (see the module for the equations).

    x [B T 4 C] pre-activations of i, f, g, o without the recurrent part, recurrent [4 C C] (``weight_hh_l0`` of
    ``torch.nn.LSTM`` unflattened), state [B 2 C] in fp32 or fp64 (h, c; zeros before the text), starts bool [B T].
    Returns h [B T C] in the dtype of x, and the final state. ``ValueError`` for shapes or dtypes that do not fit.
    """
    batch, time, width = dims("x B T 4 C, recurrent 4 C C", x, recurrent)
    check_starts(starts, batch, time)
    if state is None:
        state = x.new_zeros(batch, 2, width, dtype=state_dtype(x))
    dims("x B T 4 C, state B 2 C", x, state)
    return dispatch.run(TABLE, dict(x=x, recurrent=recurrent, state=state, starts=starts), backend)


def inputs(case: Case) -> dict[str, Tensor | None]:
    """Random inputs for tests and benchmarks; the case's gates are the log forget gates before recurrence."""
    width = case.keys
    x = case.randn(case.batch, case.time, 4, width)
    g = case.log_decay(case.batch, case.time, width).clamp(max=-1e-12)
    x[..., 1, :] = g - torch.log(-torch.expm1(g))  # log sigmoid of this is g
    return dict(x=x, recurrent=0.5 * case.randn(4, width, width) * width**-0.5)
