"""Makes the golden data directory of the present release: `python -m tests.engine.make_golden TARGET`.

A golden directory is made once for a release and never again: `golden/release-N` must verify and load for ever. Run this only
for a new release, into a new folder, and add what test_golden_directory.py expects of it. It is what an engine of two shards
leaves that a planner, two workers and a client used: every kind of event is in it, with the events of several terms, an
overcommitted counter, and sealed segments. Snapshots are left out: they are not promised to later versions.
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


async def make(target: Path) -> None:
    working.HOUSEKEEPING_TICK_S = working.EXPIRY_TICK_S = 0.005
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
            if term == TERMS - 1:
                lowered = [
                    CounterPut("van-north", slot_id, 1, closed=place % 2 == 0) for place, slot_id in enumerate(SLOTS)
                ]
                await define(client, commands.PutCounters(lowered, "a van broke down", "planner"))
            clock.pass_ms(3 * HOUR_MS)
            for running in workers:
                # Everything due is expired and forgotten before the term ends, as an idle worker would.
                await until(lambda running=running: running.state.expiry.next_ms() is None)  # type: ignore[misc]  # bound
                finished = [f"{term}-0", f"{term}-1"]
                numbers = [customers[running.shard].numbers[name] for name in finished]
                await until(
                    lambda running=running, numbers=numbers: (
                        not any(  # type: ignore[misc]  # bound
                            running.state.reservations.find(number) for number in numbers
                        )
                    )
                )
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
