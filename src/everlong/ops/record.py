"""Recording one run of PyTorch code, so that it can be replayed without Python (``models/decode.py``).

``Recorder`` notes every PyTorch operation while it runs. A function marked with ``leaf`` is noted as one call under its
own name, not by what happens inside it: the steps of the recurrences and linear maps, which have kernels of their own.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

F = TypeVar("F", bound=Callable[..., Any])
_LOCAL = threading.local()


class Call(NamedTuple):
    """One recorded call: an operation of PyTorch, or the name of a ``leaf``, with all of its arguments by name."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


class Recorder(TorchDispatchMode):
    """``with Recorder() as record: ...`` fills ``record.calls``; every tensor stays alive as long as the record."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and True imports the whole compiler: two seconds

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.inside = 0  # leaves under way

    def __enter__(self) -> Recorder:
        _LOCAL.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _LOCAL.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            self.calls.append(Call(func, args, kwargs or {}, out))
        return out


def recording() -> Recorder | None:
    """The recorder at work in this thread, or None."""
    return getattr(_LOCAL, "recorder", None)


def leaf(function: F) -> F:
    """Note calls of ``function`` in a recording as one; otherwise it runs as it is."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder = None if torch.compiler.is_compiling() else recording()
        if recorder is None or recorder.inside:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        recorder.inside += 1
        try:
            out = function(*args, **kwargs)
        finally:
            recorder.inside -= 1
        recorder.calls.append(Call(function.__name__, (), dict(bound.arguments), out))
        return out

    return call  # type: ignore[return-value]
