"""The bodies of the HTTP API as types: what is accepted, and what is answered.

Request types are decoded and checked by msgspec in one step: unknown members, wrong types ("1", 1.5, true for a number) and
values out of range are refused with the path of the member. Response types describe what `api.views` builds; OpenAPI is
generated from both, and a test compares real answers with it. All names are those of docs/api.md.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.core import limits
from engine.core.slots import DAYS_BEFORE_MAX, MINUTES_BEFORE_MAX, SLOT_ID_PATTERN

# `$` also matches before a final newline, which a JSON string may hold: the lookahead closes that door.
_END = r"$(?!\n)"
_PRINTABLE = r"^[^\x00-\x1f\x7f]*" + _END

PoolId = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=limits.POOL_ID_CHARS_MAX,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*" + _END,
        description="Letters, digits, dot, underscore and hyphen.",
        examples=["van-north"],
    ),
]
SlotId = Annotated[
    str,
    Meta(
        max_length=limits.SLOT_ID_CHARS_MAX,
        pattern=SLOT_ID_PATTERN.removesuffix("$").replace(r"\d", "[0-9]") + _END,
        description="Local date, start and end in the pool's time zone; an end at or before the start is on the next day.",
        examples=["2026-12-01T18:00-20:00"],
    ),
]
Quantity = Annotated[int, Meta(ge=1, le=limits.QUANTITY_MAX, description="Whole units.", examples=[1])]
QuantitySummed = Annotated[
    int,
    Meta(
        ge=1, le=limits.QUANTITY_MAX * limits.LINES_MAX, description="Whole units, of all lines that name the counter."
    ),
]
Units = Annotated[int, Meta(ge=0, le=limits.UNITS_MAX)]
Label = Annotated[str, Meta(min_length=1, max_length=limits.LABEL_CHARS_MAX, pattern=_PRINTABLE)]
Reason = Annotated[str, Meta(max_length=limits.REASON_CHARS_MAX, pattern=_PRINTABLE)]
TtlSeconds = Annotated[int, Meta(ge=1, le=31_536_000, description="Seconds from now.", examples=[600])]
Instant = Annotated[str, Meta(description="RFC 3339, UTC.", examples=["2026-12-01T17:00:00.000Z"])]
PositionText = Annotated[str, Meta(description="A place in the log. Opaque.", examples=["3-918273"])]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """Base of all request bodies."""


class Line(Request, frozen=True):
    """Units of one counter."""

    pool_id: PoolId
    slot_id: SlotId
    quantity: Quantity


Lines = Annotated[list[Line], Meta(min_length=1, max_length=limits.LINES_MAX)]


class ReservationRequest(Request, frozen=True):
    """Take units of one or several counters, all or nothing. Without ttl_seconds it is confirmed at once."""

    lines: Lines
    order_ref: Annotated[str, Meta(max_length=limits.ORDER_REF_CHARS_MAX, pattern=_PRINTABLE)] = ""
    channel: Annotated[str, Meta(max_length=limits.CHANNEL_CHARS_MAX, pattern=_PRINTABLE)] = ""
    ttl_seconds: TtlSeconds | None = None


class ConfirmRequest(Request, frozen=True):
    """Make a hold permanent. With lines, keep only those quantities and give the rest back."""

    lines: Lines | None = None


class ReleaseRequest(Request, frozen=True):
    """Give the units back."""

    reason: Reason = ""


class ExtendRequest(Request, frozen=True):
    """Let a hold live longer, counted from now, up to the operator's cap; it never gets shorter."""

    ttl_seconds: TtlSeconds


class MoveRequest(Request, frozen=True):
    """Exchange all lines for these in one step; the old units count as free for the check."""

    lines: Lines


class FulfilRequest(Request, frozen=True):
    """The delivery was made."""


class CutoffRule(Request, frozen=True):
    """Either minutes_before the start, or days_before at local_time. Without a rule a slot takes orders until it ends."""

    minutes_before: Annotated[int, Meta(ge=0, le=MINUTES_BEFORE_MAX)] | None = None
    days_before: Annotated[int, Meta(ge=0, le=DAYS_BEFORE_MAX)] | None = None
    local_time: Annotated[str, Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]" + _END, examples=["18:00"])] | None = None


class PoolRequest(Request, frozen=True):
    """A pool: where a kind of capacity is kept apart."""

    capacity_type: Label
    unit: Label
    time_zone: Annotated[str, Meta(min_length=1, max_length=64, pattern=_PRINTABLE, examples=["Europe/Berlin"])]
    zone: Annotated[str, Meta(max_length=limits.LABEL_CHARS_MAX, pattern=_PRINTABLE)] = ""
    cutoff: CutoffRule | None = None
    reason: Reason = ""


class CounterRequest(Request, frozen=True):
    """The planned side of a counter, as a whole: what is left out has its default."""

    base: Annotated[Units, Meta(description="Planned units.", examples=[40])]
    overbook: Annotated[Units, Meta(description="Allowance on top, in units.")] = 0
    buffer: Annotated[Units, Meta(description="Kept back, in units.")] = 0
    closed: Annotated[bool, Meta(description="Takes no new reservations, whatever is left.")] = False
    reason: Reason = ""


class ImportedCounter(Request, frozen=True):
    """One row of an import."""

    pool_id: PoolId
    slot_id: SlotId
    base: Units
    overbook: Units = 0
    buffer: Units = 0
    closed: bool = False


IMPORTED_COUNTERS_MAX = 200_000


class ImportRequest(Request, frozen=True):
    """Define many counters, all or nothing."""

    counters: Annotated[list[ImportedCounter], Meta(min_length=1, max_length=IMPORTED_COUNTERS_MAX)]
    reason: Reason = ""


# --- answers ----------------------------------------------------------------------------------------------------------


class LineAnswer(msgspec.Struct):
    """Units of one counter."""

    pool_id: PoolId
    slot_id: SlotId
    quantity: QuantitySummed


class ReservationAnswer(msgspec.Struct):
    """A reservation as it is. `expires_at` is null unless it is or was a hold."""

    reservation_id: Annotated[str, Meta(examples=["re0301beef"])]
    status: Annotated[str, Meta(pattern="^(held|confirmed|fulfilled|released|expired)$")]
    order_ref: str
    channel: str
    lines: list[LineAnswer]
    expires_at: Instant | None
    created_at: Instant
    updated_at: Instant
    version: int
    position: PositionText
    durability: Annotated[int, Meta(description="On how many hosts it is durable.")]
    late: Annotated[bool, Meta(description="Confirmed after the hold had expired.")] | msgspec.UnsetType = msgspec.UNSET


class PoolAnswer(msgspec.Struct):
    """A pool."""

    pool_id: PoolId
    capacity_type: str
    unit: str
    zone: str
    time_zone: str
    cutoff: CutoffRule | None
    plan_version: int


class PoolsAnswer(msgspec.Struct):
    """All pools."""

    pools: list[PoolAnswer]
    plan_version: int


class CounterAnswer(msgspec.Struct):
    """Everything about a counter."""

    pool_id: PoolId
    slot_id: SlotId
    capacity_type: str
    unit: str
    zone: str
    service_date: str
    starts_at: Instant
    ends_at: Instant
    time_zone: str
    cutoff_at: Instant
    status: Annotated[str, Meta(pattern="^(open|full|closed|past_cutoff|overcommitted)$")]
    base: Units
    overbook: Units
    buffer: Units
    limit: int
    held: Units
    confirmed: Units
    fulfilled: Units
    used: Units
    available: Units
    overcommitted_by: Units
    refused: Units
    utilization: float | None
    plan_version: int
    position: PositionText
    as_of: Instant


class CountersAnswer(msgspec.Struct):
    """Counters in order of pool and time."""

    counters: list[CounterAnswer]
    next_cursor: str | None
    as_of: Instant


class AvailableAnswer(msgspec.Struct):
    """What is left of one counter."""

    pool_id: PoolId
    slot_id: SlotId
    starts_at: Instant
    ends_at: Instant
    cutoff_at: Instant
    status: str
    available: Units
    position: PositionText


class AvailabilityAnswer(msgspec.Struct):
    """What is left, some milliseconds old: `as_of` says how old. Advisory; the answer to a reservation decides."""

    counters: list[AvailableAnswer]
    next_cursor: str | None
    as_of: Instant
    positions: list[PositionText]


class SlotAnswer(msgspec.Struct):
    """A slot for shoppers: no numbers."""

    pool_id: PoolId
    slot_id: SlotId
    starts_at: Instant
    ends_at: Instant
    time_zone: str
    cutoff_at: Instant
    open: bool


class SlotsAnswer(msgspec.Struct):
    """Slots in order of pool and time."""

    slots: list[SlotAnswer]
    next_cursor: str | None
    as_of: Instant


class ImportAnswer(msgspec.Struct):
    """An import that is in force."""

    counters: int
    created: int
    plan_version: int


class EventAnswer(msgspec.Struct):
    """One event of the log. `cursor` goes on after it."""

    position: PositionText
    cursor: str
    event: str
    at: Instant
    data: dict[str, Any]


class EventsAnswer(msgspec.Struct):
    """Events in order within each shard. `next_cursor` goes on after the last one."""

    events: list[EventAnswer]
    next_cursor: str


class ShardAnswer(msgspec.Struct):
    """How one shard is doing."""

    shard: int
    ready: bool
    state: str
    position: PositionText
    heartbeat_age_ms: int
    counters: int
    epoch: int
    restarts: int


class StatusAnswer(msgspec.Struct):
    """How the system is doing, shard by shard."""

    ready: bool
    version: str
    shards: list[ShardAnswer]
    pools: int
    plan_version: int


class CounterShortAnswer(msgspec.Struct):
    """A counter that stood in the way."""

    pool_id: PoolId
    slot_id: SlotId
    quantity: QuantitySummed
    available: Units
    status: str
    cutoff_at: Instant


class AlternativeAnswer(msgspec.Struct):
    """A slot of the same pool that would fit now."""

    pool_id: PoolId
    slot_id: SlotId
    available: Units


class Problem(msgspec.Struct):
    """RFC 9457 problem details. `code` is stable; `outcome` says whether anything was done."""

    type: str
    title: str
    status: int
    code: str
    outcome: Annotated[str, Meta(pattern="^(not_executed|outcome_unknown)$")]
    detail: str | msgspec.UnsetType = msgspec.UNSET
    lines: list[CounterShortAnswer] | msgspec.UnsetType = msgspec.UNSET
    alternatives: list[AlternativeAnswer] | msgspec.UnsetType = msgspec.UNSET
    reservation: ReservationAnswer | msgspec.UnsetType = msgspec.UNSET
    position: PositionText | msgspec.UnsetType = msgspec.UNSET
