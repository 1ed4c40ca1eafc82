"""selective_scan in tiles of rows: the same results as in one, whatever the cache size; memory stays O(B T C)."""

import pytest
import torch

from everlong import numerics
from everlong.ops import selective_scan as module
from everlong.ops.cases import Case

CASE = Case("tiles", batch=5, time=45, heads=2, values=8, keys=16, variant="D")


def results(tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    torch.manual_seed(0)
    inputs = {name: x.requires_grad_() for name, x in module.inputs(CASE).items() if x is not None}
    y, final = module.selective_scan(**inputs, starts=torch.rand(5, 45) < 0.1, backend="torch")
    return [y, final, *torch.autograd.grad(y.square().sum() + final.sum(), list(inputs.values()))]


@pytest.mark.parametrize("tile", [1, 256, 512, 3 * 256])  # of 256 states a row: the last tile holds fewer rows
def test_tiles_of_rows(tile, monkeypatch):
    for got, want in zip(results(tile, monkeypatch), results(1 << 16, monkeypatch), strict=True):
        numerics.assert_close(got, want, "a tile", numerics.BOUNDS["fp64 number"])


def test_no_states_are_kept_without_gradients():
    inputs = module.inputs(CASE)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()), lambda x: x):
        module.selective_scan(**inputs, backend="torch")
        assert not saved
        module.selective_scan(**{**inputs, "A": inputs["A"].requires_grad_()}, backend="torch")
    assert max(saved) <= 2 * CASE.keys / 8 * 5 * 45 * 16  # states at borders, at least 8 tokens apart
