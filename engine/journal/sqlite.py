"""The append side of a journal, on SQLite: one writer, one connection, one row for each group commit.

Rules:
- An append is one autocommit INSERT in the connection's thread: one hop, one fsync, then the reply.
- WAL with `synchronous=FULL`, set and read back. No automatic checkpoints: they would stall a commit. `maintain` runs a
  PASSIVE one on this same connection every `checkpoint_bytes`; no other connection ever checkpoints (SQLite up to 3.51.2
  can corrupt a file when two do).
- `open_journal` verifies before it touches: a journal that ends below its watermark is left exactly as it is, because
  SQLite's recovery and the next append would overwrite what might still be saved.
- What `open_journal` returns is durable. The rows of a killed writer may be in the page cache only; they are synced and
  folded into the main file before anyone can act on them.
- After a failed commit the outcome is unknown. The object refuses everything from then on and never closes SQLite (closing
  writes). The process must be killed.
- Who calls `maintain` does not matter for the watermark: a thread of its own keeps that at most 100 ms old, idle or not.

Sealing, each step durable before the next (`_SEALING`), each cut recoverable by `open_journal`:
    1 mark the segment sealed and fold its -wal in, taking the mark back when a reader is in the way: then later
    2 close it; 3 fsync, take write permission away, drop the empty -wal and -shm
    4 make the next segment, which carries the last hash; 5 open it

Not promised: retries. `maintain` puts a busy checkpoint or sealing off to a later call (see `statistics`); every other error
ends the writer.
"""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Self

import trio

from engine.core.invariant import invariant
from engine.journal.segments import (
    HINT_RESTORE,
    INSERT,
    LOCK_NAME,
    SELECT_LAST,
    SELECT_SEALED,
    UPDATE_SEALED,
    ChainState,
    DamageError,
    Problem,
    content_fault,
    continue_chain,
    create_segment,
    first_seq_of,
    list_segments,
    make_row,
    remove_unfinished,
    row_from_columns,
    shm_of,
    sync_directory,
    sync_file,
    wal_of,
)
from engine.journal.tail import JournalReader
from engine.journal.trio_sqlite import TrioConnection, connect
from engine.journal.watermark import WatermarkWriter, create_watermark, read_watermark
from engine.ports import (
    GENESIS,
    Journal,
    JournalError,
    JournalLockedError,
    JournalRow,
    JournalWriteError,
    Position,
)

SEGMENT_BYTES_MAX: Final = 128 * 2**20
"""Size at which a segment is sealed: some seconds of full load, some days of a quiet shop; a backup copies it at once."""

CHECKPOINT_BYTES: Final = 4 * 2**20
"""Size of the -wal at which `maintain` checkpoints. 77 MB took 48 ms, so this takes about 3."""

BODY_BYTES_MAX: Final = 64 * 2**20
"""Bound of one row, far above any group commit, far below SQLite's own of 10^9."""

PAGE_BYTES: Final = 4096
"""SQLite's page, one 4 KiB sector of the disk."""

WAL_PAGES_PER_ROW: Final = 2
"""Pages of the -wal that a commit writes besides those its body fills: the leaf, and the remainder of the body."""

BUSY_MS_MAX: Final = 1000
"""How long a commit waits for SQLite's write lock. A reader that meets a half-written header of the -shm takes that lock
for some microseconds; whoever keeps it for a second is another writer, which is fatal."""

invariant(CHECKPOINT_BYTES < SEGMENT_BYTES_MAX, "a segment is checkpointed before it is sealed")
invariant(BODY_BYTES_MAX < SEGMENT_BYTES_MAX, "one row does not fill a segment twice")


@dataclass(frozen=True, slots=True)
class JournalStatistics:
    """What a `SqliteJournal` is doing."""

    sqlite_version: str
    """Version of the SQLite library in this process."""
    segment: str
    """File name of the open segment."""
    segment_bytes: int
    """Estimated size of the open segment, its -wal included."""
    wal_bytes: int
    """Estimated bytes appended to the -wal since the last complete checkpoint."""
    rows_appended: int
    """Rows made durable by this object."""
    checkpoints: int
    """Checkpoints that folded everything in."""
    checkpoints_partial: int
    """Checkpoints which a reader kept from finishing. Growing all the time: some process holds a transaction open."""
    seals: int
    """Segments sealed by this object."""
    seals_postponed: int
    """Sealings put off because a reader was in the way."""


class _DirectoryLock:
    """The exclusive flock of a journal, held until `release` or the end of the process."""

    def __init__(self, directory: Path) -> None:
        path = directory / LOCK_NAME
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise JournalLockedError(
                f"{path}: another process (pid {holder}) holds this journal open for writing. Stop it, or use another "
                "data directory: two writers never share one"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._fd)


class SqliteJournal(Journal):
    """The one writer of a journal directory. Made by `open_journal`."""

    def __init__(
        self,
        directory: Path,
        lock: _DirectoryLock,
        chain: ChainState,
        *,
        segment_bytes_max: int,
        checkpoint_bytes: int,
    ) -> None:
        """Private to `open_journal`, which gives the connection and the watermark afterwards."""
        self._directory = directory
        self._lock = lock
        self._chain = chain
        self._segment_bytes_max = segment_bytes_max
        self._checkpoint_bytes = checkpoint_bytes
        self._path = directory
        self._connection: TrioConnection | None = None
        self._watermark: WatermarkWriter | None = None
        self._busy = False
        self._refusal: str | None = None
        self._closed = False
        self._segment_bytes = 0
        self._wal_bytes = 0
        self._seal_at_bytes = segment_bytes_max
        self._checkpoint_at_bytes = checkpoint_bytes
        self._rows_appended = 0
        self._checkpoints = 0
        self._checkpoints_partial = 0
        self._seals = 0
        self._seals_postponed = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        if self._refusal is None:
            await self.close()

    @property
    def head(self) -> Position:
        return self._chain.end

    @property
    def epoch(self) -> int:
        return self._chain.epoch

    @property
    def restart(self) -> int:
        return self._chain.restart

    def statistics(self) -> JournalStatistics:
        return JournalStatistics(
            sqlite_version=sqlite3.sqlite_version,
            segment=self._path.name,
            segment_bytes=self._segment_bytes,
            wal_bytes=self._wal_bytes,
            rows_appended=self._rows_appended,
            checkpoints=self._checkpoints,
            checkpoints_partial=self._checkpoints_partial,
            seals=self._seals,
            seals_postponed=self._seals_postponed,
        )

    async def append(self, *, count: int, at_ms: int, schema: int, body: bytes) -> JournalRow:
        """Make one row durable and return it. See `engine.ports.Journal`."""
        invariant(count > 0, "a row holds at least one event")
        invariant(at_ms >= self._chain.at_ms, "time of the rows of a journal never goes back")
        invariant(len(body) <= BODY_BYTES_MAX, "a body is at most BODY_BYTES_MAX")
        with trio.CancelScope(shield=True):
            connection, watermark = self._begin()
            try:
                row = make_row(self._chain, count=count, at_ms=at_ms, schema=schema, body=body)
                await connection.run(partial(_insert, row, body.decode()))
            except (sqlite3.Error, OSError) as error:
                raise self._fail("the commit of a row", error) from error
            finally:
                self._busy = False
            self._chain = ChainState(row.end, row.epoch, row.restart, row.at_ms)
            watermark.note(row.end)
        self._rows_appended += 1
        self._segment_bytes += len(body)
        self._wal_bytes += len(body) + WAL_PAGES_PER_ROW * PAGE_BYTES
        return row

    def read(self, after: Position) -> Iterator[JournalRow]:
        """The rows after a position, verified to the watermark. See `engine.ports.Journal`."""
        self._refuse()
        with JournalReader(self._directory) as reader:
            yield from reader.follow(after)

    async def maintain(self) -> None:
        """Checkpoint or seal when it is due; a comparison of numbers when it is not."""
        self._refuse()
        # A segment without rows is never sealed: the next one would have its name.
        if self._segment_bytes >= self._seal_at_bytes and self._chain.end.seq >= first_seq_of(self._path):
            await self._guarded("the sealing of a segment", self._seal)
        elif self._wal_bytes >= self._checkpoint_at_bytes:
            await self._guarded("a checkpoint", self._checkpoint)

    async def close(self) -> None:
        """Close in order. See `engine.ports.Journal`.

        Order: fold the -wal in, close SQLite, write the watermark to both slots, release the lock last, so that a next
        writer finds everything finished.
        """
        if self._closed:
            return
        await self._guarded("the ordered close", self._close_in_order)

    def _refuse(self) -> None:
        if self._refusal is not None:
            raise JournalWriteError(self._refusal)
        if self._closed:
            raise JournalError(f"{self._directory}: this journal was closed; open it again to use it")
        if self._watermark is not None and self._watermark.failure is not None:
            raise self._fail("the writing of the watermark", self._watermark.failure)

    def _begin(self) -> tuple[TrioConnection, WatermarkWriter]:
        """Enter the one call that may be under way."""
        self._refuse()
        invariant(not self._busy, "one call at a time: append, maintain and close do not overlap")
        connection, watermark = self._connection, self._watermark
        if connection is None or watermark is None:
            raise JournalError(f"{self._directory}: this journal is not open")
        self._busy = True
        return connection, watermark

    def _fail(self, what: str, error: Exception) -> JournalWriteError:
        """Refuse everything from now on. Closes nothing."""
        self._refusal = (
            f"{self._path}: {what} failed: {error}. Whether it is on the disk is unknown. End this process at once (kill), "
            "look at the disk (`dmesg`, free space), then start again: replay tells what was written"
        )
        if self._connection is not None:
            self._connection.abandon()
        if self._watermark is not None:
            self._watermark.abandon()
        return JournalWriteError(self._refusal)

    async def _guarded(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do upkeep as `append` does its commit: not cancellable, every error final."""
        with trio.CancelScope(shield=True):
            self._begin()
            try:
                await work()
            except (sqlite3.Error, OSError) as error:
                raise self._fail(what, error) from error
            finally:
                self._busy = False

    async def _checkpoint(self) -> None:
        if await self._connected().run(partial(_fold_in, mode="PASSIVE")):
            self._checkpoints += 1
            self._wal_bytes = 0
            self._checkpoint_at_bytes = self._checkpoint_bytes
            self._segment_bytes = os.stat(self._path).st_size  # noqa: PTH116 - never opened by hand, see segments.py
        else:
            # Tried again after as many bytes more: a reader in the way must not make every pause between commits long.
            self._checkpoints_partial += 1
            self._checkpoint_at_bytes = self._wal_bytes + self._checkpoint_bytes

    async def _seal(self) -> None:
        for step in self._SEALING:
            if not await step(self):
                self._seals_postponed += 1
                self._seal_at_bytes = self._segment_bytes + self._checkpoint_bytes
                return
        self._seals += 1

    async def _seal_mark(self) -> bool:
        return await self._connected().run(_mark_sealed)

    async def _seal_close(self) -> bool:
        await self._connected().close()
        self._connection = None
        return True

    async def _seal_finish(self) -> bool:
        await trio.to_thread.run_sync(_make_read_only, self._path)
        return True

    async def _seal_create_next(self) -> bool:
        self._path = await trio.to_thread.run_sync(create_segment, self._directory, self._chain.end)
        return True

    async def _seal_open_next(self) -> bool:
        await self._open_segment(self._path)
        return True

    _SEALING: Final = (_seal_mark, _seal_close, _seal_finish, _seal_create_next, _seal_open_next)

    async def _open_segment(self, path: Path) -> None:
        self._path = path
        self._connection = await connect(partial(_connect_segment, path))
        self._segment_bytes = os.stat(path).st_size  # noqa: PTH116 - never opened by hand, see segments.py
        self._wal_bytes = 0
        self._seal_at_bytes = self._segment_bytes_max
        self._checkpoint_at_bytes = self._checkpoint_bytes

    async def _open_at(self, path: Path, last: JournalRow | None) -> None:
        """Open the last segment found, make its rows durable, and finish a sealing that was cut short."""
        if not os.stat(path).st_mode & 0o222:  # noqa: PTH116 - never opened by hand, see segments.py
            self._path = path
            cut_after = self._SEALING.index(SqliteJournal._seal_close)
        else:
            await self._open_segment(path)
            row = await self._connected().run(partial(_make_durable, path, last))
            if row is not None:
                # The same row as seen read-only, or a later one that no reader could see yet.
                self._chain = self._chain._replace(end=row.end, at_ms=row.at_ms)
            marked = await self._connected().run(_is_marked_sealed)
            if not marked or not await self._seal_mark():
                return
            cut_after = self._SEALING.index(SqliteJournal._seal_mark)
        for step in self._SEALING[cut_after + 1 :]:
            await step(self)

    async def _close_in_order(self) -> None:
        connection = self._connected()
        await connection.run(partial(_fold_in, mode="TRUNCATE"))
        await connection.close()
        if self._watermark is not None:
            await trio.to_thread.run_sync(self._watermark.close)
        self._closed = True
        self._lock.release()

    def _connected(self) -> TrioConnection:
        if self._connection is None:
            raise JournalError(f"{self._directory}: this journal is not open")
        return self._connection


async def open_journal(
    directory: Path,
    *,
    epoch: int,
    restart: int | None = None,
    segment_bytes_max: int = SEGMENT_BYTES_MAX,
    checkpoint_bytes: int = CHECKPOINT_BYTES,
) -> SqliteJournal:
    """Open a journal for writing; make it when the directory has none.

    `restart` None means: one more than the last row's when that has the same epoch, else 0. What the journal holds is
    durable on return, and reaches the watermark; its chain is verified by `read`.
    Raises `JournalLockedError`, `JournalCorruptError` (nothing was changed), `JournalError` for an epoch or restart that goes
    back, and `JournalWriteError` when the disk fails: then this process has to end, it keeps the lock until then.
    """
    invariant(checkpoint_bytes > 0 and segment_bytes_max > 0, "sizes are positive")
    with trio.CancelScope(shield=True):
        try:
            lock = await trio.to_thread.run_sync(_lock_directory, directory)
            try:
                last = await trio.to_thread.run_sync(_prepare, directory)
                chain = continue_chain(str(directory), last, epoch, restart)
            except BaseException:
                lock.release()
                raise
        except (sqlite3.Error, OSError) as error:
            raise JournalWriteError(
                f"{directory}: cannot be opened for writing: {error}. Look at the disk (`dmesg`, free space) and at the "
                "owner of the directory"
            ) from error
        journal = SqliteJournal(
            directory, lock, chain, segment_bytes_max=segment_bytes_max, checkpoint_bytes=checkpoint_bytes
        )
        try:
            await journal._open_at(list_segments(directory)[-1], last)  # noqa: SLF001 - this is its constructor
            journal._watermark = await trio.to_thread.run_sync(  # noqa: SLF001 - this is its constructor
                WatermarkWriter, directory, journal.head
            )
        except (sqlite3.Error, OSError) as error:
            raise journal._fail("the opening", error) from error  # noqa: SLF001 - this is its constructor
        except JournalError as error:
            journal._fail("the opening", error)  # noqa: SLF001 - SQLite's close would fold a damaged -wal in
            raise
    return journal


def _lock_directory(directory: Path) -> _DirectoryLock:
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        sync_directory(directory.absolute().parent)
    return _DirectoryLock(directory)


def _prepare(directory: Path) -> JournalRow | None:
    """The last row, verified to reach the watermark without touching a file; then make what a new journal lacks.

    Order for a new journal: the watermark, then the first segment. A segment without a watermark is always damage.
    """
    with JournalReader(directory) as reader:
        last = reader.last_row()
    remove_unfinished(directory)
    if read_watermark(directory) is None:
        create_watermark(directory)
    if not list_segments(directory):
        create_segment(directory, GENESIS)
    return last


_PRAGMAS: Final = (
    ("journal_mode", "WAL", b"wal"),
    ("synchronous", "FULL", 2),
    ("wal_autocheckpoint", "0", 0),
)
"""Name, value to set, value that must be read back."""


def _connect_segment(path: Path) -> sqlite3.Connection:
    """Open a segment for writing. Runs in the connection's thread."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        isolation_level=None,
        timeout=BUSY_MS_MAX / 1000,
    )
    connection.text_factory = bytes
    # Not read back: a build without memory mapping answers with no row, which is what is wanted.
    connection.execute("PRAGMA mmap_size = 0").close()
    for name, value, expected in _PRAGMAS:
        connection.execute(f"PRAGMA {name} = {value}").close()
        found = connection.execute(f"PRAGMA {name}").fetchall()
        if found != [(expected,)]:
            raise sqlite3.OperationalError(f"SQLite did not accept {name} = {value}, it says {found}")
    return connection


def _make_durable(path: Path, last: JournalRow | None, connection: sqlite3.Connection) -> JournalRow | None:
    """Make durable what a killed writer left, and return the last row of this segment, if any.

    The rows seen may be in the page cache only, even after an fsync that failed. Folding them into the main file writes
    them anew. A reader may keep that from finishing, so the -wal is synced by itself first.
    """
    found = connection.execute(SELECT_LAST).fetchall()
    row = row_from_columns(found[0]) if found else None
    ends_at = row.end.seq if row is not None else first_seq_of(path) - 1
    if (found and (row is None or content_fault(row) is not None)) or (last is not None and ends_at < last.end.seq):
        raise DamageError(
            Problem(str(path), ends_at, "rows read before the file was opened for writing are gone", HINT_RESTORE)
        )
    with contextlib.suppress(FileNotFoundError):
        sync_file(wal_of(path))  # SQLite holds no fcntl lock on a -wal, so this descriptor takes none away
    _fold_in(connection, mode="TRUNCATE")
    return row


def _insert(row: JournalRow, body: str, connection: sqlite3.Connection) -> None:
    columns = (row.seq, row.count, row.epoch, row.restart, row.at_ms, row.schema, row.prev_hash, row.hash, body)
    connection.execute(INSERT, columns).close()


def _fold_in(connection: sqlite3.Connection, *, mode: str) -> bool:
    """Checkpoint. False when a reader kept it from finishing, which is not waited for: commits wait behind this."""
    connection.execute("PRAGMA busy_timeout = 0").close()
    [(busy, frames, frames_done)] = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
    connection.execute(f"PRAGMA busy_timeout = {BUSY_MS_MAX}").close()
    return bool(busy == 0 and frames == frames_done)


def _mark_sealed(connection: sqlite3.Connection) -> bool:
    """Mark a segment sealed and fold everything into its main file, or leave it unmarked and say False."""
    connection.execute(UPDATE_SEALED, (1,)).close()
    if _fold_in(connection, mode="TRUNCATE"):
        return True
    connection.execute(UPDATE_SEALED, (0,)).close()
    return False


def _is_marked_sealed(connection: sqlite3.Connection) -> bool:
    return connection.execute(SELECT_SEALED).fetchall() == [(1,)]


def _make_read_only(path: Path) -> None:
    """Make a closed segment durable and read-only, then drop the empty files that a reader kept SQLite from removing.

    Write permission goes first: readers that see none read the main file alone and never miss the others. A -wal that is
    not empty stays where it is.
    """
    sync_file(path, read_only=True)
    with contextlib.suppress(FileNotFoundError):
        if wal_of(path).stat().st_size == 0:
            wal_of(path).unlink()
            shm_of(path).unlink()
    sync_directory(path.parent)
