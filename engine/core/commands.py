"""What may be asked of a shard and of the planner. Data only: `ledger` and `catalogue` decide.

A command is complete: it carries every number that its decision needs, apart from the state and the time. The structs are
encoded as arrays on the wire between the processes of one host (`engine.wire`); new fields go to the end, with a default.
"""

import msgspec

NO_TTL = 0
"""`ttl_ms` of a reservation that is confirmed at once."""


class Line(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Units asked for of one counter."""

    pool_id: str
    slot_id: str
    quantity: int


class Command(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=True):
    """Base of all commands: the tag is the class name."""


class Hold(Command, frozen=True):
    """Take units of one or several counters, all or nothing; confirmed at once when `ttl_ms` is NO_TTL.

    `key` is 16 bytes: a digest of the idempotency key. `digest` (64 bits, signed) stands for the body that came with it.
    """

    lines: list[Line]
    ttl_ms: int
    key: bytes
    digest: int
    order_ref: str = ""
    channel: str = ""


class Confirm(Command, frozen=True):
    """Make a hold permanent; with `lines`, keep only those quantities and give the rest back.

    `action` (64 bits, signed, never 0) names this request: the same action again gets the first answer, not a refusal.
    """

    number: int
    action: int
    lines: list[Line] | None = None


class Release(Command, frozen=True):
    """Give the units of a hold or a confirmed reservation back."""

    number: int
    action: int
    reason: str = ""


class Extend(Command, frozen=True):
    """Let a hold live `ttl_ms` from now, up to the cap, never shorter than it would."""

    number: int
    action: int
    ttl_ms: int


class Move(Command, frozen=True):
    """Exchange all lines for `lines` in one step; the old units count as free for the check."""

    number: int
    action: int
    lines: list[Line]


class Fulfil(Command, frozen=True):
    """The delivery of a confirmed reservation was made."""

    number: int
    action: int


class Look(Command, frozen=True):
    """Read one reservation as it is when all earlier answers have been given."""

    number: int


class LookCounters(Command, frozen=True):
    """Read counters by their rows, for a reader whose copy stayed torn."""

    rows: list[int]


class Prepare(Command, frozen=True):
    """From the home of a reservation: be able to hold `lines` for it until told, and do not let it expire meanwhile.

    `tx` names the attempt. `part_number` is 0 for lines that are new to this shard. `number` and `version` are those of the
    reservation, 0 while it does not exist. `key` is the client's key digest. `is_confirm`: the units are about to be
    confirmed, so their slots must be open and before their cut-off even where no unit is added.
    """

    tx: int
    home_shard: int
    part_number: int
    number: int
    version: int
    key: bytes
    lines: list[Line]
    order_ref: str = ""
    is_confirm: bool = False


class Sync(Command, frozen=True):
    """From the home of a reservation: what this shard's part of it is now, by the reservation's `version`.

    `tx` is the attempt that this ends, 0 where it is none in particular. Version 0 ends an attempt that never came to be.
    """

    tx: int
    part_number: int
    number: int
    version: int
    status: int
    expires_at_ms: int
    lines: list[Line]


class Doubt(Command, frozen=True):
    """From a shard that has prepared something, has not heard of it since, and wants to know what it is now."""

    shard: int
    tx: int
    part_number: int
    number: int


class PlanPool(Command, frozen=True):
    """From the planner: a pool as it is from `planning_seq` on."""

    planning_seq: int
    pool_code: int
    pool_id: str
    time_zone: str
    cutoff: tuple[int | None, int | None, int | None] | None


class CounterPlan(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The planned side of one counter. Units are integers; instants in milliseconds since 1970."""

    pool_code: int
    slot_id: str
    base: int
    overbook: int
    buffer: int
    closed: bool
    starts_at_ms: int
    ends_at_ms: int
    cutoff_at_ms: int


class PlanCounters(Command, frozen=True):
    """From the planner: counters of this shard as they are from `planning_seq` on."""

    planning_seq: int
    counters: list[CounterPlan]


class PlanningHead(Command, frozen=True):
    """From the planner, which asks up to which `planning_seq` the shard has everything."""


class ShardStatus(Command, frozen=True):
    """How the shard is doing: for readiness and `slotkeeper status`."""


ShardCommand = (
    Hold
    | Confirm
    | Release
    | Extend
    | Move
    | Fulfil
    | Look
    | Prepare
    | Sync
    | Doubt
    | LookCounters
    | PlanPool
    | PlanCounters
    | PlanningHead
    | ShardStatus
)


class PutPool(Command, frozen=True):
    """Define a pool or change it. `cutoff` is a `slots.Cutoff` as a tuple."""

    pool_id: str
    capacity_type: str
    unit: str
    zone: str
    time_zone: str
    cutoff: tuple[int | None, int | None, int | None] | None
    reason: str = ""
    actor: str = ""
    if_version: int | None = None


class CounterPut(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One counter as asked for: names, units, not yet resolved."""

    pool_id: str
    slot_id: str
    base: int
    overbook: int = 0
    buffer: int = 0
    closed: bool = False


class PutCounters(Command, frozen=True):
    """Define counters or change them, all or nothing."""

    counters: list[CounterPut]
    reason: str = ""
    actor: str = ""
    if_version: int | None = None


class PlannerStatus(Command, frozen=True):
    """How far the planner's events have reached each shard."""


PlannerCommand = PutPool | PutCounters | PlannerStatus
