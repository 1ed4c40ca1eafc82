"""States are values: frozen dataclasses of tensors, registered as pytrees, batch on axis 0 of every leaf.

``@state`` declares one. ``gather``, ``stack``, ``detach``, ``nbytes``, ``save`` and ``load`` work on any state and on
tuples of states. A leaf whose length grows with the text is declared with ``growing("end")`` (new
entries are appended at the end; padded there when rows are stacked) or ``growing("start")`` (the
newest entry is always last, older ones are padded with zeros in front). A leaf of counts, which kernels take as places
in memory, is declared with ``counted``, and those of a file are held to it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from .files import atomic_save_tensors, parse_json, read_metadata, read_tensors, tensor_checksum

S = TypeVar("S")
LONGEST = 2**53  # tokens of a text: positions stay exact in fp64


def growing(pad: str) -> Any:
    """Declare a leaf that grows along axis 1: ``pad`` says where a shorter row is padded."""
    assert pad in ("start", "end"), pad
    return dataclasses.field(metadata={"pad": pad})


def counted(within: str | None = None) -> Any:
    """Declare a leaf of counts: from 0 to the length (axis 1) of the leaf ``within``, or of any text."""
    return dataclasses.field(metadata={"within": within, "counted": True})


def separate() -> Any:
    """Declare a tuple of states of their own, whose growing leaves may differ in length from each other's."""
    return dataclasses.field(metadata={"separate": True})


@dataclass_transform(frozen_default=True, field_specifiers=(growing, counted, separate))
def state(cls: type[S]) -> type[S]:
    """Make ``cls`` a frozen dataclass of tensors, a pytree, with an ``nbytes`` property.

    A mixer that keeps nothing between calls uses the empty tuple ``()`` as its state instead.
    """
    made = dataclasses.dataclass(frozen=True, eq=False)(cls)
    made.nbytes = property(nbytes)  # type: ignore[attr-defined]
    torch.export.register_dataclass(made)
    return made


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor, str | None]]:
    """Yield ``(path, tensor, pad)`` for every tensor of a state; ``pad`` is None for fixed sizes."""
    if isinstance(tree, Tensor):  # the state of most ops is one tensor
        yield path.rstrip("."), tree, None
    elif isinstance(tree, (tuple, list)):
        for index, item in enumerate(tree):
            yield from leaves(item, f"{path}{index}.")
    elif dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            for name, leaf, pad in leaves(getattr(tree, field.name), f"{path}{field.name}."):
                yield name, leaf, pad or field.metadata.get("pad")
    else:
        raise TypeError(f"a state holds tensors, dataclasses and tuples; got {type(tree).__name__} at {path!r}")


def rebuild(tree: S, values: Iterator[Tensor]) -> S:
    """A state shaped like ``tree`` whose leaves are taken from ``values`` in the order of ``leaves``."""
    if isinstance(tree, Tensor):
        return next(values)  # type: ignore[return-value]
    if isinstance(tree, (tuple, list)):
        return type(tree)(rebuild(item, values) for item in tree)  # type: ignore[call-arg]
    fields = dataclasses.fields(tree)  # type: ignore[arg-type]
    return type(tree)(**{field.name: rebuild(getattr(tree, field.name), values) for field in fields})


def nbytes(tree: Any) -> int:
    """Bytes held by all leaves of a state (all rows of the batch together)."""
    return sum(leaf.numel() * leaf.element_size() for _, leaf, _ in leaves(tree))


def nbytes_after(tree: Any, length: int) -> int:
    """Bytes of a state like ``tree`` after ``length`` tokens: a leaf that grows holds one entry for each of them."""
    found = 0
    for _, leaf, pad in leaves(tree):
        entries = leaf.numel() if pad is None else leaf.shape[0] * length * math.prod(leaf.shape[2:])
        found += entries * leaf.element_size()
    return found


def batch_size(tree: Any) -> int | None:
    """Rows of a state, or None for a state without tensors."""
    return next((leaf.shape[0] if leaf.dim() else 0 for _, leaf, _ in leaves(tree)), None)


def map_leaves(function: Any, tree: S) -> S:
    """Apply ``function`` to every tensor of a state."""
    return rebuild(tree, iter([function(leaf) for _, leaf, _ in leaves(tree)]))


def detach(tree: S) -> S:
    """The same values without the graph that made them: a call that begins with them sends no gradient further back.

    For training through pieces of a text (truncated backpropagation through time); memory is shared with ``tree``.
    """
    return map_leaves(Tensor.detach, tree)


def gather(tree: S, rows: Tensor | Sequence[int] | int) -> S:
    """Rows of a state, in the given order; repeated rows fork it, and a single one is a batch of one."""
    index = torch.atleast_1d(torch.as_tensor(rows, device=None if isinstance(rows, Tensor) else "cpu"))
    return map_leaves(lambda leaf: leaf[index.to(leaf.device)], tree)


def stack(trees: Sequence[S]) -> S:
    """One batched state from several; shorter histories are padded as their fields declare."""
    if not trees:
        raise ValueError("stack got no states; give it at least one")
    columns = zip(*(list(leaves(tree)) for tree in trees), strict=True)
    return rebuild(trees[0], iter([_cat(column) for column in columns]))


def _cat(column: Sequence[tuple[str, Tensor, str | None]]) -> Tensor:
    path, first, pad = column[0]
    parts = [leaf for _, leaf, _ in column]
    if pad is not None:
        length = max(part.shape[1] for part in parts)
        parts = [_padded(part, length, pad) for part in parts]
    for part in parts:
        if part.shape[1:] != first.shape[1:] and pad is None:
            raise ValueError(
                f"state leaf {path!r} has shapes {list(first.shape)} and {list(part.shape)}; "
                "only states of the same model can be stacked"
            )
    return torch.cat(parts)


def _padded(leaf: Tensor, length: int, pad: str) -> Tensor:
    missing = leaf.new_zeros(leaf.shape[0], length - leaf.shape[1], *leaf.shape[2:])
    return torch.cat([missing, leaf] if pad == "start" else [leaf, missing], dim=1)


def names(tree: Any) -> list[str]:
    """The paths of all leaves of a state, in order."""
    return [name for name, *_ in leaves(tree)]


def check_like(tree: Any, like: Any, rows: int, what: str = "state") -> None:
    """Raise ``ValueError`` unless ``tree`` has the leaves, sizes and dtypes of ``like``, and ``rows`` rows.

    ``like`` may have any number of rows (``init_state(0)`` takes no memory); lengths of growing leaves may differ.
    """
    ours, theirs = list(leaves(like)), list(leaves(tree))
    if type(tree) is not type(like) or names(like) != names(tree):
        differs = next((f", first at {a}" for a, b in zip_longest(names(like), names(tree)) if a != b), "")
        raise ValueError(
            f"{what} is of another model: got {_describe(tree)}, expected {_describe(like)}{differs}; "
            "make one with init_state(batch) of this model"
        )
    for (name, want, pad), (_, got, _) in zip(ours, theirs, strict=True):
        if got.dim() == want.dim() and got.shape[0] != rows:
            raise ValueError(
                f"{what} holds {got.shape[0]} rows, expected a batch of {rows}; "
                "use state.gather to pick rows or init_state(batch) to begin anew"
            )
        first = 2 if pad else 1
        if got.dim() != want.dim() or got.shape[first:] != want.shape[first:]:
            raise ValueError(
                f"{what} is of another model: {name} has shape {list(got.shape)}, expected {[rows, *want.shape[1:]]}"
            )
        if got.dtype != want.dtype:
            raise ValueError(
                f"{what} leaf {name} has dtype {got.dtype}, expected {want.dtype}; "
                "convert the model or make a new state with init_state(batch)"
            )


def check_values(tree: Any, what: str = "state", path: str = "") -> set[int]:
    """Raise ``ValueError`` for numbers that no call makes and a kernel would believe: a state may come from a file.

    Counts outside of their bounds, booleans that are neither, growing leaves of one state with different lengths.
    Returns the lengths of the growing leaves.
    """
    if isinstance(tree, Tensor):
        if tree.dtype == torch.bool and tree.numel() and int(tree.contiguous().view(torch.uint8).max()) > 1:
            raise ValueError(f"{what} leaf {path.rstrip('.')} holds booleans that are neither 0 nor 1; it was altered")
        return set()
    if isinstance(tree, (tuple, list)):
        return set().union(*(check_values(item, what, f"{path}{index}.") for index, item in enumerate(tree)))
    lengths: set[int] = set()
    for field in dataclasses.fields(tree):
        value, declared = getattr(tree, field.name), field.metadata
        inner = check_values(value, what, f"{path}{field.name}.")
        lengths |= set() if "separate" in declared else inner
        if "pad" in declared:
            lengths.add(value.shape[1])
        if "counted" in declared and value.numel():
            low, high = (int(bound) for bound in value.aminmax())
            most = LONGEST if declared["within"] is None else getattr(tree, declared["within"]).shape[1]
            if low < 0 or high > most:
                raise ValueError(
                    f"{what} leaf {path}{field.name} counts from {low} to {high}, expected 0 to {most}; no reading "
                    "makes that: the file was altered, begin anew"
                )
    if len(lengths) > 1:
        raise ValueError(
            f"{what} at {path or 'the top'} has histories of {sorted(lengths)} tokens, expected one length"
        )
    return lengths


def _describe(tree: Any) -> str:
    if isinstance(tree, (tuple, list)):
        return f"{len(tree)} layer states"
    return type(tree).__qualname__


def save(tree: Any, path: str | Path, meta: dict[str, str] | None = None) -> None:
    """Write a state to one safetensors file, atomically."""
    tensors = {name: leaf.detach().contiguous() for name, leaf, _ in leaves(tree)}
    said = json.dumps(meta or {})
    header = {"format": "everlong-state", "meta": said, "crc32": _seal(tensors, said)}
    atomic_save_tensors(Path(path), tensors, header)


def _seal(tensors: dict[str, Tensor], meta: str) -> str:
    return str(tensor_checksum(tensors, zlib.crc32(meta.encode())))


def load(path: str | Path, like: S) -> S:
    """Read a state saved by ``save`` to the device of ``like``, any state of the same model (``model.init_state(1)``).

    Raises ``ValueError`` where the file is damaged or belongs to another model.
    """
    tensors = read_tensors(Path(path))
    expected = names(like)
    header = read_metadata(Path(path))
    if "crc32" in header and header["crc32"] != _seal(tensors, header.get("meta", "")):
        raise ValueError(f"{path} was altered since it was written (its checksum differs); begin anew, or fetch a copy")
    if set(expected) != set(tensors):
        odd = sorted(set(expected) ^ set(tensors))[:3]
        raise ValueError(f"{path} holds the state of another model (differs at {', '.join(odd)})")
    loaded = rebuild(like, iter([tensors[name].to(leaf.device) for name, leaf, _ in leaves(like)]))
    rows = batch_size(loaded)
    if rows is not None:
        check_like(loaded, like, rows, f"state in {path}")
        check_values(loaded, f"state in {path}")
    return loaded


def read_meta(path: str | Path) -> dict[str, Any]:
    """What ``save`` was given as ``meta``; ``ValueError`` where the file holds no state."""
    header = read_metadata(Path(path))
    meta = parse_json(header.get("meta", "{}"), f"{path}: meta")
    if header.get("format") != "everlong-state" or not isinstance(meta, dict):
        raise ValueError(f"{path} holds no state of Everlong; give a file that state.save or a session wrote")
    return meta
