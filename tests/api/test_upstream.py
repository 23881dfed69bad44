"""What a caller hears when the process that it asked goes away: the truth about what was done."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from api.upstream import NOT_LOOKED_AT, Unanswered, Unsent, Upstream
from engine import service, wire
from engine.clock import SystemClock
from engine.core import outcomes
from engine.core.commands import Look
from engine.core.outcomes import Outcome, ShardReply

DEADLINE_MS = 400
"""Long enough to connect twice."""

Answerer = Callable[[int], ShardReply | None]
"""What the n-th server process answers; None: it takes the command and dies."""


async def ask(directory: Path, answer: Answerer | None) -> ShardReply:
    """Ask a server that `answer` describes, one process after the other on one socket."""
    path = directory / "worker.sock"
    clock = SystemClock()
    processes = 0

    def take(connection: service.Connection, payload: bytes) -> None:
        nonlocal processes
        ((request_id, _, _),) = wire.shard_commands.decode(payload)
        processes += 1
        reply = None if answer is None else answer(processes)
        if reply is None:
            nursery.start_soon(die, connection)
        else:
            connection.send(wire.frame([(request_id, reply)]))

    async def die(connection: service.Connection) -> None:
        connection.close()

    upstream: Upstream[ShardReply] = Upstream(path, wire.shard_replies.decode, clock)
    async with trio.open_nursery() as nursery:
        if answer is not None:
            nursery.start_soon(service.serve, service.bind(path), take)
        nursery.start_soon(upstream.run)
        try:
            return await upstream.ask(Look(1 << 16), clock.monotonic_ms() + DEADLINE_MS)
        finally:
            nursery.cancel_scope.cancel()


def _reply(outcome: Outcome) -> ShardReply:
    return outcomes.Refused(7, outcome)


async def heard(directory: Path, answer: Answerer | None) -> ShardReply | type[Exception]:
    found: ShardReply | type[Exception]
    try:
        found = await ask(directory, answer)
    except* (Unsent, Unanswered) as group:
        found = type(group.exceptions[0])
    return found


async def test_nobody_listens_so_nothing_was_done(tmp_path: Path) -> None:
    assert await heard(tmp_path, None) is Unsent


async def test_who_dies_after_taking_it_leaves_it_unknown(tmp_path: Path) -> None:
    assert await heard(tmp_path, lambda _: None) is Unanswered


async def test_a_successor_answers_what_was_asked_of_the_one_before(tmp_path: Path) -> None:
    answer = _reply(Outcome.UNKNOWN_RESERVATION)
    assert await heard(tmp_path, lambda process: answer if process == 2 else None) == answer


@pytest.mark.parametrize("outcome", sorted(NOT_LOOKED_AT))
async def test_turned_away_at_once_nothing_was_done(tmp_path: Path, outcome: Outcome) -> None:
    assert await heard(tmp_path, lambda _: _reply(outcome)) == _reply(outcome)


@pytest.mark.parametrize("outcome", sorted(NOT_LOOKED_AT))
async def test_turned_away_by_a_successor_it_is_unknown(tmp_path: Path, outcome: Outcome) -> None:
    assert await heard(tmp_path, lambda process: _reply(outcome) if process == 2 else None) is Unanswered
