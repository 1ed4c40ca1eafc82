"""A recorded step is never silently wrong: steps that a recording of one token cannot know are found, and named.

Every ``step`` here either runs natively or in Python with a reason; the decoder equals ``model.step`` in all cases.
"""

import concurrent.futures
import copy
import pickle
import re
import warnings
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch.nn import functional as F

from everlong import numerics
from everlong import state as states
from everlong.generation.decoder import Decoder
from everlong.mixers import base
from everlong.models.blocks import Layer
from everlong.models.lm import LanguageModel
from everlong.ops import native
from everlong.ops.linear import Linear
from everlong.state import state

ALLCLOSE = torch.allclose  # a subject here, not a judge

D = 16
COUNTER = {"tokens": 0}


@state
class Pair:
    """Two leaves of one shape."""

    a: torch.Tensor
    b: torch.Tensor


class Probe(base.Mixer):
    """``step`` and, where it matters, the initial state are the test's own functions."""

    memory = "constant"

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """Which step."""

        name: str

    def __init__(self, cfg, d_model, depth=base.Depth()):
        super().__init__(cfg, d_model, depth)
        self.proj = Linear(d_model, d_model)
        torch.nn.init.normal_(self.proj.weight, std=0.5)
        self.scale = torch.nn.Parameter(torch.rand(d_model) + 0.5)
        self.register_buffer("kept", torch.ones(d_model))
        self.drop = torch.nn.Dropout(0.5)
        self.calls = 0

    def init_state(self, batch):
        make = INIT.get(self.cfg.name, lambda n: Pair(a=torch.zeros(n, D), b=torch.zeros(n, D)))
        return states.map_leaves(lambda t: t.to(self.scale.dtype) if t.dtype == torch.float32 else t, make(batch))

    def step(self, x, state):
        a, b = (leaf for _, leaf, _ in states.leaves(state))
        y = self.proj(x) + 0.1 * a.to(x.dtype)
        y = y + 0.1 * b.to(x.dtype) if b.shape == x.shape else y
        out = STEPS[self.cfg.name](self, x, y, state)
        return out if isinstance(out, tuple) else (out, Pair(a=y, b=0.5 * state.b + x))


Probe.Config.owner = Probe


def changed(x, function):
    """x after ``function`` has changed it in place."""
    function(x)
    return x


def put(y):
    acc = torch.zeros_like(y)
    acc[:, :4] = y[:, :4]
    return acc


def plus_equals(y):
    acc = torch.zeros(y.shape)
    acc += y
    return acc


def late(m, y):
    constant = torch.ones(D) * m.scale
    first = y * constant
    constant.add_(1)
    return first + constant


def counted(m, y):
    m.calls += 1
    return y * m.calls


def moved(m, y):
    m.history = getattr(m, "history", torch.ones(D)) * 1.5
    return y * m.history


def set_data(y):
    z = torch.zeros_like(y)
    z.data = y
    return z


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return 2 * y


class Tagged(torch.Tensor):
    pass


def scripted(y, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is on its way out
        return torch.jit.script(_scripted)(y, x)


def _scripted(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y * torch.sigmoid(x) + y


def autocast(m, y):
    with torch.autocast("cpu", torch.bfloat16):
        return m.proj(y).float()


def in_a_thread(function):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def two(y, state):
    return y, Pair(a=y, b=y)


READS = "reads a number that depends on the token|of a value that depends on the token"
WRITES = "changes memory that is no value of the token's|in place"
RANDOM = "draws random numbers"
DIFFERS = "replayed, Probe differs from its step"
# name: (step, None where it must be native, else what the reason says)
CASES = {
    "plain": (lambda m, x, y, s: y, None),
    # numbers that leave the recording
    "float": (lambda m, x, y, s: y if float(x.sum()) > 0 else 2 * y, READS),
    "item": (lambda m, x, y, s: y * y.sum().item(), READS),
    "bool": (lambda m, x, y, s: y if (y[0, 0] > 0) else -y, READS),
    "int": (lambda m, x, y, s: y * int(y[0, 0] * 10), READS),
    "equal": (lambda m, x, y, s: y if torch.equal(y, y.abs()) else -y, READS),
    "is_nonzero": (lambda m, x, y, s: y if (y[0, 0] > 0).is_nonzero() else -y, READS),
    "allclose": (lambda m, x, y, s: y if ALLCLOSE(y[0], y[1]) else -y, "allclose|isclose|aten"),
    "tensor of items": (lambda m, x, y, s: y if float(torch.tensor([y[0, 0], y[0, 1]]).max()) < 9 else -y, "tensor"),
    "text": (lambda m, x, y, s: y if "9." in repr(y) else -y, "__repr__"),
    "tolist": (lambda m, x, y, s: y * max(y.flatten().tolist()), READS),
    "numpy": (lambda m, x, y, s: y * float(y.numpy().max()), READS),
    "asarray": (lambda m, x, y, s: torch.from_numpy(2 * numpy.asarray(y)), READS),
    "data_ptr": (lambda m, x, y, s: y * (1 + y.data_ptr() % 2), READS),
    "nonzero": (lambda m, x, y, s: y * len(torch.nonzero(y > 0)), READS),
    "masked_select": (lambda m, x, y, s: y * y.masked_select(y > 0).sum(), READS),
    "mask index": (lambda m, x, y, s: y * y[y > 0].sum(), READS),
    "unique": (lambda m, x, y, s: y * len(torch.unique(y.round())), "unique|round"),
    "argmax": (lambda m, x, y, s: y + m.scale[y.argmax(-1)][:, None], "argmax"),
    "topk": (lambda m, x, y, s: y * y.topk(2).values[:, :1], "topk"),
    "constant read": (lambda m, x, y, s: y * float(m.scale.sum()) + m.scale.tolist()[0], None),
    # memory that is written
    "zeros_like": (lambda m, x, y, s: changed(torch.zeros_like(y), lambda acc: acc.add_(y).mul_(0.5)), WRITES),
    "plus equals": (lambda m, x, y, s: plus_equals(y), WRITES),
    "empty_like": (lambda m, x, y, s: changed(torch.zeros(3, D), lambda z: z.copy_(y)), WRITES),
    "put": (lambda m, x, y, s: put(y), WRITES),
    "index_put": (lambda m, x, y, s: torch.zeros(3, D).index_put_((torch.arange(3),), y), WRITES),
    "out": (lambda m, x, y, s: changed(torch.zeros(3, D), lambda z: torch.add(y, 1, out=z)), WRITES),
    "out of a value": (lambda m, x, y, s: changed(y + 0, lambda z: torch.mul(y, y, out=z)), WRITES),
    "foreach": (lambda m, x, y, s: changed(y + 0, lambda z: torch._foreach_add_([z], [x])), WRITES),
    "fill": (lambda m, x, y, s: changed(y + 0, lambda z: z[:, :2].fill_(3.0)), WRITES),
    "zero": (lambda m, x, y, s: changed(y + 0, lambda z: z[:, :2].zero_()), WRITES),
    "addmm": (lambda m, x, y, s: changed(y + 0, lambda z: z.addmm_(x, m.proj.weight)), WRITES),
    "buffer": (lambda m, x, y, s: y * changed(m.kept, lambda k: k.mul_(1.5)), WRITES),
    "set data": (lambda m, x, y, s: set_data(y), "value that depends|changes memory"),
    "late": (lambda m, x, y, s: late(m, y), WRITES),
    "overlap": (lambda m, x, y, s: changed(y + 0, lambda z: z.add_(z.flip(-1))), "flip"),
    "of a constant": (lambda m, x, y, s: y * changed(torch.ones(D), lambda c: c.add_(1)), None),
    "of a value": (lambda m, x, y, s: changed(y + 0, lambda z: z.add_(1).mul_(x).clamp_(-1, 1).sigmoid_()), None),
    "of a part": (lambda m, x, y, s: changed(y + 0, lambda z: z[:, 2:5].mul_(x[:, 5:8])), None),
    "of a value read before": (lambda m, x, y, s: (z := y + 0) * 2 + changed(z, lambda z: z.exp_()), None),
    # digits
    "half": (lambda m, x, y, s: y.half().float(), "float16"),
    "bfloat16": (lambda m, x, y, s: y.bfloat16().float(), "bfloat16"),
    "double": (lambda m, x, y, s: ((y.double() + 1e9) - 1e9).float(), "float64"),
    "sum in double": (lambda m, x, y, s: y * y.sum(dtype=torch.float64).float(), "float64"),
    "long": (lambda m, x, y, s: y.long().float(), "int64"),
    "bits": (lambda m, x, y, s: y.view(torch.int32).view(torch.float32) * 2, "reads the bits"),
    "bool cast": (lambda m, x, y, s: y * y.clamp(min=0).bool().float(), None),
    "bool type": (lambda m, x, y, s: y.relu().bool() * y, None),
    "bool sum": (lambda m, x, y, s: y * (y > 0).sum(), "int64"),
    "bool plus": (lambda m, x, y, s: y * ((y > 0) + (x > 0)), "truth values"),
    "bool and": (lambda m, x, y, s: y * torch.logical_and(y, x).float(), "of numbers"),
    "bool or": (lambda m, x, y, s: y * torch.logical_or(y.relu(), x.relu()).float(), "of numbers"),
    "bool not": (lambda m, x, y, s: y * torch.logical_not(y.relu()).float(), None),
    "masks": (lambda m, x, y, s: y.masked_fill((y > 0) & (x < 1) | ~(y < 0.5), 0.25), None),
    # random numbers
    "rand": (lambda m, x, y, s: y * torch.rand(D), RANDOM),
    "randn_like": (lambda m, x, y, s: y + torch.randn_like(y), RANDOM),
    "bernoulli": (lambda m, x, y, s: y * torch.bernoulli(torch.full((D,), 0.5)), RANDOM),
    "uniform": (lambda m, x, y, s: y * torch.empty(D).uniform_(), RANDOM),
    "randint": (lambda m, x, y, s: y * torch.randint(0, 9, (D,)), RANDOM),
    "dropout": (lambda m, x, y, s: F.dropout(y, 0.5, training=True), RANDOM),
    "module's dropout": (lambda m, x, y, s: m.drop(y), None),
    # Python's own state
    "counter": (lambda m, x, y, s: counted(m, y), DIFFERS),
    "history": (lambda m, x, y, s: moved(m, y), DIFFERS),
    "global": (lambda m, x, y, s: (COUNTER.update(tokens=COUNTER["tokens"] + 1), y * COUNTER["tokens"])[1], DIFFERS),
    # states that alias
    "same state": (lambda m, x, y, s: (y, s), None),
    "swapped": (lambda m, x, y, s: (y + s.a, Pair(a=s.b + y, b=s.a)), "becomes another"),
    "swap only": (lambda m, x, y, s: (y + s.a - s.b, Pair(a=s.b, b=s.a)), "becomes another"),
    "one for two": (lambda m, x, y, s: two(y, s), None),
    "x itself": (lambda m, x, y, s: (y + s.a, Pair(a=x, b=x)), None),
    "part of the other": (lambda m, x, y, s: (y, Pair(a=y, b=s.a.roll(1, -1))), "roll"),
    "transposed": (lambda m, x, y, s: (y, Pair(a=y, b=s.b.view(3, 4, 4).mT.reshape(3, D) + y)), None),
    "turned in place": (lambda m, x, y, s: (y, Pair(a=y, b=s.b.view(3, 4, 4).mT.reshape(3, D))), None),
    "view of itself": (lambda m, x, y, s: (y, Pair(a=y, b=s.b.as_strided((3, D), (D, 1), 0))), "as_strided"),
    "state changed": (lambda m, x, y, s: (y, Pair(a=y, b=changed(s.b, lambda b: b.add_(y)))), WRITES),
    "constant state": (lambda m, x, y, s: (y, Pair(a=m.scale.expand(3, D), b=y)), None),
    "is it zero": (lambda m, x, y, s: torch.where(s.a == 0, x, y), None),
    "all zero": (lambda m, x, y, s: x if bool((s.a == 0).all()) else y, "aten.all|number"),
    "another dtype": (lambda m, x, y, s: (y, Pair(a=y.double(), b=y)), "float64"),
    "another shape": (lambda m, x, y, s: (y, Pair(a=y, b=torch.cat([s.b, y]))), "becomes"),
    "another kind": (lambda m, x, y, s: (y, (y, y)), "another kind"),
    "old state out": (lambda m, x, y, s: (s.a, Pair(a=y, b=s.a * 2 + x)), None),
    "new state out": (lambda m, x, y, s: (y, Pair(a=y, b=y[:, ::2].repeat_interleave(2, 1))), None),
    "state, then in place": (lambda m, x, y, s: (z := y + 0, Pair(a=z, b=changed(z, lambda z: z.mul_(2)))), None),
    "x in place": (lambda m, x, y, s: (y * changed(x, lambda x: x.mul_(2)), Pair(a=x, b=y)), None),
    # other ways around the recording
    "vmap": (lambda m, x, y, s: torch.vmap(lambda row: row * row.sum())(y), None),
    "autograd": (lambda m, x, y, s: Double.apply(y), None),
    "scripted": (lambda m, x, y, s: scripted(y, x), None),
    "autocast": (lambda m, x, y, s: autocast(m, y), "bfloat16"),
    "thread": (lambda m, x, y, s: in_a_thread(lambda: y.tanh() * 2), DIFFERS),
    "deepcopy": (lambda m, x, y, s: copy.deepcopy(y) * 2, WRITES),
    "pickle": (lambda m, x, y, s: pickle.loads(pickle.dumps(y)) * 2, "storage|numpy|pickle|of a value"),
    "from a list": (lambda m, x, y, s: torch.tensor(y.tolist()) * 2, READS),
    "cond": (lambda m, x, y, s: torch.where(y.sum() > 0, y, -y), None),
    "subclass": (lambda m, x, y, s: torch.Tensor.as_subclass(y, Tagged).mul(2).as_subclass(torch.Tensor), None),
    # initial states
    "begins at ones": (lambda m, x, y, s: (y, Pair(a=s.a * 0.9 + y, b=s.b + 1)), None),
    "views of one": (lambda m, x, y, s: (y, Pair(a=s.a + y, b=s.b * 0.5 + x)), None),
    "expanded": (lambda m, x, y, s: (y, Pair(a=s.a + y, b=s.b * 0.5 + x)), None),
    "strided": (lambda m, x, y, s: (y, Pair(a=s.a + y, b=s.b * 0.5 + x)), None),
    "integers": (lambda m, x, y, s: (y, Pair(a=y, b=s.b + 1)), None),
    "integers down": (lambda m, x, y, s: (y * s.b.float().sin(), Pair(a=y, b=s.b - 3)), None),
    "integers kept": (lambda m, x, y, s: (y, Pair(a=y, b=s.b.clone())), None),
    "integers doubled": (lambda m, x, y, s: (y, Pair(a=y, b=s.b * 2 + 1)), "int64"),
    "integers compared": (lambda m, x, y, s: (torch.where(s.b > 2, y, x), Pair(a=y, b=s.b + 1)), "int64"),
    "integers by a half": (lambda m, x, y, s: (y * (s.b * 0.5), Pair(a=y, b=s.b + 1)), "int64"),
    "integers of the token": (lambda m, x, y, s: (y, Pair(a=y, b=y.long())), "int64"),
    "truths": (lambda m, x, y, s: (torch.where(s.b, y, x), Pair(a=y, b=y > 0)), None),
    "doubles": (lambda m, x, y, s: (y, Pair(a=y, b=s.b + y)), "float64"),
    "halves": (lambda m, x, y, s: (y, Pair(a=y, b=(s.b + y).half())), "float16"),
    "empty": (lambda m, x, y, s: (y, Pair(a=y, b=s.b[:, :0] + 1)), None),
    # views
    "chunks": (lambda m, x, y, s: torch.cat([*y.chunk(2, -1)][::-1], -1) * y.T.T, None),
    "unfold": (lambda m, x, y, s: y + y.unfold(1, 4, 4).mean(-1).repeat_interleave(4, 1), None),
    "as_strided": (lambda m, x, y, s: y * y.as_strided((3, D), (D, 1), 0), "as_strided"),
    "complex": (lambda m, x, y, s: torch.view_as_real(torch.view_as_complex(y.view(3, -1, 2)) * 1j).flatten(1), None),
    "conjugate": (
        lambda m, x, y, s: y + torch.view_as_complex(y.view(3, -1, 2)).conj().imag.sum(-1, True),
        "minus|conj",
    ),
    "expanded value": (lambda m, x, y, s: y * y.mean(-1, keepdim=True).expand(3, D), None),
    "two widths": (lambda m, x, y, s: m.proj(y) + m.proj(torch.cat([y, x], -1)[:, :D]), None),
}
STEPS = {name: step for name, (step, _) in CASES.items()}
INIT = {
    "begins at ones": lambda n: Pair(a=torch.ones(n, D), b=torch.full((n, D), -2.0)),
    "views of one": lambda n: Pair(**dict(zip("ab", torch.zeros(2, n, D).unbind(0), strict=True))),
    "expanded": lambda n: Pair(a=torch.ones(n, 1).expand(n, D), b=torch.zeros(n, D)),
    "strided": lambda n: Pair(a=torch.zeros(D, n).t(), b=torch.zeros(n, 2 * D)[:, ::2]),
    **dict.fromkeys(
        [
            "integers",
            *(f"integers {how}" for how in ("down", "kept", "doubled", "compared", "by a half", "of the token")),
        ],
        lambda n: Pair(a=torch.zeros(n, D), b=torch.full((n, D), 4, dtype=torch.long)),
    ),
    "truths": lambda n: Pair(a=torch.zeros(n, D), b=torch.zeros(n, D, dtype=torch.bool)),
    "doubles": lambda n: Pair(a=torch.zeros(n, D), b=torch.zeros(n, D, dtype=torch.float64)),
    "halves": lambda n: Pair(a=torch.zeros(n, D), b=torch.zeros(n, D, dtype=torch.float16)),
    "empty": lambda n: Pair(a=torch.zeros(n, D), b=torch.zeros(n, 0)),
}


def probe(*names, **options):
    layers = tuple(Layer.Config(mixer=Probe.Config(name=name)) for name in names)
    return LanguageModel.Config(vocab_size=20, d_model=D, layers=layers, **options).build().eval()


@torch.no_grad()
def both(model, batch, steps=5, decoder=None):
    """A fresh decoder beside ``model.step``, from the initial state."""
    decoder = decoder or Decoder(model, batch)
    kept = model.init_state(batch)
    for t, tokens in enumerate(torch.randint(0, model.cfg.vocab_size, (steps, batch))):
        rng = torch.get_rng_state()
        want, kept = model.step(tokens, kept)
        torch.set_rng_state(rng)  # for a step that draws
        numerics.assert_close(decoder.step(tokens).to(want.dtype), want, f"step {t}")
    for (name, got, _), (_, want, _) in zip(states.leaves(decoder.state()), states.leaves(kept), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        numerics.assert_close(got, want, name)
    return decoder


PYTHONS_OWN = {"counter", "history", "global", "buffer"}  # a second run of these is another function


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_replayed_rightly_or_not_at_all(name):
    reason, model = CASES[name][1], probe(name)
    decoder = Decoder(model, 3) if name in PYTHONS_OWN else both(model, 3)
    found = decoder.explain()
    if native.MISSING is None and reason is None:
        assert found == []
    elif native.MISSING is None:
        assert re.search(reason, dict(found).get("layers.0.0", found[0][1])), found
    assert found or native.MISSING is None


EMBEDS = {
    "as numbers": (lambda m, t: m.embedding(t) * t.float()[:, None], "used as numbers"),
    "another order": (lambda m, t: m.embedding(t.flip(0)), "flip"),
    "other ids": (lambda m, t: m.embedding((t + 1) % 20), "used as numbers"),
    "some": (lambda m, t: m.embedding(t[:1]).expand(3, D), "something else than token ids"),
    "backwards": (lambda m, t: m.embedding(t.view(3, 1).expand(3, 2)).mean(1), "something else than token ids"),
    "twice": (lambda m, t: m.embedding(t) + 2 * m.embedding(t.long()), None),
    "read": (lambda m, t: m.embedding(t) * (1 + int(t[0])), READS),
    "python": (lambda m, t: torch.stack([m.embedding.weight[i] for i in t.tolist()]), READS),
    "nothing": (lambda m, t: torch.ones(3, D), None),
}


@pytest.mark.parametrize("name", EMBEDS)
def test_embeddings(name):
    embed, reason = EMBEDS[name]

    class Own(LanguageModel):
        def embed(self, tokens):
            return embed(self, tokens)

    model = probe("plain")
    model.__class__ = Own
    found = both(model, 3).explain()
    if native.MISSING is None:
        assert found == [] if reason is None else re.search(reason, found[0][1]), found


def test_a_norm_that_hands_on_what_it_was_given():
    model = probe("x in place", "x in place", "plain")
    for layer in model.layers:
        layer.mixer_norm = torch.nn.Identity()
    both(model, 3)


@pytest.mark.skipif(native.MISSING is not None, reason="no kernels")
@pytest.mark.parametrize("name", ["plain", "float", "counter", "history", "thread", "begins at ones"])
def test_under_bf16_each_block_is_held_to_its_step(name):
    found = Decoder(probe("plain", name, "plain").bfloat16(), 3).explain()
    assert [place for place, _ in found] == ([] if CASES[name][1] is None else ["layers.1.0"]), found
