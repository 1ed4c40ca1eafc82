"""Where others want the cores, threads sleep while they wait: a team of idle threads comes and goes."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from everlong.generation.decoder import Decoder
from everlong.mixers.mamba2 import Mamba2
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.ops.native import MISSING, waiting

pytestmark = pytest.mark.skipif(MISSING is not None, reason="no kernels")


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A queue of our own: ``queue(share)`` lets a period pass, a ``share`` of which was spent standing in it."""
    clock, file = [100.0, 0], tmp_path / "schedstat"
    file.write_text("0 0 0")
    monkeypatch.setattr(waiting, "QUEUE", str(file))
    monkeypatch.setattr(waiting, "_OFF", False)
    monkeypatch.setattr(waiting, "_SEEN", waiting._Seen())
    team = waiting._Team()
    monkeypatch.setattr(waiting, "_TEAM", team)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    waiting.look()

    def passes(share, seconds=0.2):
        clock[0] += seconds
        clock[1] += int(share * seconds * 1e9)
        file.write_text(f"123 {clock[1]} 7")
        return waiting.look()

    yield passes
    team.go()


def teams():
    return [thread for thread in threading.enumerate() if thread.name == "everlong-waiting"]


def test_on_a_quiet_machine_there_is_no_team(queue):
    before = len(teams())
    assert not any(queue(0.01) for _ in range(20))
    assert len(teams()) == before


def test_a_team_comes_where_cores_are_crowded_and_goes_when_they_are_not(queue):
    before = len(teams())
    assert queue(0.5)
    assert len(teams()) == before + 1
    assert queue(0.6) and len(teams()) == before + 1  # one, however often
    assert queue(0.0), "one quiet moment is no quiet machine"
    assert not queue(0.0, seconds=waiting.CALM + 1)
    assert len(teams()) == before


def test_a_second_thread_begins_without_a_past(queue):
    found = []
    thread = threading.Thread(target=lambda: found.append(waiting.look()))
    thread.start()
    thread.join()
    assert found == [False]


def test_it_can_be_switched_off():
    code = "from everlong.ops.native import waiting; print(waiting._OFF, waiting.look())"
    out = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "EVERLONG_WAIT": "spin"}, capture_output=True, text=True
    )
    assert out.stdout.split() == ["True", "False"], out.stderr


def model():
    layer = Layer.Config(mixer=Mamba2.Config(head_dim=16), mlp=SwiGLU.Config())
    return LanguageModel.Config(vocab_size=64, d_model=64, layers=(layer,) * 2).build().eval()


def test_models_training_and_decoding_look(monkeypatch):
    looks = []
    monkeypatch.setattr(waiting, "look", lambda: bool(looks.append(1)))
    lm = model()
    lm(torch.zeros(1, 3, dtype=torch.long))
    assert looks
    decoder = Decoder(lm)
    looks.clear()
    decoder.step(torch.zeros(1, dtype=torch.long))
    assert looks


def test_results_are_the_same_beside_a_team(queue):
    lm, tokens = model(), torch.randint(0, 64, (2, 40))

    def everything():
        lm.zero_grad()
        lm.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        decoder = Decoder(lm)
        steps = [decoder.step(tokens[:1, t]).clone() for t in range(8)]
        return [*steps, *(p.grad.clone() for p in lm.parameters())]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = everything()
        assert queue(0.9)
        together = everything()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("content", [None, "", "what", "1"])
def test_a_queue_that_cannot_be_read_is_no_error(queue, monkeypatch, content):
    if content is None:
        monkeypatch.setattr(waiting, "QUEUE", "/nowhere")
    else:
        with open(waiting.QUEUE, "w") as file:
            file.write(content)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: 1e6)
    assert waiting.look() is False


def test_an_unknown_way_to_wait_is_refused():
    code = "import everlong.ops.native.waiting"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "EVERLONG_WAIT": "SPIN"}, capture_output=True, text=True
    )
    assert "EVERLONG_WAIT=SPIN is no way to wait; expected adaptive or spin" in done.stderr
