"""Names, the row hash and the rule of the chain, as tables."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.journal.segments import (
    CHAIN_START,
    ChainState,
    content_fault,
    create_segment,
    first_seq_of,
    link_fault,
    list_segments,
    make_row,
    row_from_columns,
    row_hash,
    segment_name,
    state_after,
)
from engine.ports import GENESIS, GENESIS_HASH, JournalRow, Position

INT64 = st.integers(-(2**63), 2**63 - 1)
VALUES = st.tuples(
    st.binary(min_size=16, max_size=16), INT64, INT64, INT64, INT64, INT64, INT64, st.binary(max_size=64)
)


def test_the_row_hash_is_the_one_of_format_1() -> None:
    assert (
        row_hash(GENESIS_HASH, 1, 2, 3, 4, 5, 6, b'[["held"],["released"]]').hex() == "013e47a9c9406b49584a0e24692550ba"
    )


@given(VALUES, VALUES)
def test_different_rows_have_different_hashes(
    one: tuple[bytes, int, int, int, int, int, int, bytes], other: tuple[bytes, int, int, int, int, int, int, bytes]
) -> None:
    assert (row_hash(*one) == row_hash(*other)) == (one == other)


@given(st.integers(1, 2**63 - 1))
def test_names_carry_the_first_seq_and_sort_like_it(seq: int) -> None:
    assert first_seq_of(Path(segment_name(seq))) == seq
    assert (segment_name(seq) < segment_name(1000)) == (seq < 1000)


def test_only_segments_are_listed_oldest_first(tmp_path: Path) -> None:
    names = [
        segment_name(70),
        segment_name(1),
        segment_name(70) + "-wal",
        segment_name(70) + "-shm",
        "lock",
        "watermark",
    ]
    for name in [*names, segment_name(99) + ".new", "x" * 19 + ".sqlite", "1.sqlite"]:
        (tmp_path / name).touch()
    assert [path.name for path in list_segments(tmp_path)] == [segment_name(1), segment_name(70)]
    assert list_segments(tmp_path / "nowhere") == []


def test_a_segment_left_unfinished_is_no_segment_and_is_replaced(tmp_path: Path) -> None:
    (tmp_path / (segment_name(1) + ".new")).write_bytes(b"half of it")
    (tmp_path / (segment_name(1) + ".new-wal")).write_bytes(b"half of it")
    assert list_segments(tmp_path) == []
    path = create_segment(tmp_path, GENESIS)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name] == [segment_name(1)]


BEFORE = ChainState(Position(10, b"h" * 16), 3, 1, 5000)
NEXT = make_row(BEFORE, count=2, at_ms=5000, schema=1, body=b"[]")


def replaced(row: JournalRow, **changes: object) -> JournalRow:
    values = {name: getattr(row, name) for name in JournalRow.__dataclass_fields__}
    return JournalRow(**{**values, **changes})


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (NEXT, None),
        (replaced(NEXT, seq=13), "events 11 to 12 are missing"),
        (replaced(NEXT, seq=10), "already holds"),
        (replaced(NEXT, prev_hash=b"o" * 16), "another history"),
        (replaced(NEXT, epoch=2, restart=9), "go back"),
        (replaced(NEXT, restart=0), "go back"),
        (replaced(NEXT, epoch=4, restart=0), None),
        (replaced(NEXT, at_ms=4999), "time goes back"),
    ],
)
def test_what_may_follow_a_row(row: JournalRow, fault: str | None) -> None:
    found = link_fault(BEFORE, row)
    assert found is None if fault is None else found is not None and fault in found


@pytest.mark.parametrize("name", ["seq", "count", "epoch", "restart", "at_ms", "schema"])
def test_any_number_altered_breaks_the_hash(name: str) -> None:
    assert content_fault(NEXT) is None
    assert content_fault(replaced(NEXT, **{name: getattr(NEXT, name) + 1})) is not None
    assert content_fault(replaced(NEXT, body=b"{}")) is not None


def test_columns_of_a_wrong_type_are_no_row() -> None:
    good = tuple(getattr(NEXT, name) for name in JournalRow.__dataclass_fields__)
    assert row_from_columns(good) == NEXT
    for index in range(len(good)):
        assert row_from_columns((*good[:index], None, *good[index + 1 :])) is None
    assert row_from_columns(good[:-1]) is None
    assert row_from_columns((*good[:6], b"short", *good[7:])) is None


def test_the_state_after_a_row_is_what_the_next_has_to_fit() -> None:
    assert link_fault(state_after(NEXT), make_row(state_after(NEXT), count=1, at_ms=5001, schema=1, body=b"[]")) is None
    assert state_after(NEXT).end == NEXT.end == Position(12, NEXT.hash)
    assert CHAIN_START.end == GENESIS
