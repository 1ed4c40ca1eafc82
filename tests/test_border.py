"""The border to C++: every pointer is checked, whatever reaches it; builds are named, chosen and told apart rightly."""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import test_native_opcheck
import test_pointwise
from everlong import numerics
from everlong import state as states
from everlong.config import find, mixer_names
from everlong.generation.decoder import Decoder
from everlong.generation.generate import generate
from everlong.generation.sampler import Sampling
from everlong.models.quantize import quantized
from everlong.ops import dispatch, native
from everlong.ops.attention import Cache
from everlong.ops.attention_decode import attention_step_
from everlong.ops.native import product, signatures
from everlong.ops.native.rg_lru_gates import rg_lru_gates_native
from everlong.ops.rg_lru_gates import inputs as gate_inputs
from test_decode import model_of
from test_native import BUILDS, KERNELS
from test_ops import MODULES, OPS, Case, is_tensor, op_of

pytestmark = pytest.mark.float32("sets the defaults itself")
needs_kernels = pytest.mark.skipif(not BUILDS, reason=f"no kernels: {native.MISSING}")


# ---- one border ----


@functools.cache
def calls():
    """Arguments of a call of every entry point."""
    seen, check = {}, signatures.Signature.check

    def noting(self, args):
        plain = check(self, args)
        if sum(x is None for x in args) < sum(x is None for x in seen.get(self.name, [None] * 99)):
            seen[self.name] = list(args)
        return plain

    signatures.Signature.check = noting
    try:
        for name, variant in KERNELS:
            for plain in (True, False):
                test_native_opcheck.recorded(name, variant, plain=plain)
        for name, variant in test_pointwise.KERNELS:
            test_native_opcheck.recorded_pointwise(name, variant)
        gates = gate_inputs(Case("border", dtype=torch.float32))
        g, b = rg_lru_gates_native(**gates | {"x": gates["x"].clone().requires_grad_()})
        (g.sum() + b.sum()).backward()
        packed = product.pack(torch.randn(48, 64, dtype=torch.float32), "int8")
        product.product(torch.randn(3, 64, dtype=torch.float32), packed)
        product.unpack(packed, torch.tensor([1, 2]))
        cache = Cache(*torch.zeros(2, 2, 5, 2, 4, dtype=torch.float32), torch.zeros(2, dtype=torch.int64))
        attention_step_(*torch.randn(3, 2, 2, 4, dtype=torch.float32), state=cache, backend="native")
        Decoder(model_of("mamba"), 2).step(torch.tensor([1, 2]))
        native.call("ev_waiting_team", 2)
    finally:
        signatures.Signature.check = check
    return seen


def half_of(x):
    """The same numbers, every other one of twice as many in memory."""
    return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x


def odd(x):
    """The same numbers, at an address that no number of this size begins at."""
    raw = torch.zeros(x.numel() * x.itemsize + 1, dtype=torch.uint8)[1:]
    return torch.frombuffer(raw.numpy(), dtype=x.dtype)


SPOILT = {
    "of another dtype": lambda x: x.to(torch.float64),
    "one number short": lambda x: x.flatten()[:-1].clone(),
    "one number more": lambda x: torch.cat([x.flatten(), x.flatten()[:1]]),
    "with gaps": half_of,
    "expanded": lambda x: x.flatten()[:1].expand(x.shape),
    "on another device": lambda x: x.to("meta"),
    "to be negated": lambda x: torch._neg_view(x),
    "not aligned": odd,
    "an address": lambda x: x.data_ptr(),
    "not there": lambda x: None,
}


@needs_kernels
@pytest.mark.parametrize("name", sorted(signatures.table()))
def test_every_pointer_is_checked(name):
    signature, args = signatures.table()[name], calls()[name]
    signature.check(tuple(args))
    for memory in signature.memory:
        x = args[memory.place]
        if x is None or not x.numel():
            continue
        for how, spoil in SPOILT.items():
            right = memory.strided and how in ("with gaps", "one number more", "expanded")
            right |= x.numel() == 1 and how in ("expanded", "with gaps")
            right |= how == "not there" and memory.optional == "?"
            right |= how == "to be negated" and not x.is_floating_point()
            right |= how == "not aligned" and x.itemsize == 1
            right |= how == "with gaps" and x.dim() and x.shape[-1] == 1
            if right:
                continue
            given = [spoil(x) if place == memory.place else old for place, old in enumerate(args)]
            with pytest.raises((ValueError, RuntimeError, IndexError), match=rf"{name}: {memory.name} must be"):
                native.call(name, *given)
                pytest.fail(f"{memory.name} {how} was taken")  # pragma: no cover


@needs_kernels
def test_numbers_are_checked():
    name = "ev_gate"
    args = calls()[name]
    with pytest.raises(Exception, match="argument 3"):
        native.call(name, *args[:2], 1.5, *args[3:])
    with pytest.raises(ValueError, match="takes 12 arguments, got 11"):
        native.call(name, *args[:-1])
    args = list(calls()["ev_norm"])
    wanted, whole = args.copy(), signatures.table()["ev_norm"].names
    y, eps = whole.index("y"), whole.index("eps")
    wanted[y], wanted[eps] = torch.empty_like(args[y]), 1.0
    native.call("ev_norm", *wanted)
    args[y], args[eps] = torch.empty_like(args[y]), 1  # an integer where C expects a double
    native.call("ev_norm", *args)
    assert torch.equal(args[y], wanted[y])


def test_the_table_is_that_of_the_sources():
    """Numbers, doubles and pointers in the order of the C++ functions."""
    found = {}
    for path in sorted(native.FOLDER.glob("*.cpp")):
        for name, text in re.findall(r"^(?:extern \"C\" )?int64_t (ev_\w+)\(([^)]*)\)", path.read_text(), re.M):
            kinds = ["*" if "*" in part else part.split()[0] for part in text.split(",") if part.strip()]
            found[name] = kinds
    for name, signature in signatures.table().items():
        mine = [{"c_long": "int64_t", "c_double": "double", "c_void_p": "*"}[t.__name__] for t in signature.types]
        assert found.pop(name) == mine, name
    counts = {"ev_attention_space", "ev_product_scratch", "ev_program_instruction_bytes", "ev_program_kinds"}
    assert set(found) == counts, "an entry point without a signature"


@needs_kernels
def test_without_assertions_too():
    code = (
        "import torch; from everlong.ops.native import call\n"
        "x = torch.zeros(4, 4).t()[:, :2]\n"
        "try: call('ev_gate', 0, 0, 0, 1, 1, 64, x, 0, x, 0, x, 1)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert "ev_gate: x must be 64 numbers of float32 on the CPU in one piece, got float32 (4, 2)" in done.stdout


SHORT = """
import ctypes, resource, sys, torch
from everlong.ops import dispatch, native
from everlong.ops.native import signatures
from test_border import calls
seen = calls()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for name in sys.argv[1:]:
    signature = signatures.table()[name]
    if name == "ev_norm_backward":
        for one, value in (("parts", 2), ("gw", torch.empty(2, 99)), ("gb", torch.empty(2, 99))):
            at = signature.names.index(one)
            seen[name][at] = value[:, : seen[name][at].shape[-1]].contiguous() if one != "parts" else value
    plain, function, kept = signature.check(tuple(seen[name])), getattr(native._LIBRARY, name), [0] * (1 << 20)
    if "threads" in signature.names:
        plain[signature.names.index("threads")] = 2
    function(*plain)  # the runtime keeps a team of two
    held = libc.malloc(1 << 22)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), limits[1]))
    n, size = 0, 1 << 20
    while size >= 16:
        block = libc.malloc(size)
        if block:
            kept[n] = block
            n += 1
        else:
            size >>= 1
    status = function(*plain)
    libc.free(held)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    for block in kept[:n]:
        libc.free(block)
    print(name, status, flush=True)
"""
WORKING = [  # what asks for memory in a parallel region
    *("ev_attention_decode", "ev_delta_rule", "ev_delta_rule_backward", "ev_diagonal_scan"),
    *("ev_diagonal_scan_backward", "ev_linear_attention", "ev_linear_attention_backward", "ev_norm"),
    *("ev_norm_backward", "ev_selective_scan_backward", "ev_short_conv", "ev_short_conv_backward"),
]


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_a_kernel_without_memory_says_so():
    done = subprocess.run(
        [sys.executable, "-c", SHORT, *WORKING],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split("\n")[:-1] == [f"{name} 1" for name in WORKING], done.stderr[-2000:]


@needs_kernels
def test_failures_of_a_kernel_are_exceptions(monkeypatch):
    class Failing:
        argtypes = restype = None

        def __call__(self, *args):
            return 1

    args = calls()["ev_gate"]
    monkeypatch.setattr(native, "_LIBRARY", SimpleNamespace(ev_gate=Failing()))
    with pytest.raises(MemoryError, match="ev_gate found no memory to work in; make the batch or the model smaller"):
        native.call("ev_gate", *args)


@needs_kernels
def test_attention_of_an_impossible_position():
    cache = Cache(*torch.zeros(2, 2, 5, 2, 4), torch.tensor([3, -5]))
    with pytest.raises(ValueError, match=r"state\.position runs from -5 to 3"):
        attention_step_(*torch.randn(3, 2, 2, 4), state=cache, backend="native")
    args, place = (
        list(calls()["ev_attention_decode"]),
        signatures.table()["ev_attention_decode"].names.index("position"),
    )
    args[place] = torch.tensor([3, -5])
    with pytest.raises(ValueError, match="ev_attention_decode: a position below 0"):
        native.call("ev_attention_decode", *args)
    args[place] = torch.full((2,), 2**63 - 1)
    native.call("ev_attention_decode", *args)


# ---- default dtypes and devices ----

DEFAULTS = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float64)} | {"meta": "meta"}


@contextlib.contextmanager
def default(name):
    """The default dtype or device of this name, for a while."""
    before = torch.get_default_dtype()
    with torch.device("meta") if name == "meta" else contextlib.nullcontext():
        try:
            if name != "meta":
                torch.set_default_dtype(DEFAULTS[name])
            yield
        finally:
            torch.set_default_dtype(before)


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and mine.device == other.device
        assert torch.equal(mine, other)


def leaves_of(tree):
    return [leaf for _, leaf, _ in states.leaves(tree)]


def life(model, tokens):
    """What a model can be asked for: logits, state, loss, gradients, a step, a decoder, a text."""
    logits, state = model(tokens, starts=tokens == 7)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    slopes = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    with torch.no_grad():
        one, after = model.step(tokens[:, 0], state)
        decoder = Decoder(model, 2)
        decoder.load(state)
        played = decoder.step(tokens[:, 0]).clone()
        text = list(generate(model, tokens[0].tolist(), max_tokens=5, sampling=Sampling(seed=1, min_p=0.01)))
    found = [logits, *leaves_of(state), loss, *(s for s in slopes if s is not None), one, *leaves_of(after), played]
    return [x.detach() for x in [*found, *leaves_of(decoder.state())]], text


@pytest.mark.parametrize("name", mixer_names())
def test_a_model_is_the_same_under_every_default(name):
    model, tokens = model_of(name), torch.randint(0, 50, (2, 11))
    wanted, text = life(model, tokens)
    for other in DEFAULTS:
        with default(other):
            ours, words = life(model, tokens)
        same(ours, wanted)
        assert words == text, other


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_weights_are_the_same_under_every_default(weights):
    model, tokens = model_of("rwkv7", "mamba", "attention"), torch.randint(0, 50, (2, 5))
    with torch.no_grad():
        wanted = quantized(model, weights)(tokens)[0]
        for other in DEFAULTS:
            with default(other):
                small = quantized(model, weights)
                same([small(tokens)[0]], [wanted])
                assert all(x.dtype in (torch.float32, torch.bfloat16, torch.uint8) for x in small.state_dict().values())


@pytest.mark.parametrize("name,variant", OPS)
def test_an_op_is_the_same_under_every_default(name, variant):
    inputs = MODULES[name].inputs(Case("defaults", time=37, variant=variant, dtype=torch.float32))
    starts = torch.rand(2, 37) < 0.1

    def results():
        found = []
        for row in MODULES[name].TABLE:
            if row.refuse(**inputs, state=None, starts=starts) is None:
                given = {k: x.clone().requires_grad_() if is_tensor(x) else x for k, x in inputs.items()}
                y, state = op_of(name)(**given, starts=starts, backend=row.name)
                slopes = torch.autograd.grad(y.abs().sum(), [x for x in given.values() if is_tensor(x)])
                found += [y.detach(), *(x.detach() for x in leaves_of(state)), *slopes]
        return found

    wanted = results()
    for other in DEFAULTS:
        with default(other):
            same(results(), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", mixer_names())
def test_a_model_made_under_a_default_has_its_dtype(name, dtype):
    with default(str(dtype)):
        model = model_of(name, dtype=dtype)
        layer = find(name).Config().build(d_model=64)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert all(bool(torch.isfinite(p).all()) for p in layer.parameters())
        tokens = torch.randint(0, 50, (2, 9))
        logits, state = model(tokens)
        assert bool(torch.isfinite(logits).all())
        with torch.no_grad():
            split, after = model(tokens[:, 5:], model(tokens[:, :5])[1])
            decoder = Decoder(model, 2)
            decoder.load(state)
            played, want = decoder.step(tokens[:, 0]), model.step(tokens[:, 0], state)[0]
    numerics.assert_close(split, logits[:, 5:], "split")
    numerics.assert_close(played.to(want.dtype), want, "decoder")
    assert [x.dtype for x in leaves_of(after)] == [x.dtype for x in leaves_of(state)]


# ---- inputs that lie oddly ----


class Sub(torch.Tensor):
    """A subclass without a mind of its own."""


def offset(x):
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def frozen_array(x):
    array = x.numpy().copy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def odd_copy(x):
    made = odd(x)
    made.copy_(x.flatten())
    return made.view(x.shape)


STRANGE = {
    "last axis first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "time last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 1 else x,
    "with gaps": half_of,
    "rows with gaps": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row for all": lambda x: x[:1].expand(x.shape),
    "one number for all": lambda x: x.flatten()[:1].expand(x.shape),
    "behind another number": offset,
    "to be negated": lambda x: torch._neg_view(x.neg()),
    "to be conjugated": lambda x: x.conj().resolve_conj().conj() if x.is_complex() else x,
    "imaginary parts": lambda x: torch.complex(x, -x).conj().imag if x.dtype == torch.float32 else x,
    "of NumPy, read only": frozen_array,
    "not aligned": odd_copy,
    "a leaf": lambda x: x.clone().requires_grad_(),
    "no rows": lambda x: x[:0],
    "no tokens": lambda x: x[:, :0] if x.dim() > 1 else x,
    "no rows, leaves": lambda x: x[:0].clone().requires_grad_(),
    "no tokens, leaves": lambda x: (x[:, :0] if x.dim() > 1 else x).clone().requires_grad_(),
    "complex": lambda x: x.to(torch.complex64),
    "of a subclass": lambda x: x.clone().as_subclass(Sub),
    "sparse": lambda x: x.to_sparse(),
    "on meta": lambda x: x.to("meta"),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}
REFUSAL = (ValueError, RuntimeError, TypeError, NotImplementedError)


def plain(x):
    x = x.to_dense() if x.layout != torch.strided else x
    return x.detach().resolve_neg().resolve_conj().contiguous().clone().as_subclass(torch.Tensor)


def how_many(inputs):
    """Numbers in the smallest tensor."""
    return min(x.numel() for x in inputs.values() if is_tensor(x))


def some_of(inputs, how):
    """Each tensor alone, then all; PyTorch itself computes nothing where some tensors are on meta."""
    names = [k for k, x in inputs.items() if is_tensor(x)]
    return [names] if how == "on meta" else [*([k] for k in names), names]


def check_strange(run, inputs, keys, make):
    """``run`` on inputs that lie oddly gives what it gives on plain copies of them, or refuses."""
    try:
        strange = {k: make(x) if k in keys else x for k, x in inputs.items()}
    except (TypeError, RuntimeError, NotImplementedError):
        return  # there is no such tensor
    copied = None
    with contextlib.suppress(*REFUSAL):
        copied = run(**{k: plain(x) if k in keys else x for k, x in strange.items()})
    try:
        got = run(**strange)
    except REFUSAL as error:
        assert str(error)
        return
    if got.device.type == "meta" or got.layout != torch.strided:
        return
    assert copied is not None, "odd inputs are taken that plain ones are refused for"
    got, copied = got.as_subclass(torch.Tensor), copied.as_subclass(torch.Tensor)
    torch.testing.assert_close(got, copied, atol=numerics.BOUNDS["fp32 gradient"], rtol=numerics.BOUNDS["fp32 scan"])
    if got.requires_grad and how_many(inputs) and not how_many(strange):  # nothing to be read, and yet a gradient
        leaves = [x for x in strange.values() if is_tensor(x) and x.requires_grad]
        for slope in torch.autograd.grad(got.abs().sum(), leaves, allow_unused=True):
            assert slope is None or not slope.any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", STRANGE)
@pytest.mark.parametrize("name,variant", OPS)
def test_inputs_that_lie_oddly(name, variant, how):
    inputs = MODULES[name].inputs(Case("odd", batch=3, time=17, variant=variant, dtype=torch.float32))
    for row in MODULES[name].TABLE:
        for keys in some_of(inputs, how):
            check_strange(lambda **kw: op_of(name)(**kw, backend=row.name)[0], inputs, keys, STRANGE[how])  # noqa: B023


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", STRANGE)
@pytest.mark.parametrize("name,variant", test_pointwise.OPS)
def test_inputs_of_one_pass_that_lie_oddly(name, variant, how):
    module = test_pointwise.MODULES[name]
    case = Case("odd", batch=3, time=50, heads=3, keys=40, variant=variant)
    inputs = {k: x.float() if is_tensor(x) else x for k, x in module.inputs(case).items()}
    for row in module.TABLE:
        for keys in some_of(inputs, how):
            check_strange(partial(getattr(module, name), backend=row.name), inputs, keys, STRANGE[how])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", STRANGE)
@pytest.mark.parametrize("weights", product.FORMATS)
def test_products_of_inputs_that_lie_oddly(weights, how):
    packed = product.pack(torch.randn(48, 64, dtype=torch.float32), weights)
    for shape in ((3, 64), (2, 3, 64), (1, 64)):
        check_strange(
            lambda x: product.product(x, packed), {"x": torch.randn(shape, dtype=torch.float32)}, ["x"], STRANGE[how]
        )


# ---- builds ----


def imported(*, package=None, **env):
    """What importing the kernels says in a process of its own."""
    code = "from everlong.ops import native; print(native.BUILD, native.MISSING)"
    path = str(package) if package else os.pathsep.join(sys.path)
    env = {**os.environ, "PYTHONPATH": path, **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def package(folder, *, but=()):
    """A copy of the package."""
    shutil.copytree(native.FOLDER.parents[1], folder / "everlong", ignore=shutil.ignore_patterns("__pycache__", *but))
    return folder / "everlong" / "ops" / "native"


@needs_kernels
def test_builds_that_there_are_not(tmp_path):
    here = f"expected one of: {', '.join([*BUILDS, 'off'])}"
    said = imported(EVERLONG_NATIVE="avx521")
    assert said.returncode and f"EVERLONG_NATIVE=avx521 names no build; {here}; did you mean 'avx512'?" in said.stderr
    for build in BUILDS:
        assert imported(EVERLONG_NATIVE=build).stdout == f"{build} None\n"
    assert "switched off" in imported(EVERLONG_NATIVE="off").stdout
    package(tmp_path, but=["_portable.so"])
    said = imported(package=tmp_path, EVERLONG_NATIVE="portable")
    assert said.returncode and "EVERLONG_NATIVE=portable: _portable.so was not built; expected one of: " in said.stderr
    if "avx2" in BUILDS:  # PyTorch believes the processor to be a lesser one
        said = imported(EVERLONG_NATIVE="avx2", ATEN_CPU_CAPABILITY="default")
        wanted = (
            "EVERLONG_NATIVE=avx2 needs instructions that this processor does not have; expected one of: portable, off"
        )
        assert said.returncode and wanted in said.stderr


@needs_kernels
def test_a_wrong_build_on_the_command_line():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "EVERLONG_NATIVE": "avx521"}
    command = [sys.executable, "-m", "everlong.cli", "check", "gla"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.startswith("error: EVERLONG_NATIVE=avx521 names no build")
    assert "Traceback" not in done.stderr


@needs_kernels
def test_a_stale_library_is_noticed(tmp_path):
    folder = package(tmp_path)
    said = imported(package=tmp_path)
    assert "None" in said.stdout and not said.stderr
    with open(folder / "vec.h", "a") as file:
        file.write("// changed\n")
    said = imported(package=tmp_path)
    assert (
        said.stderr.count("were built from other sources than those beside them; build them again: make kernels") == 1
    )
    for path in [*folder.glob("*.h"), *folder.glob("*.cpp")]:
        path.unlink()  # as in a wheel
    assert not imported(package=tmp_path).stderr


def test_why_nothing_was_built_is_kept(tmp_path):
    root = native.FOLDER.parents[3]
    if not (root / "setup.py").exists():
        pytest.skip("installed without its sources")
    package(tmp_path / "src", but=["*.so"])
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    env = {**os.environ, "CC": "false", "CXX": "false", "EVERLONG_BUILDS": "portable"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True)
    said = imported(package=tmp_path / "src")
    assert re.search(
        r"no kernels were built \([Cc]ommand .*false.* exit (status|code) 1.?\); install with", said.stdout
    )
    assert "PyTorch forms" in said.stderr


def test_the_backend_of_the_environment_is_read_anew(monkeypatch):
    x = torch.zeros(3)
    monkeypatch.delenv("EVERLONG_BACKEND", raising=False)
    assert dispatch.few(x, None)
    monkeypatch.setenv("EVERLONG_BACKEND", "torch")
    assert not dispatch.few(x, None)
