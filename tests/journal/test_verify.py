"""The walk that proves a chain goes on after a problem and names each."""

import sqlite3
from pathlib import Path

import pytest
import trio

from engine.journal import verify
from engine.journal.segments import CHAIN_START, list_segments, make_row, segment_name, wal_of
from engine.journal.sqlite import open_journal
from engine.journal.verify import verify_chain
from engine.ports import GENESIS, JournalError, JournalRow
from tests.journal.journal_tools import body_of, fill


async def make(directory: Path) -> list[JournalRow]:
    """Three segments in order."""
    async with await open_journal(
        directory, epoch=1, segment_bytes_max=28 * 1024, checkpoint_bytes=8 * 1024
    ) as journal:
        made = []
        while journal.statistics().seals < 2:
            made += await fill(journal, 1, count=2, padding_bytes=500)
        made += await fill(journal, 3)
    return made


@pytest.fixture
def rows(tmp_path: Path) -> list[JournalRow]:
    return trio.run(make, tmp_path / "shard-00")


@pytest.fixture
def directory(tmp_path: Path, rows: list[JournalRow]) -> Path:
    return tmp_path / "shard-00"


def execute(path: Path, sql: str, *parameters: object) -> None:
    mode = path.stat().st_mode
    path.chmod(0o644)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(sql, parameters)
    connection.close()
    path.chmod(mode)


def test_a_sound_journal_has_no_problem(directory: Path, rows: list[JournalRow]) -> None:
    report = verify_chain(directory)
    assert report.problems == ()
    assert (report.segments, report.rows, report.head) == (3, len(rows), rows[-1].end)
    assert report.events == sum(row.count for row in rows)


async def test_a_live_journal_can_be_verified(tmp_path: Path) -> None:
    journal = await open_journal(tmp_path / "shard-00", epoch=1)
    made = await fill(journal, 4)
    report = verify_chain(tmp_path / "shard-00")
    assert (report.problems, report.head) == ((), made[-1].end)
    await journal.close()


def test_nothing_to_verify(tmp_path: Path) -> None:
    assert verify_chain(tmp_path).head == GENESIS
    with pytest.raises(JournalError, match="no such directory"):
        verify_chain(tmp_path / "nowhere")


def test_each_altered_row_is_one_problem_and_the_walk_goes_on(directory: Path, rows: list[JournalRow]) -> None:
    first, second, third = list_segments(directory)
    altered = [rows[1].seq, int(second.name[:19]) + 2, rows[-2].seq]
    for path, seq in zip((first, second, third), altered, strict=True):
        execute(path, "UPDATE batch SET schema = 9 WHERE seq = ?", seq)
    report = verify_chain(directory)
    assert [(Path(problem.file), problem.seq) for problem in report.problems] == list(
        zip((first, second, third), altered, strict=True)
    )
    assert all("altered" in problem.what and problem.hint for problem in report.problems)
    assert (report.rows, report.head) == (len(rows), rows[-1].end)


def test_a_row_taken_out_is_named_with_its_events(directory: Path, rows: list[JournalRow]) -> None:
    execute(list_segments(directory)[0], "DELETE FROM batch WHERE seq = ?", rows[1].seq)
    [problem] = verify_chain(directory).problems
    assert problem.seq == rows[1].seq
    assert problem.what == f"events {rows[1].seq} to {rows[1].end.seq} are missing"


def test_an_unreadable_segment_does_not_hide_the_next(directory: Path, rows: list[JournalRow]) -> None:
    _first, second, third = list_segments(directory)
    second.chmod(0o644)
    second.write_bytes(b"no database at all" * 1000)
    second.chmod(0o444)
    execute(third, "UPDATE batch SET schema = 9 WHERE seq = ?", rows[-1].seq)
    report = verify_chain(directory)
    assert Path(report.problems[0].file) == second
    assert report.problems[-1].seq == rows[-1].seq
    assert report.head == rows[-1].end


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"[[", "not JSON"),
        (b"{}", "not an array of 2 events"),
        (body_of(1, 3), "not an array of 2 events"),
        (b'[["held"],[]]', "beginning with its name"),
        (b'[["held"],[7]]', "beginning with its name"),
        (b'[["held"],"held"]', "beginning with its name"),
    ],
)
async def test_a_body_that_is_no_list_of_events_is_named(tmp_path: Path, body: bytes, what: str) -> None:
    directory = tmp_path / "shard-07"
    journal = await open_journal(directory, epoch=1)
    await journal.append(count=2, at_ms=1, schema=1, body=body)
    await journal.close()
    [problem] = verify_chain(directory).problems
    assert what in problem.what


def test_one_damaged_slot_of_the_watermark_is_named(directory: Path) -> None:
    path = directory / "watermark"
    contents = bytearray(path.read_bytes())
    contents[10] ^= 1
    path.write_bytes(contents)
    [problem] = verify_chain(directory).problems
    assert "one slot" in problem.what


def test_what_a_writer_would_not_leave_is_named(directory: Path) -> None:
    first, second, _third = list_segments(directory)
    execute(first, "UPDATE meta SET value = 0 WHERE name = 'sealed'")
    wal_of(second).write_bytes(b"x" * 100)
    problems = verify_chain(directory).problems
    assert [problem.what for problem in problems] == [
        "a later segment exists but this one was not sealed",
        "a sealed segment has a write-ahead log, which nobody reads",
    ]


def test_a_format_of_the_future_is_named(directory: Path) -> None:
    execute(list_segments(directory)[-1], "UPDATE meta SET value = 2 WHERE name = 'format'")
    [problem] = verify_chain(directory).problems
    assert "format 2" in problem.what


def test_time_and_epoch_that_go_back_are_named(directory: Path, rows: list[JournalRow]) -> None:
    """Rows that are sound by their hashes, as an older writer would add them."""
    before = CHAIN_START._replace(end=rows[-1].end)
    for epoch, restart, at_ms in ((0, 5, 10**9), (1, 0, 5)):
        row = make_row(before._replace(epoch=epoch, restart=restart), count=1, at_ms=at_ms, schema=1, body=body_of(1))
        execute(
            list_segments(directory)[-1],
            "INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row.seq,
            row.count,
            row.epoch,
            row.restart,
            row.at_ms,
            row.schema,
            row.prev_hash,
            row.hash,
            row.body.decode(),
        )
        before = before._replace(end=row.end)
    assert [problem.what.split(" from")[0] for problem in verify_chain(directory).problems] == [
        "epoch and restart go back",
        "time goes back",
    ]


def test_the_list_of_problems_is_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "PROBLEMS_MAX", 3)
    for path in list_segments(directory):
        execute(path, "UPDATE batch SET schema = 9")
    problems = verify_chain(directory).problems
    assert len(problems) == 4
    assert "more than 3 problems" in problems[-1].what


def test_a_missing_segment_is_named_with_the_file_it_was_in(directory: Path) -> None:
    first, second, third = list_segments(directory)
    second.unlink()
    [problem] = verify_chain(directory).problems
    assert Path(problem.file) == second
    assert (
        problem.what
        == f"events {int(second.name[:19])} to {int(third.name[:19]) - 1} are missing: no segment holds them"
    )
    first.unlink()
    assert Path(verify_chain(directory).problems[0].file).name == segment_name(1)
