"""The reader: rows, the index, selections against a plain loop over the same counters."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from readmodel import layout
from readmodel.layout import NO_CUTOFF, TornRowError
from readmodel.publisher import Publisher
from readmodel.reader import SELECT_BLOCK_ROWS, Identity, Reader, Row


def publisher_with(directory: Path, pools: list[int], *, switch: bool = True) -> Publisher:
    """Row n belongs to pools[n], starts at 10 n and has n in each value."""
    publisher = Publisher(directory, "m", epoch=1, restart_count=0)
    for row, pool in enumerate(pools):
        publisher.append(pool, b"slot-%d" % row, 10 * row, 10 * row + 10, (row,) * layout.VALUES)
    if switch:
        publisher.switch()
    return publisher


def test_a_row_comes_back_as_it_was_published(tmp_path: Path) -> None:
    publisher = publisher_with(tmp_path, [])
    slot_id = "2026-12-01T18:00-20:00 é".encode()
    publisher.append(4, slot_id, 100, 200, (41, 40, 2, 1, 3, 30, 0, 5, 6, NO_CUTOFF, 918_270, 17))
    reader = Reader(tmp_path, "m")
    expected = Row(
        version=2,
        limit=41,
        base=40,
        overbook=2,
        buffer=1,
        held=3,
        confirmed=30,
        fulfilled=0,
        refused=5,
        flags=6,
        cutoff_at_ms=NO_CUTOFF,
        seq=918_270,
        plan_version=17,
        pool_code=4,
        slot_id=slot_id,
        starts_at_ms=100,
        ends_at_ms=200,
    )
    assert reader.row(0) == expected
    counter = reader.select([4], None, None, 1).counters[0]
    assert {name: counter[name] for name in expected._fields} == expected._asdict()
    assert reader.identity(0) == Identity(4, slot_id, 100, 200)
    with pytest.raises(IndexError):
        reader.row(1)
    with pytest.raises(IndexError):
        reader.row(-1)
    with pytest.raises(IndexError):
        reader.identity(1)
    publisher.close()


def test_find_sees_rows_appended_since(tmp_path: Path) -> None:
    chance = random.Random(1)
    publisher = publisher_with(tmp_path, [])
    reader = Reader(tmp_path, "m")
    counters: list[tuple[int, bytes]] = []
    while len(counters) < 5_000:
        for _ in range(chance.choice((1, 2, 700))):
            counter = (len(counters) % 50, b"slot-%d" % (len(counters) // 50))
            publisher.append(*counter, 0, 1, (0,) * layout.VALUES)
            counters.append(counter)
        for row in (len(counters) - 1, chance.randrange(len(counters))):
            assert reader.find(*counters[row]) == row
    assert [reader.find(*counter) for counter in counters] == list(range(len(counters)))
    for pool in range(50):
        assert reader.rows_of_pool(pool).tolist() == list(range(pool, len(counters), 50))
    assert reader.statistics().index_size < 60 * len(counters)
    publisher.close()


@pytest.mark.parametrize(
    ("pool", "slot_id"),
    [(1, b"slot-0"), (0, b"slot"), (0, b""), (0, b"slot-0\0"), (-1, b"slot-0"), (0, b"slot-0" + b"x" * 30)],
)
def test_what_is_not_there_is_not_found(tmp_path: Path, pool: int, slot_id: bytes) -> None:
    publisher = publisher_with(tmp_path, [0])
    reader = Reader(tmp_path, "m")
    assert reader.find(0, b"slot-0") == 0
    assert reader.find(pool, slot_id) is None
    publisher.close()


def test_neighbouring_pools_do_not_make_long_runs_in_the_table(tmp_path: Path) -> None:
    """The hash of one slot in pools 0, 1, 2 … is n, n + 1, n + 2 …: unspread, each slot would be one run of 1,000."""
    count = 16_000
    rows = np.arange(count)
    publisher = publisher_with(tmp_path, [])
    slot_ids = np.array([b"slot-%d" % (row // 1000) for row in range(count)])
    publisher.append_many(rows % 1000, slot_ids, rows, rows, np.zeros((count, layout.VALUES), dtype=np.int64))
    reader = Reader(tmp_path, "m")
    assert reader.find(999, b"slot-15") == count - 1
    taken = "".join("x" if row >= 0 else " " for row in reader._table.tolist())
    assert max(map(len, taken.split())) < 100
    publisher.close()


pool_lists = st.lists(st.integers(0, 5), max_size=60)
instants = st.none() | st.integers(-20, 620)


@settings(deadline=None)
@given(
    pools=pool_lists,
    wanted=st.none() | st.lists(st.integers(0, 7), max_size=5),
    starts_from=instants,
    starts_to=instants,
    limit=st.integers(1, 70),
    first=st.integers(0, 70),
)
def test_a_selection_is_what_a_plain_loop_selects(
    tmp_path_factory: pytest.TempPathFactory,
    pools: list[int],
    wanted: list[int] | None,
    starts_from: int | None,
    starts_to: int | None,
    limit: int,
    first: int,
) -> None:
    directory = tmp_path_factory.mktemp("rm")
    publisher = publisher_with(directory, pools)
    publisher.set_position(5, 6)
    expected = [
        row
        for row, pool in enumerate(pools)
        if (wanted is None or pool in wanted)
        and (starts_from is None or 10 * row >= starts_from)
        and (starts_to is None or 10 * row < starts_to)
        and row >= first
    ]
    selection = Reader(directory, "m").select(wanted, starts_from, starts_to, limit, first_row=first)
    assert selection.rows.tolist() == expected[:limit]
    assert selection.counters["held"].tolist() == expected[:limit]
    assert selection.counters["slot_id"].tolist() == [b"slot-%d" % row for row in expected[:limit]]
    assert selection.torn.tolist() == []
    assert selection.next_row == (expected[limit] if len(expected) > limit else None)
    assert selection.position == (5, 6)
    publisher.close()


def test_paging_visits_each_row_once(tmp_path: Path) -> None:
    publisher = publisher_with(tmp_path, [0, 1] * 50)
    reader = Reader(tmp_path, "m")
    seen: list[int] = []
    first: int | None = 0
    while first is not None:
        page = reader.select([1], None, None, 7, first_row=first)
        seen += page.rows.tolist()
        first = page.next_row
    assert seen == list(range(1, 100, 2))
    with pytest.raises(ValueError, match="limit_rows"):
        reader.select(None, None, None, 0)
    publisher.close()


def test_a_selection_over_several_blocks(tmp_path: Path) -> None:
    count = 2 * SELECT_BLOCK_ROWS + 3
    rows = np.arange(count)
    publisher = publisher_with(tmp_path, [])
    values = np.repeat(rows[:, None], layout.VALUES, axis=1)
    publisher.append_many(rows % 3, np.array([b"%d" % row for row in range(count)]), rows, rows, values)
    reader = Reader(tmp_path, "m")
    assert (reader.select(None, None, None, count).counters["seq"] == rows).all()
    publisher._versions[[0, count - 1]] += 1
    selection = reader.select(None, None, None, count)
    assert selection.torn.tolist() == [0, count - 1]
    assert (selection.counters["seq"] == rows[1:-1]).all()
    publisher.close()


def test_selections_are_copies(tmp_path: Path) -> None:
    publisher = publisher_with(tmp_path, [0, 0])
    reader = Reader(tmp_path, "m")
    selection = reader.select(None, None, None, 2)
    rows = reader.rows_of_pool(0)
    publisher.publish(0, (99,) * layout.VALUES)
    publisher.append(0, b"third", 0, 1, (0,) * layout.VALUES)
    assert reader.find(0, b"third") == 2
    reader.close()
    assert selection.counters["held"].tolist() == [0, 1]
    assert rows.tolist() == [0, 1]
    publisher.close()


@pytest.mark.parametrize("word", [*range(layout.CHECK_WORD + 1)])
def test_any_word_that_does_not_fit_the_check_makes_a_row_torn(tmp_path: Path, word: int) -> None:
    """What a weakly ordered processor could show: versions equal and even, one store missing."""
    publisher = publisher_with(tmp_path, [0, 0])
    reader = Reader(tmp_path, "m")
    publisher._rows[1, word] += 2
    with pytest.raises(TornRowError):
        reader.row(1)
    assert reader.select(None, None, None, 2).torn.tolist() == [1]
    publisher._rows[1, word] -= 2
    assert reader.row(1).held == 1
    assert reader.select(None, None, None, 2).torn.tolist() == []
    publisher.close()


@pytest.mark.parametrize("version", [0, 3])
def test_a_row_in_the_making_is_torn_whatever_its_check_says(tmp_path: Path, version: int) -> None:
    publisher = publisher_with(tmp_path, [0, 0])
    reader = Reader(tmp_path, "m")
    publisher._rows[1, 0] = version
    publisher._rows[1, layout.CHECK_WORD] = layout.expected_checks(publisher._rows[1:2])[0]
    with pytest.raises(TornRowError):
        reader.row(1)
    reader._given_up.clear()
    assert reader.select(None, None, None, 2).torn.tolist() == [1]
    publisher.close()


class Interloper:
    """A view of versions behind which something happens right after the first look or right before the second."""

    def __init__(self, real: Any, happens: Callable[[], None], *, after_copy: bool) -> None:
        self._real, self._happens, self._after_copy, self._looks = real, happens, after_copy, 0

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, int) and at < layout.HEADER_WORDS:
            return self._real[at]
        self._looks += 1
        if self._after_copy and self._looks == 2:
            self._happens()
        value = self._real[at]
        if not self._after_copy and self._looks == 1:
            self._happens()
        return value


@pytest.mark.parametrize("after_copy", [False, True])
@pytest.mark.parametrize("vectorised", [False, True])
def test_a_publish_during_a_copy_makes_it_read_again(tmp_path: Path, *, vectorised: bool, after_copy: bool) -> None:
    publisher = publisher_with(tmp_path, [0, 0])
    reader: Any = Reader(tmp_path, "m")
    reader.find(0, b"slot-0")
    real = reader._words, reader._versions

    def publish() -> None:
        publisher.publish(1, (77,) * layout.VALUES)

    if vectorised:
        reader._versions = Interloper(real[1], publish, after_copy=after_copy)
        assert reader.select(None, None, None, 2).counters["held"].tolist() == [0, 77]
    else:
        reader._words = Interloper(real[0], publish, after_copy=after_copy)
        assert reader.row(1).held == 77
    assert reader.statistics().torn_reads == 1
    reader._words, reader._versions = real
    publisher.close()


def test_a_row_never_written_is_not_returned(tmp_path: Path) -> None:
    publisher = publisher_with(tmp_path, [0, 0])
    reader = Reader(tmp_path, "m")
    publisher._rows[1, : layout.CHECK_WORD + 1] = 0
    with pytest.raises(TornRowError):
        reader.row(1)
    publisher.close()


def test_a_row_counted_before_its_identity_is_seen_is_not_indexed(tmp_path: Path) -> None:
    publisher = publisher_with(tmp_path, [0, 1, 2])
    reader = Reader(tmp_path, "m")
    publisher._rows[1, layout.STARTS_WORD] += 1
    with pytest.raises(TornRowError, match=r"row 1 of .* has no identity"):
        reader.find(2, b"slot-2")
    publisher._rows[1, layout.STARTS_WORD] -= 1
    assert reader.find(2, b"slot-2") == 2
    publisher.close()


def test_the_index_is_kept_over_a_restart_in_the_same_order_and_dropped_otherwise(tmp_path: Path) -> None:
    first = publisher_with(tmp_path, [0, 1, 2])
    reader = Reader(tmp_path, "m")
    assert reader.find(2, b"slot-2") == 2
    table = reader._table
    same = publisher_with(tmp_path, [0, 1, 2, 3])
    assert reader.refresh()
    assert reader.statistics().rows_indexed == 3
    assert reader._table is table
    assert reader.find(3, b"slot-3") == 3
    other = publisher_with(tmp_path, [2, 1, 0, 3])
    assert reader.refresh()
    assert reader.statistics().rows_indexed == 0
    assert reader.find(2, b"slot-0") == 0
    shorter = publisher_with(tmp_path, [2])
    assert reader.find(2, b"slot-0") == 0
    assert reader.statistics().rows_indexed == 1
    assert reader.find(1, b"slot-1") is None
    assert reader.statistics().moves == 3
    for publisher in (first, same, other, shorter):
        publisher.close()
