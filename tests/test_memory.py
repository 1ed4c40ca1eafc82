"""What memory does not hold is refused before it is taken, with the sizes; a large model is counted quickly."""

import subprocess
import sys
import time

import pytest
import torch

from everlong import machine
from everlong.bench.memory import forget_peak, peak_bytes
from everlong.config import find, mixer_names
from everlong.feedforward.channelmix import ChannelMix
from everlong.models.blocks import MLP, Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.models.sizes import check_training, size
from everlong.train import job as jobs
from everlong.train.job import Job, simple_model
from everlong.train.loop import Trainer


def described(mixer, **changes):
    cfg = find(mixer).Config() if isinstance(mixer, str) else mixer
    layer = Layer.Config(mixer=cfg, mlp=SwiGLU.Config())
    return LanguageModel.Config(**{"vocab_size": 256, "d_model": 64, "layers": (layer,) * 2, **changes})


@pytest.mark.float32("models are counted in the dtype that they would be made in")
@pytest.mark.parametrize("name", mixer_names())
def test_sizes_are_counted_exactly(name):
    for cfg in find(name).examples().values():
        blocks = (None, SwiGLU.Config(), MLP.Config(), ChannelMix.Config(), None)
        layers = tuple(Layer.Config(mixer=cfg, mlp=mlp) for mlp in blocks)
        made = LanguageModel.Config(vocab_size=99, d_model=64, layers=layers, tied=name < "h").build()
        parameters = list(made.parameters())
        state = sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(made.init_state(1)))
        counted = (sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters), state)
        assert size(made.cfg) == counted


HUGE = {
    "a usual width": lambda: simple_model("gla", 100_000, 4, 256),
    "layers": lambda: simple_model("gla", 1024, 10_000, 256),
    "vocabulary": lambda: described("gla", vocab_size=2**31 - 1),
    "width": lambda: described("gla", d_model=2**31 - 2**10),
    "expand": lambda: described(find("mamba").Config(expand=2**24)),
    "hidden": lambda: described(
        "gla", layers=(Layer.Config(mixer=find("gla").Config(), mlp=MLP.Config(hidden=2**31 - 1)),)
    ),
    "expanded feed-forward": lambda: described(
        "gla", layers=(Layer.Config(mixer=find("gla").Config(), mlp=MLP.Config(expand=1e7)),)
    ),
    "window": lambda: described(find("attention").Config(window=2**31 - 1)),
    "filter layers": lambda: described(find("hyena").Config(filter_layers=2**31 - 1)),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_model_that_cannot_fit_is_refused_at_once(name):
    cfg = HUGE[name]()
    forget_peak()  # of the tests before this one
    before, began = peak_bytes(), time.perf_counter()
    with pytest.raises(
        ValueError, match=r"needs .*B, and .* of memory are free; choose|cannot be built|more than 10,000 tensors"
    ):
        cfg.build()
    assert time.perf_counter() - began < 30
    assert peak_bytes() - before < 400e6  # what PyTorch loads to count


def test_training_that_cannot_fit_is_refused_before_the_text_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.Corpus, "from_paths", lambda *args: pytest.fail("the text was read"))
    for changes, cfg in (({"batch": 10_000_000}, described("gla")), ({}, described("gla", d_model=65_536))):
        with pytest.raises(ValueError, match=r"to train .* parameters takes .* a batch of .* tokens takes .* are free"):
            jobs.train(Job(model=cfg, train=Trainer.Config(**changes)), tmp_path, device="cpu")
    check_training(described("gla"), 16, 16, 256)


def test_limits_of_the_process_count():
    code = (
        "import resource, torch; from everlong.train.job import simple_model;"
        "from everlong.machine import available_memory; free = available_memory();"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2);"
        "assert 200_000_000 < available_memory() <= 300_000_000 < free;"
        "simple_model('lstm', 1024, 40, 256).build()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs" in run.stderr and "MB of memory are free" in run.stderr.splitlines()[-1], run.stderr


def test_limits_of_the_control_group_count(monkeypatch):
    files = {
        "/proc/self/cgroup": ["0::/box/inner"],
        "/sys/fs/cgroup/box/inner/memory.max": ["max"],
        "/sys/fs/cgroup/box/inner/memory.current": ["5"],
        "/sys/fs/cgroup/box/memory.max": ["1000000"],
        "/sys/fs/cgroup/box/memory.current": ["400000"],
        "/sys/fs/cgroup/box/memory.stat": ["anon 1", "inactive_file 100000"],
    }
    monkeypatch.setattr(machine, "_lines", lambda path: files.get(path, []))
    assert machine.available_memory() == 700_000
    files["/proc/self/cgroup"], files["/sys/fs/cgroup/memory/a/memory.limit_in_bytes"] = ["3:memory:/a"], ["9000"]
    files["/sys/fs/cgroup/memory/a/memory.usage_in_bytes"] = ["8000"]
    assert machine.available_memory() == 1000
    with pytest.raises(ValueError, match="this needs 1.5 kB, and 1 kB of memory are free; buy some"):
        machine.require_memory(1500, "this", "buy some")


def test_sizes_in_words():
    said = [machine.in_words(n) for n in (0, 999, 1500, 999_600_000, 644_000_000_000, 2 * 10**17)]
    assert said == ["0 bytes", "999 bytes", "1.5 kB", "1000 MB", "644 GB", "200,000 TB"]


def test_a_peak_is_that_of_the_process_alone_and_can_begin_anew():
    code = "from everlong.bench.memory import peak_bytes; print(peak_bytes())"
    held = torch.ones(2**29, dtype=torch.uint8)
    theirs = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert theirs < peak_bytes() - 256e6, "a process is charged with what the one that started it held"
    before = peak_bytes()
    del held
    forget_peak()
    assert before - peak_bytes() > 400e6
