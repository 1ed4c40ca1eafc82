"""The native kernels, every build that this machine can run: equal to the fp64 reference, forward and backward."""

import ctypes
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from everlong import laws, numerics, state
from everlong.ops import dispatch, native
from everlong.ops.cases import CASES, Case
from everlong.ops.native.selective_scan import CHUNK
from test_ops import MODULES, OPS, is_tensor, later_state, op_of, some_starts, with_gradients

BUILDS = [build for build in native.supported() if (native.FOLDER / f"_{build}.so").exists()]
KERNELS = [(n, v) for n, v in OPS if any(row.name == "native" for row in MODULES[n].TABLE)]
ODD = [Case("odd sizes", batch=3, time=37, heads=1, keys=5, values=37), Case("one channel", heads=1, keys=1, values=1)]

# the builds are one source: the first is tried on every shape, the others on some
TRIED = [(b, case) for b in BUILDS for case in [*ODD, *(CASES if b == BUILDS[0] else CASES[:6:2])]]

pytestmark = pytest.mark.skipif(not BUILDS, reason=f"no kernels: {native.MISSING}")


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    monkeypatch.setattr(native, "_LIBRARY", ctypes.CDLL(str(native.FOLDER / f"_{request.param}.so")))
    return request.param


def single(x):
    return x.to(torch.complex64 if x.is_complex() else torch.float32) if is_tensor(x) else x


def halved(name, inputs):
    """The real inputs of every token in bf16."""
    real = {k for k in MODULES[name].SEQUENCE if is_tensor(inputs[k]) and not inputs[k].is_complex()}
    return {k: x.bfloat16() if k in real else x for k, x in inputs.items()}


@pytest.mark.parametrize("build,case", TRIED, indirect=["build"], ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("name,variant", KERNELS)
def test_kernel_equals_reference(name, variant, case, build):
    case = case.but(variant=variant)
    inputs, initial = MODULES[name].inputs(case), later_state(name, case)
    for starts in (None, some_starts(case)):
        want, slopes = with_gradients(partial(op_of(name), starts=starts, backend="reference"), inputs, initial)
        got, ours = with_gradients(
            partial(op_of(name), starts=starts, backend="native"),
            {k: single(x) for k, x in inputs.items()},
            state.map_leaves(single, initial),
        )
        for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            numerics.assert_close(mine, theirs, f"output {index}", numerics.BOUNDS["fp32 scan"])
        for key, theirs in slopes.items():
            numerics.assert_close(ours[key], theirs, f"gradient of {key}", numerics.BOUNDS["fp32 gradient"])


@pytest.mark.parametrize("name,variant", KERNELS)
def test_bfloat16_inputs_and_strides(name, variant, build):
    inputs = MODULES[name].inputs(Case("bf16", time=65, variant=variant, dtype=torch.float32))
    halves = halved(name, inputs)
    want, final = op_of(name)(**{k: single(x) for k, x in halves.items()}, backend="native")
    got, ours = op_of(name)(**halves, backend="native")
    numerics.assert_close(got, want, "bf16 output", numerics.BOUNDS["bf16 output"])
    laws.same(ours, final, "the state, which stays fp32", numerics.BOUNDS["bf16 state"])
    strided = {
        k: x.movedim(0, -1).contiguous().movedim(-1, 0) if is_tensor(x) and x.dim() > 1 else x
        for k, x in inputs.items()
    }
    assert torch.equal(*(op_of(name)(**given, backend="native")[0] for given in (strided, inputs)))


@pytest.mark.parametrize("name,variant", KERNELS)
def test_gradients_of_bfloat16_inputs(name, variant, build):
    case = Case("bf16", time=65, variant=variant, dtype=torch.float32)
    halves, initial = halved(name, MODULES[name].inputs(case)), later_state(name, case)
    dtypes = iter([leaf.dtype for _, leaf, _ in state.leaves(op_of(name)(**halves, backend="native")[1])])
    initial = state.map_leaves(lambda leaf: leaf.to(next(dtypes)), initial)
    run = partial(op_of(name), starts=some_starts(case), backend="native")
    _, want = with_gradients(run, {k: single(x) for k, x in halves.items()}, initial)
    _, ours = with_gradients(run, halves, initial)
    for key, theirs in want.items():
        assert key not in halves or ours[key].dtype == halves[key].dtype
        numerics.assert_close(ours[key], theirs, f"gradient of {key}", numerics.BOUNDS["bf16 gradient"])


@pytest.mark.parametrize("name,variant", KERNELS)
def test_rows_do_not_depend_on_the_batch_and_runs_repeat(name, variant, build):
    inputs = MODULES[name].inputs(Case("batch", batch=5, time=40, variant=variant, dtype=torch.float32))
    whole, _ = op_of(name)(**inputs, backend="native")
    alone = {
        k: x[3:4] if is_tensor(x) and k in MODULES[name].SEQUENCE and x.dim() > 1 else x for k, x in inputs.items()
    }
    assert torch.equal(op_of(name)(**alone, backend="native")[0], whole[3:4])
    assert torch.equal(op_of(name)(**inputs, backend="native")[0], whole)


def test_decays_and_turns_of_any_size(build):
    size = torch.tensor([0.0, -1e-7, -0.3, -5.0, -50.0, -87.0, -200.0, -torch.inf])
    angle = torch.cat([torch.linspace(-7, 7, 99), torch.tensor([100.0, -8191.9, 8193.0, 1e5, -3e7])])
    for g in (size, torch.complex(size[:, None].expand(-1, len(angle)), angle.expand(len(size), -1)).flatten()):
        one = torch.ones_like(g)[None]
        y, _ = op_of("diagonal_scan")(0 * one[None], g, state=one, backend="native")
        numerics.assert_close(
            torch.view_as_real(y[0, 0] + 0j),
            torch.view_as_real(g.to(torch.complex128).exp()),
            "",
            numerics.BOUNDS["fp32 number"],
        )


def test_both_sides_keep_states_at_the_same_tokens(build):
    assert native._LIBRARY.ev_selective_scan_chunk() == CHUNK


def test_refusals_name_the_reason():
    q = torch.randn(1, 4, 8, dtype=torch.float64)
    inputs = dict(x=q, dt=q, B=q, C=q, A=-torch.rand(8, 8, dtype=torch.float64))
    lines = dispatch.explain(op_of("selective_scan"), **inputs)
    assert lines[0].backend == "native" and "float64" in lines[0].reason and not lines[0].runs
    with pytest.raises(ValueError, match="backend 'native' of selective_scan cannot run here: x has dtype float64"):
        op_of("selective_scan")(**inputs, backend="native")


def test_without_kernels_the_torch_form_runs():
    code = (
        "import torch; from everlong.ops.selective_scan import selective_scan as s, inputs;"
        "from everlong import explain; from everlong.ops.cases import Case;"
        "i = inputs(Case('x', dtype=torch.float32)); s(**i); print(explain(s, **i)[0].reason)"
    )
    env = {**os.environ, "EVERLONG_NATIVE": "off"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert "switched off" in out.stdout


def test_an_install_without_a_compiler_works_and_says_so_once(tmp_path):
    root = native.FOLDER.parents[1]
    shutil.copytree(root, tmp_path / "everlong", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "import torch, everlong; from everlong.ops.selective_scan import selective_scan as s, inputs;"
        "from everlong.ops.cases import Case; i = inputs(Case('x', dtype=torch.float32)); s(**i); s(**i);"
        "print(everlong.__file__, everlong.explain(s, **i)[0].reason)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True, cwd=tmp_path
    )
    assert str(tmp_path) in done.stdout and "no kernels were built" in done.stdout
    assert done.stderr.count("everlong runs on its PyTorch forms") == 1


def test_one_openmp_runtime():
    """The kernels run on the threads of PyTorch's own runtime, never on a second pool."""
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(loaded) == 1, loaded
