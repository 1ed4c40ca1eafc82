"""What a name means: ``mixers/``, ``feedforward/`` and ``blocks/`` by file name, code of the user's own by dotted path.

``kind`` is how JSON names a class: ``"mamba"`` for ``everlong/mixers/mamba.py``, ``"swiglu"`` for
``everlong/feedforward/swiglu.py``, and ``"my_package.my_mixer"`` for a file of your own. Nothing is registered: a file
in one of the rooms is there by its name.

Files are data: a kind that a file names outside of Everlong is refused, unless the caller says ``trust_code=True`` or
has named that very module to ``find`` (as ``--mixer`` does). Whether it is imported already makes no difference.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .arguments import shown

ROOMS = ("mixers", "feedforward", "blocks")  # folders whose files are kinds
OURS = (
    "everlong.mixers.",
    "everlong.feedforward.",
    "everlong.blocks.",
    "everlong.models.",
    "everlong.tasks.",
)  # where a file may find a class
NO_KINDS = ("__init__", "base")

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


def source() -> str:
    """The file that is being read, or ""."""
    return _reading.get().source


def import_from(folder: str) -> None:
    """Look for dotted paths in ``folder`` too ("" is the current one): behind all else, only while one is imported."""
    if folder not in _folders:
        _folders.append(folder)


def suggest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'mamba'?"`` or a list of what exists, to close an error message with."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name)[:100], names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def kind_of(owner: type) -> str:
    """The kind of a class: what it says itself as ``KIND``, its file name in one of the rooms, else its dotted path."""
    module = owner.__module__
    if "KIND" in vars(owner):
        return str(owner.__dict__["KIND"])
    package, _, name = module.rpartition(".")
    if package.removeprefix("everlong.") in ROOMS and name not in NO_KINDS:
        return name
    return f"{module}:{owner.__qualname__}"


def names(room: str) -> list[str]:
    """The kinds in ``mixers``, ``feedforward`` or ``blocks``: the file names are the registry."""
    return sorted(path.stem for path in (Path(__file__).parent / room).glob("*.py") if path.stem not in NO_KINDS)


def mixer_names() -> list[str]:
    """The architectures in ``mixers/``."""
    return names("mixers")


def find(kind: str) -> Any:
    """The class of a kind. ``ValueError`` with a suggestion where there is none.

    A dotted path is imported; naming it here is consent, so that files may name that module from now on.
    """
    found = _class_of(kind)
    _named.add(kind.partition(":")[0])
    return found


def trusted(kind: Any) -> Any:
    """``find`` for a kind that a file names: code that is not Everlong's is imported only with consent."""
    if isinstance(kind, str) and is_own(kind):
        module = kind.partition(":")[0]
        trust_code, source = _reading.get()
        if not (trust_code or module in _named):
            raise ValueError(
                f"{source + ': ' if source else ''}kind {shown(kind)} is code of the module {shown(module)}, which is "
                "not part of Everlong; it was not imported. Where you trust that code, say so: trust_code=True, "
                "or --trust-code on the command line"
            )
    return _class_of(kind)


def is_own(kind: str) -> bool:
    """Whether a kind is code of the user's own."""
    module, colon, _ = kind.partition(":")
    dotted = ("." in module or colon) and all(part.isidentifier() for part in module.split("."))
    return bool(dotted) and not module.startswith(OURS)


def _class_of(kind: Any) -> Any:
    if not isinstance(kind, str):
        raise ValueError(f"kind must be a name, got {shown(kind)}")
    module_name, _, class_name = kind.partition(":")
    if module_name.endswith(".py"):
        path = module_name[:-3].strip("/").replace("/", ".")
        raise ValueError(f"{shown(kind)} is a file, expected a dotted path: {path}:ClassName, from the folder it is in")
    if "." in module_name or class_name:
        return _find_in(_imported(module_name), class_name, kind)
    for room in ROOMS:
        if kind in names(room):
            return _find_in(importlib.import_module(f"everlong.{room}.{kind}"), "", kind)
    raise ValueError(
        f"no mixer or block {shown(kind)}{suggest(kind, [name for room in ROOMS for name in names(room)])} "
        "(your own: a dotted path, my_package.my_mixer; a single file, my_mixer:ClassName)"
    )


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
