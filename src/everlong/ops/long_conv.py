"""Causal depthwise convolution with a long kernel:  y_t = sum_{j=0}^{L-1} kernel[:, j] x_{t-j}   per channel.

By FFT in O(T log T); exact when a text comes in pieces. The state is the whole history of inputs, ``[B S C]``, newest
last; inputs of earlier documents are zero in it. Lags of L and more contribute nothing.
Used by Hyena (arXiv 2302.10866), and by S4 and its kin where they are trained as convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import check_starts, dims, state_dtype
from ..state import growing, state
from . import dispatch
from .cases import Case

SEQUENCE = ("x",)
PRODUCT = 64  # halves of documents up to this length meet in a matrix product, longer ones in an FFT


@state
class History:
    """All inputs so far."""

    x: Tensor = growing("start")  # [B S C]


def long_conv_step(x: Tensor, *, kernel: Tensor, state: History) -> tuple[Tensor, History]:
    """One token, the definition. x [B C], kernel [C L], state [B S C] -> y [B C], state."""
    past = torch.cat([state.x, x.to(state.x.dtype)[:, None]], dim=1)
    lags = min(past.shape[1], kernel.shape[1])
    return newest(past[:, past.shape[1] - lags :], kernel[:, :lags].flip(1).t()).to(x.dtype), History(past)


def newest(past: Tensor, weights: Tensor) -> Tensor:
    """The last output: ``sum_s past[b, s] weights[s]``.  past [B S C], weights [S C], oldest first -> [B C]."""
    wide = state_dtype(past)
    return (past.to(wide) * weights.to(wide)).sum(dim=1)


def long_conv_reference(x: Tensor, *, kernel: Tensor, state: History,
                        starts: Tensor | None = None) -> tuple[Tensor, History]:
    """What the loop over ``long_conv_step`` gives, each token reading its last L inputs from one tensor.

    Carrying the history itself would copy the past T times, for autograd too.
    """
    lags, time = kernel.shape[1], x.shape[1]
    past = torch.cat([state.x, x.to(state.x.dtype)], dim=1)
    document = _documents(state, x, starts)
    inputs = F.pad(past, [0, 0, lags, 0]).unfold(1, lags, 1)[:, -time:].unbind(1)
    origins = F.pad(document, [lags, 0], value=-1).unfold(1, lags, 1)[:, -time:].unbind(1)
    outputs = [(near * (origin == origin[:, -1:])[:, None] * kernel.flip(1)).sum(-1)
               for near, origin in zip(inputs, origins, strict=True)]
    kept = torch.where((document == document[:, -1:])[..., None], past, 0.0)
    return torch.stack(outputs, dim=1).to(x.dtype), History(kept)


def _documents(state: History, x: Tensor, starts: Tensor | None) -> Tensor:
    """The document of each of the S + T inputs: 0 for the one that was under way, then 1, 2, ...  ``[B S+T]``."""
    begins = torch.zeros_like(x[..., 0], dtype=torch.long) if starts is None else starts.long()
    return F.pad(begins, [state.x.shape[1], 0]).cumsum(1)


def long_conv_chunk(x: Tensor, *, kernel: Tensor, state: History,
                    starts: Tensor | None = None) -> tuple[Tensor, History]:
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
    """The last ``time`` outputs of the convolution of x [B N C] with kernel [C L].  -> [B time C]."""
    length = x.shape[1]
    lags = min(length, kernel.shape[1])
    size = _fft_size(max(length, time + lags - 1))  # what wraps around falls on outputs that nobody reads
    spectrum = torch.fft.rfft(x.transpose(1, 2), size) * torch.fft.rfft(kernel[:, :lags], size)
    return torch.fft.irfft(spectrum, size)[..., length - time : length].transpose(1, 2)


def _fft_size(least: int) -> int:
    """The next power of two, or three quarters of it."""
    size = 4
    while size < least:
        size *= 2
    return size * 3 // 4 if size * 3 // 4 >= least else size


def _within_documents(x: Tensor, kernel: Tensor, document: Tensor) -> Tensor:
    """The convolution where a token sees its own ``document [B T]`` only.  x [B T C], kernel [C L] -> [B T C].

    Two tokens belong to a left and a right half of exactly one block of 2, 4, 8, ... tokens. Across its middle they see
    each other if both are of the document to which the token before the middle belongs: one mask for what leaves the
    left half, one for what reaches the right half, and an ordinary convolution between. Cost O(T log^2 T) whatever
    the documents are.
    """
    time, half = x.shape[1], 1
    size = 1 << (time - 1).bit_length()
    x = F.pad(x.permute(2, 0, 1), [0, size - time])  # [C B size]
    document = F.pad(document, [0, size - time])
    kernel = F.pad(kernel[:, :size], [0, max(size - kernel.shape[1], 0)])
    y = x * kernel[:, None, :1]
    while half < size:
        left = x.unflatten(2, (-1, 2, half))[:, :, :, 0]
        own, others = document.unflatten(1, (-1, 2, half)).unbind(2)
        right = _across(left * (own == own[..., -1:]), kernel[:, : 2 * half]) * (others == own[..., -1:])
        before, after = y.unflatten(2, (-1, 2, half)).unbind(3)
        y = torch.stack([before, after + right], dim=3).flatten(2)
        half *= 2
    return y[..., :time].permute(1, 2, 0)


def _across(left: Tensor, kernel: Tensor) -> Tensor:
    """What left halves [C B N c] give to the right halves after them, by kernel [C 2c].  -> [C B N c]."""
    half = left.shape[3]
    if half > PRODUCT:
        spectrum = torch.fft.rfft(left, 2 * half) * torch.fft.rfft(kernel)[:, None, None]
        return torch.fft.irfft(spectrum, 2 * half)[..., half:]
    toeplitz = kernel[:, 1:].unfold(1, half, 1).flip(1)  # [C s t] = kernel at lag half + t - s
    return (left.flatten(1, 2) @ toeplitz).unflatten(1, left.shape[1:3])


TABLE = (
    dispatch.Impl("torch", long_conv_chunk),
    dispatch.Impl("reference", long_conv_reference),
)


def long_conv(x: Tensor, *, kernel: Tensor, state: History | None = None, starts: Tensor | None = None,
              backend: str | None = None) -> tuple[Tensor, History]:
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
