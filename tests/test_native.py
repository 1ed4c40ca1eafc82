"""The native kernels, every build that this machine can run: equal to the fp64 reference, forward and backward."""

import ctypes
import os
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
    return x.float() if is_tensor(x) else x


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
            numerics.assert_close(mine.double(), theirs, f"output {index}", 1e-4)
        for key, theirs in slopes.items():
            numerics.assert_close(ours[key].double(), theirs, f"gradient of {key}", 1e-3)


@pytest.mark.parametrize("name,variant", KERNELS)
def test_bfloat16_inputs_and_strides(name, variant, build):
    inputs = MODULES[name].inputs(Case("bf16", time=65, variant=variant, dtype=torch.float32))
    halves = {k: x.bfloat16() if is_tensor(x) and k in MODULES[name].SEQUENCE else x for k, x in inputs.items()}
    want, final = op_of(name)(**{k: single(x) for k, x in halves.items()}, backend="native")
    got, ours = op_of(name)(**halves, backend="native")
    numerics.assert_close(got.float(), want, "bf16 output", 1e-2)
    laws.same(ours, final, "the state, which stays fp32", 2e-2)
    strided = {
        k: x.movedim(0, -1).contiguous().movedim(-1, 0) if is_tensor(x) and x.dim() > 1 else x
        for k, x in inputs.items()
    }
    numerics.assert_close(
        op_of(name)(**strided, backend="native")[0],
        op_of(name)(**inputs, backend="native")[0],
        "non-contiguous inputs",
        0.0,
    )


@pytest.mark.parametrize("name,variant", KERNELS)
def test_rows_do_not_depend_on_the_batch_and_runs_repeat(name, variant, build):
    inputs = MODULES[name].inputs(Case("batch", batch=5, time=40, variant=variant, dtype=torch.float32))
    whole, _ = op_of(name)(**inputs, backend="native")
    alone = {
        k: x[3:4] if is_tensor(x) and k in MODULES[name].SEQUENCE and x.dim() > 1 else x for k, x in inputs.items()
    }
    assert torch.equal(op_of(name)(**alone, backend="native")[0], whole[3:4])
    assert torch.equal(op_of(name)(**inputs, backend="native")[0], whole)


def test_both_sides_keep_states_at_the_same_tokens(build):
    assert native._LIBRARY.ev_selective_scan_chunk() == CHUNK


def test_refusals_name_the_reason():
    q = torch.randn(1, 4, 8, dtype=torch.float64)
    inputs = dict(x=q, dt=q, B=q, C=q, A=-torch.rand(8, 8, dtype=torch.float64))
    lines = dispatch.explain(op_of("selective_scan"), **inputs)
    assert lines[0].backend == "native" and "float64" in lines[0].reason and not lines[0].runs
    with pytest.raises(ValueError, match="backend 'native' cannot run here: x has dtype float64"):
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


def test_one_openmp_runtime():
    """The kernels run on the threads of PyTorch's own runtime, never on a second pool."""
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(loaded) == 1, loaded
