"""Frozen configurations: plain data nested in the class it builds, to JSON and back without loss.

``kind`` names the class in JSON (``kinds.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import typing
from typing import Any, ClassVar

from typing_extensions import Self

from .arguments import Bounds, check, shown
from .kinds import find, import_from, is_own, kind_of, mixer_names, names, reading, source, suggest, trusted

__all__ = [
    "Config",
    "dumps",
    "find",
    "import_from",
    "kind_of",
    "mixer_names",
    "names",
    "needs_trust",
    "reading",
    "suggest",
]

LARGEST = 2**63 - 1  # of the integers in a file
LONGEST = 4096  # characters of its texts


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
            with reading(source(), trust_code=True):
                return cls.from_dict(data)
        if not isinstance(data, dict):
            raise ValueError(f"expected a configuration of {cls.__qualname__} as a mapping, got {shown(data)}")
        values = dict(data)
        kind = values.pop("kind", None)
        if kind is None and cls.owner is None and not dataclasses.fields(cls):
            raise ValueError(f"no kind in {shown(data)}; say which it is, as in {{'kind': 'mamba', ...}}")
        if kind is not None and (cls.owner is None or kind_of(cls.owner) != kind):
            found = trusted(kind).Config
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
        except RecursionError:
            raise ValueError(f"{cls.__qualname__} is nested too deeply, one block inside another") from None


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


def needs_trust(config: Config) -> bool:
    """Whether a file with this configuration is read only with ``trust_code``."""
    level: list[Any] = [config]
    while level:
        if any(isinstance(item, Config) and item.owner is not None and is_own(item.kind) for item in level):
            return True
        inner = [list(vars(item).values()) if isinstance(item, Config) else item for item in level]
        level = [value for items in inner for value in items if isinstance(value, (Config, tuple, list))]
    return False


def dumps(config: Config) -> str:
    """JSON text of a configuration."""
    return json.dumps(config.to_dict(), indent=1) + "\n"
