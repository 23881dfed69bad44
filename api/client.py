"""A client for order services: `Client` blocks, `AsyncClient` runs on trio. Both end each call in an answer or in the truth.

    with Client("http://127.0.0.1:7411") as slotkeeper:
        held = slotkeeper.hold([("van-north", "2027-12-01T18:00-20:00", 1)], order_ref="SO-4711", ttl_seconds=600)
        slotkeeper.confirm(held.reservation_id)

Theory of operation
- The core is pure. A call is a value (`_Call`); `_insist` is a generator that says what to do next (try, pause) and is told how
  it ended; `_Exchange` turns bytes into an ending. The two faces own sockets and clocks and decide nothing.
- A key is made before the first send and goes with every try, so that the server does once what it is asked ten times. The
  key is on the answer and on every exception: who keeps it can go on later, in another process too.
- A try ends in one of four ways: answered, not connected, lost (the whole request may have arrived, or cannot have), or not
  understood. From these alone follows whether anything may have been done.

Rules
- `NotExecuted` means that no try can have been executed. Otherwise it is `OutcomeUnknown`, also where the last try was refused
  for want of a shard: an earlier one may have been executed. Reading changes nothing and is never unknown.
- A refusal (4xx) is never retried. One that follows a try whose outcome is unknown says so: `maybe_executed`.
- Retries wait: full jitter below a doubling ceiling, after what Retry-After says, within the deadline of the call and the
  retry budget of the process. One kind does not wait: a kept connection that was closed before any byte of an answer was
  most likely closed while idle, and one more try over a fresh connection costs nobody anything.
- What carries If-Match is not repeated once it may have been executed: a second try would meet the first one's change. It
  goes over a fresh connection, so that a connection gone stale cannot make its outcome unknown.
- Every wait and every size has a bound, named in `Settings`.

Not promised: TLS, redirects, cookies, proxies that close connections to end an answer; use of an `AsyncClient` in several
runs of trio; that a try that was lost does not arrive after the call has ended (its key keeps it from counting twice).
"""

import copy
import datetime as dt
import os
import random
import re
import select
import socket
import threading
import time
import uuid
import weakref
from collections import Counter as Tally
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Generic, Protocol, Self, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import httptools
import msgspec
import trio
from msgspec import Meta

from engine.core.invariant import invariant
from engine.core.limits import IDEMPOTENCY_KEY_CHARS_MAX
from engine.version import __version__

PAUSE_SECONDS_MIN = 0.05
PAUSE_SECONDS_MAX = 2.0
"""The ceiling of the first pause, and of all. A worker is back in about half a second: the fourth pause has passed it."""
IMPORT_DEADLINE_SECONDS = 120.0
"""The server gives an import of 200,000 counters a minute; a second try must fit."""
PAGE_SIZE = 500
RECEIVE_BYTES = 64 * 1024
ECHOED_CHARS_MAX = 128
"""Longer names of a request are not given back by the server."""

invariant(PAUSE_SECONDS_MIN < PAUSE_SECONDS_MAX, "pauses grow")

T_co = TypeVar("T_co", covariant=True)
ItemT = TypeVar("ItemT")
ItemT_co = TypeVar("ItemT_co", covariant=True)

Instant = Annotated[dt.datetime, Meta(tz=True)]
"""Aware, in UTC."""


# --- what is asked and answered ---------------------------------------------------------------------------------------
#
# Members that a newer server adds are passed over; words such as `status` are text, so that a new one is no error.


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


class _Problem(msgspec.Struct, frozen=True):
    """RFC 9457, as far as the client acts on it."""

    code: str = ""
    outcome: str = ""
    title: str = ""
    detail: str = ""
    lines: tuple[CounterShort, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    reservation: Reservation | None = None
    position: str | None = None


class _ProblemWords(msgspec.Struct, frozen=True):
    """The same of a server whose lines or reservations are of another shape."""

    code: str = ""
    outcome: str = ""
    title: str = ""
    detail: str = ""


class _PoolsAnswer(msgspec.Struct, frozen=True):
    pools: tuple[Pool, ...]


class _AvailabilityPage(msgspec.Struct, frozen=True):
    as_of: Instant
    items: tuple[Available, ...] = msgspec.field(name="counters")
    next_cursor: str | None = None


class _SlotsPage(msgspec.Struct, frozen=True):
    as_of: Instant
    items: tuple[Slot, ...] = msgspec.field(name="slots")
    next_cursor: str | None = None


class _CountersPage(msgspec.Struct, frozen=True):
    as_of: Instant
    items: tuple[Counter, ...] = msgspec.field(name="counters")
    next_cursor: str | None = None


class _EventsPage(msgspec.Struct, frozen=True):
    next_cursor: str
    items: tuple[Event, ...] = msgspec.field(name="events")
    as_of: Instant | None = None


class _Page(Protocol[ItemT_co]):
    @property
    def items(self) -> tuple[ItemT_co, ...]: ...
    @property
    def next_cursor(self) -> str | None: ...
    @property
    def as_of(self) -> dt.datetime | None: ...


# --- how a call can fail ----------------------------------------------------------------------------------------------


class SlotkeeperError(Exception):
    """A call that has no answer of the kind asked for. Exactly one of the three below."""

    def __init__(
        self, detail: str = "", *, code: str = "", key: str | None = None, tries: int = 0, maybe_executed: bool = False
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        """For a person."""
        self.code = code
        """The server's stable code; of the last try that had one, empty when none had."""
        self.key = key
        """The Idempotency-Key of every try. Ask again with it to go on; None for calls that have none."""
        self.tries = tries
        """How often the request was tried."""
        self.maybe_executed = maybe_executed
        """Whether some try may have been executed."""

    def __str__(self) -> str:
        """Code and detail."""
        return f"{self.code}: {self.detail}" if self.code else self.detail


class NotExecuted(SlotkeeperError):  # noqa: N818 - named for what is true
    """The deadline or the retry budget ended, and no try can have been executed: nothing was done."""


class OutcomeUnknown(SlotkeeperError):  # noqa: N818 - named for what is true
    """The deadline or the retry budget ended, and some try may have been executed. Its key makes asking again safe."""


class Refused(SlotkeeperError):  # noqa: N818 - named for what is true
    """The server looked at the request and said no. Codes that this client does not know are of this class itself."""

    def __init__(
        self,
        detail: str = "",
        *,
        code: str = "",
        key: str | None = None,
        tries: int = 0,
        maybe_executed: bool = False,
        status: int = 0,
        lines: tuple[CounterShort, ...] = (),
        alternatives: tuple[Alternative, ...] = (),
        reservation: Reservation | None = None,
        position: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(detail, code=code, key=key, tries=tries, maybe_executed=maybe_executed)
        self.status = status
        """Of HTTP."""
        self.lines = lines
        """The counters that stood in the way."""
        self.alternatives = alternatives
        """Slots that would have fitted."""
        self.reservation = reservation
        """The reservation as it is, where the refusal is about one."""
        self.position = position
        """Where in the log this was true."""
        self.retry_after_seconds = retry_after_seconds


class InsufficientCapacity(Refused):
    """Not enough units are left: see `lines` and `alternatives`."""


class SlotClosed(Refused):
    """Planners closed the slot."""


class PastCutoff(Refused):
    """The slot's last moment has passed."""


class HoldExpired(Refused):
    """The hold's time has passed and its units were given back."""


class HoldNotConfirmed(Refused):
    """A hold cannot be fulfilled."""


class ExtensionCapReached(Refused):
    """The hold has lived as long as the operator allows."""


class AlreadyConfirmed(Refused):
    """It is confirmed."""


class AlreadyReleased(Refused):
    """It was released."""


class AlreadyFulfilled(Refused):
    """It was fulfilled."""


class LinesNotHeld(Refused):
    """A partial confirm asked for more than is held."""


class IdempotencyKeyReused(Refused):
    """The key came before with another body."""


class UnknownPool(Refused):
    """There is no such pool."""


class UnknownSlot(Refused):
    """The pool has no such slot."""


class UnknownReservation(Refused):
    """There is no such reservation, or it ended so long ago that it was forgotten."""


class PlanConflict(Refused):
    """It was changed since you read it: If-Match did not match."""


class PoolHasSlots(Refused):
    """The pool has slots that rest on what was to be changed."""


class TooManyPools(Refused):
    """There are as many pools as there can be."""


class InvalidRequest(Refused):
    """The request is not one that the server takes, whatever its state."""


class InvalidSlot(InvalidRequest):
    """The slot cannot be."""


class NotFound(InvalidRequest):
    """The server has no such operation: another version, or not a Slotkeeper."""


class Forbidden(Refused):
    """It is not allowed."""


class RequestTimeout(Refused):
    """The server did not get the whole request in time. Nothing was done."""


CLASS_OF_CODE: Mapping[str, type[SlotkeeperError]] = {
    "insufficient_capacity": InsufficientCapacity,
    "slot_closed": SlotClosed,
    "past_cutoff": PastCutoff,
    "hold_expired": HoldExpired,
    "hold_not_confirmed": HoldNotConfirmed,
    "extension_cap_reached": ExtensionCapReached,
    "already_confirmed": AlreadyConfirmed,
    "already_released": AlreadyReleased,
    "already_fulfilled": AlreadyFulfilled,
    "lines_not_held": LinesNotHeld,
    "idempotency_key_reused": IdempotencyKeyReused,
    "unknown_pool": UnknownPool,
    "unknown_slot": UnknownSlot,
    "unknown_reservation": UnknownReservation,
    "plan_conflict": PlanConflict,
    "pool_has_slots": PoolHasSlots,
    "too_many_pools": TooManyPools,
    "invalid_request": InvalidRequest,
    "invalid_slot": InvalidSlot,
    "not_found": NotFound,
    "method_not_allowed": NotFound,
    "forbidden": Forbidden,
    "unsupported_media_type": InvalidRequest,
    # Those below are retried; when the deadline ends, they are this.
    "overloaded": NotExecuted,
    "shard_unavailable": NotExecuted,
    "outcome_unknown": OutcomeUnknown,
    "internal_error": OutcomeUnknown,
    # Refused before routing.
    "length_conflict": InvalidRequest,
    "request_timeout": RequestTimeout,
    "body_too_large": InvalidRequest,
    "uri_too_long": InvalidRequest,
    "expectation_failed": InvalidRequest,
    "headers_too_large": InvalidRequest,
    "method_not_implemented": InvalidRequest,
    "version_not_supported": InvalidRequest,
}
"""What each code of the API becomes."""


# --- bounds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settings:
    """All bounds of a client."""

    deadline_seconds: float = 10.0
    """For one call: all its tries and pauses, and the wait for a free connection."""
    connect_seconds: float = 1.0
    """For one connection. Within a data centre it is there in a millisecond, or a packet was lost and sent again."""
    answer_seconds: float = 3.0
    """From the first byte sent to the last byte of the answer. The server itself answers within its deadline of a second."""
    answer_bytes_max: int = 16 * 1024 * 1024
    """Four times the largest page."""
    connections_max: int = 8
    """Open at once, used and idle together; so many calls run at the same time."""
    idle_seconds_max: float = 25.0
    """The server closes an idle connection after 30."""
    request_id: str | None = None
    """Sent as X-Request-Id with every try."""
    traceparent: str | None = None
    """Sent with every try (W3C Trace Context)."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        for name in ("deadline_seconds", "connect_seconds", "answer_seconds", "answer_bytes_max", "connections_max"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive")
        for name in ("request_id", "traceparent"):
            _checked(name, getattr(self, name), ECHOED_CHARS_MAX)


_VISIBLE = re.compile(r"[\x21-\x7e]+")


def _checked(name: str, text: str | None, chars_max: int) -> str | None:
    """A text that goes into a header line as it is. Raises ValueError."""
    if text is not None and not (_VISIBLE.fullmatch(text) and len(text) <= chars_max):
        raise ValueError(f"{name} must have 1 to {chars_max} visible ASCII characters, not {text!r}")
    return text


class RetryBudget:
    """How many retries a process may make: a share of its calls, and a small reserve that refills with time.

    It keeps clients from multiplying the load of a server that is in trouble. Retries never exceed
    share * calls + reserve + reserve_per_second * seconds. Safe for threads.
    """

    def __init__(
        self,
        *,
        share: float = 0.1,
        reserve: float = 20.0,
        reserve_per_second: float = 0.5,
        saved_max: float = 100.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`saved_max` bounds what quiet times can save up for a storm."""
        invariant(0 <= reserve <= saved_max, "the reserve can be saved")
        self._share = share
        self._reserve = reserve
        self._reserve_per_second = reserve_per_second
        self._saved_max = saved_max
        self._now = now
        self._saved = reserve
        self._refilled_at = now()
        self._lock = threading.Lock()
        _forked.add(self)

    def count_call(self) -> None:
        """A call was made: it brings its share of a retry."""
        with self._lock:
            self._saved = min(self._saved_max, self._saved + self._share)

    def take(self) -> bool:
        """Whether one more retry may be made. It counts as made."""
        with self._lock:
            now = self._now()
            if self._saved < self._reserve:
                # Time restores the reserve only: what is above it has to be earned by calls.
                refilled = self._saved + (now - self._refilled_at) * self._reserve_per_second
                self._saved = min(self._reserve, refilled)
            self._refilled_at = now
            if self._saved < 1:
                return False
            self._saved -= 1
            return True

    def after_fork(self) -> None:
        """In a child process: a thread that held the lock is not there any more."""
        self._lock = threading.Lock()


class _AfterFork(Protocol):
    def after_fork(self) -> None: ...


_forked: "weakref.WeakSet[_AfterFork]" = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(_forked):
        each.after_fork()


os.register_at_fork(after_in_child=_after_fork)

RETRY_BUDGET = RetryBudget()
"""Of this process. Clients share it unless they are given their own."""


def fresh_key() -> str:
    """A new Idempotency-Key: a UUID of version 7, so that keys sort by the time they were made."""
    at_ms = time.time_ns() // 1_000_000
    chance = int.from_bytes(os.urandom(10), "big")
    number = (
        (at_ms & (1 << 48) - 1) << 80 | 0x7 << 76 | (chance >> 62 & 0xFFF) << 64 | 0b10 << 62 | chance & (1 << 62) - 1
    )
    return str(uuid.UUID(int=number))


# --- calls as values --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Call(Generic[T_co]):
    """What is asked, and how its answer is read."""

    method: str
    target: str
    decode: Callable[[bytes], T_co]
    """Raises msgspec.DecodeError."""
    body: bytes = b""
    key: str | None = None
    if_match: int | None = None
    deadline_seconds: float | None = None
    """Instead of that of the settings; one answer may then take as long."""

    @property
    def changes(self) -> bool:
        """Whether it can have an outcome."""
        return self.method != "GET"

    @property
    def is_repeatable(self) -> bool:
        """Whether doing it twice is as good as once."""
        return self.if_match is None


_reservation = msgspec.json.Decoder(Reservation)
_pool = msgspec.json.Decoder(Pool)
_pools = msgspec.json.Decoder(_PoolsAnswer)
_counter = msgspec.json.Decoder(Counter)
_imported = msgspec.json.Decoder(Imported)
_status = msgspec.json.Decoder(Status)
_availability_page = msgspec.json.Decoder(_AvailabilityPage)
_slots_page = msgspec.json.Decoder(_SlotsPage)
_counters_page = msgspec.json.Decoder(_CountersPage)
_events_page = msgspec.json.Decoder(_EventsPage)
_problem = msgspec.json.Decoder(_Problem)
_problem_words = msgspec.json.Decoder(_ProblemWords)
_encode = msgspec.json.Encoder().encode


def _segment(name: str, text: str) -> str:
    """A part of a path. Raises ValueError for what could mean another path."""
    if text in ("", ".", "..") or "/" in text:
        raise ValueError(f"{name} {text!r} cannot be")
    return quote(text, safe=":")


def _line_members(lines: Iterable[LineLike]) -> list[Line]:
    return [line if isinstance(line, Line) else Line(*line) for line in lines]


def _keyed(target: str, body: Mapping[str, object], key: str | None) -> _Call[Reservation]:
    """A call that changes a reservation. Raises ValueError for a key that cannot be sent."""
    key = fresh_key() if key is None else key
    _checked("key", key, IDEMPOTENCY_KEY_CHARS_MAX)

    def decode(data: bytes) -> Reservation:
        return msgspec.structs.replace(_reservation.decode(data), key=key)

    return _Call("POST", target, decode, _encode(body), key)


def _taking(
    lines: Iterable[LineLike], order_ref: str, channel: str, ttl_seconds: int | None, key: str | None
) -> _Call[Reservation]:
    body: dict[str, object] = {"order_ref": order_ref, "channel": channel, "lines": _line_members(lines)}
    if ttl_seconds is not None:
        body["ttl_seconds"] = ttl_seconds
    return _keyed("/v1/reservations", body, key)


def _verb(reservation_id: str, verb: str, key: str | None, **body: object) -> _Call[Reservation]:
    target = f"/v1/reservations/{_segment('reservation_id', reservation_id)}/{verb}"
    return _keyed(target, {name: value for name, value in body.items() if value is not None}, key)


def _confirm(reservation_id: str, lines: Iterable[LineLike] | None, key: str | None) -> _Call[Reservation]:
    return _verb(reservation_id, "confirm", key, lines=None if lines is None else _line_members(lines))


def _look(reservation_id: str) -> _Call[Reservation]:
    return _Call("GET", f"/v1/reservations/{_segment('reservation_id', reservation_id)}", _reservation.decode)


def _counter_path(pool_id: str, slot_id: str) -> str:
    return f"/v1/pools/{_segment('pool_id', pool_id)}/slots/{_segment('slot_id', slot_id)}"


def _look_counter(pool_id: str, slot_id: str, min_position: str | None) -> _Call[Counter]:
    query = "" if min_position is None else "?" + urlencode({"min_position": min_position})
    return _Call("GET", _counter_path(pool_id, slot_id) + query, _counter.decode)


def _look_pool(pool_id: str) -> _Call[Pool]:
    return _Call("GET", f"/v1/pools/{_segment('pool_id', pool_id)}", _pool.decode)


def _look_pools() -> _Call[tuple[Pool, ...]]:
    return _Call("GET", "/v1/pools", lambda data: _pools.decode(data).pools)


def _look_status() -> _Call[Status]:
    return _Call("GET", "/v1/status", _status.decode)


def _put_pool(pool_id: str, if_match: int | None, cutoff: CutoffRule | None, **body: str) -> _Call[Pool]:
    target = f"/v1/pools/{_segment('pool_id', pool_id)}"
    return _Call("PUT", target, _pool.decode, _encode({**body, "cutoff": cutoff}), if_match=if_match)


def _put_counter(pool_id: str, slot_id: str, if_match: int | None, **body: object) -> _Call[Counter]:
    return _Call("PUT", _counter_path(pool_id, slot_id), _counter.decode, _encode(body), if_match=if_match)


def _import(counters: Iterable[CounterPlan], reason: str, deadline_seconds: float) -> _Call[Imported]:
    body = _encode({"counters": list(counters), "reason": reason})
    return _Call("POST", "/v1/counters:import", _imported.decode, body, deadline_seconds=deadline_seconds)


When = dt.datetime | dt.date
"""An aware datetime, or a date, which means its first instant in UTC."""


def _when(name: str, when: When) -> str:
    if isinstance(when, dt.datetime):
        if when.tzinfo is None:
            raise ValueError(f"{name} {when} has no time zone")
        return when.astimezone(dt.UTC).replace(tzinfo=None).isoformat() + "Z"
    return when.isoformat()


def _selection(
    *,
    pool_id: str | Sequence[str] | None,
    capacity_type: str | None,
    zone: str | None,
    starts_from: When | None,
    starts_to: When | None,
    quantity: int | None = None,
    min_position: str | None = None,
    page_size: int,
) -> list[tuple[str, str]]:
    """The query of a listing."""
    pool_ids = () if pool_id is None else (pool_id,) if isinstance(pool_id, str) else pool_id
    query = [("pool_id", each) for each in pool_ids]
    if starts_from is not None:
        query.append(("from", _when("starts_from", starts_from)))
    if starts_to is not None:
        query.append(("to", _when("starts_to", starts_to)))
    more = {"capacity_type": capacity_type, "zone": zone, "quantity": quantity, "min_position": min_position}
    query += [(name, str(value)) for name, value in more.items() if value is not None]
    return [*query, ("limit", str(page_size))]


class _Walk(Generic[ItemT]):
    """Where an iterator over pages stands. `cursor` goes on after the last page that was handed out to its end."""

    def __init__(
        self,
        target: str,
        query: list[tuple[str, str]],
        decode: Callable[[bytes], _Page[ItemT]],
        *,
        cursor_name: str = "cursor",
        cursor: str | None = None,
    ) -> None:
        self._target = target
        self._query = query
        self._decode = decode
        self._cursor_name = cursor_name
        self.cursor = cursor
        self.as_of: dt.datetime | None = None
        self._next_cursor = cursor
        self._items: Iterator[ItemT] = iter(())
        self._is_at_end = False

    def item(self) -> ItemT | None:
        """The next item of the page, None at its end."""
        for item in self._items:
            return item
        # Only who asks for more has done with the last one.
        self.cursor = self._next_cursor
        return None

    def wanted(self) -> _Call[_Page[ItemT]] | None:
        """The call for the next page, None at the end."""
        if self._is_at_end:
            return None
        query = self._query
        if self.cursor is not None:
            query = [*query, (self._cursor_name, self.cursor)]
        return _Call("GET", f"{self._target}?{urlencode(query)}", self._decode)

    def turn(self, page: _Page[ItemT]) -> None:
        """Go on with this page."""
        self._items = iter(page.items)
        self.as_of = page.as_of
        self._next_cursor = page.next_cursor
        # The feed has a cursor at its end too, and is at its end when nothing came.
        self._is_at_end = page.next_cursor is None or (self._cursor_name == "after" and not page.items)


def _availability_walk(**selection: Any) -> _Walk[Available]:
    return _Walk("/v1/availability", _selection(**selection), _availability_page.decode)


def _slots_walk(**selection: Any) -> _Walk[Slot]:
    return _Walk("/v1/slots", _selection(**selection), _slots_page.decode)


def _counters_walk(**selection: Any) -> _Walk[Counter]:
    return _Walk("/v1/counters", _selection(**selection), _counters_page.decode)


def _events_walk(after: str | None, page_size: int) -> _Walk[Event]:
    return _Walk("/v1/events", [("limit", str(page_size))], _events_page.decode, cursor_name="after", cursor=after)


# --- one try: bytes to an ending --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Address:
    """Where the server is, and how it is named."""

    host: str
    port: int
    authority: str
    prefix: str

    @classmethod
    def of(cls, url: str) -> "_Address":
        """Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f"{url!r} is no address of a server: write http://HOST:PORT")
        if not _VISIBLE.fullmatch(parts.netloc + parts.path):
            raise ValueError(f"{url!r} has characters that cannot be sent")
        return cls(parts.hostname, parts.port or 80, parts.netloc, parts.path.rstrip("/"))


def _request_bytes(call: _Call[object], settings: Settings, address: _Address) -> bytes:
    """The request, the same for every try."""
    lines = [
        f"{call.method} {address.prefix}{call.target} HTTP/1.1",
        f"Host: {address.authority}",
        f"User-Agent: slotkeeper-client/{__version__}",
    ]
    if call.key is not None:
        lines.append(f"Idempotency-Key: {call.key}")
    if call.if_match is not None:
        lines.append(f'If-Match: "{call.if_match}"')
    if call.changes:
        lines += ["Content-Type: application/json", f"Content-Length: {len(call.body)}"]
    if settings.request_id is not None:
        lines.append(f"X-Request-Id: {settings.request_id}")
    if settings.traceparent is not None:
        lines.append(f"Traceparent: {settings.traceparent}")
    return "\r\n".join([*lines, "", ""]).encode("ascii") + call.body


@dataclass(frozen=True, slots=True)
class _Answered:
    """The server has spoken."""

    status: int
    body: bytes
    retry_after_seconds: float | None
    keep_alive: bool


@dataclass(frozen=True, slots=True)
class _NotConnected:
    """Nothing was sent."""

    detail: str


@dataclass(frozen=True, slots=True)
class _Lost:
    """The connection or the time ended before the answer did."""

    detail: str
    is_sent: bool
    """The whole request was handed to the kernel, so the server may have it. Without its end it can do nothing."""
    is_stale: bool
    """A kept connection that ended before any byte of an answer."""


@dataclass(frozen=True, slots=True)
class _NotUnderstood:
    """There was an answer, and it makes no sense: asking again would not help."""

    detail: str


_Ending = _Answered | _NotConnected | _Lost | _NotUnderstood


class _Exchange:
    """One request over one connection, without the connection."""

    def __init__(self, request: bytes, *, reused: bool, answer_bytes_max: int) -> None:
        self.unsent = memoryview(request)
        self._reused = reused
        self._bytes_left = answer_bytes_max
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._retry_after = b""
        self._began = False
        self._answer: _Answered | None = None

    def sent(self, count: int) -> None:
        """The kernel took so many bytes."""
        self.unsent = self.unsent[count:]

    def received(self, data: bytes) -> _Ending | None:
        """Bytes came, or, if there are none, the end. The ending, once it is known."""
        if not data:
            return self.ended("the server closed the connection")
        self._began = True
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            return _NotUnderstood("the answer is larger than answer_bytes_max")
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._answer is None:
                return _NotUnderstood(f"the answer is not HTTP: {error}")
            # Whatever followed a whole answer: it is not ours, and nothing more is read from this connection.
            return replace(self._answer, keep_alive=False)
        if self._answer is not None and self.unsent:
            # An early answer; the rest of the request stands in the way of the next.
            return replace(self._answer, keep_alive=False)
        return self._answer

    def ended(self, detail: str) -> _Lost:
        """The connection ended."""
        return _Lost(detail, is_sent=not self.unsent, is_stale=self._reused and not self._began)

    def timed_out(self) -> _Lost:
        """The time ended."""
        return _Lost("no whole answer in time", is_sent=not self.unsent, is_stale=False)

    # Called by the parser.

    def on_message_begin(self) -> None:
        """An answer begins; after the one that was asked for, it is nobody's, and the connection is of no more use."""
        if self._answer is not None:
            self._answer = replace(self._answer, keep_alive=False)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header line."""
        if name.lower() == b"retry-after":
            self._retry_after = value.strip()

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        """An interim answer ended, or the answer."""
        status = self._parser.get_status_code()
        if status >= 200 and self._answer is None:
            told = self._retry_after
            retry_after_seconds = float(told) if told.isdigit() and len(told) <= 9 else None
            keep_alive = self._parser.should_keep_alive()
            self._answer = _Answered(status, b"".join(self._pieces), retry_after_seconds, keep_alive)


def _is_stale(descriptor: int) -> bool:
    """Whether an idle connection has something to read: its end, or an answer to nothing. Either way it is of no use."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


# --- all tries: what to do next ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Try:
    """Send the request and wait for its answer."""

    request: bytes
    fresh: bool
    """Over a connection that has not been used."""
    until: float
    """The deadline of the call, by its clock."""
    answer_seconds: float


@dataclass(frozen=True, slots=True)
class _Pause:
    """Wait."""

    seconds: float


_Insisting = Generator[_Try | _Pause, _Ending | None, T_co]


def pause_seconds(retry: int, retry_after_seconds: float | None, chance: Callable[[], float]) -> float:
    """How long to wait before a retry (the first is 0): after what the server said, anything below a doubling ceiling."""
    ceiling_seconds = min(PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN * float(1 << min(retry, 30)))
    return (retry_after_seconds or 0.0) + chance() * ceiling_seconds


def _insist(
    call: _Call[T_co],
    settings: Settings,
    address: _Address,
    budget: RetryBudget,
    now: Callable[[], float],
    chance: Callable[[], float],
    count: Callable[[str], None],
) -> _Insisting[T_co]:
    """Try until there is an answer, a refusal, or no time or budget left. Returns the answer; raises SlotkeeperError."""
    deadline_seconds = call.deadline_seconds or settings.deadline_seconds
    answer_seconds = call.deadline_seconds or settings.answer_seconds
    request = _request_bytes(call, settings, address)
    until = now() + deadline_seconds
    maybe_executed = False
    fresh = not call.is_repeatable
    tries = retries = 0
    budget.count_call()
    count("calls")

    def gave_up(why: str, last: str, code: str = "") -> SlotkeeperError:
        kind = OutcomeUnknown if maybe_executed else NotExecuted
        text = (
            f"{call.method} {call.target}: {why} after {tries} {'try' if tries == 1 else 'tries'}; the last one: {last}"
        )
        return kind(text, code=code, key=call.key, tries=tries, maybe_executed=maybe_executed)

    while True:
        tries += 1
        count("tries")
        ending = yield _Try(request, fresh, until, answer_seconds)
        code, may_now = "", False
        retry_after_seconds: float | None = None
        match ending:
            case _Answered(status, body) if 200 <= status < 300:
                try:
                    return call.decode(body)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    maybe_executed = call.changes
                    raise gave_up("gave up", f"its answer {status} is not of the shape expected: {error}") from error
            case _Answered(status, body):
                retry_after_seconds = ending.retry_after_seconds
                problem = _problem_of(body)
                code = problem.code
                may_now = problem.outcome != "not_executed"
                if status != 503 and (status < 500 or not may_now):
                    raise _refused(problem, ending, call.key, tries, maybe_executed=maybe_executed)
                last = f"answered {status} {code} {problem.detail or problem.title}".rstrip()
            case _NotConnected(last):
                pass
            case _Lost(last, is_sent, is_stale):
                may_now = is_sent
                if is_stale:
                    # At most once, since a fresh connection is never stale; and only what is repeatable meets a kept one.
                    maybe_executed = maybe_executed or (may_now and call.changes)
                    fresh = True
                    count("stale")
                    continue
            case _NotUnderstood(last):
                maybe_executed = call.changes
                raise gave_up("gave up", last)
            case None:
                raise TypeError("a try has an ending")
        maybe_executed = maybe_executed or (may_now and call.changes)
        if may_now and not call.is_repeatable:
            raise gave_up("not repeated, because of its If-Match,", last, code)
        seconds = pause_seconds(retries, retry_after_seconds, chance)
        if now() + seconds >= until:
            raise gave_up(f"no answer within {deadline_seconds:g} s", last, code)
        if not budget.take():
            count("budget_spent")
            raise gave_up("the retry budget is spent", last, code)
        retries += 1
        count("retries")
        yield _Pause(seconds)


def _problem_of(body: bytes) -> _Problem:
    """A problem document, as far as it can be read."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        return _problem.decode(body)
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        words = _problem_words.decode(body)
        return _Problem(words.code, words.outcome, words.title, words.detail)
    return _Problem()


def _refused(
    problem: _Problem, answer: _Answered, key: str | None, tries: int, *, maybe_executed: bool
) -> SlotkeeperError:
    kind = CLASS_OF_CODE.get(problem.code, Refused)
    return (kind if issubclass(kind, Refused) else Refused)(
        problem.detail or problem.title or f"answered {answer.status}",
        code=problem.code or f"http_{answer.status}",
        key=key,
        tries=tries,
        maybe_executed=maybe_executed,
        status=answer.status,
        lines=problem.lines,
        alternatives=problem.alternatives,
        reservation=problem.reservation,
        position=problem.position,
        retry_after_seconds=answer.retry_after_seconds,
    )


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counted since a client was made; its views count with it."""

    calls: int
    """Each counted once, however often it was tried. A page of a listing is a call."""
    tries: int
    """Requests that were sent, or were to be."""
    retries: int
    """Tries after a pause."""
    stale: int
    """Tries repeated at once, because a kept connection had been closed."""
    budget_spent: int
    """Calls that ended because there was no retry left."""
    connections: int
    """Connections made."""
    connections_idle: int
    """Open now, and not in use."""


def _statistics(tally: Mapping[str, int], idle: int) -> Statistics:
    return Statistics(
        calls=tally.get("calls", 0),
        tries=tally.get("tries", 0),
        retries=tally.get("retries", 0),
        stale=tally.get("stale", 0),
        budget_spent=tally.get("budget_spent", 0),
        connections=tally.get("connections", 0),
        connections_idle=idle,
    )


def _with_options(
    settings: Settings, deadline_seconds: float | None, request_id: str | None, traceparent: str | None
) -> Settings:
    """Those that are given, in place of what was."""
    return replace(
        settings,
        deadline_seconds=settings.deadline_seconds if deadline_seconds is None else deadline_seconds,
        request_id=settings.request_id if request_id is None else request_id,
        traceparent=settings.traceparent if traceparent is None else traceparent,
    )


# --- the blocking face ------------------------------------------------------------------------------------------------


class Clock(Protocol):
    """Time for `Client`, in seconds."""

    def now(self) -> float:
        """Never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class _MonotonicClock:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True, slots=True)
class _Kept(Generic[T_co]):
    """A connection that waits for its next use."""

    socket: T_co
    since: float


class _Connections:
    """The connections of a blocking client: at most `connections_max`, used and idle together. Safe for threads."""

    def __init__(self, address: _Address, settings: Settings, clock: Clock) -> None:
        self._address = address
        self._settings = settings
        self._clock = clock
        self._idle: list[_Kept[socket.socket]] = []
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(settings.connections_max)
        self._tally: Tally[str] = Tally()
        self._is_closed = False
        _forked.add(self)

    def count(self, name: str) -> None:
        """One more of these."""
        with self._lock:
            self._tally[name] += 1

    def statistics(self) -> Statistics:
        """How it is doing."""
        with self._lock:
            return _statistics(self._tally, len(self._idle))

    def attempt(self, step: _Try) -> _Ending:
        """Try once."""
        if not self._free.acquire(timeout=max(0.0, step.until - self._clock.now())):
            return _NotConnected(f"all {self._settings.connections_max} connections were in use")
        try:
            return self._attempt(step)
        finally:
            self._free.release()

    def _attempt(self, step: _Try) -> _Ending:
        connection = self._take(fresh=step.fresh)
        reused = connection is not None
        if connection is None:
            seconds = min(self._settings.connect_seconds, step.until - self._clock.now())
            try:
                connection = socket.create_connection((self._address.host, self._address.port), max(seconds, 0.001))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                return _NotConnected(f"no connection: {error}")
            self.count("connections")
        keep = False
        try:
            exchange = _Exchange(step.request, reused=reused, answer_bytes_max=self._settings.answer_bytes_max)
            ending = self._exchange(connection, exchange, step)
            keep = isinstance(ending, _Answered) and ending.keep_alive
            return ending
        finally:
            if keep:
                self._keep(connection)
            else:
                connection.close()

    def _exchange(self, connection: socket.socket, exchange: _Exchange, step: _Try) -> _Ending:
        ends_at = min(step.until, self._clock.now() + step.answer_seconds)
        try:
            try:
                while exchange.unsent:
                    connection.settimeout(max(ends_at - self._clock.now(), 0.001))
                    exchange.sent(connection.send(exchange.unsent))
            except ConnectionError:
                pass  # it may have answered before it hung up, such as that the body is too large
            while True:
                connection.settimeout(max(ends_at - self._clock.now(), 0.001))
                ending = exchange.received(connection.recv(RECEIVE_BYTES))
                if ending is not None:
                    return ending
        except TimeoutError:
            return exchange.timed_out()
        except OSError as error:
            return exchange.ended(str(error))

    def _take(self, *, fresh: bool) -> socket.socket | None:
        """An idle connection that still stands, the last used first. Who wants a fresh one takes the place of an idle one."""
        while True:
            with self._lock:
                if self._is_closed:
                    raise RuntimeError("the client is closed")
                if not self._idle:
                    return None
                kept = self._idle.pop()
            old = self._clock.now() - kept.since > self._settings.idle_seconds_max
            if not (fresh or old or _is_stale(kept.socket.fileno())):
                return kept.socket
            kept.socket.close()
            if fresh:
                return None

    def _keep(self, connection: socket.socket) -> None:
        with self._lock:
            if not self._is_closed:
                self._idle.append(_Kept(connection, self._clock.now()))
                return
        connection.close()

    def close(self) -> None:
        """Close what is idle; what is in use closes itself."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for kept in idle:
            kept.socket.close()

    def after_fork(self) -> None:
        """In a child process: connections are the parent's, and so are threads that held a lock."""
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(self._settings.connections_max)
        idle, self._idle = self._idle, []
        for kept in idle:
            kept.socket.close()


class Pages(Generic[ItemT]):
    """An iterator over the items of all pages, which are asked for one by one as they are needed."""

    def __init__(self, run: Callable[[_Call[_Page[ItemT]]], _Page[ItemT]], walk: _Walk[ItemT]) -> None:
        self._run = run
        self._walk = walk

    @property
    def cursor(self) -> str | None:
        """Goes on after the last page that was handed out to its end: what was handed out since comes again."""
        return self._walk.cursor

    @property
    def as_of(self) -> dt.datetime | None:
        """How old the page is. None before the first, and for events."""
        return self._walk.as_of

    def __iter__(self) -> Iterator[ItemT]:
        """Itself."""
        return self

    def __next__(self) -> ItemT:
        """The next item. Raises SlotkeeperError, and goes on when asked again."""
        while (item := self._walk.item()) is None:
            call = self._walk.wanted()
            if call is None:
                raise StopIteration
            self._walk.turn(self._run(call))
        return item


class Client:
    """The blocking face. Safe for threads; so many calls run at once as there are connections, more wait for their turn.

    Every method raises SlotkeeperError: NotExecuted, OutcomeUnknown, or Refused with a class for its code; and ValueError for
    arguments that cannot be sent. Methods that change a reservation take a `key`; without one they make a fresh one.
    """

    def __init__(
        self,
        url: str,
        settings: Settings = Settings(),
        *,
        budget: RetryBudget = RETRY_BUDGET,
        chance: Callable[[], float] = random.random,
        clock: Clock | None = None,
    ) -> None:
        """`url` is http://HOST:PORT, with a path where a proxy wants one. `chance` is at least 0 and below 1."""
        self._address = _Address.of(url)
        self._settings = settings
        self._budget = budget
        self._chance = chance
        self._clock = clock or _MonotonicClock()
        self._connections = _Connections(self._address, settings, self._clock)

    def with_options(
        self, *, deadline_seconds: float | None = None, request_id: str | None = None, traceparent: str | None = None
    ) -> Self:
        """The same client, with these for its calls: connections, budget and statistics are shared. Raises ValueError."""
        view = copy.copy(self)
        view._settings = _with_options(self._settings, deadline_seconds, request_id, traceparent)  # noqa: SLF001 - a copy of ours
        return view

    def statistics(self) -> Statistics:
        """What it has met."""
        return self._connections.statistics()

    def close(self) -> None:
        """Close all connections. Calls that are running end as they would."""
        self._connections.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _run(self, call: _Call[T_co]) -> T_co:
        connections = self._connections
        steps = _insist(
            call, self._settings, self._address, self._budget, self._clock.now, self._chance, connections.count
        )
        ending: _Ending | None = None
        while True:
            try:
                step = steps.send(ending)
            except StopIteration as done:
                answer: T_co = done.value
                return answer
            if isinstance(step, _Try):
                ending = connections.attempt(step)
            else:
                self._clock.sleep(step.seconds)
                ending = None

    # Reservations

    def hold(
        self,
        lines: Iterable[LineLike],
        *,
        order_ref: str = "",
        channel: str = "",
        ttl_seconds: int,
        key: str | None = None,
    ) -> Reservation:
        """Take units of one or several counters for a time, all or nothing.

        Raises InsufficientCapacity, SlotClosed, PastCutoff, UnknownPool, UnknownSlot.
        """
        return self._run(_taking(lines, order_ref, channel, ttl_seconds, key))

    def reserve(
        self,
        lines: Iterable[LineLike],
        *,
        order_ref: str = "",
        channel: str = "",
        key: str | None = None,
    ) -> Reservation:
        """Take units, confirmed at once. Raises what `hold` raises."""
        return self._run(_taking(lines, order_ref, channel, None, key))

    def confirm(
        self, reservation_id: str, lines: Iterable[LineLike] | None = None, *, key: str | None = None
    ) -> Reservation:
        """Make a hold permanent; with lines, keep those and give the rest back. Raises HoldExpired when it is too late."""
        return self._run(_confirm(reservation_id, lines, key))

    def release(self, reservation_id: str, *, reason: str = "", key: str | None = None) -> Reservation:
        """Give the units back."""
        return self._run(_verb(reservation_id, "release", key, reason=reason))

    def extend(self, reservation_id: str, ttl_seconds: int, *, key: str | None = None) -> Reservation:
        """Let a hold live longer, counted from now. Raises ExtensionCapReached."""
        return self._run(_verb(reservation_id, "extend", key, ttl_seconds=ttl_seconds))

    def move(self, reservation_id: str, lines: Iterable[LineLike], *, key: str | None = None) -> Reservation:
        """Exchange all lines for these in one step. Raises what `hold` raises; then the old lines are kept."""
        return self._run(_verb(reservation_id, "move", key, lines=_line_members(lines)))

    def fulfil(self, reservation_id: str, *, key: str | None = None) -> Reservation:
        """The delivery was made."""
        return self._run(_verb(reservation_id, "fulfil", key))

    def reservation(self, reservation_id: str) -> Reservation:
        """The reservation as it is. Raises UnknownReservation."""
        return self._run(_look(reservation_id))

    # What is left

    def availability(
        self,
        *,
        pool_id: str | Sequence[str] | None = None,
        capacity_type: str | None = None,
        zone: str | None = None,
        starts_from: When | None = None,
        starts_to: When | None = None,
        quantity: int | None = None,
        min_position: str | None = None,
        page_size: int = PAGE_SIZE,
    ) -> Pages[Available]:
        """What is left, slot by slot; with `min_position` (that of your own reservation, say) not before it is shown."""
        return Pages(
            self._run,
            _availability_walk(
                pool_id=pool_id,
                capacity_type=capacity_type,
                zone=zone,
                starts_from=starts_from,
                starts_to=starts_to,
                quantity=quantity,
                min_position=min_position,
                page_size=page_size,
            ),
        )

    def slots(
        self,
        *,
        pool_id: str | Sequence[str] | None = None,
        capacity_type: str | None = None,
        zone: str | None = None,
        starts_from: When | None = None,
        starts_to: When | None = None,
        page_size: int = PAGE_SIZE,
    ) -> Pages[Slot]:
        """Slots for shoppers: open or not, no numbers."""
        return Pages(
            self._run,
            _slots_walk(
                pool_id=pool_id,
                capacity_type=capacity_type,
                zone=zone,
                starts_from=starts_from,
                starts_to=starts_to,
                page_size=page_size,
            ),
        )

    def counters(
        self,
        *,
        pool_id: str | Sequence[str] | None = None,
        capacity_type: str | None = None,
        zone: str | None = None,
        starts_from: When | None = None,
        starts_to: When | None = None,
        min_position: str | None = None,
        page_size: int = PAGE_SIZE,
    ) -> Pages[Counter]:
        """Everything about counters, for planners."""
        return Pages(
            self._run,
            _counters_walk(
                pool_id=pool_id,
                capacity_type=capacity_type,
                zone=zone,
                starts_from=starts_from,
                starts_to=starts_to,
                min_position=min_position,
                page_size=page_size,
            ),
        )

    def counter(self, pool_id: str, slot_id: str, *, min_position: str | None = None) -> Counter:
        """One counter. Raises UnknownPool, UnknownSlot."""
        return self._run(_look_counter(pool_id, slot_id, min_position))

    # Planning

    def pools(self) -> tuple[Pool, ...]:
        """All pools."""
        return self._run(_look_pools())

    def pool(self, pool_id: str) -> Pool:
        """One pool. Raises UnknownPool."""
        return self._run(_look_pool(pool_id))

    def put_pool(
        self,
        pool_id: str,
        *,
        capacity_type: str,
        unit: str,
        time_zone: str,
        zone: str = "",
        cutoff: CutoffRule | None = None,
        reason: str = "",
        if_match: int | None = None,
    ) -> Pool:
        """Define a pool or change it. `if_match` is the plan_version that was read; raises PlanConflict where it is old."""
        return self._run(
            _put_pool(
                pool_id,
                if_match,
                cutoff,
                capacity_type=capacity_type,
                unit=unit,
                time_zone=time_zone,
                zone=zone,
                reason=reason,
            )
        )

    def put_counter(
        self,
        pool_id: str,
        slot_id: str,
        *,
        base: int,
        overbook: int = 0,
        buffer: int = 0,
        closed: bool = False,
        reason: str = "",
        if_match: int | None = None,
    ) -> Counter:
        """Define a counter or change it, as a whole: what is left out has its default. `if_match` as for `put_pool`."""
        return self._run(
            _put_counter(
                pool_id,
                slot_id,
                if_match,
                base=base,
                overbook=overbook,
                buffer=buffer,
                closed=closed,
                reason=reason,
            )
        )

    def import_counters(
        self,
        counters: Iterable[CounterPlan],
        *,
        reason: str = "",
        deadline_seconds: float = IMPORT_DEADLINE_SECONDS,
    ) -> Imported:
        """Define many counters, all or nothing. It has a deadline of its own."""
        return self._run(_import(counters, reason, deadline_seconds))

    # Feed and service

    def events(self, after: str | None = None, *, page_size: int = PAGE_SIZE) -> Pages[Event]:
        """The feed of everything that happened, from a cursor on to its end at the time. Keep its `cursor` to go on."""
        return Pages(self._run, _events_walk(after, page_size))

    def status(self) -> Status:
        """How the system is doing, shard by shard."""
        return self._run(_look_status())


# --- the face for trio ------------------------------------------------------------------------------------------------


class AsyncClock(Protocol):
    """Time for `AsyncClient`, in seconds."""

    def now(self) -> float:
        """Never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class _TrioClock:
    def now(self) -> float:
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class _AsyncConnections:
    """The connections of a trio client: as `_Connections`, for the tasks of one run."""

    def __init__(self, address: _Address, settings: Settings, clock: AsyncClock) -> None:
        self._address = address
        self._settings = settings
        self._clock = clock
        self._idle: list[_Kept[trio.socket.SocketType]] = []
        self._free = trio.Semaphore(settings.connections_max, max_value=settings.connections_max)
        self._tally: Tally[str] = Tally()
        self._is_closed = False

    def count(self, name: str) -> None:
        """One more of these."""
        self._tally[name] += 1

    def statistics(self) -> Statistics:
        """How it is doing."""
        return _statistics(self._tally, len(self._idle))

    async def attempt(self, step: _Try) -> _Ending:
        """Try once."""
        acquired = False
        with trio.move_on_after(max(0.0, step.until - self._clock.now())):
            await self._free.acquire()
            acquired = True
        if not acquired:
            return _NotConnected(f"all {self._settings.connections_max} connections were in use")
        try:
            return await self._attempt(step)
        finally:
            self._free.release()

    async def _attempt(self, step: _Try) -> _Ending:
        connection = self._take(fresh=step.fresh)
        reused = connection is not None
        if connection is None:
            seconds = min(self._settings.connect_seconds, step.until - self._clock.now())
            try:
                with trio.fail_after(max(seconds, 0.001)):
                    connection = (await trio.open_tcp_stream(self._address.host, self._address.port)).socket
            except trio.TooSlowError:
                return _NotConnected("no connection: timed out")
            except OSError as error:
                return _NotConnected(f"no connection: {error}")
            self.count("connections")
        keep = False
        try:
            exchange = _Exchange(step.request, reused=reused, answer_bytes_max=self._settings.answer_bytes_max)
            ending = await self._exchange(connection, exchange, step)
            keep = isinstance(ending, _Answered) and ending.keep_alive
            return ending
        finally:
            # A call that was cancelled closes, too: its answer may still come.
            if keep and not self._is_closed:
                self._idle.append(_Kept(connection, self._clock.now()))
            else:
                connection.close()

    async def _exchange(self, connection: trio.socket.SocketType, exchange: _Exchange, step: _Try) -> _Ending:
        seconds = min(step.until - self._clock.now(), step.answer_seconds)
        try:
            with trio.fail_after(max(seconds, 0.001)):
                try:
                    while exchange.unsent:
                        exchange.sent(await connection.send(exchange.unsent))
                except ConnectionError:
                    pass  # as in the blocking face
                while True:
                    ending = exchange.received(await connection.recv(RECEIVE_BYTES))
                    if ending is not None:
                        return ending
        except trio.TooSlowError:
            return exchange.timed_out()
        except OSError as error:
            return exchange.ended(str(error))

    def _take(self, *, fresh: bool) -> trio.socket.SocketType | None:
        """As `_Connections._take`."""
        if self._is_closed:
            raise RuntimeError("the client is closed")
        while self._idle:
            kept = self._idle.pop()
            old = self._clock.now() - kept.since > self._settings.idle_seconds_max
            if not (fresh or old or _is_stale(kept.socket.fileno())):
                return kept.socket
            kept.socket.close()
            if fresh:
                break
        return None

    def close(self) -> None:
        """Close what is idle; what is in use closes itself."""
        self._is_closed = True
        for kept in self._idle:
            kept.socket.close()
        self._idle = []


class AsyncPages(Generic[ItemT]):
    """As `Pages`, for `async for`."""

    def __init__(self, run: Callable[[_Call[_Page[ItemT]]], Awaitable[_Page[ItemT]]], walk: _Walk[ItemT]) -> None:
        self._run = run
        self._walk = walk

    @property
    def cursor(self) -> str | None:
        """As `Pages.cursor`."""
        return self._walk.cursor

    @property
    def as_of(self) -> dt.datetime | None:
        """As `Pages.as_of`."""
        return self._walk.as_of

    def __aiter__(self) -> AsyncIterator[ItemT]:
        """Itself."""
        return self

    async def __anext__(self) -> ItemT:
        """The next item. Raises SlotkeeperError, and goes on when asked again."""
        while (item := self._walk.item()) is None:
            call = self._walk.wanted()
            if call is None:
                raise StopAsyncIteration
            self._walk.turn(await self._run(call))
        return item


class AsyncClient:
    """The face for trio: the methods of `Client`, for the tasks of one run of trio.

    A call that is cancelled has no answer and raises no error of ours: give it a `key` of your own where you cancel calls.
    """

    def __init__(
        self,
        url: str,
        settings: Settings = Settings(),
        *,
        budget: RetryBudget = RETRY_BUDGET,
        chance: Callable[[], float] = random.random,
        clock: AsyncClock | None = None,
    ) -> None:
        """As `Client`."""
        self._address = _Address.of(url)
        self._settings = settings
        self._budget = budget
        self._chance = chance
        self._clock = clock or _TrioClock()
        self._connections = _AsyncConnections(self._address, settings, self._clock)

    def with_options(
        self, *, deadline_seconds: float | None = None, request_id: str | None = None, traceparent: str | None = None
    ) -> Self:
        """As `Client.with_options`."""
        view = copy.copy(self)
        view._settings = _with_options(self._settings, deadline_seconds, request_id, traceparent)  # noqa: SLF001 - a copy of ours
        return view

    def statistics(self) -> Statistics:
        """What it has met."""
        return self._connections.statistics()

    def close(self) -> None:
        """Close all connections. Calls that are running end as they would."""
        self._connections.close()

    async def __aenter__(self) -> Self:
        """Itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        self.close()

    async def _run(self, call: _Call[T_co]) -> T_co:
        connections = self._connections
        steps = _insist(
            call, self._settings, self._address, self._budget, self._clock.now, self._chance, connections.count
        )
        ending: _Ending | None = None
        while True:
            try:
                step = steps.send(ending)
            except StopIteration as done:
                answer: T_co = done.value
                return answer
            if isinstance(step, _Try):
                ending = await connections.attempt(step)
            else:
                await self._clock.sleep(step.seconds)
                ending = None

    # Reservations

    async def hold(
        self,
        lines: Iterable[LineLike],
        *,
        order_ref: str = "",
        channel: str = "",
        ttl_seconds: int,
        key: str | None = None,
    ) -> Reservation:
        """As `Client.hold`."""
        return await self._run(_taking(lines, order_ref, channel, ttl_seconds, key))

    async def reserve(
        self,
        lines: Iterable[LineLike],
        *,
        order_ref: str = "",
        channel: str = "",
        key: str | None = None,
    ) -> Reservation:
        """As `Client.reserve`."""
        return await self._run(_taking(lines, order_ref, channel, None, key))

    async def confirm(
        self, reservation_id: str, lines: Iterable[LineLike] | None = None, *, key: str | None = None
    ) -> Reservation:
        """As `Client.confirm`."""
        return await self._run(_confirm(reservation_id, lines, key))

    async def release(self, reservation_id: str, *, reason: str = "", key: str | None = None) -> Reservation:
        """As `Client.release`."""
        return await self._run(_verb(reservation_id, "release", key, reason=reason))

    async def extend(self, reservation_id: str, ttl_seconds: int, *, key: str | None = None) -> Reservation:
        """As `Client.extend`."""
        return await self._run(_verb(reservation_id, "extend", key, ttl_seconds=ttl_seconds))

    async def move(self, reservation_id: str, lines: Iterable[LineLike], *, key: str | None = None) -> Reservation:
        """As `Client.move`."""
        return await self._run(_verb(reservation_id, "move", key, lines=_line_members(lines)))

    async def fulfil(self, reservation_id: str, *, key: str | None = None) -> Reservation:
        """As `Client.fulfil`."""
        return await self._run(_verb(reservation_id, "fulfil", key))

    async def reservation(self, reservation_id: str) -> Reservation:
        """As `Client.reservation`."""
        return await self._run(_look(reservation_id))

    # What is left

    def availability(
        self,
        *,
        pool_id: str | Sequence[str] | None = None,
        capacity_type: str | None = None,
        zone: str | None = None,
        starts_from: When | None = None,
        starts_to: When | None = None,
        quantity: int | None = None,
        min_position: str | None = None,
        page_size: int = PAGE_SIZE,
    ) -> AsyncPages[Available]:
        """As `Client.availability`."""
        return AsyncPages(
            self._run,
            _availability_walk(
                pool_id=pool_id,
                capacity_type=capacity_type,
                zone=zone,
                starts_from=starts_from,
                starts_to=starts_to,
                quantity=quantity,
                min_position=min_position,
                page_size=page_size,
            ),
        )

    def slots(
        self,
        *,
        pool_id: str | Sequence[str] | None = None,
        capacity_type: str | None = None,
        zone: str | None = None,
        starts_from: When | None = None,
        starts_to: When | None = None,
        page_size: int = PAGE_SIZE,
    ) -> AsyncPages[Slot]:
        """As `Client.slots`."""
        return AsyncPages(
            self._run,
            _slots_walk(
                pool_id=pool_id,
                capacity_type=capacity_type,
                zone=zone,
                starts_from=starts_from,
                starts_to=starts_to,
                page_size=page_size,
            ),
        )

    def counters(
        self,
        *,
        pool_id: str | Sequence[str] | None = None,
        capacity_type: str | None = None,
        zone: str | None = None,
        starts_from: When | None = None,
        starts_to: When | None = None,
        min_position: str | None = None,
        page_size: int = PAGE_SIZE,
    ) -> AsyncPages[Counter]:
        """As `Client.counters`."""
        return AsyncPages(
            self._run,
            _counters_walk(
                pool_id=pool_id,
                capacity_type=capacity_type,
                zone=zone,
                starts_from=starts_from,
                starts_to=starts_to,
                min_position=min_position,
                page_size=page_size,
            ),
        )

    async def counter(self, pool_id: str, slot_id: str, *, min_position: str | None = None) -> Counter:
        """As `Client.counter`."""
        return await self._run(_look_counter(pool_id, slot_id, min_position))

    # Planning

    async def pools(self) -> tuple[Pool, ...]:
        """As `Client.pools`."""
        return await self._run(_look_pools())

    async def pool(self, pool_id: str) -> Pool:
        """As `Client.pool`."""
        return await self._run(_look_pool(pool_id))

    async def put_pool(
        self,
        pool_id: str,
        *,
        capacity_type: str,
        unit: str,
        time_zone: str,
        zone: str = "",
        cutoff: CutoffRule | None = None,
        reason: str = "",
        if_match: int | None = None,
    ) -> Pool:
        """As `Client.put_pool`."""
        return await self._run(
            _put_pool(
                pool_id,
                if_match,
                cutoff,
                capacity_type=capacity_type,
                unit=unit,
                time_zone=time_zone,
                zone=zone,
                reason=reason,
            )
        )

    async def put_counter(
        self,
        pool_id: str,
        slot_id: str,
        *,
        base: int,
        overbook: int = 0,
        buffer: int = 0,
        closed: bool = False,
        reason: str = "",
        if_match: int | None = None,
    ) -> Counter:
        """As `Client.put_counter`."""
        return await self._run(
            _put_counter(
                pool_id,
                slot_id,
                if_match,
                base=base,
                overbook=overbook,
                buffer=buffer,
                closed=closed,
                reason=reason,
            )
        )

    async def import_counters(
        self,
        counters: Iterable[CounterPlan],
        *,
        reason: str = "",
        deadline_seconds: float = IMPORT_DEADLINE_SECONDS,
    ) -> Imported:
        """As `Client.import_counters`."""
        return await self._run(_import(counters, reason, deadline_seconds))

    # Feed and service

    def events(self, after: str | None = None, *, page_size: int = PAGE_SIZE) -> AsyncPages[Event]:
        """As `Client.events`."""
        return AsyncPages(self._run, _events_walk(after, page_size))

    async def status(self) -> Status:
        """As `Client.status`."""
        return await self._run(_look_status())
