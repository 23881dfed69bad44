"""The checker itself: a history in which nothing is wrong, and each rule broken on purpose."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.core.sharding import shard_of_counter
from tests.chaos.history import Attempt, CounterName, History, Span, home_of, violations

COUNTER = ("van-1", "2030-01-01T14:00-16:00")
FAR = ("pick-dc1", "2030-01-01T14:00-16:00")
"""Of another shard."""
R1, R2, R3, R9 = "r10000", "r20000", "r30000", "r90000"
"""Reservations whose home is that of COUNTER, shard 0."""
SHARDS = 2
LIMIT = 3


def _lines(lines: dict[CounterName, int]) -> list[dict[str, Any]]:
    return [{"pool_id": pool_id, "slot_id": slot_id, "quantity": units} for (pool_id, slot_id), units in lines.items()]


class World:
    """Three keys: one confirmed over two shards, one released, one refused; and what a sound engine says of them."""

    def __init__(self) -> None:
        both = {COUNTER: 2, FAR: 1}
        confirmed = Attempt("a", both, R1, status="confirmed", spans=[Span(both, 1.0)])
        released = Attempt("b", {COUNTER: 1}, R2, status="released", spans=[Span({COUNTER: 1}, 2.0, 3.0)])
        refused = Attempt("c", {COUNTER: 2}, refused=True)
        self.history = History({attempt.key: attempt for attempt in (confirmed, released, refused)})
        self.events: list[dict[str, Any]] = [
            {"event": "term_started", "data": {}},
            {"event": "part_prepared", "position": "1-1", "data": {"home_shard": 0, "attempt": 1, "lines": []}},
            {"event": "confirmed_at_once", "data": {"order_ref": "a", "reservation_id": R1}},
            self.part(R1, 1, "confirmed", {FAR: 1}),
            {"event": "held", "data": {"order_ref": "b", "reservation_id": R2}},
            {"event": "released", "data": {"reservation_id": R2}},
        ]
        self.reservations: dict[str, dict[str, Any]] = {
            attempt.reservation_id or "": {
                "status": attempt.status,
                "order_ref": attempt.key,
                "lines": _lines(attempt.lines),
            }
            for attempt in (confirmed, released)
        }
        self.counters: dict[CounterName, dict[str, Any]] = {
            COUNTER: {"used": 2, "limit": LIMIT},
            FAR: {"used": 1, "limit": LIMIT},
        }

    @staticmethod
    def part(reservation: str | None, version: int, status: str, lines: dict[CounterName, int]) -> dict[str, Any]:
        data = {"reservation_id": reservation, "version": version, "status": status, "lines": _lines(lines)}
        return {"event": "part_synced", "position": "1-2", "data": data}

    def violations(self) -> list[str]:
        return list(
            violations(
                self.history,
                shards=SHARDS,
                limits={COUNTER: LIMIT, FAR: LIMIT},
                counters=self.counters,
                events=self.events,
                reservations=self.reservations,
            )
        )


def _lose(world: World) -> None:
    del world.reservations[R1]


def _forget_the_release(world: World) -> None:
    world.reservations[R2]["status"] = "confirmed"


def _double(world: World) -> None:
    world.events.append({"event": "held", "data": {"order_ref": "a", "reservation_id": R9}})


def _make_what_was_refused(world: World) -> None:
    world.events.append({"event": "held", "data": {"order_ref": "c", "reservation_id": R9}})


def _make_what_nobody_asked_for(world: World) -> None:
    world.events.append({"event": "held", "data": {"order_ref": "d", "reservation_id": R9}})


def _release_twice(world: World) -> None:
    world.events.append({"event": "released", "data": {"reservation_id": R2}})


def _overbook_for_a_moment(world: World) -> None:
    extra = Attempt("e", {COUNTER: 1}, R3, status="released", spans=[Span({COUNTER: 1}, 2.5, 4.0)])
    world.history.attempts["e"] = extra
    world.events.append({"event": "held", "data": {"order_ref": "e", "reservation_id": R3}})
    world.events.append({"event": "released", "data": {"reservation_id": R3}})
    world.reservations[R3] = world.reservations[R2] | {"order_ref": "e"}


def _count_one_too_many(world: World) -> None:
    world.counters[COUNTER]["used"] = 3


def _lose_the_counter(world: World) -> None:
    del world.counters[COUNTER]


def _lose_a_part(world: World) -> None:
    del world.events[3]


def _give_a_part_back(world: World) -> None:
    world.events.append(world.part(R1, 2, "released", {FAR: 1}))


def _keep_a_part_of_what_was_released(world: World) -> None:
    world.events.append(world.part(R2, 1, "held", {FAR: 1}))


def _make_a_part_of_nothing(world: World) -> None:
    world.events.append(world.part(R9, 1, "confirmed", {FAR: 1}))


def _change_when_it_expires(world: World) -> None:
    world.history.attempts["a"].status = world.reservations[R1]["status"] = "held"
    world.history.attempts["a"].expires_at = "2030-01-01T00:00:00Z"
    world.reservations[R1]["expires_at"] = "2030-01-01T00:10:00Z"


def _let_a_client_find_something(world: World) -> None:
    world.history.violations.append("a: answered 500")


def test_the_counters_lie_on_two_shards() -> None:
    assert (shard_of_counter(*COUNTER, SHARDS), shard_of_counter(*FAR, SHARDS)) == (0, 1)
    assert {home_of(number, SHARDS) for number in (R1, R2, R3, R9)} == {0}


def test_parts_of_older_versions_and_of_attempts_that_came_to_nothing_do_not_count() -> None:
    world = World()
    world.events += [world.part(R1, 0, "released", {}), world.part(None, 0, "released", {FAR: 3})]
    assert world.violations() == []


def test_a_sound_history_breaks_no_rule() -> None:
    assert World().violations() == []


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (_lose, f"a: reservation {R1} is lost"),
        (_forget_the_release, "b: acknowledged ('released'"),
        (_double, f"a: acknowledged ['{R1}'], the feed tells ['{R1}', '{R9}']"),
        (_make_what_was_refused, f"c: acknowledged [], the feed tells ['{R9}']"),
        (_make_what_nobody_asked_for, "d: the feed tells of a reservation that nobody asked for"),
        (_release_twice, "b: released, and released 2 times in the feed"),
        (_overbook_for_a_moment, "4 units were certainly held"),
        (_count_one_too_many, "used 3 of 3, acknowledged 2 of 3"),
        (_lose_the_counter, "the counter is lost"),
        (_lose_a_part, f"a: {R1} takes {{}} on shard 1"),
        (_give_a_part_back, f"a: {R1} takes {{}} on shard 1"),
        (_keep_a_part_of_what_was_released, f"b: {R2} takes {{{FAR}: 1}} on shard 1"),
        (_make_a_part_of_nothing, f"nobody's key: {R9} takes {{{FAR}: 1}} on shard 1"),
        (_change_when_it_expires, "a: acknowledged ('held'"),
        (_let_a_client_find_something, "a: answered 500"),
    ],
)
def test_each_planted_error_is_named(plant: Callable[[World], None], named: str) -> None:
    world = World()
    plant(world)
    (found,) = world.violations()
    assert named in found
