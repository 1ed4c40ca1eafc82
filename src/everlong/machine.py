"""The machine that figures come from, and the versions that made them."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import __version__


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions, for reports."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "everlong": __version__,
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that this process may still take: of the machine, of its control group, of its own limit; None: unknown."""
    found = [limit for limit in (_host(), _group(), _own_limit()) if limit is not None]
    return max(0, min(found)) if found else None


def require_memory(needed: int, what: str, remedy: str) -> None:
    """``ValueError`` with both sizes where ``what`` needs more than is available."""
    free = available_memory()
    if free is not None and needed > free:
        raise ValueError(f"{what} needs {in_words(needed)}, and {in_words(free)} of memory are free; {remedy}")


def in_words(nbytes: int) -> str:
    """``"1.5 GB"``."""
    size = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:,.3g} TB" if size < 1000 else f"{size:,.0f} TB"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _host() -> int | None:
    """Memory and swap that Linux says are free; elsewhere all there is."""
    said = {line.partition(":")[0]: line.split() for line in _lines("/proc/meminfo")}
    if "MemAvailable" in said:
        return 1024 * sum(int(said[name][1]) for name in ("MemAvailable", "SwapFree") if name in said)
    total = _memory()
    return None if total is None else int(total * 2**30)


def _group() -> int | None:
    """What the control group of this process (a container's, say) and those above it leave."""
    places = [line.split(":", 2) for line in _lines("/proc/self/cgroup") if line.count(":") >= 2]
    left = []
    for _, kinds, name in places:
        if kinds not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", kinds)
        names = ("memory.max", "memory.current") if not kinds else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        inner = root / name.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder != root and root not in folder.parents:
                break
            limit, used = (_lines(str(folder / entry)) for entry in names)
            if limit and used and limit[0].isdigit() and int(limit[0]) < 2**60:
                stat = _lines(str(folder / "memory.stat"))  # what was read from files may be dropped
                cached = [int(line.split()[1]) for line in stat if line.startswith("inactive_file ")]
                left.append(int(limit[0]) - int(used[0]) + sum(cached))
    return min(left, default=None)


def _own_limit() -> int | None:
    """What ``ulimit -v`` leaves."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError):
        return None
    pages = _lines("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return limit - int(pages[0].split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "unknown"


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
