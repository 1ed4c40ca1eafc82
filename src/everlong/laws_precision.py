"""The laws of bf16: as the dtype of a model, and as that of autocast."""

from __future__ import annotations

from typing import Any

import torch

from . import state as states
from .numerics import assert_close


def bfloat16(subject: Any) -> None:
    """In bf16 the output stays within the tolerance table of the fp64 one."""
    exact, module = subject.module(), subject.module(torch.bfloat16)
    exact.load_state_dict(module.state_dict())  # the same weights, rounded to bf16
    x = subject.input(2, 63, torch.bfloat16)
    with torch.no_grad():
        got, _ = module(x)
        if got.dtype != torch.bfloat16:
            raise AssertionError(f"bf16 in gave {got.dtype} out")
        want = exact(x.double())[0].to(torch.bfloat16)
        assert_close(got, want, "bf16 output")
        assert_close(module.step(x[:, -1], module(x[:, :-1])[1])[0], want[:, -1], "bf16 output of a step")


@torch.no_grad()
def autocast(subject: Any) -> None:
    """Under autocast to bf16 the output stays within the tolerance table, and the state keeps its dtypes."""
    exact, module = subject.module(), subject.module(torch.float32)
    exact.load_state_dict(module.state_dict())
    x = subject.input(2, 63, torch.float32)
    want = exact(x.double())[0].to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, after = module(x)
        last, stepped = module.step(x[:, -1], module(x[:, :-1])[1])
    assert_close(got.to(torch.bfloat16), want, "output under autocast")
    assert_close(last.to(torch.bfloat16), want[:, -1], "output of a step under autocast")
    for state in (after, stepped):
        for (name, ours, _), (_, usual, _) in zip(
            states.leaves(state), states.leaves(module.init_state(2)), strict=True
        ):
            if ours.dtype != usual.dtype:
                raise AssertionError(f"state leaf {name} is {ours.dtype} under autocast, expected {usual.dtype}")
