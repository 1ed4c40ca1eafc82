"""The linear map on oneDNN equals PyTorch's own, with its gradients, for every shape and stride that models use."""

import pytest
import torch
from torch.nn import functional as F

from everlong import numerics
from everlong.ops import linear as module
from everlong.ops.linear import Linear, linear


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 7, 5), (2, 3, 2, 5), (0, 5)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients(shape, biased):
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float32),
        torch.randn(4, 5, dtype=torch.float32),
        torch.randn(4, dtype=torch.float32) if biased else None,
    )
    mine, theirs = ([t.clone().requires_grad_() for t in (x, weight, bias) if t is not None] for _ in range(2))
    got, want = linear(*mine), F.linear(*theirs)
    slope = torch.randn_like(want)
    got.backward(slope), want.backward(slope)
    assert got.shape == want.shape
    numerics.assert_close(got, want, "y", 1e-5)
    for a, b in zip(mine, theirs, strict=True):
        numerics.assert_close(a.grad, b.grad, "gradient", 1e-5)


def test_strided_inputs():
    x, weight = torch.randn(6, 20, dtype=torch.float32)[:, 3:13], torch.randn(10, 8, dtype=torch.float32).t()
    numerics.assert_close(linear(x, weight), F.linear(x, weight), "y", 1e-5)


def test_other_dtypes_and_autocast_are_pytorchs_own():
    double = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(linear(double, double), F.linear(double, double))
    single = double.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(single, single).dtype == torch.bfloat16


@pytest.mark.skipif(not module.ONEDNN, reason="no AVX-512, so MKL serves")
def test_onednn_is_really_used(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_product", lambda *given: calls.append(1) or F.linear(*given))
    layer, x = Linear(4, 3).float(), torch.randn(2, 4, requires_grad=True, dtype=torch.float32)
    layer(x).sum().backward()
    assert len(calls) == 3  # y, dx, dW


@pytest.mark.skipif(not module.ONEDNN, reason="no AVX-512, so MKL serves")
def test_onednn_never_sees_a_matrix_with_gaps(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_onednn", lambda x, weight, bias: seen.append(weight) or F.linear(x, weight, bias))
    x = torch.randn(6, 9, dtype=torch.float32)[:, :5].requires_grad_()  # a part of a projection, as dt is in Mamba
    linear(x, torch.randn(4, 9, dtype=torch.float32)[:, 2:7].requires_grad_()).sum().backward()
    assert len(seen) == 3
    assert all(w.is_contiguous() or w.t().is_contiguous() for w in seen)
