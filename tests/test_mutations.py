"""Every field of every kind of file is altered: only a clear error or the identical result is accepted.

Files whose checksum was made to fit the alteration may give another model, but no crash, no hang, and no memory beyond
what the file and the model take. The work is done in processes of their own (``mutate.py``).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import everlong

SOURCE = str(Path(everlong.__file__).parent.parent)
COUNTS = {
    "config": 400,
    "options": 400,
    "weights": 150,
    "header": 300,
    "tokenizer": 150,
    "vocabulary": 250,
    "session": 300,
    "state": 250,
    "run": 250,
    "checkpoint": 150,
    "results": 400,
}
assert sum(COUNTS.values()) >= 2_000


def mutated(kind, folder, count):
    env = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("mutate.py")), kind, str(folder), str(count)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    tried = [line for line in run.stdout.splitlines() if line.startswith("TRY")]
    assert run.returncode == 0, f"ended with {run.returncode} at {tried[-1:]}: {run.stderr[-1500:]}"
    faults = run.stdout.split("FAULT ")[1:]
    assert not faults, f"{len(faults)} of {len(tried)}, first: {faults[0]}"
    assert len(tried) >= min(count, 100), run.stdout[-500:]


def test_a_few_of_them(tmp_path):
    mutated("session", tmp_path, 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_every_kind_of_file(tmp_path, kind):
    mutated(kind, tmp_path, COUNTS[kind])
