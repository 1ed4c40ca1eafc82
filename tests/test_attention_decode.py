"""One token of attention in place: the kernel equals the definition, for any position, window, size and dtype."""

import ctypes

import pytest
import torch

from everlong.numerics import BOUNDS, assert_close
from everlong.ops import dispatch, native
from everlong.ops.attention import Cache, Ring, attention_step
from everlong.ops.attention_decode import attention_step_

BUILDS = [build for build in native.supported() if (native.FOLDER / f"_{build}.so").exists()]
pytestmark = pytest.mark.skipif(not BUILDS, reason=f"no kernels: {native.MISSING}")


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    monkeypatch.setattr(native, "_LIBRARY", ctypes.CDLL(str(native.FOLDER / f"_{request.param}.so")))
    return request.param


def scene(positions, slots, *, groups=2, shared=3, keys=20, values=13, ring=False, dtype=torch.float32):
    """q, k, v of one token, and a cache whose rows hold that many tokens."""
    batch, position = len(positions), torch.tensor(positions)
    filled = (torch.arange(slots) < position[:, None])[..., None, None]
    held = [torch.randn(batch, slots, groups, n).masked_fill(~filled, 0.0).to(dtype) for n in (keys, values)]
    q, k, v = (
        torch.randn(batch, groups * shared, keys),
        torch.randn(batch, groups, keys),
        torch.randn(batch, groups, values),
    )
    return dict(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype)), (Ring if ring else Cache)(*held, position)


def copy(state):
    return type(state)(*(leaf.clone() for leaf in (state.k, state.v, state.position)))


SCENES = {
    "first token": dict(positions=[0, 0], slots=4),
    "rows apart": dict(positions=[0, 5, 300, 699], slots=700),
    "cache is full": dict(positions=[3, 3], slots=3),
    "no slots yet": dict(positions=[0, 0], slots=0),
    "one head, wide": dict(positions=[513], slots=600, groups=1, shared=1, keys=64, values=128),
    "grouped": dict(positions=[255, 256, 257], slots=260, groups=1, shared=10, keys=32, values=32),
    "ring, not full": dict(positions=[3, 0], slots=7, ring=True),
    "ring": dict(positions=[7, 6, 1000], slots=7, ring=True),
    "large ring": dict(positions=[100, 2000], slots=513, ring=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label", SCENES)
def test_kernel_equals_the_definition(label, dtype, build):
    tokens, state = scene(**SCENES[label], dtype=dtype)
    wide = type(state)(state.k.double(), state.v.double(), state.position)
    for scale in (None, 3.0):
        want, after = attention_step(**{key: x.double() for key, x in tokens.items()}, scale=scale, state=wide)
        got, ours = attention_step_(**tokens, scale=scale, state=copy(state), backend="native")
        assert got.dtype == dtype and torch.equal(ours.position, after.position)
        assert_close(got, want, "output", BOUNDS["fp32 product" if dtype == torch.float32 else "bf16 output"])
        slots = min(ours.k.shape[1], after.k.shape[1])
        for mine, theirs in ((ours.k, after.k), (ours.v, after.v)):
            assert torch.equal(mine[:, :slots].double(), theirs[:, :slots]) and not mine[:, slots:].any()


def test_rows_threads_and_room_change_nothing(build):
    tokens, state = scene([700, 3, 1030], 1031, keys=64, values=64)
    want, _ = attention_step_(**tokens, state=copy(state), backend="native")
    alone, _ = attention_step_(
        **{key: x[2:] for key, x in tokens.items()}, state=Cache(*(x[2:].clone() for x in vars(state).values()))
    )
    assert torch.equal(alone, want[2:])
    roomy = Cache(*(torch.cat([x, torch.zeros_like(x)], 1) for x in (state.k, state.v)), state.position)
    assert torch.equal(attention_step_(**tokens, state=roomy, backend="native")[0], want)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(attention_step_(**tokens, state=copy(state), backend="native")[0], want)
    finally:
        torch.set_num_threads(threads)


def test_in_place_until_the_cache_is_full(build):
    tokens, state = scene([4, 2], 5)
    _, after = attention_step_(**tokens, state=state)
    assert after.k.data_ptr() == state.k.data_ptr() and after.v.data_ptr() == state.v.data_ptr()
    _, grown = attention_step_(**tokens, state=after)
    assert grown.k.shape[1] == 16 and grown.k.data_ptr() != state.k.data_ptr()


def test_strided_tokens_and_caches_of_mixed_dtypes(build):
    tokens, state = scene([9, 9], 12)
    want, _ = attention_step_(**tokens, state=copy(state), backend="torch")
    laid = {key: x.transpose(0, 1).contiguous().transpose(0, 1) for key, x in tokens.items()}
    held = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (state.k, state.v)]
    got, ours = attention_step_(**laid, state=Cache(*held, state.position), backend="native")
    assert_close(got, want, "output", BOUNDS["fp32 angle"])
    assert torch.equal(ours.k[0, 9], tokens["k"][0])
    half = Cache(state.k.bfloat16(), state.v, state.position)
    lines = dispatch.explain(attention_step_, **tokens, scale=None, state=half)
    assert "one dtype" in lines[0].reason and lines[1].runs


def test_gradients_are_refused():
    tokens, state = scene([1, 1], 4)
    tokens["q"].requires_grad_()
    with pytest.raises(ValueError, match="a step in place has no gradients; call it under torch.no_grad"):
        attention_step_(**tokens, state=state, backend="native")


def test_op_is_registered_soundly():
    tokens, state = scene([3, 1], 6, shared=1)
    args = (*tokens.values(), state.k, state.v, state.position)
    torch.library.opcheck(torch.ops.everlong.attention_decode_native.default, args)
