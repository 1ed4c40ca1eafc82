"""NaN and infinity stay in the document that they are in.

The fast forms reset a state by multiplying it with exp(-inf) = 0 and keep documents apart with zeros in a mask, but
zero times NaN is NaN. So the outputs are looked at, one sum per call, and where something is not finite (an input, a
state, or a sum that overflowed on the way), ``apart`` computes the broken documents by themselves, and the others
beside zeros instead of them: for those that is the same to the bit, in values and in gradients.

Nothing can be looked at in a graph that is being compiled or under ``torch.func``, and on a GPU the look would stall.
There the inputs are cleaned beforehand, whether it is needed or not (``without_looking``): from its first NaN on a
document is NaN. Sums that overflow on the way are not caught there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import state as states
from ..shapes import state_dtype
from .transforms import under_torch_func

Run = Callable[..., tuple[Tensor, Any]]


def isolated(run: Run, inputs: dict[str, Any], sequence: tuple[str, ...]) -> tuple[Tensor, Any]:
    """``run(**inputs)`` with ``starts``, where no document reaches another, whatever it holds.

    ``sequence`` names the inputs with a time axis (a vector among them has none).
    """
    names = tuple(name for name in sequence if inputs[name] is not None and inputs[name].dim() > 1)
    if not _may_look(inputs["starts"]):
        return without_looking(run, inputs, names)
    fence = Fence(inputs["starts"])
    inputs = fence.enter(_without_dead_states(inputs), names)
    y, final = run(**inputs)
    if not _finite(y):
        y, final = apart(run, inputs, names, _broken_rows(y))
    return fence.leave(y, final)


class Fence:
    """Around a call: a gradient that arrives not finite stays in its document on the way back, too.

    A document may break behind the op, where its own output was finite. It then sends no gradient through the op, and
    all that would come of it is NaN afterwards: gradients of its inputs, its state, and what all documents share.
    """

    def __init__(self, starts: Tensor) -> None:
        self.starts = starts
        self.noted: tuple[int, Tensor] | None = None  # a backward pass, and in it the documents [B T] to be NaN

    def enter(self, inputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        """The inputs, their gradients watched."""
        if not torch.is_grad_enabled():
            return inputs
        made = {
            name: self._watched(x, self._spoil if name in names else self._spoil_shared) for name, x in inputs.items()
        }
        if inputs["state"] is not None:
            made["state"] = states.map_leaves(lambda leaf: self._watched(leaf, self._spoil_state), inputs["state"])
        return made

    def leave(self, y: Tensor, final: Any) -> tuple[Tensor, Any]:
        """The outputs, what arrives at them watched."""
        if torch.is_grad_enabled():
            y, final = (
                self._watched(y, self._clean),
                states.map_leaves(lambda x: self._watched(x, self._clean_state), final),
            )
        return y, final

    @staticmethod
    def _watched(x: Any, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """x itself where it has no gradient, else a view of it, so that the hook sees what passes here alone."""
        if not isinstance(x, Tensor) or not x.requires_grad:
            return x
        view = x.view_as(x)
        view.register_hook(lambda grad: None if grad is None else hook(grad))  # None where it is not defined
        return view

    @property
    def _broken(self) -> Tensor | None:
        """The documents [B T] of which something that is not finite arrived in the backward pass at work."""
        now = torch._C._current_graph_task_id()
        return self.noted[1] if self.noted is not None and self.noted[0] == now else None

    def _note(self, documents: Tensor) -> None:
        known = self._broken
        self.noted = torch._C._current_graph_task_id(), documents if known is None else known | documents

    def _clean(self, grad: Tensor) -> Tensor | None:
        if _finite(grad):
            return None
        document = self.starts.long().cumsum(1)
        bad = (~torch.isfinite(grad)).reshape(*self.starts.shape, -1).any(2)
        count = torch.zeros_like(document[:, :1]).expand(-1, document.shape[1] + 1).scatter_add(1, document, bad.long())
        broken = count.gather(1, document) > 0
        self._note(broken)
        return _fill(grad, broken, 0.0)

    def _clean_state(self, grad: Tensor) -> Tensor | None:
        if _finite(grad):
            return None
        rows, document = ~torch.isfinite(grad).flatten(1).all(1), self.starts.long().cumsum(1)
        self._note((document == document[:, -1:]) & rows[:, None])
        return _fill(grad, rows, 0.0)

    def _spoil(self, grad: Tensor) -> Tensor | None:
        broken = self._broken
        return None if broken is None else _fill(grad, broken, float("nan"))

    def _spoil_state(self, grad: Tensor) -> Tensor | None:
        broken = self._broken
        return None if broken is None else _fill(grad, broken[:, 0] & ~self.starts[:, 0], float("nan"))

    def _spoil_shared(self, grad: Tensor) -> Tensor | None:
        return None if self._broken is None else torch.full_like(grad, float("nan"))


def _may_look(x: Tensor) -> bool:
    """Whether a branch may depend on values: not while compiling, under ``torch.func``, or where it would stall."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not under_torch_func()


def _finite(y: Tensor) -> bool:
    """Whether all of y is finite. Its sum says so at the speed of memory; all is looked at where the sum is not."""
    y = y.detach()
    total = y.sum(dtype=y.dtype if y.is_complex() else state_dtype(y))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(y).all())


def _broken_rows(y: Tensor) -> list[int]:
    """The rows of y [B ...] that hold something that is not finite."""
    broken = ~torch.isfinite(y.detach()).flatten(1).all(dim=1)
    return broken.nonzero()[:, 0].tolist()


def _without_dead_states(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, where a state that nobody reads is not finite with zeros in its place: gradients multiply by it."""
    state, left = inputs["state"], inputs["starts"][:, 0]
    if state is None or all(_finite(leaf) for _, leaf, _ in states.leaves(state) if _inexact(leaf)):
        return inputs
    return {**inputs, "state": _fill_state(state, left, 0.0)}


def apart(run: Run, inputs: dict[str, Any], names: tuple[str, ...], rows: list[int]) -> tuple[Tensor, Any]:
    """Documents of ``rows`` whose outputs are not finite are computed alone; all others together, beside zeros.

    Where finite documents together make something that is not (products between them overflow), all of a row are alone.
    """
    starts = inputs["starts"]
    alone = {place: _alone(run, inputs, names, *place) for row in rows for place in _documents(starts, row)}
    broken = torch.zeros_like(starts)
    for (row, begin, end), (piece, _) in alone.items():
        broken[row, begin:end] = not _finite(piece)
    y, final = run(**_without(inputs, names, broken))
    mixed = [row for row in _broken_rows(y) if not bool(broken[row].all())]
    if mixed:
        places = [place for row in mixed for place in _documents(starts, row)]
        alone |= {place: _alone(run, inputs, names, *place) for place in places if place not in alone}
        broken[mixed] = True
        y, final = run(**_without(inputs, names, broken))
    used = {place: made for place, made in alone.items() if broken[place[0], place[1]]}
    y = y.clone()
    for (row, begin, end), (piece, _) in used.items():
        y[row : row + 1, begin:end] = piece
    last = {row: after for (row, _, end), (_, after) in used.items() if end == starts.shape[1]}
    if last:
        final = states.stack([last[row] if row in last else states.gather(final, [row]) for row in range(len(y))])
    return y, final


def _documents(starts: Tensor, row: int) -> list[tuple[int, int, int]]:
    """(row, begin, end) of each document of a row; the first may have been under way."""
    begins = sorted({0, *starts[row].nonzero()[:, 0].tolist()})
    return [(row, begin, end) for begin, end in zip(begins, [*begins[1:], starts.shape[1]], strict=True)]


def _alone(
    run: Run, inputs: dict[str, Any], names: tuple[str, ...], row: int, begin: int, end: int
) -> tuple[Tensor, Any]:
    """One document by itself, from the state of its row where it was under way, else from an empty one."""
    state = inputs["state"]
    if state is not None:
        state = states.gather(state, [row]) if not inputs["starts"][row, begin] else _empty(state)
    own = {name: inputs[name][row : row + 1, begin:end] for name in names}
    return run(**{**inputs, **own, "state": state, "starts": None})


def _empty(state: Any) -> Any:
    """The state before the first token, for one row: zeros, and nothing where it grows."""
    made = [torch.zeros_like(leaf[:1, :0] if pad else leaf[:1]) for _, leaf, pad in states.leaves(state)]
    return states.rebuild(state, iter(made))


def _without(inputs: dict[str, Any], names: tuple[str, ...], broken: Tensor) -> dict[str, Any]:
    """The inputs with zeros for the ``broken`` tokens [B T], and in states that are theirs or nobody's."""
    cleaned = {name: _fill(inputs[name], broken, 0.0) for name in names}
    return {**inputs, **cleaned, "state": _fill_state(inputs["state"], broken[:, 0] | inputs["starts"][:, 0], 0.0)}


def _fill(x: Tensor, where: Tensor, value: float) -> Tensor:
    return x.masked_fill(where.reshape(*where.shape, *[1] * (x.dim() - where.dim())), value)


def _fill_state(state: Any, rows: Tensor, value: float) -> Any:
    """The state with ``value`` in all numbers of some ``rows`` [B]; counts stay."""
    if state is None:
        return None
    return states.map_leaves(lambda leaf: _fill(leaf, rows, value) if _inexact(leaf) else leaf, state)


def _inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def without_looking(run: Run, inputs: dict[str, Any], names: tuple[str, ...]) -> tuple[Tensor, Any]:
    """From the first one that is not finite to the end of their document, tokens are zeros for ``run``, then NaN."""
    starts, state = inputs["starts"], inputs["state"]
    broken = torch.stack([_not_finite(inputs[name], decay=name == "g").flatten(2).any(2) for name in names]).any(0)
    index = torch.arange(starts.shape[1], device=starts.device)
    first, latest = (torch.where(flags, index, -1).cummax(dim=1).values for flags in (starts, broken))
    sick = latest >= first.clamp_min(0)
    if state is not None:
        leaves = [leaf.flatten(1) for _, leaf, _ in states.leaves(state) if _inexact(leaf)]
        dead = torch.stack([_not_finite(leaf, decay=False).any(1) for leaf in leaves]).any(0)
        sick = sick | (dead[:, None] & (first < 0))
    y, final = run(**_without(inputs, names, sick))
    return _fill(y, sick, float("nan")), _fill_state(final, sick[:, -1], float("nan"))


def _not_finite(x: Tensor, *, decay: bool) -> Tensor:
    """Where x is NaN or infinite; a log decay may be -inf."""
    return ~torch.isfinite(x) & ~(x == float("-inf")) if decay else ~torch.isfinite(x)
