"""Products of a few rows with weights in fp32, bf16, int8 or int4: packing, the native product, its PyTorch form.

A matrix [out, in] becomes a ``Packed``. Integers lie as ``product.h`` says: 16 outputs side by side, four inputs of
each in 32 bits, inputs padded to a multiple of 32 and outputs to one of 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...config import suggest
from ..record import leaf
from ..transforms import custom_op
from . import BUILD, MISSING, call, count, cpu_has

if TYPE_CHECKING:
    from .lowering import Lowering

FORMATS = ("fp32", "bf16", "int8", "int4")  # the order is that of Weights in product.h
LANES, GROUP = 16, 32
MAX_ROWS = 64  # of one call of the kernel
MAX_IN = 65536  # inputs, so that sums of 8-bit products stay below 2^31
TILES = cpu_has("amx_tile")
WIDE = torch.bfloat16 if cpu_has("avx512_bf16") else torch.float32  # of products in PyTorch on a CPU
CANDIDATES = torch.linspace(
    0.75, 1.2, 16, dtype=torch.float32, device="cpu"
)  # scales tried for an int4 group, as shares of max / 8


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


def empty(out: int, width: int, format: str) -> Packed:
    """A ``Packed`` of the right shapes, its values undefined; on the default device (a meta one included)."""
    kind = FORMATS.index(check_format(format))
    if kind < 2:
        return Packed(torch.empty(out, width, dtype=torch.bfloat16 if kind else torch.float32), None, out, width)
    blocks, groups = -(-out // LANES), -(-width // GROUP)
    if kind == 2:
        weight = torch.empty(blocks, groups * 8, LANES, 4, dtype=torch.uint8)
        scale = torch.empty(blocks * LANES, dtype=torch.float32)
    else:
        weight = torch.empty(blocks, groups, 4, LANES, 4, dtype=torch.uint8)
        scale = torch.empty(blocks, groups, LANES, dtype=torch.bfloat16)
    return Packed(weight, scale, out, width)


# ---- one token in a program ----


def lower_product(to: Lowering, out: Tensor, x: Tensor, packed: Packed) -> None:
    """The instructions of ``product``."""
    raw = [packed.weight] if packed.scale is None else [packed.weight, packed.scale]
    to.product(out, x, packed.kind, raw, (packed.out, packed.width))


def lower_unpack(to: Lowering, out: Tensor, packed: Packed, rows: Tensor, dtype: Any) -> None:
    """The instruction of ``unpack`` for rows that are token ids."""
    raw = [packed.weight] if packed.scale is None else [packed.weight, packed.scale]
    to.look_up(out, rows, raw, (packed.kind, packed.out, packed.width))


def lower_linear(to: Lowering, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The instructions of a linear map with a constant weight."""
    to.linear(out, x, weight, bias)


# ----


@leaf(lower_unpack)
def unpack(packed: Packed, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out in], or its ``rows`` (int64 [...]), as fp32 or bf16: [... in].

    ``IndexError`` for rows outside the matrix, on a CPU.
    """
    half = dtype == torch.bfloat16
    if rows is None:
        return _unpack(packed.weight, packed.scale, packed.out, packed.width, None, half)
    flat = rows.reshape(-1).to(torch.int64).contiguous()
    return _unpack(packed.weight, packed.scale, packed.out, packed.width, flat, half).view(*rows.shape, packed.width)


@custom_op("everlong::unpack", mutates_args=())
def _unpack(weight: Tensor, scale: Tensor | None, out: int, width: int, rows: Tensor | None, half: bool) -> Tensor:
    packed, dtype = Packed(weight, scale, out, width), torch.bfloat16 if half else torch.float32
    if weight.device.type == "cpu" and rows is not None and rows.numel():
        low, high = (int(end) for end in rows.aminmax())
        if low < 0 or high >= out:
            raise IndexError(f"rows {low} to {high} of a matrix with {out}")
    if MISSING is not None or weight.device.type != "cpu":
        return unpack_torch(packed, rows).to(dtype, copy=True)
    result = weight.new_empty(out if rows is None else len(rows), width, dtype=dtype)
    call(
        "ev_product_unpack",
        packed.kind,
        out,
        width,
        weight,
        scale,
        rows,
        len(result),
        int(half),
        result,
        torch.get_num_threads(),
    )
    return result


@_unpack.register_fake
def _(weight: Tensor, scale: Tensor | None, out: int, width: int, rows: Tensor | None, half: bool) -> Tensor:
    dtype = torch.bfloat16 if half else torch.float32
    return weight.new_empty(out if rows is None else rows.shape[0], width, dtype=dtype)


def unpack_torch(packed: Packed, rows: Tensor | None = None) -> Tensor:
    """The matrix [out in], or its ``rows`` (int64 [N]), in fp32, in plain PyTorch."""
    weight, scale, out, width = packed
    if rows is None:
        rows = torch.arange(out, device=weight.device)
    if scale is None:
        return weight[rows].float()
    block, lane = rows // LANES, rows % LANES
    if packed.kind == 2:
        values = weight[block, :, lane].flatten(1).float() - 128
        return (values * scale[rows][:, None])[:, :width]
    bytes = weight[block, :, :, lane]  # [N in/32 4 4]
    values = torch.stack([bytes & 15, bytes >> 4], dim=3).flatten(2).float() - 8
    return (values * scale[block, :, lane].float()[..., None]).flatten(1)[:, :width]


def native_rows(packed: Packed) -> int:
    """How many rows of x at most go through the kernel on this machine.

    64, since for more the time is that of the products, not of reading the weights, and PyTorch's are as good or
    better. Where the kernel has 8-bit dot products and PyTorch no tiles (AMX), integers have no limit.
    """
    unlimited = packed.kind > 1 and BUILD == "avx512bf16" and not TILES
    return 2**62 if unlimited else MAX_ROWS


@leaf(lower_product)
def product(x: Tensor, packed: Packed) -> Tensor:
    """x [... in] times the matrix: y [... out] of x's dtype, with sums in fp32.

    Up to ``native_rows`` rows of x on a CPU go through the kernel, each with the same result in any batch; more go
    through products of unpacked weights in bf16 (in fp32 for fp32 weights, and on CPUs without products in bf16), as
    all do where there is no kernel. Forward only.
    """
    weight, scale, out, width = packed
    flat = x.reshape(-1, width)
    if MISSING is None and x.device.type == "cpu" and flat.shape[0] <= native_rows(packed):
        run = _multiply if type(x) is Tensor and not torch.compiler.is_compiling() else _product  # the op costs 8 us
        return run(flat.float().contiguous(), weight, scale, out).to(x.dtype).view(*x.shape[:-1], out)
    wide = torch.float32 if packed.kind == 0 else WIDE if x.device.type == "cpu" else torch.bfloat16
    return torch.nn.functional.linear(x.to(wide), unpack(packed, dtype=wide)).to(x.dtype)


def _multiply(x: Tensor, weight: Tensor, scale: Tensor | None, out: int) -> Tensor:
    rows, width = x.shape
    kind = Packed(weight, scale, out, width).kind
    y, row = x.new_empty(rows, out), count("ev_product_scratch", kind, out, width, 1)
    scratch = x.new_empty(row * min(rows, MAX_ROWS), dtype=torch.uint8)
    pieces = [(x, y)] if rows <= MAX_ROWS else zip(x.split(MAX_ROWS), y.split(MAX_ROWS), strict=True)
    for part, into in pieces:
        call(
            "ev_product",
            kind,
            out,
            width,
            weight,
            scale,
            len(part),
            part,
            scratch if len(part) * row == len(scratch) else scratch[: len(part) * row],
            into,
            torch.get_num_threads(),
        )
    return y


_product = custom_op("everlong::product", mutates_args=(), device_types="cpu")(_multiply)


@_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor | None, out: int) -> Tensor:
    return x.new_empty(x.shape[0], out)
