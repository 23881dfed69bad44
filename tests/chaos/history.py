"""What clients asked and heard while parts of the engine died, and what must be true of it whatever died.

A history holds one `Attempt` for each idempotency key, written by the client that used it, with times of one monotonic clock.
`violations` compares it with what the engine says when all is quiet: the feed, each reservation, each counter.

The rules, each of which yields a line that names the key or the counter
- no acknowledged reservation is lost, and it is in the state that was acknowledged last;
- one key makes one reservation: the feed tells it once, and all answers to a key name the same one;
- a refused key made none, and the feed tells of no reservation that nobody asked for;
- all or nothing: on every other shard an acknowledged reservation takes just those of its lines that lie there, a released one
  takes nothing, and nothing is taken there for a reservation that nobody was told of;
- at no instant do the reservations that certainly hold units exceed a counter's limit;
- a counter's used units are the sum over acknowledged reservations that were not released.

All of it holds when the shards are quiet, and no news is on its way between them any more.

Not checked here: that refusals were justified, and the journal itself; `slotkeeper verify` proves that from the inside.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.core.sharding import parse_position, parse_reservation_id, shard_of_counter, shard_of_number

CounterName = tuple[str, str]
"""(pool_id, slot_id)"""


@dataclass
class Span:
    """Lines that are certainly held for a time."""

    lines: dict[CounterName, int]
    since: float
    """The answer that acknowledged them."""
    until: float | None = None
    """The first moment at which a release or a move could have taken effect."""


@dataclass
class Attempt:
    """One key: a reservation that was asked for, and what became of it."""

    key: str
    """Also the order_ref, so that the feed names it."""
    lines: dict[CounterName, int]
    """As acknowledged last, after moves."""
    reservation_id: str | None = None
    refused: bool = False
    status: str = ""
    """What was acknowledged last: held, confirmed, released."""
    expires_at: str | None = None
    steps: int = 0
    """Steps asked for, so that each has a key of its own."""
    asked: bytes = b""
    """The body that made it, to be repeated."""
    spans: list[Span] = field(default_factory=list)


@dataclass
class History:
    """Everything that the clients of one run asked and heard."""

    attempts: dict[str, Attempt] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    """Found by clients as they went: an answer that cannot be, a key with two reservations, a false outcome."""
    operations: int = 0
    """Answers that settled a question."""

    def acknowledged(self) -> list[Attempt]:
        """Those that made a reservation."""
        return [attempt for attempt in self.attempts.values() if attempt.reservation_id is not None]


def violations(
    history: History,
    *,
    shards: int,
    limits: Mapping[CounterName, int],
    counters: Mapping[CounterName, Mapping[str, Any]],
    events: list[dict[str, Any]],
    reservations: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """Every rule that is broken. `reservations` are the answers to a look at each acknowledged id."""
    yield from history.violations
    yield from _feed(history, events)
    yield from _reservations(history, reservations)
    yield from _parts(history, events, shards)
    yield from _certainly_held(history, limits)
    yield from _counters(history, limits, counters)


def _feed(history: History, events: list[dict[str, Any]]) -> Iterator[str]:
    made: defaultdict[str, list[str]] = defaultdict(list)
    released: Counter[str] = Counter()
    for event in events:
        if event["event"] in ("held", "confirmed_at_once"):
            made[event["data"]["order_ref"]].append(event["data"]["reservation_id"])
        elif event["event"] == "released":
            released[event["data"]["reservation_id"]] += 1
    for key in sorted(made.keys() - history.attempts.keys()):
        yield f"{key}: the feed tells of a reservation that nobody asked for: {made[key]}"
    for attempt in history.attempts.values():
        expected = [] if attempt.reservation_id is None else [attempt.reservation_id]
        if made[attempt.key] != expected:
            yield f"{attempt.key}: acknowledged {expected}, the feed tells {made[attempt.key]}"
    for attempt in history.acknowledged():
        times = released[attempt.reservation_id or ""]
        if times != (attempt.status == "released"):
            yield f"{attempt.key}: {attempt.status}, and released {times} times in the feed"


def _reservations(history: History, reservations: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for attempt in history.acknowledged():
        found = reservations.get(attempt.reservation_id or "")
        if found is None:
            yield f"{attempt.key}: reservation {attempt.reservation_id} is lost"
            continue
        lines = {(line["pool_id"], line["slot_id"]): line["quantity"] for line in found["lines"]}
        expires_at = found["expires_at"] if attempt.status == "held" else attempt.expires_at
        acknowledged = (attempt.status, attempt.lines, attempt.key, attempt.expires_at)
        if (found["status"], lines, found["order_ref"], expires_at) != acknowledged:
            yield f"{attempt.key}: acknowledged {acknowledged}, found {found}"


def _parts(history: History, events: list[dict[str, Any]], shards: int) -> Iterator[str]:
    """What each reservation takes beside its home, by the highest version that a shard has taken over."""
    latest: dict[tuple[str, int], tuple[int, dict[CounterName, int]]] = {}
    for event in events:
        data = event["data"]
        position = parse_position(event.get("position", ""))
        if event["event"] != "part_synced" or data["reservation_id"] is None or position is None:
            continue
        place = data["reservation_id"], position[0]
        version, taken = latest.get(place, (0, {}))
        if data["version"] > version:
            version, taken = data["version"], {}
        if data["version"] == version and data["status"] in ("held", "confirmed"):
            taken = taken | {(line["pool_id"], line["slot_id"]): line["quantity"] for line in data["lines"]}
        latest[place] = version, taken
    expected: defaultdict[tuple[str, int], dict[CounterName, int]] = defaultdict(dict)
    key_of = {}
    for attempt in history.acknowledged():
        number = attempt.reservation_id or ""
        key_of[number] = attempt.key
        if attempt.status != "released":
            for name, units in attempt.lines.items():
                shard = shard_of_counter(*name, shards)
                if shard != home_of(number, shards):
                    expected[number, shard][name] = units
    for number, shard in sorted(latest.keys() | expected.keys()):
        _, taken = latest.get((number, shard), (0, {}))
        if taken != expected[number, shard]:
            key = key_of.get(number, "nobody's key")
            yield f"{key}: {number} takes {taken} on shard {shard}, acknowledged {expected[number, shard]}"


def home_of(reservation: str, shards: int) -> int:
    """The shard that decides for a reservation."""
    number = parse_reservation_id(reservation)
    if number is None:
        raise ValueError(f"{reservation!r} is no reservation id")
    return shard_of_number(number, shards)


def _certainly_held(history: History, limits: Mapping[CounterName, int]) -> Iterator[str]:
    """Certainly held: from the acknowledgement until the first moment at which a step could have given it back."""
    steps: defaultdict[CounterName, list[tuple[float, int]]] = defaultdict(list)
    for attempt in history.acknowledged():
        for span in attempt.spans:
            for name, units in span.lines.items():
                steps[name].append((span.since, units))
                if span.until is not None:
                    steps[name].append((span.until, -units))
    for name, changes in steps.items():
        held = 0
        # At one instant releases count first: only what is certain may count against the engine.
        for at, units in sorted(changes):
            held += units
            if held > limits[name]:
                yield f"{name}: {held} units were certainly held at {at}, the limit is {limits[name]}"
                break


def _counters(
    history: History, limits: Mapping[CounterName, int], counters: Mapping[CounterName, Mapping[str, Any]]
) -> Iterator[str]:
    units: Counter[CounterName] = Counter()
    for attempt in history.acknowledged():
        if attempt.status != "released":
            units.update(attempt.lines)
    for name, limit in limits.items():
        counter = counters.get(name)
        if counter is None:
            yield f"{name}: the counter is lost"
        elif (counter["used"], counter["limit"]) != (units[name], limit):
            yield f"{name}: used {counter['used']} of {counter['limit']}, acknowledged {units[name]} of {limit}"
        elif counter["used"] > limit:
            yield f"{name}: used {counter['used']} of {limit}"
