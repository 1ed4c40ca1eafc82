"""What callers give, checked before anything is made of it: numbers within bounds, sequences of texts, token ids.

The fields of a dataclass are checked by their types (``check``): no bool for a number, no text, no NaN. What the
class says in ``bounds`` holds for its numbers, by name; the others are positive: sizes and rates.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

Bounds = Mapping[str, tuple[float, float]]

COUNT = (1, 2**31 - 1)  # whole numbers, unless ``bounds`` says otherwise
AMOUNT = (1e-12, 1e12)  # other numbers
EPS = (0.0, 1e12)  # what is added below a root or a fraction, by a name that ends so: published ones are 0, too
TOTAL = (1, 2**53)  # tokens of a run, parameters of a model
SEED = (0, 2**63 - 1)
SHARE = (0.0, 1.0)


def check(record: Any) -> None:
    """Check all fields of a dataclass. ``ValueError`` names the field, its value and what is expected.

    A list where a tuple belongs becomes one, and a number an int or float of Python. A number NAME_min must not
    be above NAME_max.
    """
    cls: Any = type(record)
    hints, bounds = _declared(cls)
    for name, hint in hints.items():
        object.__setattr__(record, name, _fitting(name, getattr(record, name), hint, bounds.get(name)))
    for name in hints:
        least, most = getattr(record, name), name.removesuffix("_min") + "_max"
        if name.endswith("_min") and most in hints and least > getattr(record, most):
            raise ValueError(f"{name} = {least} and {most} = {getattr(record, most)}, expected {name} <= {most}")


def path(text: str | Path) -> Path:
    """A path of the command line; ``OSError`` where it is empty (Typer would hide what a ``ValueError`` says)."""
    if not str(text).strip():
        raise OSError("the path is empty (a variable that is not set?); give one, . for the folder you are in")
    return Path(text)


@cache
def _declared(cls: Any) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """Types of the fields of a class, and the bounds that it and its parents say."""
    hints = typing.get_type_hints(cls)
    bounds: dict[str, tuple[float, float]] = {}
    for parent in reversed(cls.__mro__):
        bounds.update(vars(parent).get("bounds", {}))
    names = [field.name for field in dataclasses.fields(cls)]
    assert bounds.keys() <= set(names), f"{cls.__qualname__} has bounds of no field: {set(bounds) - set(names)}"
    bounds = {name: EPS for name in names if name.endswith("eps")} | bounds
    return {name: hints[name] for name in names}, bounds


def _fitting(name: str, value: Any, hint: Any, bounds: tuple[float, float] | None) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        given = [option for option in options if option is not type(None)]
        absent = value is None and len(given) < len(options)
        return value if absent or len(given) > 1 else _fitting(name, value, given[0], bounds)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name} must be a list, got {shown(value)}; give a single one as [{shown(value)}]")
        return tuple(_fitting(name, item, options[0], bounds) for item in value)
    if hint is int:
        return whole(name, value, *(bounds or COUNT))
    if hint is float:
        return number(name, value, *(bounds or AMOUNT))
    if origin is None and isinstance(hint, type) and not isinstance(value, hint):
        raise ValueError(f"{name} must be {_called(hint)}, got {shown(value)}")
    return value


def _called(kind: type) -> str:
    return {bool: "True or False", str: "text"}.get(kind, f"a {kind.__qualname__}")


def whole(name: str, value: Any, low: float = COUNT[0], high: float = COUNT[1]) -> int:
    """``value`` as an int from ``low`` to ``high``; else ``ValueError``."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or not low <= found <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")
    return found


def number(name: str, value: Any, low: float = AMOUNT[0], high: float = AMOUNT[1]) -> float:
    """``value`` as a float from ``low`` to ``high``; else ``ValueError``."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}")
    return float(value)


def shown(value: Any) -> str:
    """``repr``, cut to a piece of a line, since values from files may be of any size; long numbers by their size."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 80
    brief.maxlevel, brief.maxdict = 3, 4
    return brief.repr(value)


def folder(path: str | Path) -> Path:
    """The path of a folder that is there or can be made. ``ValueError`` where a file lies there, or on the way."""
    path = Path(path)
    found = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
    if found is not None and not found.is_dir():
        raise ValueError(f"{found} is a file, so it cannot be the folder of results; give another (--out)")
    return path


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Texts, or a single one, as a tuple. ``ValueError`` where one is empty or no text."""
    given = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    for item in given:
        if not isinstance(item, str) or not item:
            raise ValueError(f"{name} must be texts of at least one character, got {item!r}")
    return given


def ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids, or a single one, as a tuple. ``ValueError`` for text and for numbers that are no ids."""
    single = not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
    given = (value,) if single else value
    if isinstance(value, str):
        raise ValueError(f"{name} must be token ids, got the text {value!r}; encode it: tokenizer.encode(text)")
    return tuple(whole(name, token, 0) for token in given)
