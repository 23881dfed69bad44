"""Pools, counters and imports over HTTP, against a real engine: versions, cut-offs, daylight saving, all or nothing."""

import threading
from typing import Any

import pytest

from engine.core.limits import UNITS_MAX
from tests.support.contract import Api, fresh, line, slot_id

POOL = {"capacity_type": "logistics", "unit": "stop", "time_zone": "Europe/Berlin"}


def test_a_pool_is_defined_and_changed(api: Api) -> None:
    path = f"/v1/pools/{fresh('pool')}"
    first = api.request("PUT", path, POOL, status=201)
    assert first.json() | {"plan_version": 0} == {
        **POOL,
        "pool_id": path.rpartition("/")[2],
        "zone": "",
        "cutoff": None,
        "plan_version": 0,
    }
    again = api.request("PUT", path, {**POOL, "zone": "north", "reason": "moved"}, status=200)
    assert again.json()["zone"] == "north"
    assert again.json()["plan_version"] > first.json()["plan_version"]
    assert again.headers["etag"] == f'"{again.json()["plan_version"]}"'
    assert api.get(path) == again.json()


def test_what_a_pool_with_slots_rests_on_stays(api: Api) -> None:
    counter = api.counter()
    path = counter.partition("/slots")[0]
    api.request("PUT", path, {**POOL, "zone": "elsewhere"}, status=200)
    for member, value in (("time_zone", "UTC"), ("unit", "box"), ("capacity_type", "warehouse")):
        api.request("PUT", path, {**POOL, member: value}, code="pool_has_slots")


@pytest.mark.parametrize(
    ("cutoff", "cutoff_at"),
    [
        (None, "2027-07-01T18:00:00.000Z"),
        ({"minutes_before": 0}, "2027-07-01T16:00:00.000Z"),
        ({"minutes_before": 90}, "2027-07-01T14:30:00.000Z"),
        ({"days_before": 0, "local_time": "00:00"}, "2027-06-30T22:00:00.000Z"),
        ({"days_before": 1, "local_time": "18:00"}, "2027-06-30T16:00:00.000Z"),
    ],
)
def test_the_cutoff_of_a_pool_holds_for_its_slots(api: Api, cutoff: Any, cutoff_at: str) -> None:
    pool_id = api.pool(cutoff={"minutes_before": 17})
    counter = api.counter(pool_id=pool_id, slot="2027-07-01T18:00-20:00")
    assert api.get(counter)["cutoff_at"] == "2027-07-01T15:43:00.000Z"
    assert api.request("PUT", f"/v1/pools/{pool_id}", {**POOL, "cutoff": cutoff}, status=200).json()["cutoff"] == cutoff
    assert api.get(counter)["cutoff_at"] == cutoff_at


@pytest.mark.parametrize(
    "cutoff",
    [
        {},
        {"minutes_before": 1, "days_before": 1, "local_time": "18:00"},
        {"days_before": 1},
        {"local_time": "18:00"},
        {"minutes_before": -1},
        {"minutes_before": 1_000_000},
        {"minutes_before": "90"},
        {"minutes_before": True},
        {"days_before": 61, "local_time": "18:00"},
        {"days_before": 1, "local_time": "24:00"},
        {"days_before": 1, "local_time": "18:00\n"},
        {"days_before": 1, "local_time": "6pm"},
        {"hours_before": 1},
        "90",
        90,
        [],
    ],
)
def test_a_cutoff_that_is_no_rule(api: Api, cutoff: object) -> None:
    api.request("PUT", f"/v1/pools/{fresh('pool')}", {**POOL, "cutoff": cutoff}, code="invalid_request")


@pytest.mark.parametrize(
    "time_zone", ["Mars/Olympus", "europe/berlin ", "../../etc/passwd", "/etc/localtime", "Europe", "Zürich", "."]
)
def test_a_time_zone_that_does_not_exist(api: Api, time_zone: str) -> None:
    path = f"/v1/pools/{fresh('pool')}"
    problem = api.request("PUT", path, {**POOL, "time_zone": time_zone}, code="invalid_slot").json()
    assert problem["outcome"] == "not_executed"
    api.request("GET", path, code="unknown_pool")


@pytest.mark.parametrize("pool_id", ["a" * 65, "-a", ".a", "a%20b", "a%0A", "%C3%BC", "a%00", "a,b", "%20", "a%2Fb"])
def test_names_that_no_pool_can_have(api: Api, pool_id: str) -> None:
    api.request("PUT", f"/v1/pools/{pool_id}", POOL, code="invalid_request")
    api.request("PUT", f"/v1/pools/{pool_id}/slots/{slot_id()}", {"base": 1}, code="invalid_request")


@pytest.mark.parametrize("pool_id", ["a" * 64, "Q", "0-names", "A.b_c-d", "a..", "v1"])
def test_names_that_a_pool_can_have(api: Api, pool_id: str) -> None:
    assert api.request("PUT", f"/v1/pools/{pool_id}", POOL, status=201).json()["pool_id"] == pool_id


def test_a_counter_is_defined_as_a_whole(api: Api) -> None:
    counter = api.counter(5, overbook=2, buffer=1, closed=True)
    shown = api.request("PUT", counter, {"base": 7}, status=200).json()
    assert (shown["base"], shown["overbook"], shown["buffer"], shown["limit"], shown["status"]) == (7, 0, 0, 7, "open")


def test_a_limit_may_fall_below_what_is_taken_and_releases_still_work(api: Api) -> None:
    counter = api.counter(5)
    held = api.hold(line(counter, 5))
    shown = api.request("PUT", counter, {"base": 2, "reason": "a van broke down"}, status=200).json()
    assert (shown["status"], shown["overcommitted_by"], shown["available"]) == ("overcommitted", 3, 0)
    api.request("POST", f"/v1/reservations/{held['reservation_id']}/confirm", status=200)
    api.request("POST", f"/v1/reservations/{held['reservation_id']}/release", status=200)
    assert api.get(counter)["available"] == 2


@pytest.mark.parametrize(
    ("slot", "starts_at", "ends_at"),
    [
        # The night that lacks an hour: 2027-03-28, and the one that has one twice: 2027-10-31.
        ("2027-03-28T01:30-03:30", "2027-03-28T00:30:00.000Z", "2027-03-28T01:30:00.000Z"),
        ("2027-03-28T02:30-04:30", "2027-03-28T01:30:00.000Z", "2027-03-28T02:30:00.000Z"),
        ("2027-10-31T02:00-04:00", "2027-10-31T00:00:00.000Z", "2027-10-31T03:00:00.000Z"),
        ("2027-07-01T23:00-01:00", "2027-07-01T21:00:00.000Z", "2027-07-01T23:00:00.000Z"),
        ("2027-07-01T00:00-00:00", "2027-06-30T22:00:00.000Z", "2027-07-01T22:00:00.000Z"),
    ],
)
def test_slots_on_odd_days(api: Api, slot: str, starts_at: str, ends_at: str) -> None:
    shown = api.get(api.counter(slot=slot))
    assert (shown["starts_at"], shown["ends_at"]) == (starts_at, ends_at)


@pytest.mark.parametrize(
    "slot",
    [
        "2027-03-28T02:00-03:00",  # the clock skips it
        "2027-03-28T02:30-03:30",
        "2027-02-29T10:00-12:00",
        "2027-13-01T10:00-12:00",
        "2027-01-01T24:00-25:00",
        "2027-01-01T10:60-12:00",
        "0000-01-01T10:00-12:00",
        "9999-12-31T10:00-12:00",
        "2027-01-01",
        "2027-01-01T10:00-12:00%20",
        "2027-01-01t10:00-12:00",
        "2027-01-01T10:00:00-12:00:00",
        "%D9%A2027-01-01T10:00-12:00",
        "x" * 100,
    ],
)
def test_slots_that_cannot_be(api: Api, slot: str) -> None:
    pool_id = api.pool()
    api.request("PUT", f"/v1/pools/{pool_id}/slots/{slot}", {"base": 1}, code="invalid_slot")
    assert api.get(f"/v1/counters?pool_id={pool_id}")["counters"] == []


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"base": -1},
        {"base": 1.5},
        {"base": "1"},
        {"base": True},
        {"base": None},
        {"base": UNITS_MAX + 1},
        {"base": 10**40},
        {"base": 1, "overbook": -1},
        {"base": 1, "buffer": -1},
        {"base": 1, "closed": 1},
        {"base": 1, "closed": "yes"},
        {"base": 1, "reason": "x" * 501},
        {"base": 1, "reason": "a\nb"},
        {"base": 1, "limit": 5},
        {"base": UNITS_MAX, "overbook": 1},
    ],
)
def test_units_that_no_counter_can_have(api: Api, members: dict[str, object]) -> None:
    pool_id = api.pool()
    api.request("PUT", f"/v1/pools/{pool_id}/slots/{slot_id()}", members, code="invalid_request")
    rows = [{"pool_id": pool_id, "slot_id": slot_id(), **members}]
    api.request("POST", "/v1/counters:import", {"counters": rows}, code="invalid_request")
    assert api.get(f"/v1/counters?pool_id={pool_id}")["counters"] == []


@pytest.mark.parametrize(
    ("members", "limit"),
    [
        ({"base": UNITS_MAX}, UNITS_MAX),
        ({"base": UNITS_MAX, "overbook": UNITS_MAX, "buffer": UNITS_MAX}, UNITS_MAX),
        ({"base": 0, "buffer": UNITS_MAX}, 0),
        ({"base": 0}, 0),
    ],
)
def test_units_at_their_bounds(api: Api, members: dict[str, int], limit: int) -> None:
    pool_id = api.pool()
    shown = api.request("PUT", f"/v1/pools/{pool_id}/slots/{slot_id()}", members, status=201).json()
    assert (shown["limit"], shown["available"]) == (limit, limit)


def test_a_counter_needs_its_pool(api: Api) -> None:
    api.request("PUT", f"/v1/pools/no-such-pool/slots/{slot_id()}", {"base": 1}, code="unknown_pool")


# --- versions -------------------------------------------------------------------------------------------------------------


def test_a_change_that_rests_on_an_old_version_is_refused(api: Api) -> None:
    counter = api.counter(5)
    for path, body in ((counter, {"base": 6}), (counter.partition("/slots")[0], {**POOL, "zone": "x"})):
        read = api.request("GET", path, status=200)
        first = api.request("PUT", path, body, headers={"If-Match": read.headers["etag"]}, status=200)
        problem = api.request("PUT", path, body, headers={"If-Match": read.headers["etag"]}, code="plan_conflict")
        assert (problem.status, problem.json()["outcome"]) == (412, "not_executed")
        assert first.headers["etag"].strip('"') in problem.json()["detail"]
        api.request("PUT", path, body, headers={"If-Match": first.headers["etag"].strip('"')}, status=200)
        api.request("PUT", path, body, headers={"If-Match": "*"}, status=200)


def test_if_match_0_means_that_there_is_none_yet(api: Api) -> None:
    path = f"/v1/pools/{fresh('pool')}"
    api.request("PUT", path, POOL, headers={"If-Match": '"0"'}, status=201)
    api.request("PUT", path, POOL, headers={"If-Match": '"0"'}, code="plan_conflict")


@pytest.mark.parametrize("if_match", ["", '"', '""', "x", 'W/"1"', '"1", "2"', "-1", "1.0", "9" * 16, '"1" "'])
def test_an_if_match_that_is_no_version(api: Api, if_match: str) -> None:
    path = f"/v1/pools/{fresh('pool')}"
    api.request("PUT", path, POOL, headers={"If-Match": if_match}, code="invalid_request")
    api.request("GET", path, code="unknown_pool")


def test_of_many_who_change_one_version_one_wins(api: Api) -> None:
    counter = api.counter(5)
    etag = api.request("GET", counter).headers["etag"]
    gate = threading.Barrier(16)
    statuses: list[int] = []

    def change(base: int) -> None:
        gate.wait()
        statuses.append(api.request("PUT", counter, {"base": base}, headers={"If-Match": etag}).status)

    threads = [threading.Thread(target=change, args=(base,)) for base in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [412] * 15


# --- imports --------------------------------------------------------------------------------------------------------------


def test_an_import_defines_all_or_nothing(api: Api) -> None:
    pool_id = api.pool()
    rows = [{"pool_id": pool_id, "slot_id": slot_id(day), "base": day} for day in range(20)]
    for bad, code in (
        ({"pool_id": "no-such-pool", "slot_id": slot_id(), "base": 1}, "unknown_pool"),
        ({"pool_id": pool_id, "slot_id": "2027-03-28T02:00-03:00", "base": 1}, "invalid_slot"),
        ({"pool_id": pool_id, "slot_id": slot_id(3), "base": 1}, "invalid_slot"),  # named twice
        ({"pool_id": pool_id, "slot_id": slot_id(30) + "\n", "base": 1}, "invalid_request"),
        ({"pool_id": pool_id + "\n", "slot_id": slot_id(30), "base": 1}, "invalid_request"),
        ({"pool_id": pool_id, "slot_id": "٢027-01-01T10:00-12:00", "base": 1}, "invalid_request"),
    ):
        problem = api.request("POST", "/v1/counters:import", {"counters": [*rows, bad]}, code=code).json()
        assert problem["outcome"] == "not_executed"
        assert api.get(f"/v1/counters?pool_id={pool_id}")["counters"] == []
    answer = api.request("POST", "/v1/counters:import", {"counters": rows, "reason": "a plan"}, status=200).json()
    assert (answer["counters"], answer["created"]) == (20, 20)
    assert [each["base"] for each in api.get(f"/v1/counters?pool_id={pool_id}")["counters"]] == list(range(20))
    again = api.request("POST", "/v1/counters:import", {"counters": rows}, status=200).json()
    assert (again["created"], again["plan_version"] > answer["plan_version"]) == (0, True)


def test_an_import_may_be_larger_than_other_bodies(api: Api) -> None:
    pool_id = api.pool()
    rows: list[dict[str, Any]] = [
        {"pool_id": pool_id, "slot_id": f"2027-{month:02d}-{day:02d}T{hour:02d}:{minute}-{hour:02d}:59", "base": 1}
        for month in range(5, 10)
        for day in range(1, 31)
        for hour in range(24)
        for minute in ("00", "30")
    ]
    answer = api.request("POST", "/v1/counters:import", {"counters": rows}, status=200).json()
    assert answer["created"] == len(rows) == 7200
    everything: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = api.get(f"/v1/counters?pool_id={pool_id}&limit=5000{cursor and '&cursor=' + cursor}")
        everything += [each["slot_id"] for each in page["counters"]]
        cursor = page["next_cursor"]
    assert sorted(everything) == sorted(row["slot_id"] for row in rows)


@pytest.mark.parametrize(
    "body", [{}, {"counters": []}, {"counters": {}}, {"counters": [[]]}, {"counters": [{}]}, {"rows": []}]
)
def test_an_import_that_is_none(api: Api, body: object) -> None:
    api.request("POST", "/v1/counters:import", body, code="invalid_request")
