"""Ops without a recurrence (gated products, norms): every row of their tables equals the equations."""

import ctypes
import importlib
from functools import partial
from pathlib import Path

import pytest
import torch

import everlong.ops
from everlong import numerics
from everlong.ops import dispatch, native
from everlong.ops.cases import Case
from everlong.ops.gate import gate
from everlong.ops.gated_norm import gated_norm
from everlong.ops.norm import norm

MODULES = {
    path.stem: importlib.import_module(f"everlong.ops.{path.stem}")
    for path in sorted(Path(everlong.ops.__file__).parent.glob("*.py"))
    if "\nVARIANTS = " in path.read_text() and "\nSEQUENCE = (" not in path.read_text()
}
OPS = [(name, variant) for name, module in MODULES.items() for variant in module.VARIANTS]
BUILDS = [build for build in native.supported() if (native.FOLDER / f"_{build}.so").exists()]
KERNELS = [(n, v) for n, v in OPS if v != "gelu"]  # the kernel leaves it to PyTorch, with a reason
CASES = [
    Case("odd", batch=2, time=37, heads=3, keys=5),
    Case("heads of 64", time=20, keys=64),
    Case("wide", batch=1, time=9, heads=1, keys=1030),
    Case("one row of three", batch=1, time=1, heads=1, keys=3),
    Case("many rows", batch=1, time=6000, heads=1, keys=16),
]


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    monkeypatch.setattr(native, "_LIBRARY", ctypes.CDLL(str(native.FOLDER / f"_{request.param}.so")))
    return request.param


def form(name, row):
    return next(r.run for r in MODULES[name].TABLE if r.name == row)


def tensors(inputs):
    return {key: x for key, x in inputs.items() if isinstance(x, torch.Tensor)}


def to(inputs, dtype):
    return {key: x.to(dtype) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}


def with_gradients(run, inputs):
    inputs = {key: x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    y = run(**inputs)
    torch.manual_seed(5)
    grads = torch.autograd.grad(
        (y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum(), tensors(inputs).values()
    )
    return y, dict(zip(tensors(inputs), grads, strict=True))


def compare(run, inputs, want, slopes, tolerance):
    got, ours = with_gradients(run, inputs)
    assert got.dtype == inputs["x" if inputs.get("weight") is None else "weight"].dtype
    numerics.assert_close(got, want, "output", tolerance)
    for key, theirs in slopes.items():
        assert ours[key].dtype == inputs[key].dtype
        numerics.assert_close(ours[key], theirs, f"gradient of {key}", 10 * tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name,variant", OPS)
def test_torch_equals_reference(name, variant, case):
    inputs = MODULES[name].inputs(case.but(variant=variant))
    compare(form(name, "torch"), inputs, *with_gradients(form(name, "reference"), inputs), numerics.BOUNDS["fp64 pass"])


@pytest.mark.parametrize("row", ["torch", "reference"])
@pytest.mark.parametrize("name,variant", OPS)
def test_gradcheck(name, variant, row):
    inputs = MODULES[name].inputs(Case("gradcheck", batch=1, time=2, heads=2, keys=3, variant=variant))
    keys = list(tensors(inputs))

    def run(*values):
        return form(name, row)(**{**inputs, **dict(zip(keys, values, strict=True))})

    assert torch.autograd.gradcheck(run, [inputs[key].requires_grad_() for key in keys])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name,variant", KERNELS)
def test_kernel_equals_reference(name, variant, case, build):
    inputs = MODULES[name].inputs(case.but(variant=variant))
    want = with_gradients(form(name, "reference"), inputs)
    compare(form(name, "native"), to(inputs, torch.float32), *want, numerics.BOUNDS["fp32 pass"])


@pytest.mark.parametrize("mixed", [False, True], ids=["all bf16", "x in fp32"])
@pytest.mark.parametrize("name,variant", KERNELS)
def test_bfloat16(name, variant, mixed, build):
    """x in fp32 and weights or gates in bf16: a residual, or the output of an op."""
    inputs = to(MODULES[name].inputs(Case("bf16", time=37, variant=variant)), torch.bfloat16)
    if mixed:
        inputs["x"] = inputs["x"].float()
    want, slopes = with_gradients(form(name, "reference"), to(inputs, torch.float64))
    got, ours = with_gradients(form(name, "native"), inputs)
    assert got.dtype == form(name, "torch")(**inputs).dtype == form(name, "reference")(**inputs).dtype
    numerics.assert_close(got, want, "output", numerics.BOUNDS["bf16 output"])
    for key, theirs in slopes.items():
        assert ours[key].dtype == inputs[key].dtype
        numerics.assert_close(ours[key], theirs, f"gradient of {key}", numerics.BOUNDS["bf16 state"])


LAYOUTS = {
    "half of a projection": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "some of the heads": lambda x: torch.cat([x, x], -2)[..., : x.shape[-2], :],
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last axis first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name,variant", KERNELS)
def test_strides(name, variant, layout, build):
    case = Case("strides", batch=4, time=6, heads=3, keys=20, variant=variant)
    inputs, run = to(MODULES[name].inputs(case), torch.float32), form(name, "native")
    laid = {key: LAYOUTS[layout](x) if key in "xz" else x for key, x in inputs.items()}
    assert laid["x"].stride() != inputs["x"].stride()
    with_leaves = [{**given, "x": given["x"].detach().requires_grad_()} for given in (inputs, laid)]
    want, got = (run(**given) for given in with_leaves)
    assert torch.equal(got, want)
    slopes = [
        torch.autograd.grad(y.sin().sum(), given["x"])[0] for y, given in zip((want, got), with_leaves, strict=True)
    ]
    assert torch.equal(*slopes)


@pytest.mark.parametrize("name,variant", KERNELS)
def test_rows_do_not_depend_on_the_batch(name, variant, build):
    inputs, run = to(MODULES[name].inputs(Case("rows", batch=4, variant=variant)), torch.float32), form(name, "native")
    alone = {key: x[2:3] if key in "xz" else x for key, x in inputs.items()}
    assert torch.equal(run(**alone), run(**inputs)[2:3])


@pytest.mark.parametrize("name,variant", KERNELS)
def test_kernel_in_a_graph(name, variant):
    inputs = to(MODULES[name].inputs(Case("graph", time=12, keys=8, variant=variant)), torch.float32)
    compiled = torch.compile(form(name, "native"), fullgraph=True, backend="aot_eager")
    want, slopes = with_gradients(form(name, "native"), inputs)
    compare(compiled, inputs, want, slopes, numerics.BOUNDS["fp32 angle"])


def test_activations_far_out(build):
    z = torch.tensor(
        [-torch.inf, -1e4, -100.0, -88.0, -87.0, -30.0, -1e-6, 0.0, 1e-6, 30.0, 88.0, 1e4, torch.nan],
        dtype=torch.float32,
    )
    for activation in ("silu", "sigmoid", "gelu_tanh", "relu2"):
        y, slopes = with_gradients(
            partial(form("gate", "native"), activation=activation), {"x": torch.ones_like(z), "z": z}
        )
        want, theirs = with_gradients(
            partial(form("gate", "reference"), activation=activation),
            {"x": torch.ones_like(z).double(), "z": z.double()},
        )
        for ours, right, near in ((y, want, "fp32 underflow"), (slopes["z"], theirs["z"], "fp32 cancelled")):
            finite = right.isfinite() & (right.abs() < 3e38) & ~z.isnan()
            torch.testing.assert_close(
                ours[finite].double(), right[finite], rtol=numerics.BOUNDS["fp32 angle"], atol=numerics.BOUNDS[near]
            )
        assert y[-1].isnan()


def test_few_numbers_take_the_torch_form_and_explain_says_so():
    x = torch.randn(2, 8, dtype=torch.float32)
    lines = dispatch.explain(gate, x=x, z=x, activation="silu")
    assert lines[0].backend == "native" and "16 numbers are few" in lines[0].reason and lines[1].runs
    if native.MISSING is None:  # a preference is no refusal
        numerics.assert_close(gate(x, x, backend="native"), gate(x, x), "few numbers", numerics.BOUNDS["fp32 product"])
    large = torch.randn(200, 100, dtype=torch.float32)
    assert dispatch.explain(norm, x=large)[0].runs or native.MISSING
    lines = dispatch.explain(gate, x=large, z=large, activation="gelu")
    assert lines[0].reason == "the kernel has no gelu"
    for op, extra in ((gate, {"activation": "gelu_tanh"}), (gated_norm, {"eps": 1e-5, "first": "norm"})):
        numerics.assert_close(
            op(large, large, **extra),
            op(large, large, **extra, backend="torch"),
            "native",
            numerics.BOUNDS["fp32 product"],
        )


def test_wrong_arguments():
    x = torch.randn(2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x has shape \[2, 8\] and z \[2, 4\], expected the same"):
        gate(x, x[:, :4])
    with pytest.raises(ValueError, match="no activation 'sillu'; did you mean 'silu'"):
        gate(x, x, activation="sillu")
    with pytest.raises(ValueError, match="no norm 'rsm'; did you mean 'rms'"):
        norm(x, style="rsm")
    with pytest.raises(ValueError, match=r"weight has shape \[4\], expected \[8\] or \[2, 8\] for x of shape \[2, 8\]"):
        norm(x, weight=x[0, :4])
    with pytest.raises(ValueError, match="no order that begins with 'gat'; did you mean 'gate'"):
        gated_norm(x, x, first="gat")
