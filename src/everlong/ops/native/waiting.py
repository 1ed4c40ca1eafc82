"""How threads wait for one another where other processes want the same cores.

In PyTorch's OpenMP runtime on Linux (libgomp) a thread that waits at a barrier spins for milliseconds. On a quiet
machine nothing is faster. On a busy one it keeps the core from the very thread that it waits for, and training falls
to a fourteenth of its speed or less (LOG.md). libgomp spins only for an instant, then sleeps, once it manages more
threads than there are cores. So while this process has to queue for its cores, a team of threads that do nothing is
kept, asleep: waiting becomes sleeping, and no result changes. On a quiet machine there is no such team.

``look()`` is called by models, training and decoding; it reads how long this thread stood in the queue (Linux:
``/proc/thread-self/schedstat``) ten times a second. ``EVERLONG_WAIT=spin`` switches it off.
"""

from __future__ import annotations

import atexit
import os
import threading
import time

from ...machine import usable_cores
from . import MISSING, call

PERIOD = 0.1  # seconds between two looks of a thread
CROWDED = 0.1  # the share of them spent in the queue above which the cores are crowded
CALM = 2.0  # seconds without such a look until they are not any more
QUEUE = "/proc/thread-self/schedstat"  # nanoseconds: on a core, in the queue for one; and how often


class _Seen(threading.local):
    """What a thread read at its last look."""

    due = 0.0
    at = 0.0
    queued: float | None = None


class _Team:
    """A thread with an idle team of OpenMP's, while it is wanted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.until = 0.0  # when it goes, unless the cores are crowded still
        self.leave: threading.Event | None = None
        self.thread: threading.Thread | None = None

    def come(self) -> None:
        ready, leave = threading.Event(), threading.Event()

        def idle() -> None:
            try:
                call("ev_waiting_team", usable_cores() + 1)
            finally:
                ready.set()
            leave.wait()

        thread = threading.Thread(target=idle, name="everlong-waiting", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the process may have no more threads: it goes on without a team
            self.until = 0.0
            return
        self.leave, self.thread = leave, thread
        ready.wait()

    def go(self) -> None:
        if self.leave is not None and self.thread is not None:
            self.leave.set()
            self.thread.join()
        self.leave = self.thread = None


_SEEN, _TEAM = _Seen(), _Team()
if os.environ.get("EVERLONG_WAIT", "adaptive") not in ("adaptive", "spin"):
    raise ValueError(f"EVERLONG_WAIT={os.environ['EVERLONG_WAIT']} is no way to wait; expected adaptive or spin")
_OFF = MISSING is not None or os.environ.get("EVERLONG_WAIT") == "spin" or not os.path.exists(QUEUE)


def look() -> bool:
    """Whether the cores are crowded; looks anew after each ``PERIOD``. A team comes or goes by what is seen."""
    if _OFF:
        return False
    now = time.monotonic()
    if now >= _SEEN.due:
        crowded = _queued(now) > CROWDED
        with _TEAM.lock:
            if crowded:
                _TEAM.until = now + CALM
                if _TEAM.leave is None:
                    _TEAM.come()
            elif _TEAM.leave is not None and now > _TEAM.until:
                _TEAM.go()
    return _TEAM.leave is not None


def _queued(now: float) -> float:
    """The share of the time since this thread's last look that it stood in the queue; 0 at the first."""
    try:
        with open(QUEUE, "rb") as file:
            queued = int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):  # no file descriptor is free, say: nothing is known this time
        _SEEN.due, _SEEN.queued = now + PERIOD, None
        return 0.0
    since, before = now - _SEEN.at, _SEEN.queued
    _SEEN.at, _SEEN.queued, _SEEN.due = now, queued, now + PERIOD
    return 0.0 if before is None else (queued - before) / since


def _forked() -> None:
    """In a child process there is no team, and nothing was seen."""
    global _SEEN, _TEAM
    _SEEN, _TEAM = _Seen(), _Team()


os.register_at_fork(after_in_child=_forked)
atexit.register(_TEAM.go)
