"""The serving loop over real sockets on loopback.

Nothing sleeps: tests wait for bytes, for the end of a stream, for events, or let others run until a count says so.
"""

import errno
import json
import re
import resource
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import trio

from api import http1, server

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
QUICK = server.ServerLimits(
    head_seconds=0.1,
    body_seconds=0.1,
    idle_seconds=0.1,
    write_seconds=0.1,
    linger_seconds=0.2,
    drain_seconds=0.1,
    abort_seconds=0.1,
    accept_pause_seconds=0.01,
    sweep_seconds=0.02,
)
"""Small times for tests in which a time must pass."""
PATIENT = server.ServerLimits(linger_seconds=5.0, drain_seconds=20.0, sweep_seconds=0.02)
"""For tests in which no time may pass: whatever waits for one of these has failed."""


@dataclass
class Served:
    """One server under test."""

    server: server.Server
    listener: socket.socket
    stop: trio.Event
    errors: list[tuple[Exception, http1.Request | None]] = field(default_factory=list)

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(*self.listener.getsockname())

    async def ask(self, *pieces: bytes, half_close: bool = False) -> bytes:
        """Send, and read until the server closes."""
        async with await self.connect() as stream:
            for piece in pieces:
                await stream.send_all(piece)
            if half_close:
                await stream.send_eof()
            return await read_to_end(stream)


async def read_to_end(stream: trio.SocketStream) -> bytes:
    return b"".join([piece async for piece in stream])


async def read_until(stream: trio.SocketStream, ending: bytes) -> bytes:
    """What comes up to and including `ending`."""
    received = b""
    while not received.endswith(ending):
        piece = await stream.receive_some()
        assert piece, received
        received += piece
    return received


def statuses_in(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d+) ", answer)]


def code_in(answer: bytes) -> str:
    code = json.loads(answer.partition(b"\r\n\r\n")[2])["code"]
    assert isinstance(code, str)
    return code


async def echo(request: http1.Request) -> http1.Response:
    return http1.Response(200, b"[%b %b]" % (request.target, request.body))


@asynccontextmanager
async def serving(
    handler: server.Handler = echo,
    limits: server.ServerLimits = PATIENT,
    listener: socket.socket | None = None,
    body_bytes_max: Callable[[str, str], int] | None = None,
) -> AsyncIterator[Served]:
    """A server for the time of the block; it is cancelled at its end, and errors it reported must have been looked at."""
    own = listener or socket.create_server(("127.0.0.1", 0))
    stop = trio.Event()
    errors: list[tuple[Exception, http1.Request | None]] = []
    try:
        async with trio.open_nursery() as nursery:
            serve = partial(
                server.serve,
                own,
                handler,
                limits=limits,
                stop=stop,
                on_error=lambda error, request: errors.append((error, request)),
                body_bytes_max=body_bytes_max,
            )
            started: server.Server = await nursery.start(serve)
            yield Served(started, own, stop, errors)
            nursery.cancel_scope.cancel()
    finally:
        if listener is None:
            own.close()
    assert errors == []


# Requests and answers


async def test_keep_alive_and_counting() -> None:
    async with serving() as served, await served.connect() as stream:
        for _ in range(3):
            await stream.send_all(GET)
            answer = await read_until(stream, b"[/ ]")
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\nDate: " in answer
            assert b"Connection" not in answer
        counted = served.server.statistics()
        assert (counted.connections_open, counted.connections_accepted, counted.requests) == (1, 1, 3)
        assert counted.bytes_received == 3 * len(GET)
        assert counted.bytes_sent > 3 * len(b"HTTP/1.1 200 OK\r\n")


async def test_pipelined_requests_are_answered_in_order_and_in_one_send() -> None:
    under_way_counts = [0]

    async def one_at_a_time(request: http1.Request) -> http1.Response:
        under_way_counts.append(under_way_counts[-1] + 1)
        await trio.lowlevel.checkpoint()
        under_way_counts.append(under_way_counts[-1] - 1)
        return await echo(request)

    async with serving(one_at_a_time) as served, await served.connect() as stream:
        await stream.send_all(b"".join(GET.replace(b"/ ", b"/%d " % index) for index in range(100)))
        answers = await read_until(stream, b"[/99 ]")
        assert re.findall(rb"\[/(\d+) \]", answers) == [b"%d" % index for index in range(100)]
        assert max(under_way_counts) == 1


async def test_a_client_that_closes_its_sending_side_still_gets_its_answer() -> None:
    may_answer = trio.Event()

    async def late(request: http1.Request) -> http1.Response:
        await may_answer.wait()
        return await echo(request)

    async with serving(late) as served, await served.connect() as stream:
        await stream.send_all(GET)
        await stream.send_eof()
        may_answer.set()
        assert b"[/ ]" in await read_to_end(stream)


async def test_head_has_no_body() -> None:
    async with serving() as served:
        answer = await served.ask(GET.replace(b"GET", b"HEAD"), half_close=True)
        assert b"Content-Length: 4\r\n" in answer
        assert answer.endswith(b"\r\n\r\n")


async def test_http_1_0_is_closed_unless_it_asks_otherwise() -> None:
    async with serving() as served:
        answer = await served.ask(b"GET / HTTP/1.0\r\n\r\n")
        assert b"Connection: close\r\n" in answer
        async with await served.connect() as stream:
            for _ in range(2):
                await stream.send_all(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
                assert b"Connection: keep-alive\r\n" in await read_until(stream, b"[/ ]")


async def test_continue_is_answered_once_and_after_earlier_answers() -> None:
    head = b"POST /b HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    async with serving() as served, await served.connect() as stream:
        await stream.send_all(GET + head)
        first = await read_until(stream, b"HTTP/1.1 100 Continue\r\n\r\n")
        assert statuses_in(first) == [200, 100]
        await stream.send_all(b"hi")
        assert statuses_in(await read_until(stream, b"[/b hi]")) == [200]


async def test_a_body_that_is_too_large_is_refused_before_it_is_sent() -> None:
    head = b"POST /b HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 200\r\n\r\n"
    async with serving(body_bytes_max=lambda _, path: 100 if path == "/b" else 300) as served:
        answer = await served.ask(head)
        assert statuses_in(answer) == [413]
        assert code_in(answer) == "body_too_large"
        answer = await served.ask(head.replace(b"/b", b"/c") + b"x" * 200, half_close=True)
        assert statuses_in(answer) == [200]


async def test_a_large_body_in_chunks() -> None:
    body = bytes(range(256)) * 4000
    head = b"POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(http1.encode_chunk(body[start : start + 9999]) for start in range(0, len(body), 9999))
    async with serving(body_bytes_max=lambda *_: len(body)) as served:
        answer = await served.ask(head + chunks + http1.LAST_CHUNK, half_close=True)
        assert answer.endswith(b"[/b %b]" % body)
        stated = b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
        assert (await served.ask(stated + body, half_close=True)).endswith(b"[/b %b]" % body)


async def test_connections_are_renewed_after_so_many_requests() -> None:
    limits = server.ServerLimits(requests_per_connection_max=2)
    async with serving(limits=limits) as served:
        answer = await served.ask(GET, GET.replace(b"/", b"/2", 1))
        assert statuses_in(answer) == [200, 200]
        assert answer.count(b"Connection: close\r\n") == 1


# Refusals


async def test_good_requests_before_a_bad_one_are_answered() -> None:
    async with serving() as served:
        answer = await served.ask(GET + GET + b"GET /\x00 HTTP/1.1\r\n\r\n" + GET)
        assert statuses_in(answer) == [200, 200, 400]
        assert served.server.statistics().requests_refused == 1


async def test_a_refusal_arrives_although_much_input_is_unread() -> None:
    """Closing with unread input would reset the connection, and the reset could overtake the answer."""
    async with serving() as served:
        answer = await served.ask(
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n", b"x" * 3_000_000, half_close=True
        )
        assert statuses_in(answer) == [413]


async def test_giant_headers_are_refused_while_they_come() -> None:
    async with serving() as served:
        answer = await served.ask(b"GET / HTTP/1.1\r\nHost: a\r\n", b"X: " + b"y" * 1_000_000, half_close=True)
        assert code_in(answer) == "headers_too_large"
        assert served.server.statistics().bytes_received < 100_000


async def test_a_failing_handler_costs_one_connection() -> None:
    async def fail(request: http1.Request) -> http1.Response:
        if request.path == "/bad":
            raise LookupError("a bug")
        if request.path == "/unwritable":
            return http1.Response(200, headers=((b"X", b"a\r\nb"),))
        return await echo(request)

    async with serving(fail) as served:
        for path in (b"/bad", b"/unwritable"):
            answer = await served.ask(GET + GET.replace(b"/ ", path + b" ") + GET)
            assert statuses_in(answer) == [200, 500]
            assert b'"code":"internal_error"' in answer
            assert b'"outcome":"outcome_unknown"' in answer
            assert b"a bug" not in answer
        assert statuses_in(await served.ask(GET, half_close=True)) == [200]
        assert [(type(error), request and request.path) for error, request in served.errors] == [
            (LookupError, "/bad"),
            (ValueError, "/unwritable"),
        ]
        assert served.server.statistics().handler_errors == 2
        served.errors.clear()


async def test_connections_over_the_bound_are_turned_away_and_others_served() -> None:
    limits = server.ServerLimits(connections_max=2, linger_seconds=5.0)
    async with serving(limits=limits) as served, await served.connect() as one, await served.connect() as two:
        for stream in (one, two):
            await stream.send_all(GET)
            await read_until(stream, b"[/ ]")
        async with await served.connect() as three:
            answer = await read_to_end(three)
        assert statuses_in(answer) == [503]
        assert b"Retry-After: 1\r\n" in answer
        assert code_in(answer) == "overloaded"
        await two.send_all(GET)
        await read_until(two, b"[/ ]")
        assert served.server.statistics().connections_refused == 1


def highest_file_number() -> int:
    return max(int(path.name) for path in Path("/proc/self/fd").iterdir())


async def test_running_out_of_files_pauses_accepting_without_spinning() -> None:
    """The real thing: the process has no file left, the connection waits in the queue, and is served once one is free."""
    async with serving(limits=QUICK) as served:
        client = trio.socket.socket()
        with client:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            highest = highest_file_number()
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
            fillers = []
            try:
                try:
                    while True:
                        fillers.append(socket.socket())
                except OSError as error:
                    if error.errno != errno.EMFILE:
                        raise
                await client.connect(served.listener.getsockname())
                await client.send(GET)
                while served.server.statistics().accept_pauses < 3:
                    await trio.lowlevel.checkpoint()
                assert served.server.statistics().connections_accepted == 0
            finally:
                for filler in fillers:
                    filler.close()
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert (await client.recv(100)).startswith(b"HTTP/1.1 200 OK\r\n")


# Slow clients


@pytest.mark.parametrize(
    ("head", "detail"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"headers"),
        (b"G", b"headers"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n", b"body"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", b"body"),
    ],
    ids=["headers", "first byte", "body", "chunks"],
)
async def test_a_request_that_stalls_is_given_up(head: bytes, detail: bytes) -> None:
    async with serving(limits=QUICK) as served:
        answer = await served.ask(head)
        assert statuses_in(answer) == [408]
        assert code_in(answer) == "request_timeout"
        assert detail in answer
        assert served.server.statistics().connections_timed_out == 1


async def test_the_time_for_headers_is_absolute() -> None:
    """A client that never pauses is given up too. Each byte is sent only when the one before has been read."""
    limits = replace(QUICK, parser=http1.ParserLimits(headers_bytes_max=1_000_000))
    async with serving(limits=limits) as served, await served.connect() as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: a\r\nX: ")
        sent_count = 0
        while served.server.connections_timed_out == 0:
            received = served.server.bytes_received
            await stream.send_all(b"y")
            sent_count += 1
            while served.server.bytes_received == received and served.server.connections_timed_out == 0:
                await trio.lowlevel.checkpoint()
        assert sent_count > 10
        assert statuses_in(await read_to_end(stream)) == [408]


async def test_an_idle_connection_is_closed_without_a_word() -> None:
    async with serving(limits=QUICK) as served:
        assert await served.ask() == b""
        assert statuses_in(await served.ask(GET)) == [200]


async def test_a_slow_handler_is_not_a_slow_client() -> None:
    async def slow(request: http1.Request) -> http1.Response:
        began = served.server.sweep
        while served.server.sweep < began + 20:
            await trio.lowlevel.checkpoint()
        return await echo(request)

    async with serving(slow, QUICK) as served:
        assert statuses_in(await served.ask(GET, half_close=True)) == [200]


async def test_a_client_that_does_not_read_is_dropped() -> None:
    async def large(_: http1.Request) -> http1.Response:
        return http1.Response(200, b"x" * 50_000_000)

    async with serving(large, QUICK) as served, await served.connect() as stream:
        await stream.send_all(GET)
        await until(lambda: served.server.statistics().connections_failed == 1)
        counted = served.server.statistics()
        assert counted.connections_timed_out == 1
        assert counted.bytes_sent < 50_000_000
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(stream)


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until it holds; the suite's timeout is the bound."""
    while not condition():
        await trio.lowlevel.checkpoint()


async def test_an_answer_larger_than_the_socket_arrives_whole() -> None:
    async def large(_: http1.Request) -> http1.Response:
        return http1.Response(200, b"x" * 20_000_000)

    async with serving(large) as served:
        answer = await served.ask(GET + GET, half_close=True)
        assert len(answer) > 40_000_000
        assert statuses_in(answer[:100]) == [200]


async def test_a_client_that_resets_is_counted_and_forgotten() -> None:
    may_answer = trio.Event()

    async def late(request: http1.Request) -> http1.Response:
        await may_answer.wait()
        return await echo(request)

    async with serving(late) as served:
        stream = await served.connect()
        await stream.send_all(GET)
        await until(lambda: served.server.statistics().requests == 1)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        await stream.aclose()
        may_answer.set()
        await until(lambda: served.server.statistics().connections_open == 0)
        assert served.server.statistics().connections_failed == 1


# Answers in pieces


async def numbers(count: int) -> AsyncGenerator[bytes, None]:
    for number in range(count):
        yield b"" if number == 1 else b"%d\n" % number
        await trio.lowlevel.checkpoint()


async def test_a_stream_is_chunked_and_the_connection_goes_on() -> None:
    async def stream_numbers(_: http1.Request) -> http1.StreamingResponse:
        return http1.StreamingResponse(numbers(4))

    async with serving(stream_numbers) as served:
        answer = await served.ask(GET + GET, half_close=True)
        assert statuses_in(answer) == [200, 200]
        assert answer.count(b"Transfer-Encoding: chunked\r\n\r\n2\r\n0\n\r\n2\r\n2\n\r\n2\r\n3\n\r\n0\r\n\r\n") == 2
        old = await served.ask(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"Transfer-Encoding" not in old
        assert b"Connection: close\r\n" in old
        assert old.endswith(b"\r\n\r\n0\n2\n3\n")
        head = await served.ask(GET.replace(b"GET", b"HEAD"), half_close=True)
        assert head.endswith(b"Transfer-Encoding: chunked\r\n\r\n")


class Endless:
    """A stream without end that says when it was closed."""

    def __init__(self) -> None:
        self.closed = trio.Event()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            yield b"data: 1\n\n"
            await trio.sleep_forever()
        finally:
            self.closed.set()

    async def handler(self, _: http1.Request) -> http1.StreamingResponse:
        return http1.StreamingResponse(self.chunks(), content_type=b"text/event-stream", endless=True)


@pytest.mark.parametrize("how", ["closes", "half-closes", "resets"])
async def test_an_endless_stream_ends_when_the_client_goes(how: str) -> None:
    endless = Endless()
    async with serving(endless.handler) as served:
        stream = await served.connect()
        await stream.send_all(GET)
        await read_until(stream, b"data: 1\n\n\r\n")
        if how == "half-closes":
            await stream.send_eof()
            assert await read_to_end(stream) == http1.LAST_CHUNK
        elif how == "resets":
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        await stream.aclose()
        await endless.closed.wait()
        await until(lambda: served.server.statistics().connections_open == 0)


async def test_an_endless_stream_ends_in_order_when_the_server_stops() -> None:
    endless = Endless()
    async with serving(endless.handler) as served, await served.connect() as stream:
        await stream.send_all(GET)
        await read_until(stream, b"data: 1\n\n\r\n")
        served.stop.set()
        assert await read_to_end(stream) == http1.LAST_CHUNK
        assert endless.closed.is_set()


async def test_a_stream_that_fails_is_seen_to_be_cut() -> None:
    async def failing() -> AsyncGenerator[bytes, None]:
        yield b"1\n"
        raise LookupError("a bug")

    async def handler(_: http1.Request) -> http1.StreamingResponse:
        return http1.StreamingResponse(failing())

    async with serving(handler) as served, await served.connect() as stream:
        await stream.send_all(GET)
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(stream)
        assert [type(error) for error, _ in served.errors] == [LookupError]
        served.errors.clear()


async def test_a_finite_stream_to_a_client_that_does_not_read_is_dropped_and_closed() -> None:
    closed = trio.Event()

    async def chunks() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"x" * 1_000_000
        finally:
            closed.set()

    async def handler(_: http1.Request) -> http1.StreamingResponse:
        return http1.StreamingResponse(chunks())

    async with serving(handler, QUICK) as served, await served.connect() as stream:
        await stream.send_all(GET)
        await closed.wait()
        await until(lambda: served.server.statistics().connections_open == 0)


# Stopping


async def test_stop_lets_requests_finish_and_answers_idle_connections_once_more() -> None:
    may_answer = trio.Event()

    async def late(request: http1.Request) -> http1.Response:
        if request.path == "/late":
            await may_answer.wait()
        return await echo(request)

    async with serving(late) as served, await served.connect() as idle, await served.connect() as busy:
        await idle.send_all(GET)
        await read_until(idle, b"[/ ]")
        await busy.send_all(GET.replace(b"/ ", b"/late "))
        await until(lambda: served.server.statistics().requests == 2)
        served.stop.set()
        await until(lambda: served.server.is_draining)
        may_answer.set()
        for stream in (busy, idle):
            if stream is idle:
                await idle.send_all(GET)
            answer = await read_to_end(stream)
            assert statuses_in(answer) == [200]
            assert b"Connection: close\r\n" in answer


async def test_stop_answers_the_request_that_is_half_here() -> None:
    """A pipelined request of which the beginning was read is not lost to the close of the one before."""
    may_answer = trio.Event()

    async def late(request: http1.Request) -> http1.Response:
        await may_answer.wait()
        return await echo(request)

    async with serving(late) as served, await served.connect() as stream:
        await stream.send_all(GET + GET[:10])
        await until(lambda: served.server.statistics().requests == 1)
        served.stop.set()
        await until(lambda: served.server.is_draining)
        may_answer.set()
        await read_until(stream, b"[/ ]")
        await stream.send_all(GET[10:])
        answer = await read_to_end(stream)
        assert statuses_in(answer) == [200]
        assert b"Connection: close\r\n" in answer


async def test_the_drain_deadline_ends_idle_and_half_sent_and_stuck() -> None:
    async def stuck(_: http1.Request) -> http1.Response:
        await trio.sleep_forever()
        raise AssertionError

    limits = server.ServerLimits(drain_seconds=0.05, abort_seconds=0.05, linger_seconds=0.05, sweep_seconds=0.02)
    async with (
        serving(stuck, limits) as served,
        await served.connect() as idle,
        await served.connect() as half,
        await served.connect() as busy,
    ):
        await half.send_all(GET[:10])
        await busy.send_all(GET)
        await until(lambda: served.server.statistics().requests == 1)
        served.stop.set()
        assert await read_to_end(idle) == b""
        answer = await read_to_end(half)
        assert statuses_in(answer) == [503]
        assert b"Retry-After: 1\r\n" in answer
        assert await read_to_end(busy) == b""


async def test_the_listening_socket_outlives_the_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(2):
            async with serving(listener=listener) as served:
                assert statuses_in(await served.ask(GET, half_close=True)) == [200]
                served.stop.set()


async def test_trio_listeners_are_taken_too() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    stop = trio.Event()
    async with listener, trio.open_nursery() as nursery:

        async def run() -> None:
            await server.serve(listener, echo, limits=PATIENT, stop=stop, on_error=lambda *_: None)

        nursery.start_soon(run)
        async with await trio.open_tcp_stream(*listener.socket.getsockname()) as stream:
            await stream.send_all(GET)
            await read_until(stream, b"[/ ]")
        stop.set()


async def ask_for_ever(listener: socket.socket, results: list[str], over: trio.Event) -> None:
    """A client that keeps the rules of HTTP/1.1: it uses a connection until it is told that it closes."""
    while not over.is_set():
        async with await trio.open_tcp_stream(*listener.getsockname()) as stream:
            answer = b""
            while b"Connection: close\r\n" not in answer and not over.is_set():
                try:
                    await stream.send_all(GET)
                    answer = await read_until(stream, b"[/ ]")
                except (trio.BrokenResourceError, AssertionError) as error:
                    results.append(f"lost: {error!r}")
                    return
                results.append("answered")


async def test_restarts_under_load_lose_no_request() -> None:
    """Generations follow each other on one listening socket: the next serves before the one before is told to stop."""
    results: list[str] = []
    over = trio.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with trio.open_nursery() as nursery:

            async def start() -> tuple[server.Server, trio.Event]:
                stop = trio.Event()
                serve = partial(server.serve, listener, echo, limits=PATIENT, stop=stop, on_error=lambda *_: None)
                started: server.Server = await nursery.start(serve)
                return started, stop

            running, stop = await start()
            for _ in range(8):
                nursery.start_soon(ask_for_ever, listener, results, over)
            for _ in range(5):
                while running.requests < 200:
                    await trio.lowlevel.checkpoint()
                before = running
                stop_before = stop
                running, stop = await start()
                stop_before.set()
                while not before.is_draining or before.connections:
                    await trio.lowlevel.checkpoint()
            over.set()
            stop.set()
    assert set(results) == {"answered"}
