"""The planner's state machine: pools and which counters exist, versioned by the planner's own journal.

The planner is the one writer of definitions (base, overbook, buffer, closed, cut-off), the shards are the writers of usage.
Each planner event reaches the shards it concerns in order, as a command that carries the event's number (`planning_seq`); a
shard remembers the last one it took, so nothing is lost or taken twice, whatever crashes in between.

`plan_version` of a pool or counter is the planning_seq that last changed it; `if_version` compares with it. A new cut-off of
a pool changes the plan_version that a shard shows of a counter, and only the shard knows of which: so any version from the
counter's last definition to its pool's last one is a version somebody may have read, and none of them hides a change of the
counter itself.

Not promised: units. What a counter's limit is stands in its shard; here only names and versions are kept, so that half a
million counters stay small.
"""

from typing import NamedTuple

from engine.core import commands, events, outcomes
from engine.core.invariant import invariant
from engine.core.limits import COUNTERS_IN_EVENT_MAX, POOLS_MAX
from engine.core.outcomes import Outcome
from engine.core.sharding import shard_of_counter
from engine.core.slots import Cutoff, SlotError, cutoff_at_ms, parse_slot_id, resolve, zone

PlannedCounter = tuple[int, str, int, int, int, bool, int, int, int]


class PoolDefinition(NamedTuple):
    """A pool as planners see it."""

    code: int
    pool_id: str
    capacity_type: str
    unit: str
    zone: str
    time_zone: str
    cutoff: Cutoff | None
    version: int


class Catalogue:
    """All pools, and the version of every counter. Changed by `apply` only."""

    def __init__(self) -> None:
        self.seq = 0
        self.at_ms = 0
        self.epoch = 0
        self.restart = 0
        self.pools: dict[str, PoolDefinition] = {}
        self.pool_of_code: list[str] = []
        self.versions: dict[str, dict[str, int]] = {}


Decision = tuple[outcomes.Reply, tuple[events.PlannerEvent, ...]]


def decide(catalogue: Catalogue, command: commands.PutPool | commands.PutCounters) -> Decision:
    """Answer one command. Never raises for anything a caller can ask; changes nothing."""
    if isinstance(command, commands.PutPool):
        return _decide_put_pool(catalogue, command)
    return _decide_put_counters(catalogue, command)


def _no(catalogue: Catalogue, outcome: Outcome, detail: str) -> Decision:
    return outcomes.Refused(catalogue.seq, outcome, [], detail), ()


def _conflict(catalogue: Catalogue, what: str, version: int) -> Decision:
    detail = f"{what} has plan_version {version} now: read it again, then decide"
    return _no(catalogue, Outcome.PLAN_CONFLICT, detail)


def _decide_put_pool(catalogue: Catalogue, command: commands.PutPool) -> Decision:
    known = catalogue.pools.get(command.pool_id)
    version = known.version if known else 0
    if command.if_version is not None and command.if_version != version:
        return _conflict(catalogue, f"pool {command.pool_id}", version)
    try:
        zone(command.time_zone)
    except SlotError as error:
        return _no(catalogue, Outcome.INVALID_SLOT, str(error))
    if known is not None and catalogue.versions.get(command.pool_id):
        for field in ("time_zone", "unit", "capacity_type"):
            before, after = getattr(known, field), getattr(command, field)
            if before != after:
                detail = (
                    f"pool {command.pool_id} has slots, and their times and units rest on its {field}: "
                    f"it stays {before!r}; define another pool for {after!r}"
                )
                return _no(catalogue, Outcome.POOL_HAS_SLOTS, detail)
    if known is None and len(catalogue.pools) >= POOLS_MAX:
        return _no(catalogue, Outcome.TOO_MANY_POOLS, f"there are {POOLS_MAX} pools already")
    event = events.PoolPut(
        known.code if known else len(catalogue.pool_of_code),
        command.pool_id,
        command.capacity_type,
        command.unit,
        command.zone,
        command.time_zone,
        command.cutoff,
        command.reason,
        command.actor,
    )
    return outcomes.Defined(catalogue.seq + 1, 0 if known else 1, applied=True), (event,)


def _decide_put_counters(catalogue: Catalogue, command: commands.PutCounters) -> Decision:
    rows: list[PlannedCounter] = []
    seen: set[tuple[str, str]] = set()
    created = 0
    for put in command.counters:
        pool = catalogue.pools.get(put.pool_id)
        if pool is None:
            return _no(catalogue, Outcome.UNKNOWN_POOL, f"there is no pool {put.pool_id}: define it first")
        if (put.pool_id, put.slot_id) in seen:
            return _no(catalogue, Outcome.INVALID_SLOT, f"{put.pool_id} {put.slot_id} is named twice")
        seen.add((put.pool_id, put.slot_id))
        version = catalogue.versions.get(put.pool_id, {}).get(put.slot_id, 0)
        newest = max(version, pool.version) if version else 0
        if command.if_version is not None and not version <= command.if_version <= newest:
            return _conflict(catalogue, f"{put.pool_id} {put.slot_id}", version)
        created += version == 0
        try:
            instants = resolve(put.slot_id, pool.time_zone)
            cutoff_ms = cutoff_at_ms(put.slot_id, pool.time_zone, pool.cutoff)
        except SlotError as error:
            return _no(catalogue, Outcome.INVALID_SLOT, str(error))
        rows.append(
            (
                pool.code,
                put.slot_id,
                put.base,
                put.overbook,
                put.buffer,
                put.closed,
                instants.starts_at_ms,
                instants.ends_at_ms,
                instants.ends_at_ms if cutoff_ms is None else cutoff_ms,
            )
        )
    parts = tuple(
        events.CountersPut(rows[start : start + COUNTERS_IN_EVENT_MAX], command.reason, command.actor)
        for start in range(0, len(rows), COUNTERS_IN_EVENT_MAX)
    )
    return outcomes.Defined(catalogue.seq + len(parts), created, applied=True), parts


def apply(catalogue: Catalogue, event: events.PlannerEvent, at_ms: int) -> None:
    """Take the next event into the state. Raises InvariantError where it cannot follow what went before."""
    catalogue.seq += 1
    invariant(at_ms >= catalogue.at_ms, "time of events must not go back")
    catalogue.at_ms = at_ms
    if isinstance(event, events.TermStarted):
        term = (event.epoch, event.restart)
        invariant(term > (catalogue.epoch, catalogue.restart), "terms must rise")
        catalogue.epoch, catalogue.restart = term
    elif isinstance(event, events.PoolPut):
        known = catalogue.pools.get(event.pool_id)
        invariant(known is None or known.code == event.pool_code, "a pool keeps its code")
        if known is None:
            invariant(event.pool_code == len(catalogue.pool_of_code), "pool codes are given in order")
            catalogue.pool_of_code.append(event.pool_id)
        catalogue.pools[event.pool_id] = PoolDefinition(
            event.pool_code,
            event.pool_id,
            event.capacity_type,
            event.unit,
            event.zone,
            event.time_zone,
            None if event.cutoff is None else Cutoff(*event.cutoff),
            catalogue.seq,
        )
    else:
        for pool_code, slot_id, *_ in event.counters:
            parse_slot_id(slot_id)
            versions = catalogue.versions.setdefault(catalogue.pool_of_code[pool_code], {})
            versions[slot_id] = catalogue.seq


def command_for_shard(
    event: events.PlannerEvent, planning_seq: int, shard: int, shards: int, pool_of_code: list[str]
) -> commands.PlanPool | commands.PlanCounters | None:
    """What a planner event asks of one shard, or None where it does not concern it."""
    if isinstance(event, events.PoolPut):
        return commands.PlanPool(planning_seq, event.pool_code, event.pool_id, event.time_zone, event.cutoff)
    if isinstance(event, events.CountersPut):
        mine = [
            commands.CounterPlan(*counter)
            for counter in event.counters
            if shard_of_counter(pool_of_code[counter[0]], counter[1], shards) == shard
        ]
        return commands.PlanCounters(planning_seq, mine) if mine else None
    return None
