"""Whatever is sent gets its documented refusal, nothing is done, and no process notices.

The shared engine checks at its end that no process was replaced and that no error was logged; each test here checks that
the answer is a problem with a stable code, a true outcome and a documented status.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from api.http1 import ParserLimits
from engine.config import Config
from engine.core.limits import LINES_MAX
from tests.support.contract import Api, check_problem, fresh, line, slot_id
from tests.support.engine import Answer, Engine

BODY_BYTES_MAX = Config().api.body_bytes_max


@pytest.fixture(autouse=True)
def _same_processes(engine: Engine) -> Iterator[None]:
    before = engine.pids()
    yield
    assert engine.pids() == before


@pytest.fixture(scope="module")
def counter(engine: Engine) -> str:
    return Api(engine).counter(base=1000)


def _reserve(api: Api, body: object, **more: Any) -> Answer:
    return api.request("POST", "/v1/reservations", body, key=fresh("key"), **more)


def _raw(api: Api, request: bytes) -> Answer:
    answer = api.engine.raw(request)
    check_problem(answer)
    return answer


# --- bodies ---------------------------------------------------------------------------------------------------------------

NO_RESERVATIONS: dict[str, bytes] = {
    "empty": b"",
    "a space": b" ",
    "cut off": b'{"lines":[{"pool_id":"a"',
    "two documents": b"{} {}",
    "a comma too much": b'{"lines":[],}',
    "single quotes": b"{'lines':[]}",
    "a comment": b'{"lines":[]} // none',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "not UTF-8": b'{"order_ref":"\xff","lines":[]}',
    "UTF-16": '{"lines":[]}'.encode("utf-16"),
    "NUL": b"\0",
    "an array": b"[]",
    "a string": b'"lines"',
    "a number": b"1",
    "null": b"null",
    "nested arrays": b"[" * 30_000,
    "nested objects": b'{"lines":' * 6_000,
    "nested and closed": b'{"lines":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "nested where anything is skipped": b'{"else":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "a number without end": b'{"ttl_seconds":' + b"9" * 60_000 + b',"lines":[]}',
    "an exponent without end": b'{"ttl_seconds":1e' + b"9" * 60_000 + b',"lines":[]}',
}


@pytest.mark.parametrize("body", NO_RESERVATIONS.values(), ids=NO_RESERVATIONS.keys())
def test_bodies_that_are_no_reservation(api: Api, body: bytes) -> None:
    assert _reserve(api, body).code == "invalid_request"
    # The same for all other calls that take a body.
    pool_id = fresh("pool")
    for method, path in (
        ("POST", "/v1/reservations/r4b53a/extend"),
        ("POST", "/v1/reservations/r4b53a/move"),
        ("POST", "/v1/counters:import"),
        ("PUT", f"/v1/pools/{pool_id}"),
        ("PUT", f"/v1/pools/{pool_id}/slots/{slot_id()}"),
    ):
        api.request(method, path, body, code="invalid_request")
    if body:
        api.request("POST", "/v1/reservations/r4b53a/confirm", body, code="invalid_request")


def _with(member: str, value: str) -> bytes:
    """A reservation with a member of the body or of its line replaced by JSON text."""
    members = {"pool_id": '"van"', "slot_id": f'"{slot_id()}"', "quantity": "1"}
    outer = {"order_ref": '"SO-1"', "channel": '"web"', "ttl_seconds": "60"}
    (members if member in members else outer)[member] = value
    lines = "[{" + ",".join(f'"{name}":{text}' for name, text in members.items()) + "}]"
    outer.setdefault("lines", lines)
    return ("{" + ",".join(f'"{name}":{text}' for name, text in outer.items()) + "}").encode()


NUMBERS = [
    "0", "-1", "-0", "1000001", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1" * 400,
    "1.5", "1.0", "1e0", "1E400", "1e-400", "1e400", "NaN", "Infinity", "-Infinity", '"1"', '""', "true", "false",
    "[1]", "{}", "01", "+1", "0x1", "1_000", ".5", "1.", "\u0661",
]  # fmt: skip
STRINGS = [
    "null", "1", "true", "[]", "{}", '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d"', '"a\\u0000b"', '"\\u0000"', '"a\\n"',
    '"\\t"', '"\\u007f"', '"a\tb"', '"\x01"', '"\\x41"', '"' + "x" * 129 + '"', '"a', "a",
]  # fmt: skip
NAMES = ['""', '"van\\n"', '"\\nvan"', '"van north"', '"-van"', '"v\\u00e4n"', '"' + "v" * 65 + '"', '"van/../x"']
SLOTS = [
    '""', '"2027"', f'"{slot_id()}\\n"', f'" {slot_id()}"', '"2027-01-01T10:00-12:00Z"', '"2027-01-01 10:00-12:00"',
    '"\\u0662\\u0660\\u0662\\u0667-01-01T10:00-12:00"', '"2027-1-1T10:00-12:00"',
]  # fmt: skip


@pytest.mark.parametrize(
    ("member", "value"),
    [
        *(("quantity", value) for value in [*NUMBERS, "null"]),
        *(("ttl_seconds", value) for value in [*(text for text in NUMBERS if text != "1000001"), "31536001"]),
        *((member, value) for member in ("order_ref", "channel", "pool_id", "slot_id") for value in STRINGS),
        *(("pool_id", value) for value in NAMES),
        *(("slot_id", value) for value in SLOTS),
        *(("lines", value) for value in ("null", "{}", "[]", '"x"', "[1]", "[[]]", "[null]", "[{}]", "[{}, {}]")),
        ("ttl_seconds", "86401"),
        ("else", "1"),
        ("Lines", "[]"),
        ("", "1"),
    ],
    ids=lambda value: value[:24].encode("unicode_escape").decode() or "empty",
)
def test_members_that_cannot_be(api: Api, member: str, value: str) -> None:
    assert _reserve(api, _with(member, value)).code == "invalid_request"


def test_unknown_members_of_a_line_are_refused(api: Api, counter: str) -> None:
    problem = _reserve(api, {"lines": [{**line(counter), "units": 2}]}, code="invalid_request").json()
    assert "`units`" in problem["detail"]
    assert "$.lines[0]" in problem["detail"]


def test_as_many_lines_as_there_can_be_and_one_more(api: Api) -> None:
    pool_id = api.pool()
    slots = api.slots_of_one_shard(pool_id, LINES_MAX + 1)
    rows = [{"pool_id": pool_id, "slot_id": slot, "base": 5} for slot in slots]
    api.request("POST", "/v1/counters:import", {"counters": rows}, status=200)
    lines = [{"pool_id": pool_id, "slot_id": slot, "quantity": 1} for slot in slots]
    _reserve(api, {"lines": lines}, code="invalid_request")
    assert len(_reserve(api, {"lines": lines[:-1]}, status=201).json()["lines"]) == LINES_MAX
    # Lines of one counter count each for itself.
    _reserve(api, {"lines": lines[:1] * (LINES_MAX + 1)}, code="invalid_request")
    assert _reserve(api, {"lines": lines[-1:] * 5}, status=201).json()["lines"] == [{**lines[-1], "quantity": 5}]
    _reserve(api, {"lines": lines[-1:] * LINES_MAX}, code="insufficient_capacity")


def test_the_most_that_can_be_asked_for(api: Api) -> None:
    most = 1_000_000 * LINES_MAX
    counter = api.counter(base=most)
    body = {"lines": [line(counter, 1_000_000)] * LINES_MAX, "order_ref": "x" * 128, "channel": "x" * 32}
    assert _reserve(api, body, status=201).json()["lines"] == [line(counter, most)]
    problem = _reserve(api, body, code="insufficient_capacity").json()
    assert problem["lines"][0]["quantity"] == most


def test_pools_and_slots_that_do_not_exist(api: Api, counter: str) -> None:
    no_pool = {"pool_id": "no-such-pool", "slot_id": slot_id(), "quantity": 1}
    _reserve(api, {"lines": [no_pool]}, code="unknown_pool")
    pool_id = line(counter)["pool_id"]
    for slot in (slot_id(999), "2027-13-01T10:00-12:00", "2027-01-01T99:99-99:99", "0000-00-00T00:00-00:00"):
        _reserve(api, {"lines": [{"pool_id": pool_id, "slot_id": slot, "quantity": 1}]}, code="unknown_slot")
    held = api.hold(line(counter))
    path = f"/v1/reservations/{held['reservation_id']}"
    nowhere = {"lines": [{**line(counter), "pool_id": "no-such-pool"}]}
    answer = api.request("POST", f"{path}/move", nowhere)
    assert answer.code == "unknown_pool"
    api.request("POST", f"{path}/confirm", nowhere, code="unknown_pool")
    assert api.get(path) == held


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"ttl_seconds": None},
        {"ttl_seconds": 0},
        {"ttl_seconds": 86401},
        {"ttl_seconds": 1.5},
        {"ttl_seconds": 5, "x": 1},
    ],
)
def test_extensions_that_cannot_be(api: Api, counter: str, body: object) -> None:
    held = api.hold(line(counter))
    api.request("POST", f"/v1/reservations/{held['reservation_id']}/extend", body, code="invalid_request")


@pytest.mark.parametrize("reason", ["x" * 501, "a\nb", "\0", 1, None, ["x"]])
def test_reasons_that_cannot_be(api: Api, counter: str, reason: object) -> None:
    held = api.hold(line(counter))
    api.request(
        "POST", f"/v1/reservations/{held['reservation_id']}/release", {"reason": reason}, code="invalid_request"
    )


def test_text_is_kept_as_it_is(api: Api, counter: str) -> None:
    order_ref = "Ö-4711 \U0001f69a \u202e <script>&amp;'\"\\ {0} %s"
    held = api.hold(line(counter), order_ref=order_ref, channel="\u2028")
    assert (held["order_ref"], held["channel"]) == (order_ref, "\u2028")
    assert api.get(f"/v1/reservations/{held['reservation_id']}") == held


# --- sizes and types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(api: Api, chunked: bool) -> None:
    size = BODY_BYTES_MAX + 1
    head = b"POST /v1/reservations HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\n"
    if chunked:
        answer = _raw(api, head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size)
    else:
        answer = _raw(api, head + b"Content-Length: %d\r\n\r\n" % size)
    assert (answer.status, answer.code) == (413, "body_too_large")


def test_the_largest_body_is_read(api: Api, counter: str) -> None:
    body = json.dumps({"lines": [line(counter)]}).encode()
    assert _reserve(api, body.ljust(BODY_BYTES_MAX)).status == 201


def test_headers_that_are_too_large(api: Api) -> None:
    limits = ParserLimits()
    one = b"GET /v1/status HTTP/1.1\r\nHost: x\r\nX: %b\r\n\r\n" % (b"x" * limits.headers_bytes_max)
    many = b"GET /v1/status HTTP/1.1\r\nHost: x\r\n%b\r\n" % (b"X: y\r\n" * limits.headers_count_max)
    for request in (one, many):
        answer = _raw(api, request)
        assert (answer.status, answer.code) == (431, "headers_too_large")
    answer = _raw(api, b"GET /v1/status?%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * limits.request_line_bytes_max))
    assert (answer.status, answer.code) == (414, "uri_too_long")


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/xml",
        "application/jsonp",
        "application/json-patch+json",
        "json",
        "",
    ],
)
def test_bodies_that_say_they_are_something_else(api: Api, counter: str, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    _reserve(api, {"lines": [line(counter)]}, headers=headers, code="unsupported_media_type")
    api.request("PUT", f"/v1/pools/{fresh('pool')}", {}, headers=headers, code="unsupported_media_type")
    held = api.hold(line(counter))
    path = f"/v1/reservations/{held['reservation_id']}"
    api.request("POST", f"{path}/confirm", {}, headers=headers, code="unsupported_media_type")
    assert api.get(path) == held


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/json;charset=UTF-8"],
)
def test_bodies_that_say_they_are_json(api: Api, counter: str, content_type: str) -> None:
    _reserve(api, {"lines": [line(counter)]}, headers={"Content-Type": content_type}, status=201)


# --- paths, methods, queries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/reservations", "POST"),
        ("HEAD", "/v1/reservations", "POST"),
        ("DELETE", "/v1/reservations/r4b53a", "GET, HEAD"),
        ("GET", "/v1/reservations/r4b53a/confirm", "POST"),
        ("POST", "/v1/availability", "GET, HEAD"),
        ("PATCH", "/v1/pools/a", "GET, PUT, HEAD"),
        ("POST", "/v1/pools", "GET, HEAD"),
        ("DELETE", f"/v1/pools/a/slots/{slot_id()}", "GET, PUT, HEAD"),
        ("GET", "/v1/counters:import", "POST"),
        ("PUT", "/v1/events", "GET, HEAD"),
        ("POST", "/livez", "GET, HEAD"),
        ("OPTIONS", "/v1/status", "GET, HEAD"),
    ],
)
def test_methods_that_do_not_work_here(api: Api, method: str, path: str, allow: str) -> None:
    answer = api.engine.request(method, path, {} if method in ("POST", "PUT", "PATCH") else None)
    check_problem(answer)
    assert (answer.status, answer.headers["allow"]) == (405, allow)


def test_methods_that_do_not_work_anywhere(api: Api) -> None:
    answer = api.engine.raw(b"BREW /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (answer.status, answer.code) == (501, "method_not_implemented")


@pytest.mark.parametrize(
    "path",
    [
        "/v1", "/v1/", "/v2/status", "/v1/status/", "/V1/status", "/v1/nothing", "/v1/reservations/", "/v1/reservations/a/b/c",
        "/v1/reservations/r4b53a/cancel", "/v1/pools/a/slots", "/v1/pools/a/slots/b/history", "//v1/status", "/%7Bname%7D",
        "/v1/counters%3Aexport", "/favicon.ico", "/page/", "/problems/no-such-problem",
    ],
)  # fmt: skip
def test_paths_where_nothing_is(api: Api, path: str) -> None:
    for method in ("GET", "POST"):
        answer = api.engine.request(method, path, {} if method == "POST" else None)
        check_problem(answer)
        assert answer.status in (404, 405), answer
        assert method == "POST" or answer.code == "not_found"


@pytest.mark.parametrize(
    "path", ["/v1/../v1/status", "/v1/%2e%2e/status", "/v1/pools/a%2Fb", "/v1/pools/%FF", "/v1/pools/%00"]
)
def test_paths_that_could_mean_something_else(api: Api, path: str) -> None:
    answer = api.engine.raw(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
    check_problem(answer)
    assert answer.code == "invalid_request"


@pytest.mark.parametrize(
    "query",
    [
        "pool=van",
        "Pool_id=van",
        "zone=a&zone=b",
        "from=yesterday",
        "from=2027-02-30",
        "from=2027-01-01T10:00",
        "from=2027-01-01T10:00:00.1234567Z",
        "from=2027-01-01T25:00Z",
        "from=2027-01-01T10:00%2B99:99",
        "from=2027-01-01T10:00-25:00",
        "from=10000-01-01",
        "from=%D9%A2027-01-01",
        "from=2027-01-01%0A",
        "from=2027-01-01%00",
        "from=",
        "from",
        "to=0000-01-01",
        "to=now",
        "limit=0",
        "limit=5001",
        "limit=-1",
        "limit=1.5",
        "limit=1e3",
        "limit=%D9%A1",
        "limit=" + "9" * 400,
        "limit=",
        "limit=+5",
        "limit=1&limit=2",
        "quantity=0",
        "quantity=1000001",
        "quantity=x",
        "cursor=",
        "cursor=x",
        "cursor=%00",
        "cursor=" + "A" * 401,
        "cursor=e30",
        "cursor=bnVsbA",
        "cursor=WzEsMiwzXQ",
        "cursor=WyJhIiwxXQ",
        "cursor=WyJhIiwxLDJdIHg",
        "cursor=WyJhIiwxLjUsMl0",
        "cursor=Ilx1ZDgwMCI",
        "cursor=____",
        "min_position=0",
        "min_position=0-",
        "min_position=-1",
        "min_position=2-1",
        "min_position=999-1",
        "min_position=0-1-2",
        "min_position=0-" + "9" * 16,
        "min_position=0-1%20",
        "zone=%FF",
        "%FF=1",
        "=1",
        "&".join(["pool_id=a"] * 101),
    ],
)
def test_queries_that_cannot_be(api: Api, query: str) -> None:
    api.request("GET", f"/v1/availability?{query}", code="invalid_request")
    if "quantity" not in query:
        api.request("GET", f"/v1/counters?{query}", code="invalid_request")


@pytest.mark.parametrize(
    "cursor", ["WyJhIiw5OTk5OTk5OTk5OTk5OTk5OTk5OTksMV0", "WyJhIiwtMSwtMV0", "WyJcdTAwMDAiLDEsMV0"]
)
def test_a_cursor_from_nowhere_is_a_place_all_the_same(api: Api, cursor: str) -> None:
    # ["a", 99999999999999999999, 1], ["a", -1, -1] and ["\\u0000", 1, 1]: nobody was given these, and they do no harm.
    answer = api.request("GET", f"/v1/counters?cursor={cursor}")
    assert answer.status == 200 or answer.code == "invalid_request"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/reservations"),
        ("GET", "/v1/reservations/r4b53a"),
        ("POST", "/v1/reservations/r4b53a/confirm"),
        ("PUT", "/v1/pools/a"),
        ("GET", "/v1/pools/a"),
        ("PUT", f"/v1/pools/a/slots/{slot_id()}"),
        ("GET", f"/v1/pools/a/slots/{slot_id()}"),
        ("POST", "/v1/counters:import"),
        ("GET", "/v1/pools"),
        ("GET", "/v1/slots"),
        ("GET", "/v1/status"),
        ("GET", "/v1/events"),
        ("GET", "/readyz"),
    ],
)
def test_parameters_that_a_call_does_not_have(api: Api, method: str, path: str) -> None:
    answer = api.request(method, f"{path}?dry_run=true", {} if method != "GET" else None, code="invalid_request")
    assert "'dry_run' is no parameter" in answer.json()["detail"]


@pytest.mark.parametrize(
    "after", ["", "0", "0.0.0", "0.-1", "0.x", "0.1e3", "0." + "9" * 16, "0.0%0A", "0-1", "_._", "9" * 2001]
)
def test_feed_cursors_that_cannot_be(api: Api, after: str) -> None:
    api.request("GET", f"/v1/events?after={after}", code="invalid_request")


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x"])
def test_feed_limits_that_cannot_be(api: Api, limit: str) -> None:
    api.request("GET", f"/v1/events?limit={limit}", code="invalid_request")


# --- pages of other sites -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
def test_a_page_of_another_site_changes_nothing(api: Api, counter: str, site: str) -> None:
    headers = {"Sec-Fetch-Site": site}
    _reserve(api, {"lines": [line(counter)]}, headers=headers, code="forbidden")
    api.request("PUT", counter, {"base": 0}, headers=headers, code="forbidden")
    held = api.hold(line(counter))
    path = f"/v1/reservations/{held['reservation_id']}"
    api.request("POST", f"{path}/release", headers=headers, code="forbidden")
    assert api.request("GET", path, headers=headers, status=200).json() == held


@pytest.mark.parametrize("site", ["none", "same-origin"])
def test_our_own_page_may(api: Api, counter: str, site: str) -> None:
    _reserve(api, {"lines": [line(counter)]}, headers={"Sec-Fetch-Site": site}, status=201)


# --- what problems say ----------------------------------------------------------------------------------------------------


def test_the_type_of_a_problem_leads_to_its_meaning(api: Api) -> None:
    problem = api.request("GET", "/v1/nothing", code="not_found").json()
    assert api.request("GET", problem["type"], status=200).json()["code"] == "not_found"
    too_large = api.engine.raw(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n").json()
    assert api.request("GET", too_large["type"], status=200).json()["status"] == 413
