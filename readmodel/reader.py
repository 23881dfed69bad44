"""Read a read model while its one writer writes: no lock, no call, and never a torn row.

Rules
- `find`, `select` and `rows_of_pool` begin a query: they first move to the generation that is live now. `row` and
  `identity` stay in the generation that gave the row number, even if another went live since. A row number kept longer
  than one query is good only while `generation` is the same. Who only calls `row` calls `refresh` before.
- Take `position` before the rows: what it says is then understated at worst. `select` does so itself.
- A row that cannot be read whole for GIVE_UP_MS is reported (TornRowError, or `Selection.torn`), never returned. The
  wait is one for a whole selection. A row given up once is given up at once while its version stays the same,
  so a killed writer costs its readers the wait once, and not in each request.
- Pool, slot and instants of a row never change, so their check is verified once, when the row is first seen. Pool code,
  start and identity check are then kept in own contiguous columns, which filters scan; instants cannot go stale there,
  because a slot's instants are resolved when it is defined, and never again.

The index costs about 36 bytes a row: 16 for the columns, 4 in the list of its pool, 8 to 16 in a table of open addressing
by the hash of pool and slot. A dict would cost over 170. It is extended by the rows that came since the last query, and kept
over a change of generation if the new one begins with the same counters in the same order, which growth guarantees
and a restarted worker usually does.

Not promised: thread safety; that two rows of one selection are of the same instant; anything about rows beyond the
position (a row may be newer than the position says, never older).
"""

import os
import struct
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from readmodel import layout
from readmodel.layout import (
    CHECK_PRIME,
    CHECK_WORD,
    GIVE_UP_MS,
    HEADER_SIZE,
    HEADER_WORDS,
    IDENTITY_CHECK_WORD,
    IDENTITY_WORD,
    IDENTITY_WORDS,
    KEY,
    KEY_HASH_MASK,
    KEY_HASH_SHIFT,
    MOVED_TO_GENERATION_AT,
    ROW,
    ROW_COUNT_AT,
    ROW_SIZE,
    ROW_WORDS,
    SLOT_ID_SIZE,
    STARTS_WORD,
    WORD_SIZE,
    LayoutError,
    NotPublishedError,
    TornRowError,
    Words,
)

SELECT_BLOCK_ROWS: Final = 4_096
"""Rows copied between two looks at their versions: about 50 us, so few are torn; 800 kB, which stay in the cache."""

INDEX_BLOCK_ROWS: Final = 65_536
"""Rows indexed in one step: bounds the memory for it at 10 MB."""

TABLE_SLOTS_MIN: Final = 1_024
KEY_SPREAD: Final = 0x9E3779B1
KEY_SPREAD_SHIFT: Final = 27
"""The residues of one slot in neighbouring pools are neighbours: multiplied (Knuth 6.4) and taken from the middle, they
are not. Without it the runs in the table grew to hundreds, and a miss took 88 us instead of 1."""
OPEN_TRIES_MAX: Final = 100
"""Each try means that a generation went away between reading its number and opening it: twice in a row is a rarity."""

_GIVE_UP_NS: Final = GIVE_UP_MS * 1_000_000
_BODY_SIZE: Final = layout.BODY.size
_KEY_AT: Final = HEADER_SIZE + IDENTITY_WORD * WORD_SIZE
_ROW_STRUCT: Final = struct.Struct(f"<{CHECK_WORD}qxxxxxxxxq{SLOT_ID_SIZE}sqq")
_CHECK_AT: Final = CHECK_WORD * WORD_SIZE

_Number = TypeVar("_Number", bound=np.generic)

_pack_key = KEY.pack
_from_bytes = int.from_bytes


class Row(NamedTuple):
    """One counter, whole. `cutoff_at_ms` is NO_CUTOFF where there is none; `version` rises by two with each publish."""

    version: int
    limit: int
    base: int
    overbook: int
    buffer: int
    held: int
    confirmed: int
    fulfilled: int
    refused: int
    flags: int
    cutoff_at_ms: int
    seq: int
    plan_version: int
    pool_code: int
    slot_id: bytes
    starts_at_ms: int
    ends_at_ms: int


class Identity(NamedTuple):
    """What never changes in a row."""

    pool_code: int
    slot_id: bytes
    starts_at_ms: int
    ends_at_ms: int


class Position(NamedTuple):
    """How far the rows are known to go: to this journal seq, at this wall time. They may hold more."""

    seq: int
    published_at_ms: int


class Header(NamedTuple):
    """The header of the live generation at one look. Each field is true for itself; two may be of different moments."""

    generation: int
    epoch: int
    restart_count: int
    boot_id: bytes
    writer_pid: int
    state: int
    heartbeat_boottime_ms: int
    position_seq: int
    published_at_ms: int
    pools_generation: int
    plan_version: int
    row_count: int
    row_capacity: int


class Selection(NamedTuple):
    """The answer of `select`. All arrays are copies."""

    counters: NDArray[np.void]
    """Whole rows, dtype `layout.ROW`, in rising order of their number."""
    rows: NDArray[np.int64]
    """The row number of each of `counters`."""
    torn: NDArray[np.int64]
    """Rows that match but stayed torn: ask the worker for `identity(row)`."""
    next_row: int | None
    """Where `limit_rows` cut the answer: `first_row` of the next call. None at the end."""
    position: Position
    """Taken before the rows."""


class ReaderStatistics(NamedTuple):
    """What a Reader did and holds."""

    rows_indexed: int
    index_size: int
    """Bytes of the columns and the table; the lists of rows by pool come on top with 4 bytes a row."""
    torn_reads: int
    """Copies thrown away because the writer was at the row; each was read again."""
    torn_rows: int
    """Rows given up."""
    moves: int
    """Changes of generation followed."""


class Reader:
    """One process's view of one read model."""

    def __init__(self, directory: Path | str, name: str) -> None:
        """Map the live generation.

        Raises NotPublishedError where there is none yet (a worker that has never started, or loads for the first time):
        answer that the shard is unavailable and try again. Raises LayoutError for files that are no read model.
        """
        self._directory = Path(directory)
        self._name = layout.checked_name(name)
        self._moves = 0
        self._torn_reads = 0
        self._torn_rows = 0
        self._given_up: dict[int, int] = {}
        self._boot_id = layout.boot_id()
        self._generation = 0
        self._forget_index()
        self._open_pointer()
        try:
            self._open_generation()
        except BaseException:
            self._pointer.release()
            raise

    # --- which generation

    @property
    def generation(self) -> int:
        """The generation that row numbers belong to."""
        return self._generation

    def refresh(self) -> bool:
        """Move to the live generation if it is another one; says whether it did. Otherwise one load, about 60 ns.

        Raises LayoutError where the files were replaced by those of another release.
        """
        if self._pointer[MOVED_TO_GENERATION_AT] == self._generation:
            return False
        if self._pointer[MOVED_TO_GENERATION_AT] == layout.RETIRED:
            retired = self._pointer
            self._open_pointer()
            retired.release()
        self._open_generation()
        self._moves += 1
        return True

    def header(self) -> Header:
        """A snapshot of the header."""
        words = self._words[:HEADER_WORDS].tolist()
        return Header(
            generation=words[layout.GENERATION_AT],
            epoch=words[layout.EPOCH_AT],
            restart_count=words[layout.RESTART_COUNT_AT],
            boot_id=b"".join(
                words[at].to_bytes(8, "big", signed=True) for at in (layout.BOOT_ID_HIGH_AT, layout.BOOT_ID_LOW_AT)
            ),
            writer_pid=words[layout.WRITER_PID_AT],
            state=words[layout.STATE_AT],
            heartbeat_boottime_ms=words[layout.HEARTBEAT_AT],
            position_seq=words[layout.POSITION_SEQ_AT],
            published_at_ms=words[layout.PUBLISHED_AT],
            pools_generation=words[layout.POOLS_GENERATION_AT],
            plan_version=words[layout.PLAN_VERSION_AT],
            row_count=words[ROW_COUNT_AT],
            row_capacity=words[layout.ROW_CAPACITY_AT],
        )

    def position(self) -> Position:
        """How far the rows go, for `position`, `as_of` and `min_position`. Take it before the rows."""
        words = self._words
        return Position(words[layout.POSITION_SEQ_AT], words[layout.PUBLISHED_AT])

    def is_writer_alive(self, boottime_ms: int, silence_ms_max: int) -> bool:
        """Whether the writer of this generation gave a sign of life in this boot within that time, and is not stopping.

        A quiet writer still beats, so False means dead, stopped or stalled.
        """
        header = self.header()
        return (
            header.boot_id == self._boot_id
            and header.state != layout.STATE_STOPPING
            and boottime_ms - header.heartbeat_boottime_ms <= silence_ms_max
        )

    # --- rows

    def row(self, row: int) -> Row:
        """One counter. Raises TornRowError after GIVE_UP_MS, IndexError for a row that this generation does not have."""
        words = self._words
        if not 0 <= row < words[ROW_COUNT_AT]:
            raise IndexError(f"row {row} of {words[ROW_COUNT_AT]} in {self._path}")
        word = HEADER_WORDS + row * ROW_WORDS
        start = word * WORD_SIZE
        deadline_ns = 0
        while True:
            version = words[word]
            copy = self._map[start : start + ROW_SIZE]
            if (
                words[word] == version
                and not version & 1
                and version
                and (_from_bytes(copy[:_BODY_SIZE], "little") - 1) % CHECK_PRIME
                == _from_bytes(copy[_CHECK_AT : _CHECK_AT + WORD_SIZE], "little")
            ):
                fields = list(_ROW_STRUCT.unpack_from(copy))
                fields[14] = fields[14].rstrip(b"\0")
                return Row._make(fields)
            self._torn_reads += 1
            now_ns = time.monotonic_ns()
            if not deadline_ns:
                deadline_ns = now_ns + _GIVE_UP_NS
                if self._given_up.get(row) == version:
                    break
            if now_ns > deadline_ns:
                self._given_up[row] = version
                break
            os.sched_yield()  # lets a writer that shares this core finish
        self._torn_rows += 1
        raise TornRowError(
            f"row {row} of {self._path} stayed half-written for {GIVE_UP_MS} ms (version {version}, writer pid "
            f"{words[layout.WRITER_PID_AT]}): ask the worker"
        )

    def identity(self, row: int) -> Identity:
        """Pool, slot and instants of a row: these cannot be torn."""
        if not 0 <= row < self._rows_indexed:
            raise IndexError(f"row {row} of {self._rows_indexed} in {self._path}")
        pool_code, slot_id, starts_at_ms, ends_at_ms = layout.IDENTITY.unpack_from(self._map, _KEY_AT + row * ROW_SIZE)
        return Identity(pool_code, slot_id.rstrip(b"\0"), starts_at_ms, ends_at_ms)

    def find(self, pool_code: int, slot_id: bytes) -> int | None:
        """The row of a counter, or None. About 1 us."""
        self._begin()
        if len(slot_id) > SLOT_ID_SIZE or slot_id.endswith(b"\0"):
            return None
        key = _pack_key(pool_code, slot_id)
        table = self._table_view
        mask = self._table_mask
        slot = _from_bytes(key, "little") % CHECK_PRIME * KEY_SPREAD >> KEY_SPREAD_SHIFT & mask
        while (row := table[slot]) >= 0:
            start = _KEY_AT + row * ROW_SIZE
            if self._map[start : start + len(key)] == key:
                return row
            slot = slot + 1 & mask
        return None

    def rows_of_pool(self, pool_code: int) -> NDArray[np.int64]:
        """The rows of a pool, rising."""
        self._begin()
        rows = self._rows_by_pool.get(pool_code)
        return np.array(rows if rows is not None else (), dtype=np.int64)

    def select(
        self,
        pool_codes: Sequence[int] | None,
        starts_from_ms: int | None,
        starts_to_ms: int | None,
        limit_rows: int,
        *,
        first_row: int = 0,
    ) -> Selection:
        """Whole copies of the rows of these pools (None: all) that start in the half-open span (None: open end).

        At most `limit_rows`, lowest row numbers first, from `first_row` on. Each row is consistent for itself.
        """
        if limit_rows < 1:
            raise ValueError(f"limit_rows must be at least 1, not {limit_rows}")
        self._begin()
        position = self.position()
        rows = self._matching(pool_codes, starts_from_ms, starts_to_ms, first_row)
        next_row = None
        if len(rows) > limit_rows:
            next_row = int(rows[limit_rows])
            rows = rows[:limit_rows]
        copies, torn = self._copy_whole(rows)
        torn_rows = rows[torn]
        if len(torn):
            whole = np.ones(len(rows), dtype=np.bool_)
            whole[torn] = False
            copies, rows = copies[whole], rows[whole]
        return Selection(copies.view(ROW)[:, 0], rows, torn_rows, next_row, position)

    def statistics(self) -> ReaderStatistics:
        """Numbers for operators."""
        index_size = sum(
            column.nbytes for column in (self._pool_codes, self._starts_at_ms, self._identity_checks, self._table)
        )
        return ReaderStatistics(self._rows_indexed, index_size, self._torn_reads, self._torn_rows, self._moves)

    def close(self) -> None:
        """Let go of the files. Idempotent."""
        self._pointer.release()
        self._release_generation()

    # --- opening

    def _open_pointer(self) -> None:
        path = layout.pointer_path(self._directory, self._name)
        try:
            mapped = layout.map_file(path, writable=False)
        except FileNotFoundError:
            raise NotPublishedError(f"{path} does not exist: the worker has not published yet") from None
        self._pointer = memoryview(mapped).cast("q")

    def _open_generation(self) -> None:
        """Map the live generation, whichever it is by the time one is caught."""
        for _ in range(OPEN_TRIES_MAX):
            generation = self._pointer[MOVED_TO_GENERATION_AT]
            if generation <= 0:
                raise NotPublishedError(
                    f"{layout.pointer_path(self._directory, self._name)} names no generation: "
                    "the worker is loading and has not published yet"
                )
            path = layout.generation_path(self._directory, self._name, generation)
            try:
                mapped = layout.map_file(path, writable=False)
            except FileNotFoundError:
                continue
            break
        else:
            raise NotPublishedError(f"{path} is the live generation and does not exist: restart the worker")
        words = memoryview(mapped).cast("q")
        if words[layout.GENERATION_AT] != generation:
            found = words[layout.GENERATION_AT]
            words.release()
            mapped.close()
            raise LayoutError(f"{path} says it is generation {found}: remove it and restart the worker")
        if self._generation:
            self._release_generation()
        self._path, self._map, self._words, self._generation = path, mapped, words, generation
        self._rows: Words = np.frombuffer(mapped, dtype=np.int64, offset=HEADER_SIZE).reshape(-1, ROW_WORDS)
        self._versions: NDArray[np.int64] = self._rows[:, 0]
        self._given_up.clear()
        kept = self._rows_indexed
        if words[ROW_COUNT_AT] < kept or not np.array_equal(
            self._rows[:kept, IDENTITY_CHECK_WORD], self._identity_checks[:kept]
        ):
            self._forget_index()

    def _release_generation(self) -> None:
        self._words.release()
        self._versions = np.empty(0, dtype=np.int64)
        self._rows = np.empty((0, ROW_WORDS), dtype=np.int64)
        self._map.close()

    # --- index

    def _begin(self) -> None:
        if self._pointer[MOVED_TO_GENERATION_AT] != self._generation:
            self.refresh()
        row_count = self._words[ROW_COUNT_AT]
        if row_count != self._rows_indexed:
            self._extend_index(row_count)

    def _forget_index(self) -> None:
        self._rows_indexed = 0
        self._pool_codes: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._starts_at_ms: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._identity_checks: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._rows_by_pool: dict[int, array[int]] = {}
        self._make_table(TABLE_SLOTS_MIN)

    def _make_table(self, slots: int) -> None:
        """A table of row numbers, -1 where empty, never more than half full."""
        self._table: NDArray[np.int32] = np.full(slots, -1, dtype=np.int32)
        self._table_view = self._table.data
        self._table_mask = slots - 1

    def _extend_index(self, row_count: int) -> None:
        if row_count > len(self._pool_codes):
            # An eighth to spare: growing again costs a copy of three columns, about 1 ms at 500,000 rows.
            capacity = row_count + row_count // 8
            self._pool_codes = _enlarged(self._pool_codes, self._rows_indexed, capacity)
            self._starts_at_ms = _enlarged(self._starts_at_ms, self._rows_indexed, capacity)
            self._identity_checks = _enlarged(self._identity_checks, self._rows_indexed, capacity)
        if 2 * row_count > len(self._table):
            self._make_table(1 << (2 * row_count).bit_length())
            self._insert(0, self._rows_indexed)
        deadline_ns = 0
        while self._rows_indexed < row_count:
            first = self._rows_indexed
            identities = self._rows[
                first : min(first + INDEX_BLOCK_ROWS, row_count), IDENTITY_WORD : IDENTITY_CHECK_WORD + 1
            ].copy()
            checks = identities[:, IDENTITY_WORDS]
            whole = checks == layout.identity_checks(identities[:, :IDENTITY_WORDS])
            count = len(whole) if whole.all() else int(np.argmin(whole))
            if count:
                self._index_block(first, identities[:count])
                deadline_ns = 0
                continue
            # Only a weakly ordered processor shows a row's number before its identity, and only for a moment.
            now_ns = time.monotonic_ns()
            deadline_ns = deadline_ns or now_ns + _GIVE_UP_NS
            if now_ns > deadline_ns:
                raise TornRowError(f"row {first} of {self._path} is counted but has no identity: restart the worker")
            os.sched_yield()

    def _index_block(self, first: int, identities: Words) -> None:
        end = first + len(identities)
        pool_codes = identities[:, 0]
        self._pool_codes[first:end] = pool_codes
        self._starts_at_ms[first:end] = identities[:, STARTS_WORD - IDENTITY_WORD]
        self._identity_checks[first:end] = identities[:, IDENTITY_WORDS]
        self._insert(first, end)
        order = np.argsort(pool_codes, kind="stable")
        grouped = pool_codes[order]
        rows = (order + first).astype(np.int32)
        starts = np.flatnonzero(np.concatenate(([True], grouped[1:] != grouped[:-1])))
        ends = [*starts[1:].tolist(), len(rows)]
        for pool_code, start, stop in zip(grouped[starts].tolist(), starts.tolist(), ends, strict=True):
            known = self._rows_by_pool.get(pool_code)
            if known is None:
                known = self._rows_by_pool[pool_code] = array("i")
            known.frombytes(rows[start:stop].tobytes())
        self._rows_indexed = end

    def _insert(self, first: int, end: int) -> None:
        """Put rows into the table. In each round all rows try their slot at once; where two meet, one wins."""
        table, mask = self._table, self._table_mask
        rows = np.arange(first, end, dtype=np.int32)
        hashes = self._identity_checks[first:end] >> KEY_HASH_SHIFT & KEY_HASH_MASK
        slots = hashes * KEY_SPREAD >> KEY_SPREAD_SHIFT & mask
        while len(rows):
            free = table[slots] < 0
            table[slots[free]] = rows[free]
            lost = table[slots] != rows
            rows = rows[lost]
            slots = (slots[lost] + 1) & mask

    # --- copies

    def _matching(
        self,
        pool_codes: Sequence[int] | None,
        starts_from_ms: int | None,
        starts_to_ms: int | None,
        first_row: int,
    ) -> NDArray[np.int64]:
        """Row numbers that match, rising."""
        count = self._rows_indexed
        starts = self._starts_at_ms[:count]
        if pool_codes is None:
            matches = np.ones(count, dtype=np.bool_)
            matches[: max(first_row, 0)] = False
            if starts_from_ms is not None:
                matches &= starts >= starts_from_ms
            if starts_to_ms is not None:
                matches &= starts < starts_to_ms
            return np.flatnonzero(matches)
        by_pool = self._rows_by_pool
        known = [by_pool[code] for code in dict.fromkeys(pool_codes) if code in by_pool]
        if not known:
            return np.empty(0, dtype=np.int64)
        rows = np.concatenate(known).astype(np.int64)
        if len(known) > 1:
            rows.sort()
        if first_row > 0:
            rows = rows[np.searchsorted(rows, first_row) :]
        if starts_from_ms is not None:
            rows = rows[starts[rows] >= starts_from_ms]
        if starts_to_ms is not None:
            rows = rows[starts[rows] < starts_to_ms]
        return rows

    def _copy_whole(self, rows: NDArray[np.int64]) -> tuple[Words, NDArray[np.int64]]:
        """Copies of rows and the places in `rows` that stayed torn."""
        copies = np.empty((len(rows), ROW_WORDS), dtype=np.int64)
        whole = np.empty(len(rows), dtype=np.bool_)
        for start in range(0, len(rows), SELECT_BLOCK_ROWS):
            end = start + SELECT_BLOCK_ROWS
            whole[start:end] = self._try_copy(rows[start:end], copies[start:end])
        pending = np.flatnonzero(~whole)
        if not len(pending):
            return copies, pending
        self._torn_reads += len(pending)
        hopeless = np.array(
            [
                self._given_up.get(row) == version
                for row, version in zip(rows[pending].tolist(), self._versions[rows[pending]].tolist(), strict=True)
            ],
            dtype=np.bool_,
        )
        given_up = pending[hopeless]
        pending = pending[~hopeless]
        deadline_ns = time.monotonic_ns() + _GIVE_UP_NS
        while len(pending):
            os.sched_yield()
            again = np.empty((min(len(pending), SELECT_BLOCK_ROWS), ROW_WORDS), dtype=np.int64)
            still: list[NDArray[np.int64]] = []
            for start in range(0, len(pending), SELECT_BLOCK_ROWS):
                places = pending[start : start + SELECT_BLOCK_ROWS]
                part = again[: len(places)]
                good = self._try_copy(rows[places], part)
                copies[places[good]] = part[good]
                still.append(places[~good])
            pending = np.concatenate(still)
            self._torn_reads += len(pending)
            if len(pending) and time.monotonic_ns() > deadline_ns:
                torn_rows = rows[pending]
                self._given_up.update(zip(torn_rows.tolist(), self._versions[torn_rows].tolist(), strict=True))
                given_up = np.sort(np.concatenate((given_up, pending)))
                break
        self._torn_rows += len(given_up)
        return copies, given_up

    def _try_copy(self, rows: NDArray[np.int64], into: Words) -> NDArray[np.bool_]:
        """Copy each row once; says which copies are whole. The seqlock read of `row`, a block at a time."""
        before = self._versions[rows]  # not take(): that copies the whole strided column first
        self._rows.take(rows, axis=0, out=into, mode="clip")  # "clip" copies straight into `out`
        after = self._versions[rows]
        whole: NDArray[np.bool_] = before == after
        whole &= before & 1 == 0
        whole &= before != 0
        whole &= into[:, 0] == before
        whole &= into[:, CHECK_WORD] == layout.expected_checks(into)
        return whole


def _enlarged(column: NDArray[_Number], used: int, capacity: int) -> NDArray[_Number]:
    larger = np.empty(capacity, dtype=column.dtype)
    larger[:used] = column[:used]
    return larger
