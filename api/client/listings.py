"""What each listing asks for, and where an iterator over its pages stands. Shared by both faces.

Rules
- A page is asked for when it is needed. One that failed is asked for again: the walk has not moved.
- `cursor` goes on after the last page that was handed out to its end: an item may come twice, and none is left out.

Not promised: one moment over several pages; each page says how old it is.
"""

import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar
from urllib.parse import urlencode

import msgspec

from api.client.answers import Available, Counter, Event, Instant, Slot
from api.client.calls import Call

PAGE_SIZE = 500

ItemT = TypeVar("ItemT")
ItemT_co = TypeVar("ItemT_co", covariant=True)


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


class Page(Protocol[ItemT_co]):
    @property
    def items(self) -> tuple[ItemT_co, ...]: ...
    @property
    def next_cursor(self) -> str | None: ...
    @property
    def as_of(self) -> dt.datetime | None: ...


_availability_page = msgspec.json.Decoder(_AvailabilityPage)
_slots_page = msgspec.json.Decoder(_SlotsPage)
_counters_page = msgspec.json.Decoder(_CountersPage)
_events_page = msgspec.json.Decoder(_EventsPage)


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


class Walk(Generic[ItemT]):
    """Where an iterator over pages stands. `cursor` goes on after the last page that was handed out to its end."""

    def __init__(
        self,
        target: str,
        query: list[tuple[str, str]],
        decode: Callable[[bytes], Page[ItemT]],
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

    def wanted(self) -> Call[Page[ItemT]] | None:
        """The call for the next page, None at the end."""
        if self._is_at_end:
            return None
        query = self._query
        if self.cursor is not None:
            query = [*query, (self._cursor_name, self.cursor)]
        return Call("GET", f"{self._target}?{urlencode(query)}", self._decode)

    def turn(self, page: Page[ItemT]) -> None:
        """Go on with this page."""
        self._items = iter(page.items)
        self.as_of = page.as_of
        self._next_cursor = page.next_cursor
        # The feed has a cursor at its end too, and is at its end when nothing came.
        self._is_at_end = page.next_cursor is None or (self._cursor_name == "after" and not page.items)


def availability(
    *,
    pool_id: str | Sequence[str] | None,
    capacity_type: str | None,
    zone: str | None,
    starts_from: When | None,
    starts_to: When | None,
    quantity: int | None,
    min_position: str | None,
    page_size: int,
) -> Walk[Available]:
    """What is left, slot by slot."""
    query = _selection(
        pool_id=pool_id,
        capacity_type=capacity_type,
        zone=zone,
        starts_from=starts_from,
        starts_to=starts_to,
        quantity=quantity,
        min_position=min_position,
        page_size=page_size,
    )
    return Walk("/v1/availability", query, _availability_page.decode)


def slots(
    *,
    pool_id: str | Sequence[str] | None,
    capacity_type: str | None,
    zone: str | None,
    starts_from: When | None,
    starts_to: When | None,
    page_size: int,
) -> Walk[Slot]:
    """Slots for shoppers."""
    query = _selection(
        pool_id=pool_id,
        capacity_type=capacity_type,
        zone=zone,
        starts_from=starts_from,
        starts_to=starts_to,
        page_size=page_size,
    )
    return Walk("/v1/slots", query, _slots_page.decode)


def counters(
    *,
    pool_id: str | Sequence[str] | None,
    capacity_type: str | None,
    zone: str | None,
    starts_from: When | None,
    starts_to: When | None,
    min_position: str | None,
    page_size: int,
) -> Walk[Counter]:
    """Everything about counters."""
    query = _selection(
        pool_id=pool_id,
        capacity_type=capacity_type,
        zone=zone,
        starts_from=starts_from,
        starts_to=starts_to,
        min_position=min_position,
        page_size=page_size,
    )
    return Walk("/v1/counters", query, _counters_page.decode)


def events(after: str | None, page_size: int) -> Walk[Event]:
    """The feed, from a cursor on."""
    return Walk("/v1/events", [("limit", str(page_size))], _events_page.decode, cursor_name="after", cursor=after)
