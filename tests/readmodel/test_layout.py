"""Layout: sizes, alignment, check words, and what a file must look like."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from readmodel import layout
from readmodel.layout import LayoutError, LayoutVersionError, NotPublishedError
from readmodel.publisher import Publisher
from readmodel.reader import Reader

int64 = st.integers(-(2**63), 2**63 - 1)
bodies = st.tuples(st.integers(0, 2**62 - 2).map(lambda n: 2 * n + 1), *[int64] * layout.VALUES)


def test_rows_and_headers_are_aligned_and_whole_cache_lines() -> None:
    assert layout.ROW.itemsize == layout.ROW_SIZE == 192
    assert layout.HEADER.itemsize == layout.HEADER_SIZE == 192
    for dtype in (layout.ROW, layout.HEADER):
        assert dtype.names is not None
        assert dtype.fields is not None
        ends = 0
        for name in dtype.names:
            field, offset = dtype.fields[name][:2]
            assert offset % 8 == 0
            assert offset >= ends
            ends = offset + field.itemsize
        assert ends <= dtype.itemsize


@given(st.lists(bodies, min_size=1, max_size=5))
def test_check_words_are_the_same_one_by_one_and_as_arrays(rows: list[tuple[int, ...]]) -> None:
    one_by_one = [layout.check_of_body(layout.BODY.pack(*row)) for row in rows]
    assert layout.checks_of_bodies(np.array(rows, dtype=np.int64)).tolist() == one_by_one
    copies = np.zeros((len(rows), layout.ROW_WORDS), dtype=np.int64)
    copies[:, : layout.CHECK_WORD] = rows
    copies[:, 0] += 1
    assert layout.expected_checks(copies).tolist() == one_by_one


@given(bodies, bodies, st.lists(st.booleans(), min_size=layout.VALUES + 1, max_size=layout.VALUES + 1))
def test_a_mixture_of_two_publishes_fails_the_check(
    old: tuple[int, ...], new: tuple[int, ...], takes_new: list[bool]
) -> None:
    mixed = tuple(n if takes else o for o, n, takes in zip(old, new, takes_new, strict=True))
    checks = [layout.check_of_body(layout.BODY.pack(*row)) for row in (old, new, mixed)]
    if mixed not in (old, new):
        assert checks[2] not in checks[:2]


def test_a_unit_that_moves_between_two_fields_changes_the_check() -> None:
    """What a plain sum or XOR of the words would miss."""
    held = layout.BODY.pack(5, 9, 9, 0, 0, 1, 0, 0, 0, 0, 0, 7, 1)
    confirmed = layout.BODY.pack(5, 9, 9, 0, 0, 0, 1, 0, 0, 0, 0, 7, 1)
    assert layout.check_of_body(held) != layout.check_of_body(confirmed)


@given(st.integers(0, layout.POOL_CODE_MAX), st.binary(min_size=1, max_size=32), int64, int64)
def test_identity_checks_are_the_same_one_by_one_and_as_arrays(pool: int, slot: bytes, starts: int, ends: int) -> None:
    packed = layout.IDENTITY.pack(pool, slot, starts, ends)
    words = np.frombuffer(packed, dtype=np.int64).reshape(1, -1)
    check = layout.identity_check(packed)
    assert layout.identity_checks(words).tolist() == [check]
    assert check > 0
    assert check >> layout.KEY_HASH_SHIFT & layout.KEY_HASH_MASK == layout.key_hash(layout.KEY.pack(pool, slot))


def published(directory: Path) -> Path:
    publisher = Publisher(directory, "m", epoch=1, restart_count=0, row_capacity=4)
    publisher.append(1, b"s", 0, 1, (0,) * layout.VALUES)
    publisher.switch()
    publisher.close()
    return layout.generation_path(directory, "m", 1)


def patch_header(path: Path, field: str, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(layout.HEADER_FIELDS[field] * 8)
        file.write(struct.pack("<q", value))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("magic", 1, "not a read model"),
        ("layout_version", 2, "layout version 2, this release knows 1"),
        ("row_size", 128, "rows of 128 bytes"),
        ("row_capacity", 5, "truncated or damaged"),
        ("row_capacity", -1, "truncated or damaged"),
        ("row_count", 5, "5 rows in a capacity of 4"),
        ("generation", 7, "says it is generation 7"),
    ],
)
def test_a_header_that_does_not_fit_is_named(tmp_path: Path, field: str, value: int, says: str) -> None:
    path = published(tmp_path)
    patch_header(path, field, value)
    with pytest.raises(LayoutError, match=says) as raised:
        Reader(tmp_path, "m")
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("size", [0, 1, layout.HEADER_SIZE - 1, layout.HEADER_SIZE, layout.HEADER_SIZE + 200])
def test_a_truncated_file_is_named(tmp_path: Path, size: int) -> None:
    path = published(tmp_path)
    os.truncate(path, size)
    with pytest.raises(LayoutError, match="truncated") as raised:
        Reader(tmp_path, "m")
    assert str(path) in str(raised.value)


def test_a_foreign_pointer_stops_reader_and_writer_and_is_left_alone(tmp_path: Path) -> None:
    pointer = layout.pointer_path(tmp_path, "m")
    pointer.write_bytes(b"x" * 4096)
    for start in (lambda: Reader(tmp_path, "m"), lambda: Publisher(tmp_path, "m", epoch=1, restart_count=0)):
        with pytest.raises(LayoutError, match=r"m\.rm is not a read model"):
            start()
    assert pointer.read_bytes() == b"x" * 4096


def test_a_directory_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    layout.pointer_path(tmp_path, "m").mkdir()
    with pytest.raises(LayoutError, match="not a regular file"):
        Reader(tmp_path, "m")


def test_a_pointer_of_another_release_is_replaced_by_the_writer_and_noticed_by_its_readers(tmp_path: Path) -> None:
    published(tmp_path)
    reader = Reader(tmp_path, "m")
    patch_header(layout.pointer_path(tmp_path, "m"), "layout_version", 9)
    with pytest.raises(LayoutVersionError, match="layout version 9"):
        Reader(tmp_path, "m")
    successor = Publisher(tmp_path, "m", epoch=1, restart_count=1)
    with pytest.raises(NotPublishedError):
        reader.refresh()
    successor.switch()
    assert reader.refresh()
    assert reader.header().restart_count == 1
    successor.close()


@pytest.mark.parametrize("name", ["", "a.b", "../a", "A", "-a", "a" * 65, "ä"])
def test_a_name_that_could_be_mistaken_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no name of a read model"):
        Reader(tmp_path, name)
