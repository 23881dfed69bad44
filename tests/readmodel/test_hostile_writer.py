"""Readers against a real process that writes as fast as it can, stops half-way, grows, starts over, and is killed."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from readmodel import layout
from readmodel.layout import TornRowError
from readmodel.publisher import Publisher
from readmodel.reader import Reader, Row
from tests.readmodel.hostile_writer import COUNTERS, DAY_MS, NAME, POOLS, fill, is_whole, values_of

SCALAR_READS = 200_000
SELECTS = 4_000
RAW_COPIES_MAX = 2_000_000
PROGRAM = Path(__file__).with_name("hostile_writer.py")
ROOT = Path(__file__).parents[2]


@contextmanager
def writer(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(directory), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def raging(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    with writer(tmp_path, "rage", "1") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "READY\n"
        yield tmp_path, process


def values_in(row: Row) -> tuple[int, ...]:
    return tuple(getattr(row, name) for name in layout.VALUE_FIELDS)


def test_scalar_reads_are_whole_and_of_the_counter_asked_for(
    raging: tuple[Path, subprocess.Popen[str]],
) -> None:
    directory, process = raging
    reader = Reader(directory, NAME)
    chance = random.Random(2)
    newest = dict.fromkeys(COUNTERS, 0)
    for _ in range(SCALAR_READS):
        pool, slot_id = counter = COUNTERS[chance.randrange(len(COUNTERS))]
        found = reader.find(pool, slot_id)
        assert found is not None
        generation = reader.generation
        try:
            row = reader.row(found)
        except TornRowError:
            continue  # the writer lost its processor between two stores
        assert (row.pool_code, row.slot_id, row.starts_at_ms) == (pool, slot_id, pool * DAY_MS)
        assert is_whole(values_in(row), pool), row
        # Within a generation a counter never goes back in time.
        if reader.header().generation == generation and newest[counter] >> 32 == generation:
            assert row.limit >= newest[counter] & 0xFFFFFFFF
        newest[counter] = generation << 32 | row.limit
    assert process.poll() is None
    statistics = reader.statistics()
    assert statistics.torn_reads > 0, "the writer was not hostile enough to prove anything"
    reader.close()


def test_selections_are_whole(raging: tuple[Path, subprocess.Popen[str]]) -> None:
    directory, process = raging
    reader = Reader(directory, NAME)
    rows_seen = 0
    factors = np.arange(1, layout.VALUES + 1)
    for turn in range(SELECTS):
        pools = None if turn % 2 else [turn % POOLS, (turn + 3) % POOLS]
        selection = reader.select(pools, 0, POOLS * DAY_MS, len(COUNTERS))
        counters = selection.counters
        values = np.stack([counters[name] for name in layout.VALUE_FIELDS], axis=1)
        pool_codes = counters["pool_code"]
        numbers = values[:, 0] - pool_codes
        assert (values == numbers[:, None] * factors + pool_codes[:, None]).all()
        assert (counters["version"] % 2 == 0).all()
        assert (counters["starts_at_ms"] == pool_codes * DAY_MS).all()
        expected = len(COUNTERS) if pools is None else 2 * len(COUNTERS) // POOLS
        assert len(counters) + len(selection.torn) == expected
        assert len({(int(row["pool_code"]), bytes(row["slot_id"])) for row in counters[:4]}) == min(4, len(counters))
        rows_seen += len(counters)
    assert process.poll() is None
    assert rows_seen > 100_000
    assert reader.statistics().torn_reads > 0, "the writer was not hostile enough to prove anything"
    assert reader.statistics().moves > 0, "the writer never started over"
    reader.close()


def test_a_reader_without_versions_meets_torn_rows_and_the_check_alone_tells_them(
    raging: tuple[Path, subprocess.Popen[str]],
) -> None:
    """The planted bug: it proves that the two tests above can fail, and that check stands on its own."""
    directory, _ = raging
    reader = Reader(directory, NAME)
    torn = 0
    for _ in range(RAW_COPIES_MAX // len(COUNTERS)):
        reader.refresh()
        copies = reader._rows[: len(COUNTERS)].copy()
        values = copies[:, 1 : 1 + layout.VALUES]
        pool_codes = copies[:, layout.IDENTITY_WORD]
        factors = np.arange(1, layout.VALUES + 1)
        broken = ((values[:, :1] - pool_codes[:, None]) * factors + pool_codes[:, None] != values).any(axis=1)
        assert not (broken & (copies[:, layout.CHECK_WORD] == layout.expected_checks(copies))).any()
        torn += int(broken.sum())
        if torn > 100:
            break
    assert torn > 100
    reader.close()


def test_a_writer_frozen_anywhere_leaves_each_row_whole_or_reported(
    raging: tuple[Path, subprocess.Popen[str]],
) -> None:
    directory, process = raging
    reader = Reader(directory, NAME)
    for _ in range(40):
        process.send_signal(signal.SIGSTOP)
        selection = reader.select(None, None, None, len(COUNTERS))
        assert len(selection.counters) + len(selection.torn) == len(COUNTERS)
        for counter in selection.counters:
            row = tuple(int(counter[name]) for name in layout.VALUE_FIELDS)
            assert is_whole(row, int(counter["pool_code"]))
        process.send_signal(signal.SIGCONT)
    reader.close()


@pytest.mark.parametrize("stores", [1, 2, 3, 4])
def test_a_row_left_odd_by_a_killed_writer_is_given_up_and_the_next_writer_heals_it(
    tmp_path: Path, stores: int
) -> None:
    with writer(tmp_path, "die", str(stores)) as process:
        assert process.wait() == -signal.SIGKILL
    reader = Reader(tmp_path, NAME)

    started_ns = time.monotonic_ns()
    with pytest.raises(TornRowError, match=r"row 1 of .*shard-07\.1\.rm .* ask the worker"):
        reader.row(1)
    assert time.monotonic_ns() - started_ns >= layout.GIVE_UP_MS * 1_000_000

    reads_before = reader.statistics().torn_reads
    with pytest.raises(TornRowError):
        reader.row(1)
    assert reader.statistics().torn_reads == reads_before + 1, "a row given up once must not be waited for again"

    selection = reader.select(None, None, None, len(COUNTERS))
    assert selection.torn.tolist() == [1]
    assert reader.identity(1)[:2] == COUNTERS[1]
    assert len(selection.counters) == len(COUNTERS) - 1
    assert 1 not in selection.rows
    assert is_whole(values_in(reader.row(0)), COUNTERS[0][0])
    assert not reader.is_writer_alive(boottime_ms=5_000, silence_ms_max=1_000)

    successor = Publisher(tmp_path, NAME, epoch=1, restart_count=1)
    with pytest.raises(TornRowError):
        reader.row(1)  # not switched yet: the old generation still answers, row 1 excepted
    assert reader.row(2).slot_id == COUNTERS[2][1]
    fill(successor, list(range(len(COUNTERS))))
    assert reader.refresh()
    assert values_in(reader.row(1)) == values_of(1, COUNTERS[1][0])
    assert reader.header().restart_count == 1
    successor.close()
    reader.close()


def test_a_selection_gives_up_torn_rows_with_one_wait(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path, NAME, epoch=1, restart_count=0)
    fill(publisher, list(range(len(COUNTERS))))
    reader = Reader(tmp_path, NAME)
    odd = [3, 4, 40]
    publisher._versions[odd] += 1
    assert reader.select(None, None, None, 100).torn.tolist() == odd
    torn_reads = reader.statistics().torn_reads
    assert reader.select(None, None, None, 100).torn.tolist() == odd
    assert reader.statistics().torn_reads == torn_reads + len(odd), "given up at once the second time"
    # A publish heals a row that an exception once left odd.
    publisher.publish(3, values_of(9, 0))
    publisher.publish_many(np.array([4]), np.array([values_of(9, 0)]))
    assert reader.select(None, None, None, 100).torn.tolist() == [40]
    assert values_in(reader.row(3)) == values_in(reader.row(4)) == values_of(9, 0)
    publisher.close()
    reader.close()
