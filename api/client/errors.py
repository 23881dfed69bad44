"""How a call can fail, and what each code of the API becomes.

Rules
- A call ends in exactly one of three: NotExecuted, OutcomeUnknown, Refused. The key and the number of tries are on each.
- A code that is not in `CLASS_OF_CODE` is a refusal like any other: a newer server may have more codes than this client.

Not promised: the texts. They are for people; programs look at the class and at `code`.
"""

from collections.abc import Mapping

from api.client.answers import Alternative, CounterShort, Reservation


class SlotkeeperError(Exception):
    """A call that has no answer of the kind asked for. Exactly one of the three below."""

    def __init__(
        self, detail: str = "", *, code: str = "", key: str | None = None, tries: int = 0, maybe_executed: bool = False
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        """For a person."""
        self.code = code
        """The server's stable code; of the last try that had one, empty when none had."""
        self.key = key
        """The Idempotency-Key of every try. Ask again with it to go on; None for calls that have none."""
        self.tries = tries
        """How often the request was tried."""
        self.maybe_executed = maybe_executed
        """Whether some try may have been executed."""

    def __str__(self) -> str:
        """Code and detail."""
        return f"{self.code}: {self.detail}" if self.code else self.detail


class NotExecuted(SlotkeeperError):  # noqa: N818 - named for what is true
    """The deadline or the retry budget ended, and no try can have been executed: nothing was done."""


class OutcomeUnknown(SlotkeeperError):  # noqa: N818 - named for what is true
    """The deadline or the retry budget ended, and some try may have been executed. Its key makes asking again safe."""


class Refused(SlotkeeperError):  # noqa: N818 - named for what is true
    """The server looked at the request and said no. Codes that this client does not know are of this class itself."""

    def __init__(
        self,
        detail: str = "",
        *,
        code: str = "",
        key: str | None = None,
        tries: int = 0,
        maybe_executed: bool = False,
        status: int = 0,
        lines: tuple[CounterShort, ...] = (),
        alternatives: tuple[Alternative, ...] = (),
        reservation: Reservation | None = None,
        position: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(detail, code=code, key=key, tries=tries, maybe_executed=maybe_executed)
        self.status = status
        """Of HTTP."""
        self.lines = lines
        """The counters that stood in the way."""
        self.alternatives = alternatives
        """Slots that would have fitted."""
        self.reservation = reservation
        """The reservation as it is, where the refusal is about one."""
        self.position = position
        """Where in the log this was true."""
        self.retry_after_seconds = retry_after_seconds


class InsufficientCapacity(Refused):
    """Not enough units are left: see `lines` and `alternatives`."""


class SlotClosed(Refused):
    """Planners closed the slot."""


class PastCutoff(Refused):
    """The slot's last moment has passed."""


class HoldExpired(Refused):
    """The hold's time has passed and its units were given back."""


class HoldNotConfirmed(Refused):
    """A hold cannot be fulfilled."""


class ExtensionCapReached(Refused):
    """The hold has lived as long as the operator allows."""


class AlreadyConfirmed(Refused):
    """It is confirmed."""


class AlreadyReleased(Refused):
    """It was released."""


class AlreadyFulfilled(Refused):
    """It was fulfilled."""


class LinesNotHeld(Refused):
    """A partial confirm asked for more than is held."""


class IdempotencyKeyReused(Refused):
    """The key came before with another body."""


class UnknownPool(Refused):
    """There is no such pool."""


class UnknownSlot(Refused):
    """The pool has no such slot."""


class UnknownReservation(Refused):
    """There is no such reservation, or it ended so long ago that it was forgotten."""


class PlanConflict(Refused):
    """It was changed since you read it: If-Match did not match."""


class PoolHasSlots(Refused):
    """The pool has slots that rest on what was to be changed."""


class TooManyPools(Refused):
    """There are as many pools as there can be."""


class InvalidRequest(Refused):
    """The request is not one that the server takes, whatever its state."""


class InvalidSlot(InvalidRequest):
    """The slot cannot be."""


class NotFound(InvalidRequest):
    """The server has no such operation: another version, or not a Slotkeeper."""


class Forbidden(Refused):
    """It is not allowed."""


class RequestTimeout(Refused):
    """The server did not get the whole request in time. Nothing was done."""


CLASS_OF_CODE: Mapping[str, type[SlotkeeperError]] = {
    "insufficient_capacity": InsufficientCapacity,
    "slot_closed": SlotClosed,
    "past_cutoff": PastCutoff,
    "hold_expired": HoldExpired,
    "hold_not_confirmed": HoldNotConfirmed,
    "extension_cap_reached": ExtensionCapReached,
    "already_confirmed": AlreadyConfirmed,
    "already_released": AlreadyReleased,
    "already_fulfilled": AlreadyFulfilled,
    "lines_not_held": LinesNotHeld,
    "idempotency_key_reused": IdempotencyKeyReused,
    "unknown_pool": UnknownPool,
    "unknown_slot": UnknownSlot,
    "unknown_reservation": UnknownReservation,
    "plan_conflict": PlanConflict,
    "pool_has_slots": PoolHasSlots,
    "too_many_pools": TooManyPools,
    "invalid_request": InvalidRequest,
    "invalid_slot": InvalidSlot,
    "not_found": NotFound,
    "method_not_allowed": NotFound,
    "forbidden": Forbidden,
    "unsupported_media_type": InvalidRequest,
    # Those below are retried; when the deadline ends, they are this.
    "overloaded": NotExecuted,
    "shard_unavailable": NotExecuted,
    "outcome_unknown": OutcomeUnknown,
    "internal_error": OutcomeUnknown,
    # Refused before routing.
    "length_conflict": InvalidRequest,
    "request_timeout": RequestTimeout,
    "body_too_large": InvalidRequest,
    "uri_too_long": InvalidRequest,
    "expectation_failed": InvalidRequest,
    "headers_too_large": InvalidRequest,
    "method_not_implemented": InvalidRequest,
    "version_not_supported": InvalidRequest,
}
"""What each code of the API becomes."""
