"""A connection between two uses, and whether it is still of use.

Rules
- One that has something to read is of no use: it is its end, or an answer to nothing.

Not promised: that one that looks sound still is when the request arrives. That try is lost, and `protocol` repeats it.
"""

import select
from dataclasses import dataclass
from typing import Generic, TypeVar

SocketT_co = TypeVar("SocketT_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Kept(Generic[SocketT_co]):
    """A connection that waits for its next use."""

    socket: SocketT_co
    since: float


def is_stale(descriptor: int) -> bool:
    """Whether an idle connection has something to read: its end, or an answer to nothing. Either way it is of no use."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
