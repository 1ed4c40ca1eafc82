"""Every python block of the README and of docs/ runs, in order, one namespace per page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python(?: file=(\S+))?\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.float32("a reader has PyTorch's own default")
def test_blocks_run(page, tmp_path, monkeypatch):
    blocks = BLOCK.findall(page.read_text())
    assert blocks or page.name == "index.md", f"{page.name} shows no code"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace = {"__name__": "__main__"}
    for number, (file, block) in enumerate(blocks, 1):
        if file:  # a block that shows a file is written there, for later blocks to import
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(block)
            continue
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
