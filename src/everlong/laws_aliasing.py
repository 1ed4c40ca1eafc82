"""The law of aliasing: a caller may use its buffers again. ``apart`` finds tensors that share memory, by writing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import state as states


@torch.no_grad()
def aliasing(subject: Any) -> None:
    """What a call is given and gives shares no memory: any of it may be overwritten without changing the rest."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module = subject.module(dtype)
        starts = torch.zeros(2, 9, dtype=torch.bool)
        starts[1, 4] = True
        for length, before in ((1, None), (2, None), (9, None), (1, 7), (9, 7)):
            state = None if before is None else module(subject.input(2, before, dtype))[1]
            for given in (None, starts) if length == 9 else (None,):
                x = subject.input(2, length, dtype)
                y, after = module(x, state, starts=given)
                apart({"x": x, "y": y, "starts": given}, {"given state": state or (), "new state": after})
        for state in (module.init_state(2), module(subject.input(2, 7, dtype))[1]):
            x = subject.input(2, 1, dtype)[:, 0].clone()
            y, after = module.step(x, state)
            apart({"x": x, "y": y}, {"given state": state, "new state": after})
            work = module.workspace(state)
            y = module.step_(x, work)
            apart({"x": x, "y": y}, {"given state": state, "the workspace's state": work.state()})
        apart({}, {"one init_state": module.init_state(2), "another": module.init_state(2)})


def apart(tensors: dict[str, Tensor | None], trees: dict[str, Any]) -> None:
    """Overwrite one tensor after the other: none of the others may change."""
    named = [(name, x) for name, x in tensors.items() if x is not None]
    for label, tree in trees.items():
        named += [(f"{name} of the {label}", leaf) for name, leaf, _ in states.leaves(tree) if leaf.numel()]
    values = [x.clone() for _, x in named]
    for index, (name, x) in enumerate(named):
        x.logical_not_() if x.dtype == torch.bool else x.add_(1)
        for other, (theirs, y) in enumerate(named):
            if other != index and not torch.equal(y, values[other]):
                raise AssertionError(f"{theirs} changes when {name} is overwritten: they share memory")
        x.copy_(values[index])
