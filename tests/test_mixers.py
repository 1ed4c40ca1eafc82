"""Every file in mixers/ and in feedforward/ obeys every law, by its mere existence."""

import pytest

from everlong import laws
from everlong.config import find, kind_of
from everlong.kinds import names

KINDS = [(name, find(name)) for room in ("mixers", "feedforward") for name in names(room)]
SUBJECTS = [(name, subject) for name, kind in KINDS for subject in laws.subjects(kind)]


def test_the_feed_forward_blocks_are_among_them():
    assert {"swiglu", "mlp", "channelmix"} <= {name for name, _ in KINDS}
    assert all(kind_of(kind) == name for name, kind in KINDS)


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("subject", [pytest.param(s, id=f"{n}-{s.name}") for n, s in SUBJECTS])
def test_law(subject, law):
    laws.check(subject, law)
