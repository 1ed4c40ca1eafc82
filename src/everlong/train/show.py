"""A training job in the terminal: a bar with loss, bits per byte and tokens/s, then what was made and what to type."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..config import needs_trust
from . import job as jobs
from .loop import Progress, Stopped, Trainer

SMOOTH = 0.95  # weight of the past in the numbers shown


def refuse_other_options(context: typer.Context, chosen: str, *excluded: str) -> None:
    """``ValueError`` where an option was typed that ``chosen`` leaves without effect (none named: any other)."""
    for name in excluded or tuple(name for name in context.params if name != "trust_code"):
        source = context.get_parameter_source(name)
        if name != chosen and source is not None and source.name == "COMMANDLINE":
            typed = "paths" if name == "paths" else f"--{name.replace('_', '-')}"
            raise ValueError(f"--{chosen} already says what {typed} would set; leave one of them out")


class _Display:
    """The bar of a run, with smoothed numbers."""

    def __init__(self, console: Console) -> None:
        columns = (
            "[bold]training",
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, console=console)
        self.task = self.bar.add_task("train", total=None, numbers="")
        self.loss = self.speed = self.bits = 0.0
        self.seen = 0

    def update(self, now: Progress) -> None:
        """Show the run after a step."""
        past = min(SMOOTH, self.seen / (self.seen + 1))
        self.seen += 1
        self.loss = past * self.loss + (1 - past) * now.loss
        self.bits = past * self.bits + (1 - past) * (now.bits_per_byte or 0.0)
        self.speed = past * self.speed + (1 - past) * now.tokens_per_second
        numbers = f"loss {self.loss:.3f} · {self.bits:.3f} bits/byte · {self.speed:,.0f} tokens/s"
        self.bar.update(self.task, completed=now.step, total=now.steps, numbers=numbers)


def _introduce(console: Console, trainer: Trainer) -> None:
    model: Any = trainer.model
    text: Any = trainer.data
    size = sum(parameter.numel() for parameter in model.parameters())
    skipped = ", ".join(f"{count} {reason}" for reason, count in text.skipped.items())
    console.print(f"model   {size:,} parameters, {len(model.layers)} layers of width {model.cfg.d_model}")
    console.print(
        f"text    {len(text):,} tokens in {text.documents:,} documents"
        + (f" [yellow](files left out: {skipped})[/]" if skipped else "")
    )
    going_on = f" [yellow](going on after step {trainer.step:,})[/]" if trainer.step else ""
    console.print(f"folder  {escape(str(trainer.folder))}{going_on}", soft_wrap=True)


def train(job: jobs.Job, folder: Path, device: str = "auto") -> jobs.Result:
    """``job.train`` with a bar; Ctrl-C says how to go on and ends with status 130."""
    console = Console(highlight=False)
    display, flag = _Display(console), " --trust-code" if needs_trust(job.model) else ""

    def ready(trainer: Trainer) -> None:
        _introduce(console, trainer)
        display.bar.update(display.task, total=trainer.cfg.steps, completed=trainer.step)
        if trainer.step < trainer.cfg.steps:
            display.bar.start()

    try:
        result = jobs.train(job, folder, on_step=display.update, on_ready=ready, device=device)
    except Stopped as stopped:
        display.bar.stop()
        console.print(f"[yellow]{escape(str(stopped))}[/]", soft_wrap=True)
        console.print(f"Go on with:  everlong train --resume {_quoted(folder)}{flag}", soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        if display.bar.live.is_started:
            display.bar.stop()
    seconds = result.curve[-1].seconds
    console.print(
        f"[green]done[/] in {seconds:,.0f} s: {result.bits_per_byte:.3f} bits per byte on held-out text "
        f"(loss {result.loss:.3f} nats per token)"
    )
    console.print(
        f"Continue a text:  everlong generate {_quoted(folder)}{flag} {escape(shlex.quote(result.opening))}",
        soft_wrap=True,
    )
    return result


def _quoted(folder: Path) -> str:
    return escape(shlex.quote(str(folder)))
