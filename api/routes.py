"""The route table: every operation of the API, once. Serving, checking and OpenAPI all read it."""

from typing import Any

from api import messages, meta, planning, reads, reservations
from api.app import Route
from api.openapi import IF_MATCH, KEY

_LINES = [{"pool_id": "van-north", "slot_id": "2026-12-01T18:00-20:00", "quantity": 1}]
_SHARD = ("shard_unavailable", "outcome_unknown")
_LINE_CODES = ("unknown_pool", "unknown_slot")
_NO_ROOM = ("insufficient_capacity", "slot_closed", "past_cutoff")


def _verb(name: str, handler: Any, summary: str, request: Any, codes: tuple[str, ...], example: Any) -> Route:
    return Route(
        "POST",
        f"/v1/reservations/{{reservation_id}}/{name}",
        handler,
        summary,
        "reservations",
        request=request,
        request_optional=request not in (messages.ExtendRequest, messages.MoveRequest),
        answers={200: messages.ReservationAnswer},
        codes=("unknown_reservation", *codes, *_SHARD),
        headers=(KEY,),
        example=example,
    )


ROUTES: tuple[Route, ...] = (
    Route(
        "POST",
        "/v1/reservations",
        reservations.create,
        "Take units of one or several counters, as a hold or confirmed at once",
        "reservations",
        request=messages.ReservationRequest,
        answers={201: messages.ReservationAnswer, 200: messages.ReservationAnswer},
        codes=(*_NO_ROOM, *_LINE_CODES, "idempotency_key_reused", *_SHARD),
        keyed=True,
        example={"order_ref": "SO-4711", "channel": "web", "ttl_seconds": 600, "lines": _LINES},
    ),
    Route(
        "GET",
        "/v1/reservations/{reservation_id}",
        reservations.look,
        "Read a reservation",
        "reservations",
        answers={200: messages.ReservationAnswer},
        codes=("unknown_reservation", "shard_unavailable"),
    ),
    _verb(
        "confirm",
        reservations.confirm,
        "Make a hold permanent, wholly or in part",
        messages.ConfirmRequest,
        (
            *_NO_ROOM,
            "unknown_pool",
            "unknown_slot",
            "lines_not_held",
            "hold_expired",
            "already_confirmed",
            "already_released",
            "already_fulfilled",
        ),
        {},
    ),
    _verb(
        "release",
        reservations.release,
        "Give the units back",
        messages.ReleaseRequest,
        ("hold_expired", "already_released", "already_fulfilled"),
        {"reason": "the customer cancelled"},
    ),
    _verb(
        "extend",
        reservations.extend,
        "Let a hold live longer",
        messages.ExtendRequest,
        ("extension_cap_reached", "hold_expired", "already_confirmed", "already_released", "already_fulfilled"),
        {"ttl_seconds": 600},
    ),
    _verb(
        "move",
        reservations.move,
        "Exchange all lines in one step",
        messages.MoveRequest,
        (*_NO_ROOM, *_LINE_CODES, "hold_expired", "already_released", "already_fulfilled"),
        {"lines": _LINES},
    ),
    _verb(
        "fulfil",
        reservations.fulfil,
        "The delivery was made",
        messages.FulfilRequest,
        ("hold_not_confirmed", "hold_expired", "already_released", "already_fulfilled"),
        {},
    ),
    Route(
        "GET",
        "/v1/availability",
        reads.availability,
        "What is left, slot by slot",
        "overview",
        answers={200: messages.AvailabilityAnswer},
        codes=("unknown_pool", "shard_unavailable"),
        query=reads.AVAILABILITY_QUERY,
    ),
    Route(
        "GET",
        "/v1/slots",
        reads.slots,
        "Slots for shoppers: open or not, no numbers",
        "overview",
        answers={200: messages.SlotsAnswer},
        codes=("unknown_pool", "shard_unavailable"),
        query=reads.SLOTS_QUERY,
    ),
    Route(
        "GET",
        "/v1/counters",
        reads.counters,
        "Everything about counters, for planners",
        "overview",
        answers={200: messages.CountersAnswer},
        codes=("unknown_pool", "shard_unavailable"),
        query=reads.COUNTERS_QUERY,
    ),
    Route(
        "GET",
        "/v1/pools/{pool_id}/slots/{slot_id}",
        reads.counter,
        "One counter",
        "overview",
        answers={200: messages.CounterAnswer},
        codes=("unknown_pool", "unknown_slot", "shard_unavailable"),
        query=reads.COUNTER_QUERY,
    ),
    Route(
        "PUT",
        "/v1/pools/{pool_id}/slots/{slot_id}",
        planning.put_counter,
        "Define a counter or change it",
        "planning",
        request=messages.CounterRequest,
        answers={201: messages.CounterAnswer, 200: messages.CounterAnswer},
        codes=("unknown_pool", "invalid_slot", "plan_conflict", *_SHARD),
        headers=(IF_MATCH,),
        example={"base": 40, "overbook": 2, "buffer": 1, "reason": "third van"},
    ),
    Route(
        "POST",
        "/v1/counters:import",
        planning.import_counters,
        "Define many counters, all or nothing",
        "planning",
        request=messages.ImportRequest,
        answers={200: messages.ImportAnswer},
        codes=("unknown_pool", "invalid_slot", *_SHARD),
        example={
            "counters": [{"pool_id": "van-north", "slot_id": "2026-12-01T18:00-20:00", "base": 40}],
            "reason": "December",
        },
    ),
    Route(
        "GET",
        "/v1/pools",
        reads.pools,
        "All pools",
        "planning",
        answers={200: messages.PoolsAnswer},
    ),
    Route(
        "GET",
        "/v1/pools/{pool_id}",
        reads.pool,
        "One pool",
        "planning",
        answers={200: messages.PoolAnswer},
        codes=("unknown_pool",),
    ),
    Route(
        "PUT",
        "/v1/pools/{pool_id}",
        planning.put_pool,
        "Define a pool or change it",
        "planning",
        request=messages.PoolRequest,
        answers={201: messages.PoolAnswer, 200: messages.PoolAnswer},
        codes=("invalid_slot", "pool_has_slots", "too_many_pools", "plan_conflict", *_SHARD),
        headers=(IF_MATCH,),
        example={
            "capacity_type": "logistics",
            "unit": "stop",
            "zone": "north",
            "time_zone": "Europe/Berlin",
            "cutoff": {"minutes_before": 90},
        },
    ),
    Route(
        "GET",
        "/v1/events",
        reads.events,
        "The numbered feed of everything that happened",
        "feed",
        answers={200: messages.EventsAnswer},
        codes=("shard_unavailable",),
        query=reads.EVENTS_QUERY,
    ),
    Route(
        "GET",
        "/v1/status",
        meta.status,
        "How the system is doing, shard by shard",
        "service",
        answers={200: messages.StatusAnswer},
    ),
)
"""The operations that OpenAPI describes."""

PLAIN_ROUTES: tuple[Route, ...] = (
    Route("GET", "/", meta.root, "To the documentation", "service"),
    Route("GET", "/livez", meta.livez, "This process answers", "service"),
    Route("GET", "/readyz", meta.readyz, "Every shard takes reservations", "service"),
    Route("GET", "/openapi.json", meta.openapi, "This document", "service"),
    Route("GET", "/docs", meta.docs, "The API for people", "service"),
    Route("GET", "/page/{name}", meta.asset, "Files of the page", "service"),
    Route("GET", "/problems/{problem}", meta.problem, "What a problem's type means", "service"),
)
"""What is served besides."""
