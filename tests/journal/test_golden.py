"""Journals of each released format load for ever. See make_golden.py; a golden journal is never made again."""

import shutil
from pathlib import Path

import pytest

from engine.journal.segments import list_segments
from engine.journal.sqlite import open_journal
from engine.journal.tail import JournalReader
from engine.journal.verify import verify_chain
from engine.ports import GENESIS
from tests.journal.journal_tools import contents_of
from tests.journal.make_golden import AT_MS, ROWS_PER_WRITER, SHARD, TERMS, golden_body, make

GOLDEN = Path(__file__).with_name("golden")
EVENTS = 48
HEADS = {"format-1": "0ecb0cd45b79e3217754e5b9e2d8a44e"}
"""The last hash of each golden journal, so that a format cannot change its meaning unnoticed."""


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
async def test_a_golden_journal_loads_and_goes_on(name: str, tmp_path: Path) -> None:
    original = GOLDEN / name / SHARD
    before = contents_of(original)
    report = verify_chain(original)
    assert report.problems == ()
    assert (report.rows, report.events) == (ROWS_PER_WRITER * len(TERMS), EVENTS)
    assert (report.head.seq, report.head.hash.hex()) == (EVENTS, HEADS[name])
    with JournalReader(original) as reader:
        rows = list(reader.follow(None))
    assert [(row.epoch, row.restart) for row in rows[::ROWS_PER_WRITER]] == [(1, 0), (1, 1), (2, 0), (2, 7)]
    for row in rows:
        assert row.body == golden_body(row.seq, row.count)
        assert row.at_ms == AT_MS + 250 * row.seq
    assert contents_of(original) == before, "reading leaves no trace in the source tree"

    copy = tmp_path / SHARD
    shutil.copytree(original, copy)
    for path in list_segments(copy):
        path.chmod(0o644)  # a checkout of the source keeps no write permissions
    journal = await open_journal(copy, epoch=3)
    assert list(journal.read(GENESIS)) == rows
    await journal.append(count=1, at_ms=AT_MS * 2, schema=1, body=golden_body(EVENTS + 1, 1))
    await journal.close()
    assert verify_chain(copy).problems == ()


async def test_the_present_writer_still_makes_the_rows_of_the_newest_golden_journal(tmp_path: Path) -> None:
    await make(tmp_path)
    newest = max(HEADS)
    with JournalReader(tmp_path / SHARD) as made, JournalReader(GOLDEN / newest / SHARD) as golden:
        assert list(made.follow(None)) == list(golden.follow(None))
