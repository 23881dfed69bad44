"""The life of a reservation over HTTP, against a real engine; retries, races, and processes that are killed or frozen."""

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.contract import Api, fresh, line, slot_id
from tests.support.engine import Answer, Engine

CLIENTS = 64
DEADLINE_MS = 1_000


def _do(api: Api, reservation: dict[str, Any], verb: str, body: object = None, **expected: Any) -> Answer:
    return api.request("POST", f"/v1/reservations/{reservation['reservation_id']}/{verb}", body, **expected)


def _look(api: Api, reservation: dict[str, Any]) -> Any:
    return api.get(f"/v1/reservations/{reservation['reservation_id']}")


def _units(api: Api, counter: str, position: str | None = None) -> tuple[int, int, int]:
    """held, confirmed, fulfilled; not older than a position."""
    shown = api.get(counter + (f"?min_position={position}" if position else ""))
    return shown["held"], shown["confirmed"], shown["fulfilled"]


def _together(count: int, work: Callable[[int], Answer]) -> list[Answer]:
    """Do something in so many threads that all begin at once."""
    gate = threading.Barrier(count)
    answers: list[Answer | None] = [None] * count

    def run(number: int) -> None:
        gate.wait()
        answers[number] = work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answer for answer in answers if answer is not None]


# --- the usual life -----------------------------------------------------------------------------------------------------


def test_from_pool_to_delivery(api: Api) -> None:
    pool_id = api.pool(zone="north", cutoff={"minutes_before": 90})
    counter = f"/v1/pools/{pool_id}/slots/{slot_id()}"
    put = api.request("PUT", counter, {"base": 40, "overbook": 2, "buffer": 1, "reason": "third van"}, status=201)
    assert put.json()["limit"] == 41

    answer = api.request(
        "POST",
        "/v1/reservations",
        {"order_ref": "SO-4711", "channel": "web", "ttl_seconds": 600, "lines": [line(counter, 3)]},
        key=fresh("key"),
        status=201,
    )
    held = answer.json()
    assert answer.headers["location"] == f"/v1/reservations/{held['reservation_id']}"
    assert (held["status"], held["order_ref"], held["channel"]) == ("held", "SO-4711", "web")
    assert held["lines"] == [line(counter, 3)]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", held["expires_at"])
    assert _look(api, held) == held
    assert _units(api, counter) == (3, 0, 0)

    confirmed = _do(api, held, "confirm", status=200).json()
    assert (confirmed["status"], confirmed["version"]) == ("confirmed", 2)
    assert _units(api, counter) == (0, 3, 0)

    fulfilled = _do(api, held, "fulfil", {}, status=200).json()
    assert (fulfilled["status"], fulfilled["version"]) == ("fulfilled", 3)
    assert _units(api, counter) == (0, 0, 3)
    assert _look(api, held) == fulfilled


def test_without_a_time_it_is_confirmed_at_once(api: Api) -> None:
    counter = api.counter()
    taken = api.hold(line(counter), ttl_seconds=None)
    assert (taken["status"], taken["expires_at"]) == ("confirmed", None)
    assert _units(api, counter) == (0, 1, 0)


def test_part_of_a_hold_is_confirmed_and_the_rest_given_back(api: Api) -> None:
    pool_id = api.pool()
    first, second = (api.counter(pool_id=pool_id, slot=slot) for slot in api.slots_of_one_shard(pool_id, 2))
    held = api.hold(line(first, 5), line(second, 2))
    problem = _do(api, held, "confirm", {"lines": [line(first, 6)]}, code="lines_not_held").json()
    assert problem["outcome"] == "not_executed"
    kept = _do(api, held, "confirm", {"lines": [line(first, 3)]}, status=200).json()
    assert kept["lines"] == [line(first, 3)]
    assert _units(api, first) == (0, 3, 0)
    assert _units(api, second) == (0, 0, 0)


def test_release_gives_the_units_back(api: Api) -> None:
    counter = api.counter(base=1)
    held = api.hold(line(counter))
    api.request("POST", "/v1/reservations", {"lines": [line(counter)]}, key=fresh("key"), code="insufficient_capacity")
    released = _do(api, held, "release", {"reason": "the customer cancelled"}, status=200).json()
    assert released["status"] == "released"
    assert api.hold(line(counter))["status"] == "held"
    problem = _do(api, held, "confirm", code="already_released").json()
    assert problem["reservation"] == released


def test_extend_makes_a_hold_live_longer_and_never_shorter(api: Api) -> None:
    held = api.hold(line(api.counter()), ttl_seconds=600)
    longer = _do(api, held, "extend", {"ttl_seconds": 3600}, status=200).json()
    assert longer["expires_at"] > held["expires_at"]
    same = _do(api, held, "extend", {"ttl_seconds": 1}, status=200).json()
    assert same["expires_at"] == longer["expires_at"]


def test_move_exchanges_the_slot_in_one_step(api: Api) -> None:
    pool_id = api.pool()
    old, new = (api.counter(1, pool_id=pool_id, slot=slot) for slot in api.slots_of_one_shard(pool_id, 2))
    held = api.hold(line(old))
    moved = _do(api, held, "move", {"lines": [line(new)]}, status=200).json()
    assert (moved["status"], moved["lines"]) == ("held", [line(new)])
    assert _units(api, old) == (0, 0, 0)
    assert _units(api, new) == (1, 0, 0)
    other = api.hold(line(old))
    refused = _do(api, other, "move", {"lines": [line(new)]}, code="insufficient_capacity").json()
    assert refused["lines"][0]["available"] == 0
    assert _look(api, other) == other


def test_a_hold_expires_and_a_late_confirm_works_while_units_are_free(api: Api) -> None:
    counter = api.counter(base=1)
    held = api.hold(line(counter), ttl_seconds=1)
    shown = held
    give_up_at = time.monotonic() + 30
    while shown["status"] == "held" and time.monotonic() < give_up_at:
        shown = _look(api, held)
    assert shown["status"] == "expired"
    _do(api, held, "extend", {"ttl_seconds": 5}, code="hold_expired")
    assert _units(api, counter, shown["position"]) == (0, 0, 0)
    late = _do(api, held, "confirm", status=200).json()
    assert (late["status"], late["late"]) == ("confirmed", True)


@pytest.mark.parametrize(
    ("before", "verb", "code"),
    [
        ([], "fulfil", "hold_not_confirmed"),
        (["confirm"], "confirm", "already_confirmed"),
        (["confirm"], "extend", "already_confirmed"),
        (["release"], "release", "already_released"),
        (["release"], "fulfil", "already_released"),
        (["confirm", "fulfil"], "release", "already_fulfilled"),
        (["confirm", "fulfil"], "confirm", "already_fulfilled"),
        (["confirm", "fulfil"], "move", "already_fulfilled"),
    ],
)
def test_what_a_status_does_not_allow(api: Api, before: list[str], verb: str, code: str) -> None:
    counter = api.counter()
    bodies: dict[str, object] = {"extend": {"ttl_seconds": 60}, "move": {"lines": [line(counter)]}}
    held = api.hold(line(counter))
    for each in before:
        _do(api, held, each, status=200)
    as_it_was = _look(api, held)
    problem = _do(api, held, verb, bodies.get(verb), code=code).json()
    assert problem["reservation"] == as_it_was
    assert _look(api, held) == as_it_was


def test_a_refusal_says_what_is_left_and_what_would_fit(api: Api) -> None:
    pool_id = api.pool()
    slots = api.slots_of_one_shard(pool_id, 3)
    full, small, large = (
        api.counter(base, pool_id=pool_id, slot=slot) for base, slot in zip((2, 3, 9), slots, strict=True)
    )
    problem = api.request(
        "POST", "/v1/reservations", {"lines": [line(full, 4)]}, key=fresh("key"), code="insufficient_capacity"
    ).json()
    short = problem["lines"][0]
    assert (short["slot_id"], short["quantity"], short["available"], short["status"]) == (slots[0], 4, 2, "full")
    assert [each["slot_id"] for each in problem["alternatives"]] == [slots[2]]
    assert api.get(full)["refused"] == 4
    assert api.get(small)["available"] == 3
    assert api.get(large)["available"] == 9


def test_all_lines_or_none(api: Api) -> None:
    pool_id = api.pool()
    wide, tight = (
        api.counter(base, pool_id=pool_id, slot=slot)
        for base, slot in zip((9, 1), api.slots_of_one_shard(pool_id, 2), strict=True)
    )
    body = {"lines": [line(wide, 2), line(tight, 2)]}
    problem = api.request("POST", "/v1/reservations", body, key=fresh("key"), code="insufficient_capacity").json()
    assert [each["slot_id"] for each in problem["lines"]] == [tight.rpartition("/")[2]]
    assert _units(api, wide) == (0, 0, 0)


def test_lines_of_one_counter_are_summed_before_the_check(api: Api) -> None:
    counter = api.counter(base=3)
    body = {"lines": [line(counter, 2), line(counter, 2)]}
    api.request("POST", "/v1/reservations", body, key=fresh("key"), code="insufficient_capacity")
    assert api.hold(line(counter, 1), line(counter, 2))["lines"] == [line(counter, 3)]


def test_closed_slots_and_those_past_their_cutoff_take_nothing(api: Api) -> None:
    closed = api.counter(closed=True)
    problem = api.request("POST", "/v1/reservations", {"lines": [line(closed)]}, key=fresh("key"), code="slot_closed")
    assert problem.json()["lines"][0]["status"] == "closed"
    past = api.counter(pool_id=api.pool(), slot="2020-01-01T10:00-12:00")
    problem = api.request("POST", "/v1/reservations", {"lines": [line(past)]}, key=fresh("key"), code="past_cutoff")
    assert problem.json()["lines"][0]["cutoff_at"] == "2020-01-01T11:00:00.000Z"


def test_lines_of_two_shards_are_taken_all_or_not_at_all(api: Api) -> None:
    pool_id = api.pool()
    first, second = (
        api.counter(pool_id=pool_id, slot=api.slots_of_one_shard(pool_id, 1, shard)[0], base=4) for shard in (0, 1)
    )
    key, body = fresh("key"), {"ttl_seconds": 600, "lines": [line(first, 3), line(second, 2)]}
    held = api.request("POST", "/v1/reservations", body, key=key, status=201).json()
    assert held["lines"] == body["lines"]
    assert api.request("POST", "/v1/reservations", body, key=key, status=200).json() == held
    too_much = {"lines": [line(first, 1), line(second, 3)]}
    refused = api.request("POST", "/v1/reservations", too_much, key=fresh("key"), code="insufficient_capacity").json()
    assert [(each["slot_id"], each["available"]) for each in refused["lines"]] == [(line(second)["slot_id"], 2)]
    assert _used(api, first) == 3
    extended = _do(api, held, "extend", {"ttl_seconds": 900}).json()
    assert extended["expires_at"] > held["expires_at"]
    moved = _do(api, held, "move", {"lines": [line(first, 1), line(second, 4)]}).json()
    assert [each["quantity"] for each in moved["lines"]] == [1, 4]
    confirmed = _do(api, held, "confirm", {"lines": [line(first, 1), line(second, 3)]}).json()
    assert confirmed["status"] == "confirmed"
    assert [each["quantity"] for each in confirmed["lines"]] == [1, 3]
    assert api.get(f"/v1/reservations/{held['reservation_id']}") == confirmed
    _do(api, held, "release")
    api.engine.wait_until(lambda _: (_used(api, first), _used(api, second)) == (0, 0))


def _used(api: Api, counter: str) -> int:
    where = line(counter)
    used: int = api.get(f"/v1/pools/{where['pool_id']}/slots/{where['slot_id']}")["used"]
    return used


@pytest.mark.parametrize("verb", ["confirm", "release", "fulfil"])
def test_verbs_take_an_empty_body_or_an_empty_object(api: Api, verb: str) -> None:
    bodies: tuple[object, ...] = (None, b"", {})
    for body in bodies:
        taken = api.hold(line(api.counter()), ttl_seconds=None if verb == "fulfil" else 60)
        _do(api, taken, verb, body, status=200)


@pytest.mark.parametrize(
    "reservation_id",
    [
        "r",
        "r1",
        "rffffffffffffffff",
        "r0301beef",
        "R4b53a",
        "4b53a",
        "r4b53g",
        "r" * 300,
        "r4b53a%0A",
        "-1",
        "r%F0%9F%92%A9",
    ],
)
def test_names_of_no_reservation(api: Api, reservation_id: str) -> None:
    # A line feed in a path is refused before anybody looks at what it could name.
    code = "invalid_request" if "%0A" in reservation_id else "unknown_reservation"
    api.request("GET", f"/v1/reservations/{reservation_id}", code=code)
    api.request("POST", f"/v1/reservations/{reservation_id}/confirm", {}, code=code)
    api.request("POST", f"/v1/reservations/{reservation_id}/extend", {"ttl_seconds": 5}, code=code)


def test_a_name_that_could_be_but_is_not(api: Api) -> None:
    for shard in (0, 1):
        api.request("GET", f"/v1/reservations/r7ffffffffff{shard:04x}", code="unknown_reservation")


# --- once, however often it is sent ------------------------------------------------------------------------------------


def test_the_same_key_with_the_same_body_is_the_same_reservation(api: Api) -> None:
    counter = api.counter(base=3)
    body = {"order_ref": "SO-1", "ttl_seconds": 60, "lines": [line(counter, 2)]}
    key = fresh("key")
    first = api.request("POST", "/v1/reservations", body, key=key, status=201)
    again = api.request("POST", "/v1/reservations", body, key=key, status=200)
    assert again.body == first.body
    # The order of members means nothing in JSON.
    turned = dict(reversed(body.items()))
    assert api.request("POST", "/v1/reservations", turned, key=key, status=200).body == first.body
    assert _units(api, counter) == (2, 0, 0)


@pytest.mark.parametrize("change", [{"quantity": 1}, {"ttl_seconds": 61}, {"order_ref": "SO-2"}, {"channel": "app"}])
def test_the_same_key_with_another_body_is_refused(api: Api, change: dict[str, Any]) -> None:
    counter = api.counter(base=3)
    key = fresh("key")
    body = {"order_ref": "SO-1", "ttl_seconds": 60, "lines": [line(counter, 2)]}
    api.request("POST", "/v1/reservations", body, key=key, status=201)
    other: dict[str, Any] = (
        {**body, "lines": [line(counter, change["quantity"])]} if "quantity" in change else {**body, **change}
    )
    api.request("POST", "/v1/reservations", other, key=key, code="idempotency_key_reused")
    assert _units(api, counter) == (2, 0, 0)


def test_a_key_that_was_refused_for_lack_of_room_may_try_again(api: Api) -> None:
    counter = api.counter(base=1)
    in_the_way = api.hold(line(counter))
    key = fresh("key")
    body: dict[str, Any] = {"lines": [line(counter)]}
    for _ in range(3):
        api.request("POST", "/v1/reservations", body, key=key, code="insufficient_capacity")
    assert api.get(counter)["refused"] == 1
    _do(api, in_the_way, "release", status=200)
    api.request("POST", "/v1/reservations", body, key=key, status=201)


@pytest.mark.parametrize(
    ("key", "accepted"),
    [
        (None, False),
        ("", False),
        ("k" * 255, True),
        ("k" * 256, False),
        ("schlüssel", True),
        ("a key, with; all", True),
    ],
)
def test_which_keys_are_taken(api: Api, key: str | None, accepted: bool) -> None:
    body = {"lines": [line(api.counter())]}
    headers = {} if key is None else {"Idempotency-Key": key}
    answer = api.request("POST", "/v1/reservations", body, headers=headers)
    assert answer.status == 201 if accepted else answer.code == "invalid_request", answer


def test_two_keys_in_one_request_are_refused(api: Api) -> None:
    answer = api.engine.raw(
        b"POST /v1/reservations HTTP/1.1\r\nHost: x\r\nIdempotency-Key: a\r\nIdempotency-Key: b\r\nContent-Length: 2\r\n\r\n{}"
    )
    assert (answer.status, answer.code) == (400, "invalid_request")


def test_a_keyed_verb_takes_effect_once(api: Api) -> None:
    held = api.hold(line(api.counter()))
    key = fresh("key")
    first = _do(api, held, "extend", {"ttl_seconds": 3600}, key=key, status=200)
    again = _do(api, held, "extend", {"ttl_seconds": 3600}, key=key, status=200)
    assert again.body == first.body
    confirmed = _do(api, held, "confirm", key=fresh("key"), status=200)
    assert confirmed.json()["version"] == 3


def test_many_clients_with_one_key_get_one_reservation(api: Api) -> None:
    counter = api.counter(base=CLIENTS)
    key, body = fresh("key"), {"ttl_seconds": 600, "lines": [line(counter)]}
    answers = _together(CLIENTS, lambda _: api.request("POST", "/v1/reservations", body, key=key))
    assert sorted(answer.status for answer in answers) == [200] * (CLIENTS - 1) + [201]
    assert len({answer.body for answer in answers}) == 1
    assert _units(api, counter) == (1, 0, 0)


def test_many_clients_and_one_unit_have_one_winner(api: Api) -> None:
    counter = api.counter(base=1)
    body = {"ttl_seconds": 600, "lines": [line(counter)]}
    keys = [fresh("key") for _ in range(CLIENTS)]
    answers = _together(CLIENTS, lambda number: api.request("POST", "/v1/reservations", body, key=keys[number]))
    assert sorted(answer.status for answer in answers) == [201] + [409] * (CLIENTS - 1)
    shown = api.get(counter)
    assert (shown["held"], shown["available"], shown["refused"]) == (1, 0, CLIENTS - 1)


# --- processes that fail ------------------------------------------------------------------------------------------------


def _stock(api: Api, base: int = 100) -> list[str]:
    """A counter of each shard, shard by shard."""
    pool_id = api.pool()
    return [
        api.counter(base, pool_id=pool_id, slot=api.slots_of_one_shard(pool_id, 1, shard)[0])
        for shard in range(api.engine.shards)
    ]


def test_a_frozen_worker_is_an_unknown_outcome_within_the_deadline(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(settings={"api.deadline_ms": DEADLINE_MS, "overload.queue_ms_max": 250})
    api = Api(engine)
    frozen, working = _stock(api)
    held = api.hold(line(frozen))
    body, key = {"lines": [line(frozen)]}, fresh("key")
    with engine.frozen("worker", 0):
        began = time.monotonic()
        answer = api.request("POST", "/v1/reservations", body, key=key, code="outcome_unknown")
        took_s = time.monotonic() - began
        assert answer.json()["outcome"] == "outcome_unknown"
        assert DEADLINE_MS / 1000 <= took_s < DEADLINE_MS / 1000 + 2
        _do(api, held, "confirm", code="outcome_unknown")
        # A read that was not answered has done nothing, whatever became of it.
        api.request("GET", f"/v1/reservations/{held['reservation_id']}", code="shard_unavailable")
        # The overview shows what was last published, and the other shard works.
        assert _units(api, frozen) == (1, 0, 0)
        api.hold(line(working))
        give_up_at = time.monotonic() + 30
        while (ready := engine.request("GET", "/readyz")).status == 200 and time.monotonic() < give_up_at:
            pass
        assert ready.status == 503
    answers = {api.request("POST", "/v1/reservations", body, key=key).status for _ in range(2)}
    assert answers <= {200, 201}
    assert sum(_units(api, frozen)) == 2


@pytest.mark.parametrize("shard", [0, 1])
def test_a_worker_killed_while_idle_is_a_pause(own_engine: Engine, shard: int) -> None:
    api = Api(own_engine)
    counters = _stock(api)
    held = [api.hold(line(counter)) for counter in counters]
    old = own_engine.kill("worker", shard)
    answer = api.request("POST", "/v1/reservations", {"lines": [line(counters[shard])]}, key=fresh("key"))
    assert answer.status == 201
    assert own_engine.wait_ready("worker", shard) != old
    for each in held:
        assert _look(api, each) == each
    assert _units(api, counters[shard], answer.json()["position"]) == (1, 1, 0)


def test_requests_on_their_way_to_a_worker_that_is_killed_are_answered(own_engine: Engine) -> None:
    api = Api(own_engine)
    counters = _stock(api)
    keys = [fresh("key") for _ in range(16)]

    def reserve(number: int) -> Answer:
        if number == len(keys):
            own_engine.kill("worker", 0)
            return own_engine.request("GET", "/livez")
        return api.request("POST", "/v1/reservations", {"lines": [line(counters[number % 2])]}, key=keys[number])

    with own_engine.frozen("worker", 0):
        # Frozen, so that they are surely on their way when it dies. SIGKILL takes a frozen process too.
        answers = _together(len(keys) + 1, reserve)
    assert [answer.status for answer in answers[:-1]] == [201] * len(keys)
    assert len({answer.json()["reservation_id"] for answer in answers[:-1]}) == len(keys)
    for counter in counters:
        assert _units(api, counter)[1] == len(keys) // 2


def test_a_planner_killed_while_idle_is_a_pause(own_engine: Engine) -> None:
    api = Api(own_engine)
    counter = _stock(api)[0]
    old = own_engine.kill("planner")
    # Who reserves needs no planner.
    api.hold(line(counter))
    assert api.request("PUT", counter, {"base": 7}, status=200).json()["base"] == 7
    assert own_engine.wait_ready("planner") != old
    api.counter(pool_id=api.pool())


@pytest.mark.parametrize("index", [0, 1])
def test_when_an_api_process_is_killed_the_other_serves(own_engine: Engine, index: int) -> None:
    api = Api(own_engine)
    counter = _stock(api)[0]
    held = api.hold(line(counter))
    with own_engine.frozen_supervisor():  # so that nobody fills its place
        own_engine.kill("api", index)
        for _ in range(10):
            assert _look(api, held) == held
        _do(api, held, "confirm", status=200)
    own_engine.wait_ready("api", index)
    assert _units(api, counter) == (0, 1, 0)


def test_everything_is_there_after_a_stop_and_after_a_crash(own_engine: Engine) -> None:
    api = Api(own_engine)
    counters = _stock(api)
    key, body = fresh("key"), {"ttl_seconds": 3600, "lines": [line(counters[0], 2)]}
    first = api.request("POST", "/v1/reservations", body, key=key, status=201)
    own_engine.stop()
    own_engine.start()
    assert api.request("POST", "/v1/reservations", body, key=key, status=200).body == first.body
    own_engine.crash()
    own_engine.start()
    assert api.request("POST", "/v1/reservations", body, key=key, status=200).body == first.body
    assert _units(api, counters[0]) == (2, 0, 0)
    assert [pool["pool_id"] for pool in api.get("/v1/pools")["pools"]] == [first.json()["lines"][0]["pool_id"]]
