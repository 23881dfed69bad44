"""What is HTTP/1.1 here and what is refused, as a table: each row is what a client sends and what it gets.

Rows come from RFC 9112 and 9110, from llhttp's own tests (what it accepts and we do not), and from the kinds of cases that
Http11Probe and the HTTP Garden collect. Each row goes through the parser in one piece and byte by byte, and through a real
server. A number is the status of the refusal; text is the list of requests taken, as "METHOD path body".

Not promised: that the first of several faults is the one reported when a message comes in pieces.
"""

import re
import socket

import pytest
import trio

from api import http1, server

GET = b"GET /a HTTP/1.1\r\n"
POST = b"POST /a HTTP/1.1\r\n"
HOST = b"Host: a\r\n"
CHUNKED = POST + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"

Expected = int | list[str]

ROWS: dict[str, tuple[bytes, Expected]] = {
    # The request line
    "plain get": (GET + HOST + b"\r\n", ["GET /a "]),
    "one empty line before": (b"\r\n" + GET + HOST + b"\r\n", ["GET /a "]),
    "two empty lines before": (b"\r\n\r\n" + GET + HOST + b"\r\n", 400),
    "bare lf before": (b"\n" + GET + HOST + b"\r\n", 400),
    "bare cr before": (b"\r" + GET + HOST + b"\r\n", 400),
    "space before the method": (b" " + GET + HOST + b"\r\n", 400),
    "two spaces after the method": (b"GET  /a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "two spaces after the target": (b"GET /a  HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "space after the version": (b"GET /a HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    "tab instead of space": (b"GET\t/a\tHTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "bare lf after the request line": (b"GET /a HTTP/1.1\nHost: a\r\n\r\n", 400),
    "bare lf everywhere": (b"GET /a HTTP/1.1\nHost: a\n\n", 400),
    "bare cr in the request line": (b"GET /a\rb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "no target": (b"GET HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "http 0.9 simple request": (b"GET /a\r\n\r\n", 400),
    "lower-case protocol": (b"GET /a http/1.1\r\nHost: a\r\n\r\n", 400),
    "version without digits": (b"GET /a HTTP/x.y\r\nHost: a\r\n\r\n", 400),
    "version 1.10": (b"GET /a HTTP/1.10\r\nHost: a\r\n\r\n", 400),
    "version 1.2": (b"GET /a HTTP/1.2\r\nHost: a\r\n\r\n", 505),
    "version 0.9": (b"GET /a HTTP/0.9\r\nHost: a\r\n\r\n", 505),
    "version 2.0": (b"GET /a HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    "http/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "rtsp": (b"PLAY /a RTSP/1.0\r\nHost: a\r\n\r\n", 400),
    "ice": (b"SOURCE /a ICE/1.0\r\nHost: a\r\n\r\n", 400),
    "tls client hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "method with a bracket": (b"G(T /a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "method in lower case": (b"get /a HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "method unknown": (b"FROBNICATE /a HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "trace": (b"TRACE /a HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "connect": (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 501),
    "request line too long": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    "request line without end": (b"GET /" + b"a" * 9000, 414),
    # Targets
    "absolute form": (b"GET http://a/x?y HTTP/1.1\r\nHost: b\r\n\r\n", ["GET /x "]),
    "absolute form without a path": (b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", ["GET / "]),
    "absolute form with a user": (b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "absolute form of another scheme": (b"GET file:///etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "asterisk for options": (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", ["OPTIONS * "]),
    "asterisk for get": (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "relative target": (b"GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "fragment": (b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "backslash": (b"GET /a\\b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "control byte in the target": (b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "byte over 127 in the target": (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "percent without digits": (b"GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "percent at the end": (b"GET /% HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "encoded nul": (b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "encoded line end": (b"GET /%0d%0aX: y HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "encoded slash": (b"GET /a%2fb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "encoded bytes that are no utf-8": (b"GET /%ff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "overlong utf-8": (b"GET /%c0%ae HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "dot segments": (b"GET /a/../b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "encoded dot segments": (b"GET /a/%2e%2e/b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "three dots are a name": (b"GET /a/.../b HTTP/1.1\r\nHost: a\r\n\r\n", ["GET /a/.../b "]),
    "encoded colon": (b"GET /s/18%3A00 HTTP/1.1\r\nHost: a\r\n\r\n", ["GET /s/18:00 "]),
    "encoded once is decoded once": (b"GET /%2541 HTTP/1.1\r\nHost: a\r\n\r\n", ["GET /%41 "]),
    # Host
    "host missing": (GET + b"\r\n", 400),
    "host missing in http/1.0": (b"GET /a HTTP/1.0\r\n\r\n", ["GET /a "]),
    "host twice": (GET + HOST + HOST + b"\r\n", 400),
    "host twice in http/1.0": (b"GET /a HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "host empty": (GET + b"Host:\r\n\r\n", 400),
    "host with a path": (GET + b"Host: a/b\r\n\r\n", 400),
    "host with a user": (GET + b"Host: u@a\r\n\r\n", 400),
    "host with a space": (GET + b"Host: a b\r\n\r\n", 400),
    "host list": (GET + b"Host: a, b\r\n\r\n", 400),
    "host with a bad port": (GET + b"Host: a:b\r\n\r\n", 400),
    "host with a port": (GET + b"Host: a:8080\r\n\r\n", ["GET /a "]),
    "host is an ipv6 address": (GET + b"Host: [::1]:8080\r\n\r\n", ["GET /a "]),
    # Header lines
    "space before the colon": (GET + b"Host : a\r\n\r\n", 400),
    "tab before the colon": (GET + HOST + b"X\t: a\r\n\r\n", 400),
    "space before content-length's colon": (POST + HOST + b"Content-Length : 5\r\n\r\nhello", 400),
    "folded line": (GET + HOST + b"X: a\r\n b\r\n\r\n", 400),
    "folded line with a tab": (GET + HOST + b"X: a\r\n\tb\r\n\r\n", 400),
    "first header line indented": (GET + b" Host: a\r\n\r\n", 400),
    "line of blanks": (GET + HOST + b" \r\n\r\n", 400),
    "no colon": (GET + HOST + b"foo\r\n\r\n", 400),
    "no name": (GET + HOST + b": b\r\n\r\n", 400),
    "bracket in a name": (GET + HOST + b"f(o: b\r\n\r\n", 400),
    "byte over 127 in a name": (GET + HOST + b"f\xffo: b\r\n\r\n", 400),
    "nul in a name": (GET + HOST + b"f\x00o: b\r\n\r\n", 400),
    "nul in a value": (GET + HOST + b"X: a\x00b\r\n\r\n", 400),
    "control byte in a value": (GET + HOST + b"X: a\x01b\r\n\r\n", 400),
    "bare cr in a value": (GET + b"Host: a\rX: b\r\n\r\n", 400),
    "bare lf ends a header line": (GET + b"Host: a\nX: b\r\n\r\n", 400),
    "bare lf ends the headers": (GET + b"Host: a\r\n\n" + SMUGGLED, 400),
    "cr cr lf": (GET + b"Host: a\r\r\n\r\n", 400),
    "byte over 127 in a value": (GET + HOST + b"X: \xff\r\n\r\n", ["GET /a "]),
    "value empty": (GET + HOST + b"X:\r\n\r\n", ["GET /a "]),
    "101 header lines": (GET + HOST + b"X: y\r\n" * 100 + b"\r\n", 431),
    "100 header lines": (GET + HOST + b"X: y\r\n" * 99 + b"\r\n", ["GET /a "]),
    "headers over 16 KiB": (GET + HOST + b"X: " + b"y" * 17_000 + b"\r\n\r\n", 431),
    "headers without end": (GET + HOST + b"X: " + b"y" * 17_000, 431),
    "idempotency key twice": (POST + HOST + b"Idempotency-Key: a\r\nIdempotency-Key: b\r\n\r\n", 400),
    "authorization twice": (GET + HOST + b"Authorization: a\r\nauthorization: a\r\n\r\n", 400),
    "list field twice": (GET + HOST + b"Accept: a\r\nAccept: b\r\n\r\n", ["GET /a "]),
    "expect something else": (POST + HOST + b"Expect: 200-ok\r\nContent-Length: 2\r\n\r\nhi", 417),
    "upgrade is ignored": (
        GET + HOST + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n" + GET + HOST + b"\r\n",
        ["GET /a ", "GET /a "],
    ),
    "upgrade with a body": (
        POST + HOST + b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\nhi",
        ["POST /a hi"],
    ),
    # Content-Length
    "body of stated length": (POST + HOST + b"Content-Length: 2\r\n\r\nhi", ["POST /a hi"]),
    "get with a body": (GET + HOST + b"Content-Length: 2\r\n\r\nhi", ["GET /a hi"]),
    "body that looks like a request": (
        POST + HOST + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
        ["POST /a " + SMUGGLED.decode("ascii")],
    ),
    "length with leading zeros": (POST + HOST + b"Content-Length: 002\r\n\r\nhi", ["POST /a hi"]),
    "length with blanks around": (POST + HOST + b"Content-Length: \t 2 \t\r\n\r\nhi", ["POST /a hi"]),
    "length twice, equal": (POST + HOST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi", 400),
    "length twice, different": (POST + HOST + b"Content-Length: 2\r\nContent-Length: 0\r\n\r\nhi", 400),
    "length as a list": (POST + HOST + b"Content-Length: 2, 2\r\n\r\nhi", 400),
    "length with a plus": (POST + HOST + b"Content-Length: +2\r\n\r\nhi", 400),
    "length negative": (POST + HOST + b"Content-Length: -2\r\n\r\nhi", 400),
    "length hexadecimal": (POST + HOST + b"Content-Length: 0x2\r\n\r\nhi", 400),
    "length with an underscore": (POST + HOST + b"Content-Length: 1_0\r\n\r\n0123456789", 400),
    "length empty": (POST + HOST + b"Content-Length:\r\n\r\nhi", 400),
    "length of two words": (POST + HOST + b"Content-Length: 2 2\r\n\r\nhi", 400),
    "length over 64 bits": (POST + HOST + b"Content-Length: 18446744073709551618\r\n\r\nhi", 400),
    "length over the bound": (POST + HOST + b"Content-Length: 65537\r\n\r\n", 413),
    # Transfer-Encoding
    "length and chunked": (POST + HOST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked and length": (POST + HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400),
    "gzip, chunked": (POST + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked, identity": (POST + HOST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
    "chunked, chunked": (POST + HOST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
    "identity": (POST + HOST + b"Transfer-Encoding: identity\r\n\r\n", 400),
    "xchunked": (POST + HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    "coding empty": (POST + HOST + b"Transfer-Encoding:\r\n\r\n", 400),
    "coding quoted": (POST + HOST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', 400),
    "coding with a vertical tab": (POST + HOST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
    "coding twice": (POST + HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "coding folded": (POST + HOST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked in http/1.0": (b"POST /a HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked in capitals": (POST + HOST + b"Transfer-Encoding: CHUNKED\r\n\r\n0\r\n\r\n", ["POST /a "]),
    # Chunks
    "chunks": (CHUNKED + b"2\r\nhi\r\nA\r\n0123456789\r\n0\r\n\r\n", ["POST /a hi0123456789"]),
    "chunk size with leading zeros": (CHUNKED + b"0002\r\nhi\r\n0\r\n\r\n", ["POST /a hi"]),
    "chunk extension": (CHUNKED + b'2;a=b;c="d;\\"e"\r\nhi\r\n0;z\r\n\r\n', ["POST /a hi"]),
    "chunk extension without a name": (CHUNKED + b"2;\r\nhi\r\n0\r\n\r\n", 400),
    "chunk extension after a space": (CHUNKED + b"2 ;a\r\nhi\r\n0\r\n\r\n", 400),
    "chunk extension with a bare lf": (CHUNKED + b"2;a\nhi\r\n0\r\n\r\n", 400),
    "chunk extension with a bare cr": (CHUNKED + b"2;a\rb\r\nhi\r\n0\r\n\r\n", 400),
    "chunk extension with nul": (CHUNKED + b"2;a=\x00\r\nhi\r\n0\r\n\r\n", 400),
    "chunk extension too long": (CHUNKED + b"2;" + b"a" * 300 + b"\r\nhi\r\n0\r\n\r\n", 400),
    "chunk extensions too many": (CHUNKED + (b"1;" + b"a" * 200 + b"\r\nx\r\n") * 6 + b"0\r\n\r\n", 400),
    "chunk size line without end": (CHUNKED + b"0" * 300, 400),
    "chunk size empty": (CHUNKED + b"\r\nhi\r\n0\r\n\r\n", 400),
    "chunk size with 0x": (CHUNKED + b"0x2\r\nhi\r\n0\r\n\r\n", 400),
    "chunk size negative": (CHUNKED + b"-2\r\nhi\r\n0\r\n\r\n", 400),
    "chunk size with a plus": (CHUNKED + b"+2\r\nhi\r\n0\r\n\r\n", 400),
    "chunk size with an underscore": (CHUNKED + b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n", 400),
    "chunk size after a space": (CHUNKED + b" 2\r\nhi\r\n0\r\n\r\n", 400),
    "chunk size before a space": (CHUNKED + b"2 \r\nhi\r\n0\r\n\r\n", 400),
    "chunk size over 64 bits": (CHUNKED + b"10000000000000002\r\nhi\r\n0\r\n\r\n", 400),
    "chunk size over the bound": (CHUNKED + b"FFFFFFFF\r\n", 413),
    "chunk sizes over the bound": (CHUNKED + b"8000\r\n" + b"x" * 0x8000 + b"\r\n8001\r\n", 413),
    "bare lf after the chunk size": (CHUNKED + b"2\nhi\r\n0\r\n\r\n", 400),
    "bare cr after the chunk size": (CHUNKED + b"2\rhi\r\n0\r\n\r\n", 400),
    "bare lf after the chunk": (CHUNKED + b"2\r\nhi\n0\r\n\r\n", 400),
    "no line end after the chunk": (CHUNKED + b"2\r\nhi0\r\n\r\n", 400),
    "two bytes instead of a line end": (CHUNKED + b"2\r\nhiXX0\r\n\r\n", 400),
    "bare lf at the end": (CHUNKED + b"0\r\n\n", 400),
    "trailer": (CHUNKED + b"0\r\nX: y\r\n\r\n", ["POST /a "]),
    "trailer content-length": (CHUNKED + b"0\r\nContent-Length: 5\r\n\r\nhello", 400),
    "trailer transfer-encoding": (CHUNKED + b"0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "trailer host": (CHUNKED + b"0\r\nHost: b\r\n\r\n", 400),
    "trailer folded": (CHUNKED + b"0\r\nX: y\r\n z\r\n\r\n", 400),
    "trailer without a colon": (CHUNKED + b"0\r\nfoo\r\n\r\n", 400),
    "trailer with a bare lf": (CHUNKED + b"0\r\nX: y\nZ: z\r\n\r\n", 400),
    "trailers too many": (CHUNKED + b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
    "trailers too large": (CHUNKED + b"0\r\nX: " + b"y" * 17_000, 431),
    # Ends of connections
    "pipelined": (GET + HOST + b"\r\n" + POST + HOST + b"Content-Length: 2\r\n\r\nhi", ["GET /a ", "POST /a hi"]),
    "empty line between requests": (GET + HOST + b"\r\n\r\n" + GET + HOST + b"\r\n", ["GET /a ", "GET /a "]),
    "nothing after close": (GET + HOST + b"Connection: close\r\n\r\n" + SMUGGLED, ["GET /a "]),
    "nothing after close in a list": (GET + HOST + b"Connection: X , Close\r\n\r\n" + SMUGGLED, ["GET /a "]),
    "nothing after http/1.0": (b"GET /a HTTP/1.0\r\n\r\n" + SMUGGLED, ["GET /a "]),
    "http/1.0 kept alive": (
        b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + GET + HOST + b"\r\n",
        ["GET /a ", "GET /a "],
    ),
    "unread bytes after an error": (GET + b"\r\n" + SMUGGLED, 400),
}

_BY_NAME = pytest.mark.parametrize(("sent", "expected"), ROWS.values(), ids=ROWS.keys())


def _taken(pieces: list[bytes]) -> Expected:
    parser = http1.RequestParser()
    taken: list[http1.Request] = []
    try:
        for piece in pieces:
            taken += parser.feed(piece)
    except http1.ProtocolError as error:
        return error.status
    if parser.error is not None:
        return parser.error.status
    return [f"{request.method} {request.path} {request.body.decode('latin-1')}" for request in taken]


def test_the_table_is_long_enough() -> None:
    assert len(ROWS) >= 60


@_BY_NAME
def test_in_one_piece(sent: bytes, expected: Expected) -> None:
    assert _taken([sent]) == expected


@_BY_NAME
def test_byte_by_byte(sent: bytes, expected: Expected) -> None:
    assert _taken([sent[index : index + 1] for index in range(len(sent))]) == expected


async def test_over_sockets() -> None:
    """The same table against a server: refusals are problems that say so and close, acceptances are answered in order."""
    seen: list[str] = []

    async def handler(request: http1.Request) -> http1.Response:
        seen.append(f"{request.method} {request.path} {request.body.decode('latin-1')}")
        return http1.Response(200, b"{}")

    errors: list[Exception] = []
    stop = trio.Event()
    limits = server.ServerLimits(drain_seconds=0.05, abort_seconds=0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await server.serve(
                    listener, handler, limits=limits, stop=stop, on_error=lambda error, _: errors.append(error)
                )

            nursery.start_soon(serve)
            for name, (sent, expected) in ROWS.items():
                seen.clear()
                stream = await trio.open_tcp_stream(*listener.getsockname())
                async with stream:
                    await stream.send_all(sent)
                    await stream.send_eof()
                    answer = b"".join([piece async for piece in stream])
                statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answer)]
                if isinstance(expected, int):
                    assert statuses[-1] == expected, name
                    assert b"Connection: close\r\n" in answer, name
                    assert b'"outcome":"not_executed"' in answer, name
                    assert "GET /smuggled " not in seen, name
                else:
                    assert statuses == [200] * len(expected), name
                    assert seen == expected, name
            stop.set()
    assert errors == []
