"""What is read without asking a worker: availability, slots, counters, pools, and how the service is doing."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from engine.version import __version__
from tests.support.contract import DAY, Api, fresh, line, slot_id

DAYS = 6


class Fleet:
    """Three pools with six days of two slots each, told apart by labels that no other test uses."""

    def __init__(self, api: Api) -> None:
        self.type = fresh("type")
        self.north, self.south = (api.pool(capacity_type=self.type, zone=zone) for zone in ("north", "south"))
        self.hands = api.pool(capacity_type=fresh("type"), zone="north", unit="pick_line")
        self.slots = sorted(slot_id(day, hour) for day in range(DAYS) for hour in (10, 18))
        rows = [
            {"pool_id": pool_id, "slot_id": slot, "base": 5}
            for pool_id in (self.north, self.south, self.hands)
            for slot in self.slots
        ]
        answer = api.request("POST", "/v1/counters:import", {"counters": rows, "reason": "a test"}, status=200).json()
        assert (answer["counters"], answer["created"]) == (len(rows), len(rows))


@pytest.fixture(scope="module")
def fleet(engine: Any) -> Fleet:
    return Fleet(Api(engine))


def _names(counters: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(each["pool_id"], each["slot_id"]) for each in counters]


def _pages(api: Api, path: str, member: str, limit: int) -> Iterator[list[dict[str, Any]]]:
    cursor = ""
    while True:
        page = api.get(f"{path}&limit={limit}{cursor}")
        yield page[member]
        if page["next_cursor"] is None:
            return
        assert len(page[member]) == limit
        cursor = f"&cursor={page['next_cursor']}"


# --- what is selected ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["availability", "slots", "counters"])
def test_filters_select_pools_by_name_type_and_zone(api: Api, fleet: Fleet, call: str) -> None:
    member = "slots" if call == "slots" else "counters"

    def pools(query: str) -> list[str]:
        return list(dict.fromkeys(each["pool_id"] for each in api.get(f"/v1/{call}?limit=5000&{query}")[member]))

    assert pools(f"pool_id={fleet.south}") == [fleet.south]
    assert pools(f"pool_id={fleet.south}&pool_id={fleet.north}") == sorted([fleet.north, fleet.south])
    assert pools(f"pool_id={fleet.south}&pool_id={fleet.south}") == [fleet.south]
    assert pools(f"capacity_type={fleet.type}") == sorted([fleet.north, fleet.south])
    assert pools(f"capacity_type={fleet.type}&zone=south") == [fleet.south]
    assert {fleet.north, fleet.hands} <= set(pools("zone=north"))
    assert pools(f"capacity_type={fleet.type}&zone=nowhere") == []
    assert pools(f"pool_id={fleet.hands}&capacity_type={fleet.type}") == []
    api.request("GET", f"/v1/{call}?pool_id=no-such-pool", code="unknown_pool")
    api.request("GET", f"/v1/{call}?pool_id=", code="unknown_pool")


@pytest.mark.parametrize("call", ["availability", "slots", "counters"])
def test_from_and_to_are_a_half_open_span_of_starts(api: Api, fleet: Fleet, call: str) -> None:
    member = "slots" if call == "slots" else "counters"
    everything = api.get(f"/v1/{call}?pool_id={fleet.north}")[member]
    starts = [each["starts_at"] for each in everything]
    assert starts == sorted(starts)
    assert len(starts) == 2 * DAYS

    def selected(query: str) -> list[str]:
        return [each["starts_at"] for each in api.get(f"/v1/{call}?pool_id={fleet.north}&{query}")[member]]

    assert selected(f"from={starts[3]}") == starts[3:]
    assert selected(f"to={starts[3]}") == starts[:3]
    assert selected(f"from={starts[3]}&to={starts[5]}") == starts[3:5]
    assert selected(f"from={starts[5]}&to={starts[3]}") == []
    assert selected(f"from={DAY}") == starts
    assert selected(f"to={DAY}") == []
    assert selected(f"from={starts[2][:10]}&to={starts[4][:10]}") == starts[2:4]
    # The same instant, written in another zone. A plus sign that nobody encoded reads as a space.
    hour = int(starts[3][11:13])
    for plus in ("%2B", "+"):
        there = f"{starts[3][:11]}{hour + 1:02d}{starts[3][13:19]}{plus}01:00"
        assert selected(f"from={there}") == starts[3:]
    assert selected("from=0001-01-01&to=9999-12-31T23:59:59.999999-23:59") == starts


def test_quantity_leaves_out_what_has_less(api: Api) -> None:
    pool_id = api.pool()
    slots = api.slots_of_one_shard(pool_id, 4)
    for slot, base in zip(slots, (1, 5, 9, 9), strict=True):
        api.counter(base, pool_id=pool_id, slot=slot, closed=slot == slots[3])
    position = api.hold({"pool_id": pool_id, "slot_id": slots[2], "quantity": 5})["position"]
    query = f"/v1/availability?pool_id={pool_id}&min_position={position}"
    assert [each["available"] for each in api.get(query)["counters"]] == [1, 5, 4, 0]
    assert [each["status"] for each in api.get(query)["counters"]] == ["open", "open", "open", "closed"]
    assert [each["slot_id"] for each in api.get(f"{query}&quantity=1")["counters"]] == slots[:3]
    assert [each["slot_id"] for each in api.get(f"{query}&quantity=4")["counters"]] == slots[1:3]
    assert [each["slot_id"] for each in api.get(f"{query}&quantity=5")["counters"]] == slots[1:2]
    assert api.get(f"{query}&quantity=6")["counters"] == []


# --- pages --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 5, 7, 12, 24, 5000])
@pytest.mark.parametrize("call", ["availability", "slots", "counters"])
def test_pages_show_everything_once_and_in_order(api: Api, fleet: Fleet, call: str, limit: int) -> None:
    member = "slots" if call == "slots" else "counters"
    path = f"/v1/{call}?capacity_type={fleet.type}"
    everything = _names(api.get(path)[member])
    assert everything == [(pool_id, slot) for pool_id in sorted([fleet.north, fleet.south]) for slot in fleet.slots]
    paged = [name for page in _pages(api, path, member, limit) for name in _names(page)]
    assert paged == everything


def test_a_page_of_availability_may_be_short_and_the_cursor_goes_on(api: Api) -> None:
    pool_id = api.pool()
    slots = sorted(slot_id(day) for day in range(6))
    for number, slot in enumerate(slots):
        api.counter(9 if number in (0, 5) else 1, pool_id=pool_id, slot=slot)
    path = f"/v1/availability?pool_id={pool_id}&quantity=5"
    first = api.get(f"{path}&limit=2")
    second = api.get(f"{path}&limit=2&cursor={first['next_cursor']}")
    third = api.get(f"{path}&limit=2&cursor={second['next_cursor']}")
    found = [[each["slot_id"] for each in page["counters"]] for page in (first, second, third)]
    assert found == [[slots[0]], [], [slots[5]]]
    assert third["next_cursor"] is None


def test_a_cursor_is_a_place_whatever_is_defined_in_between(api: Api) -> None:
    pool_id = api.pool()
    for day in (1, 3, 5):
        api.counter(pool_id=pool_id, slot=slot_id(day))
    first = api.get(f"/v1/counters?pool_id={pool_id}&limit=2")
    assert [each["slot_id"] for each in first["counters"]] == [slot_id(1), slot_id(3)]
    for day in (0, 2, 4, 6):
        api.counter(pool_id=pool_id, slot=slot_id(day))
    rest = api.get(f"/v1/counters?pool_id={pool_id}&cursor={first['next_cursor']}")
    assert [each["slot_id"] for each in rest["counters"]] == [slot_id(4), slot_id(5), slot_id(6)]


# --- numbers ------------------------------------------------------------------------------------------------------------


def test_a_counter_shows_everything_about_itself(api: Api) -> None:
    pool_id = api.pool(zone="north", cutoff={"days_before": 1, "local_time": "18:00"})
    counter = f"/v1/pools/{pool_id}/slots/2027-07-01T18:00-20:00"
    put = api.request("PUT", counter, {"base": 40, "overbook": 2, "buffer": 1}, status=201)
    taken = api.hold(line(counter, 3))
    shown = api.request("GET", f"{counter}?min_position={taken['position']}", status=200)
    assert shown.headers["etag"] == put.headers["etag"] == f'"{put.json()["plan_version"]}"'
    assert shown.json() | {"as_of": ""} == {
        "pool_id": pool_id,
        "slot_id": "2027-07-01T18:00-20:00",
        "capacity_type": "logistics",
        "unit": "stop",
        "zone": "north",
        "service_date": "2027-07-01",
        "starts_at": "2027-07-01T16:00:00.000Z",
        "ends_at": "2027-07-01T18:00:00.000Z",
        "time_zone": "Europe/Berlin",
        "cutoff_at": "2027-06-30T16:00:00.000Z",
        "status": "open",
        "base": 40,
        "overbook": 2,
        "buffer": 1,
        "limit": 41,
        "held": 3,
        "confirmed": 0,
        "fulfilled": 0,
        "used": 3,
        "available": 38,
        "overcommitted_by": 0,
        "refused": 0,
        "utilization": 0.075,
        "plan_version": put.json()["plan_version"],
        "position": taken["position"],
        "as_of": "",
    }
    assert api.get(f"/v1/counters?pool_id={pool_id}")["counters"][0] | {"as_of": ""} == shown.json() | {"as_of": ""}


@pytest.mark.parametrize(
    ("base", "taken", "then", "status"),
    [
        (5, 0, {"base": 5}, "open"),
        (5, 5, {"base": 5}, "full"),
        (5, 5, {"base": 3}, "overcommitted"),
        (5, 5, {"base": 3, "closed": True}, "closed"),
        (0, 0, {"base": 0}, "full"),
        (5, 0, {"base": 0, "buffer": 5}, "full"),
    ],
)
def test_the_status_of_a_counter(api: Api, base: int, taken: int, then: dict[str, Any], status: str) -> None:
    counter = api.counter(base)
    if taken:
        api.hold(line(counter, taken))
    shown = api.request("PUT", counter, then, status=200).json()
    assert (shown["status"], shown["used"]) == (status, taken)
    assert shown["overcommitted_by"] == max(0, taken - shown["limit"])
    pool_id = counter.split("/")[3]
    assert api.get(f"/v1/slots?pool_id={pool_id}")["slots"][0]["open"] is (status == "open")
    assert api.get(f"/v1/availability?pool_id={pool_id}")["counters"][0]["status"] == status


def test_shoppers_see_no_numbers(api: Api, fleet: Fleet) -> None:
    answer = api.request("GET", f"/v1/slots?pool_id={fleet.north}&limit=1", status=200)
    assert set(answer.json()["slots"][0]) == {
        "pool_id",
        "slot_id",
        "starts_at",
        "ends_at",
        "time_zone",
        "cutoff_at",
        "open",
    }
    assert answer.headers["cache-control"] == "public, max-age=1"


def test_whoever_has_an_answer_finds_it_in_the_overview(api: Api) -> None:
    counter = api.counter(base=1000)
    pool_id = counter.split("/")[3]
    for taken in range(1, 21):
        position = api.hold(line(counter))["position"]
        assert api.get(f"/v1/availability?pool_id={pool_id}&min_position={position}")["counters"][0]["available"] == (
            1000 - taken
        )
    shard, _, seq = position.partition("-")
    answer = api.get(f"/v1/availability?pool_id={pool_id}&min_position={position}")
    assert int(answer["positions"][int(shard)].partition("-")[2]) >= int(seq)


def test_a_position_that_is_not_reached_is_waited_for_until_the_deadline(make_engine: Any) -> None:
    engine = make_engine(shards=1, api_processes=1, settings={"api.deadline_ms": 300})
    api = Api(engine)
    began = time.monotonic()
    problem = api.request("GET", "/v1/availability?min_position=0-999999999", code="shard_unavailable").json()
    assert time.monotonic() - began >= 0.3
    assert problem["outcome"] == "not_executed"


# --- pools and the service ------------------------------------------------------------------------------------------------


def test_pools_are_listed_by_name(api: Api, fleet: Fleet) -> None:
    listed = api.get("/v1/pools")
    names = [each["pool_id"] for each in listed["pools"]]
    assert names == sorted(names)
    assert {fleet.north, fleet.south, fleet.hands} <= set(names)
    shown = api.request("GET", f"/v1/pools/{fleet.hands}", status=200)
    assert shown.json() == next(each for each in listed["pools"] if each["pool_id"] == fleet.hands)
    assert shown.headers["etag"] == f'"{shown.json()["plan_version"]}"'
    assert listed["plan_version"] >= shown.json()["plan_version"]
    api.request("GET", "/v1/pools/no-such-pool", code="unknown_pool")


def test_counters_that_are_not_there(api: Api, fleet: Fleet) -> None:
    for name in ("2026-12-01T18:00-20:01", "x", "x" * 33, "%C3%BC", "2020-01-01T10:00-12:00"):
        api.request("GET", f"/v1/pools/{fleet.north}/slots/{name}", code="unknown_slot")
    api.request("GET", f"/v1/pools/no-such-pool/slots/{slot_id()}", code="unknown_pool")


def test_status_says_how_each_shard_is_doing(api: Api) -> None:
    status = api.get("/v1/status")
    assert status["ready"] is True
    assert status["version"] == __version__
    assert [shard["shard"] for shard in status["shards"]] == [0, 1]
    assert all(shard["ready"] and shard["state"] == "serving" for shard in status["shards"])


def test_livez_and_readyz(api: Api) -> None:
    assert api.request("GET", "/livez", status=200).body == b"ok\n"
    assert api.request("GET", "/readyz", status=200).body == b"ok\n"
    verbose = api.request("GET", "/readyz?verbose=1", status=200).body.decode().splitlines()
    assert len(verbose) == 3
    assert verbose[-1] == "ready"
    assert all(
        re.match(r"shard \d: ok \(serving, position \d-\d+, heartbeat \d+ ms ago\)$", each) for each in verbose[:2]
    )
    assert api.request("GET", "/readyz?verbose", status=200).body.decode().splitlines()[-1] == "ready"
    api.request("GET", "/readyz?verbose=perhaps", code="invalid_request")


@pytest.mark.parametrize(
    "path",
    [
        "/livez",
        "/readyz",
        "/v1/status",
        "/v1/pools",
        "/v1/availability",
        "/v1/slots",
        "/v1/counters",
        "/v1/events",
        "/docs",
    ],
)
def test_head_is_get_without_its_body(api: Api, path: str) -> None:
    get, head = api.request("GET", path, status=200), api.request("HEAD", path, status=200)
    assert head.body == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_a_request_may_name_itself(api: Api) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = api.request("GET", "/v1/status", headers={"X-Request-Id": "r-17", "Traceparent": trace})
    assert (answer.headers["x-request-id"], answer.headers["traceparent"]) == ("r-17", trace)
    refused = api.request("GET", "/v1/nothing", headers={"X-Request-Id": "r-18"}, code="not_found")
    assert refused.headers["x-request-id"] == "r-18"
    assert "x-request-id" not in api.request("GET", "/v1/status", headers={"X-Request-Id": "two words"}).headers


def test_the_documentation_is_served(api: Api) -> None:
    assert api.request("GET", "/", status=307).headers["location"] == "/docs"
    page = api.request("GET", "/docs", status=200)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name in set(re.findall(rb'/page/([^"]+)"', page.body)):
        assert len(api.request("GET", f"/page/{name.decode()}", status=200).body) > 100
    api.request("GET", "/page/nothing.js", code="not_found")
    api.request("GET", "/page/docs.html", code="not_found")
