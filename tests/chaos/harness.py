"""A real engine under the load of several clients, while a nemesis ends its processes.

`Chaos.run` starts clients that replay grocery orders (a few, again and again, so that counters are contended): they reserve,
hold, confirm, extend, move, release, and repeat old requests with their keys; OVER_SHARDS of the new reservations and of the
moves are of two shards. The nemesis kills meanwhile. When it has done its work the clients stop, and `Chaos.check` waits until
no news is on its way between the shards, compares what the clients heard with what the engine says (`history.violations`),
stops it, and lets `verify` prove the journals.

Rules
- Every choice comes from one seed, which each failure names; SLOTKEEPER_CHAOS_SEED gives it. The interleaving of processes
  is the kernel's, so a seed repeats the kind of run and not the run.
- A kill waits for a condition: the one before is mended and clients have made progress. Nothing is timed but recovery, and
  that is asserted only against RECOVERY_SECONDS_MAX.
"""

import datetime as dt
import functools
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import trio

from engine.core.sharding import reservation_id, reservation_number
from engine.verify import CrossReport, verify_data_directory
from perf import load, replay
from perf.engine import Child, Engine, is_alive, kill_child
from perf.load import Budget, Client, GaveUpError
from tests.chaos.history import Attempt, CounterName, History, Span, violations

CLIENTS = 8
ORDERS = 150
SHARDS = 2
OVER_SHARDS = 0.4
"""The share of new reservations and moves whose lines lie on two shards."""
HOLD_SECONDS = 600
"""No hold expires during a run, so a client knows what its reservations are."""
RECOVERY_SECONDS_MAX = 30.0
"""Only an engine that stays broken meets it. A quiet machine takes half a second for a worker and two for everything; a busy
one several times that, and the supervisor itself waits up to 5 s before it starts a child that keeps dying."""
GONE_SECONDS_MAX = 10.0
QUIET_SECONDS_MAX = 20.0
"""Until nothing is owed or pinned: news is sent again four times a second, so this is for a machine that does much else."""
INSISTENT = Budget(seconds=60.0, retry_after_s_max=0.1)
"""Clients insist for longer than any recovery, and come back sooner than they are told, to be there when it is ready."""
POLL_SECONDS = 0.005
OUTCOME_SLACK_MS = 500
"""An event carries the time at which its batch was opened: a slow commit before its request came. A request that was said
not to be executed, and was, is older than that: its deadline of a second had passed."""

SEED = int(os.environ.get("SLOTKEEPER_CHAOS_SEED") or random.SystemRandom().randrange(1_000_000))

Nemesis = Callable[["Chaos"], Awaitable[None]]


class Chaos:
    """One engine, its clients, and what they heard."""

    def __init__(self, engine: Engine, purpose: str) -> None:
        self.engine = engine
        self.chance = random.Random(f"{SEED}-{purpose}")
        self.history = History()
        self.recoveries_seconds: list[float] = []
        orders, self.limits = demand()
        self._orders_over_shards = [order for order in orders if order.lines_elsewhere(SHARDS)]
        self._orders_of_one_shard = [order for order in orders if not order.lines_elsewhere(SHARDS)]
        self._clients: list[Client] = []
        self._stopping = False

    # --- clients ------------------------------------------------------------------------------------------------------

    def client(self, budget: Budget = INSISTENT) -> Client:
        """A client of this engine, whose figures count."""
        client = Client(self.engine.address, budget, chance=random.Random(self.chance.random()))
        self._clients.append(client)
        return client

    def met(self) -> load.Statistics:
        """What all clients have met."""
        return load.merge([client.statistics() for client in self._clients])

    async def seed_capacity(self) -> None:
        """Define pools and counters."""
        client = self.client()
        await replay.seed(client, self.limits, lambda _: None)
        client.close()

    async def run(self, nemesis: Nemesis) -> None:
        """Let the clients work until the nemesis has done its work."""
        await self.seed_capacity()
        async with trio.open_nursery() as nursery:
            for number in range(CLIENTS):
                nursery.start_soon(self._work, number)
            await nemesis(self)
            self._stopping = True

    async def progress(self, operations: int) -> None:
        """Wait until the clients have had so many more answers."""
        wanted = self.history.operations + operations
        await wait_until(lambda: self.history.operations >= wanted, INSISTENT.seconds)

    async def _work(self, number: int) -> None:
        chance = random.Random(self.chance.random())
        client = self.client()
        mine: list[Attempt] = []
        count = 0
        try:
            while not self._stopping:
                live = [attempt for attempt in mine[-50:] if attempt.status in ("held", "confirmed")]
                choice = chance.random()
                if choice < 0.25 and live:
                    await self._release(client, chance.choice(live))
                elif choice < 0.35 and live:
                    await self._confirm(client, chance.choice(live))
                elif choice < 0.4 and live:
                    await self._extend(client, chance.choice(live))
                elif choice < 0.5 and live:
                    await self._move(client, chance.choice(live), self._lines(chance))
                elif choice < 0.58 and mine:
                    await self._repeat(client, chance.choice(mine))
                else:
                    count += 1
                    attempt = Attempt(f"chaos-{number}-{count}", self._lines(chance))
                    self.history.attempts[attempt.key] = attempt
                    await self._reserve(client, attempt, ttl=chance.random() < 0.4)
                    if attempt.reservation_id is not None:
                        mine.append(attempt)
        except GaveUpError as error:
            self.history.violations.append(f"client {number} gave up: {error}")
        finally:
            client.close()

    def _lines(self, chance: random.Random) -> dict[CounterName, int]:
        """The lines of an order over two shards, or else one of them or both of an order of one."""
        if chance.random() < OVER_SHARDS:
            lines = list(chance.choice(self._orders_over_shards).lines.items())
            chance.shuffle(lines)  # the first one is at home
            return dict(lines)
        lines = list(chance.choice(self._orders_of_one_shard).lines.items())
        return dict(lines if chance.random() < 0.5 else [chance.choice(lines)])

    async def _reserve(self, client: Client, attempt: Attempt, *, ttl: bool) -> None:
        asked: dict[str, Any] = {"order_ref": attempt.key, "lines": _told(attempt.lines)}
        if ttl:
            asked["ttl_seconds"] = HOLD_SECONDS
        attempt.asked = orjson.dumps(asked)
        answer = await client.ask("POST", "/v1/reservations", attempt.asked, attempt.key)
        self.history.operations += 1
        if answer.status in (200, 201):
            made = orjson.loads(answer.body)
            attempt.reservation_id, attempt.status = made["reservation_id"], made["status"]
            attempt.expires_at = made["expires_at"] if ttl else None
            attempt.spans.append(Span(dict(attempt.lines), time.monotonic()))
            created_at_ms = dt.datetime.fromisoformat(made["created_at"]).timestamp() * 1_000
            if set(client.attempts) <= {"not_executed"} and created_at_ms < client.attempt_at_ms - OUTCOME_SLACK_MS:
                self._wrong(attempt, f"heard {client.attempts} although it was made before: {made}")
            if (attempt.status, replay.named_lines(made["lines"])) != ("held" if ttl else "confirmed", attempt.lines):
                self._wrong(attempt, f"answered {made}")
        elif answer.status == 409 and orjson.loads(answer.body)["code"] == "insufficient_capacity":
            attempt.refused = True
        else:
            self._wrong(attempt, f"answered {answer.status} {answer.body.decode()}")

    async def _repeat(self, client: Client, attempt: Attempt) -> None:
        """Ask again with an old key: the answer is the reservation as it has become."""
        answer = await client.ask("POST", "/v1/reservations", attempt.asked, attempt.key)
        self.history.operations += 1
        if answer.status != 200:
            self._wrong(attempt, f"repeated: answered {answer.status} {answer.body.decode()}")
            return
        made = orjson.loads(answer.body)
        found = made["reservation_id"], made["status"], replay.named_lines(made["lines"])
        if found != (attempt.reservation_id, attempt.status, attempt.lines):
            self._wrong(attempt, f"is {attempt}, repeated it is {made}")

    async def _confirm(self, client: Client, attempt: Attempt) -> None:
        answer = await self._act(client, attempt, "confirm", {})
        known = attempt.status == "confirmed" and answer.status == 409
        if answer.status == 200:
            attempt.status, attempt.expires_at = "confirmed", None
        elif not known:
            self._wrong(attempt, f"confirm: answered {answer.status} {answer.body.decode()}")

    async def _extend(self, client: Client, attempt: Attempt) -> None:
        answer = await self._act(client, attempt, "extend", {"ttl_seconds": HOLD_SECONDS})
        known = attempt.status == "confirmed" and answer.status == 409
        if answer.status == 200:
            attempt.expires_at = orjson.loads(answer.body)["expires_at"]
        elif not known:
            self._wrong(attempt, f"extend: answered {answer.status} {answer.body.decode()}")

    async def _move(self, client: Client, attempt: Attempt, lines: dict[CounterName, int]) -> None:
        span = attempt.spans[-1]
        span.until = time.monotonic()
        answer = await self._act(client, attempt, "move", {"lines": _told(lines)})
        if answer.status == 200:
            attempt.lines = lines
            attempt.spans.append(Span(dict(lines), time.monotonic()))
        elif answer.status == 409 and orjson.loads(answer.body)["code"] == "insufficient_capacity":
            span.until = None
        else:
            self._wrong(attempt, f"move to {lines}: answered {answer.status} {answer.body.decode()}")

    async def _release(self, client: Client, attempt: Attempt) -> None:
        attempt.spans[-1].until = time.monotonic()
        answer = await self._act(client, attempt, "release", {})
        if answer.status == 200:
            attempt.status, attempt.expires_at = "released", None
        else:
            self._wrong(attempt, f"release: answered {answer.status} {answer.body.decode()}")

    async def _act(self, client: Client, attempt: Attempt, verb: str, asked: dict[str, Any]) -> load.Answer:
        attempt.steps += 1
        target = f"/v1/reservations/{attempt.reservation_id}/{verb}"
        answer = await client.ask("POST", target, orjson.dumps(asked), f"{attempt.key}-{verb}-{attempt.steps}")
        self.history.operations += 1
        return answer

    def _wrong(self, attempt: Attempt, what: str) -> None:
        self.history.violations.append(f"{attempt.key}: {what}")

    # --- nemeses ------------------------------------------------------------------------------------------------------

    async def kill(self, child: Child) -> None:
        """SIGKILL, and wait until it is gone and the supervisor knows: else the next kill could meet the only one left."""
        kill_child(child)
        await wait_until(lambda: not is_alive(child.pid), GONE_SECONDS_MAX)
        await wait_until(lambda: child.pid not in [one.pid for one in self.engine.children()], GONE_SECONDS_MAX)

    async def ready_child(self, role: str) -> Child:
        """One of the processes of a role that are ready, by chance."""

        def ready() -> list[Child]:
            return [child for child in self.engine.children(role) if child.state == "ready"]

        await wait_until(lambda: bool(ready()), RECOVERY_SECONDS_MAX)
        return self.chance.choice(ready())

    async def all_ready(self) -> None:
        """Wait until each process of the engine is ready."""
        await wait_until(self.engine.all_ready, RECOVERY_SECONDS_MAX)

    async def shard_answers(self, shard: int) -> None:
        """Wait until a shard's worker answers: only it can know that this reservation does not exist."""
        client = self.client()
        answer = await client.ask("GET", f"/v1/reservations/{reservation_id(reservation_number(1, shard))}")
        client.close()
        if answer.status not in (200, 404):
            self.history.violations.append(f"shard {shard} answered a look with {answer.status}")

    async def measure(self, what: str, recovered: Callable[[], Awaitable[object]]) -> None:
        """How long it takes until something works again."""
        start = time.monotonic()
        with trio.move_on_after(RECOVERY_SECONDS_MAX) as patience:
            await recovered()
        if patience.cancelled_caught:
            self.history.violations.append(f"{what} did not work again within {RECOVERY_SECONDS_MAX} s")
        self.recoveries_seconds.append(time.monotonic() - start)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def quiet(self) -> CrossReport:
        """Wait until no shard owes another one news, and none waits for some; not for longer than QUIET_SECONDS_MAX."""
        give_up_at = time.monotonic() + QUIET_SECONDS_MAX
        while True:
            report = await trio.to_thread.run_sync(verify_data_directory, self.engine.data)
            cross = report.cross
            if cross.owed == cross.pinned == cross.moving == 0:
                return cross
            if time.monotonic() > give_up_at:
                self.history.violations.append(f"not quiet after {QUIET_SECONDS_MAX} s: {cross}")
                return cross
            await trio.sleep(POLL_SECONDS)

    async def check(self) -> None:
        """Wait for quiet, compare, stop, verify. Fails with everything that is wrong, and prints what was measured."""
        await self.all_ready()
        start = time.monotonic()
        cross = await self.quiet()
        quiet_seconds = time.monotonic() - start
        if cross.reservations == 0:
            self.history.violations.append("no reservation lay on two shards: this run has proven little")
        client = self.client()
        pools = {pool_id for pool_id, _ in self.limits}
        reservations = {}
        for attempt in self.history.acknowledged():
            answer = await client.ask("GET", f"/v1/reservations/{attempt.reservation_id}")
            if answer.status == 200:
                reservations[attempt.reservation_id or ""] = orjson.loads(answer.body)
        found = list(
            violations(
                self.history,
                shards=SHARDS,
                limits=self.limits,
                counters=await replay.read_counters(client, pools),
                events=await replay.Feed(client).read(lambda _: None),
                reservations=reservations,
            )
        )
        client.close()
        await trio.to_thread.run_sync(self.engine.stop)
        verified, words = await trio.to_thread.run_sync(self.engine.verify)
        if not verified:
            found.append(f"verify: {words}")
        recoveries = " ".join(f"{seconds:.2f}" for seconds in self.recoveries_seconds)
        sys.stdout.write(
            f"seed {SEED}: {self.history.operations} operations, {len(self.history.acknowledged())} reservations, "
            f"{cross.reservations} of them over two shards, quiet after {quiet_seconds:.2f} s, "
            f"recovered after s: {recoveries or '-'}; clients met {self.met()}\n"
        )
        assert not found, f"seed {SEED}, log {self.engine.log}:\n" + "\n".join(found[:20])


def _told(lines: dict[CounterName, int]) -> list[dict[str, Any]]:
    return [{"pool_id": pool_id, "slot_id": slot_id, "quantity": units} for (pool_id, slot_id), units in lines.items()]


@functools.cache
def demand() -> tuple[list[replay.Order], dict[CounterName, int]]:
    """A few orders of the year, and the limits of the counters that they ask for."""
    year = replay.load_orders(replay.weeks_to_move(dt.datetime.now(dt.UTC).date()))
    orders = year[-ORDERS:]
    return orders, replay.make_counters(orders, replay.make_limits(year))


def new_engine(directory: Path) -> Engine:
    """An engine of two shards in a directory, not started."""
    return Engine(directory / "data", shards=SHARDS)


async def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Poll a condition. Raises trio.TooSlowError."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - other processes set no event of ours
            await trio.sleep(POLL_SECONDS)
