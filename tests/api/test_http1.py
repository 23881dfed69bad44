"""The parser and the encoder as functions of bytes. What is refused, and why, is in `test_smuggling.py`."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api import http1

POST = b"POST /v1/reservations HTTP/1.1\r\nHost: a\r\n"
CONVERSATION = (
    b"GET /v1/pools/van-north?zone=n%20e&x HTTP/1.1\r\nHost: [::1]:80\r\nAccept: a\r\nAccept: b\r\n\r\n"
    b"\r\n"
    + POST
    + b"Content-Length: 11\r\nExpect: 100-continue\r\n\r\n{\r\n\r\n\r\n:1}X"
    + POST
    + b"Transfer-Encoding: chunked\r\n\r\n"
    b'4;a="\\""\r\n\r\n\r\n\r\n00A;b\r\n0123456789\r\n0\r\nX: y\r\n\r\n'
    b"HEAD / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\nCookie: a=1\r\nCookie: b=2\r\nConnection: close\r\n\r\n"
)
"""Every way a message can end, with bodies that look like line ends."""

DATE = b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"


def requests_of(pieces: list[bytes]) -> list[http1.Request]:
    parser = http1.RequestParser()
    return [request for piece in pieces for request in parser.feed(piece)]


def request_for(method: str = "GET", http_version: str = "1.1") -> http1.Request:
    return http1.Request(method, "/", b"/", b"", {}, b"", keep_alive=True, http_version=http_version)


def test_a_conversation() -> None:
    get, post, chunked, head, options = requests_of([CONVERSATION])
    assert get == http1.Request(
        method="GET",
        path="/v1/pools/van-north",
        target=b"/v1/pools/van-north?zone=n%20e&x",
        query=b"zone=n%20e&x",
        headers={b"host": b"[::1]:80", b"accept": b"a, b"},
        body=b"",
        keep_alive=True,
        http_version="1.1",
    )
    assert (post.method, post.path, post.body) == ("POST", "/v1/reservations", b"{\r\n\r\n\r\n:1}X")
    assert chunked.body == b"\r\n\r\n0123456789"
    assert b"x" not in chunked.headers
    assert (head.method, head.http_version, head.keep_alive) == ("HEAD", "1.0", True)
    assert (options.path, options.headers[b"cookie"], options.keep_alive) == ("*", b"a=1; b=2", False)


def test_any_cut_in_two_gives_the_same_requests() -> None:
    whole = requests_of([CONVERSATION])
    for cut in range(len(CONVERSATION) + 1):
        assert requests_of([CONVERSATION[:cut], CONVERSATION[cut:]]) == whole, cut


def test_byte_by_byte_gives_the_same_requests() -> None:
    assert requests_of([bytes([byte]) for byte in CONVERSATION]) == requests_of([CONVERSATION])


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=12))
def test_any_cuts_give_the_same_requests(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(CONVERSATION)]
    pieces = [CONVERSATION[start:end] for start, end in pairwise(edges)]
    assert requests_of(pieces) == requests_of([CONVERSATION])


_WORDS = st.sampled_from(
    [
        *(
            b"GET ",
            b"POST ",
            b"/",
            b"/%41",
            b" ",
            b" HTTP/1.1",
            b" HTTP/1.0",
            b"\r\n",
            b"\r\n\r\n",
            b"\r",
            b"\n",
            b":",
            b";",
        ),
        *(
            b"Host: a\r\n",
            b"Content-Length: 3\r\n",
            b"Content-Length: ",
            b"Transfer-Encoding: chunked\r\n",
            b"Expect: ",
        ),
        *(
            b"100-continue\r\n",
            b"Connection: close\r\n",
            b"Connection: upgrade\r\nUpgrade: x\r\n",
            b"0\r\n\r\n",
            b"3\r\nabc\r\n",
        ),
        *(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"),
        *(b"CONNECT a:1 HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00", b"\xff", b'"', b"a" * 9000),
    ],
)


@settings(max_examples=400)
@given(st.lists(st.one_of(_WORDS, st.binary(max_size=20)), max_size=30))
def test_nothing_raises_but_protocol_errors(pieces: list[bytes]) -> None:
    """And what is kept stays bounded, and a broken parser stays broken."""
    limits = http1.ParserLimits()
    held_max = limits.request_line_bytes_max + limits.headers_bytes_max + limits.body_bytes_max
    parser = http1.RequestParser(limits)
    for piece in pieces:
        had_failed = parser.error is not None
        try:
            requests = parser.feed(piece)
        except http1.ProtocolError:
            refusal = parser.error
            assert refusal is not None
            assert refusal.status == http1.PROBLEMS[refusal.code][0]
            assert refusal.detail
        else:
            assert not had_failed
            assert all(len(request.body) <= limits.body_bytes_max for request in requests)
        assert len(parser._buffer) + sum(map(len, parser._pieces)) <= held_max + len(piece)


@settings(max_examples=200)
@given(st.lists(st.one_of(_WORDS, st.binary(max_size=20)), max_size=20), st.data())
def test_cuts_never_change_whether_a_stream_is_refused(words: list[bytes], data: st.DataObject) -> None:
    """Which of several faults is reported may depend on the cuts; what is taken before, and that there is one, may not."""
    stream = b"".join(words)
    cut = data.draw(st.integers(0, len(stream)))

    def outcome(pieces: list[bytes]) -> tuple[list[http1.Request], bool]:
        parser = http1.RequestParser()
        taken: list[http1.Request] = []
        for piece in pieces:
            if parser.error is None:
                try:
                    taken += parser.feed(piece)
                except http1.ProtocolError:
                    break
        return taken, parser.error is not None

    assert outcome([stream[:cut], stream[cut:]]) == outcome([stream])


def test_requests_before_a_broken_one_are_handed_out_first() -> None:
    parser = http1.RequestParser()
    good = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    assert len(parser.feed(good + good + b"GET / HTTP/9\r\n\r\n" + good)) == 2
    assert parser.error is not None
    for _ in range(2):
        with pytest.raises(http1.ProtocolError) as caught:
            parser.feed(good)
        assert caught.value.code == "invalid_request"


def test_the_phase_says_where_the_input_ended() -> None:
    parser = http1.RequestParser()
    phases = [parser.phase]
    for piece in (b"PO", POST[2:] + b"Content-Length: 2\r\n\r\n", b"h", b"iGET", b" / HTTP/1.0\r\n\r\n"):
        parser.feed(piece)
        phases.append(parser.phase)
    expected = [
        http1.Phase.IDLE,
        http1.Phase.HEAD,
        http1.Phase.BODY,
        http1.Phase.BODY,
        http1.Phase.HEAD,
        http1.Phase.CLOSED,
    ]
    assert phases == expected


def test_continue_is_wanted_until_the_body_begins() -> None:
    parser = http1.RequestParser()
    head = POST + b"Expect: 100-Continue\r\nContent-Length: 2\r\n\r\n"
    wanted = []
    for piece in (head, b"h", b"i" + head + b"h"):
        parser.feed(piece)
        wanted.append((parser.continue_wanted, parser.body_bytes_left))
    assert wanted == [(True, 2), (False, 1), (False, 1)]


@pytest.mark.parametrize(
    "head",
    [
        POST + b"Expect: 100-continue\r\n\r\n",
        POST.replace(b"1.1", b"1.0") + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n",
    ],
    ids=["nothing to wait for", "http/1.0"],
)
def test_continue_is_not_wanted(head: bytes) -> None:
    parser = http1.RequestParser()
    parser.feed(head)
    assert not parser.continue_wanted


def test_each_route_can_have_its_own_bound() -> None:
    asked: list[tuple[str, str]] = []

    def body_bytes_max(method: str, path: str) -> int:
        asked.append((method, path))
        return 70_000 if path == "/v1/reservations:batch" else 3

    batch = b"POST /v1/reservations:batch HTTP/1.1\r\nHost: a\r\nContent-Length: 70000\r\n\r\n" + b"x" * 70_000
    assert len(http1.RequestParser(body_bytes_max=body_bytes_max).feed(batch)[0].body) == 70_000
    for coding in (b"Content-Length: 4\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n4\r\n"):
        with pytest.raises(http1.ProtocolError) as caught:
            http1.RequestParser(body_bytes_max=body_bytes_max).feed(POST + coding)
        assert (caught.value.status, caught.value.code) == (413, "body_too_large")
    http1.RequestParser(body_bytes_max=body_bytes_max).feed(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert asked == [("POST", "/v1/reservations:batch"), ("POST", "/v1/reservations"), ("POST", "/v1/reservations")]


def test_the_bounds_are_exact() -> None:
    limits = http1.ParserLimits(request_line_bytes_max=20, headers_bytes_max=40, headers_count_max=2, body_bytes_max=5)

    def status(sent: bytes) -> int:
        statuses = set()
        for pieces in ([sent], [sent[index : index + 1] for index in range(len(sent))]):
            parser = http1.RequestParser(limits)
            try:
                for piece in pieces:
                    parser.feed(piece)
            except http1.ProtocolError as error:
                statuses.add(error.status)
            else:
                statuses.add(200)
        (only,) = statuses
        return only

    assert status(b"GET /345678 HTTP/1.1\r\nHost: a\r\n\r\n") == 200
    assert status(b"GET /3456789 HTTP/1.1\r\nHost: a\r\n\r\n") == 414
    assert status(b"GET / HTTP/1.1\r\nHost: a\r\nX: 4567890123456789012345678\r\n\r\n") == 200
    assert status(b"GET / HTTP/1.1\r\nHost: a\r\nX: 4567890123456789012345678901\r\n\r\n") == 431
    assert status(b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\nY: z\r\n\r\n") == 431
    assert status(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n12345") == 200
    assert status(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\n") == 413


def test_limits_hold_together() -> None:
    with pytest.raises(BaseException, match="room for a size"):
        http1.ParserLimits(chunk_line_bytes_max=8)
    with pytest.raises(BaseException, match="positive"):
        http1.ParserLimits(body_bytes_max=0)


# Answers


def test_an_answer() -> None:
    response = http1.Response(201, b'{"a":1}', headers=((b"Location", b"/x"),))
    assert http1.encode(response, request_for(), DATE, keep_alive=True) == (
        b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 7\r\n"
        + DATE
        + b'Location: /x\r\n\r\n{"a":1}'
    )


def test_head_has_the_length_and_no_body() -> None:
    encoded = http1.encode(http1.Response(200, b"12345"), request_for("HEAD"), DATE, keep_alive=True)
    assert b"Content-Length: 5\r\n" in encoded
    assert encoded.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("status", [204, 304])
def test_no_body_where_none_may_be(status: int) -> None:
    encoded = http1.encode(http1.Response(status, b"12345"), request_for(), DATE, keep_alive=True)
    assert encoded.endswith(b"\r\n\r\n")
    assert b"Content-" not in encoded


@pytest.mark.parametrize(
    ("http_version", "keep_alive", "line"),
    [("1.1", True, None), ("1.1", False, b"close"), ("1.0", True, b"keep-alive"), ("1.0", False, b"close")],
)
def test_connection_is_said_when_needed(http_version: str, keep_alive: bool, line: bytes | None) -> None:
    encoded = http1.encode(http1.Response(200), request_for(http_version=http_version), DATE, keep_alive=keep_alive)
    assert (b"Connection:" in encoded) == (line is not None)
    assert line is None or b"Connection: %b\r\n" % line in encoded


@pytest.mark.parametrize(
    "response",
    [
        http1.Response(200, headers=((b"X", b"a\r\nSet-Cookie: b"),)),
        http1.Response(200, headers=((b"X", b"a\nb"),)),
        http1.Response(200, headers=((b"X Y", b"a"),)),
        http1.Response(200, headers=((b"content-length", b"3"),)),
        http1.Response(200, headers=((b"Transfer-Encoding", b"chunked"),)),
        http1.Response(200, content_type=b"text/html\r\nX: y"),
        http1.Response(103),
        http1.Response(999),
    ],
)
def test_a_handler_cannot_break_the_framing(response: http1.Response) -> None:
    with pytest.raises(ValueError, match=r"."):
        http1.encode(response, request_for(), DATE, keep_alive=True)


def test_dates_are_http_dates() -> None:
    assert http1.date_line(0.9) == DATE


@pytest.mark.parametrize("code", http1.PROBLEMS)
def test_problems_say_what_was_not_done(code: str) -> None:
    response = http1.problem(code, "Because.")
    body = json.loads(response.body)
    assert response.content_type == b"application/problem+json"
    assert body["status"] == response.status == http1.PROBLEMS[code][0]
    assert body["code"] == code
    assert body["type"].endswith(code.replace("_", "-"))
    assert body["outcome"] == ("outcome_unknown" if code == "internal_error" else "not_executed")
