"""`slotkeeper verify`: what is whole is proven, what is not is named, and a live engine raises no false alarm."""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import pytest
import trio

from engine import codec, datadir, verify
from engine.core import commands, events, outcomes
from engine.core.commands import CounterPut
from engine.core.sharding import shard_of_counter
from engine.datadir import DataDirectoryError
from engine.journal.segments import list_segments
from engine.journal.sqlite import open_journal
from engine.journal.tail import JournalReader
from engine.snapshot import newest_first
from engine.verify import Report, verify_data_directory
from tests.core.shard import NOON_MS, ZONE, key
from tests.engine.engine_tools import BOUNDS, Client, hold, planner_on_disk, until, worker_on_disk

SHARDS = 2
SLOTS = [f"2026-12-{day:02d}T18:00-20:00" for day in range(1, 9)]
BASE = 40
LOOKS = 12
EVENTS_BETWEEN_LOOKS = 25


def home(shard: int) -> list[str]:
    return [slot_id for slot_id in SLOTS if shard_of_counter("van-north", slot_id, SHARDS) == shard]


def put(base: int, slots: list[str]) -> commands.PutCounters:
    return commands.PutCounters([CounterPut("van-north", slot_id, base) for slot_id in slots])


POOL = commands.PutPool("van-north", "delivery", "stops", "north", ZONE, None)


class Live:
    """An engine at work in one process: a planner and two workers on real journals."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.planner: Client
        self.shards: list[Client] = []
        self._stack = AsyncExitStack()
        self._names = 0

    async def __aenter__(self) -> Self:
        runtime = self.directory.parent / "runtime"
        runtime.mkdir()
        workers = [
            await self._stack.enter_async_context(
                worker_on_disk(
                    datadir.shard_directory(self.directory, shard),
                    runtime=runtime,
                    shard=shard,
                    bounds=BOUNDS._replace(snapshot_every_events=40),
                    segment_bytes_max=24 * 1024,
                )
            )
            for shard in range(SHARDS)
        ]
        planner = await self._stack.enter_async_context(
            planner_on_disk(datadir.planning_directory(self.directory), runtime, SHARDS)
        )
        self.workers = workers
        self.planner = await planner.client()
        self.shards = [await worker.client() for worker in workers]
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def plan(self, command: commands.PutPool | commands.PutCounters) -> None:
        assert isinstance(await self.planner.ask(command), outcomes.Defined)

    async def reserve(self, rounds: int) -> None:
        """Holds, confirms and releases on both shards, one commit each."""
        for _ in range(rounds):
            self._names += 1
            for shard, client in enumerate(self.shards):
                slot_id = home(shard)[self._names % len(home(shard))]
                reply = await client.ask(hold(f"{self._names}", slot_id=slot_id))
                if isinstance(reply, outcomes.Taken):
                    step = (commands.Confirm, commands.Release)[self._names % 2]
                    await client.ask(step(reply.number, self._names))


async def make(directory: Path) -> None:
    datadir.init(directory, SHARDS)
    async with Live(directory) as live:
        await live.plan(POOL)
        await live.plan(put(BASE, SLOTS))
        await live.reserve(60)
        for worker in live.workers:
            await until(lambda worker=worker: not worker.worker._snapshot_running)  # type: ignore[misc]  # bound
    shutil.rmtree(directory.parent / "runtime")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "data"
    trio.run(make, directory)
    for shard in range(SHARDS):
        assert len(list_segments(datadir.shard_directory(directory, shard))) > 1
        assert len(newest_first(datadir.shard_directory(directory, shard))) == 2
    return directory


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "data"))


def problems_of(report: Report) -> list[str]:
    return [problem for journal in (*report.shards, report.planner) for problem in journal.problems]


def test_a_clean_directory_is_proven(whole: Path) -> None:
    report = verify_data_directory(whole)
    assert report.ok
    assert problems_of(report) == []
    for shard, journal in enumerate(report.shards):
        assert (journal.name, journal.counters, journal.reservations) == (f"shard-{shard:02d}", len(home(shard)), 60)
        assert journal.events == journal.head > journal.rows > 100 or journal.events == journal.head == journal.rows
        assert journal.segments > 1
        assert journal.exceptions == []
    assert (report.planner.name, report.planner.head, report.planner.counters) == ("planning", 3, len(SLOTS))


def test_a_new_directory_is_proven(tmp_path: Path) -> None:
    datadir.init(tmp_path / "data", SHARDS)
    assert verify_data_directory(tmp_path / "data").ok


def test_what_is_no_data_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataDirectoryError):
        verify_data_directory(tmp_path)


def test_progress_is_told(whole: Path) -> None:
    told: list[tuple[int, int]] = []
    verify_data_directory(whole, lambda done, total: told.append((done, total)))
    done = [each for each, _ in told]
    assert len(told) > 100
    assert done == sorted(done)
    assert done[0] > 0
    assert {total for _, total in told} == {told[0][1]}
    assert done[-1] <= told[0][1]


# --- damage -------------------------------------------------------------------------------------------------------------


def shard(data: Path) -> Path:
    return datadir.shard_directory(data, 0)


def flip_a_byte_of_a_row(data: Path) -> None:
    path = list_segments(shard(data))[0]
    content = path.read_bytes()
    place = content.index(b'"released"')
    path.chmod(0o644)
    path.write_bytes(content[:place] + b'"Released"' + content[place + 10 :])


def cut_the_tail(data: Path) -> None:
    path = list_segments(shard(data))[-1]
    os.truncate(path, path.stat().st_size - 4096)


def lose_the_last_segment(data: Path) -> None:
    list_segments(shard(data))[-1].unlink()


def lose_the_first_segment(data: Path) -> None:
    list_segments(shard(data))[0].unlink()


def lose_the_watermark(data: Path) -> None:
    (shard(data) / "watermark").unlink()


def damage_a_snapshot(data: Path) -> None:
    path = newest_first(shard(data))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def take_a_snapshot_of_another_shard(data: Path) -> None:
    """Of the same position, and with a checksum that is right."""
    other = newest_first(datadir.shard_directory(data, 1))[0]
    newest = newest_first(shard(data))[0]
    newest.unlink()
    shutil.copy(other, newest)


def take_a_snapshot_of_another_position(data: Path) -> None:
    """Of the same shard, cut out of a history that went on elsewhere: here no row ends there."""
    ahead = data.parent / "ahead" / shard(data).name
    shutil.copytree(shard(data), ahead)

    async def go_on() -> None:
        async with worker_on_disk(ahead, bounds=BOUNDS._replace(snapshot_every_events=1)) as running:
            await (await running.client()).ask(hold("elsewhere", slot_id=home(0)[0]))
            await until(lambda: running.worker.statistics().snapshots > 0)

    trio.run(go_on)
    shutil.copy(newest_first(ahead)[0], shard(data))


def lose_the_plans(data: Path) -> None:
    """The planner's journal from before the first change."""
    planning = datadir.planning_directory(data)
    shutil.rmtree(planning)
    planning.mkdir()


def flip_a_byte_of_a_plan(data: Path) -> None:
    (path,) = list_segments(datadir.planning_directory(data))
    path.write_bytes(path.read_bytes().replace(b'"van-north"', b'"van-South"', 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte_of_a_row, r"shard-00/0000000000000000001\.sqlite.*(hash|damaged)"),
        (cut_the_tail, r"shard-00/.*(cannot read the file|are missing)"),
        (lose_the_last_segment, r"are missing: the watermark says"),
        (lose_the_first_segment, r"events 1 to \d+ are missing: no segment holds them"),
        (lose_the_watermark, r"the watermark is missing"),
        (damage_a_snapshot, r"snapshot-\d+\.snap is damaged: its checksum does not match.*remove the file"),
        (take_a_snapshot_of_another_shard, r"snapshot-\d+\.snap is (not the state at|of position)"),
        (take_a_snapshot_of_another_position, r"snapshot-\d+\.snap is (not the state at|of position)"),
        (lose_the_plans, r"planning events up to 3, the planner only up to 0"),
        (flip_a_byte_of_a_plan, r"planning/.*(hash|damaged)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named(data: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(data)
    report = verify_data_directory(data)
    assert not report.ok
    found = problems_of(report)
    assert any(re.search(words, problem) for problem in found), found
    assert not report.shards[1].problems or damage is lose_the_plans, "the other shard is proven all the same"


# --- a journal with a good chain and a bad story -------------------------------------------------------------------------


def cheat(data: Path, *made: events.ShardEvent, at_ms: int = NOON_MS) -> Report:
    """Append events that no ledger decided, as a bug or another program could, and verify."""

    async def append() -> None:
        async with await open_journal(shard(data), epoch=1) as journal:
            await journal.append(count=len(made), at_ms=at_ms, schema=events.SCHEMA, body=codec.encode(list(made)))

    for path in newest_first(shard(data)):
        path.unlink()
    trio.run(append)
    return verify_data_directory(data)


def held(counter: int, units: int, name: str) -> events.Held:
    return events.Held([(counter, units)], NOON_MS + 600_000, "SO", "web", key(name).hex(), 1)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (held(0, BASE + 1, "too-many"), "limit_passed"),
        (held(0, 1, "2"), "key_used_twice"),
        (held(99, 1, "nowhere"), "cannot follow those before it"),
        (events.Held([(0, 1)], 1, "SO", "web", "no key", 1), "cannot follow those before it"),
        (events.Held([], 1, "SO", "web", key("empty").hex(), 1), "cannot follow those before it"),
        (held(0, -1, "negative"), ""),
        (events.Confirmed(12345, 1), "must be in memory to change"),
        (events.Expired([12345], [1]), "must be in memory to change"),
        (events.CountersDefined(9, [(77, SLOTS[0], 1, 0, 0, False, 1, 2, 2)]), "cannot follow those before it"),
        (events.CountersDefined(3, []), "plans must rise"),
        (events.TermStarted(1, 0), "terms must rise"),
        (events.PoolDefined(4, 5, "late", ZONE, None, []), "planning events up to 4, the planner only up to 3"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, events.Event) else None,
)
def test_a_cheat_with_a_good_chain_is_found(data: Path, event: events.ShardEvent, words: str) -> None:
    report = cheat(data, event)
    assert not report.ok
    found = report.shards[0].problems
    assert any(words in problem for problem in found), found
    seq = report.shards[0].events
    assert any(f"event {seq}" in problem for problem in found) or "planner only" in words, found


def test_a_body_that_is_no_event_is_found(data: Path) -> None:
    async def append() -> None:
        async with await open_journal(shard(data), epoch=1) as journal:
            await journal.append(count=1, at_ms=NOON_MS, schema=events.SCHEMA, body=b'[["teleported",1]]')

    trio.run(append)
    report = verify_data_directory(data)
    assert not report.ok
    assert any("holds no events this version knows" in problem for problem in report.shards[0].problems)
    assert any("could not be audited" in problem for problem in report.shards[0].problems)


@pytest.mark.parametrize(
    "event",
    [
        events.CountersPut([(9, SLOTS[0], 1, 0, 0, False, 1, 2, 2)], "", ""),
        events.CountersPut([(0, "tonight", 1, 0, 0, False, 1, 2, 2)], "", ""),
        events.TermStarted(1, 0),
    ],
)
def test_a_planner_that_cheats_is_found(data: Path, event: events.PlannerEvent) -> None:
    async def append() -> None:
        async with await open_journal(datadir.planning_directory(data), epoch=1) as journal:
            await journal.append(count=1, at_ms=NOON_MS, schema=events.SCHEMA, body=codec.encode([event]))

    trio.run(append)
    report = verify_data_directory(data)
    assert not report.ok
    assert any("event 4 cannot follow those before it" in problem for problem in report.planner.problems)


# --- what is legal ------------------------------------------------------------------------------------------------------


async def test_a_limit_lowered_below_what_is_booked_is_an_exception_and_no_problem(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    datadir.init(directory, SHARDS)
    async with Live(directory) as live:
        await live.plan(POOL)
        await live.plan(put(BASE, SLOTS))
        await live.reserve(20)
        await live.plan(put(1, SLOTS))
        await live.reserve(5)
    report = verify_data_directory(directory)
    assert report.ok
    assert problems_of(report) == []
    for journal in report.shards:
        assert journal.exceptions
        assert all(re.search(r"used over a limit of 1 from event \d+ until now", each) for each in journal.exceptions)


async def test_beside_a_live_engine_it_proves_what_is_durable(tmp_path: Path) -> None:
    """Plans, reservations, snapshots and sealings go on all the time; none of it may look like damage."""
    directory = tmp_path / "data"
    datadir.init(directory, SHARDS)
    reports: list[Report] = []
    async with Live(directory) as live:
        await live.plan(POOL)
        await live.plan(put(1_000_000, SLOTS))

        async def keep_planning() -> None:
            base = 1_000_000
            while len(reports) < LOOKS:
                base += 1
                await live.plan(put(base, SLOTS))

        async def keep_reserving() -> None:
            while len(reports) < LOOKS:
                await live.reserve(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_planning)
            nursery.start_soon(keep_reserving)
            while len(reports) < LOOKS:
                seq = EVENTS_BETWEEN_LOOKS + (reports[-1].shards[0].head if reports else 0)
                await until(lambda: live.workers[0].journal.head.seq >= seq)  # noqa: B023 - used in this round only
                report = await trio.to_thread.run_sync(verify_data_directory, directory)
                reports.append(report)
    assert [problems_of(report) for report in reports] == [[]] * LOOKS
    heads = [report.shards[0].head for report in reports]
    assert heads == sorted(set(heads)), "the engine went on"
    assert all(worker.worker.statistics().snapshots > 2 for worker in live.workers)
    for number in range(SHARDS):
        with JournalReader(datadir.shard_directory(directory, number)) as reader:
            assert reader.head().seq >= reports[-1].shards[number].head


def test_a_long_list_is_cut_with_a_count(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LISTED_MAX", 1)
    report = cheat(data, held(0, BASE + 1, "too-many"))
    assert len(report.shards[0].problems) == 2
    assert re.fullmatch(r"and \d+ more", report.shards[0].problems[-1])
