"""Files that are never half written: temporary name, fsync, rename; and what is read from them, bounded.

Whatever a file holds, reading it ends in its contents or in a ``ValueError`` that names the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONGEST = 2**28  # bytes of a JSON file
DEEPEST = 64  # lists and mappings inside one another


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well, and vanishes otherwise."""
    with atomic_together(path) as (temporary,):
        yield temporary


@contextmanager
def atomic_together(*paths: Path, removed: Sequence[Path] = ()) -> Iterator[tuple[Path, ...]]:
    """``atomic`` for files that belong together, and for some that go with the old ones: all change, or none.

    The last of ``paths`` names the others, by their checksums. Until it is replaced, what it named lies beside them
    (``versions``): who is killed at any moment leaves either the old files or the new ones to a reader who looks
    there. Two processes that write such files in one folder do so one after the other.
    """
    temporaries: list[Path] = []
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, fcntl.LOCK_EX) if len(paths) > 1 else contextlib.nullcontext(False) as alone:
            for path in paths:
                temporaries.append(_beside(path, _NEW))
            yield tuple(temporaries)
            for temporary in temporaries:
                _sync(temporary)
                os.chmod(temporary, 0o666 & ~_umask())
            earlier = [*paths[:-1], *removed]
            _exchange(temporaries, paths, earlier)
            _sync(folder)
            leftovers = [old for path in earlier for old in versions(path)[1:]]
            if alone:  # of processes that were killed: nobody else writes here now
                leftovers += [old for path in (*paths, *removed) for old in _marked(path, _NEW)]
            for old in leftovers:
                with contextlib.suppress(OSError):  # one that stays harms nobody
                    old.unlink()
    except OSError as error:
        raise OSError(
            error.errno, f"could not write {paths[0]}: {error.strerror}; the previous file, if any, is intact"
        ) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _exchange(temporaries: Sequence[Path], paths: Sequence[Path], earlier: Sequence[Path]) -> None:
    """Put ``earlier`` aside and the temporaries in their places; from the last one on the new files count."""
    aside: dict[Path, Path] = {}
    try:
        for path in earlier:
            if path.is_file():
                aside[path] = _put_aside(path)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    except BaseException:
        if temporaries[-1].exists():
            for path, old in aside.items():
                os.replace(old, path)
        raise


_NEW, _ASIDE = "new.", "before."


def _marked(path: Path, mark: str) -> list[Path]:
    """What ``_beside`` made for ``path`` with this mark."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.{mark}*"))


def _put_aside(path: Path) -> Path:
    """Where ``versions`` finds what was at ``path``."""
    old = _beside(path, _ASIDE)
    try:
        os.replace(path, old)
    except OSError:
        old.unlink()
        raise
    return old


def versions(path: Path) -> list[Path]:
    """``path``, and what a process that was killed while it wrote ``path`` had put aside."""
    return [path, *_marked(path, _ASIDE)]


@contextmanager
def locked(folder: Path, how: int = fcntl.LOCK_SH) -> Iterator[bool]:
    """Files of ``folder`` that belong together are not replaced meanwhile; False where the file system has no locks.

    With ``LOCK_EX``, no other process is in such a block either.
    """
    handle, held = None, False
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, how)
        held = True
    try:
        yield held
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):  # explicitly: a process forked meanwhile has the handle too
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def _beside(path: Path, mark: str) -> Path:
    """A new, empty file in the folder of ``path``, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.{mark}", dir=path.parent)
    os.close(handle)
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic(path) as temporary:
        save_tensors(temporary, tensors, meta)


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    """Write a safetensors file in place; ``OSError`` where the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=meta)
    except SafetensorError as error:  # the library wraps a full disk in its own class
        raise OSError(28 if "No space" in str(error) else 5, str(error)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; ``ValueError`` where the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError, KeyError, RuntimeError, OverflowError) as error:
        raise _damaged(path, error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file; ``ValueError`` where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is not a whole safetensors file ({str(error)[:200]}); it was truncated or altered, "
        "fetch or write it again"
    )


def read_json(path: Path) -> Any:
    """The contents of a JSON file; ``ValueError`` for what ``parse_json`` refuses, and for what is no readable file."""
    try:
        if not path.is_file():
            raise ValueError(f"cannot read {path}: there is no such file")
        size = path.stat().st_size
        if size > LONGEST:
            raise ValueError(f"{path} has {size:,} bytes, more than any file of this kind (at most {LONGEST:,})")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    return parse_json(data, str(path))


def parse_json(text: str | bytes, source: str) -> Any:
    """JSON, strictly. ``ValueError`` with ``source``: keys given twice, numbers that are not finite, deep nesting."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
        _check_depth(data)
    except RecursionError as error:
        raise ValueError(f"{source} is not valid JSON of ours (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON ({str(error)[:200]}); it was truncated or altered") from error
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return made


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:80]} is not a finite number")
    return number


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(DEEPEST):
        nested = [item for item in level if isinstance(item, (dict, list))]
        level = [inner for item in nested for inner in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    raise ValueError(f"nested more than {DEEPEST} deep")


def tensor_checksum(tensors: dict[str, Tensor], begin: int = 0) -> int:
    """CRC-32 of the names, dtypes, shapes and bytes of tensors, in the order of their names."""
    for name, value in sorted(tensors.items()):
        begin = zlib.crc32(f"{name} {value.dtype} {list(value.shape)};".encode(), begin)
        flat = value.detach().cpu().contiguous().reshape(-1)
        begin = zlib.crc32(flat.view(torch.uint8).numpy().data, begin)
    return begin


def json_checksum(data: Any) -> str:
    """CRC-32 of plain JSON data, whatever the order of its keys."""
    return f"{zlib.crc32(json.dumps(data, sort_keys=True).encode()):08x}"


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """The mapping with its own checksum as ``crc32``."""
    rest = {name: value for name, value in data.items() if name != "crc32"}
    return {**rest, "crc32": json_checksum(rest)}


def read_sealed(path: Path) -> dict[str, Any]:
    """What ``sealed`` described. ``ValueError`` where it was altered; an older file without a checksum is taken."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}, expected a mapping")
    found = data.pop("crc32", None)
    if found is not None and found != json_checksum(data):
        raise ValueError(f"{path} was altered since it was written (its checksum differs); restore it from a copy")
    return data
