"""Models with int8 and int4 weights: close to full precision, the same laws, saved and loaded bit-equal."""

import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

import everlong
from everlong import cli, laws, numerics, state
from everlong.checkpoints.stream import continue_text
from everlong.config import find, mixer_names
from everlong.feedforward.channelmix import ChannelMix
from everlong.mixers import base
from everlong.models.blocks import MLP, Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.models.packed import PackedEmbedding, PackedLinear
from everlong.models.quantize import places, quantized
from everlong.ops import native
from everlong.ops.native import product

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"no kernels: {native.MISSING}")
QUANTISED = ("int8", "int4")
ERROR = {
    format: numerics.BOUNDS[f"{format} inputs"] for format in ("int8", "int4")
}  # of logits, from the rounding of x alone


def small(name="mamba2", mlp=None, **options):
    layer = Layer.Config(mixer=find(name).Config(), mlp=mlp)
    return LanguageModel.Config(vocab_size=100, d_model=64, layers=(layer,) * 2, **options).build().float().eval()


def spread(model):
    """Random values everywhere, so that nothing hides behind weights that begin at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "proj" in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def with_weights_of(model, packed):
    """``model`` in full precision, its weights those that ``packed`` stands for."""
    same = copy.deepcopy(model)
    for path, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            same.get_submodule(path).weight.data = module.weight
    return same


def _as_good_as(format, got, want, what):
    if format == "bf16":
        numerics.assert_close(got.bfloat16(), want.bfloat16(), what)
    else:
        numerics.assert_close(got, want, what, ERROR[format])


@pytest.fixture(params=QUANTISED)
def format(request):
    return request.param


@pytest.mark.float32("the tolerance is that of weights drawn in fp32")
@pytest.mark.parametrize("name", mixer_names())
def test_every_mixer_quantised(name, format, monkeypatch, tiles=product.TILES):
    monkeypatch.setattr(product, "TILES", tiles)
    model = spread(small(name, mlp=ChannelMix.Config() if name == "rwkv7" else SwiGLU.Config(hidden=128)))
    tokens = torch.randint(100, (3, 40))
    with torch.no_grad():
        packed = quantized(model, format)
        matrix = next(module.matrix for module in packed.layers.modules() if isinstance(module, PackedLinear))
        by_kernel = tokens.numel() <= product.native_rows(matrix)  # else many tokens go through products in bf16
        close = partial(_as_good_as, format if by_kernel or format == "int4" else "bf16")
        want, _ = with_weights_of(model, packed)(tokens)
        got, _ = packed(tokens)
        short = tokens[:, :20]  # as many as one call of the kernel takes, on every machine
        laws.same(packed(short[1:2])[0], packed(short)[0][1:2], "a row alone", ERROR[format])
        close(packed(tokens[1:2])[0], got[1:2], "a row alone, many tokens")
        first, after = packed(tokens[:, :17])
        steps = [first]
        for i in range(17, 40):
            logits, after = packed.step(tokens[:, i], after)
            steps.append(logits[:, None])
        # a last bit of x can turn a digit, so pieces agree to the size of its steps
        close(torch.cat(steps, dim=1), got, "in pieces")
    close(got, want, f"{name} in {format}")
    assert any(isinstance(module, PackedLinear) for module in packed.layers.modules())
    assert all(leaf.dtype != torch.bfloat16 for _, leaf, _ in state.leaves(after))


@pytest.mark.float32("the tolerance is that of weights drawn in fp32")
@pytest.mark.parametrize("tiles", [True, False])
def test_on_cpus_with_tiles_and_without(tiles, format, monkeypatch):
    test_every_mixer_quantised("gla", format, monkeypatch, tiles)


def test_what_is_packed_by_role():
    wide = {"mamba": {"dt_rank": 64}, "delta_net": {"n_heads": 64}, "gla": {"gate_rank": 64}}
    spared = {}
    for name in mixer_names():
        layer = Layer.Config(mixer=find(name).Config(**wide.get(name, {})))
        model = LanguageModel.Config(vocab_size=100, d_model=128, layers=(layer,)).build()
        inside = "layers.0.mixer."
        chosen = {place.path.removeprefix(inside): place for place in places(model, "int4")}
        linear = {p for p, m in model.layers[0].mixer.named_modules() if isinstance(m, nn.Linear)}
        spared[name] = sorted(linear - set(chosen))
        assert chosen["embedding"].format == "int4"
        if name == "mamba":
            assert chosen["x_proj"].format == "int8" and chosen["in_proj"].format == "int4"
        if name == "mamba2":
            assert chosen["in_proj"].kept == model.layers[0].mixer.n_heads
    assert {name: found for name, found in spared.items() if found} == {
        "delta_net": ["beta_proj"],
        "gated_delta": ["beta_proj", "decay_proj"],
        "gla": ["decay_proj.0", "decay_proj.1"],
        "hyena": ["filter.layers.0", "filter.layers.1", "filter.layers.2", "filter.out"],
        "mamba": ["dt_proj"],
        "mlstm": ["gates"],
    }


def test_names_of_roles_exist():
    """A misspelt name would quantise what must not be."""
    for name in mixer_names():
        cls = find(name)
        mixer = cls.Config().build(64)
        mixer.check_names()
        for part in (*cls.int8_at_least, *mixer.step_outputs()):
            assert isinstance(mixer.get_submodule(part), nn.Linear)


def test_outputs_that_are_steps_stay(format):
    model = small("mamba2")
    mixer, packed = model.layers[0].mixer, quantized(model, format).layers[0].mixer
    x, heads = torch.randn(5, 64, dtype=torch.float32), mixer.n_heads
    with torch.no_grad():
        want, got = mixer.in_proj(x), packed.in_proj(x)
    numerics.assert_close(got[:, -heads:], want[:, -heads:], "dt", numerics.BOUNDS["fp32 product"])
    assert numerics.relative_errors(got[:, :-heads], want[:, :-heads])[0] > numerics.BOUNDS["fp32 product"]
    assert packed.in_proj.weight.shape == mixer.in_proj.weight.shape
    numerics.assert_close(packed.in_proj.weight, mixer.in_proj.weight, "unpacked", numerics.BOUNDS[f"{format} weights"])


def test_bias_and_dtype_of_the_activations(format):
    linear = nn.Linear(64, 96, dtype=torch.float32)
    packed = PackedLinear.of(linear.weight, linear.bias, format)
    x = torch.randn(2, 3, 64, dtype=torch.float32)
    with torch.no_grad():
        numerics.assert_close(packed(x), linear(x), "bias", numerics.BOUNDS[f"{format} weights"])
        assert packed(x.bfloat16()).dtype == torch.bfloat16


def test_what_does_not_change_is_shared(format):
    model = small()
    packed = quantized(model, format)
    assert packed.layers[0].mixer.conv1d.weight.data_ptr() == model.layers[0].mixer.conv1d.weight.data_ptr()
    assert isinstance(model.layers[0].mixer.in_proj, nn.Linear) and model.weights is None
    assert packed.weights == format and not packed.training


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head(format, tied):
    model = quantized(small(tied=tied), format)
    assert isinstance(model.embedding, PackedEmbedding)
    assert model.embedding.format == (format if tied else "int8")
    assert tied or isinstance(model.head, PackedLinear)
    with pytest.raises(ValueError, match="token ids from 3 to 100, expected 0 to 99"):
        model(torch.tensor([[3, 100]]))


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv7", "attention"])
def test_saved_and_loaded_bit_equal(name, format, tmp_path):
    model = quantized(small(name, tied=name != "rwkv7"), format)
    everlong.save(model, tmp_path)
    again = everlong.load(tmp_path)
    assert again.weights == format and again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor) and again.state_dict()[key].dtype == tensor.dtype, key
    tokens = torch.randint(100, (1, 9))
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    everlong.save(again, tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_quantised_on_loading(format, tmp_path):
    model = small()
    everlong.save(model, tmp_path)
    loaded, made = everlong.load(tmp_path, weights=format), quantized(model, format)
    for key, tensor in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert everlong.load(tmp_path, weights="bf16").embedding.weight.dtype == torch.bfloat16
    assert everlong.load(tmp_path, weights="fp32").embedding.weight.dtype == torch.float32


def test_a_bf16_folder_is_quantised_with_the_rest_in_fp32(format, tmp_path):
    everlong.save(small().bfloat16(), tmp_path)
    model = everlong.load(tmp_path, weights=format)
    assert model.layers[0].mixer.conv1d.weight.dtype == torch.float32
    assert model(torch.tensor([[1, 2]]))[0].dtype == torch.float32


def test_generating_with_weights_of_your_choice(format, tmp_path, capsys, monkeypatch):
    layer = Layer.Config(mixer=find("mamba2").Config())
    everlong.save(LanguageModel.Config(vocab_size=256, d_model=64, layers=(layer,)).build(), tmp_path)
    command = ["generate", str(tmp_path), "def ", "--max-tokens", "4", "--temperature", "0", "--weights", format]
    monkeypatch.setattr(sys, "argv", ["everlong", *command])
    with pytest.raises(SystemExit):
        cli.main()
    text = "".join(
        continue_text(tmp_path, "def ", max_tokens=4, sampling=everlong.Sampling(temperature=0), weights=format)
    )
    assert capsys.readouterr().out == f"def {text}\n"


def test_without_kernels_the_result_is_the_same_and_a_warning_says_so(format, tmp_path):
    torch.manual_seed(0)
    model, tokens = small(), torch.tensor([[3, 1, 4, 1, 5]])
    everlong.save(model, tmp_path)
    code = (
        "import sys, torch, everlong; model = everlong.load(sys.argv[1], weights=sys.argv[2]);"
        "torch.save(model(torch.tensor([[3, 1, 4, 1, 5]]))[0], sys.argv[1] + '/logits.pt')"
    )
    env = {**os.environ, "EVERLONG_NATIVE": "off"}
    command = [sys.executable, "-c", code, str(tmp_path), format]
    out = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert f"{format} weights save memory but no time here: switched off" in out.stderr
    with torch.no_grad():
        numerics.assert_close(
            torch.load(tmp_path / "logits.pt"),
            quantized(model, format)(tokens)[0],
            "torch",
            numerics.BOUNDS["another machine"],
        )


def test_combinations_that_are_refused(tmp_path):
    model = small()
    everlong.save(model, tmp_path / "whole")
    everlong.save(quantized(model, "int4"), tmp_path / "int4")
    with pytest.raises(ValueError, match="saved as int4 and cannot be loaded with weights = 'int8'; load the folder"):
        everlong.load(tmp_path / "int4", weights="int8")
    with pytest.raises(ValueError, match="saved as int4 and cannot be loaded with dtype = torch.bfloat16"):
        everlong.load(tmp_path / "int4", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="weights = 'int8' or dtype = torch.float32, not both"):
        everlong.load(tmp_path / "whole", weights="int8", dtype=torch.float32)
    with pytest.raises(ValueError, match="no weight format 'int-8'; did you mean 'int8'"):
        everlong.load(tmp_path / "whole", weights="int-8")
    with pytest.raises(ValueError, match="int4 already"):
        quantized(everlong.load(tmp_path / "int4", weights="int4"), "int8")


def test_training_and_other_dtypes_are_refused(format):
    model = quantized(small(), format)
    with pytest.raises(ValueError, match="cannot be trained; train in full precision"):
        model.train()
    with pytest.raises(ValueError, match="have no gradients"):
        model.layers[0].mixer(torch.randn(1, 3, 64, dtype=torch.float32, requires_grad=True))
    before = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    for convert in (model.bfloat16, model.double, lambda: model.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="stays in float32 and cannot become"):
            convert()
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == before
    model.float().to("cpu")
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == before


def test_copies(format):
    model, tokens = quantized(small(), format), torch.tensor([[1, 2, 3]])
    again = copy.deepcopy(model)
    assert torch.equal(again(tokens)[0], model(tokens)[0]) and again.weights == format
    again.embedding.packed.zero_()
    assert not torch.equal(again(tokens)[0], model(tokens)[0])


def test_a_compiled_model(format):
    model, tokens = quantized(small("attention", mlp=MLP.Config()), format), torch.tensor([[1, 2, 3]])
    compiled = torch.compile(lambda t: model(t)[0], backend="aot_eager")
    numerics.assert_close(compiled(tokens), model(tokens)[0], "compiled", numerics.BOUNDS["fp32 product"])


def test_without_other_parameters_the_state_is_fp32(format):
    mixer = quantized(small("linear_attention"), format).layers[0].mixer
    assert not list(mixer.parameters())
    assert mixer.init_state(1).memory.dtype == torch.float32


def test_mixers_of_your_own_that_use_the_weight_itself(format):
    """Slow, but right: ``weight`` of a packed map is the matrix in fp32."""

    class Own(base.Mixer):
        memory = "none"

        def __init__(self, cfg, d_model, depth=base.Depth()):
            super().__init__(cfg, d_model, depth)
            self.proj = nn.Linear(d_model, d_model, bias=False)

        def init_state(self, batch):
            return ()

        def forward(self, x, state=None, *, starts=None):
            return torch.nn.functional.linear(x, self.proj.weight), ()

    linear = Own(Own.Config(), 64).float().proj
    packed = PackedLinear.of(linear.weight, None, format)
    x = torch.randn(3, 64)
    numerics.assert_close(
        torch.nn.functional.linear(x, packed.weight), packed(x), "weight", numerics.BOUNDS["int8 weights"]
    )
