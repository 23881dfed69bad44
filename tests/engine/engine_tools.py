"""What the tests of the shells share: a clock set by hand, a journal that can be held, a worker and its clients.

Everything is real but for time and what is named here: frames over unix sockets, journals, the read model on a directory.
"""

import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import trio
import trio.testing

from engine import planner as planning
from engine import service, wire
from engine import worker as working
from engine.core import commands, ledger, outcomes
from engine.core.slots import resolve
from engine.journal.memory import MemoryDisk, MemoryJournal, open_memory_journal
from engine.journal.sqlite import CHECKPOINT_BYTES, SEGMENT_BYTES_MAX, open_journal
from engine.planner import Planner
from engine.ports import Clock, Journal, JournalRow, Position
from engine.worker import Bounds, Worker
from readmodel.publisher import Publisher
from readmodel.reader import Reader, Row
from tests.core.shard import EVENING, NIGHT, NOON_MS, RULES, ZONE, key, van

FOREVER_MS = 2**62
"""A deadline that never passes."""
PATIENCE_SECONDS = 20
BOUNDS = Bounds(batch_commands_max=8_192, queue_ms_max=250, snapshot_every_events=1_000_000)


def model_name(shard: int) -> str:
    return f"shard-{shard:02d}"


class ManualClock(Clock):
    """Time that moves when a test says so."""

    def __init__(self, now_ms: int = NOON_MS) -> None:
        self.wall_ms = now_ms
        self.boot_ms = 1_000_000

    def now_ms(self) -> int:
        return self.wall_ms

    def monotonic_ms(self) -> int:
        return self.boot_ms

    def pass_ms(self, span_ms: int) -> None:
        self.wall_ms += span_ms
        self.boot_ms += span_ms


class TermJournal(Journal, Protocol):
    """A journal that also says which term it is."""

    @property
    def epoch(self) -> int: ...

    @property
    def restart(self) -> int: ...


class HeldJournal(Journal):
    """A journal whose appends wait, before anything is written, while a test holds it."""

    def __init__(self, journal: TermJournal) -> None:
        self.journal = journal
        self.appending = 0
        """Appends that have begun."""
        self.rows: list[JournalRow] = []
        self._free = trio.Event()
        self._free.set()

    @property
    def head(self) -> Position:
        return self.journal.head

    @property
    def epoch(self) -> int:
        return self.journal.epoch

    @property
    def restart(self) -> int:
        return self.journal.restart

    def hold(self) -> None:
        self._free = trio.Event()

    def free(self) -> None:
        self._free.set()

    async def append(self, *, count: int, at_ms: int, schema: int, body: bytes) -> JournalRow:
        self.appending += 1
        await self._free.wait()
        row = await self.journal.append(count=count, at_ms=at_ms, schema=schema, body=body)
        self.rows.append(row)
        return row

    def read(self, after: Position) -> Iterator[JournalRow]:
        return self.journal.read(after)

    async def maintain(self) -> None:
        await self.journal.maintain()

    async def close(self) -> None:
        await self.journal.close()


class Client:
    """A peer of a worker or the planner, as an api process is one."""

    def __init__(
        self,
        peer: socket.socket,
        decode: Callable[[bytes], Sequence[tuple[int, outcomes.Reply]]] = wire.shard_replies.decode,
    ) -> None:
        self.socket = peer
        self._decode = decode
        self._frames = wire.FrameReader()
        self._next_id = 0
        self.replies: dict[int, outcomes.Reply] = {}

    async def send(self, *asked: commands.Command, deadline_ms: int = FOREVER_MS) -> list[int]:
        """Ask all in one frame; returns the request ids."""
        first = self._next_id
        self._next_id += len(asked)
        await self.send_bytes(wire.frame([(first + place, deadline_ms, each) for place, each in enumerate(asked)]))
        return list(range(first, self._next_id))

    async def send_bytes(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            await trio.lowlevel.wait_writable(self.socket)
            view = view[self.socket.send(view) :]

    async def wait(self, request_ids: list[int]) -> list[outcomes.Reply]:
        """The replies to these requests."""
        with trio.fail_after(PATIENCE_SECONDS):
            while not all(each in self.replies for each in request_ids):
                await trio.lowlevel.wait_readable(self.socket)
                data = self.socket.recv(wire.RECEIVE_BYTES)
                if not data:
                    raise ConnectionResetError
                self._take(data)
        return [self.replies.pop(each) for each in request_ids]

    def _take(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            self.replies.update(self._decode(payload))

    async def ask(self, command: commands.Command, deadline_ms: int = FOREVER_MS) -> outcomes.Reply:
        """One command and its reply."""
        (reply,) = await self.wait(await self.send(command, deadline_ms=deadline_ms))
        return reply

    async def hold(self, name: str, quantity: int = 1, *, ttl_ms: int = 600_000) -> outcomes.Reply:
        return await self.ask(hold(name, quantity, ttl_ms=ttl_ms))

    def silent(self) -> bool:
        """Whether nothing has come that was not read."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    async def until_cut_off(self) -> None:
        """Read on until the other side has closed."""
        with trio.fail_after(PATIENCE_SECONDS):
            while True:
                await trio.lowlevel.wait_readable(self.socket)
                try:
                    data = self.socket.recv(wire.RECEIVE_BYTES)
                except ConnectionResetError:
                    return
                if not data:
                    return
                self._take(data)

    def close(self) -> None:
        self.socket.close()


def hold(name: str, quantity: int = 1, *, ttl_ms: int = 600_000, slot_id: str = EVENING) -> commands.Hold:
    """A hold of van stops under the key `name`."""
    return commands.Hold([van(quantity, slot_id)], ttl_ms, key(name), 1, f"SO-{name}", "web")


def counter_plan(slot_id: str, base: int, pool_code: int = 0) -> commands.CounterPlan:
    """A counter with a cut-off at its end."""
    starts_at_ms, ends_at_ms = resolve(slot_id, ZONE)
    return commands.CounterPlan(pool_code, slot_id, base, 0, 0, False, starts_at_ms, ends_at_ms, ends_at_ms)


def plan(base: int = 3) -> list[commands.ShardCommand]:
    """Two counters of one pool: `base` stops in the evening, 50 at night."""
    return [
        commands.PlanPool(1, 0, "van-north", ZONE, None),
        commands.PlanCounters(2, [counter_plan(EVENING, base), counter_plan(NIGHT, 50)]),
    ]


class Running:
    """A worker at work."""

    def __init__(
        self, worker: Worker, journal: HeldJournal, clock: ManualClock, runtime: Path, publisher: Publisher, shard: int
    ) -> None:
        self.worker = worker
        self.journal = journal
        self.clock = clock
        self.runtime = runtime
        self.publisher = publisher
        self.shard = shard
        self.ended = trio.Event()
        """`Worker.run` has returned."""
        self._clients: list[Client] = []

    @property
    def state(self) -> ledger.Ledger:
        return self.worker._ledger

    async def client(self) -> Client:
        client = Client(await service.connect(self.runtime / f"worker-{self.shard:02d}.sock"))
        self._clients.append(client)
        return client

    async def planned(self, base: int = 3) -> Client:
        """A client of the worker, which has two counters now."""
        client = await self.client()
        for command in plan(base):
            assert isinstance(await client.ask(command), outcomes.Planned)
        return client

    def shown(self, slot_id: str = EVENING) -> tuple[int, Row]:
        """The position and one counter, as any process sees them."""
        reader = Reader(self.runtime, model_name(self.shard))
        try:
            position = reader.position().seq
            row = reader.find(0, slot_id.encode())
            assert row is not None
            return position, reader.row(row)
        finally:
            reader.close()

    def position(self) -> int:
        reader = Reader(self.runtime, model_name(self.shard))
        try:
            return reader.position().seq
        finally:
            reader.close()

    async def until_appending(self, appends: int) -> None:
        """Wait until so many appends have begun and everything else has come to rest."""
        await until(lambda: self.journal.appending >= appends)
        await trio.testing.wait_all_tasks_blocked(0.01)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.publisher.close()


@asynccontextmanager
async def running_worker(
    journal: TermJournal,
    directory: Path,
    *,
    bounds: Bounds = BOUNDS,
    rules: ledger.Rules = RULES,
    clock: ManualClock | None = None,
    runtime: Path | None = None,
    shard: int = 0,
    shards: int = 1,
) -> AsyncIterator[Running]:
    """A worker as `engine.__main__.run_worker` makes it, ended without an ordered stop. The caller owns the journal.

    The other ones of `shards` workers are reached in the same runtime directory. Snapshots lie in `directory`; the socket and
    the read model too, unless there is a `runtime` directory.
    """
    runtime = directory if runtime is None else runtime
    held = HeldJournal(journal)
    clock = ManualClock() if clock is None else clock
    recovered = working.recover(held, directory)
    publisher = Publisher(runtime, model_name(shard), epoch=held.epoch, restart_count=held.restart)
    worker = Worker(
        state=recovered.state,
        journal=held,
        publisher=publisher,
        clock=clock,
        rules=rules,
        bounds=bounds,
        directory=directory,
        snapshot_seq=recovered.from_seq,
        shard=shard,
        peers={peer: runtime / f"worker-{peer:02d}.sock" for peer in range(shards) if peer != shard},
    )
    running = Running(worker, held, clock, runtime, publisher, shard)
    worker.start_term(held.epoch, held.restart)
    worker.publish_all()
    await worker.commit_first()
    listener = service.bind(runtime / f"worker-{shard:02d}.sock")

    async def run() -> None:
        await worker.run()
        running.ended.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.serve, listener, worker.take)
            nursery.start_soon(run)
            yield running
            nursery.cancel_scope.cancel()
    finally:
        running.close()


@asynccontextmanager
async def worker_on_disk(
    directory: Path,
    *,
    bounds: Bounds = BOUNDS,
    rules: ledger.Rules = RULES,
    clock: ManualClock | None = None,
    runtime: Path | None = None,
    shard: int = 0,
    shards: int = 1,
    segment_bytes_max: int = SEGMENT_BYTES_MAX,
) -> AsyncIterator[Running]:
    """A worker on the real journal, in `directory`."""
    journal = await open_journal(
        directory,
        epoch=1,
        segment_bytes_max=segment_bytes_max,
        checkpoint_bytes=min(CHECKPOINT_BYTES, segment_bytes_max // 4),
    )
    try:
        async with running_worker(
            journal, directory, bounds=bounds, rules=rules, clock=clock, runtime=runtime, shard=shard, shards=shards
        ) as running:
            yield running
    finally:
        with trio.CancelScope(shield=True):
            await journal.close()


@asynccontextmanager
async def worker_in_memory(
    directory: Path,
    *,
    disk: MemoryDisk | None = None,
    bounds: Bounds = BOUNDS,
    rules: ledger.Rules = RULES,
    clock: ManualClock | None = None,
) -> AsyncIterator[Running]:
    """A worker on the journal's twin, ended as by a crash."""
    journal: MemoryJournal = open_memory_journal(MemoryDisk() if disk is None else disk, epoch=1)
    try:
        async with running_worker(journal, directory, bounds=bounds, rules=rules, clock=clock) as running:
            yield running
    finally:
        journal.crash()


class RunningPlanner:
    """A planner at work."""

    def __init__(self, planner: Planner, journal: HeldJournal, clock: ManualClock, runtime: Path) -> None:
        self.planner = planner
        self.journal = journal
        self.clock = clock
        self.runtime = runtime
        self.ended = trio.Event()
        self._clients: list[Client] = []

    async def client(self) -> Client:
        client = Client(await service.connect(self.runtime / "planner.sock"), wire.planner_replies.decode)
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()


@asynccontextmanager
async def planner_on_disk(
    directory: Path, runtime: Path, shards: int, *, clock: ManualClock | None = None
) -> AsyncIterator[RunningPlanner]:
    """A planner as `engine.__main__.run_planner` makes it, ended without an ordered stop."""
    journal = await open_journal(directory, epoch=1)
    held = HeldJournal(journal)
    clock = ManualClock() if clock is None else clock
    try:
        planner = Planner(
            state=planning.recover(held), journal=held, directory=directory, runtime=runtime, shards=shards, clock=clock
        )
        running = RunningPlanner(planner, held, clock, runtime)
        planner.start_term(held.epoch, held.restart)
        await planner.commit()
        listener = service.bind(runtime / "planner.sock")

        async def run() -> None:
            await planner.run()
            running.ended.set()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.serve, listener, planner.take)
                nursery.start_soon(run)
                yield running
                nursery.cancel_scope.cancel()
        finally:
            running.close()
    finally:
        with trio.CancelScope(shield=True):
            await journal.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another task or process does by itself."""
    with trio.fail_after(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - no event tells of what lies on a disk or in shared memory
            await trio.sleep(0.002)
