"""A pool: the states of up to N texts of one model, of which any can take its next token together with any others.

Rows of a pool are texts. Each has a slot in the memory of the recorded programs; those that take a token stand in
front, and the program for their number (rounded up a little) runs on that prefix. A row that runs alone and one that
runs among others give the same numbers, wherever the program is native.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import shapes
from .. import state as states
from ..arguments import whole
from ..models.lm import LanguageModel
from ..ops.native.product import MAX_ROWS
from .memory import LEAST, Memory
from .player import Player
from .programs import programs
from .recording import Recording

MOST = 1 << 16  # texts of one pool
WHOLE = -1  # stands for the model among the parts that run in Python


class Pool:
    """States of up to ``rows`` texts, by row.

    ``put(row, state)`` begins a row, ``step(tokens, rows)`` moves some on, ``take(row)`` copies its state and
    ``free(row)`` ends it. Parameters are taken as they are when the pool is made: make a new one after training.
    ``ValueError`` for rows that are not there, ids outside the vocabulary, states of another model.
    """

    def __init__(self, model: LanguageModel, rows: int) -> None:
        rows = whole("rows", rows)
        if rows > MOST:
            raise ValueError(f"rows is {rows}, expected at most {MOST} texts in one pool; make several")
        self.model, self.rows, self.programs = model, rows, programs(model)
        self._empty = model.init_state(0)  # to compare with
        self._vocabulary = model.cfg.vocab_size
        self._fresh: dict[int, tuple[Any, int]] = {}  # states that are in no slot yet, and the row of them
        self._apart: dict[int, dict[int, Any]] = {}  # of rows that stand still: states of the parts in Python
        self._row: list[int | None] = [None] * (rows + 3)  # in each slot; three, for programs of a few rows more
        self._slot: dict[int, int] = {}
        with torch.inference_mode(False):  # may be used outside of it
            self._position = torch.zeros(rows + 3, dtype=torch.int64, device="cpu")  # of the text in each slot
        self._memory: Memory | None = None
        self._players: dict[tuple[int, int], Player] = {}
        self._owners: dict[int, Any] = {}  # what runs in Python, by the index of its block
        self._forget()

    def _forget(self) -> None:
        """Nobody is about to take a token."""
        self._active: tuple[int, ...] = ()
        self._works: dict[int, dict[int, Any]] = {}  # their workspaces, by the first active row that they hold
        self._running: list[tuple[Player, int, int]] = []  # players, and their first and last of the active rows
        self._whole: Player | None = None  # the only one, where it is for exactly these rows
        self._left = 0  # steps that there is room for
        self._taken = 0  # steps of the active rows that their positions do not count yet

    # ---- the public face ----

    @property
    def alive(self) -> list[int]:
        """The rows that hold a text, in order."""
        return sorted(self._fresh.keys() | self._slot.keys() | self._apart.keys())

    def explain(self) -> list[tuple[str, str]]:
        """What runs in Python, with the reason: "model", and blocks by name; empty where all steps were native."""
        reason = self.programs.reason
        return [*([("model", reason)] if reason is not None else []), *self.programs.names().items()]

    def put(self, row: int, state: Any = None) -> None:
        """Begin row ``row`` with a copy of ``state`` [1], or at the beginning of a text."""
        self.load([row], self.model.init_state(1) if state is None else state)

    def load(self, rows: Sequence[int], state: Any) -> None:
        """Begin several rows with a copy of ``state`` [B]."""
        rows = _indices(rows)
        for row in rows:
            if not 0 <= row < self.rows:
                raise ValueError(f"row {row} is none of this pool; expected 0 to {self.rows - 1}")
        states.check_like(state, self._empty, len(rows))
        states.check_values(state)
        self.hand_over(rows, states.map_leaves(torch.clone, state))

    def hand_over(self, rows: Sequence[int], state: Any) -> None:
        """``load`` without a look at ``state`` and without a copy of it: for who has made it and gives it up."""
        for row in rows:
            self.free(row)
        self._fresh |= {row: (state, index) for index, row in enumerate(rows)}

    def take(self, rows: int | Sequence[int]) -> Any:
        """A copy of the state of a row [1], or of several [B], as ``model.step`` would return it."""
        wanted = list(_indices([rows] if isinstance(rows, int) else rows))
        self._check_alive(wanted)
        if all(row in self._fresh for row in wanted):
            return _stacked([states.gather(*self._fresh[row]) for row in wanted])
        if any(row in self._fresh for row in wanted):
            return _stacked([self.take(row) for row in wanted])
        if self._memory is None:
            return self._part(WHOLE, wanted)
        self._count()
        slots = [self._slot[row] for row in wanted]
        layers: list[list[Any]] = [[] for _ in self.model.layers]
        for index, (where, native) in enumerate(self._blocks):
            layers[where].append(self._memory.take(index, slots) if native else self._part(index, wanted))
        return self.model.State(layers=tuple(map(tuple, layers)), position=self._position[slots])

    def free(self, row: int) -> None:
        """End a row; its memory may then be another's. A row that is not there is none to end."""
        (row,) = _indices([row])
        self._fresh.pop(row, None)
        if row in self._active:
            self._stand_still()
        self._apart.pop(row, None)
        slot = self._slot.pop(row, None)
        if slot is not None:
            self._row[slot] = None
            if self._memory is not None:
                self._memory.clear(slot)

    def prepare(self, rows: Sequence[int]) -> None:
        """Make all that the next step of ``rows`` needs, so that it takes no longer than others."""
        active = _indices(rows)
        self._check_alive(active)
        with torch.inference_mode(False), torch.no_grad():
            self._compose(active)

    @torch.no_grad()
    def step(self, tokens: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """One token for each of ``rows`` (all that are alive): ids [n] -> logits [n vocab], a view until the next step.

        Logits are in fp32 where the program runs natively.
        """
        active = tuple(self.alive) if rows is None else _indices(rows)
        self._check(tokens, active)
        if active != self._active:
            self.prepare(active)
        if WHOLE in self._owners:
            return self.model.step_(tokens, self._works[0][WHOLE])
        if self._left == 0:
            with torch.inference_mode(False):
                self._left = self._make_room()
        self._left -= 1
        self._taken += 1
        tokens = tokens.long().contiguous()
        if self._whole is not None:
            return self._whole.step(tokens, self._works[0], len(active))
        for player, begin, end in self._running:
            self._logits[begin:end] = self._play(player, begin, end, tokens)
        return self._logits

    def _play(self, player: Player, begin: int, end: int, tokens: Tensor) -> Tensor:
        """One of several programs, or one for more rows than there are."""
        ids, count = tokens[begin:end], end - begin
        if count < player.recording.rows:
            ids = F.pad(ids, [0, player.recording.rows - count])
        return player.step(ids.contiguous(), self._works[begin], count)

    def _check(self, tokens: Tensor, rows: tuple[int, ...]) -> None:
        if not isinstance(tokens, Tensor):
            raise ValueError(f"tokens are {type(tokens).__name__}, expected a tensor of one id for each row")
        shapes.dims(f"tokens {len(rows)}", tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens have dtype {tokens.dtype}, expected int64 ids; encode the text first")
        if not rows:
            raise ValueError("no row takes a token; put one into the pool first")
        low, high = (int(tokens), int(tokens)) if len(rows) == 1 else (int(tokens.min()), int(tokens.max()))
        if low < 0 or high >= self._vocabulary:
            raise ValueError(
                f"token ids from {low} to {high}, expected 0 to {self._vocabulary - 1}; "
                "was the text encoded with this model's tokenizer?"
            )
        if rows != self._active:
            self._check_alive(rows)

    def _check_alive(self, rows: Sequence[int]) -> None:
        alive = self.alive
        for row in rows:
            if row not in alive:
                raise ValueError(f"row {row} holds no text; alive are {alive or 'none'}, put(row, state) begins one")
        if len(set(rows)) != len(rows):
            raise ValueError(f"rows {list(rows)} name one twice; each takes one token in a step")

    # ---- who takes a token ----

    def _compose(self, active: tuple[int, ...]) -> None:
        """Make ``active`` the rows that take the next token."""
        self._stand_still()
        sizes = _sizes(len(active))
        recordings = self._recordings(sizes)
        if self._memory is not None and (recordings[0] is None or self._epoch != self.programs.epoch):
            self._withdraw()
        if recordings[0] is not None and self._memory is None:
            self._begin(recordings[0])
        if self._memory is not None:
            self._arrange(active, sum(sizes))
            self._seat()
        else:
            self._settle()
        self._active, first = active, 0
        for recording in recordings:
            if recording is not None:
                player = self._player(recording, first)
                self._running.append((player, first, min(first + recording.rows, len(active))))
                first += recording.rows
        exact = len(self._running) == 1 and self._running[0][0].recording.rows == len(active)
        self._whole = self._running[0][0] if exact else None
        self._put_to_work()

    def _recordings(self, sizes: list[int]) -> list[Recording | None]:
        while True:
            epoch = self.programs.epoch
            made = [self.programs.recording(self.model, size) for size in sizes]
            if epoch == self.programs.epoch:  # else one has dropped others
                return made

    def _begin(self, recording: Recording) -> None:
        self._memory, self._epoch = Memory(recording, len(self._row)), self.programs.epoch
        self._blocks = [(block.where[0], block.reason is None) for block in recording.blocks]
        self._owners = {index: b.block for index, b in enumerate(recording.blocks) if b.reason is not None}
        self._reset = bool(self._memory.growing)

    def _withdraw(self) -> None:
        """Take all rows out of the memory: programs have changed their form."""
        rows = list(self._slot)
        self._fresh |= {row: (self.take(row), 0) for row in rows}
        for row in rows:
            self._apart.pop(row, None)
        self._row, self._slot = [None] * len(self._row), {}
        self._memory, self._players = None, {}

    def _player(self, recording: Recording, first: int) -> Player:
        key = (recording.rows, first)
        if key not in self._players or self._players[key].recording is not recording:
            assert self._memory is not None
            self._players[key] = Player(recording, self._memory, first)
        return self._players[key]

    def _arrange(self, active: tuple[int, ...], size: int) -> None:
        """The active rows in the first slots, in their order, and nobody else in the first ``size``."""
        for slot, row in enumerate(active):
            self._move(row, slot)
        free = (slot for slot in range(size, len(self._row)) if self._row[slot] is None)
        for slot in range(len(active), size):
            if (parked := self._row[slot]) is not None:
                self._move(parked, next(free))

    def _move(self, row: int, slot: int) -> None:
        """Row ``row`` into ``slot``; who is there takes the place of the row."""
        before, there = self._slot.get(row), self._row[slot]
        if before == slot:
            return
        if before is None:
            before = next(index for index, other in enumerate(self._row) if other is None)
            if there is None:
                before = slot
        if before != slot:
            assert self._memory is not None
            self._memory.swap(before, slot)
            pair = [before, slot]
            self._position[pair] = self._position[pair[::-1]]
            self._row[before] = there
            if there is not None:
                self._slot[there] = before
        self._row[slot], self._slot[row] = row, slot

    def _seat(self) -> None:
        """Write the fresh states of rows that have a slot."""
        assert self._memory is not None
        for row in [row for row in self._fresh if row in self._slot]:
            state, index = self._fresh.pop(row)
            self._position[self._slot[row]] = state.position[index]
            blocks = [kept for layer in state.layers for kept in layer]
            for number, (kept, (_, native)) in enumerate(zip(blocks, self._blocks, strict=True)):
                if native:
                    self._memory.put(number, self._slot[row], kept, index)
                else:
                    self._apart.setdefault(row, {})[number] = states.gather(kept, index)

    def _settle(self) -> None:
        """The same where all of the model runs in Python."""
        for row, (state, index) in self._fresh.items():
            self._apart[row] = {WHOLE: states.gather(state, index)}
        self._fresh = {}
        self._owners = {WHOLE: self.model}

    def _make_room(self) -> int:
        """Room for some steps of the running programs; returns for how many."""
        assert self._memory is not None
        used = len(self._active)
        size = sum(player.recording.rows for player, _, _ in self._running)
        if self._reset:
            for slot in range(used, size):  # rows that are there for their number alone grow nothing
                for index, (empty, leaves) in enumerate(self._memory.blocks):
                    if leaves:
                        self._memory.put(index, slot, empty)
            return min(self._memory.make_room(0, size), 1 << 62 if size == used else LEAST - 1)
        return 1 << 62

    # ---- parts in Python ----

    def _put_to_work(self) -> None:
        """Workspaces of the parts in Python for the active rows, for each program its own."""
        for begin, end in [(begin, end) for _, begin, end in self._running] or [(0, len(self._active))]:
            rows = self._active[begin:end]
            self._works[begin] = {
                index: owner.workspace(_stacked([self._apart[row].pop(index) for row in rows]))
                for index, owner in self._owners.items()
            }
        if self._running and self._whole is None:
            self._logits = torch.cat([player.logits[: end - begin] for player, begin, end in self._running])

    def _count(self) -> None:
        """Count the steps that were taken, where the rows' positions are."""
        self._position[: len(self._active)] += self._taken
        self._taken = 0

    def _stand_still(self) -> None:
        """Split what the parts in Python hold into states of single rows."""
        self._count()
        for index in self._owners if self._works else ():
            whole = self._part(index, self._active)
            for place, row in enumerate(self._active):
                self._apart[row][index] = states.gather(whole, place)
        self._forget()

    def _part(self, index: int, rows: Sequence[int]) -> Any:
        """A copy of the state that a part in Python keeps of some rows."""
        found: dict[int, Any] = {}
        for begin, works in self._works.items():
            state = works[index].state()
            if tuple(rows) == self._active and len(self._works) == 1:
                return state
            size = states.batch_size(state) or MAX_ROWS
            found |= {row: states.gather(state, place) for place, row in enumerate(self._active[begin : begin + size])}
        return _stacked([found[row] if row in found else self._apart[row][index] for row in rows])


def _indices(rows: Sequence[int]) -> tuple[int, ...]:
    """Rows as integers; ``ValueError`` for what is none."""
    try:
        return tuple(map(operator.index, rows))
    except TypeError as error:
        raise ValueError(f"rows are {list(rows)}, expected the numbers of rows ({error})") from error


def _stacked(parts: list[Any]) -> Any:
    """One state of several; one alone as it is."""
    return parts[0] if len(parts) == 1 else states.stack(parts)


def _sizes(rows: int) -> list[int]:
    """The programs that serve so many rows, each for as many: at most three more than there are in all."""
    whole, rest = divmod(rows, MAX_ROWS)  # full programs first: two halves would take a fifth more for each row
    return [MAX_ROWS] * whole + ([rest if rest <= 8 else -(-rest // 4) * 4] if rest else [])
