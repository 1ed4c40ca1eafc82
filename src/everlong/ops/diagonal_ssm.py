"""Diagonal state space model per channel:  h_t = exp(g) h_{t-1} + x_t,   y_t = sum_n Re(w_n h_{t,n}).

Every channel has N complex states with constant log decays ``g``, real part ``<= 0``; its input enters them all
alike. The fast form is a convolution with K_l = sum_n Re(w_n exp(g_n l)) inside chunks of 64 tokens, by matrix
products, and ``diagonal_scan`` over the states between them: no FFT, O(T), exact in pieces, and nothing of
size T x N. Where documents start inside a chunk, the lower triangle of K is taken apart into square blocks,
half by half: whether token i of a block sees token j is then the product of two masks, one for each.

Serves S4D. Source: arXiv 2206.11893, sec. 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import check_starts, dims, state_dtype
from . import dispatch
from .cases import Case
from .common import loop, to_chunks, windows
from .diagonal_scan import diagonal_scan_chunk
from .transforms import custom_op, transforming

SEQUENCE = ("x",)
CHUNK = 64


def diagonal_ssm_step(x: Tensor, g: Tensor, w: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, the definition. x [B C], g, w [C N] complex, state [B C N] complex -> y [B C], state."""
    after = g.to(state.dtype).exp() * state + x.to(state.real.dtype)[..., None]
    return (w.to(state.dtype) * after).real.sum(-1).to(x.dtype), after


def diagonal_ssm_reference(
    x: Tensor, g: Tensor, w: Tensor, *, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop over ``diagonal_ssm_step``."""
    return loop(diagonal_ssm_step, {"x": x}, g=g, w=w, state=state, starts=starts)


def diagonal_ssm_chunk(
    x: Tensor, g: Tensor, w: Tensor, *, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Chunk-parallel form, all in real matrix products per channel; inside, x and y are [C BN L]."""
    batch, time = x.shape[:2]
    size = min(CHUNK, 1 << (time - 1).bit_length())
    g = g.to(state.dtype)
    powers = _powers(g, size)
    weighted = powers * w.to(state.dtype)[:, None]
    kernel = weighted[:, :-1].real.sum(-1)
    u = written = _transposed(to_chunks(x.to(state.real.dtype), size).flatten(0, 2)).unflatten(1, (-1, size))
    begins, keep = None, None
    if starts is None:
        y = u @ _toeplitz(F.pad(kernel, (size - 1, 0)))
    else:
        begins = to_chunks(starts, size)
        y, keep = _inside(u, kernel, begins.flatten(0, 1)), ~begins.any(dim=2)
        document = begins.flatten(0, 1).long().cumsum(dim=1)
        written = u * (document == document[:, -1:])
    enter = _entering(written.unflatten(1, (batch, -1)), g, powers, state, keep)
    read = enter.flatten(1, 2) @ _parts(weighted[:, 1:].conj().resolve_conj()).transpose(-1, -2)
    y = y + (read if starts is None else read * (document == 0))
    y = _transposed(y.flatten(1)).unflatten(0, (batch, -1))[:, :time].to(x.dtype)
    final = _leaving(written.unflatten(1, (batch, -1))[:, :, -1], enter[:, :, -1], powers, time, keep)
    return y, final


def _transposed(x: Tensor) -> Tensor:
    return x.t().contiguous() if transforming() else _transposed_op(x)


@custom_op("everlong::transposed", mutates_args=())
def _transposed_op(x: Tensor) -> Tensor:
    """A transposed copy whose gradient is a copy too: of strided gradients the matrix products would copy each row."""
    return x.t().clone(memory_format=torch.contiguous_format)


@_transposed_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[::-1])


_transposed_op.register_autograd(lambda _, grad: _transposed(grad))


def _powers(g: Tensor, size: int) -> Tensor:
    """``exp(g l)`` for l = 0 ... size, [C L+1 N] complex, from real functions, which are faster."""
    steps = torch.arange(size + 1, dtype=g.real.dtype, device=g.device)[:, None]
    length, phase = (g.real[:, None] * steps).exp(), g.imag[:, None] * steps
    return torch.complex(length * phase.cos(), length * phase.sin())


def _parts(z: Tensor) -> Tensor:
    """Complex [... N] as real [... 2N]."""
    return torch.view_as_real(z).flatten(-2)


def _whole(parts: Tensor) -> Tensor:
    """Real [... 2N] as complex [... N]."""
    return torch.view_as_complex(parts.unflatten(-1, (-1, 2)))


def _toeplitz(band: Tensor) -> Tensor:
    """``m[:, j, i] = band[:, S-1 + i-j]``.  [C 2S-1] -> [C S S]."""
    return windows(band).flip(-2)


def _inside(u: Tensor, kernel: Tensor, starts: Tensor) -> Tensor:
    """The convolution inside chunks u [C M S] that does not cross the starts [M S], half by half."""
    size = u.shape[-1]
    if size == 1:
        return u * kernel[:, :1, None]
    u, starts = u.unflatten(-1, (2, -1)), starts.unflatten(-1, (2, -1))
    document = starts.long().cumsum(dim=-1)
    sees, seen = document[:, 1] == 0, document[:, 0] == document[:, 0, -1:]
    cross = ((u[:, :, 0] * seen) @ _toeplitz(kernel[:, 1:size])) * sees
    first, second = _inside(u.flatten(1, 2), kernel, starts.flatten(0, 1)).unflatten(1, (-1, 2)).unbind(2)
    return torch.cat([first, second + cross], dim=-1)


def _entering(written: Tensor, g: Tensor, powers: Tensor, state: Tensor, keep: Tensor | None) -> Tensor:
    """States that enter the chunks, [C B N 2K], from what is written [C B N L]; ``keep`` [B N] lets one through."""
    batch, chunks, size = written.shape[1:]
    states = state[:, None]
    if chunks > 1:
        sums = written[:, :, :-1].flatten(1, 2) @ _parts(powers[:, :-1].flip(1))
        sums = sums.unflatten(1, (batch, -1)).permute(1, 2, 0, 3).flatten(2)
        resets = None if keep is None else ~keep[:, :-1]
        later, _ = diagonal_scan_chunk(_whole(sums), size * g.flatten(), state=state.flatten(1), starts=resets)
        states = torch.cat([states, later.unflatten(2, g.shape)], dim=1)
    return _parts(states).permute(2, 0, 1, 3)


def _leaving(written: Tensor, enter: Tensor, powers: Tensor, time: int, keep: Tensor | None) -> Tensor:
    """The state after the last chunk, [B C N], of which ``time`` leaves a part; written [C B L], enter [C B 2N]."""
    used = (time - 1) % written.shape[-1] + 1
    kept = _whole(enter.contiguous()) * powers[:, None, used]
    if keep is not None:
        kept = kept * keep[:, -1:]
    added = _whole(written[:, :, :used] @ _parts(powers[:, :used].flip(1)))
    return (kept + added).transpose(0, 1).contiguous()


def operations(inputs: dict[str, Any]) -> float:
    """A complex product, an input and the real part of another product for each number of the state."""
    return float(inputs["x"].numel() * inputs["g"].shape[1] * 11)


TABLE = dispatch.Table(
    "diagonal_ssm",
    dispatch.Impl("torch", diagonal_ssm_chunk),
    dispatch.Impl("reference", diagonal_ssm_reference),
    sequence=SEQUENCE,
)


@dispatch.op(TABLE, step=diagonal_ssm_step, operations=operations)
def diagonal_ssm(
    x: Tensor,
    g: Tensor,
    w: Tensor,
    *,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Diagonal state space model per channel (see the module for the equations).

    x [B T C]; g [C N] complex log decays with real part ``<= 0``; w [C N] complex; state [B C N] complex; starts
    bool [B T]. Returns y [B T C] in the dtype of x, and the final state. ``ValueError`` for what does not fit.
    """
    batch, time, channels, size = dims("x B T C, g C N, w C N, state B C N", x, g, w, state)
    check_starts(starts, batch, time)
    for name, tensor in (("g", g), ("w", w), ("state", state)):
        if tensor is not None and not tensor.is_complex():
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected a complex one; make it with torch.complex")
    if state is None:
        state = x.new_zeros(batch, channels, size, dtype=state_dtype(x).to_complex())
    return dispatch.run(TABLE, dict(x=x, g=g, w=w, state=state, starts=starts), backend)


def inputs(case: Case) -> dict[str, Tensor | None]:
    """Random inputs for tests and benchmarks: ``keys`` complex states in each of ``values`` channels."""
    shape = (case.values, case.keys)
    return dict(
        x=case.randn(case.batch, case.time, case.values),
        g=torch.complex(case.log_decay(*shape), 3 * case.randn(*shape)),
        w=torch.complex(case.randn(*shape), case.randn(*shape)),
    )
