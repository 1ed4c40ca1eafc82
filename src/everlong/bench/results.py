"""The results of a bench, one JSON file, written whole after every stage.

``version`` 1; ``kind`` "ops" or "models"; ``created``; ``command``; ``complete``; ``machine`` and ``settings`` as
plain terms; ``limits``: ``read_gbs``, ``read_by``, ``copy_gbs``, ``matmul_fp32_gflops``, ``matmul_bf16_gflops``;
``skipped``: labels of stages for which no time was left; ``failed``: [{"label", "reason"}]; ``rows``; and ``lines``,
the project's goals that these figures decide (see ``claims.py``; empty unless ``--goals`` asks for them),
[{"claim", "asked", "measured", "holds"}].

A *spread* is {"min", "median", "max", "rounds"}; a ratio says how many times faster the row is than the other.
Every row has ``status``: "timed", "mismatch" (it does not match its reference, so there is no time), "refused" (this
form does not take these inputs), "unavailable" (this engine does not have it) or "skipped"; ``reason`` where it is not
"timed"; ``error``, the largest relative error against the reference.

ops rows: ``op``, ``variant``, ``case``, ``batch``, ``time``, ``dtype``, ``backend``, ``pass`` ("forward" or
"forward+backward"), and timed ``ms`` (spread), ``gflops``, ``gbs`` (at the median), ``against`` {backend: spread}.

models rows: ``measure``, ``model``, ``engine``, ``weights``, and timed
- prefill: ``length``, ``seconds`` to the first token, ``tokens_per_second``, ours ``ratios`` {engine: spread};
- decode: ``context``, ``tokens_per_second``, ``latency_ms`` {"p50", "p99", "p999", "units"}, ours ``gbs`` of weights
  read, ``share_of_read`` of the memory's limit in the same rounds, ``ratios``, ``in_python`` (blocks without a native
  step), and beyond the shortest context ``against_shortest`` {"context", "slowdown"};
- batch: ``batch``, ``tokens_per_second`` of all rows together, ``latency_ms``, ``in_python``, ``scaling`` against one;
- training: ``tokens_per_second``, ours ``ratios``, bf16 ``against_fp32``;
- memory: ``length``, ``peak_bytes`` of the process; loss: ``length``, ``taken_bytes``, ``logits_bytes``.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..files import atomic_write, read_sealed, sealed
from ..machine import machine

Results = dict[str, Any]
KINDS = ("ops", "models")
RESULTS, REPORT = "results.json", "report.html"


def begin(kind: str, command: str, settings: dict[str, Any]) -> Results:
    """Empty results of ``kind`` on this machine."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    about = {"version": 1, "kind": kind, "created": now, "command": command, "complete": False}
    measured: Results = {"limits": {}, "rows": [], "skipped": [], "failed": [], "lines": []}
    return {**about, "machine": machine(), "settings": settings, **measured}


def save(results: Results, folder: Path) -> None:
    """Write ``results.json`` in ``folder``, whole or not at all."""
    atomic_write(folder / RESULTS, json.dumps(sealed(results), indent=1) + "\n")


def load(folder: Path) -> Results:
    """The results in ``folder``. ``ValueError`` where there are none, or none of a bench."""
    path = folder / RESULTS
    try:
        results = read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as results of a bench ({error})") from error
    if type(results.get("version")) is not int or results["version"] != 1 or results.get("kind") not in KINDS:
        raise ValueError(f"{path} does not hold the results of a bench; give the folder that `everlong bench` wrote")
    return results
