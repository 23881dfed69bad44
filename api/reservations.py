"""The reservation calls: the customer's waiting path.

A body is checked, turned into one command, and sent to the shard of its first line; the reply becomes the answer. The
table `CODE_OF_OUTCOME` says what each outcome is in HTTP; nothing is decided here.
"""

from typing import Any

import msgspec
import orjson

from api import messages, views
from api.app import App, Parameters, body, fingerprint, fresh_action, key_digest, refuse
from api.http1 import Request, Response
from api.overview import ShardNotPublishedError
from api.problems import CODE_OF_OUTCOME, problem
from engine.core import commands, outcomes
from engine.core.columns import CONFIRMED, HELD
from engine.core.limits import IDEMPOTENCY_KEY_CHARS_MAX
from engine.core.outcomes import Outcome
from engine.core.sharding import (
    parse_reservation_id,
    position_text,
    reservation_id,
    shard_of_counter,
    shard_of_number,
)

_reservation = msgspec.json.Decoder(messages.ReservationRequest)
_confirm = msgspec.json.Decoder(messages.ConfirmRequest)
_release = msgspec.json.Decoder(messages.ReleaseRequest)
_extend = msgspec.json.Decoder(messages.ExtendRequest)
_move = msgspec.json.Decoder(messages.MoveRequest)
_fulfil = msgspec.json.Decoder(messages.FulfilRequest)
_canonical = msgspec.msgpack.Encoder()

ALTERNATIVES_MAX = 5
SLOTS_LOOKED_AT_MAX = 200
"""Of each pool, from now on: weeks ahead."""

_DONE = frozenset(
    {
        Outcome.HELD,
        Outcome.CONFIRMED,
        Outcome.RELEASED,
        Outcome.EXTENDED,
        Outcome.MOVED,
        Outcome.FULFILLED,
        Outcome.FOUND,
        Outcome.REPEATED,
    }
)


def _key(request: Request) -> bytes | None:
    key = request.headers.get(b"idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= IDEMPOTENCY_KEY_CHARS_MAX:
        raise refuse("invalid_request", f"Idempotency-Key must have 1 to {IDEMPOTENCY_KEY_CHARS_MAX} characters")
    return key


def _merged(lines: list[messages.Line]) -> dict[tuple[str, str], int]:
    """Units summed for each counter, in order of first mention."""
    units: dict[tuple[str, str], int] = {}
    for line in lines:
        counter = (line.pool_id, line.slot_id)
        units[counter] = units.get(counter, 0) + line.quantity
    return units


def _home_of(app: App, lines: dict[tuple[str, str], int]) -> int:
    """The shard of the first line, which decides for all. Raises Refusal."""
    if len(lines) > app.config.reservations.lines_max:
        raise refuse("invalid_request", f"lines: at most {app.config.reservations.lines_max} counters")
    pool_id, slot_id = next(iter(lines))
    return shard_of_counter(pool_id, slot_id, len(app.shards))


def _by_shard(app: App, lines: dict[tuple[str, str], int]) -> list[tuple[str, str, int]]:
    """The lines in the order in which a reservation keeps them: those of its home first."""
    named = [(pool_id, slot_id, quantity) for (pool_id, slot_id), quantity in lines.items()]
    if len(named) == 1:
        return named
    shards = [shard_of_counter(pool_id, slot_id, len(app.shards)) for pool_id, slot_id, _ in named]
    first = {shard: place for place, shard in reversed(list(enumerate(shards)))}
    return [line for _, line in sorted(zip(shards, named, strict=True), key=lambda pair: first[pair[0]])]


def _command_lines(lines: dict[tuple[str, str], int]) -> list[commands.Line]:
    return [commands.Line(pool_id, slot_id, quantity) for (pool_id, slot_id), quantity in lines.items()]


def _ttl_ms(app: App, ttl_seconds: int) -> int:
    if ttl_seconds > app.config.reservations.ttl_seconds_max:
        raise refuse("invalid_request", f"ttl_seconds: at most {app.config.reservations.ttl_seconds_max}")
    return ttl_seconds * 1000


async def create(app: App, request: Request, parameters: Parameters) -> Response:
    """POST /v1/reservations."""
    del parameters
    key = _key(request)
    if key is None:
        raise refuse(
            "invalid_request",
            "The header Idempotency-Key is missing: make a fresh one for each order, and send the same one again when "
            "you repeat the request. That is what keeps a retry from booking twice.",
        )
    asked = body(request, _reservation)
    lines = _merged(asked.lines)
    shard = _home_of(app, lines)
    command = commands.Hold(
        _command_lines(lines),
        commands.NO_TTL if asked.ttl_seconds is None else _ttl_ms(app, asked.ttl_seconds),
        key_digest(key),
        fingerprint(_canonical.encode(asked)),
        asked.order_ref,
        asked.channel,
    )
    reply = await app.ask(shard, command)
    if not isinstance(reply, outcomes.Taken):
        return _answer(app, shard, reply, asked.lines)
    answer = views.reservation(
        shard,
        reply.number,
        HELD if reply.expires_at_ms else CONFIRMED,
        order_ref=asked.order_ref,
        channel=asked.channel,
        lines=_by_shard(app, lines),
        expires_at_ms=reply.expires_at_ms,
        created_at_ms=reply.at_ms,
        changed_at_ms=reply.at_ms,
        version=1,
        changed_seq=reply.seq,
    )
    location = f"/v1/reservations/{reservation_id(reply.number)}".encode()
    return Response(201, orjson.dumps(answer), headers=((b"Location", location),))


def _number(parameters: Parameters) -> int:
    number = parse_reservation_id(parameters["reservation_id"])
    if number is None:
        raise refuse("unknown_reservation", f"{parameters['reservation_id']!r} is no reservation id of this system")
    return number


async def look(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /v1/reservations/{reservation_id}."""
    del request
    number = _number(parameters)
    return await _ask(app, number, commands.Look(number))


def _action(request: Request, verb: str, asked: msgspec.Struct) -> int:
    """The name of this request: from its key and content where it has a key, else a fresh one."""
    key = _key(request)
    return fresh_action() if key is None else fingerprint(key, verb.encode(), _canonical.encode(asked))


async def _ask(app: App, number: int, command: commands.Command, lines: list[messages.Line] | None = None) -> Response:
    shard = shard_of_number(number, len(app.shards))
    return _answer(app, shard, await app.ask(shard, command), lines or [])


async def confirm(app: App, request: Request, parameters: Parameters) -> Response:
    """POST /v1/reservations/{reservation_id}/confirm."""
    number = _number(parameters)
    asked = body(request, _confirm, optional=True)
    lines = None if asked.lines is None else _command_lines(_merged(asked.lines))
    return await _ask(app, number, commands.Confirm(number, _action(request, "confirm", asked), lines), asked.lines)


async def release(app: App, request: Request, parameters: Parameters) -> Response:
    """POST /v1/reservations/{reservation_id}/release."""
    number = _number(parameters)
    asked = body(request, _release, optional=True)
    return await _ask(app, number, commands.Release(number, _action(request, "release", asked), asked.reason))


async def extend(app: App, request: Request, parameters: Parameters) -> Response:
    """POST /v1/reservations/{reservation_id}/extend."""
    number = _number(parameters)
    asked = body(request, _extend)
    ttl_ms = _ttl_ms(app, asked.ttl_seconds)
    return await _ask(app, number, commands.Extend(number, _action(request, "extend", asked), ttl_ms))


async def move(app: App, request: Request, parameters: Parameters) -> Response:
    """POST /v1/reservations/{reservation_id}/move."""
    number = _number(parameters)
    asked = body(request, _move)
    lines = _merged(asked.lines)
    _home_of(app, lines)
    command = commands.Move(number, _action(request, "move", asked), _command_lines(lines))
    return await _ask(app, number, command, asked.lines)


async def fulfil(app: App, request: Request, parameters: Parameters) -> Response:
    """POST /v1/reservations/{reservation_id}/fulfil."""
    number = _number(parameters)
    asked = body(request, _fulfil, optional=True)
    return await _ask(app, number, commands.Fulfil(number, _action(request, "fulfil", asked)))


def _answer(app: App, shard: int, reply: outcomes.Reply, lines: list[messages.Line]) -> Response:
    """A worker's reply as HTTP."""
    if isinstance(reply, outcomes.Record):
        view = views.reservation_of_record(shard, reply)
        if reply.outcome in _DONE:
            return Response(200, orjson.dumps(view))
        return problem(CODE_OF_OUTCOME[reply.outcome], reservation=view, position=position_text(shard, reply.seq))
    if not isinstance(reply, outcomes.Refused):
        raise TypeError(f"a reservation call was answered with {type(reply).__name__}")
    members: dict[str, Any] = {"position": position_text(shard, reply.seq)}
    if reply.counters:
        members["lines"] = [views.counter_short(short) for short in reply.counters]
        members["alternatives"] = _alternatives(app, reply, lines)
    return problem(CODE_OF_OUTCOME[reply.outcome], reply.detail, **members)


def _alternatives(app: App, reply: outcomes.Refused, lines: list[messages.Line]) -> list[views.Json]:
    """The next slots of the same pools that would fit now, by the overview."""
    now_ms = app.clock.now_ms()
    found: list[views.Json] = []
    asked = {(line.pool_id, line.slot_id) for line in lines}
    app.overview.refresh()
    for short in reply.counters:
        pool = app.overview.pools.get(short.pool_id)
        if pool is None:
            continue
        try:
            page = app.overview.select([pool], now_ms, limit=SLOTS_LOOKED_AT_MAX)
        except ShardNotPublishedError:
            continue
        for place in page.places:
            if len(found) >= ALTERNATIVES_MAX:
                return found
            left = views.numbers(place.row, now_ms)
            slot_id = place.row.slot_id.decode()
            if left.status == "open" and left.available >= short.quantity and (pool.pool_id, slot_id) not in asked:
                found.append({"pool_id": pool.pool_id, "slot_id": slot_id, "available": left.available})
    return found
