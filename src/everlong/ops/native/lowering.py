"""From a recorded step to a native program: every operation that depends on the token becomes instructions.

What depends on parameters alone was computed while recording and is taken as it is. Views cost nothing: a tensor is
a buffer, an offset and strides. What has no native form, or could be wrong for another token than the recorded one,
raises ``Unsupported`` (``guards.py``: what no rule could make right); the block then runs through its own ``step``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...shapes import extent
from ..record import Call, lowering
from . import count, guards
from .guards import Unsupported
from .product import MAX_ROWS
from .program import Buffer, Form, Instruction, Program, Ref

BIG = 1 << 14  # numbers from which all threads share an elementwise instruction
COSTLY = {"exp", "sigmoid", "silu", "gelu", "gelu_tanh", "softplus", "tanh", "log", "log1p", "expm1", "sin", "cos"}
WEIGHTS = {torch.float32: 0, torch.bfloat16: 1}
TRUTHS = {"lt", "le", "gt", "ge", "eq", "ne", "not", "and", "or"}  # instructions that give 0 or 1
TOKENS = Buffer(0)  # stands for the ids, which every run is given anew


class Lowering:
    """Grows ``program`` call by call. ``places`` knows the buffer of every value that depends on the token."""

    def __init__(
        self, program: Program, rules: dict[str, Callable[..., None]], dtypes: set[torch.dtype], tokens: Tensor
    ) -> None:
        self.program, self.rules, self.dtypes = program, rules, dtypes  # dtypes: of values that depend on the token
        zero = torch.zeros(1, dtype=torch.float32, device="cpu")
        self.zero = Ref(Buffer(1, zero))  # the imaginary part of what is real
        self.states: set[int] = set()  # ids of the buffers of the states of the block at hand
        self.places: dict[int, Buffer] = {}
        self.alive: list[Any] = []  # recorded tensors, so that no address is used twice
        self.stale: set[int] = set()  # values whose memory an in-place step has taken over
        self.moved: dict[int, Ref] = {}  # states after a step in place
        self.prepared: dict[tuple[Any, ...], Ref] = {}
        self.rows = len(tokens)
        self.bind(tokens, TOKENS)

    def forget(self, *needed: Tensor) -> None:
        """Let go of the recorded values but ``needed``; their memory may then be given to others."""
        keys = {_key(tensor) for tensor in needed}
        self.places = {key: buffer for key, buffer in self.places.items() if key in keys}
        self.alive, self.stale, self.moved, self.prepared, self.states = list(needed), set(), {}, {}, set()

    # ---- values ----

    def bind(self, tensor: Tensor, buffer: Buffer) -> None:
        """From here on, the memory of ``tensor`` means ``buffer``."""
        self.alive.append(tensor)
        self.places[_key(tensor)] = buffer

    def bind_state(self, tensor: Tensor, *, grows: bool = False) -> Buffer:
        """``tensor`` [B ...] is a state before the step; from one token to the next it lies in memory of the owner.

        ``grows``: the rows keep one entry more after each token, along the axis behind them.
        """
        kind = "table" if grows else "counts" if tensor.dtype == torch.int64 else "numbers"
        dtype = torch.float32 if kind == "numbers" else tensor.dtype
        buffer = Buffer(tensor.numel(), brought=Form(kind, tuple(tensor.shape[1:]), dtype, grows))
        self.bind(tensor, buffer)
        self.states.add(id(buffer))
        return buffer

    def is_state(self, tensor: Tensor) -> bool:
        """Does this value lie in the memory of a state, where the next step writes?"""
        return self.known(tensor) and id(self.places[_key(tensor)]) in self.states

    def is_tokens(self, tensor: Tensor) -> bool:
        """Are these the ids of the step, all of them and in order?"""
        return self.known(tensor) and self.places[_key(tensor)] is TOKENS and tensor.shape == (self.rows,)

    def known(self, tensor: Any) -> bool:
        """Does this value depend on the token?"""
        return isinstance(tensor, Tensor) and tensor.numel() > 0 and _key(tensor) in self.places

    def ref(self, tensor: Tensor) -> Ref:
        """Where ``tensor`` lies: a buffer of the program, or a constant."""
        if tensor.is_complex():
            raise Unsupported("an operation on complex numbers")
        if self.known(tensor):
            if _key(tensor) in self.stale:
                raise Unsupported("the state from before an in-place step is read again")
            return self._inside(tensor, 1)
        constant = tensor.detach().resolve_neg().float()
        return Ref(Buffer(constant.numel(), constant), 0, constant.stride())

    def _inside(self, tensor: Tensor, numbers: int) -> Ref:
        """Where a known tensor lies, in units of ``numbers``; never beyond what its buffer holds."""
        buffer, offset = self.places[_key(tensor)], numbers * int(tensor.storage_offset())
        if buffer is TOKENS:
            raise Unsupported("token ids that are used as numbers")
        if buffer.brought is not None and buffer.brought.kind == "table":
            raise Unsupported("a history that is read by something else than its own op")
        if tensor.is_neg() or tensor.dtype not in self.dtypes:
            raise Unsupported(f"values of dtype {tensor.dtype}" if not tensor.is_neg() else "a view of minus a value")
        if offset + numbers * extent(tensor) > buffer.numbers:
            raise Unsupported("a view beyond the value that it is a view of")
        return Ref(buffer, offset, tuple(numbers * s for s in tensor.stride()))

    def constant(self, tensor: Tensor) -> Ref:
        """A parameter or what was made of parameters, contiguous in fp32."""
        if self.known(tensor):
            raise Unsupported("a weight that depends on the token")
        return self.ref(tensor.detach().float().contiguous())

    def new(self, tensor: Tensor) -> Ref:
        """Memory for the value ``tensor``."""
        if tensor.dtype not in self.dtypes:
            raise Unsupported(f"values of dtype {tensor.dtype}")
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise Unsupported(f"values on {tensor.device}, laid out as {tensor.layout}")
        if not self.known(tensor):
            self.bind(tensor, Buffer(int(tensor.storage_offset()) + extent(tensor)))
        return self.ref(tensor)

    def dense(self, tensor: Tensor) -> Ref:
        """``tensor`` with its numbers side by side, copied there if they are not."""
        if tensor.is_contiguous() and (self.known(tensor) or tensor.dtype == torch.float32):
            return self.ref(tensor)
        whole = self.temporary(tensor.shape)
        self.map("copy", tensor.shape, whole, [self.ref(tensor)])
        return whole

    def parts(self, value: Any, shape: Sequence[int]) -> tuple[Ref, Ref]:
        """The real and the imaginary part of ``value``, broadcast to ``shape``; complex numbers lie as pairs."""
        if not isinstance(value, Tensor):
            wide = torch.complex64 if isinstance(value, complex) else torch.float32
            value = torch.tensor(value, dtype=wide, device="cpu")
        if not value.is_complex():
            real = self.ref(value.expand(shape)) if self.known(value) else self.repeat(value, shape)
            return real, self.zero._replace(strides=(0,) * len(shape))
        if not self.known(value):
            pair = torch.view_as_real(value.detach().to(torch.complex64).resolve_conj())
            return self.repeat(pair[..., 0], shape), self.repeat(pair[..., 1], shape)
        if value.is_conj() or _key(value) in self.stale:
            raise Unsupported("a conjugate, or a state from before an in-place step")
        real = self._inside(value.expand(shape), 2)
        return real, real._replace(offset=real.offset + 1)

    def new_parts(self, tensor: Tensor) -> tuple[Ref, Ref]:
        """Memory for the complex value ``tensor``."""
        if tensor.dtype not in self.dtypes:
            raise Unsupported(f"values of dtype {tensor.dtype}")
        if not self.known(tensor):
            self.new(torch.view_as_real(tensor))
        return self.parts(tensor, tensor.shape)

    def temporary(self, shape: Sequence[int]) -> Ref:
        """Memory for something that has no tensor in the recording."""
        empty = torch.empty(tuple(shape), device="meta")
        return Ref(Buffer(empty.numel()), 0, empty.stride())

    def own(self, state: Tensor, after: Tensor) -> Ref:
        """The memory of a state that a step changes in place into ``after``; as it was, it can no longer be read."""
        if not self.known(state) or after.shape != state.shape or after.dtype != state.dtype:
            raise Unsupported("a constant state, or one of another shape or dtype than the state after it")
        memory = self.dense(state)
        self.alive.append(after)
        self.places[_key(after)], self.moved[_key(after)] = memory.buffer, memory
        self.stale.add(_key(state))
        if not after.is_contiguous() or after.storage_offset() != memory.offset:
            self.stale.add(_key(after))  # it lies elsewhere in the definition: fine to keep, not to read
        return memory

    def counts(self, tensor: Tensor) -> Ref:
        """Where the int64 numbers ``tensor`` lie, in order."""
        if self.known(tensor) and self.places[_key(tensor)] is TOKENS:
            raise Unsupported("token ids that are used as numbers")
        if not self.known(tensor) or _key(tensor) in self.stale:
            raise Unsupported("integers that are no counts of the state")
        if tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise Unsupported(f"integers {_name(tensor)}, or laid out otherwise than in order")
        return Ref(self.places[_key(tensor)], 2 * int(tensor.storage_offset()))

    def count(self, out: Tensor, x: Tensor, more: int) -> None:
        """``out = x + more`` for int64 numbers."""
        source = self.counts(x)
        if not self.known(out):
            self.bind(out, Buffer(2 * (int(out.storage_offset()) + extent(out))))
        self.add("count", (out.numel(),), self.counts(out), source, numbers=[more])

    def advance(self, state: Tensor, after: Tensor) -> Ref:
        """The memory of counts that grow by one in the step, which ``add_one`` does at its end."""
        memory = self.counts(state)
        self.alive.append(after)
        self.places[_key(after)], self.moved[_key(after)] = memory.buffer, memory
        self.stale |= {_key(state), _key(after)}
        return memory

    def table(self, state: Tensor, after: Tensor) -> Ref:
        """Where the addresses of the rows of ``state`` lie: memory of each row that the op alone reads and writes."""
        buffer = self.places.get(_key(state))
        if buffer is None or id(buffer) not in self.states or after.dtype != state.dtype or buffer.brought is None:
            raise Unsupported("a history that is no state, or one of another dtype after the step")
        if buffer.brought.kind == "numbers" and buffer.first < 0 and state.is_contiguous():
            buffer.brought = Form("table", tuple(state.shape[1:]), state.dtype, grows=False)
        if buffer.brought.kind != "table" or state.dtype not in self.dtypes:
            raise Unsupported(f"a history {_name(state)} that is read otherwise too")
        self.alive.append(after)
        self.places[_key(after)], self.moved[_key(after)] = buffer, Ref(buffer)
        self.stale |= {_key(state), _key(after)}
        return Ref(buffer)

    @staticmethod
    def grows(table: Ref) -> bool:
        """Does a history keep every entry, or are its places used again?"""
        return table.buffer.brought is not None and table.buffer.brought.grows

    def _keep_counts(self, after: Tensor, state: Tensor) -> None:
        """The memory of counts takes their value after the step."""
        if _key(after) in self.moved:
            if self.moved[_key(after)].buffer is not self.places[_key(state)]:
                raise Unsupported("a state that becomes another")
        elif after.shape != state.shape or after.dtype != state.dtype or not self.known(after):
            raise Unsupported(f"counts {_name(state)} that become {_name(after)}")
        elif self.places[_key(after)] is not self.places[_key(state)]:
            self.add("count", (state.numel(),), Ref(self.places[_key(state)]), self.counts(after), numbers=[0])

    def keep(self, after: Tensor, state: Tensor) -> None:
        """At the end of a step: the memory of ``state`` takes the value ``after``."""
        home = self.places[_key(state)]
        kind = home.brought.kind if home.brought is not None else "numbers"
        if kind == "counts":
            return self._keep_counts(after, state)
        if kind == "table":
            if self.moved.get(_key(after), Ref(Buffer(0))).buffer is not home:
                raise Unsupported("a state that grows")
            return None
        if after.shape != state.shape or after.dtype != state.dtype:
            raise Unsupported(f"a state {_name(state)} that becomes {_name(after)}")
        if _key(after) in self.moved:
            source = self.moved[_key(after)]._replace(strides=state.stride())
        else:
            source = self.ref(after) if self.known(after) else self.repeat(after, after.shape)
        if source.buffer is home:
            if source.offset or source.strides != state.stride():
                raise Unsupported("a state that moves within its own memory")
            return None
        if id(source.buffer) in self.states:
            raise Unsupported("a state that becomes another")
        self.map("copy", state.shape, Ref(home, 0, state.stride()), [source])
        return None

    # ---- instructions ----

    def add(self, name: str, size: Sequence[int], out: Ref, *inputs: Ref | None, **rest: Any) -> None:
        """Append one instruction."""
        self.program.add(Instruction(name, [int(n) for n in size], out, inputs, **rest))
        self.prepared = {k: v for k, v in self.prepared.items() if k[0] is not out.buffer}

    def map(
        self, name: str, shape: Sequence[int], out: Ref, inputs: Sequence[Ref], scalars: Sequence[float] = ()
    ) -> None:
        """An elementwise instruction over ``shape``, which every input already has (strides 0 repeat)."""
        size, strides = _collapse(shape, [out.strides, *(i.strides for i in inputs)])
        refs = [Ref(r.buffer, r.offset, s) for r, s in zip((out, *inputs), strides, strict=True)]
        work = math.prod(shape) * (8 if name in COSTLY else 1)
        self.add(name, size, refs[0], *refs[1:], scalars=[float(s) for s in scalars], shared=work >= BIG)

    def elementwise(self, name: str, out: Tensor, *inputs: Any, scalars: Sequence[float] = ()) -> None:
        """``out = name(inputs)``, broadcast; numbers may stand for tensors."""
        guards.truths(name, out, inputs, TRUTHS)
        tensors = [
            x if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float32, device="cpu") for x in inputs
        ]
        refs = [self.ref(x.expand(out.shape)) if self.known(x) else self.repeat(x, out.shape) for x in tensors]
        self.map(name, out.shape, self.new(out), refs, scalars)

    def repeat(self, constant: Tensor, shape: Sequence[int]) -> Ref:
        """A constant, broadcast to ``shape``."""
        ref = self.ref(constant)
        assert ref.buffer.given is not None
        return Ref(ref.buffer, 0, ref.buffer.given.expand(shape).stride())

    def reduce(self, name: str, out: Tensor, x: Tensor, dims: Sequence[int]) -> None:
        """``out = name(x)`` over ``dims``; out has one number for each of the others."""
        if not x.dim() or not out.is_floating_point():
            raise Unsupported(f"{name} of {_name(x)} into {_name(out)}")
        gone = {d % x.dim() for d in dims} or set(range(x.dim()))
        kept = [d for d in range(x.dim()) if d not in gone]
        ref, target = self.ref(x), self.new(out)
        inner, (inner_strides,) = _collapse(
            [x.shape[d] for d in sorted(gone)], [[ref.strides[d] for d in sorted(gone)]]
        )
        if any(n > 1 for n in inner[:-1]):
            raise Unsupported("a reduction over axes that do not lie side by side")
        out_strides = out.reshape([x.shape[d] for d in kept]).stride() if out.dim() != len(kept) else out.stride()
        outer, strides = _collapse([x.shape[d] for d in kept], [out_strides, [ref.strides[d] for d in kept]])
        if outer[0] > 1:
            raise Unsupported("a reduction with more than three other axes")
        size = [*outer[1:], inner[-1]]
        refs = [Ref(target.buffer, target.offset, (*strides[0][1:], 0))]
        refs.append(Ref(ref.buffer, ref.offset, (*strides[1][1:], inner_strides[-1])))
        self.add(name, size, *refs, shared=x.numel() >= BIG)

    def matmul(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """``out[g i j] = sum_k a[g i k] b[g k j]`` for three axes each."""
        target, left, right = self.new(out), self.ref(a), self.ref(b)
        size = (*a.shape[:2], b.shape[2], a.shape[2])
        self.add("matmul", size, target, left, right, shared=math.prod(size) >= BIG)

    def product(self, out: Tensor, x: Tensor, kind: int, raw: Sequence[Tensor], shape: tuple[int, int]) -> None:
        """``out [... O] = x [... I] W^T`` for a weight matrix of any format; x is prepared once per format."""
        rows, target = out.numel() // shape[0], self.new(out)
        if rows > MAX_ROWS or not out.is_contiguous():
            raise Unsupported(f"a product of more than {MAX_ROWS} rows, or into strided memory")
        numbers = (kind, *shape)
        simple = x.dim() == 2 and x.stride(1) == 1
        source = self.ref(x) if simple else self.dense(x)
        strides = (x.stride(0) if simple else shape[1], 1)
        key = (source.buffer, source.offset, strides, kind, shape[1], rows)
        if key not in self.prepared:
            space = Ref(Buffer(-(-count("ev_product_scratch", *numbers, rows) // 4)))
            at = Ref(source.buffer, source.offset, strides)
            self.add("prepare", (rows,), space, at, numbers=numbers, raw=raw)
            self.prepared[key] = space
        flat = Ref(target.buffer, target.offset, (shape[0], 1))
        self.add("product", (rows,), flat, self.prepared[key], numbers=numbers, raw=raw, shared=True)

    def linear(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """``out = x weight^T + bias`` with a constant weight [O I]."""
        if self.known(weight):
            raise Unsupported("a weight that depends on the token")
        if weight.dtype not in WEIGHTS:
            raise Unsupported(f"weights of dtype {weight.dtype}")
        weight = weight.detach().contiguous()
        self.product(out, x, WEIGHTS[weight.dtype], [weight], (weight.shape[0], weight.shape[1]))
        if bias is not None:
            self.elementwise("add", out, out, bias)

    def heads(self, given: Sequence[Tensor | None], shape: tuple[int, int, int]) -> list[Ref | None]:
        """Where q, k, v or gates of the heads lie; a gate may be one for all keys."""
        return [None if t is None else self.ref(t.expand(shape[: t.dim()])) for t in given]

    def lined(self, x: Tensor) -> Ref:
        """Where x lies, its last axis number by number."""
        return self.ref(x) if x.stride(-1) == 1 else self.dense(x)

    def look_up(self, out: Tensor, tokens: Tensor, raw: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Rows of a matrix of any format: those of the token ids, which every run is given."""
        if not self.is_tokens(tokens) or not tokens.is_contiguous() or numbers[0] < 0:
            raise Unsupported("a table that is looked up by something else than token ids")
        self.add("embed", (tokens.numel(),), self.new(out), numbers=numbers, raw=raw)

    # ---- calls ----

    def lower(self, calls: Sequence[Call]) -> None:
        """Append the instructions of recorded calls. ``Unsupported`` names what has no native form."""
        made: set[int] = set()  # memory that the recording allocated
        read: set[int] = set()  # constants that the program reads
        for call in calls:  # first of all: what is drawn says more than what is done with it
            guards.random(call)
        for call in calls:
            self.alive.append(call)
            tensors = guards.tensors((call.args, call.kwargs))
            known = [self.known(x) for x in tensors]
            for x in guards.written(call):
                mine = self.known(x) and self.places[_key(x)].in_arena
                if not mine and (any(known) or _key(x) not in made or _key(x) in read):
                    raise Unsupported(f"{guards.name(call)} changes memory that is no value of the token's")
            if any(known):
                self._lower(call)
                read |= {_key(x) for x, of_token in zip(tensors, known, strict=True) if not of_token}
            made |= {_key(x) for x in guards.tensors(call.out)} - {_key(x) for x in tensors}

    def _lower(self, call: Call) -> None:
        lower = lowering(call.op)
        if lower is not None:
            return lower(self, call.out, **call.kwargs)
        guards.numbers_read(call)
        outs = guards.tensors(call.out)
        if guards.is_view(call) and all(self.known(x) for x in outs if x.numel()):
            return None
        name = guards.rule_name(call)
        rule = self.rules.get(name)
        if rule is None:
            raise Unsupported(guards.name(call))
        if any(self.known(x) for x in outs) and not guards.written(call):
            raise Unsupported(f"{guards.name(call)}, whose result shares memory with its input")
        return rule(self, name, call.out, **guards.options(call, rule))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _name(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _collapse(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[tuple[int, ...]]]:
    """The same numbers in four axes: axes of size 1 dropped, neighbours that lie alike in all operands merged."""
    axes: list[list[int]] = []  # size, then a stride for each operand
    for axis in zip(shape, *strides, strict=True):
        if axis[0] == 1:
            continue
        if axes and all(outer == inner * axis[0] for outer, inner in zip(axes[-1][1:], axis[1:], strict=True)):
            axes[-1] = [axes[-1][0] * axis[0], *axis[1:]]
        else:
            axes.append(list(axis))
    if len(axes) > 4:
        raise Unsupported("more than four axes")
    axes = [[1, *[0] * len(strides)]] * (4 - len(axes)) + axes
    columns = list(zip(*axes, strict=True))
    return list(columns[0]), [tuple(column) for column in columns[1:]]
