"""A model's ``step`` for a fixed number of rows, recorded block by block and replayed as a native program.

What ``decode.py`` builds its decoder of. A block with an operation that has no native form runs through its own
``step_``, between two pieces of the program; values that layers share (``side``) are handed over in its memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
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

    def given(self) -> tuple[Tensor, Any, dict[str, Any]]:
        """Copies of what a replayed block is about to read: x, its state and the shared values, in fp32."""
        side = {name: value.clone() if dtype else value for name, (value, dtype) in self.side.items()}
        return self.x.clone(), states.map_leaves(torch.clone, self.state), side

    def asked(self, x: Tensor, state: Any, side: dict[str, Any], *, wide: bool = False) -> tuple[Tensor, Any]:
        """What ``step`` makes of them, in the model's dtypes, or ``wide`` with all of it in fp32."""
        norm, block = self.norm, self.block
        if wide:
            norm, block = (copy.deepcopy(module).float() for module in (norm, block))
        kinds = {k: dtype for k, (_, dtype) in self.side.items()}
        side = {k: v.to(torch.float32 if wide else kinds[k]) if kinds[k] else v for k, v in side.items()}
        state = _like(state, block.init_state(0))
        x = x.to(torch.float32 if wide else self.dtype)
        return block.step(norm(x), state, **({"side": side} if block.side else {}))


class Replay:
    """The recorded step. ``python`` gives blocks that must not be replayed, with the reason.

    ``Unsupported`` where the model as a whole cannot be recorded; ``blocks`` then holds the reasons found so far.
    """

    def __init__(self, model: LanguageModel, rows: int, python: dict[Where, str]) -> None:
        self.model, self.rows, self.python = model, rows, python
        self.blocks: list[Block] = []
        self.half = any(x.dtype == torch.bfloat16 for x in model.parameters())
        for layer, module in enumerate(model.layers):
            for index, (norm, block) in enumerate(module._blocks()):
                self.blocks.append(Block((layer, index), norm, block, reason=python.get((layer, index))))

    def record(self) -> None:
        """One step of the initial state, block by block, and the program made of it."""
        self.program = Program()
        tokens = torch.zeros(self.rows, dtype=torch.long, device="cpu")
        to, side = Lowering(self.program, RULES, _dtypes(self.half), tokens), {}  # type: ignore[var-annotated]
        x = _lowered(to, "the embedding", lambda: self.model.embed(tokens))
        self.embedded, stream = len(self.program.instructions), to.ref(x)
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
        self.stream, self.logits = self.program.view(stream, x.shape), self.program.view(final, logits.shape)
        for block in self.blocks:
            block.x, block.out = (self.program.view(ref, x.shape) for ref in (block.x, block.out))
            block.side = {k: (self.program.view(*v) if d else v, d) for k, (v, d) in block.side.items()}
        self.in_python = [block for block in self.blocks if block.reason is not None]
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
        alone = x.clone()  # Python adds to a value that is the residual stream and nothing else
        to.map("copy", x.shape, to.new(alone), [to.ref(x)])
        block.x = to.ref(alone)
        for value in block.side.values():
            if isinstance(value[0], tuple):
                self.program.touch(value[0][0].buffer)
        if block.block.side:
            self._share(to, block, alone, side)
        return alone

    def _share(self, to: Lowering, block: Block, x: Tensor, side: dict[str, Any]) -> None:
        """The shared values that a block in Python makes lie in memory of their own."""
        shared = dict(side)
        block.block.step(block.norm(x), block.block.init_state(self.rows), side=shared)
        for name, value in shared.items():
            if value is side.get(name):
                continue
            if not isinstance(value, Tensor) or value.dtype not in to.dtypes or value.is_complex():
                raise Unsupported(f"{block.name} ({block.reason}) shares {name!r}, which no program can hold")
            block.gives[name] = torch.zeros(value.shape, dtype=torch.float32, device="cpu")
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
        for block in self.in_python:
            self.program.run(begin, block.begin + 1, tokens)  # up to the copy of x
            _in_python(block)
            begin = block.end
        self.program.run(begin, len(self.program.instructions), tokens)
        self.position += 1
        return self.logits

    def differing(self, tokens: Tensor, alike: Callable[[Any, Any], bool]) -> Iterator[tuple[Where | None, str]]:
        """One step piece by piece, each beside the model's own on the same values; yields what is not ``alike``."""
        self.program.run(0, self.embedded, tokens)
        if not alike(self.stream, self.model.embed(tokens)):
            yield None, "the embedding"
        for block in self.blocks:
            if block.reason is not None:
                self.program.run(block.begin, block.begin + 1, tokens)
                _in_python(block)
                continue
            given = block.given()
            self.program.run(block.begin, block.end, tokens)
            made = block.out - given[0], block.state
            if not alike(made, block.asked(*given)) and not (self.half and alike(made, block.asked(*given, wide=True))):
                yield block.where, type(block.block).__name__
        x = self.blocks[-1].out
        want = self.model.logits(self.model.norm(x.to(self.blocks[-1].dtype)))
        self.program.run(self.blocks[-1].end, len(self.program.instructions), tokens)
        if not alike(self.logits, want):
            yield None, "the head"
        self.position += 1


def _in_python(block: Block) -> None:
    """A block's own step, on values in the program's memory."""
    side = {name: value.to(dtype) if dtype else value for name, (value, dtype) in block.side.items()}
    given, extra = dict(side), {"side": side} if block.block.side else {}
    y, block.state = block.block.step_(block.norm(block.x.to(block.dtype)), block.state, **extra)
    block.x.add_(y)
    for name, (value, dtype) in block.side.items():
        if dtype and given[name] is not value:
            value.copy_(given[name])  # it may have changed in place
    for name, memory in block.gives.items():
        memory.copy_(side[name])


def _dtypes(half: bool) -> set[torch.dtype]:
    """What values may be: fp32 keeps all digits of these; those of bf16 only where the weights have no more either."""
    return {torch.float32, torch.complex64, torch.bool, *([torch.bfloat16] if half else [])}


def _copy_of(block: Block) -> Any:
    if block.reason is not None:
        return states.map_leaves(torch.clone, block.state)
    return _like(block.state, block.block.init_state(0))


def _like(state: Any, like: Any) -> Any:
    """A copy of ``state`` in the dtypes of ``like``."""
    pairs = zip(states.leaves(state), states.leaves(like), strict=True)
    return states.rebuild(state, iter([leaf.to(kind.dtype, copy=True) for (_, leaf, _), (_, kind, _) in pairs]))


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
    if own(block.block, base.Mixer, "step_"):
        raise Unsupported(f"{type(block.block).__name__} has its own step in place")
    refuse_hooks(block.norm, "norm")
    refuse_hooks(block.block, type(block.block).__name__, itself=False)
    before = states.map_leaves(
        lambda leaf: leaf.clone(memory_format=torch.contiguous_format), block.block.init_state(rows)
    )
    memory = states.map_leaves(lambda leaf: torch.zeros(leaf.shape, dtype=torch.float32, device="cpu"), before)
    for (name, leaf, pad), (_, mine, _) in zip(states.leaves(before), states.leaves(memory), strict=True):
        if leaf.is_complex() or leaf.dtype not in to.dtypes or pad:
            raise Unsupported(f"{name} of dtype {leaf.dtype}" if not pad else f"{name} grows")
        if leaf.numel():
            to.bind_state(leaf, mine)
    with Recorder() as record:
        y, after = block.block.step(block.norm(x), before, **({"side": side} if block.block.side else {}))
        total = x + y
    to.lower(record.calls)
    if type(before) is not type(after) or states.names(before) != states.names(after):
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


def own(instance: Any, kind: type, *names: str) -> bool:
    """Does ``instance`` have another method of one of these names than ``kind`` gives?"""
    return any(getattr(getattr(instance, name), "__func__", None) is not getattr(kind, name) for name in names)


def refuse_hooks(module: nn.Module, what: str, *, itself: bool = True) -> None:
    """What a hook does besides, a replay would not do. ``itself``: the module is called, not just its ``step``."""
    for name, part in module.named_modules():
        if (name or itself) and (part._forward_hooks or part._forward_pre_hooks):
            raise Unsupported(f"{what}{'.' if name else ''}{name} has a forward hook")
