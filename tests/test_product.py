"""Products with weights in fp32, bf16, int8 and int4: every build against exact sums, in any batch and any split."""

import ctypes

import pytest
import torch

from everlong import numerics
from everlong.ops import native
from everlong.ops.native import product as products
from everlong.ops.native.product import FORMATS, MAX_ROWS, pack, product, unpack, unpack_torch
from test_native import BUILDS

SIZES = [(48, 64), (17, 33), (100, 1000), (1, 1), (260, 67)]

pytestmark = pytest.mark.skipif(not BUILDS, reason=f"no kernels: {native.MISSING}")


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    monkeypatch.setattr(native, "_LIBRARY", ctypes.CDLL(str(native.FOLDER / f"_{request.param}.so")))
    return request.param


def rounded(x, format):
    """x as the kernels take it: bf16, 16256 steps of a row's largest value, 127 of a group's."""
    if format == "fp32":
        return x.double()
    if format == "bf16":
        return x.bfloat16().double()
    size, most = (x.shape[1], 16256) if format == "int8" else (32, 127)
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    top = groups.abs().amax(dim=2, keepdim=True)
    return ((groups * (most / top).nan_to_num(0, 0)).round().double() * top / most).flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("out,width", SIZES)
def test_product_equals_the_sums_of_the_unpacked_weights(format, out, width, build):
    packed, x = pack(torch.randn(out, width, dtype=torch.float32), format), torch.randn(23, width, dtype=torch.float32)
    want = rounded(x, format) @ unpack_torch(packed).double().T
    numerics.assert_close(product(x, packed).double(), want, format, numerics.BOUNDS["fp32 product"])


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_the_batch_nor_on_threads(format, build):
    packed, x = (
        pack(torch.randn(150, 129, dtype=torch.float32), format),
        torch.randn(MAX_ROWS, 129, dtype=torch.float32),
    )
    whole = product(x, packed)
    for rows in (slice(0, 1), slice(3, 10), slice(40, 45), slice(5, 21)):
        assert torch.equal(product(x[rows], packed), whole[rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(product(x, packed), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("format", FORMATS)
def test_unpacked_rows(format, build):
    packed, ids = pack(torch.randn(50, 70, dtype=torch.float32), format), torch.tensor([[3, 49], [0, 16]])
    whole = unpack_torch(packed)
    assert torch.equal(unpack(packed), whole)
    assert torch.equal(unpack(packed, ids), whole[ids])
    assert torch.equal(unpack(packed, ids, torch.bfloat16), whole[ids].bfloat16())


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1e30, float("inf"), float("nan")])
def test_inputs_of_any_size(format, value, build):
    packed, x = pack(torch.randn(40, 64, dtype=torch.float32), format), torch.randn(2, 64, dtype=torch.float32)
    x[0] *= value
    y = product(x, packed)
    assert torch.equal(y[1:], product(x[1:], packed))
    if abs(value) < 1e31:
        want = rounded(x, format) @ unpack_torch(packed).double().T
        numerics.assert_close(y.double(), want, "scaled", numerics.BOUNDS["fp32 product"])
    else:
        assert not torch.isfinite(y[0]).any()


def test_integer_sums_are_the_same_in_all_builds(monkeypatch):
    packed, x = pack(torch.randn(100, 300, dtype=torch.float32), "int8"), torch.randn(9, 300, dtype=torch.float32)
    results = []
    for name in BUILDS:
        monkeypatch.setattr(native, "_LIBRARY", ctypes.CDLL(str(native.FOLDER / f"_{name}.so")))
        results.append(product(x, packed))
    assert all(torch.equal(results[0], other) for other in results)


def test_sums_of_the_longest_rows_do_not_overflow(build):
    packed = pack(torch.ones(1, products.MAX_IN), "int8")
    numerics.assert_close(
        product(torch.ones(1, products.MAX_IN), packed),
        torch.full((1, 1), 65536.0),
        "ones",
        numerics.BOUNDS["fp32 angle"],
    )
    with pytest.raises(ValueError, match="at most 65536"):
        pack(torch.ones(1, products.MAX_IN + 1, dtype=torch.float32), "int8")


@pytest.mark.parametrize("format,bound", [("int8", 0.008), ("int4", 0.085)])
def test_packing_errors(format, bound):
    weight = torch.randn(64, 512, dtype=torch.float32)
    error = (unpack_torch(pack(weight, format)) - weight).norm() / weight.norm()
    assert error < bound
    assert torch.equal(
        unpack_torch(pack(torch.zeros(3, 40, dtype=torch.float32), format)), torch.zeros(3, 40, dtype=torch.float32)
    )
    with pytest.raises(ValueError, match="NaN or infinity"):
        pack(torch.full((2, 2), torch.nan, dtype=torch.float32), format)


def test_int4_scales_beat_the_largest_weight_over_seven():
    weight = torch.randn(64, 512, dtype=torch.float32)
    groups = weight.unflatten(1, (-1, 32))
    scale = groups.abs().amax(dim=2, keepdim=True) / 7
    plain = ((groups / scale).round() * scale).flatten(1) - weight
    assert (unpack_torch(pack(weight, "int4")) - weight).norm() < 0.9 * plain.norm()


@pytest.mark.parametrize("format", FORMATS)
def test_many_rows_and_compiled_graphs(format):
    packed, x = pack(torch.randn(48, 64), format), torch.randn(MAX_ROWS + 1, 64)
    numerics.assert_close(product(x, packed), x @ unpack(packed).T, "many rows", numerics.BOUNDS["bf16 state"])
    compiled = torch.compile(lambda x: product(x, packed), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x[:3]), product(x[:3], packed))


def test_unknown_formats_get_a_suggestion():
    with pytest.raises(ValueError, match="no weight format 'int-8'.*did you mean 'int8'"):
        pack(torch.ones(2, 2, dtype=torch.float32), "int-8")
