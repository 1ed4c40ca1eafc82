"""Models in bf16 and fp16: what mixers call full precision stays in fp32, whichever way the model was converted."""

import pytest
import torch

import everlong
from everlong import laws, numerics, state
from everlong.config import find, mixer_names
from everlong.generation.decoder import Decoder
from everlong.mixers import base
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.models.quantize import quantized

TOKENS = torch.randint(0, 50, (2, 100), generator=torch.Generator().manual_seed(0))
HALF = torch.bfloat16


def language_model(name):
    layer = Layer.Config(mixer=find(name).Config(), mlp=SwiGLU.Config(hidden=64))
    cfg = LanguageModel.Config(vocab_size=50, d_model=64, layers=(layer, layer))
    return laws.Subject(name, cfg, cfg.build).module(torch.float32)


def ways(model, folder):
    """Every way to the same weights in bf16."""
    everlong.save(model, folder)
    yield "to", everlong.load(folder).to(HALF)
    yield "bfloat16", everlong.load(folder).bfloat16()
    yield "quantized", quantized(model, "bf16")
    yield "load, dtype", everlong.load(folder, dtype=HALF)
    yield "load, weights", everlong.load(folder, weights="bf16")
    everlong.save(model.double().to(HALF), folder)
    yield "from fp64, saved and read", everlong.load(folder)


@pytest.mark.parametrize("name", mixer_names())
def test_bf16_spares_decays_and_steps(name, tmp_path):
    model = language_model(name)
    wide, weights = base.spared(model), {key: p.clone() for key, p in model.named_parameters()}
    with torch.no_grad():
        want, final = model(TOKENS)
    for way, half in ways(model, tmp_path):
        for key, p in half.named_parameters():
            assert p.dtype == (torch.float32 if key in wide else HALF), f"{key} is {p.dtype} {way}"
            assert torch.equal(p.float(), weights[key] if key in wide else weights[key].to(HALF).float()), (key, way)
        with torch.no_grad():
            got, ours = half(TOKENS)
        assert got.dtype == HALF
        numerics.assert_close(got, want.to(HALF), f"logits in bf16, {way}")
        for (leaf, mine, _), (_, theirs, _) in zip(state.leaves(ours), state.leaves(final), strict=True):
            recurrent = leaf.rpartition(".")[2] in ("memory", "cell", "m")
            assert mine.dtype == (HALF if theirs.is_floating_point() and not recurrent else theirs.dtype), leaf


@pytest.mark.parametrize("name", mixer_names())
def test_a_bf16_model_steps_trains_and_decodes(name):
    exact, model = language_model(name), language_model(name).to(HALF)
    with torch.no_grad():
        got, final = model(TOKENS[:, :20])
        stepped, ours = laws._steps(model.step, TOKENS[:, :20], model.init_state(2))
    numerics.assert_close(stepped, got, "steps")
    state.check_like(ours, final, 2)
    assert Decoder(model, 2).explain() == Decoder(exact, 2).explain()
    model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    model.to(torch.float16)
    for key, p in model.named_parameters():
        assert p.grad.dtype == p.dtype and bool(p.grad.isfinite().all()), key
        assert p.dtype == (torch.float32 if key in base.spared(model) else torch.float16), key
    assert all(p.dtype == torch.float64 for p in model.double().parameters())


@pytest.mark.parametrize("name", mixer_names())
def test_weights_that_were_narrowed_before_run_as_they_are(name):
    """Folders of before hold all in bf16."""
    model = language_model(name)
    model.load_state_dict({key: x.to(HALF) for key, x in model.state_dict().items()}, assign=True)
    with torch.no_grad():
        got, final = model(TOKENS[:, :20])
        stepped, ours = laws._steps(model.step, TOKENS[:, :20], model.init_state(2))
        numerics.assert_close(stepped, got, "steps")
        state.check_like(ours, final, 2)


@pytest.mark.parametrize("name", mixer_names())
def test_a_mixer_alone_is_converted_alike(name):
    mixer = find(name).Config().build(64)
    wide = {key for key, _ in mixer._spared()}
    assert {key for key, p in mixer.half().named_parameters() if p.dtype == torch.float32} == wide
    assert all(p.dtype == torch.float32 for p in mixer.float().parameters())
    y, _ = mixer.to(HALF)(torch.randn(1, 5, 64, dtype=HALF))
    assert y.dtype == HALF


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_a_wrapped_model_is_not_quantised_in_silence(format):
    model = language_model("gla")
    torch.nn.utils.parametrizations.weight_norm(model.layers[0].mixer.q_proj)
    with pytest.raises(ValueError, match=r"names differ, first 'layers.0.mixer.q_proj.*merge adapters and remove"):
        quantized(model, format)
