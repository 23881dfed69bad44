"""What a request handler of the api works with, and how a request finds its handler.

`App` holds the connections to workers and planner, the overview in memory and the settings. `Router` is a table: method and
path to handler; a handler is a coroutine of (app, request, path parameters) that returns a response. It raises `Refusal`
for what the caller did wrong; nothing else may leave it.
"""

import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import msgspec
import structlog
import trio

from api import problems
from api.http1 import Request, Response, StreamingResponse
from api.overview import Overview
from api.upstream import TooMany, Unanswered, Unsent, Upstream
from engine.config import Config
from engine.core.commands import Command
from engine.core.outcomes import PlannerReply, ShardReply
from engine.core.sharding import parse_position
from engine.ports import Clock

log: structlog.stdlib.BoundLogger = structlog.get_logger("api")

BodyT = TypeVar("BodyT")
Parameters = Mapping[str, str]
Handler = Callable[["App", Request, Parameters], Awaitable[Response | StreamingResponse]]

MIN_POSITION_POLL_S = 0.002
"""Waiting for one's own write: it is published before it is answered, so this is rarely needed once."""

_ECHOED = re.compile(rb"[\x21-\x7e]{1,128}")
_JSON_TYPE = re.compile(rb"application/json[ \t]*(;.*)?", re.IGNORECASE)


class Refusal(Exception):  # noqa: N818 - a value on its way out, not a failure
    """The answer to a request that cannot be served. Carries the problem to send."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


def refuse(code: str, detail: str = "", **members: object) -> Refusal:
    """A refusal to raise."""
    return Refusal(problems.problem(code, detail, **members))  # type: ignore[arg-type]  # members extend the object


class Parameter(NamedTuple):
    """A query parameter, for checking and for OpenAPI."""

    name: str
    description: str
    pattern: str | None = None
    example: str | None = None
    repeated: bool = False
    integer: tuple[int, int] | None = None
    """Lowest and highest value of an integer parameter."""


@dataclass(frozen=True)
class Route:
    """One operation: how it is found, what it takes and gives, and what OpenAPI says of it."""

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    request: type[msgspec.Struct] | None = None
    request_optional: bool = False
    answers: Mapping[int, type[msgspec.Struct] | None] = field(default_factory=dict)
    codes: tuple[str, ...] = ()
    query: tuple[Parameter, ...] = ()
    headers: tuple[Parameter, ...] = ()
    keyed: bool = False
    example: Any = None


class App:
    """What handlers work with."""

    def __init__(
        self,
        *,
        config: Config,
        data: Path,
        shards: list[Upstream[ShardReply]],
        planner: Upstream[PlannerReply],
        overview: Overview,
        clock: Clock,
        stop: trio.Event,
        routes: tuple[Route, ...],
    ) -> None:
        self.config = config
        self.data = data
        self.shards = shards
        self.planner = planner
        self.overview = overview
        self.clock = clock
        self.stop = stop
        """Set when this process is to end: who waits for news is answered with what there is."""
        self.routes = routes
        self._exact: dict[tuple[str, str], Route] = {}
        self._templates: dict[tuple[str, int], list[tuple[list[str], Route]]] = {}
        for route in routes:
            if "{" in route.path:
                parts = route.path.split("/")
                self._templates.setdefault((route.method, len(parts)), []).append((parts, route))
            else:
                self._exact[route.method, route.path] = route

    # --- finding the handler ------------------------------------------------------------------------------------------

    async def handle(self, request: Request) -> Response | StreamingResponse:
        """Answer one request."""
        method = "GET" if request.method == "HEAD" else request.method
        route = self._exact.get((method, request.path))
        parameters: Parameters = {}
        try:
            if route is None:
                route, parameters = self._find(method, request.path)
            if method != "GET" and request.headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
                raise refuse("forbidden", "A page of another site may not change anything here.")
            if request.query and not route.query and route.path.startswith("/v1/"):
                query(request, ())
            response: Response | StreamingResponse = await route.handler(self, request, parameters)
        except Refusal as refusal:
            response = refusal.response
        except Unsent:
            response = problems.problem("shard_unavailable")
        except Unanswered:
            # Reading has no outcome: asking again is always safe, without a key.
            code, outcome = (
                ("shard_unavailable", "not_executed") if method == "GET" else ("outcome_unknown", "outcome_unknown")
            )
            response = problems.problem(code, outcome=outcome)
        except TooMany:
            response = problems.problem("overloaded")
        echoed = _echoed(request.headers)
        if echoed:
            response.headers = (*response.headers, *echoed)
        if response.status >= 500:
            log.warning("a request failed", method=request.method, path=request.path, status=response.status)
        return response

    def _match(self, method: str, path: str) -> tuple[Route, Parameters] | None:
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact, {}
        parts = path.split("/")
        for template, route in self._templates.get((method, len(parts)), ()):
            parameters = {}
            for expected, given in zip(template, parts, strict=True):
                if expected.startswith("{") and given:
                    parameters[expected[1:-1]] = given
                elif expected != given:
                    break
            else:
                return route, parameters
        return None

    def _find(self, method: str, path: str) -> tuple[Route, Parameters]:
        found = self._match(method, path)
        if found is not None:
            return found
        allowed = sorted({route.method for route in self.routes if self._match(route.method, path)})
        if allowed:
            if "GET" in allowed:
                allowed.append("HEAD")
            allow = ((b"Allow", ", ".join(allowed).encode()),)
            raise Refusal(problems.problem("method_not_allowed", headers=allow))
        raise refuse("not_found")

    # --- asking -------------------------------------------------------------------------------------------------------

    def deadline_ms(self) -> int:
        """When a request that arrives now must have its answer."""
        return self.clock.monotonic_ms() + self.config.api.deadline_ms

    async def ask(self, shard: int, command: Command) -> ShardReply:
        """Ask a worker, again after its restart, until the deadline. Raises Unsent, Unanswered, TooMany."""
        return await self.shards[shard].ask(command, self.deadline_ms())

    async def wait_for(self, min_position: str | None) -> None:
        """Wait until the overview shows a position. Raises Refusal."""
        if min_position is None:
            return
        position = parse_position(min_position)
        if position is None or position[0] >= len(self.shards):
            raise refuse("invalid_request", f"min_position {min_position!r} is no position of this system")
        shard, seq = position
        deadline_ms = self.deadline_ms()
        while self.overview.position(shard) < seq:
            if self.clock.monotonic_ms() >= deadline_ms:
                raise refuse("shard_unavailable", f"shard {shard} has not reached {min_position} yet")
            await trio.sleep(MIN_POSITION_POLL_S)


def _echoed(headers: dict[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    """The names a caller gave to its request, given back."""
    echoed: tuple[tuple[bytes, bytes], ...] = ()
    for name, shown in ((b"x-request-id", b"X-Request-Id"), (b"traceparent", b"Traceparent")):
        value = headers.get(name)
        if value is not None and _ECHOED.fullmatch(value):
            echoed += ((shown, value),)
    return echoed


# --- reading requests -------------------------------------------------------------------------------------------------


def body(request: Request, decoder: "msgspec.json.Decoder[BodyT]", *, optional: bool = False) -> BodyT:
    """The checked body. Raises Refusal with the path of what is wrong."""
    data = request.body
    if not data:
        if not optional:
            raise refuse("invalid_request", "The body is empty: send a JSON object.")
        data = b"{}"
    elif not _JSON_TYPE.fullmatch(request.headers.get(b"content-type", b"application/json")):
        raise refuse("unsupported_media_type")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refuse("invalid_request", f"The body is not valid: {error}") from None


def query(request: Request, parameters: tuple[Parameter, ...]) -> dict[str, list[str]]:
    """The checked query. Raises Refusal for unknown, repeated or malformed parameters."""
    if not request.query:
        return {}
    try:
        pairs = parse_qsl(
            request.query.decode("ascii"),
            keep_blank_values=True,  # `?verbose` is `?verbose=`
            errors="strict",
            max_num_fields=100,
        )
    except ValueError:
        raise refuse("invalid_request", "The query string is not valid: write name=value&name=value") from None
    known = {parameter.name: parameter for parameter in parameters}
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        parameter = known.get(name)
        if parameter is None:
            names = ", ".join(known) or "no parameters"
            raise refuse("invalid_request", f"{name!r} is no parameter of this call: it takes {names}")
        if name in values and not parameter.repeated:
            raise refuse("invalid_request", f"{name} may be given once")
        if parameter.pattern is not None and not re.fullmatch(parameter.pattern, value, re.ASCII):
            raise refuse("invalid_request", f"{name} {value!r} is not valid: {parameter.description}")
        if parameter.integer is not None:
            _check_integer(name, value, parameter.integer)
        values.setdefault(name, []).append(value)
    return values


def _check_integer(name: str, value: str, bounds: tuple[int, int]) -> None:
    lowest, highest = bounds
    if not (value.isascii() and value.isdigit() and len(value) <= 20 and lowest <= int(value) <= highest):
        raise refuse("invalid_request", f"{name} must be a whole number from {lowest} to {highest}")


def key_digest(key: bytes) -> bytes:
    """16 bytes for an idempotency key."""
    return blake2b(key, digest_size=16).digest()


def fingerprint(*parts: bytes) -> int:
    """64 bits, signed and never 0, for what was asked."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(4, "big"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "big", signed=True) or 1


def fresh_action() -> int:
    """A name for a request that came without one, so that sending it again to a successor is recognised."""
    return int.from_bytes(os.urandom(8), "big", signed=True) or 1
