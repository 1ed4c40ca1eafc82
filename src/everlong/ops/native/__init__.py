"""C++ kernels for CPUs, built when the package is installed: AVX-512 (with bf16 and 8-bit dot products, or without),
AVX2 and portable, chosen at run time.

The libraries use the OpenMP runtime that PyTorch has already loaded, so that one process has one pool of threads.
``EVERLONG_NATIVE`` names a build ("avx512bf16", "avx512", "avx2", "portable"), or "off".
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import suggest
from ..record import recording
from ..transforms import when_transforming
from .signatures import table

BUILDS = ("avx512bf16", "avx512", "avx2", "portable")
FOLDER = Path(__file__).parent


def _load() -> tuple[ctypes.CDLL | str, str | None]:
    """The kernels for this machine, or the reason why there are none; and the name of the build."""
    wanted = os.environ.get("EVERLONG_NATIVE")
    if wanted == "off":
        return "switched off by EVERLONG_NATIVE=off", None
    build = next((build for build in supported() if _path(build).exists()), None)
    if wanted:
        build = _named(wanted)
    if build is None:
        missing = f"no kernels were built{_why(BUILDS[-1])}; install with a C++ compiler (g++ or clang++) present"
        warnings.warn(f"everlong runs on its PyTorch forms, which are slower: {missing}, or from a wheel", stacklevel=2)
        return missing, None
    _share_openmp()
    library = ctypes.CDLL(str(_path(build)))
    if stale(library):
        warnings.warn(
            f"the kernels ({_path(build).name}) were built from other sources than those beside them; "
            "build them again: make kernels, or pip install --editable .",
            stacklevel=2,
        )
    return library, build


def _path(build: str) -> Path:
    return FOLDER / f"_{build}.so"


def _why(build: str) -> str:
    """The reason that setup.py noted when this build failed."""
    try:
        return f" ({_path(build).with_suffix('.txt').read_text(encoding='utf-8').strip()})"
    except OSError:
        return ""


def _named(wanted: str) -> str:
    """The build that EVERLONG_NATIVE names; ``ValueError`` where there is none, or not for this machine."""
    runs = [build for build in supported() if _path(build).exists()]
    here = f"expected one of: {', '.join([*runs, 'off'])}"
    if wanted not in BUILDS:
        raise ValueError(f"EVERLONG_NATIVE={wanted} names no build; {here}{suggest(wanted, BUILDS)}")
    if wanted not in supported():
        raise ValueError(f"EVERLONG_NATIVE={wanted} needs instructions that this processor does not have; {here}")
    if wanted not in runs:
        raise ValueError(f"EVERLONG_NATIVE={wanted}: {_path(wanted).name} was not built{_why(wanted)}; {here}")
    return wanted


def stale(library: ctypes.CDLL) -> bool:
    """Whether ``library`` was built from other sources than those that lie beside it; no where there are none."""
    paths = sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])
    if not paths:
        return False
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    function = getattr(library, "ev_sources", None)
    if function is None:
        return True
    function.restype = ctypes.c_char_p
    return bool(function() != whole.hexdigest()[:16].encode())


def supported() -> list[str]:
    """The builds that this machine can run, fastest first."""
    best = {"AVX512": 1, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 3)
    if best == 1 and cpu_has("vnni") and cpu_has("avx512_bf16"):
        best = 0
    return list(BUILDS[best:])


def cpu_has(feature: str) -> bool:
    """Whether PyTorch finds this feature of the CPU: "vnni", "avx512_bf16", "amx_tile"; no where it cannot tell."""
    check = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return bool(check and check())


def _share_openmp() -> None:
    """Make the symbols of PyTorch's OpenMP runtime visible to the kernels, which link to none."""
    if sys.platform != "linux":
        return
    loaded = re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[-.\w]*\.so[.\d]*", Path("/proc/self/maps").read_text())
    ctypes.CDLL(loaded[0] if loaded else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


_LIBRARY, BUILD = _load()
MISSING = _LIBRARY if isinstance(_LIBRARY, str) else None  # why there are no kernels, or None


def refusal(tensors: dict[str, Any]) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if recording() is not None:
        return "a recording notes the operations of PyTorch, not what kernels do with them"
    if (reason := when_transforming()) is not None:
        return reason
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            continue
        if x.device.type != "cpu":
            return f"{name} is on {x.device.type}, the kernels are for the CPU"
        if x.is_floating_point() and x.dtype not in (torch.float32, torch.bfloat16):
            return f"{name} has dtype {str(x.dtype).removeprefix('torch.')}; the kernels take float32 and bfloat16"
        if x.is_complex():
            return f"{name} is complex"
    return MISSING


def last_axis_whole(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous (half of a projection, a piece of a text), else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: Tensor, group: int) -> tuple[Tensor, int, int]:
    """x, and how its rows (the last axis) lie in memory: so many behind one another, then a step to the next group.

    Where all lie behind one another, groups are of ``group``. What lies in no such way is copied.
    """
    inner, axis, length = 1, x.dim(), x.shape[-1]
    while axis and (x.stride(axis - 1) == inner or x.shape[axis - 1] == 1):
        axis, inner = axis - 1, inner * x.shape[axis - 1]
    if axis == 0:
        return x, group, group * length
    step = expected = x.stride(axis - 1)
    for size, stride in zip(reversed(x.shape[:axis]), reversed(x.stride()[:axis]), strict=True):
        if (size != 1 and stride != expected) or axis == x.dim():
            return x.contiguous(), group, group * length
        expected *= size
    return x, inner // length, step


def threads_for(work: int) -> int:
    """How many threads a pass over ``work`` numbers is worth: to wake one takes as long as 16 thousand of them."""
    return max(1, min(torch.get_num_threads(), work >> 14))


_FAILURES = {  # what an entry point returns, as in memory.h
    1: lambda name: MemoryError(f"{name} found no memory to work in; make the batch or the model smaller"),
    2: lambda name: ValueError(f"{name}: a position below 0, or a cache without slots"),
}


def call(name: str, *args: Tensor | float | None) -> None:
    """Call a kernel of ``signatures.py``: tensors as pointers, None as null, numbers as int64 or double.

    ``ValueError`` for a tensor that is not what the kernel expects there: its dtype, its device, how many numbers it
    holds and how they lie. ``MemoryError`` where the kernel found no memory to work in.
    """
    signature = table()[name]
    plain = signature.check(args)
    function = _function(name, _LIBRARY)
    if function.argtypes is None:
        function.argtypes, function.restype = signature.types, ctypes.c_int64
    status = function(*plain)
    if status:
        raise _FAILURES[status](name)


def count(name: str, *args: int) -> int:
    """Call an entry point that returns an int64 which depends on the arguments alone."""
    return _counted(_LIBRARY, name, *args)


@functools.lru_cache(4096)
def _counted(library: ctypes.CDLL | str, name: str, *args: int) -> int:
    function = _function(name, library)
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * len(args)
    return int(function(*args))


def kinds() -> dict[str, int]:
    """The kinds of instructions that the kernels have registered, by name."""
    return _kinds(_LIBRARY)


@functools.lru_cache(16)
def _kinds(library: ctypes.CDLL | str) -> dict[str, int]:
    name_of = _function("ev_program_kind", library)
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_int64]
    names = [name_of(code).decode() for code in range(int(_function("ev_program_kinds", library)()))]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise RuntimeError(f"two kinds of instructions are registered as {', '.join(twice)}; give each its own name")
    return {name: code for code, name in enumerate(names)}


def _function(name: str, library: ctypes.CDLL | str) -> Any:
    if isinstance(library, str):
        raise RuntimeError(f"{name} was called without kernels: {library}")
    return getattr(library, name)
