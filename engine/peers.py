"""From a worker to the workers of the other shards: commands out, replies to a callback.

At least once: a command that has not been answered is sent again over the next connection, until its deadline. The protocol
above (`core.coordinator`) is made for repetition, so nothing here needs to remember more.

Bounds: REQUESTS_MAX unanswered commands for each peer; beyond that a command is dropped, which the protocol survives as
well: what matters is told and asked again.
Not promised: order.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from engine import service, wire
from engine.core import commands, outcomes
from engine.ports import Clock
from engine.service import Connection

RECONNECT_S_MIN = 0.005
RECONNECT_S_MAX = 0.1
REQUESTS_MAX = 16_384
PEER_DEADLINE_MS = 5_000
"""After this an unanswered command is forgotten: by then the coordinator has given up, told or asked again."""

Replied = Callable[[int, commands.Command, outcomes.Reply], None]
"""Called with the peer's shard, what was asked, and the reply."""


class Peer:
    """The way to one other shard. `run` must be running."""

    def __init__(self, shard: int, path: Path, clock: Clock, replied: Replied) -> None:
        self._shard = shard
        self._path = path
        self._clock = clock
        self._replied = replied
        self._ids = itertools.count(1)
        self._unanswered: dict[int, tuple[int, commands.Command]] = {}
        self._connection: Connection | None = None

    def send(self, asked: list[commands.Command]) -> None:
        """Send commands, now or when there is a connection. Never waits."""
        deadline_ms = self._clock.monotonic_ms() + PEER_DEADLINE_MS
        messages = []
        for command in asked:
            if len(self._unanswered) >= REQUESTS_MAX:
                break
            request_id = next(self._ids)
            self._unanswered[request_id] = (deadline_ms, command)
            messages.append((request_id, deadline_ms, command))
        if messages and self._connection is not None:
            self._connection.send(wire.frame(messages))

    async def run(self) -> None:
        """Keep a connection until cancelled."""
        pause_s = RECONNECT_S_MIN
        while True:
            try:
                connection = Connection(await service.connect(self._path))
            except OSError:
                self._forget_late()
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, RECONNECT_S_MAX)
                continue
            pause_s = RECONNECT_S_MIN
            self._forget_late()
            if self._unanswered:
                connection.send(
                    wire.frame(
                        [
                            (request_id, deadline_ms, command)
                            for request_id, (deadline_ms, command) in self._unanswered.items()
                        ]
                    )
                )
            self._connection = connection
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.write_rest)
                    await self._receive(connection)
                    nursery.cancel_scope.cancel()
            finally:
                self._connection = None
                connection.close()

    def _forget_late(self) -> None:
        now_ms = self._clock.monotonic_ms()
        for request_id, (deadline_ms, _) in list(self._unanswered.items()):
            if deadline_ms <= now_ms:
                del self._unanswered[request_id]

    async def _receive(self, connection: Connection) -> None:
        frames = wire.FrameReader()
        try:
            while data := await connection.receive():
                for payload in frames.feed(data):
                    for request_id, reply in wire.shard_replies.decode(payload):
                        asked = self._unanswered.pop(request_id, None)
                        if asked is not None:
                            self._replied(self._shard, asked[1], reply)
        except (OSError, wire.FrameError, msgspec.DecodeError, trio.ClosedResourceError):
            return
