"""Parts of a running engine are killed by SIGKILL, again and again, under the load of several clients.

Whatever dies: nothing acknowledged is lost or doubled, no counter passes its limit, `verify` proves the journals, clients that
insist get an answer, and each part works again within a bound. The short form is a few kills; `-m slow` takes
SLOTKEEPER_CHAOS_KILLS of them, 40 if not given: a child that keeps dying is started again after ever longer pauses, up to
5 s, which is where most of that time goes.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import trio

from perf.engine import Engine, is_alive
from tests.chaos.harness import GONE_SECONDS_MAX, RECOVERY_SECONDS_MAX, Chaos, Nemesis, new_engine, wait_until

KILLS_SHORT = 3
KILLS_LONG = int(os.environ.get("SLOTKEEPER_CHAOS_KILLS", "40"))
OPERATIONS_BETWEEN_MAX = 150
"""Clients do at least one and at most so many between two kills, so that kills meet the engine in every state."""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = new_engine(tmp_path)
    try:
        yield engine.start()
    finally:
        engine.clean()


async def _pause(chaos: Chaos) -> None:
    await chaos.progress(chaos.chance.randint(1, OPERATIONS_BETWEEN_MAX))


def kill_workers(kills: int) -> Nemesis:
    """A worker at a time; its shard has to answer again."""

    async def nemesis(chaos: Chaos) -> None:
        for _ in range(kills):
            await _pause(chaos)
            worker = await chaos.ready_child("worker")
            await chaos.kill(worker)
            await chaos.measure(f"shard {worker.number}", lambda shard=worker.number: chaos.shard_answers(shard))  # type: ignore[misc]  # a default binds the shard of this turn
            await chaos.all_ready()
        await _pause(chaos)

    return nemesis


def kill_api_processes(kills: int) -> Nemesis:
    """An api process at a time; the other serves, and the listening socket is never closed."""

    async def nemesis(chaos: Chaos) -> None:
        for _ in range(kills):
            await _pause(chaos)
            await chaos.kill(await chaos.ready_child("api"))
            await chaos.measure("the api", lambda: chaos.shard_answers(0))
            await chaos.all_ready()
        await _pause(chaos)
        assert chaos.met().connects_refused == 0

    return nemesis


def kill_planner(kills: int) -> Nemesis:
    """The planner, while capacity is changed; each acknowledged change stays."""

    async def nemesis(chaos: Chaos) -> None:
        acknowledged: dict[str, int] = {}
        asked: dict[str, int] = {}
        stopping = False

        async def plan(number: int) -> None:
            client = chaos.client()
            pool_id = f"planned-{number}"
            counter = f"/v1/pools/{pool_id}/slots/2030-01-01T08:00-10:00"
            pool = {"capacity_type": "logistics", "unit": "stop", "time_zone": "UTC"}
            await client.ask("PUT", f"/v1/pools/{pool_id}", orjson.dumps(pool))
            while not stopping:
                asked[counter] = base = asked.get(counter, 0) + 1
                answer = await client.ask("PUT", counter, orjson.dumps({"base": base}))
                found = orjson.loads((await client.ask("GET", counter)).body)
                if answer.status not in (200, 201) or found["base"] != base:
                    chaos.history.violations.append(f"{counter}: base {base} was answered {answer}, then read {found}")
                acknowledged[counter] = base
            client.close()

        async def planned_since(before: dict[str, int]) -> None:
            await wait_until(lambda: acknowledged != before, RECOVERY_SECONDS_MAX)

        async with trio.open_nursery() as planners:
            for number in range(3):
                planners.start_soon(plan, number)
            for _ in range(kills):
                await _pause(chaos)
                await chaos.kill(await chaos.ready_child("planner"))
                before = dict(acknowledged)
                await chaos.measure("the planner", lambda before=before: planned_since(before))  # type: ignore[misc]  # as above
                await chaos.all_ready()
            stopping = True
        assert sum(acknowledged.values()) > kills

    return nemesis


def kill_supervisor(kills: int) -> Nemesis:
    """The supervisor; no child outlives it, and the next one need not wait for them."""

    async def nemesis(chaos: Chaos) -> None:
        engine = chaos.engine
        for _ in range(kills):
            await _pause(chaos)
            orphans = engine.kill()

            async def start_again() -> None:
                engine.spawn()
                await trio.to_thread.run_sync(engine.wait_ready)
                await chaos.shard_answers(0)
                await chaos.shard_answers(1)

            await chaos.measure("the engine", start_again)
            await wait_until(lambda gone=orphans: not any(is_alive(orphan.pid) for orphan in gone), GONE_SECONDS_MAX)  # type: ignore[misc]  # as above
        await _pause(chaos)

    return nemesis


NEMESES = {
    "worker": kill_workers,
    "api": kill_api_processes,
    "planner": kill_planner,
    "supervisor": kill_supervisor,
}


@pytest.mark.parametrize("role", NEMESES)
async def test_kills(engine: Engine, role: str) -> None:
    chaos = Chaos(engine, role)
    await chaos.run(NEMESES[role](KILLS_SHORT))
    await chaos.check()


@pytest.mark.slow
@pytest.mark.timeout(120 + KILLS_LONG * 2 * RECOVERY_SECONDS_MAX)
@pytest.mark.parametrize("role", NEMESES)
async def test_many_kills(engine: Engine, role: str) -> None:
    chaos = Chaos(engine, f"{role} {KILLS_LONG}")
    await chaos.run(NEMESES[role](KILLS_LONG))
    await chaos.check()
