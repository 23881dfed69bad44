"""The planner: what it has defined reaches every shard, in order, exactly once, whatever dies in between."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from engine import codec, service, wire
from engine import planner as planning
from engine.catalogue_file import CatalogueReader, CatalogueShown, PoolShown, write
from engine.core import catalogue, commands, events, outcomes
from engine.core.commands import CounterPut
from engine.core.outcomes import Outcome
from engine.core.sharding import shard_of_counter
from engine.journal.tail import JournalReader
from engine.ports import JournalCorruptError
from engine.service import Connection
from tests.core.shard import ZONE, outcome_of
from tests.engine.engine_tools import (
    PATIENCE_SECONDS,
    Client,
    Running,
    RunningPlanner,
    hold,
    planner_on_disk,
    until,
    worker_in_memory,
    worker_on_disk,
)

SHARDS = 2
SLOTS = [f"2026-12-{day:02d}T18:00-20:00" for day in range(1, 29)]


def pool(pool_id: str, *, zone: str = "north", cutoff_minutes: int | None = None) -> commands.PutPool:
    cutoff = None if cutoff_minutes is None else (cutoff_minutes, None, None)
    return commands.PutPool(pool_id, "delivery", "stops", zone, ZONE, cutoff)


def put(pool_id: str, base: int, slots: list[str], if_version: int | None = None) -> commands.PutCounters:
    return commands.PutCounters([CounterPut(pool_id, slot_id, base) for slot_id in slots], if_version=if_version)


class Place:
    """Directories of an engine of two shards, and its processes while they run."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.runtime = base / "runtime"
        self.runtime.mkdir(mode=0o700)

    def shard(self, shard: int) -> Path:
        return self.base / f"shard-{shard:02d}"

    @asynccontextmanager
    async def worker(self, shard: int) -> AsyncIterator[Running]:
        async with worker_on_disk(self.shard(shard), runtime=self.runtime, shard=shard) as running:
            yield running

    @asynccontextmanager
    async def workers(self) -> AsyncIterator[list[Running]]:
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(self.worker(shard)) for shard in range(SHARDS)]

    @asynccontextmanager
    async def planner(self) -> AsyncIterator[RunningPlanner]:
        async with planner_on_disk(self.base / "planning", self.runtime, SHARDS) as running:
            yield running

    def planned_on(self, shard: int) -> list[tuple[int, object]]:
        """What the shard's journal says it was told, in order."""
        told: list[tuple[int, object]] = []
        with JournalReader(self.shard(shard)) as reader:
            for row in reader.follow(None):
                for event in codec.decode_shard(row):
                    if isinstance(event, events.PoolDefined):
                        told.append(
                            (event.planning_seq, (event.pool_code, event.pool_id, event.time_zone, event.cutoff))
                        )
                    elif isinstance(event, events.CountersDefined):
                        told.append((event.planning_seq, event.counters))
        return told

    def due_to(self, shard: int) -> list[tuple[int, object]]:
        """What the planner's journal says the shard must be told, in order."""
        due: list[tuple[int, object]] = []
        state = catalogue.Catalogue()
        with JournalReader(self.base / "planning") as reader:
            for row in reader.follow(None):
                for event in codec.decode_planner(row):
                    catalogue.apply(state, event, row.at_ms)
                    if isinstance(event, events.PoolPut):
                        due.append((state.seq, (event.pool_code, event.pool_id, event.time_zone, event.cutoff)))
                    elif isinstance(event, events.CountersPut):
                        mine = [
                            counter
                            for counter in event.counters
                            if shard_of_counter(state.pool_of_code[counter[0]], counter[1], SHARDS) == shard
                        ]
                        due += [(state.seq, mine)] if mine else []
        return due

    def check(self) -> None:
        """Each shard was told exactly what it had to be told, in order, once."""
        for shard in range(SHARDS):
            assert self.planned_on(shard) == self.due_to(shard)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def define(client: Client, *asked: commands.PutPool | commands.PutCounters) -> None:
    for command in asked:
        reply = await client.ask(command)
        assert isinstance(reply, outcomes.Defined), reply


async def until_reached(planner: RunningPlanner) -> None:
    await until(lambda: min(planner.planner._reached) == planner.journal.head.seq)


# --- reaching every shard -----------------------------------------------------------------------------------------------


async def test_an_answer_means_that_every_shard_can_reserve(place: Place) -> None:
    async with place.workers() as workers, place.planner() as planner:
        client = await planner.client()
        await define(client, pool("van-north"), put("van-north", 2, SLOTS))
        for worker in workers:
            mine = [each for each in SLOTS if shard_of_counter("van-north", each, SHARDS) == worker.shard]
            assert len(worker.state.counters) == len(mine) > 0
            asking = await worker.client()
            for slot_id in mine:
                assert outcome_of(await asking.ask(hold(slot_id[:16], 2, slot_id=slot_id))) is Outcome.HELD
    place.check()


async def test_the_answer_waits_for_the_last_shard(place: Place) -> None:
    async with place.worker(0) as first, place.planner() as planner:
        client = await planner.client()
        asked = await client.send(pool("van-north"))
        await until(lambda: "van-north" in first.state.pools)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert client.silent()
        assert planner.journal.head.seq == 2, "it is durable, and will happen"
        async with place.worker(1) as second:
            (reply,) = await client.wait(asked)
            assert isinstance(reply, outcomes.Defined)
            assert "van-north" in second.state.pools
    place.check()


async def test_a_shard_that_was_down_gets_everything_it_missed(place: Place) -> None:
    async with place.worker(0), place.planner() as planner:
        client = await planner.client()
        asked = await client.send(pool("van-north"))
        for number in range(60):
            asked += await client.send(put("van-north", number, SLOTS[: 1 + number % 7]))
            if number % 10 == 0:
                asked += await client.send(pool("van-north", cutoff_minutes=number))
        await until(lambda: planner.planner._reached[0] == planner.journal.head.seq > 60)
        assert client.silent()
        async with place.worker(1):
            assert {type(reply) for reply in await client.wait(asked)} == {outcomes.Defined}
            assert (planner.planner._waiting, min(planner.planner._reached)) == ([], planner.journal.head.seq)
    place.check()


async def test_restarts_of_a_worker_lose_and_double_nothing(place: Place) -> None:
    async with place.worker(0), place.planner() as planner:
        client = await planner.client()
        asked = await client.send(pool("van-north"))
        for term in range(8):
            async with place.worker(1):
                for number in range(3):
                    asked += await client.send(put("van-north", term * 10 + number, SLOTS[number : number + 9]))
                # It ends while plans are on their way to it.
                await until(lambda: planner.journal.head.seq >= len(asked))  # noqa: B023 - used in this round only
        async with place.worker(1):
            assert {type(reply) for reply in await client.wait(asked)} == {outcomes.Defined}
    place.check()


async def test_what_was_journaled_and_not_carried_is_carried_after_a_restart(place: Place) -> None:
    async with place.planner() as planner:
        client = await planner.client()
        await client.send(pool("van-north"), put("van-north", 5, SLOTS))
        await until(lambda: planner.journal.head.seq == 3)
    async with place.planner() as planner, place.workers():
        await until_reached(planner)
    place.check()
    assert [planning_seq for planning_seq, _ in place.planned_on(0)] == [2, 3]


async def test_restarts_of_the_planner_lose_and_double_nothing(place: Place) -> None:
    async with place.workers():
        for term in range(6):
            async with place.planner() as planner:
                client = await planner.client()
                await client.send(pool(f"pool-{term}"), put(f"pool-{term}", term, SLOTS[:5]), pool(f"pool-{term}"))
                await until(lambda: planner.journal.head.seq >= (term + 1) * 4)  # noqa: B023 - used in this round only
                # It ends with some of this on its way, and some not yet.
        async with place.planner() as planner:
            await until_reached(planner)
    place.check()
    assert len(place.planned_on(0)) >= 12


async def test_an_import_of_20_000_counters(place: Place) -> None:
    slots = [
        f"2026-12-{1 + day:02d}T{hour:02d}:{minute:02d}-{hour:02d}:{minute + 9:02d}"
        for day in range(25)
        for hour in range(20)
        for minute in range(0, 50, 10)
    ][:2_000]
    pools = [f"pool-{number}" for number in range(10)]
    async with place.workers() as workers, place.planner() as planner:
        client = await planner.client()
        await define(client, *(pool(pool_id) for pool_id in pools))
        import_ = commands.PutCounters([CounterPut(pool_id, slot_id, 7) for pool_id in pools for slot_id in slots])
        reply = await client.ask(import_)
        assert isinstance(reply, outcomes.Defined)
        assert reply.created == 20_000
        assert sum(len(worker.state.counters) for worker in workers) == 20_000
        assert all(set(worker.state.counters.limit) == {7} for worker in workers)
        again = await client.ask(import_)
        assert isinstance(again, outcomes.Defined)
        assert again.created == 0
    place.check()


async def test_a_plan_that_a_shard_refuses_is_brought_again(place: Place) -> None:
    """The refusal must be seen as one, and nothing that follows may pass it by."""
    refused: list[int] = []
    async with worker_in_memory(place.base) as running:

        def take(connection: Connection, payload: bytes) -> None:
            ((request_id, _, command),) = wire.shard_commands.decode(payload)
            if isinstance(command, commands.PlanCounters) and len(refused) < 3:
                refused.append(command.planning_seq)
                connection.send(wire.frame([(request_id, outcomes.Refused(0, Outcome.OVERLOADED))]))
            else:
                running.worker.take(connection, payload)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.serve, service.bind(place.runtime / "worker-00.sock"), take)
            async with planner_on_disk(place.base / "planning", place.runtime, 1) as planner:
                client = await planner.client()
                await define(client, pool("van-north"), put("van-north", 5, SLOTS), put("van-north", 6, SLOTS[:3]))
            nursery.cancel_scope.cancel()
        assert refused == [3, 3, 3]
        assert list(running.state.counters.limit) == [6] * 3 + [5] * (len(SLOTS) - 3)
        assert running.state.planning_seq == 4


async def test_a_shard_that_knows_more_than_the_journal_halts_the_planner(place: Place) -> None:
    """A journal from an old backup: what it defines next, the shard would take for something it has already."""
    async with place.worker(0) as worker:
        client = await worker.client()
        await client.ask(commands.PlanPool(90, 0, "van-north", ZONE, None))
        with pytest.RaisesGroup(
            pytest.RaisesExc(JournalCorruptError, match="shard 0 has planning events up to 90, this journal ends at 1"),
            flatten_subgroups=True,
        ):
            async with place.planner():
                await trio.sleep(PATIENCE_SECONDS)


# --- answers ------------------------------------------------------------------------------------------------------------


async def test_of_two_who_read_the_same_version_one_is_refused(place: Place) -> None:
    async with place.workers(), place.planner() as planner:
        client = await planner.client()
        await define(client, pool("van-north"), put("van-north", 5, SLOTS[:1]))
        first, second = await client.wait(
            await client.send(put("van-north", 6, SLOTS[:1], 3), put("van-north", 7, SLOTS[:1], 3))
        )
        assert isinstance(first, outcomes.Defined)
        assert outcome_of(second) is Outcome.PLAN_CONFLICT
    place.check()


async def test_the_version_that_a_shard_shows_can_be_used_after_a_new_cutoff(place: Place) -> None:
    async with place.workers() as workers, place.planner() as planner:
        client = await planner.client()
        await define(client, pool("van-north"), put("van-north", 5, SLOTS[:1]), pool("van-north", cutoff_minutes=30))
        (shown,) = [version for worker in workers for version in worker.state.counters.plan_version]
        assert shown == 4
        await define(client, put("van-north", 6, SLOTS[:1], shown))


async def test_after_its_deadline_nothing_is_defined(place: Place) -> None:
    async with place.planner() as planner:
        client = await planner.client()
        reply = await client.ask(pool("van-north"), planner.clock.monotonic_ms() - 1)
        assert outcome_of(reply) is Outcome.DEADLINE_PASSED
        assert planner.journal.head.seq == 1


async def test_a_refusal_needs_no_shard_and_waits_for_the_disk(place: Place) -> None:
    async with place.planner() as planner:
        client = await planner.client()
        planner.journal.hold()
        await client.send(pool("van-north"))
        asked = await client.send(pool("van-north", zone="south"), put("unknown", 1, SLOTS), commands.PlannerStatus())
        await until(lambda: planner.journal.appending == 2)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert client.silent()
        planner.journal.free()
        refused, status = await client.wait(asked[1:])
        assert outcome_of(refused) is Outcome.UNKNOWN_POOL
        assert isinstance(status, outcomes.Status)
        assert status.values["pools"] == 1
        assert status.values["shard_1_reached"] == 0


async def test_callers_who_wait_no_more_make_room_for_others(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "WAITING_MAX", 2)
    async with place.planner() as planner:
        client = await planner.client()
        soon_ms = planner.clock.monotonic_ms() + 1_000
        for number in range(2):
            await client.send(pool(f"pool-{number}"), deadline_ms=soon_ms)
            await until(lambda: len(planner.planner._waiting) == number + 1)  # noqa: B023 - used in this round only
        assert outcome_of(await client.ask(pool("pool-2"))) is Outcome.OVERLOADED
        assert planner.journal.head.seq == 3
        planner.clock.pass_ms(1_001)
        asked = await client.send(pool("pool-2"))
        await until(lambda: planner.journal.head.seq == 4)
        async with place.workers():
            assert isinstance((await client.wait(asked))[0], outcomes.Defined)
    place.check()


async def test_too_many_at_once_are_refused_before_anything_is_done(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "COMMANDS_OPEN_MAX", 3)
    async with place.planner() as planner:
        client = await planner.client()
        asked = await client.send(*(pool(f"pool-{number}") for number in range(5)))
        assert [outcome_of(reply) for reply in await client.wait(asked[3:])] == [Outcome.OVERLOADED] * 2
        await until(lambda: planner.journal.head.seq == 4)


async def test_garbage_cuts_off_only_who_sent_it(place: Place) -> None:
    async with place.workers(), place.planner() as planner:
        client, bad = await planner.client(), await planner.client()
        await bad.send_bytes(wire.frame([(1, 2, commands.ShardStatus())]))
        await bad.until_cut_off()
        await define(client, pool("van-north"))


async def test_stop_makes_durable_what_was_taken(place: Place) -> None:
    async with place.planner() as planner:
        client = await planner.client()
        planner.journal.hold()
        await client.send(pool("pool-0"))
        await until(lambda: planner.journal.appending == 2)
        await client.send(pool("pool-1"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        planner.planner.stop()
        planner.journal.free()
        with trio.fail_after(PATIENCE_SECONDS):
            await planner.ended.wait()
        assert planner.journal.head.seq == 3


# --- the catalogue file -------------------------------------------------------------------------------------------------


async def test_the_file_of_pools_shows_what_is_durable(place: Place) -> None:
    reader = CatalogueReader(place.runtime)
    reader.refresh()
    assert (reader.planning_seq, reader.pools) == (0, {})
    async with place.workers(), place.planner() as planner:
        client = await planner.client()
        await define(client, pool("van-north", cutoff_minutes=90))
        reader.refresh()
        shown = PoolShown(0, "van-north", "delivery", "stops", "north", ZONE, (90, None, None), 2)
        assert (reader.planning_seq, reader.pools, reader.pool_of_code) == (2, {"van-north": shown}, {0: shown})
        planner.journal.hold()
        await client.send(pool("pick"))
        await until(lambda: planner.journal.appending == 3)
        reader.refresh()
        assert list(reader.pools) == ["van-north"]
        planner.journal.free()
        await until(lambda: planner.journal.head.seq == 3)
        await define(client, pool("van-north", zone="south"))
        reader.refresh()
        assert (reader.planning_seq, [each.zone for each in reader.pools.values()]) == (4, ["south", "north"])
    (place.runtime / "catalogue.json").unlink()
    async with place.planner():
        again = CatalogueReader(place.runtime)
        again.refresh()
        assert again.planning_seq == 5, "written anew at every start"
        assert list(again.pools) == list(reader.pools)


def test_the_file_is_read_only_when_it_is_another_one(tmp_path: Path) -> None:
    reader = CatalogueReader(tmp_path)
    shown = PoolShown(0, "a", "", "", "", ZONE, None, 1)
    for number in range(50):
        write(tmp_path, CatalogueShown(number, [shown]))
        reader.refresh()
        pools = reader.pools
        assert reader.planning_seq == number
        reader.refresh()
        assert reader.pools is pools
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue.json"]
