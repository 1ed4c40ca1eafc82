"""A decoder: a pool whose rows all take each token, for a state that it alone owns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..models.lm import LanguageModel
from .pool import Pool
from .programs import Cost


class Decoder:
    """``decoder.step(tokens [B]) -> logits [B vocab]``, for a state that the decoder alone owns.

    ``load`` takes a state, ``state`` gives a copy of it. Logits are a view that the next step overwrites, in fp32
    where the program runs natively. ``explain()`` says which blocks run in Python, ``cost`` what was spent on recording
    for it. Parameters are taken as they are when it is made: make a new one after training.
    ``ValueError`` for ids outside the vocabulary, states of another model.
    """

    def __init__(self, model: LanguageModel, batch: int = 1) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1 row, got {batch}")
        self.model, self.batch, self._pool = model, batch, Pool(model, batch)
        self._rows = tuple(range(batch))
        before = self._pool.programs.cost
        self._pool.load(self._rows, model.init_state(batch))
        self._pool.prepare(self._rows)
        self.cost = Cost(*(b - a for a, b in zip(before, self._pool.programs.cost, strict=True)))

    def explain(self) -> list[tuple[str, str]]:
        """The blocks that run in Python, with the reason; empty where the whole step is native.

        Where all of the model does, that line comes first.
        """
        return self._pool.explain()

    def load(self, state: Any) -> None:
        """Take a copy of ``state`` [B rows] as the state to go on from."""
        self._pool.load(self._rows, state)

    def state(self) -> Any:
        """A copy of the state after all tokens so far, as ``model.step`` would return it."""
        return self._pool.take(self._rows)

    def step(self, tokens: Tensor) -> Tensor:
        """One token per row: ids [B] -> logits [B vocab]; the state moves on."""
        return self._pool.step(tokens, self._rows)
