"""The overview: all counters of all shards, from shared memory, without asking or delaying anybody.

One reader for each shard's read model and the planner's file of pools. Rows come out whole or not at all: a row that stays
torn because its writer died is named, and the caller asks the worker.

Order of everything listed: pool_id, start, end. A page ends at a place in that order, and the cursor is that place, so a
page is right whatever was defined or changed in between.

Not promised: that two counters are of the same instant. The overview is advisory; the answer to a reservation decides.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.catalogue_file import CatalogueReader, PoolShown
from engine.core.sharding import shard_of_counter
from engine.ports import Clock
from readmodel.layout import VALUE_FIELDS, NotPublishedError
from readmodel.reader import Header, Reader, Row

REFRESH_MS = 50
"""How old the list of pools may be where it only adds to an answer, and nobody names a pool that is not in it."""

HEARTBEAT_AGE_MS_MAX = 1_000
"""A writer beats ten times a second: silent for longer, it is dead, frozen or starved."""

ROWS_MAX = 4_000_000
_VALUES = len(VALUE_FIELDS)


class ShardNotPublishedError(Exception):
    """A shard has shown nothing yet since the host started: its worker is still loading."""


class Place(NamedTuple):
    """A row and the shard it is of."""

    shard: int
    row: Row


class TornPlace(NamedTuple):
    """A row that stayed torn."""

    shard: int
    number: int


class Cursor(NamedTuple):
    """The last place of a page."""

    pool_id: str
    starts_at_ms: int
    ends_at_ms: int


class Page(NamedTuple):
    """Rows in order, those of the page that stayed torn, and whether more follow."""

    places: list[Place]
    torn: list[TornPlace]
    more: bool


def worker_name(shard: int) -> str:
    """The name of a shard's read model."""
    return f"shard-{shard:02d}"


class Overview:
    """What the workers and the planner show."""

    def __init__(self, runtime: Path, shards: int, clock: Clock) -> None:
        self._runtime = runtime
        self._readers: list[Reader | None] = [None] * shards
        self._clock = clock
        self._catalogue = CatalogueReader(runtime)
        self._refreshed_ms = 0

    def refresh(self, *, now: bool = False) -> None:
        """Look for changed pools, if that has not been done just before."""
        monotonic_ms = self._clock.monotonic_ms()
        if now or monotonic_ms - self._refreshed_ms >= REFRESH_MS:
            self._refreshed_ms = monotonic_ms
            self._catalogue.refresh()

    @property
    def pools(self) -> dict[str, PoolShown]:
        """The pools by id."""
        return self._catalogue.pools

    @property
    def pool_of_code(self) -> dict[int, PoolShown]:
        """The pools by code."""
        return self._catalogue.pool_of_code

    @property
    def plan_version(self) -> int:
        """Up to which change the pools are shown."""
        return self._catalogue.planning_seq

    def pool(self, pool_id: str) -> PoolShown | None:
        """A pool; one that is not known is looked for at once."""
        self.refresh()
        found = self._catalogue.pools.get(pool_id)
        if found is None:
            self.refresh(now=True)
            found = self._catalogue.pools.get(pool_id)
        return found

    def reader(self, shard: int) -> Reader:
        """The reader of a shard. Raises ShardNotPublishedError."""
        reader = self._readers[shard]
        if reader is None:
            try:
                reader = self._readers[shard] = Reader(self._runtime, worker_name(shard))
            except NotPublishedError as error:
                raise ShardNotPublishedError(str(error)) from error
        return reader

    def position(self, shard: int) -> int:
        """Up to which seq a shard's rows are shown. Raises ShardNotPublishedError."""
        reader = self.reader(shard)
        reader.refresh()
        return reader.position().seq

    def header(self, shard: int) -> Header:
        """How a shard's writer is. Raises ShardNotPublishedError."""
        reader = self.reader(shard)
        reader.refresh()
        return reader.header()

    def as_of_ms(self, shards: Iterable[int] | None = None) -> int:
        """The wall time that the rows of these shards (all) are true for, at least."""
        now_ms, monotonic_ms = self._clock.now_ms(), self._clock.monotonic_ms()
        oldest = now_ms
        for shard in range(len(self._readers)) if shards is None else shards:
            header = self.header(shard)
            silent_ms = max(0, monotonic_ms - header.heartbeat_boottime_ms)
            oldest = min(oldest, max(now_ms - silent_ms, header.published_at_ms))
        return oldest

    def find(self, pool: PoolShown, slot_id: str) -> tuple[int, int | None]:
        """Shard and row number of a counter. Raises ShardNotPublishedError."""
        shard = shard_of_counter(pool.pool_id, slot_id, len(self._readers))
        return shard, self.reader(shard).find(pool.code, slot_id.encode())

    def select(
        self,
        pools: list[PoolShown],
        starts_from_ms: int | None = None,
        starts_to_ms: int | None = None,
        *,
        after: Cursor | None = None,
        limit: int = ROWS_MAX,
    ) -> Page:
        """The counters of these pools that start in the half-open span, in order. Raises ShardNotPublishedError."""
        pools = sorted(pools, key=lambda pool: pool.pool_id)
        if after is not None:
            pools = [pool for pool in pools if pool.pool_id >= after.pool_id]
        if not pools:
            return Page([], [], more=False)
        codes = np.array([pool.code for pool in pools], np.int64)
        torn: list[TornPlace] = []
        torn_identities: list[tuple[int, int, int]] = []
        parts, shards = [], []
        for shard in range(len(self._readers)):
            reader = self.reader(shard)
            found = reader.select(codes.tolist(), starts_from_ms, starts_to_ms, ROWS_MAX)
            parts.append(found.counters)
            shards.append(np.full(len(found.counters), shard))
            for number in found.torn.tolist():
                identity = reader.identity(number)
                torn.append(TornPlace(shard, number))
                torn_identities.append((identity.pool_code, identity.starts_at_ms, identity.ends_at_ms))
        rows, shard_of = np.concatenate(parts), np.concatenate(shards)
        # A torn row has its place in the order like any other: what it is called cannot be torn. They come after the rows.
        names = np.array(torn_identities, np.int64).reshape(-1, 3)
        pool_codes = np.concatenate((rows["pool_code"], names[:, 0]))
        starts = np.concatenate((rows["starts_at_ms"], names[:, 1]))
        ends = np.concatenate((rows["ends_at_ms"], names[:, 2]))
        rank = np.empty(int(codes.max()) + 1, np.int64)
        rank[codes] = np.arange(len(codes))
        ranks = rank[pool_codes]
        order = np.lexsort((ends, starts, ranks))
        if after is not None and pools[0].pool_id == after.pool_id:
            later = (starts > after.starts_at_ms) | ((starts == after.starts_at_ms) & (ends > after.ends_at_ms))
            order = order[((ranks > 0) | later)[order]]
        more = len(order) > limit
        order = order[:limit]
        whole = order[order < len(rows)]
        places = [
            Place(shard, _row(fields))
            for shard, fields in zip(shard_of[whole].tolist(), rows[whole].tolist(), strict=True)
        ]
        return Page(places, [torn[index - len(rows)] for index in order[order >= len(rows)].tolist()], more)


def _row(fields: tuple[int | bytes, ...]) -> Row:
    """A row of `layout.ROW` without its check words."""
    return Row._make(fields[: 1 + _VALUES] + fields[2 + _VALUES : 6 + _VALUES])
