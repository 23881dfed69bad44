"""What the shells need from the world, as protocols: journal and clock.

Rules:
- A port is narrow. Real parts and their twins pass the same contract suite (`tests/journal/test_contract.py`).
- Each method states its order, idempotence and errors. Nothing here decides anything.

Not promised: thread safety. Each object has one owner.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

GENESIS_HASH = bytes(16)
"""`prev_hash` of the first row of a journal."""


class Position(NamedTuple):
    """A place between two rows of one journal: everything up to and including event `seq` lies before it.

    `hash` is the chain hash of the row that ends at `seq`: an equal seq with another hash is another history.
    """

    seq: int
    hash: bytes


GENESIS = Position(0, GENESIS_HASH)


@dataclass(frozen=True, slots=True)
class JournalRow:
    """One group commit: `count` events numbered `seq` … `seq + count - 1`, written as one row by one commit."""

    seq: int
    count: int
    epoch: int
    restart: int
    at_ms: int
    schema: int
    prev_hash: bytes
    hash: bytes
    body: bytes

    @property
    def end(self) -> Position:
        """The position after this row."""
        return Position(self.seq + self.count - 1, self.hash)


class Journal(Protocol):
    """The append side of one shard's journal: exactly one holder at a time, for the holder's whole life."""

    @property
    def head(self) -> Position:
        """The end of the last durable row."""

    async def append(self, *, count: int, at_ms: int, schema: int, body: bytes) -> JournalRow:
        """Make one row durable and return it. On return it survives loss of power.

        Not cancellable: once called, it runs to its end and returns the commit's outcome, whatever happens to the
        caller's cancel scope. One call at a time. `at_ms` must not be lower than that of the row before.

        Raises `JournalWriteError`: the outcome is unknown. The caller must end the process at once, without closing.
        """

    def read(self, after: Position) -> Iterator[JournalRow]:
        """The rows after a position, oldest first, each verified against the chain. Used before the first append.

        Raises `JournalCorruptError` where the chain is broken, a segment is missing, `after` is not in this journal,
        or the chain ends below the watermark.
        """

    async def maintain(self) -> None:
        """Do pending upkeep between two appends: a passive checkpoint every few MB, sealing a full segment.

        Cheap when there is nothing to do. Raises `JournalWriteError` as `append` does.
        """

    async def close(self) -> None:
        """Close in order: checkpoint, fsync, watermark, release the lock. Idempotent. Not after a `JournalWriteError`."""


class JournalError(Exception):
    """Something is wrong with a journal. The text says what, where, and what the operator can do."""


class JournalWriteError(JournalError):
    """A commit failed: whether the row is on disk is unknown."""


class JournalCorruptError(JournalError):
    """Rows that must be there are missing or altered. Nothing was changed or skipped."""


class JournalLockedError(JournalError):
    """Another process holds this journal open for writing."""


class Clock(Protocol):
    """Wall time for events, monotonic time for deadlines."""

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01T00:00:00Z."""

    def monotonic_ms(self) -> int:
        """Milliseconds of CLOCK_BOOTTIME: the same for every process of this host, never set back."""
