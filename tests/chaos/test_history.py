"""The checker itself: a history in which nothing is wrong, and each rule broken on purpose."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.history import Attempt, History, violations

COUNTER = ("van-1", "2030-01-01T08:00-10:00")
LIMIT = 3


class World:
    """Three keys: one confirmed, one released, one refused; and what a sound engine says of them."""

    def __init__(self) -> None:
        confirmed = Attempt("a", {COUNTER: 2}, "r1", status="confirmed", acknowledged_at=1.0)
        released = Attempt("b", {COUNTER: 1}, "r2", status="released", acknowledged_at=2.0, release_asked_at=3.0)
        refused = Attempt("c", {COUNTER: 2}, refused=True)
        self.history = History({attempt.key: attempt for attempt in (confirmed, released, refused)})
        self.events: list[dict[str, Any]] = [
            {"event": "term_started", "data": {}},
            {"event": "confirmed_at_once", "data": {"order_ref": "a", "reservation_id": "r1"}},
            {"event": "held", "data": {"order_ref": "b", "reservation_id": "r2"}},
            {"event": "released", "data": {"reservation_id": "r2"}},
        ]
        self.reservations: dict[str, dict[str, Any]] = {
            attempt.reservation_id or "": {
                "status": attempt.status,
                "order_ref": attempt.key,
                "lines": [{"pool_id": COUNTER[0], "slot_id": COUNTER[1], "quantity": attempt.lines[COUNTER]}],
            }
            for attempt in (confirmed, released)
        }
        self.counters: dict[tuple[str, str], dict[str, Any]] = {COUNTER: {"used": 2, "limit": LIMIT}}

    def violations(self) -> list[str]:
        return list(
            violations(
                self.history,
                limits={COUNTER: LIMIT},
                counters=self.counters,
                events=self.events,
                reservations=self.reservations,
            )
        )


def _lose(world: World) -> None:
    del world.reservations["r1"]


def _forget_the_release(world: World) -> None:
    world.reservations["r2"]["status"] = "confirmed"


def _double(world: World) -> None:
    world.events.append({"event": "held", "data": {"order_ref": "a", "reservation_id": "r9"}})


def _make_what_was_refused(world: World) -> None:
    world.events.append({"event": "held", "data": {"order_ref": "c", "reservation_id": "r9"}})


def _make_what_nobody_asked_for(world: World) -> None:
    world.events.append({"event": "held", "data": {"order_ref": "d", "reservation_id": "r9"}})


def _release_twice(world: World) -> None:
    world.events.append({"event": "released", "data": {"reservation_id": "r2"}})


def _overbook_for_a_moment(world: World) -> None:
    extra = Attempt("e", {COUNTER: 1}, "r3", status="released", acknowledged_at=2.5, release_asked_at=4.0)
    world.history.attempts["e"] = extra
    world.events.append({"event": "held", "data": {"order_ref": "e", "reservation_id": "r3"}})
    world.events.append({"event": "released", "data": {"reservation_id": "r3"}})
    world.reservations["r3"] = world.reservations["r2"] | {"order_ref": "e"}


def _count_one_too_many(world: World) -> None:
    world.counters[COUNTER]["used"] = 3


def _lose_the_counter(world: World) -> None:
    world.counters.clear()


def _let_a_client_find_something(world: World) -> None:
    world.history.violations.append("a: answered 500")


def test_a_sound_history_breaks_no_rule() -> None:
    assert World().violations() == []


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (_lose, "a: reservation r1 is lost"),
        (_forget_the_release, "b: acknowledged released"),
        (_double, "a: acknowledged ['r1'], the feed tells ['r1', 'r9']"),
        (_make_what_was_refused, "c: acknowledged [], the feed tells ['r9']"),
        (_make_what_nobody_asked_for, "d: the feed tells of a reservation that nobody asked for"),
        (_release_twice, "b: released, and released 2 times in the feed"),
        (_overbook_for_a_moment, "4 units were certainly held"),
        (_count_one_too_many, "used 3 of 3, acknowledged 2 of 3"),
        (_lose_the_counter, "the counter is lost"),
        (_let_a_client_find_something, "a: answered 500"),
    ],
)
def test_each_planted_error_is_named(plant: Callable[[World], None], named: str) -> None:
    world = World()
    plant(world)
    (found,) = world.violations()
    assert named in found
