"""What each call sends, and how its answer is read. Shared by both faces: a function for each method, of its name.

Rules
- A call is a value: made without a connection, and the same for every try. Calls for pages are made by `listings`.
- What changes a reservation carries a key from the start, and its answer carries that key.
- What could mean another path, or cannot stand in a header line, is a ValueError before anything is sent.

Not promised: that the server takes it. Quantities, names and times are judged there.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from api.client.answers import Counter, CounterPlan, CutoffRule, Imported, Line, LineLike, Pool, Reservation, Status
from api.client.header_text import checked
from api.client.keys import fresh_key
from engine.core.limits import IDEMPOTENCY_KEY_CHARS_MAX

IMPORT_DEADLINE_SECONDS = 120.0
"""The server gives an import of 200,000 counters a minute; a second try must fit."""

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Call(Generic[T_co]):
    """What is asked, and how its answer is read."""

    method: str
    target: str
    decode: Callable[[bytes], T_co]
    """Raises msgspec.DecodeError."""
    body: bytes = b""
    key: str | None = None
    if_match: int | None = None
    deadline_seconds: float | None = None
    """Instead of that of the settings; one answer may then take as long."""

    @property
    def changes(self) -> bool:
        """Whether it can have an outcome."""
        return self.method != "GET"

    @property
    def is_repeatable(self) -> bool:
        """Whether doing it twice is as good as once."""
        return self.if_match is None


class _PoolsAnswer(msgspec.Struct, frozen=True):
    pools: tuple[Pool, ...]


_reservation = msgspec.json.Decoder(Reservation)
_pool = msgspec.json.Decoder(Pool)
_pools = msgspec.json.Decoder(_PoolsAnswer)
_counter = msgspec.json.Decoder(Counter)
_imported = msgspec.json.Decoder(Imported)
_status = msgspec.json.Decoder(Status)
_encode = msgspec.json.Encoder().encode


def _segment(name: str, text: str) -> str:
    """A part of a path. Raises ValueError for what could mean another path."""
    if text in ("", ".", "..") or "/" in text:
        raise ValueError(f"{name} {text!r} cannot be")
    return quote(text, safe=":")


def _line_members(lines: Iterable[LineLike]) -> list[Line]:
    return [line if isinstance(line, Line) else Line(*line) for line in lines]


def _keyed(target: str, body: Mapping[str, object], key: str | None) -> Call[Reservation]:
    """A call that changes a reservation. Raises ValueError for a key that cannot be sent."""
    key = fresh_key() if key is None else key
    checked("key", key, IDEMPOTENCY_KEY_CHARS_MAX)

    def decode(data: bytes) -> Reservation:
        return msgspec.structs.replace(_reservation.decode(data), key=key)

    return Call("POST", target, decode, _encode(body), key)


def _taking(
    lines: Iterable[LineLike], order_ref: str, channel: str, ttl_seconds: int | None, key: str | None
) -> Call[Reservation]:
    body: dict[str, object] = {"order_ref": order_ref, "channel": channel, "lines": _line_members(lines)}
    if ttl_seconds is not None:
        body["ttl_seconds"] = ttl_seconds
    return _keyed("/v1/reservations", body, key)


def _verb(reservation_id: str, verb: str, key: str | None, **body: object) -> Call[Reservation]:
    target = f"/v1/reservations/{_segment('reservation_id', reservation_id)}/{verb}"
    return _keyed(target, {name: value for name, value in body.items() if value is not None}, key)


# Reservations


def hold(
    lines: Iterable[LineLike], order_ref: str, channel: str, ttl_seconds: int, key: str | None
) -> Call[Reservation]:
    """Take units for a time."""
    return _taking(lines, order_ref, channel, ttl_seconds, key)


def reserve(lines: Iterable[LineLike], order_ref: str, channel: str, key: str | None) -> Call[Reservation]:
    """Take units, confirmed at once."""
    return _taking(lines, order_ref, channel, None, key)


def confirm(reservation_id: str, lines: Iterable[LineLike] | None, key: str | None) -> Call[Reservation]:
    """Make a hold permanent."""
    return _verb(reservation_id, "confirm", key, lines=None if lines is None else _line_members(lines))


def release(reservation_id: str, reason: str, key: str | None) -> Call[Reservation]:
    """Give the units back."""
    return _verb(reservation_id, "release", key, reason=reason)


def extend(reservation_id: str, ttl_seconds: int, key: str | None) -> Call[Reservation]:
    """Let a hold live longer."""
    return _verb(reservation_id, "extend", key, ttl_seconds=ttl_seconds)


def move(reservation_id: str, lines: Iterable[LineLike], key: str | None) -> Call[Reservation]:
    """Exchange all lines."""
    return _verb(reservation_id, "move", key, lines=_line_members(lines))


def fulfil(reservation_id: str, key: str | None) -> Call[Reservation]:
    """The delivery was made."""
    return _verb(reservation_id, "fulfil", key)


def reservation(reservation_id: str) -> Call[Reservation]:
    """The reservation as it is."""
    return Call("GET", f"/v1/reservations/{_segment('reservation_id', reservation_id)}", _reservation.decode)


# Counters and pools


def _counter_path(pool_id: str, slot_id: str) -> str:
    return f"{_pool_path(pool_id)}/slots/{_segment('slot_id', slot_id)}"


def _pool_path(pool_id: str) -> str:
    return f"/v1/pools/{_segment('pool_id', pool_id)}"


def counter(pool_id: str, slot_id: str, min_position: str | None) -> Call[Counter]:
    """One counter."""
    query = "" if min_position is None else "?" + urlencode({"min_position": min_position})
    return Call("GET", _counter_path(pool_id, slot_id) + query, _counter.decode)


def pools() -> Call[tuple[Pool, ...]]:
    """All pools."""
    return Call("GET", "/v1/pools", lambda data: _pools.decode(data).pools)


def pool(pool_id: str) -> Call[Pool]:
    """One pool."""
    return Call("GET", _pool_path(pool_id), _pool.decode)


def put_pool(pool_id: str, if_match: int | None, cutoff: CutoffRule | None, **body: str) -> Call[Pool]:
    """Define a pool or change it."""
    return Call("PUT", _pool_path(pool_id), _pool.decode, _encode({**body, "cutoff": cutoff}), if_match=if_match)


def put_counter(pool_id: str, slot_id: str, if_match: int | None, **body: int | bool | str) -> Call[Counter]:
    """Define a counter or change it."""
    return Call("PUT", _counter_path(pool_id, slot_id), _counter.decode, _encode(body), if_match=if_match)


def import_counters(counters: Iterable[CounterPlan], reason: str, deadline_seconds: float) -> Call[Imported]:
    """Define many counters."""
    body = _encode({"counters": list(counters), "reason": reason})
    return Call("POST", "/v1/counters:import", _imported.decode, body, deadline_seconds=deadline_seconds)


# Service


def status() -> Call[Status]:
    """How the system is doing."""
    return Call("GET", "/v1/status", _status.decode)
