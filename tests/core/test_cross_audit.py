"""The proof over all shards: what is whole is proven at any moment, what is on its way is counted, what is cut off is named.

The journals come from the simulation, where every promise is known to be kept.
"""

from functools import partial

import pytest

from engine import codec
from engine.audit import CONFIRMED, HELD, RELEASED, Auditor
from engine.cross_audit import Report, cross_audit
from tests.sim.clients import Ask, Customer
from tests.sim.run import BAD_MS, HEAL_MS
from tests.sim.world import HEALED, Chances, World

UNTIL_MS = 3_000.0
TERRIBLE = Chances(lost=0.1, repeated=0.1, late=0.2, late_ms_max=300.0, crash_in_step=0.005, slow_commit=0.1)


def played(seed: int, until_ms: float, chances: Chances = TERRIBLE) -> World:
    """A world in the middle of things."""
    world = World(seed, 3, counters=2, base_max=8, chances=chances)
    asks: list[Ask] = []
    for name in range(1, 31):
        world.after(world.random.uniform(0.0, BAD_MS * 0.6), partial(_enter, world, name, asks))
    world.run(until_ms)
    return world


def _enter(world: World, name: int, asks: list[Ask]) -> None:
    Customer(world, name, asks)


def audited(world: World, shard: int, rows: int | None = None) -> Auditor:
    """A shard's auditor after so many rows."""
    auditor = Auditor(world.shards)
    for row in world.nodes[shard].rows[:rows]:
        for place, event in enumerate(codec.decode_shard(row)):
            auditor.take(row.seq + place, row.at_ms, event)
    return auditor


def whole(world: World) -> list[Auditor]:
    return [audited(world, shard) for shard in range(world.shards)]


def test_at_any_moment_nothing_is_wrong_and_what_is_on_its_way_is_counted() -> None:
    owed = pinned = parts = 0
    for seed in range(1, 6):
        world = played(seed, 0.0)
        for moment in range(1, 60):
            world.run(moment * 50.0)
            report = cross_audit(whole(world))
            assert report.problems == []
            assert report.moving == 0
            owed, pinned, parts = owed + report.owed, pinned + report.pinned, parts + report.parts
    assert owed > 100
    assert pinned > 100
    assert parts > owed


def test_journals_read_one_after_another_raise_no_false_alarm() -> None:
    """As beside a live engine: each shard is read some time after the one before."""
    moving = 0
    for seed in range(1, 6):
        for moment_ms in range(200, 2_600, 150):
            world = played(seed, float(moment_ms))
            auditors = []
            for shard in range(world.shards):
                auditors.append(audited(world, shard))
                world.run(world.now_ms + 250.0)
            report = cross_audit(auditors)
            assert report.problems == []
            moving += report.moving
    assert moving > 10


def test_after_everything_has_healed_nothing_is_on_its_way() -> None:
    world = played(1, BAD_MS)
    world.chances = HEALED
    world.run(BAD_MS + HEAL_MS)
    report = cross_audit(whole(world))
    assert report.reservations > 0
    assert (report.owed, report.pinned, report.moving, report.problems) == (0, 0, 0, [])


@pytest.fixture(scope="module")
def world() -> World:
    """A quiet world in the middle of a day: many reservations are settled and take units."""
    return played(4, 2_500.0, HEALED)


def settled(auditors: list[Auditor]) -> tuple[int, int, int, int]:
    """Home shard, number, other shard and part number of a settled reservation that takes units elsewhere."""
    for shard, auditor in enumerate(auditors):
        for home in auditor.homes():
            if not home.is_owed and home.status == CONFIRMED:
                for other, (part_number, lines) in home.parts.items():
                    if lines and not auditors[other].part(part_number).is_pinned:  # type: ignore[union-attr]  # it is there
                        return shard, home.number, other, part_number
    raise AssertionError("no settled reservation")


def problem_of(auditors: list[Auditor]) -> str:
    report = cross_audit(auditors)
    assert len(report.problems) >= 1, report
    return report.problems[0]


def test_a_part_that_is_gone_is_named(world: World) -> None:
    auditors = whole(world)
    _, number, other, part = settled(auditors)
    del auditors[other]._links[part]
    assert f"reservation {number}" in problem_of(auditors)
    assert "confirmed at home, unknown there" in problem_of(auditors)
    auditors[other]._left.add(part)
    assert cross_audit(auditors).problems == []


@pytest.mark.parametrize("what", ["status", "lines", "version back", "version ahead", "another home", "pinned"])
def test_a_part_that_differs_is_named(world: World, what: str) -> None:
    auditors = whole(world)
    shard, _, other, part = settled(auditors)
    record, link = auditors[other]._records[part], auditors[other]._links[part]
    match what:
        case "status":
            record.status = RELEASED
        case "lines":
            record.lines = tuple((row, units + 1) for row, units in record.lines)
        case "version back":
            link.version -= 1
        case "version ahead":
            link.version += 1
        case "another home":
            link.reservation += 1
        case _:
            link.is_pinned = True
            assert cross_audit(auditors).problems == []
            return
    report = cross_audit(auditors)
    is_told_by_reading_order = (what == "version ahead" and shard < other) or (what == "version back" and other < shard)
    if is_told_by_reading_order:
        assert (report.problems, report.moving) == ([], 1)
    else:
        assert f"part {part}" in report.problems[0]


def test_a_hold_may_have_expired_by_the_clock_of_its_part_only(world: World) -> None:
    auditors = whole(world)
    shard, number, other, part = settled(auditors)
    auditors[shard]._records[number].status = HELD
    assert "held" in problem_of(auditors)
    auditors[other]._records[part].status = 4
    assert cross_audit(auditors).problems == []


def test_a_reservation_that_its_home_does_not_know_is_named(world: World) -> None:
    auditors = whole(world)
    shard, number, other, _ = settled(auditors)
    del auditors[shard]._records[number]
    report = cross_audit(auditors)
    if other < shard:
        assert report.moving >= 1
    else:
        assert "its home does not know" in report.problems[0]
    auditors[shard]._left.add(number)
    assert cross_audit(auditors)[:1] == ([],)


def test_a_part_that_its_reservation_does_not_name_is_named(world: World) -> None:
    auditors = whole(world)
    shard, number, other, part = settled(auditors)
    del auditors[shard]._elsewhere[number][other]
    assert problem_of(auditors).startswith(f"part {part} on shard {other}")


def test_a_journal_that_has_lost_its_end_is_named(world: World) -> None:
    """Rows are cut off one shard, which its own chain would not show: the others know more than it."""
    found: list[str] = []
    for shard in range(world.shards):
        rows = len(world.nodes[shard].rows)
        auditors = [audited(world, each, rows // 2 if each == shard else None) for each in range(world.shards)]
        found += cross_audit(auditors).problems
    assert any("lost its end" in problem for problem in found)
    assert len(found) > world.shards


def test_a_report_of_nothing() -> None:
    assert cross_audit([Auditor(), Auditor()]) == Report([], 0, 0, 0, 0, 0)
