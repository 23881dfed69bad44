"""A shard without a process or a disk, for tests: the order of work of a worker around the real ledger, codec and auditor.

Every event is encoded into a row as a worker would, and goes through the auditor; after each one the auditor's totals must be
the ledger's counters. `fingerprint` is everything that can be asked of a ledger, for comparing two of them.
"""

import copy
from collections.abc import Iterable
from struct import Struct
from typing import Any

from engine import codec
from engine.audit import Auditor
from engine.core import commands, events, ledger, outcomes
from engine.core.columns import COUNTER_FIELDS, FIELDS, GONE, HELD
from engine.core.commands import Line
from engine.core.ledger import Ledger, Rules
from engine.core.outcomes import Outcome
from engine.core.slots import Cutoff, cutoff_at_ms, resolve
from engine.ports import GENESIS_HASH, JournalRow

ZONE = "Europe/Berlin"
NOON_MS = resolve("2026-11-30T12:00-13:00", ZONE).starts_at_ms
"""The day before the slots of most tests."""
KEY_HALVES = Struct("<qq")
SECOND_MS = 1_000
MINUTE_MS = 60_000
HOUR_MS = 3_600_000
DAY_MS = 86_400_000

EVENING = "2026-12-01T18:00-20:00"
NIGHT = "2026-12-01T20:00-22:00"
MORNING = "2026-12-01T10:00-14:00"

RULES = Rules(hold_ms_max=HOUR_MS, finished_keep_ms=DAY_MS)


def key(name: str) -> bytes:
    """A 16-byte key that is easy to read in a failure."""
    return name.encode().ljust(16, b".")


def van(quantity: int, slot_id: str = EVENING) -> Line:
    """A line of the van pool."""
    return Line("van-north", slot_id, quantity)


def pick(quantity: int) -> Line:
    """A line of the warehouse pool."""
    return Line("pick-dc1", MORNING, quantity)


def new_row(seq: int, at_ms: int, made: list[events.ShardEvent]) -> JournalRow:
    """A journal row; the chain is not under test here."""
    return JournalRow(seq, len(made), 1, 0, at_ms, events.SCHEMA, GENESIS_HASH, GENESIS_HASH, codec.encode(made))


class Shard:
    """A ledger with the order of work of its worker: expire, decide, apply, and a row for each batch."""

    watched = True
    """Hold the auditor against the ledger after each event; without it, for long stories, the test does so now and then."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.ledger = Ledger()
        self.rules = rules
        self.now_ms = NOON_MS
        self.rows: list[JournalRow] = []
        self.auditor = Auditor()
        self.planning_seq = 0
        self.actions = 0
        self._batch: list[events.ShardEvent] = []

    def apply(self, event: events.ShardEvent) -> None:
        """Take an event in and, while watched, hold what it changed against the auditor and the touched rows."""
        before = counter_rows(self.ledger) if self.watched else []
        self.ledger.touched.clear()
        ledger.apply(self.ledger, event, self.now_ms)
        self._batch.append(event)
        self.auditor.take(self.ledger.seq, self.now_ms, event)
        if self.watched:
            self.compare()
            changed = {
                row
                for row, values in enumerate(counter_rows(self.ledger))
                if row >= len(before) or values != before[row]
            }
            assert changed <= self.ledger.touched, "what is not touched is not published"
            assert all(self.ledger.counters.changed_seq[row] == self.ledger.seq for row in changed)

    def compare(self) -> None:
        """The auditor must have found nothing and come to the same units and records."""
        assert not self.auditor.findings
        assert audited(self.auditor) == counted(self.ledger)
        assert self.auditor.statistics().reservations == self.ledger.reservations.count

    def decide(self, command: commands.ShardCommand) -> outcomes.Reply:
        """Decide one command into the open batch."""
        while (expired := ledger.expire(self.ledger, self.now_ms)) is not None:
            self.apply(expired)
        reply, made = ledger.decide(self.ledger, command, self.now_ms, self.rules)
        for event in made:
            self.apply(event)
        return reply

    def forget(self, from_number: int) -> int:
        """One step of forgetting into the open batch; returns where to go on."""
        event, next_number = ledger.forget(self.ledger, from_number, self.now_ms, self.rules)
        if event is not None:
            self.apply(event)
        return next_number

    def forget_all(self) -> None:
        """Forget whatever may be forgotten now."""
        number = self.forget(0)
        while number:
            number = self.forget(number)
        self.seal()

    def seal(self) -> None:
        """Close the open batch: its events become one row."""
        if self._batch:
            self.rows.append(new_row(self.ledger.seq - len(self._batch) + 1, self.now_ms, self._batch))
            self._batch = []

    def ask(self, command: commands.ShardCommand, *, after_ms: int = 0) -> outcomes.Reply:
        """One command in a batch of its own, `after_ms` after the one before."""
        self.now_ms += after_ms
        reply = self.decide(command)
        self.seal()
        return reply

    # --- in the words of the domain -----------------------------------------------------------------------------------

    def action(self) -> int:
        """A new name for a request."""
        self.actions += 1
        return self.actions

    def hold(
        self, *lines: Line, name: str | None = None, ttl_ms: int = 10 * MINUTE_MS, digest: int = 1
    ) -> outcomes.Reply:
        """Ask for a hold; without a name, under a new key."""
        name = f"key-{self.action()}" if name is None else name
        return self.ask(commands.Hold(list(lines), ttl_ms, key(name), digest, f"SO-{name}", "web"))

    def held(self, *lines: Line, ttl_ms: int = 10 * MINUTE_MS) -> int:
        """The number of a new hold, which must be granted."""
        reply = self.hold(*lines, ttl_ms=ttl_ms)
        assert isinstance(reply, outcomes.Taken), reply
        return reply.number

    def confirmed(self, *lines: Line) -> int:
        """The number of a reservation confirmed at once, which must be granted."""
        return self.held(*lines, ttl_ms=commands.NO_TTL)

    def confirm(self, number: int, *lines: Line, action: int | None = None) -> outcomes.Reply:
        """Confirm, with lines partially."""
        return self.ask(commands.Confirm(number, action or self.action(), list(lines) or None))

    def release(self, number: int, *, action: int | None = None) -> outcomes.Reply:
        """Release."""
        return self.ask(commands.Release(number, action or self.action(), "changed their mind"))

    def extend(self, number: int, ttl_ms: int, *, action: int | None = None) -> outcomes.Reply:
        """Extend."""
        return self.ask(commands.Extend(number, action or self.action(), ttl_ms))

    def move(self, number: int, *lines: Line, action: int | None = None) -> outcomes.Reply:
        """Move."""
        return self.ask(commands.Move(number, action or self.action(), list(lines)))

    def fulfil(self, number: int, *, action: int | None = None) -> outcomes.Reply:
        """Fulfil."""
        return self.ask(commands.Fulfil(number, action or self.action()))

    def look(self, number: int) -> outcomes.Reply:
        """Look."""
        return self.ask(commands.Look(number))

    def status(self, number: int) -> int:
        """The status of a reservation that must be there."""
        reply = self.look(number)
        assert isinstance(reply, outcomes.Record), reply
        return reply.status

    def plan_pool(self, pool_code: int, pool_id: str, cutoff: Cutoff | None) -> outcomes.Reply:
        """Define a pool."""
        self.planning_seq += 1
        return self.ask(commands.PlanPool(self.planning_seq, pool_code, pool_id, ZONE, cutoff))

    def plan(
        self,
        pool_id: str,
        slot_id: str,
        base: int,
        *,
        overbook: int = 0,
        buffer: int = 0,
        closed: bool = False,
    ) -> outcomes.Reply:
        """Define a counter as the planner would: its cut-off by the rule of its pool."""
        self.planning_seq += 1
        pool = self.ledger.pools[pool_id]
        starts_at_ms, ends_at_ms = resolve(slot_id, ZONE)
        cutoff_ms = cutoff_at_ms(slot_id, ZONE, pool.cutoff)
        plan = commands.CounterPlan(
            pool.code,
            slot_id,
            base,
            overbook,
            buffer,
            closed,
            starts_at_ms,
            ends_at_ms,
            ends_at_ms if cutoff_ms is None else cutoff_ms,
        )
        return self.ask(commands.PlanCounters(self.planning_seq, [plan]))

    def row(self, pool_id: str, slot_id: str) -> int:
        """The row of a counter that must be there."""
        row = self.ledger.counters.find(pool_id, slot_id)
        assert row is not None
        return row

    def units(self, slot_id: str = EVENING, pool_id: str = "van-north") -> tuple[int, int, int, int]:
        """held, confirmed, fulfilled, refused of a counter."""
        row = self.row(pool_id, slot_id)
        counters = self.ledger.counters
        return counters.held[row], counters.confirmed[row], counters.fulfilled[row], counters.refused[row]


def planned_shard(rules: Rules = RULES) -> Shard:
    """Three counters: 3 and 5 van stops with a cut-off 90 minutes before, 20 pick lines with none."""
    shard = Shard(rules)
    shard.apply(events.TermStarted(1, 1))
    shard.plan_pool(1, "van-north", Cutoff(minutes_before=90))
    shard.plan_pool(2, "pick-dc1", None)
    shard.plan("van-north", EVENING, 3)
    shard.plan("van-north", NIGHT, 5)
    shard.plan("pick-dc1", MORNING, 20)
    return shard


def outcome_of(reply: outcomes.Reply) -> Outcome:
    """The rule that decided, whatever the form of the reply."""
    if isinstance(reply, outcomes.Taken):
        return Outcome.HELD if reply.expires_at_ms else Outcome.CONFIRMED
    assert isinstance(reply, outcomes.Record | outcomes.Refused), reply
    return reply.outcome


def counted(state: Ledger) -> list[tuple[int, ...]]:
    """The units of every counter as the ledger has them."""
    counters = state.counters
    return list(
        zip(
            counters.base,
            counters.limit,
            counters.held,
            counters.confirmed,
            counters.fulfilled,
            counters.refused,
            strict=True,
        )
    )


def counter_rows(state: Ledger) -> list[tuple[int, ...]]:
    """Everything there is of every counter."""
    return list(zip(*(getattr(state.counters, field) for field in COUNTER_FIELDS), strict=True))


def audited(auditor: Auditor) -> list[tuple[int, ...]]:
    """The units of every counter as the auditor has them."""
    return [
        (total.base, total.limit, total.held, total.confirmed, total.fulfilled, total.refused)
        for total in auditor.totals()
    ]


def replayed(rows: Iterable[JournalRow], state: Ledger | None = None) -> Ledger:
    """The state that a journal's rows lead to."""
    state = Ledger() if state is None else state
    for row in rows:
        for event in codec.decode_shard(row):
            ledger.apply(state, event, row.at_ms)
    return state


def records(state: Ledger) -> list[tuple[Any, ...]]:
    """Every record with all it has, by number."""
    found = []
    for chunk in state.reservations.chunks():
        for row in range(chunk.size):
            if chunk.status[row] != GONE:
                values = [getattr(chunk, field)[row] for field in FIELDS if field not in _LAYOUT_FIELDS]
                found.append((*values, state.reservations.lines(chunk, row), chunk.label(row)))
    return found


_LAYOUT_FIELDS = frozenset({"counter", "quantity", "counter_2", "quantity_2", "label_end"})
"""How lines and labels lie in memory, not what they are."""


def expiries(state: Ledger) -> list[tuple[int, int]]:
    """What would expire when, in order, if nothing else happened. The ledger stays as it is."""
    queue = copy.deepcopy(state.expiry)
    found = []
    times, numbers = queue.due(2**62, 2**62)
    for expires_at_ms, number in zip(times.tolist(), numbers.tolist(), strict=True):
        record = state.reservations.find(number)
        if record is not None:
            chunk, row = record
            if chunk.status[row] == HELD and chunk.expires_at_ms[row] == expires_at_ms:
                found.append((expires_at_ms, number))
    return found


def fingerprint(state: Ledger, keys: Iterable[bytes] = ()) -> dict[str, Any]:
    """Everything that can be asked of a ledger, which must agree with itself: the key of every record finds that record, and
    no other of `keys` finds one.
    """
    rows = records(state)
    keys_of_records = {
        KEY_HALVES.pack(chunk.key_high[row], chunk.key_low[row])
        for chunk in state.reservations.chunks()
        for row in range(chunk.size)
        if chunk.status[row] != GONE
    }
    numbers_of_keys: dict[bytes, int | None] = {}
    for each in sorted({*keys, *keys_of_records}):
        known = ledger.find_key(state, each)
        assert (known is not None) == (each in keys_of_records)
        if known is not None:
            chunk, row = known
            assert KEY_HALVES.pack(chunk.key_high[row], chunk.key_low[row]) == each
            numbers_of_keys[each] = chunk.number[row]
    assert sum(state.keys._alive) == len(keys_of_records) == state.reservations.count
    return {
        "seq": state.seq,
        "at_ms": state.at_ms,
        "term": (state.epoch, state.restart),
        "planning_seq": state.planning_seq,
        "pools": dict(state.pools),
        "pool_of_code": dict(state.pool_of_code),
        "refused_keys": list(state.refused_keys),
        "counters": {field: getattr(state.counters, field).tolist() for field in COUNTER_FIELDS},
        "counter_names": list(zip(state.counters.pool_id, state.counters.slot_id, strict=True)),
        "counter_rows": [
            state.counters.find(*name) for name in zip(state.counters.pool_id, state.counters.slot_id, strict=True)
        ],
        "records": rows,
        "record_count": state.reservations.count,
        "long_lines": sorted(state.reservations.long_lines),
        "keys": numbers_of_keys,
        "expiries": expiries(state),
    }
