"""The memory that a recorded program runs on: the states of N slots, one row of a batch each.

Leaves of a fixed size lie side by side, in fp32 (counts in int64). A leaf that grows, or that its op reads in its own
dtype, is a piece of memory for each slot, found through a table of addresses: a row that grows moves nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import state as states
from ..ops.native.program import Buffer, Form, Instance
from .recording import Recording

LEAST = 64  # entries of a history that grows


class Leaf:
    """One leaf of the state of a block, for every slot."""

    def __init__(self, form: Form | None, like: Tensor, pad: str | None, slots: int) -> None:
        self.form, self.like, self.pad = form, like, pad  # like: the leaf of an empty state, for its dtype and shape
        self.table = form is not None and form.kind == "table"
        self.grows = form is not None and form.grows
        if form is None:
            self.memory = torch.zeros(slots, 0, dtype=torch.float32, device="cpu")
        elif self.table:
            self.rows = [self._empty(0) for _ in range(slots)]
            self.memory = torch.tensor([row.data_ptr() for row in self.rows], dtype=torch.int64, device="cpu")
            self.held = torch.zeros(slots, dtype=torch.int64, device="cpu")  # entries of each row
        else:
            self.memory = torch.zeros(slots, *form.shape, dtype=form.dtype, device="cpu")

    def _shape(self, room: int) -> tuple[int, ...]:
        assert self.form is not None
        return (room, *self.form.shape[1:]) if self.grows else self.form.shape

    def write(self, slot: int, value: Tensor) -> None:
        """Take a copy of ``value``, a leaf of one row without the batch axis."""
        if not self.table:
            self.memory[slot] = value.view(self.memory.shape[1:])
            return
        if self.grows:
            self.held[slot] = len(value)
            self._replace(slot, self._empty(max(LEAST, len(value) * 9 // 8 + 1)))
        self.rows[slot][: len(value)] = value

    def read(self, slots: Sequence[int]) -> Tensor:
        """A copy of the leaf of some rows [B ...]; shorter histories are padded as the state declares."""
        if self.form is None:
            return self.like.expand(len(slots), *self.like.shape[1:]).clone()
        if not self.table:
            return self.memory[list(slots)].to(self.like.dtype)
        if not self.grows:
            return torch.stack([self.rows[slot] for slot in slots])
        held = [int(self.held[slot]) for slot in slots]
        out = torch.zeros(len(slots), *self._shape(max(held)), dtype=self.like.dtype, device="cpu")
        for row, slot, size in zip(out, slots, held, strict=True):
            row[len(row) - size if self.pad == "start" else 0 :][:size] = self.rows[slot][:size]
        return out

    def make_room(self, slot: int) -> None:
        """Room for at least one entry more."""
        held = int(self.held[slot])
        if held >= len(self.rows[slot]):
            grown = self._empty(max(LEAST, held * 3 // 2 + 1))
            grown[:held] = self.rows[slot][:held]
            self._replace(slot, grown)

    def left(self, slot: int) -> int:
        """Entries that still fit."""
        return len(self.rows[slot]) - int(self.held[slot])

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots."""
        pair = [a, b]
        self.memory[pair] = self.memory[pair[::-1]]
        if self.table:
            self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
            self.held[pair] = self.held[pair[::-1]]

    def clear(self, slot: int) -> None:
        """Let go of a row's memory where it has grown."""
        if self.grows:
            self.held[slot] = 0
            self._replace(slot, self._empty(0))

    def _empty(self, room: int) -> Tensor:
        return torch.zeros(self._shape(room), dtype=self.like.dtype, device="cpu")

    def _replace(self, slot: int, row: Tensor) -> None:
        self.rows[slot], self.memory[slot] = row, row.data_ptr()


class Kernel:
    """The weights of a long convolution at as many lags as any row may need, lag 0 last."""

    def __init__(self, form: Form) -> None:
        self.form, self.room = form, 0
        self.memory = torch.zeros(2, dtype=torch.int64, device="cpu")  # where they lie, and their room

    def make_room(self, lags: int) -> None:
        """At least ``lags`` of them."""
        if self.room < lags:
            assert self.form.lags is not None
            self.room = max(LEAST, lags * 3 // 2)
            with torch.inference_mode(False), torch.no_grad():
                self.weights = self.form.lags(self.room).detach().float().flip(1).t().contiguous()
            self.memory[0], self.memory[1] = self.weights.data_ptr(), self.room


class Memory:
    """States of ``slots`` rows, in the forms that a recording asks for; every recording of the model can run on it."""

    def __init__(self, recording: Recording, slots: int) -> None:
        self.slots = slots
        self.blocks: list[tuple[Any, list[Leaf]]] = []  # an empty state, and its leaves; none where it runs in Python
        for block in recording.blocks:
            empty = block.block.init_state(1)
            forms = [buffer.brought for buffer in block.leaves]
            likes = list(states.leaves(empty)) if block.reason is None else []
            pairs = zip(forms, likes, strict=True)
            self.blocks.append((empty, [Leaf(form, like, pad, slots) for form, (_, like, pad) in pairs]))
        self.kernels = [Kernel(buffer.brought) for buffer in _lags(recording) if buffer.brought is not None]
        self.growing = [leaf for _, leaves in self.blocks for leaf in leaves if leaf.grows]
        held = torch.zeros(len(self.growing), slots, dtype=torch.int64, device="cpu")
        self.held = held  # of all histories: one addition counts for all
        for leaf, row in zip(self.growing, held, strict=True):
            leaf.held = row

    def bring(self, recording: Recording, instance: Instance, first: int) -> None:
        """Let ``instance`` of ``recording`` run on the slots from ``first`` on."""
        places: dict[Buffer, Leaf] = {}
        for block, (_, leaves) in zip(recording.blocks, self.blocks, strict=True):
            places |= dict(zip(block.leaves, leaves, strict=True))
        for buffer, leaf in places.items():
            instance.bring(buffer, leaf.memory[first:])
        for held in recording.program.spots:
            if held is not None and held.brought is not None and held.brought.kind == "held":
                instance.bring(held, places[held.brought.of].held[first:])
        for buffer, kernel in zip(_lags(recording), self.kernels, strict=True):
            instance.bring(buffer, kernel.memory)

    def put(self, index: int, slot: int, state: Any, row: int = 0) -> None:
        """Write the state of the block ``index``, of one row of ``state``."""
        for leaf, (_, value, _) in zip(self.blocks[index][1], states.leaves(state), strict=True):
            leaf.write(slot, value[row])

    def take(self, index: int, slots: Sequence[int]) -> Any:
        """A copy of the state of the block ``index``, of some rows."""
        empty, leaves = self.blocks[index]
        return states.rebuild(empty, iter([leaf.read(slots) for leaf in leaves]))

    def all(self) -> Iterator[Leaf]:
        """Every leaf."""
        return (leaf for _, leaves in self.blocks for leaf in leaves)

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots."""
        for leaf in self.all():
            leaf.swap(a, b)

    def clear(self, slot: int) -> None:
        """Let go of what a row has grown."""
        for leaf in self.growing:
            leaf.clear(slot)

    def make_room(self, first: int, count: int) -> int:
        """Room for a step of ``count`` slots from ``first`` on; returns for how many steps it lasts."""
        if not self.growing:
            return 1 << 62
        slots, most = range(first, first + count), int(self.held.max()) + 1
        for leaf in self.growing:
            for slot in slots:
                leaf.make_room(slot)
        for kernel in self.kernels:
            kernel.make_room(most)
        rooms = [leaf.left(slot) for leaf in self.growing for slot in slots]
        return min([*rooms, *(kernel.room - most + 1 for kernel in self.kernels)])

    def moved_on(self, first: int, count: int) -> None:
        """A step of ``count`` slots was made."""
        if self.growing:
            self.held[:, first : first + count] += 1


def _lags(recording: Recording) -> list[Buffer]:
    """The buffers of long kernels, in the order of the program."""
    found = (b for b in recording.program.spots if b is not None and b.brought is not None)
    return [buffer for buffer in found if buffer.brought is not None and buffer.brought.kind == "lags"]
