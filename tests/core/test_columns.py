"""The flat arrays of `engine.core.columns` against plain dicts and lists that do the same."""

import random
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core import columns
from engine.core.columns import (
    COUNTER_FIELDS,
    EXPIRED,
    HELD,
    PARTITION_SLOTS_MIN,
    RELEASED,
    Chunk,
    CounterTable,
    ExpiryQueue,
    KeyIndex,
    Lines,
    ReservationTable,
)
from engine.core.invariant import InvariantError
from tests.core.drawing import tries

ROWS_OF_CHUNK = 6


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Chunks that fill, empty and join within a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "CHUNK_ROWS", ROWS_OF_CHUNK)
        yield


# --- reservations -----------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """A reservation as a tuple of what it is."""

    status: int
    lines: Lines
    expires_at_ms: int
    at_ms: int
    seq: int
    key: tuple[int, int]
    digest: int
    label: tuple[str, str]


some_lines = st.lists(
    st.tuples(st.integers(0, 4_000_000), st.integers(1, 20_000_000)),
    min_size=1,
    max_size=5,
    unique_by=lambda line: line[0],
).map(tuple)
wide = st.integers(-(2**63), 2**63 - 1)
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
models = st.builds(
    Model,
    status=st.integers(1, 5),
    lines=some_lines,
    expires_at_ms=st.integers(0, 2**62),
    at_ms=st.integers(0, 2**62),
    seq=st.integers(0, 2**47),
    key=st.tuples(wide, wide),
    digest=wide,
    label=st.tuples(words, words),
)
table_steps = st.lists(
    st.tuples(st.just("append"), st.integers(1, 50), models)
    | st.tuples(st.just("lines"), st.integers(0, 40), some_lines)
    | st.tuples(st.just("status"), st.integers(0, 40), st.sampled_from((HELD, RELEASED, EXPIRED)))
    | st.tuples(st.just("remove"), st.lists(st.integers(0, 40), max_size=12), st.none())
    | st.tuples(st.just("remove first"), st.integers(0, 12), st.none()),
    max_size=60,
)


class Tables:
    """A table and a dict that are told the same."""

    def __init__(self) -> None:
        self.table = ReservationTable()
        self.model: dict[int, Model] = {}
        self.gone: set[int] = set()
        self.last = 0

    def do(self, verb: str, first: object, second: object) -> None:
        """One step to both."""
        numbers = sorted(self.model)
        if verb == "append":
            assert isinstance(first, int)
            assert isinstance(second, Model)
            self.last += first
            self._append(self.last, second)
        elif verb == "lines" and numbers:
            assert isinstance(first, int)
            assert isinstance(second, tuple)
            number = numbers[first % len(numbers)]
            self.table.set_lines(*self.table.writable(number), second)
            self.model[number] = self.model[number]._replace(lines=second)
        elif verb == "status" and numbers:
            assert isinstance(first, int)
            assert isinstance(second, int)
            number = numbers[first % len(numbers)]
            chunk, row = self.table.writable(number)
            chunk.status[row] = second
            self.model[number] = self.model[number]._replace(status=second)
        elif verb == "remove":
            assert isinstance(first, list)
            self._remove(sorted({numbers[each % len(numbers)] for each in first}) if numbers else [])
        elif verb == "remove first":
            assert isinstance(first, int)
            self._remove(numbers[:first])

    def _append(self, number: int, made: Model) -> None:
        self.table.append(
            number,
            made.status,
            made.lines,
            expires_at_ms=made.expires_at_ms,
            at_ms=made.at_ms,
            seq=made.seq,
            key_high=made.key[0],
            key_low=made.key[1],
            digest=made.digest,
            order_ref=made.label[0],
            channel=made.label[1],
        )
        self.model[number] = made

    def _remove(self, numbers: list[int]) -> None:
        self.table.remove(numbers)
        for number in numbers:
            del self.model[number]
        self.gone |= set(numbers)


def read(table: ReservationTable, number: int) -> Model | None:
    """A record of the table as a model."""
    found = table.find(number)
    if found is None:
        return None
    chunk, row = found
    assert chunk.number[row] == number
    return Model(
        chunk.status[row],
        table.lines(chunk, row),
        chunk.expires_at_ms[row],
        chunk.created_at_ms[row],
        chunk.changed_seq[row],
        (chunk.key_high[row], chunk.key_low[row]),
        chunk.digest[row],
        chunk.label(row),
    )


def contents(table: ReservationTable) -> dict[int, Model]:
    """All records, found by scanning the chunks."""
    found: dict[int, Model] = {}
    for chunk in table.chunks():
        for row in range(chunk.size):
            if chunk.status[row]:
                model = read(table, chunk.number[row])
                assert model is not None
                found[chunk.number[row]] = model
    return found


@given(table_steps)
@tries(200)
def test_the_table_is_a_dict(story: list[tuple[str, object, object]]) -> None:
    both = Tables()
    for step in story:
        both.do(*step)
        assert both.table.count == len(both.model)
    table, model = both.table, both.model
    assert contents(table) == model
    assert list(contents(table)) == sorted(model)
    assert all(table.find(number) is None for number in both.gone)
    assert table.find(both.last + 1) is None
    assert table.find(0) is None
    assert set(table.long_lines) == {number for number, made in model.items() if len(made.lines) > 2}
    assert all(chunk.alive == np.count_nonzero(chunk.view("status")) for chunk in table.chunks())
    for number in range(both.last + 2):
        check_place(table, number, model)


def check_place(table: ReservationTable, number: int, model: dict[int, Model]) -> None:
    """`chunk_of` leads to the first row at or after a number, hole or not, and never past a record."""
    following = min((each for each in model if each >= number), default=None)
    place = table.chunk_of(number)
    if place is None:
        assert following is None
        return
    chunk, row = place
    assert chunk.number[row] >= number
    assert following is None or chunk.number[row] <= following


@given(table_steps)
@tries(200)
def test_holes_are_given_back(story: list[tuple[str, object, object]]) -> None:
    """No chunk but the last stays empty, or keeps a new hole while it has more holes than records."""
    both = Tables()
    for step in story:
        holes = set(both.gone)
        both.do(*step)
        for chunk in both.table.chunks()[:-1]:
            assert chunk.alive
            new_holes = (both.gone - holes) & set(chunk.view("number").tolist())
            assert chunk.alive * 2 > chunk.size or not new_holes
    both.table.remove(sorted(both.model))
    assert both.table.count == 0
    assert len(both.table.chunks()) <= 1
    assert both.table.long_lines == {}


def test_records_that_leave_bit_by_bit_leave_no_chunks_behind() -> None:
    """Chunks compacted once were never compacted again: one that emptied later stayed for ever."""
    both = Tables()
    chance = random.Random(5)
    made = Model(HELD, ((1, 1),), 1, 1, 1, (1, 1), 1, ("SO-1", "web"))
    for _ in range(50 * ROWS_OF_CHUNK):
        both.do("append", 1, made)
    numbers = list(both.model)
    chance.shuffle(numbers)
    while numbers:
        leaving, numbers = numbers[:4], numbers[4:]
        both.table.remove(sorted(leaving))
        chunks = both.table.chunks()
        assert len(chunks) <= 2 + 4 * len(numbers) // ROWS_OF_CHUNK
    assert len(both.table.chunks()) <= 1


@given(table_steps, table_steps, st.integers(0, 2))
@tries(200)
def test_a_snapshot_of_the_table_is_one_instant(
    before: list[tuple[str, object, object]], after: list[tuple[str, object, object]], eager: int
) -> None:
    both = Tables()
    for step in before:
        both.do(*step)
    frozen, frozen_long_lines = dict(both.model), dict(both.table.long_lines)
    both.table.begin_snapshot()
    blocks = []
    complete = False
    for step in after:
        both.do(*step)
        for _ in range(eager):
            if not complete:
                block = both.table.next_block()
                complete = block is None
                blocks += [block] if block is not None else []
    while not complete:
        block = both.table.next_block()
        complete = block is None
        blocks += [block] if block is not None else []
    loaded = ReservationTable()
    loaded.load(blocks)
    loaded.long_lines = frozen_long_lines
    assert contents(loaded) == frozen
    assert loaded.count == len(frozen)
    assert contents(both.table) == both.model


def test_a_snapshot_keeps_a_chunk_that_its_neighbour_is_joined_to() -> None:
    """The neighbour changes, not the chunk; it must be saved all the same before it is rewritten."""
    both = Tables()
    made = Model(HELD, ((1, 1),), 1, 1, 1, (1, 1), 1, ("SO-1", "web"))
    for _ in range(2 * ROWS_OF_CHUNK + 1):
        both.do("append", 1, made)
    both.table.remove([1, 2])
    frozen = set(contents(both.table))
    both.table.begin_snapshot()
    both.table.remove([8, 9, 10, 11])
    assert [chunk.size for chunk in both.table.chunks()] == [ROWS_OF_CHUNK, 1]
    blocks = []
    while (block := both.table.next_block()) is not None:
        blocks.append(block)
    loaded = ReservationTable()
    loaded.load(blocks)
    assert set(contents(loaded)) == frozen


def test_one_snapshot_at_a_time() -> None:
    table = ReservationTable()
    with pytest.raises(InvariantError, match="no snapshot has begun"):
        table.next_block()
    table.begin_snapshot()
    with pytest.raises(InvariantError, match="one snapshot at a time"):
        table.begin_snapshot()
    assert table.next_block() is None
    table.begin_snapshot()


def test_numbers_must_rise() -> None:
    both = Tables()
    made = Model(HELD, ((1, 1),), 1, 1, 1, (1, 1), 1, ("", ""))
    both.do("append", 5, made)
    both.last = 4
    with pytest.raises(InvariantError, match="must rise"):
        both.do("append", 1, made)
    with pytest.raises(InvariantError, match="must be in memory"):
        both.table.writable(7)


def test_a_loaded_table_takes_no_second_load() -> None:
    table = ReservationTable()
    table.load([])
    both = Tables()
    both.do("append", 5, Model(HELD, ((1, 1),), 1, 1, 1, (1, 1), 1, ("", "")))
    with pytest.raises(InvariantError, match="empty table"):
        both.table.load([])


@given(st.lists(models, min_size=1, max_size=ROWS_OF_CHUNK))
@tries(200)
def test_a_block_is_a_chunk(made: list[Model]) -> None:
    both = Tables()
    for each in made:
        both.do("append", 3, each)
    [chunk] = both.table.chunks()
    copied = Chunk.from_block(chunk.to_block())
    assert copied.to_block() == chunk.to_block() == chunk.compacted()
    assert (copied.size, copied.alive) == (chunk.size, chunk.alive)


def test_memory_of_a_record_keeps_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns of a full chunk: under 130 bytes a record, a label of a dozen characters included."""
    monkeypatch.setattr(columns, "CHUNK_ROWS", 16_384)
    both = Tables()
    for _ in range(16_384):
        both.table.append(
            both.last + 1,
            HELD,
            ((1, 1), (2, 7)),
            expires_at_ms=1,
            at_ms=1,
            seq=1,
            key_high=1,
            key_low=1,
            digest=1,
            order_ref="SO-4711-0001",
            channel="web",
        )
        both.last += 1
    [chunk] = both.table.chunks()
    size = sum(sys.getsizeof(getattr(chunk, field)) for field in (*columns.FIELDS, "labels"))
    assert size / 16_384 < 130


# --- keys -------------------------------------------------------------------------------------------------------------

halves = st.sampled_from((0, 1, -1, 63, 64, 65, 2**62, -(2**63))) | wide
lows = st.sampled_from((0, 256, 512, -256, 1, 257)) | wide
index_steps = st.lists(st.tuples(st.sampled_from(("add", "add", "remove", "find")), halves, lows), max_size=200)


def found(index: KeyIndex, lows_of_numbers: dict[int, int], key: tuple[int, int]) -> list[int]:
    """The numbers of a key: the candidates whose row has this low half."""
    return [number for number in index.candidates(*key) if lows_of_numbers[number] == key[1]]


@given(index_steps)
@tries(200)
def test_the_index_is_a_dict(story: list[tuple[str, int, int]]) -> None:
    """Equal high halves, equal partitions, deletions in the middle of a chain."""
    index = KeyIndex()
    model: dict[tuple[int, int], int] = {}
    lows_of_numbers: dict[int, int] = {}
    for number, (verb, high, low) in enumerate(story, start=1):
        key = (high, low)
        if verb == "add" and key not in model:
            index.add(high, low, number)
            model[key] = number
            lows_of_numbers[number] = low
        elif verb == "remove" and model:
            chosen = key if key in model else sorted(model)[number % len(model)]
            index.remove(*chosen, model.pop(chosen))
        assert found(index, lows_of_numbers, key) == ([model[key]] if key in model else [])
    assert {key: found(index, lows_of_numbers, key) for key in model} == {key: [each] for key, each in model.items()}
    reloaded = KeyIndex()
    reloaded.load(
        np.array([key[0] for key in model], np.int64),
        np.array([key[1] for key in model], np.int64),
        np.array(list(model.values()), np.int64),
    )
    assert {key: found(reloaded, lows_of_numbers, key) for key in model} == {key: [each] for key, each in model.items()}


@pytest.mark.parametrize("spread", [1, 3, 2**40])
def test_the_index_grows_and_forgets(spread: int) -> None:
    """Thousands in one partition, among them a thousand under one high half; then most leave and others come."""
    index = KeyIndex()
    chance = random.Random(spread)
    model: dict[tuple[int, int], int] = {}
    lows_of_numbers: dict[int, int] = {}
    number = 0
    for round_ in range(3):
        while len(model) < 2_000:
            number += 1
            key = (chance.randrange(spread) if number % 2 else chance.getrandbits(40), number * 256)
            index.add(*key, number)
            model[key] = number
            lows_of_numbers[number] = key[1]
        for key in chance.sample(sorted(model), 1_500 - 400 * round_):
            index.remove(*key, model.pop(key))
            assert found(index, lows_of_numbers, key) == []
    assert all(found(index, lows_of_numbers, key) == [each] for key, each in model.items())


def test_taking_out_what_is_not_there_breaks_an_invariant() -> None:
    index = KeyIndex()
    index.add(1, 0, 5)
    with pytest.raises(InvariantError, match="must be filed under its key"):
        index.remove(1, 0, 6)


@pytest.mark.parametrize("count", [39, 40, 42, 84, 85, 1_365, 2_700, 2_730])
def test_a_steady_count_rarely_lays_the_index_anew(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At counts just below a threshold every other key once laid its whole partition anew."""
    index = KeyIndex()
    chance = random.Random(count)
    keys = [chance.getrandbits(62) for _ in range(count)]
    for number, high in enumerate(keys, start=1):
        index.add(high, 0, number)
    times = 0
    lay_anew = KeyIndex._rebuild

    def counted(self: KeyIndex, part: int, slots: int) -> None:
        nonlocal times
        times += 1
        lay_anew(self, part, slots)

    monkeypatch.setattr(KeyIndex, "_rebuild", counted)
    turns = 2_000
    for turn in range(turns):
        place = turn % count
        index.remove(keys[place], 0, place + 1)
        keys[place] = chance.getrandbits(62)
        index.add(keys[place], 0, place + 1)
    slots = len(index._numbers[0])
    assert times <= 1 + turns * 20 // slots
    assert slots <= max(PARTITION_SLOTS_MIN, count * 4)


# --- expiry -----------------------------------------------------------------------------------------------------------

instants = st.integers(0, 12_000) | st.sampled_from((999, 1_000, 1_001, 1_999, 2_000))
queue_steps = st.lists(
    st.tuples(st.just("add"), instants, st.integers(1, 1_000)) | st.tuples(st.just("due"), instants, st.integers(0, 6)),
    max_size=80,
)


def taken(queue: ExpiryQueue, now_ms: int, count_max: int) -> list[tuple[int, int]]:
    times, numbers = queue.due(now_ms, count_max)
    return list(zip(times.tolist(), numbers.tolist(), strict=True))


@given(st.lists(st.tuples(instants, st.integers(1, 1_000)), max_size=20), queue_steps)
@tries(200)
def test_the_queue_is_a_sorted_list(loaded: list[tuple[int, int]], story: list[tuple[str, int, int]]) -> None:
    queue = ExpiryQueue()
    model = sorted(loaded)
    queue.load(np.array([each[1] for each in loaded], np.int64), np.array([each[0] for each in loaded], np.int64))
    now_ms = 0
    for verb, at_ms, number in story:
        if verb == "add":
            queue.add(number, at_ms)
            model.append((at_ms, number))
            model.sort()
        else:
            now_ms = max(now_ms, at_ms)
            expected = [each for each in model if each[0] <= now_ms][:number]
            assert taken(queue, now_ms, number) == expected
            del model[: len(expected)]
        check_next(queue, model)
    assert taken(queue, 2**62, 2**62) == model
    assert queue.next_ms() is None


def test_what_is_due_at_one_instant_comes_in_order_of_number_whenever_it_was_filed() -> None:
    """A replayed queue is filed in another order and must expire in the same."""
    queue = ExpiryQueue()
    for number in (7, 5):
        queue.add(number, 1_000)
    assert taken(queue, 1_000, 1) == [(1_000, 5)]
    queue.add(3, 1_000)
    assert taken(queue, 1_000, 9) == [(1_000, 3), (1_000, 7)]


def check_next(queue: ExpiryQueue, model: list[tuple[int, int]]) -> None:
    """A lower bound, at most a second off, so that a timer on it is never late."""
    next_ms = queue.next_ms()
    if not model:
        assert next_ms is None
    else:
        assert next_ms is not None
        assert next_ms <= model[0][0] < next_ms + 1_000


# --- counters ---------------------------------------------------------------------------------------------------------


def test_counters_are_found_by_name_and_survive_a_dump() -> None:
    table = CounterTable()
    names = [(f"pool-{pool}", f"2026-12-01T{hour:02}:00-{hour + 1:02}:00") for pool in range(3) for hour in range(20)]
    for place, (pool_id, slot_id) in enumerate(names):
        assert table.append(pool_id, slot_id, place // 20, place * 7) == place
    for place, field in enumerate(COUNTER_FIELDS):
        table.view(field)[:] = np.arange(len(names)) * (place + 1)
    loaded = CounterTable()
    loaded.load(table.dump(), table.pool_id[:], table.slot_id[:])
    for each in (table, loaded):
        assert len(each) == 60
        assert [each.find(*name) for name in names] == list(range(60))
        assert each.find("pool-3", names[0][1]) is None
        assert each.find("pool-0", "2026-12-01T23:00-24:00") is None
        assert len(each.rows_of_pool("pool-1")) == 20
        assert each.rows_of_pool("pool-9") == {}
        assert each.used(3) == each.held[3] + each.confirmed[3] + each.fulfilled[3] > 0
    assert loaded.dump() == table.dump()


def test_a_view_kept_across_an_append_is_an_error_not_a_wrong_number() -> None:
    table = CounterTable()
    table.append("p", "s", 1, 1)
    view = table.view("held")
    with pytest.raises(BufferError):
        table.append("p", "t", 1, 1)
    assert view[0] == 0
