"""The border to C++: every pointer is checked, whatever reaches it; builds are named, chosen and told apart rightly."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import test_native_opcheck
import test_pointwise
from everlong.models.decode import Decoder
from everlong.ops import native
from everlong.ops.attention import Cache
from everlong.ops.attention_decode import attention_step_
from everlong.ops.native import product, signatures
from everlong.ops.native.rg_lru_gates import rg_lru_gates_native
from everlong.ops.rg_lru_gates import inputs as gate_inputs
from test_decode import model_of
from test_native import BUILDS, KERNELS
from test_ops import Case

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
        packed = product.pack(torch.randn(48, 64), "int8")
        product.product(torch.randn(3, 64), packed)
        product.unpack(packed, torch.tensor([1, 2]))
        cache = Cache(*torch.zeros(2, 2, 5, 2, 4), torch.zeros(2, dtype=torch.int64))
        attention_step_(*torch.randn(3, 2, 2, 4), state=cache, backend="native")
        Decoder(model_of("mamba"), 2).step(torch.tensor([1, 2]))
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
    assert set(found) == {"ev_product_scratch", "ev_program_instruction_bytes"}, "an entry point without a signature"


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
from everlong.ops import native
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
    with pytest.raises(ValueError, match="ev_attention_decode: a position below 0"):
        attention_step_(*torch.randn(3, 2, 2, 4), state=cache, backend="native")
    last = torch.full((2,), 2**63 - 1)
    args = list(calls()["ev_attention_decode"])
    args[signatures.table()["ev_attention_decode"].names.index("position")] = last
    native.call("ev_attention_decode", *args)
