"""Files are data: no folder, job, session or results file runs code, and none is executed for lying around."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import everlong
from everlong import config as configs
from everlong import kinds
from everlong.config import Config, find, needs_trust, reading
from everlong.mixers.gla import GLA
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.train.job import Job, read_job, read_model_config
from everlong.train.loop import Trainer

SOURCE = str(Path(everlong.__file__).parent.parent)
MIXER = """
import pathlib
pathlib.Path("RAN").touch()
from everlong.mixers.gla import GLA
class Boo(GLA): pass
"""


class Mine(GLA):
    """A mixer of a module that is imported already."""


def tiny(mixer="gla", **options):
    torch.manual_seed(0)
    layer = Layer.Config(mixer=find(mixer).Config(n_heads=2) if isinstance(mixer, str) else mixer, mlp=SwiGLU.Config())
    return LanguageModel.Config(**{"vocab_size": 256, "d_model": 16, "layers": (layer,), **options}).build()


def evil(folder, kind, name="config.json"):
    """Write a model, and a job, whose config names ``kind``."""
    everlong.save(tiny(), folder)
    job = Job(model=tiny().cfg, train=Trainer.Config(tokens=256, context=16, batch=4))
    (folder / "job.json").write_text(configs.dumps(job))
    for name in ("config.json", "job.json"):
        data = json.loads((folder / name).read_text())
        data["model"]["layers"][0]["mixer"]["kind"] = kind
        data.pop("fingerprint", None)
        (folder / name).write_text(json.dumps(data))


def everlong_in(folder, *arguments, path=SOURCE):
    """The command as it is installed, in ``folder``."""
    code = "import sys; sys.path[:] = filter(None, sys.path); from everlong.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(kinds, "_named", set())
    monkeypatch.setattr(kinds, "_folders", [])
    yield
    for name in ("payload", "payload_pack", "payload_pack.boo"):
        sys.modules.pop(name, None)


KINDS = ("payload:Boo", "payload_pack.boo", "payload_pack.boo:Boo", "tests_trust.none:Boo", "os:Boo", "torch.nn:Linear")


@pytest.mark.parametrize(
    "kind", [*KINDS, "everlong:Boo", "everlong.cli:Boo", "everlong.bench.memory:Boo", "__main__:Boo"]
)
def test_a_folder_runs_no_code(tmp_path, monkeypatch, kind):
    (tmp_path / "payload.py").write_text(MIXER)
    (tmp_path / "payload_pack").mkdir()
    (tmp_path / "payload_pack" / "boo.py").write_text(MIXER)
    evil(tmp_path, kind)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    for read, name in (
        (lambda: everlong.load(tmp_path), "config.json"),
        (lambda: read_model_config(tmp_path), "config.json"),
        (lambda: read_job(tmp_path), "job.json"),
        (lambda: Job.from_dict(json.loads((tmp_path / "job.json").read_text())), ""),
    ):
        with pytest.raises(
            ValueError, match=rf"{name}.*kind '{kind}' is code of the module .*trust_code=True.*--trust-code"
        ):
            read()
    assert not Path("RAN").exists() and not {name for name in set(sys.modules) - before if "payload" in name}


STRANGE = (
    *(".os:x", ":x", "everlong.mixers.mamba:", "everlong.mixers.base:Mixer", "everlong.mixers.base:Config"),
    *("everlong.mixers.os:x", "everlong.models.lm:LanguageModel", "everlong.mixers.:x", "everlong.mixers.mamba:torch"),
    *("everlong.mixers.mamba:__class__", "layer", "norm", "gla:GLA", "\0", "a b.c", "é.x:y"),
)


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_kinds_are_refused(tmp_path, kind):
    evil(tmp_path, kind)
    with pytest.raises(ValueError, match="kind|module|mixer|path|option"):
        everlong.load(tmp_path)


def test_a_dotted_path_of_ours_needs_no_trust(tmp_path):
    evil(tmp_path, "everlong.mixers.gla:GLA")
    assert everlong.load(tmp_path).cfg == tiny().cfg


def test_trust_is_given_by_the_caller_or_by_naming_that_module_alone(tmp_path, monkeypatch):
    (tmp_path / "payload.py").write_text(MIXER)
    (tmp_path / "payload_pack").mkdir()
    (tmp_path / "payload_pack" / "boo.py").write_text(MIXER)
    evil(tmp_path, "payload:Boo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    find("payload_pack.boo")
    with pytest.raises(ValueError, match="module 'payload'"):
        everlong.load(tmp_path)
    loaded = everlong.load(tmp_path, trust_code=True)
    assert type(loaded.layers[0].mixer).__name__ == "Boo" and needs_trust(loaded.cfg) and not needs_trust(tiny().cfg)
    with pytest.raises(ValueError, match="module 'payload'"):  # the word holds for one call
        everlong.load(tmp_path)
    assert read_job(tmp_path, trust_code=True).model == read_model_config(tmp_path, trust_code=True) == loaded.cfg
    find("payload:Boo")
    assert everlong.load(tmp_path).cfg == loaded.cfg


def test_an_imported_class_needs_the_same_word(tmp_path):
    model = tiny(Mine.Config(n_heads=2))
    everlong.save(model, tmp_path)
    with pytest.raises(ValueError, match=f"kind '{__name__}:Mine' is code of the module"):
        everlong.load(tmp_path)
    assert everlong.load(tmp_path, trust_code=True).cfg == model.cfg
    with pytest.raises(ValueError, match="is code of the module"):
        Config.from_dict(Mine.Config().to_dict())
    with pytest.raises(ValueError, match="some.json: kind"), reading("some.json"):
        Config.from_dict(Mine.Config().to_dict())
    assert Config.from_dict(Mine.Config().to_dict(), trust_code=True) == Mine.Config()
    find(f"{__name__}:Mine")
    assert Config.from_dict(Mine.Config().to_dict()) == Mine.Config()


def test_the_command_line_asks_too(tmp_path):
    (tmp_path / "payload.py").write_text(MIXER)
    (tmp_path / "text.txt").write_text("some text " * 400)
    evil(tmp_path, "payload:Boo")
    for arguments in (["generate", ".", "hi"], ["train", "--resume", "."], ["train", "text.txt", "--config", "."]):
        run = everlong_in(tmp_path, *arguments)
        assert run.returncode == 2 and "kind 'payload:Boo' is code of" in run.stderr and "--trust-code" in run.stderr
        assert not (tmp_path / "RAN").exists(), arguments
    run = everlong_in(tmp_path, "generate", ".", "hi", "--max-tokens", "2", "--trust-code")
    assert run.returncode == 0 and run.stdout.startswith("hi") and (tmp_path / "RAN").exists(), run.stderr


@pytest.mark.slow
def test_a_mixer_that_is_typed_needs_no_flag(tmp_path):
    (tmp_path / "payload.py").write_text(MIXER)
    (tmp_path / "text.txt").write_text("some text " * 400)
    sizes = ["--d-model", "16", "--layers", "1", "--tokens", "256", "--context", "16", "--batch", "4"]
    run = everlong_in(tmp_path, "train", "text.txt", "--mixer", "payload:Boo", *sizes, "--out", "run")
    assert run.returncode == 0 and "everlong generate run --trust-code" in run.stdout, run.stderr
    run = everlong_in(tmp_path, "train", "--resume", "run")
    assert run.returncode == 2 and "run/job.json: kind 'payload:Boo'" in run.stderr and "--trust-code" in run.stderr
    run = everlong_in(tmp_path, "train", "--resume", "run", "--trust-code")
    assert run.returncode == 0, run.stderr


WATCH = """
import os, sys
sys.path[:] = filter(None, sys.path)
class Watch:
    def find_spec(self, name, path=None, target=None):
        here = [entry for entry in sys.path if entry == "" or os.path.realpath(entry) == os.getcwd()]
        if path is None and here:
            print("LOOKED", name, file=sys.stderr)
sys.meta_path.insert(0, Watch())
from everlong.cli import main
main()
"""
LYING = (
    "triton",
    "opt_einsum",
    "pandas",
    "IPython",
    "ipywidgets",
    "plotly",
    "orjson",
    "rich",
    "numpy",
    "torch_xla",
    "sitecustomize",
)
TRAIN = shlex.split("train text.txt --d-model 16 --layers 1 --tokens 256 --context 16 --batch 4 --out run")
COMMANDS = {
    "list": ["list"],
    "generate": ["generate", "model", "hi", "--max-tokens", "3", "--session", "s"],
    "train": [*TRAIN, "--mixer", "gla"],
    "compare": ["compare", "--mixers", "nothing"],
    "check": ["check", "nothing"],
    "bench ops": ["bench", "ops", "--ops", "nothing"],
    "bench models": ["bench", "models", "--models", "nothing"],
    "help": ["--help"],
}


@pytest.mark.parametrize(
    "name", [n if n in ("list", "generate") else pytest.param(n, marks=pytest.mark.slow) for n in COMMANDS]
)
def test_no_command_runs_files_of_the_folder_one_is_in(tmp_path, name):
    for lying in LYING:
        (tmp_path / f"{lying}.py").write_text(f"import pathlib; pathlib.Path('RAN-{lying}').touch()")
    everlong.save(tiny(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("some text " * 400)
    env = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", WATCH, *COMMANDS[name]], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == (2 if "nothing" in COMMANDS[name] else 0), run.stderr
    assert "LOOKED" not in run.stderr and not list(tmp_path.glob("RAN-*")), run.stderr


@pytest.mark.slow
def test_measuring_in_a_process_of_its_own_neither(tmp_path, monkeypatch):
    from everlong.bench.memory import measured

    for lying in LYING:
        (tmp_path / f"{lying}.py").write_text(f"import pathlib; pathlib.Path('RAN-{lying}').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", SOURCE)
    found = measured("read", {"model": tiny().cfg.to_dict(), "length": 8, "threads": 1})
    assert found["peak_bytes"] > 0 and not list(tmp_path.glob("RAN-*"))


def test_only_the_typed_path_is_looked_for_there(tmp_path):
    (tmp_path / "payload.py").write_text("import helper\nfrom everlong.mixers.base import Mixer")
    (tmp_path / "helper.py").write_text("")
    env = {**os.environ, "PYTHONPATH": SOURCE}
    run = subprocess.run(
        [sys.executable, "-c", WATCH, "check", "payload:Boo"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    looked = {line.split()[1] for line in run.stderr.splitlines() if line.startswith("LOOKED")}
    assert looked == {"payload", "helper"} and "payload defines no 'Boo'" in run.stderr, run.stderr


def test_a_file_is_named_by_its_class(tmp_path, monkeypatch):
    (tmp_path / "boo.py").write_text("raise SystemExit('it ran')")
    monkeypatch.chdir(tmp_path)
    for kind in ("boo.py", "./boo.py", "boo.py:Boo"):
        with pytest.raises(ValueError, match=r"is a file, expected a dotted path"):
            find(kind)
    with pytest.raises(ValueError, match="a single file, my_mixer:ClassName"):
        find("boo")
