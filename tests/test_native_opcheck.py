"""Every custom op of the native kernels through PyTorch's ``opcheck``: schema, fake kernel, autograd, tracing."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import test_pointwise
from everlong import state
from everlong.ops import native
from everlong.ops.cases import Case
from everlong.ops.native.selective_scan import selective_scan_native
from test_native import BUILDS, KERNELS, single
from test_ops import MODULES, is_tensor, later_state, op_of, some_starts

pytestmark = pytest.mark.skipif(not BUILDS, reason=f"no kernels: {native.MISSING}")
CUSTOM_OP = type(selective_scan_native.__globals__["_forward"])


def registered():
    """The names of the custom ops that the modules of the native folder define."""
    modules = [importlib.import_module(f"{native.__name__}.{path.stem}") for path in native.FOLDER.glob("[!_]*.py")]
    return {op._opoverload.name() for module in modules for op in vars(module).values() if isinstance(op, CUSTOM_OP)}


class Recorder(TorchDispatchMode):
    """Keeps the arguments of the last call of each of our custom ops."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "everlong":
            assert not kwargs, f"{func} is called with arguments by name"
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


def recorded(name, variant, *, plain):
    """The custom ops that an op calls: forward alone (``plain``), or with a state, starts and the backward pass."""
    case = Case("opcheck", batch=2, time=19, heads=2, keys=3, values=5, variant=variant)
    inputs = {k: single(x) for k, x in MODULES[name].inputs(case).items()}
    if plain:
        with Recorder() as recorder:
            op_of(name)(**inputs, backend="native")
        return recorder.calls
    leaves = [x.requires_grad_() for x in inputs.values() if is_tensor(x) and (x.is_floating_point() or x.is_complex())]
    given = {"state": state.map_leaves(single, later_state(name, case)), "starts": some_starts(case)}
    with Recorder() as recorder:
        y, _ = op_of(name)(**inputs, **given, backend="native")
        torch.autograd.grad((y * y.conj()).real.sum(), leaves, allow_unused=True)
    return recorder.calls


def recorded_pointwise(name, variant):
    """The same for an op without a state."""
    case = Case("opcheck", batch=2, time=5, heads=2, keys=3, variant=variant)
    inputs = {k: single(x) for k, x in test_pointwise.MODULES[name].inputs(case).items()}
    leaves = [x.requires_grad_() for x in inputs.values() if is_tensor(x) and x.is_floating_point()]
    with Recorder() as recorder:
        y = test_pointwise.form(name, "native")(**inputs)
        torch.autograd.grad(y.square().sum(), leaves)
    return recorder.calls


def fresh(x, tracked):
    """A copy of an argument, which is differentiated where the op has a backward pass."""
    return x.detach().clone().requires_grad_(tracked and x.is_floating_point()) if is_tensor(x) else x


@pytest.mark.parametrize("plain", [True, False], ids=["forward alone", "with gradients"])
@pytest.mark.parametrize("name,variant", KERNELS)
def test_opcheck(name, variant, plain):
    calls = recorded(name, variant, plain=plain)
    assert calls, "the native row of the op calls no custom op of the namespace everlong"
    for op, args in calls.items():
        tracked = not plain and "backward" not in op.name()
        torch.library.opcheck(op, tuple(fresh(x, tracked) for x in args))


@pytest.mark.parametrize("name,variant", test_pointwise.KERNELS)
def test_opcheck_of_ops_without_a_state(name, variant):
    for op, args in recorded_pointwise(name, variant).items():
        torch.library.opcheck(op, tuple(fresh(x, "backward" not in op.name()) for x in args))


def test_every_custom_op_is_checked():
    seen = {op.name() for name, variant in KERNELS for op in recorded(name, variant, plain=False)}
    seen |= {op.name() for name, variant in test_pointwise.KERNELS for op in recorded_pointwise(name, variant)}
    seen.add("everlong::attention_decode_native")  # in test_attention_decode.py
    seen |= {"everlong::rg_lru_gates_native", "everlong::rg_lru_gates_native_backward"}  # in test_rg_lru_gates.py
    seen |= {"everlong::product", "everlong::unpack"}  # of packed weights, no rows of a table: in test_product.py
    assert not registered() - seen, "no case of an op with a native row calls these"
