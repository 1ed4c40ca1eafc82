"""Products of a few rows with weights in fp32, bf16, int8 or int4: packing, the native product, the PyTorch form.

A matrix [out, in] becomes a ``Packed``. Integers lie as ``product.h`` says: 16 outputs side by side, four inputs of
each in 32 bits, inputs padded to a multiple of 32 and outputs to one of 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...config import suggest
from ..record import leaf
from . import MISSING, call, count

FORMATS = ("fp32", "bf16", "int8", "int4")  # the order is that of Weights in product.h
LANES, GROUP = 16, 32
MAX_ROWS = 64  # of a native product; for more, unpacked rows and PyTorch's product are faster
MAX_IN = 65536  # inputs, so that sums of 8-bit products stay below 2^31
CANDIDATES = torch.linspace(0.75, 1.2, 16)  # scales tried for an int4 group, as shares of max / 8


class Packed(NamedTuple):
    """A matrix [out, in] in one of the ``FORMATS``; ``scale`` is None for fp32 and bf16."""

    weight: Tensor  # [out in], or uint8 [out/16 in/4 16 4] (int8), [out/16 in/32 4 16 4] (int4)
    scale: Tensor | None  # fp32 [out padded] (int8), bf16 [out/16 in/32 16] (int4)
    out: int
    width: int

    @property
    def kind(self) -> int:
        """The index of the format in ``FORMATS``."""
        if self.scale is None:
            return int(self.weight.dtype == torch.bfloat16)
        return 2 if self.scale.dtype == torch.float32 else 3


def check_format(name: str) -> str:
    """``name``, or ``ValueError`` where it is none of the ``FORMATS``."""
    if name not in FORMATS:
        raise ValueError(f"no weight format {name!r}{suggest(name, FORMATS)}")
    return name


def pack(weight: Tensor, format: str) -> Packed:
    """``weight`` [out in] in ``format``; fp32 and bf16 only change the dtype. ``ValueError`` for NaN or infinity.

    int8: one scale a row, max / 127, so that the error is at most half a step. int4: groups of 32 inputs, values
    -8..7 times a bf16 scale that may be negative (the largest weight is on the side of -8), the one of 16
    candidates with the smallest squared error.
    """
    out, width = weight.shape
    kind = FORMATS.index(check_format(format))
    weight = weight.detach()
    if kind < 2:
        return Packed(weight.to(torch.bfloat16 if kind else torch.float32).contiguous(), None, out, width)
    if width > MAX_IN:
        raise ValueError(f"a weight of {width} inputs cannot be packed in {format}, at most {MAX_IN}")
    if not torch.isfinite(weight).all():
        raise ValueError(f"a weight [{out} {width}] holds NaN or infinity; it cannot be packed in {format}")
    pieces = [(_pack8 if kind == 2 else _pack4)(piece.float()) for piece in weight.split(1024)]
    return Packed(torch.cat([piece for piece, _ in pieces]), torch.cat([scale for _, scale in pieces]), out, width)


def _pad(weight: Tensor) -> Tensor:
    out, width = weight.shape
    return torch.nn.functional.pad(weight, (0, -width % GROUP, 0, -out % LANES))


def _pack8(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = _pad(weight)
    scale = weight.abs().amax(dim=1) / 127
    values = (weight / scale.clamp_min(1e-38)[:, None]).round().clamp(-127, 127)
    lanes = (values + 128).to(torch.uint8).view(-1, LANES, weight.shape[1] // 4, 4)
    return lanes.transpose(1, 2).contiguous(), scale


def _pack4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = _pad(weight).unflatten(1, (-1, GROUP))
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    best = torch.full_like(extreme, torch.inf)
    scale, values = torch.zeros_like(extreme), torch.zeros_like(groups)
    for share in CANDIDATES.tolist():
        tried = (extreme * (-share / 8)).bfloat16().float()
        rounded = (groups / torch.where(tried == 0, 1.0, tried)).round().clamp(-8, 7)
        error = (rounded * tried - groups).square().sum(dim=2, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
        values = torch.where(better, rounded, values)
    lanes = (values + 8).to(torch.uint8).unflatten(0, (-1, LANES)).unflatten(3, (4, 2, 4))
    low, high = lanes.permute(0, 2, 3, 4, 1, 5).unbind(3)  # [out/16 in/32 4 16 4]
    scales = scale.squeeze(2).unflatten(0, (-1, LANES)).transpose(1, 2)
    return low | (high << 4), scales.contiguous().bfloat16()


@leaf
def unpack(packed: Packed, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out in], or its ``rows`` (int64 [...]), as fp32 or bf16: [... in]."""
    weight, scale, out, width = packed
    if MISSING is None and weight.device.type == "cpu" and not torch.compiler.is_compiling():
        ids = None if rows is None else rows.reshape(-1).contiguous()
        count_ = out if ids is None else ids.numel()
        result = torch.empty(count_, width, dtype=dtype)
        arguments = (ids, count_, int(dtype == torch.bfloat16), result, torch.get_num_threads())
        call("ev_product_unpack", packed.kind, out, width, weight, scale, *arguments)
        return result if rows is None else result.view(*rows.shape, width)
    whole = unpack_torch(packed)
    return (whole if rows is None else whole[rows]).to(dtype)


def unpack_torch(packed: Packed) -> Tensor:
    """The whole matrix [out in] in fp32, in plain PyTorch."""
    weight, scale, out, width = packed
    if scale is None:
        return weight.float()
    if packed.kind == 2:
        values = (weight.float() - 128).transpose(1, 2).flatten(2) * scale.view(-1, LANES, 1)
        return values.flatten(0, 1)[:out, :width]
    halves = torch.stack([weight & 15, weight >> 4], dim=3).float() - 8  # [out/16 in/32 4 2 16 4]
    values = halves.permute(0, 4, 1, 2, 3, 5).flatten(3) * scale.float().transpose(1, 2)[..., None]
    return values.flatten(0, 1).flatten(1)[:out, :width]


@leaf
def product(x: Tensor, packed: Packed) -> Tensor:
    """x [... in] times the matrix: y [... out] of x's dtype, with sums in fp32.

    At most 64 rows of x on a CPU go through the kernel, each with the same result in any batch; more go through
    bf16 products (fp32 ones for fp32 weights), as all do where there is no kernel.
    """
    weight, scale, out, width = packed
    flat = x.reshape(-1, width)
    if flat.shape[0] <= MAX_ROWS and MISSING is None and x.device.type == "cpu":
        return _product(flat.float().contiguous(), weight, scale, out).to(x.dtype).view(*x.shape[:-1], out)
    wide = torch.bfloat16 if packed.kind else torch.float32
    return torch.nn.functional.linear(x.to(wide), unpack(packed, dtype=wide)).to(x.dtype)


@torch.library.custom_op("everlong::product", mutates_args=(), device_types="cpu")
def _product(x: Tensor, weight: Tensor, scale: Tensor | None, out: int) -> Tensor:
    rows, width = x.shape
    kind = Packed(weight, scale, out, width).kind
    y = x.new_empty(rows, out)
    scratch = torch.empty(count("ev_product_scratch", kind, out, width, rows), dtype=torch.uint8)
    call("ev_product", kind, out, width, weight, scale, rows, x, scratch, y, torch.get_num_threads())
    return y


@_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor | None, out: int) -> Tensor:
    return x.new_empty(x.shape[0], out)
