"""The calls that define capacity: pools, counters, imports. They go to the planner, which carries them to the shards.

An answer means that the change is durable and in force on every shard. `If-Match` with the `plan_version` that was read
makes a change fail with 412 where somebody else was faster.
"""

import re

import msgspec
import orjson

from api import messages, problems, views
from api.app import App, Parameters, Refusal, body, refuse
from api.http1 import Request, Response
from api.overview import ShardNotPublishedError
from api.problems import CODE_OF_OUTCOME
from api.reads import counter_view
from engine.core import commands, outcomes
from engine.core.limits import UNITS_MAX
from engine.core.slots import SLOT_ID_PATTERN, SlotError, make_cutoff

_pool = msgspec.json.Decoder(messages.PoolRequest)
_counter = msgspec.json.Decoder(messages.CounterRequest)
_import = msgspec.json.Decoder(messages.ImportRequest)

_POOL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_SLOT_ID = re.compile(SLOT_ID_PATTERN.strip("^$"), re.ASCII)
_ETAG = re.compile(rb'"?(\d{1,15})"?')


def _pool_id(parameters: Parameters) -> str:
    pool_id = parameters["pool_id"]
    if not _POOL_ID.fullmatch(pool_id):
        raise refuse(
            "invalid_request",
            f"{pool_id!r} is no pool id: 1 to 64 letters, digits, dots, underscores, hyphens; a letter or digit first",
        )
    return pool_id


def _if_version(request: Request) -> int | None:
    if_match = request.headers.get(b"if-match")
    if if_match is None or if_match == b"*":
        return None
    match = _ETAG.fullmatch(if_match)
    if match is None:
        raise refuse("invalid_request", 'If-Match must be the plan_version that was read, as in "17"')
    return int(match[1])


async def _plan(app: App, command: commands.PutPool | commands.PutCounters) -> outcomes.Defined:
    """Have the planner define something. Raises Refusal."""
    # With a version to compare a second try would meet its own first one: then the truth is that nobody knows.
    reply = await app.planner.ask(command, app.deadline_ms(), again=command.if_version is None)
    if isinstance(reply, outcomes.Refused):
        raise Refusal(problems.problem(CODE_OF_OUTCOME[reply.outcome], reply.detail))
    if not isinstance(reply, outcomes.Defined):
        raise TypeError(f"a definition was answered with {type(reply).__name__}")
    app.overview.refresh(now=True)
    return reply


def _not_shown(detail: str) -> Refusal:
    """What was asked for was done, but cannot be shown: whoever asks again with what they know finds out."""
    return Refusal(problems.problem("outcome_unknown", detail, outcome="outcome_unknown"))


async def put_pool(app: App, request: Request, parameters: Parameters) -> Response:
    """PUT /v1/pools/{pool_id}."""
    pool_id = _pool_id(parameters)
    asked = body(request, _pool)
    cutoff = None
    if asked.cutoff is not None:
        try:
            cutoff = make_cutoff(asked.cutoff.minutes_before, asked.cutoff.days_before, asked.cutoff.local_time)
        except SlotError as error:
            raise refuse("invalid_request", str(error)) from None
    command = commands.PutPool(
        pool_id,
        asked.capacity_type,
        asked.unit,
        asked.zone,
        asked.time_zone,
        cutoff,
        asked.reason,
        "",
        _if_version(request),
    )
    defined = await _plan(app, command)
    shown = app.overview.pool(pool_id)
    if shown is None:
        raise _not_shown("The pool is defined; the overview does not show it yet.")
    headers = ((b"ETag", f'"{shown.version}"'.encode()),)
    return Response(201 if defined.created else 200, orjson.dumps(views.pool(shown)), headers=headers)


def _counter_put(put: commands.CounterPut) -> commands.CounterPut:
    """A counter whose limit every JSON reader keeps exact, as its parts are. Raises Refusal."""
    if put.base + put.overbook - put.buffer > UNITS_MAX:
        raise refuse(
            "invalid_request", f"{put.pool_id} {put.slot_id}: base + overbook - buffer must be at most {UNITS_MAX}"
        )
    return put


async def put_counter(app: App, request: Request, parameters: Parameters) -> Response:
    """PUT /v1/pools/{pool_id}/slots/{slot_id}."""
    pool_id, slot_id = _pool_id(parameters), parameters["slot_id"]
    if not _SLOT_ID.fullmatch(slot_id):
        raise refuse("invalid_slot", f"{slot_id!r} is no slot id: write it as in 2026-12-01T18:00-20:00")
    asked = body(request, _counter)
    put = _counter_put(commands.CounterPut(pool_id, slot_id, asked.base, asked.overbook, asked.buffer, asked.closed))
    defined = await _plan(app, commands.PutCounters([put], asked.reason, "", _if_version(request)))
    try:
        view = await counter_view(app, pool_id, slot_id)
    except ShardNotPublishedError as error:
        raise _not_shown(f"The counter is defined; the overview does not show it: {error}") from None
    headers = ((b"ETag", f'"{view["plan_version"]}"'.encode()),)
    return Response(201 if defined.created else 200, orjson.dumps(view), headers=headers)


async def import_counters(app: App, request: Request, parameters: Parameters) -> Response:
    """POST /v1/counters:import."""
    del parameters
    asked = body(request, _import)
    counters = [
        _counter_put(commands.CounterPut(row.pool_id, row.slot_id, row.base, row.overbook, row.buffer, row.closed))
        for row in asked.counters
    ]
    deadline_ms = app.clock.monotonic_ms() + IMPORT_DEADLINE_MS
    reply = await app.planner.ask(commands.PutCounters(counters, asked.reason), deadline_ms)
    if isinstance(reply, outcomes.Refused):
        raise Refusal(problems.problem(CODE_OF_OUTCOME[reply.outcome], reply.detail))
    if not isinstance(reply, outcomes.Defined):
        raise TypeError(f"an import was answered with {type(reply).__name__}")
    answer = {"counters": len(counters), "created": reply.created, "plan_version": reply.planning_seq}
    return Response(200, orjson.dumps(answer))


IMPORT_DEADLINE_MS = 60_000
"""An import of 200,000 counters takes seconds, not the milliseconds of a customer's request."""

IMPORT_BODY_BYTES_MAX = 48 * 1024 * 1024
"""200,000 counters of 200 bytes each, with room."""
