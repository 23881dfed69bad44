"""The planner: the one writer of pools and counter definitions, and the one that carries them to the shards.

Order of one change, and why
1. Decided against the catalogue, made durable in the planner's own journal: from here on it will happen.
2. Carried to every shard it concerns, in journal order, each shard answering up to which `planning_seq` it has everything.
   What was sent is always read back from the journal, so there is no queue in memory that a crash could lose.
3. Answered when all shards have it: who has the answer can reserve.

A shard that is down stops nobody but itself: its changes wait in the journal. The caller's deadline passes and it hears
`outcome_unknown`; sending the change again is harmless.

A shard that has plans which the planner's journal does not know proves that this journal has lost its end. The planner then
halts: what it would define next, that shard would take for something it has already.

The pools are shown to the api processes as a JSON file in the runtime directory, replaced as a whole (`engine.catalogue_file`).

Not promised: that two shards take over one change at the same instant.
"""

from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog
import trio

from engine import catalogue_file, codec, service, wire
from engine.catalogue_file import CatalogueShown, PoolShown
from engine.child import die
from engine.core import catalogue, commands, events, outcomes
from engine.core.outcomes import Outcome
from engine.failpoints import failpoint
from engine.journal.tail import JournalReader
from engine.ports import GENESIS, Clock, Journal, JournalCorruptError, JournalWriteError, Position
from engine.service import Connection

log: structlog.stdlib.BoundLogger = structlog.get_logger("planner")

RECONNECT_S_MIN = 0.01
RECONNECT_S_MAX = 0.5
SHIP_TIMEOUT_S = 30.0
"""A shard that has not answered a change by then is asked anew over another connection."""
ROWS_AT_ONCE = 64
COMMANDS_OPEN_MAX = 1_000
WAITING_MAX = 10_000


class _Waiting(NamedTuple):
    planning_seq: int
    connection: Connection
    request_id: int
    deadline_ms: int
    reply: outcomes.Reply


class Planner:
    """The only writer of the planner's journal."""

    def __init__(
        self,
        *,
        state: catalogue.Catalogue,
        journal: Journal,
        directory: Path,
        runtime: Path,
        shards: int,
        clock: Clock,
    ) -> None:
        self._catalogue = state
        self._journal = journal
        self._directory = directory
        self._runtime = runtime
        self._shards = shards
        self._clock = clock
        self._events: list[events.PlannerEvent] = []
        self._replies: list[_Waiting] = []
        self._waiting: list[_Waiting] = []
        self._reached = [0] * shards
        self._wake = trio.Event()
        self._committed = [trio.Event() for _ in range(shards)]
        self._stopping = False
        self._open_at_ms = 0

    def take(self, connection: Connection, payload: bytes) -> None:
        """Decide the commands of one frame into the open batch."""
        monotonic_ms = self._clock.monotonic_ms()
        for request_id, deadline_ms, command in wire.planner_commands.decode(payload):
            if deadline_ms < monotonic_ms:
                reply: outcomes.Reply = outcomes.Refused(self._catalogue.seq, Outcome.DEADLINE_PASSED)
            elif isinstance(command, commands.PlannerStatus):
                reply = self._status()
            elif len(self._replies) >= COMMANDS_OPEN_MAX or self._too_many_wait(monotonic_ms):
                reply = outcomes.Refused(self._catalogue.seq, Outcome.OVERLOADED)
            else:
                reply = self._decide(command)
            self._replies.append(_Waiting(self._catalogue.seq, connection, request_id, deadline_ms, reply))
        self._wake.set()

    def _too_many_wait(self, monotonic_ms: int) -> bool:
        """Whether WAITING_MAX callers wait. Those who no longer do, for a shard long down, are forgotten first."""
        if len(self._waiting) >= WAITING_MAX:
            self._waiting = [
                waiting
                for waiting in self._waiting
                if waiting.deadline_ms >= monotonic_ms and not waiting.connection.closed
            ]
        return len(self._waiting) >= WAITING_MAX

    def _status(self) -> outcomes.Status:
        values: dict[str, int | str] = {"pools": len(self._catalogue.pools)}
        values |= {f"shard_{shard}_reached": reached for shard, reached in enumerate(self._reached)}
        return outcomes.Status(self._catalogue.seq, values)

    def _decide(self, command: commands.PutPool | commands.PutCounters) -> outcomes.Reply:
        if not self._events:
            self._open_at_ms = max(self._catalogue.at_ms, self._clock.now_ms())
        reply, made = catalogue.decide(self._catalogue, command)
        for event in made:
            self._apply(event)
        return reply

    def _apply(self, event: events.PlannerEvent) -> None:
        catalogue.apply(self._catalogue, event, self._open_at_ms)
        self._events.append(event)

    def start_term(self, epoch: int, restart: int) -> None:
        """Open the first batch with the event that begins this planner's term."""
        self._open_at_ms = max(self._catalogue.at_ms, self._clock.now_ms())
        self._apply(events.TermStarted(epoch, restart))

    async def commit(self) -> None:
        """Make the open batch durable and show it. Its answers wait for the shards."""
        made, replies = self._events, self._replies
        self._events, self._replies = [], []
        if made:
            failpoint("planner_before_append")
            try:
                await self._journal.append(
                    count=len(made), at_ms=self._open_at_ms, schema=events.SCHEMA, body=codec.encode(made)
                )
            except JournalWriteError as error:
                die(f"the outcome of a write is unknown: {error}")
            failpoint("planner_after_append")
            self.show()
            for committed in self._committed:
                committed.set()
        for waiting in replies:
            if isinstance(waiting.reply, outcomes.Defined) and min(self._reached) < waiting.planning_seq:
                self._waiting.append(waiting)
            else:
                waiting.connection.send(wire.frame([(waiting.request_id, waiting.reply)]))

    def show(self) -> None:
        """Replace the file of pools."""
        pools = [PoolShown(*pool) for pool in self._catalogue.pools.values()]
        catalogue_file.write(self._runtime, CatalogueShown(self._catalogue.seq, pools))

    async def run(self) -> None:
        """Commit and carry until `stop`."""
        async with trio.open_nursery() as nursery:
            for shard in range(self._shards):
                nursery.start_soon(self._carry, shard)
            while True:
                if not self._replies and not self._events:
                    if self._stopping:
                        break
                    await self._wake.wait()
                    self._wake = trio.Event()
                await self.commit()
                await self._journal.maintain()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Let `run` return once everything taken is durable."""
        self._stopping = True
        self._wake.set()

    async def _carry(self, shard: int) -> None:
        """Bring everything to one shard, for ever."""
        pause_s = RECONNECT_S_MIN
        while True:
            try:
                peer = await service.connect(self._runtime / f"worker-{shard:02d}.sock")
            except OSError:
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 2, RECONNECT_S_MAX)
                continue
            pause_s = RECONNECT_S_MIN
            connection = Connection(peer)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.write_rest)
                    await self._carry_over(shard, connection)
            except* (
                OSError,
                wire.FrameError,
                msgspec.DecodeError,
                trio.TooSlowError,
                trio.ClosedResourceError,
            ) as gone:
                log.info("a shard went away: connecting anew", shard=shard, error=str(gone.exceptions[0]))
            finally:
                connection.close()
            await trio.sleep(pause_s)

    async def _carry_over(self, shard: int, connection: Connection) -> None:
        """Bring everything to one shard over one connection. Raises when the shard goes away.

        Raises JournalCorruptError when the shard has plans that this planner's journal does not hold.
        """
        frames = wire.FrameReader()

        async def ask(command: commands.ShardCommand) -> int:
            deadline_ms = self._clock.monotonic_ms() + int(SHIP_TIMEOUT_S * 1000)
            connection.send(wire.frame([(0, deadline_ms, command)]))
            with trio.fail_after(SHIP_TIMEOUT_S):
                while data := await connection.receive():
                    for payload in frames.feed(data):
                        ((_, reply),) = wire.shard_replies.decode(payload)
                        if isinstance(reply, outcomes.Planned):
                            return reply.planning_seq
                        raise wire.FrameError(f"shard {shard} does not take a plan: {reply}")
            raise ConnectionResetError(f"shard {shard} closed the connection")

        with JournalReader(self._directory) as reader:
            reached = await ask(commands.PlanningHead())
            holding = reader.row_holding(reached)
            if reached and holding is None:
                raise JournalCorruptError(
                    f"{self._directory}: shard {shard} has planning events up to {reached}, this journal ends at "
                    f"{self._journal.head.seq}: it has lost its end. Restore it from a backup at least as new as the shards"
                )
            position = GENESIS if holding is None else Position(holding.seq - 1, holding.prev_hash)
            while True:
                committed = self._committed[shard] = trio.Event()
                while rows := reader.rows(position, rows_max=ROWS_AT_ONCE):
                    for row in rows:
                        for index, event in enumerate(codec.decode_planner(row)):
                            planning_seq = row.seq + index
                            command = catalogue.command_for_shard(
                                event, planning_seq, shard, self._shards, self._catalogue.pool_of_code
                            )
                            if command is None or planning_seq <= reached:
                                continue
                            answered = await ask(command)
                            if answered < planning_seq:
                                raise wire.FrameError(f"shard {shard} answered {answered} to plan {planning_seq}")
                        position = row.end
                        self._reach(shard, row.end.seq)
                await committed.wait()

    def _reach(self, shard: int, planning_seq: int) -> None:
        """A shard has everything up to here: answer who waited for the last one."""
        self._reached[shard] = planning_seq
        everywhere = min(self._reached)
        left = []
        for waiting in self._waiting:
            if waiting.planning_seq <= everywhere:
                waiting.connection.send(wire.frame([(waiting.request_id, waiting.reply)]))
            else:
                left.append(waiting)
        self._waiting = left


def recover(journal: Journal) -> catalogue.Catalogue:
    """The catalogue as its journal tells it. Raises `JournalCorruptError`."""
    state = catalogue.Catalogue()
    for row in journal.read(GENESIS):
        for event in codec.decode_planner(row):
            catalogue.apply(state, event, row.at_ms)
    return state
