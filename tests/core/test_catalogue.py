"""The planner's decisions as tables, its versions, and what of it each shard is told."""

import pytest

from engine.core import catalogue, commands, events, outcomes
from engine.core.catalogue import Catalogue, command_for_shard
from engine.core.commands import CounterPut
from engine.core.invariant import InvariantError
from engine.core.limits import COUNTERS_IN_EVENT_MAX
from engine.core.outcomes import Outcome
from engine.core.sharding import shard_of_counter
from engine.core.slots import cutoff_at_ms, make_cutoff, resolve

ZONE = "Europe/Berlin"
EVENING = "2026-12-01T18:00-20:00"
NIGHT = "2026-12-01T20:00-22:00"
AT_MS = 1_796_083_200_000


def pool(pool_id: str = "van", *, cutoff_minutes: int | None = None, **changes: object) -> commands.PutPool:
    cutoff = None if cutoff_minutes is None else (cutoff_minutes, None, None)
    words: dict[str, object] = {"capacity_type": "delivery", "unit": "stops", "zone": "north", "time_zone": ZONE}
    return commands.PutPool(pool_id, **{**words, "cutoff": cutoff, **changes})  # type: ignore[arg-type]  # by name


def put(*counters: CounterPut, if_version: int | None = None) -> commands.PutCounters:
    return commands.PutCounters(list(counters), "why", "who", if_version)


def ask(state: Catalogue, command: commands.PutPool | commands.PutCounters) -> outcomes.Reply:
    """Decide and apply, as the planner does."""
    before = state.seq
    reply, made = catalogue.decide(state, command)
    assert state.seq == before, "deciding changes nothing"
    for event in made:
        catalogue.apply(state, event, AT_MS)
    if isinstance(reply, outcomes.Defined):
        assert reply.planning_seq == state.seq
    else:
        assert made == ()
    return reply


def planned() -> Catalogue:
    state = Catalogue()
    ask(state, pool("van", cutoff_minutes=90))
    ask(state, put(CounterPut("van", EVENING, 3)))
    return state


@pytest.mark.parametrize(
    ("command", "outcome", "detail"),
    [
        (pool(if_version=0), Outcome.PLAN_CONFLICT, "plan_version 1 now"),
        (pool(if_version=2), Outcome.PLAN_CONFLICT, "plan_version 1 now"),
        (pool("new", if_version=1), Outcome.PLAN_CONFLICT, "plan_version 0 now"),
        (pool(time_zone="Mars/Olympus"), Outcome.INVALID_SLOT, "no IANA time zone"),
        (pool(time_zone="Europe/Paris"), Outcome.POOL_HAS_SLOTS, "time_zone"),
        (pool(unit="parcels"), Outcome.POOL_HAS_SLOTS, "unit"),
        (pool(capacity_type="pickup"), Outcome.POOL_HAS_SLOTS, "capacity_type"),
        (put(CounterPut("none", EVENING, 1)), Outcome.UNKNOWN_POOL, "define it first"),
        (put(CounterPut("van", "tonight", 1)), Outcome.INVALID_SLOT, "no slot id"),
        (put(CounterPut("van", "2026-03-29T02:00-03:00", 1)), Outcome.INVALID_SLOT, "does not exist"),
        (put(CounterPut("van", NIGHT, 1), CounterPut("van", NIGHT, 2)), Outcome.INVALID_SLOT, "named twice"),
        (put(CounterPut("van", EVENING, 1), if_version=1), Outcome.PLAN_CONFLICT, "plan_version 2 now"),
        (put(CounterPut("van", EVENING, 1), if_version=3), Outcome.PLAN_CONFLICT, "plan_version 2 now"),
        (put(CounterPut("van", NIGHT, 1), if_version=1), Outcome.PLAN_CONFLICT, "plan_version 0 now"),
        (
            put(CounterPut("van", NIGHT, 1), CounterPut("van", EVENING, 1), if_version=0),
            Outcome.PLAN_CONFLICT,
            EVENING,
        ),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    command: commands.PutPool | commands.PutCounters, outcome: Outcome, detail: str
) -> None:
    reply = ask(planned(), command)
    assert isinstance(reply, outcomes.Refused)
    assert reply.outcome is outcome
    assert detail in reply.detail


@pytest.mark.parametrize(
    ("command", "created"),
    [
        (pool(if_version=1), 0),
        (pool("new", if_version=0), 1),
        (pool(zone="south"), 0),
        (put(CounterPut("van", EVENING, 9), if_version=2), 0),
        (put(CounterPut("van", NIGHT, 9), if_version=0), 1),
        (put(CounterPut("van", NIGHT, 9), CounterPut("van", EVENING, 9)), 1),
        (put(), 0),
    ],
)
def test_what_can_be_is_defined(command: commands.PutPool | commands.PutCounters, created: int) -> None:
    reply = ask(planned(), command)
    assert isinstance(reply, outcomes.Defined)
    assert reply.created == created


def test_a_pool_keeps_its_code_and_gets_a_new_version() -> None:
    state = planned()
    ask(state, pool("pick"))
    ask(state, pool("van", zone="south"))
    assert [(each.code, each.pool_id, each.zone, each.version) for each in state.pools.values()] == [
        (0, "van", "south", 4),
        (1, "pick", "north", 3),
    ]
    assert state.pool_of_code == ["van", "pick"]


def test_a_pool_without_slots_may_move_to_another_zone() -> None:
    state = Catalogue()
    ask(state, pool())
    assert isinstance(ask(state, pool(time_zone="Europe/Paris")), outcomes.Defined)


def test_a_version_read_after_a_new_cutoff_of_the_pool_is_good() -> None:
    """A shard shows the pool's new number where the cut-off changed and the counter's own where it did not."""
    for read in (2, 3):
        state = planned()
        ask(state, pool("van", cutoff_minutes=120))
        assert isinstance(ask(state, put(CounterPut("van", EVENING, 4), if_version=read)), outcomes.Defined)
        again = ask(state, put(CounterPut("van", EVENING, 5), if_version=read))
        assert isinstance(again, outcomes.Refused), "somebody else was first"
        assert again.outcome is Outcome.PLAN_CONFLICT


def test_a_counter_is_resolved_once_when_it_is_defined() -> None:
    state = planned()
    (event,) = catalogue.decide(state, put(CounterPut("van", NIGHT, 5, 2, 1, closed=True)))[1]
    assert isinstance(event, events.CountersPut)
    starts_at_ms, ends_at_ms = resolve(NIGHT, ZONE)
    assert event.counters == [(0, NIGHT, 5, 2, 1, True, starts_at_ms, ends_at_ms, starts_at_ms - 90 * 60_000)]
    assert (event.reason, event.actor) == ("why", "who")
    ask(state, pool("pick"))
    (event,) = catalogue.decide(state, put(CounterPut("pick", NIGHT, 5)))[1]
    assert isinstance(event, events.CountersPut)
    assert event.counters[0][-1] == ends_at_ms, "without a rule orders are taken until the end"


def test_a_cutoff_by_days_reaches_the_counter() -> None:
    state = Catalogue()
    rule = make_cutoff(days_before=1, local_time="18:00")
    ask(state, pool(cutoff=tuple(rule)))
    (event,) = catalogue.decide(state, put(CounterPut("van", EVENING, 5)))[1]
    assert isinstance(event, events.CountersPut)
    assert event.counters[0][-1] == cutoff_at_ms(EVENING, ZONE, rule)


def test_an_import_is_cut_into_events_of_bounded_size() -> None:
    state = planned()
    many = [
        CounterPut(
            "van", f"2027-{1 + place // 672:02d}-{1 + place // 24 % 28:02d}T{place % 24:02d}:00-{place % 24:02d}:30", 1
        )
        for place in range(COUNTERS_IN_EVENT_MAX * 2 + 1)
    ]
    reply, made = catalogue.decide(state, put(*many))
    assert reply == outcomes.Defined(state.seq + 3, len(many), applied=True)
    assert [len(event.counters) for event in made if isinstance(event, events.CountersPut)] == [
        COUNTERS_IN_EVENT_MAX,
        COUNTERS_IN_EVENT_MAX,
        1,
    ]


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_each_counter_reaches_one_shard_and_each_pool_all(shards: int) -> None:
    state = planned()
    slots = [f"2026-12-{day:02d}T18:00-20:00" for day in range(1, 29)]
    made = catalogue.decide(state, put(*(CounterPut("van", slot_id, 1) for slot_id in slots)))[1]
    told: list[str] = []
    for shard in range(shards):
        for event in made:
            command = command_for_shard(event, 3, shard, shards, state.pool_of_code)
            if command is not None:
                assert isinstance(command, commands.PlanCounters)
                assert command.planning_seq == 3
                assert {shard_of_counter("van", plan.slot_id, shards) for plan in command.counters} == {shard}
                told += [plan.slot_id for plan in command.counters]
        pool_event = events.PoolPut(0, "van", "delivery", "stops", "north", ZONE, (90, None, None), "", "")
        assert command_for_shard(pool_event, 4, shard, shards, []) == commands.PlanPool(
            4, 0, "van", ZONE, (90, None, None)
        )
        assert command_for_shard(events.TermStarted(1, 1), 5, shard, shards, []) is None
    assert sorted(told) == slots


def test_a_shard_that_an_event_does_not_concern_is_told_nothing() -> None:
    state = planned()
    (event,) = catalogue.decide(state, put(CounterPut("van", EVENING, 1)))[1]
    home = shard_of_counter("van", EVENING, 8)
    told = [command_for_shard(event, 3, shard, 8, state.pool_of_code) is not None for shard in range(8)]
    assert told == [shard == home for shard in range(8)]


def test_too_many_pools_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "POOLS_MAX", 1)
    state = planned()
    reply = ask(state, pool("one-more"))
    assert isinstance(reply, outcomes.Refused)
    assert reply.outcome is Outcome.TOO_MANY_POOLS
    assert isinstance(ask(state, pool("van", zone="south")), outcomes.Defined), "what is there may change"


POOL_A = events.PoolPut(0, "a", "", "", "", ZONE, None, "", "")


@pytest.mark.parametrize(
    ("event", "at_ms", "words"),
    [
        (events.TermStarted(1, 1), AT_MS, "terms must rise"),
        (events.PoolPut(2, "late", "", "", "", ZONE, None, "", ""), AT_MS, "given in order"),
        (POOL_A, AT_MS - 1, "time of events"),
    ],
)
def test_a_history_that_cannot_be_breaks_an_invariant(event: events.PlannerEvent, at_ms: int, words: str) -> None:
    state = Catalogue()
    for before in (events.TermStarted(1, 1), POOL_A):
        catalogue.apply(state, before, AT_MS)
    with pytest.raises(InvariantError, match=words):
        catalogue.apply(state, event, at_ms)


def test_a_pool_cannot_take_the_code_of_another() -> None:
    state = planned()
    with pytest.raises(InvariantError, match="keeps its code"):
        catalogue.apply(state, events.PoolPut(5, "van", "", "", "", ZONE, None, "", ""), AT_MS)
