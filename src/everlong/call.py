"""What travels beside the tokens through the blocks of one call of a model, and what a block hands back of it.

Nothing is written into what another block holds: a block returns what it hands on, and the model gives that to the
blocks behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

EMBEDDINGS = "embeddings"  # the value that the model itself hands on: the embedded tokens

Way = Literal["forward", "step", "step_"]


class Call(NamedTuple):
    """One call: the method of the mixers that is meant, where documents begin, and the values handed on so far."""

    way: Way = "forward"
    starts: Tensor | None = None  # bool [B T], for "forward" alone
    values: Mapping[str, Tensor] = {}

    def after(self, handed: Handed) -> Call:
        """The call for the blocks behind one that has handed something on."""
        return self._replace(values={**self.values, **handed.values}) if handed.values else self


class Handed(NamedTuple):
    """What a block returns beside its output and state: values for the blocks behind it, and losses, by name."""

    values: Mapping[str, Tensor] = {}
    losses: Mapping[str, Tensor] = {}  # scalars, added to the loss in training

    def plus(self, other: Handed) -> Handed:
        """Both; of two values of one name the later one, of two losses the sum."""
        if other is NOTHING or self is NOTHING:
            return self if other is NOTHING else other
        losses = dict(self.losses)
        for name, loss in other.losses.items():
            losses[name] = losses[name] + loss if name in losses else loss
        return Handed({**self.values, **other.values}, losses)


NOTHING = Handed()


def ask(mixer: Any, x: Tensor, state: Any, call: Call) -> tuple[Tensor, Any, Handed]:
    """``mixer`` called in the way of ``call``: y, the state (or workspace) after it, and what it hands on."""
    given = {"values": call.values} if mixer.values else {}
    if call.way == "forward":
        made = mixer(x, state, starts=call.starts, **given)
    elif call.way == "step":
        made = mixer.step(x, state, **given)
    else:
        made = mixer.step_(x, state, **given)
        return (made[0], state, made[1]) if given else (made, state, NOTHING)
    return made if given else (*made, NOTHING)


def through(parts: Iterable[Any], x: Tensor, state: Any, call: Call) -> tuple[Tensor, tuple[Any, ...], Handed]:
    """Layers or blocks one after another: each gets what those before it have handed on.

    x, their states (or workspaces), and all that was handed on.
    """
    after, all_handed = [], NOTHING
    for part, kept in zip(parts, state, strict=True):
        x, kept, handed = part(x, kept, call)
        call, all_handed = call.after(handed), all_handed.plus(handed)
        after.append(kept)
    return x, tuple(after), all_handed
