"""Frozen configurations: plain data nested in the class it builds, to JSON and back without loss.

``kind`` names the class in JSON: ``"mamba"`` for ``everlong/mixers/mamba.py``, ``"swiglu"`` for a block of
``everlong/models/``, and ``"my_package.my_mixer"`` for a file of your own.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import Self

from .arguments import Bounds, check

BLOCKS = ("everlong.models.blocks", "everlong.models.channel_mix")


def suggest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'mamba'?"`` or a list of what exists, to close an error message with."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configurations. Subclasses add fields with plain JSON values or further configs."""

    owner: ClassVar[Any] = None  # the class this configures, set when that class is created
    bounds: ClassVar[Bounds] = {}  # of numbers that are not simply positive, by field (see ``arguments``)

    def __post_init__(self) -> None:
        check(self)

    @property
    def kind(self) -> str:
        """The name under which this configuration is found again."""
        return kind_of(self.owner) if self.owner else type(self).__qualname__

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """The configured object: ``owner(self, ...)``."""
        return self.owner(self, *args, **kwargs)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; an unknown field raises ``ValueError`` with a suggestion."""
        _refuse_unknown(type(self), changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, ``kind`` first."""
        fields = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kind": self.kind, **fields} if self.owner else fields

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The configuration that ``to_dict`` described. ``ValueError`` names an unknown key or kind."""
        if not isinstance(data, dict):
            raise ValueError(f"expected a configuration of {cls.__qualname__} as a mapping, got {data!r}")
        values = dict(data)
        kind = values.pop("kind", None)
        if kind is None and cls.owner is None and not dataclasses.fields(cls):
            raise ValueError(f"no kind in {data!r}; say which it is, as in {{'kind': 'mamba', ...}}")
        if kind is not None and (cls.owner is None or kind_of(cls.owner) != kind):
            found = find(kind).Config
            if not issubclass(found, cls):
                raise ValueError(f"kind {kind!r} is a {found.__qualname__}, expected a {cls.__qualname__}")
            return found.from_dict(data)
        _refuse_unknown(cls, values)
        hints = typing.get_type_hints(cls)
        try:
            return cls(**{name: _typed(value, hints[name], name) for name, value in values.items()})
        except TypeError as error:
            raise ValueError(f"{cls.__qualname__}: {error}") from error


def _refuse_unknown(cls: type[Config], values: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise ValueError(f"{cls.__qualname__} has no option {name!r}{suggest(name, known)}")


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _typed(value: Any, hint: Any, name: str) -> Any:
    """``value`` from JSON as ``hint`` asks: configs, tuples and numbers; ``ValueError`` where it does not fit."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, args, name)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(_typed(item, args[0], name) for item in value)
    if isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, Config) else hint.from_dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, bool, str) and type(value) is not hint:
        raise ValueError(f"{name} must be {hint.__name__}, got {value!r}")
    return value


def _one_of(value: Any, options: tuple[Any, ...], name: str) -> Any:
    if value is None and type(None) in options:
        return None
    if isinstance(value, dict):
        return Config.from_dict(value)
    given = [option for option in options if option is not type(None)]
    return _typed(value, given[0], name) if len(given) == 1 else value


def kind_of(owner: type) -> str:
    """The kind of a class: its file name in ``mixers/``, its own name in ``blocks``, else its dotted path."""
    module = owner.__module__
    if module.startswith("everlong.mixers."):
        return module.rpartition(".")[2]
    if module in BLOCKS:
        return owner.__qualname__.lower()
    return f"{module}:{owner.__qualname__}"


def mixer_names() -> list[str]:
    """The architectures in ``mixers/``: the file names are the registry."""
    folder = Path(__file__).parent / "mixers"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "base"))


def find(kind: str) -> Any:
    """The class of a kind; a dotted path is imported. ``ValueError`` with a suggestion where there is none."""
    if not isinstance(kind, str):
        raise ValueError(f"kind must be a name, got {kind!r}")
    module_name, _, class_name = kind.partition(":")
    if "." in module_name or class_name:
        return _find_in(_imported(module_name), class_name, kind)
    if kind in mixer_names():
        return _find_in(importlib.import_module(f"everlong.mixers.{kind}"), "", kind)
    blocks = {kind_of(block): block for name in BLOCKS for block in _modules_in(importlib.import_module(name))}
    if kind not in blocks:
        known = [*mixer_names(), *(name for name, block in blocks.items() if hasattr(block, "memory"))]
        raise ValueError(
            f"no mixer or block {kind!r}{suggest(kind, known)} (your own: a dotted path, my_package.my_mixer)"
        )
    return blocks[kind]


def _imported(name: str) -> types.ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{name!r} is no dotted path; expected one like my_package.my_mixer")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot import {name!r} ({error}); run from the folder that holds it, or put that on PYTHONPATH"
        ) from error


def _modules_in(module: types.ModuleType) -> list[type]:
    return [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and issubclass(cls, torch.nn.Module) and "Config" in vars(cls)
    ]


def _find_in(module: types.ModuleType, class_name: str, kind: str) -> Any:
    found = {cls.__name__: cls for cls in _modules_in(module)}
    if class_name:
        if class_name not in found:
            raise ValueError(f"{module.__name__} defines no {class_name!r}{suggest(class_name, found)}")
        return found[class_name]
    if len(found) != 1:
        raise ValueError(
            f"{kind} defines {len(found)} classes with a Config ({', '.join(found) or 'none'}), expected one; "
            f"name the one you mean as '{kind}:ClassName'"
        )
    return next(iter(found.values()))


def dumps(config: Config) -> str:
    """JSON text of a configuration."""
    return json.dumps(config.to_dict(), indent=1) + "\n"
