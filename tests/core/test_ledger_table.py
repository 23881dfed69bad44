"""The life of a reservation as tables: every step from every status, every outcome, and the cases that decide money.

A row is a small story in the words of the domain. Two tests hold the tables complete: each cell of TRANSITIONS and each
outcome that `engine/core/ledger.py` names has a row.
"""

import inspect
import re
from collections.abc import Callable

import pytest

from engine.core import commands, events, ledger, outcomes
from engine.core.columns import CONFIRMED, COUNTER_FIELDS, EXPIRED, FULFILLED, HELD, RELEASED, STATUS_WORDS
from engine.core.commands import NO_TTL, Line
from engine.core.invariant import InvariantError
from engine.core.ledger import TRANSITIONS
from engine.core.limits import REFUSED_KEYS_MAX
from engine.core.outcomes import Outcome
from engine.core.sharding import counter_hash
from engine.core.slots import Cutoff, resolve
from tests.core.shard import (
    DAY_MS,
    EVENING,
    HOUR_MS,
    MINUTE_MS,
    MORNING,
    NIGHT,
    NOON_MS,
    RULES,
    SECOND_MS,
    ZONE,
    Shard,
    fingerprint,
    key,
    outcome_of,
    pick,
    planned_shard,
    van,
)

EVENING_STARTS_MS = resolve(EVENING, ZONE).starts_at_ms
EVENING_CUTOFF_MS = EVENING_STARTS_MS - 90 * MINUTE_MS
ALL_DAY_MS = 2 * DAY_MS
"""A time to live that reaches past every cut-off of the tests, for rules that allow it."""
PATIENT = RULES._replace(hold_ms_max=10 * DAY_MS)


@pytest.fixture
def shard() -> Shard:
    return planned_shard()


def reservation(shard: Shard, status: int) -> int:
    """The number of a reservation of one unit in that status."""
    number = shard.held(van(1), ttl_ms=SECOND_MS)
    if status in {CONFIRMED, FULFILLED}:
        shard.confirm(number)
    if status == FULFILLED:
        shard.fulfil(number)
    if status == RELEASED:
        shard.release(number)
    if status == EXPIRED:
        shard.now_ms += SECOND_MS
    assert shard.status(number) == status
    return number


def used(shard: Shard, slot_id: str = EVENING) -> int:
    return shard.ledger.counters.used(shard.row("van-north", slot_id))


def record_of(reply: outcomes.Reply) -> outcomes.Record:
    assert isinstance(reply, outcomes.Record), reply
    return reply


def refused_of(reply: outcomes.Reply) -> outcomes.Refused:
    assert isinstance(reply, outcomes.Refused), reply
    return reply


# --- every step from every status -------------------------------------------------------------------------------------

LIFE: list[tuple[int, str, Outcome, int]] = [
    # from, verb, answer, status afterwards
    (HELD, "confirm", Outcome.CONFIRMED, CONFIRMED),
    (HELD, "release", Outcome.RELEASED, RELEASED),
    (HELD, "extend", Outcome.EXTENDED, HELD),
    (HELD, "move", Outcome.MOVED, HELD),
    (HELD, "fulfil", Outcome.HOLD_NOT_CONFIRMED, HELD),
    (CONFIRMED, "confirm", Outcome.ALREADY_CONFIRMED, CONFIRMED),
    (CONFIRMED, "release", Outcome.RELEASED, RELEASED),
    (CONFIRMED, "extend", Outcome.ALREADY_CONFIRMED, CONFIRMED),
    (CONFIRMED, "move", Outcome.MOVED, CONFIRMED),
    (CONFIRMED, "fulfil", Outcome.FULFILLED, FULFILLED),
    (FULFILLED, "confirm", Outcome.ALREADY_FULFILLED, FULFILLED),
    (FULFILLED, "release", Outcome.ALREADY_FULFILLED, FULFILLED),
    (FULFILLED, "extend", Outcome.ALREADY_FULFILLED, FULFILLED),
    (FULFILLED, "move", Outcome.ALREADY_FULFILLED, FULFILLED),
    (FULFILLED, "fulfil", Outcome.ALREADY_FULFILLED, FULFILLED),
    (RELEASED, "confirm", Outcome.ALREADY_RELEASED, RELEASED),
    (RELEASED, "release", Outcome.ALREADY_RELEASED, RELEASED),
    (RELEASED, "extend", Outcome.ALREADY_RELEASED, RELEASED),
    (RELEASED, "move", Outcome.ALREADY_RELEASED, RELEASED),
    (RELEASED, "fulfil", Outcome.ALREADY_RELEASED, RELEASED),
    (EXPIRED, "confirm", Outcome.CONFIRMED, CONFIRMED),
    (EXPIRED, "release", Outcome.HOLD_EXPIRED, EXPIRED),
    (EXPIRED, "extend", Outcome.HOLD_EXPIRED, EXPIRED),
    (EXPIRED, "move", Outcome.HOLD_EXPIRED, EXPIRED),
    (EXPIRED, "fulfil", Outcome.HOLD_EXPIRED, EXPIRED),
]

EXPIRY: list[tuple[int, bool]] = [
    # from, whether an `expired` event can follow it
    (HELD, True),
    (CONFIRMED, False),
    (FULFILLED, False),
    (RELEASED, False),
    (EXPIRED, False),
]

VERBS: dict[str, Callable[[Shard, int], outcomes.Reply]] = {
    "confirm": lambda shard, number: shard.confirm(number),
    "release": lambda shard, number: shard.release(number),
    "extend": lambda shard, number: shard.extend(number, MINUTE_MS),
    "move": lambda shard, number: shard.move(number, van(2, NIGHT)),
    "fulfil": lambda shard, number: shard.fulfil(number),
}


def title(value: object) -> str:
    return STATUS_WORDS[value] if isinstance(value, int) and not isinstance(value, bool) else str(value)


def test_the_tables_have_every_cell() -> None:
    assert {(status, verb) for status, verb, _, _ in LIFE} | {(status, "expire") for status, _ in EXPIRY} == set(
        TRANSITIONS
    )


@pytest.mark.parametrize(("status", "verb", "answer", "afterwards"), LIFE, ids=title)
def test_a_step(shard: Shard, status: int, verb: str, answer: Outcome, afterwards: int) -> None:
    number = reservation(shard, status)
    before = record_of(shard.look(number))
    state_before = fingerprint(shard.ledger)

    reply = record_of(VERBS[verb](shard, number))

    assert reply.outcome is answer
    assert reply.status == afterwards
    done = answer in {Outcome.CONFIRMED, Outcome.RELEASED, Outcome.EXTENDED, Outcome.MOVED, Outcome.FULFILLED}
    if done:
        assert (reply.version, reply.seq) == (before.version + 1, before.seq + 1)
    else:
        assert reply.version == before.version
        assert fingerprint(shard.ledger) == state_before
    looked = record_of(shard.look(number))
    reply_as_looked_at = (reply.status, reply.version, reply.changed_seq, reply.expires_at_ms, reply.lines)
    assert reply_as_looked_at == (
        looked.status,
        looked.version,
        looked.changed_seq,
        looked.expires_at_ms,
        looked.lines,
    )
    taken = {HELD: (1, 0, 0), CONFIRMED: (0, 1, 0), FULFILLED: (0, 0, 1), RELEASED: (0, 0, 0), EXPIRED: (0, 0, 0)}
    if verb == "move" and done:
        assert shard.units(EVENING)[:3] == (0, 0, 0)
        assert shard.units(NIGHT)[:3] == tuple(2 * units for units in taken[afterwards])
    else:
        assert shard.units(EVENING)[:3] == taken[afterwards]


@pytest.mark.parametrize(("status", "can_expire"), EXPIRY, ids=title)
def test_an_expiry(shard: Shard, status: int, *, can_expire: bool) -> None:
    number = reservation(shard, status)
    due_ms = record_of(shard.look(number)).expires_at_ms
    shard.now_ms = max(shard.now_ms, due_ms)
    if can_expire:
        assert shard.status(number) == EXPIRED
        assert shard.units() == (0, 0, 0, 0)
        return
    assert ledger.expire(shard.ledger, shard.now_ms) is None
    with pytest.raises(InvariantError, match="the journal says expire"):
        ledger.apply(shard.ledger, events.Expired([number], [due_ms]), shard.now_ms)


ILLEGAL_EVENTS: list[tuple[int, Callable[[int], events.ShardEvent]]] = [
    (HELD, lambda number: events.Fulfilled(number, 9)),
    (HELD, lambda number: events.Confirmed(number, 9, None, late=True)),
    (EXPIRED, lambda number: events.Confirmed(number, 9)),
    (RELEASED, lambda number: events.Confirmed(number, 9)),
    (RELEASED, lambda number: events.Released(number, 9)),
    (CONFIRMED, lambda number: events.Extended(number, 9, NOON_MS + DAY_MS)),
    (FULFILLED, lambda number: events.Moved(number, 9, [(1, 1)])),
    (HELD, lambda number: events.Confirmed(number, 9, [(0, 2)])),
    (HELD, lambda number: events.Confirmed(number, 9, [(1, 1)])),
    (HELD, lambda number: events.Moved(number, 9, [(0, 4)])),
    (HELD, lambda number: events.Released(number + (1 << 16), 9)),
    (HELD, lambda number: events.Held([(0, 3)], NOON_MS + DAY_MS, "", "", key("k").hex(), number)),
    (HELD, lambda number: events.TermStarted(1, 1)),
    (HELD, lambda number: events.CountersDefined(1, [])),
    (HELD, lambda number: events.PoolDefined(1, 1, "van-north", ZONE, None, [])),
]


@pytest.mark.parametrize(("status", "made"), ILLEGAL_EVENTS)
def test_apply_refuses_a_journal_that_breaks_a_rule(
    shard: Shard, status: int, made: Callable[[int], events.ShardEvent]
) -> None:
    number = reservation(shard, status)
    with pytest.raises(InvariantError):
        ledger.apply(shard.ledger, made(number), shard.now_ms)


def test_apply_refuses_a_late_confirm_that_does_not_fit(shard: Shard) -> None:
    number = reservation(shard, EXPIRED)
    shard.held(van(3))
    with pytest.raises(InvariantError, match="would pass its limit"):
        ledger.apply(shard.ledger, events.Confirmed(number, 9, None, late=True), shard.now_ms)


def test_apply_refuses_time_that_goes_back(shard: Shard) -> None:
    shard.held(van(1))
    with pytest.raises(InvariantError, match="must not go back"):
        ledger.apply(shard.ledger, events.TermStarted(2, 0), shard.now_ms - 1)


# --- every outcome ----------------------------------------------------------------------------------------------------

Story = Callable[[Shard], outcomes.Reply]
OUTCOMES: list[tuple[Outcome, Story]] = []


def leads_to(outcome: Outcome) -> Callable[[Story], Story]:
    def add(story: Story) -> Story:
        OUTCOMES.append((outcome, story))
        return story

    return add


@leads_to(Outcome.HELD)
def room_for_a_hold(shard: Shard) -> outcomes.Reply:
    return shard.hold(van(3))


@leads_to(Outcome.CONFIRMED)
def without_a_time_to_live(shard: Shard) -> outcomes.Reply:
    return shard.hold(van(3), ttl_ms=NO_TTL)


@leads_to(Outcome.CONFIRMED)
def confirming_a_hold(shard: Shard) -> outcomes.Reply:
    return shard.confirm(shard.held(van(3)))


@leads_to(Outcome.RELEASED)
def releasing_a_hold(shard: Shard) -> outcomes.Reply:
    return shard.release(shard.held(van(1)))


@leads_to(Outcome.EXTENDED)
def more_time_for_a_hold(shard: Shard) -> outcomes.Reply:
    return shard.extend(shard.held(van(1)), 20 * MINUTE_MS)


@leads_to(Outcome.MOVED)
def another_slot_for_a_hold(shard: Shard) -> outcomes.Reply:
    return shard.move(shard.held(van(1)), van(1, NIGHT))


@leads_to(Outcome.FULFILLED)
def the_delivery_was_made(shard: Shard) -> outcomes.Reply:
    return shard.fulfil(shard.confirmed(van(1)))


@leads_to(Outcome.FOUND)
def looking_at_a_reservation(shard: Shard) -> outcomes.Reply:
    return shard.look(shard.held(van(1)))


@leads_to(Outcome.REPEATED)
def the_same_hold_again(shard: Shard) -> outcomes.Reply:
    shard.hold(van(1), name="same")
    return shard.hold(van(1), name="same")


@leads_to(Outcome.IDEMPOTENCY_KEY_REUSED)
def another_body_under_a_known_key(shard: Shard) -> outcomes.Reply:
    shard.hold(van(1), name="same", digest=1)
    return shard.hold(van(2), name="same", digest=2)


@leads_to(Outcome.INSUFFICIENT_CAPACITY)
def one_unit_too_many(shard: Shard) -> outcomes.Reply:
    return shard.hold(van(4))


@leads_to(Outcome.SLOT_CLOSED)
def a_closed_slot(shard: Shard) -> outcomes.Reply:
    shard.plan("van-north", EVENING, 3, closed=True)
    return shard.hold(van(1))


@leads_to(Outcome.PAST_CUTOFF)
def too_late_in_the_day(shard: Shard) -> outcomes.Reply:
    shard.now_ms = EVENING_CUTOFF_MS
    return shard.hold(van(1))


@leads_to(Outcome.UNKNOWN_POOL)
def a_pool_that_is_not(shard: Shard) -> outcomes.Reply:
    return shard.hold(Line("van-south", EVENING, 1))


@leads_to(Outcome.UNKNOWN_SLOT)
def a_slot_that_is_not(shard: Shard) -> outcomes.Reply:
    return shard.hold(van(1, "2026-12-02T18:00-20:00"))


@leads_to(Outcome.UNKNOWN_RESERVATION)
def a_reservation_that_is_not(shard: Shard) -> outcomes.Reply:
    return shard.confirm(77 << 16)


@leads_to(Outcome.UNKNOWN_RESERVATION)
def looking_at_a_reservation_that_is_not(shard: Shard) -> outcomes.Reply:
    return shard.look(77 << 16)


@leads_to(Outcome.HOLD_EXPIRED)
def extending_what_has_expired(shard: Shard) -> outcomes.Reply:
    return shard.extend(reservation(shard, EXPIRED), MINUTE_MS)


@leads_to(Outcome.HOLD_EXPIRED)
def a_late_confirm_when_the_units_are_taken(shard: Shard) -> outcomes.Reply:
    number = reservation(shard, EXPIRED)
    shard.held(van(3))
    return shard.confirm(number)


@leads_to(Outcome.HOLD_NOT_CONFIRMED)
def delivering_what_is_only_held(shard: Shard) -> outcomes.Reply:
    return shard.fulfil(shard.held(van(1)))


@leads_to(Outcome.EXTENSION_CAP_REACHED)
def extending_past_the_cap(shard: Shard) -> outcomes.Reply:
    number = shard.held(van(1), ttl_ms=RULES.hold_ms_max)
    shard.now_ms += MINUTE_MS
    return shard.extend(number, HOUR_MS)


@leads_to(Outcome.ALREADY_CONFIRMED)
def confirming_twice(shard: Shard) -> outcomes.Reply:
    return shard.confirm(shard.confirmed(van(1)))


@leads_to(Outcome.ALREADY_FULFILLED)
def releasing_what_was_delivered(shard: Shard) -> outcomes.Reply:
    return shard.release(reservation(shard, FULFILLED))


@leads_to(Outcome.ALREADY_RELEASED)
def confirming_what_was_released(shard: Shard) -> outcomes.Reply:
    return shard.confirm(reservation(shard, RELEASED))


@leads_to(Outcome.LINES_NOT_HELD)
def confirming_more_than_is_held(shard: Shard) -> outcomes.Reply:
    return shard.confirm(shard.held(van(1)), van(2))


@leads_to(Outcome.SHARD_FULL)
def a_counter_too_many(shard: Shard) -> outcomes.Reply:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "COUNTERS_OF_SHARD_MAX", 3)
        return shard.plan("van-north", "2026-12-02T18:00-20:00", 3)


@leads_to(Outcome.DEADLINE_PASSED)
def a_late_message_of_an_attempt_that_is_over(shard: Shard) -> outcomes.Reply:
    shard.ask(commands.Prepare(2, 1, 0, 0, 0, key("late"), [van(1)]))
    return shard.ask(commands.Prepare(1, 1, 0, 0, 0, key("late"), [van(1)]))


@pytest.mark.parametrize(("outcome", "story"), OUTCOMES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_an_outcome(shard: Shard, outcome: Outcome, story: Story) -> None:
    assert outcome_of(story(shard)) is outcome


def test_every_outcome_of_the_ledger_has_a_row() -> None:
    named = {Outcome[name] for name in re.findall(r"Outcome\.([A-Z_]+)", inspect.getsource(ledger))}
    answered_by_its_own_reply = {Outcome.HELD}
    assert named | answered_by_its_own_reply == {outcome for outcome, _ in OUTCOMES}


# --- taking -----------------------------------------------------------------------------------------------------------


def test_the_last_unit_goes_to_one(shard: Shard) -> None:
    answers = [outcome_of(shard.hold(van(1))) for _ in range(5)]
    assert answers == [Outcome.HELD] * 3 + [Outcome.INSUFFICIENT_CAPACITY] * 2
    assert shard.units() == (3, 0, 0, 2)


def test_lines_of_one_counter_are_summed_before_the_check(shard: Shard) -> None:
    short = refused_of(shard.hold(van(2), pick(1), van(2))).counters
    assert [(each.slot_id, each.quantity, each.available) for each in short] == [(EVENING, 4, 3)]
    number = shard.held(van(2), pick(1), van(1))
    assert record_of(shard.look(number)).lines == [("van-north", EVENING, 3), ("pick-dc1", MORNING, 1)]


def test_several_counters_all_or_nothing(shard: Shard) -> None:
    reply = refused_of(shard.hold(van(4), pick(7), van(6, NIGHT)))
    assert reply.outcome is Outcome.INSUFFICIENT_CAPACITY
    assert [(each.slot_id, each.reason) for each in reply.counters] == [
        (EVENING, Outcome.INSUFFICIENT_CAPACITY),
        (NIGHT, Outcome.INSUFFICIENT_CAPACITY),
    ]
    assert shard.units(MORNING, "pick-dc1") == (0, 0, 0, 0)
    assert (shard.units(EVENING), shard.units(NIGHT)) == ((0, 0, 0, 4), (0, 0, 0, 6))


def test_overbook_and_buffer_move_the_limit(shard: Shard) -> None:
    shard.plan("van-north", EVENING, 3, overbook=2, buffer=1)
    shard.held(van(4))
    assert outcome_of(shard.hold(van(1))) is Outcome.INSUFFICIENT_CAPACITY
    shard.plan("van-north", EVENING, 3, overbook=2)
    assert outcome_of(shard.hold(van(1))) is Outcome.HELD


def test_a_hold_lives_no_longer_than_the_cap(shard: Shard) -> None:
    reply = shard.hold(van(1), ttl_ms=ALL_DAY_MS)
    assert isinstance(reply, outcomes.Taken)
    assert reply.expires_at_ms == shard.now_ms + RULES.hold_ms_max


def test_units_are_free_from_the_very_millisecond_of_expiry(shard: Shard) -> None:
    shard.held(van(3), ttl_ms=SECOND_MS)
    assert outcome_of(shard.ask(hold_of(shard, van(1)), after_ms=SECOND_MS - 1)) is Outcome.INSUFFICIENT_CAPACITY
    assert outcome_of(shard.ask(hold_of(shard, van(1)), after_ms=1)) is Outcome.HELD


def hold_of(shard: Shard, *lines: Line) -> commands.Hold:
    return commands.Hold(list(lines), MINUTE_MS, key(f"key-{shard.action()}"), 1)


# --- confirming -------------------------------------------------------------------------------------------------------


def test_a_partial_confirm_gives_the_rest_back(shard: Shard) -> None:
    number = shard.held(van(3), pick(7))
    reply = record_of(shard.confirm(number, van(1), pick(7)))
    assert (reply.outcome, reply.lines) == (
        Outcome.CONFIRMED,
        [("van-north", EVENING, 1), ("pick-dc1", MORNING, 7)],
    )
    assert shard.units() == (0, 1, 0, 0)
    assert shard.units(MORNING, "pick-dc1") == (0, 7, 0, 0)
    assert outcome_of(shard.hold(van(2))) is Outcome.HELD


def test_a_partial_confirm_can_drop_a_whole_line_even_of_a_closed_counter(shard: Shard) -> None:
    number = shard.held(van(3), pick(7))
    shard.plan("van-north", EVENING, 3, closed=True)
    assert outcome_of(shard.confirm(number)) is Outcome.SLOT_CLOSED
    assert outcome_of(shard.confirm(number, pick(7))) is Outcome.CONFIRMED
    assert shard.units() == (0, 0, 0, 0)


def test_a_confirm_that_lists_everything_is_a_full_one(shard: Shard) -> None:
    number = shard.held(van(2), pick(7))
    shard.confirm(number, pick(7), van(1), van(1))
    assert shard.ledger.reservations.lines(*shard.ledger.reservations.writable(number)) == ((0, 2), (2, 7))
    assert shard.units() == (0, 2, 0, 0)


def test_a_late_confirm_takes_free_units_and_says_so(shard: Shard) -> None:
    number = reservation(shard, EXPIRED)
    reply = record_of(shard.confirm(number))
    assert (reply.outcome, reply.status, reply.late) == (Outcome.CONFIRMED, CONFIRMED, True)
    assert shard.units() == (0, 1, 0, 0)


def test_a_late_confirm_can_be_partial(shard: Shard) -> None:
    number = shard.held(van(3), ttl_ms=SECOND_MS)
    shard.now_ms += SECOND_MS
    shard.held(van(1))
    assert outcome_of(shard.confirm(number)) is Outcome.HOLD_EXPIRED
    assert outcome_of(shard.confirm(number, van(2))) is Outcome.CONFIRMED
    assert shard.units() == (1, 2, 0, 0)


def test_a_late_confirm_without_room_says_how_much_there_is(shard: Shard) -> None:
    number = shard.held(van(2), ttl_ms=SECOND_MS)
    shard.now_ms += SECOND_MS
    shard.held(van(2))
    reply = refused_of(shard.confirm(number))
    assert reply.outcome is Outcome.HOLD_EXPIRED
    assert [(each.quantity, each.available) for each in reply.counters] == [(2, 1)]
    assert shard.units() == (2, 0, 0, 0)


# --- extending --------------------------------------------------------------------------------------------------------


def test_an_extension_counts_from_now(shard: Shard) -> None:
    number = shard.held(van(1), ttl_ms=10 * MINUTE_MS)
    shard.now_ms += 9 * MINUTE_MS
    reply = record_of(shard.extend(number, 5 * MINUTE_MS))
    assert reply.expires_at_ms == shard.now_ms + 5 * MINUTE_MS
    shard.now_ms += 5 * MINUTE_MS - 1
    assert shard.status(number) == HELD
    shard.now_ms += 1
    assert shard.status(number) == EXPIRED


def test_an_extension_ends_at_the_cap(shard: Shard) -> None:
    number = shard.held(van(1), ttl_ms=10 * MINUTE_MS)
    created_at_ms = shard.now_ms
    shard.now_ms += 9 * MINUTE_MS
    reply = record_of(shard.extend(number, HOUR_MS))
    assert reply.expires_at_ms == created_at_ms + RULES.hold_ms_max
    assert outcome_of(shard.extend(number, HOUR_MS)) is Outcome.EXTENSION_CAP_REACHED


def test_an_extension_never_shortens_and_the_hold_expires_once(shard: Shard) -> None:
    number = shard.held(van(1), ttl_ms=10 * MINUTE_MS)
    until_ms = shard.now_ms + 10 * MINUTE_MS
    for _ in range(3):
        reply = record_of(shard.extend(number, MINUTE_MS))
        assert (reply.outcome, reply.expires_at_ms) == (Outcome.EXTENDED, until_ms)
    shard.now_ms = until_ms
    event = ledger.expire(shard.ledger, shard.now_ms)
    assert event == events.Expired([number], [until_ms])


# --- moving -----------------------------------------------------------------------------------------------------------


def test_a_move_on_a_full_counter_counts_its_own_units_as_free(shard: Shard) -> None:
    number = shard.held(van(2))
    shard.held(van(1))
    assert outcome_of(shard.move(number, van(1))) is Outcome.MOVED
    assert outcome_of(shard.move(number, van(2))) is Outcome.MOVED
    reply = refused_of(shard.move(number, van(3)))
    assert [(each.quantity, each.available) for each in reply.counters] == [(3, 2)]
    assert shard.units() == (3, 0, 0, 3)


def test_a_move_to_a_full_counter_keeps_the_old_slot(shard: Shard) -> None:
    shard.held(van(5, NIGHT))
    number = shard.confirmed(van(1))
    assert outcome_of(shard.move(number, van(1, NIGHT))) is Outcome.INSUFFICIENT_CAPACITY
    assert record_of(shard.look(number)).lines == [("van-north", EVENING, 1)]
    assert (shard.units(EVENING), shard.units(NIGHT)) == ((0, 1, 0, 0), (5, 0, 0, 1))


def test_a_move_away_from_a_closed_counter(shard: Shard) -> None:
    number = shard.confirmed(van(2))
    shard.plan("van-north", EVENING, 3, closed=True)
    assert outcome_of(shard.move(number, van(2, NIGHT))) is Outcome.MOVED
    assert outcome_of(shard.move(number, van(2, EVENING))) is Outcome.SLOT_CLOSED
    assert (shard.units(EVENING)[:3], shard.units(NIGHT)[:3]) == ((0, 0, 0), (0, 2, 0))


def test_a_move_gives_back_on_a_closed_counter_but_takes_nothing_there(shard: Shard) -> None:
    number = shard.confirmed(van(2))
    shard.plan("van-north", EVENING, 3, closed=True)
    assert outcome_of(shard.move(number, van(3))) is Outcome.SLOT_CLOSED
    assert outcome_of(shard.move(number, van(2), pick(1))) is Outcome.MOVED
    assert outcome_of(shard.move(number, van(1), pick(1))) is Outcome.MOVED


def test_a_move_past_the_cutoff_goes_only_away(shard: Shard) -> None:
    number = shard.confirmed(van(2))
    shard.now_ms = EVENING_CUTOFF_MS
    assert outcome_of(shard.move(number, van(3))) is Outcome.PAST_CUTOFF
    assert outcome_of(shard.move(number, van(1))) is Outcome.MOVED
    assert outcome_of(shard.move(number, van(1, NIGHT))) is Outcome.MOVED
    assert outcome_of(shard.move(number, van(1))) is Outcome.PAST_CUTOFF


def test_a_move_goes_between_few_lines_and_many(shard: Shard) -> None:
    number = shard.held(van(1))
    assert outcome_of(shard.move(number, van(2), van(2, NIGHT), pick(2))) is Outcome.MOVED
    assert (shard.units(EVENING), shard.units(NIGHT), shard.units(MORNING, "pick-dc1")) == ((2, 0, 0, 0),) * 3
    assert outcome_of(shard.move(number, pick(1))) is Outcome.MOVED
    assert shard.ledger.reservations.long_lines == {}
    assert shard.units(MORNING, "pick-dc1") == (1, 0, 0, 0)


def test_a_move_to_what_is_not_changes_nothing(shard: Shard) -> None:
    number = shard.held(van(1))
    assert outcome_of(shard.move(number, van(1), Line("van-south", EVENING, 1))) is Outcome.UNKNOWN_POOL
    assert record_of(shard.look(number)).version == 1


# --- asking again -----------------------------------------------------------------------------------------------------


def test_a_retry_finds_its_first_try_whatever_became_of_it(shard: Shard) -> None:
    first = shard.hold(van(1), name="same")
    assert isinstance(first, outcomes.Taken)
    shard.release(first.number)
    again = record_of(shard.hold(van(1), name="same"))
    assert (again.outcome, again.number, again.status) == (Outcome.REPEATED, first.number, RELEASED)
    assert used(shard) == 0


def test_a_retry_of_a_refusal_is_counted_once_and_may_succeed(shard: Shard) -> None:
    number = shard.held(van(3))
    for _ in range(3):
        assert outcome_of(shard.hold(van(2), name="same")) is Outcome.INSUFFICIENT_CAPACITY
    assert shard.units() == (3, 0, 0, 2)
    shard.release(number)
    assert outcome_of(shard.hold(van(2), name="same")) is Outcome.HELD
    assert shard.units() == (2, 0, 0, 2)
    assert shard.ledger.refused_keys == {}


def test_a_retried_refusal_of_a_move_is_counted_once(shard: Shard) -> None:
    number = shard.held(van(1))
    for _ in range(3):
        assert outcome_of(shard.move(number, van(4), action=-7)) is Outcome.INSUFFICIENT_CAPACITY
    assert shard.units() == (1, 0, 0, 4)


def test_keys_of_refusals_are_kept_up_to_a_bound(shard: Shard) -> None:
    for number in range(REFUSED_KEYS_MAX + 10):
        ledger.apply(shard.ledger, events.Refused("slot_closed", [(0, 1, 0)], f"{number:032x}"), shard.now_ms)
    assert len(shard.ledger.refused_keys) == REFUSED_KEYS_MAX
    assert next(iter(shard.ledger.refused_keys)) == f"{10:032x}"


SAME_ACTION: list[tuple[int, str, Callable[[Shard, int, int], outcomes.Reply], Outcome]] = [
    (HELD, "confirm", lambda shard, number, action: shard.confirm(number, action=action), Outcome.CONFIRMED),
    (CONFIRMED, "release", lambda shard, number, action: shard.release(number, action=action), Outcome.RELEASED),
    (HELD, "extend", lambda shard, number, action: shard.extend(number, MINUTE_MS, action=action), Outcome.EXTENDED),
    (HELD, "move", lambda shard, number, action: shard.move(number, van(2), action=action), Outcome.MOVED),
    (CONFIRMED, "fulfil", lambda shard, number, action: shard.fulfil(number, action=action), Outcome.FULFILLED),
    (EXPIRED, "late confirm", lambda shard, number, action: shard.confirm(number, action=action), Outcome.CONFIRMED),
]


@pytest.mark.parametrize(
    ("status", "step", "outcome"),
    [(row[0], row[2], row[3]) for row in SAME_ACTION],
    ids=[row[1] for row in SAME_ACTION],
)
def test_the_same_action_again_is_answered_as_the_first_time_and_done_once(
    shard: Shard, status: int, step: Callable[[Shard, int, int], outcomes.Reply], outcome: Outcome
) -> None:
    number = reservation(shard, status)
    first = record_of(step(shard, number, -5))
    after_first = fingerprint(shard.ledger)
    again = record_of(step(shard, number, -5))
    assert (first.outcome, again.outcome) == (outcome, outcome)
    assert (again.status, again.version, again.lines) == (first.status, first.version, first.lines)
    assert fingerprint(shard.ledger) == after_first


def test_another_key_is_another_reservation(shard: Shard) -> None:
    """Also where one half of the key is the same, and the part of the index it is filed in."""
    numbers = set()
    for each in (bytes(16), bytes(8) + b"\0\1" + bytes(6), b"\1" + bytes(15)):
        reply = shard.ask(commands.Hold([van(1)], MINUTE_MS, each, 1))
        assert isinstance(reply, outcomes.Taken)
        numbers.add(reply.number)
    assert len(numbers) == used(shard) == 3


# --- overcommitted ----------------------------------------------------------------------------------------------------


def overcommitted(shard: Shard) -> tuple[int, int]:
    """A hold and a confirmed reservation of one unit each, on a counter whose limit is one."""
    numbers = shard.held(van(1)), shard.confirmed(van(1))
    shard.plan("van-north", EVENING, 1)
    return numbers


def test_lowering_a_limit_below_what_is_booked_is_recorded_not_refused(shard: Shard) -> None:
    held, _ = overcommitted(shard)
    at_seq = shard.ledger.seq
    assert used(shard) == 2
    [exception] = shard.auditor.overcommitments
    assert exception == (at_seq, ("van-north", EVENING), 2, 1, None)
    shard.release(held)
    [exception] = shard.auditor.overcommitments
    assert exception.until_seq == shard.ledger.seq


def test_an_overcommitted_counter_refuses_holds(shard: Shard) -> None:
    overcommitted(shard)
    reply = refused_of(shard.hold(van(1)))
    assert reply.outcome is Outcome.INSUFFICIENT_CAPACITY
    assert reply.counters[0].available == 0


def test_an_overcommitted_counter_lets_releases_confirms_and_deliveries_through(shard: Shard) -> None:
    held, confirmed = overcommitted(shard)
    assert outcome_of(shard.confirm(held)) is Outcome.CONFIRMED
    assert outcome_of(shard.fulfil(confirmed)) is Outcome.FULFILLED
    assert outcome_of(shard.release(held)) is Outcome.RELEASED
    assert shard.units() == (0, 0, 1, 0)


def test_an_overcommitted_counter_allows_moves_that_take_less_or_the_same(shard: Shard) -> None:
    number = shard.held(van(3))
    shard.plan("van-north", EVENING, 1)
    assert outcome_of(shard.move(number, van(3), pick(1))) is Outcome.MOVED
    assert outcome_of(shard.move(number, van(2), pick(1))) is Outcome.MOVED
    assert outcome_of(shard.move(number, van(3))) is Outcome.INSUFFICIENT_CAPACITY
    assert used(shard) == 2


def test_an_overcommitted_counter_takes_no_late_confirm(shard: Shard) -> None:
    number = shard.held(van(2), ttl_ms=SECOND_MS)
    shard.now_ms += SECOND_MS
    shard.plan("van-north", EVENING, 1)
    assert outcome_of(shard.confirm(number)) is Outcome.HOLD_EXPIRED


# --- cut-off and closed, to the millisecond ---------------------------------------------------------------------------

AT_AN_INSTANT: list[tuple[str, Callable[[Shard, int], outcomes.Reply], Outcome]] = [
    ("hold", lambda shard, _: shard.hold(van(1)), Outcome.HELD),
    ("confirm at once", lambda shard, _: shard.hold(van(1), ttl_ms=NO_TTL), Outcome.CONFIRMED),
    ("confirm", lambda shard, number: shard.confirm(number), Outcome.CONFIRMED),
    ("move here", lambda shard, number: shard.move(number, van(2)), Outcome.MOVED),
]

ids_of_instants = [row[0] for row in AT_AN_INSTANT]


@pytest.mark.parametrize(("step", "done"), [row[1:] for row in AT_AN_INSTANT], ids=ids_of_instants)
def test_from_the_cutoff_on_nothing_is_taken(step: Callable[[Shard, int], outcomes.Reply], done: Outcome) -> None:
    early = planned_shard(PATIENT)
    number = early.held(van(1), ttl_ms=ALL_DAY_MS)
    early.now_ms = EVENING_CUTOFF_MS - 1
    assert outcome_of(step(early, number)) is done

    late = planned_shard(PATIENT)
    number = late.held(van(1), ttl_ms=ALL_DAY_MS)
    late.now_ms = EVENING_CUTOFF_MS
    assert outcome_of(step(late, number)) is Outcome.PAST_CUTOFF
    assert late.status(number) == HELD


@pytest.mark.parametrize(("step", "done"), [row[1:] for row in AT_AN_INSTANT], ids=ids_of_instants)
def test_of_a_closed_counter_nothing_is_taken(
    shard: Shard, step: Callable[[Shard, int], outcomes.Reply], done: Outcome
) -> None:
    number = shard.held(van(1))
    shard.plan("van-north", EVENING, 3, closed=True)
    assert outcome_of(step(shard, number)) is Outcome.SLOT_CLOSED
    shard.plan("van-north", EVENING, 3)
    assert outcome_of(step(shard, number)) is done


def test_a_late_confirm_past_the_cutoff_names_the_cutoff() -> None:
    shard = planned_shard(PATIENT)
    number = shard.held(van(1), ttl_ms=MINUTE_MS)
    shard.now_ms = EVENING_CUTOFF_MS
    assert outcome_of(shard.confirm(number)) is Outcome.PAST_CUTOFF


def test_release_extend_and_fulfil_do_not_look_at_the_cutoff() -> None:
    shard = planned_shard(PATIENT)
    first = shard.held(van(1), ttl_ms=ALL_DAY_MS)
    second = shard.confirmed(van(1))
    shard.now_ms = EVENING_STARTS_MS + HOUR_MS
    assert outcome_of(shard.extend(first, ALL_DAY_MS)) is Outcome.EXTENDED
    assert outcome_of(shard.release(first)) is Outcome.RELEASED
    assert outcome_of(shard.fulfil(second)) is Outcome.FULFILLED


def test_a_pool_without_a_rule_takes_orders_until_a_slot_ends(shard: Shard) -> None:
    ends_at_ms = resolve(MORNING, ZONE).ends_at_ms
    shard.now_ms = ends_at_ms - 1
    assert outcome_of(shard.hold(pick(1))) is Outcome.HELD
    shard.now_ms = ends_at_ms
    reply = refused_of(shard.hold(pick(1)))
    assert (reply.outcome, reply.counters[0].cutoff_at_ms) == (Outcome.PAST_CUTOFF, ends_at_ms)


def test_refused_demand_past_the_cutoff_is_counted(shard: Shard) -> None:
    shard.now_ms = EVENING_CUTOFF_MS
    shard.hold(van(2))
    assert shard.units() == (0, 0, 0, 2)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_new_rule_of_a_pool_moves_the_cutoffs_of_its_counters(shard: Shard) -> None:
    counters = shard.ledger.counters
    pick_cutoff_ms = counters.cutoff_at_ms[shard.row("pick-dc1", MORNING)]
    shard.plan_pool(1, "van-north", Cutoff(days_before=1, local_minute=18 * 60))
    six_the_day_before_ms = resolve("2026-11-30T18:00-19:00", ZONE).starts_at_ms
    for slot_id in (EVENING, NIGHT):
        row = shard.row("van-north", slot_id)
        assert (counters.cutoff_at_ms[row], counters.plan_version[row]) == (six_the_day_before_ms, shard.planning_seq)
    assert counters.cutoff_at_ms[shard.row("pick-dc1", MORNING)] == pick_cutoff_ms
    shard.now_ms = six_the_day_before_ms
    assert outcome_of(shard.hold(van(1))) is Outcome.PAST_CUTOFF
    shard.plan_pool(1, "van-north", None)
    assert outcome_of(shard.hold(van(1))) is Outcome.HELD


def test_a_counter_is_as_planned_and_keeps_its_instants(shard: Shard) -> None:
    def as_it_is() -> dict[str, int]:
        return {field: getattr(shard.ledger.counters, field)[row] for field in COUNTER_FIELDS}

    shard.plan("van-north", EVENING, 40, overbook=2, buffer=1, closed=True)
    row = shard.row("van-north", EVENING)
    planned = {
        "base": 40,
        "overbook": 2,
        "buffer": 1,
        "limit": 41,
        "held": 0,
        "confirmed": 0,
        "fulfilled": 0,
        "refused": 0,
        "closed": 1,
        "starts_at_ms": EVENING_STARTS_MS,
        "ends_at_ms": EVENING_STARTS_MS + 2 * HOUR_MS,
        "cutoff_at_ms": EVENING_CUTOFF_MS,
        "changed_seq": shard.ledger.seq,
        "plan_version": shard.planning_seq,
        "pool_code": 1,
        "hashed": counter_hash("van-north", EVENING),
    }
    assert as_it_is() == planned
    moved = events.CountersDefined(shard.planning_seq + 1, [(1, EVENING, 1, 0, 5, False, 1, 2, 3)])
    shard.apply(moved)
    changes = {"base": 1, "overbook": 0, "buffer": 5, "limit": 0, "closed": 0, "cutoff_at_ms": 3}
    versions = {"changed_seq": shard.ledger.seq, "plan_version": shard.planning_seq + 1}
    assert as_it_is() == planned | changes | versions


def test_a_plan_that_came_before_is_answered_and_not_applied(shard: Shard) -> None:
    before = fingerprint(shard.ledger)
    for command in (
        commands.PlanPool(shard.planning_seq, 1, "van-north", ZONE, None),
        commands.PlanCounters(1, []),
        commands.PlanningHead(),
    ):
        assert shard.ask(command) == outcomes.Planned(shard.ledger.seq, shard.planning_seq)
    assert fingerprint(shard.ledger) == before


def test_a_full_shard_still_takes_changes_of_the_counters_it_has(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "COUNTERS_OF_SHARD_MAX", 3)
    assert isinstance(shard.plan("van-north", EVENING, 9), outcomes.Planned)
    assert shard.ledger.counters.limit[shard.row("van-north", EVENING)] == 9


def test_counters_of_a_pool_that_has_not_come_break_an_invariant(shard: Shard) -> None:
    plan = commands.CounterPlan(9, EVENING, 1, 0, 0, False, 0, 1, 1)
    with pytest.raises(InvariantError, match="before its counters"):
        shard.ask(commands.PlanCounters(100, [plan]))


def test_a_counter_keeps_its_units_and_row_through_a_plan(shard: Shard) -> None:
    shard.held(van(2))
    row = shard.row("van-north", EVENING)
    shard.plan("van-north", EVENING, 8)
    assert shard.row("van-north", EVENING) == row
    assert shard.units() == (2, 0, 0, 0)


def test_the_status_of_a_shard(shard: Shard) -> None:
    shard.held(van(1))
    reply = shard.ask(commands.ShardStatus())
    assert isinstance(reply, outcomes.Status)
    assert reply.values == {"counters": 3, "reservations": 1, "planning_seq": 5, "epoch": 1, "restart": 1}


# --- forgetting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [RELEASED, EXPIRED, FULFILLED], ids=title)
def test_what_is_finished_is_forgotten_when_it_has_been_kept_long_enough(shard: Shard, status: int) -> None:
    number = reservation(shard, status)
    units = shard.units()
    changed_at_ms = record_of(shard.look(number)).changed_at_ms
    shard.now_ms = changed_at_ms + RULES.finished_keep_ms
    shard.forget_all()
    assert shard.status(number) == status
    shard.now_ms += 1
    shard.forget_all()
    assert outcome_of(shard.look(number)) is Outcome.UNKNOWN_RESERVATION
    assert shard.units() == units


def test_what_is_confirmed_is_forgotten_long_after_its_slot(shard: Shard) -> None:
    number = shard.confirmed(van(1))
    shard.now_ms = resolve(EVENING, ZONE).ends_at_ms + RULES.finished_keep_ms
    shard.forget_all()
    assert shard.status(number) == CONFIRMED
    shard.now_ms += 1
    shard.forget_all()
    assert outcome_of(shard.look(number)) is Outcome.UNKNOWN_RESERVATION
    assert shard.units() == (0, 1, 0, 0)


LATER = "2026-12-05T18:00-20:00"


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("lines", [[van(1)], [van(1), van(1, NIGHT), pick(1)]], ids=["two lines", "four lines"])
def test_what_is_confirmed_is_kept_until_the_last_of_its_slots_is_long_past(
    shard: Shard, lines: list[Line], shuffled: bool
) -> None:
    shard.plan("van-north", LATER, 5)
    lines = [*lines, van(1, LATER)]
    number = shard.confirmed(*(lines[::-1] if shuffled else lines))
    shard.now_ms = resolve(LATER, ZONE).ends_at_ms + RULES.finished_keep_ms
    shard.forget_all()
    assert shard.status(number) == CONFIRMED
    shard.now_ms += 1
    shard.forget_all()
    assert outcome_of(shard.look(number)) is Outcome.UNKNOWN_RESERVATION
    assert shard.units() == (0, 1, 0, 0)


@pytest.mark.parametrize("own_lines", [True, False])
def test_a_reservation_is_kept_until_its_parts_elsewhere_are_past_in_every_zone(shard: Shard, own_lines: bool) -> None:
    """Their instants are not known at home, their dates are: three days after the midnight (UTC) that begins the date."""
    parts = [(1, 70, [("pick-far", "2026-12-03T22:00-02:00", 1), ("pick-far", LATER, 1)]), (2, 71, [("x", MORNING, 2)])]
    number = shard.confirmed(van(1))
    shard.apply(events.Moved(number, 7, [(shard.row("van-north", EVENING), 1)] if own_lines else [], parts))
    shard.now_ms = resolve("2026-12-08T00:00-01:00", "UTC").starts_at_ms + RULES.finished_keep_ms - 1
    shard.apply(events.PartsSettled(number, 2))
    shard.forget_all()
    assert shard.status(number) == CONFIRMED
    shard.now_ms += 1
    shard.forget_all()
    assert outcome_of(shard.look(number)) is Outcome.UNKNOWN_RESERVATION
    assert number not in shard.ledger.parts


def test_a_reservation_whose_news_is_owed_is_not_forgotten(shard: Shard) -> None:
    number = shard.confirmed(van(1))
    shard.apply(events.Moved(number, 7, [], [(1, 70, [("pick-far", LATER, 1)])]))
    shard.now_ms += 99 * DAY_MS
    shard.forget_all()
    assert shard.status(number) == CONFIRMED


def test_what_is_held_is_never_forgotten() -> None:
    shard = planned_shard(PATIENT)
    number = shard.held(van(1), ttl_ms=9 * DAY_MS)
    shard.now_ms += 8 * DAY_MS
    shard.forget_all()
    assert shard.status(number) == HELD


def test_a_key_is_free_again_once_its_record_is_forgotten(shard: Shard) -> None:
    first = shard.hold(van(1), name="same")
    assert isinstance(first, outcomes.Taken)
    shard.release(first.number)
    shard.now_ms += RULES.finished_keep_ms + 1
    shard.forget_all()
    second = shard.hold(pick(1), name="same", digest=2)
    assert isinstance(second, outcomes.Taken)
    assert second.number > first.number
    again = record_of(shard.hold(pick(1), name="same", digest=2))
    assert again.number == second.number


def test_nothing_to_forget_makes_no_event(shard: Shard) -> None:
    assert shard.forget(0) == 0
    number = shard.held(van(1))
    assert shard.forget(0) == number + 1
    assert shard.forget(number + 1) == 0
