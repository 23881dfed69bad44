"""Segments: the files of a journal, their names, their tables, and the rule by which rows form a chain.

A journal is a directory:

    0000000000000000001.sqlite    a segment, named by the number of its first event; read-only once sealed
    0000000000000052144.sqlite    the open segment, with -wal and -shm while a writer has it open
    watermark                     how far the journal had got (see watermark.py)
    lock                          held by the one writer

Rules:
- Only a complete segment gets its name: it is made as NAME.new, made durable, then renamed. A left-over .new is no part
  of the journal.
- `prev_hash` of a row is `hash` of the row before it, and `hash` covers every other column (`row_hash`). A segment's meta
  table repeats the hash with which it goes on, so a segment of another history cannot slip in.
- No segment file is opened by hand while this process has it open through SQLite: closing any descriptor of a file drops
  all fcntl locks which the process holds on it, SQLite's among them.

Not promised: protection against someone who rewrites the rows on purpose. The hash has no key.
"""

import hashlib
import os
import sqlite3
import stat
import struct
from pathlib import Path
from typing import Any, Final, NamedTuple

from engine.core.invariant import invariant
from engine.ports import GENESIS, GENESIS_HASH, JournalCorruptError, JournalError, JournalRow, Position

FORMAT: Final = 1
"""Version of the tables below. A reader refuses any other."""

APPLICATION_ID: Final = 0x534C4B4A
"""`SLKJ` in the header of each segment, so that `file` and a person can tell what it is."""

HASH_BYTES: Final = 16
"""128 bits: against accidents, of which 2^64 rows would be needed for one to pass."""

SEQ_DIGITS: Final = 19
"""Every seq that SQLite can hold fits, so names sort like numbers."""

SEGMENT_SUFFIX: Final = ".sqlite"
UNFINISHED_SUFFIX: Final = ".new"
LOCK_NAME: Final = "lock"
WATERMARK_NAME: Final = "watermark"

invariant(len(GENESIS_HASH) == HASH_BYTES, "the genesis hash has the size of a hash")
invariant(len(str(2**63 - 1)) == SEQ_DIGITS, "every seq fits a segment's name")

HINT_RESTORE: Final = (
    "Nothing was changed. Keep a copy of the directory, run `slotkeeper verify` to see all damage, then restore this "
    "journal from a backup or clone it from an in-sync standby"
)

COLUMNS: Final = "seq, count, epoch, restart, at_ms, schema, prev_hash, hash, body"

COLUMN_COUNT: Final = len(COLUMNS.split(", "))

INSERT: Final = f"INSERT INTO batch ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - fixed text
SELECT_AFTER: Final = f"SELECT {COLUMNS} FROM batch WHERE seq > ? ORDER BY seq LIMIT ?"  # noqa: S608 - fixed text
SELECT_HOLDING: Final = f"SELECT {COLUMNS} FROM batch WHERE seq <= ? ORDER BY seq DESC LIMIT 1"  # noqa: S608 - fixed text
SELECT_LAST: Final = f"SELECT {COLUMNS} FROM batch ORDER BY seq DESC LIMIT 1"  # noqa: S608 - fixed text
SELECT_META: Final = "SELECT name, value FROM meta"
SELECT_SEALED: Final = "SELECT value FROM meta WHERE name = 'sealed'"
UPDATE_SEALED: Final = "UPDATE meta SET value = ? WHERE name = 'sealed'"

# STRICT keeps a hand with the sqlite3 shell from storing a number as text. The view is for that hand, nothing here reads it.
_SCHEMA: Final = """
PRAGMA page_size = 4096;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
BEGIN;
CREATE TABLE meta (name TEXT PRIMARY KEY, value ANY NOT NULL) STRICT;
CREATE TABLE batch (
  seq INTEGER PRIMARY KEY,
  count INTEGER NOT NULL,
  epoch INTEGER NOT NULL,
  restart INTEGER NOT NULL,
  at_ms INTEGER NOT NULL,
  schema INTEGER NOT NULL,
  prev_hash BLOB NOT NULL,
  hash BLOB NOT NULL,
  body TEXT NOT NULL
) STRICT;
CREATE VIEW event (seq, at, name, body) AS
  SELECT batch.seq + item.key,
         strftime('%Y-%m-%dT%H:%M:%fZ', batch.at_ms / 1000.0, 'unixepoch'),
         json_extract(item.value, '$[0]'),
         item.value
  FROM batch, json_each(batch.body) AS item;
"""


class Problem(NamedTuple):
    """One thing that is wrong with a journal."""

    file: str
    """Path of the file that is damaged or missing."""
    seq: int
    """Number of the first event that is concerned."""
    what: str
    hint: str

    def __str__(self) -> str:
        return f"{self.file}: at event {self.seq}: {self.what}. {self.hint}."


class DamageError(JournalCorruptError):
    """A `JournalCorruptError` that carries its problem as data."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class SegmentMeta(NamedTuple):
    """What a segment says of itself."""

    shard: str
    """Name of the directory in which the journal was made."""
    first_seq: int
    prev_hash: bytes
    sealed: bool
    """Set when the segment was closed for good. Taken back while no next segment exists and a reader is in the way."""


class ChainState(NamedTuple):
    """What the next row has to fit to."""

    end: Position
    epoch: int
    restart: int
    at_ms: int


CHAIN_START: Final = ChainState(GENESIS, 0, 0, 0)


def row_hash(
    prev_hash: bytes, seq: int, count: int, epoch: int, restart: int, at_ms: int, schema: int, body: bytes
) -> bytes:
    """The chain hash of a row: BLAKE2b of everything in it but the hash itself.

    Unambiguous: six numbers of fixed width and a hash of fixed width come first, so the body is what is left. `person`
    keeps these hashes apart from any other use of BLAKE2b. Raises `struct.error` when a value has the wrong type or size.
    """
    head = struct.pack(">16s6q", prev_hash, seq, count, epoch, restart, at_ms, schema)
    digest = hashlib.blake2b(head, digest_size=HASH_BYTES, person=b"slotkeeper-row-1")
    digest.update(body)
    return digest.digest()


def make_row(before: ChainState, *, count: int, at_ms: int, schema: int, body: bytes) -> JournalRow:
    """The row that follows `before`. Epoch and restart are those of `before`."""
    seq, prev_hash = before.end.seq + 1, before.end.hash
    row_digest = row_hash(prev_hash, seq, count, before.epoch, before.restart, at_ms, schema, body)
    return JournalRow(seq, count, before.epoch, before.restart, at_ms, schema, prev_hash, row_digest, body)


def row_from_columns(columns: tuple[Any, ...]) -> JournalRow | None:
    """A row as SQLite returned it, or None when damage has changed the type of a column."""
    if len(columns) != COLUMN_COUNT:
        return None
    for number in columns[:6]:
        if type(number) is not int:
            return None
    for octets in columns[6:]:
        if type(octets) is not bytes:
            return None
    row = JournalRow(*columns)
    if len(row.prev_hash) != HASH_BYTES or len(row.hash) != HASH_BYTES or row.count < 1:
        return None
    return row


def state_after(row: JournalRow) -> ChainState:
    return ChainState(row.end, row.epoch, row.restart, row.at_ms)


def continue_chain(name: str, last: JournalRow | None, epoch: int, restart: int | None) -> ChainState:
    """Where a writer of the given epoch goes on after the last row.

    `restart` None means one more than the last row's when that has the same epoch, else 0. Raises `JournalError` when epoch
    and restart would go back; `name` says of which journal.
    """
    if last is None:
        return ChainState(GENESIS, epoch, restart or 0, 0)
    if restart is None:
        restart = last.restart + 1 if last.epoch == epoch else 0
    if (epoch, restart) < (last.epoch, last.restart):
        raise JournalError(
            f"{name}: asked to write in epoch {epoch}, restart {restart}, but the journal was already written in epoch "
            f"{last.epoch}, restart {last.restart}. Who says which epoch it is has gone back: a restored backup?"
        )
    return ChainState(last.end, epoch, restart, last.at_ms)


def content_fault(row: JournalRow) -> str | None:
    """What is wrong with a row taken alone, or None."""
    expected = row_hash(row.prev_hash, row.seq, row.count, row.epoch, row.restart, row.at_ms, row.schema, row.body)
    if expected != row.hash:
        return "the row does not match its hash: it was altered after it was written"
    return None


def link_fault(before: ChainState, row: JournalRow) -> str | None:
    """Why a row cannot follow what came before it, or None."""
    expected_seq = before.end.seq + 1
    if row.seq > expected_seq:
        return f"events {expected_seq} to {row.seq - 1} are missing"
    if row.seq < expected_seq:
        return f"the row begins at event {row.seq}, which an earlier row already holds"
    if row.prev_hash != before.end.hash:
        return "the row does not continue the row before it: it belongs to another history"
    if (row.epoch, row.restart) < (before.epoch, before.restart):
        return (
            f"epoch and restart go back from ({before.epoch}, {before.restart}) to ({row.epoch}, {row.restart}): "
            "an older writer wrote after a newer one"
        )
    if row.at_ms < before.at_ms:
        return f"time goes back from {before.at_ms} to {row.at_ms} ms"
    return None


def segment_name(first_seq: int) -> str:
    return f"{first_seq:0{SEQ_DIGITS}}{SEGMENT_SUFFIX}"


def first_seq_of(path: Path) -> int:
    """The number of a segment's first event, from its name."""
    return int(path.name[:SEQ_DIGITS])


def list_segments(directory: Path) -> list[Path]:
    """The segments of a journal, oldest first. Empty when there is no journal."""
    try:
        names = [path.name for path in directory.iterdir()]
    except FileNotFoundError:
        return []
    return [directory / name for name in sorted(names) if _is_segment_name(name)]


def _is_segment_name(name: str) -> bool:
    stem = name.removesuffix(SEGMENT_SUFFIX)
    return stem != name and len(stem) == SEQ_DIGITS and stem.isascii() and stem.isdigit()


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def shm_of(path: Path) -> Path:
    return path.with_name(path.name + "-shm")


def meta_from_rows(rows: list[tuple[object, ...]]) -> SegmentMeta | str:
    """The meta table as read with `text_factory = bytes`, or what is wrong with it."""
    values: dict[object, object] = {row[0]: row[1] for row in rows if len(row) == 2}
    version, shard, first_seq = values.get(b"format"), values.get(b"shard"), values.get(b"first_seq")
    prev_hash, sealed = values.get(b"prev_hash"), values.get(b"sealed")
    if version != FORMAT:
        return f"the segment says format {version!r}, this program reads format {FORMAT}"
    if not isinstance(shard, bytes) or type(first_seq) is not int or sealed not in (0, 1):
        return "the meta table is damaged"
    if not isinstance(prev_hash, bytes) or len(prev_hash) != HASH_BYTES:
        return "the meta table is damaged"
    return SegmentMeta(shard.decode(errors="replace"), first_seq, prev_hash, sealed == 1)


def meta_fault(path: Path, meta: SegmentMeta) -> str | None:
    """Why a segment cannot be part of the journal in which it lies, or None."""
    if meta.first_seq != first_seq_of(path):
        return f"the file is named for event {first_seq_of(path)} but was made for event {meta.first_seq}"
    if meta.shard != path.absolute().parent.name:
        return f"the file belongs to {meta.shard!r} and lies in {path.absolute().parent.name!r}"
    return None


def sync_file(path: Path, *, read_only: bool = False) -> None:
    """Make a file durable; `read_only` then takes its write permission away, durably too.

    Never for a segment which this process has open: see the rules above.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        if read_only:
            os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & ~0o222)
            os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """Make names durable: files made, renamed or removed in a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def create_segment(directory: Path, after: Position) -> Path:
    """Make the segment that goes on after a position; durable, name included, on return.

    Order: contents, fsync, rename, fsync of the directory. A crash at any point leaves either no segment or a whole one.
    """
    path = directory / segment_name(after.seq + 1)
    unfinished = path.with_name(path.name + UNFINISHED_SUFFIX)
    remove_unfinished(directory)
    connection = sqlite3.connect(unfinished, isolation_level=None)
    try:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}").close()
        connection.execute(f"PRAGMA user_version = {FORMAT}").close()
        connection.executescript(_SCHEMA)
        connection.executemany(
            "INSERT INTO meta (name, value) VALUES (?, ?)",
            [
                ("format", FORMAT),
                ("shard", directory.absolute().name),
                ("first_seq", after.seq + 1),
                ("prev_hash", after.hash),
                ("sealed", 0),
            ],
        )
        connection.execute("COMMIT")
    finally:
        connection.close()  # the last close of a healthy database folds the -wal in and removes it
    invariant(not wal_of(unfinished).exists(), "a new segment is one file")
    sync_file(unfinished)
    unfinished.rename(path)
    sync_directory(directory)
    return path


def remove_unfinished(directory: Path) -> None:
    """Remove what a crash left of a segment in the making. Only the holder of the lock may."""
    for left_over in directory.glob(f"*{SEGMENT_SUFFIX}{UNFINISHED_SUFFIX}*"):
        left_over.unlink()
