"""The command line: what is wrong is one line and status 2, whatever is typed; what is shown is what is done."""

import dataclasses
import os
import subprocess
import sys

import pytest
import typer.main

import everlong
import everlong.train.data
from everlong import cli
from everlong.config import find
from everlong.models.blocks import Layer
from everlong.models.lm import LanguageModel
from everlong.models.quantize import packed, quantized
from everlong.train.loop import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    layers = (Layer.Config(mixer=find("gla").Config(n_heads=2)),)
    everlong.save(LanguageModel.Config(vocab_size=256, d_model=32, layers=layers).build(), path)
    (path / "text.txt").write_text("the cat sat on the mat → 🧀. " * 30)
    return path


def told(capsys, monkeypatch, *arguments):
    """Status, output and errors of a command."""
    monkeypatch.setattr(sys, "argv", ["everlong", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    return ended.value.code or 0, shown.out, shown.err


HUGE = "99999999999999999999"
TRAIN = ("--mixer", "gla", "--d-model", 16, "--layers", 1, "--tokens", 64, "--context", 16, "--batch", 4)
REFUSED = [
    (("generate", "MODEL", "a", "--stop", ""), "stop must be texts of at least one character, got ''"),
    (
        ("generate", "MODEL", "a", "--max-tokens", "-3"),
        "max_tokens must be a whole number from 0 to 2147483647, got -3",
    ),
    (("generate", "MODEL", "a", "--seed", HUGE), f"seed must be a whole number from 0 to {2**63 - 1}, got {HUGE}"),
    (("generate", "MODEL", "a", "--seed", "-1"), "seed must be a whole number"),
    (("generate", "MODEL", "a", "--temperature", "nan"), "temperature must be a number from 0 to 100, got nan"),
    (("generate", "MODEL", "a", "--top-k", "-1"), "top_k must be a whole number from 0 to"),
    (("generate", "MODEL", "a", "--top-p", "inf"), "top_p must be a number from 0 to 1, got inf"),
    (("generate", "MODEL", "a", "--weights", "int9"), "no weight format 'int9'; did you mean 'int"),
    (("generate", "MODEL", "a", "--weights", "int8"), "nothing of this model can be packed in int8"),
    (("generate", "MODEL", "a\ud83e"), "half a character"),
    (("train", "", *TRAIN), "a path is empty (a variable that is not set?); give . for the folder you are in"),
    (("train", "MODEL", *TRAIN, "--seed", HUGE), f"seed must be a whole number from 0 to {2**63 - 1}, got {HUGE}"),
    (("train", "MODEL", *TRAIN, "--lr", "nan"), "lr must be a number from 1e-12 to 1000, got nan"),
    (("train", "MODEL", *TRAIN, "--d-model", HUGE), "d_model must be a whole number from 1 to"),
    (("train", "MODEL", *TRAIN, "--layers", HUGE), "layers must be a whole number from 1 to"),
    (("train", "MODEL", *TRAIN, "--save-every", "-1"), "save_every must be a whole number from 0 to"),
    (("train", "MODEL", *TRAIN, "--out", "MODEL/text.txt"), "text.txt is a file, so it cannot be the folder"),
    (("train", "MODEL", *TRAIN, "--out", "MODEL/text.txt/run"), "text.txt is a file, so it cannot be the folder"),
    (("train", "MODEL", "--resume", "MODEL"), "--resume already says what paths would set"),
    (("train", "--resume", "MODEL", "--context", "9"), "--resume already says what --context would set"),
    (("train", "MODEL", *TRAIN, "--tokenizer", ""), "the path of the tokenizer is empty"),
    (("compare", "--data", ""), "a path is empty"),
    (("compare", "--data", "MODEL", "--seed", HUGE), "seed must be a whole number"),
    (("compare", "--data", "MODEL", "--params", "0"), "params must be a whole number from 1 to"),
    (("compare", "--data", "MODEL", "--out", "MODEL/text.txt"), "text.txt is a file, so it cannot be the folder"),
    (("bench", "ops", "--quick", "--minutes", "0"), "minutes must be a number from 0.001 to"),
    (("bench", "ops", "--quick", "--minutes", "nan"), "minutes must be a number from 0.001 to"),
    (("bench", "ops", "--quick", "--threads", HUGE), "threads must be a whole number from 1 to 4096"),
    (("bench", "ops", "--quick", "--seconds", "nan"), "seconds must be a number from"),
    (("bench", "ops", "--quick", "--out", "MODEL/text.txt"), "text.txt is a file, so it cannot be the folder"),
    *(
        ((*command.split(), ""), "the path is empty (a variable that is not set?); give one")
        for command in (
            "generate",
            "generate MODEL a --session",
            "train MODEL --out",
            "train MODEL --config",
            "train --resume",
            "compare --out",
            "bench ops --quick --out",
            "bench models --quick --out",
        )
    ),
    (("bench", "models", "--quick", "--lengths", HUGE), "lengths must be a whole number from 1 to"),
]


@pytest.mark.parametrize(
    "arguments,message",
    REFUSED,
    ids=lambda value: value if isinstance(value, str) else ascii(" ".join(map(str, value)))[:60],
)
def test_what_is_wrong_is_one_line(arguments, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = [str(argument).replace("MODEL", str(folder)) for argument in arguments]
    status, out, error = told(capsys, monkeypatch, *typed)
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error and not out and not list(tmp_path.iterdir()), error


def test_the_defaults_shown_are_those_of_the_class():
    shown = {option.name: option.show_default for option in typer.main.get_command(cli.app).commands["train"].params}
    for field in dataclasses.fields(Trainer.Config):
        if field.name in shown and field.name != "bf16":
            assert float(str(shown[field.name]).replace(",", "")) == field.default, field.name
    assert {"tokens", "context", "batch", "accumulate", "lr", "seed", "save_every"} <= shown.keys()


def run(folder, *arguments, **options):
    command = [sys.executable, "-m", "everlong.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, cwd=folder, **options)


def test_an_8_bit_locale_shows_what_it_can(folder):
    eight = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    done = run(folder, "generate", ".", "mat → 🧀", "--max-tokens", 40, "--seed", 1, env={**os.environ, **eight})
    assert done.returncode == 0 and done.stdout.startswith(rb"mat \u2192 \U0001f9c0"), done.stderr
    listed = run(folder, "list", env={**os.environ, **eight})
    assert listed.returncode == 0 and b"mamba" in listed.stdout, listed.stderr


def test_a_closed_standard_input_is_one_line(folder):
    done = run(folder, "generate", ".", preexec_fn=lambda: os.close(0))
    assert done.returncode == 2 and done.stderr.startswith(b"error: there is no standard input"), done.stderr


def test_a_prompt_from_standard_input_is_taken_as_it_is(folder):
    done = run(folder, "generate", ".", "--max-tokens", 0, input="a\r\n→".encode())
    assert done.returncode == 0 and done.stdout == "a\r\n→\n".encode(), done.stderr


def test_links_that_lead_to_themselves_are_left_out(tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "folder").symlink_to(tmp_path)
    corpus = everlong.train.data.Corpus.from_paths(tmp_path)
    assert corpus.documents == 1 and corpus.skipped == {"not a regular file": 1}


def test_a_model_too_narrow_to_pack_says_so(folder):
    model = everlong.load(folder)
    with pytest.raises(ValueError, match=r"nothing of this model can be packed in int4: .*64.*d_model is 32.*bf16"):
        quantized(model, "int4")
    assert model.weights is None
    layers = (Layer.Config(mixer=find("gla").Config(n_heads=2)),)
    wide = quantized(LanguageModel.Config(vocab_size=256, d_model=64, layers=layers).build(), "int8")
    assert packed(wide)["embedding"] == "int8" and "layers.0.mixer.decay_proj.0" not in packed(wide)
    assert packed(model) == {}
