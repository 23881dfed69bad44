"""Slots: from local date and times in an IANA zone to instants, once, right on both daylight-saving days.

A slot id is `YYYY-MM-DDTHH:MM-HH:MM`: local date, local start and end in the pool's zone. An end at or before the start lies
on the next day. Rules on the two odd days, those of PEP 495 with fold=0:
- a local time that the clock skips (spring) means the same time span after the change: 02:30 becomes 03:30;
- a local time that comes twice (autumn) means the first one; so a chain of slots covers the long night without a gap.
A slot that would have no length after that does not exist and is refused.

Instants are integer milliseconds since 1970 (UTC). Not promised: what a zone will do in ten years; a counter keeps the
instants resolved when it was defined.
"""

import datetime as dt
import re
import zoneinfo
from functools import lru_cache
from typing import NamedTuple

SLOT_ID_PATTERN = r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}-\d{2}:\d{2}$"
_SLOT_ID = re.compile(r"(\d{4})-(\d{2})-(\d{2})T(\d{2}):(\d{2})-(\d{2}):(\d{2})", re.ASCII)
_MINUTE_MS = 60_000
_NO_ZONES = ("localtime", "posixrules", "Factory", "posix/", "right/")
"""What a host's zone directory holds beside the zones: its own local time, and copies that count leap seconds. They would
mean other instants on another host."""
MINUTES_BEFORE_MAX = 60 * 24 * 60
DAYS_BEFORE_MAX = 60


class SlotError(ValueError):
    """A slot id, zone or rule that cannot be. The text says why and what would do."""


class Slot(NamedTuple):
    """A slot id taken apart: local times, no zone yet."""

    date: dt.date
    start: dt.time
    end: dt.time


class Instants(NamedTuple):
    """The half-open span of a slot, in milliseconds since 1970 UTC."""

    starts_at_ms: int
    ends_at_ms: int


class Cutoff(NamedTuple):
    """The last moment for orders: `minutes_before` the start, or `days_before` the service date at `local_minute`.

    `local_minute` counts from local midnight. Exactly one of the two forms is set.
    """

    minutes_before: int | None = None
    days_before: int | None = None
    local_minute: int | None = None


def parse_slot_id(slot_id: str) -> Slot:
    """Take a slot id apart. Raises SlotError."""
    match = _SLOT_ID.fullmatch(slot_id)
    if match is None:
        raise SlotError(f"{slot_id!r} is no slot id: write local date, start and end, as in 2026-12-01T18:00-20:00")
    year, month, day, hour, minute, end_hour, end_minute = map(int, match.groups())
    try:
        slot = Slot(dt.date(year, month, day), dt.time(hour, minute), dt.time(end_hour, end_minute))
    except ValueError as error:
        raise SlotError(f"{slot_id!r} is no slot id: {error}") from None
    if not 1971 <= year <= 9998:
        raise SlotError(f"{slot_id!r}: the year must lie between 1971 and 9998")
    return slot


@lru_cache(maxsize=1024)
def zone(name: str) -> zoneinfo.ZoneInfo:
    """The IANA zone of that name. Raises SlotError."""
    try:
        if not name.startswith(_NO_ZONES):
            return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        pass
    raise SlotError(f"{name!r} is no IANA time zone: write one such as Europe/Berlin")


def _instant_ms(local: dt.datetime, time_zone: zoneinfo.ZoneInfo) -> int:
    return int(local.replace(tzinfo=time_zone, fold=0).timestamp()) * 1000


@lru_cache(maxsize=65_536)
def resolve(slot_id: str, time_zone: str) -> Instants:
    """The instants of a slot in a zone. Raises SlotError."""
    slot = parse_slot_id(slot_id)
    where = zone(time_zone)
    end_date = slot.date if slot.end > slot.start else slot.date + dt.timedelta(days=1)
    starts_at_ms = _instant_ms(dt.datetime.combine(slot.date, slot.start), where)
    ends_at_ms = _instant_ms(dt.datetime.combine(end_date, slot.end), where)
    if ends_at_ms <= starts_at_ms:
        raise SlotError(f"{slot_id!r} does not exist in {time_zone}: the clock skips it on that day")
    return Instants(starts_at_ms, ends_at_ms)


def cutoff_at_ms(slot_id: str, time_zone: str, rule: Cutoff | None) -> int | None:
    """The instant from which a slot takes no more orders, or None without a rule. Raises SlotError."""
    if rule is None:
        return None
    if rule.minutes_before is not None:
        return resolve(slot_id, time_zone).starts_at_ms - rule.minutes_before * _MINUTE_MS
    date = parse_slot_id(slot_id).date - dt.timedelta(days=rule.days_before or 0)
    hour, minute = divmod(rule.local_minute or 0, 60)
    return _instant_ms(dt.datetime.combine(date, dt.time(hour, minute)), zone(time_zone))


def make_cutoff(
    minutes_before: int | None = None, days_before: int | None = None, local_time: str | None = None
) -> Cutoff:
    """A checked rule from its JSON members. Raises SlotError where it is neither form or out of range."""
    if minutes_before is not None and days_before is None and local_time is None:
        if not 0 <= minutes_before <= MINUTES_BEFORE_MAX:
            raise SlotError(f"cutoff.minutes_before must lie between 0 and {MINUTES_BEFORE_MAX}")
        return Cutoff(minutes_before=minutes_before)
    if minutes_before is None and days_before is not None and local_time is not None:
        if not 0 <= days_before <= DAYS_BEFORE_MAX:
            raise SlotError(f"cutoff.days_before must lie between 0 and {DAYS_BEFORE_MAX}")
        match = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)", local_time, re.ASCII)
        if match is None:
            raise SlotError(f"cutoff.local_time {local_time!r} must be a time of day, as in 18:00")
        return Cutoff(days_before=days_before, local_minute=int(match[1]) * 60 + int(match[2]))
    raise SlotError('cutoff takes {"minutes_before": 90} or {"days_before": 1, "local_time": "18:00"}, not a mixture')
