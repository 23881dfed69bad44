"""The auditor of parts: every rule about reservations over several shards has a stream that breaks it, as in `test_audit`."""

import pytest

from engine.audit import Auditor, Home, Part, Rule
from engine.core import events
from engine.core.columns import CONFIRMED, EXPIRED, FULFILLED, HELD, RELEASED
from tests.core.test_audit import (
    CUTOFF_MS,
    FIRST_SEQ,
    KEY,
    NAMES,
    RULES_OF_PARTS,
    at_once,
    audited,
    defined,
    held,
    number,
    refused,
)

HOME = 1
FAR = [("pick-dc1", "2026-12-01T10:00-14:00", 2)]
NEAR = [("pick-dc1", "2026-12-01T10:00-14:00", 1)]
RESERVATION = 9 << 16
Stream = list[tuple[int, events.ShardEvent]]


def prepared(
    units: int, *, tx: int = 5, part: int = 0, reservation: int = 0, version: int = 0, home: int = HOME, row: int = 0
) -> events.PartPrepared:
    return events.PartPrepared(tx, home, part, reservation, version, [(row, units)], f"{KEY}1")


def synced(
    units: int, *, version: int = 1, status: int = HELD, part: int | None = None, expires_at_ms: int = 30_000,
    reservation: int = RESERVATION, row: int = 0,
) -> events.PartSynced:  # fmt: skip
    lines = [(row, units)] if units else []
    return events.PartSynced(number(0) if part is None else part, reservation, version, status, expires_at_ms, lines)


def spread(units: int = 1, parts: list[events.PartUnits] | None = None) -> events.Held:
    return events.Held([(0, units)], 30_000, "", "", f"{KEY}1", 1, [(2, 70, FAR)] if parts is None else parts)


BROKEN: list[tuple[Rule, Stream]] = [
    (Rule.LIMIT_PASSED, [(2_000, prepared(4))]),
    (Rule.LIMIT_PASSED, [(2_000, held(3)), (2_000, prepared(1))]),
    (Rule.LIMIT_PASSED, [(2_000, prepared(3)), (2_000, held(1, key=2))]),
    (Rule.LIMIT_PASSED, [(2_000, prepared(2)), (2_000, at_once(1, key=2)), (2_000, prepared(3, part=number(0), tx=6))]),
    (Rule.TAKEN_WHILE_CLOSED, [(2_000, defined(4, 3, closed=True)), (2_000, prepared(1))]),
    (Rule.TAKEN_PAST_CUTOFF, [(CUTOFF_MS, prepared(1))]),
    (Rule.EVENT_MALFORMED, [(2_000, prepared(1, row=9))]),
    (Rule.EVENT_MALFORMED, [(2_000, prepared(0))]),
    (Rule.EVENT_MALFORMED, [(2_000, prepared(1)), (2_000, synced(1, row=9))]),
    (Rule.EVENT_MALFORMED, [(2_000, spread(parts=[(2, 70, FAR), (2, 71, FAR)]))]),
    (Rule.EVENT_MALFORMED, [(2_000, spread(parts=[(2, 0, FAR)]))]),
    (Rule.EVENT_MALFORMED, [(2_000, spread()), (2_000, events.Moved(number(0), 1, [], [(2, 70, [])]))]),
    (Rule.EVENT_MALFORMED, [(2_000, spread()), (2_000, events.Confirmed(number(0), 1, [], parts=[(2, 70, [])]))]),
    (Rule.UNKNOWN_RESERVATION, [(2_000, prepared(1, part=77))]),
    (Rule.UNKNOWN_RESERVATION, [(2_000, held(1)), (2_000, prepared(1, part=number(0)))]),
    (Rule.UNKNOWN_RESERVATION, [(2_000, held(1)), (2_000, synced(1))]),
    (Rule.UNKNOWN_RESERVATION, [(2_000, prepared(1)), (2_000, synced(1, status=6))]),
    (Rule.STEP_ILLEGAL, [(2_000, prepared(1)), (2_000, events.Released(number(0), 1))]),
    (Rule.STEP_ILLEGAL, [(2_000, prepared(1)), (2_000, events.Confirmed(number(0), 1))]),
    (Rule.PREPARED_TOO_LATE, [(2_000, prepared(1, tx=6)), (2_000, prepared(1, tx=5, part=number(0)))]),
    (
        Rule.PREPARED_TOO_LATE,
        [
            (2_000, prepared(1)),
            (2_000, synced(1, version=3)),
            (2_000, prepared(1, tx=6, part=number(0), reservation=RESERVATION, version=2)),
        ],
    ),
    (Rule.PART_GAVE_UP_UNITS, [(2_000, prepared(2)), (2_000, prepared(1, tx=6, part=number(0)))]),
    (Rule.PART_TOOK_UNPREPARED, [(2_000, prepared(1)), (2_000, synced(2))]),
    (
        Rule.PART_TOOK_UNPREPARED,
        [(2_000, prepared(1)), (2_000, synced(0, status=RELEASED)), (2_000, synced(1, version=2))],
    ),
    (Rule.PART_WENT_BACK, [(2_000, prepared(1)), (2_000, synced(1, version=2)), (2_000, synced(1, version=1))]),
    (Rule.PART_WENT_BACK, [(2_000, prepared(1)), (2_000, synced(1)), (2_000, synced(1))]),
    (Rule.PART_OF_ANOTHER, [(2_000, prepared(1)), (2_000, prepared(1, tx=6, part=number(0), home=2))]),
    (
        Rule.PART_OF_ANOTHER,
        [(2_000, prepared(1)), (2_000, synced(1)), (2_000, synced(1, version=2, reservation=RESERVATION + 1))],
    ),
    (
        Rule.EXPIRED_WHILE_PINNED,
        [
            (2_000, prepared(1)),
            (2_000, synced(1)),
            (2_000, prepared(1, tx=6, part=number(0), reservation=RESERVATION, version=1)),
            (30_000, events.Expired([number(0)], [30_000])),
        ],
    ),
    (Rule.HOLD_OVERDUE, [(2_000, prepared(1)), (2_000, synced(1)), (30_000, refused(9))]),
    (Rule.HOLD_OVERDUE, [(2_000, prepared(1)), (31_000, synced(1)), (31_000, refused(9))]),
    (
        Rule.HOLD_OVERDUE,
        [
            (2_000, prepared(1)),
            (2_000, synced(1)),
            (30_000, prepared(1, tx=6, part=number(0), reservation=RESERVATION, version=1)),
        ],
    ),
    (Rule.PART_LEFT_OUT, [(2_000, spread()), (2_000, events.Moved(number(0), 1, [(0, 1)], []))]),
    (Rule.PART_LEFT_OUT, [(2_000, spread()), (2_000, events.Confirmed(number(0), 1, None, parts=[(2, 71, FAR)]))]),
    (
        Rule.KEPT_MORE_THAN_HELD,
        [(2_000, spread(parts=[(2, 70, NEAR)])), (2_000, events.Confirmed(number(0), 1, None, parts=[(2, 70, FAR)]))],
    ),
    (Rule.SETTLED_ANOTHER_VERSION, [(2_000, spread()), (2_000, events.PartsSettled(number(0), 2))]),
    (
        Rule.SETTLED_ANOTHER_VERSION,
        [(2_000, spread()), (2_000, events.Released(number(0), 1)), (2_000, events.PartsSettled(number(0), 1))],
    ),
    (
        Rule.SETTLED_ANOTHER_VERSION,
        [(2_000, spread()), (2_000, events.PartsSettled(number(0), 1)), (2_000, events.PartsSettled(number(0), 1))],
    ),
    (Rule.SETTLED_ANOTHER_VERSION, [(2_000, held(1)), (2_000, events.PartsSettled(number(0), 1))]),
]


@pytest.mark.parametrize(("rule", "stream"), BROKEN, ids=lambda value: str(value) if isinstance(value, Rule) else None)
def test_a_broken_rule_is_found(rule: Rule, stream: Stream) -> None:
    """At the last event, and nothing before it."""
    assert audited(stream[:-1]).findings == []
    found = audited(stream).findings
    assert [finding.what for finding in found] == [rule]
    assert found[0].seq == FIRST_SEQ + len(stream) - 1


def test_every_rule_of_parts_has_a_stream_that_breaks_it() -> None:
    assert set(RULES_OF_PARTS) <= {rule for rule, _ in BROKEN}


RIGHT: list[Stream] = [
    # taken, held, expired like any hold
    [
        (2_000, prepared(3)),
        (2_000, synced(3)),
        (30_000, events.Expired([number(0)], [30_000])),
        (30_000, held(3, key=2)),
    ],
    # pinned: past its time, it neither expires nor stands in the way of a decision
    [
        (2_000, prepared(2)),
        (2_000, synced(2)),
        (2_000, prepared(2, tx=6, part=number(0), reservation=RESERVATION, version=1)),
        (31_000, at_once(1, key=2)),
        (31_000, synced(2, version=2, status=CONFIRMED)),
        (31_000, synced(2, version=3, status=FULFILLED)),
    ],
    # never was
    [(2_000, prepared(3)), (2_000, synced(0, version=0, status=RELEASED, reservation=0)), (2_000, held(3, key=2))],
    # an attempt is given up: the same version again
    [
        (2_000, prepared(1)),
        (2_000, synced(1)),
        (2_000, prepared(3, tx=6, part=number(0), reservation=RESERVATION, version=1)),
        (2_000, synced(1)),
        (2_000, held(2, key=2)),
    ],
    # a retry takes the part of a lost attempt over; a plan below what is taken stops no news
    [
        (2_000, prepared(2, tx=5)),
        (2_000, defined(4, 1)),
        (2_000, prepared(2, tx=6, part=number(0))),
        (2_000, synced(2, status=CONFIRMED)),
        (90_000, synced(2, status=EXPIRED, version=2)),
    ],
    # expired, then confirmed late
    [
        (2_000, prepared(2)),
        (2_000, synced(2)),
        (30_000, events.Expired([number(0)], [30_000])),
        (30_000, prepared(2, tx=6, part=number(0), reservation=RESERVATION, version=2)),
        (30_000, synced(2, version=3, status=CONFIRMED)),
    ],
    # at home: all moves away, what is given up is settled and gone
    [
        (2_000, spread()),
        (2_000, events.Moved(number(0), 1, [], [(2, 70, []), (3, 71, FAR)])),
        (2_000, events.PartsSettled(number(0), 2)),
        (2_000, events.Confirmed(number(0), 2, None, parts=[(3, 71, NEAR)])),
        (2_000, events.Released(number(0), 3)),
        (2_000, events.PartsSettled(number(0), 4)),
        (2_000, held(3, key=2)),
    ],
]


@pytest.mark.parametrize("stream", RIGHT)
def test_a_right_stream_has_no_findings(stream: Stream) -> None:
    auditor = audited(stream)
    auditor.recount()
    assert auditor.findings == []


def test_parts_and_homes_are_shown_as_they_are() -> None:
    auditor = audited([(2_000, prepared(2)), (2_000, synced(2, version=4)), (2_000, spread())])
    assert list(auditor.parts()) == [
        Part(number(0), HOME, RESERVATION, 4, is_pinned=False, status=0, lines={NAMES[0]: 2})
    ]
    assert list(auditor.homes()) == [
        Home(number(2), 0, 1, 30_000, is_owed=True, parts={2: (70, {(FAR[0][0], FAR[0][1]): 2})})
    ]
    assert auditor.newest() == number(2)
    assert auditor.part(number(2)) is None
    assert auditor.home(number(0)) is None


def test_what_is_owed_or_pinned_is_not_forgotten() -> None:
    stream: Stream = [
        (2_000, spread()),
        (2_000, prepared(1)),
        (2_000, events.Released(number(0), 1)),
        (9_000, events.Forgotten(0, 2**62, 8_000)),
    ]
    auditor = audited(stream)
    assert auditor.home(number(0)) is not None
    assert auditor.part(number(1)) is not None
    auditor = audited(
        [
            *stream,
            (9_000, events.PartsSettled(number(0), 2)),
            (9_000, synced(0, part=number(1), version=0, status=RELEASED, reservation=0)),
            (29_000, events.Forgotten(0, 2**62, 28_000)),
        ]
    )
    assert auditor.home(number(0)) is None
    assert auditor.part(number(1)) is None
    assert not auditor.has_left(number(0))
    auditor.recount()
    assert auditor.findings == []


def test_a_part_of_a_slot_long_past_leaves_and_its_units_stay() -> None:
    auditor = audited(
        [(2_000, prepared(2)), (2_000, synced(2, status=CONFIRMED)), (99_000, events.Forgotten(0, 2**62, 98_000))]
    )
    assert auditor.part(number(0)) is None
    assert auditor.has_left(number(0))
    auditor.recount()
    assert auditor.findings == []


def test_attempts_explain_a_refusal_only_where_there_are_other_shards() -> None:
    refused = events.Refused("insufficient_capacity", [(0, 3, 2)], KEY)
    alone, beside = audited([(2_000, refused)]), Auditor(2)
    for seq, (at_ms, event) in enumerate(_stream_of(refused)):
        beside.take(seq + 1, at_ms, event)
    assert [finding.what for finding in alone.findings] == [Rule.REFUSED_WITHOUT_CAUSE]
    assert beside.findings == []
    assert beside.statistics().refused_beside_attempts == 1


def _stream_of(event: events.ShardEvent) -> Stream:
    from tests.core.test_audit import PLANNED

    return [*PLANNED, (2_000, event)]
