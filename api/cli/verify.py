"""`slotkeeper verify`: prove a data directory. `engine.verify` does the work."""

from pathlib import Path

import click
import msgspec
from rich.progress import Progress, TaskID

from api.cli import options, output
from api.cli.exits import Exit, Failure, write_json
from engine.datadir import DataDirectoryError
from engine.verify import Report, verify_data_directory


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@options.as_json
def verify(directory: Path, *, as_json: bool) -> None:
    """Prove a data directory from its journals.

    Every row is there, unaltered and in order; no counter ever passed its limit but where a plan went below what was
    booked; the state that comes out is the one that is served; every reservation over several shards is the same on each of
    them or on its way. It only reads, and may run beside a live service.
    Exit code 0 only when all is proven.
    """
    try:
        with output.progress() as bars:
            report = verify_data_directory(directory, _Steps(bars, bars.add_task("Proving", total=None)))
    except DataDirectoryError as error:
        raise Failure(Exit.UNUSABLE, str(error)) from None
    if as_json:
        write_json(msgspec.to_builtins(report))
    else:
        _show(report)
    raise SystemExit(Exit.OK if report.ok else Exit.REFUSED)


class _Steps:
    """Moves a bar a thousand times at most: a journal may have millions of rows, and a step costs more than a row."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task
        self._next = 0

    def __call__(self, done: int, total: int) -> None:
        if done >= self._next or done == total:
            self._next = done + total // 1_000
            self._bars.update(self._task, completed=done, total=total)


def _show(report: Report) -> None:
    journals = (*report.shards, report.planner)
    columns = ("journal", "segments", "rows", "events", "head", "counters", "reservations", "problems")
    output.table(
        columns,
        (
            (one.name, one.segments, one.rows, one.events, one.head, one.counters, one.reservations, len(one.problems))
            for one in journals
        ),
    )
    cross = report.cross
    output.table(
        ("between shards", "reservations", "parts", "owed", "pinned", "moving", "problems"),
        [("all", cross.reservations, cross.parts, cross.owed, cross.pinned, cross.moving, len(cross.problems))],
    )
    for one in journals:
        for exception in one.exceptions:
            click.echo(f"{one.name}: recorded: {exception}")
    for one in journals:
        for problem in one.problems:
            click.echo(f"{one.name}: PROBLEM: {problem}")
    for problem in cross.problems:
        click.echo(f"between shards: PROBLEM: {problem}")
    events = sum(one.events for one in journals)
    if report.ok:
        click.echo(f"\nproven: {events} events, no counter above its limit, every row unaltered and in its place")
    else:
        click.echo("\nNOT PROVEN: see the problems above")
