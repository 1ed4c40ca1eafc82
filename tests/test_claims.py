"""What the pages say of the code is held to the code: tables, times, laws."""

import importlib
import inspect
import io
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import everlong
from everlong import laws, numerics
from everlong.compare import cost
from everlong.compare.architectures import DEFAULT, sized
from everlong.compare.settings import Settings, quick
from everlong.config import find, mixer_names
from everlong.generation.decoder import Decoder
from everlong.generation.generate import generate
from everlong.generation.sampler import Sampling
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.ops import dispatch, native
from everlong.ops.attention import attention_step
from everlong.report import table

ROOT = Path(__file__).parent.parent
needs_kernels = pytest.mark.skipif(native.MISSING is not None, reason="no kernels were built")


@needs_kernels
@pytest.mark.parametrize("name", mixer_names())
def test_native_training_in_the_table_is_what_training_runs(name, monkeypatch):
    """The ops over time that a real call dispatches, filters of a few tokens left out, run the rows the table means."""
    ran = {}
    choose = dispatch.choose

    def watched(rows, inputs, backend):
        row = choose(rows, inputs, backend)
        if rows.sequence:
            ran[rows.name] = row.name
        return row

    monkeypatch.setattr(dispatch, "choose", watched)
    mixer = find(name)
    y, _ = mixer.Config().build(128).float()(torch.randn(2, 70, 128, dtype=torch.float32))
    y.sum().backward()
    over_time = {op: row for op, row in ran.items() if op in table.mixing(mixer)}
    assert set(over_time) == set(table.mixing(mixer)), (ran, table.mixing(mixer))
    found = [row == "native" for row in over_time.values()]
    assert table.trains(mixer) == ("yes" if all(found) else "in part" if any(found) else "no"), over_time


@needs_kernels
def test_the_table_knows_who_has_no_kernel():
    """Named in the open: a norm, a filter of three tokens or a step of decoding makes no recurrence native."""
    told = {row.name: (row.trains, row.decodes) for row in table.rows()}
    assert {name for name, (trains, _) in told.items() if trains == "no"} == {
        *("attention", "hyena", "lstm", "s4d", "slstm")
    }
    assert {name for name, (trains, _) in told.items() if trains == "in part"} == {"mlstm"}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "Every architecture decodes so, attention and hybrids included" in readme
    assert {decodes for _, decodes in told.values()} == {"yes"}, "say so in the README, under Speed"


def test_operations_of_attention_are_those_that_pytorch_counts():
    """Independent of the table: the products of one token over 1,024 keys, as they run, and those of the maps."""
    layer = find("attention").Config().build(table.WIDTH)
    maps = 2 * sum(p.numel() for p in layer.parameters())
    with torch.no_grad():
        _, state = layer(torch.randn(1, 1023, table.WIDTH))
        token = torch.randn(1, layer.cfg.n_heads, layer.head_dim)
        with FlopCounterMode(display=False) as counted:
            attention_step(token, token, token, state=state)
    assert counted.get_total_flops() > 0
    assert table.operations(layer, 1024) == pytest.approx(
        maps + counted.get_total_flops(), rel=numerics.BOUNDS["operations"]
    )


@pytest.mark.parametrize("length", [1024, 1024**2])
def test_operations_of_hyena_are_those_of_its_convolution(length):
    """One multiplication and one addition for every channel and every token before, beside the maps."""
    layer = find("hyena").Config().build(table.WIDTH)
    maps = 2 * sum(p.numel() for p in layer.parameters())
    assert table.operations(layer, length) == pytest.approx(
        maps + 2 * table.WIDTH * length, rel=numerics.BOUNDS["operations"]
    )


def test_list_fits_into_eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    table.show()
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    for name in mixer_names():
        assert f"  {find(name).equation}" in lines, f"the equation of {name} is broken over lines"


def test_the_page_of_the_contract_lists_every_law():
    page = (ROOT / "docs/contract.md").read_text()
    listed = re.findall(r"^\| ([^|]+?) \|", page[page.index("| law |") :], re.MULTILINE)
    listed = [name for name in listed if name != "law" and not set(name) <= {"-"}]
    missing, gone = set(laws.LAWS) - set(listed), set(listed) - set(laws.LAWS)
    assert not missing, (
        f"docs/contract.md, table of the laws: add a line '| name | what it says |' for {sorted(missing)}"
    )
    assert not gone, f"docs/contract.md lists laws that laws.LAWS does not have: {sorted(gone)}; take the lines out"


TIMES = {"4 min 56 s", "1 min 32 s"}  # of `make run`, and of the installation before it, on the machine of the README
PAGES = ["README.md", "CONTRIBUTING.md", "Makefile", "src/everlong/cli.py", "src/everlong/compare/settings.py"]
TIME = re.compile(r"(\d+ min(?:utes?)? \d+ s\b|(?:about|some) (?:a|\d+) minutes?)", re.IGNORECASE)


def test_one_time_of_make_run_everywhere():
    """The measured time of ``make run``, and of its installation, is the same wherever a page tells one."""
    pages = [*(ROOT / page for page in PAGES), *sorted((ROOT / "docs").glob("*.md"))]
    told = {}
    for page in pages:
        for line in page.read_text().splitlines():
            for time in TIME.findall(line):
                told.setdefault(time, []).append(f"{page.name}: {line.strip()}")
    assert set(told) == TIMES, {time: told.get(time) for time in set(told) ^ TIMES}


@needs_kernels
def test_the_models_of_make_run_decode_without_python():
    for name in DEFAULT:
        assert cost.engine(Decoder(sized(name, Settings().params).build().float()))[0] == 0


def test_help_names_the_sizes_of_both_profiles():
    page = (ROOT / "src/everlong/cli.py").read_text()
    for key in ("params", "tokens"):
        full, short = (f"{getattr(settings, key):,}" for settings in (Settings(), quick()))
        assert f'show_default="{full}; quick: {short}"' in page, f"--{key} of compare: {full}, with --quick {short}"


def ops_over_time():
    """The ops that walk along the sequence, by name."""
    names = [module.name for module in pkgutil.iter_modules(everlong.ops.__path__)]
    modules = {name: importlib.import_module(f"everlong.ops.{name}") for name in names}
    return {name: getattr(module, name) for name, module in modules.items() if hasattr(module, "SEQUENCE")}


@pytest.mark.parametrize("name", ops_over_time())
def test_ops_over_time_have_the_signature_of_the_contract(name):
    options = inspect.signature(ops_over_time()[name]).parameters
    for option in ("state", "starts", "backend"):
        assert options[option].kind is inspect.Parameter.KEYWORD_ONLY and options[option].default is None


def test_operations_that_stand_alone_have_a_table_with_their_name():
    for name in (path.stem for path in Path(everlong.ops.__path__[0]).glob("*.py")):
        module = importlib.import_module(f"everlong.ops.{name}")
        if hasattr(module, "TABLE"):
            verb = getattr(module, module.TABLE.name)
            assert verb.table is module.TABLE and verb.explain.args == (verb,)
            assert verb.reference is not None and verb.reference.__name__.endswith("_reference")
            assert verb.step is getattr(module, f"{name}_step", None) or name == "attention_decode"


def uses(model, tokens):
    """Logits, slopes and a text of a model."""
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    slopes = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    text = list(generate(model, tokens[0, :5].tolist(), max_tokens=4, sampling=Sampling(temperature=0)))
    return [model(tokens)[0].detach(), *(s for s in slopes if s is not None)], text


@pytest.mark.parametrize("name", mixer_names())
@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_what_the_contract_says_of_named_backends(name, backend, monkeypatch):
    """In reading, training and generation a named backend holds, or the op without such a row is named."""
    layers = (Layer.Config(mixer=find(name).Config(), mlp=SwiGLU.Config()),) * 2
    torch.manual_seed(0)
    model = LanguageModel.Config(vocab_size=9, d_model=64, layers=layers).build().float()
    tokens = torch.randint(0, 9, (2, 40))
    want, text = uses(model, tokens)
    monkeypatch.setenv("EVERLONG_BACKEND", backend)
    assert (not Decoder(model).explain()) == (backend == "native" and native.MISSING is None)
    try:
        got, same = uses(model, tokens)
    except ValueError as error:
        assert backend == "native", error
        assert re.search(r"(\w+ has no backend 'native')|(backend 'native' of \w+ cannot run here)", str(error))
        assert table.trains(find(name)) != "yes" or native.MISSING, error
        return
    for mine, theirs in zip(got, want, strict=True):
        numerics.assert_close(mine, theirs, name)
    assert same == text
    with dispatch.backend("torch"):
        assert dispatch.named() == "torch" and dispatch.choose(module_of("norm").TABLE, {}, None).name == "torch"
    assert dispatch.named() == backend


def module_of(name):
    return importlib.import_module(f"everlong.ops.{name}")
