"""One try, without the connection: the bytes of a request, and the bytes of an answer up to an ending.

Rules
- A try ends in one of four ways: answered, not connected, lost (the whole request may have arrived, or cannot have), or not
  understood. From these alone follows whether anything may have been done.
- No socket and no clock: who owns them says what was sent, what came, and that it ended.
- What follows a whole answer is nobody's; the connection is not used again.

Not promised: TLS, redirects, cookies, answers whose end is the end of the connection.
"""

from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import httptools

from api.client.calls import Call
from api.client.header_text import VISIBLE
from api.client.settings import Settings
from engine.version import __version__

RECEIVE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is, and how it is named."""

    host: str
    port: int
    authority: str
    prefix: str

    @classmethod
    def of(cls, url: str) -> "Address":
        """Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f"{url!r} is no address of a server: write http://HOST:PORT")
        if not VISIBLE.fullmatch(parts.netloc + parts.path):
            raise ValueError(f"{url!r} has characters that cannot be sent")
        return cls(parts.hostname, parts.port or 80, parts.netloc, parts.path.rstrip("/"))


def request_bytes(call: Call[object], settings: Settings, address: Address) -> bytes:
    """The request, the same for every try."""
    lines = [
        f"{call.method} {address.prefix}{call.target} HTTP/1.1",
        f"Host: {address.authority}",
        f"User-Agent: slotkeeper-client/{__version__}",
    ]
    if call.key is not None:
        lines.append(f"Idempotency-Key: {call.key}")
    if call.if_match is not None:
        lines.append(f'If-Match: "{call.if_match}"')
    if call.changes:
        lines += ["Content-Type: application/json", f"Content-Length: {len(call.body)}"]
    if settings.request_id is not None:
        lines.append(f"X-Request-Id: {settings.request_id}")
    if settings.traceparent is not None:
        lines.append(f"Traceparent: {settings.traceparent}")
    return "\r\n".join([*lines, "", ""]).encode("ascii") + call.body


@dataclass(frozen=True, slots=True)
class Answered:
    """The server has spoken."""

    status: int
    body: bytes
    retry_after_seconds: float | None
    keep_alive: bool


@dataclass(frozen=True, slots=True)
class NotConnected:
    """Nothing was sent."""

    detail: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection or the time ended before the answer did."""

    detail: str
    is_sent: bool
    """The whole request was handed to the kernel, so the server may have it. Without its end it can do nothing."""
    is_stale: bool
    """A kept connection that ended before any byte of an answer."""


@dataclass(frozen=True, slots=True)
class NotUnderstood:
    """There was an answer, and it makes no sense: asking again would not help."""

    detail: str


Ending = Answered | NotConnected | Lost | NotUnderstood


class Exchange:
    """One request over one connection, without the connection."""

    def __init__(self, request: bytes, *, reused: bool, answer_bytes_max: int) -> None:
        self.unsent = memoryview(request)
        self._reused = reused
        self._bytes_left = answer_bytes_max
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._retry_after = b""
        self._began = False
        self._answer: Answered | None = None

    def sent(self, count: int) -> None:
        """The kernel took so many bytes."""
        self.unsent = self.unsent[count:]

    def received(self, data: bytes) -> Ending | None:
        """Bytes came, or, if there are none, the end. The ending, once it is known."""
        if not data:
            return self.ended("the server closed the connection")
        self._began = True
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            return NotUnderstood("the answer is larger than answer_bytes_max")
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._answer is None:
                return NotUnderstood(f"the answer is not HTTP: {error}")
            # Whatever followed a whole answer: it is not ours, and nothing more is read from this connection.
            return replace(self._answer, keep_alive=False)
        if self._answer is not None and self.unsent:
            # An early answer; the rest of the request stands in the way of the next.
            return replace(self._answer, keep_alive=False)
        return self._answer

    def ended(self, detail: str) -> Lost:
        """The connection ended."""
        return Lost(detail, is_sent=not self.unsent, is_stale=self._reused and not self._began)

    def timed_out(self) -> Lost:
        """The time ended."""
        return Lost("no whole answer in time", is_sent=not self.unsent, is_stale=False)

    # Called by the parser.

    def on_message_begin(self) -> None:
        """An answer begins; after the one that was asked for, it is nobody's, and the connection is of no more use."""
        if self._answer is not None:
            self._answer = replace(self._answer, keep_alive=False)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header line."""
        if name.lower() == b"retry-after":
            self._retry_after = value.strip()

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        """An interim answer ended, or the answer."""
        status = self._parser.get_status_code()
        if status >= 200 and self._answer is None:
            told = self._retry_after
            retry_after_seconds = float(told) if told.isdigit() and len(told) <= 9 else None
            keep_alive = self._parser.should_keep_alive()
            self._answer = Answered(status, b"".join(self._pieces), retry_after_seconds, keep_alive)
