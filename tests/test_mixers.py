"""Every file in mixers/ obeys every law, by its mere existence."""

import pytest

from everlong import laws
from everlong.config import find, mixer_names

SUBJECTS = [(name, subject) for name in mixer_names() for subject in laws.subjects(find(name))]


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("subject", [pytest.param(s, id=f"{n}-{s.name}") for n, s in SUBJECTS])
def test_law(subject, law):
    laws.check(subject, law)
