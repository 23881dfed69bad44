"""What happened, in the past tense: the only things that are journaled and the only things that change state.

Rules
- An event carries what was decided, never what has to be decided again: instants, kept quantities, resolved cut-offs.
- Counters are named by their row, their place in the order of definition in this shard: short, and fixed for ever.
- Fields are never removed or given a new meaning; new ones go to the end with a default; a change beyond that is a new
  schema version and an upcaster in `engine.codec`.
- The number of a new reservation follows from the event's own seq and its first counter (`sharding.reservation_number`).

In the journal an event is a JSON array that opens with its name; `docs/journal.md` is the table for people.
"""

import msgspec

SCHEMA = 1

CounterUnits = tuple[int, int]
"""(counter row, units)"""


NamedUnits = tuple[str, str, int]
"""(pool_id, slot_id, units) of a counter on another shard"""

PartUnits = tuple[int, int, list[NamedUnits]]
"""(shard, part number there, lines) of a reservation's part on another shard"""


class Event(msgspec.Struct, array_like=True, frozen=True, gc=False, tag_field="event", forbid_unknown_fields=True):
    """Base of all events."""


class TermStarted(Event, frozen=True, tag="term_started"):
    """A worker took over the shard: the first event of its term."""

    epoch: int
    restart: int


class Held(Event, frozen=True, tag="held"):
    """A new hold. `key` is hex of the 16-byte key digest; `digest` stands for the body."""

    lines: list[CounterUnits]
    expires_at_ms: int
    order_ref: str
    channel: str
    key: str
    digest: int
    parts: list[PartUnits] = []


class ConfirmedAtOnce(Event, frozen=True, tag="confirmed_at_once"):
    """A new reservation that never was a hold."""

    lines: list[CounterUnits]
    order_ref: str
    channel: str
    key: str
    digest: int
    parts: list[PartUnits] = []


class Confirmed(Event, frozen=True, tag="confirmed"):
    """A hold became permanent. `kept` lists the units that stay where not all do; `late` after its expiry."""

    number: int
    action: int
    kept: list[CounterUnits] | None = None
    late: bool = False
    parts: list[PartUnits] | None = None


class Released(Event, frozen=True, tag="released"):
    """Units were given back."""

    number: int
    action: int
    reason: str = ""


class Extended(Event, frozen=True, tag="extended"):
    """A hold lives until `expires_at_ms`."""

    number: int
    action: int
    expires_at_ms: int


class Moved(Event, frozen=True, tag="moved"):
    """A reservation now takes `lines` instead of what it took."""

    number: int
    action: int
    lines: list[CounterUnits]
    parts: list[PartUnits] | None = None


class Fulfilled(Event, frozen=True, tag="fulfilled"):
    """The delivery was made."""

    number: int
    action: int


class Expired(Event, frozen=True, tag="expired"):
    """Holds whose time had passed: `numbers[i]` at `expired_at_ms[i]`. Parts of holds are among them."""

    numbers: list[int]
    expired_at_ms: list[int]


class PartPrepared(Event, frozen=True, tag="part_prepared"):
    """A part of a reservation whose home is another shard was taken here, until that one says what became of it.

    `part_number` 0: the part is new, numbered by this event. `lines` are all lines of the part from now on. `number` and
    `version` are those of the reservation when it was asked for, 0 while it does not exist.
    """

    tx: int
    home_shard: int
    part_number: int
    number: int
    version: int
    lines: list[CounterUnits]
    key: str


class PartSynced(Event, frozen=True, tag="part_synced"):
    """A part here is now what its home says, by version `version` of the reservation."""

    part_number: int
    number: int
    version: int
    status: int
    expires_at_ms: int
    lines: list[CounterUnits]


class PartsSettled(Event, frozen=True, tag="parts_settled"):
    """All other shards have taken over version `version` of a reservation."""

    number: int
    version: int


class Refused(Event, frozen=True, tag="refused"):
    """Demand was turned away: (counter row, units asked for, units available) of each counter in the way."""

    reason: str
    counters: list[tuple[int, int, int]]
    key: str
    order_ref: str = ""


class PoolDefined(Event, frozen=True, tag="pool_defined"):
    """A pool as the planner has it from `planning_seq` on; `cutoffs` are the new cut-offs of its counters here."""

    planning_seq: int
    pool_code: int
    pool_id: str
    time_zone: str
    cutoff: tuple[int | None, int | None, int | None] | None
    cutoffs: list[tuple[int, int]]


class CountersDefined(Event, frozen=True, tag="counters_defined"):
    """Counters as the planner has them from `planning_seq` on.

    Each is (pool_code, slot_id, base, overbook, buffer, closed, starts_at_ms, ends_at_ms, cutoff_at_ms).
    """

    planning_seq: int
    counters: list[tuple[int, str, int, int, int, bool, int, int, int]]


class Forgotten(Event, frozen=True, tag="forgotten"):
    """Records with numbers in [first, last] that were over before `before_ms` left memory.

    Those are the finished ones that had not changed since, and the confirmed ones whose slots had all ended: of the lines
    here by their counters' ends, of the lines on other shards by the date in the slot id, which must lie before the UTC date
    of `before_ms` less two days. What is owed to other shards, and parts that are pinned, stays.
    """

    first: int
    last: int
    before_ms: int


ShardEvent = (
    TermStarted
    | Held
    | ConfirmedAtOnce
    | Confirmed
    | Released
    | Extended
    | Moved
    | Fulfilled
    | Expired
    | PartPrepared
    | PartSynced
    | PartsSettled
    | Refused
    | PoolDefined
    | CountersDefined
    | Forgotten
)


class PoolPut(Event, frozen=True, tag="pool_put"):
    """Planner: a pool was defined or changed, by whom and why."""

    pool_code: int
    pool_id: str
    capacity_type: str
    unit: str
    zone: str
    time_zone: str
    cutoff: tuple[int | None, int | None, int | None] | None
    reason: str
    actor: str


class CountersPut(Event, frozen=True, tag="counters_put"):
    """Planner: counters were defined or changed, by whom and why. Tuples as in `CountersDefined`."""

    counters: list[tuple[int, str, int, int, int, bool, int, int, int]]
    reason: str
    actor: str


PlannerEvent = TermStarted | PoolPut | CountersPut
