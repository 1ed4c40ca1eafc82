"""Bad input gets a message that says what, got, expected and the remedy; nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import everlong
from everlong import state as states
from everlong.config import find
from everlong.generation.session import new_session
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.ops.linear_attention import linear_attention
from everlong.ops.short_conv import short_conv
from everlong.tokenizer import ByteTokenizer


@pytest.fixture
def model():
    return small("gla")


def small(mixer, **changes):
    layer = Layer.Config(mixer=find(mixer).Config(), mlp=SwiGLU.Config())
    return LanguageModel.Config(vocab_size=100, d_model=64, layers=(layer,) * 2, **changes).build().float()


TOKENS = torch.randint(0, 100, (2, 12))


def test_unknown_mixer():
    with pytest.raises(ValueError, match="no mixer or block 'retentoin'; did you mean 'retention'"):
        find("retentoin")
    with pytest.raises(ValueError, match="cannot import 'no_such_package.mixer'.*PYTHONPATH"):
        find("no_such_package.mixer")


def test_unknown_config_key():
    with pytest.raises(ValueError, match=r"GLA.Config has no option 'n_head'; did you mean 'n_heads'"):
        find("gla").Config.from_dict({"kind": "gla", "n_head": 2})
    with pytest.raises(ValueError, match="n_heads must be int, got 'four'"):
        find("gla").Config.from_dict({"n_heads": "four"})


@pytest.mark.parametrize(
    "kind,message",
    [
        (5, "kind must be a name, got 5"),
        (None, "no kind in .*'kind': 'mamba'"),
        (".gla", "'.gla' is no dotted path"),
        (":GLA", "'' is no dotted path"),
    ],
)
def test_bad_kind_in_a_config(model, kind, message):
    data = json.loads(json.dumps(model.cfg.to_dict()))
    data["layers"][0]["mixer"].pop("kind")
    if kind is not None:
        data["layers"][0]["mixer"]["kind"] = kind
    with pytest.raises(ValueError, match=message):
        LanguageModel.Config.from_dict(data)


def test_wrong_shapes_and_dtypes(model):
    with pytest.raises(ValueError, match=r"tokens has shape \[12\], expected 2 axes \[B T\]"):
        model(TOKENS[0])
    with pytest.raises(ValueError, match="tokens have dtype torch.float32, expected int64 ids"):
        model(TOKENS.float())
    with pytest.raises(ValueError, match=r"x has shape \[2, 5, 32\], expected \[B T 64\]"):
        model.layers[0].mixer(torch.randn(2, 5, 32, dtype=torch.float32))
    state = model.init_state(2).layers[0][0]
    with pytest.raises(ValueError, match=r"x has shape \[2, 1, 64\], expected 2 axes \[B 64\]"):
        model.layers[0].mixer.step(torch.randn(2, 1, 64, dtype=torch.float32), state)
    with pytest.raises(ValueError, match=r"x has shape \[2, 64\], expected 3 axes \[B T 64\]"):
        model.layers[0].mixer(torch.randn(2, 64, dtype=torch.float32), state)
    with pytest.raises(ValueError, match="x has dtype torch.int64, expected a floating dtype"):
        model.layers[0].mixer(torch.ones(2, 5, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"k has shape \[1, 5, 2, 4\], .* with K = 8 \(from q\), got K = 4"):
        q = torch.randn(1, 5, 2, 8, dtype=torch.float32)
        linear_attention(q, q[..., :4], q)
    with pytest.raises(ValueError, match="no activation 'sulu' here, expected None or 'silu'; did you mean 'silu'"):
        short_conv(torch.randn(1, 5, 2, dtype=torch.float32), weight=torch.randn(2, 4), activation="sulu")
    with pytest.raises(ValueError, match=r"starts has shape \[2, 5\], expected \[B T\] = \[2, 12\]"):
        model(TOKENS, starts=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="starts has dtype torch.int64, expected torch.bool"):
        model(TOKENS, starts=torch.zeros(2, 12, dtype=torch.int64))


def test_wrong_arguments_of_a_step(model):
    state = model.init_state(1)
    with pytest.raises(ValueError, match=r"tokens has shape \[1, 1\], expected 1 axes \[B\]"):
        model.step(TOKENS[:1, :1], state)
    with pytest.raises(ValueError, match="tokens have dtype torch.float32, expected int64 ids"):
        model.step_(TOKENS[:1, 0].float(), state)
    with pytest.raises(ValueError, match=r"state is NoneType, expected that of init_state\(batch\)"):
        model.step(TOKENS[:1, 0], None)
    with pytest.raises(ValueError, match=r"tokens has shape \[12\], expected 2 axes"):
        model.read(TOKENS[0])


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="head_dim is 48, expected a divisor of the inner width 128"):
        find("mamba2").Config(head_dim=48).build(64)
    with pytest.raises(ValueError, match="head_dim must be a whole number from 1 to .*, got 0"):
        find("mamba2").Config(head_dim=0).build(64)
    with pytest.raises(ValueError, match="block must be a whole number from 1 to .*, got 0"):
        find("mlstm").Config(block=0).build(64)


def test_layers_that_are_none():
    mixer = find("gla").Config()
    with pytest.raises(ValueError, match=r"layers holds GLA.Config\(.*expected Layer.Config\(mixer="):
        LanguageModel.Config(vocab_size=100, d_model=64, layers=(mixer,))
    with pytest.raises(ValueError, match="layers must be a tuple of at least one"):
        LanguageModel.Config(vocab_size=100, d_model=64, layers=Layer.Config(mixer=mixer))
    listed = LanguageModel.Config(vocab_size=100, d_model=64, layers=[Layer.Config(mixer=mixer)])
    assert LanguageModel.Config.from_dict(listed.to_dict()) == listed


def test_prompts_that_are_no_ids(model):
    with pytest.raises(ValueError, match=r"the prompt is text, expected token ids; encode it: tokenizer.encode"):
        everlong.generate(model, "def f")
    with pytest.raises(ValueError, match=r"the prompt has shape \[2, 12\] and dtype torch.int64"):
        everlong.generate(model, TOKENS)
    with pytest.raises(ValueError, match=r"the prompt has shape \[2\] and dtype torch.b?float"):
        everlong.generate(model, [1.5, 2])


def test_zero_length(model):
    with pytest.raises(ValueError, match=r"tokens are empty \(B = 2, T = 0\)"):
        model(TOKENS[:, :0])
    with pytest.raises(ValueError, match=r"tokens are empty \(B = 0, T = 12\)"):
        model(TOKENS[:0])
    with pytest.raises(ValueError, match=r"x has shape \[2, 0, 64\]; give at least one row and one token"):
        model.layers[0].mixer(torch.randn(2, 0, 64, dtype=torch.float32))
    with pytest.raises(ValueError, match="the prompt is empty"):
        everlong.generate(model, [])


def test_state_of_another_model_or_batch(model):
    _, state = model(TOKENS)
    with pytest.raises(ValueError, match="state holds 2 rows, expected a batch of 1"):
        model(TOKENS[:1], state)
    _, other = small("retention")(TOKENS)
    with pytest.raises(ValueError, match="state is of another model"):
        model(TOKENS, other)
    wider = LanguageModel.Config(vocab_size=100, d_model=128, layers=model.cfg.layers).build().float()
    with pytest.raises(ValueError, match=r"another model: layers.0.0.memory has shape \[2, 4, 8, 16\]"):
        wider(TOKENS, state)
    with pytest.raises(ValueError, match="dtype torch.float32, expected torch.float64"):
        model.double()(TOKENS, state)


def test_out_of_vocabulary(model):
    with pytest.raises(ValueError, match="token ids from 5 to 100, expected 0 to 99"):
        model(torch.tensor([[5, 100]]))
    with pytest.raises(ValueError, match="expected 0 to 99; encode it with this model's tokenizer"):
        everlong.generate(model, [3, -1])


def test_truncated_and_tampered_checkpoints(model, tmp_path):
    with pytest.raises(ValueError, match=r"no model in .*config.json is missing"):
        everlong.load(tmp_path)
    everlong.save(model, tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not the file that was saved.*truncated or altered"):
        everlong.load(tmp_path)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="not the file that was saved"):
        everlong.load(tmp_path)
    weights.write_bytes(whole)
    config.write_text(text[:50])
    with pytest.raises(ValueError, match="not valid JSON"):
        everlong.load(tmp_path)
    data = json.loads(text)
    data["model"]["d_modle"] = data["model"].pop("d_model")
    config.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="was altered since it was saved: its model is not that of its fingerprint"):
        everlong.load(tmp_path)
    data.pop("fingerprint")
    config.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="no option 'd_modle'; did you mean 'd_model'"):
        everlong.load(tmp_path)
    data = json.loads(text)
    data["model"]["d_model"] = 128
    data.pop("fingerprint")
    config.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"does not fit its config: .* has shape"):
        everlong.load(tmp_path)
    config.write_text(text)
    assert torch.equal(everlong.load(tmp_path)(TOKENS)[0], model.eval()(TOKENS)[0])
    weights.unlink()
    with pytest.raises(ValueError, match="holds a config.json but no model.safetensors"):
        everlong.load(tmp_path)


def test_nan_in_the_weights(model, tmp_path):
    with torch.no_grad():
        model.layers[1].mixer.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite; its weights hold NaN"):
        next(everlong.generate(model, [1, 2]))
    everlong.save(model, tmp_path)
    with pytest.raises(ValueError, match="layers.1.mixer.k_proj.weight holds NaN or infinity"):
        everlong.load(tmp_path)


def test_damaged_or_foreign_session(model, tmp_path):
    path = tmp_path / "session.safetensors"
    states.save(new_session(model), path)
    with pytest.raises(ValueError, match="holds the state of another model"):
        states.load(path, new_session(small("lstm")))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        states.load(path, new_session(model))
    with pytest.raises(ValueError, match="no file"):
        states.load(tmp_path / "nowhere", new_session(model))


def test_full_disk_while_saving(model, tmp_path):
    everlong.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code = (
        "import sys, resource, signal, everlong; model = everlong.load(sys.argv[1]);"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try: everlong.save(model, sys.argv[1])\n"
        "except OSError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "could not write" in run.stdout and "the previous file, if any, is intact" in run.stdout, run
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_sampling():
    with pytest.raises(ValueError, match="top_p must be a number from 0 to 1, got 1.5"):
        everlong.Sampling(top_p=1.5)
    with pytest.raises(ValueError, match="temperature must be a number from 0 to 100, got -1"):
        everlong.Sampling(temperature=-1)
    with pytest.raises(ValueError, match=r"repetition_penalty must be a number from 1e-06 to 1e\+06, got nan"):
        everlong.Sampling(repetition_penalty=float("nan"))


def test_backend_by_name():
    q = torch.randn(1, 5, 2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="linear_attention has no backend 'torhc'; did you mean 'torch'"):
        linear_attention(q, q, q, backend="torhc")


def test_mixing_matrix_of_a_nonlinear_mixer():
    with pytest.raises(ValueError, match="LSTM is not linear in its values"):
        find("lstm").Config().build(64).mixing_matrix(torch.randn(1, 4, 64, dtype=torch.float32))


def test_the_command_line_says_it_in_one_line(tmp_path):
    for arguments in (
        ["generate", str(tmp_path), "x"],
        ["check", "mamba3"],
        ["compare", "--mixers", "mambo"],
        ["train", str(tmp_path / "nothing.txt"), "--out", str(tmp_path / "out")],
    ):
        run = subprocess.run(
            [sys.executable, "-m", "everlong.cli", *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert run.returncode == 2 and run.stderr.startswith("error: ") and "Traceback" not in run.stderr, run.stderr
        assert not run.stdout.strip(), "nothing is printed before the error"


def test_a_save_that_fails_late_leaves_the_earlier_model(model, tmp_path, monkeypatch):
    everlong.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_text

    def full(path, *args, **kwargs):
        if "config.json" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device; the previous file, if any, is intact"):
        everlong.save(small("gla"), tmp_path)  # other weights, which fit the disk
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_byte_model_does_not_keep_the_tokenizer_of_another(model, tmp_path):
    everlong.save(model, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    everlong.save(model, tmp_path, ByteTokenizer())
    assert isinstance(everlong.load_tokenizer(tmp_path), ByteTokenizer)


def test_files_of_the_folder_one_is_in_shadow_no_library(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('shadowed')")
    code = (
        "import sys; del sys.path[0]; from everlong.cli import main;"
        "sys.argv = ['everlong', 'generate', '.', 'x']; main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stderr.startswith("error: no model in ."), run.stderr
