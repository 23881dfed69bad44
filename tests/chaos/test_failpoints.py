"""A process dies at an exact step of its work, once, while clients wait for just that step.

The environment names the step for the whole engine; the file that its first death leaves proves that it was reached, and the
successor goes on without it (`engine.failpoints`).
"""

from pathlib import Path

import orjson
import pytest

from perf.engine import Engine
from tests.chaos.harness import INSISTENT, SHARDS, Chaos, demand, wait_until

STEPS_BEFORE = 15
"""Commits with a step of a reservation over two shards before the death."""
COMMITS_BEFORE = 30
"""Commits between the definition of capacity and the death."""


def failpoint(place: str, commits: int, mark: Path) -> dict[str, str]:
    """The environment of an engine in which a process dies once, `commits` after it has the capacity of the clients."""
    pools = {pool_id for pool_id, _ in demand()[1]}
    # Each pool is a commit of the planner and of each worker, and so are its term and the import of counters.
    return {"SLOTKEEPER_FAILPOINT": f"{place}:kill:{len(pools) + 2 + commits}:{mark}"}


async def _until_died(chaos: Chaos, mark: Path) -> None:
    """A nemesis that only waits: for the death, and until everything works again."""
    await wait_until(mark.exists, INSISTENT.seconds)

    async def all_answer() -> None:
        for shard in range(SHARDS):
            await chaos.shard_answers(shard)

    await chaos.measure("the engine", all_answer)
    await chaos.progress(50)


@pytest.mark.parametrize("place", ["before_append", "after_append", "after_publish"])
async def test_a_worker_dies_at_each_step_of_a_commit(tmp_path: Path, place: str) -> None:
    mark = tmp_path / "died"
    engine = Engine(tmp_path / "data", shards=SHARDS, environment=failpoint(place, COMMITS_BEFORE, mark))
    try:
        chaos = Chaos(engine.start(), place)
        await chaos.run(lambda chaos: _until_died(chaos, mark))
        await chaos.check()
    finally:
        engine.clean()


@pytest.mark.parametrize("place", ["before_append_of_decision", "after_append_of_part"])
async def test_a_worker_dies_between_the_steps_of_a_reservation_over_two_shards(tmp_path: Path, place: str) -> None:
    mark = tmp_path / "died"
    # Only commits with such a step count, so capacity need not be counted with them.
    environment = {"SLOTKEEPER_FAILPOINT": f"{place}:kill:{STEPS_BEFORE}:{mark}"}
    engine = Engine(tmp_path / "data", shards=SHARDS, environment=environment)
    try:
        chaos = Chaos(engine.start(), place)
        await chaos.run(lambda chaos: _until_died(chaos, mark))
        await chaos.check()
    finally:
        engine.clean()


@pytest.mark.parametrize("place", ["planner_before_append", "planner_after_append"])
async def test_the_planner_dies_at_each_step_of_a_commit(tmp_path: Path, place: str) -> None:
    mark = tmp_path / "died"
    engine = Engine(tmp_path / "data", shards=SHARDS, environment=failpoint(place, 5, mark))

    async def plan_until_died(chaos: Chaos) -> None:
        client = chaos.client()
        pool = {"capacity_type": "logistics", "unit": "stop", "time_zone": "UTC"}
        await client.ask("PUT", "/v1/pools/planned", orjson.dumps(pool))
        counter = "/v1/pools/planned/slots/2030-01-01T08:00-10:00"
        base = 0
        while not mark.exists():
            base += 1
            answer = await client.ask("PUT", counter, orjson.dumps({"base": base}))
            found = orjson.loads((await client.ask("GET", counter)).body)
            if answer.status not in (200, 201) or found["base"] != base:
                chaos.history.violations.append(f"{counter}: base {base} was answered {answer}, then read {found}")
        client.close()
        await _until_died(chaos, mark)

    try:
        chaos = Chaos(engine.start(), place)
        await chaos.run(plan_until_died)
        await chaos.check()
    finally:
        engine.clean()
