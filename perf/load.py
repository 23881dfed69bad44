"""A raw HTTP/1.1 client on trio, fast enough to load an engine from one process, that retries as a careful caller would.

`Connection` is one keep-alive connection and one request at a time. `Client` asks until it has an answer that settles the
question: it connects anew when the server says `Connection: close` or goes away, and waits as `Retry-After` says after a 503.
Every retry sends the same bytes, so a request that changes something must carry an Idempotency-Key, or be harmless to repeat.

Rules
- A request is repeated until an answer other than 503, or until the budget is spent; then `GaveUpError` says so. What has
  become of a request that was given up is unknown if it ever reached the server.
- The server is trusted to speak the HTTP/1.1 of `api.http1`: each answer carries its Content-Length.

Not promised: pipelining, chunked answers, redirects, TLS.
"""

import random
import socket
import time
from collections import Counter
from typing import NamedTuple

import trio

RECEIVE_BYTES = 64 * 1024
PAUSE_S_MIN = 0.005
PAUSE_S_MAX = 0.2
"""Between attempts to connect: a server that restarts is found soon, and is not stormed."""
RETRY_AFTER_S_DEFAULT = 1.0
"""After a 503 that names no time."""


class Address(NamedTuple):
    """Where the server listens."""

    host: str
    port: int


class Answer(NamedTuple):
    """What the server said."""

    status: int
    body: bytes
    retry_after_s: float | None
    closes: bool
    """The server closes the connection after this answer."""


class Budget(NamedTuple):
    """How long a client insists."""

    seconds: float = 60.0
    """For one request, all attempts together."""
    retry_after_s_max: float = 3.0
    """A shorter wait than the server asks for is impolite; tests that kill servers are."""


class LostError(Exception):
    """The connection ended before the answer was complete: nobody here knows what has become of the request."""


class GaveUpError(Exception):
    """The budget is spent without an answer that settles the question."""


class Statistics(NamedTuple):
    """What a client has met."""

    requests: int
    """Requests answered, each counted once however often it was sent."""
    connections: int
    """Connections made."""
    connects_refused: int
    """Attempts at which nobody listened."""
    lost: int
    """Attempts whose answer was lost with the connection."""
    unavailable: dict[str, int]
    """Attempts answered with 503, by code."""


def request_bytes(method: str, target: str, body: bytes = b"", key: str | None = None) -> bytes:
    """A request, ready to be sent any number of times."""
    head = f"{method} {target} HTTP/1.1\r\nHost: slotkeeper\r\n"
    if key is not None:
        head += f"Idempotency-Key: {key}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode("ascii") + b"\r\n" + body


def _header(head: bytes, name: bytes) -> bytes | None:
    """The value of a header. `head` is lower case."""
    start = head.find(b"\r\n" + name + b":")
    if start < 0:
        return None
    start += len(name) + 3
    end = head.find(b"\r\n", start)
    return head[start:end].strip()


class Connection:
    """One connection, one request at a time."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._rest = b""

    @classmethod
    async def open(cls, address: Address) -> "Connection":
        """Connect. Raises OSError."""
        sock = trio.socket.socket()
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await sock.connect(tuple(address))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def ask(self, request: bytes) -> Answer:
        """Send a request and wait for its answer. Raises LostError."""
        try:
            sent = await self._socket.send(request)
            while sent < len(request):
                sent += await self._socket.send(memoryview(request)[sent:])
            return await self._answer()
        except OSError as error:
            raise LostError(str(error)) from error

    async def _answer(self) -> Answer:
        data = self._rest
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += await self._receive()
        status = int(data[9:12])
        # The closing CR LF of the last header stays, as the search for a header's end relies on it.
        head = data[: end + 2].lower()
        length = _header(head, b"content-length")
        if length is None:
            raise LostError("an answer without Content-Length")
        body_from, body_to = end + 4, end + 4 + int(length)
        if len(data) < body_to:
            pieces, missing = [data], body_to - len(data)
            while missing > 0:
                pieces.append(await self._receive())
                missing -= len(pieces[-1])
            data = b"".join(pieces)
        self._rest = data[body_to:]
        retry_after = _header(head, b"retry-after")
        return Answer(
            status,
            data[body_from:body_to],
            None if retry_after is None else float(retry_after),
            _header(head, b"connection") == b"close",
        )

    async def _receive(self) -> bytes:
        data = await self._socket.recv(RECEIVE_BYTES)
        if not data:
            raise LostError("the server closed the connection")
        return data

    def close(self) -> None:
        """Close it. Idempotent."""
        self._socket.close()


class Client:
    """Asks one server, over one connection at a time, until it has an answer. Used by one task."""

    def __init__(self, address: Address, budget: Budget = Budget(), *, chance: random.Random | None = None) -> None:  # noqa: B008 - immutable
        self._address = address
        self._budget = budget
        self._chance = chance or random.Random()
        self._connection: Connection | None = None
        self.attempts: list[str] = []
        """How the attempts of the last request before its answer ended: `not_executed` or `outcome_unknown`."""
        self.attempt_at_ms = 0
        """When the last attempt of the last request began, in wall time."""
        self._requests = self._connections = self._connects_refused = self._lost = 0
        self._unavailable: Counter[str] = Counter()

    def statistics(self) -> Statistics:
        """What this client has met so far."""
        return Statistics(
            self._requests, self._connections, self._connects_refused, self._lost, dict(self._unavailable)
        )

    async def ask(self, method: str, target: str, body: bytes = b"", key: str | None = None) -> Answer:
        """Ask, and ask again until the answer is not 503. Raises GaveUpError."""
        request = request_bytes(method, target, body, key)
        last = "no attempt was finished"
        self.attempts = []
        pause_s = PAUSE_S_MIN
        with trio.move_on_after(self._budget.seconds):
            while True:
                try:
                    answer = await self._attempt(request)
                except LostError as error:
                    last = f"the answer was lost: {error}"
                    self._lost += 1
                    self.attempts.append("outcome_unknown")
                    self.close()
                except OSError as error:
                    last = f"no connection: {error}"
                    self._connects_refused += 1
                    self.attempts.append("not_executed")
                else:
                    if answer.status != 503:
                        self._requests += 1
                        return answer
                    last = answer.body.decode(errors="replace")
                    self._unavailable[_member(answer.body, b"code")] += 1
                    self.attempts.append(_member(answer.body, b"outcome"))
                    await self._wait_as_told(answer)
                    continue
                await trio.sleep(pause_s * (0.5 + self._chance.random()))
                pause_s = min(pause_s * 2, PAUSE_S_MAX)
        # A connection on which an answer is still due is of no use to the next request.
        self.close()
        raise GaveUpError(f"{method} {target} has no answer after {self._budget.seconds} s: {last}")

    async def _attempt(self, request: bytes) -> Answer:
        self.attempt_at_ms = time.time_ns() // 1_000_000
        if self._connection is None:
            self._connection = await Connection.open(self._address)
            self._connections += 1
        answer = await self._connection.ask(request)
        if answer.closes:
            self.close()
        return answer

    async def _wait_as_told(self, answer: Answer) -> None:
        told_s = RETRY_AFTER_S_DEFAULT if answer.retry_after_s is None else answer.retry_after_s
        await trio.sleep(min(told_s, self._budget.retry_after_s_max))

    def close(self) -> None:
        """Close the connection; the next request opens another. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _member(body: bytes, name: bytes) -> str:
    """A text member of a problem document, without a JSON parser: it is counted, not obeyed."""
    _, found, rest = body.partition(b'"%b":"' % name)
    return rest.partition(b'"')[0].decode(errors="replace") if found else "missing"


def merge(statistics: list[Statistics]) -> Statistics:
    """The sum over several clients."""
    unavailable: Counter[str] = Counter()
    for one in statistics:
        unavailable.update(one.unavailable)
    return Statistics(
        sum(one.requests for one in statistics),
        sum(one.connections for one in statistics),
        sum(one.connects_refused for one in statistics),
        sum(one.lost for one in statistics),
        dict(unavailable),
    )
