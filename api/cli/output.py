"""What people see: tables on standard output, progress on standard error. Imported only by commands that print such things.

Written to a file or a pipe, a table is as wide as it needs to be, without colours, and progress is not shown at all.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

PIPE_COLUMNS: Final = 1_000
"""Wider than any table here: a pipe has no edge to wrap at."""


def console() -> Console:
    """Standard output."""
    return (
        Console(highlight=False, soft_wrap=True)
        if sys.stdout.isatty()
        else Console(width=PIPE_COLUMNS, highlight=False)
    )


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table. Numbers stand to the right."""
    listed = [list(row) for row in rows]
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        numbers = bool(listed) and all(isinstance(row[index], int | float) for row in listed)
        shown.add_column(column, justify="right" if numbers else "left", no_wrap=True)
    for row in listed:
        # As texts: names with square brackets are no markup.
        shown.add_row(*(Text(_cell(value)) for value in row))
    console().print(shown)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on standard error, where that is a terminal."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bars:
        yield bars
