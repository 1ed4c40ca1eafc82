"""Every python block of the README and of docs/ runs, in order, one namespace per page."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from everlong import state as states
from everlong.numerics import assert_close
from everlong.ops import native

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python(?: file=(\S+))?\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.float32("a reader has PyTorch's own default")
def test_blocks_run(page, tmp_path, monkeypatch):
    assert run(page, tmp_path, monkeypatch) or page.name == "index.md", f"{page.name} shows no code"


def run(page, tmp_path, monkeypatch):
    """The names that the blocks of a page leave behind."""
    blocks = BLOCK.findall(page.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace = {"__name__": "__main__"}
    for number, (file, block) in enumerate(blocks, 1):
        if file:  # a block that shows a file is written there, for later blocks to import
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(block)
            continue
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
    return namespace if blocks else {}


@pytest.fixture
def fresh_modules():
    """Modules that a page has written are no others' afterwards."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("decayed_sum"):
            del sys.modules[name]


@pytest.mark.skipif(shutil.which("g++") is None or native.MISSING is not None, reason="no compiler, or no kernels")
@pytest.mark.float32("a reader has PyTorch's own default")
def test_the_kernel_of_the_page_is_built_and_runs(tmp_path, monkeypatch, fresh_modules):
    """In a library with the walker and the instructions that every step has, not with the kernels of other ops."""
    page = ROOT / "docs" / "add_a_kernel.md"
    (name, source), *others = re.findall(r"^```cpp file=(\S+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert not others
    (tmp_path / name).write_text(source)
    parts = [
        tmp_path / name,
        *(native.FOLDER / f"{part}.cpp" for part in ("program", "elementwise", "product", "waiting")),
    ]
    flags = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Werror",
        "-fPIC",
        "-shared",
        "-fopenmp",
        "-ffp-contract=fast",
        f"-I{native.FOLDER}",
    ]
    subprocess.run(["g++", *flags, *map(str, parts), "-o", str(tmp_path / "kernels.so")], check=True, timeout=300)
    without = run(page, tmp_path, monkeypatch)["decoder"]
    assert "the kernels have no instruction 'decayed_sum'" in without.explain()[0][1]
    monkeypatch.setattr(native, "_LIBRARY", ctypes.CDLL(str(tmp_path / "kernels.so")))
    found = run(page, tmp_path, monkeypatch)
    model, decoder, tokens = found["model"], found["decoder"], torch.randint(0, 256, (5, 3))
    assert not decoder.explain()
    state = model.init_state(3)
    with torch.no_grad():
        for row in tokens:
            want, state = model.step(row, state)
            assert_close(decoder.step(row), want, "logits")
    for (leaf, got, _), (_, want, _) in zip(states.leaves(decoder.state()), states.leaves(state), strict=True):
        assert_close(got, want, leaf)
