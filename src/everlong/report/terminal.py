"""The comparison in the terminal: a live table, plain lines where nobody watches, a summary at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..config import suggest
from .caveats import busy
from .measures import MEASURES, Results, bits, comma, milliseconds, models, number, percent, size, title
from .verdict import first_places, verdict


@dataclass(frozen=True)
class Column:
    """A column of the live table: its key in ``update``, its head, how its value is shown."""

    key: str
    head: str
    show: Callable[[Any], str]
    plain: str  # the words after the value in a plain line


STATE_AT = 2**17  # the length whose state the live table shows
COLUMNS: tuple[Column, ...] = (
    Column("params", "params", lambda count: f"{count / 1e6:.2f}M", "parameters"),
    Column("train", "train\ntok/s", comma, "tokens/s trained"),
    Column("loss", "bpb\nnow", bits, "bits per byte now"),
    Column("held_out", "bpb\nheld", bits, "bits per byte held out"),
    Column("recall", "recall", percent, "recall"),
    Column("state", "state\n128K", size, f"of state at {STATE_AT:,} tokens"),
    Column("prefill", "prefill\ntok/s", comma, "tokens/s of prefill"),
    Column("decode", "decode\nms", milliseconds, "ms per token decoded"),
)
_BY_KEY = {column.key: column for column in COLUMNS}
_LAST = ("done", "partial", "failed")  # nothing follows these stages, so their line is printed at once
_WIDE = 100  # columns of terminal below which the progress bar gives way to a percentage


@dataclass
class _Row:
    title: str
    status: str = "waiting"
    progress: float | None = None
    cells: dict[str, float] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)  # columns set since the last plain line


class Board:
    """The live table of a comparison, one row per model; a context manager.

    ``names`` maps the name of each model to its title, or lists names. On a terminal the table is redrawn in place;
    elsewhere one line is printed whenever a model leaves a stage: its ``status`` changes or is ``"done"``,
    ``"partial"`` or ``"failed"``, or the board closes. Columns given with a new status belong to the new stage.
    """

    def __init__(self, names: Mapping[str, str] | Sequence[str], console: Console | None = None) -> None:
        given = names if isinstance(names, Mapping) else {name: name for name in names}
        self.rows = {name: _Row(title=shown) for name, shown in given.items()}
        self.console = console or Console()
        self.live = Live(get_renderable=self.table, console=self.console, refresh_per_second=4, auto_refresh=True)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for row in self.rows.values():
            self._leave_stage(row)
        if self.live.is_started:
            self.live.stop()

    def update(self, name: str, *, status: str | None = None, progress: float | None = None, **columns: float) -> None:
        """Set the stage (``status``), its progress from 0 to 1, and any of ``COLUMNS`` by key, for one model.

        ``ValueError`` for a model or a column that the board does not have.
        """
        if name not in self.rows:
            raise ValueError(f"no model {name!r} on the board{suggest(name, self.rows)}")
        if unknown := [key for key in columns if key not in _BY_KEY]:
            raise ValueError(f"no column {unknown[0]!r} on the board{suggest(unknown[0], _BY_KEY)}")
        row = self.rows[name]
        if status is not None and status != row.status:
            self._leave_stage(row)
            row.status, row.progress = status, None
        values = {key: value for key, value in columns.items() if number(value) is not None}
        row.cells.update(values)
        row.fresh += [key for key in values if key not in row.fresh]
        if progress is not None:
            row.progress = min(max(progress, 0.0), 1.0)
        if row.status in _LAST:
            self._leave_stage(row)

    def _leave_stage(self, row: _Row) -> None:
        """The plain line at the end of a stage; silent on a terminal and where nothing was learnt."""
        if self.console.is_terminal or not row.fresh:
            row.fresh.clear()
            return
        told = [f"{_BY_KEY[key].show(row.cells[key])} {_BY_KEY[key].plain}" for key in row.fresh]
        row.fresh.clear()
        line = f"{row.title}: {row.status}: {', '.join(told)}"
        self.console.print(Text(line), soft_wrap=True)

    def table(self) -> Table:
        """The table as it stands."""
        table = Table(box=None, padding=(0, 1), pad_edge=False, collapse_padding=True, header_style="bold")
        table.add_column("model", no_wrap=True)
        table.add_column("status", no_wrap=True, min_width=12)
        for column in COLUMNS:
            table.add_column(column.head, justify="right", no_wrap=True)
        for row in self.rows.values():
            cells = [column.show(row.cells[column.key]) if column.key in row.cells else "·" for column in COLUMNS]
            table.add_row(Text(row.title), self._stage(row), *cells)
        return table

    def _stage(self, row: _Row) -> Text | Table:
        """Name of the stage, with a bar where there is room and a percentage where there is not."""
        style = {"waiting": "dim", "done": "green"}.get(row.status, "cyan")
        if row.progress is None:
            return Text(row.status, style=style)
        if self.console.width < _WIDE:
            return Text(f"{row.status} {row.progress:.0%}", style=style)
        pair = Table.grid(padding=(0, 1))
        pair.add_row(Text(row.status, style=style), ProgressBar(total=1.0, completed=row.progress, width=12))
        return pair


def summary(results: Results, report: Path | None = None, console: Console | None = None) -> None:
    """Print the final table, one line of verdict per need, and where the report lies."""
    console = console or Console()
    console.print(Group(_final(results), Text("")))
    for finding in verdict(results):
        if finding["kind"] != "missing":
            told = f"{finding['headline']}, {finding['figure']}" if finding["figure"] else finding["headline"]
            console.print(f"[bold]{finding['need']}:[/] {escape(told)}", highlight=False)
    unfinished = [title(model) for model in models(results) if model.get("status", "complete") != "complete"]
    if unfinished or results.get("complete") is False:
        who = f" ({', '.join(unfinished)})" if unfinished else ""
        told = f"Partial results{who}; run the same command again to go on."
        console.print(Text(f"\n{told}", style="yellow"))
    if told := busy(results):
        console.print(Text(f"\n{told}", style="yellow"))
    if report is not None:
        console.print(Text(f"\nReport: {report}"), soft_wrap=True)


_HEADS = {
    "text": "bits\nper byte",
    "beyond": "bits of\nends, {}",
    "recall": "recall",
    "memory": "state\nat {}",
    "prefill": "prefill\nat {}",
    "decode": "ms/tok\nat {}",
    "train": "train\ntok/s",
}


def _short(length: float | None) -> str:
    """A length in tokens for a narrow column: 256, 2K, 128K."""
    if not length:
        return "-"
    return f"{length / 1024:.0f}K" if length >= 1024 else f"{length:.0f}"


def _final(results: Results) -> Table:
    """One row per model, one column per need; ``*`` marks what is best or within noise of it."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    readings = [(measure, measure.read(results)) for measure in MEASURES]
    marked = [first_places(m, reading) if len(reading.values) > 1 else [] for m, reading in readings]
    for measure, reading in readings:
        table.add_column(_HEADS[measure.key].format(_short(reading.at)), justify="right", no_wrap=True)
    for model in models(results):
        cells = []
        for (measure, reading), best in zip(readings, marked, strict=True):
            value = reading.shown(model["name"])
            star = "*" if model["name"] in best else "†" if model["name"] in reading.aside else " "
            cells.append("· " if value is None else measure.show(value) + star)
        table.add_row(Text(title(model).split(" (")[0]), *cells)
    table.caption = "* best, or within noise of the best" if models(results) else None
    if any(reading.aside for _, reading in readings):
        table.caption = f"{table.caption}\n† not compared: decoded in part by Python, or had not finished learning"
    table.caption_justify = "left"
    return table
