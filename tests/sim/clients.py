"""Customers of the simulated shards: they order, change their minds, and ask again under the same key when nobody answers.

As `api.upstream` does for them: a request that finds the worker gone waits for its successor and is sent to it again; at the
deadline the outcome is unknown, and the customer may ask again under the same key.
"""

from collections.abc import Callable
from typing import NamedTuple

from engine.core import commands, outcomes
from engine.core.columns import CONFIRMED, HELD
from engine.core.commands import Line
from engine.core.outcomes import Outcome
from engine.core.sharding import shard_of_counter
from tests.sim.world import POOL, Incoming, World

DEADLINE_MS = 3_000
TRIES_MAX = 4
STEPS_MAX = 5
TRY_AGAIN = (
    Outcome.PARTICIPANT_SILENT,
    Outcome.OVERLOADED,
    Outcome.DEADLINE_PASSED,
    Outcome.SHARD_FULL,
)
"""Refusals by which nothing was done and which time may cure."""


class Ask(NamedTuple):
    """A request and what came of it."""

    command: commands.ShardCommand
    replies: list[outcomes.Reply]
    """All replies, in the order in which they came."""
    unknown: list[float]
    """When a try got no answer by its deadline."""


def upstream(
    world: World, shard: int, command: commands.ShardCommand, done: Callable[[outcomes.Reply | None], None]
) -> None:
    """One request as `api.upstream` makes it. None: unknown."""
    deadline_ms = world.now_ms + DEADLINE_MS
    answered = False

    def answer(reply: outcomes.Reply) -> None:
        def arrive() -> None:
            nonlocal answered
            if not answered:
                answered = True
                done(reply)

        world.after(world.random.uniform(0.05, 0.5), arrive)

    def send() -> None:
        node = world.nodes[shard]
        if answered or world.now_ms >= deadline_ms:
            return
        if not node.is_up:
            node.on_start.append(send)
            return
        life = node.life
        node.receive(Incoming(answer, int(deadline_ms), command))

        def lost() -> None:
            """The connection broke: wait for the successor."""
            if not answered and world.now_ms < deadline_ms:
                if node.life != life:
                    send()
                else:
                    world.after(20.0, lost)

        world.after(20.0, lost)

    def give_up() -> None:
        nonlocal answered
        if not answered:
            answered = True
            done(None)

    world.after(world.random.uniform(0.05, 0.5), send)
    world.after(DEADLINE_MS, give_up)


class Customer:
    """One order: a hold, then some steps on it."""

    def __init__(self, world: World, name: int, asks: list[Ask], *, slots: list[str] | None = None) -> None:
        self.world = world
        self.asks = asks
        self.key = name.to_bytes(8, "big") + (name * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big")
        self.name = name
        self.number = 0
        self.last: outcomes.Record | outcomes.Taken | None = None
        self.steps = 0
        random = world.random
        self.lines = self._draw(slots)
        self.is_at_once = random.random() < 0.2
        self.ttl_ms = random.choice((150, 600, 2_000, 5_000))
        self.home = shard_of_counter(POOL, self.lines[0].slot_id, world.shards)
        ttl_ms = commands.NO_TTL if self.is_at_once else self.ttl_ms
        self._ask(commands.Hold(self.lines, ttl_ms, self.key, name, f"SO-{name}", "web"), self._booked)

    def _draw(self, slots: list[str] | None = None) -> list[Line]:
        random = self.world.random
        chosen = slots or random.sample(self.world.slots, min(len(self.world.slots), random.choice((1, 2, 2, 2, 3))))
        return [Line(POOL, slot_id, 1 if slots else random.choice((1, 1, 2))) for slot_id in chosen]

    def _ask(self, command: commands.ShardCommand, done: Callable[[outcomes.Reply], None]) -> None:
        ask = Ask(command, [], [])
        self.asks.append(ask)
        tries = 0

        def once() -> None:
            nonlocal tries
            tries += 1
            upstream(self.world, self.home, command, heard)

        def heard(reply: outcomes.Reply | None) -> None:
            if reply is None:
                ask.unknown.append(self.world.now_ms)
            else:
                ask.replies.append(reply)
                if not (isinstance(reply, outcomes.Refused) and reply.outcome in TRY_AGAIN):
                    done(reply)
                    return
            if tries < TRIES_MAX:
                self.world.after(self.world.random.uniform(1.0, 300.0), once)

        once()

    def _booked(self, reply: outcomes.Reply) -> None:
        if isinstance(reply, outcomes.Taken | outcomes.Record):
            self.number = reply.number
            self.last = reply
            if self.world.random.random() < 0.1:  # as if the answer had been lost on the way
                self._ask(self.asks_first(), self._went_on)
            else:
                self._went_on(reply)

    def asks_first(self) -> commands.ShardCommand:
        """The order once more, word for word."""
        ttl_ms = commands.NO_TTL if self.is_at_once else self.ttl_ms
        return commands.Hold(self.lines, ttl_ms, self.key, self.name, f"SO-{self.name}", "web")

    def _went_on(self, reply: outcomes.Reply) -> None:
        if isinstance(reply, outcomes.Record):
            self.last = reply
        self.steps += 1
        if self.steps > STEPS_MAX:
            return
        self.world.after(self.world.random.choice((0.0, 1.0, 30.0, 400.0)), self._step)

    def _step(self) -> None:
        random = self.world.random
        action = self.name * 1_000 + self.steps + 1
        number = self.number
        status = self.last.status if isinstance(self.last, outcomes.Record) else CONFIRMED if self.is_at_once else HELD
        likely = ("confirm", "confirm", "part", "extend", "move", "release", "look")
        if status == CONFIRMED:
            likely = ("move", "fulfil", "release", "look", "move", "confirm", "look")
        match random.choice(likely):
            case "confirm":
                command: commands.ShardCommand = commands.Confirm(number, action)
            case "part":
                had = self.last.lines if isinstance(self.last, outcomes.Record) else _named(self.lines)
                kept = [Line(pool_id, slot_id, random.randint(1, units)) for pool_id, slot_id, units in had]
                command = commands.Confirm(number, action, kept[: random.randint(1, len(kept))] if kept else None)
            case "extend":
                command = commands.Extend(number, action, random.choice((300, 2_000, 5_000)))
            case "move":
                command = commands.Move(number, action, self._draw())
            case "release":
                command = commands.Release(number, action)
            case "fulfil":
                command = commands.Fulfil(number, action)
            case _:
                command = commands.Look(number)
        self._ask(command, self._went_on)
        if random.random() < 0.25:  # somebody else has the same page open
            self._ask(
                random.choice(
                    (
                        commands.Release(number, -action),
                        commands.Move(number, -action, self._draw()),
                        commands.Move(number, -action, self._draw()),
                        commands.Confirm(number, -action),
                    )
                ),
                lambda _: None,
            )


def _named(lines: list[Line]) -> list[tuple[str, str, int]]:
    units: dict[tuple[str, str], int] = {}
    for line in lines:
        name = (line.pool_id, line.slot_id)
        units[name] = units.get(name, 0) + line.quantity
    return [(pool_id, slot_id, quantity) for (pool_id, slot_id), quantity in units.items()]
