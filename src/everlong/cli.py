"""The command line: verbs only; each calls one function of the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    name="everlong",
    help="Sequence models whose cost stays linear: compare, train, generate, check.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)


def main() -> None:
    """Entry point: errors meant for the user are one clear line, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        from rich.console import Console

        Console(stderr=True, highlight=False).print("[bold red]error:[/]", str(error), markup=True, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
