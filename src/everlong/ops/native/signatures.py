"""What every entry point of the kernels takes: the one place where memory is checked before C++ sees it.

One word for each argument of the C function, in order: ``T`` an int64, ``eps:double``, ``program:address``, and for
memory ``q:half[B T H K]``: a contiguous tensor on the CPU of that many numbers. A dtype is a name of ``DTYPES`` or an
integer, 0 fp32, 1 bf16, 2 uint8. ``?`` allows None, ``!`` asks for it where there would be nothing. ``x@half[...]`` is
a tensor whose steps are passed beside it: the brackets say how far the kernel reads from its beginning. ``E=...`` names
a size for the others. Axes are those of the whole library: B batch, T time, H heads, G groups of heads, K keys, V
values, C channels.
"""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIGNATURES = """
ev_attention_decode half B S G shared K V q:f32[B G shared K] new_k:half[B G K] new_v:half[B G V]
    k:half[B S G K] v:half[B S G V] position:i64[B] y:f32[B G shared V] threads

ev_delta_rule half B T H K V per_key  E=K**per_key N=pieces(T,every)
    q:half[B T H K] k:half[B T H K] v:half[B T H V] a:half[B T H K] b?:half[B T H K] g?:f32[B T H E]
    state:f32[B H K V] starts?:bool[B T] y:half[B T H V] final:f32[B H K V] kept:f32[B N H K V] u?:f32[B T H V]
    every parts threads
ev_delta_rule_backward half B T H K V per_key  E=K**per_key N=pieces(T,every)
    q:half[B T H K] k:half[B T H K] v:half[B T H V] a:half[B T H K] b?:half[B T H K] g?:f32[B T H E] starts?:bool[B T]
    kept:f32[B N H K V] u:f32[B T H V] every gy:half[B T H V] gfinal:f32[B H K V] gv:half[B T H V]
    gq:f32[parts B T H K] gk:f32[parts B T H K] ga:f32[parts B T H K] gb:f32[given(b) parts B T H K]
    gg:f32[given(g) parts B T H E] gstate:f32[B H K V] parts threads

ev_diagonal_scan half kind fixed B T C  D=C>>(kind==1) F=(B*T,1)[fixed]
    b:half[B T C] g:half[F D] state:f32[B C] starts?:bool[B T] y:half[B T C] final:f32[B C] kept?:f32[B T C] threads
ev_diagonal_scan_backward half kind fixed B T C  D=C>>(kind==1) F=(B*T,1)[fixed] S=(B*T,B)[fixed] Y=half*(1-fixed)
    g:half[F D] state:f32[B C] starts?:bool[B T] h:f32[B T C] gy:half[B T C] gfinal?:f32[B C] gb:half[B T C]
    gg:Y[S D] gstate:f32[B C] threads

ev_gate x_half z_half act groups group n  half=x_half|z_half N=group*n
    x@x_half[span(groups,x_step,N)] x_step z@half[span(groups,z_step,N)] z_step y:half[groups N] threads
ev_gate_backward x_half z_half act groups group n  half=x_half|z_half N=group*n
    x@x_half[span(groups,x_step,N)] x_step z@half[span(groups,z_step,N)] z_step
    gy:half[groups N] gx:x_half[groups N] gz:half[groups N] threads

ev_linear_attention half B T G H K V per_key  E=K**per_key N=pieces(T,every)
    q:half[B T G K] k:half[B T G K] v:half[B T H V] g?:f32[B T H E] bonus?:f32[H K]
    state:f32[B H K V] starts?:bool[B T] y:half[B T H V] final:f32[B H K V] kept:f32[B N H K V] every parts threads
ev_linear_attention_backward half B T G H K V per_key  E=K**per_key N=pieces(T,every) L=pieces(V,64)
    q:half[B T G K] k:half[B T G K] v:half[B T H V] g?:f32[B T H E] bonus?:f32[H K] starts?:bool[B T]
    kept:f32[B N H K V] every gy:half[B T H V] gfinal:f32[B H K V] gv:half[B T H V]
    gq:f32[parts B T G K] gk:f32[parts B T G K] gg:f32[L B T H E] gbonus:f32[given(bonus) L B H K]
    gstate:f32[B H K V] parts threads

ev_norm x_half y_half order center eps:double period groups group n  half=x_half|y_half N=group*n
    x@x_half[span(groups,x_step,N)] x_step z?@x_half[span(groups,z_step,N)] z_step
    weight?:f32[period] bias?:f32[period] y:half[groups N] threads
ev_norm_backward x_half y_half order center eps:double period groups group n  half=x_half|y_half N=group*n
    x@x_half[span(groups,x_step,N)] x_step z?@x_half[span(groups,z_step,N)] z_step weight?:f32[period] bias?:f32[period]
    gy:half[groups N] gx:x_half[groups N] gz:x_half[given(z) groups N] gw:f32[parts period] gb:f32[parts period] parts

ev_product kind O I  F=(0,1,2,2)[kind] R=(O,O,pieces(O,16)*16,pieces(O,16)*16)[kind]
    M=(I,I,pieces(I,32)*32,pieces(I,32)*16)[kind] S=(0,0,0,1)[kind] N=(0,0,1,pieces(I,32))[kind]
    weight:F[R M] scale!:S[R N] B x:f32[B I] scratch:u8[scratch_bytes(kind,O,I,B)] y:f32[B O] threads
ev_product_unpack kind O I  F=(0,1,2,2)[kind] R=(O,O,pieces(O,16)*16,pieces(O,16)*16)[kind]
    M=(I,I,pieces(I,32)*32,pieces(I,32)*16)[kind] S=(0,0,0,1)[kind] N=(0,0,1,pieces(I,32))[kind]
    weight:F[R M] scale!:S[R N] ids?:i64[rows] rows half out:half[rows I] threads

ev_program_run program:address length tokens:i64[B] B threads

ev_rg_lru_gates half N H D  x:half[N H D] r@half[span(N,r_token,span(H,r_head,D))] r_token r_head
    i@half[span(N,i_token,span(H,i_head,D))] i_token i_head r_bias:f32[H D] i_bias:f32[H D] decay:f32[H D] first:bool[N]
    g:f32[N H D] b:f32[N H D] threads
ev_rg_lru_gates_backward half N H D  x:half[N H D] r@half[span(N,r_token,span(H,r_head,D))] r_token r_head
    i@half[span(N,i_token,span(H,i_head,D))] i_token i_head r_bias:f32[H D] i_bias:f32[H D] decay:f32[H D] first:bool[N]
    gg:f32[N H D] gb:f32[N H D] gx:half[N H D] gr:half[N H D] gi:half[N H D] sums:f32[parts 3 H D] parts

ev_selective_scan half B T C K  N=pieces(T,32) L=pieces(C,16)*16
    x:half[B T C] dt:half[B T C] dt_bias?:f32[C] A:f32[C K] In:f32[B T K] Out:f32[B T K] D?:f32[C] state:f32[B C K]
    starts?:bool[B T] y:half[B T C] final:f32[B C K] kept?:f32[B N L K] threads
ev_selective_scan_backward half B T C K  N=pieces(T,32) L=pieces(C,16)*16
    x:half[B T C] dt:half[B T C] dt_bias?:f32[C] A:f32[C K] In:f32[B T K] Out:f32[B T K] D?:f32[C] kept:f32[B N L K]
    starts?:bool[B T] gy:half[B T C] gfinal:f32[B C K] gx:f32[B T C] gdt:f32[B T C] gA:f32[B C K]
    gIn:f32[groups B T K] gOut:f32[groups B T K] gD:f32[B C] gstate:f32[B C K] groups threads

ev_short_conv half silu B T C W  L=B*(W-1)*C
    x@half[span(B,x_row,span(T,x_time,C))] x_row x_time state:half[L] taps:f32[W C] bias:f32[C] starts?:bool[B T]
    y:half[B T C] threads
ev_short_conv_backward half silu B T C W  L=B*(W-1)*C
    x@half[span(B,x_row,span(T,x_time,C))] x_row x_time state:half[L] taps:f32[W C] bias:f32[C] starts?:bool[B T]
    gy:half[B T C] gx:half[B T C] gtaps:f32[groups W C] gbias:f32[groups C] gstate:f32[L] groups threads

ev_waiting_team threads
"""
NEEDED = ("G", "H", "K", "V", "C", "W", "D", "n")  # sizes that are no 0: batch and time may be
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "u8": torch.uint8, "i64": torch.int64, "bool": torch.bool}
INDEXED = (torch.float32, torch.bfloat16, torch.uint8)  # of a dtype that an integer names
MEMORY = re.compile(r"(\w+)([?!]?)([:@])(\w+)\[([^]]*)]")


class Memory(NamedTuple):
    """One argument that is memory: its place among all, its name, whether None may stand there, or steps follow it."""

    place: int
    name: str
    optional: str
    strided: bool


class Signature:
    """One entry point: ``check`` holds its arguments to the table and turns tensors into addresses."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.names = name, []  # type: tuple[str, list[str]]
        self.types: list[Any] = []
        self.memory: list[Memory] = []
        sizes, wanted = [], []
        for word in re.findall(r"\w+[?!]?[:@]\w+\[[^]]*]|\S+", text):
            memory = MEMORY.fullmatch(word)
            if memory is not None:
                called, optional, kind, dtype, count = memory.groups()
                self.memory.append(Memory(len(self.names), called, optional, kind == "@"))
                of = f"DTYPES[{dtype!r}]" if dtype in DTYPES else f"INDEXED[{dtype}]"
                wanted.append(f"({of}, {' * '.join(f'({part})' for part in count.split())})")
                self.names.append(called)
                self.types.append(ctypes.c_void_p)
            elif "=" in word:
                sizes.append(word.replace("=", " = ", 1))
            else:
                called, _, kind = word.partition(":")
                self.names.append(called)
                self.types.append(_TYPES[kind])
        needed = [
            name for name in self.names if name in NEEDED and self.types[self.names.index(name)] is ctypes.c_int64
        ]
        if needed:
            sizes.append(
                f"if not ({' and '.join(needed)}): raise ValueError({name!r} + ': {' '.join(needed)} cannot be 0')"
            )
        lines = [f"def wanted({', '.join(self.names)}):", *sizes, f"return ({''.join(f'{one}, ' for one in wanted)})"]
        scope = dict(globals())
        exec("\n    ".join(lines), scope)  # the table above, as a function
        self.wanted = scope["wanted"]

    def check(self, args: tuple[Any, ...]) -> list[Any]:
        """The arguments for C. ``ValueError`` names the one that is not what the kernel reads or writes there."""
        plain = list(args)
        if len(plain) != len(self.names):
            raise ValueError(f"{self.name} takes {len(self.names)} arguments, got {len(plain)}")
        for (place, _, optional, strided), (dtype, count) in zip(self.memory, self.wanted(*args), strict=True):
            x = args[place]
            if x is None and optional and (optional == "?" or not count):
                continue
            if (
                not isinstance(x, Tensor)
                or x.dtype is not dtype
                or not x.is_cpu
                or x.is_neg()
                or (_reach(x) < count if strided else x.numel() != count or not x.is_contiguous())
            ):
                raise ValueError(self.complaint(place, x, dtype, count))
            plain[place] = at = x.data_ptr()
            if at % dtype.itemsize or (count and not at):
                raise ValueError(self.complaint(place, x, dtype, count))
        return plain

    def complaint(self, place: int, x: Any, dtype: torch.dtype, count: int) -> str:
        """What was expected at ``place``, what is there, and what helps."""
        kind = str(dtype).removeprefix("torch.")
        got = "nothing" if x is None else type(x).__name__
        if isinstance(x, Tensor):
            got = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"
            if x.layout != torch.strided:
                got += f", {x.layout}"
            elif x.is_cpu:
                got += f" with strides {x.stride()}" + (", to be negated" if x.is_neg() else "")
                got += ", not aligned" if x.data_ptr() % dtype.itemsize else ""
        return (
            f"{self.name}: {self.names[place]} must be {count} numbers of {kind} on the CPU in one piece, got {got}; "
            "x.clone() copies what is not aligned or in one piece"
        )


_TYPES = {"": ctypes.c_int64, "double": ctypes.c_double, "address": ctypes.c_void_p}


def _reach(x: Tensor) -> int:
    """How many numbers lie between the beginning of ``x`` and the end of its memory."""
    return x.untyped_storage().nbytes() // x.itemsize - int(x.storage_offset())


def given(x: Any) -> int:
    """1 where an argument is there, 0 for None."""
    return int(x is not None)


def pieces(n: int, size: int) -> int:
    """Pieces of ``size``, the last one shorter, that make ``n``; none of size 0."""
    return -(-n // size) if size else 0


def scratch_bytes(kind: int, outputs: int, inputs: int, rows: int) -> int:
    """Bytes that the product of so many rows works in, as its build says."""
    from . import count

    return count("ev_product_scratch", kind, outputs, inputs, rows)


def span(n: int, step: int, last: int) -> int:
    """How far ``n`` parts reach that lie ``step`` apart and are ``last`` long."""
    return (n - 1) * step + last if n and last else 0


@functools.cache
def table() -> dict[str, Signature]:
    """The table, read when the first kernel is called."""
    entries = re.split(r"\n(?=ev_)", SIGNATURES.strip())
    return {name: Signature(name, text) for name, text in (entry.split(maxsplit=1) for entry in entries)}
