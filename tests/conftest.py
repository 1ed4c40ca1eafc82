"""Every test starts from the same seed; uninitialised memory is poisoned, so reading it shows."""

import pytest
import torch

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


DEFAULTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def pytest_addoption(parser):
    parser.addoption("--default-dtype", choices=DEFAULTS, default="float32", help="PyTorch's default in every test")


@pytest.fixture(autouse=True)
def _default_dtype(request):
    """What the library computes must not depend on the default: `make dtypes` runs the fast tests under each."""
    reason = request.node.get_closest_marker("float32")
    name = request.config.getoption("--default-dtype")
    if reason is not None and name != "float32" and name in reason.kwargs.get("but", name):
        pytest.skip(reason.args[0])
    torch.set_default_dtype(DEFAULTS[name])
    yield
    torch.set_default_dtype(torch.float32)


def pytest_collection_modifyitems(items):
    """`make check` leaves out what takes longest: official code, whole models, kernels, every op on every case."""
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
