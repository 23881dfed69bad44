"""The one writer of a read model: appends rows, publishes values, grows, and makes its generation the live one.

Order of stores, and why
- `publish`: odd version, values, check, even version. A reader that sees the same even version before and after its copy has
  seen no store of a later publish begin. Everything that can fail (numbers that do not fit) is done before the
  odd version, and the values go in as one memcpy of 104 bytes: the row is odd for about 150 ns.
  `struct.pack_into` straight into the map was refused: CPython first fills its target with zeros, so the version would be
  an even 0 for an instant, and a number that does not fit would leave the row half-written.
- `append`: identity, values, and only then `row_count`. A row that a reader can count is complete.
- `set_position` comes after the rows it covers. Position and time are two words; either alone may be seen late, which
  understates what the rows hold and never overstates it.
- growing and starting: the new file is complete before it has a name, has its name before the pointer names it, and the
  old file is unlinked last. A process that dies in between leaves the old generation live; an unnamed file is gone with
  its process, and a named one that never became live is removed by the next switch.

A new Publisher always starts a generation of its own and copies nothing: the worker appends all rows from its state, sets
position and heartbeat, then calls `switch`. Until then readers answer from the generation before. So a row that a
killed writer left odd is never patched, and two writers (a planned restart) can be there at once: the one that switched
last is live, and the other gets SupersededError when it wants to grow.

Not promised: thread safety; that a pool and slot is appended once only (the caller's index knows); survival of a reboot.
"""

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from readmodel import layout
from readmodel.layout import (
    BODY,
    CHECK_PRIME,
    CHECK_WORD,
    HEADER_WORDS,
    IDENTITY_CHECK_WORD,
    IDENTITY_WORD,
    IDENTITY_WORDS,
    POOL_CODE_MAX,
    ROW_SIZE,
    ROW_WORDS,
    ROWS_MAX,
    SLOT_ID_SIZE,
    STARTS_WORD,
    VALUE_FIELDS,
    VALUES,
    WORD_SIZE,
    FullError,
    LayoutVersionError,
    SupersededError,
    Words,
)

PUBLISH_BLOCK_ROWS = 4_096
"""Rows that `publish_many` holds odd at the same time: about 60 us, and 800 kB, which stay in the second-level cache."""

_BODY_SIZE = BODY.size
_PUBLISHED_SIZE = _BODY_SIZE + WORD_SIZE
_pack_body = BODY.pack
_from_bytes = int.from_bytes


class PublisherStatistics(NamedTuple):
    """What a Publisher holds."""

    generation: int
    """The live generation, 0 before `switch`."""
    rows: int
    row_capacity: int
    growths: int
    """Times the capacity was doubled; each copies all rows once."""


class Publisher:
    """The writer of one read model. See the module's text for the order of its stores."""

    def __init__(
        self, directory: Path | str, name: str, *, epoch: int, restart_count: int, row_capacity: int = 1024
    ) -> None:
        """Prepare a generation that nobody sees yet.

        Its memory is reserved at once, so a full tmpfs is an OSError here or in `append`, and never a SIGBUS later.
        Raises LayoutError where the pointer's path holds something else.
        """
        if not 1 <= row_capacity <= ROWS_MAX:
            raise ValueError(f"row_capacity must lie between 1 and {ROWS_MAX}, not {row_capacity}")
        self._directory = Path(directory)
        self._name = layout.checked_name(name)
        self._generation = 0
        self._row_count = 0
        self._growths = 0
        self._closed = False
        self._directory_descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._pointer = self._open_pointer()
            self._descriptor, self._map = self._new_file(row_capacity)
        except BaseException:
            os.close(self._directory_descriptor)
            raise
        self._adopt_map()
        words = self._words
        words[layout.GENERATION_AT] = 0
        words[layout.EPOCH_AT] = epoch
        words[layout.RESTART_COUNT_AT] = restart_count
        boot_id = layout.boot_id()
        words[layout.BOOT_ID_HIGH_AT] = _from_bytes(boot_id[:8], "big", signed=True)
        words[layout.BOOT_ID_LOW_AT] = _from_bytes(boot_id[8:], "big", signed=True)
        words[layout.WRITER_PID_AT] = os.getpid()
        words[layout.STATE_AT] = layout.STATE_STARTING

    # --- rows

    def append(
        self, pool_code: int, slot_id: bytes, starts_at_ms: int, ends_at_ms: int, values: tuple[int, ...]
    ) -> int:
        """Add a counter and return its row. Pool, slot and instants of a row never change afterwards.

        `slot_id` has 1 to 32 bytes, the last not zero (zeros pad it); `values` are VALUE_FIELDS in their order.
        Grows when full.
        """
        if not 0 <= pool_code <= POOL_CODE_MAX:
            raise ValueError(f"pool_code must lie between 0 and {POOL_CODE_MAX}, not {pool_code}")
        if not 1 <= len(slot_id) <= SLOT_ID_SIZE or slot_id.endswith(b"\0"):
            raise ValueError(f"a slot id has 1 to {SLOT_ID_SIZE} bytes, the last not zero: {slot_id!r}")
        identity = layout.IDENTITY.pack(pool_code, slot_id, starts_at_ms, ends_at_ms)
        self._make_room(1)
        row = self._row_count
        word = HEADER_WORDS + row * ROW_WORDS
        start = (word + IDENTITY_WORD) * WORD_SIZE
        self._map[start : start + len(identity)] = identity
        self._words[word + IDENTITY_CHECK_WORD] = layout.identity_check(identity)
        self._store(row, values)
        self._row_count = row + 1
        self._words[layout.ROW_COUNT_AT] = row + 1
        return row

    def append_many(
        self,
        pool_codes: NDArray[np.int64],
        slot_ids: NDArray[np.bytes_],
        starts_at_ms: NDArray[np.int64],
        ends_at_ms: NDArray[np.int64],
        values: NDArray[np.int64],
    ) -> int:
        """`append` for many counters at array speed: returns the row of the first, the others follow it in order.

        `slot_ids` is an array of `S32` or shorter; `values` has the shape (rows, VALUES).
        """
        count = len(pool_codes)
        if count and (int(pool_codes.min()) < 0 or int(pool_codes.max()) > POOL_CODE_MAX):
            raise ValueError(f"each pool_code must lie between 0 and {POOL_CODE_MAX}")
        if slot_ids.dtype.kind != "S" or slot_ids.dtype.itemsize > SLOT_ID_SIZE:
            raise ValueError(f"slot ids must be byte strings of at most {SLOT_ID_SIZE} bytes, not {slot_ids.dtype}")
        slot_words = slot_ids.astype(f"S{SLOT_ID_SIZE}").view(np.int64).reshape(count, -1)
        if not slot_words.any(axis=1).all():
            raise ValueError(f"each slot id has 1 to {SLOT_ID_SIZE} bytes")
        value_words = _as_words(values, count)
        self._make_room(count)
        first = self._row_count
        for start in range(0, count, PUBLISH_BLOCK_ROWS):
            block = slice(start, min(start + PUBLISH_BLOCK_ROWS, count))
            new = np.zeros((block.stop - start, ROW_WORDS), dtype=np.int64)
            new[:, IDENTITY_WORD] = pool_codes[block]
            new[:, IDENTITY_WORD + 1 : STARTS_WORD] = slot_words[block]
            new[:, STARTS_WORD] = starts_at_ms[block]
            new[:, STARTS_WORD + 1] = ends_at_ms[block]
            new[:, IDENTITY_CHECK_WORD] = layout.identity_checks(new[:, IDENTITY_WORD : IDENTITY_WORD + IDENTITY_WORDS])
            new[:, 0] = 1
            new[:, 1:CHECK_WORD] = value_words[block]
            new[:, CHECK_WORD] = layout.checks_of_bodies(new[:, :CHECK_WORD])
            new[:, 0] = 2
            self._rows[first + start : first + block.stop] = new
        self._row_count = first + count
        self._words[layout.ROW_COUNT_AT] = self._row_count
        return first

    def publish(self, row: int, values: tuple[int, ...]) -> None:
        """Store a counter's values, VALUE_FIELDS in their order. About 0.6 us.

        Raises IndexError or struct.error before anything is stored.
        """
        if not 0 <= row < self._row_count:
            raise IndexError(f"row {row} of {self._row_count}")
        self._store(row, values)

    def _store(self, row: int, values: tuple[int, ...]) -> None:
        words = self._words
        word = HEADER_WORDS + row * ROW_WORDS
        odd = words[word] + 1 | 1  # also right where an exception between two stores once left the row odd
        body = _pack_body(odd, *values)
        check = _from_bytes(body, "little") % CHECK_PRIME
        start = word * WORD_SIZE
        words[word] = odd
        self._map[start : start + _BODY_SIZE] = body
        words[word + CHECK_WORD] = check
        words[word] = odd + 1

    def publish_many(self, rows: NDArray[np.int64], columns: NDArray[np.int64] | NDArray[np.void]) -> None:
        """`publish` for many rows at array speed; worth it from about thirty rows on.

        `columns` has the shape (rows, VALUES), or is a structured array with VALUE_FIELDS among its fields. Each row at
        most once. Rows become visible block by block: readers never see all of them change at one instant.
        """
        count = len(rows)
        if count == 0:
            return
        if int(rows.min()) < 0 or int(rows.max()) >= self._row_count:
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of {self._row_count}")
        values = _as_words(columns, count)
        versions, published = self._versions, self._published
        body = np.empty((min(count, PUBLISH_BLOCK_ROWS), CHECK_WORD + 1), dtype=np.int64)
        for start in range(0, count, PUBLISH_BLOCK_ROWS):
            block = rows[start : start + PUBLISH_BLOCK_ROWS]
            part = body[: len(block)]
            odd = versions[block]
            odd += 1
            odd |= 1
            part[:, 0] = odd
            part[:, 1:CHECK_WORD] = values[start : start + PUBLISH_BLOCK_ROWS]
            part[:, CHECK_WORD] = layout.checks_of_bodies(part[:, :CHECK_WORD])
            versions[block] = odd
            published[block] = part.view(published.dtype)[:, 0]
            odd += 1
            versions[block] = odd

    # --- header

    def set_position(self, seq: int, now_ms: int) -> None:
        """Say up to which journal seq the rows hold everything. Call it after publishing those rows."""
        words = self._words
        words[layout.POSITION_SEQ_AT] = seq
        words[layout.PUBLISHED_AT] = now_ms

    def heartbeat(self, boottime_ms: int) -> None:
        """Say that this writer is alive. Needed once before `switch`, then as often as readers are told to expect."""
        self._words[layout.HEARTBEAT_AT] = boottime_ms

    def set_state(self, state: int) -> None:
        """STATE_STARTING, STATE_SERVING or STATE_STOPPING."""
        self._words[layout.STATE_AT] = state

    def set_pools_generation(self, pools_generation: int) -> None:
        """Say which set of pools the pool codes belong to."""
        self._words[layout.POOLS_GENERATION_AT] = pools_generation

    def set_plan_version(self, plan_version: int) -> None:
        """Say which plan is applied."""
        self._words[layout.PLAN_VERSION_AT] = plan_version

    # --- life

    def switch(self) -> int:
        """Make this generation the live one, after rows, position and heartbeat are set. Returns its number.

        Idempotent. Raises SupersededError where another writer of a newer release took the name over.
        """
        if self._generation == 0:
            self._go_live(self._descriptor, self._words)
        return self._generation

    def statistics(self) -> PublisherStatistics:
        """Numbers for operators."""
        return PublisherStatistics(
            self._generation, self._row_count, self._words[layout.ROW_CAPACITY_AT], self._growths
        )

    def close(self) -> None:
        """Say STATE_STOPPING and let go. Idempotent. The files stay, so readers go on answering from the last values."""
        if self._closed:
            return
        self._closed = True
        self.set_state(layout.STATE_STOPPING)
        self._release_map()
        self._pointer.close()
        os.close(self._descriptor)
        os.close(self._directory_descriptor)

    def _open_pointer(self) -> mmap.mmap:
        """Map the pointer, made at need. One of another layout version is marked RETIRED and replaced."""
        path = layout.pointer_path(self._directory, self._name)
        with self._locked():
            try:
                return layout.map_file(path, writable=True)
            except FileNotFoundError:
                pass
            except LayoutVersionError:
                with path.open("r+b") as old:
                    old.seek(layout.MOVED_TO_GENERATION_AT * WORD_SIZE)
                    old.write(layout.RETIRED.to_bytes(WORD_SIZE, "little", signed=True))
                path.unlink()
            descriptor, pointer = self._new_file(0)
            try:
                self._give_name(descriptor, path)
            finally:
                os.close(descriptor)
            return pointer

    def _new_file(self, row_capacity: int) -> tuple[int, mmap.mmap]:
        """A file without a name, its memory reserved, its header begun: it vanishes with this process unless named."""
        size = layout.file_size(row_capacity)
        descriptor = os.open(self._directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            mapped = mmap.mmap(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        with memoryview(mapped) as raw, raw.cast("q") as words:
            words[layout.MAGIC_AT] = layout.MAGIC
            words[layout.LAYOUT_VERSION_AT] = layout.LAYOUT_VERSION
            words[layout.ROW_SIZE_AT] = ROW_SIZE
            words[layout.ROW_CAPACITY_AT] = row_capacity
        return descriptor, mapped

    def _give_name(self, descriptor: int, path: Path) -> None:
        # With a directory descriptor CPython calls linkat(AT_SYMLINK_FOLLOW), without one link(), which would link /proc's
        # own symlink. The path is absolute, so which directory it is does not matter.
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=self._directory_descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the directory against other writers for the moment of a switch; the kernel frees it if a holder dies."""
        fcntl.flock(self._directory_descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._directory_descriptor, fcntl.LOCK_UN)

    def _live_generation(self) -> int:
        with memoryview(self._pointer) as raw, raw.cast("q") as words:
            return words[layout.MOVED_TO_GENERATION_AT]

    def _go_live(self, descriptor: int, words: memoryview) -> None:
        """Name the file, point to it, unlink what came before: in this order, so that some generation is always live."""
        with self._locked():
            live = self._live_generation()
            if live == layout.RETIRED or (self._generation and live != self._generation):
                raise SupersededError(
                    f"{layout.pointer_path(self._directory, self._name)} now belongs to another writer (generation {live}, "
                    f"ours was {self._generation}): stop this worker"
                )
            present = layout.generations_in(self._directory, self._name)
            generation = max([live, *present]) + 1
            words[layout.GENERATION_AT] = generation
            self._give_name(descriptor, layout.generation_path(self._directory, self._name, generation))
            with memoryview(self._pointer) as raw, raw.cast("q") as pointer:
                pointer[layout.MOVED_TO_GENERATION_AT] = generation
            self._generation = generation
            for old in present:
                layout.generation_path(self._directory, self._name, old).unlink(missing_ok=True)

    def _make_room(self, count: int) -> None:
        """Double the capacity until `count` more rows fit; costs one copy of all rows."""
        capacity: int = self._words[layout.ROW_CAPACITY_AT]
        needed = self._row_count + count
        if needed <= capacity:
            return
        if needed > ROWS_MAX:
            raise FullError(f"read model {self._name} in {self._directory} is full: {ROWS_MAX} rows")
        while capacity < needed:
            capacity = min(2 * capacity, ROWS_MAX)
        descriptor, mapped = self._new_file(capacity)
        used = layout.file_size(self._row_count)
        try:
            with memoryview(mapped) as raw, raw.cast("q") as words:
                with memoryview(self._map) as old:
                    raw[:used] = old[:used]
                words[layout.ROW_CAPACITY_AT] = capacity
                if self._generation:
                    self._go_live(descriptor, words)
        except BaseException:
            mapped.close()
            os.close(descriptor)
            raise
        self._release_map()
        os.close(self._descriptor)
        self._descriptor, self._map = descriptor, mapped
        self._adopt_map()
        self._growths += 1

    def _adopt_map(self) -> None:
        capacity = (len(self._map) - layout.HEADER_SIZE) // ROW_SIZE
        self._words = memoryview(self._map).cast("q")
        self._rows: Words = np.frombuffer(self._map, dtype=np.int64, offset=layout.HEADER_SIZE).reshape(
            capacity, ROW_WORDS
        )
        self._versions: NDArray[np.int64] = self._rows[:, 0]
        # version, values and check as one opaque item: numpy then moves 112 bytes at once instead of fourteen numbers.
        self._published: NDArray[np.void] = np.ndarray(
            (capacity,),
            dtype=np.dtype((np.void, _PUBLISHED_SIZE)),
            buffer=self._map,
            offset=layout.HEADER_SIZE,
            strides=(ROW_SIZE,),
        )

    def _release_map(self) -> None:
        self._words.release()
        del self._rows, self._versions, self._published
        self._map.close()


def _as_words(columns: NDArray[Any], count: int) -> Words:
    """Values as (rows, VALUES) of int64. Raises ValueError for another shape or for floats."""
    if columns.dtype.names is not None:
        columns = np.column_stack([columns[name] for name in VALUE_FIELDS])
    if columns.shape != (count, VALUES) or columns.dtype.kind not in "iu":
        raise ValueError(
            f"values must be integers of the shape ({count}, {VALUES}), not {columns.dtype} {columns.shape}"
        )
    return columns.astype(np.int64, copy=False)
