"""The worker of one shard: the shell around the ledger that makes its decisions durable, visible and answered.

Order of one round, and why
1. Commands are decided as they arrive and their events applied at once: the open batch. Decisions see each other.
2. When the commit before has returned, the batch is sealed: what the read model will show is copied now, because the
   next batch changes the state while this one is being written. While one batch is made durable the next collects: that is
   the group commit, and it needs no timer.
3. One row is appended to the journal. If that fails, nobody knows whether it is on disk: the process is killed and
   replays. There is no undo code.
4. The counters that changed are published, then the replies are sent: who has an answer finds it in the overview.

Answers that need no event (a look, a refusal already counted) wait for the commit in flight all the same: they may rest on
decisions that are not durable yet.

Bounds: a batch takes `batch_commands_max` commands, and none at all while a commit has been running for longer than
`queue_ms_max`, or once the worker stops; the rest is refused as `overloaded`, before anything was done. Such a refusal
rests on nothing that is not durable, so it leaves at once: who asks a stalled shard need not wait for the disk to hear no.

Not promised: fairness between connections, or an answer after the caller's deadline.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structlog
import trio
from numpy.typing import NDArray

from engine import codec, wire
from engine.child import die
from engine.core import commands, events, ledger, outcomes
from engine.core.columns import CounterTable
from engine.core.coordinator import Coordinator, Effects, Message, Request
from engine.core.invariant import InvariantError, invariant
from engine.core.outcomes import Outcome
from engine.failpoints import failpoint
from engine.peers import Peer
from engine.ports import GENESIS, Clock, Journal, JournalRow, JournalWriteError, Position
from engine.service import Connection
from engine.snapshot import Frozen, SnapshotFile, load_newest, remove_unfinished
from readmodel.layout import STATE_SERVING, VALUE_FIELDS, VALUES
from readmodel.publisher import Publisher

log: structlog.stdlib.BoundLogger = structlog.get_logger("worker")

EXPIRY_TICK_S = 0.05
"""How late the overview may show units of an expired hold as taken while nothing else happens on the shard. Decisions
never wait for it: each frees what is due first."""
HEARTBEAT_TICK_S = 0.1
COORDINATOR_TICK_S = 0.05
"""How late an attempt's deadline may be noticed. Nothing safe or lasting depends on it."""
HOUSEKEEPING_TICK_S = 1.0
PUBLISH_ONE_BY_ONE_MAX = 48
"""Up to here single rows are published faster than the arrays of a vectorised publication are set up."""
DISK_RESERVE_BYTES = 64 * 1024 * 1024
"""Below this much free space new reservations are refused, so that releases, confirms and expiries keep working."""

_ALWAYS_TAKEN = (
    commands.Look,
    commands.LookCounters,
    commands.ShardStatus,
    commands.PlanningHead,
    commands.PlanPool,
    commands.PlanCounters,
)
"""Reads, and what the planner brings: one at a time, and an overloaded shard is where a slot must be closed now."""
_TAKES_UNITS = (commands.Hold, commands.Move, commands.Prepare)
_STEPS = (commands.Confirm, commands.Release, commands.Extend, commands.Fulfil, commands.Look)

EXPIRY_STEPS_MAX = 2
"""`expired` events of 16,384 holds each in one batch: then it is sealed, and other work gets its turn."""


class Bounds(NamedTuple):
    """What an operator may set, from the configuration."""

    batch_commands_max: int
    queue_ms_max: int
    snapshot_every_events: int


class Statistics(NamedTuple):
    """What a worker has done since it started."""

    commands: int
    """Commands decided, whatever the outcome."""
    events: int
    """Events made durable."""
    commits: int
    """Rows appended: events / commits is the mean batch."""
    overloaded: int
    """Commands refused because the batch was full or the commit before took too long."""
    too_late: int
    """Commands dropped because their deadline had passed when they arrived."""
    snapshots: int
    """Snapshots completed."""


class _Sealed(NamedTuple):
    events: list[events.ShardEvent]
    at_ms: int
    replies: dict[Connection, list[tuple[int, outcomes.Reply]]]
    news: dict[int, list[commands.Command]]
    changed: list[tuple[int, tuple[int, ...]]]
    changed_many: tuple[NDArray[np.int64], NDArray[np.int64]] | None
    frozen: Frozen | None


class Worker:
    """One shard's only writer."""

    def __init__(
        self,
        *,
        state: ledger.Ledger,
        journal: Journal,
        publisher: Publisher,
        clock: Clock,
        rules: ledger.Rules,
        bounds: Bounds,
        directory: Path,
        snapshot_seq: int,
        shard: int,
        peers: dict[int, Path],
    ) -> None:
        """`snapshot_seq` is the last event of the snapshot that `state` was recovered from, 0 without one."""
        self._ledger = state
        self._coordinator = Coordinator(shard, len(peers) + 1)
        self._peers = {peer: Peer(peer, path, clock, self._replied) for peer, path in peers.items()}
        self._news: dict[int, list[commands.Command]] = {}
        self._expiring = False
        self._expiry_steps = 0
        self._due = trio.Event()
        self._room = trio.Event()
        self._postponed: list[Request] = []
        self._journal = journal
        self._publisher = publisher
        self._clock = clock
        self._rules = rules
        self._bounds = bounds
        self._directory = directory
        self._events: list[events.ShardEvent] = []
        self._replies: dict[Connection, list[tuple[int, outcomes.Reply]]] = {}
        self._commands_open = 0
        self._open_at_ms = 0
        self._commit_began_ms: int | None = None
        self._wake = trio.Event()
        self._stopping = False
        self._published_rows = 0
        self._forget_from = 0
        self._snapshot_seq = snapshot_seq
        self._snapshot_running = False
        self._disk_low = False
        self._counts = {"commands": 0, "events": 0, "commits": 0, "overloaded": 0, "too_late": 0, "snapshots": 0}

    def statistics(self) -> Statistics:
        """What this worker has done so far."""
        return Statistics(**self._counts)

    # --- deciding: never waits ----------------------------------------------------------------------------------------

    def take(self, connection: Connection, payload: bytes) -> None:
        """Decide the commands of one frame into the open batch. A broken invariant ends the process here and now."""
        try:
            self._take(connection, wire.shard_commands.decode(payload))
        except InvariantError as error:
            die(f"broken invariant: {error}")

    def _take(self, connection: Connection, messages: list[tuple[int, int, commands.ShardCommand]]) -> None:
        monotonic_ms = self._clock.monotonic_ms()
        overloaded = (
            self._commit_began_ms is not None and monotonic_ms - self._commit_began_ms > self._bounds.queue_ms_max
        )
        decided: list[tuple[int, outcomes.Reply]] = []
        not_looked_at: list[tuple[int, outcomes.Reply]] = []
        now_ms = self._begin()
        for request_id, deadline_ms, command in messages:
            if deadline_ms < monotonic_ms:
                self._counts["too_late"] += 1
                not_looked_at.append((request_id, self._refused(Outcome.DEADLINE_PASSED)))
            elif self._stopping or (
                (overloaded or self._commands_open >= self._bounds.batch_commands_max)
                and not isinstance(command, _ALWAYS_TAKEN)
            ):
                self._counts["overloaded"] += 1
                not_looked_at.append((request_id, self._refused(Outcome.OVERLOADED)))
            else:
                self._commands_open += 1
                self._counts["commands"] += 1
                if self._expiring or self._coordinator.concerns(self._ledger, command):
                    self._handle(Request(command, deadline_ms, (connection, request_id)))
                elif isinstance(command, commands.Doubt):
                    self._follow(self._coordinator.doubt(self._ledger, command))
                    decided.append((request_id, outcomes.Planned(self._ledger.seq, self._ledger.planning_seq)))
                else:
                    decided.append((request_id, self._decide(command, now_ms)))
        if not_looked_at:
            connection.send(wire.frame(not_looked_at))
        if decided:
            self._replies.setdefault(connection, []).extend(decided)
        self._wake.set()

    def _handle(self, request: Request) -> None:
        """A command that needs other shards, or one that comes while more holds have expired than could be freed at once.

        In that case it sees its own reservation as it should be, and what would be refused for lack of units waits until all
        that is due has been freed.
        """
        command = request.command
        if self._expiring:
            if isinstance(command, _STEPS):
                self._free(ledger.expire_one(self._ledger, command.number, self._open_at_ms))
            elif isinstance(command, _TAKES_UNITS):
                self._postpone(request)
                return
        if self._coordinator.concerns(self._ledger, command):
            self._coordinate(request)
        elif isinstance(command, commands.Doubt):
            self._follow(self._coordinator.doubt(self._ledger, command))
            self._answer(request, outcomes.Planned(self._ledger.seq, self._ledger.planning_seq))
        else:
            self._answer(request, self._decide(command, self._open_at_ms))

    def _postpone(self, request: Request) -> None:
        if isinstance(request.command, commands.Hold) and not self._coordinator.concerns(self._ledger, request.command):
            reply, made = ledger.decide(self._ledger, request.command, self._open_at_ms, self._rules)
            if not isinstance(reply, outcomes.Refused) or reply.outcome is not Outcome.INSUFFICIENT_CAPACITY:
                for event in made:
                    self._apply(event, self._open_at_ms)
                self._answer(request, reply)
                return
        if len(self._postponed) >= self._bounds.batch_commands_max:
            self._counts["overloaded"] += 1
            self._answer(request, self._refused(Outcome.OVERLOADED))
        else:
            self._postponed.append(request)

    def _answer(self, request: Request, reply: outcomes.Reply) -> None:
        connection, request_id = request.waiter
        self._replies.setdefault(connection, []).append((request_id, reply))

    def _refused(self, outcome: Outcome) -> outcomes.Refused:
        """A refusal that leaves at once, so its position is the durable one."""
        return outcomes.Refused(self._journal.head.seq, outcome)

    def _begin(self) -> int:
        """Read the clock for the open batch, unless it has events: they all have one time, never before the batch before.

        Called once by whatever comes in from outside, so that a decision and its events see the same instant.
        """
        if not self._events:
            self._open_at_ms = max(self._ledger.at_ms, self._clock.now_ms())
        self._expire()
        return self._open_at_ms

    def _decide(self, command: commands.ShardCommand, now_ms: int) -> outcomes.Reply:
        reply, made = ledger.decide(self._ledger, command, now_ms, self._rules)
        if made and self._disk_low and isinstance(command, _TAKES_UNITS):
            # Only what would be written is refused: a retry of what was taken before still hears that it was taken.
            return outcomes.Refused(self._ledger.seq, Outcome.SHARD_FULL)
        for event in made:
            self._apply(event, now_ms)
        return reply

    def _expire(self) -> None:
        """Free what is due, a bounded number at once: the rest is freed by `_free_the_rest`, with other work in between."""
        expiry = self._ledger.expiry
        while self._expiry_steps < EXPIRY_STEPS_MAX and expiry.is_due(self._open_at_ms):
            self._expiry_steps += 1
            self._free(ledger.expire(self._ledger, self._open_at_ms))
        self._expiring = expiry.is_due(self._open_at_ms)
        if self._expiring:
            self._due.set()

    def _free(self, expired: events.Expired | None) -> None:
        """Holds have expired, which ends attempts on them."""
        if expired is not None:
            self._apply(expired, self._open_at_ms)
            self._follow(self._coordinator.expired(self._ledger, expired))

    def _apply(self, event: events.ShardEvent, at_ms: int) -> None:
        ledger.apply(self._ledger, event, at_ms)
        self._events.append(event)

    # --- other shards -------------------------------------------------------------------------------------------------

    def _coordinate(self, request: Request) -> None:
        if self._disk_low and isinstance(request.command, _TAKES_UNITS):
            self._answer(request, outcomes.Refused(self._ledger.seq, Outcome.SHARD_FULL))
            return
        effects = self._coordinator.submit(
            self._ledger, request, self._open_at_ms, self._rules, self._clock.monotonic_ms()
        )
        self._follow(effects)

    def _replied(self, shard: int, asked: commands.Command, reply: outcomes.Reply) -> None:
        """Another shard has answered. A broken invariant ends the process here and now."""
        try:
            now_ms = self._begin()
            if isinstance(asked, commands.Prepare):
                effects = self._coordinator.prepared(self._ledger, shard, asked, reply, now_ms, self._rules)
                self._follow(effects)
            elif isinstance(asked, commands.Sync):
                self._follow(self._coordinator.synced(self._ledger, shard, asked, reply))
        except InvariantError as error:
            die(f"broken invariant: {error}")
        self._wake.set()

    def _follow(self, effects: Effects) -> None:
        """Do what the coordinator asks for, in its order."""
        for event in effects.made:
            self._apply(event, self._open_at_ms)
        for waiter, reply in effects.answers:
            connection, request_id = waiter
            self._replies.setdefault(connection, []).append((request_id, reply))
        self._send(effects.messages)
        for request in effects.again:
            self._handle(request)

    def _send(self, messages: tuple[Message, ...]) -> None:
        now: dict[int, list[commands.Command]] = {}
        for shard, command, after_commit in messages:
            (self._news if after_commit else now).setdefault(shard, []).append(command)
        for shard, asked in now.items():
            self._peers[shard].send(asked)

    # --- committing ---------------------------------------------------------------------------------------------------

    def _seal(self, *, may_freeze: bool = True) -> _Sealed:
        for number in dict.fromkeys(self._ledger.news):
            self._send(self._coordinator.news(self._ledger, number, self._clock.monotonic_ms()))
        self._ledger.news.clear()
        made, replies, news = self._events, self._replies, self._news
        self._events, self._replies, self._news = [], {}, {}
        self._commands_open = 0
        self._expiry_steps = 0
        self._room.set()
        self._room = trio.Event()
        touched = self._ledger.touched
        changed: list[tuple[int, tuple[int, ...]]] = []
        changed_many = None
        counters = self._ledger.counters
        if len(touched) <= PUBLISH_ONE_BY_ONE_MAX:
            changed = [(row, ledger.counter_values(counters, row)) for row in sorted(touched)]
        else:
            rows = np.fromiter(touched, np.int64, len(touched))
            rows.sort()
            changed_many = rows, _published_many(counters, rows)
        touched.clear()
        frozen = None
        if (
            self._ledger.seq - self._snapshot_seq >= self._bounds.snapshot_every_events
            and not self._snapshot_running
            and may_freeze
            and made
        ):
            self._snapshot_running = True
            self._snapshot_seq = self._ledger.seq
            frozen = Frozen(self._ledger)
        return _Sealed(made, self._open_at_ms, replies, news, changed, changed_many, frozen)

    async def _commit(self, sealed: _Sealed) -> None:
        """Steps 3 and 4 of a round."""
        if sealed.events:
            self._commit_began_ms = self._clock.monotonic_ms()
            failpoint("before_append")
            # The home: other shards have agreed to what this batch decides.
            failpoint(
                "before_append_of_decision", lambda: any(getattr(event, "parts", None) for event in sealed.events)
            )
            try:
                row = await self._journal.append(
                    count=len(sealed.events),
                    at_ms=sealed.at_ms,
                    schema=events.SCHEMA,
                    body=codec.encode(sealed.events),
                )
            except JournalWriteError as error:
                die(f"the outcome of a write is unknown: {error}")
            failpoint("after_append")
            # Another shard: its part is pinned, and the home waits for the answer.
            failpoint(
                "after_append_of_part", lambda: any(isinstance(event, events.PartPrepared) for event in sealed.events)
            )
            self._commit_began_ms = None
            self._counts["commits"] += 1
            self._counts["events"] += row.count
            self._publish(sealed, row)
            failpoint("after_publish")
        for connection, replies in sealed.replies.items():
            if replies:
                connection.send(wire.frame(replies))
        for shard, asked in sealed.news.items():
            self._peers[shard].send(asked)

    def _publish(self, sealed: _Sealed, row: JournalRow) -> None:
        counters = self._ledger.counters
        for counter, values in sealed.changed:
            if counter >= self._published_rows:
                self._append_published(counters, counter, values)
            else:
                self._publisher.publish(counter, values)
        if sealed.changed_many is not None:
            rows, columns = sealed.changed_many
            known = int(np.searchsorted(rows, self._published_rows))
            self._publisher.publish_many(rows[:known], columns[:known])
            for counter, values in zip(rows[known:].tolist(), columns[known:].tolist(), strict=True):
                self._append_published(counters, counter, tuple(values))
        self._publisher.set_position(row.end.seq, row.at_ms)

    def _append_published(self, counters: CounterTable, counter: int, values: tuple[int, ...]) -> None:
        row = self._publisher.append(
            counters.pool_code[counter],
            counters.slot_id[counter].encode(),
            counters.starts_at_ms[counter],
            counters.ends_at_ms[counter],
            values,
        )
        invariant(row == counter, "rows of the read model are rows of the ledger")
        self._published_rows = row + 1

    def publish_all(self) -> None:
        """Publish the whole state into a fresh generation of the read model and make it the live one.

        Before the first decision: the open batch may hold the event that begins the term, which changes no counter. The
        position is the durable one all the same.
        """
        counters = self._ledger.counters
        if len(counters):
            self._publisher.append_many(
                counters.view("pool_code"),
                np.array(counters.slot_id, dtype="S"),
                counters.view("starts_at_ms"),
                counters.view("ends_at_ms"),
                _published_many(counters, np.arange(len(counters))),
            )
        self._published_rows = len(counters)
        self._ledger.touched.clear()
        self._ledger.news.clear()
        self._publisher.set_position(self._journal.head.seq, self._ledger.at_ms)
        self._publisher.heartbeat(self._clock.monotonic_ms())
        self._publisher.set_state(STATE_SERVING)
        self._publisher.switch()

    async def _write_snapshot(self, frozen: Frozen, position: Position) -> None:
        """Write a frozen state away, a section at a time, in a thread. A full disk costs the snapshot, nothing else."""
        sections = frozen.sections(position)
        try:
            file = await trio.to_thread.run_sync(SnapshotFile, self._directory, frozen.seq)
            try:
                for section in sections:
                    await trio.to_thread.run_sync(file.add, section)
                await trio.to_thread.run_sync(file.finish)
                self._counts["snapshots"] += 1
            except BaseException:
                file.drop()
                raise
        except OSError as error:
            log.warning("a snapshot could not be written: a restart would take longer", error=str(error))
            for _ in sections:
                await trio.lowlevel.checkpoint()
        finally:
            self._snapshot_running = False

    # --- tasks --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Commit until `stop`. The open batch is committed before this returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick_expiry)
            nursery.start_soon(self._tick_heartbeat)
            nursery.start_soon(self._tick_housekeeping)
            nursery.start_soon(self._tick_coordinator)
            nursery.start_soon(self._free_the_rest)
            for peer in self._peers.values():
                nursery.start_soon(peer.run)
            while True:
                if not self._replies and not self._events and not self._news:
                    if self._stopping:
                        break
                    await self._wake.wait()
                    self._wake = trio.Event()
                # One look at the sockets: what has arrived by now shares this commit. Under load that makes batches
                # larger and so everything cheaper; an idle shard pays some microseconds.
                await trio.lowlevel.checkpoint()
                sealed = self._seal()
                await self._commit(sealed)
                if sealed.frozen is not None:
                    nursery.start_soon(self._write_snapshot, sealed.frozen, self._journal.head)
                await self._journal.maintain()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Take nothing any more, and let `run` return once everything taken has been committed and answered."""
        self._stopping = True
        self._wake.set()

    def start_term(self, epoch: int, restart: int) -> None:
        """Open the first batch with the event that begins this worker's term."""
        self._open_at_ms = max(self._ledger.at_ms, self._clock.now_ms())
        self._apply(events.TermStarted(epoch, restart), self._open_at_ms)

    async def commit_first(self) -> None:
        """Commit the first batch before anybody is served: it proves that the disk takes writes.

        No snapshot yet, however due: it would keep the callers of a shard that just came back waiting.
        """
        await self._commit(self._seal(may_freeze=False))

    async def _tick_expiry(self) -> None:
        while True:
            await trio.sleep(EXPIRY_TICK_S)
            next_ms = self._ledger.expiry.next_ms()
            if next_ms is not None and next_ms <= self._clock.now_ms():
                self._begin()
                self._wake.set()

    async def _free_the_rest(self) -> None:
        """After a mass expiry: free step by step, look at the sockets in between, then decide what had to wait."""
        while True:
            await self._due.wait()
            self._due = trio.Event()
            while self._expiring:
                self._begin()
                self._wake.set()
                if self._events:
                    await self._room.wait()
                else:
                    self._expiry_steps = 0
                    await trio.lowlevel.checkpoint()
            postponed, self._postponed = self._postponed, []
            monotonic_ms = self._clock.monotonic_ms()
            self._begin()
            for request in postponed:
                if request.deadline_ms < monotonic_ms:
                    self._counts["too_late"] += 1
                    self._answer(request, self._refused(Outcome.DEADLINE_PASSED))
                else:
                    self._handle(request)
            self._wake.set()

    async def _tick_coordinator(self) -> None:
        while True:
            await trio.sleep(COORDINATOR_TICK_S)
            self._begin()
            effects = self._coordinator.tick(self._ledger, self._clock.monotonic_ms())
            if any(effects):
                self._follow(effects)
                self._wake.set()

    async def _tick_heartbeat(self) -> None:
        while True:
            self._publisher.heartbeat(self._clock.monotonic_ms())
            await trio.sleep(HEARTBEAT_TICK_S)

    async def _tick_housekeeping(self) -> None:
        while True:
            await trio.sleep(HOUSEKEEPING_TICK_S)
            event, self._forget_from = ledger.forget(self._ledger, self._forget_from, self._clock.now_ms(), self._rules)
            if event is not None:
                self._apply(event, self._begin())
                self._wake.set()
            disk = os.statvfs(self._directory)
            disk_low = disk.f_bavail * disk.f_frsize < DISK_RESERVE_BYTES
            if disk_low != self._disk_low:
                self._disk_low = disk_low
                log.warning("disk space is low: new reservations are refused" if disk_low else "disk space is back")


_COLUMNS = tuple({"flags": "closed", "seq": "changed_seq"}.get(field, field) for field in VALUE_FIELDS)
"""The ledger's columns in the order of the read model's values. `flags` has one bit: closed."""


def _published_many(counters: CounterTable, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """As `ledger.counter_values`, for many rows: shape (rows, VALUES)."""
    columns = np.empty((len(rows), VALUES), np.int64)
    for place, field in enumerate(_COLUMNS):
        columns[:, place] = counters.view(field)[rows]
    return columns


class Recovered(NamedTuple):
    """What recovery found."""

    state: ledger.Ledger
    from_seq: int
    """The snapshot's last event; 0 without one."""
    events_replayed: int
    warnings: list[str]


def recover(journal: Journal, directory: Path) -> Recovered:
    """The state of a shard: the newest good snapshot and every event after it.

    The journal's lock is held, so what a killed worker left of a snapshot is nobody's now and is removed.
    Raises `JournalCorruptError` where the journal does not carry the state up to where it had got.
    """
    remove_unfinished(directory)
    state, position, warnings = load_newest(directory)
    from_seq = state.seq
    replayed = 0
    for row in journal.read(GENESIS if position is None else position):
        for event in codec.decode_shard(row):
            ledger.apply(state, event, row.at_ms)
        replayed += row.count
    return Recovered(state, from_seq, replayed, warnings)
