"""The bench: fair rounds, refusals of what is wrong, peers on our weights, results, bad input."""

import json
import math
import os
import shlex
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from everlong import cli, numerics
from everlong.bench import checks, claims, clock, engines, memory, models, ops, peers, results, run, training
from everlong.bench.limits import Limits
from everlong.bench.plan import models_plan, ops_plan
from everlong.config import find
from everlong.feedforward.channelmix import ChannelMix
from everlong.mixers.base import spared
from everlong.models.blocks import Layer, Norm, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.ops.cases import CASES, TIMED, Case
from everlong.ops.dispatch import Impl, Table
from everlong.report import bench as report

FAST = clock.Pace(seconds=60.0, least=2, most=2)
GOOSE = Norm.Config(style="layer")
TINY = Case("tiny", batch=1, time=19, heads=2, keys=4, values=8)


def config(mixer, **changes):
    return LanguageModel.Config(vocab_size=96, d_model=64, layers=(Layer.Config(mixer=mixer),) * 2, **changes)


CONFIGS = {
    "mamba": config(find("mamba").Config(), residual_fp32=True),
    "mamba2": config(find("mamba2").Config(d_state=16, head_dim=32), residual_fp32=True),
    "llama": LanguageModel.Config(
        vocab_size=96,
        d_model=64,
        layers=(Layer.Config(mixer=find("attention").Config(n_heads=4, n_kv_heads=2), mlp=SwiGLU.Config(hidden=96)),)
        * 2,
    ),
    "rwkv7": LanguageModel.Config(
        vocab_size=96,
        d_model=128,
        layers=(Layer.Config(mixer=find("rwkv7").Config(), mlp=ChannelMix.Config(), norm=GOOSE),) * 2,
        norm=GOOSE,
        embed_norm=GOOSE,
        tied=False,
    ),
}


@pytest.fixture
def limits():
    return Limits(2**16)


def tokens(batch=1, length=24):
    return torch.randint(0, 96, (batch, length))


class TestClock:
    def test_contenders_take_turns(self):
        order = []

        def contender(name):
            return lambda: order.append(name) or [1e-3]

        laps = clock.interleave({name: contender(name) for name in "abc"}, clock.Pace(seconds=0.012, least=1, most=9))
        assert "".join(order) == "abc" + "abc" * 4  # warm-up, then 0.012 s of turns of 0.003 s
        assert all(len(lap.rounds) == 4 for lap in laps.values())

    def test_what_is_slow_is_run_once(self):
        ran = {"quick": 0, "slow": 0, "slower": 0}

        def contender(name, seconds):
            def work():
                ran[name] += 1
                return [seconds]

            return work

        pace = clock.Pace(seconds=1.0, least=3, most=3, patience=10.0)
        pairs = {"quick": 0.1, "slow": 2.0, "slower": 20.0}
        laps = clock.interleave({name: contender(name, seconds) for name, seconds in pairs.items()}, pace)
        assert ran == {"quick": 4, "slow": 2, "slower": 1}
        assert [len(laps[name].rounds) for name in pairs] == [3, 1, 1]
        assert clock.ratios(laps["quick"], laps["slower"]) == {"min": 200, "median": 200, "max": 200, "rounds": 3}

    def test_ratios_are_formed_within_rounds(self):
        ours, theirs = clock.Laps(((1.0,), (10.0,), (2.0,))), clock.Laps(((2.0,), (40.0,), (6.0,)))
        assert clock.ratios(ours, theirs) == {"min": 2.0, "median": 3.0, "max": 4.0, "rounds": 3}
        assert clock.rates(ours, 20)["median"] == 10.0

    def test_tails_need_enough_units(self):
        few = clock.latencies(clock.Laps((tuple(k / 1000 for k in range(1, 51)),)))
        assert few == {"p50": pytest.approx(25.5), "p99": None, "p999": None, "units": 50}
        many = clock.latencies(clock.Laps((tuple(k / 1000 for k in range(1, 1001)),)))
        assert many["p999"] == pytest.approx(999.0, abs=0.1) and many["p99"] == pytest.approx(990.0, abs=0.1)
        with pytest.raises(ValueError, match="no values"):
            clock.quantile([], 0.5)

    def test_exponent(self):
        assert clock.slope([(x, 3 * x**1.5) for x in (2, 8, 64)]) == pytest.approx(1.5)
        assert clock.slope([(2, 1.0), (2, 2.0)]) is None


class TestOps:
    @pytest.mark.parametrize("item", ops.items(ops.OpsPlan(cases=(TINY,))), ids=lambda item: item.label)
    def test_every_op_is_timed(self, item):
        rows = ops.time_item(item, ops.OpsPlan(pace=FAST))
        assert {row["status"] for row in rows} <= {"timed", "refused"}, [row["reason"] for row in rows]
        singles = [row for row in rows if row["dtype"] == "fp32" and row["status"] == "timed"]
        assert {row["pass"] for row in singles} == set(ops.PASSES)
        for row in singles:
            assert row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"] and row["gflops"] > 0 and row["gbs"] > 0

    def test_every_op_is_counted(self):
        module = ops.modules()["selective_scan"]
        given = module.inputs(TIMED[0].but(variant="no D"))
        assert module.selective_scan.operations(given) == 2048 * 1536 * (16 * 7 + 1)
        item = next(item for item in ops.items(ops.OpsPlan(ops=("selective_scan",), cases=(TINY,))))
        rows = ops.time_item(item, ops.OpsPlan(dtypes=("fp32",), pace=FAST))
        ahead, both = ([row["gflops"] * row["ms"]["median"] for row in rows if row["pass"] == p] for p in ops.PASSES)
        assert both == pytest.approx([3 * work for work in ahead])

    def break_op(self, monkeypatch, spoil):
        """selective_scan's torch form, spoilt."""
        module = ops.modules()["selective_scan"]
        right = next(row for row in module.TABLE if row.name == "torch").run

        def wrong(**inputs):
            y, state = right(**inputs)
            return spoil(y), state

        rows = (Impl("torch", wrong) if row.name == "torch" else row for row in module.TABLE)
        monkeypatch.setattr(module, "TABLE", Table("selective_scan", *rows, sequence=module.SEQUENCE))
        plan = ops.OpsPlan(ops=("selective_scan",), cases=(TINY,), dtypes=("fp32",), pace=FAST)
        rows = [row for row in ops.time_item(ops.items(plan)[0], plan) if row["backend"] == "torch"]
        return {row["pass"]: row for row in rows}

    def test_a_wrong_result_is_not_timed(self, monkeypatch):
        rows = self.break_op(monkeypatch, lambda y: 1.001 * y)
        for row in rows.values():
            assert (
                row["status"] == "mismatch"
                and "ms" not in row
                and row["error"] == pytest.approx(1e-3, rel=numerics.BOUNDS["fp32 gradient"])
            )
            assert row["reason"] == "output 0: relative error 1.0e-03, allowed 2e-04"

    def test_a_wrong_gradient_is_not_timed(self, monkeypatch):
        rows = self.break_op(monkeypatch, lambda y: y.detach() + 1.01 * (y - y.detach()))
        assert rows["forward"]["status"] == "timed"
        wrong = rows["forward+backward"]
        assert wrong["status"] == "mismatch" and "ms" not in wrong and "gradient of" in wrong["reason"]

    def test_nan_is_a_mismatch(self, monkeypatch):
        rows = self.break_op(monkeypatch, lambda y: y * torch.nan)
        assert rows["forward"]["status"] == "mismatch" and math.isinf(rows["forward"]["error"])

    def test_a_form_that_refuses_says_why(self, monkeypatch):
        module = ops.modules()["short_conv"]
        picky = Impl("picky", module.TABLE[0].run, lambda **inputs: "it is Sunday")
        monkeypatch.setattr(module, "TABLE", Table("short_conv", picky, *module.TABLE, sequence=module.SEQUENCE))
        plan = ops.OpsPlan(ops=("short_conv",), cases=(TINY,), dtypes=("fp32",), pace=FAST)
        rows = [row for row in ops.time_item(ops.items(plan)[0], plan) if row["backend"] == "picky"]
        assert [(row["status"], row["reason"]) for row in rows] == [("refused", "it is Sunday")] * 2

    def test_gradients_over_many_tokens_are_summed_in_fp32(self):
        plan = ops.OpsPlan(ops=("diagonal_scan",), cases=(TINY.but(time=500, heads=16),), dtypes=("bf16",), pace=FAST)
        item = next(item for item in ops.items(plan) if item.case.variant == "invariant")
        assert {row["status"] for row in ops.time_item(item, plan)} == {"timed"}

    def test_gates_and_norms_take_all_channels(self):
        subject = ops.Subject(ops.Item("norm", TINY.but(heads=4, keys=8, values=16, variant="rms")))
        assert subject.inputs["x"].shape[2:] == (1, 64) and subject.sequence == ("x",)
        assert subject.per_token(subject.truth) == subject.truth

    def test_large_graphs_of_loops_are_left_out(self):
        item = ops.Item(
            "linear_attention", Case("wide", batch=1, time=4096, heads=2, keys=256, values=256, variant="none")
        )
        subject = ops.Subject.__new__(ops.Subject)
        subject.item, subject.complex, subject.recurrent = item, False, True
        subject.op = ops.modules()["linear_attention"].linear_attention
        subject.truth = [torch.zeros(1), torch.zeros(2, 256, 256)]
        assert subject.graph_bytes(4096, 4) == 6 * 4 * 2 * 256 * 256 * 4096 > ops.GRAPH


class TestEngines:
    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
    @pytest.mark.float32("peers are compared in fp32")
    def test_ours_equals_the_functional_forward(self, name, weights):
        engine = engines.Everlong(engines.randomized(CONFIGS[name]), weights)
        assert checks.check_engine(engine, tokens(2)).reason is None

    @pytest.mark.parametrize("method", ["read", "step"])
    @pytest.mark.float32("peers are compared in fp32")
    def test_wrong_logits_are_refused(self, monkeypatch, method):
        right = getattr(engines.Everlong, method)
        monkeypatch.setattr(engines.Everlong, method, lambda self, tokens: 1.01 * right(self, tokens))
        rig = models.Rig("tiny", CONFIGS["mamba"], "fp32", small_plan())
        assert not rig.engines and rig.ours is None
        rows = models.prefill(rig) + models.batches(rig)
        assert [(row["engine"], row["status"]) for row in rows] == [("everlong", "mismatch")] * 2
        assert "relative error 1.0e-02, allowed 2e-04" in rows[0]["reason"] and "seconds" not in rows[0]

    def test_random_weights_leave_no_block_silent(self):
        """RWKV-7's last matrices begin at zero, so its blocks would add nothing."""
        quiet, loud = CONFIGS["rwkv7"].build(), engines.randomized(CONFIGS["rwkv7"])
        assert not quiet.layers[0].mixer.out_proj.weight.any()
        assert all(float(p.std()) > 0 for p in loud.parameters() if p.numel() > 1)

    def test_bytes_of_weights(self):
        tied, own = (engines.randomized(CONFIGS[name]) for name in ("mamba", "rwkv7"))
        assert engines.Everlong(tied, "fp32").nbytes == 4 * sum(p.numel() for p in tied.parameters())
        read = sum(p.numel() for p in own.parameters()) - 96 * 128  # a table that is only looked up
        decays = sum(
            p.numel() for name, p in own.named_parameters() if name in spared(own)
        )  # in fp32 whatever the rest is
        assert engines.Everlong(own, "bf16").nbytes == 2 * (read + decays)
        assert engines.Everlong(own, "int4").nbytes < engines.Everlong(own, "int8").nbytes < 2 * read

    def test_bytes_of_histories(self):
        """Keys and values of every token, or of the last ones; what recurrences keep is not counted."""
        layers = [find("attention").Config(n_kv_heads=2), find("attention").Config(window=9), find("mamba2").Config()]
        cfg = LanguageModel.Config(vocab_size=9, d_model=64, layers=tuple(Layer.Config(mixer=m) for m in layers))
        model = cfg.build().float()
        assert engines.history_bytes(model, 100) == 4 * (2 * 100 * 2 * 16) + 4 * (2 * 9 * 64) + 8
        assert engines.history_bytes(model, 3) == 4 * (2 * 3 * 2 * 16) + (4 * (2 * 9 * 64) + 8) * 3 // 9

    @pytest.mark.float32("peers are compared in fp32")
    def test_integers_are_held_to_the_values_they_stand_for(self):
        engine = engines.Everlong(engines.randomized(CONFIGS["mamba"]), "int4")
        truth, original = engine.truth().layers[0].mixer, engine._original.layers[0].mixer
        assert not torch.equal(truth.in_proj.weight, original.in_proj.weight)
        assert torch.equal(truth.in_proj.weight, engine.model.layers[0].mixer.in_proj.weight)
        assert torch.equal(truth.A_log, original.A_log)

    @pytest.mark.float32("peers are compared in fp32")
    def test_a_fork_has_a_state_of_its_own(self):
        engine, prompt = engines.Everlong(engines.randomized(CONFIGS["mamba"]), "fp32"), tokens(1, 9)
        engine.read(prompt[:, :8])
        other = engine.fork()
        other.read(prompt[:, :3])
        want = engine.truth()(prompt)[0][0]
        numerics.assert_close(other.step(prompt[:, 3])[0], want[3], "step 3", numerics.BOUNDS["fp32 product"])
        numerics.assert_close(engine.step(prompt[:, 8])[0], want[8], "step 8", numerics.BOUNDS["fp32 product"])


class TestPeers:
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("name", ["mamba", "mamba2", "llama"])
    @pytest.mark.parametrize("weights", ["fp32", "bf16"])
    def test_transformers_has_our_weights(self, name, weights):
        pytest.importorskip("transformers")
        engine = peers.engine("transformers", engines.randomized(CONFIGS[name]), weights, tokens=64)
        assert checks.check_engine(engine, tokens(2)).reason is None
        engine.model.get_output_embeddings().weight.data[3] *= 2
        assert "relative error" in checks.check_engine(engine, tokens(2)).reason

    @pytest.mark.filterwarnings("ignore")
    def test_what_transformers_lacks_is_unavailable(self):
        pytest.importorskip("transformers")
        with pytest.raises(engines.Unavailable, match="transformers has no rwkv7"):
            peers.engine("transformers", engines.randomized(CONFIGS["rwkv7"]), "fp32", tokens=64)
        hybrid = LanguageModel.Config(
            vocab_size=96, d_model=64, layers=(*CONFIGS["mamba"].layers, *CONFIGS["llama"].layers)
        )
        with pytest.raises(engines.Unavailable, match="hybrid of attention and mamba"):
            peers.engine("transformers", engines.randomized(hybrid), "fp32", tokens=64)

    @pytest.mark.skipif(
        util.find_spec("llama_cpp") is None or util.find_spec("gguf") is None,
        reason='llama.cpp is not installed; pip install "everlong[peers]"',
    )
    def test_llama_cpp_has_our_weights(self):
        """In a process of its own, because llama.cpp brings another OpenMP runtime into the one that loads it."""
        code = (
            "import torch; from test_bench import CONFIGS; from everlong.bench import checks, engines, peers\n"
            "for name, cfg in CONFIGS.items():\n"
            "    for form in ('f32', 'f16', 'Q8_0', 'Q4_0'):\n"
            "        engine = peers.engine('llama.cpp', engines.randomized(cfg), form, tokens=64, batch=2)\n"
            "        print(name, form, checks.check_engine(engine, torch.randint(0, 96, (2, 40))).reason)\n"
            "        engine.close()\n"
        )
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
        assert len(out.splitlines()) == 16 and all(line.endswith(" None") for line in out.splitlines()), out

    def test_missing_peers_say_how_to_install_them(self, monkeypatch):
        monkeypatch.setattr(peers.util, "find_spec", lambda name: None if name == "llama_cpp" else object())
        assert peers.check_peers(["transformers"]) == ["transformers"]
        with pytest.raises(ValueError, match=r'llama_cpp not installed; pip install "everlong\[peers\]"'):
            peers.check_peers(["transformers", "llama.cpp"])
        with pytest.raises(ValueError, match="no peer 'llama'; did you mean 'llama.cpp'"):
            peers.check_peers(["llama"])

    def test_importing_the_bench_imports_no_peer(self):
        code = (
            "import sys, everlong.bench.run, everlong.bench.plan, everlong.report.bench;"
            "print(*{'transformers', 'llama_cpp', 'gguf'} & set(sys.modules))"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == ""


class Copy(engines.Everlong):
    """A peer for tests: our own engine under another name."""

    title = "copy"

    def __init__(self, model, weights, *, tokens, batch=1):
        super().__init__(model, weights)


@pytest.fixture
def copycat(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "copy", peers.Peer("none", (), {"fp32": "fp32", "bf16": "bf16"}))
    monkeypatch.setattr(peers, "engine", lambda name, model, form, **kw: Copy(model, form, **kw))


def small_plan(**changes):
    plan = {
        "models": {"tiny": CONFIGS["mamba"]},
        "weights": ("fp32",),
        "lengths": (8, 16),
        "contexts": (8, 16),
        "batches": (1, 2),
        "reads": (64, 256),
        "steps": 4,
        "pace": FAST,
        "training": training.Shape(d_model=64, layers=3, batch=2, context=16, dtypes=("fp32", "bf16")),
    }
    return models.ModelsPlan(**{**plan, **changes})


class TestModels:
    @pytest.mark.float32("peers are compared in fp32")
    def test_a_whole_run_reads_back(self, tmp_path, copycat, limits, monkeypatch):
        monkeypatch.setattr(run, "Limits", lambda: limits)
        monkeypatch.setattr(limits, "measure", lambda: {"read_gbs": 1.0, "read_by": "test"})
        figures = {"peak_bytes": 2**20, "taken_bytes": 1}  # measured in processes of their own, see TestMemory
        monkeypatch.setattr(memory, "measured", lambda what, settings: figures)
        seen = []
        plan = small_plan(against=("copy",))
        made = run.run_models(plan, run.Terms(tmp_path, threads=1), lambda *told: seen.append(told))
        assert made == results.load(tmp_path) == json.loads(json.dumps(made))
        assert made["complete"] and not made["failed"] and {row["status"] for row in made["rows"]} == {"timed"}
        assert {row["measure"] for row in made["rows"]} == set(models.MEASURES)
        assert seen[-1][0] == seen[-1][1] == len(models.stages(models.Stand(plan), limits))
        for row in made["rows"]:
            if row["engine"] == "everlong" and row["measure"] in ("prefill", "decode"):
                assert set(row["ratios"]) == {"copy fp32"} and row["ratios"]["copy fp32"]["rounds"] == 2
        decode = {
            row["context"]: row for row in made["rows"] if row["measure"] == "decode" and row["engine"] == "everlong"
        }
        assert decode[16]["against_shortest"]["context"] == 8 and "against_shortest" not in decode[8]
        assert decode[8]["latency_ms"]["units"] == 8 and decode[8]["share_of_read"]["median"] > 0

    def test_one_that_fails_does_not_stop_the_others(self, tmp_path, limits, monkeypatch):
        def fail():
            raise RuntimeError("out of memory")

        stages = [models.Stage("one", fail), models.Stage("two", lambda: [{"status": "timed"}])]
        found = results.begin("ops", "", {})
        run._work(found, stages, run.Terms(tmp_path), lambda *told: None)
        assert (
            found["failed"] == [{"label": "one", "reason": "RuntimeError: out of memory"}] and len(found["rows"]) == 1
        )

    def test_no_stage_begins_too_late(self, tmp_path):
        found = results.begin("ops", "", {})
        run._work(found, [models.Stage("one", list)], run.Terms(tmp_path, minutes=-1), lambda *told: None)
        assert found["skipped"] == ["one"]

    def test_ctrl_c_keeps_what_there_is(self, tmp_path, limits, monkeypatch):
        monkeypatch.setattr(run, "Limits", lambda: limits)
        monkeypatch.setattr(limits, "measure", dict)

        def watch(done, total, label):
            if done == 1:
                raise KeyboardInterrupt

        plan = ops.OpsPlan(ops=("max_plus_scan",), cases=(TINY, TINY), dtypes=("fp32",), pace=FAST)
        made = run.run_ops(plan, run.Terms(tmp_path), watch)
        assert not made["complete"] and results.load(tmp_path)["rows"] and "Ctrl-C" in made["skipped"][0]

    @pytest.mark.parametrize("goals", [False, True])
    def test_the_goals_of_the_project_are_for_its_scripts(self, tmp_path, limits, monkeypatch, goals):
        monkeypatch.setattr(run, "Limits", lambda: limits)
        monkeypatch.setattr(limits, "measure", dict)
        monkeypatch.setattr(claims, "lines", lambda kind, rows: [{"claim": "fast"}])
        plan = ops.OpsPlan(ops=("max_plus_scan",), cases=(TINY,), dtypes=("fp32",), pace=FAST)
        made = run.run_ops(plan, run.Terms(tmp_path, goals=goals), lambda *told: None)
        assert made["lines"] == ([{"claim": "fast"}] if goals else [])

    def test_scripts_ask_for_goals_and_help_does_not_show_them(self):
        scripts = "".join(path.read_text() for path in Path(__file__).parent.parent.glob("runs/*.sh"))
        called = [line for line in scripts.splitlines() if line.startswith("everlong bench")]
        assert called and all(" --goals " in line for line in called)
        for verb in ("ops", "models"):
            shown = CliRunner().invoke(cli.app, ["bench", verb, "--help"])
            assert shown.exit_code == 0 and "--quick" in shown.output and "goals" not in shown.output

    def test_threads_are_given_back(self, tmp_path):
        before = torch.get_num_threads()
        with pytest.raises(ValueError, match="threads must be a whole number from 1 to 4096, got 0"), run.threads(0):
            pass
        with run.threads(before + 1) as count:
            assert torch.get_num_threads() == count == before + 1
        assert torch.get_num_threads() == before

    @pytest.mark.float32("peers are compared in fp32")
    def test_slow_peers_are_left_out(self, copycat):
        rig = models.Rig("tiny", CONFIGS["mamba"], "fp32", small_plan(against=("copy",)))
        rig.speed["copy fp32"] = 0.1
        rows = models.prefill(rig)
        assert [row["status"] for row in rows] == ["timed", "skipped"] * 2
        assert rows[1]["reason"] == "reading 8 tokens would take about 80 s" and rows[0]["ratios"] == {}

    def test_training_that_differs_is_refused(self, monkeypatch):
        monkeypatch.setitem(training.LIMITS, "fp32", 0.0)
        shape = training.Shape(d_model=64, layers=1, batch=1, context=8, dtypes=("fp32",))
        rows = training.throughput(shape, (), FAST)
        assert {row["status"] for row in rows} == {"mismatch"} and all("tokens_per_second" not in row for row in rows)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.float32("peers are compared in fp32")
    def test_training_beside_transformers(self):
        pytest.importorskip("transformers")
        shape = training.Shape(d_model=64, layers=2, batch=1, context=8, dtypes=("fp32",))
        rows = training.throughput(shape, ("transformers",), FAST)
        assert [row["model"] for row in rows if row["engine"] == "transformers"] == ["llama", "mamba"]
        assert set(rows[0]["ratios"]) == {"transformers llama fp32", "transformers mamba fp32"}


class TestMemory:
    def test_a_process_of_its_own(self):
        rows = memory.by_length("tiny", CONFIGS["mamba"], (16,))
        assert 2**24 < rows[0]["peak_bytes"] < 2**32 and rows[0]["length"] == 16
        assert memory.peak_bytes() > 2**24

    def test_the_loss_never_holds_all_logits(self):
        layer = Layer.Config(mixer=find("lru").Config())
        cfg = LanguageModel.Config(vocab_size=50280, d_model=16, layers=(layer,))
        for _ in range(3):  # memory in pieces of other sizes is sometimes used again, and sometimes not
            found = memory.measured("loss", {"model": cfg.to_dict(), "length": 4096, "threads": 1})
            assert 0 < found["taken_bytes"] < 0.35 * 4 * 4096 * 50280

    def test_a_failure_has_its_last_words(self):
        with pytest.raises(RuntimeError, match=r"measuring memory \(read\) failed: RuntimeError: .*negative dimension"):
            settings = {"model": CONFIGS["mamba"].to_dict(), "length": -1, "threads": 1}
            memory.measured("read", settings)


def spread(value):
    return {"min": value, "median": value, "max": value, "rounds": 3}


def timed(**fields):
    return {"engine": "everlong", "status": "timed", "reason": None, "error": 0.0, **fields}


class TestClaims:
    @pytest.mark.parametrize("good", [True, False])
    def test_each_claim_is_judged(self, good):
        better = 2.0 if good else 0.5
        decode = timed(
            measure="decode",
            model="m",
            weights="bf16",
            context=131072,
            ratios={"llama.cpp f16": spread(1.4 * better)},
            share_of_read=spread(0.8 * better),
            against_shortest={"context": 1024, "slowdown": spread(1.05 / better)},
        )
        rows = [
            timed(
                measure="prefill", model="m", weights="bf16", length=2048, ratios={"llama.cpp f16": spread(4 * better)}
            ),
            decode,
            timed(measure="batch", model="m", weights="fp32", batch=16, scaling=spread(5 * better)),
            timed(measure="training", model="m", weights="fp32", ratios={"transformers llama fp32": spread(better)}),
            timed(measure="training", model="m", weights="bf16", ratios={}, against_fp32=spread(better)),
            timed(measure="loss", model="m", weights="fp32", length=9, taken_bytes=0.5 / better, logits_bytes=1.0),
        ]
        rows += [
            timed(
                measure="prefill",
                model="n",
                weights="fp32",
                length=n,
                ratios={},
                seconds=spread(n ** (1.0 if good else 1.1)),
            )
            for n in (2048, 131072)
        ]
        rows += [
            timed(measure="memory", model="m", weights="fp32", length=n, peak_bytes=n ** (0.0 if good else 0.5))
            for n in (10_000, 1_000_000)
        ]
        rows[0]["seconds"] = spread(1.0)
        lines = claims.lines("models", rows)
        assert len(lines) == 10 and {line["holds"] for line in lines} == {good}, lines
        assert claims.lines("models", [{**row, "status": "mismatch"} for row in rows]) == []

    @pytest.mark.parametrize("gain,cost", [(50.0, 3.0), (40.0, 4.0)])
    def test_the_scan(self, gain, cost):
        about = {"op": "selective_scan", "case": "mamba-130m", "dtype": "fp32", "backend": "native", "variant": "D"}
        rows = [
            timed(**about, **{"pass": "forward"}, ms=spread(1.0), against={"reference": spread(gain)}),
            timed(**about, **{"pass": "forward+backward"}, ms=spread(cost), against={}),
        ]
        lines = claims.lines("ops", rows)
        assert [line["holds"] for line in lines] == [gain >= 45, cost <= 3.5]
        assert lines[0]["measured"] == f"{gain:.3g}x ({gain:.3g}x to {gain:.3g}x, 3 rounds)"


OPS = {"ops": [], "cases": [], "dtypes": [], "backends": [], "seconds": None, "quick": False}
SIZES = {"lengths": "8", "contexts": "8", "batches": "1", "texts": "8"}
MODELS = {"models": ["mamba-130m"], "measures": [], "weights": ["fp32"], "sizes": SIZES, "against": []}
MODELS |= {"seconds": None, "quick": False}


@pytest.mark.parametrize(
    "make,changes,message",
    [
        (ops_plan, {"ops": ["selectivescan"]}, "no op 'selectivescan'; did you mean 'selective_scan'"),
        (ops_plan, {"cases": ["mamba"]}, "no case 'mamba'; did you mean"),
        (ops_plan, {"dtypes": ["fp16"]}, "no dtype 'fp16'; did you mean 'bf16'"),
        (ops_plan, {"backends": ["cuda"]}, "no backend 'cuda'; known: native, reference, torch"),
        (ops_plan, {"seconds": 0.0}, r"seconds must be a number from 1e-12 to 1e\+12, got 0.0"),
        (models_plan, {"models": ["mamba130"]}, "no preset 'mamba130'; did you mean 'mamba-130m'"),
        (models_plan, {"measures": ["prefil"]}, "no measure 'prefil'; did you mean 'prefill'"),
        (models_plan, {"weights": ["int3"]}, "no weight format 'int3'; did you mean 'int"),
        (models_plan, {"against": ["vllm"]}, "no peer 'vllm'; known: llama.cpp, transformers"),
        (models_plan, {"sizes": {**SIZES, "lengths": "2k"}}, "--lengths must be numbers separated by commas, got '2k'"),
        (models_plan, {"sizes": {**SIZES, "batches": "0,1"}}, "--batches must be numbers of at least 1, got '0,1'"),
    ],
)
def test_bad_input(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**{**(OPS if make is ops_plan else MODELS), **changes})


def test_plans():
    assert ops_plan(**OPS).cases == tuple(TIMED) and ops_plan(**{**OPS, "cases": ["tests"]}).cases == tuple(CASES)
    assert ops_plan(**{**OPS, "quick": True}).dtypes == ("fp32",)
    plan = models_plan(**{**MODELS, "sizes": {**SIZES, "lengths": "4096, 512,512"}})
    assert plan.lengths == (512, 4096) and plan.measures == models.MEASURES and list(plan.models) == ["mamba-130m"]
    quick = models_plan(**{**MODELS, "models": [], "weights": [], "sizes": {**SIZES, "lengths": None}, "quick": True})
    assert quick.weights == ("bf16",) and quick.lengths == (256,) and quick.reads == (8,) and len(quick.models) == 1
    assert models_plan(**{**MODELS, "quick": True}).weights == ("fp32",)  # what is said is never overruled
    assert ops_plan(**{**OPS, "quick": True, "dtypes": ["bf16"]}).dtypes == ("bf16",)


def test_results_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as results of a bench"):
        results.load(tmp_path)
    (tmp_path / results.RESULTS).write_text('{"version": 1, "models": []}')
    with pytest.raises(ValueError, match="does not hold the results of a bench"):
        results.load(tmp_path)


def test_limits_are_measured(limits):
    found = limits.measure(size=32, repeats=2)
    assert found["read_by"].startswith("torch.") and len(limits.read()) == 1
    assert all(value > 0 for key, value in found.items() if key != "read_by") and len(found) == 5


@pytest.mark.parametrize("verb,option", [("ops", "--backends"), ("models", "--against")])
def test_help_has_examples(verb, option):
    out = subprocess.run(
        [sys.executable, "-m", "everlong.cli", "bench", verb, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "Examples" in out and f"everlong bench {verb} --quick" in out and option in out
    code = f"import sys; from everlong.cli import app; sys.argv = ['everlong', 'bench', '{verb}', '--help']; "
    code += "\ntry: app()\nexcept SystemExit: print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip().endswith("False")


def test_errors_on_the_command_line_are_one_line(tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "everlong.cli", "bench", "models", "--models", "mamba130"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert out.returncode == 2 and out.stderr.strip() == "error: no preset 'mamba130'; did you mean 'mamba-130m'?"
    assert not list(tmp_path.iterdir())


SCRIPTS = sorted((Path(__file__).parent.parent / "runs").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_of_the_figures(script, monkeypatch):
    """Each stops at an error, says what it measures, and gives commands that the command line takes."""
    lines = script.read_text().replace("\\\n", "").splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# ") and "set -e" in lines
    monkeypatch.setattr("everlong.bench.plan.check_peers", lambda names: names)
    asked = []
    monkeypatch.setattr(report, "bench", lambda kind, plan, terms: asked.append((kind, plan, terms)) or True)
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("everlong ")]
    for command in commands:
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 0, (done.output, done.exception)
    assert len(asked) == len(commands) or "startup" in lines[-1]
    assert all(str(terms.out).startswith("runs/bench/") for _, _, terms in asked)
    assert script.stat().st_mode & 0o111
