"""Decoding without Python in the way: a model's ``step``, recorded once, replayed as a native program.

``Decoder(model, batch)`` owns a state and writes it in place. Its definition is ``model.step``; a test holds it to that
for every mixer. Blocks with an operation that has no native form run through their own ``step_``, in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import shapes
from .. import state as states
from ..mixers import base
from ..ops import native
from ..ops.native.product import MAX_ROWS
from ..ops.native.program import Buffer, Program, Ref
from ..ops.record import Recorder
from .lm import LanguageModel
from .lowering import TOKENS, Lowering, Unsupported

Where = tuple[int, int]  # layer, and block within it


class Part(NamedTuple):
    """A piece of the step: instructions ``begin`` to ``end``, and the block that then runs in Python, if any."""

    begin: int
    end: int
    block: Where | None = None
    x: Tensor | None = None  # the residual stream [B D], in the program's memory: read and written by the block
    reason: str = ""


class Decoder:
    """``decoder.step(tokens [B]) -> logits [B vocab]``, for a state that the decoder alone owns.

    ``load`` takes a state, ``state`` gives a copy of it. Logits are a view that the next step overwrites, in fp32
    where the program runs natively. ``explain()`` says which blocks do not. Parameters are taken as they are when
    it is made: make a new one after training. ``ValueError`` for ids outside the vocabulary, states of another model.
    """

    def __init__(self, model: LanguageModel, batch: int = 1) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1 row, got {batch}")
        self.model, self.batch = model, batch
        self.reason = _refusal(model, batch)
        if self.reason is None:
            try:
                self._record()
            except Unsupported as error:
                self.reason = str(error)
        if self.reason is not None:
            self._state: Any = model.init_state(batch)

    # ---- the public face ----

    def explain(self) -> list[tuple[str, str]]:
        """The blocks that run in Python, with the reason; empty where the whole step is native."""
        if self.reason is not None:
            return [("model", self.reason)]
        return [(f"layers.{part.block[0]}.{part.block[1]}", part.reason) for part in self._parts if part.block]

    def load(self, state: Any) -> None:
        """Take a copy of ``state`` [B rows] as the state to go on from."""
        states.check_like(state, self.model.init_state(0), self.batch)
        if self.reason is not None:
            self._state = states.map_leaves(torch.clone, state)
            return
        for where, _ in self._blocks():
            given = state.layers[where[0]][where[1]]
            if where in self._python:
                self._python[where] = states.map_leaves(torch.clone, given)
                continue
            for (_, mine, _), (_, leaf, _) in zip(
                states.leaves(self._memory[where]), states.leaves(given), strict=True
            ):
                mine.copy_(leaf)
        self._position = state.position.clone()

    def state(self) -> Any:
        """A copy of the state after all tokens so far, as ``model.step`` would return it."""
        if self.reason is not None:
            return states.map_leaves(torch.clone, self._state)
        layers: list[list[Any]] = [[] for _ in self.model.layers]
        for where, block in self._blocks():
            if where in self._python:
                kept = states.map_leaves(torch.clone, self._python[where])
            else:
                dtypes = [leaf.dtype for _, leaf, _ in states.leaves(block.init_state(0))]
                pairs = zip(states.leaves(self._memory[where]), dtypes, strict=True)
                values = [leaf.to(dtype, copy=True) for (_, leaf, _), dtype in pairs]
                kept = states.rebuild(self._memory[where], iter(values))
            layers[where[0]].append(kept)
        return self.model.State(layers=tuple(map(tuple, layers)), position=self._position.clone())

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """One token per row: ids [B] -> logits [B vocab]; the state moves on."""
        self._check(tokens)
        if self.reason is not None:
            logits, self._state = self.model.step_(tokens, self._state)
            return logits
        tokens = tokens.long().contiguous()
        for part in self._parts:
            self.program.run(part.begin, part.end, tokens)
            if part.block is not None:
                assert part.x is not None
                norm, block = self.model.layers[part.block[0]]._blocks()[part.block[1]]
                y, self._python[part.block] = block.step_(norm(part.x), self._python[part.block])
                part.x.add_(y)
        self._position += 1
        return self.logits

    def _check(self, tokens: Tensor) -> None:
        shapes.dims(f"tokens {self.batch}", tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens have dtype {tokens.dtype}, expected int64 ids; encode the text first")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.model.cfg.vocab_size:
            raise ValueError(
                f"token ids from {low} to {high}, expected 0 to {self.model.cfg.vocab_size - 1}; "
                "was the text encoded with this model's tokenizer?"
            )

    def _blocks(self) -> Iterator[tuple[Where, Any]]:
        for layer, module in enumerate(self.model.layers):
            for index, (_, block) in enumerate(module._blocks()):
                yield (layer, index), block

    # ---- recording ----

    @torch.no_grad()
    def _record(self) -> None:
        """One step of zeros, block by block, and the program made of it."""
        self.program = Program()
        self._parts: list[Part] = []
        self._memory: dict[Where, Any] = {}
        self._python: dict[Where, Any] = {}
        self._position = torch.zeros(self.batch, dtype=torch.long, device="cpu")
        to, side = Lowering(self.program), {}  # type: ignore[var-annotated]
        tokens = torch.zeros(self.batch, dtype=torch.long, device="cpu")
        to.bind(tokens, TOKENS)
        with Recorder() as record:
            x = self.model.embed(tokens)
        to.lower(record.calls)
        self._views: list[tuple[int, Ref]] = []
        for where, block in self._blocks():
            x = self._record_block(to, where, block, x, side)
            to.forget(x, *side.values())
        with Recorder() as record:
            logits = self.model.logits(self.model.norm(x))
        to.lower(record.calls)
        self._parts.append(Part(self._parts[-1].end if self._parts else 0, len(self.program.instructions)))
        final = to.ref(logits)
        self.program.touch(final.buffer)
        self.program.finish()
        self.logits = self.program.view(final, logits.shape)
        for index, ref in self._views:
            self._parts[index] = self._parts[index]._replace(x=self.program.view(ref, x.shape))

    def _record_block(self, to: Lowering, where: Where, block: Any, x: Tensor, side: dict[str, Tensor]) -> Tensor:
        """Instructions of ``x + block(norm(x))``, or a part that leaves it to Python. Returns the recorded sum."""
        norm, length = self.model.layers[where[0]]._blocks()[where[1]][0], len(self.program.instructions)
        try:
            if type(block).step_ is not base.Mixer.step_:
                raise Unsupported(f"{type(block).__name__} has its own step in place")
            return self._lower_block(to, where, block, norm, x, side)
        except Unsupported as error:
            if block.side:
                raise Unsupported(f"{type(block).__name__} shares values with other layers: {error}") from error
            del self.program.instructions[length:]
            to.prepared = {}
            self._memory.pop(where, None)
            self._python[where] = block.init_state(self.batch)
            self._views.append((len(self._parts), to.ref(x)))
            self._parts.append(Part(self._parts[-1].end if self._parts else 0, length, where, None, str(error)))
            return x

    def _lower_block(
        self, to: Lowering, where: Where, block: Any, norm: Any, x: Tensor, side: dict[str, Tensor]
    ) -> Tensor:
        before = block.init_state(self.batch)
        memory = states.map_leaves(lambda leaf: torch.zeros(leaf.shape, dtype=torch.float32, device="cpu"), before)
        pairs = list(zip(states.leaves(before), states.leaves(memory), strict=True))
        for (name, leaf, _), (_, mine, _) in pairs:
            if not leaf.is_contiguous() or not (leaf.is_floating_point() or leaf.dtype == torch.bool):
                raise Unsupported(f"{name} of dtype {leaf.dtype}, or not in one piece")
            if leaf.numel():
                to.bind(leaf, Buffer(leaf.numel(), mine))
        with Recorder() as record:
            y, after = block.step(norm(x), before, **({"side": side} if block.side else {}))
            total = x + y
        to.lower(record.calls)
        for (_, leaf, _), (_, kept, _) in zip(states.leaves(before), states.leaves(after), strict=True):
            if leaf.numel():
                to.keep(kept, leaf)
        self._memory[where] = memory
        return total


def _refusal(model: LanguageModel, batch: int) -> str | None:
    """Why this model cannot be recorded at all, or None."""
    if native.MISSING is not None:
        return native.MISSING
    if batch > MAX_ROWS:
        return f"a batch of {batch} rows; the native products take {MAX_ROWS}"
    for name, x in model.state_dict().items():
        if x.device.type != "cpu" or x.dtype in (torch.float64, torch.float16):
            return f"{name} is {x.dtype} on {x.device}; the kernels take fp32 and bf16 on the CPU"
    return None
