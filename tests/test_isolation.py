"""NaN, infinity and overflow stay in their document and in their row: every op, every form, every build."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from everlong import laws, state
from everlong.config import find, mixer_names
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.ops import native, quarantine
from everlong.ops.cases import Case
from everlong.ops.linear_attention import linear_attention
from test_ops import MODULES, OPS, is_tensor, later_state, op_of

BUILDS = [build for build in native.supported() if (native.FOLDER / f"_{build}.so").exists()]
FORMS = [
    (name, variant, row.name, build)
    for name, variant in OPS
    for row in MODULES[name].TABLE
    for build in (BUILDS[:1] if row.name == "native" else [None])
]
OTHERS = [(name, variant, row, build) for name, variant, row, first in FORMS if first for build in BUILDS[1:]]
ENDS = (0, 30, 50, 70)  # of the documents in the first row; the first was under way
SHORT = (0, 6, 10, 14)  # the same for loops
pytestmark = pytest.mark.slow

NAN, INF = float("nan"), float("inf")

forms = pytest.mark.parametrize("name,variant,backend,build", FORMS, ids=lambda x: x or "")


@pytest.fixture
def library(build, monkeypatch):
    if build is not None:
        monkeypatch.setattr(native, "_LIBRARY", ctypes.CDLL(str(native.FOLDER / f"_{build}.so")))


class Subject:
    """An op on inputs of two rows, the first with three documents."""

    def __init__(self, name, variant, backend):
        dtype = torch.float32 if backend == "native" else torch.float64
        self.name, self.backend, self.module = name, backend, MODULES[name]
        self.ends = SHORT if backend == "reference" else ENDS
        case = Case("isolation", time=self.ends[-1], keys=4, values=4, variant=variant)
        narrow = {torch.float64: dtype, torch.complex128: dtype.to_complex()}
        self.initial = state.map_leaves(lambda x: x.to(narrow.get(x.dtype, x.dtype)), later_state(name, case))
        self.inputs = {k: x.to(narrow[x.dtype]) if is_tensor(x) else x for k, x in self.module.inputs(case).items()}
        self.sequence = [k for k in self.module.SEQUENCE if is_tensor(self.inputs[k]) and self.inputs[k].dim() > 1]
        self.starts = torch.zeros(2, self.ends[-1], dtype=torch.bool)
        self.starts[0, list(self.ends[1:-1])] = True
        self.huge = torch.finfo(dtype).max ** 0.8

    def run(self, inputs, *, initial=None, starts=None, cotangent=None, good=None):
        """The outputs, final state and gradients that the ``good`` tokens [B T] are promised."""
        inputs = {k: x.clone().requires_grad_() if k in self.sequence else x for k, x in inputs.items()}
        initial = self.initial if initial is None else initial
        y, final = op_of(self.name)(**inputs, state=initial, starts=starts, backend=self.backend)
        torch.manual_seed(3)
        cotangent = torch.randn(y.shape, dtype=y.dtype) if cotangent is None else cotangent
        wanted = [inputs[k] for k in self.sequence]
        grads = [None] * len(wanted)
        if y.requires_grad:
            grads = torch.autograd.grad((y[good] * cotangent[good]).real.sum(), wanted, allow_unused=True)
        made = {"output": y[good]}
        made |= {f"gradient of {k}": g[good] for k, g in zip(self.sequence, grads, strict=True) if g is not None}
        rows = good[:, -1]
        return made | {f"final {path}": leaf[rows] for path, leaf, _ in state.leaves(final)}

    def breaks(self, values):
        """(what, inputs, good): each input of the tokens broken in turn, in each document of the first row."""
        for number, key in enumerate(self.sequence):
            for index, value in enumerate(values):
                if key == "g" and value in (-INF, self.huge):
                    continue  # log decays are at most 0, and -inf is one of them
                document = (number + index) % 3
                begin, end = self.ends[document : document + 2]
                token = (begin + end) // 2
                x = self.inputs[key].clone()
                x[0, token] = value
                good = torch.ones_like(self.starts)
                good[0, begin:end] = False
                yield f"{value:g} in {key} at token {token}", {**self.inputs, key: x}, good


def unchanged(got, want, what):
    for name, theirs in want.items():
        assert torch.equal(got[name], theirs), f"{name} changes with {what}"


@pytest.mark.parametrize("name,variant,backend,build", FORMS + OTHERS, ids=lambda x: x or "")
def test_documents(name, variant, backend, build, library):
    subject = Subject(name, variant, backend)
    for what, inputs, good in subject.breaks((NAN, INF, -INF, subject.huge)):
        want = subject.run(subject.inputs, starts=subject.starts, good=good)
        unchanged(subject.run(inputs, starts=subject.starts, good=good), want, what)


@forms
def test_a_broken_state(name, variant, backend, build, library):
    subject = Subject(name, variant, backend)
    good = torch.ones_like(subject.starts)
    good[0, : subject.ends[1]] = False
    want = subject.run(subject.inputs, starts=subject.starts, good=good)
    for value in (NAN, INF):
        dead = state.map_leaves(lambda leaf: leaf.clone(), subject.initial)
        for _, leaf, _ in state.leaves(dead):
            if leaf.is_floating_point() or leaf.is_complex():
                leaf[0] = value
        unchanged(subject.run(subject.inputs, initial=dead, starts=subject.starts, good=good), want, f"a {value} state")
        anew = subject.starts.clone()
        anew[0, 0] = True
        everything = torch.ones_like(good)
        want_anew = subject.run(subject.inputs, starts=anew, good=everything)
        unchanged(
            subject.run(subject.inputs, initial=dead, starts=anew, good=everything), want_anew, "one that is left"
        )


@forms
def test_rows(name, variant, backend, build, library):
    subject = Subject(name, variant, backend)
    good = torch.tensor([[False], [True]]).expand(2, subject.ends[-1])
    want = subject.run(subject.inputs, good=good)
    for what, inputs, _ in subject.breaks((NAN, INF, -INF, subject.huge)):
        unchanged(subject.run(inputs, good=good), want, what)


@forms
def test_documents_without_looking(name, variant, backend, build, library, monkeypatch):
    """The path of compiled graphs, ``torch.func`` and GPUs; and a document keeps what was before its first NaN."""
    monkeypatch.setattr(quarantine, "_may_look", lambda x: False)
    subject = Subject(name, variant, backend)
    for what, inputs, good in subject.breaks((NAN, INF, -INF)):
        good[0, : int((~good[0]).nonzero()[0]) + 2] = True
        want = subject.run(subject.inputs, starts=subject.starts, good=good)
        unchanged(subject.run(inputs, starts=subject.starts, good=good), want, what)


@pytest.mark.parametrize("name,variant,backend", sorted({form[:3] for form in FORMS}, key=str), ids=str)
def test_gradients_that_arrive_broken(name, variant, backend):
    """A document that breaks behind the op sends NaN to its own inputs, and nothing to others."""
    subject = Subject(name, variant, backend)
    everything, good = torch.ones_like(subject.starts), torch.ones_like(subject.starts)
    begin, end = subject.ends[1:3]
    good[0, begin:end] = False
    y, _ = op_of(name)(**subject.inputs, state=subject.initial, starts=subject.starts, backend=backend)
    cotangent = torch.randn(y.shape, dtype=y.dtype)
    clean = {"starts": subject.starts, "good": everything}
    cotangent[0, begin:end] = 0
    want = subject.run(subject.inputs, **clean, cotangent=cotangent)
    cotangent[0, begin + 2] = NAN
    got = subject.run(subject.inputs, **clean, cotangent=cotangent)
    for key in subject.sequence:
        key = f"gradient of {key}"
        if key in want:
            mine, theirs = (x[key].unflatten(0, good.shape) for x in (got, want))
            assert torch.equal(mine[good], theirs[good]), key
            assert bool(mine[~good].isnan().all()), key


def test_documents_that_overflow_together_only():
    """Scores between two documents overflow, which nobody asked for: each is computed alone."""
    q, k, v = (torch.randn(1, 40, 1, 4) for _ in range(3))
    q[:, :20] *= 1e-30
    k[:, :20] *= 1e30
    q[:, 20:] *= 1e30
    k[:, 20:] *= 1e-30
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[:, 20] = True
    y, final = linear_attention(q, k, v, starts=starts, backend="torch")
    for part in (slice(0, 20), slice(20, 40)):
        alone, last = linear_attention(q[:, part], k[:, part], v[:, part], backend="torch")
        assert torch.equal(y[:, part], alone) and bool(alone.isfinite().all())
    assert torch.equal(final, last)


def test_a_broken_gradient_of_the_final_state():
    """It reaches the last document of its row, beside a finite one of the output; another backward pass is clean."""
    x, weight, state = torch.randn(2, 40, 8).requires_grad_(), torch.randn(8, 4), torch.randn(2, 3, 8).requires_grad_()
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[0, 20] = True
    y, final = op_of("short_conv")(x, weight=weight, state=state, starts=starts)
    grads = []
    for value in (1.0, NAN, 1.0):
        arrives = torch.ones_like(final)
        arrives[0, 1, 2] = value
        grads.append(torch.autograd.grad((y, final), (x, state), (torch.ones_like(y), arrives), retain_graph=True))
    (clean, clean_state), (broken, broken_state), again = grads
    assert torch.equal(again[0], clean) and torch.equal(again[1], clean_state)
    assert bool(broken[0, 20:].isnan().all()) and torch.equal(broken_state, clean_state)
    assert torch.equal(broken[0, :20], clean[0, :20]) and torch.equal(broken[1], clean[1])
    (only,) = torch.autograd.grad(final, x, torch.full_like(final, NAN), retain_graph=True)
    assert bool(only[0, 20:].isnan().all()) and bool(only[1].isnan().all()) and bool(only[0, :20].isfinite().all())


def test_shared_parameters_do_not_hide_a_broken_gradient():
    x, weight = torch.randn(1, 40, 8), torch.randn(8, 4).requires_grad_()
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[:, 20] = True
    y, _ = op_of("short_conv")(x, weight=weight, starts=starts)
    cotangent = torch.ones_like(y)
    cotangent[:, 3] = NAN
    (grad,) = torch.autograd.grad(y, weight, cotangent)
    assert bool(grad.isnan().all())


@pytest.mark.parametrize("name", mixer_names())
def test_models(name):
    """Through layers, norms and feed-forwards: logits, final states, and what the loss teaches the other tokens."""
    layer = Layer.Config(mixer=find(name).Config(), mlp=SwiGLU.Config())
    model = LanguageModel.Config(vocab_size=40, d_model=64, layers=(layer, layer), tied=False).build()
    tokens, starts = torch.randint(0, 30, (2, 70)), torch.zeros(2, 70, dtype=torch.bool)
    starts[:, [0, 20, 50]] = True
    tokens[1, 20:50] = torch.randint(30, 40, (30,))
    tokens[1, 33] = 35
    good = tokens < 30
    outcomes = []
    for value in (1.0, NAN, INF, 3e38):
        with torch.no_grad():
            model.embedding.weight[35] = value
        logits, final = model(tokens, starts=starts)
        (grad,) = torch.autograd.grad(logits[good].square().sum(), model.embedding.weight)
        outcomes.append([logits[good], grad[:30], *(leaf for _, leaf, _ in state.leaves(final))])
    for other in outcomes[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(other, outcomes[0], strict=True))


@torch.no_grad()
def spreads(name):
    """Whether a NaN makes outputs of earlier tokens NaN, in any variant."""
    for subject in laws.subjects(find(name)):
        for dtype in (torch.float64, torch.float32):
            for length, token in ((50, 20), (70, 40)):
                x = subject.input(1, length, dtype)
                x[0, token] = NAN
                y, _ = subject.module(dtype)(x)
                assert bool(y[0, token].isnan().any())
                if not bool(y[0, :token].isfinite().all()):
                    return True
    return False


def test_the_list_of_forms_that_spread_a_nan_to_earlier_tokens(monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "numerics.md").read_text()
    found = {name: spreads(name) for name in mixer_names()}
    for label, kind in (("may be NaN", True), ("are right", False)):
        (line,) = re.findall(rf"^\| {label} \| (.*) \|$", page, re.MULTILINE)
        assert re.findall(r"`(\w+)`", line) == [name for name in sorted(found) if found[name] == kind]
    monkeypatch.setenv("EVERLONG_BACKEND", "reference")
    assert not any(spreads(name) for name in ("gla", "delta_net", "s4d"))  # the loop shows where it began


@torch.no_grad()
def test_compiled_and_mapped():
    mixer = find("gla").Config().build(16).eval()
    x, starts = torch.randn(3, 20, 16), torch.zeros(3, 20, dtype=torch.bool)
    starts[:, 10] = True
    want, _ = mixer(x, starts=starts)
    x[:, 4] = NAN
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    mapped = torch.func.vmap(lambda x, starts: mixer(x[None], starts=starts[None])[0][0])
    for got in (compiled(x, starts=starts)[0], mapped(x, starts)):
        laws.same(got[:, 10:], want[:, 10:], "the second document")
        laws.same(got[:, :4], want[:, :4], "what was before the NaN")
        assert bool(got[:, 4:10].isnan().all())
