"""``everlong bench`` for people: progress while it runs, then tables and the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Printed
from rich.text import Text

from ..bench.results import REPORT
from ..bench.run import Terms, run_models, run_ops
from .bench_page import headline, limits, notice, write_page
from .bench_tables import Results, Table, tables

RANGE = re.compile(r" \([^()]* to [^()]*\)")  # of a spread: the page has room for it
RUNS: dict[str, Callable[..., Results]] = {"ops": run_ops, "models": run_models}


def bench(kind: str, plan: Any, terms: Terms, console: Console | None = None) -> bool:
    """Run a bench of ``kind`` ("ops" or "models"), print its tables, write its page; True where all of it was done.

    ``plan`` is an ``OpsPlan`` or a ``ModelsPlan``. What does not match its reference is red and makes it False.
    """
    terms.check()
    console = console or Console()
    console.print(f"At most {terms.minutes:g} minutes: no measurement begins later, the rest is skipped.")
    with Watching(console) as watch:
        results = RUNS[kind](plan, terms, watch)
    write_page(results, terms.out / REPORT)
    show(results, console)
    console.print(Text(f"\nPage: {terms.out / REPORT}"), soft_wrap=True)
    return results["complete"] and all(row["status"] != "mismatch" for row in results["rows"])


class Watching:
    """A bar on a terminal, a line for each stage elsewhere; a context manager that is called with each stage."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task("", total=None)

    def __enter__(self) -> Watching:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def __call__(self, done: int, total: int, label: str) -> None:
        """``done`` of ``total`` stages are done, and ``label`` comes now."""
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, total=total or None, description=label)
        else:
            self.console.print(Text(f"[{done}/{total}] {label}" if total else label), soft_wrap=True)


def show(results: Results, console: Console) -> None:
    """Print limits, tables and, where they were asked for, goals."""
    told = ", ".join(f"{limit['name'].lower()} {limit['value']}" for limit in limits(results))
    console.print(Text(f"\nThis machine, {results['machine']['threads']} threads: {told}"), soft_wrap=True)
    for table in tables(results):
        console.print()
        console.print(printed(table))
        for line in table.lines:
            if line.note:
                told = f"{', '.join(line.cells[: table.words])}: {line.note}"
                console.print(Text(told, style="red" if line.bad else "dim"), soft_wrap=True)
    if missing := notice(results):
        console.print(Text(f"\n{missing}", style="yellow"), soft_wrap=True)
    if results["lines"]:
        console.print()
    for line in results["lines"]:
        mark = Text("holds  " if line["holds"] else "fails  ", style="green" if line["holds"] else "bold red")
        words = f"{line['claim']}: {line['measured']}, asked {line['asked']}"
        console.print(mark.append(words, style="default not bold"), soft_wrap=True)
    console.print(Text(f"\n{headline(results)}"), soft_wrap=True)


def printed(table: Table) -> Printed:
    """A table for the terminal, medians alone; rows that do not match their reference are red."""
    made = Printed(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    widest = min(15, max(len(line.cells[0]) for line in table.lines))
    for number, head in enumerate(table.head):
        words = number < table.words
        made.add_column(
            head, justify="left" if words else "right", no_wrap=number > 0, min_width=0 if number else widest
        )
    for line in table.lines:
        shown = (Text(RANGE.sub("", cell)) for cell in line.cells)
        made.add_row(*shown, style="red" if line.bad else None)
    return made
