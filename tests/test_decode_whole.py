"""Decoders as wholes: what is shared, wrapped, hooked, broken or made by two at once is right; reasons are named."""

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from everlong import numerics
from everlong import state as states
from everlong.call import Handed
from everlong.config import find, mixer_names
from everlong.feedforward.channelmix import ChannelMix
from everlong.generation.decoder import Decoder
from everlong.mixers import base, rwkv7
from everlong.models.blocks import Layer
from everlong.models.lm import LanguageModel
from everlong.models.quantize import quantized
from everlong.ops import native
from everlong.ops.linear import Linear, linear
from everlong.ops.native.aten import RULES
from everlong.ops.record import Recorder, leaf, recording
from everlong.state import state
from test_decode import model_of
from test_decode_guards import both, probe

NEAR = {"rtol": numerics.BOUNDS["fp32 scan"], "atol": numerics.BOUNDS["fp32 scan"]}

needs_kernels = pytest.mark.skipif(native.MISSING is not None, reason=f"no kernels: {native.MISSING}")


def names(decoder):
    return [name for name, _ in decoder.explain()]


# ---- recorders ----


def test_a_nested_recorder_gives_back_the_outer_one():
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with Recorder() as outer:
        with Recorder() as inner:
            assert recording() is inner
            linear(x, weight)
        assert recording() is outer
        linear(x, weight)
        with pytest.raises(ZeroDivisionError), Recorder():
            1 / 0  # noqa: B018
        assert recording() is outer
    assert recording() is None
    assert [call.op for call in outer.calls] == [linear, linear]  # never what a leaf does inside
    assert [call.op for call in inner.calls] == [linear]


def test_a_leaf_that_fails_leaves_nothing_behind():
    @leaf(lambda to, out, x: None)
    def fails(x):
        raise RuntimeError("no")

    with Recorder() as record:
        with pytest.raises(RuntimeError, match="no"):
            fails(torch.ones(1))
        assert not record.inside
        linear(torch.ones(1, 1), torch.ones(1, 1))
    assert record.calls[-1].op is linear and recording() is None


def test_another_thread_is_not_recorded():
    x, weight, found = torch.randn(2, 3), torch.randn(4, 3), []
    with Recorder() as record:
        thread = threading.Thread(target=lambda: found.append((recording(), linear(x, weight))))
        thread.start()
        thread.join()
    assert found[0][0] is None and not record.calls


def test_a_step_that_fails_while_it_is_recorded_runs_in_python():
    model = probe("plain")
    model.layers[0].mixer.drop = None
    block = model.layers[0].mixer

    class Fails(type(block)):
        def step(self, x, state):
            if recording() is not None:
                raise RuntimeError("not while recorded")
            return super().step(x, state)

    block.__class__ = Fails
    decoder = both(model, 2)
    assert recording() is None
    assert native.MISSING or "not while recorded" in dict(decoder.explain())["layers.0.0"]


@needs_kernels
def test_a_decoder_made_during_a_recording():
    model = model_of("mamba")
    with Recorder() as record:
        decoder = Decoder(model, 2)
        assert recording() is record
    assert not both(model, 2, decoder=decoder).explain()


def test_decoders_of_one_model_in_two_threads():
    model, failures, ready = model_of("mamba", "gla", "attention"), [], threading.Barrier(3)

    @torch.no_grad()
    def use(seed):
        try:
            numbers = torch.Generator().manual_seed(seed)
            for _ in range(3):
                tokens = torch.randint(0, 50, (6, 2), generator=numbers)
                ready.wait()  # made at the same time, and used at the same time
                decoder, kept = Decoder(model, 2), model.init_state(2)
                for t in tokens:
                    want, kept = model.step(t, kept)
                    torch.testing.assert_close(
                        decoder.step(t), want, rtol=numerics.BOUNDS["fp32 scan"], atol=numerics.BOUNDS["fp32 scan"]
                    )
                assert native.MISSING or not decoder.explain()
        except BaseException as error:
            failures.append(error)
            ready.abort()

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- values shared between layers ----


class Sharing(base.Mixer):
    """Reads, makes and changes shared values in the ways of ``HOW``."""

    memory = "none"
    values = ("memo",)

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """Which way."""

        how: str

        def writes(self, depth):
            return ("memo",)

    def __init__(self, cfg, d_model, depth=base.Depth()):
        super().__init__(cfg, d_model, depth)
        self.proj = Linear(d_model, d_model)

    def init_state(self, batch):
        return (torch.zeros(batch, self.d_model, **self.factory),)

    def step(self, x, state, *, values):
        y, given = self.proj(x), dict(values)
        out = HOW[self.cfg.how](y, given, state[0])
        return out, (y,), Handed({k: v for k, v in given.items() if v is not values.get(k)})


Sharing.Config.owner = Sharing


def shared(*how, dtype=torch.float32):
    layers = tuple(Layer.Config(mixer=Sharing.Config(how=each)) for each in how)
    return LanguageModel.Config(vocab_size=20, d_model=16, layers=layers).build().to(dtype).eval()


def gives(value):
    def step(y, side, kept):
        side["memo"] = value(y, side, kept)
        return y

    return step


HOW = {
    "makes": gives(lambda y, side, kept: y * 2),
    "reads": lambda y, side, kept: y * side["memo"],
    "changes": gives(lambda y, side, kept: side["memo"] + y),
    "makes in python": gives(lambda y, side, kept: (y * 2).round(decimals=3)),
    "reads in python": lambda y, side, kept: (y * side["memo"]).round(decimals=3),
    "changes in python": gives(lambda y, side, kept: (side["memo"] + y).round(decimals=3)),
    "makes its state": gives(lambda y, side, kept: kept),
    "makes integers": gives(lambda y, side, kept: (9 * y).long()),
    "makes a number": gives(lambda y, side, kept: 3.0),
    "makes its output": gives(lambda y, side, kept: y),
    "in place": lambda y, side, kept: side["memo"].add_(y) * 1.0,
    "in place in python": lambda y, side, kept: side["memo"].add_(y).round(decimals=3),
}


@pytest.mark.parametrize(
    "how,python",
    [
        ("makes,reads,reads", ""),
        ("makes,reads in python,reads", "1"),
        ("makes in python,reads,reads", "0"),
        ("makes in python,reads in python,changes,reads in python,reads", "013"),
        ("makes,changes in python,reads,changes,reads in python", "14"),
        ("makes its state,reads", "0"),
        ("makes a number,reads,reads in python", "2"),
        ("makes its output,reads in python,reads", "1"),
        ("makes,in place,reads", ""),
        ("makes,in place in python,reads", "1"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_values_are_handed_over(how, python, dtype):
    decoder = both(shared(*how.split(","), dtype=dtype), 3)
    if native.MISSING is None:
        assert names(decoder) == [f"layers.{layer}.0" for layer in python]


@needs_kernels
def test_values_that_no_program_can_hold_are_named():
    decoder = both(shared("makes", "makes integers", "reads"), 2)
    assert names(decoder) == ["model", "layers.1.0"]
    assert "layers.1.0" in decoder.explain()[0][1] and "'memo'" in decoder.explain()[0][1]


@needs_kernels
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_one_odd_layer_of_rwkv7_leaves_the_others_native(odd):
    class Odd(rwkv7.RWKV7):
        def step(self, x, state, *, values=None):
            y, *rest = super().step(x, state, values=values)
            return y.round(decimals=3), *rest

    layer = Layer.Config(mixer=find("rwkv7").Config(head_size=16), mlp=ChannelMix.Config())
    model = LanguageModel.Config(vocab_size=50, d_model=64, layers=(layer,) * 3).build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.layers[odd].mixer.__class__ = Odd
    decoder = both(model, 2)
    assert names(decoder) == [f"layers.{odd}.0"] and "round" in decoder.explain()[0][1]


class Turning(base.Mixer):
    """A complex state that turns, times a real gate:  h_t = exp(-nu + i theta) a_t h_{t-1} + x_t."""

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """No options."""

    @state
    class State:
        """Real and imaginary parts side by side."""

        memory: torch.Tensor

    def __init__(self, cfg, d_model, depth=base.Depth()):
        super().__init__(cfg, d_model, depth)
        self.gate, self.out = Linear(d_model, d_model), Linear(d_model, d_model)
        self.nu, self.theta = nn.Parameter(torch.rand(d_model)), nn.Parameter(3 * torch.rand(d_model))

    def init_state(self, batch):
        return self.State(memory=torch.zeros(batch, self.d_model, 2, **self.memory_factory))

    def step(self, x, state):
        turn = torch.polar(torch.exp(-self.nu), self.theta)
        h = turn * (torch.view_as_complex(state.memory) * torch.sigmoid(self.gate(x))) + x
        return self.out(h.real), self.State(memory=torch.view_as_real(h))


def test_a_complex_state_times_a_real_gate():
    layers = (Layer.Config(mixer=Turning.Config()),) * 2
    model = LanguageModel.Config(vocab_size=50, d_model=32, layers=layers, embed_std=1.0).build().eval()
    decoder = both(model, 2, steps=8)
    assert native.MISSING or not decoder.explain()


def test_random_numbers_of_other_threads_are_left_alone():
    model, stop, drawn = model_of("attention"), threading.Event(), []

    def draw():
        while not stop.is_set():
            drawn.append(float(torch.rand(())))

    thread = threading.Thread(target=draw)
    thread.start()
    for _ in range(3):
        Decoder(model)
    stop.set()
    thread.join()
    assert len(set(drawn)) > 0.99 * len(drawn)  # 24 bits: two draws may agree


# ---- wrapped and hooked modules ----


class Adapter(nn.Module):
    """A linear map with a low-rank term, as an adapter library puts in its place."""

    def __init__(self, inner, size):
        super().__init__()
        self.inner = inner
        wide, narrow = inner.weight.shape
        self.down = nn.Parameter(size * torch.randn(2, narrow))
        self.up = nn.Parameter(size * torch.randn(wide, 2))

    def __getattr__(self, name):
        return getattr(super().__getattr__("inner"), name) if name in ("weight", "bias") else super().__getattr__(name)

    def forward(self, x):
        return self.inner(x) + x @ self.down.t() @ self.up.t()


@pytest.mark.parametrize("name", mixer_names())
def test_a_wrapper_on_any_linear_map_is_honoured(name):
    model = model_of(name, tied=False)
    maps = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for path in maps:
        parent, _, last = path.rpartition(".")
        size = 0.05 if ".filter." in path else 0.3  # sines of large angles turn rounding into another number
        setattr(model.get_submodule(parent), last, Adapter(model.get_submodule(path), size))
    assert len(maps) > 2
    both(model, 2)


@pytest.mark.parametrize("name", ["mamba", "rwkv7", "gla"])
def test_hooks_and_parametrizations_are_honoured(name):
    model = model_of(name)
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]
    nn.utils.parametrizations.weight_norm(maps[0])
    before = both(model, 2)
    assert native.MISSING or not before.explain()
    maps[1].register_forward_hook(lambda module, inputs, out: 1.5 * out)
    assert native.MISSING or "has a forward hook" in both(model, 2).explain()[0][1]


@needs_kernels
@pytest.mark.parametrize("part", ["embedding", "norm", "layers.0.mixer_norm", "layers.0.mlp_norm"])
def test_a_hook_on_any_part_of_the_model_is_honoured(part):
    model, seen = model_of("gla"), []
    model.get_submodule(part).register_forward_hook(lambda module, inputs, out: seen.append(1) or 1.5 * out)
    decoder = both(model, 2)
    assert "forward hook" in decoder.explain()[0][1]
    count = len(seen)
    decoder.step(torch.tensor([1, 2]))
    assert len(seen) == count + 1


def test_hooks_for_all_modules_are_honoured():
    model = model_of("gla")
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, out: None)
        try:
            assert native.MISSING or "forward hook" in Decoder(model).explain()[0][1]
        finally:
            handle.remove()


def test_a_model_with_a_step_of_its_own_runs_in_python():
    class Own(LanguageModel):
        def step(self, tokens, state):
            logits, state = super().step(tokens, state)
            return logits.flip(-1), state

        def step_(self, tokens, work):
            return super().step_(tokens, work).flip(-1)

    model = model_of("gla")
    model.__class__ = Own
    assert native.MISSING or "Own has its own step" in both(model, 2).explain()[0][1]


# ---- the check ----


@needs_kernels
def test_a_wrong_rule_is_found_and_its_blocks_named(monkeypatch):
    monkeypatch.setitem(RULES, "tanh", _wrong)
    decoder = both(model_of("gla", "mamba", "lstm"), 3)
    assert names(decoder) == ["layers.2.0"]
    assert "replayed, LSTM differs from its step" in decoder.explain()[0][1]


def _wrong(to, name, out, x):
    to.elementwise("sigmoid", out, x)


@needs_kernels
def test_a_wrong_head_is_found(monkeypatch):
    monkeypatch.setitem(RULES, "tanh", _wrong)
    decoder = both(model_of("mamba", logit_cap=5.0), 3)
    assert names(decoder) == ["model"] and "the head differs" in decoder.explain()[0][1]


@needs_kernels
def test_a_decoder_begins_anew_after_its_check_and_shows_what_it_cost():
    model = model_of("mamba", "attention", "mlstm")
    decoder = Decoder(model, 3)
    for (name, got, _), (_, want, _) in zip(
        states.leaves(decoder.state()), states.leaves(model.init_state(3)), strict=True
    ):
        assert torch.equal(got, want), name
    assert decoder.cost.recording > 0 and decoder.cost.checking > 0
    assert Decoder(model_of("mamba").double()).cost == (0, 0)


def test_making_a_decoder_draws_nothing_from_the_global_generator():
    model = probe("dropout", "plain").train()
    before = torch.get_rng_state()
    decoder = Decoder(model, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert native.MISSING or names(decoder) == ["layers.0.0"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_broken_weights_are_no_error_of_the_decoder(value):
    model = model_of("mamba", "gla")
    with torch.no_grad():
        model.layers[1].mixer.out_proj.weight[3, 4] = value
    decoder = Decoder(model, 2)
    with torch.no_grad():
        logits, _ = model.step(torch.tensor([1, 2]), model.init_state(2))
    torch.testing.assert_close(
        decoder.step(torch.tensor([1, 2])),
        logits,
        equal_nan=True,
        rtol=numerics.BOUNDS["fp32 scan"],
        atol=numerics.BOUNDS["fp32 scan"],
    )


@pytest.mark.parametrize("weights", ["int8", "int4"])
@needs_kernels
def test_packed_weights_pass_the_check(weights):
    assert not Decoder(quantized(model_of("rwkv7", "mamba", "mamba2", "s4d", "slstm"), weights), 2).explain()


@needs_kernels
@pytest.mark.parametrize("name", [n for n in mixer_names() if n not in ("attention", "hyena", "retention")])
def test_bf16_passes_the_check(name):
    assert not Decoder(model_of(*[name] * 4, dtype=torch.bfloat16), 4).explain()


def test_made_in_inference_mode_and_used_outside():
    model = model_of("mamba", "attention")
    with torch.inference_mode():
        decoder = Decoder(model, 2)
    both(model, 2, decoder=decoder)


@needs_kernels
def test_other_default_dtypes():
    model = model_of("mamba", "gla", "lru")
    torch.set_default_dtype(torch.float64)
    try:
        assert not both(model, 2).explain()
    finally:
        torch.set_default_dtype(torch.float32)


@needs_kernels
def test_heads_with_many_keys():
    layer = Layer.Config(mixer=find("linear_attention").Config(n_heads=1))
    model = LanguageModel.Config(vocab_size=20, d_model=1100, layers=(layer,)).build().eval()
    assert not both(model, 1, steps=2).explain()
