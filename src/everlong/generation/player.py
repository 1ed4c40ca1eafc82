"""Runs a recording on memory: one token for its rows, with the blocks that are left to Python in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import state as states
from ..call import Call
from ..mixers import base
from ..models.lm import LanguageModel
from ..ops.native.program import Instance
from .memory import Memory
from .recording import Recording, Where, hooked


class Player:
    """A recording at work on the slots of ``memory`` from ``first`` on."""

    def __init__(self, recording: Recording, memory: Memory, first: int = 0) -> None:
        self.recording, self.memory, self.first = recording, memory, first
        self.instance = Instance(recording.program)
        memory.bring(recording, self.instance, first)
        rows = (recording.rows, recording.width)
        self.logits = self.instance.view(recording.logits, (recording.rows, recording.vocabulary))
        self.stream = self.instance.view(recording.stream, rows)
        self.x = [self.instance.view(block.x, rows) for block in recording.blocks]
        self.out = [self.instance.view(block.out, rows) for block in recording.blocks]
        blocks = recording.blocks
        self.values = [{name: self._value(*value) for name, value in block.values.items()} for block in blocks]
        self.made = [
            {name: self.instance.view(*value) for name, (value, dtype) in block.made.items() if dtype}
            for block in blocks
        ]
        self.gives = [{name: self.instance.view(*value) for name, value in block.gives.items()} for block in blocks]

    def _value(self, value: Any, dtype: torch.dtype | None) -> tuple[Any, torch.dtype | None]:
        """A handed value as it lies in memory, and its dtype in the model; or a constant and None."""
        return (self.instance.view(*value) if dtype else value, dtype)

    def step(self, tokens: Tensor, works: dict[int, base.Workspace], count: int) -> Tensor:
        """Int64 ids [rows] -> logits [count vocab] of the first rows, which the next step overwrites.

        ``works`` are the workspaces of the blocks in Python, by their index; they hold ``count`` rows.
        """
        begin = 0
        for index in self.recording.python:
            block = self.recording.blocks[index]
            self.instance.run(begin, block.begin + 1, tokens)  # up to the copy of x
            self._in_python(index, works[index], count)
            begin = block.end
        self.instance.run(begin, len(self.recording.program.instructions), tokens)
        self.memory.moved_on(self.first, self.recording.rows)
        return self.logits if count == self.recording.rows else self.logits[:count]

    def _in_python(self, index: int, work: base.Workspace, rows: int) -> None:
        """A block's own step, on values in the program's memory."""
        block = self.recording.blocks[index]
        given = {k: value[:rows].to(dtype) if dtype else value for k, (value, dtype) in self.values[index].items()}
        x, call = self.x[index][:rows], Call("step_", values=given)
        if isinstance(block.block, nn.Module) and hooked(block.block):
            out, _, handed = block.block(x.to(block.dtype), work, call)
            x.copy_(out)
        else:  # the sum keeps the digits of the stream in memory
            y, _, handed = block.block.branch(x.to(block.dtype), work, call)
            x.add_(y) if block.block.additive else x.copy_(block.block.join(x, y))
        for name, (value, dtype) in self.values[index].items():
            if dtype and given[name] is not value:
                value[:rows].copy_(given[name])  # it may have changed in place
        for name, memory in self.gives[index].items():
            memory[:rows].copy_(handed.values[name])

    def differing(
        self, model: LanguageModel, tokens: Tensor, works: dict[int, base.Workspace], alike: Callable[[Any, Any], bool]
    ) -> Iterator[tuple[Where | None, str]]:
        """One step piece by piece, each beside the model's own on the same values; yields what is not ``alike``."""
        recording = self.recording
        self.instance.run(0, recording.embedded, tokens)
        if not alike(self.stream, model.embed(tokens)):
            yield None, "the embedding"
        for index, block in enumerate(recording.blocks):
            if block.reason is not None:
                self.instance.run(block.begin, block.begin + 1, tokens)
                self._in_python(index, works[index], recording.rows)
                continue
            given = self._given(index)
            self.instance.run(block.begin, block.end, tokens)
            out = self.out[index] - given[0] if block.block.additive else self.out[index]
            made = out, self.after(index), tuple(self.made[index].values())
            if not alike(made, self._asked(index, *given)) and not (
                recording.half and alike(made, self._asked(index, *given, wide=True))
            ):
                yield block.where, block.kind
        x = self.out[-1].to(recording.blocks[-1].dtype)
        want = model.logits(model.norm(x))
        self.instance.run(recording.blocks[-1].end, len(recording.program.instructions), tokens)
        if not alike(self.logits, want):
            yield None, "the head"
        self.memory.moved_on(self.first, recording.rows)

    def _given(self, index: int) -> tuple[Tensor, Any, dict[str, Any]]:
        """Copies of what a replayed block is about to read: x, its state and handed values with their dtypes."""
        values = {k: (value.clone() if dtype else value, dtype) for k, (value, dtype) in self.values[index].items()}
        return self.x[index].clone(), self.state(index), values

    def state(self, index: int) -> Any:
        """A copy of the state of a replayed block, all rows."""
        return self.memory.take(index, range(self.first, self.first + self.recording.rows))

    def after(self, index: int) -> Any:
        """The same when the block has run, before the step is counted."""
        leaves = [leaf for leaf in self.memory.blocks[index][1] if leaf.grows]
        for change in (1, -1):
            if change == -1:
                state = self.state(index)
            for leaf in leaves:
                leaf.held[self.first : self.first + self.recording.rows] += change
        return state

    def _asked(
        self, index: int, x: Tensor, state: Any, values: dict[str, Any], *, wide: bool = False
    ) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
        """What the step of a block makes of them, in the model's dtypes, or ``wide`` with all of it in fp32."""
        block = self.recording.blocks[index]
        asked = block.block.widened() if wide else block.block
        if wide:
            pairs = zip(states.leaves(state), states.leaves(asked.init_state(0)), strict=True)
            state = states.rebuild(state, iter([leaf.to(like.dtype) for (_, leaf, _), (_, like, _) in pairs]))
        given = {
            k: value.to(torch.float32 if wide else dtype) if dtype else value for k, (value, dtype) in values.items()
        }
        x = x.to(torch.float32 if wide else block.dtype)
        y, after, handed = asked.branch(x, state, Call("step", values=given))
        y = y if asked.additive else asked.join(x, y)
        return y, after, tuple(handed.values[name] for name in self.made[index])
