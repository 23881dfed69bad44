"""Reading beside a live writer, after a killed one, under a sealing, and without leaving a trace."""

import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest

from engine.core.invariant import InvariantError
from engine.journal import tail
from engine.journal.segments import list_segments, segment_name, shm_of, wal_of
from engine.journal.sqlite import SqliteJournal, open_journal
from engine.journal.tail import JournalReader, SegmentView
from engine.ports import GENESIS, JournalCorruptError, JournalError, JournalRow, Position
from tests.journal.journal_tools import contents_of, end_writer, fill, image_of, start_writer

SMALL_SEGMENT_BYTES = 28 * 1024


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "shard-00"


async def several_segments(directory: Path) -> list[JournalRow]:
    async with await open_journal(
        directory, epoch=1, segment_bytes_max=SMALL_SEGMENT_BYTES, checkpoint_bytes=8 * 1024
    ) as journal:
        rows = await fill(journal, 50, count=2, padding_bytes=500)
    assert len(list_segments(directory)) >= 3
    return rows


def read_all(directory: Path) -> list[JournalRow]:
    with JournalReader(directory) as reader:
        return list(reader.follow(None))


def test_a_directory_without_a_journal_is_empty(directory: Path) -> None:
    with JournalReader(directory) as reader:
        assert reader.rows(None, rows_max=10) == []
        assert reader.head() == GENESIS
        assert reader.row_holding(1) is None
        assert reader.last_row() is None


async def test_a_closed_journal_is_read_without_a_trace(directory: Path) -> None:
    rows = await several_segments(directory)
    before = contents_of(directory)
    assert read_all(directory) == rows
    with JournalReader(directory) as reader:
        assert reader.head() == rows[-1].end
    assert contents_of(directory) == before


@pytest.mark.parametrize("rows_max", [1, 7, 1000])
async def test_reading_in_steps_gives_the_same_rows(directory: Path, rows_max: int) -> None:
    rows = await several_segments(directory)
    with JournalReader(directory) as reader:
        seen: list[JournalRow] = []
        while chunk := reader.rows(seen[-1].end if seen else None, rows_max=rows_max):
            assert len(chunk) <= rows_max
            seen += chunk
        assert seen == rows
        assert reader.rows(rows[10].end, rows_max=3) == rows[11:14]


async def test_a_reader_asks_for_at_least_one_row(directory: Path) -> None:
    with JournalReader(directory) as reader, pytest.raises(InvariantError):
        reader.rows(None, rows_max=0)


async def test_large_bodies_bound_a_transaction(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = await several_segments(directory)
    monkeypatch.setattr(tail, "CHUNK_BYTES_MAX", 1)
    view = SegmentView(list_segments(directory)[0])
    assert len(view.rows_after(0, 100)) == 1
    view.close()
    assert read_all(directory) == rows


async def test_the_row_that_holds_an_event(directory: Path) -> None:
    rows = await several_segments(directory)
    with JournalReader(directory) as reader:
        for row in rows:
            assert reader.row_holding(row.seq) == reader.row_holding(row.seq + 1) == row
        assert reader.row_holding(0) is None
        assert reader.row_holding(rows[-1].end.seq + 1) is None
        list_segments(directory)[0].unlink()
        with pytest.raises(JournalCorruptError, match="no segment holds them"):
            reader.row_holding(1)


async def test_polling_beside_the_writer_in_one_process(directory: Path) -> None:
    journal = await open_journal(directory, epoch=1, segment_bytes_max=SMALL_SEGMENT_BYTES, checkpoint_bytes=8 * 1024)
    with JournalReader(directory) as reader:
        position = GENESIS
        for _ in range(60):
            assert reader.poll(position) == []
            [row] = await fill(journal, 1, padding_bytes=700)
            assert reader.poll(position) == [row]
            assert reader.head() == row.end
            position = row.end
        assert journal.statistics().seals >= 1
        assert journal.statistics().seals_postponed == 0
    await journal.close()


def test_polling_beside_a_writer_of_another_process(directory: Path) -> None:
    writer = start_writer(directory, "--rows", "300", "--segment-bytes", "30000")
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"open 0\n"
        with JournalReader(directory) as reader:
            position = GENESIS
            acknowledged = 0
            for line in writer.stdout:
                if line == b"idle\n":
                    break
                acknowledged = int(line)
                while position.seq < acknowledged:
                    news = reader.poll(position)
                    assert news, "an acknowledged row can be seen"
                    position = news[-1].end
            assert position.seq == acknowledged == 300
            assert len(list_segments(directory)) > 1
            assert reader.poll(position) == []
            before = sorted(contents_of(directory))
            assert read_all(directory)[-1].end == position
            assert sorted(contents_of(directory)) == before
    finally:
        end_writer(writer)


def test_a_killed_writers_rows_are_read_without_a_trace(directory: Path) -> None:
    writer = start_writer(directory, "--rows", "10")
    try:
        assert writer.stdout is not None
        while writer.stdout.readline() != b"idle\n":
            pass
        with JournalReader(directory) as early:
            assert early.head().seq == 10  # its connection was opened beside the living
            end_writer(writer)
            before = contents_of(directory)
            del before[segment_name(1) + "-shm"]  # SQLite's index of the -wal, made anew from it
            assert wal_of(list_segments(directory)[0]).stat().st_size > 0
            assert [row.seq for row in early.follow(None)] == list(range(1, 11))
            assert [row.seq for row in read_all(directory)] == list(range(1, 11))
        shm_of(list_segments(directory)[0]).unlink()
        assert [row.seq for row in read_all(directory)] == list(range(1, 11))
        assert contents_of(directory) == before
    finally:
        end_writer(writer)


async def test_a_reader_follows_from_a_killed_writer_to_the_next(directory: Path) -> None:
    writer = start_writer(directory, "--rows", "10")
    try:
        assert writer.stdout is not None
        while writer.stdout.readline() != b"idle\n":
            pass
    finally:
        end_writer(writer)
    with JournalReader(directory) as reader:
        seen = reader.rows(None, rows_max=100)
        assert len(seen) == 10
        journal = await open_journal(directory, epoch=1)
        assert reader.poll(seen[-1].end) == []
        [row] = await fill(journal, 1)
        assert row.restart == 1
        assert reader.poll(seen[-1].end) == [row]
        await journal.close()
        assert reader.poll(row.end) == []


@pytest.mark.parametrize("with_shm", [True, False])
async def test_a_copy_of_a_killed_writers_files_is_read(tmp_path: Path, directory: Path, *, with_shm: bool) -> None:
    journal = await open_journal(directory, epoch=1)
    rows = await fill(journal, 30, padding_bytes=300)
    image = image_of(directory, tmp_path / "image", with_shm=with_shm)
    await journal.close()
    names = sorted(contents_of(image))
    before = {name: contents for name, contents in contents_of(image).items() if not name.endswith("-shm")}
    assert read_all(image) == rows
    assert sorted(contents_of(image)) == names
    assert contents_of(image).items() >= before.items()


async def test_shared_memory_that_cannot_be_used_is_done_without(tmp_path: Path, directory: Path) -> None:
    journal = await open_journal(directory, epoch=1)
    rows = await fill(journal, 5)
    image = image_of(directory, tmp_path / "image")
    await journal.close()
    shm = shm_of(list_segments(image)[0])
    shm.unlink()
    shm.mkdir()
    assert read_all(image) == rows
    shm.rmdir()


async def test_a_private_copy_is_read_once_and_removed(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    journal = await open_journal(directory, epoch=1)
    rows = await fill(journal, 5)
    image = image_of(directory, tmp_path / "image", with_shm=False)
    await journal.close()
    with JournalReader(image) as reader:
        assert reader.rows(None, rows_max=2) == rows[:2]
        copies = list(private.iterdir())
        assert len(copies) == 1
        assert reader.rows(rows[1].end, rows_max=10) == rows[2:]
        assert list(private.iterdir()) == copies
    assert list(private.iterdir()) == []


@pytest.mark.parametrize("step", range(len(SqliteJournal._SEALING) + 1))
async def test_a_segment_sealed_beneath_a_reader_changes_nothing(directory: Path, step: int) -> None:
    journal = await open_journal(directory, epoch=1)
    rows = await fill(journal, 5)
    with JournalReader(directory) as reader:
        assert reader.rows(None, rows_max=3) == rows[:3]
        for work in SqliteJournal._SEALING[:step]:
            assert await work(journal)
        assert reader.rows(rows[2].end, rows_max=10) == rows[3:]
        for work in SqliteJournal._SEALING[step:]:
            assert await work(journal)
        rows += await fill(journal, 2)
        assert reader.poll(rows[4].end) == rows[5:]
        assert reader.rows(None, rows_max=10) == rows
    await journal.close()


async def test_rows_written_and_sealed_between_two_looks_are_not_skipped(directory: Path) -> None:
    journal = await open_journal(directory, epoch=1)
    rows = await fill(journal, 2)
    with JournalReader(directory) as reader:
        assert reader.rows(None, rows_max=10) == rows
        for _ in range(3):
            rows += await fill(journal, 2)
            for work in SqliteJournal._SEALING:
                assert await work(journal)
        assert reader.poll(rows[1].end) == rows[2:]
    await journal.close()


@pytest.mark.parametrize(
    ("seq", "digest", "what"),
    [(4, None, "in the middle of a row"), (3, b"?" * 16, "another hash"), (500, b"?" * 16, "ends before event 500")],
)
async def test_a_position_that_is_not_in_the_journal_is_refused(
    directory: Path, seq: int, digest: bytes | None, what: str
) -> None:
    journal = await open_journal(directory, epoch=1)
    rows = [*await fill(journal, 1, count=3), *await fill(journal, 1, count=3)]
    await journal.close()
    with JournalReader(directory) as reader:
        with pytest.raises(JournalCorruptError, match=what):
            reader.rows(Position(seq, digest or rows[0].hash), rows_max=10)
        assert reader.rows(rows[0].end, rows_max=10) == rows[1:]


async def test_a_file_locked_by_another_program_is_said_to_be_locked(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "BUSY_MS_MAX", 0)
    rows = await several_segments(directory)
    path = list_segments(directory)[-1]
    stranger = sqlite3.connect(path, isolation_level=None)
    stranger.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
    stranger.execute("UPDATE meta SET value = value").close()  # leaves a -wal, no -shm, and the file locked
    with JournalReader(directory) as reader:
        assert reader.head() == rows[-1].end  # by way of a private copy
    stranger.close()


async def test_a_segment_that_goes_away_is_said_to_go_away(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await several_segments(directory)
    gone = directory / segment_name(10_000)
    listed = list_segments(directory)
    monkeypatch.setattr(tail, "list_segments", lambda _directory: [*listed, gone])
    with JournalReader(directory) as reader, pytest.raises(JournalError, match="files go away"):
        reader.head()


async def test_a_journal_exchanged_beneath_a_reader_is_noticed(tmp_path: Path, directory: Path) -> None:
    rows = await several_segments(directory)
    other = tmp_path / "other" / "shard-00"
    journal = await open_journal(other, epoch=2)
    await fill(journal, 60, count=2)
    await journal.close()
    with JournalReader(directory) as reader:
        reader.rows(None, rows_max=5)
        shutil.rmtree(directory)
        other.rename(directory)
        with pytest.raises(JournalCorruptError, match="another h"):
            reader.rows(rows[4].end, rows_max=100)
        assert len(reader.rows(None, rows_max=100)) == 60
