"""A model's ``step`` for a fixed number of rows, recorded block by block and replayed as a native program.

What ``decode.py`` builds its decoder of. A block with an operation that has no native form runs through its own
``step_``, between two pieces of the program; values that layers share (``side``) are handed over in its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import state as states
from ..mixers import base
from ..ops.native.program import Buffer, Program
from ..ops.record import Recorder
from .guards import Unsupported
from .instructions import RULES
from .lm import LanguageModel
from .lowering import Lowering

Where = tuple[int, int]  # layer, and block within it


@dataclass
class Block:
    """``x + block(norm(x))``: instructions ``begin`` to ``end``, or where there is a ``reason``, Python."""

    where: Where
    norm: Any
    block: Any
    begin: int = 0
    end: int = 0
    x: Any = None  # the residual stream [B D] before and after it: a Ref, then a view of the program's memory
    out: Any = None
    dtype: torch.dtype = torch.float32  # of the residual stream in the model
    state: Any = None  # in fp32 as the program's memory, or as the block's own
    side: dict[str, Any] = field(default_factory=dict)  # shared values before it, likewise Refs and views
    gives: dict[str, Tensor] = field(default_factory=dict)  # shared values that a block in Python makes
    reason: str | None = None

    @property
    def name(self) -> str:
        """Its place in the model, as ``explain`` names it."""
        return f"layers.{self.where[0]}.{self.where[1]}"

    def run(self, step: Any, state: Any) -> tuple[Tensor, Any, dict[str, Any]]:
        """``block(norm(x))`` through ``step`` on what lies in the program's memory; the state and side values after."""
        side = {name: value.to(dtype) if dtype else value for name, (value, dtype) in self.side.items()}
        y, after = step(self.norm(self.x.to(self.dtype)), state, **({"side": side} if self.block.side else {}))
        return y, after, side


class Replay:
    """The recorded step. ``python`` gives blocks that must not be replayed, with the reason.

    ``Unsupported`` where the model as a whole cannot be recorded; ``blocks`` then holds the reasons found so far.
    """

    def __init__(self, model: LanguageModel, rows: int, python: dict[Where, str]) -> None:
        self.model, self.rows, self.python = model, rows, python
        self.blocks: list[Block] = []
        for layer, module in enumerate(model.layers):
            for index, (norm, block) in enumerate(module._blocks()):
                self.blocks.append(Block((layer, index), norm, block, reason=python.get((layer, index))))

    def record(self) -> None:
        """One step of the initial state, block by block, and the program made of it."""
        self.program = Program()
        tokens = torch.zeros(self.rows, dtype=torch.long)
        to, side = Lowering(self.program, RULES, _dtypes(self.model), tokens), {}  # type: ignore[var-annotated]
        x = _lowered(to, "the embedding", lambda: self.model.embed(tokens))
        self.embedded = len(self.program.instructions)
        for block in self.blocks:
            block.begin, block.dtype, block.x = len(self.program.instructions), x.dtype, to.ref(x)
            block.side = {name: _shared(to, value) for name, value in side.items()}
            x = self._record_block(to, block, x, side)
            block.end, block.out = len(self.program.instructions), to.ref(x)
            to.forget(x, *(value for value in side.values() if isinstance(value, Tensor)))
        logits = _lowered(to, "the head", lambda: self.model.logits(self.model.norm(x)))
        final = to.ref(logits)
        self.program.touch(final.buffer)
        self.program.finish()
        self.logits = self.program.view(final, logits.shape)
        for block in self.blocks:
            block.x, block.out = (self.program.view(ref, x.shape) for ref in (block.x, block.out))
            block.side = {k: (self.program.view(*v) if d else v, d) for k, (v, d) in block.side.items()}
        self.load(self.model.init_state(self.rows))

    def _record_block(self, to: Lowering, block: Block, x: Tensor, side: dict[str, Any]) -> Tensor:
        """Instructions of the block, or a part that leaves it to Python. Returns the recorded sum."""
        shared = dict(side)
        try:
            if block.reason is not None:
                raise Unsupported(block.reason)
            out = _lower_block(to, block, x, shared, self.rows)
            side.update(shared)
            return out
        except Unsupported as error:
            block.reason = str(error)
        except Exception as error:  # what a step does while it is recorded, or a rule has not foreseen
            block.reason = f"recording failed: {type(error).__name__}: {error}"
        del self.program.instructions[block.begin :]
        to.forget(x, *(value for value in side.values() if isinstance(value, Tensor)))
        copy = x.clone()  # Python adds to a value that is the residual stream and nothing else
        to.map("copy", x.shape, to.new(copy), [to.ref(x)])
        block.x = to.ref(copy)
        for value in block.side.values():
            if isinstance(value[0], tuple):
                self.program.touch(value[0][0].buffer)
        if block.block.side:
            self._share(to, block, copy, side)
        return copy

    def _share(self, to: Lowering, block: Block, x: Tensor, side: dict[str, Any]) -> None:
        """The shared values that a block in Python makes lie in memory of their own."""
        shared = dict(side)
        block.block.step(block.norm(x), block.block.init_state(self.rows), side=shared)
        for name, value in shared.items():
            if value is side.get(name):
                continue
            if not isinstance(value, Tensor) or value.dtype not in to.dtypes or value.is_complex():
                raise Unsupported(f"{block.name} ({block.reason}) shares {name!r}, which no program can hold")
            block.gives[name] = torch.zeros(value.shape, dtype=torch.float32)
            side[name] = value.clone(memory_format=torch.contiguous_format)
            to.bind(side[name], Buffer(value.numel(), block.gives[name]))

    # ---- use ----

    def load(self, state: Any) -> None:
        """Take a copy of ``state`` [B rows]."""
        for block in self.blocks:
            given = state.layers[block.where[0]][block.where[1]]
            if block.reason is not None:
                block.state = states.map_leaves(torch.clone, given)
                continue
            for (_, mine, _), (_, leaf, _) in zip(states.leaves(block.state), states.leaves(given), strict=True):
                mine.copy_(leaf)
        self.position = state.position.clone()

    def state(self) -> Any:
        """A copy of the state."""
        layers: list[list[Any]] = [[] for _ in self.model.layers]
        for block in self.blocks:
            layers[block.where[0]].append(_copy_of(block))
        return self.model.State(layers=tuple(map(tuple, layers)), position=self.position.clone())

    def step(self, tokens: Tensor) -> Tensor:
        """One token per row: int64 ids [B] -> logits [B vocab], which the next step overwrites."""
        begin = 0
        for block in self.blocks:
            if block.reason is None:
                continue
            self.program.run(begin, block.begin + 1, tokens)  # up to the copy of x
            y, block.state, side = block.run(block.block.step_, block.state)
            block.x.add_(y)
            for name, memory in block.gives.items():
                memory.copy_(side[name])
            begin = block.end
        self.program.run(begin, len(self.program.instructions), tokens)
        self.position += 1
        return self.logits

    def blocks_beside_their_steps(self, tokens: Tensor) -> Iterator[tuple[Block, Any, Any]]:
        """One step in which every replayed block is also run in Python on the same values: what it made, and should.

        Both are tuples of the residual stream after the block and the leaves of its state.
        """
        self.program.run(0, self.embedded, tokens)
        for block in self.blocks:
            if block.reason is not None:
                self.program.run(block.begin, block.end, tokens)
                y, block.state, side = block.run(block.block.step_, block.state)
                block.x.add_(y)
                for name, memory in block.gives.items():
                    memory.copy_(side[name])
                continue
            x = block.x.to(block.dtype).clone()
            y, after, _ = block.run(block.block.step, _copy_of(block))
            self.program.run(block.begin, block.end, tokens)
            yield block, (block.out.clone(), _copy_of(block)), (x + y, after)
        self.position += 1


def _dtypes(model: LanguageModel) -> set[torch.dtype]:
    """What values may be: all of fp32's digits are kept, and so are those of bf16 where the weights have no more."""
    half = any(x.dtype == torch.bfloat16 for x in model.parameters())
    return {torch.float32, torch.complex64, torch.bool, *([torch.bfloat16] if half else [])}


def _copy_of(block: Block) -> Any:
    if block.reason is not None:
        return states.map_leaves(torch.clone, block.state)
    dtypes = [leaf.dtype for _, leaf, _ in states.leaves(block.block.init_state(0))]
    pairs = zip(states.leaves(block.state), dtypes, strict=True)
    return states.rebuild(block.state, iter([leaf.to(dtype, copy=True) for (_, leaf, _), dtype in pairs]))


def _lowered(to: Lowering, what: str, function: Any) -> Any:
    """The recorded value of ``function``, and its instructions."""
    with Recorder() as record:
        out = function()
    try:
        to.lower(record.calls)
        to.ref(out)
    except Unsupported as error:
        raise Unsupported(f"{what}: {error}") from error
    return out


def _shared(to: Lowering, value: Any) -> tuple[Any, torch.dtype | None]:
    """Where a shared value lies and its dtype, or a constant and None."""
    return ((to.ref(value), value.shape), value.dtype) if to.known(value) else (value, None)


def _lower_block(to: Lowering, block: Block, x: Tensor, side: dict[str, Any], rows: int) -> Tensor:
    """The instructions of ``x + block(norm(x))``."""
    if type(block.block).step_ is not base.Mixer.step_:
        raise Unsupported(f"{type(block.block).__name__} has its own step in place")
    refuse_hooks(block.norm, "norm")
    refuse_hooks(block.block, type(block.block).__name__, itself=False)
    before = states.map_leaves(
        lambda leaf: leaf.clone(memory_format=torch.contiguous_format), block.block.init_state(rows)
    )
    memory = states.map_leaves(lambda leaf: torch.zeros(leaf.shape, dtype=torch.float32), before)
    for (name, leaf, pad), (_, mine, _) in zip(states.leaves(before), states.leaves(memory), strict=True):
        if leaf.is_complex() or leaf.dtype not in to.dtypes or pad:
            raise Unsupported(f"{name} of dtype {leaf.dtype}" if not pad else f"{name} grows")
        if leaf.numel():
            to.bind_state(leaf, mine)
    with Recorder() as record:
        y, after = block.block.step(block.norm(x), before, **({"side": side} if block.block.side else {}))
        total = x + y
    to.lower(record.calls)
    names = [[name for name, *_ in states.leaves(tree)] for tree in (before, after)]
    if type(before) is not type(after) or names[0] != names[1]:
        raise Unsupported("a state of another kind than init_state makes")
    for name, value in side.items():
        if isinstance(value, Tensor) and to.is_state(value):
            raise Unsupported(f"it shares {name!r}, which lies in its state")
    for (_, leaf, _), (_, kept, _) in zip(states.leaves(before), states.leaves(after), strict=True):
        if leaf.numel():
            to.keep(kept, leaf)
        elif kept.shape != leaf.shape:
            raise Unsupported("a state that grows")
    if total.dtype != x.dtype or total.shape != x.shape or not to.known(total) or to.is_state(total):
        raise Unsupported(f"an output of shape {list(total.shape)} and dtype {total.dtype}")
    block.state = memory
    return total


def refuse_hooks(module: nn.Module, what: str, *, itself: bool = True) -> None:
    """What a hook does besides, a replay would not do. ``itself``: the module is called, not just its ``step``."""
    for name, part in module.named_modules():
        if (name or itself) and (part._forward_hooks or part._forward_pre_hooks):
            raise Unsupported(f"{what}{'.' if name else ''}{name} has a forward hook")
