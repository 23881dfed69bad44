"""The overview over real read models: order, pages, rows that stay torn, writers that fall silent, pools that change."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from api.overview import REFRESH_MS, Cursor, Overview, Page, ShardNotPublishedError, worker_name
from engine import catalogue_file
from engine.catalogue_file import CatalogueShown, PoolShown
from engine.core.sharding import shard_of_counter
from readmodel import layout
from readmodel.layout import STATE_SERVING, VALUE_FIELDS, TornRowError
from readmodel.publisher import Publisher

SHARDS = 2
HOUR_MS = 3_600_000
POOLS = ("b", "a", "c")
"""In the order of their codes, which is not that of their names."""


class HandClock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.wall_ms = 1_800_000_000_000
        self.boottime_ms = 1_000_000

    def now_ms(self) -> int:
        return self.wall_ms

    def monotonic_ms(self) -> int:
        return self.boottime_ms


class Shown:
    """What workers and the planner show, made by the real writers, and an overview of it."""

    def __init__(self, runtime: Path, stack: ExitStack) -> None:
        self.runtime = runtime
        self.clock = HandClock()
        self.stack = stack
        self.publishers: list[Publisher] = []
        self.overview = Overview(runtime, SHARDS, self.clock)
        self.places: dict[tuple[str, int], tuple[int, int]] = {}
        """Pool and hour -> shard and row."""

    def pools(self, *names: str, version: int = 1) -> None:
        shown = [
            PoolShown(code, name, "logistics", "stop", "", "UTC", None, version) for code, name in enumerate(names)
        ]
        catalogue_file.write(self.runtime, CatalogueShown(version, shown))
        self.clock.boottime_ms += REFRESH_MS

    def publish(self) -> None:
        for shard in range(SHARDS):
            publisher = Publisher(self.runtime, worker_name(shard), epoch=1, restart_count=0)
            self.stack.callback(publisher.close)
            publisher.set_state(STATE_SERVING)
            publisher.heartbeat(self.clock.boottime_ms)
            publisher.set_position(7 + shard, self.clock.wall_ms)
            publisher.switch()
            self.publishers.append(publisher)

    def counter(self, pool_id: str, hour: int, hours: int = 1) -> None:
        slot_id = f"{hour:02d}+{hours}"
        shard = shard_of_counter(pool_id, slot_id, SHARDS)
        values = tuple(hour if field == "limit" else 0 for field in VALUE_FIELDS)
        row = self.publishers[shard].append(
            POOLS.index(pool_id), slot_id.encode(), hour * HOUR_MS, (hour + hours) * HOUR_MS, values
        )
        self.places[pool_id, hour] = shard, row

    def tear(self, pool_id: str, hour: int) -> None:
        """Leave a row as a worker does that is killed while it publishes."""
        shard, row = self.places[pool_id, hour]
        # The version, which stands first in a row, is odd while the row is written.
        self.publishers[shard]._words[layout.HEADER_WORDS + row * layout.ROW_WORDS] += 1

    def select(self, *names: str, **arguments: object) -> Page:
        self.overview.refresh()
        pools = [pool for pool in self.overview.pools.values() if pool.pool_id in (names or POOLS)]
        return self.overview.select(pools, **arguments)  # type: ignore[arg-type]  # handed on as they are

    def names(self, page: Page) -> list[tuple[str, int]]:
        return [
            (self.overview.pool_of_code[place.row.pool_code].pool_id, place.row.starts_at_ms // HOUR_MS)
            for place in page.places
        ]


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    with ExitStack() as stack:
        yield Shown(tmp_path, stack)


@pytest.fixture
def grid(shown: Shown) -> Shown:
    """Three pools of ten hours each."""
    shown.pools(*POOLS)
    shown.publish()
    for hour in (3, 9, 0, 5, 7, 1, 8, 2, 6, 4):
        for name in POOLS:
            shown.counter(name, hour)
    return shown


IN_ORDER = [(name, hour) for name in sorted(POOLS) for hour in range(10)]


def _pages(grid: Shown, limit: int) -> Iterator[tuple[Page, list[tuple[str, int]]]]:
    """Pages as the calls read them: torn rows are asked for and take their places."""
    after = None
    torn_at = {place: name for name, place in grid.places.items()}
    while True:
        page = grid.select(after=after, limit=limit)
        names = sorted(grid.names(page) + [torn_at[torn.shard, torn.number] for torn in page.torn])
        yield page, names
        if not page.more:
            return
        pool_id, hour = names[-1]
        after = Cursor(pool_id, hour * HOUR_MS, (hour + 1) * HOUR_MS)


def test_everything_is_in_order_of_pool_and_time(grid: Shown) -> None:
    page = grid.select()
    assert grid.names(page) == IN_ORDER
    assert not page.more
    assert {place.shard for place in page.places} == {0, 1}
    assert grid.names(grid.select("c", "a")) == [name for name in IN_ORDER if name[0] != "b"]
    assert grid.select("d") == Page([], [], more=False)


def test_slots_that_start_together_come_in_order_of_their_ends(shown: Shown) -> None:
    shown.pools(*POOLS)
    shown.publish()
    for hours in (4, 1, 3, 2):
        shown.counter("a", 5, hours)
    page = shown.select(limit=2)
    assert [place.row.slot_id for place in page.places] == [b"05+1", b"05+2"]
    last = page.places[-1].row
    rest = shown.select(after=Cursor("a", last.starts_at_ms, last.ends_at_ms))
    assert [place.row.slot_id for place in rest.places] == [b"05+3", b"05+4"]


def test_the_span_is_half_open(grid: Shown) -> None:
    page = grid.select("a", starts_from_ms=3 * HOUR_MS, starts_to_ms=5 * HOUR_MS)
    assert grid.names(page) == [("a", 3), ("a", 4)]


@pytest.mark.parametrize("limit", [1, 3, 10, 29, 30, 31])
def test_pages_have_everything_once(grid: Shown, limit: int) -> None:
    pages = list(_pages(grid, limit))
    assert [name for _, names in pages for name in names] == IN_ORDER
    assert all(len(names) == limit for _, names in pages[:-1])


def test_a_cursor_is_a_place_and_need_not_be_a_row(grid: Shown) -> None:
    assert grid.names(grid.select(after=Cursor("a", 4 * HOUR_MS + 1, 0)))[0] == ("a", 5)
    assert grid.names(grid.select(after=Cursor("aa", 0, 0)))[0] == ("b", 0)
    assert grid.names(grid.select(after=Cursor("", 0, 0))) == IN_ORDER
    assert grid.names(grid.select(after=Cursor("c", 2**70, 2**70))) == []
    assert grid.names(grid.select(after=Cursor("d", 0, 0))) == []


@pytest.mark.parametrize("limit", [1, 3, 7, 30])
@pytest.mark.parametrize("torn", [[("a", 0)], [("c", 9)], [("a", 2), ("b", 5), ("b", 6)], IN_ORDER[:10]])
def test_rows_that_stay_torn_have_their_place_in_the_pages(
    grid: Shown, torn: list[tuple[str, int]], limit: int
) -> None:
    for name in torn:
        grid.tear(*name)
    seen, asked = [], []
    for page, names in _pages(grid, limit):
        assert len(names) <= limit
        seen += names
        asked += [name for name in names if name not in grid.names(page)]
    assert seen == IN_ORDER
    assert asked == torn
    shard, row = grid.places[torn[0]]
    with pytest.raises(TornRowError):
        grid.overview.reader(shard).row(row)


def test_a_shard_that_has_shown_nothing_yet(shown: Shown) -> None:
    shown.pools(*POOLS)
    with pytest.raises(ShardNotPublishedError):
        shown.select()
    with pytest.raises(ShardNotPublishedError):
        shown.overview.position(0)
    shown.publish()
    assert shown.select().places == []
    assert [shown.overview.position(shard) for shard in range(SHARDS)] == [7, 8]


def test_counters_are_found_by_name(grid: Shown) -> None:
    grid.overview.refresh()
    for (pool_id, hour), place in grid.places.items():
        pool = grid.overview.pools[pool_id]
        assert grid.overview.find(pool, f"{hour:02d}+1") == place
        assert grid.overview.find(pool, f"{hour:02d}+2")[1] is None
    pool = grid.overview.pools["a"]
    for name in ("", "x" * 40, "\0", "03+1\0"):
        assert grid.overview.find(pool, name)[1] is None


def test_a_restarted_writer_is_followed(grid: Shown) -> None:
    assert len(grid.select().places) == 30
    grid.tear("a", 0)
    grid.places.clear()
    grid.publishers.clear()
    grid.publish()
    assert grid.select().places == []
    grid.counter("a", 0)
    page = grid.select()
    assert grid.names(page) == [("a", 0)]
    assert page.torn == []


def test_as_of_is_now_while_writers_beat_and_stays_behind_when_one_falls_silent(grid: Shown) -> None:
    began_ms = grid.clock.wall_ms
    assert grid.overview.as_of_ms() == began_ms
    grid.clock.wall_ms += 5_000
    grid.clock.boottime_ms += 5_000
    grid.publishers[0].heartbeat(grid.clock.boottime_ms)
    assert grid.overview.as_of_ms([0]) == grid.clock.wall_ms
    assert grid.overview.as_of_ms([1]) == began_ms
    assert grid.overview.as_of_ms() == began_ms
    # A wall clock that was set back does not make what was published true for an earlier time.
    grid.clock.wall_ms = began_ms - 60_000
    assert grid.overview.as_of_ms([1]) <= began_ms


def test_pools_are_looked_for_again_when_they_are_old_or_not_known(shown: Shown) -> None:
    shown.pools("a", version=1)
    shown.overview.refresh()
    shown.pools("a", "b", version=2)
    shown.clock.boottime_ms -= REFRESH_MS
    known = shown.overview.pool("a")
    assert known is not None
    assert known.version == 1
    found = shown.overview.pool("b")
    assert found is not None
    assert (found.version, shown.overview.plan_version) == (2, 2)
    shown.pools("a", "b", version=3)
    known = shown.overview.pool("a")
    assert known is not None
    assert known.version == 3
    assert shown.overview.pool("c") is None
    assert shown.overview.pool_of_code[1].pool_id == "b"
