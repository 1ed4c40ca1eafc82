"""Programs of native instructions: one token as a list of small operations on fixed memory, replayed by one call.

A ``Program`` collects instructions whose operands are ``Ref``s into buffers; ``finish`` lays the buffers out in one
arena, reusing the memory of values that are no longer needed, and ``run`` replays the list on PyTorch's threads.
All numbers are fp32; a truth value is 0 or 1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import call, count, waiting

ALIGN = 16  # floats between the beginnings of two buffers
ONE = ["copy", "neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sigmoid", "silu", "tanh"]
ONE += ["gelu", "gelu_tanh", "relu", "softplus", "log_sigmoid", "elu", "sin", "cos", "not", "power", "clamp"]
TWO = ["add", "sub", "mul", "div", "maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne", "and", "or"]
THREE = ["where", "addcmul"]
LARGE = ["sum", "mean", "max", "norm", "matmul", "embed", "prepare", "product", "conv", "scan", "attend", "delta"]
CODES = {name: code for code, name in [*enumerate([*ONE, *TWO, *THREE]), *enumerate(LARGE, 64)]}


class _CRef(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4)]


class _CInstruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_int64),
        ("shared", ctypes.c_int64),
        ("size", ctypes.c_int64 * 4),
        ("out", _CRef),
        ("inputs", _CRef * 7),
        ("number", ctypes.c_int64 * 4),
        ("scalar", ctypes.c_double * 2),
        ("raw", ctypes.c_void_p * 2),
    ]


@dataclass(eq=False)
class Buffer:
    """Memory of one value: given (a parameter, a state), or a part of the arena while it lives."""

    numbers: int
    given: Tensor | None = None
    first: int = -1  # instructions that touch it
    last: int = -1
    offset: int = 0


class Ref(NamedTuple):
    """Where an operand lies: ``offset`` and ``strides`` in numbers, as of a PyTorch tensor."""

    buffer: Buffer
    offset: int = 0
    strides: tuple[int, ...] = ()


@dataclass
class Instruction:
    """One operation; what sizes and numbers mean is its kernel's (program.cpp). ``shared``: all threads take part."""

    name: str
    size: Sequence[int]
    out: Ref
    inputs: Sequence[Ref | None] = ()
    numbers: Sequence[int] = ()
    scalars: Sequence[float] = ()
    raw: Sequence[Tensor] = ()
    shared: bool = False


@dataclass
class Program:
    """Instructions in order. Build it with ``add``, then ``finish``; ``run`` as often as wanted."""

    instructions: list[Instruction] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # memory that instructions point to

    def add(self, instruction: Instruction) -> None:
        """Append an instruction and note which buffers it touches."""
        self.instructions.append(instruction)
        self.kept += instruction.raw
        for ref in (instruction.out, *instruction.inputs):
            if ref is not None:
                self.touch(ref.buffer)

    def touch(self, buffer: Buffer) -> None:
        """Note that ``buffer`` is in use now (it is read from outside, say)."""
        now = len(self.instructions) - 1
        buffer.first, buffer.last = (now if buffer.first < 0 else buffer.first), now
        if buffer.given is not None and all(buffer.given is not kept for kept in self.kept[-8:]):
            self.kept.append(buffer.given)

    def finish(self) -> None:
        """Give every buffer its place and encode the list."""
        if count("ev_program_instruction_bytes") != ctypes.sizeof(_CInstruction):
            raise RuntimeError("the kernels know another form of instructions; build them again: make kernels")
        self.arena = torch.zeros(_lay_out(self._buffers()), dtype=torch.float32, device="cpu")
        self.rows = max((int(i.size[0]) for i in self.instructions if i.name == "embed"), default=0)  # token ids read
        self.encoded = (_CInstruction * len(self.instructions))()
        for line, instruction in zip(self.encoded, self.instructions, strict=True):
            self._encode(line, instruction)

    def _buffers(self) -> list[Buffer]:
        refs = [ref for i in self.instructions for ref in (i.out, *i.inputs) if ref is not None]
        return list({id(r.buffer): r.buffer for r in refs if r.buffer.given is None}.values())

    def _encode(self, line: Any, instruction: Instruction) -> None:
        line.code, line.shared = CODES[instruction.name], instruction.shared
        line.size[:] = [*instruction.size, *[0] * (4 - len(instruction.size))]
        self._encode_ref(line.out, instruction.out)
        for place, ref in zip(line.inputs, instruction.inputs, strict=False):
            self._encode_ref(place, ref)
        for place, values in (
            (line.number, instruction.numbers),
            (line.scalar, instruction.scalars),
            (line.raw, [x.data_ptr() for x in instruction.raw]),
        ):
            place[: len(values)] = list(values)

    def _encode_ref(self, place: Any, ref: Ref | None) -> None:
        if ref is not None:
            place.at = self.address(ref)
            place.stride[: len(ref.strides)] = list(ref.strides)

    def address(self, ref: Ref) -> int:
        """Where ``ref`` lies in memory, after ``finish``."""
        base = (
            self.arena.data_ptr() + 4 * ref.buffer.offset if ref.buffer.given is None else ref.buffer.given.data_ptr()
        )
        return base + 4 * ref.offset

    def view(self, ref: Ref, shape: Sequence[int]) -> Tensor:
        """The numbers of ``ref`` as a tensor that shares their memory, after ``finish``."""
        if ref.buffer.given is None:
            return self.arena.as_strided(tuple(shape), ref.strides, ref.buffer.offset + ref.offset)
        given = ref.buffer.given
        return given.as_strided(tuple(shape), ref.strides, given.storage_offset() + ref.offset)

    def run(self, begin: int, end: int, tokens: Tensor) -> None:
        """Replay instructions ``begin`` to ``end`` for the ids ``tokens`` int64 [B]."""
        size = ctypes.sizeof(_CInstruction)
        call(
            "ev_program_run",
            ctypes.addressof(self.encoded) + begin * size,
            end - begin,
            tokens,
            self.rows or tokens.numel(),
            1 if waiting.look() else torch.get_num_threads(),  # threads meet often: not on cores that others want
        )


def _lay_out(buffers: list[Buffer]) -> int:
    """Offsets such that no two buffers that live at the same time overlap; returns the numbers needed."""
    live: list[tuple[int, int, Buffer]] = []  # begin, end, buffer, by begin
    top = ALIGN
    for buffer in sorted(buffers, key=lambda b: b.first):
        live = [entry for entry in live if entry[2].last >= buffer.first]
        size, begin = -(-buffer.numbers // ALIGN) * ALIGN, 0
        for other_begin, other_end, _ in live:
            if begin + size <= other_begin:
                break
            begin = max(begin, other_end)
        buffer.offset = begin
        live.append((begin, begin + size, buffer))
        live.sort(key=lambda entry: entry[:2])
        top = max(top, begin + size)
    return top
