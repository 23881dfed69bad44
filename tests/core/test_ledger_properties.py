"""What holds for every sequence of commands: drawn ones, with times, refusals, retries, plans, expiry and forgetting.

`Shard.apply` (tests/core/shard.py) sends each event through the auditor and compares its totals with the ledger's, so every
property here also proves, at every position, that nothing passed a limit and every step was legal. The world is small on
purpose: five counters of a few units, sixteen keys of which many share a half, chunks of eight rows; collisions are the rule.
"""

import copy
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import pack
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine import codec, snapshot
from engine.audit import Auditor
from engine.core import columns, commands, events, ledger, outcomes
from engine.core.commands import NO_TTL, Line
from engine.core.ledger import Rules
from engine.core.outcomes import REFUSALS, Outcome
from engine.core.slots import Cutoff, resolve
from engine.ports import Position
from tests.core.drawing import tries
from tests.core.shard import (
    DAY_MS,
    EVENING,
    HOUR_MS,
    MINUTE_MS,
    MORNING,
    NIGHT,
    SECOND_MS,
    ZONE,
    Shard,
    counted,
    fingerprint,
    outcome_of,
    planned_shard,
    replayed,
)

ROWS_OF_CHUNK = 8
"""So small that forgetting compacts and joins chunks, and a snapshot has many, within a few dozen commands."""

RULES = Rules(hold_ms_max=20 * MINUTE_MS, finished_keep_ms=HOUR_MS)

COUNTERS = [
    ("van-north", EVENING),
    ("van-north", NIGHT),
    ("van-north", "2026-12-01T22:00-02:00"),
    ("pick-dc1", MORNING),
    ("pick-dc1", "2026-12-01T14:00-18:00"),
    ("van-north", "2026-12-24T18:00-20:00"),
    ("van-south", EVENING),
]
"""The last two are not there."""
COUNTERS_COUNT = 5
KEYS = [pack("<qq", high, low) for high in (0, -1, 7, 2**62) for low in (3, 3 + 256, -253, 4)]
MORE_KEYS = [pack("<qq", number % 7, number) for number in range(16, 4_000)]
"""For long stories."""


class Step(NamedTuple):
    """A drawn command. Reservations are named by their place among those made, so a step means something in any run."""

    after_ms: int
    verb: str
    which: int
    action: int
    lines: tuple[tuple[int, int], ...]
    ttl_ms: int
    plan: tuple[int, int, int, bool]


VERBS = (
    *("hold",) * 8,
    *("confirm",) * 3,
    "confirm partly",
    *("release",) * 2,
    "extend",
    *("move",) * 3,
    *("fulfil",) * 2,
    "look",
    "plan",
    "plan pool",
    "forget",
    "term",
)

steps = st.builds(
    Step,
    after_ms=st.sampled_from((0, 0, 0, 0, 1, 999, SECOND_MS, 40 * SECOND_MS, 11 * MINUTE_MS, 5 * HOUR_MS, DAY_MS)),
    verb=st.sampled_from(VERBS),
    which=st.integers(0, 15),
    action=st.integers(-3, -1) | st.integers(1, 40),
    lines=st.lists(
        st.tuples(st.sampled_from((0, 0, 0, 1, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 6)), st.integers(1, 4)),
        min_size=1,
        max_size=5,
    ).map(tuple),
    ttl_ms=st.sampled_from((NO_TTL, 1, SECOND_MS, 1_001, 10 * MINUTE_MS, HOUR_MS)),
    plan=st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 3), st.booleans()),
)
stories = st.lists(steps, max_size=40)


def world() -> Shard:
    """Five counters of three to five units; the clock stands at noon of the day before."""
    shard = planned_shard(RULES)
    for pool_id, slot_id in COUNTERS[:COUNTERS_COUNT]:
        shard.plan(pool_id, slot_id, 5)
    return shard


def key_of(which: int) -> bytes:
    return KEYS[which] if which < len(KEYS) else MORE_KEYS[which - len(KEYS)]


def command_of(shard: Shard, numbers: list[int], step: Step) -> commands.ShardCommand:
    """The command a step means after what has happened so far."""
    number = numbers[step.which % len(numbers)] if numbers else 1 << 16
    lines = [Line(*COUNTERS[counter], units) for counter, units in step.lines]
    match step.verb:
        case "hold":
            return commands.Hold(lines, step.ttl_ms, key_of(step.which), step.action % 3, f"SO-{step.which}", "web")
        case "confirm":
            return commands.Confirm(number, step.action)
        case "confirm partly":
            return commands.Confirm(number, step.action, lines)
        case "release":
            return commands.Release(number, step.action, "no reason")
        case "extend":
            return commands.Extend(number, step.action, step.ttl_ms)
        case "move":
            return commands.Move(number, step.action, lines)
        case "fulfil":
            return commands.Fulfil(number, step.action)
        case "look":
            return commands.Look(number)
        case "plan":
            return plan_of(shard, step)
        case "plan pool":
            shard.planning_seq += 1
            rule = (None, Cutoff(minutes_before=step.which * 30), Cutoff(days_before=1, local_minute=18 * 60))
            return commands.PlanPool(shard.planning_seq, 1, "van-north", ZONE, rule[step.which % 3])
        case _:
            return commands.ShardStatus()


def plan_of(shard: Shard, step: Step) -> commands.PlanCounters:
    """A change of one counter's units: often below what is booked."""
    pool_id, slot_id = COUNTERS[step.lines[0][0] % COUNTERS_COUNT]
    base, overbook, buffer, closed = step.plan
    starts_at_ms, ends_at_ms = resolve(slot_id, ZONE)
    row = shard.row(pool_id, slot_id)
    cutoff_ms = shard.ledger.counters.cutoff_at_ms[row]
    shard.planning_seq += 1
    plan = commands.CounterPlan(
        shard.ledger.pools[pool_id].code,
        slot_id,
        base,
        overbook,
        buffer,
        closed and step.which < 4,
        starts_at_ms,
        ends_at_ms,
        cutoff_ms,
    )
    return commands.PlanCounters(shard.planning_seq, [plan])


def do(shard: Shard, numbers: list[int], step: Step) -> outcomes.Reply | None:
    """One step into the open batch."""
    if step.verb == "forget":
        number = shard.forget(0)
        while number:
            number = shard.forget(number)
        return None
    if step.verb == "term":
        shard.apply(events.TermStarted(shard.ledger.epoch, shard.ledger.restart + 1))
        return None
    reply = shard.decide(command_of(shard, numbers, step))
    if isinstance(reply, outcomes.Taken):
        numbers.append(reply.number)
    return reply


def run(story: list[Step], after_each: Callable[[Shard], None] = lambda _: None) -> Shard:
    """A story, each step in a batch of its own."""
    shard = world()
    numbers: list[int] = []
    for step in story:
        shard.now_ms += step.after_ms
        do(shard, numbers, step)
        shard.seal()
        after_each(shard)
    return shard


def drawn_by(seed: int, count: int) -> list[Step]:
    """A long story from a seed, for what a few dozen steps do not reach.

    Times are short, so much is alive at once; each step has a key of its own and may be about any reservation.
    """
    chance = random.Random(seed)
    return [
        Step(
            chance.choice((0, 0, 1, 20, SECOND_MS, 10 * SECOND_MS)),
            chance.choice(VERBS),
            place,
            chance.randrange(1, 1_000_000),
            tuple((chance.randrange(COUNTERS_COUNT), chance.randint(1, 2)) for _ in range(chance.choice((1, 1, 2, 4)))),
            chance.choice((NO_TTL, SECOND_MS, MINUTE_MS)),
            (chance.choice((2, 40, 4_000)), 0, 0, False),
        )
        for place in range(count)
    ]


@contextmanager
def small_chunks() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "CHUNK_ROWS", ROWS_OF_CHUNK)
        yield patch


EXTENDED_BY_NOTHING = [
    Step(0, "hold", 0, 1, ((0, 1),), 10 * MINUTE_MS, (5, 0, 0, False)),
    Step(0, "extend", 0, 2, ((0, 1),), SECOND_MS, (5, 0, 0, False)),
    Step(11 * MINUTE_MS, "look", 0, 1, ((0, 1),), NO_TTL, (5, 0, 0, False)),
]
"""Once killed the worker: the hold stood in the expiry queue twice."""


# --- limits, and the auditor's word for it ----------------------------------------------------------------------------


def check_limits(shard: Shard) -> None:
    """`used` above `limit` only where the auditor has an overcommitment that is not over."""
    counters = shard.ledger.counters
    over = {each.counter for each in shard.auditor.overcommitments if each.until_seq is None}
    for row in range(len(counters)):
        if counters.used(row) > max(0, counters.limit[row]):
            assert (counters.pool_id[row], counters.slot_id[row]) in over
        else:
            assert (counters.pool_id[row], counters.slot_id[row]) not in over


@given(stories)
@example(EXTENDED_BY_NOTHING)
@tries(150)
def test_nothing_passes_its_limit_and_the_auditor_agrees(story: list[Step]) -> None:
    with small_chunks():
        shard = run(story, check_limits)
        shard.auditor.recount()
    assert shard.auditor.findings == []


@given(stories)
@tries(150)
def test_units_are_the_sum_of_the_lines(story: list[Step]) -> None:
    """The columns against the records of the same ledger: what is forgotten is taken off by what the auditor saw leave."""
    with small_chunks():
        shard = run([step for step in story if step.verb != "forget"])
        sums = [[0, 0, 0] for _ in range(len(shard.ledger.counters))]
        for chunk in shard.ledger.reservations.chunks():
            for row in range(chunk.size):
                if columns.HELD <= chunk.status[row] <= columns.FULFILLED:
                    for counter, units in shard.ledger.reservations.lines(chunk, row):
                        sums[counter][chunk.status[row] - columns.HELD] += units
    assert [list(row[2:5]) for row in counted(shard.ledger)] == sums


# --- replay -----------------------------------------------------------------------------------------------------------


@given(stories)
@example(EXTENDED_BY_NOTHING)
@tries(150)
def test_a_replay_of_the_bytes_is_the_same_state(story: list[Step]) -> None:
    with small_chunks():
        shard = run(story)
        assert fingerprint(replayed(shard.rows), KEYS) == fingerprint(shard.ledger, KEYS)


@given(stories, st.integers(2, 40))
@tries(150)
def test_a_replay_does_not_depend_on_how_records_lie_in_memory(story: list[Step], rows_of_chunk: int) -> None:
    """After a restart the chunks are other ones: a `forgotten` event then spans several, or a part of one."""
    with small_chunks() as patch:
        shard = run(story)
        patch.setattr(columns, "CHUNK_ROWS", rows_of_chunk)
        assert fingerprint(replayed(shard.rows), KEYS) == fingerprint(shard.ledger, KEYS)


@given(stories, st.data())
@tries(150)
def test_after_a_replay_work_goes_on_as_if_nothing_had_been(story: list[Step], data: st.DataObject) -> None:
    """A crash between two commands: the same replies and the same state afterwards."""
    cut = data.draw(st.integers(0, len(story)))
    with small_chunks():
        shard = world()
        numbers: list[int] = []
        replies = []
        for place, step in enumerate(story):
            if place == cut:
                shard.ledger = replayed(shard.rows)
            shard.now_ms += step.after_ms
            replies.append(do(shard, numbers, step))
            shard.seal()
        undisturbed = world()
        numbers = []
        expected = []
        for step in story:
            undisturbed.now_ms += step.after_ms
            expected.append(do(undisturbed, numbers, step))
            undisturbed.seal()
        assert replies == expected
        assert fingerprint(shard.ledger, KEYS) == fingerprint(undisturbed.ledger, KEYS)


# --- batches ----------------------------------------------------------------------------------------------------------


def run_in_batches(story: list[Step], sizes: list[int]) -> tuple[Shard, list[outcomes.Reply | None]]:
    """A story in batches of the given sizes, again and again; a batch ends early where the time of the next step differs."""
    shard = world()
    numbers: list[int] = []
    replies = []
    in_batch = 0
    for place, step in enumerate(story):
        if step.after_ms or in_batch >= sizes[place % len(sizes)]:
            shard.seal()
            in_batch = 0
        shard.now_ms += step.after_ms
        replies.append(do(shard, numbers, step))
        in_batch += 1
    shard.seal()
    return shard, replies


@given(st.lists(steps.map(lambda step: step._replace(after_ms=step.after_ms if step.which < 4 else 0)), max_size=40))
@tries(150)
def test_batches_of_any_size_give_the_same_replies_and_state(story: list[Step]) -> None:
    with small_chunks():
        alone, replies = run_in_batches(story, [1])
        for sizes in ([2], [7, 1, 3], [1_000]):
            together, replies_together = run_in_batches(story, sizes)
            assert replies_together == replies
            assert fingerprint(together.ledger, KEYS) == fingerprint(alone.ledger, KEYS)
            assert fingerprint(replayed(together.rows), KEYS) == fingerprint(alone.ledger, KEYS)


# --- what is refused changes nothing ----------------------------------------------------------------------------------


@given(stories)
@tries(150)
def test_deciding_changes_nothing_and_a_refusal_only_what_it_counts(story: list[Step]) -> None:
    with small_chunks():
        shard = world()
        numbers: list[int] = []
        for step in story:
            shard.now_ms += step.after_ms
            if step.verb in {"forget", "term"}:
                do(shard, numbers, step)
                continue
            command = command_of(shard, numbers, step)
            while (expired := ledger.expire(shard.ledger, shard.now_ms)) is not None:
                shard.apply(expired)
            before = fingerprint(shard.ledger, KEYS)
            shard.ledger.touched.clear()
            reply, made = ledger.decide(shard.ledger, command, shard.now_ms, RULES)
            assert fingerprint(shard.ledger, KEYS) == before
            assert shard.ledger.touched == set()
            assert len(made) <= 1
            for event in made:
                shard.apply(event)
            if isinstance(reply, outcomes.Taken):
                numbers.append(reply.number)
            if isinstance(reply, outcomes.Refused):
                check_only_counted(before, fingerprint(shard.ledger, KEYS), reply, made)


def check_only_counted(
    before: dict[str, object],
    after: dict[str, object],
    reply: outcomes.Refused,
    made: tuple[events.ShardEvent, ...],
) -> None:
    """A refusal leaves everything as it was, apart from what counts the refused units."""
    if not made:
        assert after == before
        return
    [event] = made
    assert isinstance(event, events.Refused)
    assert outcome_of(reply) in REFUSALS
    counters_before, counters_after = before["counters"], after["counters"]
    assert isinstance(counters_before, dict)
    assert isinstance(counters_after, dict)
    refused = list(counters_before["refused"])
    for row, units, _ in event.counters:
        refused[row] += units
    assert counters_after["refused"] == refused
    for field in set(counters_before) - {"refused", "changed_seq"}:
        assert counters_after[field] == counters_before[field]
    assert after["refused_keys"] == [*_list(before["refused_keys"]), event.key]
    for field in set(before) - {"counters", "refused_keys", "seq", "at_ms"}:
        assert after[field] == before[field]


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


# --- snapshots --------------------------------------------------------------------------------------------------------


def check_snapshot(story: list[Step], begin: int, eager: int) -> None:
    """Freeze after `begin` steps, take `eager` sections after each one that follows, load, and compare with that instant."""
    shard = world()
    numbers: list[int] = []
    before = fingerprint(shard.ledger, KEYS)
    rows_before = len(shard.rows)
    sections: Iterator[bytes] = iter(())
    with tempfile.TemporaryDirectory() as folder:
        file = None
        for place, step in enumerate([*story, None]):
            if place == begin:
                shard.seal()
                before = fingerprint(shard.ledger, KEYS)
                rows_before = len(shard.rows)
                frozen = snapshot.Frozen(shard.ledger)
                file = snapshot.SnapshotFile(Path(folder), frozen.seq)
                sections = frozen.sections(Position(frozen.seq, bytes(16)))
            if step is not None:
                shard.now_ms += step.after_ms
                do(shard, numbers, step)
                shard.seal()
            if file is not None:
                for _ in range(eager):
                    section = next(sections, None)
                    if section is not None:
                        file.add(section)
        assert file is not None
        for section in sections:
            file.add(section)
        loaded, _ = snapshot.load(file.finish())
    assert fingerprint(loaded, KEYS) == before
    assert fingerprint(replayed(shard.rows[rows_before:], loaded), KEYS) == fingerprint(shard.ledger, KEYS)


@given(stories, st.data())
@tries(60)
def test_a_snapshot_taken_while_work_goes_on_is_one_instant(story: list[Step], data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(story)))
    eager = data.draw(st.integers(0, 2))
    with small_chunks():
        check_snapshot(story, begin, eager)


@pytest.mark.parametrize("seed", range(3))
def test_a_snapshot_of_many_chunks_is_one_instant(seed: int) -> None:
    with small_chunks():
        check_snapshot(drawn_by(seed, 900), 500, seed)


# --- long stories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_long_story(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of steps: compaction, joined chunks, index growth; checked every few hundred steps and at the end."""
    monkeypatch.setattr(columns, "CHUNK_ROWS", ROWS_OF_CHUNK)
    shard = world()
    shard.watched = False
    numbers: list[int] = []
    for place, step in enumerate(drawn_by(seed, 4_000)):
        shard.now_ms += step.after_ms
        do(shard, numbers, step)
        shard.seal()
        if place % 500 == 0:
            shard.now_ms += RULES.finished_keep_ms // 2
            shard.auditor.recount()
            shard.compare()
            check_limits(shard)
    assert len(numbers) > 400
    assert shard.ledger.reservations.count < len(numbers), "something must have been forgotten"
    shard.compare()
    with monkeypatch.context() as patch:
        patch.setattr(columns, "CHUNK_ROWS", 5 * ROWS_OF_CHUNK)
        assert fingerprint(replayed(shard.rows), MORE_KEYS) == fingerprint(shard.ledger, MORE_KEYS)
    assert fingerprint(replayed(shard.rows), MORE_KEYS) == fingerprint(shard.ledger, MORE_KEYS)


# --- the auditor reads nothing but the events -------------------------------------------------------------------------


@given(stories)
@tries(60)
def test_an_auditor_of_the_bytes_comes_to_the_same_totals(story: list[Step]) -> None:
    with small_chunks():
        shard = run(story)
    auditor = Auditor()
    for row in shard.rows:
        for place, event in enumerate(codec.decode_shard(row)):
            auditor.take(row.seq + place, row.at_ms, event)
    auditor.recount()
    assert auditor.findings == []
    assert auditor.totals() == shard.auditor.totals()
    assert auditor.overcommitments == shard.auditor.overcommitments
    assert auditor.statistics() == shard.auditor.statistics()
    assert auditor.statistics().reservations == shard.ledger.reservations.count


def test_fingerprints_tell_two_states_apart() -> None:
    """The helper that all of this rests on sees a change of any column."""
    shard = run(drawn_by(1, 60))
    before = fingerprint(shard.ledger, KEYS)
    assert fingerprint(copy.deepcopy(shard.ledger), KEYS) == before
    for field in set(columns.FIELDS) - {"number", "label_end", "counter_2", "quantity_2", "key_high", "key_low"}:
        other = copy.deepcopy(shard.ledger)
        getattr(other.reservations.chunks()[0], field)[0] += 1
        assert fingerprint(other, KEYS) != before, field
    for field in ("key_high", "key_low"):
        other = copy.deepcopy(shard.ledger)
        getattr(other.reservations.chunks()[0], field)[0] += 1
        with pytest.raises(AssertionError):
            fingerprint(other, KEYS)
    for field in columns.COUNTER_FIELDS:
        other = copy.deepcopy(shard.ledger)
        getattr(other.counters, field)[0] += 1
        assert fingerprint(other, KEYS) != before, field
    other = copy.deepcopy(shard.ledger)
    other.refused_keys["ff"] = None
    assert fingerprint(other, KEYS) != before
    shard.plan("pick-dc1", MORNING, 40)
    shard.held(Line("pick-dc1", MORNING, 1))
    before = fingerprint(shard.ledger, KEYS)
    other = copy.deepcopy(shard.ledger)
    assert len(other.expiry.due(2**62, 1_000)[0])
    assert fingerprint(other, KEYS) != before


def test_the_stories_reach_every_outcome() -> None:
    """What is drawn is only worth as much as what it meets."""
    met: set[Outcome] = set()
    for seed in range(15):
        shard = world()
        numbers: list[int] = []
        pace = (1, 60, 300)[seed % 3]
        for step in drawn_by(seed, 600):
            shard.now_ms += step.after_ms * pace
            chosen = step._replace(
                which=step.action % 16 if step.verb == "hold" else step.which,
                action=step.action % 50 + 1,
                ttl_ms=step.ttl_ms * pace,
                lines=(*step.lines, (step.action % 12, 1)) if step.action % 12 < len(COUNTERS) else step.lines,
                plan=(*step.plan[:3], step.action % 3 == 0),
            )
            reply = do(shard, numbers, chosen)
            shard.seal()
            if isinstance(reply, outcomes.Record | outcomes.Refused | outcomes.Taken):
                met.add(outcome_of(reply))
    never_of_a_story = {
        Outcome.SHARD_FULL,
        Outcome.PARTICIPANT_SILENT,
        Outcome.OVERLOADED,
        Outcome.DEADLINE_PASSED,
        Outcome.PLANNED,
        Outcome.PLAN_CONFLICT,
        Outcome.INVALID_SLOT,
        Outcome.POOL_HAS_SLOTS,
        Outcome.TOO_MANY_POOLS,
    }
    assert met == set(Outcome) - never_of_a_story
