"""The decoder: equal to ``step`` in every build and batch, native where it should be, and clear where it is not.

That it equals ``step`` for every mixer is the law "decode" (test_mixers.py).
"""

import ctypes
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from everlong import laws, numerics, state
from everlong.config import find, mixer_names
from everlong.feedforward.channelmix import ChannelMix
from everlong.generation.decoder import Decoder
from everlong.models.blocks import Layer, Norm, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.models.quantize import quantized
from everlong.ops import native
from everlong.ops.native.program import Buffer, Instruction, Program, Ref

BUILDS = [build for build in native.supported() if (native.FOLDER / f"_{build}.so").exists()]
needs_kernels = pytest.mark.skipif(not BUILDS, reason=f"no kernels: {native.MISSING}")


def model_of(*mixers, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layers = tuple(Layer.Config(mixer=find(name).Config(), mlp=SwiGLU.Config()) for name in mixers)
    model = LanguageModel.Config(vocab_size=50, d_model=64, layers=layers, **options).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def both(model, batch, tolerance=None):
    """Logits of a few steps by the decoder, held to ``step``."""
    tokens = torch.randint(0, 50, (batch, 9))
    with torch.no_grad():
        _, kept = model(tokens[:, :4])
        decoder, logits = Decoder(model, batch), []
        decoder.load(kept)
        for t in range(4, 9):
            want, kept = model.step(tokens[:, t], kept)
            logits.append(decoder.step(tokens[:, t]).clone())
            numerics.assert_close(logits[-1].to(want.dtype), want, f"step {t}", tolerance)
    return decoder, tokens, torch.stack(logits, 1)


@needs_kernels
@pytest.mark.parametrize("name", mixer_names())
def test_the_whole_step_is_native(name):
    assert not Decoder(model_of(name)).explain()


@needs_kernels
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_build(build, dtype, monkeypatch):
    monkeypatch.setattr(native, "_LIBRARY", ctypes.CDLL(str(native.FOLDER / f"_{build}.so")))
    both(model_of("rwkv7", "mamba", "mamba2", "rg_lru", "attention", "s4d", dtype=dtype), 3)


@pytest.mark.parametrize(
    "options",
    [
        dict(tied=False, embed_norm=Norm.Config(style="layer"), norm=Norm.Config(style="layer")),
        dict(embed_scale=8.0, logit_cap=5.0, residual_fp32=True),
    ],
    ids=["untied, layer norms", "scaled, capped"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_option_of_the_model(options, dtype):
    both(model_of("mamba", "gla", dtype=dtype, **options), 2)


def test_channel_mix_and_values_shared_between_layers():
    layer = Layer.Config(mixer=find("rwkv7").Config(head_size=16), mlp=ChannelMix.Config())
    model = LanguageModel.Config(vocab_size=50, d_model=64, layers=(layer,) * 3).build().float().eval()
    decoder, *_ = both(model, 2)
    assert native.MISSING or not decoder.explain()


@needs_kernels
@pytest.mark.parametrize("name", mixer_names())
def test_a_row_does_not_depend_on_its_batch(name):
    decoder, tokens, logits = both(model_of(name), 7)
    alone = Decoder(decoder.model, 1)
    with torch.no_grad():
        alone.load(state.gather(decoder.model(tokens[:, :4])[1], [5]))
    for t in range(4, 9):
        assert torch.equal(alone.step(tokens[5:6, t])[0], logits[5, t - 4])


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("options", [{}, dict(tied=False)], ids=["tied", "untied"])
def test_packed_weights(weights, options):
    model = quantized(model_of("rwkv7", "mamba", "mamba2", "attention", **options), weights)
    decoder, *_ = both(model, 3, numerics.BOUNDS["int8 decoding"])  # two paths may round an input to different digits
    assert native.MISSING or not decoder.explain()


def test_state_is_a_copy_and_load_goes_back():
    model = model_of("mamba2", "attention")
    decoder, tokens = Decoder(model, 2), torch.randint(0, 50, (2, 6))
    for t in range(3):
        decoder.step(tokens[:, t])
    kept = decoder.state()
    first = [decoder.step(tokens[:, t]).clone() for t in range(3, 6)]
    decoder.load(kept)
    assert torch.equal(torch.stack(first), torch.stack([decoder.step(tokens[:, t]).clone() for t in range(3, 6)]))
    with torch.no_grad():
        laws.same(decoder.state(), model(tokens)[1], "state")


def test_what_cannot_be_recorded_runs_all_the_same():
    model = model_of("gla").double()
    decoder, *_ = both(model, 2)
    assert "float64" in decoder.explain()[0][1]


@pytest.mark.parametrize("batch", [64, 65, 130])
def test_many_rows_are_several_programs(batch):
    model = model_of("rwkv7", "mamba2", "attention")
    decoder, tokens, logits = both(model, batch)
    with torch.no_grad():
        laws.same(decoder.state(), model(tokens)[1], "state")
    if native.MISSING is None:
        assert not decoder.explain()
    end = -(-batch // -(-batch // 64))
    alone = Decoder(model, end)
    with torch.no_grad():
        alone.load(state.gather(model(tokens[:, :4])[1], range(end)))
    for t in range(4, 9):
        assert torch.equal(alone.step(tokens[:end, t]), logits[:end, t - 4])


def test_without_kernels():
    code = (
        "import torch; from test_decode import *; d, *_ = both(model_of('mamba', 'lstm'), 2); print(d.explain()[0][1])"
    )
    env = {**os.environ, "EVERLONG_NATIVE": "off", "PYTHONPATH": os.pathsep.join([*sys.path])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert "switched off" in out.stdout


@pytest.mark.parametrize(
    "tokens,message",
    [
        (torch.tensor([1, 50]), "token ids from 1 to 50, expected 0 to 49"),
        (torch.tensor([-1, 5]), "token ids from -1 to 5"),
        (torch.tensor([1, 2, 3]), "shape"),
        (torch.tensor([1.0, 2.0]), "expected int64 ids"),
    ],
    ids=str,
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        Decoder(model_of("mamba"), 2).step(tokens)


def test_bad_states_and_batches():
    model = model_of("mamba")
    with pytest.raises(ValueError, match="holds 3 rows, expected a batch of 2"):
        Decoder(model, 2).load(model.init_state(3))
    with pytest.raises(ValueError, match="another model"):
        Decoder(model, 2).load(model_of("gla").init_state(2))
    with pytest.raises(ValueError, match="batch must be at least 1 row, got 0"):
        Decoder(model, 0)


def test_memory_is_reused_but_never_shared_by_living_values():
    program = Program()
    buffers = [Buffer(size) for size in (100, 30, 7, 100, 64, 1)]
    for a, b in itertools.pairwise(buffers):
        program.add(Instruction("copy", (1, 1, 1, 1), Ref(b, 0, (0,) * 4), [Ref(a, 0, (0,) * 4)]))
    program.touch(buffers[1])
    program.finish()
    for i, a in enumerate(buffers):
        for b in buffers[i + 1 :]:
            together = a.first <= b.last and b.first <= a.last
            apart = a.offset + a.numbers <= b.offset or b.offset + b.numbers <= a.offset
            assert apart or not together
    assert program.numbers < sum(max(16, b.numbers) for b in buffers)


@needs_kernels
def test_instructions_are_known_by_name():
    program, out = Program(), Ref(Buffer(4), 0, (0, 0, 0, 1))
    program.add(Instruction("atend", (1, 1, 1, 4), out, [out]))
    with pytest.raises(ValueError, match="the kernels have no instruction 'atend'; did you mean 'attend'"):
        program.finish()

    twice = SimpleNamespace(ev_program_kinds=lambda: 3, ev_program_kind=lambda code: b"scan")
    with pytest.raises(RuntimeError, match="two kinds of instructions are registered as scan"):
        native._kinds.__wrapped__(twice)
