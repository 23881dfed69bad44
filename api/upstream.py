"""From an api process to the worker of a shard or to the planner, and back.

One connection, many requests in flight. A request that finds the worker gone waits and is sent again to its successor, with
the same key: for a client a worker's restart is a pause, not an error. What it hears at its deadline is the truth:
- it was never sent: nothing was done (`Unsent`);
- it was sent and not answered: nobody knows (`Unanswered`), and its key makes asking again safe. That is also the answer
  when the server that got it is gone and its successor refuses to look at it: the first may have done it.

Bounds: `requests_max` in flight; more are refused at once (`TooMany`).
Not promised: order between requests.
"""

import itertools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import msgspec
import outcome
import trio

from engine import service, wire
from engine.core.commands import Command
from engine.core.outcomes import Outcome, Refused
from engine.ports import Clock
from engine.service import Connection

RECONNECT_S_MIN = 0.005
RECONNECT_S_MAX = 0.02
"""A worker is back in about half a second, which is half of a usual deadline: asking fifty times a second finds it soon, and
costs 20 us each time."""
SWEEP_S = 0.02
"""How late a deadline may be noticed."""

NOT_LOOKED_AT = frozenset({Outcome.OVERLOADED, Outcome.DEADLINE_PASSED, Outcome.SHARD_FULL})
"""Refusals that rest on the server and the time, not on the request and what became of it earlier."""

ReplyT = TypeVar("ReplyT")


class Unsent(Exception):  # noqa: N818 - named for what is true
    """The deadline passed before the request could be sent: nothing was done."""


class Unanswered(Exception):  # noqa: N818 - named for what is true
    """The deadline passed after the request was sent: what became of it is unknown."""


class TooMany(Exception):  # noqa: N818 - named for what is true
    """Too many requests are in flight: nothing was done."""


class _Pending:
    __slots__ = ("again", "command", "deadline_ms", "lost", "sent", "task")

    def __init__(self, task: trio.lowlevel.Task, command: Command, deadline_ms: int, *, again: bool) -> None:
        self.task = task
        self.command = command
        self.deadline_ms = deadline_ms
        self.again = again
        self.sent = False
        self.lost = False
        """Sent to a server that is gone: it may have been done there."""


class Statistics(NamedTuple):
    """How one upstream is doing."""

    connected: bool
    """Whether the last connection still stands."""
    in_flight: int
    """Requests waiting for their answer."""
    connections: int
    """Connections made since the start: one, plus one for each restart on the other side."""


class Upstream(Generic[ReplyT]):
    """Requests to one server process. `run` must be running."""

    def __init__(
        self,
        path: Path,
        decode: Callable[[bytes], list[tuple[int, ReplyT]]],
        clock: Clock,
        *,
        requests_max: int = 8192,
    ) -> None:
        self._path = path
        self._decode = decode
        self._clock = clock
        self._requests_max = requests_max
        self._pending: dict[int, _Pending] = {}
        self._ids = itertools.count(1)
        self._unsent: list[tuple[int, int, Command]] = []
        self._flush = trio.Event()
        self._connection: Connection | None = None
        self._connections = 0

    def statistics(self) -> Statistics:
        """How it is doing."""
        return Statistics(self._connection is not None, len(self._pending), self._connections)

    async def ask(self, command: Command, deadline_ms: int, *, again: bool = True) -> ReplyT:
        """Send a command and wait for its reply until `deadline_ms` (CLOCK_BOOTTIME).

        `again` says that the command may be sent to a successor when the answer is lost.
        Raises Unsent, Unanswered, TooMany.
        """
        if len(self._pending) >= self._requests_max:
            raise TooMany
        request_id = next(self._ids)
        self._pending[request_id] = _Pending(trio.lowlevel.current_task(), command, deadline_ms, again=again)
        self._unsent.append((request_id, deadline_ms, command))
        self._flush.set()

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._pending[request_id]
            return trio.lowlevel.Abort.SUCCEEDED

        reply: ReplyT = await trio.lowlevel.wait_task_rescheduled(abort)
        return reply

    async def run(self) -> None:
        """Keep a connection and serve `ask` until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep)
            pause_s = RECONNECT_S_MIN
            while True:
                try:
                    peer = await service.connect(self._path)
                except OSError:
                    answered = False
                else:
                    answered = await self._serve(peer)
                # Who accepts and hangs up is waited for like who is not there: else both would spin.
                if answered:
                    pause_s = RECONNECT_S_MIN
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, RECONNECT_S_MAX)

    async def _serve(self, peer: socket.socket) -> bool:
        """Use a connection until it ends; says whether anything was answered over it."""
        connection = Connection(peer)
        self._connection = connection
        self._connections += 1
        answered = False
        try:
            async with trio.open_nursery() as inner:
                inner.start_soon(connection.write_rest)
                inner.start_soon(self._send, connection)
                answered = await self._receive(connection)
                inner.cancel_scope.cancel()
        finally:
            self._connection = None
            connection.close()
        self._lost()
        return answered

    def _lost(self) -> None:
        """The server is gone: what may be sent again waits for its successor, the rest is unknown."""
        for request_id, pending in list(self._pending.items()):
            if pending.sent and not pending.again:
                self._fail(request_id, Unanswered())
            else:
                pending.lost = pending.sent
        # Made anew, since one that was lost twice must not stand here twice.
        self._unsent = [(request_id, each.deadline_ms, each.command) for request_id, each in self._pending.items()]
        if self._unsent:
            self._flush.set()

    async def _send(self, connection: Connection) -> None:
        while True:
            await self._flush.wait()
            # One look at the sockets: requests that have arrived by now travel in the same frame.
            await trio.lowlevel.checkpoint()
            if connection.closed:
                return
            self._flush = trio.Event()
            messages = [message for message in self._unsent if message[0] in self._pending]
            self._unsent = []
            if messages:
                for request_id, _, _ in messages:
                    self._pending[request_id].sent = True
                connection.send(wire.frame(messages))

    async def _receive(self, connection: Connection) -> bool:
        """Hand out replies until the connection ends; says whether there were any."""
        frames = wire.FrameReader()
        answered = False
        try:
            while data := await connection.receive():
                for payload in frames.feed(data):
                    for request_id, reply in self._decode(payload):
                        answered = True
                        pending = self._pending.get(request_id)
                        if pending is None:
                            continue
                        if pending.lost and isinstance(reply, Refused) and reply.outcome in NOT_LOOKED_AT:
                            self._fail(request_id, Unanswered())
                            continue
                        del self._pending[request_id]
                        trio.lowlevel.reschedule(pending.task, outcome.Value(reply))
        except (OSError, wire.FrameError, msgspec.DecodeError, trio.ClosedResourceError):
            pass  # as good as a connection that ended: what was asked over it is lost
        return answered

    def _fail(self, request_id: int, error: Exception) -> None:
        pending = self._pending.pop(request_id)
        trio.lowlevel.reschedule(pending.task, outcome.Error(error))

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            now_ms = self._clock.monotonic_ms()
            for request_id, pending in list(self._pending.items()):
                if pending.deadline_ms <= now_ms:
                    self._fail(request_id, Unanswered() if pending.sent else Unsent())
