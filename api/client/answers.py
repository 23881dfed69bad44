"""What the client is given and gives back: lines, plans, reservations, pools, counters, events, status.

Rules
- Members that a newer server adds are passed over; words such as `status` are text, so that a new one is no error.
- All structs are frozen. Instants are aware, in UTC.

Not promised: that what was read is still so; only the answer to a reservation decides.
"""

import datetime as dt
from typing import Annotated, Any

import msgspec
from msgspec import Meta

Instant = Annotated[dt.datetime, Meta(tz=True)]
"""Aware, in UTC."""


class Line(msgspec.Struct, frozen=True):
    """Units of one counter."""

    pool_id: str
    slot_id: str
    quantity: int


LineLike = Line | tuple[str, str, int]
"""A line, or its pool_id, slot_id and quantity."""


class CutoffRule(msgspec.Struct, frozen=True, omit_defaults=True):
    """Either minutes_before the start, or days_before at local_time ("18:00")."""

    minutes_before: int | None = None
    days_before: int | None = None
    local_time: str | None = None


class CounterPlan(msgspec.Struct, frozen=True):
    """One row of an import: the planned side of a counter."""

    pool_id: str
    slot_id: str
    base: int
    overbook: int = 0
    buffer: int = 0
    closed: bool = False


class Reservation(msgspec.Struct, frozen=True):
    """A reservation as it is. `expires_at` is None unless it is or was a hold."""

    reservation_id: str
    status: str
    order_ref: str
    channel: str
    lines: tuple[Line, ...]
    expires_at: Instant | None
    created_at: Instant
    updated_at: Instant
    version: int
    position: str
    durability: int = 1
    late: bool = False
    """Confirmed after the hold had expired."""
    key: str | None = None
    """The key of the call that this answers; None when it was read."""


class Pool(msgspec.Struct, frozen=True):
    """Where a kind of capacity is kept apart."""

    pool_id: str
    capacity_type: str
    unit: str
    zone: str
    time_zone: str
    cutoff: CutoffRule | None
    plan_version: int


class Counter(msgspec.Struct, frozen=True):
    """Everything about a counter. `limit` is base + overbook - buffer, `used` is held + confirmed + fulfilled."""

    pool_id: str
    slot_id: str
    capacity_type: str
    unit: str
    zone: str
    service_date: dt.date
    starts_at: Instant
    ends_at: Instant
    time_zone: str
    cutoff_at: Instant
    status: str
    base: int
    overbook: int
    buffer: int
    limit: int
    held: int
    confirmed: int
    fulfilled: int
    used: int
    available: int
    overcommitted_by: int
    refused: int
    utilization: float | None
    plan_version: int
    position: str
    as_of: Instant


class Available(msgspec.Struct, frozen=True):
    """What is left of one counter. Advisory; the answer to a reservation decides."""

    pool_id: str
    slot_id: str
    starts_at: Instant
    ends_at: Instant
    cutoff_at: Instant
    status: str
    available: int
    position: str


class Slot(msgspec.Struct, frozen=True):
    """A slot for shoppers: no numbers."""

    pool_id: str
    slot_id: str
    starts_at: Instant
    ends_at: Instant
    time_zone: str
    cutoff_at: Instant
    open: bool


class Imported(msgspec.Struct, frozen=True):
    """An import that is in force."""

    counters: int
    created: int
    plan_version: int


class Event(msgspec.Struct, frozen=True):
    """One event of the log."""

    position: str
    event: str
    at: Instant
    data: dict[str, Any]


class ShardStatus(msgspec.Struct, frozen=True):
    """How one shard is doing."""

    shard: int
    ready: bool
    state: str
    position: str
    heartbeat_age_ms: int
    counters: int
    epoch: int
    restarts: int


class Status(msgspec.Struct, frozen=True):
    """How the system is doing, shard by shard."""

    ready: bool
    version: str
    shards: tuple[ShardStatus, ...]
    pools: int
    plan_version: int


class CounterShort(msgspec.Struct, frozen=True):
    """A counter that stood in the way of a request."""

    pool_id: str
    slot_id: str
    quantity: int
    available: int
    status: str
    cutoff_at: Instant


class Alternative(msgspec.Struct, frozen=True):
    """A slot of the same pool that would fit now."""

    pool_id: str
    slot_id: str
    available: int
