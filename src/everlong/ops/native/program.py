"""Programs of native instructions: one token as a list of small operations on fixed memory, replayed by one call.

A ``Program`` collects instructions whose operands are ``Ref``s into buffers; ``finish`` lays the buffers out in one
arena, reusing the memory of values that are no longer needed. It holds no memory but constants: an ``Instance`` brings
the arena and the states, and ``run`` replays the list there on PyTorch's threads, so that one program serves any number
of owners. All numbers of the arena are fp32; a truth value is 0 or 1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import suggest
from . import call, count, kinds, waiting

ALIGN = 16  # floats between the beginnings of two buffers


MEETS = 2  # beside 1 for shared: threads meet before the instruction
READERS = {"embed", "prepare", "product", "matmul", "sum", "mean", "max", "norm"}  # they write nothing but ``out``
READERS |= {
    "copy",
    "neg",
    "abs",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "sigmoid",
    "silu",
    "tanh",
}
READERS |= {
    "gelu",
    "gelu_tanh",
    "relu",
    "softplus",
    "log_sigmoid",
    "elu",
    "sin",
    "cos",
    "not",
    "power",
    "clamp",
    "rotate",
}
READERS |= {"add", "sub", "mul", "div", "maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "where"}
READERS |= {"addcmul"}


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


WORDS = ctypes.sizeof(_CInstruction) // 8


class Form(NamedTuple):
    """What an instance brings for a buffer: for each row ``shape`` of ``dtype``.

    ``kind`` is "numbers" (fp32) or "counts" (int64), all rows in one tensor; "table": the address of each row's own
    memory, int64, where the first axis may grow; "held": how many entries a history holds, int64 for each row; "lags":
    the address of a kernel and how many lags it has.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    grows: bool = False
    of: Any = None  # the buffer of the history that is held
    lags: Callable[[int], Tensor] | None = None  # the kernel [C lags]


@dataclass(eq=False)
class Buffer:
    """Memory of one value: given (a constant), brought by each instance, or a part of the arena while it lives."""

    numbers: int
    given: Tensor | None = None
    brought: Form | None = None
    first: int = -1  # instructions that touch it
    last: int = -1
    offset: int = 0

    @property
    def in_arena(self) -> bool:
        """Does it lie in the arena?"""
        return self.given is None and self.brought is None


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
    """Instructions in order. Build it with ``add``, then ``finish``; run it as an ``Instance``."""

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
        """Give every buffer its place and encode the list, but for the places of what an instance brings."""
        if count("ev_program_instruction_bytes") != ctypes.sizeof(_CInstruction):
            raise RuntimeError("the kernels know another form of instructions; build them again: make kernels")
        self.numbers = _lay_out(self._buffers())
        self.rows = max((int(i.size[0]) for i in self.instructions if i.name == "embed"), default=0)  # token ids read
        self.spots: dict[
            Buffer | None, list[tuple[int, int]]
        ] = {}  # word of the list, and bytes behind a buffer (None:
        encoded = (_CInstruction * max(1, len(self.instructions)))()  # the arena) that belong there
        for index, (instruction, meets) in enumerate(zip(self.instructions, _meetings(self.instructions), strict=True)):
            self._encode(encoded[index], index * WORDS, instruction)
            encoded[index].shared |= MEETS * meets
        self.encoded = torch.frombuffer(encoded, dtype=torch.int64).clone()
        self.places = {
            buffer: torch.tensor(spots, dtype=torch.int64, device="cpu").unbind(1)
            for buffer, spots in self.spots.items()
        }

    def _buffers(self) -> list[Buffer]:
        refs = [ref for i in self.instructions for ref in (i.out, *i.inputs) if ref is not None]
        return list({id(r.buffer): r.buffer for r in refs if r.buffer.in_arena}.values())

    def _encode(self, line: Any, word: int, instruction: Instruction) -> None:
        line.code, line.shared = code(instruction.name), instruction.shared
        line.size[:] = [*instruction.size, *[0] * (4 - len(instruction.size))]
        self._encode_ref(line.out, word + _CInstruction.out.offset // 8, instruction.out)
        first, words = _CInstruction.inputs.offset // 8, ctypes.sizeof(_CRef) // 8
        for place, (index, ref) in zip(line.inputs, enumerate(instruction.inputs), strict=False):
            self._encode_ref(place, word + first + index * words, ref)
        for place, values in (
            (line.number, instruction.numbers),
            (line.scalar, instruction.scalars),
            (line.raw, [x.data_ptr() for x in instruction.raw]),
        ):
            place[: len(values)] = list(values)

    def _encode_ref(self, place: Any, word: int, ref: Ref | None) -> None:
        if ref is None:
            return
        place.stride[: len(ref.strides)] = list(ref.strides)
        buffer = ref.buffer
        if buffer.given is not None:
            place.at = buffer.given.data_ptr() + 4 * ref.offset
        else:
            spot = (word, 4 * (ref.offset + (buffer.offset if buffer.in_arena else 0)))
            self.spots.setdefault(None if buffer.in_arena else buffer, []).append(spot)


class Instance:
    """A finished program on memory of its own: an arena, and what ``bring`` puts in the place of its buffers."""

    def __init__(self, program: Program) -> None:
        self.program, self._brought = program, {}  # type: ignore[var-annotated]
        self._encoded = program.encoded.clone()
        self.arena = torch.zeros(program.numbers, dtype=torch.float32, device="cpu")
        self._place(None, self.arena.data_ptr())

    def bring(self, buffer: Buffer, memory: Tensor) -> None:
        """Let ``buffer`` be ``memory``, contiguous from its first number on, as the form of the buffer says."""
        self._brought[buffer] = memory
        self._place(buffer, memory.data_ptr())

    def _place(self, buffer: Buffer | None, address: int) -> None:
        if buffer in self.program.places:
            words, behind = self.program.places[buffer]
            self._encoded[words] = behind + address

    def view(self, ref: Ref, shape: Sequence[int]) -> Tensor:
        """The numbers of ``ref`` as a tensor that shares their memory."""
        buffer = ref.buffer
        if buffer.in_arena:
            return self.arena.as_strided(tuple(shape), ref.strides, buffer.offset + ref.offset)
        memory = self._brought[buffer] if buffer.given is None else buffer.given
        return memory.as_strided(tuple(shape), ref.strides, memory.storage_offset() + ref.offset)

    def run(self, begin: int, end: int, tokens: Tensor) -> None:
        """Replay instructions ``begin`` to ``end`` for the ids ``tokens`` int64 [B]."""
        call(
            "ev_program_run",
            self._encoded.data_ptr() + begin * ctypes.sizeof(_CInstruction),
            end - begin,
            tokens,
            self.program.rows or tokens.numel(),
            1 if waiting.look() else torch.get_num_threads(),  # threads meet often: not on cores that others want
        )


class _Access:
    """Memory that instructions since the last meeting of threads have read or written."""

    def __init__(self) -> None:
        self.read: list[tuple[Any, int, int]] = []
        self.written: list[tuple[Any, int, int]] = []

    def add(self, other: _Access) -> None:
        self.read += other.read
        self.written += other.written

    def conflicts(self, other: _Access) -> bool:
        """Does one write what the other reads or writes?"""
        pairs = [(self.written, other.read), (self.written, other.written), (self.read, other.written)]
        return any(_overlap(a, b) for mine, theirs in pairs for a in mine for b in theirs)


def _overlap(a: tuple[Any, int, int], b: tuple[Any, int, int]) -> bool:
    return a[0] is b[0] and a[1] < b[2] and b[1] < a[2]


def _access(instruction: Instruction) -> _Access:
    """What an instruction reads and writes; constants are never written."""
    found = _Access()
    for ref in (instruction.out, *instruction.inputs):
        if ref is None or ref.buffer.given is not None:
            continue
        buffer = ref.buffer
        span = (None, buffer.offset, buffer.offset + buffer.numbers) if buffer.in_arena else (buffer, 0, 1)
        read_only = ref is not instruction.out and instruction.name in READERS
        (found.read if read_only else found.written).append(span)
    return found


def _meetings(instructions: Sequence[Instruction]) -> list[bool]:
    """Before which instructions threads must meet: where one needs what others have written since they last met.

    What one thread does alone (not ``shared``) is in order for itself; what all share is in order for nobody.
    """
    alone, together, meets = _Access(), _Access(), []
    for instruction in instructions:
        own = _access(instruction)
        before = [together, alone] if instruction.shared else [together]
        meets.append(any(own.conflicts(other) for other in before))
        if meets[-1]:
            alone, together = _Access(), _Access()
        (together if instruction.shared else alone).add(own)
    return meets


def code(name: str) -> int:
    """The number of a kind of instruction. ``ValueError`` where the kernels have none of this name."""
    known = kinds()
    if name not in known:
        raise ValueError(f"the kernels have no instruction {name!r}{suggest(name, known)}")
    return known[name]


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
