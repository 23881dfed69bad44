"""Names of shards, reservations and positions: fixed for ever, since they stand in journals and in customers' hands."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.limits import SEQ_MAX, SHARDS_MAX
from engine.core.sharding import (
    HASH_MASK,
    counter_hash,
    parse_position,
    parse_reservation_id,
    position_text,
    reservation_id,
    reservation_number,
    shard_of_counter,
    shard_of_hash,
    shard_of_number,
)
from tests.core.drawing import tries

GOLDEN_HASHES = {
    ("van-north", "2026-12-01T18:00-20:00"): 0xA2D1,
    ("van-north", "2026-12-01T20:00-22:00"): 0x3F2D,
    ("pick-dc1", "2026-12-01T10:00-14:00"): 0x5517,
    ("Köln-Süd", "2026-12-01T10:00-14:00"): 0x922D,
}
"""Changing one of these moves counters to other shards under everybody's feet."""

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
seqs = st.integers(1, SEQ_MAX)
hashes = st.integers(0, HASH_MASK)
shard_counts = st.integers(1, SHARDS_MAX)


@pytest.mark.parametrize(("name", "hashed"), GOLDEN_HASHES.items())
def test_a_hash_is_for_ever(name: tuple[str, str], hashed: int) -> None:
    assert counter_hash(*name) == hashed


@given(names, names, shard_counts)
@tries(200)
def test_a_counter_has_one_shard(pool_id: str, slot_id: str, shards: int) -> None:
    hashed = counter_hash(pool_id, slot_id)
    assert 0 <= hashed <= HASH_MASK
    assert shard_of_counter(pool_id, slot_id, shards) == shard_of_hash(hashed, shards) < shards


@given(seqs, hashes, shard_counts)
@tries(200)
def test_a_reservation_lives_where_its_first_counter_does(seq: int, hashed: int, shards: int) -> None:
    number = reservation_number(seq, hashed)
    assert shard_of_number(number, shards) == shard_of_hash(hashed, shards)
    assert 0 < number < 2**63


@given(seqs, seqs, hashes, hashes)
@tries(200)
def test_numbers_rise_with_their_events(seq: int, other_seq: int, hashed: int, other_hashed: int) -> None:
    number, other = reservation_number(seq, hashed), reservation_number(other_seq, other_hashed)
    if seq != other_seq:
        assert (number < other) == (seq < other_seq)
    else:
        assert (number == other) == (hashed == other_hashed)


@given(seqs, hashes)
@tries(200)
def test_an_id_is_its_number(seq: int, hashed: int) -> None:
    number = reservation_number(seq, hashed)
    text = reservation_id(number)
    assert parse_reservation_id(text) == number
    assert text.isascii()
    assert 6 <= len(text) <= 17


@pytest.mark.parametrize(
    "text",
    [
        "",
        "r",
        "r0",
        "rffff",
        "r01ffff",
        "r1FFFF",
        "R1ffff",
        "x1ffff",
        "r1fff_",
        "r1fff ",
        " r1ffff",
        "r1ffff\n",
        "r+1ffff",
        "r-1ffff",
        "r0x1fff",
        "r1fffg",
        "r\u0661ffff0",
        "r8000000000000000",
        "rffffffffffffffff",
        "r" + "1" * 17,
        "r" + "1" * 5_000,
    ],
)
def test_no_id(text: str) -> None:
    assert parse_reservation_id(text) is None


@given(st.text("r0123456789abcdefABCDEF_-+ \n", max_size=20))
@tries(300)
def test_what_parses_as_an_id_is_one(text: str) -> None:
    number = parse_reservation_id(text)
    assert number is None or reservation_id(number) == text


def test_the_last_id_there_can_be() -> None:
    assert parse_reservation_id("r7fffffffffffffff") == reservation_number(SEQ_MAX, HASH_MASK) == 2**63 - 1
    assert parse_reservation_id("r10000") == reservation_number(1, 0)


@given(st.integers(0, SHARDS_MAX - 1), st.integers(0, SEQ_MAX))
@tries(100)
def test_a_position_is_its_text(shard: int, seq: int) -> None:
    assert parse_position(position_text(shard, seq)) == (shard, seq)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "3",
        "3-",
        "-3",
        "3-x",
        "x-3",
        "3-4-5",
        "3--4",
        "+3-4",
        "3- 4",
        "3-4\n",
        "\u0663-4",
        "3-\u0664",
        "9999-1",
    ],
)
def test_no_position(text: str) -> None:
    assert parse_position(text) is None


@pytest.mark.parametrize("shards", [2, 3, 4, 7, 8, 16])
def test_the_counters_of_a_grocer_spread_evenly(shards: int) -> None:
    """Names as people give them differ in a digit or two: each shard still gets its share within a fifth."""
    slots = [
        f"2026-{month:02}-{day:02}T{hour:02}:00-{hour + 2:02}:00"
        for month in (11, 12)
        for day in range(1, 31)
        for hour in range(6, 22, 2)
    ]
    pools = [f"van-{zone}-{number}" for zone in ("north", "south") for number in range(1, 6)] + ["pick-dc1", "pick-dc2"]
    counts = Counter(shard_of_counter(pool_id, slot_id, shards) for pool_id in pools for slot_id in slots)
    share = len(pools) * len(slots) / shards
    assert len(counts) == shards
    assert all(0.8 * share < count < 1.2 * share for count in counts.values())


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_the_slots_of_one_pool_and_day_spread_as_by_chance(shards: int) -> None:
    """A sale is one day of one pool: its sixteen slots fall on the shards like thrown dice, chi-squared says."""
    chi_squared = 0.0
    freedom = 0
    expected = 16 / shards
    for pool_id in ("van-north", "van-south", "pick-dc1", "p1", "p2", "zone-a"):
        for day in range(1, 31):
            counts = Counter(
                shard_of_counter(pool_id, f"2026-11-{day:02}T{hour:02}:00-{hour + 1:02}:00", shards)
                for hour in range(6, 22)
            )
            chi_squared += sum((counts[shard] - expected) ** 2 / expected for shard in range(shards))
            freedom += shards - 1
    assert 0.7 < chi_squared / freedom < 1.3
