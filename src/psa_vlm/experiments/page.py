"""What an experiment found: as a page, as Markdown, as JSON, and in the terminal."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Shown

from psa_vlm.evaluation import report
from psa_vlm.evaluation.figures import Figure
from psa_vlm.evaluation.scorecard import git_commit, write_whole
from psa_vlm.evaluation.scorers import Interval

Cell = str | int | float | Interval | None
"""What stands in a table: words, a number, a figure with its interval, or None where there is none.
In `result.json` it keeps its numbers."""

T = TypeVar("T")
WIDTH = 100  # of a log, which has none of its own


@dataclass(frozen=True)
class Change(Interval):
    """A difference of two shares with its 95% interval, told in percentage points."""

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


class Table(NamedTuple):
    """A table under its caption; every row has a cell for each name in the header."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Page:
    """What an experiment found.

    Attributes:
        title: what was done, in a few words.
        question: what it should answer.
        tables: captions, headers and rows; a plain tuple is a `Table` too.
        plots: captions and figures, as `psa_vlm.evaluation.figures` makes them.
        notes: sentences computed from the figures, warnings among them.
    """

    title: str
    question: str
    tables: Sequence[Table | tuple[str, Sequence[str], Sequence[Sequence[Cell]]]]
    plots: Sequence[tuple[str, Figure]] = ()
    notes: Sequence[str] = ()


def write_page(out: Path, page: Page, command: str, seed: int, started: float) -> None:
    """Write `page.html`, `tables.md` and `result.json` into a folder, and print the tables.

    Args:
        out: the folder, made if it is not there.
        page: what to write.
        command: that makes it again.
        seed: the first seed.
        started: when the experiment began, by `time.monotonic()`.

    Raises:
        MissingExtra: plotly is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    tables = [Table(*table) for table in page.tables]
    seconds = round(time.monotonic() - started, 1)
    made = {
        "command": command,
        "seed": seed,
        "commit": git_commit(),
        "seconds": seconds,
        "machine": processor(),
    }
    result = {"title": page.title, "question": page.question, **made, "notes": list(page.notes)}
    result["tables"] = [
        {
            "caption": table.caption,
            "rows": [dict(zip(table.header, map(_plain, row), strict=True)) for row in table.rows],
        }
        for table in tables
    ]
    write_whole(out / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_whole(out / "tables.md", _markdown(tables, page.notes))
    report.write_page(
        out / "page.html",
        "experiment.html",
        {f"plot-{index}": figure for index, (_, figure) in enumerate(page.plots)},
        page=page,
        tables=[(table.caption, table.header, _rows(table, parts)) for table in tables],
        made=made,
        duration=report.duration(seconds),
    )
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    for table in tables:
        console.print(_shown(table))
    for note in page.notes:
        console.print(f"- {escape(note)}", highlight=False)
    console.print(f"page: {out / 'page.html'}   figures: {out / 'result.json'}")


def told(cell: Cell, column: str = "") -> str:
    """A cell as people read it: shares in percent, F1 as a fraction, each with its interval."""
    value, interval = parts(cell, column)
    return f"{value} ({interval})" if interval else value


def parts(cell: Cell, column: str = "") -> tuple[str, str]:
    """`told` in two: the figure, and its interval or nothing."""
    if isinstance(cell, Change):
        return f"{100 * cell.value:+.1f}", f"{100 * cell.low:+.1f} to {100 * cell.high:+.1f}"
    if isinstance(cell, Interval):
        if column.endswith("F1"):
            return f"{cell.value:.3f}", f"{cell.low:.2f}-{cell.high:.2f}"
        return f"{100 * cell.value:.1f}%", f"{100 * cell.low:.1f}-{100 * cell.high:.1f}"
    if cell is None:
        return "-", ""
    if isinstance(cell, float):
        return f"{cell:.4g}", ""
    return f"{cell:,}" if isinstance(cell, int) else cell, ""


def processor() -> str:
    """The machine's CPU by name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _plain(cell: Cell) -> Any:
    return asdict(cell) if isinstance(cell, Interval) else cell


def _rows(table: Table, how: Callable[[Cell, str], T]) -> list[list[T]]:
    """The cells of a table, each put into words."""
    return [
        [how(cell, name) for name, cell in zip(table.header, row, strict=True)]
        for row in table.rows
    ]


def _stacked(cell: Cell, column: str) -> str:
    """For the terminal, which is narrow: the interval below its figure."""
    value, interval = parts(cell, column)
    return f"{escape(value)}\n[dim]{interval}[/dim]" if interval else escape(value)


def _markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    blocks = [
        [f"**{table.caption}**", "", line(table.header), "|---" * len(table.header) + "|"]
        + [line(row) for row in _rows(table, told)]
        for table in tables
    ]
    blocks += [[f"- {note}" for note in notes]] if notes else []
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _shown(table: Table) -> Shown:
    shown = Shown(title=escape(table.caption), box=box.SIMPLE_HEAD, pad_edge=False)
    shown.title_justify, shown.title_style = "left", "bold"
    for index, name in enumerate(table.header):
        shown.add_column(escape(name), justify="right" if index else "left", overflow="fold")
    for row in _rows(table, _stacked):
        shown.add_row(*row)
    return shown
