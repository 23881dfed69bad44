"""What a decision answers: outcomes named for the rule they report, and the replies that carry them.

One outcome, one word, from here to the page: `api.problems` maps each to HTTP in one table and a test proves that none is
missing. Rejections are values; nothing here is an exception.
"""

from enum import StrEnum

import msgspec


class Outcome(StrEnum):
    """The rule that decided."""

    HELD = "held"
    CONFIRMED = "confirmed"
    RELEASED = "released"
    EXTENDED = "extended"
    MOVED = "moved"
    FULFILLED = "fulfilled"
    FOUND = "found"
    REPEATED = "repeated"

    INSUFFICIENT_CAPACITY = "insufficient_capacity"
    SLOT_CLOSED = "slot_closed"
    PAST_CUTOFF = "past_cutoff"
    UNKNOWN_POOL = "unknown_pool"
    UNKNOWN_SLOT = "unknown_slot"
    UNKNOWN_RESERVATION = "unknown_reservation"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    HOLD_EXPIRED = "hold_expired"
    HOLD_NOT_CONFIRMED = "hold_not_confirmed"
    EXTENSION_CAP_REACHED = "extension_cap_reached"
    ALREADY_CONFIRMED = "already_confirmed"
    ALREADY_FULFILLED = "already_fulfilled"
    ALREADY_RELEASED = "already_released"
    LINES_NOT_HELD = "lines_not_held"
    PARTICIPANT_SILENT = "participant_silent"
    SHARD_FULL = "shard_full"
    OVERLOADED = "overloaded"
    DEADLINE_PASSED = "deadline_passed"

    PLANNED = "planned"
    PLAN_CONFLICT = "plan_conflict"
    INVALID_SLOT = "invalid_slot"
    POOL_HAS_SLOTS = "pool_has_slots"
    TOO_MANY_POOLS = "too_many_pools"


REFUSALS = frozenset({Outcome.INSUFFICIENT_CAPACITY, Outcome.SLOT_CLOSED, Outcome.PAST_CUTOFF})
"""Outcomes that turn demand away and are counted as `refused` units of a counter."""


class CounterShort(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A counter that stood in the way of a request, as it was at the decision."""

    pool_id: str
    slot_id: str
    quantity: int
    available: int
    reason: Outcome
    cutoff_at_ms: int


class Reply(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=True):
    """Base of all replies. `seq` is the journal's last event when the answer was true."""


class Taken(Reply, frozen=True):
    """A new reservation: the caller knows the lines, so they are not repeated."""

    seq: int
    number: int
    at_ms: int
    expires_at_ms: int


class Record(Reply, frozen=True):
    """A reservation as it is, with the outcome of what was asked."""

    seq: int
    outcome: Outcome
    number: int
    status: int
    version: int
    created_at_ms: int
    changed_at_ms: int
    changed_seq: int
    expires_at_ms: int
    order_ref: str
    channel: str
    lines: list[tuple[str, str, int]]
    late: bool = False


class Refused(Reply, frozen=True):
    """Nothing was done, by this rule. `counters` names those in the way; `detail` is for a person."""

    seq: int
    outcome: Outcome
    counters: list[CounterShort] = []
    detail: str = ""


class Prepared(Reply, frozen=True):
    """A shard has taken what it was asked to prepare, as this part of the reservation."""

    seq: int
    tx: int
    part_number: int


class Synced(Reply, frozen=True):
    """A shard's part is at this version of the reservation."""

    seq: int
    part_number: int
    version: int


class CounterValues(Reply, frozen=True):
    """Counters as they are: for each the values of the read model, in the order of its VALUE_FIELDS."""

    seq: int
    values: list[tuple[int, int, int, int, int, int, int, int, int, int, int, int]]


class Planned(Reply, frozen=True):
    """A plan event has been taken over: the shard has everything up to `planning_seq`."""

    seq: int
    planning_seq: int


class Defined(Reply, frozen=True):
    """The planner has journaled a definition as `planning_seq`; `created` counts the new ones."""

    planning_seq: int
    created: int
    applied: bool


class Status(Reply, frozen=True):
    """How a shard or the planner is doing. Each member is explained in docs/operations.md."""

    seq: int
    values: dict[str, int | str]


ShardReply = Taken | Record | Refused | Prepared | Synced | CounterValues | Planned | Status
PlannerReply = Defined | Refused | Status
