"""torch.func, forward mode, batches of gradients, second gradients and checkpointing over mixers and ops.

The law "transforms" holds every mixer to this on short texts; here are texts of several chunks, what kernels take, the
builds, and what surrounds a mixer.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import test_ops
import test_pointwise
from everlong import explain, laws, numerics
from everlong.config import find, mixer_names
from everlong.laws_transforms import Case
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.ops import native
from everlong.ops.cases import Case as Inputs
from everlong.ops.gated_norm import gated_norm
from everlong.ops.linear import Linear, linear
from everlong.ops.linear_attention import linear_attention
from everlong.ops.transforms import transforming

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
LONG = 67  # tokens: more than a chunk of any form, and a rest
OP_NAMES = sorted(test_ops.MODULES)


def first_subject(name):
    return laws.subjects(find(name))[0]


@pytest.mark.parametrize("name", mixer_names())
def test_texts_of_several_chunks(name):
    case = Case(first_subject(name), torch.float64, LONG)
    case.gradients(), case.directions(), case.documents(), case.batches(), case.second_gradients()


@pytest.mark.parametrize("name", OP_NAMES)
def test_an_op_under_grad_is_the_op(name):
    """Every variant, with the gradients of every input: the forms that transforms see equal the ones that run alone."""
    for variant in getattr(test_ops.MODULES[name], "VARIANTS", (None,)):
        inputs = test_ops.MODULES[name].inputs(
            Inputs("func", batch=2, time=LONG, heads=2, keys=4, values=4, variant=variant)
        )
        free = {
            k: x for k, x in inputs.items() if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
        }
        fixed = {k: x for k, x in inputs.items() if k not in free}

        def loss(free, fixed=fixed):
            y = test_ops.op_of(name)(**free, **fixed)[0]
            return (y * y.conj()).real.cos().sum()

        leaves = {k: x.clone().requires_grad_() for k, x in free.items()}
        want = torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True)
        for (key, got), theirs in zip(grad(loss)(free).items(), want, strict=True):
            numerics.assert_close(got, theirs, f"{variant}: gradient of {key}", numerics.BOUNDS["fp64 gradient"])


def large(name):
    """Inputs of an op without a state for which its kernel is chosen."""
    made = test_pointwise.MODULES[name].inputs(
        Inputs("func", batch=2, time=80, heads=4, keys=32, variant=test_pointwise.MODULES[name].VARIANTS[0])
    )
    return {k: x.float() if test_ops.is_tensor(x) and x.is_floating_point() else x for k, x in made.items()}


@pytest.mark.parametrize("name", [n for n in test_pointwise.MODULES if n != "linear"])
def test_ops_without_a_state(name):
    inputs = large(name)
    op = getattr(test_pointwise.MODULES[name], name)
    rest = {k: v for k, v in inputs.items() if k != "x"}
    x = inputs["x"].clone().requires_grad_()
    y = op(x=x, **rest)
    y = y[1] if isinstance(y, tuple) else y
    slopes = torch.randn(3, *y.shape)
    (got,) = torch.autograd.grad(y, x, slopes, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(y, x, slope, retain_graph=True)[0] for slope in slopes]
    numerics.assert_close(got, torch.stack(want), "batched gradients")

    def call(x):
        y = op(x=x, **rest)
        return y[1] if isinstance(y, tuple) else y

    along = torch.randn_like(inputs["x"])
    value, slope = jvp(call, (inputs["x"],), (along,))
    numerics.assert_close(value, y, "value")
    numerics.assert_close(
        (slope * slopes[0]).sum()[None], (want[0] * along).sum()[None], "jvp", numerics.BOUNDS["fp32 gradient"]
    )
    if test_ops.is_tensor(rest.get("z")):
        return
    numerics.assert_close(vmap(call)(torch.stack([inputs["x"]] * 2))[1], y, "vmap")


def test_a_linear_map():
    layer, x = Linear(96, 128), torch.randn(6, 40, 96)
    parameters = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).cos().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        want = torch.autograd.grad(layer(x[i]).cos().sum(), list(layer.parameters()))
        for (name, got), theirs in zip(each.items(), want, strict=True):
            numerics.assert_close(got[i], theirs, name)
    y = linear(x.requires_grad_(), layer.weight, layer.bias)
    slopes = torch.randn(3, *y.shape)
    (got,) = torch.autograd.grad(y, x, slopes, is_grads_batched=True)
    numerics.assert_close(got, slopes @ layer.weight, "batched gradients")


def test_explain_says_that_a_transform_is_at_work():
    q, seen = torch.randn(1, 8, 2, 16), []

    def look(q):
        seen.extend(explain(linear_attention, q=q, k=q, v=q))
        return q.sum()

    grad(look)(q)
    assert not seen[0].runs and "torch.func" in seen[0].reason and seen[1].runs


def test_a_named_kernel_refuses():
    x = torch.randn(2, 80, 4, 32)
    with pytest.raises(ValueError, match="cannot run here: .*torch.func"):
        grad(lambda x: gated_norm(x, x, backend="native").sum())(x)


def tiny(name, dtype=torch.float64):
    layer = Layer.Config(mixer=first_subject(name).config, mlp=SwiGLU.Config())
    return LanguageModel.Config(vocab_size=11, d_model=64, layers=(layer,)).build().to(dtype)


@pytest.mark.parametrize("name", mixer_names())
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(name, reentrant):
    mixer = first_subject(name).module(torch.float32)
    x = torch.randn(2, 19, 64, requires_grad=True)
    results = []
    for call in (mixer, lambda x: checkpoint(mixer, x, use_reentrant=reentrant)):
        x.grad = None
        call(x)[0].square().sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)


def test_a_model_gives_gradients_per_sample():
    model = tiny("mamba")
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    tokens = torch.randint(0, 11, (3, 9))

    def loss(parameters, row):
        return torch.nn.functional.cross_entropy(functional_call(model, parameters, (row[None],))[0][0], row)

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, tokens)
    leaves = list(model.parameters())
    for i, row in enumerate(tokens):
        alone = torch.autograd.grad(torch.nn.functional.cross_entropy(model(row[None])[0][0], row), leaves)
        for name, want in zip(parameters, alone, strict=True):
            numerics.assert_close(each[name][i], want, name, numerics.BOUNDS["fp64 gradient"])


@pytest.mark.slow
@pytest.mark.parametrize("build", [*native.supported(), "off"])
def test_builds(build):
    """The law on other builds than the one that this process took."""
    if build != "off" and not (native.FOLDER / f"_{build}.so").exists():
        pytest.skip("not built")
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from everlong import laws; from everlong.config import find\n"
        "for name in ('mamba', 'rwkv7', 'rg_lru', 'slstm'):\n"
        "    laws.check(laws.subjects(find(name))[0], 'transforms')"
    )
    env = {**os.environ, "EVERLONG_NATIVE": build}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gla", "mamba", "slstm"])
def test_compiled_gradients_per_sample(name):
    torch._dynamo.reset()
    case = Case(first_subject(name), torch.float32)
    each = vmap(grad(lambda p, x, w: case.loss(p, x[None], w[None])), in_dims=(None, 0, 0))
    given = case.parameters, case.x, case.weights
    got, want = torch.compile(each, backend="eager")(*given), each(*given)
    for key, theirs in want.items():
        case.same(got[key], theirs, f"compiled gradient of {key}")


@pytest.mark.parametrize("name", ["lstm", "slstm"])
def test_a_second_gradient_is_refused_where_there_is_none(name):
    module = find(name).Config().build(64).double()
    x = torch.randn(1, 6, 64, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.functional.hessian(lambda v: module(v)[0].square().mean(), x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_graph_is_no_transform(backend):
    def told(x):
        return x + 1 if transforming() else x.clone()

    zeros = torch.zeros(2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(told, backend=backend, fullgraph=True)
    assert torch.equal(compiled(zeros), zeros)
    assert torch.equal(vmap(told)(zeros), zeros + 1)
    assert torch.equal(torch.compile(vmap(told), backend=backend, fullgraph=True)(zeros), zeros + 1)
    assert torch.equal(compiled(zeros), zeros)
