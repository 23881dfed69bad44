"""The auditor finds what is planted: every rule has an event stream that breaks it, and a broken ledger is caught.

That it finds nothing in what a right ledger writes is proven by all of `test_ledger_properties.py`.
"""

import random
import sys
import tracemalloc
from collections.abc import Callable

import pytest

from engine import audit
from engine.audit import Auditor, CounterTotals, Overcommitment, Rule
from engine.core import columns, events, ledger, outcomes
from engine.core.sharding import counter_hash, reservation_number
from tests.core.shard import EVENING, NIGHT, counted, planned_shard, van

SLOT_STARTS_MS, SLOT_ENDS_MS, CUTOFF_MS = 50_000, 60_000, 40_000
KEY = "0" * 31
NAMES = [("van-north", EVENING), ("van-north", NIGHT)]
RULES_OF_PARTS = [
    Rule.PREPARED_TOO_LATE,
    Rule.PART_GAVE_UP_UNITS,
    Rule.PART_TOOK_UNPREPARED,
    Rule.PART_WENT_BACK,
    Rule.PART_OF_ANOTHER,
    Rule.EXPIRED_WHILE_PINNED,
    Rule.PART_LEFT_OUT,
    Rule.SETTLED_ANOTHER_VERSION,
]


def defined(
    planning_seq: int, base: int, *, slot_id: str = EVENING, closed: bool = False, pool_code: int = 1
) -> events.CountersDefined:
    return events.CountersDefined(
        planning_seq, [(pool_code, slot_id, base, 0, 0, closed, SLOT_STARTS_MS, SLOT_ENDS_MS, CUTOFF_MS)]
    )


def held(units: int, *, row: int = 0, expires_at_ms: int = 30_000, key: int = 1) -> events.Held:
    return events.Held([(row, units)], expires_at_ms, "SO-1", "web", f"{KEY}{key}", 1)


def at_once(units: int, *, row: int = 0, key: int = 1) -> events.ConfirmedAtOnce:
    return events.ConfirmedAtOnce([(row, units)], "SO-1", "web", f"{KEY}{key}", 1)


def refused(units: int, *, row: int = 0, available: int = 0) -> events.Refused:
    return events.Refused("insufficient_capacity", [(row, units, available)], KEY)


PLANNED: list[tuple[int, events.ShardEvent]] = [
    (1_000, events.TermStarted(1, 1)),
    (1_000, events.PoolDefined(1, 1, "van-north", "UTC", None, [])),
    (1_000, defined(2, 3)),
    (1_000, defined(3, 5, slot_id=NIGHT)),
]
FIRST_SEQ = len(PLANNED) + 1


def number(place: int, row: int = 0) -> int:
    """The number of the reservation made by the event at that place after PLANNED."""
    return reservation_number(FIRST_SEQ + place, counter_hash(*NAMES[row]))


def audited(stream: list[tuple[int, events.ShardEvent]]) -> Auditor:
    """An auditor that has taken PLANNED and then these events."""
    auditor = Auditor()
    for place, (at_ms, event) in enumerate([*PLANNED, *stream]):
        auditor.take(place + 1, at_ms, event)
    return auditor


BROKEN: list[tuple[Rule, list[tuple[int, events.ShardEvent]]]] = [
    (Rule.TIME_WENT_BACK, [(2_000, held(1)), (1_999, events.Released(number(0), 1))]),
    (Rule.TERM_NOT_RISEN, [(2_000, events.TermStarted(1, 1))]),
    (Rule.TERM_NOT_RISEN, [(2_000, events.TermStarted(0, 9))]),
    (Rule.PLANNING_SEQ_NOT_RISEN, [(2_000, defined(3, 5))]),
    (Rule.PLANNING_SEQ_NOT_RISEN, [(2_000, events.PoolDefined(2, 1, "van-north", "UTC", None, []))]),
    (Rule.UNKNOWN_POOL, [(2_000, defined(9, 5, pool_code=7))]),
    (Rule.UNKNOWN_RESERVATION, [(2_000, events.Released(77, 1))]),
    (Rule.UNKNOWN_RESERVATION, [(2_000, events.Expired([77], [1_000]))]),
    (Rule.EVENT_MALFORMED, [(2_000, held(1, row=2))]),
    (Rule.EVENT_MALFORMED, [(2_000, held(1, row=-1))]),
    (Rule.EVENT_MALFORMED, [(2_000, held(0))]),
    (Rule.EVENT_MALFORMED, [(2_000, events.Held([], 30_000, "", "", f"{KEY}1", 1))]),
    (Rule.EVENT_MALFORMED, [(2_000, events.Held([(0, 1), (0, 1)], 30_000, "", "", f"{KEY}1", 1))]),
    (Rule.EVENT_MALFORMED, [(2_000, events.Held([(0, 1)], 30_000, "", "", "no hex", 1))]),
    (Rule.EVENT_MALFORMED, [(2_000, held(1)), (2_000, events.Moved(number(0), 1, []))]),
    (Rule.EVENT_MALFORMED, [(2_000, held(1)), (2_000, events.Confirmed(number(0), 1, [(0, -1)]))]),
    (Rule.EVENT_MALFORMED, [(2_000, events.Expired([77], []))]),
    (Rule.EVENT_MALFORMED, [(2_000, events.Refused("slot_closed", [(5, 1, 0)], KEY))]),
    (Rule.EVENT_MALFORMED, [(2_000, events.Refused("slot_closed", [], KEY))]),
    (Rule.EVENT_MALFORMED, [(2_000, events.PoolDefined(9, 1, "van-north", "UTC", None, [(2, 5)]))]),
    (Rule.EVENT_MALFORMED, [(2_000, events.PoolDefined(9, 2, "van-south", "UTC", None, [(0, 5)]))]),
    (Rule.LIMIT_PASSED, [(2_000, held(4))]),
    (Rule.LIMIT_PASSED, [(2_000, held(3)), (2_000, at_once(1, key=2))]),
    (Rule.LIMIT_PASSED, [(2_000, held(3)), (2_000, events.Moved(number(0), 1, [(0, 4)]))]),
    (
        Rule.LIMIT_PASSED,
        [(2_000, held(3)), (2_000, held(3, row=1, key=2)), (2_000, events.Moved(number(1, 1), 1, [(0, 1)]))],
    ),
    (
        Rule.LIMIT_PASSED,
        [
            (2_000, held(2)),
            (30_000, events.Expired([number(0)], [30_000])),
            (30_000, at_once(2, key=2)),
            (30_000, events.Confirmed(number(0), 1, None, late=True)),
        ],
    ),
    (Rule.LIMIT_PASSED, [(2_000, held(3)), (2_000, defined(4, 1)), (2_000, at_once(1, key=2))]),
    (Rule.TAKEN_WHILE_CLOSED, [(2_000, defined(4, 3, closed=True)), (2_000, held(1))]),
    (
        Rule.TAKEN_WHILE_CLOSED,
        [(2_000, held(1)), (2_000, defined(4, 3, closed=True)), (2_000, events.Confirmed(number(0), 1))],
    ),
    (
        Rule.TAKEN_WHILE_CLOSED,
        [(2_000, held(1)), (2_000, defined(4, 3, closed=True)), (2_000, events.Moved(number(0), 1, [(0, 2)]))],
    ),
    (Rule.TAKEN_PAST_CUTOFF, [(CUTOFF_MS, held(1, expires_at_ms=90_000))]),
    (Rule.TAKEN_PAST_CUTOFF, [(CUTOFF_MS, at_once(1))]),
    (
        Rule.TAKEN_PAST_CUTOFF,
        [(2_000, held(1, expires_at_ms=90_000)), (CUTOFF_MS, events.Confirmed(number(0), 1))],
    ),
    (
        Rule.TAKEN_PAST_CUTOFF,
        [(2_000, events.PoolDefined(4, 1, "van-north", "UTC", None, [(0, 2_000)])), (2_000, held(1))],
    ),
    (Rule.STEP_ILLEGAL, [(2_000, held(1)), (2_000, events.Fulfilled(number(0), 1))]),
    (Rule.STEP_ILLEGAL, [(2_000, held(1)), (2_000, events.Confirmed(number(0), 1, None, late=True))]),
    (Rule.STEP_ILLEGAL, [(2_000, at_once(1)), (2_000, events.Confirmed(number(0), 1))]),
    (Rule.STEP_ILLEGAL, [(2_000, at_once(1)), (2_000, events.Extended(number(0), 1, 50_000))]),
    (Rule.STEP_ILLEGAL, [(2_000, at_once(1)), (2_000, events.Expired([number(0)], [0]))]),
    (
        Rule.STEP_ILLEGAL,
        [(2_000, held(1)), (2_000, events.Released(number(0), 1)), (2_000, events.Released(number(0), 2))],
    ),
    (
        Rule.STEP_ILLEGAL,
        [(2_000, held(1)), (30_000, events.Expired([number(0), number(0)], [30_000, 30_000]))],
    ),
    (
        Rule.STEP_ILLEGAL,
        [
            (2_000, held(1)),
            (30_000, events.Expired([number(0)], [30_000])),
            (30_000, events.Confirmed(number(0), 1)),
        ],
    ),
    (Rule.KEY_USED_TWICE, [(2_000, held(1)), (2_000, held(1))]),
    (Rule.KEY_USED_TWICE, [(2_000, held(1)), (2_000, events.Released(number(0), 1)), (2_000, at_once(1))]),
    (Rule.KEPT_MORE_THAN_HELD, [(2_000, held(1)), (2_000, events.Confirmed(number(0), 1, [(0, 2)]))]),
    (Rule.KEPT_MORE_THAN_HELD, [(2_000, held(1)), (2_000, events.Confirmed(number(0), 1, [(1, 1)]))]),
    (Rule.HOLD_SHORTENED, [(2_000, held(1)), (2_000, events.Extended(number(0), 1, 29_999))]),
    (Rule.EXPIRED_TOO_EARLY, [(2_000, held(1)), (29_999, events.Expired([number(0)], [30_000]))]),
    (Rule.EXPIRED_AT_ANOTHER_TIME, [(2_000, held(1)), (30_000, events.Expired([number(0)], [29_999]))]),
    (
        Rule.EXPIRED_AT_ANOTHER_TIME,
        [
            (2_000, held(1)),
            (2_000, events.Extended(number(0), 1, 35_000)),
            (36_000, events.Expired([number(0)], [30_000])),
        ],
    ),
    (Rule.HOLD_OVERDUE, [(2_000, held(1)), (30_000, events.Confirmed(number(0), 1))]),
    (Rule.HOLD_OVERDUE, [(2_000, held(1)), (30_000, events.Released(number(0), 1))]),
    (Rule.HOLD_OVERDUE, [(2_000, held(1)), (30_000, events.Extended(number(0), 1, 60_000))]),
    (Rule.HOLD_OVERDUE, [(2_000, held(3)), (30_000, refused(1))]),
    (Rule.HOLD_OVERDUE, [(2_000, held(1)), (30_000, events.Moved(number(0), 1, [(0, 2)]))]),
    (
        Rule.HOLD_OVERDUE,
        [(2_000, held(1)), (2_000, events.Extended(number(0), 1, 35_000)), (35_000, refused(9))],
    ),
    (
        # The hold that was expired is not the one whose units are in the way.
        Rule.HOLD_OVERDUE,
        [
            (2_000, held(1)),
            (2_000, held(1, key=2)),
            (30_000, events.Expired([number(0)], [30_000])),
            (30_000, refused(9)),
        ],
    ),
    (
        Rule.HOLD_OVERDUE,
        [
            (2_000, held(1)),
            (2_000, events.Moved(number(0), 1, [(1, 1)])),
            (30_000, events.Refused("insufficient_capacity", [(0, 9, 3), (1, 9, 4)], KEY)),
        ],
    ),
    (Rule.REFUSED_WITHOUT_CAUSE, [(2_000, events.Refused("insufficient_capacity", [(0, 3, 2)], KEY))]),
    (Rule.REFUSED_WITHOUT_CAUSE, [(2_000, events.Refused("slot_closed", [(0, 3, 2)], KEY))]),
    (Rule.REFUSED_WITHOUT_CAUSE, [(CUTOFF_MS - 1, events.Refused("past_cutoff", [(0, 3, 2)], KEY))]),
    (Rule.REFUSED_WITHOUT_CAUSE, [(2_000, events.Refused("bad_weather", [(0, 9, 0)], KEY))]),
]


@pytest.mark.parametrize(("rule", "stream"), BROKEN, ids=lambda value: str(value) if isinstance(value, Rule) else None)
def test_a_broken_rule_is_found(rule: Rule, stream: list[tuple[int, events.ShardEvent]]) -> None:
    """At the last event, and nothing before it."""
    assert audited(stream[:-1]).findings == []
    found = audited(stream).findings
    assert [finding.what for finding in found] == [rule]
    assert found[0].seq == FIRST_SEQ + len(stream) - 1


def test_every_rule_has_a_stream_that_breaks_it() -> None:
    with_tests_of_their_own = {Rule.SEQ_SKIPPED, Rule.UNITS_NOT_THE_SUM, Rule.UNITS_BELOW_ZERO}
    with_tests_of_their_own |= set(RULES_OF_PARTS)  # in test_audit_parts.py
    assert {rule for rule, _ in BROKEN} | with_tests_of_their_own == set(Rule)


RIGHT: list[list[tuple[int, events.ShardEvent]]] = [
    [(2_000, held(3)), (29_999, events.Confirmed(number(0), 1))],
    [(2_000, held(3)), (29_999, events.Confirmed(number(0), 1, [(0, 2)])), (30_000, at_once(1, key=2))],
    [(2_000, held(3)), (35_000, events.Expired([number(0)], [30_000])), (35_000, held(3, key=2, expires_at_ms=39_000))],
    [
        (2_000, held(1)),
        (30_000, events.Expired([number(0)], [30_000])),
        (30_000, events.Confirmed(number(0), 1, None, late=True)),
        (90_000, events.Fulfilled(number(0), 2)),
    ],
    [(2_000, held(1)), (35_000, events.TermStarted(1, 2)), (35_000, events.Expired([number(0)], [30_000]))],
    [(2_000, held(1)), (2_000, events.Extended(number(0), 1, 30_000)), (30_000, events.Expired([number(0)], [30_000]))],
    [(2_000, at_once(3)), (CUTOFF_MS, events.Moved(number(0), 1, [(0, 2)]))],
    [(2_000, at_once(3)), (2_000, events.Moved(number(0), 1, [(1, 5)]))],
    [(2_000, held(3)), (2_000, defined(4, 1)), (2_000, events.Confirmed(number(0), 1))],
    [(2_000, held(3)), (2_000, defined(4, 1)), (2_000, events.Moved(number(0), 1, [(0, 3), (1, 1)]))],
    [(CUTOFF_MS, events.Refused("past_cutoff", [(0, 3, 3)], KEY))],
    [(2_000, events.Refused("insufficient_capacity", [(0, 4, 3), (1, 1, 5)], KEY))],
]


@pytest.mark.parametrize("stream", RIGHT)
def test_a_right_stream_has_no_findings(stream: list[tuple[int, events.ShardEvent]]) -> None:
    auditor = audited(stream)
    auditor.recount()
    assert auditor.findings == []


def test_a_gap_in_the_positions_is_found() -> None:
    auditor = Auditor()
    auditor.take(1, 0, events.TermStarted(1, 1))
    auditor.take(3, 0, events.TermStarted(1, 2))
    auditor.take(4, 0, events.TermStarted(1, 3))
    auditor.take(4, 0, events.TermStarted(1, 4))
    assert [(finding.seq, finding.what) for finding in auditor.findings] == [
        (3, Rule.SEQ_SKIPPED),
        (4, Rule.SEQ_SKIPPED),
    ]


def test_units_that_are_not_the_sum_of_the_lines_are_found() -> None:
    auditor = audited([(2_000, held(2)), (2_000, at_once(1, row=1, key=2))])
    auditor.recount()
    assert auditor.findings == []
    auditor._counters[1].units[audit.CONFIRMED] -= 1
    auditor.recount()
    [finding] = auditor.findings
    assert (finding.what, finding.counter) == (Rule.UNITS_NOT_THE_SUM, NAMES[1])
    auditor.take(FIRST_SEQ + 2, 2_000, events.Released(number(1, 1), 1))
    assert [finding.what for finding in auditor.findings] == [Rule.UNITS_NOT_THE_SUM, Rule.UNITS_BELOW_ZERO]


def test_a_finding_names_the_counter_or_the_reservation() -> None:
    [passed] = audited([(2_000, held(4))]).findings
    assert (passed.counter, passed.number) == (NAMES[0], number(0))
    assert passed.detail == "4 units taken: used 4, limit 3"
    [illegal] = audited([(2_000, held(1)), (2_000, events.Fulfilled(number(0), 1))]).findings
    assert (illegal.counter, illegal.number) == (None, number(0))
    assert illegal.detail == "fulfil of what is held"


def test_findings_are_bounded_and_still_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "FINDINGS_MAX", 3)
    auditor = audited([(2_000, events.Released(place, 1)) for place in range(10)])
    assert len(auditor.findings) == 3
    assert auditor.statistics().findings == 10


def test_totals_and_statistics() -> None:
    auditor = audited(
        [
            (2_000, held(1)),
            (2_000, at_once(2, row=1, key=2)),
            (2_000, at_once(1, row=1, key=3)),
            (2_000, events.Fulfilled(number(2, 1), 1)),
            (2_000, events.Refused("insufficient_capacity", [(0, 7, 2), (1, 9, 2)], KEY)),
        ]
    )
    assert auditor.totals() == [
        CounterTotals("van-north", EVENING, 3, 3, held=1, confirmed=0, fulfilled=0, refused=7),
        CounterTotals("van-north", NIGHT, 5, 5, held=0, confirmed=2, fulfilled=1, refused=9),
    ]
    assert auditor.statistics() == audit.Statistics(
        seq=FIRST_SEQ + 4, counters=2, reservations=3, findings=0, overcommitments=0
    )


def test_a_limit_never_falls_below_zero() -> None:
    auditor = Auditor()
    for place, (at_ms, event) in enumerate(PLANNED):
        auditor.take(place + 1, at_ms, event)
    plan = events.CountersDefined(9, [(1, EVENING, 1, 0, 5, False, SLOT_STARTS_MS, SLOT_ENDS_MS, CUTOFF_MS)])
    auditor.take(FIRST_SEQ, 2_000, plan)
    assert auditor.totals()[0].limit == 0
    assert auditor.overcommitments == []


# --- overcommitted ----------------------------------------------------------------------------------------------------


def test_a_limit_lowered_below_what_is_booked_is_listed_until_it_fits_again() -> None:
    stream: list[tuple[int, events.ShardEvent]] = [
        (2_000, held(3)),
        (2_000, defined(4, 1)),
        (2_000, events.Moved(number(0), 1, [(0, 2)])),
        (2_000, events.Moved(number(0), 2, [(0, 2), (1, 1)])),
        (2_000, events.Confirmed(number(0), 3, [(0, 1)])),
    ]
    assert audited(stream[:4]).overcommitments == [Overcommitment(FIRST_SEQ + 1, NAMES[0], 3, 1, None)]
    assert audited(stream).overcommitments == [Overcommitment(FIRST_SEQ + 1, NAMES[0], 3, 1, FIRST_SEQ + 4)]
    assert audited(stream).findings == []


def test_each_plan_below_what_is_booked_is_listed() -> None:
    stream: list[tuple[int, events.ShardEvent]] = [
        (2_000, held(3)),
        (2_000, defined(4, 2)),
        (2_000, defined(5, 2, closed=True)),
        (2_000, defined(6, 1)),
        (2_000, defined(7, 3)),
        (2_000, defined(8, 0)),
        (30_000, events.Expired([number(0)], [30_000])),
    ]
    auditor = audited(stream)
    assert auditor.findings == []
    assert auditor.overcommitments == [
        Overcommitment(FIRST_SEQ + 1, NAMES[0], 3, 2, FIRST_SEQ + 3),
        Overcommitment(FIRST_SEQ + 3, NAMES[0], 3, 1, FIRST_SEQ + 4),
        Overcommitment(FIRST_SEQ + 5, NAMES[0], 3, 0, FIRST_SEQ + 6),
    ]


# --- holds that are due ------------------------------------------------------------------------------------------------


def test_decisions_between_the_steps_of_a_mass_expiry_are_legal() -> None:
    """Others may be overdue as long as nobody is refused for the units of such a hold, and no step is taken on one."""
    auditor = audited(
        [
            (2_000, held(1)),
            (2_000, held(1, key=2)),
            (2_000, held(1, row=1, key=3)),
            (30_000, at_once(1, key=4)),
            (30_000, events.Refused("slot_closed", [(0, 1, 0)], KEY)),
            (30_000, events.Expired([number(0)], [30_000])),
            (30_000, events.Confirmed(number(0), 1, None, late=True)),
            (30_000, defined(4, 3, closed=True)),
            (30_000, events.Refused("slot_closed", [(0, 1, 0)], KEY)),
            (30_000, events.Expired([number(1)], [30_000])),
            (30_000, refused(9)),
            (30_000, events.Expired([number(2, 1)], [30_000])),
            (30_000, refused(9, row=1)),
        ]
    )
    assert [finding.what for finding in auditor.findings] == [Rule.REFUSED_WITHOUT_CAUSE]
    assert [finding.seq for finding in auditor.findings] == [FIRST_SEQ + 4]


def test_every_refusal_beside_an_overdue_hold_is_found_until_it_has_expired() -> None:
    auditor = audited(
        [
            (2_000, held(1)),
            (29_999, refused(9)),
            (30_000, refused(9)),
            (30_000, refused(9, row=1)),
            (30_001, refused(9)),
            (30_001, events.Expired([number(0)], [30_000])),
            (30_001, refused(9)),
        ]
    )
    assert [(finding.seq, finding.what, finding.counter) for finding in auditor.findings] == [
        (FIRST_SEQ + 2, Rule.HOLD_OVERDUE, NAMES[0]),
        (FIRST_SEQ + 4, Rule.HOLD_OVERDUE, NAMES[0]),
    ]
    assert not auditor._due
    assert not auditor._overdue


# --- forgetting -------------------------------------------------------------------------------------------------------


def test_forgotten_records_leave_and_their_units_stay() -> None:
    stream: list[tuple[int, events.ShardEvent]] = [
        (2_000, at_once(1)),
        (2_000, at_once(1, row=1, key=2)),
        (2_000, held(1, key=3)),
        (3_000, events.Fulfilled(number(1, 1), 1)),
        (3_000, events.Released(number(2), 1)),
        (99_000, events.Forgotten(0, 2**62, 3_000)),
    ]
    auditor = audited(stream)
    assert auditor.statistics().reservations == 3
    auditor.take(FIRST_SEQ + 6, 99_000, events.Forgotten(0, number(1, 1), 3_001))
    assert auditor.statistics().reservations == 2
    auditor.take(FIRST_SEQ + 7, 99_000, events.Forgotten(number(2), number(2), 3_001))
    assert auditor.statistics().reservations == 1
    auditor.take(FIRST_SEQ + 8, 99_000, events.Forgotten(0, 2**62, SLOT_ENDS_MS))
    assert auditor.statistics().reservations == 1
    auditor.take(FIRST_SEQ + 9, 99_000, events.Forgotten(0, 2**62, SLOT_ENDS_MS + 1))
    assert auditor.statistics().reservations == 0
    auditor.recount()
    assert auditor.findings == []
    assert [(total.confirmed, total.fulfilled) for total in auditor.totals()] == [(1, 0), (0, 1)]
    auditor.take(FIRST_SEQ + 10, 99_000, events.Released(number(0), 1))
    assert [finding.what for finding in auditor.findings] == [Rule.UNKNOWN_RESERVATION]


def test_a_forgotten_key_may_come_again() -> None:
    auditor = audited(
        [
            (2_000, held(1)),
            (2_000, events.Released(number(0), 1)),
            (3_000, events.Forgotten(0, 2**62, 2_001)),
            (3_000, held(1)),
        ]
    )
    assert auditor.findings == []


# --- a ledger with a planted bug --------------------------------------------------------------------------------------


def without_check(patch: pytest.MonkeyPatch) -> None:
    """The check before and the check after: both must fail for units to be sold twice."""
    patch.setattr(ledger, "_in_the_way", lambda *_: [])
    patch.setattr(ledger, "_check_limits", lambda *_: None)


def without_cutoffs(patch: pytest.MonkeyPatch) -> None:
    original = ledger._in_the_way
    patch.setattr(ledger, "_in_the_way", lambda state, taking, freed, _: original(state, taking, freed, 0))


def without_expiry(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger, "expire", lambda *_: None)


def with_holds_that_expire_a_minute_early(patch: pytest.MonkeyPatch) -> None:
    original = ledger.expire
    patch.setattr(ledger, "expire", lambda state, now_ms: original(state, now_ms + 60_000))


def without_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger, "find_key", lambda *_: None)


def with_a_release_of_what_was_delivered(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ledger.TRANSITIONS, (columns.FULFILLED, "release"), columns.RELEASED)


def without_a_fault(patch: pytest.MonkeyPatch) -> None:
    """The control: the same story with nothing planted."""


PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], int, set[Rule]]] = [
    # what is planted, units of each slot, what is found
    (without_check, 3, {Rule.LIMIT_PASSED, Rule.TAKEN_PAST_CUTOFF}),
    (without_cutoffs, 1_000, {Rule.TAKEN_PAST_CUTOFF}),
    (without_expiry, 1_000, {Rule.HOLD_OVERDUE}),
    (with_holds_that_expire_a_minute_early, 1_000, {Rule.EXPIRED_TOO_EARLY}),
    (without_keys, 1_000, {Rule.KEY_USED_TWICE}),
    (with_a_release_of_what_was_delivered, 1_000, {Rule.STEP_ILLEGAL}),
    (without_a_fault, 3, set()),
    (without_a_fault, 1_000, set()),
]


@pytest.mark.parametrize(("plant", "base", "rules"), PLANTED)
def test_a_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], base: int, rules: set[Rule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two days of orders, up to and past the cut-offs."""
    shard = planned_shard()
    for slot_id in (EVENING, NIGHT):
        shard.plan("van-north", slot_id, base)
    shard.watched = False
    plant(monkeypatch)
    chance = random.Random(11)
    numbers: list[int] = []
    for _ in range(200):
        shard.now_ms += 700_000
        slot_id = chance.choice((EVENING, NIGHT))
        reply = shard.hold(van(1, slot_id), name=f"key-{chance.randrange(400)}", ttl_ms=730_000)
        if isinstance(reply, outcomes.Taken):
            numbers.append(reply.number)
            if chance.random() < 0.5:
                shard.confirm(reply.number)
        if numbers and chance.random() < 0.5:
            shard.fulfil(chance.choice(numbers))
            shard.release(chance.choice(numbers))
    shard.auditor.recount()
    assert {finding.what for finding in shard.auditor.findings} == rules


def test_a_ledger_that_miscounts_comes_to_other_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that only the comparison of totals can see: the events are right, the columns are not."""
    shard = planned_shard()
    shard.watched = False
    original = ledger._move_units

    def miscounting(state: ledger.Ledger, lines: columns.Lines, status: int, sign: int) -> None:
        original(state, lines[:1], status, sign)

    monkeypatch.setattr(ledger, "_move_units", miscounting)
    shard.held(van(1), van(1, NIGHT))
    assert [(total.held, total.confirmed) for total in shard.auditor.totals()] != [
        row[2:4] for row in counted(shard.ledger)
    ]


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer's own memory would be counted")
def test_a_live_reservation_costs_under_600_bytes() -> None:
    auditor = Auditor()
    for place, (at_ms, event) in enumerate(PLANNED):
        auditor.take(place + 1, at_ms, event)
    auditor.take(FIRST_SEQ, 1_000, defined(9, 2**40))
    auditor.take(FIRST_SEQ + 1, 1_000, defined(10, 2**40, slot_id=NIGHT))
    chance = random.Random(3)
    count = 20_000
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for place in range(count):
            lines = [(0, 1_000 + place % 7), (1, 2_000)] if place % 3 == 0 else [(place % 2, 1)]
            key = chance.randbytes(16).hex()
            event = events.Held(lines, CUTOFF_MS - 1 - place % 20_000, f"SO-{place}", "web", key, place)
            auditor.take(FIRST_SEQ + 2 + place, 2_000, event)
        del event, lines, key
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert auditor.findings == []
    assert (after - before) / count < 600
