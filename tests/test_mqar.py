"""MQAR: the layout, the distribution of the gaps, and that a batch is a function of seed and step."""

from types import SimpleNamespace

import pytest
import torch

from everlong import numerics
from everlong.tasks.mqar import MQAR


def batch(step=0, seed=0, rows=64, **options):
    task = MQAR.Config(**{"vocab_size": 256, "length": 64, "pairs": (8,), **options}).build()
    return task.batch(step, SimpleNamespace(batch=rows, seed=seed))


@pytest.mark.parametrize("random_non_queries", [True, False])
def test_layout(random_non_queries):
    tokens, targets, starts = batch(random_non_queries=random_non_queries)
    assert tokens.shape == targets.shape == starts.shape == (64, 64)
    assert tokens.dtype == targets.dtype == torch.int64
    assert starts[:, 0].all() and not starts[:, 1:].any()
    assert int(tokens.min()) >= 0 and int(tokens.max()) < 256
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        keys, values = row[0:16:2], row[1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert all(1 <= key < 128 for key in keys) and all(128 <= value < 256 for value in values)
        asked = [place for place, target in enumerate(wanted) if target != -100]
        assert len(asked) == 8 and all(place >= 16 and place % 2 == 0 for place in asked)
        assert sorted(row[place] for place in asked) == sorted(keys)
        assert all(wanted[place] == values[keys.index(row[place])] for place in asked)
        rest = [row[place] for place in range(16, 64) if place not in asked]
        assert any(rest) == random_non_queries


def test_gaps_follow_the_power_law():
    _, targets, _ = batch(rows=20_000, pairs=(1,), length=32)
    slots = (targets != -100).long().argmax(dim=1).sub(2) // 2
    seen = torch.bincount(slots, minlength=15) / len(slots)
    wanted = torch.arange(1, 16).double() ** (0.01 - 1)
    torch.testing.assert_close(seen.double(), wanted / wanted.sum(), atol=numerics.BOUNDS["sample"], rtol=0)


def test_draws_without_replacement_as_one_after_the_other():
    """Two slots of three: the second is drawn in proportion to what is left."""
    _, targets, _ = batch(rows=40_000, pairs=(2,), length=10, power=1e-9)
    asked = (targets != -100)[:, 4::2]
    missing = (~asked).double().mean(dim=0)  # P(slot i is the one not drawn), weights 1, 1/2, 1/3
    weights = torch.tensor([1, 1 / 2, 1 / 3], dtype=torch.float64)
    odds = weights / weights.sum()
    wanted = [
        sum(odds[i] * odds[j] / (1 - odds[i]) for i in range(3) for j in range(3) if i != j and out not in (i, j))
        for out in range(3)
    ]
    torch.testing.assert_close(missing, torch.stack(wanted), atol=numerics.BOUNDS["sample"], rtol=0)


def test_batch_is_a_function_of_seed_and_step():
    first, again = batch(step=3, seed=5), batch(step=3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (batch(step=4, seed=5), batch(step=3, seed=6), batch(step=5, seed=3)):
        assert not torch.equal(first.tokens, other.tokens)


def test_shortest_length_for_the_pairs_of_the_batch():
    task = MQAR.Config(vocab_size=64, length=None, pairs=(2, 8)).build()
    shapes = {tuple(task.batch(step, SimpleNamespace(batch=4, context=32, seed=0)).tokens.shape) for step in range(20)}
    assert shapes == {(16, 8), (4, 32)}
    tokens, targets, _ = task.batch(0, SimpleNamespace(batch=4, context=32, seed=0))
    assert ((targets != -100).sum(dim=1) * 4 == tokens.shape[1]).all()  # every slot is a query


def test_mixed_pairs_are_drawn_evenly():
    counts = {n: 0 for n in (1, 2, 4)}
    for step in range(300):
        counts[int((batch(step=step, rows=1, pairs=(1, 2, 4)).targets != -100).sum())] += 1
    assert min(counts.values()) > 70


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pairs": (17,)}, "17 pairs and their queries need a length of 68, got 64"),
        ({"pairs": ()}, "pairs must be numbers >= 1"),
        ({"vocab_size": 16}, "8 pairs need an even vocab_size of at least 18, got 16"),
        ({"vocab_size": 65}, "8 pairs need an even vocab_size"),
        ({"power": 0.0}, "power must be a number from 1e-12 to .*, got 0.0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        batch(**options)


def test_round_trip():
    config = MQAR.Config(vocab_size=256, length=64, pairs=(4, 8))
    assert MQAR.Config.from_dict(config.to_dict()) == config
