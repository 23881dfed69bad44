"""HTTP/1.1: bytes in, requests out; responses in, bytes out. No I/O, no clock, no task.

Theory of operation
- A head (request line and header lines) is looked at only when it is complete, so one read of the socket is normally
  one pass: find the blank line, take the request line apart (remembered, clients repeat themselves), let llhttp check
  and split the header lines. Each head gets a llhttp of its own (0.15 us to make): it never sees a body, so nothing it
  believes about where a message ends can differ from what is believed here: this file alone decides that.
- llhttp 9 is strict about header lines (space before the colon, folded lines, bare CR and LF, control bytes) and
  lenient elsewhere: it takes RTSP and ICE, HTTP/0.9 and HTTP/2.0, several spaces, bare LF before a request, fragments
  and `<>"{}|^` in targets, `Transfer-Encoding: gzip, chunked`, chunked in HTTP/1.0, a request without Host, any number
  of chunk extensions. All that is refused here; `tests/api/test_smuggling.py` is the table.
- The body is either exactly Content-Length bytes or chunked, never guessed (RFC 9112, 6.3).

Rules
- Whatever two readers could understand differently is refused with 400, and nothing after it on the connection is read.
- Every length has a bound in `ParserLimits`; a partial message never holds more than those bounds allow.
- Refusals are `ProtocolError`; the table `PROBLEMS` is the only place that gives codes their status and title.
- Requests that were complete before a broken one are handed out first; the error is raised by the next call.

Not promised: HTTP/2, upgrades (an `Upgrade` header is ignored, as RFC 9110 allows), request trailers (checked,
bounded and dropped), content codings of request bodies, tunnels (CONNECT).
"""

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from email.utils import formatdate
from enum import IntEnum
from functools import lru_cache
from http import HTTPStatus
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

import httptools
import orjson

from engine.core.invariant import invariant

METHODS: Final = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})
"""What is known here. Another token is a fine method that nobody implements: 501."""

SINGLETONS: Final = frozenset(
    {
        b"age",
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-location",
        b"content-range",
        b"content-type",
        b"date",
        b"expect",
        b"from",
        b"host",
        b"idempotency-key",
        b"if-modified-since",
        b"if-range",
        b"if-unmodified-since",
        b"last-modified",
        b"max-forwards",
        b"origin",
        b"proxy-authorization",
        b"range",
        b"referer",
        b"retry-after",
        b"traceparent",
        b"transfer-encoding",
        b"user-agent",
        b"x-request-id",
    },
)
"""Fields with one value: a second line is refused, since another reader might take the other one."""

TRAILERS_REFUSED: Final = frozenset({b"content-length", b"host", b"transfer-encoding", b"authorization", b"expect"})
"""Fields that steer framing, routing or rights: RFC 9110, 6.5.1 forbids them in trailers."""

PROBLEMS: Final[dict[str, tuple[int, str]]] = {
    "invalid_request": (400, "The request is not valid HTTP/1.1"),
    "length_conflict": (400, "The length of the body is not stated clearly"),
    "request_timeout": (408, "The request did not arrive in time"),
    "body_too_large": (413, "The body is too large"),
    "uri_too_long": (414, "The request line is too long"),
    "expectation_failed": (417, "Only 100-continue can be expected"),
    "headers_too_large": (431, "The header lines are too many or too large"),
    "internal_error": (500, "The server failed"),
    "method_not_implemented": (501, "This method is not implemented"),
    "overloaded": (503, "The server has too much to do"),
    "version_not_supported": (505, "Only HTTP/1.1 and HTTP/1.0 are spoken here"),
}
"""code -> (status, title): all that this layer answers by itself."""

PROBLEM_TYPE_PREFIX: Final = "/problems/"
"""`type` of a problem is this and the code with dashes: a relative reference, so it holds behind any host name."""


class ProtocolError(Exception):
    """A request that is refused before routing. It is the client's doing, and nothing was executed.

    `status` comes from `PROBLEMS`; `detail` says what was wrong and never repeats what the client sent.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.status = PROBLEMS[code][0]
        self.detail = detail


@dataclass(slots=True)
class Request:
    """One complete request.

    `path` is decoded (UTF-8, no control characters, no encoded slash, no dot segments); `target` is what was sent;
    `query` stays encoded, without its question mark. `headers` has lower-case names; repeated lines of list-type fields are
    joined with commas. `keep_alive` is what the client wants; `http_version` is "1.1" or "1.0".
    """

    method: str
    path: str
    target: bytes
    query: bytes
    headers: dict[bytes, bytes]
    body: bytes
    keep_alive: bool
    http_version: str


@dataclass(slots=True)
class Response:
    """A whole answer. Content-Length, Date and Connection are written by this layer and refused in `headers`."""

    status: int
    body: bytes = b""
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(slots=True)
class StreamingResponse:
    """An answer whose body comes in pieces (chunked; for HTTP/1.0 until the connection closes).

    `endless` says that the stream has no end of its own (server-sent events): it ends as soon as the client closes its sending
    side or the server stops. Other streams run to their end, and notice a client that has gone when they write.
    """

    chunks: AsyncIterator[bytes]
    status: int = 200
    content_type: bytes = b"application/x-ndjson"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    endless: bool = False


@dataclass(frozen=True, slots=True)
class ParserLimits:
    """Bounds of what one request may look like."""

    request_line_bytes_max: int = 8 * 1024
    headers_count_max: int = 100
    headers_bytes_max: int = 16 * 1024
    body_bytes_max: int = 64 * 1024
    """For routes that say nothing else."""
    chunk_line_bytes_max: int = 256
    """One size line with its extensions: twice what any client was seen to send."""
    chunk_extension_bytes_max: int = 1024
    """All extensions of one body: they carry nothing we use, and unbounded they are a way to send for ever."""

    def __post_init__(self) -> None:
        invariant(self.chunk_line_bytes_max >= _CHUNK_SIZE_DIGITS_MAX, "a size line must have room for a size")
        invariant(
            min(self.request_line_bytes_max, self.headers_count_max, self.headers_bytes_max, self.body_bytes_max) > 0,
            "limits are positive",
        )


class Phase(IntEnum):
    """Where in a message a parser stands."""

    IDLE = 0
    """Between messages, nothing read of the next."""
    HEAD = 1
    BODY = 2
    CLOSED = 3
    """After an error, or after a request that was the last of its connection: input is dropped."""


# Looking a member up in its class costs 30 ns on Python 3.11, and the hot path looks often.
_IDLE: Final = Phase.IDLE
_HEAD: Final = Phase.HEAD
_BODY: Final = Phase.BODY
_CLOSED: Final = Phase.CLOSED


_CHUNK_SIZE_DIGITS_MAX: Final = 16
_LENGTH_DIGITS_MAX: Final = 18  # they fit 63 bits
_HEADER_LINE_BYTES_MIN: Final = 4  # "a:" and its CR LF
_CARRIAGE_RETURN: Final = 0x0D
_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_TOKEN_RE: Final = re.compile(_TOKEN)
_METHOD_START_RE: Final = re.compile(rb"(?:\r|%b(?: |\Z))" % _TOKEN)
_VERSION_RE: Final = re.compile(rb"HTTP/[0-9]\.[0-9]")
# RFC 3986 pchar and "/", each percent sign with its two digits. The query also takes brackets: many clients send them bare.
_PCHAR: Final = rb"[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2}"
_TARGET_RE: Final = re.compile(rb"(/(?:%b)*+)(?:\?((?:%b|[?\[\]])*+))?" % (_PCHAR, _PCHAR))
_AUTHORITY: Final = rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?"
_AUTHORITY_RE: Final = re.compile(_AUTHORITY)
_ABSOLUTE_RE: Final = re.compile(rb"(?i:https?)://%b(?=[/?]|\Z)" % _AUTHORITY)
_QUOTED: Final = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*+"'
_CHUNK_LINE_RE: Final = re.compile(
    rb"([0-9A-Fa-f]{1,%d})((?:;%b(?:=(?:%b|%b))?)*+)" % (_CHUNK_SIZE_DIGITS_MAX, _TOKEN, _TOKEN, _QUOTED),
)
_TRAILER_RE: Final = re.compile(rb"(%b):[\t \x21-\x7e\x80-\xff]*+" % _TOKEN)
_UNWRITABLE_RE: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class _RequestLine(NamedTuple):
    method: str
    path: str
    target: bytes
    query: bytes
    http_version: str


@lru_cache(maxsize=512)  # at most 512 x 8 KiB; a client of the hot routes sends the same few lines for ever
def _request_line(line: bytes) -> _RequestLine:
    """Take a request line apart, to the letter of RFC 9112, 3. Raises `ProtocolError`."""
    parts = line.split(b" ")
    if len(parts) != 3:
        raise ProtocolError(
            "invalid_request", "The request line is not: method, one space, target, one space, version."
        )
    method, target, version = parts
    if not _TOKEN_RE.fullmatch(method):
        raise ProtocolError("invalid_request", "The method is not a token.")
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        if _VERSION_RE.fullmatch(version):
            raise ProtocolError("version_not_supported", "The version is neither HTTP/1.1 nor HTTP/1.0.")
        raise ProtocolError("invalid_request", "The version is not of the form HTTP/1.1.")
    if method not in METHODS:
        raise ProtocolError("method_not_implemented", "The method is none of those that this server knows.")
    http_version = version[5:].decode("ascii")
    if target == b"*":
        if method != b"OPTIONS":
            raise ProtocolError("invalid_request", "Only OPTIONS can be asked of *.")
        return _RequestLine("OPTIONS", "*", target, b"", http_version)
    origin = target
    if not target.startswith(b"/"):
        absolute = _ABSOLUTE_RE.match(target)
        if absolute is None:
            raise ProtocolError("invalid_request", "The target is neither a path nor an http URI.")
        origin = target[absolute.end() :]
        if not origin.startswith(b"/"):
            origin = b"/" + origin
    match = _TARGET_RE.fullmatch(origin)
    if match is None:
        raise ProtocolError("invalid_request", "The target has characters that must be percent-encoded, or a fragment.")
    return _RequestLine(method.decode("ascii"), _decoded(match[1]), target, match[2] or b"", http_version)


def _decoded(raw: bytes) -> str:
    """A path as text, or a refusal where decoding would let it mean something else than it says."""
    plain = raw
    if b"%" in raw:
        if b"%2f" in raw.lower():
            raise ProtocolError("invalid_request", "The path has an encoded slash.")
        plain = unquote_to_bytes(raw)
    try:
        path = plain.decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("invalid_request", "The decoded path is not UTF-8.") from None
    if any(character < " " or character == "\x7f" for character in path):
        raise ProtocolError("invalid_request", "The decoded path has control characters.")
    if "/." in path and any(segment in {".", ".."} for segment in path.split("/")):
        raise ProtocolError("invalid_request", "The path has dot segments.")
    return path


@lru_cache(maxsize=256)
def _is_authority(value: bytes) -> bool:
    return _AUTHORITY_RE.fullmatch(value) is not None


def _body_length(stated: bytes | None, coding: bytes | None, *, is_http_10: bool) -> int | None:
    """Length of a body whose head states or codes it (RFC 9112, 6.3); None for chunked."""
    if coding is None:
        if stated is None or not stated.isdigit() or len(stated) > _LENGTH_DIGITS_MAX:
            raise ProtocolError("length_conflict", "The header content-length is not a number of bytes.")
        return int(stated)
    if stated is not None:
        raise ProtocolError("length_conflict", "There are both content-length and transfer-encoding.")
    if is_http_10:
        raise ProtocolError("length_conflict", "HTTP/1.0 has no transfer-encoding.")
    if coding.lower() != b"chunked":
        raise ProtocolError("length_conflict", "The only transfer-encoding understood is chunked.")
    return None


_NO_LINE: Final = _RequestLine("", "", b"", b"", "1.1")


class RequestParser:
    """Bytes of one connection, in any pieces, to requests. How they are cut never changes what they mean.

    `phase` says where in a message the input ended. `continue_wanted` is set when the client waits for 100 Continue before
    it sends its body; whoever answers resets it.
    """

    __slots__ = (
        "_body_bytes_max",
        "_body_bytes_max_of",
        "_body_size",
        "_buffer",
        "_chunk_left",
        "_chunk_step",
        "_extension_size",
        "_headers",
        "_keep_alive",
        "_length_left",
        "_limits",
        "_line",
        "_line_skipped",
        "_pieces",
        "_repeated",
        "_trailer_count",
        "_trailer_size",
        "continue_wanted",
        "error",
        "phase",
    )

    def __init__(
        self,
        limits: ParserLimits | None = None,
        body_bytes_max: Callable[[str, str], int] | None = None,
    ) -> None:
        """`body_bytes_max(method, path)` is asked once the headers of a request with a body are complete."""
        self._limits = limits or ParserLimits()
        self._body_bytes_max_of = body_bytes_max
        self.phase: Phase = _IDLE
        self.error: ProtocolError | None = None
        self.continue_wanted = False
        self._buffer = b""
        self._line_skipped = False
        self._headers: dict[bytes, bytes] = {}
        self._repeated = b""
        self._line = _NO_LINE
        self._keep_alive = True
        self._pieces: list[bytes] = []
        self._body_size = 0
        self._body_bytes_max = 0
        self._length_left: int | None = None
        self._chunk_step = _ChunkStep.SIZE
        self._chunk_left = 0
        self._extension_size = 0
        self._trailer_size = 0
        self._trailer_count = 0

    @property
    def body_bytes_left(self) -> int:
        """How much of a body of stated length is still to come; 0 when none is, or when nobody knows."""
        return (self._length_left or 0) if self.phase is _BODY else 0

    def feed(self, data: bytes) -> list[Request]:
        """Requests that are complete with `data`, in their order.

        Raises `ProtocolError` for the first broken one: at once if none was complete before it in the same piece, otherwise
        at the next call (`error` shows it already). After that it raises the same for ever.
        """
        if self.error is not None:
            raise self.error
        requests: list[Request] = []
        try:
            self._parse(data, requests)
        except ProtocolError as error:
            self.error = error
            self._close()
            if not requests:
                raise
        return requests

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header line (called by llhttp)."""
        name = name.lower()
        value = value.rstrip(b" \t")
        headers = self._headers
        if name in headers:
            if name in SINGLETONS:
                self._repeated = name
            separator = b"; " if name == b"cookie" else b", "
            value = headers[name] + separator + value
        headers[name] = value

    def _close(self) -> None:
        self.phase = _CLOSED
        self.continue_wanted = False
        self._buffer = b""
        self._pieces = []

    def _parse(self, data: bytes, requests: list[Request]) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        start = 0
        size = len(data)
        while start < size:
            phase = self.phase
            if phase is _BODY:
                self.continue_wanted = False
                if self._length_left is None:
                    end = self._take_chunks(data, start, requests)
                else:
                    end = self._take_piece(data, start, self._length_left, requests)
            elif phase is _CLOSED:
                return
            else:
                end = self._take_head(data, start, requests)
            if end == start:  # what is left is the beginning of something, and the rest has not come
                self._buffer = data[start:] if start else data
                return
            start = end

    def _finish(self, requests: list[Request], body: bytes) -> None:
        method, path, target, query, version = self._line
        requests.append(Request(method, path, target, query, self._headers, body, self._keep_alive, version))
        self._line_skipped = False
        self.phase = _IDLE
        if not self._keep_alive:
            self._close()

    def _take_piece(self, data: bytes, start: int, left: int, requests: list[Request]) -> int:
        """Take what is there of a body of stated length; returns where it stopped."""
        piece = data[start : start + left]
        self._pieces.append(piece)
        self._length_left = left - len(piece)
        if not self._length_left:
            body = b"".join(self._pieces)
            self._pieces = []
            self._finish(requests, body)
        return start + len(piece)

    # Heads

    def _take_head(self, data: bytes, start: int, requests: list[Request]) -> int:
        """Take a head, with its body if that is there too; returns where it stopped: `start` if the head is incomplete."""
        if data[start] == _CARRIAGE_RETURN and data[start : start + 2] == b"\r\n":
            # RFC 9112, 2.2: one empty line before a request is forgiven, some old clients end a body with it.
            if self._line_skipped:
                raise ProtocolError("invalid_request", "There are empty lines before the request line.")
            self._line_skipped = True
            return start + 2
        head_end = data.find(b"\r\n\r\n", start)
        if head_end < 0:
            self._check_partial_head(data[start:])
            self.phase = _HEAD
            return start
        length = self._parse_head(data, start, head_end)
        start = head_end + 4
        if length == 0:
            self._finish(requests, b"")
            return start
        if length is not None and len(data) - start >= length:
            self._finish(requests, data[start : start + length])
            return start + length
        self.phase = _BODY
        self._length_left = length
        self._body_size = self._extension_size = self._trailer_size = self._trailer_count = 0
        self._chunk_step = _ChunkStep.SIZE
        if b"expect" in self._headers and len(data) == start:
            # RFC 9110, 10.1.1: an HTTP/1.0 client never gets an interim answer; one that sends on does not wait for it.
            self.continue_wanted = self._line.http_version != "1.0"
        return start

    def _check_partial_head(self, partial: bytes) -> None:
        """Refuse early what can no longer become a request, so that nobody is kept waiting for a timeout."""
        limits = self._limits
        line_end = partial.find(b"\r\n")
        if (line_end if line_end >= 0 else len(partial.removesuffix(b"\r"))) > limits.request_line_bytes_max:
            raise ProtocolError("uri_too_long", f"The request line is over {limits.request_line_bytes_max} bytes.")
        if not _METHOD_START_RE.match(partial):
            raise ProtocolError("invalid_request", "The request does not begin with a method.")
        if line_end >= 0 and len(partial) - line_end > limits.headers_bytes_max + 4:
            raise ProtocolError("headers_too_large", f"The header lines are over {limits.headers_bytes_max} bytes.")
        line_count = partial.count(b"\r\n")
        if partial.count(b"\n") != line_count or partial.count(b"\r") - partial.endswith(b"\r") != line_count:
            raise ProtocolError("invalid_request", "A line does not end with CR LF.")
        if line_count - 1 > limits.headers_count_max:
            raise ProtocolError("headers_too_large", f"There are over {limits.headers_count_max} header lines.")

    def _parse_head(self, data: bytes, start: int, head_end: int) -> int | None:
        """Check everything about one head; returns the length of the body, None for chunked."""
        limits = self._limits
        line_end = data.find(b"\r\n", start)
        if line_end - start > limits.request_line_bytes_max:
            raise ProtocolError("uri_too_long", f"The request line is over {limits.request_line_bytes_max} bytes.")
        self._line = line = _request_line(data[start:line_end])
        headers_size = head_end - line_end
        if headers_size > limits.headers_bytes_max:
            raise ProtocolError("headers_too_large", f"The header lines are over {limits.headers_bytes_max} bytes.")
        if (
            headers_size > limits.headers_count_max * _HEADER_LINE_BYTES_MIN
            and data.count(b"\r\n", line_end, head_end) > limits.headers_count_max
        ):
            raise ProtocolError("headers_too_large", f"There are over {limits.headers_count_max} header lines.")
        headers: dict[bytes, bytes] = {}
        self._headers = headers
        try:
            httptools.HttpRequestParser(self).feed_data(data[start : head_end + 4])
        except httptools.HttpParserUpgrade:
            pass  # the head is complete and in order; the upgrade is declined by answering in HTTP/1.1
        except httptools.HttpParserError as error:
            # The words of llhttp are fixed texts. Should they change, the answer is still 400, with the general code.
            text = str(error)
            framing = "Content-Length" in text or "Transfer-Encoding" in text
            raise ProtocolError("length_conflict" if framing else "invalid_request", f"{text}.") from None
        if self._repeated:
            name = self._repeated
            framing = name in {b"content-length", b"transfer-encoding"}
            code = "length_conflict" if framing else "invalid_request"
            raise ProtocolError(code, f"The header {name.decode('ascii')} is there more than once.")

        is_http_10 = line.http_version == "1.0"
        host = headers.get(b"host")
        if host is None:
            if not is_http_10:
                raise ProtocolError("invalid_request", "The header host is missing.")
        elif not _is_authority(host):
            raise ProtocolError("invalid_request", "The header host is not a host with an optional port.")
        connection = headers.get(b"connection")
        if connection is None:
            self._keep_alive = not is_http_10
        else:
            options = [option.strip(b" \t").lower() for option in connection.split(b",")]
            self._keep_alive = b"close" not in options and (not is_http_10 or b"keep-alive" in options)

        coding = headers.get(b"transfer-encoding")
        stated = headers.get(b"content-length")
        length = _body_length(stated, coding, is_http_10=is_http_10) if stated is not None or coding is not None else 0
        if b"expect" in headers and headers[b"expect"].lower() != b"100-continue":
            raise ProtocolError("expectation_failed", "The header expect is not 100-continue.")
        if length != 0:
            if self._body_bytes_max_of is None:
                self._body_bytes_max = limits.body_bytes_max
            else:
                self._body_bytes_max = self._body_bytes_max_of(line.method, line.path)
            if length is not None and length > self._body_bytes_max:
                raise self._too_large()
        return length

    def _too_large(self) -> ProtocolError:
        return ProtocolError("body_too_large", f"The body is over {self._body_bytes_max} bytes.")

    # Chunked bodies

    def _take_chunks(self, data: bytes, start: int, requests: list[Request]) -> int:
        """Take chunks from `start` on; returns where it stopped: at the end of the body, or before an incomplete line."""
        size = len(data)
        while start < size:
            step = self._chunk_step
            if step is _ChunkStep.DATA:
                piece = data[start : start + self._chunk_left]
                self._pieces.append(piece)
                start += len(piece)
                self._chunk_left -= len(piece)
                if not self._chunk_left:
                    self._chunk_step = _ChunkStep.DATA_END
                continue
            if step is _ChunkStep.DATA_END:
                ending = data[start : start + 2]
                if ending == b"\r\n":
                    start += 2
                    self._chunk_step = _ChunkStep.SIZE
                    continue
                if ending == b"\r":
                    return start
                raise ProtocolError("invalid_request", "A chunk is not followed by CR LF.")
            line_end = data.find(b"\r\n", start)
            is_size = step is _ChunkStep.SIZE
            line_bytes_max = self._limits.chunk_line_bytes_max if is_size else self._limits.headers_bytes_max
            line = data[start : line_end if line_end >= 0 else size]
            if len(line) - (line_end < 0 and line.endswith(b"\r")) > line_bytes_max:
                if is_size:
                    raise ProtocolError("invalid_request", f"A chunk size line is over {line_bytes_max} bytes.")
                raise ProtocolError("headers_too_large", f"The trailers are over {line_bytes_max} bytes.")
            if line_end < 0:
                if b"\n" in line or b"\r" in line[:-1]:
                    raise ProtocolError("invalid_request", "A line of a chunked body does not end with CR LF.")
                return start
            start = line_end + 2
            if is_size:
                self._take_chunk_size(line)
            elif line:
                self._take_trailer(line)
            else:
                body = b"".join(self._pieces)
                self._pieces = []
                self._finish(requests, body)
                return start
        return start

    def _take_chunk_size(self, line: bytes) -> None:
        match = _CHUNK_LINE_RE.fullmatch(line)
        if match is None:
            raise ProtocolError("invalid_request", "A chunk size line is not a hexadecimal size with extensions.")
        self._extension_size += len(match[2])
        if self._extension_size > self._limits.chunk_extension_bytes_max:
            raise ProtocolError(
                "invalid_request", f"The chunk extensions are over {self._limits.chunk_extension_bytes_max} bytes."
            )
        self._chunk_left = int(match[1], 16)
        self._body_size += self._chunk_left
        if self._body_size > self._body_bytes_max:
            raise self._too_large()
        self._chunk_step = _ChunkStep.DATA if self._chunk_left else _ChunkStep.TRAILER

    def _take_trailer(self, line: bytes) -> None:
        match = _TRAILER_RE.fullmatch(line)
        if match is None:
            raise ProtocolError("invalid_request", "A trailer is not a header line.")
        if match[1].lower() in TRAILERS_REFUSED:
            raise ProtocolError("invalid_request", "A trailer has a field that must not be a trailer.")
        self._trailer_size += len(line) + 2
        self._trailer_count += 1
        if self._trailer_size > self._limits.headers_bytes_max or self._trailer_count > self._limits.headers_count_max:
            raise ProtocolError("headers_too_large", "The trailers are too many or too large.")


class _ChunkStep(IntEnum):
    """What a chunked body goes on with."""

    SIZE = 0
    DATA = 1
    DATA_END = 2
    TRAILER = 3


# Answers

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK: Final = b"0\r\n\r\n"

_STATUS_LINES: Final = {
    int(status): b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode("ascii"))
    for status in HTTPStatus
    if status >= 200
}
_OWN_HEADERS: Final = frozenset(
    {b"connection", b"content-length", b"content-type", b"date", b"transfer-encoding", b"keep-alive", b"trailer"},
)
_CLOSE: Final = b"Connection: close\r\n"
_KEEP_ALIVE: Final = b"Connection: keep-alive\r\n"


def date_line(epoch_seconds: float) -> bytes:
    """The Date header line, for one second of time: the caller keeps it until the next."""
    return b"Date: %b\r\n" % formatdate(epoch_seconds, usegmt=True).encode("ascii")


@lru_cache(maxsize=256)
def _opening(status: int, content_type: bytes) -> bytes:
    """Status line and Content-Type. Raises ValueError for what must not be written."""
    line = _STATUS_LINES.get(status)
    if line is None:
        raise ValueError(f"not a final status: {status}")
    if _UNWRITABLE_RE.search(content_type):
        raise ValueError("a content type has control characters")
    if not content_type or not has_body(status):
        return line
    return b"%bContent-Type: %b\r\n" % (line, content_type)


def _header_lines(headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """Header lines of a handler. Raises ValueError where a line could end early or contradict this layer."""
    lines = []
    for name, value in headers:
        if not _TOKEN_RE.fullmatch(name) or _UNWRITABLE_RE.search(value):
            raise ValueError("a response header has characters that must not be in it")
        if name.lower() in _OWN_HEADERS:
            raise ValueError(f"the response header {name.decode('ascii')} is written by the HTTP layer")
        lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join(lines)


def has_body(status: int) -> bool:
    """Whether answers with this status have a body at all (RFC 9110, 6.4.1)."""
    return status not in (204, 304)


def encode(response: Response, request: Request | None, date: bytes, *, keep_alive: bool) -> bytes:
    """A whole answer as bytes. `request` None: the request was never understood. `date` is a `date_line`.

    Raises ValueError for an answer that must not be sent: a bug of the handler, not of the client.
    """
    body = response.body
    extra = _header_lines(response.headers) if response.headers else b""
    if not keep_alive:
        extra += _CLOSE
    elif request is not None and request.http_version == "1.0":
        extra += _KEEP_ALIVE
    opening = _opening(response.status, response.content_type)
    if not has_body(response.status):
        return b"%b%b%b\r\n" % (opening, date, extra)
    if request is not None and request.method == "HEAD":
        return b"%bContent-Length: %d\r\n%b%b\r\n" % (opening, len(body), date, extra)
    return b"%bContent-Length: %d\r\n%b%b\r\n%b" % (opening, len(body), date, extra, body)


def encode_stream_head(response: StreamingResponse, request: Request, date: bytes, *, keep_alive: bool) -> bytes:
    """The head of an answer in pieces. Raises ValueError as `encode` does."""
    extra = _header_lines(response.headers) if response.headers else b""
    if not keep_alive:
        extra += _CLOSE
    if request.http_version != "1.0" and has_body(response.status):
        extra += b"Transfer-Encoding: chunked\r\n"
    return b"%b%b%b\r\n" % (_opening(response.status, response.content_type), date, extra)


def encode_chunk(data: bytes) -> bytes:
    """One chunk. Not for empty data: that would end the body."""
    invariant(bool(data), "an empty chunk ends a body")
    return b"%x\r\n%b\r\n" % (len(data), data)


def problem(code: str, detail: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Response:
    """An RFC 9457 answer of this layer. Only `internal_error` leaves open whether something was done."""
    status, title = PROBLEMS[code]
    body = {
        "type": PROBLEM_TYPE_PREFIX + code.replace("_", "-"),
        "title": title,
        "status": status,
        "code": code,
        "detail": detail,
        "outcome": "outcome_unknown" if code == "internal_error" else "not_executed",
    }
    return Response(status, orjson.dumps(body), b"application/problem+json", headers)
