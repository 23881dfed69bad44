"""Slots on ordinary days, on both daylight-saving days of four zones, and what is no slot.

Expected instants are written in UTC by hand from the published rules of each zone, not computed with the code under test.
Berlin: 2026-03-29 02:00 -> 03:00, 2026-10-25 03:00 -> 02:00. New York: 2026-03-08 02:00 -> 03:00, 2026-11-01 02:00 -> 01:00.
Lord Howe shifts by half an hour: 2026-10-04 02:00 -> 02:30, 2026-04-05 02:00 -> 01:30. Singapore never shifts.
"""

import datetime as dt
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.slots import (
    DAYS_BEFORE_MAX,
    MINUTES_BEFORE_MAX,
    Cutoff,
    Slot,
    SlotError,
    cutoff_at_ms,
    make_cutoff,
    parse_slot_id,
    resolve,
    zone,
)
from tests.core.drawing import tries

BERLIN = "Europe/Berlin"
NEW_YORK = "America/New_York"
SINGAPORE = "Asia/Singapore"
LORD_HOWE = "Australia/Lord_Howe"


def utc_ms(text: str) -> int:
    """Milliseconds of an instant written in UTC."""
    return int(dt.datetime.fromisoformat(f"{text}+00:00").timestamp()) * 1000


RESOLVED = [
    # zone, slot, starts, ends
    (BERLIN, "2026-12-01T18:00-20:00", "2026-12-01T17:00", "2026-12-01T19:00"),
    (BERLIN, "2026-07-01T18:00-20:00", "2026-07-01T16:00", "2026-07-01T18:00"),
    (BERLIN, "2026-12-31T22:00-02:00", "2026-12-31T21:00", "2027-01-01T01:00"),
    (BERLIN, "2026-12-01T08:00-08:00", "2026-12-01T07:00", "2026-12-02T07:00"),
    (BERLIN, "2026-12-01T22:00-00:00", "2026-12-01T21:00", "2026-12-01T23:00"),
    # spring in Berlin: 02:00 to 03:00 is skipped, the day has 23 hours
    (BERLIN, "2026-03-29T01:00-02:00", "2026-03-29T00:00", "2026-03-29T01:00"),
    (BERLIN, "2026-03-29T01:00-03:00", "2026-03-29T00:00", "2026-03-29T01:00"),
    (BERLIN, "2026-03-29T01:30-02:30", "2026-03-29T00:30", "2026-03-29T01:30"),
    (BERLIN, "2026-03-29T02:00-04:00", "2026-03-29T01:00", "2026-03-29T02:00"),
    (BERLIN, "2026-03-29T02:30-04:00", "2026-03-29T01:30", "2026-03-29T02:00"),
    (BERLIN, "2026-03-29T03:00-04:00", "2026-03-29T01:00", "2026-03-29T02:00"),
    (BERLIN, "2026-03-28T22:00-06:00", "2026-03-28T21:00", "2026-03-29T04:00"),
    (BERLIN, "2026-03-29T00:00-00:00", "2026-03-28T23:00", "2026-03-29T22:00"),
    # autumn in Berlin: 02:00 to 03:00 comes twice and means the first, the day has 25 hours
    (BERLIN, "2026-10-25T01:00-02:00", "2026-10-24T23:00", "2026-10-25T00:00"),
    (BERLIN, "2026-10-25T02:00-03:00", "2026-10-25T00:00", "2026-10-25T02:00"),
    (BERLIN, "2026-10-25T02:00-02:30", "2026-10-25T00:00", "2026-10-25T00:30"),
    (BERLIN, "2026-10-25T02:30-03:00", "2026-10-25T00:30", "2026-10-25T02:00"),
    (BERLIN, "2026-10-25T03:00-04:00", "2026-10-25T02:00", "2026-10-25T03:00"),
    (BERLIN, "2026-10-24T22:00-06:00", "2026-10-24T20:00", "2026-10-25T05:00"),
    (BERLIN, "2026-10-25T00:00-00:00", "2026-10-24T22:00", "2026-10-25T23:00"),
    # New York
    (NEW_YORK, "2026-03-08T01:00-03:00", "2026-03-08T06:00", "2026-03-08T07:00"),
    (NEW_YORK, "2026-03-08T02:30-04:00", "2026-03-08T07:30", "2026-03-08T08:00"),
    (NEW_YORK, "2026-03-07T23:00-05:00", "2026-03-08T04:00", "2026-03-08T09:00"),
    (NEW_YORK, "2026-11-01T00:00-01:00", "2026-11-01T04:00", "2026-11-01T05:00"),
    (NEW_YORK, "2026-11-01T01:00-02:00", "2026-11-01T05:00", "2026-11-01T07:00"),
    (NEW_YORK, "2026-11-01T01:30-02:00", "2026-11-01T05:30", "2026-11-01T07:00"),
    (NEW_YORK, "2026-10-31T22:00-04:00", "2026-11-01T02:00", "2026-11-01T09:00"),
    # Lord Howe: half an hour
    (LORD_HOWE, "2026-10-04T01:00-02:00", "2026-10-03T14:30", "2026-10-03T15:30"),
    (LORD_HOWE, "2026-10-04T02:00-03:00", "2026-10-03T15:30", "2026-10-03T16:00"),
    (LORD_HOWE, "2026-10-04T02:15-03:00", "2026-10-03T15:45", "2026-10-03T16:00"),
    (LORD_HOWE, "2026-10-03T22:00-06:00", "2026-10-03T11:30", "2026-10-03T19:00"),
    (LORD_HOWE, "2026-04-05T01:00-01:30", "2026-04-04T14:00", "2026-04-04T14:30"),
    (LORD_HOWE, "2026-04-05T01:30-02:00", "2026-04-04T14:30", "2026-04-04T15:30"),
    (LORD_HOWE, "2026-04-05T01:00-02:00", "2026-04-04T14:00", "2026-04-04T15:30"),
    (LORD_HOWE, "2026-04-04T22:00-06:00", "2026-04-04T11:00", "2026-04-04T19:30"),
    # Singapore, on the days others shift
    (SINGAPORE, "2026-03-29T02:00-03:00", "2026-03-28T18:00", "2026-03-28T19:00"),
    (SINGAPORE, "2026-10-25T02:00-03:00", "2026-10-24T18:00", "2026-10-24T19:00"),
    (SINGAPORE, "2026-12-01T22:00-02:00", "2026-12-01T14:00", "2026-12-01T18:00"),
]


@pytest.mark.parametrize(("time_zone", "slot_id", "starts_at", "ends_at"), RESOLVED)
def test_a_slot_is_resolved_to_instants(time_zone: str, slot_id: str, starts_at: str, ends_at: str) -> None:
    assert resolve(slot_id, time_zone) == (utc_ms(starts_at), utc_ms(ends_at))


SKIPPED = [
    (BERLIN, "2026-03-29T02:00-03:00"),
    (BERLIN, "2026-03-29T02:30-03:00"),
    (BERLIN, "2026-03-29T02:30-03:30"),
    (BERLIN, "2026-03-29T02:15-03:10"),
    (NEW_YORK, "2026-03-08T02:00-03:00"),
    (LORD_HOWE, "2026-10-04T02:00-02:30"),
]


@pytest.mark.parametrize(("time_zone", "slot_id"), SKIPPED)
def test_a_slot_the_clock_skips_does_not_exist(time_zone: str, slot_id: str) -> None:
    with pytest.raises(SlotError, match="does not exist"):
        resolve(slot_id, time_zone)
    assert resolve(slot_id, SINGAPORE).ends_at_ms > resolve(slot_id, SINGAPORE).starts_at_ms


NIGHTS = [
    (BERLIN, "2026-10-25", 25 * 60),
    (NEW_YORK, "2026-11-01", 25 * 60),
    (LORD_HOWE, "2026-04-05", 24 * 60 + 30),
    (SINGAPORE, "2026-10-25", 24 * 60),
    (BERLIN, "2026-12-01", 24 * 60),
]


@pytest.mark.parametrize(("time_zone", "date", "minutes"), NIGHTS)
@pytest.mark.parametrize("step_minutes", [15, 30, 60, 120])
def test_a_chain_of_slots_covers_a_long_day_without_gap_or_overlap(
    time_zone: str, date: str, minutes: int, step_minutes: int
) -> None:
    starts = range(0, 24 * 60, step_minutes)
    ids = [f"{date}T{clock(start)}-{clock(start + step_minutes)}" for start in starts]
    spans = [resolve(slot_id, time_zone) for slot_id in ids]
    for before, after in pairwise(spans):
        assert before.ends_at_ms == after.starts_at_ms
    assert spans[-1].ends_at_ms - spans[0].starts_at_ms == minutes * 60_000


def clock(minute: int) -> str:
    return f"{minute // 60 % 24:02}:{minute % 60:02}"


SHORT_DAYS = [
    (BERLIN, "2026-03-29", 23 * 60),
    (NEW_YORK, "2026-03-08", 23 * 60),
    (LORD_HOWE, "2026-10-04", 23 * 60 + 30),
]


@pytest.mark.parametrize(("time_zone", "date", "minutes"), SHORT_DAYS)
def test_the_slots_that_exist_cover_a_short_day(time_zone: str, date: str, minutes: int) -> None:
    step_minutes = 30
    spans = []
    for start in range(0, 24 * 60, step_minutes):
        try:
            spans.append(resolve(f"{date}T{clock(start)}-{clock(start + step_minutes)}", time_zone))
        except SlotError:
            continue
    covered = set()
    for span in spans:
        covered |= set(range(span.starts_at_ms, span.ends_at_ms, step_minutes * 60_000))
    assert len(covered) * step_minutes == minutes


CUTOFFS = [
    # zone, slot, rule, cut-off; minutes are minutes of real time, a local time is a time on the wall
    (BERLIN, "2026-12-01T18:00-20:00", Cutoff(minutes_before=90), "2026-12-01T15:30"),
    (BERLIN, "2026-12-01T18:00-20:00", Cutoff(minutes_before=0), "2026-12-01T17:00"),
    (BERLIN, "2026-12-01T18:00-20:00", Cutoff(days_before=1, local_minute=18 * 60), "2026-11-30T17:00"),
    (BERLIN, "2026-12-01T18:00-20:00", Cutoff(days_before=0, local_minute=0), "2026-11-30T23:00"),
    (BERLIN, "2026-03-29T04:00-06:00", Cutoff(minutes_before=180), "2026-03-28T23:00"),
    (BERLIN, "2026-10-25T04:00-06:00", Cutoff(minutes_before=180), "2026-10-25T00:00"),
    (BERLIN, "2026-03-30T10:00-12:00", Cutoff(days_before=1, local_minute=18 * 60), "2026-03-29T16:00"),
    (BERLIN, "2026-03-29T10:00-12:00", Cutoff(days_before=1, local_minute=18 * 60), "2026-03-28T17:00"),
    (BERLIN, "2026-10-25T10:00-12:00", Cutoff(days_before=1, local_minute=18 * 60), "2026-10-24T16:00"),
    (BERLIN, "2026-10-26T10:00-12:00", Cutoff(days_before=1, local_minute=18 * 60), "2026-10-25T17:00"),
    (BERLIN, "2026-03-30T10:00-12:00", Cutoff(days_before=1, local_minute=150), "2026-03-29T01:30"),
    (BERLIN, "2026-10-26T10:00-12:00", Cutoff(days_before=1, local_minute=150), "2026-10-25T00:30"),
    (BERLIN, "2026-03-01T10:00-12:00", Cutoff(days_before=60, local_minute=23 * 60 + 59), "2025-12-31T22:59"),
    (BERLIN, "2026-10-24T22:00-06:00", Cutoff(days_before=0, local_minute=12 * 60), "2026-10-24T10:00"),
    (NEW_YORK, "2026-03-08T10:00-12:00", Cutoff(minutes_before=600), "2026-03-08T04:00"),
    (NEW_YORK, "2026-03-09T10:00-12:00", Cutoff(days_before=1, local_minute=150), "2026-03-08T07:30"),
    (NEW_YORK, "2026-11-01T10:00-12:00", Cutoff(days_before=0, local_minute=90), "2026-11-01T05:30"),
    (LORD_HOWE, "2026-10-04T10:00-12:00", Cutoff(days_before=0, local_minute=135), "2026-10-03T15:45"),
    (LORD_HOWE, "2026-04-05T10:00-12:00", Cutoff(days_before=0, local_minute=105), "2026-04-04T14:45"),
    (LORD_HOWE, "2026-04-05T10:00-12:00", Cutoff(minutes_before=600), "2026-04-04T13:30"),
    (SINGAPORE, "2026-03-29T10:00-12:00", Cutoff(days_before=1, local_minute=18 * 60), "2026-03-28T10:00"),
]


@pytest.mark.parametrize(("time_zone", "slot_id", "rule", "cutoff_at"), CUTOFFS)
def test_a_cutoff(time_zone: str, slot_id: str, rule: Cutoff, cutoff_at: str) -> None:
    assert cutoff_at_ms(slot_id, time_zone, rule) == utc_ms(cutoff_at)


def test_without_a_rule_there_is_no_cutoff() -> None:
    assert cutoff_at_ms("2026-12-01T18:00-20:00", BERLIN, None) is None


def test_a_slot_id_is_taken_apart() -> None:
    assert parse_slot_id("2026-12-01T18:00-20:30") == Slot(dt.date(2026, 12, 1), dt.time(18), dt.time(20, 30))


BAD_SLOT_IDS = [
    "",
    "2026-12-01",
    "2026-12-01T18:00",
    "2026-12-01T18:00-20",
    "2026-12-01T18:00-20:00Z",
    "2026-12-01t18:00-20:00",
    "2026-12-01 18:00-20:00",
    "26-12-01T18:00-20:00",
    "2026-13-01T18:00-20:00",
    "2026-02-29T18:00-20:00",
    "2026-12-01T24:00-20:00",
    "2026-12-01T18:60-20:00",
    "2026-12-01T18:00-24:00",
    "2026-12-01T18:00-20:00\n",
    " 2026-12-01T18:00-20:00",
    "2026-12-01T18:00-20:00 ",
    "\u0968\u0966\u0968\u096c-12-01T18:00-20:00",
    "+026-12-01T18:00-20:00",
    "0000-12-01T18:00-20:00",
    "0001-01-01T18:00-20:00",
    "1970-12-31T18:00-20:00",
    "9999-12-01T18:00-20:00",
]


@pytest.mark.parametrize("slot_id", BAD_SLOT_IDS)
def test_no_slot_id(slot_id: str) -> None:
    with pytest.raises(SlotError):
        parse_slot_id(slot_id)
    with pytest.raises(SlotError):
        resolve(slot_id, BERLIN)


@pytest.mark.parametrize("slot_id", ["1971-01-01T00:00-00:00", "9998-12-31T23:59-00:00"])
def test_the_first_and_last_slot(slot_id: str) -> None:
    assert resolve(slot_id, BERLIN).ends_at_ms > resolve(slot_id, BERLIN).starts_at_ms
    assert isinstance(cutoff_at_ms(slot_id, BERLIN, Cutoff(days_before=60, local_minute=0)), int)


BAD_ZONES = [
    "",
    ".",
    "Europe",
    "Europe/Berlin\n",
    "Europe/Berlin/",
    "Europe/../Europe/Berlin",
    "../etc/passwd",
    "/etc/localtime",
    "Europe/Nowhere",
    "Europe\\Berlin",
    "a\0b",
    "\ud800",
    "é",
    "x" * 300,
    "__init__.py",
    "zone.tab",
    "tzdata.zi",
    "localtime",
    "posixrules",
    "Factory",
    "posix/Europe/Berlin",
    "right/Europe/Berlin",
    "UTC+2",
]


@pytest.mark.parametrize("name", BAD_ZONES)
def test_no_zone(name: str) -> None:
    with pytest.raises(SlotError, match="is no IANA time zone"):
        zone(name)
    with pytest.raises(SlotError, match="is no IANA time zone"):
        resolve("2026-12-01T18:00-20:00", name)


@pytest.mark.parametrize(
    "name", [BERLIN, NEW_YORK, SINGAPORE, LORD_HOWE, "UTC", "Asia/Kathmandu", "America/Indiana/Knox"]
)
def test_a_zone(name: str) -> None:
    assert zone(name).key == name


def test_rules_from_their_json_members() -> None:
    assert make_cutoff(minutes_before=90) == Cutoff(minutes_before=90)
    assert make_cutoff(minutes_before=0) == Cutoff(minutes_before=0)
    assert make_cutoff(minutes_before=MINUTES_BEFORE_MAX) == Cutoff(minutes_before=MINUTES_BEFORE_MAX)
    assert make_cutoff(days_before=1, local_time="18:05") == Cutoff(days_before=1, local_minute=18 * 60 + 5)
    assert make_cutoff(days_before=0, local_time="00:00") == Cutoff(days_before=0, local_minute=0)
    assert make_cutoff(days_before=DAYS_BEFORE_MAX, local_time="23:59") == Cutoff(None, DAYS_BEFORE_MAX, 1439)


BAD_RULES: list[tuple[int | None, int | None, str | None]] = [
    (None, None, None),
    (90, 1, "18:00"),
    (90, 1, None),
    (90, None, "18:00"),
    (None, 1, None),
    (None, None, "18:00"),
    (-1, None, None),
    (MINUTES_BEFORE_MAX + 1, None, None),
    (None, -1, "18:00"),
    (None, DAYS_BEFORE_MAX + 1, "18:00"),
    (None, 1, "24:00"),
    (None, 1, "18:60"),
    (None, 1, "8:00"),
    (None, 1, "18:00\n"),
    (None, 1, "18:00:00"),
    (None, 1, "\u0967\u096e:\u0966\u0966"),
    (None, 1, ""),
]


@pytest.mark.parametrize(("minutes_before", "days_before", "local_time"), BAD_RULES)
def test_no_rule(minutes_before: int | None, days_before: int | None, local_time: str | None) -> None:
    with pytest.raises(SlotError):
        make_cutoff(minutes_before, days_before, local_time)


zones = st.sampled_from((BERLIN, NEW_YORK, SINGAPORE, LORD_HOWE, "UTC", "Africa/Casablanca", "Pacific/Apia"))
dates = st.dates(dt.date(2000, 1, 1), dt.date(2037, 12, 31))


@given(zones, dates, st.integers(0, 1439), st.integers(0, 1439))
@tries(300)
def test_a_slot_that_exists_has_a_length_and_starts_at_its_time_on_the_wall(
    time_zone: str, date: dt.date, start: int, end: int
) -> None:
    try:
        span = resolve(f"{date}T{clock(start)}-{clock(end)}", time_zone)
    except SlotError:
        return
    assert 0 < span.ends_at_ms - span.starts_at_ms <= 49 * 3_600_000
    assert span.starts_at_ms % 60_000 == span.ends_at_ms % 60_000 == 0
    wall = dt.datetime.fromtimestamp(span.starts_at_ms / 1000, zone(time_zone))
    asked = dt.datetime.combine(date, dt.time(*divmod(start, 60)))
    shifted = wall.replace(tzinfo=None) - asked
    assert dt.timedelta(0) <= shifted <= dt.timedelta(hours=24)
    assert wall.fold == 0
