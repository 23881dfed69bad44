"""The life of reservations on one shard: what may happen, what it does, and nothing else.

Theory of operation
- `decide(ledger, command, now_ms, rules)` answers a command with a reply and the events that make the reply true. It changes
  nothing. `apply(ledger, event, at_ms)` changes state and decides nothing. Live work, replay, standbys and simulation all go
  through the same `apply`.
- The caller applies the events of a decision before it asks for the next one, so decisions of one batch see each other, and
  makes the batch durable before it lets any reply out.
- The table TRANSITIONS is the whole life cycle. An illegal step is an outcome for a caller (`decide`) and a broken
  invariant for a journal (`apply`).
- Time is an argument. A hold's units count as free from `expires_at_ms` on: whoever decides frees what is due first (`expire`),
  or at least the hold that a step is about (`expire_one`), and lets nobody be refused for units that are due; replay never
  looks at a clock.
- Taking units never makes `used` pass `limit`, and `apply` checks it on every event, replayed ones too. `used > limit` comes
  about in one way only: a plan lowers the limit below what is booked.

                 hold                      confirm (at once)
                  |                               |
                  v     confirm                   v         fulfil
               [held] ---------------------> [confirmed] ------------> [fulfilled]
           extend ^ | move          late ^      | move
                  +-+                    |      |
                  | expire               |      | release
                  +--------> [expired] --+      |
                  | release                     v
                  +-----------------------> [released]

Not promised: durability, uniqueness of an idempotency key beyond the life of its record, anything across shards.
"""

import datetime as dt
from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.core import commands, events, outcomes
from engine.core.columns import (
    CONFIRMED,
    EXPIRED,
    FULFILLED,
    GONE,
    HELD,
    MORE_LINES,
    NO_COUNTER,
    RELEASED,
    Chunk,
    CounterTable,
    ExpiryQueue,
    KeyIndex,
    Lines,
    ReservationTable,
)
from engine.core.invariant import broken, invariant
from engine.core.limits import (
    COUNTERS_OF_SHARD_MAX,
    EXPIRED_IN_EVENT_MAX,
    FORGOTTEN_IN_EVENT_MAX,
    REFUSED_KEYS_MAX,
    SEQ_MAX,
)
from engine.core.outcomes import CounterShort, Outcome
from engine.core.sharding import counter_hash, reservation_number
from engine.core.slots import Cutoff, cutoff_at_ms, resolve

ONE_BY_ONE_MAX = 64
"""Below so many, single steps are faster than arrays."""

DAY_MS = 86_400_000
DAYS_MAX = 2_900_000
"""Days after 1970-01-01 that are surely a date with a year of four digits."""
PART_ENDS_DAYS_MAX = 2
"""A slot of local date D ends on D + 1, and no zone is more than 12 hours behind UTC: over by the noon of D + 2."""

_ORDINAL_OF_1970 = 719_163
_KEY_HALVES = Struct("<qq")

_REFUSALS: dict[int, Outcome] = {
    CONFIRMED: Outcome.ALREADY_CONFIRMED,
    FULFILLED: Outcome.ALREADY_FULFILLED,
    RELEASED: Outcome.ALREADY_RELEASED,
    EXPIRED: Outcome.HOLD_EXPIRED,
}

TRANSITIONS: dict[tuple[int, str], int | Outcome] = {
    # from, verb            to, or why not
    (HELD, "confirm"): CONFIRMED,
    (HELD, "release"): RELEASED,
    (HELD, "extend"): HELD,
    (HELD, "move"): HELD,
    (HELD, "fulfil"): Outcome.HOLD_NOT_CONFIRMED,
    (HELD, "expire"): EXPIRED,
    (CONFIRMED, "confirm"): Outcome.ALREADY_CONFIRMED,
    (CONFIRMED, "release"): RELEASED,
    (CONFIRMED, "extend"): Outcome.ALREADY_CONFIRMED,
    (CONFIRMED, "move"): CONFIRMED,
    (CONFIRMED, "fulfil"): FULFILLED,
    (CONFIRMED, "expire"): Outcome.ALREADY_CONFIRMED,
    (EXPIRED, "confirm"): CONFIRMED,  # late, only while the units are still free
    **{
        (status, verb): _REFUSALS[status]
        for status, verbs in (
            (FULFILLED, ("confirm", "release", "extend", "move", "fulfil", "expire")),
            (RELEASED, ("confirm", "release", "extend", "move", "fulfil", "expire")),
            (EXPIRED, ("release", "extend", "move", "fulfil", "expire")),
        )
        for verb in verbs
    },
}


class Rules(NamedTuple):
    """Bounds an operator sets. They steer decisions only: what was decided stays, whatever they become."""

    hold_ms_max: int = 172_800_000
    finished_keep_ms: int = 86_400_000


class Pool(NamedTuple):
    """What a shard knows of a pool."""

    code: int
    time_zone: str
    cutoff: Cutoff | None


class Part(NamedTuple):
    """At the home of a reservation: what it takes on another shard, and the part's number there."""

    shard: int
    number: int
    lines: tuple[tuple[str, str, int], ...]
    """(pool_id, slot_id, units). Empty: to be given up, remembered until that shard knows."""


class Link(NamedTuple):
    """At another shard: whose part a record is."""

    home_shard: int
    tx: int
    """The attempt it was prepared for last."""
    number: int
    """The reservation's number; 0 until its home has said that it exists."""
    version: int
    """The reservation's version that this part has taken over."""
    is_pinned: bool
    """Prepared and not heard of since: it does not expire, and its home is asked."""
    asked_version: int = 0
    """The reservation's version that the attempt started from: news up to it does not say what became of the attempt."""


class Ledger:
    """The state of one shard. Changed by `apply` only (and `expire`, which takes due entries out of its queue)."""

    def __init__(self) -> None:
        self.seq = 0
        self.at_ms = 0
        self.epoch = 0
        self.restart = 0
        self.planning_seq = 0
        self.counters = CounterTable()
        self.reservations = ReservationTable()
        self.keys = KeyIndex()
        self.expiry = ExpiryQueue()
        self.pools: dict[str, Pool] = {}
        self.pool_of_code: dict[int, str] = {}
        self.refused_keys: dict[str, None] = {}
        self.parts: dict[int, tuple[Part, ...]] = {}
        """Of reservations at home here: what they take elsewhere."""
        self.owed: dict[int, None] = {}
        """Of those, the ones whose last change other shards have not all taken over."""
        self.news: list[int] = []
        """Numbers that came to be owed since the owner last told the other shards and cleared this. Not journaled."""
        self.links: dict[int, Link] = {}
        """Of parts here: whose they are."""
        self.pinned: dict[int, None] = {}
        """Of those, the ones whose home has not said what became of them."""
        self.attempted_units: dict[int, int] = {}
        """Units by counter row that attempts under way want here. Not journaled: what is never decided leaves nothing."""
        self.touched: set[int] = set()
        """Counter rows changed since the owner last published and cleared this."""


Decision = tuple[outcomes.Reply, tuple[events.ShardEvent, ...]]


def decide(ledger: Ledger, command: commands.ShardCommand, now_ms: int, rules: Rules) -> Decision:
    """Answer one command. Never raises for anything a caller can ask; changes nothing."""
    return _DECIDE[type(command)](ledger, command, now_ms, rules)


def apply(ledger: Ledger, event: events.ShardEvent, at_ms: int) -> None:
    """Take the next event into the state. Raises InvariantError where it cannot follow what went before."""
    ledger.seq += 1
    invariant(ledger.seq <= SEQ_MAX, "the shard has used up its event numbers")
    invariant(at_ms >= ledger.at_ms, "time of events must not go back")
    ledger.at_ms = at_ms
    _APPLY[type(event)](ledger, event)


def expire(ledger: Ledger, now_ms: int) -> events.Expired | None:
    """The next holds whose time has passed, as one event, or None when nothing is due.

    The caller applies the event at once: what is returned has left the queue. Call again until None, or see `expire_one`.
    """
    while True:
        times, numbers = ledger.expiry.due(now_ms, EXPIRED_IN_EVENT_MAX)
        if not len(times):
            return None
        if len(times) < ONE_BY_ONE_MAX:
            due = [
                (number, expires_at_ms)
                for number, expires_at_ms in dict.fromkeys(zip(numbers.tolist(), times.tolist(), strict=True))
                if _is_due(ledger, number, expires_at_ms)
            ]
            if due:
                return events.Expired([number for number, _ in due], [expires_at_ms for _, expires_at_ms in due])
            continue
        keep = np.zeros(len(times), np.bool_)
        for chunk, places, rows in ledger.reservations.locate(numbers):
            keep[places] = (chunk.view("status")[rows] == HELD) & (chunk.view("expires_at_ms")[rows] == times[places])
        for place in np.flatnonzero(keep).tolist() if ledger.pinned else ():
            keep[place] = int(numbers[place]) not in ledger.pinned
        # A number may be due several times: earlier times are those before an extension, equal ones are the same entry twice.
        places = np.flatnonzero(keep)
        _, first = np.unique(numbers[places], return_index=True)
        once = places[np.sort(first)]
        if len(once):
            return events.Expired(numbers[once].tolist(), times[once].tolist())


def _is_due(ledger: Ledger, number: int, expires_at_ms: int) -> bool:
    found = ledger.reservations.find(number)
    if found is None or number in ledger.pinned:
        return False
    chunk, row = found
    return chunk.status[row] == HELD and chunk.expires_at_ms[row] == expires_at_ms


def expire_one(ledger: Ledger, number: int, now_ms: int) -> events.Expired | None:
    """One hold out of its turn, if its time has passed: so that a step on it need not wait for a million others."""
    found = ledger.reservations.find(number)
    if found is None:
        return None
    expires_at_ms = found[0].expires_at_ms[found[1]]
    if expires_at_ms > now_ms or not _is_due(ledger, number, expires_at_ms):
        return None
    return events.Expired([number], [expires_at_ms])


def forget(ledger: Ledger, from_number: int, now_ms: int, rules: Rules) -> tuple[events.Forgotten | None, int]:
    """Look through the next records for those that have been kept long enough.

    Finished ones are kept from their last change on, confirmed ones from the end of the last of their slots on, parts
    elsewhere included. Returns the event, or None where there is nothing to forget, and the number to go on from (0: all
    looked through).
    """
    found = ledger.reservations.chunk_of(from_number)
    if found is None:
        return None, 0
    chunk, row = found
    first = chunk.number[row]
    last = chunk.number[min(chunk.size, row + FORGOTTEN_IN_EVENT_MAX) - 1]
    event = events.Forgotten(first, last, now_ms - rules.finished_keep_ms)
    return (event if _forgettable(ledger, event) else None), last + 1


# --- deciding ---------------------------------------------------------------------------------------------------------


def decide_hold(
    ledger: Ledger, command: commands.Hold, now_ms: int, rules: Rules, parts: tuple[Part, ...] = ()
) -> Decision:
    """A new reservation of the command's lines, which are this shard's, and of `parts` that other shards have prepared."""
    known = find_key(ledger, command.key)
    if known is not None:
        chunk, row = known
        if chunk.digest[row] != command.digest:
            return _no(
                ledger,
                Outcome.IDEMPOTENCY_KEY_REUSED,
                "this Idempotency-Key came before with another body: send a new key for a new request",
            )
        return record(ledger, chunk, row, Outcome.REPEATED), ()
    taking = _counter_rows(ledger, command.lines)
    if isinstance(taking, outcomes.Refused):
        return taking, ()
    short = _in_the_way(ledger, taking, {}, now_ms)
    key = command.key.hex()
    if short:
        return _refuse(ledger, short, key, command.order_ref)
    lines = list(taking.items())
    seq = ledger.seq + 1
    number = reservation_number(seq, ledger.counters.hashed[lines[0][0]])
    if command.ttl_ms == commands.NO_TTL:
        at_once = events.ConfirmedAtOnce(
            lines, command.order_ref, command.channel, key, command.digest, _part_units(parts)
        )
        return outcomes.Taken(seq, number, now_ms, 0), (at_once,)
    expires_at_ms = now_ms + min(command.ttl_ms, rules.hold_ms_max)
    held = events.Held(
        lines, expires_at_ms, command.order_ref, command.channel, key, command.digest, _part_units(parts)
    )
    return outcomes.Taken(seq, number, now_ms, expires_at_ms), (held,)


def _part_units(parts: tuple[Part, ...]) -> list[events.PartUnits]:
    return [(part.shard, part.number, list(part.lines)) for part in parts]


def decide_confirm(
    ledger: Ledger, command: commands.Confirm, now_ms: int, rules: Rules, parts: tuple[Part, ...] | None = None
) -> Decision:
    """Confirm what lies here, and `parts` of what lies elsewhere (None: all of it)."""
    del rules
    step = _step(ledger, command, "confirm", Outcome.CONFIRMED)
    if not isinstance(step, tuple):
        return step, ()
    chunk, row = step
    had = dict(ledger.reservations.lines(chunk, row))
    kept: dict[int, int] | None = None
    if command.lines is not None:
        wanted = _counter_rows(ledger, command.lines)
        if isinstance(wanted, outcomes.Refused):
            return wanted, ()
        if any(units > had.get(counter, 0) for counter, units in wanted.items()):
            return _no(
                ledger,
                Outcome.LINES_NOT_HELD,
                "a partial confirm can keep what is held or less: see the lines of the reservation, or use move",
            )
        kept = None if wanted == had else wanted
    late = chunk.status[row] == EXPIRED
    keeping = had if kept is None else kept
    short = _in_the_way(ledger, keeping, {} if late else keeping, now_ms)
    if short:
        if late and short[0].reason is Outcome.INSUFFICIENT_CAPACITY:
            return (
                outcomes.Refused(ledger.seq, Outcome.HOLD_EXPIRED, short, "the hold expired and its units are taken"),
                (),
            )
        return outcomes.Refused(ledger.seq, short[0].reason, short), ()
    event = events.Confirmed(
        command.number,
        command.action,
        None if kept is None else list(kept.items()),
        late,
        None if parts is None else _part_units(parts),
    )
    lines = tuple(keeping.items())
    reply = _changed(ledger, chunk, row, Outcome.CONFIRMED, now_ms, CONFIRMED, lines, late=late, parts=parts)
    return reply, (event,)


def _decide_release(ledger: Ledger, command: commands.Release, now_ms: int, rules: Rules) -> Decision:
    del rules
    step = _step(ledger, command, "release", Outcome.RELEASED)
    if not isinstance(step, tuple):
        return step, ()
    chunk, row = step
    event = events.Released(command.number, command.action, command.reason)
    return _changed(ledger, chunk, row, Outcome.RELEASED, now_ms, RELEASED), (event,)


def decide_extend(ledger: Ledger, command: commands.Extend, now_ms: int, rules: Rules) -> Decision:
    """Let a hold live longer."""
    step = _step(ledger, command, "extend", Outcome.EXTENDED)
    if not isinstance(step, tuple):
        return step, ()
    chunk, row = step
    had_until_ms = chunk.expires_at_ms[row]
    cap_ms = chunk.created_at_ms[row] + rules.hold_ms_max
    until_ms = max(had_until_ms, min(now_ms + command.ttl_ms, cap_ms))
    if until_ms == had_until_ms and now_ms + command.ttl_ms > had_until_ms:
        return _no(
            ledger,
            Outcome.EXTENSION_CAP_REACHED,
            "a hold can live no longer than the cap set by the operator: confirm it or let it go",
        )
    event = events.Extended(command.number, command.action, until_ms)
    reply = _changed(ledger, chunk, row, Outcome.EXTENDED, now_ms, HELD, expires_at_ms=until_ms)
    return reply, (event,)


def decide_move(
    ledger: Ledger, command: commands.Move, now_ms: int, rules: Rules, parts: tuple[Part, ...] | None = None
) -> Decision:
    """Exchange what is taken here for the command's lines, and what is taken elsewhere for `parts` (None: as it is)."""
    del rules
    step = _step(ledger, command, "move", Outcome.MOVED)
    if not isinstance(step, tuple):
        return step, ()
    chunk, row = step
    wanted = _counter_rows(ledger, command.lines)
    if isinstance(wanted, outcomes.Refused):
        return wanted, ()
    had = dict(ledger.reservations.lines(chunk, row))
    rising = {counter: units for counter, units in wanted.items() if units > had.get(counter, 0)}
    short = _in_the_way(ledger, rising, had, now_ms)
    if short:
        return _refuse(ledger, short, f"{command.action & (2**64 - 1):016x}", chunk.label(row)[0])
    event = events.Moved(
        command.number, command.action, list(wanted.items()), None if parts is None else _part_units(parts)
    )
    lines = tuple(wanted.items())
    reply = _changed(ledger, chunk, row, Outcome.MOVED, now_ms, chunk.status[row], lines, parts=parts)
    return reply, (event,)


def _decide_fulfil(ledger: Ledger, command: commands.Fulfil, now_ms: int, rules: Rules) -> Decision:
    del rules
    step = _step(ledger, command, "fulfil", Outcome.FULFILLED)
    if not isinstance(step, tuple):
        return step, ()
    chunk, row = step
    event = events.Fulfilled(command.number, command.action)
    return _changed(ledger, chunk, row, Outcome.FULFILLED, now_ms, FULFILLED), (event,)


def _decide_look(ledger: Ledger, command: commands.Look, now_ms: int, rules: Rules) -> Decision:
    del now_ms, rules
    found = ledger.reservations.find(command.number)
    if found is None or command.number in ledger.links:
        return _unknown_reservation(ledger), ()
    return record(ledger, *found, Outcome.FOUND), ()


def _decide_prepare(ledger: Ledger, command: commands.Prepare, now_ms: int, rules: Rules) -> Decision:
    """Take what another shard's reservation wants here, if it fits, until its home says what became of it."""
    del rules
    wanted = _counter_rows(ledger, command.lines)
    if isinstance(wanted, outcomes.Refused):
        return wanted, ()
    key = _part_key(command.key)
    part_number = command.part_number or _unborn_part(ledger, key, command)
    had: dict[int, int] = {}
    is_held = False
    if part_number:
        found, link = ledger.reservations.find(part_number), ledger.links.get(part_number)
        if found is None or link is None:
            return _unknown_reservation(ledger), ()
        if link.is_pinned and link.tx == command.tx:
            return outcomes.Prepared(ledger.seq, command.tx, part_number), ()
        chunk, row = found
        if (
            link.tx == command.tx
            or _is_older(command.tx, link.tx)
            or command.version < link.version
            or chunk.status[row] == FULFILLED
        ):
            return _no(ledger, Outcome.DEADLINE_PASSED, "a late message: the attempt that sent it is over")
        is_held = chunk.status[row] in (HELD, CONFIRMED)
        if is_held:
            had = dict(ledger.reservations.lines(chunk, row))
    target = had | {row: max(units, had.get(row, 0)) for row, units in wanted.items()}
    rising = {row: units for row, units in target.items() if units > had.get(row, 0)}
    short = _in_the_way(ledger, wanted if command.is_confirm else rising, had, now_ms)
    if short:
        if is_held and command.is_confirm:
            return outcomes.Refused(ledger.seq, short[0].reason, short), ()
        return _refuse(ledger, short, command.key.hex(), command.order_ref)
    lines = list(target.items())
    event = events.PartPrepared(
        command.tx, command.home_shard, part_number, command.number, command.version, lines, key.hex()
    )
    number = part_number or reservation_number(ledger.seq + 1, ledger.counters.hashed[lines[0][0]])
    return outcomes.Prepared(ledger.seq + 1, command.tx, number), (event,)


def _part_key(key: bytes) -> bytes:
    """Parts are filed beside reservations under the client's key with another first byte half: never mistaken for one."""
    return bytes(byte ^ 0x5A for byte in key[:8]) + key[8:]


def _is_older(tx: int, than: int) -> bool:
    """Whether a home began the one attempt before the other. Numbers of attempts rise, and begin again after 2**63."""
    return 0 < (than - tx) % 2**63 < 2**62


def _unborn_part(ledger: Ledger, key: bytes, command: commands.Prepare) -> int:
    """A part that an earlier attempt of the same request prepared and whose home lost it: it is taken over. 0: none."""
    key_high, key_low = _KEY_HALVES.unpack(key)
    for number in ledger.keys.candidates(key_high, key_low):
        link, found = ledger.links.get(number), ledger.reservations.find(number)
        if link is None or found is None or found[0].key_low[found[1]] != key_low:
            continue
        if (
            link.home_shard == command.home_shard
            and link.number == command.number
            and link.version == 0
            and link.is_pinned
        ):
            return number
    return 0


def _decide_sync(ledger: Ledger, command: commands.Sync, now_ms: int, rules: Rules) -> Decision:
    """Take over what the home of a reservation says of the part here. Older news than what is known changes nothing.

    While the part is pinned, the answer about that very attempt ends it, as does a version beyond the one it started from. A
    home that no longer knows the reservation (version 0) gives the part up, whatever version it has.
    """
    del rules
    link = ledger.links.get(command.part_number)
    if link is None:
        return outcomes.Synced(ledger.seq, command.part_number, command.version), ()
    if link.is_pinned and command.tx == link.tx:
        is_taken_over = command.version >= link.version or command.version == 0
    else:
        is_taken_over = command.version > (max(link.version, link.asked_version) if link.is_pinned else link.version)
    if not is_taken_over:
        return outcomes.Synced(ledger.seq, command.part_number, link.version), ()
    lines = _counter_rows(ledger, command.lines)
    if isinstance(lines, outcomes.Refused):
        broken("a part names counters that this shard has")
    version = max(command.version, link.version)
    is_late = command.status == HELD and command.expires_at_ms <= now_ms  # its time came while the news travelled
    event = events.PartSynced(
        command.part_number,
        command.number or link.number,
        version,
        EXPIRED if is_late else command.status,
        command.expires_at_ms,
        list(lines.items()),
    )
    return outcomes.Synced(ledger.seq + 1, command.part_number, version), (event,)


def counter_values(
    counters: CounterTable, row: int
) -> tuple[int, int, int, int, int, int, int, int, int, int, int, int]:
    """What is shown of a counter, in the order of the read model's VALUE_FIELDS. Its `flags` have one bit: closed."""
    return (
        counters.limit[row],
        counters.base[row],
        counters.overbook[row],
        counters.buffer[row],
        counters.held[row],
        counters.confirmed[row],
        counters.fulfilled[row],
        counters.refused[row],
        counters.closed[row],
        counters.cutoff_at_ms[row],
        counters.changed_seq[row],
        counters.plan_version[row],
    )


def _decide_look_counters(ledger: Ledger, command: commands.LookCounters, now_ms: int, rules: Rules) -> Decision:
    del now_ms, rules
    known = len(ledger.counters)
    if not all(0 <= row < known for row in command.rows):
        return _no(ledger, Outcome.UNKNOWN_SLOT, f"this shard has {known} counters")
    return outcomes.CounterValues(ledger.seq, [counter_values(ledger.counters, row) for row in command.rows]), ()


def _decide_plan_pool(ledger: Ledger, command: commands.PlanPool, now_ms: int, rules: Rules) -> Decision:
    del now_ms, rules
    if command.planning_seq <= ledger.planning_seq:
        return outcomes.Planned(ledger.seq, ledger.planning_seq), ()
    cutoff = None if command.cutoff is None else Cutoff(*command.cutoff)
    cutoffs = [
        (row, _cutoff_ms(slot_id, command.time_zone, cutoff))
        for slot_id, row in ledger.counters.rows_of_pool(command.pool_id).items()
    ]
    changed = [(row, at_ms) for row, at_ms in cutoffs if ledger.counters.cutoff_at_ms[row] != at_ms]
    event = events.PoolDefined(
        command.planning_seq, command.pool_code, command.pool_id, command.time_zone, command.cutoff, changed
    )
    return outcomes.Planned(ledger.seq + 1, command.planning_seq), (event,)


def _cutoff_ms(slot_id: str, time_zone: str, cutoff: Cutoff | None) -> int:
    """Without a rule a slot takes orders until it ends."""
    at_ms = cutoff_at_ms(slot_id, time_zone, cutoff)
    return resolve(slot_id, time_zone).ends_at_ms if at_ms is None else at_ms


def _decide_plan_counters(ledger: Ledger, command: commands.PlanCounters, now_ms: int, rules: Rules) -> Decision:
    del now_ms, rules
    if command.planning_seq <= ledger.planning_seq:
        return outcomes.Planned(ledger.seq, ledger.planning_seq), ()
    for plan in command.counters:
        invariant(plan.pool_code in ledger.pool_of_code, "a pool must reach a shard before its counters")
    new_count = sum(
        ledger.counters.find(ledger.pool_of_code[plan.pool_code], plan.slot_id) is None for plan in command.counters
    )
    if len(ledger.counters) + new_count > COUNTERS_OF_SHARD_MAX:
        return _no(ledger, Outcome.SHARD_FULL, f"a shard holds at most {COUNTERS_OF_SHARD_MAX} counters")
    rows = [
        (
            plan.pool_code,
            plan.slot_id,
            plan.base,
            plan.overbook,
            plan.buffer,
            plan.closed,
            plan.starts_at_ms,
            plan.ends_at_ms,
            plan.cutoff_at_ms,
        )
        for plan in command.counters
    ]
    event = events.CountersDefined(command.planning_seq, rows)
    return outcomes.Planned(ledger.seq + 1, command.planning_seq), (event,)


def _decide_planning_head(ledger: Ledger, command: commands.PlanningHead, now_ms: int, rules: Rules) -> Decision:
    del command, now_ms, rules
    return outcomes.Planned(ledger.seq, ledger.planning_seq), ()


def _decide_status(ledger: Ledger, command: commands.ShardStatus, now_ms: int, rules: Rules) -> Decision:
    del command, now_ms, rules
    values: dict[str, int | str] = {
        "counters": len(ledger.counters),
        "reservations": ledger.reservations.count,
        "planning_seq": ledger.planning_seq,
        "epoch": ledger.epoch,
        "restart": ledger.restart,
    }
    return outcomes.Status(ledger.seq, values), ()


_DECIDE: dict[type, Callable[[Ledger, Any, int, Rules], Decision]] = {
    commands.Hold: decide_hold,
    commands.Confirm: decide_confirm,
    commands.Release: _decide_release,
    commands.Extend: decide_extend,
    commands.Move: decide_move,
    commands.Fulfil: _decide_fulfil,
    commands.Look: _decide_look,
    commands.Prepare: _decide_prepare,
    commands.Sync: _decide_sync,
    commands.LookCounters: _decide_look_counters,
    commands.PlanPool: _decide_plan_pool,
    commands.PlanCounters: _decide_plan_counters,
    commands.PlanningHead: _decide_planning_head,
    commands.ShardStatus: _decide_status,
}

ReservationStep = commands.Confirm | commands.Release | commands.Extend | commands.Move | commands.Fulfil


def _step(ledger: Ledger, command: ReservationStep, verb: str, done: Outcome) -> tuple[Chunk, int] | outcomes.Reply:
    """The record a step is about, or the answer when there is nothing to do.

    The same action again means that its first answer was lost: it is answered as then, from the record as it is.
    """
    found = ledger.reservations.find(command.number)
    if found is None or command.number in ledger.links:
        return _unknown_reservation(ledger)
    chunk, row = found
    if chunk.action[row] == command.action:
        return record(ledger, chunk, row, done)
    to = TRANSITIONS[chunk.status[row], verb]
    if isinstance(to, Outcome):
        return record(ledger, chunk, row, to)
    return found


def _counter_rows(ledger: Ledger, lines: list[commands.Line]) -> dict[int, int] | outcomes.Refused:
    """Units summed for each counter, before any check; or the first line that names no counter."""
    units: dict[int, int] = {}
    counters = ledger.counters
    for line in lines:
        row = counters.find(line.pool_id, line.slot_id)
        if row is None:
            if line.pool_id in ledger.pools:
                detail = f"pool {line.pool_id} has no slot {line.slot_id}"
                return outcomes.Refused(ledger.seq, Outcome.UNKNOWN_SLOT, [], detail)
            return outcomes.Refused(ledger.seq, Outcome.UNKNOWN_POOL, [], f"there is no pool {line.pool_id}")
        units[row] = units.get(row, 0) + line.quantity
    return units


def _in_the_way(ledger: Ledger, taking: dict[int, int], freed: dict[int, int], now_ms: int) -> list[CounterShort]:
    """The counters that do not allow `taking`, when `freed` units of theirs count as free. Empty: all allow it."""
    counters = ledger.counters
    attempted = ledger.attempted_units
    short = []
    for row, units in taking.items():
        used = counters.held[row] + counters.confirmed[row] + counters.fulfilled[row] - freed.get(row, 0)
        if attempted:
            used += attempted.get(row, 0)
        if counters.closed[row]:
            reason = Outcome.SLOT_CLOSED
        elif now_ms >= counters.cutoff_at_ms[row]:
            reason = Outcome.PAST_CUTOFF
        elif used + units > counters.limit[row] and units > freed.get(row, 0):
            reason = Outcome.INSUFFICIENT_CAPACITY
        else:
            continue
        short.append(
            CounterShort(
                counters.pool_id[row],
                counters.slot_id[row],
                units,
                max(0, counters.limit[row] - used),
                reason,
                counters.cutoff_at_ms[row],
            )
        )
    return short


def _refuse(ledger: Ledger, short: list[CounterShort], key: str, order_ref: str) -> Decision:
    """Turn demand away and, the first time for this key, record how much."""
    if key in ledger.refused_keys:
        return outcomes.Refused(ledger.seq, short[0].reason, short), ()
    counters: list[tuple[int, int, int]] = []
    for each in short:
        row = ledger.counters.find(each.pool_id, each.slot_id)
        if row is None:
            broken("a counter in the way must exist")
        counters.append((row, each.quantity, each.available))
    event = events.Refused(short[0].reason.value, counters, key, order_ref)
    return outcomes.Refused(ledger.seq + 1, short[0].reason, short), (event,)


def _no(ledger: Ledger, outcome: Outcome, detail: str) -> Decision:
    return outcomes.Refused(ledger.seq, outcome, [], detail), ()


def _unknown_reservation(ledger: Ledger) -> outcomes.Refused:
    return outcomes.Refused(
        ledger.seq,
        Outcome.UNKNOWN_RESERVATION,
        [],
        "there is no such reservation, or it was finished longer ago than finished ones are kept",
    )


def find_key(ledger: Ledger, key: bytes) -> tuple[Chunk, int] | None:
    """The record made under this 16-byte key digest, while it lives."""
    key_high, key_low = _KEY_HALVES.unpack(key)
    for number in ledger.keys.candidates(key_high, key_low):
        found = ledger.reservations.find(number)
        if found is not None and found[0].key_low[found[1]] == key_low:
            return found
    return None


def key_of(chunk: Chunk, row: int) -> bytes:
    """The 16-byte key digest of a record."""
    return _KEY_HALVES.pack(chunk.key_high[row], chunk.key_low[row])


def _named_lines(ledger: Ledger, lines: Lines, parts: tuple[Part, ...]) -> list[tuple[str, str, int]]:
    counters = ledger.counters
    named = [(counters.pool_id[row], counters.slot_id[row], units) for row, units in lines]
    for part in parts:
        named += part.lines
    return named


def record(ledger: Ledger, chunk: Chunk, row: int, outcome: Outcome) -> outcomes.Record:
    """A reservation as it is now."""
    order_ref, channel = chunk.label(row)
    return outcomes.Record(
        ledger.seq,
        outcome,
        chunk.number[row],
        chunk.status[row],
        chunk.version[row],
        chunk.created_at_ms[row],
        chunk.changed_at_ms[row],
        chunk.changed_seq[row],
        chunk.expires_at_ms[row],
        order_ref,
        channel,
        _named_lines(ledger, ledger.reservations.lines(chunk, row), ledger.parts.get(chunk.number[row], ())),
    )


def _changed(
    ledger: Ledger,
    chunk: Chunk,
    row: int,
    outcome: Outcome,
    now_ms: int,
    status: int,
    lines: Lines | None = None,
    *,
    expires_at_ms: int | None = None,
    late: bool = False,
    parts: tuple[Part, ...] | None = None,
) -> outcomes.Record:
    """A reservation as it will be once the event of this decision is applied."""
    order_ref, channel = chunk.label(row)
    if lines is None:
        lines = ledger.reservations.lines(chunk, row)
    if parts is None:
        parts = ledger.parts.get(chunk.number[row], ())
    return outcomes.Record(
        ledger.seq + 1,
        outcome,
        chunk.number[row],
        status,
        chunk.version[row] + 1,
        chunk.created_at_ms[row],
        now_ms,
        ledger.seq + 1,
        chunk.expires_at_ms[row] if expires_at_ms is None else expires_at_ms,
        order_ref,
        channel,
        _named_lines(ledger, lines, parts),
        late,
    )


# --- applying ---------------------------------------------------------------------------------------------------------


def _apply_term_started(ledger: Ledger, event: events.TermStarted) -> None:
    invariant((event.epoch, event.restart) > (ledger.epoch, ledger.restart), "terms must rise")
    ledger.epoch, ledger.restart = event.epoch, event.restart


def _move_units(ledger: Ledger, lines: Lines | list[tuple[int, int]], status: int, sign: int) -> None:
    """Add (sign 1) or take away (sign -1) units from what a status counts as. Statuses that take no units: nothing."""
    counters = ledger.counters
    if status == HELD:
        column = counters.held
    elif status == CONFIRMED:
        column = counters.confirmed
    elif status == FULFILLED:
        column = counters.fulfilled
    else:
        return
    for row, units in lines:
        column[row] += sign * units
        invariant(column[row] >= 0, "units of a counter must not fall below zero")
        counters.changed_seq[row] = ledger.seq
        ledger.touched.add(row)


def _check_limits(ledger: Ledger, lines: Lines | list[tuple[int, int]]) -> None:
    """The promise of the whole system: what was just taken fits."""
    counters = ledger.counters
    for row, _ in lines:
        if counters.held[row] + counters.confirmed[row] + counters.fulfilled[row] > counters.limit[row]:
            broken(f"counter {counters.pool_id[row]} {counters.slot_id[row]} would pass its limit at {ledger.seq}")


def _add_record(ledger: Ledger, event: events.Held | events.ConfirmedAtOnce, status: int, expires_at_ms: int) -> int:
    number = reservation_number(ledger.seq, ledger.counters.hashed[event.lines[0][0]])
    key_high, key_low = _KEY_HALVES.unpack(bytes.fromhex(event.key))
    ledger.reservations.append(
        number,
        status,
        tuple(event.lines),
        expires_at_ms=expires_at_ms,
        at_ms=ledger.at_ms,
        seq=ledger.seq,
        key_high=key_high,
        key_low=key_low,
        digest=event.digest,
        order_ref=event.order_ref,
        channel=event.channel,
    )
    ledger.keys.add(key_high, key_low, number)
    ledger.refused_keys.pop(event.key, None)
    if event.parts:
        _set_parts(ledger, number, event.parts)
    _move_units(ledger, event.lines, status, 1)
    _check_limits(ledger, event.lines)
    return number


def _set_parts(ledger: Ledger, number: int, parts: list[events.PartUnits]) -> None:
    """What a reservation takes elsewhere from now on. The other shards have to hear of it."""
    ledger.parts[number] = tuple(Part(shard, part_number, tuple(lines)) for shard, part_number, lines in parts)
    _owe(ledger, number)


def _owe(ledger: Ledger, number: int) -> None:
    ledger.owed[number] = None
    ledger.news.append(number)


def _apply_held(ledger: Ledger, event: events.Held) -> None:
    number = _add_record(ledger, event, HELD, event.expires_at_ms)
    ledger.expiry.add(number, event.expires_at_ms)


def _apply_confirmed_at_once(ledger: Ledger, event: events.ConfirmedAtOnce) -> None:
    _add_record(ledger, event, CONFIRMED, 0)


def _changing(ledger: Ledger, number: int, verb: str, action: int) -> tuple[Chunk, int, int]:
    """The record an event changes, marked as changed by it, and its status after the event."""
    chunk, row = ledger.reservations.writable(number)
    to = TRANSITIONS[chunk.status[row], verb]
    if isinstance(to, Outcome):
        broken(f"the journal says {verb} at {ledger.seq}, but {to}")
    chunk.changed_at_ms[row] = ledger.at_ms
    chunk.changed_seq[row] = ledger.seq
    chunk.version[row] += 1
    chunk.action[row] = action
    if number in ledger.parts:
        _owe(ledger, number)
    return chunk, row, to


def _apply_confirmed(ledger: Ledger, event: events.Confirmed) -> None:
    chunk, row, to = _changing(ledger, event.number, "confirm", event.action)
    lines = ledger.reservations.lines(chunk, row)
    invariant(event.late == (chunk.status[row] == EXPIRED), "late means confirmed after expiry")
    _move_units(ledger, lines, chunk.status[row], -1)
    if event.kept is not None:
        had = dict(lines)
        invariant(all(units <= had.get(counter, 0) for counter, units in event.kept), "kept units must have been held")
        lines = tuple(event.kept)
        ledger.reservations.set_lines(chunk, row, lines)
    _move_units(ledger, lines, to, 1)
    if event.late:
        _check_limits(ledger, lines)
    if event.parts is not None:
        _set_parts(ledger, event.number, event.parts)
    chunk.status[row] = to


def _apply_released(ledger: Ledger, event: events.Released) -> None:
    chunk, row, to = _changing(ledger, event.number, "release", event.action)
    _move_units(ledger, ledger.reservations.lines(chunk, row), chunk.status[row], -1)
    chunk.status[row] = to


def _apply_extended(ledger: Ledger, event: events.Extended) -> None:
    chunk, row, _ = _changing(ledger, event.number, "extend", event.action)
    if event.expires_at_ms != chunk.expires_at_ms[row]:  # an equal entry in the queue would expire the hold twice
        chunk.expires_at_ms[row] = event.expires_at_ms
        ledger.expiry.add(event.number, event.expires_at_ms)


def _apply_moved(ledger: Ledger, event: events.Moved) -> None:
    chunk, row, status = _changing(ledger, event.number, "move", event.action)
    had = dict(ledger.reservations.lines(chunk, row))
    _move_units(ledger, tuple(had.items()), status, -1)
    ledger.reservations.set_lines(chunk, row, tuple(event.lines))
    _move_units(ledger, event.lines, status, 1)
    _check_limits(ledger, [line for line in event.lines if line[1] > had.get(line[0], 0)])
    if event.parts is not None:
        _set_parts(ledger, event.number, event.parts)


def _apply_part_prepared(ledger: Ledger, event: events.PartPrepared) -> None:
    number = event.part_number
    if number:
        link = ledger.links[number]._replace(tx=event.tx, is_pinned=True, asked_version=event.version)
        if event.number:
            link = link._replace(number=event.number)
        chunk, row = ledger.reservations.writable(number)
        status = chunk.status[row]
        had = dict(ledger.reservations.lines(chunk, row)) if status in (HELD, CONFIRMED) else {}
        _move_units(ledger, tuple(had.items()), status, -1)
        if status != CONFIRMED:
            chunk.status[row] = HELD
        ledger.reservations.set_lines(chunk, row, tuple(event.lines))
        _touch(ledger, chunk, row)
    else:
        number = reservation_number(ledger.seq, ledger.counters.hashed[event.lines[0][0]])
        key_high, key_low = _KEY_HALVES.unpack(bytes.fromhex(event.key))
        ledger.reservations.append(
            number,
            HELD,
            tuple(event.lines),
            expires_at_ms=0,
            at_ms=ledger.at_ms,
            seq=ledger.seq,
            key_high=key_high,
            key_low=key_low,
            digest=0,
            order_ref="",
            channel="",
        )
        ledger.keys.add(key_high, key_low, number)
        link = Link(event.home_shard, event.tx, event.number, 0, is_pinned=True, asked_version=event.version)
        chunk, row = ledger.reservations.writable(number)
        had = {}
    ledger.links[number] = link
    ledger.pinned[number] = None
    _move_units(ledger, event.lines, chunk.status[row], 1)
    _check_limits(ledger, [line for line in event.lines if line[1] > had.get(line[0], 0)])


def _touch(ledger: Ledger, chunk: Chunk, row: int) -> None:
    chunk.changed_at_ms[row] = ledger.at_ms
    chunk.changed_seq[row] = ledger.seq
    chunk.version[row] += 1


def _apply_part_synced(ledger: Ledger, event: events.PartSynced) -> None:
    chunk, row = ledger.reservations.writable(event.part_number)
    status = chunk.status[row]
    had = dict(ledger.reservations.lines(chunk, row)) if status in (HELD, CONFIRMED, FULFILLED) else {}
    _move_units(ledger, tuple(had.items()), status, -1)
    ledger.reservations.set_lines(chunk, row, tuple(event.lines))
    chunk.status[row] = event.status
    chunk.expires_at_ms[row] = event.expires_at_ms
    _touch(ledger, chunk, row)
    _move_units(ledger, event.lines, event.status, 1)
    if event.status in (HELD, CONFIRMED, FULFILLED):
        _check_limits(ledger, [line for line in event.lines if line[1] > had.get(line[0], 0)])
    if event.status == HELD:
        ledger.expiry.add(event.part_number, event.expires_at_ms)
    link = ledger.links[event.part_number]
    ledger.links[event.part_number] = Link(link.home_shard, link.tx, event.number, event.version, is_pinned=False)
    ledger.pinned.pop(event.part_number, None)


def _apply_parts_settled(ledger: Ledger, event: events.PartsSettled) -> None:
    found = ledger.reservations.find(event.number)
    invariant(found is not None and found[0].version[found[1]] == event.version, "what is settled is the last version")
    del ledger.owed[event.number]
    left = tuple(part for part in ledger.parts[event.number] if part.lines)
    if left:
        ledger.parts[event.number] = left
    else:
        del ledger.parts[event.number]


def _apply_fulfilled(ledger: Ledger, event: events.Fulfilled) -> None:
    chunk, row, to = _changing(ledger, event.number, "fulfil", event.action)
    lines = ledger.reservations.lines(chunk, row)
    _move_units(ledger, lines, CONFIRMED, -1)
    _move_units(ledger, lines, to, 1)
    chunk.status[row] = to


def _apply_expired(ledger: Ledger, event: events.Expired) -> None:
    if len(event.numbers) >= ONE_BY_ONE_MAX:
        _apply_expired_many(ledger, event)
        return
    for number, expired_at_ms in zip(event.numbers, event.expired_at_ms, strict=True):
        chunk, row, to = _changing(ledger, number, "expire", 0)
        invariant(chunk.expires_at_ms[row] == expired_at_ms, "a hold expires at its own time")
        _move_units(ledger, ledger.reservations.lines(chunk, row), HELD, -1)
        chunk.status[row] = to


def _apply_expired_many(ledger: Ledger, event: events.Expired) -> None:
    """As one by one, with arrays."""
    numbers, times = np.array(event.numbers, np.int64), np.array(event.expired_at_ms, np.int64)
    invariant(len(np.unique(numbers)) == len(numbers), "a hold expires once")
    counters = ledger.counters
    left = len(numbers)
    touched: list[NDArray[np.int64]] = []
    for chunk, places, rows in ledger.reservations.locate(numbers):
        ledger.reservations.writable_chunk(chunk)
        left -= len(rows)
        status = chunk.view("status")
        invariant(bool(np.all(status[rows] == HELD)), "only holds expire")
        invariant(bool(np.all(chunk.view("expires_at_ms")[rows] == times[places])), "a hold expires at its own time")
        status[rows] = EXPIRED
        chunk.view("changed_at_ms")[rows] = ledger.at_ms
        chunk.view("changed_seq")[rows] = ledger.seq
        chunk.view("version")[rows] += 1
        chunk.view("action")[rows] = 0
        second = chunk.view("counter_2")[rows]
        for row in rows[second == MORE_LINES].tolist():
            _move_units(ledger, ledger.reservations.lines(chunk, row), HELD, -1)
        for counter, quantity, here in (
            ("counter", "quantity", (chunk.view("counter")[rows] != NO_COUNTER) & (second != MORE_LINES)),
            ("counter_2", "quantity_2", second >= 0),
        ):
            which = chunk.view(counter)[rows][here].astype(np.int64)
            np.subtract.at(counters.view("held"), which, chunk.view(quantity)[rows][here].astype(np.int64))
            touched.append(which)
    invariant(left == 0, "what expires must be in memory")
    changed = np.unique(np.concatenate(touched))
    invariant(bool(np.all(counters.view("held")[changed] >= 0)), "units of a counter must not fall below zero")
    counters.view("changed_seq")[changed] = ledger.seq
    ledger.touched.update(changed.tolist())
    if ledger.parts:
        for number in event.numbers:
            if number in ledger.parts:
                _owe(ledger, number)


def _apply_refused(ledger: Ledger, event: events.Refused) -> None:
    counters = ledger.counters
    for row, units, _ in event.counters:
        counters.refused[row] += units
        counters.changed_seq[row] = ledger.seq
        ledger.touched.add(row)
    ledger.refused_keys[event.key] = None
    if len(ledger.refused_keys) > REFUSED_KEYS_MAX:
        del ledger.refused_keys[next(iter(ledger.refused_keys))]


def _apply_pool_defined(ledger: Ledger, event: events.PoolDefined) -> None:
    invariant(event.planning_seq > ledger.planning_seq, "plans must rise")
    ledger.planning_seq = event.planning_seq
    cutoff = None if event.cutoff is None else Cutoff(*event.cutoff)
    ledger.pools[event.pool_id] = Pool(event.pool_code, event.time_zone, cutoff)
    ledger.pool_of_code[event.pool_code] = event.pool_id
    for row, at_ms in event.cutoffs:
        ledger.counters.cutoff_at_ms[row] = at_ms
        ledger.counters.changed_seq[row] = ledger.seq
        ledger.counters.plan_version[row] = event.planning_seq
        ledger.touched.add(row)


def _apply_counters_defined(ledger: Ledger, event: events.CountersDefined) -> None:
    invariant(event.planning_seq > ledger.planning_seq, "plans must rise")
    ledger.planning_seq = event.planning_seq
    counters = ledger.counters
    for pool_code, slot_id, base, overbook, buffer, closed, starts_at_ms, ends_at_ms, cutoff_ms in event.counters:
        pool_id = ledger.pool_of_code[pool_code]
        row = counters.find(pool_id, slot_id)
        if row is None:
            row = counters.append(pool_id, slot_id, pool_code, counter_hash(pool_id, slot_id))
            counters.starts_at_ms[row] = starts_at_ms
            counters.ends_at_ms[row] = ends_at_ms
        counters.base[row] = base
        counters.overbook[row] = overbook
        counters.buffer[row] = buffer
        counters.limit[row] = max(0, base + overbook - buffer)
        counters.closed[row] = closed
        counters.cutoff_at_ms[row] = cutoff_ms
        counters.changed_seq[row] = ledger.seq
        counters.plan_version[row] = event.planning_seq
        ledger.touched.add(row)


def _forgettable(ledger: Ledger, event: events.Forgotten) -> list[tuple[int, int, int]]:
    """(number, key_high, key_low) of the records this event names: finished, or confirmed for slots that are all long past.

    One or two lines are looked at with arrays, more of them and parts elsewhere one by one (`_has_ended`).
    """
    found: list[tuple[int, int, int]] = []
    number = event.first
    ends_at_ms = ledger.counters.view("ends_at_ms") if len(ledger.counters) else np.zeros(0, np.int64)
    while True:
        place = ledger.reservations.chunk_of(number)
        if place is None or place[0].number[place[1]] > event.last:
            return found
        chunk = place[0]
        numbers, status = chunk.view("number"), chunk.view("status")
        finished = (status >= FULFILLED) & (chunk.view("changed_at_ms") < event.before_ms)
        past = status == CONFIRMED
        for field in ("counter", "counter_2"):
            counter = chunk.view(field)
            past &= (counter < 0) | (ends_at_ms[np.maximum(counter, 0)] < event.before_ms)
        unclear = past & ((chunk.view("counter") == NO_COUNTER) | (chunk.view("counter_2") == MORE_LINES))
        inside = (numbers >= event.first) & (numbers <= event.last) & (status != GONE)
        rows = np.flatnonzero((finished | past) & inside)
        found += [
            (number, key_high, key_low)
            for row, number, key_high, key_low in zip(
                rows.tolist(),
                numbers[rows].tolist(),
                chunk.view("key_high")[rows].tolist(),
                chunk.view("key_low")[rows].tolist(),
                strict=True,
            )
            if number not in ledger.owed
            and number not in ledger.pinned
            and (
                not past[row]
                or not (unclear[row] or number in ledger.parts)
                or _has_ended(ledger, chunk, row, event.before_ms)
            )
        ]
        number = chunk.number[chunk.size - 1] + 1


def _has_ended(ledger: Ledger, chunk: Chunk, row: int, before_ms: int) -> bool:
    """Whether every slot of a reservation had ended before.

    Of a part's slot only the id is known here. It ends on the day after its local date at the latest, which is over in every
    zone two days later by UTC.
    """
    lines = ledger.reservations.lines(chunk, row)
    slot_ids = [line[1] for part in ledger.parts.get(chunk.number[row], ()) for line in part.lines]
    if not lines and not slot_ids:
        return False
    days = before_ms // DAY_MS - PART_ENDS_DAYS_MAX
    date = dt.date.fromordinal(_ORDINAL_OF_1970 + min(max(days, 0), DAYS_MAX)).isoformat()
    return all(ledger.counters.ends_at_ms[counter] < before_ms for counter, _ in lines) and all(
        slot_id[: len(date)] < date for slot_id in slot_ids
    )


def _apply_forgotten(ledger: Ledger, event: events.Forgotten) -> None:
    leaving = _forgettable(ledger, event)
    for number, key_high, key_low in leaving:
        ledger.keys.remove(key_high, key_low, number)
        ledger.parts.pop(number, None)
        ledger.links.pop(number, None)
    ledger.reservations.remove([number for number, _, _ in leaving])


_APPLY: dict[type, Callable[[Ledger, Any], None]] = {
    events.TermStarted: _apply_term_started,
    events.Held: _apply_held,
    events.ConfirmedAtOnce: _apply_confirmed_at_once,
    events.Confirmed: _apply_confirmed,
    events.Released: _apply_released,
    events.Extended: _apply_extended,
    events.Moved: _apply_moved,
    events.Fulfilled: _apply_fulfilled,
    events.Expired: _apply_expired,
    events.PartPrepared: _apply_part_prepared,
    events.PartSynced: _apply_part_synced,
    events.PartsSettled: _apply_parts_settled,
    events.Refused: _apply_refused,
    events.PoolDefined: _apply_pool_defined,
    events.CountersDefined: _apply_counters_defined,
    events.Forgotten: _apply_forgotten,
}
