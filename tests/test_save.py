"""Models that are wrapped, shared, mixed or changed: saved and loaded right, or refused at once with the reason."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn

import everlong
from everlong.checkpoints.folder import load_tokenizer
from everlong.config import find
from everlong.files import read_tensors
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.models.quantize import quantized
from everlong.tokenizer import ByteTokenizer, FileTokenizer
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


SAVER = """
import os, sys
import torch, everlong
from everlong.config import find
from everlong.models.blocks import Layer
from everlong.models.lm import LanguageModel
from everlong.tokenizer import ByteTokenizer, FileTokenizer

def save(value, folder, tokenizer):
    layer = Layer.Config(mixer=find("lru").Config())
    model = LanguageModel.Config(vocab_size=300, d_model=32, layers=(layer,) * value).build()
    everlong.save(model, folder, tokenizer)
"""


def letters(folder):
    """A tokenizer file."""
    library = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    library.save(str(folder / "letters.json"))
    return folder / "letters.json"


def saver(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", SAVER + code, *map(str, arguments)])


def saved_number(folder):
    """Which of the models of ``SAVER`` lies there, after all checks of its files."""
    model, tokenizer = everlong.load(folder), load_tokenizer(folder)
    assert len(model.layers) % 2 == isinstance(tokenizer, ByteTokenizer)
    return len(model.layers)


ONE_KILLED = """
folder, vocabulary, first, fatal = sys.argv[1:5]
replace, calls = os.replace, 0
def counting(*paths):
    global calls
    calls += 1
    if calls == int(fatal):
        os._exit(9)
    replace(*paths)
os.replace = counting
save(int(first), folder, ByteTokenizer() if int(first) % 2 else FileTokenizer(vocabulary))
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_a_save_that_is_killed_leaves_the_earlier_model_or_the_new_one(tmp_path, first):
    vocabulary = letters(tmp_path)
    folder = tmp_path / "model"
    assert saver(ONE_KILLED, folder, vocabulary, first, 0).wait() == 0
    found, new = first, first + 1
    for fatal in (1, 2, 3, 4, 5, 2, 3, 1):  # one killed save after the other
        died = saver(ONE_KILLED, folder, vocabulary, new, fatal).wait()
        assert died in (0, 9)
        now = saved_number(folder)
        assert now == new if died == 0 else now in (found, new)
        found, new = now, new + 1
    assert saver(ONE_KILLED, folder, vocabulary, new, 0).wait() == 0
    assert saved_number(folder) == new
    assert not list(folder.glob(".*")), "the next save clears up"


MANY = """
folder, vocabulary, first = sys.argv[1:4]
for value in range(int(first), int(first) + 12):
    save(value % 6 + 1, folder, FileTokenizer(vocabulary) if value % 2 else ByteTokenizer())
"""


@pytest.mark.slow
def test_two_processes_save_while_a_third_loads(tmp_path):
    vocabulary, folder = letters(tmp_path), tmp_path / "model"
    assert saver(ONE_KILLED, folder, vocabulary, 1, 0).wait() == 0
    running = [saver(MANY, folder, vocabulary, first) for first in (0, 3)]
    loads = 0
    while any(process.poll() is None for process in running):
        everlong.load(folder)
        load_tokenizer(folder)
        loads += 1
    assert [process.returncode for process in running] == [0, 0]
    assert loads > 3 and saved_number(folder) in range(1, 7)


def test_a_disk_that_refuses_half_way_leaves_the_earlier_files(tmp_path, monkeypatch):
    everlong.save(small(seed=1), tmp_path / "model", FileTokenizer(letters(tmp_path)))
    want = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    replace = os.replace
    for fatal in (1, 2, 3, 4):
        calls = itertools.count(1)

        def refusing(*paths, calls=calls, fatal=fatal):
            if next(calls) == fatal:
                raise OSError(5, "Input/output error")
            replace(*paths)

        monkeypatch.setattr(os, "replace", refusing)
        with pytest.raises(OSError, match="the previous file, if any, is intact"):
            everlong.save(small(seed=2), tmp_path / "model", ByteTokenizer())
        assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == want, fatal


def test_an_interrupt_after_the_last_file_keeps_the_new_model(tmp_path, monkeypatch):
    everlong.save(small(), tmp_path, FileTokenizer(letters(tmp_path)))
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        if str(target).endswith("config.json"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        everlong.save(small(seed=2), tmp_path, ByteTokenizer())
    assert torch.equal(everlong.load(tmp_path).embedding.weight, small(seed=2).embedding.weight)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_leftovers_that_cannot_go_harm_nobody(tmp_path):
    everlong.save(small(), tmp_path)
    (tmp_path / ".model.safetensors.before.folder").mkdir()
    (tmp_path / ".model.safetensors.before.file").write_bytes(b"")
    everlong.save(small(seed=2), tmp_path)
    assert torch.equal(everlong.load(tmp_path).embedding.weight, small(seed=2).embedding.weight)
    assert not (tmp_path / ".model.safetensors.before.file").exists()


def test_the_tokenizer_that_a_model_was_saved_with_stays(tmp_path):
    folder = tmp_path / "model"
    everlong.save(small(), folder, ByteTokenizer())
    (folder / "tokenizer.json").write_bytes(letters(tmp_path).read_bytes())  # of a save that was killed, or a copy
    assert isinstance(load_tokenizer(folder), ByteTokenizer)
    everlong.save(small(), folder)
    assert isinstance(load_tokenizer(folder), ByteTokenizer)
    everlong.save(small(), folder, FileTokenizer(letters(tmp_path)))
    everlong.save(small(), folder)
    assert isinstance(load_tokenizer(folder), FileTokenizer)
