"""What a client has met, in numbers.

Rules
- Counted since the client was made; its views count with it.

Not promised: how long calls took, and how each of them ended.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counted since a client was made; its views count with it."""

    calls: int
    """Each counted once, however often it was tried. A page of a listing is a call."""
    tries: int
    """Requests that were sent, or were to be."""
    retries: int
    """Tries after a pause."""
    stale: int
    """Tries repeated at once, because a kept connection had been closed."""
    budget_spent: int
    """Calls that ended because there was no retry left."""
    connections: int
    """Connections made."""
    connections_idle: int
    """Open now, and not in use."""


def statistics_of(tally: Mapping[str, int], idle: int) -> Statistics:
    return Statistics(
        calls=tally.get("calls", 0),
        tries=tally.get("tries", 0),
        retries=tally.get("retries", 0),
        stale=tally.get("stale", 0),
        budget_spent=tally.get("budget_spent", 0),
        connections=tally.get("connections", 0),
        connections_idle=idle,
    )
