"""What clients asked and heard while parts of the engine died, and what must be true of it whatever died.

A history holds one `Attempt` for each idempotency key, written by the client that used it, with times of one monotonic clock.
`violations` compares it with what the engine says when all is quiet: the feed, each reservation, each counter.

The rules, each of which yields a line that names the key or the counter
- no acknowledged reservation is lost, and it is in the state that was acknowledged last;
- one key makes one reservation: the feed tells it once, and all answers to a key name the same one;
- a refused key made none, and the feed tells of no reservation that nobody asked for;
- at no instant do the reservations that certainly hold units exceed a counter's limit;
- a counter's used units are the sum over acknowledged reservations that were not released.

Not checked here: that refusals were justified, and the journal itself; `slotkeeper verify` proves that from the inside.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

CounterName = tuple[str, str]
"""(pool_id, slot_id)"""


@dataclass
class Attempt:
    """One key: a reservation that was asked for, and what became of it."""

    key: str
    """Also the order_ref, so that the feed names it."""
    lines: dict[CounterName, int]
    reservation_id: str | None = None
    refused: bool = False
    status: str = ""
    """What was acknowledged last: held, confirmed, released."""
    acknowledged_at: float = 0.0
    release_asked_at: float | None = None


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
    limits: Mapping[CounterName, int],
    counters: Mapping[CounterName, Mapping[str, Any]],
    events: list[dict[str, Any]],
    reservations: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """Every rule that is broken. `reservations` are the answers to a look at each acknowledged id."""
    yield from history.violations
    yield from _feed(history, events)
    yield from _reservations(history, reservations)
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
        if (found["status"], lines, found["order_ref"]) != (attempt.status, attempt.lines, attempt.key):
            yield f"{attempt.key}: acknowledged {attempt.status} {attempt.lines}, found {found}"


def _certainly_held(history: History, limits: Mapping[CounterName, int]) -> Iterator[str]:
    """Certainly held: from the acknowledgement until the first moment at which a release could have taken effect."""
    steps: defaultdict[CounterName, list[tuple[float, int]]] = defaultdict(list)
    for attempt in history.acknowledged():
        for name, units in attempt.lines.items():
            steps[name].append((attempt.acknowledged_at, units))
            if attempt.release_asked_at is not None:
                steps[name].append((attempt.release_asked_at, -units))
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
