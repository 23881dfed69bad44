"""The journal's twin in memory, for tests and simulation. It passes `tests/journal/test_contract.py` like the real one.

A `MemoryDisk` outlives its journals as a directory does. `stage` and `sync` are the two halves of an append, so that a
simulator without trio can put a crash between them: `crash` loses the staged tail, or keeps a part of it, since whether an
unfinished commit is on the disk is unknown.

Not promised: damage inside a row that keeps its length and hash, segments, time. The disk never fails by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.core.invariant import invariant
from engine.journal.segments import (
    CHAIN_START,
    HINT_RESTORE,
    ChainState,
    DamageError,
    Problem,
    content_fault,
    continue_chain,
    link_fault,
    make_row,
    state_after,
)
from engine.ports import GENESIS, Journal, JournalError, JournalLockedError, JournalRow, Position


@dataclass
class MemoryDisk:
    """What is left when the process is gone."""

    name: str = "memory"
    """Stands where a path stands in errors."""
    rows: list[JournalRow] = field(default_factory=list)
    """Everything written, durable or not."""
    rows_synced: int = 0
    """So many of the rows survive a crash."""
    watermark: Position = GENESIS
    """Up to where rows must be there."""
    locked: bool = False


class MemoryJournal(Journal):
    """The one writer of a `MemoryDisk`. Made by `open_memory_journal`."""

    def __init__(self, disk: MemoryDisk, chain: ChainState) -> None:
        """Private to `open_memory_journal`."""
        self._disk = disk
        self._chain = chain
        self._durable = chain.end
        self._refusal: str | None = None
        self._closed = False

    @property
    def head(self) -> Position:
        return self._durable

    @property
    def epoch(self) -> int:
        return self._chain.epoch

    @property
    def restart(self) -> int:
        return self._chain.restart

    def stage(self, *, count: int, at_ms: int, schema: int, body: bytes) -> JournalRow:
        """Write a row that is not durable yet: the first half of `append`."""
        self._refuse()
        invariant(count > 0, "a row holds at least one event")
        invariant(at_ms >= self._chain.at_ms, "time of the rows of a journal never goes back")
        row = make_row(self._chain, count=count, at_ms=at_ms, schema=schema, body=body)
        self._disk.rows.append(row)
        self._chain = state_after(row)
        return row

    def sync(self) -> None:
        """Make all staged rows durable: the second half of `append`."""
        self._refuse()
        self._disk.rows_synced = len(self._disk.rows)
        self._durable = self._disk.watermark = self._chain.end

    async def append(self, *, count: int, at_ms: int, schema: int, body: bytes) -> JournalRow:
        row = self.stage(count=count, at_ms=at_ms, schema=schema, body=body)
        self.sync()
        return row

    def read(self, after: Position) -> Iterator[JournalRow]:
        self._refuse()
        chain = CHAIN_START
        reached = after == GENESIS
        for row in tuple(self._disk.rows):
            fault = link_fault(chain, row) or content_fault(row)
            if fault is not None:
                raise _damage(self._disk, chain.end.seq + 1, fault)
            chain = state_after(row)
            if reached:
                yield row
            reached = reached or chain.end == after
        if not reached:
            raise _damage(
                self._disk, after.seq, f"the position {after.seq} with hash {after.hash.hex()} is not in this journal"
            )
        _check_reach(self._disk)

    async def maintain(self) -> None:
        """Nothing is ever pending."""
        self._refuse()

    async def close(self) -> None:
        if not self._closed:
            self.sync()
            self._closed = True
            self._disk.locked = False

    def crash(self, *, staged_rows_kept: int = 0) -> None:
        """End as by kill -9 and loss of power: staged rows are lost but for the first so many. Refuses all afterwards."""
        rows_kept = min(self._disk.rows_synced + staged_rows_kept, len(self._disk.rows))
        del self._disk.rows[rows_kept:]
        self._disk.rows_synced = rows_kept
        self._disk.locked = False
        self._refusal = f"{self._disk.name}: this journal's process has crashed"

    def _refuse(self) -> None:
        if self._refusal is not None:
            raise JournalError(self._refusal)
        if self._closed:
            raise JournalError(f"{self._disk.name}: this journal was closed; open it again to use it")


def open_memory_journal(disk: MemoryDisk, *, epoch: int, restart: int | None = None) -> MemoryJournal:
    """Open a disk for writing, with the rules and errors of `engine.journal.sqlite.open_journal`."""
    if disk.locked:
        raise JournalLockedError(f"{disk.name}: another journal holds this disk open for writing")
    _check_reach(disk)
    chain = continue_chain(disk.name, disk.rows[-1] if disk.rows else None, epoch, restart)
    disk.locked = True
    disk.rows_synced = len(disk.rows)
    disk.watermark = chain.end
    return MemoryJournal(disk, chain)


def _check_reach(disk: MemoryDisk) -> None:
    end = disk.rows[-1].end if disk.rows else GENESIS
    if end.seq < disk.watermark.seq:
        raise _damage(disk, end.seq + 1, f"events {end.seq + 1} to {disk.watermark.seq} are missing")


def _damage(disk: MemoryDisk, seq: int, what: str) -> DamageError:
    return DamageError(Problem(disk.name, seq, what, HINT_RESTORE))
