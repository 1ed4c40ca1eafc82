"""Write what is generated from the code into a page: ``python -m everlong.report.readme README.md``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ..files import atomic_write
from .table import markdown

MARKED = re.compile(r"(<!-- architectures -->\n).*?(<!-- /architectures -->)", re.DOTALL)


def generated(text: str) -> str:
    """``text`` with the table of architectures between its marks made anew."""
    return MARKED.sub(lambda found: found[1] + markdown() + found[2], text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        atomic_write(Path(name), generated(Path(name).read_text(encoding="utf-8")))
