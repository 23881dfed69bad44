"""The change feed: no event is missed, none comes twice, each shard's numbers are without a gap, whatever is restarted."""

import threading
from collections.abc import Callable
from typing import Any

from tests.support.contract import Api, fresh, line
from tests.support.engine import Engine


def _read(api: Api, after: str | None = None, limit: int = 1000) -> tuple[list[dict[str, Any]], str]:
    """All events after a cursor, page by page, until a page is empty; and the cursor that goes on."""
    events: list[dict[str, Any]] = []
    while True:
        page = api.get(f"/v1/events?limit={limit}" + ("" if after is None else f"&after={after}"))
        after = page["next_cursor"]
        if not page["events"]:
            return events, str(after)
        assert len(page["events"]) <= limit
        events += page["events"]


def _read_own(api: Api, after: str) -> tuple[list[dict[str, Any]], str]:
    """As `_read`, without what other tests left to happen by itself."""
    events, cursor = _read(api, after)
    return [event for event in events if event["event"] not in ("expired", "forgotten")], cursor


def _seqs(events: list[dict[str, Any]], shards: int = 2) -> list[list[int]]:
    """The numbers of the events of each shard, as they came."""
    places = [tuple(map(int, event["position"].split("-"))) for event in events]
    return [[seq for shard, seq in places if shard == wanted] for wanted in range(shards)]


def _counters(api: Api, base: int = 1000) -> list[str]:
    """A counter of each shard."""
    pool_id = api.pool()
    return [
        api.counter(base, pool_id=pool_id, slot=api.slots_of_one_shard(pool_id, 1, shard)[0])
        for shard in range(api.engine.shards)
    ]


def _busy(api: Api, counters: list[str], count: int = 5) -> None:
    """Some events of all shards."""
    for _ in range(count):
        for counter in counters:
            held = api.hold(line(counter))
            api.request("POST", f"/v1/reservations/{held['reservation_id']}/confirm", status=200)


def test_pages_of_any_size_have_all_events_once(own_engine: Engine) -> None:
    api = Api(own_engine)
    _busy(api, _counters(api))
    everything, end = _read(api)
    assert [seqs == list(range(1, len(seqs) + 1)) for seqs in _seqs(everything)] == [True, True]
    for limit in (1, 2, 7):
        assert _read(api, limit=limit) == (everything, end)
    times = [event["at"] for event in everything]
    assert times == sorted(times)
    assert _read(api, after=end) == ([], end)


def test_a_reader_that_comes_back_goes_on_where_it_was(own_engine: Engine) -> None:
    api = Api(own_engine)
    counters = _counters(api)
    events, cursor = _read(api)
    disturbances: list[Callable[[], object]] = [
        lambda: own_engine.kill("worker", 0),
        lambda: own_engine.kill("worker", 1),
        lambda: own_engine.kill("api", 0),
        own_engine.restart,
        own_engine.restart_after_crash,
    ]
    for disturb in disturbances:
        _busy(api, counters, 2)
        first, cursor = _read(api, cursor, limit=3)
        _busy(api, counters, 1)
        disturb()
        second, cursor = _read(api, cursor, limit=3)
        events += first + second
    rest, cursor = _read(api, cursor)
    events += rest
    assert [seqs == list(range(1, len(seqs) + 1)) for seqs in _seqs(events)] == [True, True]
    assert _read(api) == (events, cursor)
    # Each worker opened a term at each of its starts: four times, and once more after its own end.
    terms = [event["position"][0] for event in events if event["event"] == "term_started"]
    assert (terms.count("0"), terms.count("1")) == (4, 4)


def test_a_reader_beside_writers_misses_nothing(api: Api) -> None:
    counters = _counters(api)
    _, cursor = _read(api)
    keys = [[fresh("key") for _ in range(25)] for _ in range(6)]
    made: list[str] = []

    def write(number: int) -> None:
        made.extend(api.hold(line(counters[number % 2]), key=key)["reservation_id"] for key in keys[number])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(keys))]
    for thread in threads:
        thread.start()
    found: list[dict[str, Any]] = []
    while any(thread.is_alive() for thread in threads):
        page, cursor = _read(api, cursor, limit=10)
        found += page
    for thread in threads:
        thread.join()
    page, cursor = _read(api, cursor)
    found += page
    assert sorted(event["data"]["reservation_id"] for event in found if event["event"] == "held") == sorted(made)
    for seqs in _seqs(found):
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


def test_an_event_is_in_the_feed_when_its_answer_is_given(api: Api) -> None:
    counters = _counters(api)
    _, cursor = _read(api)
    for number in range(20):
        position = api.hold(line(counters[number % 2]))["position"]
        events, cursor = _read_own(api, cursor)
        assert [event["position"] for event in events] == [position]


def test_events_that_the_overview_does_not_show_yet_wait(make_engine: Any) -> None:
    # The worker stands still between making its third batch durable and publishing it.
    engine = make_engine(
        shards=1,
        api_processes=1,
        environment={"SLOTKEEPER_FAILPOINT": "after_append:stop:3"},
        settings={"api.deadline_ms": 1_000},
    )
    api = Api(engine)
    pool_id = api.pool()  # the second batch, after the one that opened the term
    path = api.slots_of_one_shard(pool_id, 1)[0]
    before, cursor = _read(api)
    assert [event["event"] for event in before] == ["term_started", "pool_defined"]
    api.request("PUT", f"/v1/pools/{pool_id}/slots/{path}", {"base": 1}, code="outcome_unknown")
    assert _read(api, cursor) == ([], cursor)
    engine.environment.clear()
    engine.crash()
    engine.start()
    after, _ = _read(api, cursor)
    assert [event["event"] for event in after][:2] == ["counters_defined", "term_started"]
    assert after[0]["data"]["counters"][0]["slot_id"] == path


def test_what_the_events_say(api: Api) -> None:
    pool_id = api.pool(cutoff={"minutes_before": 90})
    first, second = (api.counter(3, pool_id=pool_id, slot=slot) for slot in api.slots_of_one_shard(pool_id, 2))
    _, cursor = _read(api)

    def do(held: dict[str, Any], verb: str, body: object = None) -> Any:
        return api.request("POST", f"/v1/reservations/{held['reservation_id']}/{verb}", body, status=200).json()

    held = api.hold(line(first, 2), order_ref="SO-1", channel="web")
    longer = do(held, "extend", {"ttl_seconds": 3600})
    do(held, "move", {"lines": [line(second, 3)]})
    do(held, "confirm", {"lines": [line(second, 1)]})
    do(held, "fulfil")
    other = api.hold(line(first), ttl_seconds=None)
    do(other, "release", {"reason": "cancelled"})
    api.request(
        "POST", "/v1/reservations", {"lines": [line(first, 9)], "order_ref": "SO-9"}, key=fresh("key"), status=409
    )
    api.request("PUT", first, {"base": 5, "overbook": 1, "buffer": 2}, status=200)
    events, _ = _read_own(api, cursor)
    name = {"reservation_id": held["reservation_id"]}
    said = [(event["event"], event["data"]) for event in events]
    assert said[:-1] == [
        (
            "held",
            {
                **name,
                "order_ref": "SO-1",
                "channel": "web",
                "lines": [line(first, 2)],
                "expires_at": held["expires_at"],
            },
        ),
        ("extended", {**name, "expires_at": longer["expires_at"]}),
        ("moved", {**name, "lines": [line(second, 3)]}),
        ("confirmed", {**name, "late": False, "lines": [line(second, 1)]}),
        ("fulfilled", name),
        (
            "confirmed_at_once",
            {"reservation_id": other["reservation_id"], "order_ref": "", "channel": "", "lines": [line(first)]},
        ),
        ("released", {"reservation_id": other["reservation_id"], "reason": "cancelled"}),
        (
            "refused",
            {
                "reason": "insufficient_capacity",
                "order_ref": "SO-9",
                "counters": [{**line(first, 9), "available": 3}],
            },
        ),
    ]
    kind, data = said[-1]
    assert kind == "counters_defined"
    assert data["counters"][0] | {"starts_at": "", "ends_at": "", "cutoff_at": ""} == {
        "pool_id": pool_id,
        "slot_id": line(first)["slot_id"],
        "base": 5,
        "overbook": 1,
        "buffer": 2,
        "closed": False,
        "starts_at": "",
        "ends_at": "",
        "cutoff_at": "",
    }


def test_only_the_events_asked_for_come_and_the_cursor_passes_over_the_rest(own_engine: Engine) -> None:
    api = Api(own_engine)
    _busy(api, _counters(api))
    everything, end = _read(api)
    page = api.get("/v1/events?event=held&limit=1000")
    assert page["events"] == [event for event in everything if event["event"] == "held"]
    assert page["next_cursor"] == end
    api.request("GET", "/v1/events?event=nonsense", code="invalid_request")


def test_every_event_carries_the_cursor_that_goes_on_after_it(own_engine: Engine) -> None:
    api = Api(own_engine)
    _busy(api, _counters(api))
    everything, _ = _read(api)
    for place in (0, len(everything) // 2, len(everything) - 2):
        rest, _ = _read(api, everything[place]["cursor"])
        assert rest == everything[place + 1 :]


def test_who_waits_is_answered_by_the_next_event(own_engine: Engine) -> None:
    api = Api(own_engine)
    counter = _counters(api)[0]
    _, end = _read(api)
    answers: list[dict[str, Any]] = []
    waiter = threading.Thread(
        target=lambda: answers.append(api.get(f"/v1/events?after={end}&wait_ms=30000&event=held"))
    )
    waiter.start()
    held = api.hold(line(counter))
    waiter.join(30)
    assert [event["data"]["reservation_id"] for event in answers[0]["events"]] == [held["reservation_id"]]
    nothing = api.get(f"/v1/events?after={answers[0]['next_cursor']}&wait_ms=1")
    assert nothing["events"] == []


def test_events_are_sent_as_they_happen_and_a_consumer_that_comes_back_goes_on(own_engine: Engine) -> None:
    api = Api(own_engine)
    counter = _counters(api)[0]
    _, end = _read(api)
    accept = {"Accept": "text/event-stream"}

    def take(last: str, make: Callable[[], dict[str, Any]]) -> tuple[str, str]:
        """The id of the next event that is sent after `last`, and the reservation it is about."""
        connection = own_engine.connect()
        try:
            connection.request("GET", "/v1/events?event=held", headers={**accept, "Last-Event-ID": last})
            answer = connection.getresponse()
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            made = make()["reservation_id"]
            fields = {}
            for text in iter(answer.readline, b""):
                name, _, value = text.decode().rstrip("\n").partition(": ")
                fields[name] = value
                if name == "data":
                    break
            assert fields["event"] == "held"
            assert made in fields["data"]
            return fields["id"], made
        finally:
            connection.close()

    last, first = take(end, lambda: api.hold(line(counter)))
    _, second = take(last, lambda: api.hold(line(counter)))
    assert first != second


def test_a_stop_does_not_wait_for_those_who_wait(own_engine: Engine) -> None:
    api = Api(own_engine)
    _, end = _read(api)
    connection = own_engine.connect()
    connection.request("GET", f"/v1/events?after={end}&wait_ms=30000&event=forgotten")
    own_engine.wait_until(lambda state: state.state == "ready")
    own_engine.stop()
    connection.close()
