"""Errors as RFC 9457 problem details, and the one table that maps outcomes and codes to HTTP.

Rules
- `code` is stable: clients may branch on it. Status, title and advice may improve.
- `outcome` is `not_executed` or `outcome_unknown`, and it is true.
- Whoever's fault it is, the text says what to do next.
- 503 carries Retry-After, spread over one to three seconds so that those turned away do not come back all at once.
"""

import itertools
from typing import NamedTuple

import orjson

from api.http1 import Response
from engine.core.outcomes import Outcome

PROBLEM_TYPE = b"application/problem+json"


class Code(NamedTuple):
    """What a stable code means."""

    status: int
    title: str
    advice: str


CODES: dict[str, Code] = {
    "insufficient_capacity": Code(
        409, "Not enough capacity is left", "See lines for what is left and alternatives for slots that fit."
    ),
    "slot_closed": Code(409, "The slot is closed", "Offer another slot: planners closed this one."),
    "past_cutoff": Code(409, "The slot's cut-off has passed", "Offer a later slot; cutoff_at is in every answer."),
    "hold_expired": Code(
        409,
        "The hold has expired",
        "Its units were given back. Make a new reservation; a late confirm works while units are still free.",
    ),
    "hold_not_confirmed": Code(409, "The reservation is still a hold", "Confirm it before you fulfil it."),
    "extension_cap_reached": Code(409, "The hold cannot live longer", "Confirm it, or let it go."),
    "already_confirmed": Code(409, "The reservation is confirmed already", "Nothing is left to do."),
    "already_released": Code(409, "The reservation was released", "Make a new reservation."),
    "already_fulfilled": Code(409, "The reservation was fulfilled", "Nothing is left to do."),
    "lines_not_held": Code(
        409, "A partial confirm can keep what is held or less", "Send lines within those of the hold, or use move."
    ),
    "idempotency_key_reused": Code(
        422, "The Idempotency-Key came before with another body", "Send a new key for a new request."
    ),
    "unknown_pool": Code(404, "There is no such pool", "Define it with PUT /v1/pools/{pool_id}."),
    "unknown_slot": Code(404, "The pool has no such slot", "Define it with PUT /v1/pools/{pool_id}/slots/{slot_id}."),
    "unknown_reservation": Code(
        404, "There is no such reservation", "Finished reservations are kept for a time, then forgotten."
    ),
    "plan_conflict": Code(412, "It was changed since you read it", "Read it again, then decide."),
    "pool_has_slots": Code(409, "The pool has slots that rest on this", "Define another pool."),
    "too_many_pools": Code(409, "There are as many pools as there can be", "Remove what is not needed."),
    "invalid_request": Code(400, "The request is not valid", "The detail says what and where."),
    "invalid_slot": Code(422, "The slot cannot be", "The detail says why."),
    "not_found": Code(404, "There is nothing here", "See /docs for what there is."),
    "method_not_allowed": Code(405, "The method does not work here", "See the Allow header and /docs."),
    "forbidden": Code(403, "This is not allowed", "The detail says why."),
    "unsupported_media_type": Code(415, "The body is not JSON", "Send it with Content-Type: application/json."),
    "overloaded": Code(503, "Too much work is waiting", "Try again after the time in Retry-After."),
    "shard_unavailable": Code(
        503, "The shard did not take the request in time", "Nothing was done. Try again after the time in Retry-After."
    ),
    "outcome_unknown": Code(
        503,
        "The answer was lost",
        "It may or may not have happened. Send the same request with the same Idempotency-Key: it takes effect once.",
    ),
}
"""Codes of routed requests. Those that arise before routing stand in `http1.PROBLEMS`."""

CODE_OF_OUTCOME: dict[Outcome, str] = {
    **{
        outcome: outcome.value
        for outcome in (
            Outcome.INSUFFICIENT_CAPACITY,
            Outcome.SLOT_CLOSED,
            Outcome.PAST_CUTOFF,
            Outcome.HOLD_EXPIRED,
            Outcome.HOLD_NOT_CONFIRMED,
            Outcome.EXTENSION_CAP_REACHED,
            Outcome.ALREADY_CONFIRMED,
            Outcome.ALREADY_RELEASED,
            Outcome.ALREADY_FULFILLED,
            Outcome.LINES_NOT_HELD,
            Outcome.IDEMPOTENCY_KEY_REUSED,
            Outcome.UNKNOWN_POOL,
            Outcome.UNKNOWN_SLOT,
            Outcome.UNKNOWN_RESERVATION,
            Outcome.PLAN_CONFLICT,
            Outcome.POOL_HAS_SLOTS,
            Outcome.TOO_MANY_POOLS,
            Outcome.INVALID_SLOT,
            Outcome.OVERLOADED,
        )
    },
    Outcome.DEADLINE_PASSED: "shard_unavailable",
    Outcome.SHARD_FULL: "shard_unavailable",
    Outcome.PARTICIPANT_SILENT: "shard_unavailable",
}

_retry_after_s = itertools.cycle((b"1", b"2", b"3"))


def problem(
    code: str,
    detail: str = "",
    *,
    outcome: str = "not_executed",
    headers: tuple[tuple[bytes, bytes], ...] = (),
    **members: object,
) -> Response:
    """The answer for a code. `detail` is for a person; `members` extend the object."""
    known = CODES[code]
    body: dict[str, object] = {
        "type": f"/problems/{code.replace('_', '-')}",
        "title": known.title,
        "status": known.status,
        "code": code,
        "outcome": outcome,
        "detail": detail or known.advice,
    }
    body.update(members)
    if known.status == 503:
        headers = (*headers, (b"Retry-After", next(_retry_after_s)))
    return Response(known.status, orjson.dumps(body), PROBLEM_TYPE, headers)
