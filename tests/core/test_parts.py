"""What a shard does with messages about its parts: late, repeated, or about what never came to be.

`tests/sim` draws such stories by chance; these are the ones that chance draws too seldom.
"""

import pytest

from engine.core import commands, events, ledger, outcomes
from engine.core.columns import CONFIRMED, EXPIRED, FULFILLED, HELD, RELEASED
from engine.core.coordinator import Coordinator
from engine.core.outcomes import Outcome
from tests.core.shard import MINUTE_MS, SECOND_MS, Shard, key, planned_shard, van

HOME = 1
RESERVATION = 9 << 16


@pytest.fixture
def shard() -> Shard:
    return planned_shard()


def prepare(
    shard: Shard, units: int, *, tx: int = 1, part: int = 0, number: int = 0, version: int = 0
) -> outcomes.Reply:
    return shard.ask(commands.Prepare(tx, HOME, part, number, version, key("part"), [van(units)]))


def part_of(reply: outcomes.Reply) -> int:
    assert isinstance(reply, outcomes.Prepared), reply
    return reply.part_number


def sync(
    shard: Shard, part: int, version: int, status: int, units: int = 0, *, tx: int = 0, ttl_ms: int = 10 * MINUTE_MS
) -> int:
    """The version that the shard says it has."""
    expires_at_ms = shard.now_ms + ttl_ms if status == HELD else 0
    lines = [van(units)] if units else []
    number = RESERVATION if version else 0
    reply = shard.ask(commands.Sync(tx, part, number, version, status, expires_at_ms, lines))
    assert isinstance(reply, outcomes.Synced)
    return reply.version


def is_pinned(shard: Shard, part: int) -> bool:
    assert shard.ledger.links[part].is_pinned == (part in shard.ledger.pinned)
    return part in shard.ledger.pinned


def test_a_version_that_its_home_has_lost_does_not_keep_a_part_pinned(shard: Shard) -> None:
    """The prepare left before its home made version 2 durable, and the home died: version 1 is all that there is."""
    part = part_of(prepare(shard, 1))
    sync(shard, part, 1, CONFIRMED, 1)
    prepare(shard, 3, tx=2, part=part, number=RESERVATION, version=2)
    assert shard.units()[1] == 3
    assert sync(shard, part, 1, CONFIRMED, 1, tx=2) == 1
    assert not is_pinned(shard, part)
    assert shard.units()[1] == 1


def test_news_that_a_pinned_part_passes_over_is_not_called_known(shard: Shard) -> None:
    part = part_of(prepare(shard, 1))
    sync(shard, part, 1, CONFIRMED, 1)
    prepare(shard, 3, tx=2, part=part, number=RESERVATION, version=2)
    assert sync(shard, part, 2, CONFIRMED, 1) == 1, "it does not say what became of attempt 2"
    assert is_pinned(shard, part)
    assert shard.units()[1] == 3
    assert sync(shard, part, 3, CONFIRMED, 3) == 3, "a version beyond the one that the attempt started from does"
    assert not is_pinned(shard, part)


def test_the_answer_about_an_older_attempt_does_not_end_a_newer_one(shard: Shard) -> None:
    part = part_of(prepare(shard, 1, tx=1))
    assert part_of(prepare(shard, 1, tx=2)) == part
    sync(shard, part, 0, RELEASED, tx=1)
    assert is_pinned(shard, part)
    sync(shard, part, 0, RELEASED, tx=2)
    assert not is_pinned(shard, part)
    assert shard.units()[0] == 0


@pytest.mark.parametrize("tx", [1, 2])
def test_a_late_prepare_does_not_take_a_part_back_to_an_attempt_that_is_over(shard: Shard, tx: int) -> None:
    part = part_of(prepare(shard, 1, tx=2))
    sync(shard, part, 1, CONFIRMED, 1)
    reply = prepare(shard, 3, tx=tx, part=part, number=RESERVATION, version=1)
    assert isinstance(reply, outcomes.Refused)
    assert reply.outcome is Outcome.DEADLINE_PASSED
    assert not is_pinned(shard, part)


def test_a_late_prepare_does_not_count_a_fulfilled_part_twice(shard: Shard) -> None:
    part = part_of(prepare(shard, 1, tx=1))
    sync(shard, part, 1, CONFIRMED, 1)
    sync(shard, part, 3, FULFILLED, 1)
    for version in (2, 3):
        reply = prepare(shard, 2, tx=2, part=part, number=RESERVATION, version=version)
        assert isinstance(reply, outcomes.Refused)
    assert shard.units()[:3] == (0, 0, 1)


def test_numbers_of_attempts_may_begin_again(shard: Shard) -> None:
    part = part_of(prepare(shard, 1, tx=2**63 - 1))
    sync(shard, part, 1, CONFIRMED, 1)
    assert part_of(prepare(shard, 1, tx=1, part=part, number=RESERVATION, version=1)) == part


def test_a_home_that_has_forgotten_a_reservation_gives_its_part_up(shard: Shard) -> None:
    part = part_of(prepare(shard, 1))
    sync(shard, part, 4, CONFIRMED, 1)
    prepare(shard, 2, tx=2, part=part, number=RESERVATION, version=4)
    assert sync(shard, part, 0, RELEASED, tx=2) == 4
    assert not is_pinned(shard, part)
    assert shard.units()[1] == 0


def test_a_hold_whose_time_came_while_the_news_travelled_takes_nothing(shard: Shard) -> None:
    part = part_of(prepare(shard, 3))
    expires_at_ms = shard.now_ms + SECOND_MS
    shard.now_ms += 2 * SECOND_MS
    shard.decide(commands.Sync(0, part, RESERVATION, 1, HELD, expires_at_ms, [van(3)]))
    reply = shard.decide(commands.Hold([van(3)], MINUTE_MS, key("next"), 1))
    shard.seal()
    assert isinstance(reply, outcomes.Taken)
    found = shard.ledger.reservations.find(part)
    assert found is not None
    assert found[0].status[found[1]] == EXPIRED


def test_a_retried_move_finds_the_new_part_of_its_first_try(shard: Shard) -> None:
    part = part_of(prepare(shard, 3, tx=1, number=RESERVATION, version=2))
    assert part_of(prepare(shard, 3, tx=2, number=RESERVATION, version=2)) == part
    assert shard.units()[0] == 3


def test_parts_cannot_be_seen_or_changed_by_their_number(shard: Shard) -> None:
    part = part_of(prepare(shard, 1))
    for reply in (shard.look(part), shard.release(part), shard.confirm(part), shard.extend(part, MINUTE_MS)):
        assert isinstance(reply, outcomes.Refused)
        assert reply.outcome is Outcome.UNKNOWN_RESERVATION


def test_only_the_part_that_a_reservation_names_makes_its_news_known(shard: Shard) -> None:
    """A repeated prepare may have made a second part on that shard: its answer says nothing about the first."""
    home = Coordinator(0, 2)
    shard.apply(
        events.Held([(0, 1)], shard.now_ms + MINUTE_MS, "", "", key("spread").hex(), 1, [(1, 7 << 16, [("p", "s", 1)])])
    )
    shard.seal()
    number = next(iter(shard.ledger.owed))

    def heard(part: int) -> tuple[events.ShardEvent, ...]:
        asked = commands.Sync(0, part, number, 1, HELD, shard.now_ms + MINUTE_MS, [])
        return home.synced(shard.ledger, 1, asked, outcomes.Synced(1, part, 1)).made

    assert heard(8 << 16) == ()
    assert heard(7 << 16) == (events.PartsSettled(number, 1),)


@pytest.mark.parametrize("count", [3, ledger.ONE_BY_ONE_MAX + 3])
def test_a_hold_that_was_extended_expires_once_though_both_its_times_are_due(shard: Shard, count: int) -> None:
    """As after a standstill: the entry before the extension must not hide the one that counts."""
    shard.plan("pick-dc1", "2026-12-01T10:00-14:00", 10_000)
    pick = commands.Line("pick-dc1", "2026-12-01T10:00-14:00", 1)
    numbers = [shard.held(pick, ttl_ms=SECOND_MS) for _ in range(count)]
    for number in numbers:
        shard.extend(number, 2 * SECOND_MS)
    shard.now_ms += 5 * SECOND_MS
    shard.look(numbers[0])
    assert {shard.status(number) for number in numbers} == {EXPIRED}
