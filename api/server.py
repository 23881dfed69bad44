"""The serving loop: connections of one process on trio, requests to a handler, answers back in order.

Theory of operation
- A connection is one task. It waits until its socket is readable, reads once, feeds the parser, answers what is complete,
  sends all answers of that read at once, and waits again. Sockets are used directly and written without waiting where
  the kernel takes the bytes, so a request normally costs one pass through trio's scheduler.
- Time is counted in sweeps. One task for each process wakes every `sweep_seconds`, counts, and cancels the connections whose
  phase has lasted too long. A cancel scope or deadline for each request costs more than parsing it (see ARCHITECTURE.md), and a
  process that was itself stopped for a while does not blame its clients, because its count stood still too.
- A connection's phase says what it waits for, and each phase has its bound: idle (between requests), head, body, writing;
  none while the handler works (handlers keep their own deadlines).

Rules
- One request in flight for each connection; answers leave in the order of the requests. What is read ahead is bounded by
  one read of the socket.
- A message that was refused is the last of its connection: the answer says so, and nothing behind it is read as a request.
- The server closes in this order: shut down sending, read and drop until the client closes or `linger_seconds` have passed,
  close. Closing with unread input would send a reset, and that can destroy an answer on its way.
- A failing handler is answered with 500 and reported; a failing connection ends alone. Errors that are no `Exception`
  (a broken invariant) are not caught: they end the process.

Graceful stop, in this order, so that no request is lost: stop accepting (the listening socket stays open, others share
it); answer the next request of each connection with `Connection: close`; end endless streams; after `drain_seconds` close
what is idle or half sent; after `abort_seconds` more, cancel the rest.

Not promised: punctual timeouts (never early, up to two sweeps late). An idle connection that is closed at the drain
deadline or after its idle time can lose a request that is on its way at that instant; HTTP/1.1 has no safe instant.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import trio
from trio.lowlevel import notify_closing, wait_readable, wait_writable

from api import http1
from engine.core.invariant import invariant

Handler = Callable[[http1.Request], Awaitable[http1.Response | http1.StreamingResponse]]
"""What answers a request. It may wait, and must bound its own waiting."""

OnError = Callable[[Exception, http1.Request | None], None]
"""Told of each failed handler (with its request) and each failed connection (None). Must not raise."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """All bounds of one process. Times are from the blueprint; tests use small ones."""

    parser: http1.ParserLimits = http1.ParserLimits()  # noqa: RUF009 - frozen
    connections_max: int = 4096
    """For one process; its files must suffice (one each, and the upstreams)."""
    refusals_lingering_max: int = 64
    """Connections over the bound that are given their 503 without a reset; those beyond are just closed."""
    requests_per_connection_max: int = 1_000
    """After so many the connection is closed in order, so that connections spread again after a restart."""
    head_seconds: float = 5.0
    """From the first byte of a request to the end of its headers, however busily it trickles."""
    body_seconds: float = 10.0
    idle_seconds: float = 30.0
    write_seconds: float = 10.0
    """For each `write_bytes` of an answer: a reader slower than that is dropped."""
    write_bytes: int = 64 * 1024
    linger_seconds: float = 1.0
    drain_seconds: float = 30.0
    abort_seconds: float = 5.0
    accept_pause_seconds: float = 0.1
    """After accept failed for lack of files or memory."""
    retry_after_seconds: int = 1
    sweep_seconds: float = 1.0
    """How often times are looked at, and how old the Date of an answer can be."""
    read_bytes_min: int = 16 * 1024
    """One read between bodies, which bounds the requests that are read ahead."""
    read_bytes_max: int = 256 * 1024
    """One read within a body of stated length."""

    def __post_init__(self) -> None:
        invariant(
            0 < self.read_bytes_min <= self.read_bytes_max, "a read has a size, and bodies are not read in smaller ones"
        )
        invariant(self.connections_max > 0 and self.requests_per_connection_max > 0, "somebody is served")
        shortest = min(self.idle_seconds, self.head_seconds, self.body_seconds, self.write_seconds)
        invariant(0 < self.sweep_seconds <= shortest, "a time that is shorter than a sweep cannot be kept")


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Counted since the start of the server."""

    connections_open: int
    """Now, including those that are closing."""
    connections_accepted: int
    connections_refused: int
    """Over the bound: answered 503 or closed at once."""
    connections_timed_out: int
    """By the sweeper, whatever they were waiting for; idle ones too."""
    connections_failed: int
    """Reset by the client, lost, or dropped because the client did not read."""
    requests: int
    """Handed to the handler."""
    requests_refused: int
    """Answered by this layer: not HTTP, too large, too late."""
    handler_errors: int
    bytes_received: int
    bytes_sent: int
    accept_pauses: int
    """Times that accept failed for lack of files or memory."""


class _Phase(IntEnum):
    """What a connection waits for. The first three are `http1.Phase`, with the same numbers."""

    IDLE = 0
    HEAD = 1
    BODY = 2
    WRITING = 3
    WORKING = 4
    """In the handler, or closing: no bound here, the handler and the closing keep their own."""


# Looking a member up in its class costs 30 ns on Python 3.11, and the hot path looks often.
_IDLE: Final = _Phase.IDLE
_WRITING: Final = _Phase.WRITING
_WORKING: Final = _Phase.WORKING
_PHASES: Final = {http1.Phase.IDLE: _Phase.IDLE, http1.Phase.HEAD: _Phase.HEAD, http1.Phase.BODY: _Phase.BODY}
_NEVER: Final = 1 << 62

_ACCEPT_ERRORS_OF_THE_CLIENT: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
    },
)
"""accept(2): pending errors of the new connection are handed to accept; treat them as nothing to accept."""
_ACCEPT_ERRORS_OF_THE_HOST: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

PIPELINE_HOLD_SECONDS: Final = 0.005
"""How long an answer may wait for those behind it, to be sent with them."""

_LINGER_READ_BYTES: Final = 64 * 1024
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds


class _ClientGoneError(Exception):
    """The rest of an answer cannot be delivered."""


class Server:
    """The connections of one process. `serve` makes one; its `statistics` can be read at any time."""

    def __init__(
        self,
        handler: Handler,
        *,
        limits: ServerLimits,
        on_error: OnError,
        body_bytes_max: Callable[[str, str], int] | None = None,
    ) -> None:
        self.handler = handler
        self.limits = limits
        self.on_error = on_error
        self.body_bytes_max = body_bytes_max
        self.sweep = 0
        self.sweeps_max = tuple(
            # One more than the time needs: a phase may have begun just before a sweep.
            _NEVER if seconds is None else int(seconds / limits.sweep_seconds) + 1
            for seconds in (limits.idle_seconds, limits.head_seconds, limits.body_seconds, limits.write_seconds, None)
        )
        self.date = http1.date_line(time.time())
        self.draining = trio.Event()
        self.is_draining = False
        self.connections: set[_Connection] = set()
        self.refusals_lingering = 0
        self.connections_accepted = 0
        self.connections_refused = 0
        self.connections_timed_out = 0
        self.connections_failed = 0
        self.requests = 0
        self.requests_refused = 0
        self.handler_errors = 0
        self.bytes_received = 0
        self.bytes_sent = 0
        self.accept_pauses = 0

    def statistics(self) -> ServerStatistics:
        return ServerStatistics(
            connections_open=len(self.connections),
            connections_accepted=self.connections_accepted,
            connections_refused=self.connections_refused,
            connections_timed_out=self.connections_timed_out,
            connections_failed=self.connections_failed,
            requests=self.requests,
            requests_refused=self.requests_refused,
            handler_errors=self.handler_errors,
            bytes_received=self.bytes_received,
            bytes_sent=self.bytes_sent,
            accept_pauses=self.accept_pauses,
        )

    async def run(self, listener: socket.socket, stop: trio.Event) -> None:
        """Serve until `stop`, then stop in order. `listener` is not closed."""
        async with trio.open_nursery() as background:
            background.start_soon(self._sweep_for_ever)
            async with trio.open_nursery() as connections:
                accepting = trio.CancelScope()
                background.start_soon(self._drain_after, stop, accepting, connections.cancel_scope)
                with accepting:
                    await self._accept_for_ever(listener, connections)
            background.cancel_scope.cancel()

    async def _accept_for_ever(self, listener: socket.socket, connections: trio.Nursery) -> None:
        limits = self.limits
        while True:
            await wait_readable(listener)
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                continue  # another process was quicker
            except OSError as error:
                if error.errno in _ACCEPT_ERRORS_OF_THE_CLIENT:
                    continue
                if error.errno in _ACCEPT_ERRORS_OF_THE_HOST:
                    # The listening socket stays readable, so asking again at once would spin.
                    self.accept_pauses += 1
                    await trio.sleep(limits.accept_pause_seconds)
                    continue
                raise
            client.setblocking(False)
            if client.family in (socket.AF_INET, socket.AF_INET6):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(self.connections) < limits.connections_max:
                self.connections_accepted += 1
                connection = _Connection(self, client)
                self.connections.add(connection)
                connections.start_soon(connection.run)
            else:
                self.connections_refused += 1
                if self.refusals_lingering < limits.refusals_lingering_max:
                    self.refusals_lingering += 1
                    connections.start_soon(self._turn_away, client)
                else:
                    client.close()

    async def _turn_away(self, client: socket.socket) -> None:
        retry_after = ((b"Retry-After", b"%d" % self.limits.retry_after_seconds),)
        response = http1.problem("overloaded", "This process has as many connections as it may.", retry_after)
        try:
            client.send(http1.encode(response, None, self.date, keep_alive=False))
            await _linger(client, self.limits.linger_seconds)
        except OSError:
            pass  # it has gone by itself
        finally:
            self.refusals_lingering -= 1
            _close(client)

    async def _sweep_for_ever(self) -> None:
        while True:
            await trio.sleep(self.limits.sweep_seconds)
            self.sweep = sweep = self.sweep + 1
            self.date = http1.date_line(time.time())
            sweeps_max = self.sweeps_max
            for connection in self.connections:
                if sweep - connection.since > sweeps_max[connection.phase]:
                    self.connections_timed_out += 1
                    connection.expire()

    async def _drain_after(self, stop: trio.Event, accepting: trio.CancelScope, connections: trio.CancelScope) -> None:
        await stop.wait()
        accepting.cancel()
        self.is_draining = True
        self.draining.set()
        await trio.sleep(self.limits.drain_seconds)
        for connection in self.connections:
            if connection.phase in (_Phase.IDLE, _Phase.HEAD, _Phase.BODY):
                connection.expire()
        await trio.sleep(self.limits.abort_seconds)
        connections.cancel()


class _Connection:
    """One client. Owned by its task; the sweeper only reads `phase` and `since`, and calls `expire`."""

    __slots__ = (
        "_is_broken",
        "_is_expired",
        "_parser",
        "_requests_left",
        "_scope",
        "_server",
        "_socket",
        "phase",
        "since",
    )

    def __init__(self, server: Server, client: socket.socket) -> None:
        self._server = server
        self._socket = client
        self._parser = http1.RequestParser(server.limits.parser, server.body_bytes_max)
        self._scope = trio.CancelScope()
        self._requests_left = server.limits.requests_per_connection_max
        self._is_broken = False
        """Set while an answer is half sent, and for good when it stays so."""
        self._is_expired = False
        self.phase = _Phase.IDLE
        self.since = server.sweep

    def expire(self) -> None:
        """The phase has lasted too long, or the server stops."""
        self._is_expired = True
        self._scope.cancel()

    async def run(self) -> None:
        server = self._server
        try:
            while True:
                with self._scope:
                    await self._converse()
                if not self._is_expired:
                    break
                if self.phase is not _IDLE or not self._has_input():
                    await self._close_expired()
                    break
                # A request came in the instant that its time was up: serve it.
                self._is_expired = False
                self._scope = trio.CancelScope()
                self.since = server.sweep
        except (OSError, _ClientGoneError):
            server.connections_failed += 1
            self._is_broken = True
        except Exception as error:  # noqa: BLE001 - reported; one connection must not end the others
            self._is_broken = True
            server.on_error(error, None)
        finally:
            server.connections.discard(self)
            if self._is_broken:
                _reset_on_close(self._socket)
            _close(self._socket)

    async def _converse(self) -> None:
        server = self._server
        client = self._socket
        parser = self._parser
        read_bytes_min = server.limits.read_bytes_min
        read_bytes_max = server.limits.read_bytes_max
        while True:
            await wait_readable(client)
            if self._is_expired:
                return  # cancelled, but too late for the wait: a handler called now would be cut short
            body_bytes_left = parser.body_bytes_left
            try:
                data = client.recv(
                    read_bytes_min if body_bytes_left <= read_bytes_min else min(body_bytes_left, read_bytes_max),
                )
            except BlockingIOError:
                continue
            if not data:
                return
            server.bytes_received += len(data)
            try:
                requests = parser.feed(data)
            except http1.ProtocolError as error:
                await self._refuse(error)
                return
            if requests and not await self._answer(requests):
                await self._finish()
                return
            if parser.error is not None:
                await self._refuse(parser.error)
                return
            if parser.continue_wanted:
                parser.continue_wanted = False
                await self._send(http1.CONTINUE)
            phase = _PHASES[parser.phase]
            if requests or phase is not self.phase:
                self.phase = phase
                self.since = server.sweep

    async def _answer(self, requests: list[http1.Request]) -> bool:
        """Answer the requests of one read, in order, in few sends. False: the connection is to be closed."""
        server = self._server
        self.phase = _WORKING
        pending = b""
        hold_until = trio.current_time() + PIPELINE_HOLD_SECONDS if len(requests) > 1 else 0.0
        last = requests[-1]
        for request in requests:
            server.requests += 1
            self._requests_left -= 1
            try:
                response = await server.handler(request)
                keep_alive = request.keep_alive
                # Only now: the server may have been told to stop while the handler worked.
                if (server.is_draining or self._requests_left <= 0) and request is last:
                    # While the next request is already half here, closing would lose it.
                    keep_alive = keep_alive and self._parser.phase is not http1.Phase.IDLE
                if isinstance(response, http1.StreamingResponse):
                    keep_alive = keep_alive and not response.endless and request.http_version != "1.0"
                    pending += http1.encode_stream_head(response, request, server.date, keep_alive=keep_alive)
                else:
                    pending += http1.encode(response, request, server.date, keep_alive=keep_alive)
            except Exception as error:  # noqa: BLE001 - reported; a bug of a handler costs one connection
                server.handler_errors += 1
                server.on_error(error, request)
                failure = http1.problem("internal_error", "The request may or may not have been executed.")
                await self._send(pending + http1.encode(failure, request, server.date, keep_alive=False))
                return False
            if isinstance(response, http1.StreamingResponse):
                await self._send(pending)
                pending = b""
                keep_alive = await self._stream(request, response) and keep_alive
            if not keep_alive:
                break
            if request is not last and (len(pending) > server.limits.write_bytes or trio.current_time() > hold_until):
                await self._send(pending)
                pending = b""
                hold_until = trio.current_time() + PIPELINE_HOLD_SECONDS
        if pending:
            await self._send(pending)
        return keep_alive

    async def _send(self, data: bytes) -> None:
        """Hand all of `data` to the kernel. Leaves the phase as it was; while it must wait, the sweeper watches."""
        client = self._socket
        try:
            sent = client.send(data)
        except BlockingIOError:
            sent = 0
        self._server.bytes_sent += sent
        if sent != len(data):
            await self._send_rest(memoryview(data)[sent:])

    async def _send_rest(self, rest: memoryview) -> None:
        server = self._server
        client = self._socket
        write_bytes = server.limits.write_bytes
        phase = self.phase
        self.phase = _WRITING
        while rest:
            piece = rest[:write_bytes]
            rest = rest[write_bytes:]
            self.since = server.sweep
            while piece:
                await wait_writable(client)
                if self._is_expired:
                    raise _ClientGoneError
                try:
                    sent = client.send(piece)
                except BlockingIOError:
                    continue
                server.bytes_sent += sent
                piece = piece[sent:]
        self.phase = phase

    # Answers in pieces

    async def _stream(self, request: http1.Request, response: http1.StreamingResponse) -> bool:
        """Send the body of an answer whose head is out. False: the connection cannot go on."""
        chunks = response.chunks
        try:
            if request.method == "HEAD" or not http1.has_body(response.status):
                return True
            is_chunked = request.http_version != "1.0"
            if response.endless:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._cancel_when_client_closes, nursery.cancel_scope)
                    nursery.start_soon(self._cancel_when_draining, nursery.cancel_scope)
                    await self._pump(request, chunks, is_chunked=is_chunked)
                    nursery.cancel_scope.cancel()
            else:
                await self._pump(request, chunks, is_chunked=is_chunked)
            if is_chunked and not self._is_broken:
                await self._send(http1.LAST_CHUNK)
            return not self._is_broken
        finally:
            if isinstance(chunks, AsyncGenerator):
                try:
                    await chunks.aclose()
                except Exception as error:  # noqa: BLE001 - reported; as above
                    self._server.handler_errors += 1
                    self._server.on_error(error, request)

    async def _pump(self, request: http1.Request, chunks: AsyncIterator[bytes], *, is_chunked: bool) -> None:
        """Send chunk after chunk. Where it ends within one, `_is_broken` stays set, and the client sees a reset."""
        server = self._server
        while True:
            try:
                chunk = await anext(chunks)
                data = http1.encode_chunk(chunk) if is_chunked and chunk else chunk
            except StopAsyncIteration:
                return
            except Exception as error:  # noqa: BLE001 - reported; as above
                self._is_broken = True
                server.handler_errors += 1
                server.on_error(error, request)
                return
            if not data:
                continue
            self._is_broken = True
            try:
                await self._send(data)
            except (OSError, _ClientGoneError):
                server.connections_failed += 1
                return
            self._is_broken = False

    async def _cancel_when_client_closes(self, stream: trio.CancelScope) -> None:
        """Read and drop: after an endless answer the connection is closed, so nothing sent now can be a request."""
        client = self._socket
        try:
            while True:
                await wait_readable(client)
                try:
                    data = client.recv(self._server.limits.read_bytes_min)
                except BlockingIOError:
                    continue
                if not data:
                    break
        except OSError:
            self._server.connections_failed += 1
            self._is_broken = True
        stream.cancel()

    async def _cancel_when_draining(self, stream: trio.CancelScope) -> None:
        await self._server.draining.wait()
        stream.cancel()

    # Ends

    async def _refuse(self, error: http1.ProtocolError) -> None:
        self._server.requests_refused += 1
        self.phase = _WORKING
        await self._send(
            http1.encode(http1.problem(error.code, error.detail), None, self._server.date, keep_alive=False)
        )
        await self._finish()

    async def _finish(self) -> None:
        """Close in order: see the rules above."""
        if self._is_broken:
            return
        self.phase = _WORKING
        with suppress(OSError):  # the client may end as rudely as it likes once it has its answer
            await _linger(self._socket, self._server.limits.linger_seconds)

    async def _close_expired(self) -> None:
        """The sweeper or the drain deadline has spoken. The scope is left, so waiting is possible again."""
        server = self._server
        phase = self.phase
        self.phase = _WORKING
        if phase is _WRITING:
            raise _ClientGoneError
        if phase is not _IDLE:
            server.requests_refused += 1
            if server.is_draining:
                retry_after = ((b"Retry-After", b"%d" % server.limits.retry_after_seconds),)
                response = http1.problem(
                    "overloaded", "The server stops, and the request was not complete.", retry_after
                )
            else:
                part = "headers" if phase is _Phase.HEAD else "body"
                response = http1.problem("request_timeout", f"The {part} did not arrive in time.")
            with suppress(BlockingIOError):  # it neither sends nor reads
                server.bytes_sent += self._socket.send(http1.encode(response, None, server.date, keep_alive=False))
        await self._finish()

    def _has_input(self) -> bool:
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False


async def _linger(client: socket.socket, seconds: float) -> None:
    """Tell the client that no more comes, and read what it still sends, for a bounded time."""
    client.shutdown(socket.SHUT_WR)
    with trio.move_on_after(seconds):
        while True:
            await wait_readable(client)
            try:
                data = client.recv(_LINGER_READ_BYTES)
            except BlockingIOError:
                continue
            if not data:
                return


def _reset_on_close(client: socket.socket) -> None:
    """Let the client see that its answer is not whole, and drop what the kernel still holds for it."""
    with suppress(OSError):  # it is gone already
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


def _close(client: socket.socket) -> None:
    notify_closing(client)
    client.close()


async def serve(
    listener: trio.SocketListener | trio.socket.SocketType | socket.socket,
    handler: Handler,
    *,
    limits: ServerLimits,
    stop: trio.Event,
    on_error: OnError,
    body_bytes_max: Callable[[str, str], int] | None = None,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve connections of `listener` until `stop` is set, and return when the last of them has ended.

    The listening socket is neither closed nor shut down: it belongs to the caller and may be shared by processes.
    `body_bytes_max(method, path)` overrides `limits.parser.body_bytes_max` for each route. Started in a nursery,
    it hands out the `Server`, whose `statistics()` can be read at any time.
    """
    source = listener.socket if isinstance(listener, trio.SocketListener) else listener
    own = socket.socket(fileno=os.dup(source.fileno()))
    own.setblocking(False)
    server = Server(handler, limits=limits, on_error=on_error, body_bytes_max=body_bytes_max)
    try:
        task_status.started(server)
        await server.run(own, stop)
    finally:
        _close(own)
