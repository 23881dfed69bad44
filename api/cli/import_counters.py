"""`slotkeeper import`: counters from a CSV file, all or nothing.

`read` is pure: text and the zones of the pools in, counters and bad rows out. The service checks everything again; what is
checked here is checked so that every bad row is named at once, with its line.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO, Final, NamedTuple

import click
import msgspec

from api.cli import options, output
from api.cli.client import Service
from api.cli.exits import Exit, Failure, write_json
from api.messages import IMPORTED_COUNTERS_MAX, ImportedCounter, ImportRequest
from engine.core.limits import REASON_CHARS_MAX
from engine.core.slots import SlotError, resolve

REQUIRED: Final = ("pool_id", "slot_id", "base")
COLUMNS: Final = (*REQUIRED, "overbook", "buffer", "closed")
BAD_ROWS_SHOWN_MAX: Final = 100
"""Who has more has one mistake many times."""
FILE_BYTES_MAX: Final = 64 * 2**20
"""200,000 rows of 300 bytes, the longest there can be, and a little."""
ANSWER_TIMEOUT_SECONDS: Final = 90.0
"""Half as long again as the service itself takes at most for an import."""

_TRUE: Final = frozenset({"true", "yes", "1"})
_FALSE: Final = frozenset({"false", "no", "0", ""})


class BadRow(NamedTuple):
    """A line of the file that cannot be."""

    line: int
    """As an editor counts, from 1; of a row over several lines the last."""
    problem: str


class Found(NamedTuple):
    """What a file says."""

    counters: list[ImportedCounter]
    bad: list[BadRow]
    """All of them: the file is not used when there is one."""


class HeaderError(Exception):
    """The first line does not name the columns."""


def read(lines: Iterable[str], zones: Mapping[str, str]) -> Found:
    """Take a CSV file apart; `zones` maps each pool to its time zone. Raises `HeaderError`.

    Columns in any order, `overbook`, `buffer` and `closed` may be missing or empty. Separated by commas, or by semicolons as
    spreadsheets write where the comma is the decimal sign. More rows than one import takes are one bad row.
    """
    rows, names = _rows(lines)
    found = Found([], [])
    line_of: dict[tuple[str, str], int] = {}
    while True:
        try:
            cells = next(rows, None)
        except csv.Error as error:
            found.bad.append(BadRow(rows.line_num, f"not CSV: {error}"))
            return found
        if cells is None:
            return found
        if not any(cells):
            continue
        line = rows.line_num
        if len(found.counters) + len(found.bad) >= IMPORTED_COUNTERS_MAX:
            found.bad.append(BadRow(line, f"more than {IMPORTED_COUNTERS_MAX:,} rows: split the file"))
            return found
        try:
            counter = _counter(names, cells, zones)
        except ValueError as error:
            found.bad.append(BadRow(line, str(error)))
            continue
        first = line_of.setdefault((counter.pool_id, counter.slot_id), line)
        if first == line:
            found.counters.append(counter)
        else:
            found.bad.append(BadRow(line, f"{counter.pool_id} {counter.slot_id} stands in line {first} already"))


class _Reader(Iterator[list[str]]):
    """csv.reader, with a type."""

    def __init__(self, lines: Iterable[str], delimiter: str, before: int) -> None:
        self._reader = csv.reader(lines, delimiter=delimiter, strict=True)
        self._before = before

    def __next__(self) -> list[str]:
        return [cell.strip() for cell in next(self._reader)]

    @property
    def line_num(self) -> int:
        return self._reader.line_num + self._before


def _rows(lines: Iterable[str]) -> tuple[_Reader, list[str]]:
    remaining = iter(lines)
    header = next(remaining, "")
    delimiter = ";" if ";" in header and "," not in header else ","
    try:
        names = next(_Reader([header], delimiter, 0), [])
    except csv.Error as error:
        raise HeaderError(f"line 1 is not CSV: {error}") from None
    should = f"line 1 must name the columns: {','.join(COLUMNS)} (the last three may be missing)"
    if unknown := [name for name in names if name not in COLUMNS]:
        raise HeaderError(f"{should}; it has {', '.join(map(repr, unknown))}")
    if missing := [name for name in REQUIRED if name not in names]:
        raise HeaderError(f"{should}; it lacks {', '.join(missing)}")
    if len(set(names)) < len(names):
        raise HeaderError(f"{should}; it has one of them twice")
    return _Reader(remaining, delimiter, 1), names


def _counter(names: list[str], cells: list[str], zones: Mapping[str, str]) -> ImportedCounter:
    """One row. Raises `ValueError` with what is wrong with it."""
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells where the header has {len(names)}")
    values: dict[str, object] = {}
    for name, cell in zip(names, cells, strict=True):
        if name == "closed":
            values[name] = _boolean(cell)
        elif name in ("pool_id", "slot_id"):
            values[name] = cell
        elif cell or name in REQUIRED:
            values[name] = _integer(name, cell)
    try:
        counter = msgspec.convert(values, ImportedCounter)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at ")
        name = path.strip("`$.")
        raise ValueError(f"{name} {values.get(name)!r}: {text}") from None
    zone = zones.get(counter.pool_id)
    if zone is None:
        raise ValueError(f"there is no pool {counter.pool_id!r}: `slotkeeper pools` lists those that there are")
    try:
        resolve(counter.slot_id, zone)
    except SlotError as error:
        raise ValueError(str(error)) from None
    return counter


def _integer(name: str, cell: str) -> int:
    if not (cell.isascii() and cell.isdigit()):
        raise ValueError(f"{name} {cell!r}: not a whole number from 0 up")
    # The longest possible has 16 digits; Python refuses to read thousands of them.
    return int(cell[:32])


def _boolean(cell: str) -> bool:
    word = cell.lower()
    if word not in _TRUE | _FALSE:
        raise ValueError(f"closed {cell!r}: write true or false")
    return word in _TRUE


@click.command("import")
@click.argument("file", metavar="FILE.csv", type=click.File("rb"))
@click.option("--reason", default="", metavar="TEXT", help="Why; it stands in the log of changes.")
@click.option("--dry-run", is_flag=True, help="Check every row, change nothing.")
@options.url
@options.as_json
def import_counters(file: BinaryIO, reason: str, url: str, *, dry_run: bool, as_json: bool) -> None:
    """Define many counters from a CSV file.

    The first line names the columns: pool_id, slot_id, base and, if you like, overbook, buffer, closed. All or nothing:
    one bad row, and nothing is changed; every bad row is named with its line. A counter that exists is replaced. At most
    200,000 rows. FILE.csv may be - for standard input.
    """
    if len(reason) > REASON_CHARS_MAX:
        raise Failure(Exit.USAGE, f"--reason has {len(reason)} characters, at most {REASON_CHARS_MAX} are kept")
    lines = _lines(file)
    with output.progress() as bars, Service(url, timeout_seconds=ANSWER_TIMEOUT_SECONDS) as service:
        zones = {pool["pool_id"]: pool["time_zone"] for pool in service.get("/v1/pools")["pools"]}
        try:
            found = read(bars.track(lines, description="Checking"), zones)
        except HeaderError as error:
            raise Failure(Exit.REFUSED, f"nothing was changed: {error}") from None
        if found.bad:
            raise _bad_rows(found)
        if not found.counters:
            raise Failure(Exit.REFUSED, "nothing was changed: the file has no rows")
        answer: dict[str, object] = {"counters": len(found.counters)}
        if not dry_run:
            document = msgspec.json.encode(ImportRequest(found.counters, reason))
            task = bars.add_task("Sending", total=len(document))

            def sent(size: int) -> None:
                bars.advance(task, size)
                if bars.tasks[task].finished:
                    bars.update(task, description="Applying", total=None)

            answer = service.checked(service.ask("POST", "/v1/counters:import", document, progress=sent))
    if as_json:
        write_json({"ok": True, "dry_run": dry_run, **answer})
    elif dry_run:
        click.echo(f"{len(found.counters):,} counters could be defined; nothing was changed (--dry-run)")
    else:
        click.echo(
            f"{answer['counters']:,} counters defined, {answer['created']:,} of them new (plan {answer['plan_version']})"
        )


def _lines(file: BinaryIO) -> list[str]:
    content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise Failure(
            Exit.REFUSED, f"nothing was changed: the file is larger than {FILE_BYTES_MAX // 2**20} MiB: split it"
        )
    try:
        # Spreadsheets open UTF-8 files with a mark.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Failure(Exit.REFUSED, f"nothing was changed: line {line} is not UTF-8; save the file as UTF-8") from None
    # Not splitlines(): that ends lines at characters which no editor counts.
    return list(io.StringIO(text, newline=""))


def _bad_rows(found: Found) -> Failure:
    shown = found.bad[:BAD_ROWS_SHOWN_MAX]
    rows = len(found.bad) + len(found.counters)
    lines = [f"nothing was changed: {len(found.bad):,} of {rows:,} rows cannot be used"]
    lines += [f"  line {row.line}: {row.problem}" for row in shown]
    if len(shown) < len(found.bad):
        lines.append(f"  and {len(found.bad) - len(shown):,} more")
    problems = [row._asdict() for row in shown]
    return Failure(Exit.REFUSED, "\n".join(lines), rows=rows, bad_rows=len(found.bad), problems=problems)
