"""The linear map  y = x W^T + b,  on the fastest product that PyTorch carries.

PyTorch hands fp32 products on a CPU to MKL, which on many processors leaves the AVX-512 units idle; oneDNN, which it
carries too, uses them (LOG.md: 2.2 times the speed). So large fp32 products on a CPU with AVX-512 go to oneDNN, forward
and backward, and everything else to ``torch.nn.functional.linear``.

oneDNN compiles a program for each shape, which takes milliseconds, and keeps a thousand of half a megabyte each. Texts
have all lengths, so it never sees them: it is given pieces of few sizes (1999 rows = 3 x 512 + 3 x 128 + 79; a power of
two is one piece), and the rows that are left go to MKL. What a row becomes depends on the others by rounding alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .native.product import lower_linear
from .record import leaf
from .transforms import custom_op, several_gradients, transforming

ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
WORTH = 1 << 21  # multiply-adds: for fewer, calling oneDNN costs more than it saves
ROWS, SUMMED = 128, 512  # the smallest piece: of rows that stay rows, and of rows that are summed up


@leaf(lower_linear)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + b``: x [... I], weight [O I], bias [O] -> y [... O]. Obeys autocast as PyTorch's own does.

    ``ValueError`` for shapes that do not fit.
    """
    _check(x, weight, bias)
    if not _for_onednn(x.numel() * weight.shape[0], x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return _rows_op(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _rows(x, weight, bias)


def precise_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``linear`` of bf16 or fp16 inputs and fp32 weights with all digits of these, rounded at its end: y like x.

    Where many rows are read in bf16, the weights are the sum of two bf16 numbers (16 digits; y has 8), which is one
    product that reads and writes bf16: ``y = [x x] [high low]^T``.
    """
    rows = x.numel() // x.shape[-1]
    if rows <= ROWS or x.dtype != torch.bfloat16 or (torch.is_grad_enabled() and weight.requires_grad):
        return linear(x.to(weight.dtype), weight).to(x.dtype)
    high = weight.to(x.dtype)
    low = (weight - high).to(x.dtype)
    return F.linear(torch.cat([x, x], dim=-1), torch.cat([high, low], dim=-1))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The kernels read what the shapes promise, so these are looked at first."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)} and weight {list(weight.shape)}, expected [... I] and [O I]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}, expected [O] = {list(weight.shape[:1])} as weight has it")


def _for_onednn(work: int, *tensors: Tensor | None) -> bool:
    """Plain fp32 tensors on a CPU, outside autocast and the transforms of ``torch.func``, and enough to multiply."""
    if not ONEDNN or work < WORTH or torch.is_autocast_enabled("cpu") or transforming():
        return False
    given = [t for t in tensors if t is not None]
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype != torch.float32 or t.device.type != "cpu" for t in given):
        return False
    return not several_gradients(*given)


def _one_piece(rows: int) -> bool:
    """A power of two: of these there are few."""
    return rows & (rows - 1) == 0


def _pieces(rows: int, work: int, least: int) -> list[int]:
    """Rows for oneDNN: multiples of ``least`` by 1, 4, 16 ..., that are ``WORTH`` multiply-adds at ``work`` a row."""
    sizes, size = [], least
    while 4 * size <= rows:
        size *= 4
    while size >= least and size * work >= WORTH:
        sizes += [size] * (rows // size)
        rows, size = rows % size, size // 4
    return sizes


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in pieces of the rows of x [... I]; the rest of them by MKL."""
    if _one_piece(x.numel() // x.shape[-1]):  # as it is, without a call more than it takes
        return _whole(x, weight, bias)
    return _rows_now(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _rows_now(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _one_piece(len(x)):
        return _whole(x, weight, bias)
    weight, bias = _dense(weight), None if bias is None else bias.contiguous()  # once for all pieces
    sizes = _pieces(len(x), weight.numel(), ROWS)
    *parts, rest = x.split([*sizes, len(x) - sum(sizes)])
    done = [_onednn(part, weight, bias) for part in parts]
    if len(rest):
        done.append(F.linear(rest, weight, bias))
    return done[0] if len(done) == 1 else torch.cat(done)


def _summed(dy: Tensor, x: Tensor) -> Tensor:
    """``dy^T x`` summed over the rows of dy [N O] and x [N I], in pieces of the rows; the rest of them by MKL."""
    if _one_piece(len(x)):
        return _whole(dy.t(), x.t(), None)
    sizes = _pieces(len(x), dy.shape[1] * x.shape[1], SUMMED)
    rest = len(x) - sum(sizes)
    if not sizes:
        return dy.t() @ x
    *parts, (last_dy, last_x) = zip(dy.split([*sizes, rest]), x.split([*sizes, rest]), strict=True)
    total, *others = (_whole(a.t(), b.t(), None) for a, b in parts)
    for other in others:
        total.add_(other)
    return total.addmm_(last_dy.t(), last_x) if rest else total


# For compiled graphs, in which the pieces are cut when they run.
_rows_op = custom_op("everlong::linear", mutates_args=(), device_types="cpu")(_rows_now)
_summed_op = custom_op("everlong::linear_summed", mutates_args=(), device_types="cpu")(_summed)


@_rows_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


@_summed_op.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(dy.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.biased = bias is not None


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    dx = _rows_op(dy, weight.t(), None) if needs_x else None
    dw = _summed_op(dy, x) if needs_weight else None
    return dx, dw, dy.sum(0) if ctx.biased and needs_bias else None


_rows_op.register_autograd(_gradients, setup_context=_save)


def _dense(weight: Tensor) -> Tensor:
    """oneDNN takes a matrix or its transpose; from a matrix with gaps it computes a thousand times slower."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _whole(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product by oneDNN, from operands that it takes as they lie."""
    return _onednn(x, _dense(weight), None if bias is None else bias.contiguous())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Bias is read as it lies in memory, whatever its strides say: it must be contiguous."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The same with its gradients:  dx = dy W,  dW = dy^T x,  db = the sum of dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _rows(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = linear(dy, weight.t()) if needs_x else None
        dw = outer(dy, x) if needs_weight else None
        return dx, dw, dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.biased and needs_bias else None


def outer(dy: Tensor, x: Tensor) -> Tensor:
    """``dy^T x`` over all rows, the gradient of a weight: dy [... O], x [... I] -> [O I]."""
    tracked = torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad)
    rows, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if not _for_onednn(dy.numel() * x.shape[-1], dy, x):
        return rows.t() @ inputs
    return _Outer.apply(rows, inputs) if tracked else _summed(rows, inputs)


class _Outer(torch.autograd.Function):
    """The same with its gradients, for gradients of gradients:  ddy = x G^T,  dx = dy G."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(dy, x)
        return _summed(dy, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, x = ctx.saved_tensors
        needs_dy, needs_x = ctx.needs_input_grad
        return linear(x, grad) if needs_dy else None, linear(dy, grad.t()) if needs_x else None


class Linear(nn.Linear):
    """``torch.nn.Linear``, computed by ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """x [... I] -> y [... O]."""
        return linear(x, self.weight, self.bias)
