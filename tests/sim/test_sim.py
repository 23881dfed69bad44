"""The simulation keeps every promise, replays by seed, and notices what is planted."""

import random

import pytest

from engine.core import ledger, outcomes
from engine.core.invariant import InvariantError
from engine.core.outcomes import Outcome
from engine.core.sharding import shard_of_counter
from tests.sim import bugs, world
from tests.sim.bugs import Plant
from tests.sim.clients import Ask, Customer
from tests.sim.run import run, simulate
from tests.sim.world import HEALED, POOL, Violation, World

SEEDS = 250
SEEDS_TO_FIND_A_BUG = 600
"""About three times what the best hidden of them takes."""


def test_a_few_hundred_bad_times() -> None:
    total = run(seed=1, runs=SEEDS)
    assert total.done > 20 * SEEDS
    assert total.refused > 5 * SEEDS
    assert total.crashes > SEEDS
    assert total.unknown > 0


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_many_thousand_bad_times() -> None:
    run(seed=100_000, runs=20_000)


def test_a_seed_replays_the_same_run() -> None:
    seed = random.Random(4).randint(0, 10**9)
    assert simulate(seed) == simulate(seed)


@pytest.mark.parametrize("plant", {**bugs.BUGS, **bugs.MADE}.values(), ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises((Violation, InvariantError)):
        run(seed=1, runs=SEEDS_TO_FIND_A_BUG)


def _retried_after_the_home_lost_its_attempt() -> list[outcomes.Reply]:
    """The replies to an order for the last units of two shards whose home dies when the other shard has agreed."""
    here = World(5, 2, counters=1, base_max=1, chances=HEALED)
    by_shard = {shard_of_counter(POOL, slot_id, 2): slot_id for slot_id in here.slots}
    asks: list[Ask] = []
    Customer(here, 1, asks, slots=[by_shard[0], by_shard[1]])
    while not here.nodes[1].ledger.pinned:
        here.run(here.now_ms + 0.05)
    while not any(part.is_pinned for part in here.nodes[1].auditor.parts()):
        here.run(here.now_ms + 0.05)
    here.nodes[0].crash()
    here.run(here.now_ms + 100.0)
    return asks[0].replies


def test_a_retry_finds_the_part_of_an_attempt_that_its_home_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that nothing is overbooked, but a customer is refused for the sake of his own first try."""
    monkeypatch.setattr(world, "RESTART_MS", (10.0, 10.0))
    [reply] = _retried_after_the_home_lost_its_attempt()
    assert isinstance(reply, outcomes.Taken)
    monkeypatch.setattr(ledger, "_unborn_part", lambda *_: 0)
    [reply] = _retried_after_the_home_lost_its_attempt()
    assert isinstance(reply, outcomes.Refused)
    assert reply.outcome is Outcome.INSUFFICIENT_CAPACITY
