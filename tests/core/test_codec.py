"""Bodies of the journal: what was once written must decode for ever, and what is no body must say so.

The golden files hold one body a line as schema 1 wrote them. They are never edited: a schema 2 adds files of its own, and its
upcasters must bring these to the structs expected here, changed as the new schema says.
"""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import codec
from engine.core import events
from engine.ports import GENESIS_HASH, JournalCorruptError, JournalRow
from tests.core.drawing import tries

GOLDEN = Path(__file__).parent / "golden"

SHARD_EVENTS: list[list[events.ShardEvent]] = [
    [events.TermStarted(3, 1)],
    [events.Held([(0, 1), (2, 7)], 1796140000000, "SO-4711", "web", "000102030405060708090a0b0c0d0e0f", -(2**63))],
    [events.ConfirmedAtOnce([(1, 1_000_000)], 'SO-Köln "1"', "", "f" * 32, 2**63 - 1)],
    [events.Confirmed(262144017, -1, [(0, 1)], late=True)],
    [events.Confirmed(262144017, 77, None, late=False)],
    [events.Released(262144017, 78, "customer called")],
    [events.Extended(262144017, 79, 1796140600000)],
    [events.Moved(262144017, 80, [(1, 2), (2, 3), (3, 4)])],
    [events.Fulfilled(262144017, 81)],
    [events.Expired([262144017, 2**63 - 1], [1796140000000, 1796140000001])],
    [events.Refused("insufficient_capacity", [(0, 4, 3), (2, 1, 0)], "0" * 32, "SO-4712")],
    [events.PoolDefined(12, 1, "van-north", "Europe/Berlin", (90, None, None), [(0, 1796139000000)])],
    [events.PoolDefined(13, 2, "pick-dc1", "Asia/Singapore", (None, 1, 1080), [])],
    [events.PoolDefined(14, 3, "pick-dc2", "UTC", None, [])],
    [
        events.CountersDefined(
            15,
            [
                (1, "2026-12-01T18:00-20:00", 40, 2, 1, False, 1796144400000, 1796151600000, 1796139000000),
                (2, "2026-12-01T10:00-14:00", 2**53, 0, 0, True, 1, 2, 3),
            ],
        )
    ],
    [events.Forgotten(65536, 262144017, 1796053600000)],
    [],
    [
        events.Held([(0, 1)], 1796140000000, "", "", "0" * 31 + "1", 0),
        events.Released(131072, 5),
        events.Fulfilled(196608, 6),
    ],
    [
        events.Held(
            [(0, 1)], 1796140000000, "", "", "0" * 32, 7, [(1, 131073, [("pick-dc1", "2026-12-01T10:00-14:00", 7)])]
        )
    ],
    [events.Confirmed(262144017, 82, [(0, 1)], late=False, parts=[(1, 131073, [])])],
    [events.Moved(262144017, 83, [], [(1, 131073, [("pick-dc1", "2026-12-01T10:00-14:00", 2)])])],
    [events.PartPrepared(9007199254740993, 1, 0, 0, 0, [(0, 1)], "0" * 32)],
    [events.PartSynced(131073, 262144017, 2, 2, 0, [(0, 1)])],
    [events.PartsSettled(262144017, 2)],
]

PLANNER_EVENTS: list[list[events.PlannerEvent]] = [
    [events.TermStarted(3, 1)],
    [
        events.PoolPut(
            1, "van-north", "logistics", "stop", "north", "Europe/Berlin", (90, None, None), "third van", "anna"
        )
    ],
    [events.PoolPut(2, "pick-dc1", "warehouse", "pick_line", "", "UTC", None, "", "")],
    [
        events.CountersPut(
            [(1, "2026-12-01T18:00-20:00", 40, 2, 1, False, 1796144400000, 1796151600000, 1796139000000)],
            "third van",
            "anna",
        )
    ],
]


def golden(name: str) -> list[bytes]:
    return (GOLDEN / name).read_bytes().splitlines()


def row_of(body: bytes, count: int, schema: int = 1) -> JournalRow:
    return JournalRow(41, count, 3, 1, 1796140000000, schema, GENESIS_HASH, GENESIS_HASH, body)


@pytest.mark.parametrize(
    ("body", "expected"), list(zip(golden("shard-events-schema-1.jsonl"), SHARD_EVENTS, strict=True))
)
def test_shard_events_of_schema_1_decode_for_ever(body: bytes, expected: list[events.ShardEvent]) -> None:
    decoded = codec.decode_shard(row_of(body, len(expected)))
    assert decoded == expected
    assert [type(event) for event in decoded] == [type(event) for event in expected]
    written = codec.encode(decoded)  # longer than the old body where fields have been added since
    assert codec.decode_shard(row_of(written, len(expected))) == expected


@pytest.mark.parametrize(
    ("body", "expected"), list(zip(golden("planner-events-schema-1.jsonl"), PLANNER_EVENTS, strict=True))
)
def test_planner_events_of_schema_1_decode_for_ever(body: bytes, expected: list[events.PlannerEvent]) -> None:
    decoded = codec.decode_planner(row_of(body, len(expected)))
    assert decoded == expected
    assert [type(event) for event in decoded] == [type(event) for event in expected]
    assert codec.encode(decoded) == body


def test_every_event_has_a_golden_body() -> None:
    assert {type(event) for body in SHARD_EVENTS for event in body} == set(events.ShardEvent.__args__)
    assert {type(event) for body in PLANNER_EVENTS for event in body} == set(events.PlannerEvent.__args__)


def test_fields_with_a_default_may_be_missing_in_old_bodies() -> None:
    body = b'[["confirmed",65536,1],["released",65536,2],["refused","slot_closed",[],"00"]]'
    assert codec.decode_shard(row_of(body, 3)) == [
        events.Confirmed(65536, 1, None, late=False),
        events.Released(65536, 2, ""),
        events.Refused("slot_closed", [], "00", ""),
    ]


NO_BODIES = [
    b"",
    b"{}",
    b"null",
    b"[[]]",
    b"[1]",
    b'[["held"]]',
    b'[["vanished",1,2]]',
    b'[["Held",[[0,1]],1,"","","00",0]]',
    b'[["fulfilled",1,2]',
    b'[["fulfilled",1,2]]x',
    b'[["fulfilled","1",2]]',
    b'[["fulfilled",1.5,2]]',
    b'[["fulfilled",1]]',
    b'[["released",1,2,null]]',
    b'[["moved",1,2,[[1]]]]',
    b'[["moved",1,2,[[1,2,3]]]]',
    b'[["moved",1,2,null]]',
    b'[{"event":"fulfilled","number":1,"action":2}]',
    b'[["pool_put",1,"p","","","","UTC",null,"",""]]',
    b'[["counters_defined",1,[[1,"s",1,0,0,0,1,2,3]]]]',
    b'[["released",1,2,"\xff"]]',
    b'[["released",1,2,"\\ud800"]]',
]


@pytest.mark.parametrize("body", NO_BODIES)
def test_what_is_no_body_is_corrupt_and_the_row_is_named(body: bytes) -> None:
    with pytest.raises(JournalCorruptError, match="the row at 41 "):
        codec.decode_shard(row_of(body, 1))


@pytest.mark.parametrize("body", [b'[["held",[[0,1]],1,"","","00",0]]', b'[["pool_put",1]]', b"[", b"[1]"])
def test_what_is_no_body_of_the_planner_is_corrupt(body: bytes) -> None:
    with pytest.raises(JournalCorruptError, match="the row at 41 "):
        codec.decode_planner(row_of(body, 1))


@pytest.mark.parametrize("count", [0, 1, 3, -1])
def test_a_row_must_have_as_many_events_as_it_says(count: int) -> None:
    body = b'[["term_started",1,1],["term_started",1,2]]'
    for decode in (codec.decode_shard, codec.decode_planner):
        with pytest.raises(JournalCorruptError, match=f"says it has {count} events and has 2"):
            decode(row_of(body, count))


def test_a_schema_of_the_future_is_refused_with_what_to_do() -> None:
    for decode in (codec.decode_shard, codec.decode_planner):
        with pytest.raises(JournalCorruptError, match=r"schema 2, this version reads up to 1: run a version"):
            decode(row_of(b"[]", 0, schema=2))


@pytest.mark.parametrize("schema", [0, -1])
def test_a_schema_that_never_was_is_corrupt(schema: int) -> None:
    with pytest.raises(JournalCorruptError, match="which there never was"):
        codec.decode_shard(row_of(b"[]", 0, schema=schema))


def test_upcasters_bring_an_old_body_up_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As schema 3 will: 1 had a `gave_back` event, 2 called it `released`, 3 gave it a reason."""
    monkeypatch.setattr(codec, "SCHEMA", 3)
    monkeypatch.setitem(codec.UPCASTERS, 1, lambda body: body.replace(b'"gave_back"', b'"released"'))
    monkeypatch.setitem(codec.UPCASTERS, 2, lambda body: body.replace(b"]]", b',"none given"]]'))
    expected = [events.Released(65536, 2, "none given")]
    assert codec.decode_shard(row_of(b'[["gave_back",65536,2]]', 1, schema=1)) == expected
    assert codec.decode_shard(row_of(b'[["released",65536,2]]', 1, schema=2)) == expected
    assert codec.decode_shard(row_of(b'[["released",65536,2,"none given"]]', 1, schema=3)) == expected


def test_every_schema_before_this_one_has_an_upcaster() -> None:
    assert set(codec.UPCASTERS) == set(range(1, events.SCHEMA))


integers = st.integers(-(2**63), 2**63 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
line_lists = st.lists(st.tuples(integers, integers), max_size=4)
keys = st.binary(min_size=16, max_size=16).map(bytes.hex)
cutoffs = st.none() | st.tuples(*[st.none() | integers] * 3)
planned = st.lists(
    st.tuples(integers, text, integers, integers, integers, st.booleans(), integers, integers, integers), max_size=3
)
drawn_events: st.SearchStrategy[events.ShardEvent] = st.one_of(
    st.builds(events.TermStarted, integers, integers),
    st.builds(events.Held, line_lists, integers, text, text, keys, integers),
    st.builds(events.ConfirmedAtOnce, line_lists, text, text, keys, integers),
    st.builds(events.Confirmed, integers, integers, st.none() | line_lists, st.booleans()),
    st.builds(events.Released, integers, integers, text),
    st.builds(events.Extended, integers, integers, integers),
    st.builds(events.Moved, integers, integers, line_lists),
    st.builds(events.Fulfilled, integers, integers),
    st.builds(events.Expired, st.lists(integers, max_size=3), st.lists(integers, max_size=3)),
    st.builds(events.Refused, text, st.lists(st.tuples(integers, integers, integers), max_size=3), keys, text),
    st.builds(events.PoolDefined, integers, integers, text, text, cutoffs, line_lists),
    st.builds(events.CountersDefined, integers, planned),
    st.builds(events.Forgotten, integers, integers, integers),
)


@given(st.lists(drawn_events, max_size=6))
@tries(200)
def test_what_is_written_is_read_again(made: list[events.ShardEvent]) -> None:
    body = codec.encode(made)
    decoded = codec.decode_shard(row_of(body, len(made)))
    assert decoded == made
    assert codec.encode(decoded) == body
    assert b"\n" not in body, "a body is one line, so that journals can be searched and compared by line"


@given(st.lists(drawn_events, min_size=1, max_size=3), st.data())
@tries(200)
def test_a_cut_or_altered_body_is_corrupt_or_another_body_never_a_crash(
    made: list[events.ShardEvent], data: st.DataObject
) -> None:
    body = bytearray(codec.encode(made))
    place = data.draw(st.integers(0, len(body) - 1))
    if data.draw(st.booleans()):
        del body[place:]
    else:
        body[place] = data.draw(st.integers(0, 255))
    try:
        decoded = codec.decode_shard(row_of(bytes(body), len(made)))
    except JournalCorruptError:
        return
    assert msgspec.json.decode(codec.encode(decoded), type=list[events.ShardEvent]) == decoded
