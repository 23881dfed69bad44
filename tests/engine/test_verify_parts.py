"""`slotkeeper verify` over all shards of a data directory: real journals and snapshots, with what the simulation decided."""

import shutil
from pathlib import Path

import pytest
import trio

from engine import codec, datadir
from engine.core import events, ledger
from engine.journal.segments import list_segments
from engine.journal.sqlite import open_journal
from engine.ports import JournalRow
from engine.snapshot import Frozen, SnapshotFile
from engine.verify import Report, verify_data_directory
from tests.core.test_cross_audit import played, settled, whole
from tests.sim.world import HEALED, World


async def write(directory: Path, rows: list[JournalRow], snapshot_after: int) -> None:
    """A shard's rows, and a snapshot in the middle."""
    state = ledger.Ledger()
    journal = await open_journal(directory, epoch=1)
    for place, row in enumerate(rows):
        written = await journal.append(count=row.count, at_ms=row.at_ms, schema=row.schema, body=row.body)
        for event in codec.decode_shard(row):
            ledger.apply(state, event, row.at_ms)
        if place == snapshot_after:
            frozen = Frozen(state)
            file = SnapshotFile(directory, frozen.seq)
            for section in frozen.sections(written.end):
                file.add(section)
            file.finish()
    await journal.close()


async def write_planner(directory: Path, count: int) -> None:
    """As many events as the shards have seen: which ones is not under test here."""
    journal = await open_journal(directory, epoch=1)
    made: list[events.PlannerEvent] = [events.TermStarted(1, restart) for restart in range(1, count + 1)]
    await journal.append(count=count, at_ms=1, schema=events.SCHEMA, body=codec.encode(made))
    await journal.close()


async def make(directory: Path, world: World) -> None:
    datadir.init(directory, world.shards)
    for shard, node in enumerate(world.nodes):
        await write(datadir.shard_directory(directory, shard), node.rows, len(node.rows) // 2)
    await write_planner(datadir.planning_directory(directory), world.planning_seq)


@pytest.fixture(scope="module")
def world() -> World:
    return played(4, 2_500.0, HEALED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    directory = tmp_path_factory.mktemp("parts") / "data"
    trio.run(make, directory, world)
    return directory


def problems(report: Report) -> list[str]:
    shards = [problem for shard in report.shards for problem in shard.problems]
    return [*shards, *report.planner.problems, *report.cross.problems]


def test_a_directory_with_reservations_over_several_shards_is_proven(data: Path) -> None:
    report = verify_data_directory(data)
    assert problems(report) == []
    assert report.ok
    assert report.cross.reservations > 0
    assert report.cross.parts >= report.cross.reservations
    assert report.cross.moving == 0


def test_what_is_in_flight_is_counted(tmp_path: Path) -> None:
    world = played(3, 1_025.0)
    trio.run(make, tmp_path / "data", world)
    report = verify_data_directory(tmp_path / "data")
    assert report.ok
    assert report.cross.owed + report.cross.pinned > 0


def test_a_shard_that_is_put_back_to_yesterday_is_named(data: Path, world: World, tmp_path: Path) -> None:
    """Its chain is whole and its events are right: only the other shards show that it once was further."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    shutil.rmtree(datadir.shard_directory(copy, 1))
    datadir.shard_directory(copy, 1).mkdir()
    rows = world.nodes[1].rows
    trio.run(write, datadir.shard_directory(copy, 1), rows[: len(rows) // 2], 0)
    report = verify_data_directory(copy)
    assert not report.ok
    assert all(not shard.problems for shard in report.shards)
    assert any("lost its end" in problem for problem in report.cross.problems)


def test_a_snapshot_that_has_forgotten_a_part_is_named(data: Path, world: World, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    _, _, other, part = settled(whole(world))
    directory = datadir.shard_directory(copy, other)
    for path in directory.glob("*.snap"):
        path.unlink()
    for path in list_segments(directory):
        path.unlink()
    for path in directory.glob("watermark*"):
        path.unlink()
    trio.run(_write_with_a_bad_snapshot, directory, world.nodes[other].rows, part)
    report = verify_data_directory(copy)
    assert not report.ok
    assert any("is not the state at" in problem for problem in report.shards[other].problems)


async def _write_with_a_bad_snapshot(directory: Path, rows: list[JournalRow], part: int) -> None:
    state = ledger.Ledger()
    journal = await open_journal(directory, epoch=1)
    for row in rows:
        written = await journal.append(count=row.count, at_ms=row.at_ms, schema=row.schema, body=row.body)
        for event in codec.decode_shard(row):
            ledger.apply(state, event, row.at_ms)
    del state.links[part]
    frozen = Frozen(state)
    file = SnapshotFile(directory, frozen.seq)
    for section in frozen.sections(written.end):
        file.add(section)
    file.finish()
    await journal.close()
