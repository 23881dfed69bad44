"""Data directories of each release verify and load for ever. See make_golden.py; a golden directory is never made again."""

import shutil
from pathlib import Path
from typing import NamedTuple, get_args

import pytest

from engine import codec, datadir
from engine import planner as planning
from engine.core import commands, events, outcomes
from engine.core.outcomes import Outcome
from engine.journal.sqlite import open_journal
from engine.journal.tail import JournalReader
from engine.verify import CrossReport, verify_data_directory
from tests.core.shard import key, outcome_of
from tests.engine.engine_tools import ManualClock, worker_on_disk

GOLDEN = Path(__file__).with_name("golden")


class Expected(NamedTuple):
    """What is in a golden directory, found when it was made, and checked by hand then."""

    heads: dict[str, str]
    """Position and hash of each journal: what a format means cannot change unnoticed."""
    totals: list[list[tuple[str, int, int, int, int, int]]]
    """slot_id, limit, held, confirmed, fulfilled, refused of each shard's counters."""
    exceptions: list[int]
    shared: int
    """Reservations over both shards that are not forgotten. Nothing of them is in flight."""


EXPECTED: dict[str, Expected] = {
    "release-0.1.0": Expected(
        heads={
            "planning": "10 66ab82d5cdd1f7cc6d3b8d9d549c5ea2",
            "shard-00": "202 ccdd0926649b493f5e9e8f847841bbb6",
            "shard-01": "202 1d8b7a41e8b5dcbab31b820c6bb5a606",
        },
        totals=[
            [
                ("2026-12-02T18:00-20:00", 1, 0, 6, 3, 2700),
                ("2026-12-03T18:00-20:00", 1, 0, 6, 0, 2700),
                ("2026-12-05T18:00-20:00", 1, 0, 6, 6, 0),
                ("2026-12-07T18:00-20:00", 1, 0, 0, 0, 0),
                ("2026-12-08T18:00-20:00", 1, 0, 0, 0, 0),
            ],
            [
                ("2026-12-01T18:00-20:00", 1, 0, 6, 3, 2700),
                ("2026-12-04T18:00-20:00", 1, 0, 6, 0, 2700),
                ("2026-12-06T18:00-20:00", 1, 0, 6, 6, 0),
            ],
        ],
        exceptions=[4, 3],
        shared=7,
    )
}


@pytest.fixture(params=sorted(EXPECTED))
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Expected]:
    """A copy, as a checkout of the source leaves it: it keeps no missing write permission."""
    directory = tmp_path / "data"
    shutil.copytree(GOLDEN / request.param, directory)
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return directory, EXPECTED[request.param]


def test_every_golden_directory_has_its_expectations() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(EXPECTED)


def test_it_is_proven(golden: tuple[Path, Expected]) -> None:
    directory, expected = golden
    report = verify_data_directory(directory)
    journals = (*report.shards, report.planner)
    assert [journal.problems for journal in journals] == [[], [], []]
    assert report.ok
    assert report.cross == CrossReport(expected.shared, expected.shared, owed=0, pinned=0, moving=0, problems=[])
    assert [len(journal.exceptions) for journal in report.shards] == expected.exceptions
    for name, head in expected.heads.items():
        with JournalReader(directory / name) as reader:
            assert f"{reader.head().seq} {reader.head().hash.hex()}" == head


def test_every_kind_of_event_is_in_it(golden: tuple[Path, Expected]) -> None:
    directory, _ = golden
    kinds: set[type] = set()
    for shard in range(2):
        with JournalReader(datadir.shard_directory(directory, shard)) as reader:
            for row in reader.follow(None):
                kinds.update(type(event) for event in codec.decode_shard(row))
    with JournalReader(datadir.planning_directory(directory)) as reader:
        for row in reader.follow(None):
            kinds.update(type(event) for event in codec.decode_planner(row))
    assert kinds == {*get_args(events.ShardEvent), *get_args(events.PlannerEvent)}


async def test_it_loads_and_goes_on(golden: tuple[Path, Expected]) -> None:
    directory, expected = golden
    for shard, totals in enumerate(expected.totals):
        async with worker_on_disk(
            datadir.shard_directory(directory, shard), runtime=directory, shard=shard, clock=ManualClock(2**42)
        ) as running:
            counters = running.state.counters
            found = [
                (
                    counters.slot_id[row],
                    counters.limit[row],
                    counters.held[row],
                    counters.confirmed[row],
                    counters.fulfilled[row],
                    counters.refused[row],
                )
                for row in range(len(counters))
            ]
            assert found == totals
            client = await running.client()
            # A key of the last term that took units at once: its record is kept until its slot is long past.
            lines = [commands.Line("van-north", counters.slot_id[0], 2)]
            reply = await client.ask(commands.Hold(lines, commands.NO_TTL, key(f"{shard}-2-at-once"), 7))
            assert isinstance(reply, outcomes.Record)
            assert outcome_of(reply) is Outcome.REPEATED
    async with await open_journal(datadir.planning_directory(directory), epoch=2) as journal:
        state = planning.recover(journal)
        assert [each.pool_id for each in state.pools.values()] == ["van-north"]
    assert verify_data_directory(directory).ok


def test_nothing_of_it_is_changed_by_verifying(golden: tuple[Path, Expected]) -> None:
    directory, _ = golden
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    verify_data_directory(directory)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
