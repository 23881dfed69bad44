"""A client for order services: `Client` blocks, `AsyncClient` runs on trio. Both end each call in an answer or in the truth.

    with Client("http://127.0.0.1:7411") as slotkeeper:
        held = slotkeeper.hold([("van-north", "2027-12-01T18:00-20:00", 1)], order_ref="SO-4711", ttl_seconds=600)
        slotkeeper.confirm(held.reservation_id)

Theory of operation
- The core is pure. A call is a value (`calls`, `listings`); `protocol.insist` is a generator that says what to do next (try,
  pause) and is told how it ended; `exchange.Exchange` turns bytes into an ending. The two faces (`blocking`, `on_trio`) own
  sockets and clocks and decide nothing.
- A key is made before the first send and goes with every try, so that the server does once what it is asked ten times. The
  key is on the answer and on every exception: who keeps it can go on later, in another process too.
- A try ends in one of four ways: answered, not connected, lost (the whole request may have arrived, or cannot have), or not
  understood. From these alone follows whether anything may have been done. What is done next stands in `protocol`.

Rules
- What is public is in `__all__` here. The modules of this package are not: import from `api.client`.
- Every wait and every size has a bound, named in `Settings`.

Not promised: TLS, redirects, cookies, proxies that close connections to end an answer; use of an `AsyncClient` in several
runs of trio; that a try that was lost does not arrive after the call has ended (its key keeps it from counting twice).
"""

from api.client.answers import (
    Alternative,
    Available,
    Counter,
    CounterPlan,
    CounterShort,
    CutoffRule,
    Event,
    Imported,
    Instant,
    Line,
    LineLike,
    Pool,
    Reservation,
    ShardStatus,
    Slot,
    Status,
)
from api.client.blocking import Client, Clock, Pages
from api.client.budget import RETRY_BUDGET, RetryBudget
from api.client.calls import IMPORT_DEADLINE_SECONDS, T_co
from api.client.errors import (
    CLASS_OF_CODE,
    AlreadyConfirmed,
    AlreadyFulfilled,
    AlreadyReleased,
    ExtensionCapReached,
    Forbidden,
    HoldExpired,
    HoldNotConfirmed,
    IdempotencyKeyReused,
    InsufficientCapacity,
    InvalidRequest,
    InvalidSlot,
    LinesNotHeld,
    NotExecuted,
    NotFound,
    OutcomeUnknown,
    PastCutoff,
    PlanConflict,
    PoolHasSlots,
    Refused,
    RequestTimeout,
    SlotClosed,
    SlotkeeperError,
    TooManyPools,
    UnknownPool,
    UnknownReservation,
    UnknownSlot,
)
from api.client.exchange import RECEIVE_BYTES
from api.client.keys import fresh_key
from api.client.listings import PAGE_SIZE, ItemT, ItemT_co, When
from api.client.on_trio import AsyncClient, AsyncClock, AsyncPages
from api.client.protocol import PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN, pause_seconds
from api.client.settings import ECHOED_CHARS_MAX, Settings
from api.client.statistics import Statistics

__all__ = [
    "CLASS_OF_CODE",
    "ECHOED_CHARS_MAX",
    "IMPORT_DEADLINE_SECONDS",
    "PAGE_SIZE",
    "PAUSE_SECONDS_MAX",
    "PAUSE_SECONDS_MIN",
    "RECEIVE_BYTES",
    "RETRY_BUDGET",
    "AlreadyConfirmed",
    "AlreadyFulfilled",
    "AlreadyReleased",
    "Alternative",
    "AsyncClient",
    "AsyncClock",
    "AsyncPages",
    "Available",
    "Client",
    "Clock",
    "Counter",
    "CounterPlan",
    "CounterShort",
    "CutoffRule",
    "Event",
    "ExtensionCapReached",
    "Forbidden",
    "HoldExpired",
    "HoldNotConfirmed",
    "IdempotencyKeyReused",
    "Imported",
    "Instant",
    "InsufficientCapacity",
    "InvalidRequest",
    "InvalidSlot",
    "ItemT",
    "ItemT_co",
    "Line",
    "LineLike",
    "LinesNotHeld",
    "NotExecuted",
    "NotFound",
    "OutcomeUnknown",
    "Pages",
    "PastCutoff",
    "PlanConflict",
    "Pool",
    "PoolHasSlots",
    "Refused",
    "RequestTimeout",
    "Reservation",
    "RetryBudget",
    "Settings",
    "ShardStatus",
    "Slot",
    "SlotClosed",
    "SlotkeeperError",
    "Statistics",
    "Status",
    "T_co",
    "TooManyPools",
    "UnknownPool",
    "UnknownReservation",
    "UnknownSlot",
    "When",
    "fresh_key",
    "pause_seconds",
]

for _name in __all__:
    # A class is shown, and pickled, under the name that it is imported by: which module it stands in can change.
    if isinstance(_public := globals()[_name], type):
        _public.__module__ = __name__
