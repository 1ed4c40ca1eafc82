"""Models that are wrapped, shared, mixed or changed: saved and loaded right, or refused at once with the reason."""

import copy

import pytest
import torch
from torch import nn

import everlong
from everlong.config import find
from everlong.files import read_tensors
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.models.quantize import quantized
from everlong.train import checkpoint
from everlong.train.data import Corpus
from everlong.train.loop import Trainer

TOKENS = torch.randint(0, 100, (2, 12))


def small(mixer="gla", seed=0, **changes):
    torch.manual_seed(seed)
    layer = Layer.Config(mixer=find(mixer).Config(), mlp=SwiGLU.Config())
    return LanguageModel.Config(**{"vocab_size": 256, "d_model": 64, "layers": (layer,) * 2, **changes}).build().eval()


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_layer(model):
    model.layers[0].mixer = torch.compile(model.layers[0].mixer, backend="eager")
    return model


WRAPPED = {
    "compiled": compiled,
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "compiled layer": compiled_layer,
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_taken_off(tmp_path, name):
    plain = small()
    want = plain(TOKENS)[0]
    everlong.save(WRAPPED[name](plain), tmp_path)
    assert torch.equal(everlong.load(tmp_path)(TOKENS)[0], want)


def layers_shared(model):
    model.layers[1] = model.layers[0]


def part_shared(model):
    model.layers[1].mlp.in_proj.weight = model.layers[0].mlp.in_proj.weight


def a_view(model):
    model.layers[1].mixer_norm.weight.data = model.embedding.weight.data.flatten()[64:128]


def added(model):
    model.extra = nn.Linear(3, 3)


def buffered(model):
    model.layers[0].register_buffer("seen", torch.zeros(3))


def removed(model):
    del model.layers[1]


def pruned(model):
    del model.layers[0].mlp.out_proj


def adapted(model):
    inner = model.layers[0].mlp.out_proj
    model.layers[0].mlp.out_proj = nn.Sequential(inner, nn.Identity())


def widened(model):
    model.embedding = nn.Embedding(300, 64)


def hollow(model):
    model.to("meta")


def another_config(model):
    model.cfg = model.cfg.replace(layers=(Layer.Config(mixer=find("gla").Config(n_heads=2), mlp=SwiGLU.Config()),) * 2)


def another_mlp(model):
    changed = Layer.Config(mixer=find("gla").Config(), mlp=SwiGLU.Config(activation="gelu"))
    model.cfg = model.cfg.replace(layers=(changed,) * 2)


def mixed(model):
    model.layers[0].mlp.out_proj.bfloat16()


def tiny_floats(model):
    model.layers[0].mlp.out_proj.to(torch.float8_e4m3fn)


REFUSED = {
    layers_shared: "share memory, and loading would give two",
    part_shared: "layers.0.mlp.in_proj.weight and layers.1.mlp.in_proj.weight share memory",
    a_view: "share memory",
    added: r"extra.bias is not what the config describes \(2 such tensors\)",
    buffered: "layers.0.seen is not what the config describes",
    removed: "the model has 1 layers, its config 2",
    pruned: "layers.0.mlp.out_proj.weight is missing",
    adapted: "out_proj.0.weight is not what the config describes",
    widened: r"embedding.weight has shape \[300, 64\], but the config says \[256, 64\]",
    hollow: "has no values",
    another_config: "layers.0.mixer was built with another config",
    another_mlp: "layers.0.mlp was built with another config",
    mixed: "of several dtypes .*bfloat16, float32.* do not work together",
    tiny_floats: "has dtype torch.float8_e4m3fn, expected one of float32",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_loading_would_not_give_back_is_refused(tmp_path, change):
    everlong.save(small(seed=1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = small()
    change(model)
    with pytest.raises(ValueError, match=REFUSED[change]):
        everlong.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_tied_head_is_said_in_the_config(tmp_path):
    model = small(tied=False)
    model.head.weight = model.embedding.weight
    with pytest.raises(ValueError, match=r"embedding.weight and head.weight share memory.*tied=True in the config"):
        everlong.save(model, tmp_path)


def test_other_classes_are_refused(tmp_path):
    class Mine(LanguageModel):
        def logits(self, hidden):
            return -super().logits(hidden)

    for other in (Mine(small().cfg), nn.Linear(2, 2), nn.Sequential(small()), small().layers[0]):
        with pytest.raises(ValueError, match=f"a {type(other).__name__} cannot be saved"):
            everlong.save(other, tmp_path)
    assert not list(tmp_path.iterdir())


def one_buffer(model):
    """All parameters as pieces of one flat buffer, as some optimisers make them."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    at = 0
    for parameter in model.parameters():
        parameter.data = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()


def turned(model):
    weight = model.layers[0].mlp.in_proj.weight
    weight.data = weight.data.t().contiguous().t()


def frozen(model):
    model.requires_grad_(False)


def expanded(model):
    model.norm.weight.data = torch.ones(1).expand(64)


@pytest.mark.parametrize("change", [one_buffer, turned, frozen, expanded], ids=lambda change: change.__name__)
def test_weights_may_lie_anyhow_in_memory(tmp_path, change):
    model = small()
    change(model)
    want = model(TOKENS)[0]
    everlong.save(model, tmp_path)
    assert torch.equal(everlong.load(tmp_path)(TOKENS)[0], want)
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (tmp_path / "model.safetensors").stat().st_size < total + 20_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_tensor_keeps_its_dtype(tmp_path, dtype):
    model = small().to(dtype)
    everlong.save(model, tmp_path)
    loaded = everlong.load(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in loaded.values()} == {tensor.dtype for tensor in model.state_dict().values()}
    assert dtype in {tensor.dtype for tensor in loaded.values()}


def test_dtypes_that_work_together_are_kept(tmp_path):
    model = small("mamba2", residual_fp32=True).bfloat16()
    model.layers[0].mixer.A_log.data = model.layers[0].mixer.A_log.data.float()
    everlong.save(model, tmp_path)
    loaded = everlong.load(tmp_path)
    assert loaded.layers[0].mixer.A_log.dtype == torch.float32 and loaded.norm.weight.dtype == torch.bfloat16
    assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])


def test_quantised_and_copied_models_are_saved(tmp_path):
    small_bits = quantized(small(), "int8")
    for model in (small_bits, copy.deepcopy(small())):
        everlong.save(model, tmp_path)
        assert torch.equal(everlong.load(tmp_path)(TOKENS)[0], model(TOKENS)[0])


# Training


CFG = Trainer.Config(tokens=6 * 4 * 16, context=16, batch=4, save_every=3)


def losses(model, folder, cfg=CFG):
    return [step.loss for step in Trainer(model, Corpus.from_texts(["some text " * 60]), cfg, folder).run()]


@pytest.mark.parametrize("first,then", [(compiled, copy.copy), (copy.copy, compiled), (compiled, compiled)])
def test_a_compiled_run_goes_on_compiled_or_not(tmp_path, first, then):
    want = losses(small(), None)
    model = first(small())
    trainer = Trainer(model, Corpus.from_texts(["some text " * 60]), CFG, tmp_path)
    with pytest.raises(RuntimeError, match="enough"):
        trainer.run(lambda step: step.step == 4 and (_ for _ in ()).throw(RuntimeError("enough")))
    assert not any("_orig_mod" in name for name in read_tensors(tmp_path / checkpoint.FILE))
    assert losses(then(small(seed=1)), tmp_path) == want


def test_a_run_with_shared_layers_goes_on(tmp_path):
    def shared(seed):
        model = small(seed=seed, tied=False)
        model.layers[1] = model.layers[0]
        model.head.weight = model.embedding.weight
        return model

    want = losses(shared(0), None)
    trainer = Trainer(shared(0), Corpus.from_texts(["some text " * 60]), CFG, tmp_path)
    with pytest.raises(RuntimeError, match="enough"):
        trainer.run(lambda step: step.step == 4 and (_ for _ in ()).throw(RuntimeError("enough")))
    model = shared(1)
    assert losses(model, tmp_path) == want and model.head.weight is model.embedding.weight
