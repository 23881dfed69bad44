"""State in columns: counters, reservations, idempotency keys and expiry times as flat arrays instead of objects.

Why: a live reservation costs about 130 bytes here and several hundred as objects; whole blocks can be copied, saved, loaded
and scanned at array speed; and the garbage collector never has to walk millions of objects.

Rules
- Reservations lie in chunks of CHUNK_ROWS rows, in rising order of their number, so a number is found by two bisections
  and needs no index. Removing a record leaves a hole; a chunk with more holes than records is compacted, except the last
  one while it fills.
- Keys are found through an open-addressing table split into PARTITIONS parts, so that its growth is never one long stall.
- A snapshot is taken chunk by chunk while work goes on: a chunk not yet saved is copied before it is changed
  (`ReservationTable.writable`), so what is saved is the state at one instant.

Not promised: thread safety; one owner.
"""

import heapq
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engine.core.invariant import broken, invariant

CHUNK_ROWS = 16_384
"""Copying a chunk (about 1.8 MB) for a snapshot takes well under a millisecond."""

PARTITIONS = 256
PARTITION_SLOTS_MIN = 64

GONE, HELD, CONFIRMED, FULFILLED, RELEASED, EXPIRED = range(6)
"""Status of a reservation row. GONE marks a hole."""

STATUS_WORDS = ("gone", "held", "confirmed", "fulfilled", "released", "expired")

NO_COUNTER = -1
MORE_LINES = -2
"""In `counter_2`: the lines are in `ReservationTable.long_lines`."""

_WIDE = (
    "number",
    "expires_at_ms",
    "created_at_ms",
    "changed_at_ms",
    "changed_seq",
    "key_high",
    "key_low",
    "digest",
    "action",
)
_NARROW = ("counter", "quantity", "counter_2", "quantity_2", "version", "label_end")
_SMALL = ("status",)
FIELDS = _WIDE + _NARROW + _SMALL
DTYPES: dict[str, type[np.signedinteger]] = {
    **dict.fromkeys(_WIDE, np.int64),
    **dict.fromkeys(_NARROW, np.int32),
    **dict.fromkeys(_SMALL, np.int8),
}

Lines = tuple[tuple[int, int], ...]
"""(counter row, units), each counter once."""

_NOTHING: NDArray[np.int64] = np.empty(0, np.int64)

Block = dict[str, bytes]
"""A chunk as bytes by field, plus `labels`."""


class Chunk:
    """CHUNK_ROWS reservation rows; `size` are filled, `alive` of them are records, the rest of those are holes."""

    __slots__ = (
        "action",
        "alive",
        "changed_at_ms",
        "changed_seq",
        "counter",
        "counter_2",
        "created_at_ms",
        "digest",
        "expires_at_ms",
        "key_high",
        "key_low",
        "label_end",
        "labels",
        "number",
        "quantity",
        "quantity_2",
        "size",
        "status",
        "unsaved",
        "version",
    )

    number: "array[int]"
    expires_at_ms: "array[int]"
    created_at_ms: "array[int]"
    changed_at_ms: "array[int]"
    changed_seq: "array[int]"
    key_high: "array[int]"
    key_low: "array[int]"
    digest: "array[int]"
    action: "array[int]"
    counter: "array[int]"
    quantity: "array[int]"
    counter_2: "array[int]"
    quantity_2: "array[int]"
    version: "array[int]"
    label_end: "array[int]"
    status: "array[int]"

    def __init__(self) -> None:
        for field in _WIDE:
            setattr(self, field, array("q", bytes(8 * CHUNK_ROWS)))
        for field in _NARROW:
            setattr(self, field, array("i", bytes(4 * CHUNK_ROWS)))
        for field in _SMALL:
            setattr(self, field, array("b", bytes(CHUNK_ROWS)))
        self.labels = bytearray()
        self.size = 0
        self.alive = 0
        self.unsaved = False

    def view(self, field: str) -> NDArray[np.signedinteger]:
        """The filled part of a column as a numpy view. Do not keep it across a change of `size`."""
        return np.frombuffer(getattr(self, field), dtype=DTYPES[field])[: self.size]

    def label(self, row: int) -> tuple[str, str]:
        """order_ref and channel."""
        start = self.label_end[row - 1] if row else 0
        order_ref, _, channel = self.labels[start : self.label_end[row]].decode().partition("\0")
        return order_ref, channel

    def to_block(self) -> Block:
        """A copy of the filled part as bytes."""
        block: Block = {field: self.view(field).tobytes() for field in FIELDS}
        block["labels"] = bytes(self.labels)
        return block

    @classmethod
    def from_block(cls, block: Block) -> "Chunk":
        """The chunk that `to_block` copied."""
        chunk = cls()
        chunk.size = len(block["status"])
        for field in FIELDS:
            np.frombuffer(getattr(chunk, field), dtype=DTYPES[field])[: chunk.size] = np.frombuffer(
                block[field], dtype=DTYPES[field]
            )
        chunk.labels = bytearray(block["labels"])
        chunk.alive = int(np.count_nonzero(chunk.view("status")))
        return chunk

    def compacted(self) -> Block:
        """As `to_block`, without the holes."""
        keep = np.flatnonzero(self.view("status"))
        block: Block = {field: self.view(field)[keep].tobytes() for field in FIELDS if field != "label_end"}
        ends = self.view("label_end")
        starts = np.concatenate((np.zeros(1, ends.dtype), ends[:-1]))
        labels = bytes(self.labels)
        block["labels"] = b"".join(
            [labels[start:end] for start, end in zip(starts[keep].tolist(), ends[keep].tolist(), strict=True)]
        )
        block["label_end"] = np.cumsum((ends - starts)[keep], dtype=np.int32).tobytes()
        return block


def joined_blocks(first: Block, second: Block) -> Block:
    """Two blocks as one."""
    block: Block = {field: first[field] + second[field] for field in (*FIELDS, "labels")}
    shifted = np.frombuffer(second["label_end"], np.int32) + np.int32(len(first["labels"]))
    block["label_end"] = first["label_end"] + shifted.astype(np.int32).tobytes()
    return block


class ReservationTable:
    """All reservation records of a shard, found by number."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
        self._firsts: list[int] = []
        self.long_lines: dict[int, Lines] = {}
        self._saving: list[Block] | None = None
        self.count = 0

    def append(
        self,
        number: int,
        status: int,
        lines: Lines,
        *,
        expires_at_ms: int,
        at_ms: int,
        seq: int,
        key_high: int,
        key_low: int,
        digest: int,
        order_ref: str,
        channel: str,
    ) -> None:
        """Add a record. Its number must be above all others."""
        chunk = self._chunks[-1] if self._chunks else None
        if chunk is None or chunk.size == CHUNK_ROWS:
            chunk = Chunk()
            self._chunks.append(chunk)
            self._firsts.append(number)
        elif chunk.unsaved:
            self._save(chunk)
        row = chunk.size
        invariant(row == 0 or chunk.number[row - 1] < number, "reservation numbers must rise")
        chunk.number[row] = number
        chunk.status[row] = status
        chunk.expires_at_ms[row] = expires_at_ms
        chunk.created_at_ms[row] = at_ms
        chunk.changed_at_ms[row] = at_ms
        chunk.changed_seq[row] = seq
        chunk.key_high[row] = key_high
        chunk.key_low[row] = key_low
        chunk.digest[row] = digest
        chunk.action[row] = 0
        chunk.version[row] = 1
        self._set_lines(chunk, row, number, lines)
        chunk.labels += f"{order_ref}\0{channel}".encode() if channel else order_ref.encode()
        chunk.label_end[row] = len(chunk.labels)
        chunk.size = row + 1
        chunk.alive += 1
        self.count += 1

    def find(self, number: int) -> tuple[Chunk, int] | None:
        """Chunk and row of a record, for reading."""
        place = bisect_right(self._firsts, number) - 1
        if place < 0:
            return None
        chunk = self._chunks[place]
        row = bisect_left(chunk.number, number, 0, chunk.size)
        if row == chunk.size or chunk.number[row] != number or chunk.status[row] == GONE:
            return None
        return chunk, row

    def writable(self, number: int) -> tuple[Chunk, int]:
        """Chunk and row of a record that is about to change; saves the chunk first where a snapshot waits for it."""
        found = self.find(number)
        if found is None:
            broken(f"reservation {number} must be in memory to change")
        if found[0].unsaved:
            self._save(found[0])
        return found

    def locate(self, numbers: NDArray[np.int64]) -> Iterator[tuple[Chunk, NDArray[np.int64], NDArray[np.int64]]]:
        """Where many records are: chunk by chunk, their places in `numbers` and their rows. Absent ones are left out."""
        if not self._chunks:
            return
        chunk_of = np.searchsorted(np.array(self._firsts, np.int64), numbers, side="right") - 1
        order = np.argsort(chunk_of, kind="stable")
        bounds = np.flatnonzero(np.diff(chunk_of[order])) + 1
        for places in np.split(order, bounds):
            which = int(chunk_of[places[0]])
            if which < 0:
                continue
            chunk = self._chunks[which]
            here = chunk.view("number")
            rows = np.searchsorted(here, numbers[places])
            inside = rows < chunk.size
            asked, rows = places[inside], rows[inside]
            known = (here[rows] == numbers[asked]) & (chunk.view("status")[rows] != GONE)
            if known.any():
                yield chunk, asked[known], rows[known]

    def writable_chunk(self, chunk: Chunk) -> None:
        """Save a chunk that is about to change where a snapshot waits for it."""
        if chunk.unsaved:
            self._save(chunk)

    def lines(self, chunk: Chunk, row: int) -> Lines:
        """What a record takes. Nothing, where all of it lies on other shards."""
        if chunk.counter[row] == NO_COUNTER:
            return ()
        second = chunk.counter_2[row]
        if second == NO_COUNTER:
            return ((chunk.counter[row], chunk.quantity[row]),)
        if second == MORE_LINES:
            return self.long_lines[chunk.number[row]]
        return ((chunk.counter[row], chunk.quantity[row]), (second, chunk.quantity_2[row]))

    def set_lines(self, chunk: Chunk, row: int, lines: Lines) -> None:
        """Replace what a record takes. The chunk must come from `writable`."""
        number = chunk.number[row]
        if chunk.counter_2[row] == MORE_LINES:
            del self.long_lines[number]
        self._set_lines(chunk, row, number, lines)

    def _set_lines(self, chunk: Chunk, row: int, number: int, lines: Lines) -> None:
        chunk.counter[row], chunk.quantity[row] = lines[0] if lines else (NO_COUNTER, 0)
        if len(lines) <= 1:
            chunk.counter_2[row] = NO_COUNTER
            chunk.quantity_2[row] = 0
        elif len(lines) == 2:
            chunk.counter_2[row], chunk.quantity_2[row] = lines[1]
        else:
            chunk.counter_2[row] = MORE_LINES
            chunk.quantity_2[row] = 0
            self.long_lines[number] = lines

    def remove(self, numbers: list[int]) -> None:
        """Leave holes for these records, then compact what has become mostly holes. The numbers must rise."""
        touched: dict[int, Chunk] = {}
        for number in numbers:
            chunk, row = self.writable(number)
            if chunk.counter_2[row] == MORE_LINES:
                del self.long_lines[number]
            chunk.status[row] = GONE
            chunk.alive -= 1
            self.count -= 1
            touched[id(chunk)] = chunk
        for chunk in touched.values():
            still_filling = chunk is self._chunks[-1] and chunk.size < CHUNK_ROWS
            if chunk.alive * 2 <= chunk.size and not still_filling:
                self._compact(chunk)

    def _compact(self, chunk: Chunk) -> None:
        """Close the holes of a chunk; join it with the one before where both fit into one."""
        place = self._chunks.index(chunk)
        if chunk.alive == 0:
            del self._chunks[place], self._firsts[place]
            return
        block = chunk.compacted()
        if place and self._chunks[place - 1].alive + chunk.alive <= CHUNK_ROWS:
            before = self._chunks[place - 1]
            if before.unsaved:
                self._save(before)
            block = joined_blocks(before.compacted(), block)
            del self._chunks[place], self._firsts[place]
            place -= 1
        self._chunks[place] = Chunk.from_block(block)

    def chunk_of(self, number: int) -> tuple[Chunk, int] | None:
        """The chunk that holds the first record at or after `number`, and the row to look from."""
        place = max(bisect_right(self._firsts, number) - 1, 0)
        while place < len(self._chunks):
            chunk = self._chunks[place]
            row = bisect_left(chunk.number, number, 0, chunk.size)
            if row < chunk.size:
                return chunk, row
            place += 1
        return None

    def chunks(self) -> list[Chunk]:
        """All chunks in order: for scans over whole columns."""
        return self._chunks

    def begin_snapshot(self) -> None:
        """From here on `next_block` yields the state of this instant. One snapshot at a time."""
        invariant(self._saving is None, "one snapshot at a time")
        self._saving = []
        for chunk in self._chunks:
            chunk.unsaved = True

    def next_block(self) -> Block | None:
        """The next saved block in no particular order, or None when the snapshot is complete."""
        invariant(self._saving is not None, "no snapshot has begun")
        if not self._saving:
            for chunk in self._chunks:
                if chunk.unsaved:
                    self._save(chunk)
                    break
        if self._saving:
            return self._saving.pop()
        self._saving = None
        return None

    def _save(self, chunk: Chunk) -> None:
        chunk.unsaved = False
        if self._saving is not None:
            self._saving.append(chunk.to_block())

    def load(self, blocks: list[Block]) -> None:
        """Become what the blocks of a complete snapshot say. Only for an empty table."""
        invariant(not self._chunks, "load into an empty table only")
        chunks = [Chunk.from_block(block) for block in blocks]
        chunks.sort(key=lambda chunk: chunk.number[0])
        self._chunks = chunks
        self._firsts = [chunk.number[0] for chunk in chunks]
        self.count = sum(chunk.alive for chunk in chunks)


def _slots_for(keys: int) -> int:
    """The size of a partition laid anew: a power of two, filled to 8/13 at most.

    It is laid anew when filled to 2/3, so what comes and goes at a steady count must fill a twentieth of it in between:
    filled to just under 2/3 at once, every other key would lay thousands anew.
    """
    return max(PARTITION_SLOTS_MIN, 1 << (keys * 13 // 8).bit_length())


class KeyIndex:
    """16-byte keys to reservation numbers: open addressing in flat arrays, 24 to 52 bytes a key.

    The low half of a key picks the partition, the high half is kept in the table; equal high halves are told apart by
    the low half in the reservation's own row, so a match is always on all 128 bits.
    """

    _EMPTY = 0
    _DELETED = -1

    def __init__(self) -> None:
        self._numbers = [array("q", bytes(8 * PARTITION_SLOTS_MIN)) for _ in range(PARTITIONS)]
        self._prints = [array("q", bytes(8 * PARTITION_SLOTS_MIN)) for _ in range(PARTITIONS)]
        self._filled = [0] * PARTITIONS
        self._alive = [0] * PARTITIONS

    def candidates(self, key_high: int, key_low: int) -> Iterator[int]:
        """The numbers filed under this high half; the caller compares the low half with the row's."""
        part = key_low & (PARTITIONS - 1)
        numbers, prints = self._numbers[part], self._prints[part]
        mask = len(numbers) - 1
        place = key_high & mask
        while True:
            number = numbers[place]
            if number == self._EMPTY:
                return
            if prints[place] == key_high and number != self._DELETED:
                yield number
            place = place + 1 & mask

    def add(self, key_high: int, key_low: int, number: int) -> None:
        """File a number (never 0 or -1) under a key that is not yet here."""
        part = key_low & (PARTITIONS - 1)
        if self._filled[part] * 3 >= len(self._numbers[part]) * 2:
            self._rebuild(part, _slots_for(self._alive[part]))
        numbers = self._numbers[part]
        mask = len(numbers) - 1
        place = key_high & mask
        while numbers[place] > 0:
            place = place + 1 & mask
        if numbers[place] == self._EMPTY:
            self._filled[part] += 1
        self._alive[part] += 1
        numbers[place] = number
        self._prints[part][place] = key_high

    def remove(self, key_high: int, key_low: int, number: int) -> None:
        """Take a number out again."""
        part = key_low & (PARTITIONS - 1)
        numbers = self._numbers[part]
        mask = len(numbers) - 1
        place = key_high & mask
        while numbers[place] != number:
            invariant(numbers[place] != self._EMPTY, f"reservation {number} must be filed under its key")
            place = place + 1 & mask
        numbers[place] = self._DELETED
        self._alive[part] -= 1

    def _rebuild(self, part: int, slots: int) -> None:
        numbers = np.frombuffer(self._numbers[part], np.int64)
        alive = np.flatnonzero(numbers > 0)
        self._fill(part, np.frombuffer(self._prints[part], np.int64)[alive], numbers[alive], slots)

    def _fill(self, part: int, prints: NDArray[np.int64], numbers: NDArray[np.int64], slots: int) -> None:
        """Lay a partition anew with array steps: place what falls on a free slot, move the rest on by one."""
        new_numbers = np.zeros(slots, np.int64)
        new_prints = np.zeros(slots, np.int64)
        place = prints & (slots - 1)
        waiting = np.arange(len(numbers))
        while len(waiting):
            wanted = place[waiting]
            _, first = np.unique(wanted, return_index=True)
            lucky = first[new_numbers[wanted[first]] == self._EMPTY]
            new_numbers[wanted[lucky]] = numbers[waiting[lucky]]
            new_prints[wanted[lucky]] = prints[waiting[lucky]]
            left = np.ones(len(waiting), np.bool_)
            left[lucky] = False
            waiting = waiting[left]
            place[waiting] = place[waiting] + 1 & (slots - 1)
        self._numbers[part] = array("q", new_numbers.tobytes())
        self._prints[part] = array("q", new_prints.tobytes())
        self._filled[part] = self._alive[part] = len(numbers)

    def load(self, key_high: NDArray[np.int64], key_low: NDArray[np.int64], numbers: NDArray[np.int64]) -> None:
        """File many at once. Only for an empty index."""
        parts = key_low & (PARTITIONS - 1)
        order = np.argsort(parts, kind="stable")
        bounds = np.searchsorted(parts[order], np.arange(PARTITIONS + 1))
        for part in range(PARTITIONS):
            chosen = order[bounds[part] : bounds[part + 1]]
            self._fill(part, key_high[chosen], numbers[chosen], _slots_for(len(chosen)))


BUCKET_MS = 100
"""A million holds that expire in one second are sorted in ten steps of some milliseconds instead of one of a hundred."""


class ExpiryQueue:
    """When holds are due: numbers in buckets of BUCKET_MS; a bucket whose time has come is sorted, once, at array speed.

    Entries are never taken back: the caller compares a due entry's time with the record's and passes over what has been
    extended, confirmed or released since.
    """

    def __init__(self) -> None:
        self._buckets: dict[int, array[int]] = {}
        self._slices: list[int] = []
        self._open_times = _NOTHING
        self._open_numbers = _NOTHING
        self._open_from = 0
        self._open_next_ms: int | None = None

    def add(self, number: int, expires_at_ms: int) -> None:
        """Remember that a hold is due at `expires_at_ms`."""
        slice_ = expires_at_ms // BUCKET_MS
        bucket = self._buckets.get(slice_)
        if bucket is None:
            bucket = self._buckets[slice_] = array("q")
            heapq.heappush(self._slices, slice_)
        bucket.append(expires_at_ms)
        bucket.append(number)

    def due(self, now_ms: int, count_max: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Take up to `count_max` times <= now_ms, earliest first (of equal times the lowest number), and their numbers."""
        times, numbers, left = [], [], count_max
        while left:
            next_ms = self._open_next_ms
            if self._slices and self._slices[0] * BUCKET_MS <= (now_ms if next_ms is None else min(now_ms, next_ms)):
                self._open(heapq.heappop(self._slices))
                continue
            if next_ms is None or next_ms > now_ms:
                break
            start = self._open_from
            end = start + int(np.searchsorted(self._open_times[start : start + left], now_ms, side="right"))
            if self._slices:  # a slice that begins before what is open ends has its turn in between
                end = min(end, start + int(np.searchsorted(self._open_times[start:end], self._slices[0] * BUCKET_MS)))
            times.append(self._open_times[start:end])
            numbers.append(self._open_numbers[start:end])
            left -= end - start
            self._go_on_from(end)
        if not times:
            return _NOTHING, _NOTHING
        return np.concatenate(times), np.concatenate(numbers)

    def _go_on_from(self, place: int) -> None:
        self._open_from = place
        self._open_next_ms = int(self._open_times[place]) if place < len(self._open_times) else None

    def _open(self, slice_: int) -> None:
        pairs = np.frombuffer(self._buckets.pop(slice_), np.int64).reshape(-1, 2)
        times = np.concatenate((self._open_times[self._open_from :], pairs[:, 0]))
        numbers = np.concatenate((self._open_numbers[self._open_from :], pairs[:, 1]))
        if np.any(numbers[1:] < numbers[:-1]):  # seldom: numbers rise with time
            order = np.argsort(numbers, kind="stable")
            times, numbers = times[order], numbers[order]
        past = times - times.min()
        # Sixteen bits sort ten times faster: what is open spans little time, unless the clock jumped.
        keys = past.astype(np.int16) if past.max() < 2**15 else past
        order = np.argsort(keys, kind="stable")
        self._open_times, self._open_numbers = times[order], numbers[order]
        self._go_on_from(0)

    def is_due(self, now_ms: int) -> bool:
        """Whether `due` may give something now. Asked before every decision, so it is one or two comparisons."""
        if self._slices and self._slices[0] * BUCKET_MS <= now_ms:
            return True
        return self._open_next_ms is not None and self._open_next_ms <= now_ms

    def next_ms(self) -> int | None:
        """A lower bound for the next due time: no later than it, at most BUCKET_MS before it."""
        times = []
        if self._slices:
            times.append(self._slices[0] * BUCKET_MS)
        if self._open_next_ms is not None:
            times.append(self._open_next_ms)
        return min(times) if times else None

    def load(self, numbers: NDArray[np.int64], expires_at_ms: NDArray[np.int64]) -> None:
        """Remember many at once. Only for an empty queue."""
        order = np.argsort(expires_at_ms, kind="stable")
        pairs = np.empty((len(order), 2), np.int64)
        pairs[:, 0] = expires_at_ms[order]
        pairs[:, 1] = numbers[order]
        slices, starts = np.unique(pairs[:, 0] // BUCKET_MS, return_index=True)
        for slice_, block in zip(slices.tolist(), np.split(pairs, starts[1:]), strict=False):
            self._buckets[slice_] = array("q", block.tobytes())
        self._slices = [int(slice_) for slice_ in slices]
        heapq.heapify(self._slices)


COUNTER_FIELDS = (
    "base",
    "overbook",
    "buffer",
    "limit",
    "held",
    "confirmed",
    "fulfilled",
    "refused",
    "closed",
    "starts_at_ms",
    "ends_at_ms",
    "cutoff_at_ms",
    "changed_seq",
    "plan_version",
    "pool_code",
    "hashed",
)


class CounterTable:
    """The counters of a shard: a row each, in order of definition, for ever."""

    base: "array[int]"
    overbook: "array[int]"
    buffer: "array[int]"
    limit: "array[int]"
    held: "array[int]"
    confirmed: "array[int]"
    fulfilled: "array[int]"
    refused: "array[int]"
    closed: "array[int]"
    starts_at_ms: "array[int]"
    ends_at_ms: "array[int]"
    cutoff_at_ms: "array[int]"
    changed_seq: "array[int]"
    plan_version: "array[int]"
    pool_code: "array[int]"
    hashed: "array[int]"

    def __init__(self) -> None:
        for field in COUNTER_FIELDS:
            setattr(self, field, array("q"))
        self.pool_id: list[str] = []
        self.slot_id: list[str] = []
        self._rows: dict[str, dict[str, int]] = {}

    def __len__(self) -> int:
        return len(self.slot_id)

    def find(self, pool_id: str, slot_id: str) -> int | None:
        """The row of a counter."""
        slots = self._rows.get(pool_id)
        return None if slots is None else slots.get(slot_id)

    def rows_of_pool(self, pool_id: str) -> dict[str, int]:
        """slot_id to row."""
        return self._rows.get(pool_id, {})

    def append(self, pool_id: str, slot_id: str, pool_code: int, hashed: int) -> int:
        """Add a counter without units and return its row."""
        row = len(self.slot_id)
        for field in COUNTER_FIELDS:
            getattr(self, field).append(0)
        self.pool_code[row] = pool_code
        self.hashed[row] = hashed
        self.pool_id.append(pool_id)
        self.slot_id.append(slot_id)
        self._rows.setdefault(pool_id, {})[slot_id] = row
        return row

    def used(self, row: int) -> int:
        """Units taken: held + confirmed + fulfilled."""
        return self.held[row] + self.confirmed[row] + self.fulfilled[row]

    def view(self, field: str) -> NDArray[np.int64]:
        """A column as a numpy view. Drop it before the next `append`."""
        return np.frombuffer(getattr(self, field), np.int64)

    def dump(self) -> dict[str, bytes]:
        """A copy as bytes by field."""
        return {field: getattr(self, field).tobytes() for field in COUNTER_FIELDS}

    def load(self, columns: dict[str, bytes], pool_ids: list[str], slot_ids: list[str]) -> None:
        """Become what `dump` copied. Only for an empty table."""
        for field in COUNTER_FIELDS:
            setattr(self, field, array("q", columns[field]))
        self.pool_id = pool_ids
        self.slot_id = slot_ids
        for row, (pool_id, slot_id) in enumerate(zip(pool_ids, slot_ids, strict=True)):
            self._rows.setdefault(pool_id, {})[slot_id] = row
