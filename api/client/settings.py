"""The bounds of a client, and the names that it sends with its requests.

Rules
- Every wait and every size of a call has its bound here. Pauses have theirs in `protocol`, the deadline of an import stands
  in `calls`.
- What cannot be is refused when the settings are made, not when a call is.

Not promised: that the defaults fit a server far away; they are for one in the same data centre.
"""

from dataclasses import dataclass, replace

from api.client.header_text import checked

ECHOED_CHARS_MAX = 128
"""Longer names of a request are not given back by the server."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All bounds of a client."""

    deadline_seconds: float = 10.0
    """For one call: all its tries and pauses, and the wait for a free connection."""
    connect_seconds: float = 1.0
    """For one connection. Within a data centre it is there in a millisecond, or a packet was lost and sent again."""
    answer_seconds: float = 3.0
    """From the first byte sent to the last byte of the answer. The server itself answers within its deadline of a second."""
    answer_bytes_max: int = 16 * 1024 * 1024
    """Four times the largest page."""
    connections_max: int = 8
    """Open at once, used and idle together; so many calls run at the same time."""
    idle_seconds_max: float = 25.0
    """The server closes an idle connection after 30."""
    request_id: str | None = None
    """Sent as X-Request-Id with every try."""
    traceparent: str | None = None
    """Sent with every try (W3C Trace Context)."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        for name in ("deadline_seconds", "connect_seconds", "answer_seconds", "answer_bytes_max", "connections_max"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive")
        for name in ("request_id", "traceparent"):
            checked(name, getattr(self, name), ECHOED_CHARS_MAX)


def settings_with(
    settings: Settings, deadline_seconds: float | None, request_id: str | None, traceparent: str | None
) -> Settings:
    """Those that are given, in place of what was."""
    return replace(
        settings,
        deadline_seconds=settings.deadline_seconds if deadline_seconds is None else deadline_seconds,
        request_id=settings.request_id if request_id is None else request_id,
        traceparent=settings.traceparent if traceparent is None else traceparent,
    )
