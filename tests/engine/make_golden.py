"""Makes the golden data directory of the present release: `python -m tests.engine.make_golden TARGET`.

A golden directory is made once for a release and never again: `golden/release-N` must verify and load for ever. Run this only
for a new release, into a new folder, and add what test_golden_directory.py expects of it. It is what an engine of two shards
leaves that a planner, two workers and a client used: every kind of event is in it, with the events of several terms, an
overcommitted counter, reservations over both shards with either as their home, and sealed segments. Snapshots are left out:
they are not promised to later versions.

Made twice it is the same to the last hash. So time moves only when everything has come to rest, nothing ticks, and what
else comes by a tick, expiry and forgetting, is done by hand.
"""

import argparse
import shutil
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import trio

from engine import datadir
from engine import worker as working
from engine.core import commands, ledger, outcomes
from engine.core.commands import CounterPut, Line
from engine.core.sharding import shard_of_counter
from tests.core.shard import HOUR_MS, MINUTE_MS, ZONE, key
from tests.engine.engine_tools import Client, ManualClock, Running, planner_on_disk, until, worker_on_disk

SHARDS = 2
STORE_ID = UUID("6f1d3c52-0000-4000-8000-51077e3be5e0")
CREATED_AT = datetime(2026, 11, 30, tzinfo=UTC)
SLOTS = [f"2026-12-{day:02d}T18:00-20:00" for day in range(1, 9)]
RULES = ledger.Rules(hold_ms_max=2 * HOUR_MS, finished_keep_ms=2 * HOUR_MS)
TERMS = 3


async def define(client: Client, command: commands.PutPool | commands.PutCounters) -> None:
    reply = await client.ask(command)
    if not isinstance(reply, outcomes.Defined):
        raise SystemExit(f"not defined: {reply}")


class Customers:
    """Who reserves on one shard, term after term."""

    def __init__(self, shard: int) -> None:
        self.mine = [slot_id for slot_id in SLOTS if shard_of_counter("van-north", slot_id, SHARDS) == shard]
        self.shard = shard
        self.numbers: dict[str, int] = {}
        self.action = 0

    async def hold(self, client: Client, name: str, quantity: int, place: int, *, ttl_ms: int = HOUR_MS) -> None:
        line = Line("van-north", self.mine[place % len(self.mine)], quantity)
        words = (f"SO-{name}", "größe" if quantity == 1 else "web")
        reply = await client.ask(commands.Hold([line], ttl_ms, key(f"{self.shard}-{name}"), 7, *words))
        if isinstance(reply, outcomes.Taken):
            self.numbers[name] = reply.number

    async def step(self, client: Client, make: type[commands.Command], name: str, *more: object) -> None:
        self.action += 1
        await client.ask(make(self.numbers[name], self.action, *more))

    async def term(self, running: Running, clock: ManualClock, term: int) -> None:
        client = await running.client()
        for number in range(6):
            await self.hold(client, f"{term}-{number}", 1 + number % 3, number)
            clock.pass_ms(250)
        await self.hold(client, f"{term}-greedy", 900, 1)  # refused
        await self.step(client, commands.Confirm, f"{term}-0")
        await self.step(client, commands.Fulfil, f"{term}-0")
        await self.step(client, commands.Confirm, f"{term}-1", [Line("van-north", self.mine[1], 1)])
        await self.step(client, commands.Release, f"{term}-1", "changed their mind")
        await self.step(client, commands.Extend, f"{term}-2", HOUR_MS)
        await self.step(client, commands.Move, f"{term}-3", [Line("van-north", self.mine[0], 1)])
        await self.hold(client, f"{term}-at-once", 2, 0, ttl_ms=commands.NO_TTL)
        await self.hold(client, f"{term}-short", 1, 1, ttl_ms=MINUTE_MS)
        clock.pass_ms(2 * MINUTE_MS)
        await self.step(client, commands.Confirm, f"{term}-short")  # late


class Pairs:
    """Who reserves on both shards at once, each reservation at home on the shard of its first line."""

    def __init__(self, home: Customers, away: Customers) -> None:
        self.home = home
        self.away = away

    def lines(self, quantity: int, place: int, place_away: int) -> list[Line]:
        return [
            Line("van-north", customers.mine[which % len(customers.mine)], quantity)
            for customers, which in ((self.home, place), (self.away, place_away))
        ]

    async def term(self, workers: list[Running], term: int) -> None:
        running = workers[self.home.shard]
        client = await running.client()

        async def hold(name: str, lines: list[Line], ttl_ms: int = HOUR_MS) -> None:
            name = f"{term}-{name}"
            reply = await client.ask(
                commands.Hold(lines, ttl_ms, key(f"{self.home.shard}-{name}"), 7, f"SO-{name}", "größe")
            )
            await settled(workers)
            if isinstance(reply, outcomes.Taken):
                self.home.numbers[name] = reply.number

        async def step(make: type[commands.Command], name: str, *more: object) -> None:
            await self.home.step(client, make, f"{term}-{name}", *more)
            await settled(workers)

        await hold("pair-0", self.lines(1, 2, 2))
        await step(commands.Confirm, "pair-0")
        await step(commands.Fulfil, "pair-0")
        await hold("pair-1", self.lines(2, 2, 1))
        await step(commands.Confirm, "pair-1", self.lines(1, 2, 1))
        await hold("pair-2", self.lines(1, 0, 2))
        await step(commands.Extend, "pair-2", 90 * MINUTE_MS)
        await step(commands.Move, "pair-2", self.lines(2, 2, 0))
        await step(commands.Release, "pair-2", "changed their mind")
        await hold("pair-at-once", self.lines(1, 1, 1), commands.NO_TTL)
        await step(commands.Move, "pair-at-once", self.lines(1, 2, 1)[:1])  # the part is given up
        few, many = self.lines(1, 0, 0)[0], self.lines(900, 0, 0)[1]
        await hold("pair-greedy", [few, many])  # refused by the other shard
        if self.home.shard == term % SHARDS:  # two at the same time would pass each other on their way
            await hold("pair-expires", self.lines(1, 0, 1))


async def settled(workers: list[Running]) -> None:
    """Nothing is in flight between the shards, or open."""
    await until(
        lambda: (
            not any(
                running.state.owed
                or running.state.pinned
                or running.worker._events
                or running.journal.head.seq < running.state.seq
                for running in workers
            )
        )
    )


async def clean_up(workers: list[Running]) -> None:
    """Everything due is expired and forgotten, as the ticks of an idle worker would."""
    for running in workers:
        at_ms = running.worker._begin()
        event, _ = ledger.forget(running.state, 0, at_ms, RULES)
        if event is not None:
            running.worker._apply(event, at_ms)
        running.worker._wake.set()
    await settled(workers)


async def make(target: Path) -> None:
    working.HOUSEKEEPING_TICK_S = working.EXPIRY_TICK_S = working.COORDINATOR_TICK_S = 3600
    datadir.init(target, SHARDS, store_id=STORE_ID, created_at=CREATED_AT)
    runtime = target / "runtime"
    runtime.mkdir()
    clock = ManualClock()
    customers = [Customers(shard) for shard in range(SHARDS)]
    for term in range(TERMS):
        async with AsyncExitStack() as stack:
            workers = [
                await stack.enter_async_context(
                    worker_on_disk(
                        datadir.shard_directory(target, shard),
                        runtime=runtime,
                        shard=shard,
                        shards=SHARDS,
                        clock=clock,
                        rules=RULES,
                        segment_bytes_max=20 * 1024,
                    )
                )
                for shard in range(SHARDS)
            ]
            planner = await stack.enter_async_context(
                planner_on_disk(datadir.planning_directory(target), runtime, SHARDS, clock=clock)
            )
            client = await planner.client()
            cutoff = (30 * (term + 1), None, None) if term else None
            await define(
                client, commands.PutPool("van-north", "delivery", "stops", "north", ZONE, cutoff, "why", "who")
            )
            counters = [CounterPut("van-north", slot_id, 30 + term, 2, 1) for slot_id in SLOTS]
            await define(client, commands.PutCounters(counters, "season", "planner"))
            for each, running in zip(customers, workers, strict=True):
                await each.term(running, clock, term)
                await settled(workers)
            for home, away in (customers, customers[::-1]):
                await Pairs(home, away).term(workers, term)
            if term == TERMS - 1:
                lowered = [
                    CounterPut("van-north", slot_id, 1, closed=place % 2 == 0) for place, slot_id in enumerate(SLOTS)
                ]
                await define(client, commands.PutCounters(lowered, "a van broke down", "planner"))
            clock.pass_ms(3 * HOUR_MS)
            await clean_up(workers)
    shutil.rmtree(runtime)
    remove_locks(target)


def remove_locks(target: Path) -> None:
    """Their text is the process that made this."""
    for path in (*target.glob("*/lock"), target / datadir.LOCK_NAME):
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    trio.run(make, parser.parse_args().target)


if __name__ == "__main__":
    main()
