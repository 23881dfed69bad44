"""One seed, one run: `python -m tests.sim.run --seed N --runs M`. A failure names the seed that replays it.

A run: some shards, customers in a bad time (messages lost, repeated, late; workers dying at every step; clocks that step; plans
that go below what is booked), then everything heals, and within HEAL_MS all must be settled: then the judge (`tests.sim.check`)
compares what was answered with what is journaled, and one more order over two shards must be taken.
"""

import argparse
import random
import sys
import time
from functools import partial
from typing import NamedTuple

from engine.core import outcomes
from engine.core.invariant import InvariantError
from engine.core.sharding import shard_of_counter
from tests.sim.check import check, require
from tests.sim.clients import Ask, Customer
from tests.sim.world import HEALED, POOL, Chances, Violation, World

BAD_MS = 4_000.0
HEAL_MS = 14_000.0
"""Deadlines (3 s) times tries (4), then a hold's longest life (6 s)."""
LAST_MS = 3_000.0


class Result(NamedTuple):
    """What a run was like."""

    asks: int
    done: int
    refused: int
    unknown: int
    """Tries that got no answer by their deadline."""
    crashes: int
    events: int


def chances_of(seed: int) -> Chances:
    """From a quiet time to a terrible one."""
    draw = random.Random(seed ^ 0x5EED)
    return Chances(
        lost=draw.choice((0.0, 0.02, 0.2)),
        repeated=draw.choice((0.0, 0.05, 0.3)),
        late=draw.choice((0.0, 0.05, 0.3)),
        late_ms_max=draw.choice((5.0, 300.0, 3_000.0)),
        crash_in_step=draw.choice((0.0, 0.003, 0.02)),
        slow_commit=draw.choice((0.0, 0.02, 0.2)),
    )


def simulate(seed: int) -> Result:
    """One run. Raises Violation or InvariantError."""
    draw = random.Random(seed)
    shards = draw.choice((2, 2, 3))
    world = World(
        seed, shards, counters=draw.choice((1, 1, 2)), base_max=draw.choice((1, 3, 8)), chances=chances_of(seed)
    )
    asks: list[Ask] = []
    customers = draw.randint(8, 30)
    for name in range(1, customers + 1):
        world.after(world.random.uniform(0.0, BAD_MS * 0.8), partial(_enter, world, name, asks))
    for _ in range(draw.choice((0, 1, 4))):
        victim = world.nodes[draw.randrange(shards)]
        world.after(draw.uniform(0.0, BAD_MS), victim.crash)
    for _ in range(draw.choice((0, 0, 3))):
        slot_id, base = draw.choice(world.slots), draw.randint(0, 4)
        world.after(draw.uniform(0.0, BAD_MS), partial(world.plan, slot_id, base))
    world.run(BAD_MS)
    world.chances = HEALED
    world.run(BAD_MS + HEAL_MS)
    check(world, asks)
    _check_alive(world)
    replies = [ask.replies[-1] for ask in asks if ask.replies]
    refused = sum(isinstance(reply, outcomes.Refused) for reply in replies)
    return Result(
        len(asks),
        len(replies) - refused,
        refused,
        sum(len(ask.unknown) for ask in asks),
        world.crashes,
        sum(node.rows[-1].end.seq for node in world.nodes),
    )


def _enter(world: World, name: int, asks: list[Ask]) -> None:
    Customer(world, name, asks)


def _check_alive(world: World) -> None:
    """After everything has healed an order over two shards is taken, at the first try."""
    by_shard = {shard_of_counter(POOL, slot_id, world.shards): slot_id for slot_id in world.slots}
    chosen = [by_shard[0], by_shard[1]]
    for slot_id in chosen:
        world.plan(slot_id, 1_000)
    world.run(world.now_ms + 50.0)
    asks: list[Ask] = []
    Customer(world, 1_000_000, asks, slots=chosen)
    world.run(world.now_ms + LAST_MS)
    first = asks[0].replies
    require(
        len(first) >= 1 and isinstance(first[0], outcomes.Taken), f"no order is taken after all has healed: {first}"
    )


def run(seed: int, runs: int) -> Result:
    """Several seeds from `seed` on; the sum of their results."""
    total = Result(0, 0, 0, 0, 0, 0)
    for each in range(seed, seed + runs):
        try:
            total = Result(*(sum(pair) for pair in zip(total, simulate(each), strict=True)))
        except (Violation, InvariantError) as error:
            raise Violation(f"seed {each}: {error}\nreplay: python -m tests.sim.run --seed {each} --runs 1") from error
    return total


def main() -> None:
    """The entry for a person."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1_000)
    arguments = parser.parse_args()
    began = time.monotonic()
    total = run(arguments.seed, arguments.runs)
    sys.stdout.write(f"{arguments.runs} runs in {time.monotonic() - began:.1f} s, all promises kept: {total}\n")


if __name__ == "__main__":
    main()
