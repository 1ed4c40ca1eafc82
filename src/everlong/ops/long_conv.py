"""Causal depthwise convolution with a long kernel:  y_t = sum_{j=0}^{L-1} kernel[:, j] x_{t-j}   per channel.

By FFT in O(T log T); exact when a text comes in pieces. The state is the whole history of inputs, ``[B S C]``, newest
last; inputs of earlier documents are zero in it. Lags of L and more contribute nothing.
Used by Hyena (arXiv 2302.10866), and by S4 and its kin where they are trained as convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import check_starts, dims, state_dtype
from ..state import growing, state
from . import dispatch
from .cases import Case
from .common import windows
from .native.long_conv import lower_step
from .record import leaf
from .transforms import custom_op, transforming

SEQUENCE = ("x",)
PRODUCT = 32  # halves of documents up to this length meet in a matrix product, longer ones in an FFT


@state
class History:
    """All inputs so far."""

    x: Tensor = growing("start")  # [B S C]


def long_conv_step(x: Tensor, *, kernel: Tensor, state: History) -> tuple[Tensor, History]:
    """One token, the definition. x [B C], kernel [C L], state [B S C] -> y [B C], state."""
    past = torch.cat([state.x, x.to(state.x.dtype)[:, None]], dim=1)
    lags = min(past.shape[1], kernel.shape[1])
    return newest(past[:, past.shape[1] - lags :], kernel[:, :lags].flip(1).t()).to(x.dtype), History(past)


@leaf(lower_step)
def history_step(x: Tensor, lags: Callable[[int], Tensor], state: History) -> tuple[Tensor, History]:
    """``long_conv_step`` with a kernel that is a function of the lag: ``lags(n)`` is the kernel [C n].

    The weights that ``lags`` reads must stay as they are while a recording of this step is in use.
    """
    return long_conv_step(x, kernel=lags(state.x.shape[1] + 1), state=state)


def newest(past: Tensor, weights: Tensor) -> Tensor:
    """The last output: ``sum_s past[b, s] weights[s]``.  past [B S C], weights [S C], oldest first -> [B C]."""
    wide = state_dtype(past)
    return (past.to(wide) * weights.to(wide)).sum(dim=1)


def long_conv_reference(
    x: Tensor, *, kernel: Tensor, state: History, starts: Tensor | None = None
) -> tuple[Tensor, History]:
    """What the loop over ``long_conv_step`` gives, each token reading its last L inputs from one tensor.

    Carrying the history itself would copy the past T times, for autograd too.
    """
    lags, time = kernel.shape[1], x.shape[1]
    past = torch.cat([state.x, x.to(state.x.dtype)], dim=1)
    document = _documents(state, x, starts)
    inputs = F.pad(past, [0, 0, lags, 0]).unfold(1, lags, 1)[:, -time:].unbind(1)
    origins = F.pad(document, [lags, 0], value=-1).unfold(1, lags, 1)[:, -time:].unbind(1)
    outputs = [
        (near * (origin == origin[:, -1:])[:, None] * kernel.flip(1)).sum(-1)
        for near, origin in zip(inputs, origins, strict=True)
    ]
    kept = torch.where((document == document[:, -1:])[..., None], past, 0.0)
    return torch.stack(outputs, dim=1).to(x.dtype), History(kept)


def _documents(state: History, x: Tensor, starts: Tensor | None) -> Tensor:
    """The document of each of the S + T inputs: 0 for the one that was under way, then 1, 2, ...  ``[B S+T]``."""
    begins = torch.zeros_like(x[..., 0], dtype=torch.long) if starts is None else starts.long()
    return F.pad(begins, [state.x.shape[1], 0]).cumsum(1)


def long_conv_chunk(
    x: Tensor, *, kernel: Tensor, state: History, starts: Tensor | None = None
) -> tuple[Tensor, History]:
    """All tokens at once: one FFT over history and tokens, or with ``starts`` one per level of halves."""
    time, wide = x.shape[1], state_dtype(x)
    past = torch.cat([state.x, x.to(state.x.dtype)], dim=1)
    if starts is None:
        return _fft_conv(past.to(wide), kernel.to(wide), time).to(x.dtype), History(past)
    document = _documents(state, x, starts)
    slots = state.x.shape[1]
    y = _within_documents(x.to(wide), kernel.to(wide), document[:, slots:])
    if slots:
        earlier = _fft_conv(F.pad(state.x.to(wide), [0, 0, 0, time]), kernel.to(wide), time)
        y = y + earlier * (document[:, slots:, None] == 0)
    kept = past * (document == document[:, -1:])[..., None]
    return y.to(x.dtype), History(kept)


def _fft_conv(x: Tensor, kernel: Tensor, time: int) -> Tensor:
    return (_fft_conv_plain if transforming() else _fft_conv_op)(x, kernel, time)


def _fft_conv_plain(x: Tensor, kernel: Tensor, time: int) -> Tensor:
    """The last ``time`` outputs of the convolution of x [B N C] with kernel [C L].  -> [B time C]."""
    length, size = x.shape[1], _fft_size(x, kernel, time)
    spectrum = torch.fft.rfft(x.transpose(1, 2), size) * torch.fft.rfft(kernel[:, :length], size)
    return torch.fft.irfft(spectrum, size)[..., length - time : length].transpose(1, 2).contiguous()


_fft_conv_op = custom_op("everlong::fft_conv", mutates_args=())(_fft_conv_plain)


@_fft_conv_op.register_fake
def _(x: Tensor, kernel: Tensor, time: int) -> Tensor:
    return x.new_empty(len(x), time, x.shape[2])


@custom_op("everlong::fft_conv_backward", mutates_args=())
def _fft_conv_backward(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and kernel. Autograd's own would take the FFTs of real numbers as complex ones."""
    length, time, lags = x.shape[1], grad.shape[1], min(x.shape[1], kernel.shape[1])
    size = _fft_size(x, kernel, time)
    spectrum = torch.fft.rfft(F.pad(grad.transpose(1, 2), [length - time, 0]), size)
    weights, inputs = torch.fft.rfft(kernel[:, :length], size), torch.fft.rfft(x.transpose(1, 2), size)
    grad_x = torch.fft.irfft(spectrum * weights.conj(), size)[..., :length].transpose(1, 2)
    grad_kernel = torch.fft.irfft((spectrum * inputs.conj()).sum(0), size)[..., :lags]
    return grad_x.contiguous(), F.pad(grad_kernel, [0, kernel.shape[1] - lags]).contiguous()


@_fft_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), kernel.new_empty(kernel.shape)


def _fft_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _fft_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_fft_conv_backward(grad, *ctx.saved_tensors), None)


_fft_conv_op.register_autograd(_fft_gradients, setup_context=_fft_save)


def _fft_size(x: Tensor, kernel: Tensor, time: int) -> int:
    """A power of two, or three quarters of it, so large that what wraps around falls on outputs that nobody reads."""
    length = x.shape[1]
    least, size = max(length, time + min(length, kernel.shape[1]) - 1), 4
    while size < least:
        size *= 2
    return size * 3 // 4 if size * 3 // 4 >= least else size


def _within_documents(x: Tensor, kernel: Tensor, document: Tensor) -> Tensor:
    return (_within_plain if transforming() else _within_op)(x, kernel, document)


@custom_op("everlong::conv_within_documents", mutates_args=())
def _within_op(x: Tensor, kernel: Tensor, document: Tensor) -> Tensor:
    """The convolution where a token sees its own ``document [B T]`` only.  x [B T C], kernel [C L] -> [B T C].

    Two tokens belong to a left and a right half of exactly one block of 2, 4, 8, ... tokens. Across its middle they see
    each other if both are of the document to which the token before the middle belongs: one mask for what leaves the
    left half, one for what reaches the right half, and an ordinary convolution between. Cost O(T log^2 T) whatever
    the documents are.
    """
    wide, weights, levels = _padded(x), _cropped(x, kernel), _levels(document, x.dtype)
    y = wide * weights[:, None, :1]
    for half, leaves, arrives in levels:
        across = _across(_halves(wide, half)[0] * leaves, weights[:, : 2 * half])
        _halves(y, half)[1].addcmul_(across, arrives)
    return y[..., : x.shape[1]].permute(1, 2, 0).contiguous()


def _within_plain(x: Tensor, kernel: Tensor, document: Tensor) -> Tensor:
    """The same in PyTorch's own operations, for transforms."""
    wide, weights = _padded(x), _cropped(x, kernel)
    y = wide * weights[:, None, :1]
    for half, leaves, arrives in _levels(document, x.dtype):
        across = _across(_halves(wide, half)[0] * leaves, weights[:, : 2 * half]) * arrives
        y = y + torch.stack([torch.zeros_like(across), across], dim=-2).flatten(-3)
    return y[..., : x.shape[1]].permute(1, 2, 0).contiguous()


@_within_op.register_fake
def _(x: Tensor, kernel: Tensor, document: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("everlong::conv_within_documents_backward", mutates_args=())
def _within_backward(grad: Tensor, x: Tensor, kernel: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and kernel, by the same halves."""
    inputs, outer, weights = _padded(x), _padded(grad), _cropped(x, kernel)
    grad_x, grad_kernel = outer * weights[:, None, :1], torch.zeros_like(weights)
    grad_kernel[:, 0] = (outer * inputs).sum((1, 2))
    for half, leaves, arrives in _levels(document, x.dtype):
        right = _halves(outer, half)[1] * arrives
        _halves(grad_x, half)[0].addcmul_(_back(right, weights[:, : 2 * half]), leaves)
        grad_kernel[:, : 2 * half] += _products(_halves(inputs, half)[0] * leaves, right)
    used = min(kernel.shape[1], weights.shape[1])
    grad_kernel = F.pad(grad_kernel[:, :used], [0, kernel.shape[1] - used])
    return grad_x[..., : x.shape[1]].permute(1, 2, 0).contiguous(), grad_kernel.contiguous()


@_within_backward.register_fake
def _(grad: Tensor, x: Tensor, kernel: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), kernel.new_empty(kernel.shape)


def _within_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _within_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_within_backward(grad, *ctx.saved_tensors), None)


_within_op.register_autograd(_within_gradients, setup_context=_within_save)


def _room(time: int) -> int:
    """The power of two that holds ``time`` tokens."""
    return 1 << (time - 1).bit_length()


def _padded(x: Tensor) -> Tensor:
    """``[B T C] -> [C B size]`` with zeros behind the tokens."""
    return F.pad(x.permute(2, 0, 1), [0, _room(x.shape[1]) - x.shape[1]])


def _cropped(x: Tensor, kernel: Tensor) -> Tensor:
    """As many lags as padded tokens, zeros where the kernel has none."""
    size = _room(x.shape[1])
    return F.pad(kernel[:, :size], [0, max(size - kernel.shape[1], 0)])


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views of the left and right halves of blocks of ``2 half`` tokens.  [... T] -> twice [... N half]."""
    left, right = x.unflatten(-1, (-1, 2, half)).unbind(-2)
    return left, right


def _levels(document: Tensor, dtype: torch.dtype) -> list[tuple[int, Tensor, Tensor]]:
    """For halves of 1, 2, 4, ... tokens: masks of what leaves left ones and of what reaches right ones, [B N half]."""
    document = F.pad(document, [0, _room(document.shape[1]) - document.shape[1]])
    levels, half = [], 1
    while half < document.shape[1]:
        left, right = _halves(document, half)
        border = left[..., -1:]
        levels.append((half, (left == border).to(dtype), (right == border).to(dtype)))
        half *= 2
    return levels


def _hankel(kernel: Tensor) -> Tensor:
    """``[C 2c] -> [C c c]``: the kernel at lag 1 + row + column; rows flipped, lag ``c + t - s`` at row s, column t."""
    return windows(kernel[:, 1:])


def _across(left: Tensor, kernel: Tensor) -> Tensor:
    """What left halves [C B N c] give to the right halves after them, by kernel [C 2c].  -> [C B N c]."""
    half = left.shape[3]
    if half <= PRODUCT:
        return (left.flatten(1, 2) @ _hankel(kernel).flip(1)).unflatten(1, left.shape[1:3])
    spectrum = torch.fft.rfft(left, 2 * half) * torch.fft.rfft(kernel)[:, None, None]
    return torch.fft.irfft(spectrum, 2 * half)[..., half:]


def _back(right: Tensor, kernel: Tensor) -> Tensor:
    """The transpose of ``_across``: gradients of right halves to those of left ones."""
    half = right.shape[3]
    if half <= PRODUCT:
        return (right.flatten(1, 2) @ _hankel(kernel).flip(2)).unflatten(1, right.shape[1:3])
    spectrum = torch.fft.rfft(F.pad(right, [half, 0])) * torch.fft.rfft(kernel)[:, None, None].conj()
    return torch.fft.irfft(spectrum, 2 * half)[..., :half]


def _products(left: Tensor, right: Tensor) -> Tensor:
    """``sum left_s right_t`` over all blocks and pairs of lag ``c + t - s``: the gradient of the kernel.  -> [C 2c]."""
    half = left.shape[3]
    if half > PRODUCT:
        spectrum = torch.fft.rfft(left, 2 * half).conj() * torch.fft.rfft(F.pad(right, [half, 0]))
        return torch.fft.irfft(spectrum.sum((1, 2)), 2 * half)
    columns = left.flatten(1, 2).transpose(1, 2).contiguous()  # one copy, where bmm would make one per channel
    pairs = (columns @ right.flatten(1, 2)).flip(1)  # [C c c], lag 1 + row + column
    slanted = F.pad(pairs, [0, half]).flatten(1)[:, :-half]  # each row moves by one
    return F.pad(slanted.unflatten(1, (half, 2 * half - 1)).sum(1), [1, 0])


def operations(inputs: dict[str, Any]) -> float:
    """Three real transforms: what an FFT needs, where the sum over all lags would take more."""
    (batch, time, channels), lags = inputs["x"].shape, inputs["kernel"].shape[1]
    length = 2 ** math.ceil(math.log2(time + lags))
    return float(batch * channels * 3 * 2.5 * length * math.log2(length))


def graph(inputs: dict[str, Any]) -> float:
    """The state is the whole text, of which each token keeps a view."""
    return 8.0 * inputs["x"].numel()


TABLE = dispatch.Table(
    "long_conv",
    dispatch.Impl("torch", long_conv_chunk),
    dispatch.Impl("reference", long_conv_reference),
    sequence=SEQUENCE,
)


@dispatch.op(TABLE, step=long_conv_step, operations=operations, graph=graph)
def long_conv(
    x: Tensor, *, kernel: Tensor, state: History | None = None, starts: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, History]:
    """Causal depthwise convolution with a long kernel (see the module for the equation).

    x [B T C], kernel [C L] (lag 0 first), state ``History`` with x [B S C], starts bool [B T]. The products are taken
    in fp32 (fp64 for fp64 inputs). Returns y [B T C] in the dtype of x, and the state of S + T inputs.
    ``ValueError`` for shapes that do not fit.
    """
    batch, time, channels, _ = dims("x B T C, kernel C L", x, kernel)
    check_starts(starts, batch, time)
    if state is None:
        state = History(x.new_zeros(batch, 0, channels))
    dims("x B T C, state.x B S C", x, state.x)
    return dispatch.run(TABLE, dict(x=x, kernel=kernel, state=state, starts=starts), backend)


def inputs(case: Case) -> dict[str, Tensor]:
    """Random inputs for tests and benchmarks; ``case.variant``: a kernel of 5 lags, or longer than the text."""
    channels = case.heads * case.keys
    lags = 5 if case.variant == "short" else min(case.time + 9, 300)
    return dict(x=case.randn(case.batch, case.time, channels), kernel=case.randn(channels, lags))


VARIANTS = ("long", "short")
