"""The real writer: its settings, its upkeep, its sealing cut after each step, its refusals."""

import sqlite3
import stat
from functools import partial
from pathlib import Path

import pytest
import trio

from engine.journal.segments import list_segments, segment_name, shm_of, wal_of
from engine.journal.sqlite import SqliteJournal, open_journal
from engine.journal.tail import JournalReader
from engine.journal.trio_sqlite import _abandoned
from engine.journal.verify import verify_chain
from engine.ports import GENESIS, JournalCorruptError, JournalLockedError, JournalWriteError
from tests.journal.journal_tools import body_of, contents_of, end_writer, fill, image_of, settle, start_writer

SMALL_SEGMENT_BYTES = 28 * 1024
"""A little more than an empty segment, so that some rows fill it."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "shard-00"


def is_read_only(path: Path) -> bool:
    return not stat.S_IMODE(path.stat().st_mode) & 0o222


def pragma(name: str, raw: sqlite3.Connection) -> list[tuple[object]]:
    return raw.execute(f"PRAGMA {name}").fetchall()


async def open_small(directory: Path) -> SqliteJournal:
    return await open_journal(directory, epoch=1, segment_bytes_max=SMALL_SEGMENT_BYTES, checkpoint_bytes=8 * 1024)


async def test_the_connection_has_the_settings_that_durability_needs(directory: Path) -> None:
    journal = await open_journal(directory, epoch=1)
    for name, expected in [
        ("journal_mode", b"wal"),
        ("synchronous", 2),
        ("wal_autocheckpoint", 0),
        ("mmap_size", 0),
        ("busy_timeout", 1000),
    ]:
        found = await journal._connected().run(partial(pragma, name))
        assert found in ([(expected,)], []), name
    await journal.close()


async def test_a_person_reads_events_with_the_view(directory: Path) -> None:
    journal = await open_journal(directory, epoch=1)
    body = '[["held","SO-4711",2],["released","SO-0815 März"]]'.encode()
    await journal.append(count=2, at_ms=1_796_083_200_123, schema=1, body=body)
    await journal.append(count=1, at_ms=1_796_083_200_999, schema=1, body=b'[["expired"]]')
    await journal.close()
    connection = sqlite3.connect(list_segments(directory)[0])
    assert connection.execute("SELECT * FROM event").fetchall() == [
        (1, "2026-12-01T00:00:00.123Z", "held", '["held","SO-4711",2]'),
        (2, "2026-12-01T00:00:00.123Z", "released", '["released","SO-0815 März"]'),
        (3, "2026-12-01T00:00:00.999Z", "expired", '["expired"]'),
    ]
    connection.close()


async def test_an_ordered_close_leaves_one_file_for_each_segment(directory: Path) -> None:
    journal = await open_journal(directory, epoch=1)
    await fill(journal, 3)
    await journal.close()
    assert sorted(contents_of(directory)) == [segment_name(1), "watermark"]


async def test_segments_are_sealed_by_size_and_go_on_with_the_hash(directory: Path) -> None:
    async with await open_small(directory) as journal:
        rows = await fill(journal, 60, padding_bytes=1000)
        assert journal.statistics().seals >= 2
        assert journal.statistics().checkpoints >= 1
        segments = list_segments(directory)
        assert len(segments) == journal.statistics().seals + 1
        for path in segments[:-1]:
            assert is_read_only(path)
            assert not wal_of(path).exists()
            assert not shm_of(path).exists()
        assert not is_read_only(segments[-1])
        assert list(journal.read(GENESIS)) == rows
        assert list(journal.read(rows[30].end)) == rows[31:]
    assert verify_chain(directory).problems == ()


STEPS = len(SqliteJournal._SEALING)


@pytest.mark.parametrize("with_shm", [True, False])
@pytest.mark.parametrize("steps_done", range(STEPS + 1))
async def test_a_sealing_cut_after_each_step_is_finished_by_the_next_writer(
    tmp_path: Path, directory: Path, steps_done: int, *, with_shm: bool
) -> None:
    journal = await open_journal(directory, epoch=1)
    rows = await fill(journal, 10)
    for step in SqliteJournal._SEALING[:steps_done]:
        assert await step(journal)
    settle(journal)
    image = image_of(directory, tmp_path / "cut", with_shm=with_shm)
    for step in SqliteJournal._SEALING[steps_done:]:
        assert await step(journal)
    await journal.close()

    with JournalReader(image) as reader:
        assert list(reader.follow(None)) == rows
        assert reader.head() == rows[-1].end
    resumed = await open_journal(image, epoch=1)
    assert resumed.head == rows[-1].end
    assert list(resumed.read(GENESIS)) == rows
    more = await fill(resumed, 2)
    assert list(resumed.read(GENESIS)) == rows + more
    await resumed.close()
    assert [path.name for path in list_segments(image)] == [segment_name(1), segment_name(11)][: 2 if steps_done else 1]
    assert verify_chain(image).problems == ()


async def test_a_segment_in_the_making_is_forgotten(directory: Path) -> None:
    journal = await open_journal(directory, epoch=1)
    rows = await fill(journal, 2)
    await journal.close()
    for suffix in ("", "-wal", "-shm"):
        (directory / (segment_name(3) + ".new" + suffix)).write_bytes(b"cut short")
    journal = await open_journal(directory, epoch=1)
    assert list(journal.read(GENESIS)) == rows
    await journal.close()
    assert sorted(contents_of(directory)) == [segment_name(1), "watermark"]


@pytest.mark.parametrize("files", [[], ["watermark"]])
async def test_a_creation_cut_short_is_begun_again(tmp_path: Path, directory: Path, files: list[str]) -> None:
    journal = await open_journal(directory, epoch=1)
    image = tmp_path / "cut" / directory.name
    image.mkdir(parents=True)
    for name in files:
        (image / name).write_bytes((directory / name).read_bytes())
    await journal.close()
    journal = await open_journal(image, epoch=1)
    assert journal.head == GENESIS
    await fill(journal, 1)
    await journal.close()


async def test_a_reader_in_the_way_puts_checkpoint_and_sealing_off_and_stops_nothing(directory: Path) -> None:
    journal = await open_small(directory)
    rows = await fill(journal, 3)
    blocker = sqlite3.connect(f"{list_segments(directory)[0].as_uri()}?mode=ro", uri=True, isolation_level=None)
    blocker.execute("BEGIN")
    blocker.execute("SELECT count(*) FROM batch").fetchall()
    rows += await fill(journal, 40, padding_bytes=1000)
    statistics = journal.statistics()
    assert statistics.seals == 0
    assert statistics.seals_postponed + statistics.checkpoints_partial > 0
    assert await journal._connected().run(
        lambda raw: raw.execute("SELECT value FROM meta WHERE name = 'sealed'").fetchall()
    ) == [(0,)]
    blocker.execute("COMMIT")
    rows += await fill(journal, 20, padding_bytes=1000)
    assert journal.statistics().seals > 0
    assert list(journal.read(GENESIS)) == rows
    blocker.close()
    await journal.close()
    assert verify_chain(directory).problems == ()


async def test_a_reader_that_keeps_its_connection_does_not_keep_a_segment_from_being_sealed(directory: Path) -> None:
    journal = await open_small(directory)
    rows = await fill(journal, 1)
    with JournalReader(directory) as reader:
        seen = reader.rows(None, rows_max=100)
        while journal.statistics().seals < 2:
            rows += await fill(journal, 1, padding_bytes=1000)
        assert journal.statistics().seals_postponed == 0
        sealed = list_segments(directory)[:-1]
        assert not any(wal_of(path).exists() or shm_of(path).exists() for path in sealed)
        while news := reader.poll(seen[-1].end):
            seen += news
        assert seen == rows
    await journal.close()


async def test_another_process_cannot_write(directory: Path) -> None:
    writer = start_writer(directory, "--rows", "1")
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"open 0\n"
        with pytest.raises(JournalLockedError, match=f"pid {writer.pid}"):
            await open_journal(directory, epoch=1)
    finally:
        end_writer(writer)
    journal = await open_journal(directory, epoch=1)
    await journal.close()


async def test_after_a_failed_commit_everything_is_refused(directory: Path) -> None:
    journal = await open_journal(directory, epoch=1)
    await fill(journal, 1)
    # Another writer's row in the way, as a broken lock would let it in.
    await journal._connected().run(
        lambda raw: raw.execute("INSERT INTO batch VALUES (2, 1, 1, 1, 1, 1, x'', x'', '[]')").close()
    )
    for call in (lambda: fill(journal, 1), lambda: fill(journal, 1), journal.maintain, journal.close):
        with pytest.raises(JournalWriteError, match="unknown"):
            await call()
    with pytest.raises(JournalWriteError):
        list(journal.read(GENESIS))
    assert journal.head.seq == 1
    abandoned = _abandoned.pop()
    assert abandoned is journal._connection
    await abandoned.close()  # only here: the process of a test lives on


async def test_a_journal_that_lost_its_end_is_left_exactly_as_it_was(tmp_path: Path, directory: Path) -> None:
    journal = await open_journal(directory, epoch=1)
    await fill(journal, 20)
    settle(journal)
    image = image_of(directory, tmp_path / "cut")
    await journal.close()
    wal = wal_of(list_segments(image)[0])
    damaged = bytearray(wal.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    wal.write_bytes(damaged)
    names = sorted(contents_of(image))
    before = {name: contents for name, contents in contents_of(image).items() if not name.endswith("-shm")}
    with pytest.raises(JournalCorruptError, match="the watermark says that they were durable"):
        await open_journal(image, epoch=1)
    assert verify_chain(image).problems
    assert sorted(contents_of(image)) == names
    assert contents_of(image).items() >= before.items()


async def test_opening_again_folds_in_what_a_killed_writer_left(tmp_path: Path, directory: Path) -> None:
    journal = await open_journal(directory, epoch=1)
    rows = await fill(journal, 20)
    image = image_of(directory, tmp_path / "killed")
    await journal.close()
    journal = await open_journal(image, epoch=1)
    assert wal_of(list_segments(image)[0]).stat().st_size == 0
    assert list(journal.read(GENESIS)) == rows
    await journal.close()


async def test_a_cancelled_opening_is_whole(directory: Path) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        journal = await open_journal(directory, epoch=1)
    await fill(journal, 1)
    await journal.close()


async def test_a_directory_of_another_shard_is_refused(tmp_path: Path, directory: Path) -> None:
    journal = await open_journal(directory, epoch=1)
    await journal.append(count=1, at_ms=1, schema=1, body=body_of(1))
    await journal.close()
    other = directory.rename(tmp_path / "shard-01")  # noqa: ASYNC240 - a test has nobody waiting
    with pytest.raises(JournalCorruptError, match="belongs to 'shard-00'"):
        await open_journal(other, epoch=1)
