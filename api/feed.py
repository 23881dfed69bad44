"""The change feed: the events of all shards, read from the ends of their journals.

Within a shard events come in the order of their numbers, without a gap; between shards they are merged by time. The cursor
names the last event seen of each shard, so a consumer that comes back with it misses nothing and sees nothing twice, whatever
has been restarted in between.

A consumer asks page by page, waits for the next event with `wait_ms`, or has them sent (`text/event-stream`); with `event` it
gets only those of these names, and the cursor passes over the rest.

Reading happens in a thread with connections of its own (`read`); naming counters needs the overview, which belongs to the
api's own thread (`show`).
"""

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from api import views
from api.overview import Overview
from engine import codec
from engine.core import events
from engine.core.columns import STATUS_WORDS
from engine.core.sharding import counter_hash, position_text, reservation_id, reservation_number
from engine.datadir import shard_directory
from engine.journal.tail import JournalReader
from engine.ports import Position

ROWS_AT_ONCE = 64

NAMES = frozenset(str(kind.__struct_config__.tag) for kind in get_args(events.ShardEvent))
"""Every event there is."""


class FeedEvent(NamedTuple):
    """An event and its place."""

    at_ms: int
    shard: int
    seq: int
    event: events.ShardEvent


FeedCursor = tuple[int, ...]
"""The seq of the last event seen, for each shard."""


def start(shards: int) -> FeedCursor:
    """The cursor before the first event."""
    return (0,) * shards


def cursor_text(cursor: FeedCursor) -> str:
    """The opaque form."""
    return ".".join(str(seq) for seq in cursor)


def parse_cursor(text: str, shards: int) -> FeedCursor | None:
    """The cursor of a text, or None where it is none of this system's."""
    parts = text.split(".")
    if len(parts) != shards or not all(part.isascii() and part.isdigit() and len(part) <= 15 for part in parts):
        return None
    return tuple(int(part) for part in parts)


def _events_of(data: Path, shard: int, after_seq: int) -> Iterator[FeedEvent]:
    with JournalReader(shard_directory(data, shard)) as reader:
        holding = reader.row_holding(after_seq + 1)
        if holding is None:
            return
        position = Position(holding.seq - 1, holding.prev_hash)
        while rows := reader.rows(position, rows_max=ROWS_AT_ONCE):
            for row in rows:
                for index, event in enumerate(codec.decode_shard(row)):
                    if row.seq + index > after_seq:
                        yield FeedEvent(row.at_ms, shard, row.seq + index, event)
            position = rows[-1].end


def read(data: Path, cursor: FeedCursor, limit: int) -> list[FeedEvent]:
    """Up to `limit` events after the cursor. Blocking; for a thread."""
    sources = [_events_of(data, shard, seq) for shard, seq in enumerate(cursor)]
    found: list[FeedEvent] = []
    try:
        for event in heapq.merge(*sources, key=lambda event: event[:3]):
            found.append(event)
            if len(found) == limit:
                break
    finally:
        for source in sources:
            source.close()  # type: ignore[attr-defined]  # generators close their readers
    return found


class Page(NamedTuple):
    """Events that may be shown, and the cursor that goes on after all that were looked at."""

    events: list[views.Json]
    cursor: FeedCursor


def news(cursor: FeedCursor, overview: Overview) -> bool:
    """Whether there is anything after the cursor. One look into shared memory. Raises ShardNotPublishedError."""
    return any(overview.position(shard) > seq for shard, seq in enumerate(cursor))


def show(found: list[FeedEvent], cursor: FeedCursor, overview: Overview, wanted: frozenset[str] | None) -> Page:
    """The events whose names are wanted (None: all), as JSON. Raises ShardNotPublishedError."""
    overview.refresh()
    # The journal is a step ahead of the overview, which alone can name counters: what it does not show yet waits.
    shown_to = {shard: overview.position(shard) for shard in {event.shard for event in found}}
    seen = list(cursor)
    shown = []
    for event in found:
        if event.seq > shown_to[event.shard]:
            continue
        seen[event.shard] = event.seq
        name = event.event.__struct_config__.tag
        if wanted is None or name in wanted:
            shown.append(
                {
                    "position": position_text(event.shard, event.seq),
                    "cursor": cursor_text(tuple(seen)),
                    "event": name,
                    "at": views.instant(event.at_ms),
                    "data": _data(event, overview),
                }
            )
    return Page(shown, tuple(seen))


def _counter(overview: Overview, shard: int, number: int) -> views.Json:
    reader = overview.reader(shard)
    reader.rows_of_pool(0)  # takes rows that are new into the index
    identity = reader.identity(number)
    pool = overview.pool_of_code.get(identity.pool_code)
    if pool is None:
        overview.refresh(now=True)
        pool = overview.pool_of_code[identity.pool_code]
    return {"pool_id": pool.pool_id, "slot_id": identity.slot_id.decode()}


def _data(found: FeedEvent, overview: Overview) -> views.Json:
    """What an event says, with names in place of numbers."""
    event, shard = found.event, found.shard

    def lines(units: list[tuple[int, int]]) -> list[views.Json]:
        return [{**_counter(overview, shard, number), "quantity": quantity} for number, quantity in units]

    def parts(elsewhere: list[events.PartUnits]) -> list[views.Json]:
        return [
            {"pool_id": pool_id, "slot_id": slot_id, "quantity": quantity}
            for _, _, named in elsewhere
            for pool_id, slot_id, quantity in named
        ]

    match event:
        case events.Held() | events.ConfirmedAtOnce():
            named = lines(event.lines)
            first = named[0]
            number = reservation_number(found.seq, counter_hash(first["pool_id"], first["slot_id"]))
            data: views.Json = {
                "reservation_id": reservation_id(number),
                "order_ref": event.order_ref,
                "channel": event.channel,
                "lines": named,
            }
            data["lines"] += parts(event.parts)
            if isinstance(event, events.Held):
                data["expires_at"] = views.instant(event.expires_at_ms)
            return data
        case events.Confirmed():
            data = {"reservation_id": reservation_id(event.number), "late": event.late}
            if event.kept is not None or event.parts is not None:
                data["lines"] = lines(event.kept or []) + parts(event.parts or [])
            return data
        case events.Released():
            return {"reservation_id": reservation_id(event.number), "reason": event.reason}
        case events.Extended():
            return {
                "reservation_id": reservation_id(event.number),
                "expires_at": views.instant(event.expires_at_ms),
            }
        case events.Moved():
            return {
                "reservation_id": reservation_id(event.number),
                "lines": lines(event.lines) + parts(event.parts or []),
            }
        case events.Fulfilled():
            return {"reservation_id": reservation_id(event.number)}
        case events.Expired():
            return {
                "reservations": [
                    {"reservation_id": reservation_id(number), "expired_at": views.instant(at_ms)}
                    for number, at_ms in zip(event.numbers, event.expired_at_ms, strict=True)
                ]
            }
        case events.PartPrepared():
            return {"home_shard": event.home_shard, "attempt": event.tx, "lines": lines(event.lines)}
        case events.PartSynced():
            return {
                "reservation_id": reservation_id(event.number) if event.number else None,
                "version": event.version,
                "status": STATUS_WORDS[event.status],
                "lines": lines(event.lines),
            }
        case events.PartsSettled():
            return {"reservation_id": reservation_id(event.number), "version": event.version}
        case events.Refused():
            return {
                "reason": event.reason,
                "order_ref": event.order_ref,
                "counters": [
                    {**_counter(overview, shard, number), "quantity": quantity, "available": left}
                    for number, quantity, left in event.counters
                ],
            }
        case events.PoolDefined():
            return {
                "pool_id": event.pool_id,
                "time_zone": event.time_zone,
                "cutoff": views.cutoff_rule(event.cutoff),
                "plan_version": event.planning_seq,
            }
        case events.CountersDefined():
            return {"plan_version": event.planning_seq, "counters": [_planned(overview, row) for row in event.counters]}
        case events.TermStarted():
            return {"epoch": event.epoch, "restart": event.restart}
        case events.Forgotten():
            return {"before": views.instant(event.before_ms)}


def _planned(overview: Overview, row: tuple[int, str, int, int, int, bool, int, int, int]) -> views.Json:
    pool_code, slot_id, base, overbook, buffer, closed, starts_at_ms, ends_at_ms, cutoff_at_ms = row
    if pool_code not in overview.pool_of_code:
        overview.refresh(now=True)
    return {
        "pool_id": overview.pool_of_code[pool_code].pool_id,
        "slot_id": slot_id,
        "base": base,
        "overbook": overbook,
        "buffer": buffer,
        "closed": closed,
        "starts_at": views.instant(starts_at_ms),
        "ends_at": views.instant(ends_at_ms),
        "cutoff_at": views.instant(cutoff_at_ms),
    }
