"""The linear map on oneDNN equals PyTorch's own, with its gradients, for every shape and stride that models use."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from everlong import numerics
from everlong.ops import linear as module
from everlong.ops.linear import Linear, linear, precise_linear

needs_onednn = pytest.mark.skipif(not module.ONEDNN, reason="no AVX-512, so MKL serves")


@pytest.fixture(params=["all", "large"])
def worth(request, monkeypatch):
    """Every product through oneDNN, in pieces of any size; and as it is."""
    if request.param == "all":
        for name in ("WORTH", "ROWS", "SUMMED"):
            monkeypatch.setattr(module, name, 1)


either = pytest.mark.usefixtures("worth")


def both(x, weight, bias=None):
    """y and all gradients, the second ones too, of ``linear`` and of PyTorch's own."""
    results = []
    for function in (linear, F.linear):
        y = function(x, weight, bias)
        leaves = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
        if not leaves:
            results.append([y])
            continue
        slope = some(y).requires_grad_()
        grads = torch.autograd.grad(y, leaves, slope, create_graph=True)
        total = sum((g * some(g)).sum() for g in grads)
        second = torch.autograd.grad(total, [*leaves, slope], allow_unused=True)
        results.append([y, *grads, *second])
    return results


def some(like):
    """Numbers that depend on the shape alone."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(like.numel()))


def agree(x, weight, bias=None):
    for i, (got, want) in enumerate(zip(*both(x, weight, bias), strict=True)):
        assert (got is None) == (want is None)
        if want is not None:
            assert got.shape == want.shape and got.dtype == want.dtype
            numerics.assert_close(got, want, f"result {i}", numerics.BOUNDS["fp32 product"])


@either
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 7, 5), (2, 3, 2, 5), (0, 5), (3, 0, 5)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("needs", ["x weight bias", "x", "weight", "bias", ""])
def test_values_and_gradients(shape, biased, needs):
    x, weight, bias = torch.randn(shape), torch.randn(4, 5), torch.randn(4) if biased else None
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            tensor.requires_grad_(name in needs.split())
    agree(x, weight, bias)


def odd(size):
    """A vector whose storage begins one number later than memory is aligned."""
    return torch.randn(size + 1)[1:]


BIASES = {
    "column": lambda n: torch.randn(n, 2)[:, 0],
    "expanded": lambda n: torch.randn(1).expand(n),
    "reversed columns": lambda n: torch.randn(3, n).t()[:, 1],
    "every third": lambda n: torch.randn(3 * n)[::3],
    "odd offset": odd,
    "negated view": lambda n: torch.randn(n, dtype=torch.complex64).conj().imag,
}
MATRICES = {
    "dense": lambda m, n: torch.randn(m, n),
    "transposed": lambda m, n: torch.randn(n, m).t(),
    "columns": lambda m, n: torch.randn(m, n + 5)[:, 2 : n + 2],
    "rows of a transposed one": lambda m, n: torch.randn(n, m + 5).t()[3 : m + 3],
    "every second column": lambda m, n: torch.randn(m, 2 * n)[:, ::2],
    "one row, many times": lambda m, n: torch.randn(1, n).expand(m, n),
    "one column, many times": lambda m, n: torch.randn(m, 1).expand(m, n),
    "one number": lambda m, n: torch.randn(1, 1).expand(m, n),
    "overlapping": lambda m, n: torch.randn(m + n).as_strided((m, n), (1, 1)),
    "odd offset": lambda m, n: odd(m * n).view(m, n),
    "negated view": lambda m, n: torch.randn(m, n, dtype=torch.complex64).conj().imag,
    "odd strides of size one": lambda m, n: torch.randn(m * n + 7).as_strided((m, n), (n if m > 1 else 7, 1)),
}


@either
@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_bias_is_read_by_its_strides(kind, rows):
    x, weight = torch.randn(rows, 48), torch.randn(64, 48)
    agree(x, weight, BIASES[kind](64))
    agree(x, weight, BIASES[kind](64).detach().requires_grad_())


@needs_onednn
def test_a_large_product_reads_a_bias_by_its_strides():
    x, weight = torch.randn(512, 64), torch.randn(64, 64)
    for kind in BIASES:
        agree(x, weight, BIASES[kind](64))


@either
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("of", ["x", "weight"])
@pytest.mark.parametrize("sizes", [(1, 9, 7), (6, 1, 7), (6, 9, 1), (19, 33, 17)], ids=str)
def test_strides(kind, of, sizes):
    rows, inputs, outputs = sizes
    x = MATRICES[kind if of == "x" else "dense"](rows, inputs)
    weight = MATRICES[kind if of == "weight" else "dense"](outputs, inputs)
    agree(x, weight, torch.randn(outputs))
    agree(x.detach().requires_grad_(), weight.detach().requires_grad_(), torch.randn(outputs, requires_grad=True))


@either
def test_x_of_many_axes_and_strides():
    for x in (torch.randn(4, 3, 5).transpose(0, 1), torch.randn(1, 3, 5).expand(4, 3, 5), torch.randn(5, 3, 4).mT):
        agree(x.requires_grad_(), torch.randn(6, x.shape[-1], requires_grad=True))


@either
@pytest.mark.parametrize("sizes", [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0)], ids=str)
def test_sizes_of_zero(sizes):
    rows, inputs, outputs = sizes
    tensors = [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]
    agree(*tensors)
    agree(*(t.requires_grad_() for t in tensors))


@either
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 128, 300, 511, 1999])
def test_pieces_are_the_whole(rows):
    x, weight, bias = torch.randn(rows, 70), torch.randn(90, 70), torch.randn(90)
    got, want = (f(*(t.requires_grad_() for t in (x, weight, bias))) for f in (linear, F.linear))
    numerics.assert_close(got, want, "y", numerics.BOUNDS["fp32 product"])
    slope = torch.randn_like(want)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, weight, bias), slope) for y in (got, want)), strict=True):
        numerics.assert_close(ours, theirs, "gradient", numerics.BOUNDS["fp32 product"])


@pytest.mark.parametrize(
    "shapes", [((3, 4), (5, 6), None), ((3, 4), (4,), None), ((), (5, 4), None), ((3, 4), (5, 4), (6,))], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_that_do_not_fit(shapes, dtype):
    with pytest.raises(ValueError, match="has shape .* expected"):
        linear(*(None if shape is None else torch.randn(shape, dtype=dtype) for shape in shapes))


@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 1), ()], ids=str)
def test_a_bias_of_another_shape(shape):
    with pytest.raises(ValueError, match="bias has shape"):
        linear(torch.randn(3, 4), torch.randn(5, 4), torch.randn(shape))


def test_a_bias_of_another_dtype_is_pytorchs_own():
    given = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        F.linear(*given)
    with pytest.raises(RuntimeError):
        linear(*given)


def test_other_dtypes_and_autocast_are_pytorchs_own():
    double = torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(linear(double, double), F.linear(double, double))
    single = double.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(single, single).dtype == torch.bfloat16


class Doubled(torch.Tensor):
    """A weight that counts twice in every linear map, as quantised weights hook in."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        y = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * y if func is F.linear else y


def test_subclasses_of_tensors_are_asked():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert torch.equal(linear(x, weight.as_subclass(Doubled)).as_subclass(torch.Tensor), 2 * F.linear(x, weight))
    layer = Linear(4, 5, bias=False)
    layer.weight = nn.Parameter(weight.as_subclass(Doubled))
    assert torch.equal(layer(x).detach().as_subclass(torch.Tensor), 2 * F.linear(x, weight))


@needs_onednn
def test_onednn_is_really_used(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_onednn", lambda *given: calls.append(1) or F.linear(*given))
    layer, x = Linear(128, 256), torch.randn(2, 128, 128, requires_grad=True)
    layer(x).sum().backward()
    assert len(calls) == 3  # y, dx, dW


@needs_onednn
def test_onednn_never_sees_a_matrix_with_gaps(monkeypatch):
    monkeypatch.setattr(module, "WORTH", 1)
    seen = []
    monkeypatch.setattr(module, "_onednn", lambda x, weight, bias: seen.append(weight) or F.linear(x, weight, bias))
    x = torch.randn(8, 9)[:, :5].requires_grad_()  # a part of a projection, as dt is in Mamba
    linear(x, torch.randn(4, 9)[:, 2:7].requires_grad_()).sum().backward()
    assert len(seen) == 3
    assert all(w.is_contiguous() or w.t().is_contiguous() for w in seen)


@needs_onednn
def test_onednn_sees_few_shapes(monkeypatch):
    """It keeps a program for each: texts of all lengths may not become programs of all shapes."""
    seen = set()
    monkeypatch.setattr(module, "_onednn", lambda x, w, b: seen.add((x.shape, w.shape)) or F.linear(x, w, b))
    layer = Linear(96, 192)
    for rows in range(1, 3000, 7):
        layer(torch.randn(rows, 96)).sum().backward()
    assert 0 < len(seen) < 30


@needs_onednn
@pytest.mark.slow
def test_a_compiled_map_takes_all_lengths():
    """Pieces are cut when the graph runs, whatever length it was compiled for."""
    torch._dynamo.reset()
    layer = Linear(96, 192)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (300, 512, 700):
        x = torch.randn(rows, 96)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = compiled(mine), F.linear(theirs, layer.weight, layer.bias)
        numerics.assert_close(got, want, "y", numerics.BOUNDS["fp32 product"])
        for y, leaf in ((got, mine), (want, theirs)):
            leaf.found = torch.autograd.grad(y.cos().sum(), [leaf, *layer.parameters()])
        for ours, wanted in zip(mine.found, theirs.found, strict=True):
            numerics.assert_close(ours, wanted, "gradient", numerics.BOUNDS["fp32 product"])


@needs_onednn
def test_opcheck():
    x, weight, bias = (torch.randn(*shape) for shape in ((300, 64), (128, 64), (128,)))
    for given in (bias, None):
        torch.library.opcheck(module._rows_op, (x, weight, given))
    torch.library.opcheck(module._summed_op, (torch.randn(600, 128), torch.randn(600, 64)))


@needs_onednn
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_of_new_lengths_is_bounded():
    code = "from everlong.bench.lengths import memory_of_prompts; print(memory_of_prompts(60))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20  # MiB; 330 where each length is compiled


@pytest.mark.parametrize("rows", [1, 128, 129, 1000])
@pytest.mark.parametrize("graph", [True, False])
def test_fp32_weights_keep_their_digits_for_bf16_inputs(rows, graph):
    """As good as the fp32 product, rounded once: half an ulp of bf16, of which rounded weights make more."""
    x, weight = torch.randn(2, rows, 48, dtype=torch.bfloat16), torch.randn(96, 48, dtype=torch.float32)
    weight.requires_grad_(graph)
    y = precise_linear(x, weight)
    assert y.dtype == torch.bfloat16 and y.shape == (2, rows, 96)
    want = x.double() @ weight.detach().double().T
    best, rounded = want.to(torch.bfloat16).double(), x.double() @ weight.detach().to(torch.bfloat16).double().T
    error = (y.detach().double() - want).norm()
    assert error < 1.01 * (best - want).norm() < 1.2 * (rounded.to(torch.bfloat16).double() - want).norm()
    if graph:
        (grad,) = torch.autograd.grad(y.float().sum(), weight)
        numerics.assert_close(grad, x.float().sum((0, 1)).expand(96, 48).contiguous(), "gradient")
