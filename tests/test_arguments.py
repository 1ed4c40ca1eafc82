"""Every number of every configuration: it works, or a ValueError names it; nothing odd reaches PyTorch."""

import dataclasses
import importlib
import math
import pkgutil
import types
import typing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import everlong
from everlong import arguments, config
from everlong import state as states
from everlong.bench.clock import Pace
from everlong.bench.models import ModelsPlan
from everlong.bench.ops import OpsPlan
from everlong.bench.training import Shape
from everlong.blocks.aside import Aside
from everlong.blocks.base import Block
from everlong.blocks.parallel import Parallel
from everlong.blocks.residual import Residual
from everlong.blocks.shared import Shared
from everlong.checkpoints.stream import continue_text
from everlong.compare.architectures import architecture, sized
from everlong.compare.run import Comparison
from everlong.compare.settings import Recall, Settings, profile
from everlong.config import find
from everlong.generation.generate import generate
from everlong.generation.sampler import Sampling, filtered, penalised
from everlong.generation.text import stream_text
from everlong.mixers import base
from everlong.models.blocks import Layer, Norm
from everlong.models.lm import LanguageModel
from everlong.models.presets import preset
from everlong.models.quantize import quantized
from everlong.tasks.mqar import MQAR
from everlong.tokenizer import ByteTokenizer, open_tokenizer
from everlong.train.data import Corpus
from everlong.train.job import Job, simple_model
from everlong.train.loop import Trainer
from everlong.train.optim import make_optimizer

for module in pkgutil.walk_packages(everlong.__path__, "everlong."):
    if not module.name.startswith(("everlong.bench.peers", "everlong.ops.native._")):
        importlib.import_module(module.name)

ODD = (0, -1, 1, 3, 64, 0.25, 2**31, 2**70, 10**5000, 1.5, 1e-9, -1e-9, 1e30, math.nan, math.inf, -math.inf)
WRONG = (True, "3", [3], 2j, b"3")
WIDTHS = ("d_model", "expand_k", "expand_v", "hidden", "width")  # of which a message may say "width 3 cannot be ..."
OTHERS = (Sampling, Pace, Shape, ModelsPlan, OpsPlan)
LAYERS = (Layer.Config(mixer=find("gla").Config(n_heads=2)),)
RESIDUAL = Residual.Config(inner=LAYERS[0].mixer)
NEEDED = {
    LanguageModel.Config: {"vocab_size": 20, "d_model": 16, "layers": LAYERS},
    Job: {"model": LanguageModel.Config(vocab_size=256, d_model=16, layers=LAYERS)},
    Layer.Config: {"mixer": LAYERS[0].mixer},
    Residual.Config: {"inner": LAYERS[0].mixer},
    Parallel.Config: {"branches": (RESIDUAL,)},
    Aside.Config: {"name": "memo", "block": RESIDUAL},
    Shared.Config: {"name": "one", "block": RESIDUAL, "adapted": ("out_proj",)},
    ModelsPlan: {"models": {}},
}


def configs():
    found, todo = [], [config.Config]
    while todo:
        for cls in todo.pop().__subclasses__():
            todo.append(cls)
            if cls.__module__.startswith("everlong.") and (cls.owner is not base.Mixer):
                found.append(cls)
    return [*dict.fromkeys(found), *OTHERS]


def numbers(cls):
    """(field, whether it is whole, whether it is a tuple of them) for the numbers of a class."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_args(hint) else (hint,)
        if found := {int, float} & set(options):
            yield field.name, int in found, typing.get_origin(hint) is tuple


def kind(cls):
    return f"{cls.__module__.removeprefix('everlong.')}.{cls.__qualname__}"


CASES = [pytest.param(cls, *row, id=f"{kind(cls)}.{row[0]}") for cls in configs() for row in numbers(cls)]


def test_the_cases_are_found():
    assert len(CASES) > 120 and {"Trainer.Config", "Settings", "Mamba.Config"} <= {c.__qualname__ for c in configs()}


def use(cfg):
    """Something small that uses the numbers of a configuration; what it computes."""
    uses = {
        LanguageModel.Config: lambda: cfg.build()(torch.zeros(1, 5, dtype=torch.int64))[0],
        Block.Config: lambda: (block := cfg.build(64))(torch.randn(1, 5, 64), block.init_state(1))[0],
        base.Config: lambda: cfg.build(64)(torch.randn(1, 5, 64))[0],
        Norm.Config: lambda: cfg.build(64)(torch.randn(1, 5, 64)),
        MQAR.Config: lambda: cfg.build().batch(0, SimpleNamespace(batch=2, context=64, seed=0)).tokens.float(),
        Trainer.Config: lambda: torch.tensor(float(cfg.steps)) if make_optimizer(torch.nn.Linear(2, 2), cfg) else None,
        Settings: lambda: torch.tensor(float(cfg.training().steps)),
        Recall: lambda: torch.tensor(float(cfg.training(0).steps)),
        Sampling: lambda: drawn_from(cfg),
    }
    found = next((run for kind, run in uses.items() if isinstance(cfg, kind)), None)
    return found() if found else torch.zeros(1)


def drawn_from(cfg):
    torch.Generator().manual_seed(cfg.seed or 0)
    logits = penalised(torch.randn(1, 9), torch.ones(1, 9, dtype=torch.bool), cfg.repetition_penalty)
    return filtered(logits, [cfg]).softmax(-1) if cfg.temperature > 1e-6 else logits


@pytest.mark.parametrize("cls,name,whole,several", CASES)
def test_odd_numbers_work_or_are_refused_by_name(cls, name, whole, several):
    needed = NEEDED.get(cls, {})
    worked = 0
    for value in (*ODD, *WRONG):
        given = (0.5, value) if name == "betas" else (value,) if several else value
        try:
            cfg = cls(**{**needed, name: given})
            assert not isinstance(value, (bool, str, list, complex, bytes)), f"{name} = {value!r} was taken"
            assert not (whole and isinstance(value, float)), f"{name} = {value!r} was taken for a whole number"
            out = use(cfg)
        except ValueError as error:
            short = name.removesuffix("_min").removesuffix("_max")
            assert short in str(error) or (short in WIDTHS and "width" in str(error)), f"{name} = {given!r}: {error}"
            assert len(str(error)) < 400
            continue
        assert bool(torch.isfinite(out).all()), f"{name} = {value!r}: the output is not finite"
        worked += 1
    assert worked, f"no value of {name} was taken"


@pytest.mark.parametrize("cls", configs(), ids=kind)
def test_yes_or_no_and_texts_are_no_numbers(cls):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        wrong = {bool: (1, 0, "yes", None), str: (1, True, None, b"a")}.get(hints[field.name], ())
        for value in wrong:
            with pytest.raises(ValueError, match=field.name):
                cls(**{**NEEDED.get(cls, {}), field.name: value})


def test_numbers_of_other_libraries_become_plain_ones_and_lists_tuples():
    cfg = find("gla").Config(n_heads=np.int64(2), expand_k=np.float64(1.0))
    assert type(cfg.n_heads) is int and config.Config.from_dict(cfg.to_dict()) == cfg
    assert Settings(lengths=[256, 512]) == Settings(lengths=(256, 512))


def test_the_message_says_what_is_expected():
    with pytest.raises(ValueError, match="d_conv must be a whole number from 1 to 2147483647, got 0"):
        find("mamba").Config(d_conv=0)
    with pytest.raises(ValueError, match="lr must be a number from 1e-12 to 1000, got nan"):
        Trainer.Config(lr=math.nan)
    with pytest.raises(ValueError, match="dt_min = 0.5 and dt_max = 0.1, expected dt_min <= dt_max"):
        find("gated_delta").Config(dt_min=0.5)
    with pytest.raises(ValueError, match="expand = 0.01 of a width of 64 leaves no channel"):
        find("mamba").Config(expand=0.01).build(64)


def test_bounds_of_a_field_that_is_not_there_are_a_mistake():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(config.Config):
        bounds: typing.ClassVar = {"widht": (0, 1)}
        width: int = 1

    with pytest.raises(AssertionError, match="bounds of no field: {'widht'}"):
        Mine()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70, 1.0, True, "1", math.nan], ids=repr)
def test_a_seed_that_is_none_is_refused_everywhere(seed):
    text = Corpus.from_texts(["some text " * 20])
    for take in (
        lambda: Sampling(seed=seed),
        lambda: Trainer.Config(seed=seed),
        lambda: Settings(seed=seed),
        lambda: profile(True, seed=seed),
        lambda: text.split(0.1, seed),
        lambda: text.batch(0, SimpleNamespace(seed=seed, batch=1, context=8)),
        lambda: MQAR.Config().build().batch(0, SimpleNamespace(seed=seed, batch=1, context=8)),
    ):
        with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 9223372036854775807, got"):
            take()


def test_the_largest_seed_is_taken_everywhere():
    seed = 2**63 - 1
    text = Corpus.from_texts(["some text " * 20])
    text.split(0.1, seed)
    text.batch(0, SimpleNamespace(seed=seed, batch=1, context=8))
    MQAR.Config().build().batch(0, SimpleNamespace(seed=seed, batch=1, context=8))
    model = NEEDED[Job]["model"].build()
    assert len(list(generate(model, b"a", max_tokens=2, sampling=Sampling(seed=seed)))) == 2


def test_a_single_text_or_id_is_one():
    tokenizer = ByteTokenizer()
    assert "".join(stream_text(iter(tokenizer.encode("hello world")), tokenizer, "world")) == "hello "
    model = NEEDED[Job]["model"].build().eval()
    made = list(generate(model, b"a", max_tokens=9, sampling=Sampling(temperature=0)))
    ended = generate(model, b"a", max_tokens=9, sampling=Sampling(temperature=0), stop_ids=made[-1])
    assert list(ended) == made[: made.index(made[-1])]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"stop_ids": "ab"}, "stop_ids must be token ids, got the text 'ab'"),
        ({"stop_ids": 1.5}, "stop_ids must be a whole number"),
        ({"stop_ids": [None]}, "stop_ids must be a whole number from 0 to 2147483647, got None"),
        ({"stop_ids": [-1]}, "stop_ids must be a whole number"),
        ({"max_tokens": -3}, "max_tokens must be a whole number from 0 to .*, got -3"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number"),
        ({"piece": 0}, "piece must be a whole number from 1 to"),
        ({"sampling": {"seed": 1}}, "sampling must be Sampling"),
    ],
)
def test_generate_refuses_what_it_cannot_use(options, message):
    model = NEEDED[Job]["model"].build()
    with pytest.raises(ValueError, match=message):
        generate(model, b"ab", **options)


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], 5, [5], None, b"ab"], ids=repr)
def test_stop_texts_that_are_none_are_refused_before_anything_is_read(stop, tmp_path):
    with pytest.raises(ValueError, match="stop must be texts of at least one character, got"):
        stream_text(iter([97]), ByteTokenizer(), stop)
    with pytest.raises(ValueError, match="stop must be texts of at least one character, got"):
        continue_text(tmp_path / "no model there", "a", stop=stop)


def test_a_single_row_of_a_state_is_a_batch_of_one():
    mixer = find("gla").Config(n_heads=2).build(16)
    _, state = mixer(torch.randn(3, 5, 16))
    for one in (2, torch.tensor(2), [2]):
        picked = states.gather(state, one)
        assert states.batch_size(picked) == 1 and torch.equal(picked.memory, state.memory[2:])
    with torch.no_grad():
        mixer.step(torch.randn(1, 16), states.gather(state, 2))


def test_texts_where_lists_of_them_belong(tmp_path):
    with pytest.raises(ValueError, match=r"paths must be a list, got 'book.txt'; give a single one as \['book.txt'\]"):
        Job(**NEEDED[Job], paths="book.txt")
    (tmp_path / "book.txt").write_text("import os\n" * 500)
    path = str(tmp_path / "book.txt")
    settings = Settings(params=20_000, tokens=500, context=32, lengths=(32,))
    comparison = Comparison(tmp_path / "out", names="gla", data=path, settings=settings)
    assert comparison.names == ("gla",) and comparison.results["settings"]["data"] == [path]
    assert Corpus.from_paths(path).documents == 1
    with pytest.raises(ValueError, match="token ids"):
        ByteTokenizer().decode("abc")
    assert ByteTokenizer().decode(97) == "a"


@pytest.mark.parametrize(
    "take,message",
    [
        (lambda: quantized(None, 5), "no weight format 5; known: "),
        (lambda: preset(5), "no preset 5; known: "),
        (lambda: find(["gla"]), "kind must be a name"),
        (lambda: architecture(5), "no architecture 5; known: "),
        (lambda: sized("gla", math.nan, vocab_size=256, context=8), "params must be a whole number"),
        (lambda: simple_model("gla", "64", 2, 256), "d_model must be a whole number"),
        (lambda: Corpus.from_paths(5), "paths must be files, folders or globs, got 5"),
        (lambda: Corpus.from_texts(None), "texts must be documents"),
        (lambda: Corpus.from_texts([5]), "expected text, got int"),
        (lambda: Corpus.from_texts("abc").split("0.1"), "held_out must be between 0 and 1, got '0.1'"),
        (lambda: Corpus.from_texts("abc").windows(0), "context must be a whole number from 1"),
        (lambda: next(Corpus.from_texts("abc").in_order(2, 0)), "batch must be a whole number from 1"),
        (lambda: open_tokenizer(""), "the path of the tokenizer is empty"),
    ],
)
def test_what_is_of_another_kind_altogether(take, message):
    with pytest.raises(ValueError, match=message):
        take()


def test_arguments_of_their_own():
    assert arguments.texts("stop", "ab") == ("ab",) and arguments.texts("stop", ["a", "b"]) == ("a", "b")
    assert arguments.ids("stop_ids", torch.tensor([1, 2])) == (1, 2) == arguments.ids("stop_ids", (1, np.int32(2)))
    assert arguments.ids("stop_ids", b"ab") == (97, 98) and arguments.ids("stop_ids", torch.tensor(3)) == (3,)
