"""Training: the packed text, the optimiser's rules, and a loop that is killed and resumed without a trace."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import everlong
from everlong import cli, numerics
from everlong.config import find, mixer_names
from everlong.mixers import base
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.tokenizer import FileTokenizer
from everlong.train import checkpoint, show
from everlong.train.data import Batch, Corpus, default_paths
from everlong.train.job import Job, read_job, read_model_config, simple_model
from everlong.train.loop import METRICS, Stopped, Trainer, evaluate
from everlong.train.optim import learning_rate, parameter_rules

CFG = Trainer.Config(tokens=12 * 4 * 16, context=16, batch=4, lr=2e-2, save_every=3)


def model(seed=0, d_model=16):
    torch.manual_seed(seed)
    layer = Layer.Config(mixer=find("gla").Config(n_heads=2), mlp=SwiGLU.Config())
    return LanguageModel.Config(vocab_size=256, d_model=d_model, layers=(layer,)).build()


def corpus(seed=0, documents=20):
    words = random.Random(seed)
    return Corpus.from_texts([" ".join(words.choices(["ab", "cde", "f"], k=40)) for _ in range(documents)])


def losses(curve):
    return [progress.loss for progress in curve]


def written(folder):
    return [json.loads(line)["loss"] for line in (Path(folder) / METRICS).read_text().splitlines()]


# Text


def test_documents_are_packed_behind_separators():
    packed = Corpus.from_texts(["ab", b"c", "", "de"])
    assert bytes(packed.tokens.tolist()) == b"\0ab\0c\0de"
    assert packed.tokens.dtype == torch.uint8 and packed.documents == 3 and packed.tokens_per_byte == 1
    batch = packed.rows(torch.tensor([0, 2]), 5)
    assert batch.tokens.tolist() == [[0, 97, 98, 0, 99], [98, 0, 99, 0, 100]]
    assert batch.targets.tolist() == [[97, 98, 0, 99, 0], [0, 99, 0, 100, 101]]
    assert batch.starts.tolist() == [[True, False, False, True, False], [False, True, False, True, False]]


def test_starts_and_targets_agree_with_the_stream():
    packed = corpus()
    batch = packed.batch(3, CFG)
    assert torch.equal(batch.tokens == 0, batch.starts)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])


def test_an_epoch_shows_every_window_once_in_an_order_of_its_own():
    packed = Corpus.from_texts([bytes(range(1, 256))])  # every token says where it is
    cfg = Trainer.Config(context=10, batch=5)
    count = packed.windows(10)
    assert count == 25

    def firsts(epoch):
        return torch.cat([packed.batch(step, cfg).tokens[:, 0] for step in range(5 * epoch, 5 * epoch + 5)]).tolist()

    first, second = firsts(0), firsts(1)
    for seen in (first, second):
        assert [b - a for a, b in zip(sorted(seen), sorted(seen)[1:], strict=False)] == [10] * (count - 1)
    assert first != second and first != sorted(first)
    assert torch.equal(packed.batch(7, cfg).tokens, packed.batch(7, cfg).tokens)
    assert not torch.equal(packed.batch(7, cfg).tokens, packed.batch(7, cfg.replace(seed=1)).tokens)


def test_split_by_whole_documents():
    packed = corpus(documents=50)
    train, held_out = packed.split(0.1, seed=3)
    assert train.documents + held_out.documents == 50 and 0.05 < len(held_out) / len(packed) < 0.2
    assert train.nbytes + held_out.nbytes == packed.nbytes
    every = sorted(bytes(part.document(i).tolist()) for part in (train, held_out) for i in range(part.documents))
    assert every == sorted(bytes(packed.document(i).tolist()) for i in range(50))
    again, other = packed.split(0.1, seed=3)[1], packed.split(0.1, seed=4)[1]
    assert again.fingerprint == held_out.fingerprint != other.fingerprint


def test_split_cuts_the_end_of_the_longest_where_documents_are_few():
    train, held_out = Corpus.from_texts(["short", bytes(range(1, 201)), "b"]).split(0.1)
    assert bytes(train.tokens.tolist()) == b"\0short\0" + bytes(range(1, 181)) + b"\0b"
    assert bytes(held_out.tokens.tolist()) == b"\0" + bytes(range(181, 201))
    assert train.tokens_per_byte == held_out.tokens_per_byte == 1 and train.offsets.tolist() == [0, 6, 187, 189]
    with pytest.raises(ValueError, match="too little text"):
        Corpus.from_texts(["a"]).split()
    with pytest.raises(ValueError, match="held_out must be between 0 and 1, got 2"):
        corpus().split(2)


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "b").mkdir()
    files = {"a.txt": b"one", "b/c.py": b"tw\xff", "b/x.png": b"\x89\0P", "b/empty": b"", "b/.git": b"h"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    folder = Corpus.from_paths(tmp_path)
    assert bytes(folder.tokens.tolist()) == b"\0one\0tw\xff" and folder.skipped == {"binary": 1, "empty": 1}
    assert Corpus.from_paths([tmp_path / "a.txt", tmp_path]).fingerprint == folder.fingerprint  # each file once
    assert bytes(Corpus.from_paths(f"{tmp_path}/**/*.py").tokens.tolist()) == b"\0tw\xff"
    assert bytes(Corpus.from_paths(f"{tmp_path}/b*").tokens.tolist()) == b"\0tw\xff"


def test_bad_paths_get_clear_errors(tmp_path, monkeypatch):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "nowhere.txt": "no such file or folder: .*nowhere.txt",
        "*.md": "no file matches .*; quote the pattern",
        "empty.txt": r"no text in .*empty.txt \(1 empty\)",
        "image.png": "image.png is binary: a NUL byte at 4; give text",
        "pipe": "pipe is not a regular file: give a file",
        "": r"no text in .* \(1 empty, 1 binary, 1 not a regular file\)",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            Corpus.from_paths(str(tmp_path / name))
    with pytest.raises(ValueError, match="an empty list of paths"):
        Corpus.from_paths([])
    with pytest.raises(ValueError, match="texts are empty"):
        Corpus.from_texts([""])

    def refused(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.txt").write_text("text")
    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(ValueError, match=r"secret.txt is unreadable: Permission denied; check its permissions"):
        Corpus.from_paths(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="unreadable"):
        Corpus.from_paths(tmp_path)


def test_text_shorter_than_the_context():
    with pytest.raises(ValueError, match=r"the text has 6 tokens, shorter than the context of 16 .*at most 5"):
        Corpus.from_texts(["hello"]).batch(0, CFG)


def word_tokenizer(path, **special):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    library = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2, **special}, unk_token="[UNK]"))
    library.pre_tokenizer = WhitespaceSplit()
    library.save(str(path))
    return FileTokenizer(path)


def test_tokenizer_files_keep_the_number_of_bytes(tmp_path):
    texts = ["one two one", "two é"]
    plain = Corpus.from_texts(texts, word_tokenizer(tmp_path / "plain.json"))
    assert plain.tokens.tolist() == [1, 2, 1, 2, 0] and plain.tokens.dtype == torch.int32
    assert plain.tokens_per_byte == 5 / (11 + 6) and plain.rows(torch.tensor([0]), 4).starts.tolist()[0][3]
    ending = Corpus.from_texts(texts, word_tokenizer(tmp_path / "eos.json", **{"</s>": 3}))
    assert ending.tokens.tolist() == [3, 1, 2, 1, 3, 2, 0] and ending.tokens_per_byte == 7 / (12 + 7)


def test_default_text_is_the_standard_library():
    paths = default_paths()
    assert {"argparse.py", "dataclasses.py"} <= {path.name for path in paths}
    assert not any("test" in path.parts or "site-packages" in path.parts for path in paths)


# Optimiser


class Marked(base.Mixer):
    no_decay = ("rates",)
    lr_scales = {"rates": 2.0, "inner.weight": 0.5}  # noqa: RUF012

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        pass

    def __init__(self, cfg, d_model, depth=base.Depth()):
        super().__init__(cfg, d_model, depth)
        self.rates, self.vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
        self.inner = nn.Linear(2, 2)


def test_weight_decay_and_learning_rates_by_parameter():
    parts = {"embedding": nn.Embedding(3, 2), "norm": nn.LayerNorm(2), "mixer": Marked(Marked.Config(), 2)}
    whole = nn.ModuleDict(parts)
    assert parameter_rules(whole) == {
        "embedding.weight": (False, 1.0), "norm.weight": (False, 1.0), "norm.bias": (False, 1.0),
        "mixer.rates": (False, 2.0), "mixer.vector": (False, 1.0),
        "mixer.inner.weight": (True, 0.5), "mixer.inner.bias": (False, 1.0),
    }  # fmt: skip
    before = whole["mixer"].rates.detach().clone()
    trainer = Trainer(whole, None, Trainer.Config(lr=0.1))
    for parameter in whole.parameters():
        parameter.grad = torch.ones_like(parameter)
    from everlong.train.optim import set_learning_rate

    set_learning_rate(trainer.optimizer, 0.1)
    trainer.optimizer.step()
    tiny = numerics.BOUNDS["fp32 pass"]
    numerics.assert_close(whole["mixer"].rates, before - 0.2, "a scaled rate", tiny)
    numerics.assert_close(whole["mixer"].vector, before[0] - 0.1, "a rate", tiny)
    for parameter in whole.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters to train"):
        Trainer(whole, None, CFG)


@pytest.mark.parametrize("name", mixer_names())
def test_rules_of_the_mixers_name_parameters_that_exist(name):
    mixer = find(name)
    built = [cfg.build(64, base.Depth(layer, 2)) for cfg in mixer.examples().values() for layer in (0, 1)]
    parameters = {name for layer in built for name, _ in layer.named_parameters()}
    for entry in (*mixer.no_decay, *mixer.lr_scales):
        assert any(f".{entry}." in f".{parameter}." for parameter in parameters), entry


def test_a_submodule_is_spared_from_weight_decay_as_a_whole():
    rules = parameter_rules(find("hyena").Config().build(64))
    assert rules["in_proj.weight"][0]
    assert not any(decays for name, (decays, _) in rules.items() if name.startswith("filter."))


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    cfg = Trainer.Config(lr=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, cfg) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)]) and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.1)
    assert learning_rate(0, 1, cfg) == 1.0


def test_settings_are_checked():
    cases = [
        ({"tokens": 0}, "tokens must be a whole number from 1 to 9007199254740992, got 0"),
        ({"lr": 0.0}, "lr must be a number from 1e-12 to 1000, got 0.0"),
        ({"warmup": 2.0}, "warmup must be a number from 0 to 1, got 2.0"),
        ({"seed": -1}, "seed must be a whole number from 0 to 9223372036854775807, got -1"),
        ({"clip": math.nan}, r"clip must be a number from 0 to 1e\+12, got nan"),
        ({"batch": 4, "accumulate": 3}, "a batch of 4 rows cannot be split into 3 equal parts"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            Trainer.Config(**changes)
    assert Trainer.Config.from_dict(json.loads(json.dumps(CFG.to_dict()))) == CFG


# The loop


@pytest.mark.float32("training in fp16 needs a scaled loss", only="float16")
def test_it_learns_and_reports(tmp_path):
    seen = []
    text = corpus()
    trained = model()
    before = evaluate(trained, text, 16)
    curve = Trainer(trained, text, CFG, tmp_path).run(seen.append)
    assert seen == curve and len(curve) == CFG.steps == 12 and curve[-1].tokens == CFG.tokens
    assert curve[-1].loss < 0.7 * curve[0].loss and curve[0].bits_per_byte == curve[0].loss / math.log(2)
    assert written(tmp_path) == losses(curve)
    after = evaluate(trained, text, 16)
    assert after[0] < 0.7 * before[0] and after[1] == pytest.approx(after[0] / math.log(2))
    assert Trainer(model(1), text, CFG, tmp_path).run() == curve  # done: nothing more is trained


@pytest.mark.float32("held to the digits of fp32")
def test_parts_of_a_step_do_not_change_it():
    class Uneven:  # numbers of targets differ from row to row
        def batch(self, step, cfg):
            tokens, targets, starts = corpus().batch(step, cfg)
            keep = torch.arange(cfg.context) < 2 + 4 * torch.arange(cfg.batch)[:, None]
            return Batch(tokens, targets.where(keep, -100), starts)

    whole = Trainer(model(), Uneven(), CFG).run()
    parts = Trainer(model(), Uneven(), CFG.replace(accumulate=4)).run()
    assert losses(parts) == pytest.approx(losses(whole), rel=numerics.BOUNDS["fp32 scan"])
    assert whole[0].bits_per_byte is None


def test_documents_in_a_row_do_not_see_each_other():
    batch = Corpus.from_texts(["one", "two", "three", "four"] * 9).batch(0, CFG)
    trainer = Trainer(model(), corpus(), CFG)
    assert batch.starts[:, 1:].any()
    expected = trainer.model.loss(batch.tokens, batch.targets, starts=batch.starts)
    tiny = numerics.BOUNDS["fp32 pass"]
    numerics.assert_close(trainer._gradients(batch), expected, "loss", tiny)
    assert numerics.relative_errors(trainer._gradients(batch._replace(starts=None)), expected)[0] > tiny


@pytest.mark.float32("held to the digits of fp32")
def test_bfloat16():
    curve = Trainer(model(), corpus(), CFG.replace(bf16=True)).run()
    exact = Trainer(model(), corpus(), CFG).run()
    assert losses(curve) != losses(exact) and losses(curve) == pytest.approx(
        losses(exact), rel=numerics.BOUNDS["bf16 losses"]
    )


class Noisy(nn.Module):
    """Learning that draws random numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(256, 256)

    def loss(self, tokens, targets, *, starts=None, reduction="mean"):
        logits = nn.functional.dropout(self.table(tokens), 0.5)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def interrupt_at(step):
    def on_step(progress):
        if progress.step == step:
            raise RuntimeError("cut off")

    return on_step


@pytest.mark.parametrize("make", [model, Noisy])
@pytest.mark.float32("training in fp16 needs a scaled loss", only="float16")
def test_resumed_runs_equal_uninterrupted_ones(tmp_path, make):
    whole, cut = make(), make()
    expected = Trainer(whole, corpus(), CFG).run()
    for step in (2, 5, 9, 10):  # before the first checkpoint, and after others
        with pytest.raises(RuntimeError):
            Trainer(cut, corpus(), CFG, tmp_path).run(interrupt_at(step))
        torch.rand(5)
        cut = make()
    leftover = tmp_path / f".{checkpoint.FILE}.abc"
    leftover.write_bytes(b"half")
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 1')  # a line cut off
    assert losses(Trainer(cut, corpus(), CFG, tmp_path).run()) == losses(expected) == written(tmp_path)
    assert not leftover.exists()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_the_callers_randomness_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    Trainer(Noisy(), corpus(), CFG)
    torch.manual_seed(5)
    noisy = Noisy.__new__(Noisy)
    nn.Module.__init__(noisy)
    noisy.table = nn.Embedding.from_pretrained(torch.zeros(256, 256), freeze=False)
    Trainer(noisy, corpus(), CFG).run()
    assert torch.rand(1) == expected and noisy.training


LONG = CFG.replace(tokens=80 * 4 * 16, save_every=7)


def train_slowly(folder, threads):
    """What the process that gets killed does: 60 of 80 steps, so that on a busy machine it is not over before."""
    torch.set_num_threads(int(threads))
    Trainer(model(), corpus(), LONG, folder).run(lambda progress: time.sleep(0.03 if progress.step < 60 else 600))


def test_killed_twice_it_ends_with_the_same_curve(tmp_path):
    expected = losses(Trainer(model(), corpus(), LONG).run())
    program = f"import test_train; test_train.train_slowly({str(tmp_path)!r}, {torch.get_num_threads()})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    reached = []
    for least in (5, 30):
        process = subprocess.Popen([sys.executable, "-c", program], env=environment)
        deadline = time.monotonic() + 500
        while not (tmp_path / METRICS).exists() or len(written_so_far(tmp_path)) < least:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.SystemRandom().uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        reached.append(len(written_so_far(tmp_path)))
        assert written_so_far(tmp_path) == expected[: reached[-1]]
    assert reached[0] >= 5 and LONG.steps > reached[1] >= 30
    resumed = Trainer(model(), corpus(), LONG, tmp_path)
    # the line of a step is written before its checkpoint, and the kill may come between
    assert resumed.resume() in (reached[1] // 7 * 7, (reached[1] - 1) // 7 * 7)
    assert losses(resumed.run()) == expected == written(tmp_path)


def written_so_far(folder):
    lines = (folder / METRICS).read_text().split("\n")[:-1]  # the last one may be unfinished
    return [json.loads(line)["loss"] for line in lines]


def test_another_run_in_the_folder_is_refused(tmp_path):
    with pytest.raises(RuntimeError):
        Trainer(model(), corpus(), CFG, tmp_path).run(interrupt_at(4))
    cases = [
        (model(), corpus(), CFG.replace(lr=1e-3), r"holds a run that differs: train.lr was 0.02, is 0.001\. Go on"),
        (model(d_model=32), corpus(), CFG, "model.d_model was 16, is 32"),
        (model(), corpus(1), CFG, "data was '.* tokens in 20 documents, checksum .*, is '"),
        (Noisy(), corpus(), CFG, "model was a everlong.models.lm:LanguageModel, is 'Noisy'"),
    ]
    for other, text, cfg, message in cases:
        with pytest.raises(ValueError, match=message):
            Trainer(other, text, cfg, tmp_path).run()
    assert Trainer(model(), corpus(), CFG.replace(save_every=1), tmp_path).resume() == 3


def test_damaged_checkpoints_are_refused(tmp_path):
    Trainer(model(), corpus(), CFG.replace(tokens=64), tmp_path).run()
    path = tmp_path / checkpoint.FILE
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    everlong.save(model(), tmp_path / "other")
    other = (tmp_path / "other" / "model.safetensors").read_bytes()
    cases = [
        (whole[:-10], "not a whole safetensors file"),
        (bytes(flipped), "altered since it was written"),
        (other, "not the checkpoint of a training run"),
    ]
    for data, message in cases:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            Trainer(model(), corpus(), CFG.replace(tokens=64), tmp_path).run()


@pytest.mark.parametrize("size", [200, 20_000])  # of the largest file: too small for the metrics, for the checkpoint
@pytest.mark.float32("training in fp16 needs a scaled loss", only="float16")
def test_a_full_disk_loses_nothing(tmp_path, size):
    with pytest.raises(RuntimeError):
        Trainer(model(), corpus(), CFG.replace(save_every=1), tmp_path).run(interrupt_at(1))
    before = (tmp_path / checkpoint.FILE).read_bytes()
    trainer = Trainer(model(), corpus(), CFG.replace(save_every=1), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        message = r"step 2: .*File too large.*; the checkpoint of step 1 is intact\. Make room"
        with pytest.raises(OSError, match=message) as caught:
            trainer.run()
        assert "previous file" not in str(caught.value), "it says one thing, once"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / checkpoint.FILE).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.FILE, METRICS]
    assert losses(Trainer(model(), corpus(), CFG.replace(save_every=1), tmp_path).run()) == losses(
        Trainer(model(), corpus(), CFG).run()
    )


class Breaking(Noisy):
    """A model whose loss, or only its gradient, is lost at the eighth step."""

    calls = 0
    kind = "loss"

    def loss(self, tokens, targets, *, starts=None, reduction="mean"):
        self.calls += 1
        loss = super().loss(tokens, targets, reduction=reduction)
        if self.calls < 8:
            return loss
        return loss * math.nan if self.kind == "loss" else loss + self.table.weight[0, 0].mul(0).abs().sqrt()


@pytest.mark.parametrize(
    ("kind", "what"), [("loss", "the loss is nan"), ("gradient", "the norm of the gradient is nan")]
)
def test_a_diverged_run_stops_and_keeps_its_checkpoint(tmp_path, kind, what):
    breaking = Breaking()
    breaking.kind = kind
    message = rf"step 8 of 12: {what}; the checkpoint of step 6 is intact\. To go on, try a lower lr \(6.7e-03\)"
    with pytest.raises(ValueError, match=message):
        Trainer(breaking, corpus(), CFG, tmp_path).run()
    assert all(bool(torch.isfinite(value).all()) for value in breaking.parameters())
    assert Trainer(Breaking(), corpus(), CFG, tmp_path).resume() == 6 and len(written(tmp_path)) == 7


class Choking(Breaking):
    """A model that breaks on the byte z, in its loss or only in its gradient; a bigram before that."""

    def loss(self, tokens, targets, *, starts=None, reduction="mean"):
        assert reduction == "sum"
        hit = (tokens == ord("z")).double().cumsum(1)
        if self.kind == "loss":  # in the whole row, as a chunk would spread it
            return self.table(tokens).square().sum() + torch.where(hit[:, -1:] > 0, math.nan, 0.0).sum()
        sound = self.table(tokens).square().sum()
        return sound + (self.table.weight[0, 0] * 0).abs().sqrt() if bool(hit.any()) else sound


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_diverged_run_names_document_and_token(tmp_path, kind):
    (tmp_path / "text").mkdir()
    texts = ["abcd" * 30, "abcd" * 20 + "z" + "abcd" * 10, "abcd" * 30]
    for name, text in zip("abc", texts, strict=True):
        (tmp_path / "text" / f"{name}.txt").write_text(text)
    breaking = Choking()
    breaking.kind = kind
    message = r"It began in row \d of the batch at token \d+, token 81 of document 1 \(.*b\.txt\)$"
    with pytest.raises(ValueError, match=message):
        Trainer(breaking, Corpus.from_paths(tmp_path / "text"), CFG).run()


def test_the_names_of_documents_follow_them(tmp_path):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(name * 50)
    whole = Corpus.from_paths(tmp_path)
    for part in (*whole.split(0.3), *whole.split(0.01)):
        assert len(part.names) == part.documents
        for index, name in enumerate(part.names):
            assert set(bytes(part.document(index)[1:].tolist()).decode()) == {Path(name).stem}


def test_a_model_says_where_it_overflowed():
    """Through kernels and chunks, whose NaN reach earlier tokens: the token is the right one."""
    torch.manual_seed(0)
    broken = model().cfg.replace(tied=False, embed_scale=10.0).build()
    with torch.no_grad():
        broken.embedding.weight[ord("z")] = 3e38
    texts = ["ab" * 40, "ab" * 10 + "z" + "ab" * 30]
    with pytest.raises(ValueError, match=r"token 21 of document 1$"):
        Trainer(broken, Corpus.from_texts(texts), CFG).run()


def test_weights_that_are_not_finite_are_named(tmp_path):
    broken = model()
    with torch.no_grad():
        broken.layers[0].mixer.out_proj.weight[0, 0] = math.nan
    message = r"step 1 of 12: .*weights layers.0.mixer.out_proj.weight are not finite; there is no checkpoint yet"
    with pytest.raises(ValueError, match=message):
        Trainer(broken, corpus(), CFG, tmp_path).run()


def at(press, *steps):
    return lambda progress: press() if progress.step in steps else None


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path, ctrl_c):
    with pytest.raises(Stopped, match=r"stopped after step 5 of 12; saved in .* the same call goes on") as caught:
        Trainer(model(), corpus(), CFG, tmp_path).run(at(ctrl_c, 5))
    assert len(caught.value.curve) == 5
    again = Trainer(model(), corpus(), CFG, tmp_path)
    assert again.resume() == 5
    assert losses(again.run()) == losses(Trainer(model(), corpus(), CFG).run())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(Trainer(model(), corpus(), CFG).run(at(ctrl_c, 12))) == 12  # it was done anyway
    with pytest.raises(Stopped, match=r"stopped after step 3 of 12$"):
        Trainer(model(), corpus(), CFG).run(at(ctrl_c, 3))

    def press_twice(progress):
        ctrl_c()
        ctrl_c()

    with pytest.raises(KeyboardInterrupt) as caught:
        Trainer(model(), corpus(), CFG).run(press_twice)
    assert not isinstance(caught.value, Stopped)


def test_where_ctrl_c_is_ignored_it_stays_so(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a job in the background of a script
    assert len(Trainer(model(), corpus(), CFG).run(at(ctrl_c, 5))) == 12
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_vocabulary_too_small_for_the_text():
    small = LanguageModel.Config(vocab_size=100, d_model=16, layers=model().cfg.layers).build()
    with pytest.raises(ValueError, match=r"token ids up to 255, the model a vocabulary of 100; .*vocab_size=256"):
        Trainer(small, corpus(), CFG)


# The command


def command(*arguments):
    return CliRunner().invoke(cli.app, ["train", *map(str, arguments)])


SMALL = ("--mixer", "gla", "--d-model", 16, "--layers", 1, "--tokens", 640, "--context", 16, "--batch", 4)


@pytest.mark.float32("a command makes its models in the default dtype")
def test_the_command_trains_resumes_and_saves_a_model(tmp_path, monkeypatch, ctrl_c):
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("the cat sat on the mat. " * 30)
    monkeypatch.setattr(show._Display, "update", lambda self, now: at(ctrl_c, 4)(now))
    stopped = command(text, *SMALL, "--out", out)
    assert stopped.exit_code == 130 and f"everlong train --resume {out}" in stopped.output
    monkeypatch.undo()
    done = command("--resume", out)
    assert done.exit_code == 0 and "going on after step 4" in done.output
    assert "bits per byte on held-out text" in done.output and "everlong generate" in done.output
    whole = command(text, *SMALL, "--out", tmp_path / "whole")
    assert whole.exit_code == 0 and written(out) == written(tmp_path / "whole") and len(written(out)) == 10
    loaded = everlong.load(out)
    weights = everlong.load(tmp_path / "whole").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    assert command(text, *SMALL, "--out", out).exit_code == 0
    by_config = command(text, "--config", out, *SMALL[6:], "--out", tmp_path / "same")
    assert by_config.exit_code == 0 and written(tmp_path / "same") == written(out)


def test_the_command_refuses_clearly(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("too short")
    (tmp_path / "broken.json").write_text("{")
    cases = [
        ((text, "--mixer", "gal"), "no mixer or block 'gal'; did you mean 'gla'"),
        ((text, "--mixer", "swiglu"), "swiglu is a feed-forward block that mixes no tokens; known: .*gla"),
        ((text, *SMALL, "--layers", 0), "layers must be a whole number from 1 to 10000, got 0"),
        ((text, *SMALL, "--out", tmp_path / "run"), "the text has 10 tokens, shorter than the context of 16"),
        ((tmp_path / "none", *SMALL), "no such file or folder"),
        ((text, "--resume", tmp_path), "--resume already says what paths would set"),
        ((text, "--config", tmp_path, "--d-model", 3), "--config already says what --d-model would set"),
        (("--resume", tmp_path), "no training run in .*job.json is missing"),
        ((text, "--config", tmp_path / "no.json"), "cannot read .*no.json"),
        ((text, "--config", tmp_path / "broken.json"), "broken.json is not valid JSON"),
        ((text, *SMALL, "--tokenizer", tmp_path / "no.json"), "no tokenizer file"),
    ]
    for arguments, message in cases:
        result = command(*arguments)
        assert isinstance(result.exception, ValueError)
        with pytest.raises(ValueError, match=message):
            raise result.exception


def test_jobs_are_plain_data(tmp_path):
    job = Job(model=simple_model("gla", 32, 2, 256), train=CFG, paths=("a",))
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job
    (tmp_path / "job.json").write_text(json.dumps(job.to_dict()))
    assert read_job(tmp_path) == job
    (tmp_path / "model.json").write_text(json.dumps(job.model.to_dict()))
    assert read_model_config(tmp_path / "model.json") == job.model


@pytest.mark.float32("training in fp16 needs a scaled loss", only="float16")
def test_a_run_with_a_tokenizer_goes_on_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    word_tokenizer(tmp_path / "words.json")
    (tmp_path / "text.txt").write_text("a b c " * 300)
    assert command("text.txt", *SMALL, "--tokenizer", "words.json", "--out", "run").exit_code == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = command("--resume", "../run")
    assert again.exit_code == 0, again.exception
