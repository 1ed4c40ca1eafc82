"""Pools: any rows of any texts together, each as if it were alone; recordings kept as long as they are true."""

import copy
import io
import itertools
import pickle
import threading

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import everlong
from everlong import numerics
from everlong import state as states
from everlong.config import find, mixer_names
from everlong.generation.pool import Pool, _sizes
from everlong.generation.programs import programs
from everlong.generation.sampler import Sampler, Sampling, filtered
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel
from everlong.models.quantize import quantized
from everlong.ops import native
from test_decode import model_of
from test_decode_guards import probe

needs_kernels = pytest.mark.skipif(native.MISSING is not None, reason=f"no kernels: {native.MISSING}")
HYBRID = ("rwkv7", "mamba2", "attention", "hyena", "retention")


def windowed(dtype=torch.float32):
    """Griffin's kind: a ring of keys beside a recurrence."""
    mixers = [find("rg_lru").Config(), find("attention").Config(window=7, n_kv_heads=2), find("mlstm").Config()]
    layers = tuple(Layer.Config(mixer=mixer, mlp=SwiGLU.Config()) for mixer in mixers)
    return LanguageModel.Config(vocab_size=50, d_model=64, layers=layers).build().to(dtype).eval()


MODELS = {
    "hybrid": lambda: model_of(*HYBRID),
    "hybrid bf16": lambda: model_of(*HYBRID, dtype=torch.bfloat16),
    "hybrid int8": lambda: quantized(model_of(*HYBRID), "int8"),
    "window": windowed,
    "window bf16": lambda: windowed(torch.bfloat16),
    "a block in Python": lambda: probe("plain", "half", "plain"),
    "all in Python": lambda: model_of("gla", "attention").double(),
}


def equal(got, want, what):
    for (name, mine, _), (_, theirs, _) in zip(states.leaves(got), states.leaves(want), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, (what, name, mine.shape, theirs.shape)
        assert torch.equal(mine, theirs), (what, name)


@torch.no_grad()
@pytest.mark.parametrize("label", MODELS)
def test_any_rows_together_are_each_as_alone(label):
    """Rows come, go, stand still and change places; each equals a pool of its own, in logits and state."""
    model, rows = MODELS[label](), 6
    exact = native.MISSING is None and label not in ("a block in Python", "all in Python")
    vocabulary = model.cfg.vocab_size
    together, alone, random = Pool(model, rows), {}, torch.Generator().manual_seed(3)
    number = lambda n: int(torch.randint(0, n, (), generator=random))  # noqa: E731
    for turn in range(60):
        for row in range(rows):
            if row not in alone and number(3) == 0:
                prompt = torch.randint(0, vocabulary, (1, 1 + number(90)), generator=random)
                state = None if label.startswith("a block") or number(4) == 0 else model.read(prompt)[1]
                alone[row] = Pool(model, 1)
                together.put(row, state)
                alone[row].put(0, state)
            elif row in alone and number(12) == 0:
                together.free(row)
                del alone[row]
        assert together.alive == sorted(alone)
        active = [row for row in alone if number(3)]
        active = [active[i] for i in torch.randperm(len(active), generator=random)]
        if not active:
            continue
        tokens = torch.randint(0, vocabulary, (len(active),), generator=random)
        logits = together.step(tokens, active).clone()
        for place, row in enumerate(active):
            want = alone[row].step(tokens[place : place + 1])[0]
            if exact:
                assert torch.equal(logits[place], want), (turn, row)
            else:
                numerics.assert_close(logits[place], want, f"turn {turn}, row {row}")
        if turn % 9 == 0 and exact:
            for row in alone:
                equal(together.take(row), alone[row].take(0), (turn, row))
            equal(
                together.take(active),
                states.stack([alone[row].take(0) for row in active]),
                "several rows",
            )


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("name", mixer_names())
def test_the_state_is_that_of_step(name):
    """Names, shapes and dtypes byte for byte; numbers within rounding. Growing histories pass their first room."""
    model, pool = model_of(name), Pool(model_of(name), 2)
    tokens = torch.randint(0, 50, (2, 150))
    _, state = model(tokens[:, :3])
    pool.load([1, 0], state)
    for token in tokens[:, 3:].unbind(1):
        _, state = model.step(token, state)
        pool.step(token, [1, 0])
    for (leaf, got, _), (_, want, _) in zip(states.leaves(pool.take([1, 0])), states.leaves(state), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape, leaf
        numerics.assert_close(got, want, leaf)
    states.check_values(pool.take(0))


@torch.no_grad()
@pytest.mark.parametrize("name", mixer_names())
def test_a_batch_of_prompts_is_each_prompt_alone(name):
    model = model_of(name)
    prompts = [torch.randint(0, 50, (length,)).tolist() for length in (1, 2, 30, 5, 9, 71, 4)]
    settings = [Sampling(temperature=0.0), Sampling(seed=1), Sampling(seed=2, top_k=5), Sampling(seed=3, top_p=0.7)]
    settings += [Sampling(seed=4, min_p=0.02), Sampling(temperature=0.0, repetition_penalty=1.7), Sampling(seed=1)]
    batch = everlong.generate_batch(model, prompts, max_tokens=12, sampling=settings, rows=5, stop_ids=7)
    seen = list(batch)
    for index, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True)):
        alone = list(everlong.generate(model, prompt, max_tokens=12, sampling=sampling, stop_ids=7))
        assert batch.tokens[index] == alone == [token for i, token in seen if i == index]


def test_a_batch_says_what_it_cannot_do():
    model = model_of("gla")
    for prompts, options, message in (
        ([], {}, "prompts must be lists of token ids, at least one"),
        ([1, 2], {}, "for a single prompt: generate"),
        ("text", {}, "prompts must be lists"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [50]], {}, "ids from 50 to 50, expected 0 to 49"),
        ([[1], [2]], {"sampling": [Sampling()]}, "1 settings of sampling for 2 prompts"),
        ([[1]], {"sampling": "hot"}, "sampling"),
        ([[1]], {"rows": 0}, "rows"),
    ):
        with pytest.raises(ValueError, match=message):
            everlong.generate_batch(model, prompts, **options)
    assert list(everlong.generate_batch(model, [[1], [2]], max_tokens=0)) == []


def test_a_pool_says_what_it_cannot_do():
    model, token = model_of("attention"), torch.tensor([1])
    for rows, message in ((0, "rows"), (1.5, "rows"), (1 << 40, "rows"), (1 << 20, "at most 65536 texts in one pool")):
        with pytest.raises(ValueError, match=message):
            Pool(model, rows)
    pool = Pool(model, 2)
    with pytest.raises(ValueError, match="no row takes a token; put one into the pool first"):
        pool.step(torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"row 1 holds no text; alive are none"):
        pool.step(token, [1])
    pool.put(0)
    for rows, message in (([0, 0], "name one twice"), ([1, 0], "row 1 holds no text; alive are")):
        with pytest.raises(ValueError, match=message):
            pool.step(torch.tensor([1, 2]), rows)
    with pytest.raises(ValueError, match="row 2 is none of this pool; expected 0 to 1"):
        pool.put(2)
    with pytest.raises(ValueError, match="of another model"):
        pool.put(1, model_of("gla").init_state(1))
    with pytest.raises(ValueError, match="token ids from 50 to 50, expected 0 to 49"):
        pool.step(torch.tensor([50]))
    with pytest.raises(ValueError, match="row 1 holds no text"):
        pool.take(1)
    for rows in (["0"], [0.0], [None]):
        with pytest.raises(ValueError, match="expected the numbers of rows"):
            pool.step(token, rows)
    with pytest.raises(ValueError, match="tokens are list, expected a tensor"):
        pool.step([1])
    for rows in ([torch.tensor(0)], [numpy.int64(0)], [False], iter([0])):  # integers, whatever their type
        pool.step(token, rows)
        assert [type(row) for row in pool.alive] == [int] and pool.alive == [0]
    pool.free(1)
    assert pool.alive == [0] and pool.step(token).shape == (1, 50)


def test_a_state_given_to_a_pool_or_taken_from_it_is_a_value():
    model = model_of(*HYBRID)
    with torch.no_grad():
        _, state = model.read(torch.randint(0, 50, (1, 9)))
    before = states.map_leaves(torch.clone, state)
    pool = Pool(model, 1)
    pool.put(0, state)
    kept = pool.take(0)
    for leaf in (leaf for _, leaf, _ in states.leaves(kept)):
        leaf.zero_()
    logits = pool.step(torch.tensor([3])).clone()
    equal(state, before, "the state that was given")
    for leaf in (leaf for _, leaf, _ in states.leaves(state)):
        leaf.zero_()
    pool.put(0, before)
    assert torch.equal(pool.step(torch.tensor([3])), logits)


def test_sizes_of_programs():
    for rows in range(1, 300):
        sizes = _sizes(rows)
        assert 0 <= sum(sizes) - rows <= 3 and max(sizes) <= 64 and len(sizes) == -(-rows // 64)
        assert all(size % 4 == 0 for size in sizes[:-1])


# ---- recordings that are kept ----


@needs_kernels
def test_a_second_text_records_nothing():
    model = model_of("mamba", "attention")
    list(everlong.generate(model, [1, 2], max_tokens=3))
    cost, kept = programs(model).cost, programs(model)
    list(everlong.generate(model, [3], max_tokens=3))
    assert programs(model) is kept and kept.cost == cost and cost.recording > 0


def scaled(model):
    with torch.no_grad():
        model.layers[0].mixer.out_proj.weight.mul_(2)


def data(model):
    model.layers[0].mixer.A_log.data.mul_(2)


def swapped(model):
    model.layers[0].mixer.out_proj.weight.data = 2 * model.layers[0].mixer.out_proj.weight.data


def replaced(model):
    model.layers[0].mixer.out_proj = nn.Sequential(copy.deepcopy(model.layers[0].mixer.out_proj), nn.Tanh())


def hooked(model):
    model.layers[0].mixer_norm.register_forward_hook(lambda module, inputs, out: 2 * out)


def attribute(model):
    norm = model.layers[0].mixer_norm
    norm.cfg = norm.cfg.replace(eps=0.5)


def loaded(model):
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()})


def another_class(model):
    class Twice(type(model.layers[0].mixer)):
        def step(self, x, state):
            y, after = super().step(x, state)
            return 2 * y, after

    model.layers[0].mixer.__class__ = Twice


def converted(model):
    model.bfloat16()


@pytest.mark.parametrize(
    "change", [scaled, data, swapped, replaced, hooked, attribute, loaded, another_class, converted]
)
@torch.no_grad()
def test_a_model_that_has_changed_is_recorded_anew(change):
    model = model_of("mamba")

    def two_tokens():
        pool = Pool(model, 1)
        pool.put(0)
        return [pool.step(torch.tensor([token])) for token in (3, 4)][1].clone()

    before = two_tokens()
    change(model)
    want, _ = model.step(torch.tensor([4]), model.step(torch.tensor([3]), model.init_state(1))[1])
    got = two_tokens()
    numerics.assert_close(got.to(want.dtype), want, change.__name__)
    assert not torch.equal(got, before)


def test_copies_of_a_model_carry_no_recordings():
    model = model_of("mamba")
    list(everlong.generate(model, [1], max_tokens=2))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            other.layers[0].mixer.out_proj.weight.zero_()
        pool = Pool(other, 1)
        pool.put(0)
        want, _ = other.step(torch.tensor([3]), other.init_state(1))
        numerics.assert_close(pool.step(torch.tensor([3])), want.detach(), "logits of the copy")
    assert "_programs" not in model.state_dict()


@needs_kernels
def test_pools_of_one_model_in_several_threads():
    model, failures = model_of(*HYBRID), []
    want = [list(everlong.generate(model, [seed], max_tokens=20, sampling=Sampling(seed=seed))) for seed in range(4)]
    programs(model)._kept.clear()

    def use(seed):
        try:
            for _ in range(3):
                assert list(everlong.generate(model, [seed], max_tokens=20, sampling=Sampling(seed=seed))) == want[seed]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- sampling ----


def test_draws_follow_the_odds_and_never_take_what_has_none():
    logits = torch.tensor([[0.0, -float("inf"), 1.0, 2.0, -float("inf"), 0.5]]).clamp_min(-1e30)
    for sampling in (Sampling(seed=1), Sampling(seed=2, top_k=2), Sampling(seed=3, top_p=0.8, temperature=0.7)):
        sampler = Sampler(6)
        sampler.put(0, sampling, torch.zeros(0, dtype=torch.long))
        counts = torch.bincount(torch.tensor([sampler.draw(logits, [0])[0] for _ in range(4000)]), minlength=6)
        odds = filtered(logits, [sampling]).softmax(-1)[0]
        assert not counts[odds == 0].any()
        spread = (4000 * odds * (1 - odds)).sqrt()
        assert ((counts - 4000 * odds).abs() <= 5 * spread + 1e-9).all(), (counts, 4000 * odds)


def test_rows_draw_as_if_they_were_alone():
    logits, rows = torch.randn(6, 40), [3, 0, 9, 4, 7, 1]
    settings = [Sampling(seed=1), Sampling(temperature=0), Sampling(seed=1, top_k=3), Sampling(seed=5, top_p=0.5)]
    settings += [Sampling(seed=2, min_p=0.1, repetition_penalty=3.0), Sampling(seed=9, temperature=3.0)]
    together = Sampler(40)
    for row, sampling in zip(rows, settings, strict=True):
        together.put(row, sampling, torch.tensor([1, 2]))
    drawn = [together.draw(logits + step, rows) for step in range(90)]
    for place, sampling in enumerate(settings):
        alone = Sampler(40)
        alone.put(5, sampling, torch.tensor([1, 2]))
        assert [alone.draw(logits[place : place + 1] + step, [5])[0] for step in range(90)] == [d[place] for d in drawn]


def test_without_a_seed_the_generator_of_pytorch_is_asked():
    sampler, logits = Sampler(30), torch.randn(1, 30)
    sampler.put(0, Sampling(), torch.zeros(0, dtype=torch.long))
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append([sampler.draw(logits, [0])[0] for _ in range(20)])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value):
    sampler = Sampler(3)
    sampler.put(0, Sampling(), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="logits are not finite"):
        sampler.draw(torch.tensor([[0.0, value, 1.0]]), [0])


def test_filters_of_rows_are_those_of_each():
    logits = torch.randn(20, 33)
    options = [dict(top_k=k, top_p=p, min_p=m) for k, p, m in itertools.product((0, 3), (1.0, 0.6), (0.0, 0.05))]
    settings = [Sampling(temperature=0.5 + i / 10, **options[i % 8]) for i in range(20)]
    together = filtered(logits, settings)
    for row, sampling in enumerate(settings):
        assert torch.equal(filtered(logits[row : row + 1], [sampling])[0], together[row])
        plain = F.softmax(logits[row] / sampling.temperature, -1)
        assert torch.isfinite(together[row][plain.argmax()])
