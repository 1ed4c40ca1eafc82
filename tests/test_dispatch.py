"""Which row of an op runs: by what it is called with, by who asks for one; and what an op says of itself."""

import importlib
import inspect
import pkgutil
import threading

import pytest
import torch

import everlong
from everlong.ops import dispatch
from everlong.ops.cases import Case
from everlong.ops.linear import linear
from everlong.ops.linear_attention import linear_attention
from everlong.ops.norm import norm

MODULES = [
    importlib.import_module(f"everlong.ops.{module.name}") for module in pkgutil.iter_modules(everlong.ops.__path__)
]
OPS = {m.TABLE.name: m for m in MODULES if hasattr(m, "TABLE") and hasattr(m, "inputs")}
TABLE = dispatch.Table(
    "probe",
    dispatch.Impl("native", lambda x: x + 1, lambda x: "x is large" if x.numel() > 4 else None),
    dispatch.Impl("torch", lambda x: x + 2),
    dispatch.Impl("reference", lambda x: x + 3),
)
X = torch.zeros(3)


@dispatch.op(TABLE, operations=lambda inputs: float(inputs["x"].numel()))
def probe(x, *, backend=None):
    """Says by its result which row has run."""
    return dispatch.run(TABLE, dict(x=x), backend)


def ran(x=X, backend=None, op=probe):
    return {1: "native", 2: "torch", 3: "reference"}[int(op(x, backend=backend)[0])]


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch):
    monkeypatch.delenv("EVERLONG_BACKEND", raising=False)


def compiled():
    torch.compiler.reset()
    return torch.compile(probe, fullgraph=True, backend="eager")


@pytest.mark.parametrize("make", [lambda: probe, compiled], ids=["eager", "compiled"])
def test_a_call_goes_before_a_block_and_a_block_before_the_environment(make, monkeypatch):
    op = make()
    assert ran(op=op) == "native" and ran(torch.zeros(5), op=op) == "torch"
    monkeypatch.setenv("EVERLONG_BACKEND", "reference")
    assert ran(op=op) == "reference"
    with dispatch.backend("torch"):
        assert ran(op=op) == "torch" and ran(backend="native", op=op) == "native"
        with dispatch.backend("native"):
            assert ran(op=op) == "native"
    assert ran(op=op) == "reference"
    monkeypatch.setenv("EVERLONG_BACKEND", "")
    assert ran(op=op) == "native"


@pytest.mark.parametrize("make", [lambda: probe, compiled], ids=["eager", "compiled"])
def test_a_block_may_let_the_op_choose_again(make, monkeypatch):
    op = make()
    monkeypatch.setenv("EVERLONG_BACKEND", "reference")
    with dispatch.backend("torch"), dispatch.backend(None):
        assert dispatch.named() is None
        assert ran(op=op) == "native" and ran(torch.zeros(5), op=op) == "torch"
        x = torch.randn(2, 8)
        assert torch.equal(norm(x), norm(x, backend="torch")) and norm.explain(x)[1].runs
    assert ran(op=op) == "reference"


@pytest.mark.parametrize("make", [lambda: probe, compiled], ids=["eager", "compiled"])
def test_a_block_is_its_threads_own(make):
    op, found, inside, checked = make(), [], threading.Event(), threading.Event()

    def elsewhere():
        found.append(ran(op=op))
        with dispatch.backend("torch"):
            found.append(ran(op=op))
            inside.set()
            checked.wait(60)

    thread = threading.Thread(target=elsewhere, daemon=True)
    try:
        with dispatch.backend("reference"):
            assert ran(op=op) == "reference"
            thread.start()
            assert inside.wait(60) and ran(op=op) == "reference"
        assert ran(op=op) == "native"
    finally:
        checked.set()
    thread.join()
    assert found == ["native", "torch"] and dispatch.named() is None


def test_a_block_ends_where_an_error_leaves_it():
    with pytest.raises(KeyError), dispatch.backend("torch"):
        raise KeyError
    assert dispatch.named() is None
    for name in ("", torch):
        with pytest.raises(ValueError, match="backend is .*expected the name of a row"), dispatch.backend(name):
            pass


def test_what_no_op_has_and_what_a_row_refuses_is_an_error(monkeypatch):
    with (
        pytest.raises(ValueError, match="probe has no backend 'torhc'; did you mean 'torch'"),
        dispatch.backend("torhc"),
    ):
        probe(X)
    monkeypatch.setenv("EVERLONG_BACKEND", "native")
    with pytest.raises(ValueError, match="backend 'native' of probe cannot run here: x is large; leave backend=None"):
        probe(torch.zeros(5))


def choices(name, monkeypatch):
    """The op on some inputs, its inputs, and where to read which row ran: ``few`` takes the torch form unasked."""
    rows, choose = [], dispatch.choose

    def watched(table, inputs, backend):
        row = choose(table, inputs, backend)
        if table.name == name:
            rows.append(row.name)
        return row

    monkeypatch.setattr(dispatch, "choose", watched)
    return getattr(OPS[name], name), rows


@pytest.mark.parametrize("name", OPS)
def test_explain_names_the_row_that_runs(name, monkeypatch):
    op, rows = choices(name, monkeypatch)
    for variant in getattr(OPS[name], "VARIANTS", (None,)):
        for time in (2, 300):
            case = Case("explained", time=time, heads=4, dtype=torch.float32, variant=variant)
            inputs = OPS[name].inputs(case)
            for asked in (None, *(row.name for row in op.table)):
                lines = op.explain(**inputs, backend=asked)
                assert lines == everlong.explain(op, **inputs, backend=asked)
                assert [line.backend for line in lines] == [row.name for row in op.table]
                assert all(line.runs != bool(line.reason) for line in lines)
                told = next((line.backend for line in lines if line.runs), None)
                for in_block in (False, True):
                    rows.clear()
                    try:
                        with dispatch.backend(asked if in_block else None):
                            op(**inputs, backend=None if in_block else asked)
                    except ValueError as error:
                        assert told is None and dict((b, r) for b, _, r in lines)[asked] in str(error)
                        continue
                    assert (rows or ["torch"])[0] == told, (variant, time, asked)


def test_explain_knows_of_a_block_and_of_the_environment(monkeypatch):
    q = torch.randn(1, 70, 2, 16)
    with dispatch.backend("reference"):
        lines = linear_attention.explain(q, q, q)
    assert [line.backend for line in lines if line.runs] == ["reference"]
    assert {line.reason for line in lines if not line.runs} == {"backend 'reference' is asked for"}
    monkeypatch.setenv("EVERLONG_BACKEND", "torch")
    assert [line.backend for line in norm.explain(q) if line.runs] == ["torch"]


def test_explain_refuses_what_the_op_would():
    q = torch.randn(1, 7, 2, 16)
    with pytest.raises(ValueError, match="linear_attention: missing a required argument: 'v'; explain it with what"):
        linear_attention.explain(q, k=q)
    with pytest.raises(ValueError, match="linear_attention: got an unexpected keyword argument 'decay'"):
        linear_attention.explain(q, q, q, decay=q)
    with pytest.raises(ValueError, match="'linear' has no table of implementations, expected an op like norm"):
        everlong.explain(linear, q)


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_the_function_that_it_was(name):
    op, module = getattr(OPS[name], name), OPS[name]
    assert inspect.isfunction(op) and op.__doc__ and op.__name__ == name == op.table.name
    assert inspect.signature(op).parameters["backend"].default is None
    assert op.table.sequence == getattr(module, "SEQUENCE", ()) and (op.step is None) == (not op.table.sequence)


@pytest.mark.parametrize("name", OPS)
def test_operations_grow_with_the_text_and_need_no_optional_inputs(name):
    """Twice the text is twice the work, of attention four times it, of an FFT a little more."""
    op, module = getattr(OPS[name], name), OPS[name]
    variant = getattr(module, "VARIANTS", (None,))[0]
    once, twice = (module.inputs(Case("counted", time=time, variant=variant)) for time in (1024, 2048))
    ratio = op.operations(twice) / op.operations(once)
    low, high = {"attention": (3.9, 4.0), "long_conv": (2.0, 2.5)}.get(name, (2.0, 2.0))
    assert low <= ratio <= high
    given = {key: x for key, x in once.items() if x is not None}
    assert op.operations(given) == op.operations(once) > 0
