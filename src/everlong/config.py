"""Frozen configurations: plain data nested in the class it builds, to JSON and back without loss.

``kind`` names the class in JSON: ``"mamba"`` for ``everlong/mixers/mamba.py``, ``"swiglu"`` for a block of
``everlong/models/``, and ``"my_package.my_mixer"`` for a file of your own.

Files are data: a kind that a file names outside of Everlong is refused, unless the caller says ``trust_code=True`` or
has named that very module to ``find`` (as ``--mixer`` does). Whether it is imported already makes no difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from typing_extensions import Self

from .arguments import Bounds, check, shown

BLOCKS = ("everlong.models.blocks", "everlong.models.channel_mix")
OURS = ("everlong.mixers.", "everlong.models.", "everlong.tasks.")  # where a file may find a class by its dotted path
LARGEST = 2**63 - 1  # of the integers in a file
LONGEST = 4096  # characters of its texts

_named: set[str] = set()  # modules that the user named to ``find``
_folders: list[str] = []  # looked in while a module of the user's own is imported


class _Reading(NamedTuple):
    trust_code: bool
    source: str


_ELSE = _Reading(False, "")  # outside of ``reading``
_reading: ContextVar[_Reading] = ContextVar("reading", default=_ELSE)


@contextlib.contextmanager
def reading(source: str | Path, *, trust_code: bool = False) -> Iterator[None]:
    """What is read inside comes from the file ``source``, which errors name; ``trust_code`` lets its kinds run code."""
    token = _reading.set(_Reading(trust_code, str(source)))
    try:
        yield
    finally:
        _reading.reset(token)


def import_from(folder: str) -> None:
    """Look for dotted paths in ``folder`` too ("" is the current one): behind all else, only while one is imported."""
    if folder not in _folders:
        _folders.append(folder)


def suggest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'mamba'?"`` or a list of what exists, to close an error message with."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name)[:100], names, n=1)
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
    def from_dict(cls, data: dict[str, Any], *, trust_code: bool = False) -> Self:
        """The configuration that ``to_dict`` described. ``ValueError`` names an unknown key or kind.

        A kind outside of Everlong is imported only with ``trust_code``, or where ``find`` was given its module before.
        """
        if trust_code:
            with reading(_reading.get().source, trust_code=True):
                return cls.from_dict(data)
        if not isinstance(data, dict):
            raise ValueError(f"expected a configuration of {cls.__qualname__} as a mapping, got {shown(data)}")
        values = dict(data)
        kind = values.pop("kind", None)
        if kind is None and cls.owner is None and not dataclasses.fields(cls):
            raise ValueError(f"no kind in {shown(data)}; say which it is, as in {{'kind': 'mamba', ...}}")
        if kind is not None and (cls.owner is None or kind_of(cls.owner) != kind):
            found = _trusted(kind).Config
            if not (isinstance(found, type) and issubclass(found, cls)):
                raise ValueError(f"kind {shown(kind)} is no {cls.__qualname__}, which is expected here")
            if found is not cls:
                return found.from_dict(values)
        _refuse_unknown(cls, values)
        hints = typing.get_type_hints(cls)
        try:
            return cls(**{name: _typed(value, hints[name], name) for name, value in values.items()})
        except (TypeError, ArithmeticError, AttributeError) as error:
            raise ValueError(f"{cls.__qualname__}: {error}") from error


def _refuse_unknown(cls: type[Config], values: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise ValueError(f"{cls.__qualname__} has no option {shown(name)}{suggest(name, known)}")


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
            raise ValueError(f"{name} must be a list, got {shown(value)}")
        return tuple(_typed(item, args[0], name) for item in value)
    if isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, Config) else hint.from_dict(value)
    if type(value) is int and hint in (int, float):
        if abs(value) > LARGEST:
            raise ValueError(f"{name} is {shown(value)}, more than any size can be (at most {LARGEST})")
        return hint(value)
    if hint in (int, float, bool, str) and type(value) is not hint:
        raise ValueError(f"{name} must be {hint.__name__}, got {shown(value)}")
    if isinstance(value, str) and len(value) > LONGEST:
        raise ValueError(f"{name} is a text of {len(value):,} characters, longer than any name or path: {shown(value)}")
    return value


def _one_of(value: Any, options: tuple[Any, ...], name: str) -> Any:
    """``value`` as the first of several types that it fits."""
    if value is None and type(None) in options:
        return None
    given = [option for option in options if option is not type(None)]
    for option in given[:-1]:
        with contextlib.suppress(ValueError):
            return _typed(value, option, name)
    return _typed(value, given[-1], name)


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
    """The class of a kind. ``ValueError`` with a suggestion where there is none.

    A dotted path is imported; naming it here is consent, so that files may name that module from now on.
    """
    found = _class_of(kind)
    _named.add(kind.partition(":")[0])
    return found


def _trusted(kind: Any) -> Any:
    """``find`` for a kind that a file names: code that is not Everlong's is imported only with consent."""
    if isinstance(kind, str) and _is_own(kind):
        module = kind.partition(":")[0]
        trust_code, source = _reading.get()
        if not (trust_code or module in _named):
            raise ValueError(
                f"{source + ': ' if source else ''}kind {shown(kind)} is code of the module {shown(module)}, which is "
                "not part of Everlong; it was not imported. Where you trust that code, say so: trust_code=True, "
                "or --trust-code on the command line"
            )
    return _class_of(kind)


def _is_own(kind: str) -> bool:
    """Whether a kind is code of the user's own."""
    module, colon, _ = kind.partition(":")
    dotted = ("." in module or colon) and all(part.isidentifier() for part in module.split("."))
    return bool(dotted) and not module.startswith(OURS)


def needs_trust(config: Config) -> bool:
    """Whether a file with this configuration is read only with ``trust_code``."""
    level: list[Any] = [config]
    while level:
        if any(isinstance(item, Config) and item.owner is not None and _is_own(item.kind) for item in level):
            return True
        inner = [list(vars(item).values()) if isinstance(item, Config) else item for item in level]
        level = [value for items in inner for value in items if isinstance(value, (Config, tuple, list))]
    return False


def _class_of(kind: Any) -> Any:
    if not isinstance(kind, str):
        raise ValueError(f"kind must be a name, got {shown(kind)}")
    module_name, _, class_name = kind.partition(":")
    if module_name.endswith(".py"):
        path = module_name[:-3].strip("/").replace("/", ".")
        raise ValueError(f"{shown(kind)} is a file, expected a dotted path: {path}:ClassName, from the folder it is in")
    if "." in module_name or class_name:
        return _find_in(_imported(module_name), class_name, kind)
    if kind in mixer_names():
        return _find_in(importlib.import_module(f"everlong.mixers.{kind}"), "", kind)
    blocks = {kind_of(block): block for name in BLOCKS for block in _modules_in(importlib.import_module(name))}
    if kind not in blocks:
        known = [*mixer_names(), *(name for name, block in blocks.items() if hasattr(block, "memory"))]
        raise ValueError(
            f"no mixer or block {shown(kind)}{suggest(kind, known)} "
            "(your own: a dotted path, my_package.my_mixer; a single file, my_mixer:ClassName)"
        )
    return blocks[kind]


def _imported(name: str) -> types.ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{shown(name)} is no dotted path; expected one like my_package.my_mixer")
    folders = list(_folders)
    sys.path.extend(folders)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot import {shown(name)} ({error}); run from the folder that holds it, or put that on PYTHONPATH"
        ) from error
    finally:
        for folder in folders:
            if folder in sys.path:
                del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]  # the one at the end


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
