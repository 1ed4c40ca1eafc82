"""The rules of the decoder: each honours the options it names, and refuses the others."""

import importlib
import inspect
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import everlong.ops
from everlong import numerics
from everlong.ops import native
from everlong.ops.native import guards
from everlong.ops.native.aten import RULES
from everlong.ops.native.guards import Unsupported
from everlong.ops.native.lowering import Lowering
from everlong.ops.native.program import Buffer, Instance, Program
from everlong.ops.record import Call, Recorder, lowering

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"no kernels: {native.MISSING}")


@torch.no_grad()
def replayed(function, *recorded):
    """A program of ``function``, recorded on one set of inputs: returns a function of others."""
    program, held = Program(), [torch.zeros_like(x) for x in recorded]
    dtypes = {torch.float32, torch.complex64, torch.bool}
    to = Lowering(program, RULES, dtypes, torch.zeros(1, dtype=torch.long))
    inputs = [x.clone() for x in recorded]
    for x, memory in zip(inputs, held, strict=True):
        to.bind(x, Buffer(memory.numel(), memory))
    with Recorder() as record:
        out = function(*inputs)
    to.lower(record.calls)
    assert to.known(out)
    final = to.ref(out)
    program.touch(final.buffer)
    program.finish()
    instance = Instance(program)
    view = instance.view(final, out.shape)

    def run(*others):
        for memory, x in zip(held, others, strict=True):
            memory.copy_(x)
        instance.run(0, len(program.instructions), torch.zeros(1, dtype=torch.long))
        return view.clone()

    return run


def test_every_parameter_of_a_rule_is_an_argument_of_its_operation():
    for name, rule in RULES.items():
        packet = getattr(torch.ops.aten, name)
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
        known = {argument.name for schema in schemas for argument in schema.arguments}
        shared = {other for other, same in RULES.items() if same is rule}
        for other in shared:  # a rule of several operations names what any of them has
            packet = getattr(torch.ops.aten, other)
            known |= {a.name for o in packet.overloads() for a in getattr(packet, o)._schema.arguments}
        assert guards.accepted(rule) <= known, f"{name}: {guards.accepted(rule) - known}"
        kinds = [parameter.kind for parameter in inspect.signature(rule).parameters.values()]
        assert set(kinds) == {inspect.Parameter.POSITIONAL_OR_KEYWORD}, f"{name} swallows arguments"


def other_than(argument):
    """A value for a schema argument that is not its default."""
    kind, default = str(argument.type), argument.default_value
    if "Tensor" in kind:
        return torch.ones(2)
    if "bool" in kind:
        return not default
    if "str" in kind:
        return "other"
    return [5] if "List" in kind else 5.5 if default != 5.5 else 6.5


@pytest.mark.parametrize("name", RULES)
def test_every_argument_of_an_operation_is_honoured_or_refused(name):
    rule, packet = RULES[name], getattr(torch.ops.aten, name)
    for overload in packet.overloads():
        op = getattr(packet, overload)
        for argument in op._schema.arguments:
            call = Call(op, (), {argument.name: other_than(argument)}, None)
            if argument.name in guards.accepted(rule):
                assert len(guards.options(call, rule)) == 1
            elif argument.name in guards.SHOWN | guards.BACKWARD:
                assert guards.options(call, rule) == {}
            elif argument.name == "out":
                assert op._schema.is_mutable  # refused in place
            else:
                with pytest.raises(Unsupported, match=argument.name):
                    guards.options(call, rule)


def test_every_argument_of_a_leaf_is_named_by_its_rule():
    names = [path.stem for path in Path(everlong.ops.__file__).parent.rglob("*.py") if path.stem != "__init__"]
    homes = [f"everlong.ops.{name}" for name in names] + [f"everlong.ops.native.{name}" for name in names]
    modules = [importlib.import_module(home) for home in homes if importlib.util.find_spec(home)]
    leaves = {f for module in modules for f in vars(module).values() if lowering(f) and f.__module__ == module.__name__}
    assert len(leaves) > 9
    for leaf in leaves:
        assert {*inspect.signature(leaf.lower).parameters} - {"to", "out"} == {*inspect.signature(leaf).parameters}


C = torch.linspace(-1, 1, 16)
REFUSED = "refused"
OPTIONS = {
    "add alpha": (lambda x, y: torch.add(x, y, alpha=2), REFUSED),
    "sub alpha": (lambda x, y: torch.sub(x, y, alpha=2), REFUSED),
    "rsub": (lambda x, y: torch.rsub(x, 3.0), None),
    "rsub alpha": (lambda x, y: torch.rsub(x, y, alpha=2), REFUSED),
    "div floor": (lambda x, y: torch.div(x, y, rounding_mode="floor"), REFUSED),
    "div trunc": (lambda x, y: torch.div(x, 3.0, rounding_mode="trunc"), REFUSED),
    "addcmul value": (lambda x, y: torch.addcmul(x, y, y, value=0.5), REFUSED),
    "addcmul": (lambda x, y: torch.addcmul(x, y, C), None),
    "addcdiv": (lambda x, y: torch.addcdiv(x, y, y + 9), REFUSED),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3), REFUSED),
    "sum dim": (lambda x, y: x.sum(0), None),
    "sum all": (lambda x, y: x.sum()[None], None),
    "sum dtype": (lambda x, y: x.sum(1, dtype=torch.float64), REFUSED),
    "sum keepdim": (lambda x, y: x.sum((0, 1), keepdim=True), None),
    "sum empty dims": (lambda x, y: x.sum([])[None], None),
    "sum bool": (lambda x, y: (x > 0).sum(1, dtype=torch.float32), None),
    "mean dtype": (lambda x, y: x.mean(1, dtype=torch.float64), REFUSED),
    "mean -2": (lambda x, y: x.mean(-2), None),
    "amax": (lambda x, y: x.amax(1, keepdim=True), None),
    "amin": (lambda x, y: x.amin(1), REFUSED),
    "max dim": (lambda x, y: x.max(1).values, REFUSED),
    "norm 1": (lambda x, y: torch.linalg.vector_norm(x, 1, dim=1), REFUSED),
    "norm inf": (lambda x, y: torch.linalg.vector_norm(x, math.inf, dim=1), REFUSED),
    "norm 2": (lambda x, y: torch.linalg.vector_norm(x, 2, dim=1, keepdim=True), None),
    "norm dtype": (lambda x, y: torch.linalg.vector_norm(x, dim=1, dtype=torch.float64), REFUSED),
    "norm all": (lambda x, y: torch.linalg.vector_norm(x)[None], None),
    "var": (lambda x, y: x.var(1), REFUSED),
    "softplus": (lambda x, y: F.softplus(9 * x), None),
    "softplus beta": (lambda x, y: F.softplus(x, beta=2), REFUSED),
    "softplus beta -1": (lambda x, y: F.softplus(x, beta=-1), None),
    "softplus threshold": (lambda x, y: F.softplus(x, threshold=1), REFUSED),
    "elu": (lambda x, y: F.elu(x), None),
    "elu alpha": (lambda x, y: F.elu(x, 0.5), REFUSED),
    "selu": (lambda x, y: F.selu(x), REFUSED),
    "gelu": (lambda x, y: F.gelu(x), None),
    "gelu tanh": (lambda x, y: F.gelu(x, approximate="tanh"), None),
    "clamp": (lambda x, y: x.clamp(-0.5, 0.5), None),
    "clamp crossed": (lambda x, y: x.clamp(0.5, -0.5), None),
    "clamp min": (lambda x, y: x.clamp(min=0.1), None),
    "clamp max": (lambda x, y: torch.clamp_max(x, 0.1), None),
    "clamp min of": (lambda x, y: torch.clamp_min(x, 0.1), None),
    "clamp tensors": (lambda x, y: x.clamp(y, y + 1), REFUSED),
    "clamp nan": (lambda x, y: x.clamp(max=math.nan), REFUSED),
    "pow": (lambda x, y: x.pow(3), None),
    "pow of base": (lambda x, y: 2**x, REFUSED),
    "pow tensor": (lambda x, y: (x.abs() + 1).pow(y), REFUSED),
    "pow -2": (lambda x, y: (x + 9) ** -2, None),
    "addmm": (lambda x, y: torch.addmm(C, x, C[:, None] * C), None),
    "addmm beta": (lambda x, y: torch.addmm(C, x, C[:, None] * C, beta=2), REFUSED),
    "addmm alpha": (lambda x, y: torch.addmm(C, x, C[:, None] * C, alpha=2), REFUSED),
    "baddbmm": (lambda x, y: torch.baddbmm(x[None], x[None], (C[:, None] * C)[None]), REFUSED),
    "mm of two": (lambda x, y: x @ y.t(), None),
    "mm from a constant": (lambda x, y: (C[:, None] * C) @ x.t(), None),
    "bmm": (lambda x, y: torch.bmm(x.view(3, 4, 4), y.view(3, 4, 4).mT), None),
    "cat 1": (lambda x, y: torch.cat([x, C.expand(3, 16), y], 1), None),
    "cat -2": (lambda x, y: torch.cat([x, y], -2), None),
    "cat empty": (lambda x, y: torch.cat([torch.zeros(0), x, y], 1), None),
    "stack -1": (lambda x, y: torch.stack([x, y], -1), None),
    "glu": (lambda x, y: F.glu(x.t().reshape(16, 3), 0), None),
    "where numbers": (lambda x, y: torch.where(x > 0, 1.5, y), None),
    "where both numbers": (lambda x, y: torch.where(x > 0, 1.5, 2.5), None),
    "masked_fill value": (lambda x, y: x.masked_fill(y > 0, torch.tensor(2.0)), None),
    "softmax": (lambda x, y: x.softmax(-1), REFUSED),
    "layer_norm": (lambda x, y: F.layer_norm(x, (16,), C, C + 1, 1e-3), None),
    "layer_norm of two axes": (lambda x, y: F.layer_norm(x, (3, 16)), REFUSED),
    "rms_norm": (lambda x, y: F.rms_norm(x, (16,), C, 1e-3), None),
    "normalize": (lambda x, y: F.normalize(x, dim=-1), None),
    "ones_like": (lambda x, y: x + torch.ones_like(x, dtype=torch.float64), REFUSED),
    "new_full": (lambda x, y: x + x.new_full((16,), 2.0), None),
    "empty_like": (lambda x, y: x * torch.empty_like(x), REFUSED),
    "clone format": (lambda x, y: (x.t() + 1).clone(memory_format=torch.contiguous_format), None),
    "complex": (lambda x, y: torch.view_as_real(torch.complex(x, y) * torch.complex(y, x)), None),
    "complex abs": (lambda x, y: torch.complex(x, y).abs(), REFUSED),
    "complex exp": (lambda x, y: torch.view_as_real(torch.complex(x, y).exp()), REFUSED),
    "complex128": (lambda x, y: torch.view_as_real(torch.complex(x, y).to(torch.complex128)), REFUSED),
    "double constant": (lambda x, y: x * C.double(), REFUSED),
    "double number": (lambda x, y: x * torch.tensor(0.1, dtype=torch.float64), None),
    "negated constant": (lambda x, y: x * torch.complex(C, C).conj().imag, None),
    "int constant": (lambda x, y: x * torch.arange(16) + (torch.arange(16) > 3), None),
    "eq": (lambda x, y: (x == x) * y + (x != 0.5) * 1.0, None),
    "five axes": (lambda x, y: x.view(3, 2, 2, 2, 2).permute(4, 2, 0, 3, 1) + 1, REFUSED),
}


@pytest.mark.float32("what PyTorch makes of two numbers has the default dtype")
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    function, expected = OPTIONS[name]
    recorded, others = (torch.randn(2, 3, 16).unbind(0) for _ in range(2))
    if expected is REFUSED:
        with pytest.raises(Unsupported):
            replayed(function, *recorded)
        return
    got, want = replayed(function, *recorded)(*others), function(*others)
    numerics.assert_close(got.to(want.dtype), want, name)


EDGES = torch.tensor(
    [0.0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, 0.3, -0.3, 2.0, -2.0, 15.0, -15.0, 40.0, -40.0, 90.0, -90.0]
)
NAMES = "neg abs exp expm1 sigmoid silu tanh relu sin cos square gelu softplus elu logsigmoid"
FUNCTIONS = {name: getattr(torch, name, None) or getattr(F, name) for name in NAMES.split()}
FUNCTIONS["gelu_tanh"] = lambda x: F.gelu(x, approximate="tanh")
FUNCTIONS |= {name: (lambda x, f=getattr(torch, name): f(x.abs() + 1e-30)) for name in ("log", "log1p", "sqrt")}
FUNCTIONS |= {name: (lambda x, f=getattr(torch, name): f(x.abs() + 0.01)) for name in ("rsqrt", "reciprocal")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_at_their_edges(name):
    function = FUNCTIONS[name]
    got, want = replayed(function, torch.zeros(16))(EDGES), function(EDGES)
    finite = torch.isfinite(want)
    torch.testing.assert_close(
        got[finite], want[finite], rtol=numerics.BOUNDS["fp32 product"], atol=numerics.BOUNDS["fp32 cancelled"]
    )
    assert (got[~finite] > 1e38).all()


BINARY = {
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "relu": lambda x, y: F.relu(x),
    "clamp": lambda x, y: x.clamp(-1, 1),
    "amax": lambda x, y: x.amax(-1, keepdim=True),
    "sum": lambda x, y: x.sum(-1, keepdim=True),
    "where": lambda x, y: torch.where(x == x, x, y),
    "abs": lambda x, y: x.abs(),
    "elu": lambda x, y: F.elu(x),
}


@pytest.mark.parametrize("name", BINARY)
def test_nan_stays_nan(name):
    x, y = torch.randn(2, 3, 16).unbind(0)
    broken, other = x.clone(), y.clone()
    broken[1, 3], other[2, 5] = math.nan, math.nan
    got, want = replayed(BINARY[name], x, y)(broken, other), BINARY[name](broken, other)
    torch.testing.assert_close(
        got, want, equal_nan=True, rtol=numerics.BOUNDS["fp32 angle"], atol=numerics.BOUNDS["fp32 product"]
    )
