"""A model's ``step`` for a fixed number of rows, recorded block by block as a native program.

A ``Recording`` holds no state: any number of ``Player``s run it, each on memory of its own. A block with an operation
that has no native form runs in Python, between two pieces of the program; values that blocks hand on are handed over in
its memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import state as states
from ..blocks.residual import Inner
from ..call import EMBEDDINGS, Call
from ..models.lm import LanguageModel
from ..ops.native.aten import RULES
from ..ops.native.guards import Unsupported
from ..ops.native.lowering import Lowering
from ..ops.native.program import Buffer, Program, Ref
from ..ops.record import Recorder

Where = tuple[int, int]  # layer, and block within it


@dataclass
class Block:
    """``join(x, branch(x))``: instructions ``begin`` to ``end``, or where there is a ``reason``, Python."""

    where: Where
    block: Any
    begin: int = 0
    end: int = 0
    x: Any = None  # Ref of the residual stream [B D] before and after it
    out: Any = None
    dtype: torch.dtype = torch.float32  # of the residual stream in the model
    leaves: list[Buffer] = field(default_factory=list)  # of its state; a leaf of no numbers has none
    values: dict[str, Any] = field(default_factory=dict)  # handed on before it: (Ref, shape) and dtype, or a constant
    gives: dict[str, Any] = field(default_factory=dict)  # what a block in Python hands on: Ref and shape
    made: dict[str, Any] = field(default_factory=dict)  # what one of instructions does: (Ref, shape) and dtype
    reason: str | None = None

    @property
    def name(self) -> str:
        """Its place in the model, as ``explain`` names it."""
        return f"layers.{self.where[0]}.{self.where[1]}"

    @property
    def kind(self) -> str:
        """What it is, in messages: the class of its mixer."""
        return ", ".join(type(mixer).__name__ for mixer in self.block.mixers())

    @property
    def hands_on(self) -> bool:
        """Whether it may hand values on."""
        return not isinstance(self.block, Inner) or any(mixer.values for mixer in self.block.mixers())


class Recording:
    """The recorded step. ``python`` gives blocks that must not be replayed, with the reason.

    ``record`` raises ``Unsupported`` where the model as a whole cannot be recorded; ``blocks`` then holds the reasons
    found so far.
    """

    def __init__(self, model: LanguageModel, rows: int, python: dict[Where, str]) -> None:
        self.rows, self.width, self.program = rows, model.cfg.d_model, Program()
        self.half = any(x.dtype == torch.bfloat16 for x in model.parameters())
        self.blocks = [
            Block((layer, index), block, reason=python.get((layer, index)))
            for layer, module in enumerate(model.layers)
            for index, block in enumerate(module.sequence())
        ]

    def record(self, model: LanguageModel) -> None:
        """One step of the initial state, block by block, and the program made of it."""
        tokens = torch.zeros(self.rows, dtype=torch.long, device="cpu")
        to = Lowering(self.program, RULES, _dtypes(self.half), tokens)
        x = _lowered(to, "the embedding", lambda: model.embed(tokens))
        self.embedded, self.stream = len(self.program.instructions), to.ref(x)
        call = Call("step", values={EMBEDDINGS: self._apart(to, x)} if model.cfg.reads_embeddings() else {})
        for block in self.blocks:
            block.begin, block.dtype, block.x = len(self.program.instructions), x.dtype, to.ref(x)
            block.values = {name: _shared(to, value) for name, value in call.values.items()}
            x, call = self._record_block(to, block, x, call)
            block.end, block.out = len(self.program.instructions), to.ref(x)
            to.forget(x, *_tensors(call))
        logits = _lowered(to, "the head", lambda: model.logits(model.norm(x)))
        self.logits, self.vocabulary = to.ref(logits), logits.shape[-1]
        self.program.touch(self.logits.buffer)
        self.program.finish()
        self.python = [index for index, block in enumerate(self.blocks) if block.reason is not None]

    def _apart(self, to: Lowering, x: Tensor) -> Tensor:
        """A copy of a value, which nothing else writes."""
        alone = x.clone()
        to.map("copy", x.shape, to.new(alone), [to.ref(x)])
        return alone

    def _record_block(self, to: Lowering, block: Block, x: Tensor, call: Call) -> tuple[Tensor, Call]:
        """Instructions of the block, or a part that leaves it to Python. Returns the recorded sum, the call after."""
        try:
            if block.reason is not None:
                raise Unsupported(block.reason)
            out, after = _lower_block(to, block, x, call, self.rows)
            names = (name for name, value in after.values.items() if value is not call.values.get(name))
            block.made = {name: _shared(to, after.values[name]) for name in names}
            return out, after
        except Unsupported as error:
            block.reason = str(error)
        except Exception as error:  # what a step does while it is recorded, or a rule has not foreseen
            block.reason = f"recording failed: {type(error).__name__}: {error}"
        block.leaves = []
        del self.program.instructions[block.begin :]
        to.forget(x, *_tensors(call))
        alone = self._apart(to, x)  # Python adds to a value that is the residual stream and nothing else
        block.x = to.ref(alone)
        for value in block.values.values():
            if isinstance(value[0], tuple):
                self.program.touch(value[0][0].buffer)
        return alone, self._hand_on(to, block, alone, call)

    def _hand_on(self, to: Lowering, block: Block, x: Tensor, call: Call) -> Call:
        """What a block in Python hands on has a place in the program from here on."""
        if not block.hands_on:
            return call
        values = dict(call.values)
        _, _, handed = block.block(x, block.block.init_state(self.rows), call)
        for name, value in handed.values.items():
            if not isinstance(value, Tensor) or value.dtype not in to.dtypes or value.is_complex():
                raise Unsupported(f"{block.name} ({block.reason}) hands on {name!r}, which no program can hold")
            values[name] = value.clone(memory_format=torch.contiguous_format)
            buffer = Buffer(value.numel())
            to.bind(values[name], buffer)
            self.program.touch(buffer)
            block.gives[name] = (Ref(buffer, 0, values[name].stride()), value.shape)
        return call._replace(values=values)


def _tensors(call: Call) -> list[Tensor]:
    return [value for value in call.values.values() if isinstance(value, Tensor)]


def _dtypes(half: bool) -> set[torch.dtype]:
    """What values may be: fp32 keeps all digits of these; those of bf16 only where the weights have no more either."""
    return {torch.float32, torch.complex64, torch.bool, *([torch.bfloat16] if half else [])}


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


def _begun(state: Any) -> Any:
    """A copy of an empty state whose growing leaves have one entry, so that they can be told from nothing."""
    copies = []
    for _, leaf, pad in states.leaves(state):
        if pad and leaf.shape[1] == 0:
            leaf = leaf.new_zeros(len(leaf), 1, *leaf.shape[2:])
        copies.append(leaf.clone(memory_format=torch.contiguous_format))
    return states.rebuild(state, iter(copies))


def _lower_block(to: Lowering, block: Block, x: Tensor, call: Call, rows: int) -> tuple[Tensor, Call]:
    """The instructions of the block; the stream and the call after it."""
    for name, module, itself in block.block.called():
        if itself:
            refuse_hook(name, module)
    before = _begun(block.block.init_state(rows))
    for name, leaf, pad in states.leaves(before):
        if leaf.is_complex() or leaf.dtype not in to.dtypes | {torch.int64}:
            raise Unsupported(f"{name} of dtype {leaf.dtype}")
        block.leaves.append(to.bind_state(leaf, grows=bool(pad)) if leaf.numel() else Buffer(0))
    with Recorder() as record:
        total, after, handed = block.block(x, before, call)
    to.lower(record.calls)
    if type(before) is not type(after) or states.names(before) != states.names(after):
        raise Unsupported("a state of another kind than init_state makes")
    for name, value in handed.values.items():
        if isinstance(value, Tensor) and to.is_state(value):
            raise Unsupported(f"it hands on {name!r}, which lies in its state")
    for (_, leaf, _), (_, kept, _) in zip(states.leaves(before), states.leaves(after), strict=True):
        if leaf.numel():
            to.keep(kept, leaf)
        elif kept.shape != leaf.shape:
            raise Unsupported("a state that grows")
    if total.dtype != x.dtype or total.shape != x.shape or not to.known(total) or to.is_state(total):
        raise Unsupported(f"an output of shape {list(total.shape)} and dtype {total.dtype}")
    return total, call.after(handed)


def own(instance: Any, kind: type, *names: str) -> bool:
    """Does ``instance`` have another method of one of these names than ``kind`` gives?"""
    return any(getattr(getattr(instance, name), "__func__", None) is not getattr(kind, name) for name in names)


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def refuse_hook(name: str, module: nn.Module) -> None:
    """What a hook does besides, a replay would not do."""
    if hooked(module):
        raise Unsupported(f"{name} has a forward hook")


def refuse_hooks(module: nn.Module, what: str) -> None:
    """The same for a module and all its parts."""
    for name, part in module.named_modules():
        refuse_hook(f"{what}.{name}".rstrip("."), part)
