"""What the demo shows: the pools of a small grocer and their slots of two weeks. Pure: dates in, bodies of requests out.

The numbers are invented, of the size that one town has: a van makes about four stops an hour, a picker about sixty lines.
"""

import datetime as dt
from collections.abc import Iterator
from typing import Final, NamedTuple

DAYS: Final = 14
ORDERED_FROM_DAY, ORDERED_TO_DAY = 2, 6
"""Standing orders lie on these days from today. The first is far enough away for every cut-off here."""

SATURDAY, SUNDAY = 5, 6


class Template(NamedTuple):
    """A slot of each day: local start and end, planned units on a weekday and on a Saturday; 0 is no slot."""

    start: str
    end: str
    weekday: int
    saturday: int


class DemoPool(NamedTuple):
    """A pool as the demo defines it."""

    pool_id: str
    capacity_type: str
    unit: str
    zone: str
    time_zone: str
    cutoff: dict[str, int | str]
    templates: tuple[Template, ...]
    overbook: int
    buffer: int
    ordered_share: float
    """Of the limit, taken by standing orders in an evening slot; earlier slots have half of it."""


class Order(NamedTuple):
    """A standing order: a reservation that the demo makes."""

    pool_id: str
    slot_id: str
    quantity: int


_VANS: Final = (
    Template("08:00", "10:00", 16, 24),
    Template("10:00", "12:00", 24, 32),
    Template("12:00", "14:00", 24, 32),
    Template("14:00", "16:00", 24, 24),
    Template("16:00", "18:00", 32, 16),
    Template("18:00", "20:00", 40, 0),
    Template("20:00", "22:00", 24, 0),
)
_SHIFTS: Final = (
    Template("05:00", "13:00", 2_400, 2_400),
    Template("13:00", "21:00", 3_600, 1_800),
)
_LOCKERS: Final = (Template("07:00", "22:00", 60, 60),)

POOLS: Final = (
    DemoPool("van-north", "logistics", "stop", "north", "Europe/Berlin", {"minutes_before": 90}, _VANS, 2, 1, 0.9),
    DemoPool("van-south", "logistics", "stop", "south", "Europe/Berlin", {"minutes_before": 90}, _VANS, 0, 2, 0.6),
    DemoPool("van-london", "logistics", "stop", "london", "Europe/London", {"minutes_before": 120}, _VANS, 2, 0, 0.7),
    DemoPool(
        "locker-station", "logistics", "box", "north", "Europe/Berlin", {"minutes_before": 240}, _LOCKERS, 0, 0, 0.4
    ),
    DemoPool(
        "pick-dc1",
        "warehouse",
        "pick_line",
        "dc1",
        "Europe/Berlin",
        {"days_before": 1, "local_time": "18:00"},
        _SHIFTS,
        0,
        120,
        0.8,
    ),
    DemoPool(
        "pick-dc2",
        "warehouse",
        "pick_line",
        "dc2",
        "Europe/London",
        {"days_before": 1, "local_time": "20:00"},
        _SHIFTS,
        60,
        0,
        0.5,
    ),
)


def pool_body(pool: DemoPool) -> dict[str, object]:
    """The body of PUT /v1/pools/{pool_id}."""
    names = ("capacity_type", "unit", "zone", "time_zone", "cutoff")
    return {name: getattr(pool, name) for name in names} | {"reason": "demo"}


def _slots(pool: DemoPool, day: dt.date) -> Iterator[tuple[Template, str, int]]:
    if day.weekday() == SUNDAY:
        return
    for template in pool.templates:
        base = template.saturday if day.weekday() == SATURDAY else template.weekday
        if base:
            yield template, f"{day}T{template.start}-{template.end}", base


def counters(today: dt.date) -> list[dict[str, object]]:
    """The rows of POST /v1/counters:import: tomorrow and the days after it, Sundays off, one slot closed for show."""
    rows: list[dict[str, object]] = []
    for pool in POOLS:
        for offset in range(1, DAYS + 1):
            day = today + dt.timedelta(days=offset)
            for template, slot_id, base in _slots(pool, day):
                closed = pool.pool_id == "van-south" and day.weekday() == SATURDAY and template.start == "16:00"
                row = {"base": base, "overbook": pool.overbook, "buffer": pool.buffer, "closed": closed}
                rows.append({"pool_id": pool.pool_id, "slot_id": slot_id, **row})
    return rows


def standing_orders(today: dt.date) -> Iterator[Order]:
    """Reservations that make the overview look like a week under way: evenings fuller than mornings."""
    for pool in POOLS:
        for offset in range(ORDERED_FROM_DAY, ORDERED_TO_DAY + 1):
            for template, slot_id, base in _slots(pool, today + dt.timedelta(days=offset)):
                share = pool.ordered_share if template.end >= "18:00" else pool.ordered_share / 2
                if template.start == "16:00" and pool.pool_id == "van-south":
                    continue
                yield Order(pool.pool_id, slot_id, max(1, int((base + pool.overbook - pool.buffer) * share)))


def shown_slot(today: dt.date) -> tuple[str, str]:
    """A counter with room that takes orders now and for a day at least: what the printed commands are about."""
    pool = POOLS[0]
    for offset in range(ORDERED_FROM_DAY, DAYS):
        day = today + dt.timedelta(days=offset)
        if day.weekday() < SATURDAY:
            return pool.pool_id, f"{day}T18:00-20:00"
    raise ValueError("two weeks without a weekday")
