"""Frames: however the bytes arrive the same payloads come out, each once; and every message survives the way."""

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.core import commands, outcomes
from engine.core.outcomes import CounterShort, Outcome
from engine.wire import FRAME_BYTES_MAX, FrameError, FrameReader

SHARD_COMMANDS: list[commands.ShardCommand] = [
    commands.Hold(
        [commands.Line("van-north", "2026-12-01T18:00-20:00", 3)], 600_000, bytes(range(16)), -(2**63), "SO", "w"
    ),
    commands.Confirm(2**62, -5, [commands.Line("a", "b", 1)]),
    commands.Confirm(1, 1),
    commands.Release(1, 2, "Größe"),
    commands.Extend(1, 2, 3),
    commands.Move(1, 2, [commands.Line("a", "b", 1)]),
    commands.Fulfil(1, 2),
    commands.Look(7),
    commands.LookCounters([1, 2, 3]),
    commands.Prepare(2**61, 1, 5, 6, 7, bytes(range(16)), [commands.Line("a", "b", 1)], "SO", is_confirm=True),
    commands.Sync(2**61, 5, 6, 7, 2, 8, [commands.Line("a", "b", 1)]),
    commands.Doubt(1, 2**61, 5, 6),
    commands.PlanPool(4, 0, "van-north", "Europe/Berlin", (90, None, None)),
    commands.PlanCounters(5, [commands.CounterPlan(0, "s", 1, 2, 3, True, 4, 5, 6)]),
    commands.PlanningHead(),
    commands.ShardStatus(),
]
PLANNER_COMMANDS: list[commands.PlannerCommand] = [
    commands.PutPool("van-north", "delivery", "stops", "north", "Europe/Berlin", (None, 1, 1080), "why", "who", 3),
    commands.PutCounters([commands.CounterPut("van-north", "s", 1, 2, 3, closed=True)], "why", "who", 3),
    commands.PlannerStatus(),
]
REFUSED = outcomes.Refused(
    9, Outcome.INSUFFICIENT_CAPACITY, [CounterShort("p", "s", 2, 1, Outcome.SLOT_CLOSED, 5)], "too little"
)
SHARD_REPLIES: list[outcomes.ShardReply] = [
    outcomes.Taken(1, 2**62, 3, 0),
    outcomes.Record(1, Outcome.MOVED, 2, 1, 3, 4, 5, 6, 7, "SO", "web", [("p", "s", 2)], late=True),
    REFUSED,
    outcomes.Prepared(1, 2**61, 5),
    outcomes.Synced(1, 5, 7),
    outcomes.CounterValues(1, [(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)]),
    outcomes.Planned(1, 2),
    outcomes.Status(1, {"counters": 2, "word": "three"}),
]
PLANNER_REPLIES: list[outcomes.PlannerReply] = [outcomes.Defined(1, 2, applied=True), REFUSED, outcomes.Status(1, {})]


@given(st.lists(st.binary(max_size=60), max_size=12), st.lists(st.integers(1, 40), max_size=60))
def test_any_split_of_the_stream_gives_the_same_payloads(payloads: list[bytes], sizes: list[int]) -> None:
    stream = b"".join(wire.frame(payload) for payload in payloads)
    reader = FrameReader()
    found: list[bytes] = []
    for size in [*sizes, len(stream)]:
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert [msgspec.msgpack.decode(payload) for payload in found] == payloads
    assert not reader._rest


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_a_caller_that_stops_early_gets_each_payload_once_all_the_same(numbers: list[int]) -> None:
    reader = FrameReader()
    found = []
    data = b"".join(wire.frame(number) for number in numbers)
    for _ in numbers:
        found.append(msgspec.msgpack.decode(next(reader.feed(data))))
        data = b""
    assert found == numbers
    assert list(reader.feed(b"")) == []


def test_a_frame_too_long_is_refused_before_its_bytes_are_waited_for() -> None:
    reader = FrameReader()
    assert list(reader.feed(FRAME_BYTES_MAX.to_bytes(4, "big"))) == []
    with pytest.raises(FrameError, match="longer than"):
        list(FrameReader().feed((FRAME_BYTES_MAX + 1).to_bytes(4, "big")))


def test_what_came_before_a_frame_too_long_is_handed_out() -> None:
    payloads = FrameReader().feed(wire.frame("good") + b"\xff" * 4)
    assert msgspec.msgpack.decode(next(payloads)) == "good"
    with pytest.raises(FrameError):
        next(payloads)


def one_payload(messages: object) -> bytes:
    (payload,) = FrameReader().feed(wire.frame(messages))
    return payload


def test_every_message_survives_the_way() -> None:
    asked = [(place, 2**62, command) for place, command in enumerate(SHARD_COMMANDS)]
    assert wire.shard_commands.decode(one_payload(asked)) == asked
    planning = [(place, 2**62, command) for place, command in enumerate(PLANNER_COMMANDS)]
    assert wire.planner_commands.decode(one_payload(planning)) == planning
    assert wire.shard_replies.decode(one_payload(list(enumerate(SHARD_REPLIES)))) == list(enumerate(SHARD_REPLIES))
    assert wire.planner_replies.decode(one_payload(list(enumerate(PLANNER_REPLIES)))) == list(
        enumerate(PLANNER_REPLIES)
    )


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_survives_the_way(outcome: Outcome) -> None:
    replies = [(0, outcomes.Refused(1, outcome))]
    assert wire.shard_replies.decode(one_payload(replies)) == replies


def test_no_message_was_left_out() -> None:
    for union, examples in (
        (commands.ShardCommand, SHARD_COMMANDS),
        (commands.PlannerCommand, PLANNER_COMMANDS),
        (outcomes.ShardReply, SHARD_REPLIES),
        (outcomes.PlannerReply, PLANNER_REPLIES),
    ):
        assert set(get_args(union)) == {type(example) for example in examples}
