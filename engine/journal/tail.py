"""Reading a journal, beside its live writer or without one.

Rules:
- Nothing of a journal is written and no file is created: no -wal, no -shm, no lock that a writer would wait for longer
  than one short transaction. All connections are `mode=ro`, one SELECT each, at most `CHUNK_BYTES_MAX` of bodies.
- Rows come out verified: each against its own hash, against the row before it, and against the watermark, which is read
  before the rows are, so that rows which it promises must be there.
- Under `synchronous=FULL` other processes see a row only after its fsync. So what is read while the writer lives is durable.

How a segment is opened depends on what lies on the disk (`_How`), because `mode=ro` alone would create -wal and -shm:

| files                               | who left them so                  | opened with                        |
|-------------------------------------|-----------------------------------|------------------------------------|
| no write permission                 | sealed                            | immutable, kept                    |
| no -wal, or an empty one, no -shm   | ordered close, or restored        | immutable, for one reading         |
| -wal and -shm                       | live writer, or a killed one      | shared memory, kept                |
| -wal without -shm                   | crash and a copy without the -shm | a private copy elsewhere           |

Of a killed writer's files SQLite builds its index of the -wal anew in the -shm that is there, so its rows are seen
(tests/journal/test_tail.py holds it to that). `readonly_shm` is not used: SQLite shares one descriptor of the -shm among all
connections of a process, so a follower that becomes the writer could not write.

Not promised: that no empty -wal and -shm appear when a writer closes in the very moment between the look and the opening.
They do no harm and go with the next ordered close.
Not promised: that the rows a killed writer left are durable. They may be in the page cache only, until the next writer has
opened the journal. Not promised either: a result from a file on a network file system.
"""

import enum
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self, TypeVar

from engine.core.invariant import invariant
from engine.journal.segments import (
    CHAIN_START,
    HINT_RESTORE,
    SELECT_AFTER,
    SELECT_HOLDING,
    SELECT_LAST,
    SELECT_META,
    WATERMARK_NAME,
    ChainState,
    DamageError,
    Problem,
    SegmentMeta,
    content_fault,
    first_seq_of,
    link_fault,
    list_segments,
    meta_fault,
    meta_from_rows,
    row_from_columns,
    segment_name,
    shm_of,
    state_after,
    wal_of,
)
from engine.journal.watermark import read_watermark
from engine.ports import GENESIS, JournalError, JournalRow, Position

Result = TypeVar("Result")

CHUNK_ROWS_MAX: Final = 256
"""Rows of one transaction: a few hundred microseconds with small bodies."""

CHUNK_BYTES_MAX: Final = 4 * 2**20
"""Bodies of one transaction: some milliseconds, so that a checkpoint meets a reader rarely and never for long."""

POLL_ROWS_MAX: Final = 1024
"""Rows of one `poll`."""

BUSY_MS_MAX: Final = 200
"""How long SQLite waits for a writer that is just opening or closing the file."""

LOOKS_MAX: Final = 8
"""How often a segment is looked at again when it changed while it was being read, before that is called an error."""

LOOKS_BEFORE_COPY: Final = 4
"""After so many looks in vain at the shared memory of a writer, read a copy."""

invariant(LOOKS_BEFORE_COPY < LOOKS_MAX, "a copy is tried before giving up")

_DAMAGE_CODES: Final = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_RANGE,
    sqlite3.SQLITE_NOMEM,
}
"""Primary result codes that looking again does not change: the file says something that cannot be."""


class _How(enum.Enum):
    SEALED = "sealed"
    RESTING = "resting"
    LIVE = "live"
    ORPHANED = "orphaned"


class _Sight(NamedTuple):
    """What lies on the disk for one segment. An equal sight means that nothing was exchanged or changed in between."""

    how: _How
    main: tuple[int, ...]
    wal: tuple[int, ...]


class SegmentView:
    """A read-only look at one segment, for one thread. Opened at the first query; `close` gives everything back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._main_name = os.fspath(path)
        self._wal_name = os.fspath(wal_of(path))
        self._shm_name = os.fspath(shm_of(path))
        self._sight: _Sight | None = None
        self._connection: sqlite3.Connection | None = None
        self._copy: tempfile.TemporaryDirectory[str] | None = None

    @property
    def is_live(self) -> bool:
        """Whether the last query went through the shared memory of a writer, alive or killed."""
        return self._sight is not None and self._sight.how is _How.LIVE

    def close(self) -> None:
        """Give the connection and any private copy back. The view can be used again."""
        self._sight = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._copy is not None:
            self._copy.cleanup()
            self._copy = None

    def release(self) -> None:
        """Keep only what stays right between two readings: not the view of a file that a writer may open meanwhile."""
        if self._sight is not None and self._sight.how is _How.RESTING:
            self.close()

    def rows_after(self, seq: int, rows_max: int) -> list[tuple[object, ...]]:
        """Rows with a greater seq, oldest first, unverified. Fewer than `rows_max` also when bodies are large."""
        return self._query(SELECT_AFTER, (seq, min(rows_max, CHUNK_ROWS_MAX)), seq + 1, CHUNK_BYTES_MAX)

    def last_row(self) -> JournalRow | None:
        """The last row, matched with its own hash, or None when the segment is empty."""
        return self._one_row(self._query(SELECT_LAST, (), first_seq_of(self.path)), first_seq_of(self.path))

    def row_holding(self, seq: int) -> JournalRow | None:
        """The row with the greatest seq not above the given one, matched with its own hash."""
        return self._one_row(self._query(SELECT_HOLDING, (seq,), seq), seq)

    def meta(self) -> SegmentMeta:
        """What the segment says of itself. Raises `DamageError` when that cannot be true."""
        meta = meta_from_rows(self._query(SELECT_META, (), first_seq_of(self.path)))
        fault = meta if isinstance(meta, str) else meta_fault(self.path, meta)
        if isinstance(meta, str) or fault is not None:
            raise self.damage(first_seq_of(self.path), str(fault))
        return meta

    def damage(self, seq: int, what: str) -> DamageError:
        """An error that names this file."""
        return DamageError(Problem(str(self.path), seq, what, HINT_RESTORE))

    def _query(
        self, sql: str, parameters: tuple[int, ...], seq: int, bytes_max: int | None = None
    ) -> list[tuple[object, ...]]:
        """Rows of one SELECT, in one transaction, until their bodies pass `bytes_max`. `seq` is where damage is said to be.

        Raises `DamageError` for what SQLite cannot read, `JournalError` when a writer keeps the file locked, and
        `FileNotFoundError` when the segment is gone.
        """
        failure: sqlite3.Error | UnicodeDecodeError | None = None
        for look in range(LOOKS_MAX):
            copy = look >= LOOKS_BEFORE_COPY
            try:
                sight = self._look(copy=copy)
                rows = _select(self._opened(sight), sql, parameters, bytes_max)
                if sight.how is _How.LIVE or self._look(copy=copy) == sight:
                    return rows
                self.close()
            except (sqlite3.Error, UnicodeDecodeError) as error:
                # Not text: SQLite quotes a damaged schema in its message, which Python then fails to decode.
                failure = error
                self.close()
                if _primary_code(error) in _DAMAGE_CODES and look > 0:
                    break
        if failure is None or _primary_code(failure) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_PROTOCOL}:
            raise JournalError(
                f"{self.path}: cannot be read because it keeps changing or stays locked ({failure}). "
                "See which process writes to it besides its worker"
            )
        raise self.damage(seq, f"SQLite cannot read the file: {failure}") from failure

    def _one_row(self, rows: list[tuple[object, ...]], seq: int) -> JournalRow | None:
        if not rows:
            return None
        row = row_from_columns(rows[0])
        fault = "the row is damaged" if row is None else content_fault(row)
        if row is None or fault is not None:
            raise self.damage(seq if row is None else row.seq, str(fault))
        return row

    def _look(self, *, copy: bool) -> _Sight:
        """What lies on the disk now. With `copy` shared memory counts as gone, since it could not be used."""
        main = os.stat(self._main_name)  # noqa: PTH116 - a Path for each poll costs more than the stat
        try:
            wal = os.stat(self._wal_name)  # noqa: PTH116 - same
        except FileNotFoundError:
            wal = None
        if not main.st_mode & 0o222:
            how = _How.SEALED
        elif wal is None:
            how = _How.RESTING
        elif not copy and os.path.exists(self._shm_name):  # noqa: PTH110 - same
            # Only the identity matters: the contents are SQLite's to keep consistent.
            return _Sight(_How.LIVE, (main.st_dev, main.st_ino, main.st_mode), ())
        else:
            how = _How.ORPHANED if wal.st_size else _How.RESTING
        return _Sight(
            how,
            (main.st_dev, main.st_ino, main.st_mode, main.st_size, main.st_mtime_ns),
            () if wal is None else (wal.st_ino, wal.st_size, wal.st_mtime_ns),
        )

    def _opened(self, sight: _Sight) -> sqlite3.Connection:
        """A connection that suits what lies on the disk."""
        if self._connection is not None and sight == self._sight:
            return self._connection
        self.close()
        address = f"{self.path.absolute().as_uri()}?mode=ro"
        if sight.how is _How.ORPHANED:
            self._copy = tempfile.TemporaryDirectory(prefix="slotkeeper-read-", ignore_cleanup_errors=True)
            target = Path(self._copy.name) / self.path.name
            shutil.copyfile(self.path, target)
            shutil.copyfile(wal_of(self.path), wal_of(target))
            address = f"{target.as_uri()}?mode=rw"
        elif sight.how is not _How.LIVE:
            address += "&immutable=1"
        connection = sqlite3.connect(address, uri=True, isolation_level=None, timeout=BUSY_MS_MAX / 1000)
        self._connection = connection
        self._sight = sight
        connection.text_factory = bytes  # bodies stay octets; damaged text must reach the hash, not a decoder
        connection.execute("PRAGMA mmap_size = 0").close()
        return connection


def _select(
    connection: sqlite3.Connection, sql: str, parameters: tuple[int, ...], bytes_max: int | None
) -> list[tuple[object, ...]]:
    cursor = connection.execute(sql, parameters)
    try:
        if bytes_max is None:
            return cursor.fetchall()
        rows: list[tuple[object, ...]] = []
        size_bytes = 0
        for row in cursor:
            rows.append(row)
            body = row[-1]
            size_bytes += len(body) if isinstance(body, bytes) else 0
            if size_bytes >= bytes_max:
                break
        return rows
    finally:
        cursor.close()


def _primary_code(error: sqlite3.Error | UnicodeDecodeError) -> int:
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF


class JournalReader:
    """Verified reading of one journal, in any process, for one thread.

    Keeps at most one connection open. `with JournalReader(directory) as reader:` closes it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._view: SegmentView | None = None
        self._chain: ChainState | None = None
        """Where the last reading ended, verified: going on from there needs no lookup."""
        self._last_path: Path | None = None
        """The last segment when the directory was listed last: a live one is listed for once, not at each poll."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back. Idempotent; the reader can be used again."""
        self._chain = None
        if self._view is not None:
            self._view.close()
            self._view = None

    def rows(self, after: Position | None, *, rows_max: int) -> list[JournalRow]:
        """At most `rows_max` rows after a position (None: from the beginning), oldest first, verified.

        An empty list means that there are none now. Goes on over sealed segments into the open one.
        Raises `JournalCorruptError` where the chain is broken, a segment is missing, `after` is not in this journal, or
        the rows end below the watermark.
        """
        invariant(rows_max > 0, "a reader asks for at least one row")
        return self._looking(lambda: self._rows(GENESIS if after is None else after, rows_max))

    def poll(self, after: Position) -> list[JournalRow]:
        """What has come since: `rows`, bounded, never waiting for more. Cheapest when `after` ends the last result."""
        return self.rows(after, rows_max=POLL_ROWS_MAX)

    def follow(self, after: Position | None) -> Iterator[JournalRow]:
        """All rows there are after a position, one by one; ends where the journal ends now."""
        position = GENESIS if after is None else after
        while rows := self.rows(position, rows_max=POLL_ROWS_MAX):
            yield from rows
            position = rows[-1].end

    def row_holding(self, seq: int) -> JournalRow | None:
        """The row that holds an event, matched with its own hash; None when there is no such event yet.

        Raises `JournalCorruptError` when the event must be there and is not.
        """
        return None if seq < 1 else self._looking(lambda: self._row_holding(seq))

    def last_row(self) -> JournalRow | None:
        """The last row, matched with its own hash; None for an empty journal. Raises as `head` does."""
        return self._looking(self._last_row)

    def head(self) -> Position:
        """The end of the last row. Raises `JournalCorruptError` when that row is damaged or lies below the watermark."""
        row = self.last_row()
        return GENESIS if row is None else row.end

    def _looking(self, look: Callable[[], Result]) -> Result:
        """Look again, from the start, when a file went away between listing and opening it."""
        try:
            try:
                return look()
            except FileNotFoundError:
                self.close()
                return look()
        except FileNotFoundError as error:
            self.close()
            raise JournalError(f"{self.directory}: files go away while they are read: {error}") from error
        except JournalError:
            self.close()
            raise
        finally:
            if self._view is not None:
                self._view.release()

    def _row_holding(self, seq: int) -> JournalRow | None:
        segments = list_segments(self.directory)
        holding = [path for path in segments if first_seq_of(path) <= seq]
        if not holding:
            if segments:
                raise self._gap(1, first_seq_of(segments[0]) - 1)
            return None
        row = self._query_once(holding[-1], lambda view: view.row_holding(seq))
        if row is not None and row.end.seq >= seq:
            return row
        if holding[-1] != segments[-1]:
            raise self._gap(seq, first_seq_of(segments[len(holding)]) - 1)
        return None

    def _last_row(self) -> JournalRow | None:
        promised = self._promised()
        segments = list_segments(self.directory)
        row = None
        if segments:
            meta, row = self._query_once(segments[-1], lambda view: (view.meta(), view.last_row()))
            if row is None and meta.first_seq > 1:
                row = self._row_holding(meta.first_seq - 1)
                if row is None or row.end != (meta.first_seq - 1, meta.prev_hash):
                    raise SegmentView(segments[-1]).damage(
                        meta.first_seq, "the segment does not continue the segment before it"
                    )
        end = GENESIS if row is None else row.end
        self._check_reach(end, promised)
        if GENESIS.seq < promised.seq < end.seq:
            known = self._row_holding(promised.seq)
            self._check_reach(GENESIS if known is None else known.end, promised)
        return row

    def _query_once(self, path: Path, question: Callable[[SegmentView], Result]) -> Result:
        view = SegmentView(path)
        try:
            return question(view)
        finally:
            view.close()

    def _rows(self, after: Position, rows_max: int) -> list[JournalRow]:
        promised = self._promised()
        chain = self._chain_at(after)
        view = self._view
        if chain is None or view is None:
            self._check_reach(GENESIS, promised)
            return []
        rows: list[JournalRow] = []
        while len(rows) < rows_max:
            chunk = view.rows_after(chain.end.seq, rows_max - len(rows))
            if not chunk:
                following = self._following(view, chain, promised)
                if following is None:
                    break
                view = following
                continue
            for columns in chunk:
                row = row_from_columns(columns)
                if row is None:
                    raise view.damage(chain.end.seq + 1, "the row is damaged")
                fault = link_fault(chain, row) or content_fault(row)
                if fault is not None:
                    raise view.damage(chain.end.seq + 1, fault)
                chain = state_after(row)
                if chain.end.seq == promised.seq and chain.end.hash != promised.hash:
                    raise view.damage(row.seq, "the watermark knows another row here: this is another history")
                rows.append(row)
        self._chain = chain
        return rows

    def _chain_at(self, after: Position) -> ChainState | None:
        """Stand at a position, which must be in this journal. None when there is no journal yet."""
        if self._chain is not None and self._chain.end == after:
            return self._chain
        self.close()
        segments = list_segments(self.directory)
        if not segments:
            if after != GENESIS:
                raise self._foreign(after, "there are no segments")
            return None
        if after == GENESIS:
            if first_seq_of(segments[0]) != 1:
                raise self._gap(1, first_seq_of(segments[0]) - 1)
            path, chain = segments[0], CHAIN_START
        else:
            row = self._row_holding(after.seq)
            if row is None:
                raise self._foreign(after, f"the journal ends before event {after.seq}")
            if row.end.seq != after.seq:
                raise self._foreign(after, f"event {after.seq} is in the middle of a row")
            if row.end.hash != after.hash:
                raise self._foreign(after, "that event is there with another hash: this is another history")
            path = [path for path in segments if first_seq_of(path) <= after.seq][-1]
            chain = state_after(row)
        meta = self._query_once(path, SegmentView.meta)
        if after == GENESIS and meta.prev_hash != GENESIS.hash:
            raise SegmentView(path).damage(1, "the first segment does not begin where a journal begins")
        self._view = SegmentView(path)
        self._chain = chain
        return chain

    def _following(self, view: SegmentView, chain: ChainState, promised: Position) -> SegmentView | None:
        """The view that goes on where this one is exhausted; None at the journal's end."""
        path = self.directory / segment_name(chain.end.seq + 1)
        if path != view.path and path.exists():
            meta = self._query_once(path, SegmentView.meta)
            if meta.prev_hash != chain.end.hash:
                raise SegmentView(path).damage(
                    meta.first_seq, "the segment does not continue the segment before it: it is of another history"
                )
            view.close()
            self._view = SegmentView(path)
            return self._view
        if view.is_live and chain.end.seq >= promised.seq and view.path == self._last_path:
            return None  # the usual case of a poll with nothing new: no listing
        segments = list_segments(self.directory)
        self._last_path = segments[-1]
        if segments[-1] != view.path:
            if view.rows_after(chain.end.seq, 1):
                return view  # its writer filled and sealed it since it was found exhausted
            following = segments[segments.index(view.path) + 1]
            if first_seq_of(following) > chain.end.seq + 1:
                raise self._gap(chain.end.seq + 1, first_seq_of(following) - 1)
            raise SegmentView(following).damage(
                first_seq_of(following),
                f"the segment begins at event {first_seq_of(following)}, which {view.path.name} already holds: two "
                "histories were mixed in one directory",
            )
        self._check_reach(chain.end, promised)
        return None

    def _promised(self) -> Position:
        """Up to where rows must be there."""
        watermark = read_watermark(self.directory)
        if watermark is not None:
            return watermark.position
        if list_segments(self.directory):
            raise self._no_watermark()
        return GENESIS

    def _check_reach(self, end: Position, promised: Position) -> None:
        if end.seq < promised.seq:
            raise self._missing(end.seq + 1, promised.seq)
        if end.seq == promised.seq and end.hash != promised.hash:
            raise self._foreign(promised, f"the watermark knows event {promised.seq} with another hash")

    def _no_watermark(self) -> DamageError:
        return DamageError(
            Problem(
                str(self.directory / WATERMARK_NAME),
                0,
                "the watermark is missing, so nothing proves that the end of the journal is there",
                HINT_RESTORE,
            )
        )

    def _gap(self, first: int, last: int) -> DamageError:
        """A segment between others, or the first, is not there."""
        return DamageError(
            Problem(
                str(self.directory / segment_name(first)),
                first,
                f"events {first} to {last} are missing: no segment holds them",
                HINT_RESTORE,
            )
        )

    def _missing(self, first: int, last: int) -> DamageError:
        """The end of the journal is not there: name the file in which it should be."""
        segments = list_segments(self.directory)
        path = segments[-1] if segments else self.directory / segment_name(first)
        return DamageError(
            Problem(
                str(path),
                first,
                f"events {first} to {last} are missing: the watermark says that they were durable",
                HINT_RESTORE,
            )
        )

    def _foreign(self, position: Position, what: str) -> DamageError:
        return DamageError(
            Problem(
                str(self.directory),
                position.seq,
                f"the position {position.seq} with hash {position.hash.hex()} is not in this journal: {what}",
                "It was taken from another history, or from a longer one whose end is lost. " + HINT_RESTORE,
            )
        )
