"""What a recorded call may not do if its replay is to be right for every token, whatever rule there is for it.

A recording sees one token. A number that is read out of a value, memory that is changed behind the recording's back,
a random draw, an option that a rule does not know: each would bake that one token into the program. All raise
``Unsupported`` with the reason, and the block runs through its own ``step``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..record import Call

DRAWS = "draws random numbers"
PLAIN = "add sub mul div pow square neg abs exp expm1 log log1p sqrt rsqrt reciprocal sigmoid silu tanh relu sin cos"
IN_PLACE = {*PLAIN.split(), "clamp", "clamp_min", "clamp_max", "masked_fill", "addcmul", "copy"}
"""Operations that are right in place: one instruction that reads each number before it writes it."""
SHOWN = {"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking"}
"""Arguments whose effect the result itself shows; ``Lowering.new`` takes its dtype, device and strides, or refuses."""
BACKWARD = {"padding_idx", "scale_grad_by_freq", "sparse"}  # arguments that only a backward pass sees


class Unsupported(Exception):
    """This operation has no native form."""


def tensors(tree: Any) -> list[Tensor]:
    """All tensors among arguments or results."""
    if isinstance(tree, (tuple, list)):
        return [leaf for item in tree for leaf in tensors(item)]
    if isinstance(tree, dict):
        return tensors(list(tree.values()))
    return [tree] if isinstance(tree, Tensor) else []


def name(call: Call) -> str:
    """The call's operation, as reasons name it."""
    return str(call.op) if _schema(call) else getattr(call.op, "__name__", str(call.op))


def _schema(call: Call) -> Any:
    return getattr(call.op, "_schema", None)


def random(call: Call) -> None:
    """Random numbers would be drawn once, while recording, and then be the same for every token."""
    if torch.Tag.nondeterministic_seeded in getattr(call.op, "tags", ()):
        raise Unsupported(f"{name(call)} {DRAWS}")


def numbers_read(call: Call) -> None:
    """What Python does with a number depends on the token, and the recording does not see it."""
    schema = _schema(call)
    if schema is None:
        raise Unsupported(f"{name(call)} of a value that depends on the token")
    plain = any("Tensor" not in str(result.type) for result in schema.returns)
    if plain or {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(call.op.tags):
        raise Unsupported(f"{name(call)} reads a number that depends on the token")


def written(call: Call) -> list[Tensor]:
    """The tensors among the arguments that the call changes."""
    schema = _schema(call)
    if schema is None:  # x.data = y
        return tensors(call.args[:1]) if getattr(call.op, "__name__", "") == "__set__" else []
    if not schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in schema.arguments), call.args, strict=False)) | call.kwargs
    changed = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return tensors([given.get(argument) for argument in changed])


def is_view(call: Call) -> bool:
    """Is the result the same numbers, of the same kind, seen in another way?"""
    base = _schema(call).name.removeprefix("aten::")
    if not (call.op.is_view or base in ("_unsafe_view", "_reshape_alias")) or base == "as_strided":
        return False
    kinds = {x.dtype for x in tensors((call.args, call.out))}
    if len(kinds) > 1 and base not in ("view_as_real", "view_as_complex"):
        raise Unsupported(f"{name(call)} reads the bits of a value as another dtype")
    return True


def rule_name(call: Call) -> str:
    """The name under which ``Rules.aten`` holds the call's operation; in place, the same as out of place."""
    schema = _schema(call)
    if not schema.name.startswith("aten::"):
        raise Unsupported(name(call))
    base = str(schema.name).removeprefix("aten::")
    if not schema.is_mutable:
        return base
    target, others = call.args[0], tensors((call.args[1:], call.kwargs))
    if not isinstance(target, Tensor) or target.is_complex() or base[-1] != "_" or base[:-1] not in IN_PLACE:
        raise Unsupported(f"{name(call)} in place")
    shared = any(x.untyped_storage().data_ptr() == target.untyped_storage().data_ptr() for x in others)
    alike = all(x.shape == target.shape and x.stride() == target.stride() for x in others)
    if shared and not alike:
        raise Unsupported(f"{name(call)} in place")
    return base[:-1]


@functools.cache
def accepted(rule: Callable[..., None]) -> frozenset[str]:
    """The schema arguments that a rule honours: its parameters behind ``to, name, out``, where x is ``self``."""
    parameters = list(inspect.signature(rule).parameters)[3:]
    return frozenset("self" if parameter == "x" else parameter for parameter in parameters)


def options(call: Call, rule: Callable[..., None]) -> dict[str, Any]:
    """The call's arguments by name; ``Unsupported`` for one that the rule does not know and that is not at rest."""
    honoured, given = accepted(rule), {}
    for index, argument in enumerate(_schema(call).arguments):
        if index < len(call.args):
            value = call.args[index]
        elif argument.name in call.kwargs:
            value = call.kwargs[argument.name]
        else:
            continue
        if argument.name in honoured:
            given["x" if argument.name == "self" else argument.name] = value
        elif argument.name not in SHOWN | BACKWARD and not _at_rest(value, argument):
            raise Unsupported(f"{name(call)} with {argument.name}")
    return given


def _at_rest(value: Any, argument: Any) -> bool:
    return argument.has_default_value() and not isinstance(value, Tensor) and value == argument.default_value


def truths(instruction: str, out: Tensor, inputs: Sequence[Any], comparisons: set[str]) -> None:
    """A truth value is 0 or 1: arithmetic on it is another one in PyTorch, and so is logic on other numbers."""
    boolean = [x.dtype == torch.bool if isinstance(x, Tensor) else isinstance(x, bool) for x in inputs]
    if instruction in ("and", "or") and not all(boolean):
        raise Unsupported(f"{instruction} of numbers")
    moves = instruction in ("copy", "maximum", "minimum", "where") and all(boolean)
    if out.dtype == torch.bool and instruction not in comparisons and not moves:
        raise Unsupported(f"{instruction} that makes truth values")
