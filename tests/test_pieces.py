"""Reading in pieces takes the memory of one piece, as the README shows it, and training through pieces is asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from everlong import state as states
from everlong.config import find, mixer_names
from everlong.models.blocks import Layer
from everlong.models.lm import LanguageModel

ROOT = Path(__file__).parent.parent

READ = """
from everlong.bench.memory import peak_bytes
document, state = torch.randint(0, 256, (1, {count} * 512)), None
pieces = document.split(512, dim=1)
for number, piece in enumerate(pieces):
    {recipe}
    if number == 4:
        before = peak_bytes()
print((peak_bytes() - before) / 2**20)
"""


def growth(recipe, count=50):
    """MiB that the peak of memory grows by from the fifth to the last piece, with the README's model."""
    block = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE).group(1)
    build = block.split("document = ")[0]
    code = build + READ.format(recipe=recipe.replace("\n", "\n    "), count=count)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def recipe():
    """The README's second piece: its call, and what the call stands in."""
    lines = (ROOT / "README.md").read_text().splitlines()
    call = next(index for index, line in enumerate(lines) if "model(document[:, 3000:], state)" in line)
    first = next(index for index in range(call, 0, -1) if not lines[index].startswith(" "))
    used = [line for line in lines[first : call + 1] if "[:, :3000]" not in line]
    return "\n".join(line.split("  #")[0].replace("document[:, 3000:]", "piece") for line in used)


@pytest.mark.slow
def test_the_recipe_of_the_readme_takes_constant_memory():
    assert growth(recipe()) < 20, recipe()
    assert growth("_, state = model.read(piece, state)") < 20
    assert growth("_, state = model(piece, state)", 15) > 40  # what this test looks for


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_pages_that_read_in_pieces_keep_no_graph(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    namespace = {}
    for block in blocks:
        exec(block, namespace)
        if "state" in namespace:
            assert not any(leaf.requires_grad for _, leaf, _ in states.leaves(namespace["state"])), block
    assert "state" in namespace


@pytest.mark.parametrize("name", mixer_names())
def test_a_detached_state_sends_no_gradient_back(name):
    torch.manual_seed(0)
    cfg = LanguageModel.Config(vocab_size=20, d_model=64, layers=(Layer.Config(mixer=find(name).Config()),))
    model, tokens = cfg.build().double(), torch.randint(0, 20, (2, 12))
    grads = []
    for cut in (states.detach, torch.no_grad()(lambda state: states.map_leaves(torch.clone, state))):
        model.zero_grad()
        _, state = model(tokens[:, :6])
        cut_state = cut(state)
        assert not any(leaf.requires_grad for _, leaf, _ in states.leaves(cut_state))
        model(tokens[:, 6:], cut_state)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for (_, ours, _), (_, theirs, _) in zip(states.leaves(cut_state), states.leaves(state), strict=True):
            assert torch.equal(ours, theirs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))
