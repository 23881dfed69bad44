"""Snapshots of a shard's state: what bounds the replay after a crash.

The worker itself takes them, while it works: the state is frozen at one journal position and copied chunk by chunk
(`columns.ReservationTable.begin_snapshot`), and a thread writes the copies away. Loading is a few large array copies, so a
million reservations are back in a fraction of a second.

A file `snapshot-SEQ.snap` is a magic line, sections (4 bytes length, MessagePack) and a 32-byte BLAKE2b of everything before
it. It appears under its name only when it is complete and fsynced. The two newest are kept: a damaged one is passed over
with a warning and the one before, or the whole journal, is used. A snapshot is never the truth; the journal is.

Not promised: that a newer or older version can read it; such a file is passed over like a damaged one.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from engine.core.columns import COUNTER_FIELDS, GONE, HELD, Block, Chunk
from engine.core.ledger import Ledger, Link, Part, Pool
from engine.core.slots import Cutoff
from engine.ports import Position

MAGIC = b"slotkeeper snapshot 1\n"
SNAPSHOTS_KEPT = 2
COUNTERS_IN_SECTION = 10_000
"""Encoding so many takes about a millisecond; longer would hold up the worker's own thread."""
_DIGEST_BYTES = 32
_LENGTH_BYTES = 4


class SnapshotError(Exception):
    """The file is no complete snapshot of this version."""


class _Head(msgspec.Struct, array_like=True):
    seq: int
    hash: bytes
    at_ms: int
    epoch: int
    restart: int
    planning_seq: int
    pools: dict[str, tuple[int, str, Cutoff | None]]
    refused_keys: list[str]
    long_lines: dict[int, list[tuple[int, int]]]
    parts: dict[int, tuple[Part, ...]]
    links: dict[int, Link]
    owed: list[int]
    counters: int
    blocks: int


class _Counters(msgspec.Struct, array_like=True):
    columns: dict[str, bytes]
    pool_ids: list[str]
    slot_ids: list[str]


_encode = msgspec.msgpack.Encoder().encode
_decode_head = msgspec.msgpack.Decoder(_Head).decode
_decode_counters = msgspec.msgpack.Decoder(_Counters).decode
_decode_block = msgspec.msgpack.Decoder(dict[str, bytes]).decode


class Frozen:
    """A shard's state at one instant, handed out section by section.

    Made between two decisions; `sections` may be consumed later, while the ledger goes on, but not from another thread.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._head = _Head(
            ledger.seq,
            b"",
            ledger.at_ms,
            ledger.epoch,
            ledger.restart,
            ledger.planning_seq,
            {pool_id: (pool.code, pool.time_zone, pool.cutoff) for pool_id, pool in ledger.pools.items()},
            list(ledger.refused_keys),
            {number: list(lines) for number, lines in ledger.reservations.long_lines.items()},
            dict(ledger.parts),
            dict(ledger.links),
            list(ledger.owed),
            len(ledger.counters),
            len(ledger.reservations.chunks()),
        )
        self._columns = ledger.counters.dump()
        self._pool_ids = ledger.counters.pool_id[:]
        self._slot_ids = ledger.counters.slot_id[:]
        ledger.reservations.begin_snapshot()

    @property
    def seq(self) -> int:
        """The last event the state contains."""
        return self._head.seq

    def sections(self, position: Position) -> Iterator[bytes]:
        """The sections in file order. `position` is where the journal stood at the freeze, now that it is durable."""
        self._head.hash = position.hash
        yield _encode(self._head)
        for start in range(0, self._head.counters, COUNTERS_IN_SECTION):
            end = min(start + COUNTERS_IN_SECTION, self._head.counters)
            columns = {field: column[start * 8 : end * 8] for field, column in self._columns.items()}
            yield _encode(_Counters(columns, self._pool_ids[start:end], self._slot_ids[start:end]))
        while (block := self._ledger.reservations.next_block()) is not None:
            yield _encode(block)


class SnapshotFile:
    """A snapshot on its way to disk. `add` sections, then `finish`; or `drop` it."""

    def __init__(self, directory: Path, seq: int) -> None:
        self._path = directory / f"snapshot-{seq:019d}.snap"
        self._temporary = self._path.with_suffix(".tmp")
        self._file = self._temporary.open("wb")
        self._digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        self._write(MAGIC)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def add(self, section: bytes) -> None:
        """Append one section. Raises OSError."""
        self._write(len(section).to_bytes(_LENGTH_BYTES, "big"))
        self._write(section)

    def finish(self) -> Path:
        """Make the file durable under its name and remove the oldest ones. Raises OSError."""
        self._file.write(self._digest.digest())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        _sync_directory(self._path.parent)
        for old in newest_first(self._path.parent)[SNAPSHOTS_KEPT:]:
            old.unlink()
        return self._path

    def drop(self) -> None:
        """Remove what there is of it."""
        with suppress(OSError):  # closing writes what is buffered, and a full disk is why it is dropped
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest_first(directory: Path) -> list[Path]:
    """The complete snapshots of a shard."""
    return sorted(directory.glob("snapshot-*.snap"), reverse=True)


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed worker left of a snapshot. Only for the shard's one writer, while it writes none."""
    for path in directory.glob("snapshot-*.tmp"):
        path.unlink()


def _sections(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    body = memoryview(data)[:-_DIGEST_BYTES]
    if not data.startswith(MAGIC):
        raise SnapshotError(f"{path} is no snapshot of this version")
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != data[-_DIGEST_BYTES:]:
        raise SnapshotError(f"{path} is damaged: its checksum does not match")
    place = len(MAGIC)
    while place < len(body):
        size = int.from_bytes(body[place : place + _LENGTH_BYTES], "big")
        place += _LENGTH_BYTES
        yield bytes(body[place : place + size])
        place += size


def load(path: Path) -> tuple[Ledger, Position]:
    """The state a snapshot holds and the journal position it was taken at. Raises SnapshotError, OSError."""
    sections = _sections(path)
    try:
        head = _decode_head(next(sections))
        parts = [_decode_counters(next(sections)) for _ in range(0, head.counters, COUNTERS_IN_SECTION)]
        blocks: list[Block] = [_decode_block(section) for section in sections]
        if len(blocks) != head.blocks:
            raise SnapshotError(f"{path} has {len(blocks)} blocks of reservations and says it has {head.blocks}")
        return _ledger_of(head, parts, blocks), Position(head.seq, head.hash)
    except (msgspec.DecodeError, StopIteration, LookupError, ValueError, TypeError) as error:
        # Other columns under the same magic: a version between two releases wrote it.
        raise SnapshotError(f"{path} is no snapshot of this version: {error!r}") from error


def _ledger_of(head: _Head, parts: list[_Counters], blocks: list[Block]) -> Ledger:
    ledger = Ledger()
    ledger.seq = head.seq
    ledger.at_ms = head.at_ms
    ledger.epoch, ledger.restart = head.epoch, head.restart
    ledger.planning_seq = head.planning_seq
    for pool_id, (code, time_zone, cutoff) in head.pools.items():
        ledger.pools[pool_id] = Pool(code, time_zone, cutoff)
        ledger.pool_of_code[code] = pool_id
    ledger.refused_keys = dict.fromkeys(head.refused_keys)
    ledger.counters.load(
        {field: b"".join(part.columns[field] for part in parts) for field in COUNTER_FIELDS},
        [pool_id for part in parts for pool_id in part.pool_ids],
        [slot_id for part in parts for slot_id in part.slot_ids],
    )
    ledger.reservations.load(blocks)
    ledger.reservations.long_lines = {number: tuple(lines) for number, lines in head.long_lines.items()}
    ledger.parts = head.parts
    ledger.links = head.links
    ledger.pinned = {number: None for number, link in head.links.items() if link.is_pinned}
    ledger.owed = dict.fromkeys(head.owed)
    _index(ledger, ledger.reservations.chunks())
    return ledger


def _index(ledger: Ledger, chunks: list[Chunk]) -> None:
    """Rebuild what follows from the records: the key index and the expiry queue."""
    if not chunks:
        return
    status = np.concatenate([chunk.view("status") for chunk in chunks])
    number = np.concatenate([chunk.view("number") for chunk in chunks]).astype(np.int64, copy=False)
    key_high = np.concatenate([chunk.view("key_high") for chunk in chunks]).astype(np.int64, copy=False)
    key_low = np.concatenate([chunk.view("key_low") for chunk in chunks]).astype(np.int64, copy=False)
    expires = np.concatenate([chunk.view("expires_at_ms") for chunk in chunks]).astype(np.int64, copy=False)
    alive = status != GONE
    ledger.keys.load(key_high[alive], key_low[alive], number[alive])
    held = status == HELD
    ledger.expiry.load(number[held], expires[held])


def load_newest(directory: Path) -> tuple[Ledger, Position | None, list[str]]:
    """The newest readable snapshot, or an empty state; and what was wrong with those passed over."""
    problems = []
    for path in newest_first(directory):
        try:
            ledger, position = load(path)
        except (SnapshotError, OSError) as error:
            problems.append(str(error))
        else:
            return ledger, position, problems
    return Ledger(), None, problems
