"""Recording one run of PyTorch code, so that it can be replayed without Python (``generation/recording.py``).

``Recorder`` notes every PyTorch operation while it runs. A function marked with ``leaf`` is noted as one call, not by
what happens inside it: the steps of the recurrences and linear maps, which have instructions of their own.
What reads a tensor's memory without an operation (``numpy``, ``tolist``, ``data_ptr``) is noted too.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

F = TypeVar("F", bound=Callable[..., Any])
_LOCAL = threading.local()
READS = {"numpy", "tolist", "data_ptr", "untyped_storage", "storage", "_typed_storage", "__array__", "__dlpack__"}
READS |= {"__repr__", "__str__", "__format__"}
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}  # from lists that may hold tensors


class Call(NamedTuple):
    """One recorded call, with all of its arguments.

    ``op`` is an operation of PyTorch, a function marked with ``leaf`` (its arguments by name), or one of ``READS``.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


class _Reads(TorchFunctionMode):
    """Notes calls that reach the numbers of a tensor past PyTorch's operations, or put other numbers in their place."""

    def __init__(self, record: Recorder) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = func.__name__ in READS or (func in MAKERS and any(isinstance(x, (list, tuple)) for x in args))
        if not self.record.inside and (read or func == torch.Tensor.data.__set__):  # type: ignore[attr-defined]
            self.record.calls.append(Call(func, args, kwargs or {}, None))
        return out


class Recorder(TorchDispatchMode):
    """``with Recorder() as record: ...`` fills ``record.calls``; every tensor stays alive as long as the record."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and True imports the whole compiler: two seconds

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.inside = 0  # leaves under way
        self._reads = _Reads(self)

    def __enter__(self) -> Recorder:
        super().__enter__()
        self._reads.__enter__()
        _LOCAL.recorders = [*_recorders(), self]
        return self

    def __exit__(self, *error: Any) -> None:
        _LOCAL.recorders = _recorders()[:-1]
        self._reads.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            self.calls.append(Call(func, args, kwargs or {}, out))
        return out


def _recorders() -> list[Recorder]:
    return getattr(_LOCAL, "recorders", [])


def recording() -> Recorder | None:
    """The innermost recorder at work in this thread, or None."""
    return next(reversed(_recorders()), None)


def leaf(lower: Callable[..., None]) -> Callable[[F], F]:
    """Note calls of a function in a recording as one, not by what happens inside it; otherwise it runs as it is.

    ``lower(to, out, **arguments)`` appends the instructions of such a call to a program (``ops/native/lowering.py``).
    """

    def mark(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or recording() is None:
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return _noted(call, function, args, kwargs, dict(bound.arguments))

        call.lower = lower  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return mark


def _noted(call: Any, function: Any, args: Any, kwargs: Any, arguments: dict[str, Any]) -> Any:
    """Run ``function`` with all recorders at work looking away, and note the call."""
    recorders = [recorder for recorder in _recorders() if not recorder.inside]
    for recorder in recorders:
        recorder.inside += 1
    try:
        out = function(*args, **kwargs)
    finally:
        for recorder in recorders:
            recorder.inside -= 1
    for recorder in recorders:
        recorder.calls.append(Call(call, (), arguments, out))
    return out


def lowering(op: Any) -> Callable[..., None] | None:
    """How a recorded operation appends its own instructions; None where it is no ``leaf``."""
    return getattr(op, "lower", None) if isinstance(op, types.FunctionType) else None
