"""One connection to a running service, for the command line: blocking, by the standard library.

Rules
- What the service refuses, or its absence, becomes a `Failure` with the exit code that fits and a text that says what to do.
- Nothing is sent twice. A request whose answer was lost says so; the caller knows whether asking again is harmless.

Not promised: redirects, proxies, compression, more than one request at a time.
"""

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

from api.cli.exits import Exit, Failure

Json = dict[str, Any]
Progress = Callable[[int], None]
"""Told the bytes sent since it was told before."""

TIMEOUT_SECONDS: Final = 10.0
"""Ten times the deadline of a request as configured by default: the service answers long before, or not at all."""

_CHUNK_BYTES: Final = 256 * 1024
_TRY_AGAIN: Final = frozenset({408, 429, 502, 503, 504})


class Answer(NamedTuple):
    """What the service said."""

    status: int
    document: Json


class Service:
    """A service at a URL."""

    def __init__(self, url: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise Failure(Exit.USAGE, f"--url {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise Failure(Exit.USAGE, f"--url {url!r} is no address of a service: write http://127.0.0.1:7411")
        kind = http.client.HTTPConnection if parts.scheme == "http" else http.client.HTTPSConnection
        self._connection = kind(host, port, timeout=timeout_seconds)
        self._path = parts.path

    def __enter__(self) -> Self:
        """It connects with the first request."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self._connection.close()

    def ask(
        self,
        method: str,
        path: str,
        document: bytes | None = None,
        *,
        key: str | None = None,
        progress: Progress | None = None,
    ) -> Answer:
        """Send a request and return the answer, whatever its status. Raises `Failure` where there is none."""
        headers = {"Accept": "application/json"}
        if key is not None:
            headers["Idempotency-Key"] = key
        if document is not None:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(document))}
        body = None if document is None else _chunks(document, progress)
        try:
            if self._connection.sock is None:
                self._connection.connect()
        except OSError as error:
            raise Failure(Exit.UNAVAILABLE, self._no_connection(error)) from None
        try:
            self._connection.request(method, self._path + path, body=body, headers=headers)
            response = self._connection.getresponse()
            content = response.read()
        except TimeoutError:
            raise Failure(Exit.UNAVAILABLE, self._lost("did not answer in time")) from None
        except (OSError, http.client.HTTPException) as error:
            raise Failure(Exit.UNAVAILABLE, self._lost(f"ended the connection ({_words(error)})")) from None
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Failure(
                Exit.UNAVAILABLE,
                f"{self.url} answers {method} {path} with status {response.status}, but not as Slotkeeper does: "
                "is it another program?",
            )
        return Answer(response.status, answer)

    def get(self, path: str) -> Json:
        """Read something. Raises `Failure`."""
        return self.checked(self.ask("GET", path))

    def checked(self, answer: Answer) -> Json:
        """The document of an answer that is no refusal. Raises `Failure`."""
        if answer.status < 400:
            return answer.document
        problem = answer.document
        text = f"{problem.get('title', f'status {answer.status}')} ({problem.get('code', 'no code')})"
        detail = problem.get("detail")
        if isinstance(detail, str) and detail:
            text = f"{text}: {detail}"
        raise Failure(Exit.TRY_AGAIN if answer.status in _TRY_AGAIN else Exit.REFUSED, text, problem=problem)

    def _no_connection(self, error: OSError) -> str:
        if isinstance(error, ConnectionRefusedError):
            why = "nothing listens there"
        elif isinstance(error, TimeoutError):
            why = "it does not answer"
        elif isinstance(error, socket.gaierror):
            why = "there is no host of that name"
        else:
            why = _words(error)
        return (
            f"cannot reach {self.url}: {why}. Start the service with `slotkeeper serve --data DIR`, "
            "or say with --url where it is."
        )

    def _lost(self, what: str) -> str:
        return f"{self.url} {what}. Look at its log, and with `slotkeeper status` whether all its shards are ready."


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _chunks(document: bytes, progress: Progress | None) -> Iterator[bytes]:
    for start in range(0, len(document), _CHUNK_BYTES):
        chunk = document[start : start + _CHUNK_BYTES]
        yield chunk
        # Asked for the next one: this one is with the kernel.
        if progress is not None:
            progress(len(chunk))
