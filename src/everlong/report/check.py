"""``everlong check``: the laws of the contract on one mixer, as a list of ticks."""

from __future__ import annotations

from ..config import find
from ..laws import LAWS, LawBroken, check, subjects
from ..mixers.base import Mixer


def check_mixer(name: str) -> bool:
    """Print a line per law and configuration; True where all hold. ``ValueError`` where there is no such mixer."""
    from rich.console import Console
    from rich.markup import escape

    console, broken = Console(highlight=False), 0
    mixer = find(name)
    if not issubclass(mixer, Mixer):
        raise ValueError(f"{name} is no mixer; derive it from everlong.mixers.base.Mixer")
    for subject in subjects(mixer):
        console.print(f"[bold]{subject.name}[/]  {escape(mixer.equation)}", soft_wrap=True)
        for law, function in LAWS.items():
            told = (function.__doc__ or "").strip().splitlines()[0]
            try:
                with console.status(f"{law} ..."):
                    check(subject, law)
                console.print(f"  [green]holds[/]   {law:<11} [dim]{escape(told)}[/]", soft_wrap=True)
            except LawBroken as error:
                broken += 1
                console.print(f"  [bold red]broken[/]  {law:<11} {escape(str(error))}", soft_wrap=True)
    console.print(f"[bold red]{broken} laws broken[/]" if broken else "[bold green]all laws hold[/]")
    return not broken
