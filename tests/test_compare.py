"""The comparison: sizes, measures, a miniature run to the end, interruption and going on, bad input."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from everlong import numerics, state
from everlong.checkpoints import folder
from everlong.compare import cost, measure
from everlong.compare.architectures import ARCHITECTURES, Shape, count, describe, make, sized
from everlong.compare.run import BLOCKS, Comparison
from everlong.compare.settings import Recall, Settings, profile, quick
from everlong.train import loop
from everlong.train.data import Corpus

RECALL = Recall(params=20_000, tokens=2_000, batch=8, pairs=(2,), tests=(4, 8), sequences=8)
TINY = Settings(
    params=30_000,
    tokens=1_500,
    context=32,
    batch=4,
    runs=2,
    lengths=(256, 1024),
    seconds=0.01,
    decode_steps=20,
    sample_tokens=5,
    recall=RECALL,
)


@pytest.fixture
def text(tmp_path):
    """Some files of text, in which lines repeat."""
    made = tmp_path / "text"
    made.mkdir()
    for index in range(30):
        (made / f"{index}.txt").write_text(f"line {index} of the text, and on it goes\n" * (10 + index))
    return made


def comparison(out, text, *, settings=TINY, names=("gla", "attention")):
    return Comparison(out, names=names, data=[text], settings=settings, command="test", console=Console(quiet=True))


@pytest.mark.parametrize("name", [*ARCHITECTURES, "gla", "retention"])
def test_sizes_are_within_five_percent(name):
    for wanted in (50_000, 600_000):
        cfg = sized(name, wanted)
        assert abs(count(cfg) / wanted - 1) <= 0.05, (name, wanted, count(cfg))
    assert len(cfg.layers) >= 2


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.float32("held to the digits of fp32")
def test_named_architectures_read_write_and_learn(name):
    cfg = sized(name, 60_000, context=64)
    assert type(cfg).from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    model = cfg.build()
    tokens = torch.randint(256, (2, 24))
    model.loss(tokens, tokens).backward()
    with torch.no_grad():
        whole, _ = model(tokens)
        last, kept = model.read(tokens[:, :-1], piece=7)
        last, _ = model.step(tokens[:, -1], kept)
    numerics.assert_close(last, whole[:, -1], "the last logits")


def test_architectures_are_those_of_the_papers():
    layers = {name: make(name, Shape(128, 32), 1).layers for name in ARCHITECTURES}
    assert [layer.mixer.kind for layer in layers["griffin"]] == ["rg_lru", "rg_lru", "attention"]
    assert layers["griffin"][2].mixer.window == 64 and layers["griffin"][2].mixer.n_kv_heads == 1
    assert [layer.mixer.kind for layer in layers["jamba"]] == ["mamba2", "mamba2", "attention", "mamba2"]
    assert layers["jamba"][2].mixer.rope_theta is None
    assert layers["mamba"][0].mlp is None and layers["mamba2"][0].mlp is None
    assert make("griffin", Shape(128, 32), 1).embed_scale == 128**0.5
    assert describe(make("jamba", Shape(64, 32), 2)) == ("(2 mamba2 + swiglu, attention + swiglu, mamba2 + swiglu) x2")
    assert describe(make("mamba", Shape(64, 32), 3)) == "mamba, x3"


def test_impossible_size_names_the_nearest():
    with pytest.raises(ValueError, match=r"mamba2 cannot have 1,000 parameters within 5%; the nearest is [\d,]+ \("):
        sized("mamba2", 1_000)


@pytest.mark.parametrize(
    "name, message",
    [
        ("mamba22", "no architecture 'mamba22'; did you mean 'mamba2'"),
        ("no_such_package.mixer", "cannot import 'no_such_package.mixer'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        sized(name, 100_000)


@pytest.mark.float32("held to the digits of fp32")
def test_losses_as_a_stream_are_those_of_one_call(text):
    model = sized("gla", 30_000, context=32).build()
    runs = measure.held_out_runs(Corpus.from_paths([text]), 32, 4)
    assert runs.factor == 8 and runs.batch.tokens.shape == (4, 256)
    streamed = measure.losses(model, runs.batch, 50)
    with torch.no_grad():
        logits, _ = model(runs.batch.tokens, starts=runs.batch.starts)
    whole = F.cross_entropy(logits.transpose(1, 2), runs.batch.targets, reduction="none")
    numerics.assert_close(streamed, whole, "losses", numerics.BOUNDS["fp32 scan"])


def test_text_measures_agree_with_their_definitions(text):
    model = sized("gla", 30_000, context=32).build()
    runs = measure.held_out_runs(Corpus.from_paths([text]), 32, 4)
    found = measure.text(model, runs)
    windows = torch.stack(
        [
            measure.losses(model, type(runs.batch)(*(t[:, at : at + 32] for t in runs.batch)), 32)
            for at in range(0, 256, 32)
        ]
    )
    assert found["bits_per_byte"] == pytest.approx(
        float(windows.mean()) / math.log(2), rel=numerics.BOUNDS["fp32 scan"]
    )
    assert [length for length, _ in found["by_length"]] == [32, 64, 128, 256]
    assert found["by_length"][0][1] == pytest.approx(
        float(windows[-1, :, 16:].mean()) / math.log(2), rel=numerics.BOUNDS["fp32 scan"]
    )
    whole = measure.losses(model, runs.batch, 256)
    assert found["by_length"][-1][1] == pytest.approx(
        float(whole[:, -16:].mean()) / math.log(2), rel=numerics.BOUNDS["fp32 scan"]
    )
    places = [place for place, _ in found["by_position"]]
    assert places == sorted(set(places)) and places[0] == 1 and places[-1] <= 256
    assert found["by_position"][0][1] == pytest.approx(
        float(windows[:, :, 0].mean()) / math.log(2), rel=numerics.BOUNDS["fp32 scan"]
    )


def test_short_text_is_measured_over_fewer_lengths():
    corpus = Corpus.from_texts(["word " * 20])
    assert measure.held_out_runs(corpus, 32, 4).factor == 2
    with pytest.raises(ValueError, match="shorter than the context"):
        measure.held_out_runs(corpus, 512, 4)


class Oracle(torch.nn.Module):
    """Answers with the token that followed the same token before."""

    def hidden(self, tokens):
        before = (tokens[:, :, None] == tokens[:, None]).tril(-1).float().argmax(dim=-1)
        return F.one_hot(tokens.roll(-1, 1).gather(1, before), 66).float(), None

    def logits(self, hidden):
        return hidden


def test_recall_accuracy_of_an_oracle_and_of_a_guess():
    task = RECALL.test(8)
    assert measure.recall_accuracy(Oracle(), task, 20, seed=0) == 1.0
    silent = Oracle()
    silent.logits = torch.zeros_like
    assert measure.recall_accuracy(silent, task, 20, seed=0) == 0.0


@pytest.mark.float32("training in fp16 needs a scaled loss", only="float16")
def test_learning_ends_where_nothing_is_left_to_learn():
    model = sized("gla", 20_000, vocab_size=66).build()
    task = RECALL.replace(tokens=8 * 32 * 150)
    steps = []
    learnt = measure.learn(loop.Trainer(model, task.task().build(), task.training(0)), 99.0, steps.append)
    assert len(steps) == 100 and learnt == (100 * 8 * 32, True) and not model.training
    short = RECALL.replace(tokens=8 * 32 * 5)
    assert measure.learn(loop.Trainer(model, short.task().build(), short.training(0)), 0.0, steps.append) == (
        8 * 32 * 5,
        False,
    )


@pytest.mark.parametrize("name", ["attention", "griffin", "gla"])
def test_state_bytes_are_those_of_real_states(name):
    model = sized(name, 60_000, context=64).build()
    found = cost.measured_bytes(model, torch.randint(256, (1, 100)), (50, 300))
    for length, held in found:
        assert held == state.nbytes(model.read(torch.zeros(1, length, dtype=torch.long))[1])
    computed = dict(cost.computed_bytes(model))
    assert list(computed) == [2**k for k in range(10, 21)]
    assert (computed[2**20] > 500 * computed[2**10]) == (name == "attention")


def test_a_state_that_grows_undeclared_is_refused(monkeypatch):
    model = sized("gla", 30_000).build()
    monkeypatch.setattr(cost.states, "nbytes_after", lambda empty, length: 7)
    with pytest.raises(RuntimeError, match="bytes after 10 tokens, but 7 were computed"):
        cost.measured_bytes(model, torch.zeros(1, 10, dtype=torch.long), (10,))


@pytest.mark.float32("training in fp16 needs a scaled loss", only="float16")
def test_miniature_run(tmp_path, text):
    results = comparison(tmp_path / "run", text).run()
    assert results["complete"] and results == json.loads((tmp_path / "run/results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["gla", "attention"]
    for model in results["models"]:
        assert model["status"] == "complete" and all(block in model for block in BLOCKS)
        assert 0 < model["text"]["bits_per_byte"] < 9
        assert model["training"]["tokens"] == results["settings"]["train_tokens"]
        assert [n for n, _ in model["recall"]["pairs"]] == [4, 8]
        assert model["decode"][0]["context"] == 1024 and model["decode"][0]["p50_ms"] <= model["decode"][0]["p99_ms"]
        assert len(model["samples"]) >= 1 and model["recall"]["finished"] is False
        assert model["engine"]["in_python"] in (0, 1, 2, 4) and model["load"] >= 0
        assert describe(folder.load(tmp_path / "run" / model["name"]).cfg) == model["layers"]
        assert not (tmp_path / "run" / model["name"] / "training/checkpoint.safetensors").exists()
    assert "<html" in (tmp_path / "run/report.html").read_text()
    again = comparison(tmp_path / "run", text, names=("gla",))
    again._store = None  # nothing is left to do
    assert again.run()["models"] == results["models"]


def without_times(results):
    """What two runs must agree in."""
    return [
        (m["name"], [loss for _, loss in m["training"]["curve"]], m["text"], m["recall"], m["samples"])
        for m in results["models"]
    ]


@pytest.mark.float32("a command makes its models in the default dtype")
def test_interrupted_run_reports_and_goes_on_to_the_same_results(tmp_path, text, monkeypatch, ctrl_c):
    whole = comparison(tmp_path / "whole", text).run()
    real, made = loop.Trainer._advance, []

    def interrupted(self):
        made.append(1)
        if len(made) == 17:  # in the middle of the second model's training
            ctrl_c()
        return real(self)

    monkeypatch.setattr(loop.Trainer, "_advance", interrupted)
    partial = comparison(tmp_path / "run", text).run()
    assert not partial["complete"] and [m["status"] for m in partial["models"]] == ["partial", "partial"]
    assert 0 < partial["models"][1]["training"]["tokens"] < partial["settings"]["train_tokens"]
    assert "text" in partial["models"][0] and "text" not in partial["models"][1]
    assert (tmp_path / "run/report.html").exists()

    monkeypatch.setattr(measure, "recall_accuracy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    later = comparison(tmp_path / "run", text).run()
    assert all("text" in model and "recall" not in model for model in later["models"])

    monkeypatch.undo()
    done = comparison(tmp_path / "run", text).run()
    assert done["complete"] and without_times(done) == without_times(whole)


def test_other_settings_in_the_same_folder_are_refused(tmp_path, text):
    comparison(tmp_path, text).save()
    with pytest.raises(ValueError, match=r"other settings: settings.lr was 0.003, is 0.1\. Give the same settings"):
        comparison(tmp_path, text, settings=TINY.replace(lr=0.1))
    (text / "more.txt").write_text("more text " * 99)
    with pytest.raises(ValueError, match=r"text was '.* tokens in"):
        comparison(tmp_path, text)
    Path(tmp_path, "results.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold the results of a comparison"):
        comparison(tmp_path, text)
    Path(tmp_path, "results.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as results"):
        comparison(tmp_path, text)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"names": ()}, "no architectures to compare"),
        ({"names": ("gla", "gla")}, "gla is named twice"),
        ({"names": ("swiglu",)}, "no architecture 'swiglu'"),
        ({"settings": TINY.replace(params=100)}, "cannot have 100 parameters"),
        ({"settings": TINY.replace(context=100_000)}, "too few to train on sequences of 100000 tokens"),
    ],
)
def test_bad_input(tmp_path, text, change, message):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, text, **change)


def test_profiles():
    assert quick().quick and not Settings().quick
    assert profile(True, seed=3, params=9).replace(seed=0, params=quick().params) == quick()
    with pytest.raises(ValueError, match="tokens must be a whole number from 1 to .*, got 0"):
        profile(False, tokens=0)
    assert Settings.from_dict(json.loads(json.dumps(quick().to_dict()))) == quick()


def test_a_text_that_is_too_short_is_told_how_much_is_needed(tmp_path):
    (tmp_path / "short.txt").write_text("a short text " * 30)
    with pytest.raises(ValueError, match=r"the text has 391 bytes, too few .* give at least 2,048 bytes with --data"):
        Comparison(tmp_path / "out", names=("gla",), data=[tmp_path / "short.txt"])
    (tmp_path / "enough.txt").write_text("a text that is just long enough " * 70)
    assert Comparison(tmp_path / "out", names=("gla",), data=[tmp_path / "enough.txt"]).held_out.nbytes > 256


@pytest.mark.parametrize("length", [1, 2, 7, 256, 2048, 3000])
def test_buckets_cover_every_position_once_and_the_last_is_not_a_rest(length):
    values = torch.arange(1.0, length + 1)
    found = measure._buckets(values)
    places = [place for place, _ in found]
    assert places[0] == 1 and places == sorted(set(places))
    assert all(abs(mean - place) <= 0.12 * place + 0.5 for place, mean in found)
    if length > 100:
        assert found[-1][0] < 0.95 * length


def test_a_mixer_of_ones_own_is_compared_by_its_dotted_path():
    cfg = sized("test_laws:Average", 50_000)
    assert abs(count(cfg) / 50_000 - 1) <= 0.05
    assert cfg.layers[0].mixer.kind == "test_laws:Average" and describe(cfg).startswith("average + swiglu")
    assert type(cfg).from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
