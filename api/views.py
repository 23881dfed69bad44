"""From integers to JSON objects: the answers of the API, built from rows of the read model and from replies.

Pure functions. Units are integers, instants RFC 3339 in UTC with milliseconds; a counter's status follows from its numbers
and the time, in this order: closed, past_cutoff, overcommitted, full, open.
"""

import datetime as dt
from functools import lru_cache
from typing import Any, NamedTuple

from engine.catalogue_file import PoolShown
from engine.core.columns import STATUS_WORDS
from engine.core.outcomes import CounterShort, Outcome, Record
from engine.core.sharding import position_text, reservation_id
from readmodel.reader import Row

Json = dict[str, Any]

STATUS_OF_REASON = {
    Outcome.SLOT_CLOSED: "closed",
    Outcome.PAST_CUTOFF: "past_cutoff",
    Outcome.INSUFFICIENT_CAPACITY: "full",
}


@lru_cache(maxsize=4096)
def _second(seconds: int) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S")


def instant(at_ms: int) -> str:
    """RFC 3339, UTC, milliseconds."""
    seconds, milliseconds = divmod(at_ms, 1000)
    return f"{_second(seconds)}.{milliseconds:03d}Z"


def reservation(
    shard: int,
    number: int,
    status: int,
    *,
    order_ref: str,
    channel: str,
    lines: list[tuple[str, str, int]],
    expires_at_ms: int,
    created_at_ms: int,
    changed_at_ms: int,
    version: int,
    changed_seq: int,
) -> Json:
    """A reservation. `position` is that of its last change."""
    return {
        "reservation_id": reservation_id(number),
        "status": STATUS_WORDS[status],
        "order_ref": order_ref,
        "channel": channel,
        "lines": [
            {"pool_id": pool_id, "slot_id": slot_id, "quantity": quantity} for pool_id, slot_id, quantity in lines
        ],
        "expires_at": instant(expires_at_ms) if expires_at_ms else None,
        "created_at": instant(created_at_ms),
        "updated_at": instant(changed_at_ms),
        "version": version,
        "position": position_text(shard, changed_seq),
        "durability": 1,
    }


def reservation_of_record(shard: int, record: Record) -> Json:
    """A reservation from a worker's reply."""
    body = reservation(
        shard,
        record.number,
        record.status,
        order_ref=record.order_ref,
        channel=record.channel,
        lines=record.lines,
        expires_at_ms=record.expires_at_ms,
        created_at_ms=record.created_at_ms,
        changed_at_ms=record.changed_at_ms,
        version=record.version,
        changed_seq=record.changed_seq,
    )
    if record.late:
        body["late"] = True
    return body


def counter_short(short: CounterShort) -> Json:
    """A counter that stood in the way."""
    return {
        "pool_id": short.pool_id,
        "slot_id": short.slot_id,
        "quantity": short.quantity,
        "available": short.available,
        "status": STATUS_OF_REASON[short.reason],
        "cutoff_at": instant(short.cutoff_at_ms),
    }


class Numbers(NamedTuple):
    """What follows from a counter's columns."""

    used: int
    available: int
    overcommitted_by: int
    status: str


def numbers(row: Row, now_ms: int) -> Numbers:
    """Used, left, over, and the status."""
    used = row.held + row.confirmed + row.fulfilled
    available = max(0, row.limit - used)
    over = max(0, used - row.limit)
    if row.flags & 1:
        status = "closed"
    elif now_ms >= row.cutoff_at_ms:
        status = "past_cutoff"
    elif over:
        status = "overcommitted"
    elif not available:
        status = "full"
    else:
        status = "open"
    return Numbers(used, available, over, status)


def counter(pool: PoolShown, shard: int, row: Row, now_ms: int, as_of_ms: int) -> Json:
    """Everything about a counter."""
    derived = numbers(row, now_ms)
    slot_id = row.slot_id.decode()
    return {
        "pool_id": pool.pool_id,
        "slot_id": slot_id,
        "capacity_type": pool.capacity_type,
        "unit": pool.unit,
        "zone": pool.zone,
        "service_date": slot_id[:10],
        "starts_at": instant(row.starts_at_ms),
        "ends_at": instant(row.ends_at_ms),
        "time_zone": pool.time_zone,
        "cutoff_at": instant(row.cutoff_at_ms),
        "status": derived.status,
        "base": row.base,
        "overbook": row.overbook,
        "buffer": row.buffer,
        "limit": row.limit,
        "held": row.held,
        "confirmed": row.confirmed,
        "fulfilled": row.fulfilled,
        "used": derived.used,
        "available": derived.available,
        "overcommitted_by": derived.overcommitted_by,
        "refused": row.refused,
        "utilization": round(derived.used / row.base, 4) if row.base else None,
        "plan_version": row.plan_version,
        "position": position_text(shard, row.seq),
        "as_of": instant(as_of_ms),
    }


def available(pool: PoolShown, shard: int, row: Row, now_ms: int) -> Json:
    """What is left of a counter; nothing where it takes no orders."""
    derived = numbers(row, now_ms)
    return {
        "pool_id": pool.pool_id,
        "slot_id": row.slot_id.decode(),
        "starts_at": instant(row.starts_at_ms),
        "ends_at": instant(row.ends_at_ms),
        "cutoff_at": instant(row.cutoff_at_ms),
        "status": derived.status,
        "available": derived.available if derived.status == "open" else 0,
        "position": position_text(shard, row.seq),
    }


def slot(pool: PoolShown, row: Row, now_ms: int) -> Json:
    """A slot for shoppers: open or not, no numbers."""
    return {
        "pool_id": pool.pool_id,
        "slot_id": row.slot_id.decode(),
        "starts_at": instant(row.starts_at_ms),
        "ends_at": instant(row.ends_at_ms),
        "time_zone": pool.time_zone,
        "cutoff_at": instant(row.cutoff_at_ms),
        "open": numbers(row, now_ms).status == "open",
    }


def cutoff_rule(cutoff: tuple[int | None, int | None, int | None] | None) -> Json | None:
    """A cut-off rule as it was sent."""
    if cutoff is None:
        return None
    minutes_before, days_before, local_minute = cutoff
    if minutes_before is not None:
        return {"minutes_before": minutes_before}
    hour, minute = divmod(local_minute or 0, 60)
    return {"days_before": days_before, "local_time": f"{hour:02d}:{minute:02d}"}


def pool(shown: PoolShown) -> Json:
    """A pool."""
    return {
        "pool_id": shown.pool_id,
        "capacity_type": shown.capacity_type,
        "unit": shown.unit,
        "zone": shown.zone,
        "time_zone": shown.time_zone,
        "cutoff": cutoff_rule(shown.cutoff),
        "plan_version": shown.version,
    }
