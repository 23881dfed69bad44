"""The watermark file: two slots, never ahead, never silently gone."""

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.journal import watermark as watermark_module
from engine.journal.sqlite import open_journal
from engine.journal.trio_sqlite import _abandoned
from engine.journal.watermark import WatermarkWriter, create_watermark, read_watermark
from engine.ports import GENESIS, GENESIS_HASH, JournalCorruptError, JournalWriteError, Position
from tests.journal.journal_tools import fill, settle

SLOTS = (0, 4096)
SLOT_BYTES = watermark_module._SLOT.size


def position(seq: int) -> Position:
    return Position(seq, seq.to_bytes(16, "big"))


def damage(path: Path, offset: int) -> None:
    contents = bytearray(path.read_bytes())
    contents[offset] ^= 0xFF
    path.write_bytes(contents)


def test_no_file_is_no_watermark(tmp_path: Path) -> None:
    assert read_watermark(tmp_path) is None


def test_a_new_watermark_is_at_the_beginning(tmp_path: Path) -> None:
    create_watermark(tmp_path)
    found = read_watermark(tmp_path)
    assert found is not None
    assert (found.position, found.slots_damaged) == (Position(0, GENESIS_HASH), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["watermark"]


def test_without_a_close_the_watermark_reaches_what_was_noted_last(tmp_path: Path) -> None:
    create_watermark(tmp_path)
    writer = WatermarkWriter(tmp_path, GENESIS)
    for seq in range(1, 1000):
        writer.note(position(seq))
    assert writer.wait_settled(10)
    found = read_watermark(tmp_path)
    assert found is not None
    assert found.position == position(999)
    writer.close()


def test_at_rest_either_slot_may_be_damaged_without_loss(tmp_path: Path) -> None:
    create_watermark(tmp_path)
    writer = WatermarkWriter(tmp_path, GENESIS)
    writer.note(position(7))
    writer.close()
    writer.close()
    path = tmp_path / "watermark"
    sound = path.read_bytes()
    for offset in SLOTS:
        path.write_bytes(sound)
        damage(path, offset + 20)
        found = read_watermark(tmp_path)
        assert found is not None
        assert (found.position, found.slots_damaged) == (position(7), 1)


def test_two_damaged_slots_are_named(tmp_path: Path) -> None:
    create_watermark(tmp_path)
    for offset in SLOTS:
        damage(tmp_path / "watermark", offset)
    with pytest.raises(JournalCorruptError, match="both slots"):
        read_watermark(tmp_path)


@pytest.mark.parametrize("size_bytes", [0, 10])
def test_a_file_cut_before_the_first_slot_ends_is_named(tmp_path: Path, size_bytes: int) -> None:
    create_watermark(tmp_path)
    os.truncate(tmp_path / "watermark", size_bytes)
    with pytest.raises(JournalCorruptError, match="both slots"):
        read_watermark(tmp_path)


@given(slot=st.sampled_from(SLOTS), index=st.integers(0, SLOT_BYTES - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_slot_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, slot: int, index: int, bit: int
) -> None:
    directory = tmp_path_factory.mktemp("flip")
    create_watermark(directory)
    path = directory / "watermark"
    contents = bytearray(path.read_bytes())
    contents[slot + index] ^= 1 << bit
    path.write_bytes(contents)
    found = read_watermark(directory)
    assert found is not None
    assert found.slots_damaged == 1


def test_a_write_cut_short_at_any_byte_leaves_one_of_the_two_positions(tmp_path: Path) -> None:
    create_watermark(tmp_path)
    path = tmp_path / "watermark"
    writer = WatermarkWriter(tmp_path, position(1))
    writer.abandon()
    writer._thread.join(10)
    before = path.read_bytes()
    writer._write(position(2))
    after = path.read_bytes()
    os.close(writer._fd)
    for size_bytes in range(len(after)):
        path.write_bytes(after[:size_bytes] + before[size_bytes:])
        found = read_watermark(tmp_path)
        assert found is not None
        assert found.position in (position(1), position(2))


def test_the_generations_go_on_after_a_restart(tmp_path: Path) -> None:
    create_watermark(tmp_path)
    generations = []
    for seq in (1, 2, 3):
        writer = WatermarkWriter(tmp_path, position(seq))
        writer.close()
        found = read_watermark(tmp_path)
        assert found is not None
        assert found.position == position(seq)
        generations.append(found.generation)
    assert generations == sorted(set(generations))


def test_it_is_never_written_more_often_than_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The period is a wait on an event; here the test is the clock."""
    create_watermark(tmp_path)
    writer = WatermarkWriter(tmp_path, GENESIS)
    waiting, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def wait_for_the_test(timeout: float | None = None) -> bool:
        assert timeout == watermark_module.PERIOD_MS / 1000
        waiting.release()
        assert go_on.acquire(timeout=10)
        return writer._stopping

    monkeypatch.setattr(writer._stopped, "wait", wait_for_the_test)
    writer.note(position(1))
    assert waiting.acquire(timeout=10)
    for seq in range(2, 50):
        writer.note(position(seq))
    found = read_watermark(tmp_path)
    assert found is not None
    assert found.position == position(1)
    go_on.release()
    assert waiting.acquire(timeout=10)
    found = read_watermark(tmp_path)
    assert found is not None
    assert found.position == position(49)
    writer.abandon()
    go_on.release()
    writer._thread.join(10)
    os.close(writer._fd)


async def test_an_idle_journal_gets_its_watermark_without_anyone_calling(tmp_path: Path) -> None:
    journal = await open_journal(tmp_path / "shard-00", epoch=1)
    await fill(journal, 5)
    settle(journal)
    found = read_watermark(tmp_path / "shard-00")
    assert found is not None
    assert found.position == journal.head
    await journal.close()


async def test_an_error_of_its_thread_reaches_the_next_append(tmp_path: Path) -> None:
    journal = await open_journal(tmp_path / "shard-00", epoch=1)
    await fill(journal, 1)
    settle(journal)
    writer = journal._watermark
    assert writer is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._fd)  # a disk without room for the next write of the watermark
    os.close(full)
    writer.note(position(2))
    assert not writer.wait_settled(10)
    assert writer.failure is not None
    assert writer.failure.errno == errno.ENOSPC
    for call in (lambda: fill(journal, 1), journal.maintain, journal.close):
        with pytest.raises(JournalWriteError, match="watermark"):
            await call()
    os.close(writer._fd)
    await _abandoned.pop().close()  # only here: the process of a test lives on
