"""The writer: what it refuses, how it grows, switches, and hands over."""

import errno
import os
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from readmodel import layout
from readmodel.layout import FullError, NotPublishedError, SupersededError
from readmodel.publisher import PUBLISH_BLOCK_ROWS, Publisher
from readmodel.reader import Reader

ZEROS = (0,) * layout.VALUES


def make(directory: Path, *, restart_count: int = 0, row_capacity: int = 4) -> Publisher:
    return Publisher(directory, "m", epoch=3, restart_count=restart_count, row_capacity=row_capacity)


def live(directory: Path, rows: int, *, row_capacity: int = 4) -> Publisher:
    publisher = make(directory, row_capacity=row_capacity)
    for row in range(rows):
        publisher.append(row % 3, f"slot-{row}".encode(), row, row + 1, (row,) * layout.VALUES)
    publisher.switch()
    return publisher


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_nothing_is_seen_before_the_switch(tmp_path: Path) -> None:
    with pytest.raises(NotPublishedError, match="has not published yet"):
        Reader(tmp_path, "m")
    publisher = make(tmp_path)
    publisher.append(1, b"s", 0, 1, ZEROS)
    assert files(tmp_path) == ["m.rm"]
    with pytest.raises(NotPublishedError, match="the worker is loading"):
        Reader(tmp_path, "m")
    assert publisher.switch() == 1
    assert publisher.switch() == 1
    assert files(tmp_path) == ["m.1.rm", "m.rm"]
    reader = Reader(tmp_path, "m")
    assert reader.find(1, b"s") == 0
    publisher.close()


def test_the_header_says_who_writes_and_how_far(tmp_path: Path) -> None:
    publisher = make(tmp_path, restart_count=5)
    publisher.set_position(918_273, 1_764_000_000_000)
    publisher.heartbeat(70_000)
    publisher.set_state(layout.STATE_SERVING)
    publisher.set_plan_version(12)
    publisher.set_pools_generation(4)
    publisher.switch()
    reader = Reader(tmp_path, "m")
    header = reader.header()
    assert header._asdict() == {
        "generation": 1,
        "epoch": 3,
        "restart_count": 5,
        "boot_id": uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes,
        "writer_pid": os.getpid(),
        "state": layout.STATE_SERVING,
        "heartbeat_boottime_ms": 70_000,
        "position_seq": 918_273,
        "published_at_ms": 1_764_000_000_000,
        "pools_generation": 4,
        "plan_version": 12,
        "row_count": 0,
        "row_capacity": 4,
    }
    assert reader.position() == (918_273, 1_764_000_000_000)
    assert reader.is_writer_alive(boottime_ms=71_000, silence_ms_max=1_000)
    assert not reader.is_writer_alive(boottime_ms=71_001, silence_ms_max=1_000)
    publisher.close()
    publisher.close()
    assert not reader.is_writer_alive(boottime_ms=70_000, silence_ms_max=1_000)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ((2**63, *ZEROS[1:]), struct.error),
        ((1.5, *ZEROS[1:]), struct.error),
        (ZEROS[1:], struct.error),
        ((*ZEROS, 0), struct.error),
    ],
)
def test_values_that_do_not_fit_change_nothing(tmp_path: Path, values: tuple[int, ...], error: type[Exception]) -> None:
    publisher = live(tmp_path, 2)
    reader = Reader(tmp_path, "m")
    before = reader.row(1)
    with pytest.raises(error):
        publisher.publish(1, values)
    with pytest.raises(error):
        publisher.append(9, b"new", 0, 1, values)
    assert reader.row(1) == before
    assert reader.header().row_count == 2
    assert reader.find(9, b"new") is None
    publisher.close()


@pytest.mark.parametrize("row", [-1, 2, 3, 1_000_000])
def test_a_row_that_does_not_exist_is_refused(tmp_path: Path, row: int) -> None:
    publisher = live(tmp_path, 2)
    with pytest.raises(IndexError):
        publisher.publish(row, ZEROS)
    with pytest.raises(IndexError):
        publisher.publish_many(np.array([0, row]), np.zeros((2, layout.VALUES), dtype=np.int64))
    publisher.close()


@pytest.mark.parametrize(("pool_code", "slot_id"), [(-1, b"s"), (2**31, b"s"), (1, b""), (1, b"x" * 33), (1, b"s\0")])
def test_an_identity_that_does_not_fit_is_refused(tmp_path: Path, pool_code: int, slot_id: bytes) -> None:
    publisher = make(tmp_path)
    with pytest.raises(ValueError, match=r"pool_code must|a slot id has"):
        publisher.append(pool_code, slot_id, 0, 1, ZEROS)
    publisher.close()


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    publisher = live(tmp_path, 2)
    one = np.zeros(1, dtype=np.int64)
    values = np.zeros((1, layout.VALUES), dtype=np.int64)
    floats: Any = np.zeros((1, layout.VALUES))
    with pytest.raises(ValueError, match="values must be integers"):
        publisher.publish_many(np.array([0, 1]), values)
    with pytest.raises(ValueError, match="values must be integers"):
        publisher.publish_many(np.array([0]), floats)
    with pytest.raises(ValueError, match="each pool_code"):
        publisher.append_many(one - 1, np.array([b"s"]), one, one, values)
    with pytest.raises(ValueError, match="each slot id"):
        publisher.append_many(one, np.array([b""]), one, one, values)
    with pytest.raises(ValueError, match="slot ids must be"):
        publisher.append_many(one, np.array([b"x" * 33]), one, one, values)
    publisher.close()


@given(st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * layout.VALUES), min_size=1, max_size=6))
def test_one_by_one_and_in_bulk_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, ...]]
) -> None:
    directory = tmp_path_factory.mktemp("rm")
    one, many = (Publisher(directory, name, epoch=1, restart_count=0) for name in ("one", "many"))
    count = len(rows)
    indices = np.arange(count)
    values = np.array(rows, dtype=np.int64)
    for row in range(count):
        assert one.append(7, b"slot-%d" % row, row, row + 1, rows[row]) == row
    slot_ids = np.array([b"slot-%d" % row for row in range(count)])
    assert many.append_many(np.full(count, 7), slot_ids, indices, indices + 1, values) == 0
    assert (one._rows == many._rows).all()
    for row in range(count):
        one.publish(row, rows[-1 - row])
    many.publish_many(indices, values[::-1])
    assert (one._rows == many._rows).all()
    structured = np.zeros(count, dtype=[(name, "<i8") for name in reversed(layout.VALUE_FIELDS)])
    for column, name in enumerate(layout.VALUE_FIELDS):
        structured[name] = values[:, column]
    for row in range(count):
        one.publish(row, rows[row])
    many.publish_many(indices, structured)
    assert (one._rows == many._rows).all()
    one.close()
    many.close()


def test_a_bulk_publish_over_several_blocks_reaches_each_row(tmp_path: Path) -> None:
    count = 2 * PUBLISH_BLOCK_ROWS + 5
    publisher = make(tmp_path)
    rows = np.arange(count)
    slot_ids = np.array([b"%d" % row for row in range(count)])
    values = np.zeros((count, layout.VALUES), dtype=np.int64)
    publisher.append_many(rows % 9, slot_ids, rows, rows, values)
    publisher.switch()
    values[:] = rows[:, None]
    publisher.publish_many(rows[::-1], values[::-1])
    selection = Reader(tmp_path, "m").select(None, None, None, count)
    assert (selection.counters["held"] == rows).all()
    assert (selection.counters["version"] == 4).all()
    publisher.publish_many(rows[:0], values[:0])
    publisher.close()


def test_growing_doubles_moves_readers_and_leaves_old_maps_valid(tmp_path: Path) -> None:
    publisher = live(tmp_path, 4)
    publisher.set_position(77, 78)
    reader, late = Reader(tmp_path, "m"), Reader(tmp_path, "m")
    assert late.find(1, b"slot-1") == 1
    assert publisher.append(2, b"slot-4", 4, 5, ZEROS) == 4
    assert files(tmp_path) == ["m.2.rm", "m.rm"]
    assert publisher.statistics() == (2, 5, 8, 1)
    assert late.row(1).held == 1  # still the unlinked generation 1
    assert late.generation == 1
    assert reader.find(2, b"slot-4") == 4
    assert reader.generation == 2
    assert reader.position() == (77, 78)
    publisher.publish(1, (50,) * layout.VALUES)
    assert late.row(1).held == 1
    assert late.refresh()
    assert not late.refresh()
    assert late.row(1).held == 50
    assert late.statistics().rows_indexed == 4  # the index was kept
    publisher.close()


def test_growing_before_the_switch_needs_no_generation(tmp_path: Path) -> None:
    publisher = live(tmp_path, 40, row_capacity=1)
    assert publisher.statistics() == (1, 40, 64, 6)
    reader = Reader(tmp_path, "m")
    assert [reader.find(row % 3, f"slot-{row}".encode()) for row in range(40)] == list(range(40))
    publisher.close()


def test_a_full_read_model_refuses_and_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("readmodel.publisher.ROWS_MAX", 6)
    publisher = live(tmp_path, 6)
    with pytest.raises(FullError, match="is full"):
        publisher.append(1, b"one-more", 0, 1, ZEROS)
    publisher.publish(5, ZEROS)
    assert Reader(tmp_path, "m").header().row_count == 6
    publisher.close()


def test_no_memory_left_is_an_error_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = live(tmp_path, 4)

    def no_space(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", no_space)
    with pytest.raises(OSError, match="No space left"):
        publisher.append(1, b"one-more", 0, 1, ZEROS)
    publisher.publish(3, (9,) * layout.VALUES)
    reader = Reader(tmp_path, "m")
    assert reader.row(3).held == 9
    assert files(tmp_path) == ["m.1.rm", "m.rm"]
    publisher.close()


def test_a_fresh_writer_starts_over_and_the_old_generation_answers_until_the_switch(tmp_path: Path) -> None:
    first = live(tmp_path, 3)
    reader = Reader(tmp_path, "m")
    second = make(tmp_path, restart_count=1)
    second.append(5, b"other", 0, 1, (8,) * layout.VALUES)
    assert reader.find(1, b"slot-1") == 1
    assert reader.find(5, b"other") is None
    first.close()
    assert second.switch() == 2
    assert files(tmp_path) == ["m.2.rm", "m.rm"]
    assert reader.find(5, b"other") == 0
    assert reader.find(1, b"slot-1") is None
    assert reader.rows_of_pool(1).tolist() == []
    assert reader.header().restart_count == 1
    second.close()


def test_a_writer_that_was_superseded_cannot_move_the_pointer_back(tmp_path: Path) -> None:
    first = live(tmp_path, 4)
    second = make(tmp_path, restart_count=1)
    second.append(5, b"other", 0, 1, ZEROS)
    second.switch()
    with pytest.raises(SupersededError, match="stop this worker"):
        first.append(1, b"one-more", 0, 1, ZEROS)
    assert files(tmp_path) == ["m.2.rm", "m.rm"]
    assert Reader(tmp_path, "m").find(5, b"other") == 0
    first.close()
    second.close()


def test_an_old_writer_may_grow_while_its_successor_loads(tmp_path: Path) -> None:
    first = live(tmp_path, 4)
    second = make(tmp_path, restart_count=1)
    first.append(1, b"one-more", 0, 1, ZEROS)
    assert first.statistics().generation == 2
    assert second.switch() == 3
    assert files(tmp_path) == ["m.3.rm", "m.rm"]
    first.close()
    second.close()


def test_what_a_crash_in_the_middle_of_a_switch_left_is_cleared_away(tmp_path: Path) -> None:
    live(tmp_path, 3).close()
    # Named, but the pointer was never moved to it; and an older one that was never unlinked.
    (tmp_path / "m.7.rm").write_bytes(b"half")
    reader = Reader(tmp_path, "m")
    assert reader.generation == 1
    (tmp_path / "other.7.rm").write_bytes(b"of another name")
    publisher = live(tmp_path, 3)
    assert publisher.statistics().generation == 8
    assert files(tmp_path) == ["m.8.rm", "m.rm", "other.7.rm"]
    assert reader.refresh()
    publisher.close()


def test_a_generation_that_is_missing_is_named(tmp_path: Path) -> None:
    live(tmp_path, 3).close()
    (tmp_path / "m.1.rm").unlink()
    with pytest.raises(NotPublishedError, match=r"m\.1\.rm is the live generation and does not exist"):
        Reader(tmp_path, "m")


@pytest.mark.parametrize("row_capacity", [0, -1, layout.ROWS_MAX + 1])
def test_a_capacity_out_of_bounds_is_refused(tmp_path: Path, row_capacity: int) -> None:
    with pytest.raises(ValueError, match="row_capacity"):
        make(tmp_path, row_capacity=row_capacity)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    publisher = live(tmp_path, 40)
    reader = Reader(tmp_path, "m")
    reader.find(1, b"slot-1")
    reader.close()
    reader.close()
    publisher.close()
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


class Recorder:
    """Passes everything on to a real map or array, and notes each store in order."""

    def __init__(self, what: str, real: Any, log: list[tuple[str, Any]], note: Callable[[], Any]) -> None:
        self._what, self._real, self._log, self._note = what, real, log, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __getitem__(self, at: Any) -> Any:
        return self._real[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        self._real[at] = value
        self._log.append((self._what, self._note()))


def test_the_version_is_odd_from_before_the_first_store_until_after_the_last(tmp_path: Path) -> None:
    """The check word would hide a wrong order on this processor, so the order is looked at itself."""
    publisher: Any = live(tmp_path, 3)
    log: list[tuple[str, Any]] = []

    def version() -> int:
        return int(publisher._rows[1, 0])

    real = publisher._words, publisher._map, publisher._versions, publisher._published
    publisher._words = Recorder("word", real[0], log, version)
    publisher._map = Recorder("values", real[1], log, version)
    publisher.publish(1, ZEROS)
    assert log == [("word", 3), ("values", 3), ("word", 3), ("word", 4)]

    log.clear()
    publisher._versions = Recorder("version", real[2], log, version)
    publisher._published = Recorder("values and check", real[3], log, version)
    publisher.publish_many(np.array([0, 1]), np.zeros((2, layout.VALUES), dtype=np.int64))
    assert log == [("version", 5), ("values and check", 5), ("version", 6)]
    publisher._words, publisher._map, publisher._versions, publisher._published = real
    del real  # a map with views on it cannot be closed
    publisher.close()


def test_a_row_is_counted_only_when_it_is_complete(tmp_path: Path) -> None:
    publisher: Any = live(tmp_path, 2)
    log: list[tuple[str, Any]] = []

    def counted_and_complete() -> tuple[int, bool]:
        row = publisher._rows[2:3]
        whole = layout.expected_checks(row) == row[:, layout.CHECK_WORD] and row[0, 0] == 2
        return int(real[layout.ROW_COUNT_AT]), bool(whole and row[0, layout.IDENTITY_CHECK_WORD])

    real = publisher._words
    publisher._words = Recorder("word", real, log, counted_and_complete)
    publisher.append(1, b"new", 0, 1, ZEROS)
    assert log[-1] == ("word", (3, True))
    assert all(count == 2 for _, (count, _) in log[:-1])
    publisher._words = real
    publisher.close()
