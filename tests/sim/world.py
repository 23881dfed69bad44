"""Shards, the wires between them and time, from one seed: what is real is the ledger, the coordinator and the codec.

Rules
- One heap of things to come; ties in the order they were put in. Chance comes from one seeded generator, in that order, so a
  seed replays the same run.
- `Node` does what `engine.worker` does around the same calls: an open batch, a sealed one, a journal with a durable part and a
  tail that may or may not be durable when the process dies; replies and news leave after the commit.
- The wires are worse than unix sockets: messages are lost, repeated, reordered, and reach a successor of who they were for.

Not promised: anything about sockets, frames, SQLite or trio. `tests/engine` and `tests/journal` are about those.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from engine import codec
from engine.audit import CONFIRMED, FULFILLED, HELD, Auditor
from engine.core import commands, events, ledger, outcomes
from engine.core.coordinator import Coordinator, Effects, Message, Request
from engine.core.ledger import Ledger, Rules
from engine.core.sharding import shard_of_counter
from engine.core.slots import resolve
from engine.ports import GENESIS_HASH, JournalRow

ZONE = "UTC"
POOL = "van"
STARTS_MS = resolve("2026-12-01T00:00-01:00", ZONE).starts_at_ms
NOON_MS = STARTS_MS - 12 * 3_600_000
TICK_MS = 50.0
PEER_DEADLINE_MS = 5_000
RULES = Rules(hold_ms_max=6_000, finished_keep_ms=86_400_000)
SEAL_MS_MAX = 0.5
RESTART_MS = (5.0, 900.0)
CLOCK_STEP_MS_MAX = 40


class Violation(AssertionError):  # noqa: N818 - named for what it is
    """A promise was broken. The text says which."""


class Chances(NamedTuple):
    """How bad this world is. All zero after it has healed."""

    lost: float
    repeated: float
    late: float
    late_ms_max: float
    crash_in_step: float
    """At each step of a commit."""
    slow_commit: float


HEALED = Chances(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class World:
    """Time, chance, nodes and wires."""

    def __init__(self, seed: int, shards: int, counters: int, base_max: int, chances: Chances) -> None:
        self.random = random.Random(seed)
        self.now_ms = 0.0
        self.chances = chances
        self.shards = shards
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.slots = slots(shards, counters)
        self.bases = {slot: self.random.randint(1, base_max) for slot in self.slots}
        self.planning_seq = 0
        self.nodes = [Node(self, shard) for shard in range(shards)]
        self.crashes = 0
        for node in self.nodes:
            node.start()

    # --- time ---------------------------------------------------------------------------------------------------------

    def after(self, delay_ms: float, do: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._heap, (self.now_ms + delay_ms, next(self._order), do))

    def run(self, until_ms: float) -> None:
        """Let time pass."""
        while self._heap and self._heap[0][0] <= until_ms:
            self.now_ms, _, do = heapq.heappop(self._heap)
            do()
        self.now_ms = until_ms

    def happens(self, chance: float) -> bool:
        """Throw the dice."""
        return chance > 0 and self.random.random() < chance

    # --- wires --------------------------------------------------------------------------------------------------------

    def carry(self, deliver: Callable[[], None]) -> None:
        """Between two shards: perhaps never, perhaps twice, perhaps late."""
        chances = self.chances
        times = 0 if self.happens(chances.lost) else 1 + self.happens(chances.repeated)
        for _ in range(times):
            delay_ms = self.random.uniform(0.05, 1.0)
            if self.happens(chances.late):
                delay_ms += self.random.uniform(0.0, chances.late_ms_max)
            self.after(delay_ms, deliver)

    # --- plans --------------------------------------------------------------------------------------------------------

    def plan(self, slot_id: str, base: int) -> None:
        """A new base for a counter; it reaches its shard at once, or when that is back."""
        self.bases[slot_id] = base
        self.nodes[shard_of_counter(POOL, slot_id, self.shards)].plan(slot_id)

    def next_planning_seq(self) -> int:
        """Plans have numbers that rise."""
        self.planning_seq += 1
        return self.planning_seq


def slots(shards: int, counters: int) -> list[str]:
    """Slot ids spread evenly over the shards."""
    found: list[list[str]] = [[] for _ in range(shards)]
    for minute in range(24 * 60):
        start, end = divmod(minute, 60), divmod((minute + 30) % 1440, 60)
        slot_id = f"2026-12-01T{start[0]:02}:{start[1]:02}-{end[0]:02}:{end[1]:02}"
        found[shard_of_counter(POOL, slot_id, shards)].append(slot_id)
    return [ids[place] for place in range(counters) for ids in found]


class Incoming(NamedTuple):
    """A command with the way back for its reply."""

    answer: Callable[[outcomes.Reply], None]
    deadline_ms: int
    command: Any


class _Sealed(NamedTuple):
    events: list[events.ShardEvent]
    at_ms: int
    replies: list[tuple[Callable[[outcomes.Reply], None], outcomes.Reply]]
    news: list[Message]


class Node:
    """One shard's worker, one after another."""

    def __init__(self, world: World, shard: int) -> None:
        self.world = world
        self.shard = shard
        self.rows: list[JournalRow] = []
        self.auditor = Auditor(world.shards)
        """Of what is durable. Nothing durable is ever lost, so it goes on across crashes."""
        self.is_up = False
        self.life = 0
        self.offset_ms = 0
        self.ledger = Ledger()
        self.coordinator = Coordinator(shard, world.shards)
        self.unanswered: dict[int, tuple[float, int, commands.Command]] = {}
        self._ids = itertools.count(1)
        self.on_start: list[Callable[[], None]] = []
        """Clients that wait for a successor."""
        self._reset()

    def _reset(self) -> None:
        self.events: list[events.ShardEvent] = []
        self.replies: list[tuple[Callable[[outcomes.Reply], None], outcomes.Reply]] = []
        self.news: list[Message] = []
        self.open_at_ms = 0
        self.committing: _Sealed | None = None
        self.seal_awaited = False
        self.inbox: list[Incoming] = []

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Replay what is durable, open a term, and serve once its first event is durable."""
        self.life += 1
        self._reset()
        self.ledger = self.recovered()
        self.ledger.news.clear()
        self.ledger.touched.clear()
        self.coordinator = Coordinator(self.shard, self.world.shards)
        self.unanswered.clear()
        self.offset_ms += self.world.random.randint(-CLOCK_STEP_MS_MAX, CLOCK_STEP_MS_MAX)
        self.open_at_ms = max(self.ledger.at_ms, self.clock_ms())
        self._apply(events.TermStarted(1, self.ledger.restart + 1))
        if not self.rows:
            self._first_plans()
        self.is_up = True
        if self._write(self._seal(), self.life):
            self._serve()

    def recovered(self) -> Ledger:
        """The state that the durable rows lead to."""
        state = Ledger()
        for row in self.rows:
            for event in codec.decode_shard(row):
                ledger.apply(state, event, row.at_ms)
        return state

    def _first_plans(self) -> None:
        plan = commands.PlanPool(self.world.next_planning_seq(), 1, POOL, ZONE, None)
        self._decide(plan)
        for slot_id in self.world.bases:
            if shard_of_counter(POOL, slot_id, self.world.shards) == self.shard:
                self._decide(self._plan_of(slot_id))

    def _plan_of(self, slot_id: str) -> commands.PlanCounters:
        instants = resolve(slot_id, ZONE)
        plan = commands.CounterPlan(
            1, slot_id, self.world.bases[slot_id], 0, 0, False, instants.starts_at_ms, instants.ends_at_ms,
            instants.ends_at_ms,
        )  # fmt: skip
        return commands.PlanCounters(self.world.next_planning_seq(), [plan])

    def plan(self, slot_id: str) -> None:
        """Take a plan, now or when up again."""
        if not self.is_up:
            self.on_start.append(lambda: self.plan(slot_id))
            return
        self._begin()
        self._decide(self._plan_of(slot_id))
        self._wake()

    def _serve(self) -> None:
        life = self.life
        self.world.after(TICK_MS, lambda: self._tick(life))
        for node in self.world.nodes if len(self.world.nodes) == self.world.shards else ():
            if node is not self and node.is_up:
                node.send_again(self.shard)
        waiting, self.on_start = self.on_start, []
        for do in waiting:
            self.world.after(self.world.random.uniform(0.0, 5.0), do)

    def crash(self) -> None:
        """Lose memory and what was not durable; of a row being written nobody knows."""
        if not self.is_up:
            return
        self.world.crashes += 1
        self.is_up = False
        self.life += 1
        if self.committing is not None and self.world.happens(0.5):
            self._make_durable(self.committing)
        self._reset()
        self.world.after(self.world.random.uniform(*RESTART_MS), self.start)

    def clock_ms(self) -> int:
        """Wall time of this host: near that of the others."""
        return NOON_MS + int(self.world.now_ms) + self.offset_ms

    def monotonic_ms(self) -> int:
        """Time for deadlines."""
        return int(self.world.now_ms)

    # --- deciding, as engine.worker does ------------------------------------------------------------------------------

    def receive(self, incoming: Incoming) -> None:
        """A command has arrived; what arrives within a moment shares a frame."""
        if not self.is_up:
            return
        self.inbox.append(incoming)
        if len(self.inbox) == 1:
            life = self.life
            self.world.after(self.world.random.choice((0.0, 0.0, 0.3, 2.0)), lambda: self._read(life))

    def _read(self, life: int) -> None:
        if life == self.life:
            frame, self.inbox = self.inbox, []
            self.take(frame)

    def take(self, frame: list[Incoming]) -> None:
        """A frame of commands."""
        self._begin()
        for answer, deadline_ms, command in frame:
            if deadline_ms < self.monotonic_ms():
                self.replies.append((answer, outcomes.Refused(self.ledger.seq, outcomes.Outcome.DEADLINE_PASSED)))
            else:
                self._handle(Request(command, deadline_ms, answer))
        self._wake()

    def _handle(self, request: Request) -> None:
        if self.coordinator.concerns(self.ledger, request.command):
            self._follow(self.coordinator.submit(self.ledger, request, self.open_at_ms, RULES, self.monotonic_ms()))
        elif isinstance(request.command, commands.Doubt):
            self._follow(self.coordinator.doubt(self.ledger, request.command))
            self.replies.append((request.waiter, outcomes.Planned(self.ledger.seq, self.ledger.planning_seq)))
        else:
            self.replies.append((request.waiter, self._decide(request.command)))

    def _begin(self) -> None:
        if not self.events:
            self.open_at_ms = max(self.ledger.at_ms, self.clock_ms())
        while (expired := ledger.expire(self.ledger, self.open_at_ms)) is not None:
            self._apply(expired)
            self._follow(self.coordinator.expired(self.ledger, expired))

    def _decide(self, command: commands.ShardCommand) -> outcomes.Reply:
        reply, made = ledger.decide(self.ledger, command, self.open_at_ms, RULES)
        for event in made:
            self._apply(event)
        return reply

    def _apply(self, event: events.ShardEvent) -> None:
        ledger.apply(self.ledger, event, self.open_at_ms)
        self.events.append(event)

    def _follow(self, effects: Effects) -> None:
        for event in effects.made:
            self._apply(event)
        for waiter, reply in effects.answers:
            self.replies.append((waiter, reply))
        self._send(effects.messages)
        for request in effects.again:
            self._handle(request)

    def _send(self, messages: tuple[Message, ...]) -> None:
        for message in messages:
            if message.after_commit:
                self.news.append(message)
            else:
                self.transmit(message.shard, message.command)

    def _replied(self, shard: int, asked: commands.Command, reply: outcomes.Reply) -> None:
        self._begin()
        if isinstance(asked, commands.Prepare):
            self._follow(self.coordinator.prepared(self.ledger, shard, asked, reply, self.open_at_ms, RULES))
        elif isinstance(asked, commands.Sync):
            self._follow(self.coordinator.synced(self.ledger, shard, asked, reply))
        self._wake()

    def _tick(self, life: int) -> None:
        if life != self.life:
            return
        self._begin()
        self._follow(self.coordinator.tick(self.ledger, self.monotonic_ms()))
        if self.events or self.replies or self.news:
            self._wake()
        self.world.after(TICK_MS, lambda: self._tick(life))

    # --- peers, as engine.peers does, and worse -----------------------------------------------------------------------

    def transmit(self, shard: int, command: commands.Command) -> None:
        """Send a command to another shard; once more whenever that one starts, until it is answered."""
        request_id = next(self._ids)
        self.unanswered[request_id] = (self.world.now_ms + PEER_DEADLINE_MS, shard, command)
        self._carry(request_id, shard, command)

    def send_again(self, to_shard: int) -> None:
        """A shard is back: what it has not answered goes out again."""
        for request_id, (deadline_ms, shard, command) in list(self.unanswered.items()):
            if deadline_ms < self.world.now_ms:
                del self.unanswered[request_id]
            elif shard == to_shard:
                self._carry(request_id, shard, command)

    def _carry(self, request_id: int, shard: int, command: Any) -> None:
        other = self.world.nodes[shard]
        deadline_ms = self.monotonic_ms() + PEER_DEADLINE_MS

        def answer(reply: outcomes.Reply) -> None:
            def arrive() -> None:
                if self.is_up:
                    self.unanswered.pop(request_id, None)
                    self._replied(shard, command, reply)

            self.world.carry(arrive)

        self.world.carry(lambda: other.receive(Incoming(answer, deadline_ms, command)))

    # --- committing ---------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self.committing is None and not self.seal_awaited:
            self.seal_awaited = True
            life = self.life
            self.world.after(self.world.random.uniform(0.0, SEAL_MS_MAX), lambda: self._round(life))

    def _round(self, life: int) -> None:
        if life == self.life:
            self.seal_awaited = False
            self._write(self._seal(), life)

    def _seal(self) -> _Sealed:
        for number in dict.fromkeys(self.ledger.news):
            self._send(self.coordinator.news(self.ledger, number, self.monotonic_ms()))
        self.ledger.news.clear()
        self.ledger.touched.clear()
        sealed = _Sealed(self.events, self.open_at_ms, self.replies, self.news)
        self.events, self.replies, self.news = [], [], []
        return sealed

    def _write(self, sealed: _Sealed, life: int) -> bool:
        """Append a row, which takes its time. Whether it was durable at once, as at the start of a term."""
        if not sealed.events:
            self._let_out(sealed, life)
            return True
        if isinstance(sealed.events[0], events.TermStarted):
            self._make_durable(sealed)
            return True
        if self.world.happens(self.world.chances.crash_in_step):
            self.crash()
            return False
        self.committing = sealed
        duration_ms = self.world.random.uniform(0.2, 2.0)
        if self.world.happens(self.world.chances.slow_commit):
            duration_ms = self.world.random.uniform(10.0, 400.0)
        self.world.after(duration_ms, lambda: self._committed(sealed, life))
        return True

    def _committed(self, sealed: _Sealed, life: int) -> None:
        if life != self.life:
            return
        self.committing = None
        self._make_durable(sealed)
        if self.world.happens(self.world.chances.crash_in_step):
            self.crash()
            return
        self._let_out(sealed, life)
        if life == self.life and (self.events or self.replies or self.news):
            self._wake()

    def _let_out(self, sealed: _Sealed, life: int) -> None:
        for answer, reply in sealed.replies:
            answer(reply)
        if self.world.happens(self.world.chances.crash_in_step):
            self.crash()
        if life == self.life:
            for message in sealed.news:
                self.transmit(message.shard, message.command)

    def _make_durable(self, sealed: _Sealed) -> None:
        seq = self.rows[-1].end.seq + 1 if self.rows else 1
        row = JournalRow(
            seq, len(sealed.events), 1, 0, sealed.at_ms, events.SCHEMA, GENESIS_HASH, GENESIS_HASH,
            codec.encode(sealed.events),
        )  # fmt: skip
        self.rows.append(row)
        decided: set[int] = set()
        for place, event in enumerate(codec.decode_shard(row)):
            self.auditor.take(seq + place, row.at_ms, event)
            if isinstance(event, events.Held | events.ConfirmedAtOnce):
                decided.add(self.auditor.newest())
            elif isinstance(event, events.Confirmed | events.Moved | events.Extended):
                decided.add(event.number)
        if self.auditor.findings:
            raise Violation(f"shard {self.shard}: {self.auditor.findings[0]}")
        for number in decided:
            self._check_taken(number)

    def _check_taken(self, number: int) -> None:
        """What is decided here must have been taken, durably, everywhere."""
        home = self.auditor.home(number)
        if home is None or home.status not in (HELD, CONFIRMED, FULFILLED):
            return
        for shard, (part_number, lines) in home.parts.items():
            part = self.world.nodes[shard].auditor.part(part_number)
            if lines and (
                part is None
                or part.status not in (HELD, CONFIRMED, FULFILLED)
                or any(part.lines.get(name, 0) < units for name, units in lines.items())
            ):
                raise Violation(
                    f"{number} was decided on shard {self.shard} with {lines} of shard {shard}, where {part}"
                )
