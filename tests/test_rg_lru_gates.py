"""The gates of the RG-LRU: the kernel equals the equations in fp64, gradients included."""

import ctypes

import pytest
import torch

from everlong import numerics
from everlong.ops import native
from everlong.ops.cases import Case
from everlong.ops.native.rg_lru_gates import rg_lru_gates_native
from everlong.ops.rg_lru_gates import (
    input_scale,
    inputs,
    rg_lru_gates,
    rg_lru_gates_reference,
    rg_lru_gates_torch,
)

BUILDS = [build for build in native.supported() if (native.FOLDER / f"_{build}.so").exists()]
needs_kernels = pytest.mark.skipif(not BUILDS, reason=f"no kernels: {native.MISSING}")


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    monkeypatch.setattr(native, "_LIBRARY", ctypes.CDLL(str(native.FOLDER / f"_{request.param}.so")))
    return request.param


def to(given, dtype):
    return {key: x if x.dtype == torch.bool else x.to(dtype) for key, x in given.items()}


def with_gradients(run, given):
    """g (0 where it is -inf), b, and the gradients of a random combination of both."""
    leaves = {key: x.detach().requires_grad_() for key, x in given.items() if x.dtype != torch.bool}  # strides stay
    g, b = run(**{**given, **leaves})
    assert torch.equal(g.isinf(), given["first"][..., None].expand_as(g)) and b.dtype == g.dtype
    g = g.masked_fill(g.isinf(), 0.0)
    torch.manual_seed(3)
    weights = [torch.randn(g.shape, dtype=torch.float64).to(g.dtype) for _ in range(2)]
    return (g, b), dict(
        zip(leaves, torch.autograd.grad((g * weights[0] + b * weights[1]).sum(), leaves.values()), strict=True)
    )


def compare(given, exact, tolerance):
    want, slopes = with_gradients(rg_lru_gates_torch, exact)
    got, ours = with_gradients(rg_lru_gates_native, given)
    for label, mine, theirs in zip("gb", got, want, strict=True):
        numerics.assert_close(mine, theirs, label, tolerance)
    for key, theirs in slopes.items():
        assert ours[key].dtype == given[key].dtype
        numerics.assert_close(ours[key], theirs, f"gradient of {key}", 10 * tolerance)


@needs_kernels
@pytest.mark.parametrize("gate", [None, -1e-5, -0.1, -5.0, -50.0])
@pytest.mark.parametrize("sizes", [(2, 3, 5), (1, 1, 64), (3, 2, 50)])
def test_kernel_equals_the_equations(sizes, gate, build):
    batch, heads, keys = sizes
    given = inputs(Case("gates", batch=batch, heads=heads, keys=keys, gate=gate))
    compare(to(given, torch.float32), given, numerics.BOUNDS["fp32 product"])
    half = to(given, torch.bfloat16)
    compare(half, to(half, torch.float64), numerics.BOUNDS["bf16 state"])


@pytest.mark.parametrize("gate", [None, 0.0, -1e-5, -0.1, -5.0, -50.0])
def test_the_torch_form_equals_the_paper(gate):
    given = inputs(Case("gates", batch=2, heads=3, keys=5, gate=gate))
    want, slopes = with_gradients(rg_lru_gates_reference, given)
    got, ours = with_gradients(rg_lru_gates_torch, given)
    for label, mine, theirs in zip("gb", got, want, strict=True):
        numerics.assert_close(mine, theirs, label)
    for key, theirs in slopes.items():
        numerics.assert_close(ours[key], theirs, f"gradient of {key}")


@needs_kernels
def test_heads_that_lie_apart_and_single_tokens(build):
    for time in (37, 1):
        given = to(inputs(Case("strides", batch=3, time=time, heads=2, keys=24)), torch.float32)
        laid = {key: x.movedim(-2, 0).contiguous().movedim(0, -2) if key in "ri" else x for key, x in given.items()}
        gaps = {key: x.transpose(0, 1).contiguous().transpose(0, 1) if key in "xri" else x for key, x in given.items()}
        want, slopes = with_gradients(rg_lru_gates_native, given)
        for other in (laid, gaps):
            got, ours = with_gradients(rg_lru_gates_native, other)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert all(torch.equal(ours[key], slopes[key]) for key in slopes)


@needs_kernels
def test_no_decay_has_a_finite_slope(build):
    given = to(inputs(Case("flat", gate=0.0)), torch.float32)
    (_, b), slopes = with_gradients(rg_lru_gates_native, given)
    assert not b[~given["first"]].any()
    assert all(bool(slope.isfinite().all()) for slope in slopes.values())
    _, theirs = with_gradients(rg_lru_gates_torch, to(given, torch.float64))
    numerics.assert_close(slopes["decay"], theirs["decay"], "slope of decay", numerics.BOUNDS["fp32 product"])


def test_gradcheck():
    given = inputs(Case("gradcheck", batch=1, time=4, heads=2, keys=2))
    given["first"] = torch.tensor([[False, True, False, False]])
    keys = [key for key in given if key != "first"]

    def run(*values):
        g, b = rg_lru_gates(**{**given, **dict(zip(keys, values, strict=True))})
        return g[:, [0, 2, 3]], b

    assert torch.autograd.gradcheck(run, [given[key].requires_grad_() for key in keys])


@needs_kernels
def test_registration():
    given = to(inputs(Case("registered", time=5, heads=2, keys=3)), torch.float32)
    args = [x.requires_grad_() if x.is_floating_point() else x for x in given.values()]
    torch.library.opcheck(torch.ops.everlong.rg_lru_gates_native.default, args)
    gg, gb = torch.randn_like(args[0]), torch.randn_like(args[0])
    backward = torch.ops.everlong.rg_lru_gates_native_backward.default
    torch.library.opcheck(backward, [gg, gb, *(x.detach() for x in args)])


def test_wrong_sizes():
    given = inputs(Case("wrong", time=5, heads=2, keys=3))
    with pytest.raises(ValueError, match=r"x has shape \[2, 5, 6\] and r_bias \[2, 3\], but r, i, .* \[2, 5, 2, 2\]"):
        rg_lru_gates(**{**given, "r": given["r"][..., :2]})


def test_second_gradients():
    """Of the root too, whose slope was once taken for a constant; where it is cut at 1000 it is one."""
    g = -torch.rand(5, dtype=torch.float64).add(0.05)
    assert torch.autograd.gradgradcheck(input_scale, g.requires_grad_())
    steep = torch.full((3,), -1e-9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(input_scale(steep).sum(), steep, create_graph=True)
    numerics.assert_close(
        slope, torch.full_like(slope, -2000.0), "the slope that is cut", numerics.BOUNDS["fp32 angle"]
    )
    (second,) = torch.autograd.grad(slope.sum(), steep)
    assert bool(torch.isfinite(second).all())
