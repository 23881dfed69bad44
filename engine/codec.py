"""Events to journal bodies and back.

A body is a JSON array of the events of one group commit; each event is an array that opens with its name. JSON, because an
operator with nothing but the sqlite3 shell must be able to read a journal ten years from now.

Rules
- Every row carries its schema version. What is written is always `events.SCHEMA`; what is read is brought up to it by the
  upcasters here, one for each step; a version from the future is refused.
- A body that does not decode is a `JournalCorruptError`: the hash chain held, so a bug or another program wrote it.
"""

from collections.abc import Callable

import msgspec

from engine.core.events import SCHEMA, PlannerEvent, ShardEvent
from engine.ports import JournalCorruptError, JournalRow

UPCASTERS: dict[int, Callable[[bytes], bytes]] = {}
"""From schema version n to a body of version n + 1. Empty while there has been one version only."""

_encoder = msgspec.json.Encoder()
_shard_decoder = msgspec.json.Decoder(list[ShardEvent])
_planner_decoder = msgspec.json.Decoder(list[PlannerEvent])


def encode(events: list[ShardEvent] | list[PlannerEvent]) -> bytes:
    """The body of one row."""
    return _encoder.encode(events)


def _upcast(row: JournalRow) -> bytes:
    body = row.body
    if row.schema > SCHEMA:
        raise JournalCorruptError(
            f"the row at {row.seq} has event schema {row.schema}, this version reads up to {SCHEMA}: "
            "run a version of slotkeeper at least as new as the one that wrote it"
        )
    for version in range(row.schema, SCHEMA):
        if version not in UPCASTERS:
            raise JournalCorruptError(f"the row at {row.seq} has event schema {row.schema}, which there never was")
        body = UPCASTERS[version](body)
    return body


def decode_shard(row: JournalRow) -> list[ShardEvent]:
    """The events of a shard's row. Raises JournalCorruptError."""
    try:
        events = _shard_decoder.decode(_upcast(row))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _undecodable(row, error) from error
    _check_count(row, len(events))
    return events


def decode_planner(row: JournalRow) -> list[PlannerEvent]:
    """The events of a planner's row. Raises JournalCorruptError."""
    try:
        events = _planner_decoder.decode(_upcast(row))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _undecodable(row, error) from error
    _check_count(row, len(events))
    return events


def _undecodable(row: JournalRow, error: Exception) -> JournalCorruptError:
    return JournalCorruptError(f"the row at {row.seq} holds no events this version knows: {error}")


def _check_count(row: JournalRow, count: int) -> None:
    if count != row.count:
        raise JournalCorruptError(f"the row at {row.seq} says it has {row.count} events and has {count}")
