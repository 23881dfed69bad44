"""The watermark: how far a journal had got, kept apart from the journal.

SQLite drops the tail of a write-ahead log after a damaged frame and calls the file healthy. The rows left form a valid
chain. Only a record kept elsewhere can tell that the chain was longer: this file.

Layout: two slots, each within one sector, 4096 bytes apart. A slot is written in place with O_DSYNC, the older one first,
so a crash in the middle of a write leaves the other slot. Each carries a generation and a CRC.

Rules:
- Never ahead: `note` is called with rows that are durable, and nothing else is ever written.
- At most `AGE_MS_MAX` behind while the process lives, idle or not: a thread of its own writes it, at once after a pause and
  then at most every `PERIOD_MS`. It costs the append path an attribute and, after a pause, one wake-up.
- At rest both slots hold the last row, so that one damaged slot loses nothing.
- Two damaged slots are an error, never "no watermark".

Not promised: anything about the rows noted in the last `AGE_MS_MAX` before a crash. Damage there looks like a torn tail.
"""

import os
import struct
import threading
import zlib
from pathlib import Path
from typing import Final, NamedTuple

from engine.core.invariant import invariant
from engine.journal.segments import (
    HASH_BYTES,
    HINT_RESTORE,
    WATERMARK_NAME,
    DamageError,
    Problem,
    sync_directory,
    sync_file,
)
from engine.ports import GENESIS, Position

AGE_MS_MAX: Final = 100
"""Promised bound of the watermark's age (design: "at most 100 ms old")."""

PERIOD_MS: Final = 80
"""Least time between two writes. What is left of AGE_MS_MAX is for the write itself: p99 of an fdatasync is under 1 ms."""

invariant(PERIOD_MS < AGE_MS_MAX, "a write has to fit between the period and the promised age")

_SLOT: Final = struct.Struct(f">8sQQ{HASH_BYTES}sI")
_SLOT_OFFSETS: Final = (0, 4096)  # a page apart: no sector and no page holds both
_FILE_BYTES: Final = 8192
_MAGIC: Final = b"SLKMARK1"


class Watermark(NamedTuple):
    """What the file says."""

    position: Position
    generation: int
    slots_damaged: int


def _encode(position: Position, generation: int) -> bytes:
    unsigned = _SLOT.pack(_MAGIC, generation, position.seq, position.hash, 0)[:-4]
    return unsigned + zlib.crc32(unsigned).to_bytes(4, "big")


def _decode(slot: bytes) -> tuple[int, Position] | None:
    if len(slot) != _SLOT.size:
        return None
    magic, generation, seq, digest, crc = _SLOT.unpack(slot)
    if magic != _MAGIC or crc != zlib.crc32(slot[:-4]):
        return None
    return generation, Position(seq, digest)


def create_watermark(directory: Path) -> None:
    """Make the watermark of a new journal, before its first segment. Durable on return, whole or not at all."""
    path = directory / WATERMARK_NAME
    unfinished = directory / (WATERMARK_NAME + ".new")
    contents = bytearray(_FILE_BYTES)
    for generation, offset in enumerate(_SLOT_OFFSETS):
        contents[offset : offset + _SLOT.size] = _encode(GENESIS, generation)
    unfinished.write_bytes(contents)
    sync_file(unfinished)
    unfinished.rename(path)
    sync_directory(directory)


def read_watermark(directory: Path) -> Watermark | None:
    """The newer of the two slots; None when there is no file. Safe beside the live writer.

    Raises `DamageError` when neither slot is readable. One unreadable slot is what a crash during a write leaves.
    """
    path = directory / WATERMARK_NAME
    for _ in range(2):  # a second look: one slot may be damaged and the other in the middle of being written
        try:
            contents = path.read_bytes()
        except FileNotFoundError:
            return None
        slots = [_decode(contents[offset : offset + _SLOT.size]) for offset in _SLOT_OFFSETS]
        readable = [slot for slot in slots if slot is not None]
        if readable:
            generation, position = max(readable)
            return Watermark(position, generation, len(slots) - len(readable))
    raise DamageError(
        Problem(
            str(path),
            0,
            "both slots of the watermark are damaged, so nothing proves that the end of the journal is there",
            HINT_RESTORE,
        )
    )


class WatermarkWriter:
    """Keeps the file at most `AGE_MS_MAX` behind what was noted. One owner; `note` and `close` in the owner's thread.

    The thread is a daemon: a process that dies leaves the watermark behind the journal, which is allowed.
    """

    def __init__(self, directory: Path, position: Position) -> None:
        """Start with a durable position, which is written to both slots before the constructor returns."""
        found = read_watermark(directory)
        invariant(found is not None, "a journal is created with its watermark")
        self._generation = 0 if found is None else found.generation
        self._noted = position
        self._written: list[Position | None] = [None, None]
        self._failure: OSError | None = None
        self._stopping = False
        self._changed = threading.Event()
        self._stopped = threading.Event()
        self._settled = threading.Condition()
        self._fd = os.open(directory / WATERMARK_NAME, os.O_WRONLY | os.O_DSYNC | os.O_CLOEXEC)
        try:
            self._settle()
        except OSError:
            os.close(self._fd)
            raise
        self._thread = threading.Thread(target=self._run, name="watermark", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> OSError | None:
        """The error that ended the thread. The owner looks before it appends."""
        return self._failure

    def note(self, position: Position) -> None:
        """Say how far the journal is durable. Cheap: no lock, no I/O."""
        self._noted = position
        if not self._changed.is_set():
            self._changed.set()

    def wait_settled(self, timeout_s: float) -> bool:
        """Wait until both slots hold what was noted last. False when time is up or the thread has failed."""
        with self._settled:
            return (
                self._settled.wait_for(
                    lambda: self._failure is not None or self._written == [self._noted, self._noted], timeout_s
                )
                and self._failure is None
            )

    def close(self) -> None:
        """Write what was noted last to both slots, and end. Raises `OSError`. Idempotent."""
        if self._stopped.is_set():
            return
        self.abandon()
        self._thread.join()
        try:
            if self._failure is not None:
                raise self._failure
            self._settle()
        finally:
            os.close(self._fd)

    def abandon(self) -> None:
        """End the thread and write nothing more: the owner is about to kill the process."""
        self._stopping = True
        self._stopped.set()
        self._changed.set()

    def _run(self) -> None:
        try:
            while True:
                self._changed.wait()
                if self._stopping:
                    return
                # Cleared before the position is read: a note that comes in between sets it again.
                self._changed.clear()
                self._write(self._noted)
                if self._stopped.wait(PERIOD_MS / 1000):
                    return
                if not self._changed.is_set():
                    self._settle()  # a pause: the second slot too
        except OSError as error:
            with self._settled:
                self._failure = error
                self._settled.notify_all()

    def _settle(self) -> None:
        position = self._noted
        while self._written != [position, position]:
            self._write(position)

    def _write(self, position: Position) -> None:
        generation = self._generation + 1
        slot = generation % 2  # the older one: generations of the two slots are always neighbours
        os.pwrite(self._fd, _encode(position, generation), _SLOT_OFFSETS[slot])
        self._generation = generation
        with self._settled:
            self._written[slot] = position
            self._settled.notify_all()
