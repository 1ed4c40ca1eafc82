"""Every file in mixers/, and every feed-forward block of models/, obeys every law, by its mere existence."""

import importlib
import inspect

import pytest

from everlong import laws
from everlong.config import BLOCKS, find, kind_of, mixer_names
from everlong.mixers.base import Mixer
from everlong.models.blocks import FeedForward


def blocks():
    """The feed-forward blocks: mixers by contract, beside those in mixers/."""
    modules = [importlib.import_module(name) for name in BLOCKS]
    classes = [cls for module in modules for _, cls in inspect.getmembers(module, inspect.isclass)]
    found = {cls for cls in classes if issubclass(cls, Mixer) and cls.__module__ in BLOCKS} - {FeedForward}
    return sorted(found, key=kind_of)


KINDS = [*((name, find(name)) for name in mixer_names()), *((kind_of(block), block) for block in blocks())]
SUBJECTS = [(name, subject) for name, kind in KINDS for subject in laws.subjects(kind)]


def test_the_feed_forward_blocks_are_among_them():
    assert {"swiglu", "mlp", "channelmix"} <= {name for name, _ in KINDS}


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("subject", [pytest.param(s, id=f"{n}-{s.name}") for n, s in SUBJECTS])
def test_law(subject, law):
    laws.check(subject, law)
