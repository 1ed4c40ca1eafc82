"""Every test starts from the same seed; uninitialised memory is poisoned, so reading it shows."""

import contextlib
import functools
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from everlong import config

with torch.device("meta"):  # torch notes once which functions make tensors: before they are replaced below
    torch.zeros(1)

SLOW = (
    "test_oracle_",
    "test_models.py",
    "test_native.py",
    "test_ops.py",
    "test_killed_twice",
    "::TestPeers",
    "::TestMemory",
)


OTHER_PROCESSES = (
    "test_command_line",
    "test_mutations",
    "test_trust",
    "test_house",
    "test_report",
    "test_bench_report",
)
HERE = str(Path(__file__).parent)
FACTORIES = [
    *("randn", "rand", "zeros", "ones", "full", "empty"),
    *("tensor", "as_tensor", "linspace", "eye", "arange"),
]
FP32_MODULES = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv1d, nn.RMSNorm)
DEFAULTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def pytest_addoption(parser):
    parser.addoption("--default-dtype", choices=DEFAULTS, default="float32", help="PyTorch's default in every test")


@contextlib.contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def meaning_fp32(make, anywhere=True):
    """``make`` under a default of fp32: wherever it is called, or only in tests."""

    @functools.wraps(make)
    def made(*args, **kwargs):
        if anywhere or sys._getframe(1).f_code.co_filename.startswith(HERE):
            with default(torch.float32):
                return make(*args, **kwargs)
        return make(*args, **kwargs)

    return made


class Torch(types.ModuleType):
    """What tests call torch: the tensors that they make are fp32."""

    def __init__(self):
        super().__init__("torch")
        for factory in FACTORIES:
            setattr(self, factory, meaning_fp32(lambda *args, f=factory, **kwargs: getattr(torch, f)(*args, **kwargs)))

    def __getattr__(self, name):
        return getattr(torch, name)


def subclasses(cls):
    """The class and all that are made of it."""
    return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__()))


@pytest.fixture(autouse=True)
def _default_dtype(request, monkeypatch):
    """What the library computes must not depend on the default: `make dtypes` runs the fast tests under each.

    The tensors that a test makes, and its models, are fp32 as ever; the library works on them under the other default.
    What it does with models that were made under that default is for tests/test_border.py.
    """
    name = request.config.getoption("--default-dtype")
    reason = request.node.get_closest_marker("float32")
    if name == "float32":
        yield
        return
    if reason is not None and name == reason.kwargs.get("only", name):
        pytest.skip(reason.args[0])
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(HERE) and file != __file__ and getattr(module, "torch", None) is torch:
            monkeypatch.setattr(module, "torch", Torch())
    for cls in FP32_MODULES:
        monkeypatch.setattr(cls, "__init__", meaning_fp32(cls.__init__, anywhere=False))
    for owner in subclasses(config.Config):
        if "build" in vars(owner):
            monkeypatch.setattr(owner, "build", meaning_fp32(owner.build))
    with default(DEFAULTS[name]):
        yield


def pytest_collection_modifyitems(config, items):
    """`make check` leaves out what takes longest: official code, whole models, kernels, every op on every case.

    Those that read files, or start commands, which have a default of their own, are not run under another dtype.
    """
    if config.getoption("--default-dtype") != "float32":
        items[:] = [item for item in items if item.path.stem not in OTHER_PROCESSES]
    for item in items:
        if any(name in item.nodeid for name in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.device.type == "cpu":
                tensor.detach().fill_(float("nan"))
            return tensor

        return made

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))


@pytest.fixture
def ctrl_c():
    """Presses Ctrl-C, with Python's own handler during the test: jobs in the background begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
