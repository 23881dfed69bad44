"""The replay's own arithmetic, and that its proofs notice what they are for."""

import datetime as dt
import functools
from collections import Counter
from typing import Any

from perf import replay
from perf.load import Statistics
from perf.replay import Order, Result

VAN, PICK, SLOT = "van-2", "pick-dc1", "2027-12-26T08:00-10:00"


def order(ref: str, day: dt.date = dt.date(2017, 12, 24), lines: int = 3) -> Order:
    return Order(ref, day, 8, SLOT, VAN, PICK, lines)


@functools.cache
def year() -> list[Order]:
    return replay.load_orders(replay.WEEKS_MIN)


def test_the_first_sunday_of_2017_becomes_the_first_sunday_of_2027() -> None:
    first = year()[0]
    assert (first.day, first.slot_id) == (dt.date(2017, 1, 1), "2027-01-03T10:00-12:00")
    assert len(year()) == 155_848
    assert len({one.van_pool for one in year()}) == 457


def test_slots_always_lie_in_the_future() -> None:
    assert replay.weeks_to_move(dt.date(2026, 12, 1)) == replay.WEEKS_MIN
    for today in (dt.date(2027, 1, 1), dt.date(2030, 6, 15), dt.date(2031, 1, 5)):
        weeks = replay.weeks_to_move(today)
        ahead = replay.FIRST_DAY + dt.timedelta(weeks=weeks) - today
        assert replay.DAYS_AHEAD_MIN <= ahead.days < replay.DAYS_AHEAD_MIN + 7


def test_limits_are_those_of_the_first_eleven_months() -> None:
    sunday = dt.date(2017, 1, 1)
    weeks = [sunday + dt.timedelta(weeks=week) for week in range(48)]
    orders = [order(f"{day}", day, lines) for lines, day in enumerate(weeks, 1)]
    orders.append(order("second of a day", weeks[0]))
    orders += [order(f"december {number}", dt.date(2017, 12, 3), 1_000) for number in range(9)]
    limits = replay.make_limits(orders)
    assert limits[VAN, 6, 8] == 2
    # The 46th of 48 days, by nearest rank, is the first with 95 % of them at or below it.
    assert limits[PICK, 6, 8] == 46
    assert replay.make_counters(orders, limits) == {(VAN, SLOT): 2, (PICK, SLOT): 46}


def test_days_without_orders_count() -> None:
    orders = [order("one", dt.date(2017, 1, 1), 50), order("two", dt.date(2017, 1, 8), 60)]
    assert replay.make_limits(orders)[PICK, 6, 8] == 1


SHARDS = 2
ORDERS = [order("a"), order("b"), order("c")]
RESULTS = {"a": Result("r1"), "b": replay.REFUSED, "c": replay.REFUSED}
LIMITS = {(VAN, SLOT): 1, (PICK, SLOT): 5}


def told(lines: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
    return [{"pool_id": pool_id, "slot_id": slot_id, "quantity": units} for (pool_id, slot_id), units in lines.items()]


def made(ref: str, number: str) -> dict[str, Any]:
    data = {"order_ref": ref, "channel": "replay", "reservation_id": number, "lines": told(order(ref).lines)}
    return {"event": "confirmed_at_once", "position": "0-1", "data": data}


def synced(number: str | None, status: str) -> dict[str, Any]:
    data = {"reservation_id": number, "version": 1, "status": status, "lines": told({(PICK, SLOT): 3})}
    return {"event": "part_synced", "position": "1-2", "data": data}


EVENTS: list[dict[str, Any]] = [
    {"event": "part_prepared", "position": "1-1", "data": {"home_shard": 0, "attempt": 7, "lines": []}},
    made("a", "r1"),
    synced("r1", "confirmed"),
    synced(None, "released"),
    {"event": "parts_settled", "position": "0-2", "data": {"reservation_id": "r1", "version": 1}},
]


def counters(van: int, pick: int) -> dict[tuple[str, str], dict[str, Any]]:
    return {(VAN, SLOT): {"used": van, "limit": 1}, (PICK, SLOT): {"used": pick, "limit": 5}}


def test_counters_are_compared_with_what_was_acknowledged() -> None:
    assert list(replay.check_counters(ORDERS, RESULTS, LIMITS, counters(1, 3))) == []
    assert len(list(replay.check_counters(ORDERS, RESULTS, LIMITS, counters(1, 4)))) == 1
    assert len(list(replay.check_counters(ORDERS, RESULTS, LIMITS, {}))) == 2


def test_van_and_warehouse_of_this_order_lie_on_two_shards() -> None:
    assert ORDERS[0].lines_elsewhere(SHARDS) == {(PICK, SLOT): 3}
    assert ORDERS[0].lines_elsewhere(1) == {}


def test_the_feed_is_compared_with_what_was_acknowledged() -> None:
    def problems(events: list[dict[str, Any]]) -> list[str]:
        return list(replay.check_feed(ORDERS, RESULTS, events, SHARDS))

    assert problems(EVENTS) == []
    half = made("a", "r1")
    half["data"]["lines"].pop()
    for wrong, named in (
        ([*EVENTS, EVENTS[1]], "the feed tells"),
        ([*EVENTS, made("b", "r9")], "r9: in the feed, and not acknowledged"),
        ([EVENTS[0], *EVENTS[2:]], "the feed tells []"),
        ([half, *EVENTS[2:]], "the feed tells"),
        ([*EVENTS[:2], synced("r1", "released"), *EVENTS[3:]], "on other shards are {}"),
        (EVENTS[:-1], "settled 0 times"),
    ):
        (found,) = problems(wrong)
        assert named in found


def test_who_is_accepted_after_a_refusal_must_have_met_an_attempt() -> None:
    again = RESULTS | {"c": Result("r4")}
    assert list(replay.check_asked_again(ORDERS, RESULTS, again, SHARDS)) == []
    # On one shard nobody waits for another one, so nobody can have been in the way.
    assert len(list(replay.check_asked_again(ORDERS, RESULTS, again, 1))) == 1


def test_the_second_pass_changes_nothing() -> None:
    def problems(second: dict[str, Result], events: list[dict[str, Any]]) -> int:
        return len(list(replay.check_twice(RESULTS, second, events)))

    refused = {"event": "refused", "position": "1-9", "data": {"order_ref": "b"}}
    assert problems(RESULTS, []) == 0
    assert problems(RESULTS, [refused]) == 0
    assert problems(RESULTS, [refused | {"data": {"order_ref": "a"}}]) == 1
    assert problems(RESULTS, [made("a", "r5")]) == 1
    assert problems(RESULTS, [synced(None, "released")]) == 1
    assert problems(RESULTS | {"a": Result("r5")}, []) == 1
    assert problems(RESULTS | {"c": Result("r4")}, [made("c", "r4")]) == 2
    assert problems({"a": RESULTS["a"]}, []) == 2


def test_refusals_are_told_by_month() -> None:
    done = replay.Pass(RESULTS, [], 2.0, [1.0, 2.0, 3.0], Statistics(6, 1, 0, 0, {}))
    figures = replay.summary(ORDERS, done, SHARDS)
    assert (figures["accepted"], figures["refused"], figures["refused_by_month"]) == (1, 2, {"2017-12": 2})
    assert (figures["orders_per_second"], figures["request_ms_max"]) == (1.5, 3.0)
    assert figures["over_shards"] == 3
    assert replay.units_of(ORDERS, RESULTS) == Counter({(VAN, SLOT): 1, (PICK, SLOT): 3})
