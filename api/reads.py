"""The reading calls: availability, slots, counters, pools and events. Answered from memory, or from the journal's end.

None of them asks a worker, with one exception: a row left half-written by a worker that was killed is asked for by its
number when there is somebody to ask.
"""

import base64
import binascii
import datetime as dt
from collections.abc import AsyncGenerator
from typing import NamedTuple

import msgspec
import orjson
import trio

from api import feed, views
from api.app import App, Parameter, Parameters, query, refuse
from api.http1 import Request, Response, StreamingResponse
from api.overview import Cursor, Page, Place, ShardNotPublishedError, TornPlace
from engine.catalogue_file import PoolShown
from engine.core import commands, outcomes
from engine.core.limits import QUANTITY_MAX
from readmodel.layout import TornRowError
from readmodel.reader import Row

PAGE_MAX = 5_000
PAGE_DEFAULT = 500
EVENTS_MAX = 1_000
FEED_WAIT_MS_MAX = 30_000
"""Below the time after which proxies usually give an answer up."""
FEED_LOOK_S = 0.02
"""How often a waiting consumer looks into shared memory: two microseconds each time."""
FEED_BEAT_S = 10.0
"""How often a stream without events shows that it is alive."""
EVENTS_DEFAULT = 100

_DATE = r"\d{4}-\d{2}-\d{2}"
# A space before the offset: that is what a plus sign means in a query where nobody encoded it.
_INSTANT = _DATE + r"(T\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+ -]\d{2}:\d{2}))?"

POOL_IDS = Parameter("pool_id", "Only these pools; may be given several times.", example="van-north", repeated=True)
CAPACITY_TYPE = Parameter("capacity_type", "Only pools of this capacity type.", example="logistics")
ZONE = Parameter("zone", "Only pools of this zone.", example="north")
FROM = Parameter(
    "from", "Only slots that start at or after this instant (RFC 3339) or date (UTC).", _INSTANT, "2026-12-01"
)
TO = Parameter("to", "Only slots that start before this instant (RFC 3339) or date (UTC).", _INSTANT, "2026-12-02")
QUANTITY = Parameter("quantity", "Only counters with so many units left.", integer=(1, QUANTITY_MAX), example="1")
MIN_POSITION = Parameter(
    "min_position", "Wait until this position is shown: a caller's own write.", r"\d{1,3}-\d{1,15}", "0-17"
)
LIMIT = Parameter("limit", f"Entries of a page, {PAGE_DEFAULT} if not given.", integer=(1, PAGE_MAX), example="100")
CURSOR = Parameter("cursor", "next_cursor of the page before.", r"[A-Za-z0-9_-]{1,400}")
SELECTION = (POOL_IDS, CAPACITY_TYPE, ZONE, FROM, TO)
AVAILABILITY_QUERY = (*SELECTION, QUANTITY, MIN_POSITION, LIMIT, CURSOR)
SLOTS_QUERY = (*SELECTION, LIMIT, CURSOR)
COUNTERS_QUERY = (*SELECTION, MIN_POSITION, LIMIT, CURSOR)
COUNTER_QUERY = (MIN_POSITION,)
EVENTS_QUERY = (
    Parameter("after", "next_cursor of the page before; without it the feed begins at its start.", r"[0-9._]{1,2000}"),
    Parameter("limit", f"Events of a page, {EVENTS_DEFAULT} if not given.", integer=(1, EVENTS_MAX), example="100"),
    Parameter(
        "wait_ms",
        "Where there is nothing yet, wait so long for the next event.",
        integer=(0, FEED_WAIT_MS_MAX),
        example="0",
    ),
    Parameter("event", "Only events of this name; may be given several times.", example="held", repeated=True),
)


class _Listing(NamedTuple):
    page: Page
    next_cursor: str | None
    now_ms: int
    as_of_ms: int


def _first(values: dict[str, list[str]], name: str) -> str | None:
    found = values.get(name)
    return None if found is None else found[0]


def _instant_ms(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        parsed = dt.datetime.fromisoformat(text.replace(" ", "+"))
    except ValueError:
        raise refuse(
            "invalid_request", f"{name} {text!r} is no instant: write 2026-12-01 or 2026-12-01T18:00Z"
        ) from None
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=dt.UTC)
    return int((parsed - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1))


def _encode_cursor(place: Place, pool_id: str) -> str:
    cursor = Cursor(pool_id, place.row.starts_at_ms, place.row.ends_at_ms)
    # orjson takes tuples, not their subclasses.
    return base64.urlsafe_b64encode(orjson.dumps(tuple(cursor))).rstrip(b"=").decode()


def _decode_cursor(text: str | None) -> Cursor | None:
    if text is None:
        return None
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return msgspec.convert(msgspec.json.decode(data), Cursor)
    except (msgspec.DecodeError, binascii.Error, ValueError):
        raise refuse("invalid_request", "cursor is not one that this system gave") from None


def _pools(app: App, values: dict[str, list[str]]) -> list[PoolShown]:
    """The pools that a query selects. A pool that is named and does not exist is an error, not an empty answer."""
    app.overview.refresh(now=True)  # who defined a pool finds it, whichever api process answers
    named = values.get("pool_id")
    if named is None:
        pools = list(app.overview.pools.values())
    else:
        pools = []
        for pool_id in dict.fromkeys(named):
            pool = app.overview.pool(pool_id)
            if pool is None:
                raise refuse("unknown_pool", f"There is no pool {pool_id!r}.")
            pools.append(pool)
    capacity_type, zone = _first(values, "capacity_type"), _first(values, "zone")
    return [
        pool
        for pool in pools
        if (capacity_type is None or pool.capacity_type == capacity_type) and (zone is None or pool.zone == zone)
    ]


async def _mended(app: App, torn: list[TornPlace]) -> list[Place]:
    """The rows that stayed torn, asked of their workers."""
    return [Place(place.shard, await _ask_for_row(app, place.shard, place.number)) for place in torn]


async def _ask_for_row(app: App, shard: int, number: int) -> Row:
    identity = app.overview.reader(shard).identity(number)
    reply = await app.ask(shard, commands.LookCounters([number]))
    if not isinstance(reply, outcomes.CounterValues):
        raise refuse("shard_unavailable", f"shard {shard} does not show this counter now")
    return Row(0, *reply.values[0], *identity)


async def _list(app: App, values: dict[str, list[str]], minimum: int) -> _Listing:
    """A page of counters with at least `minimum` units left (0: all)."""
    limit = int(_first(values, "limit") or PAGE_DEFAULT)
    after = _decode_cursor(_first(values, "cursor"))
    starts_from_ms = _instant_ms("from", _first(values, "from"))
    starts_to_ms = _instant_ms("to", _first(values, "to"))
    pools = _pools(app, values)
    try:
        await app.wait_for(_first(values, "min_position"))
        as_of_ms = app.overview.as_of_ms()
        page = app.overview.select(pools, starts_from_ms, starts_to_ms, after=after, limit=limit)
    except ShardNotPublishedError as error:
        raise refuse("shard_unavailable", str(error)) from None
    places = page.places
    if page.torn:
        places = places + await _mended(app, page.torn)
        places.sort(key=lambda place: (_pool_id(app, place), place.row.starts_at_ms, place.row.ends_at_ms))
    next_cursor = _encode_cursor(places[-1], _pool_id(app, places[-1])) if page.more else None
    now_ms = app.clock.now_ms()
    if minimum:
        places = [
            place
            for place in places
            if (left := views.numbers(place.row, now_ms)).status == "open" and left.available >= minimum
        ]
    return _Listing(Page(places, [], page.more), next_cursor, now_ms, as_of_ms)


def _pool_id(app: App, place: Place) -> str:
    return app.overview.pool_of_code[place.row.pool_code].pool_id


async def availability(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /v1/availability."""
    del parameters
    values = query(request, AVAILABILITY_QUERY)
    listing = await _list(app, values, int(_first(values, "quantity") or 0))
    pool_of_code = app.overview.pool_of_code
    counters = [
        views.available(pool_of_code[place.row.pool_code], place.shard, place.row, listing.now_ms)
        for place in listing.page.places
    ]
    positions = [f"{shard}-{app.overview.position(shard)}" for shard in range(len(app.shards))]
    answer = {
        "counters": counters,
        "next_cursor": listing.next_cursor,
        "as_of": views.instant(listing.as_of_ms),
        "positions": positions,
    }
    return Response(200, orjson.dumps(answer))


async def slots(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /v1/slots."""
    del parameters
    listing = await _list(app, query(request, SLOTS_QUERY), 0)
    pool_of_code = app.overview.pool_of_code
    answer = {
        "slots": [
            views.slot(pool_of_code[place.row.pool_code], place.row, listing.now_ms) for place in listing.page.places
        ],
        "next_cursor": listing.next_cursor,
        "as_of": views.instant(listing.as_of_ms),
    }
    return Response(200, orjson.dumps(answer), headers=((b"Cache-Control", b"public, max-age=1"),))


async def counters(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /v1/counters."""
    del parameters
    listing = await _list(app, query(request, COUNTERS_QUERY), 0)
    pool_of_code = app.overview.pool_of_code
    answer = {
        "counters": [
            views.counter(pool_of_code[place.row.pool_code], place.shard, place.row, listing.now_ms, listing.as_of_ms)
            for place in listing.page.places
        ],
        "next_cursor": listing.next_cursor,
        "as_of": views.instant(listing.as_of_ms),
    }
    return Response(200, orjson.dumps(answer))


async def counter(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /v1/pools/{pool_id}/slots/{slot_id}."""
    values = query(request, COUNTER_QUERY)
    app.overview.refresh(now=True)  # its version is compared with, by If-Match
    try:
        await app.wait_for(_first(values, "min_position"))
        view = await counter_view(app, parameters["pool_id"], parameters["slot_id"])
    except ShardNotPublishedError as error:
        raise refuse("shard_unavailable", str(error)) from None
    return Response(200, orjson.dumps(view), headers=((b"ETag", f'"{view["plan_version"]}"'.encode()),))


async def counter_view(app: App, pool_id: str, slot_id: str) -> views.Json:
    """One counter as it is shown. Raises Refusal, ShardNotPublishedError."""
    pool = app.overview.pool(pool_id)
    if pool is None:
        raise refuse("unknown_pool", f"There is no pool {pool_id!r}.")
    shard, number = app.overview.find(pool, slot_id)
    if number is None:
        raise refuse("unknown_slot", f"Pool {pool_id!r} has no slot {slot_id!r}.")
    as_of_ms = app.overview.as_of_ms([shard])
    try:
        row = app.overview.reader(shard).row(number)
    except TornRowError:
        row = await _ask_for_row(app, shard, number)
    return views.counter(pool, shard, row, app.clock.now_ms(), as_of_ms)


async def pool(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /v1/pools/{pool_id}."""
    query(request, ())
    app.overview.refresh(now=True)  # its version is compared with, by If-Match
    found = app.overview.pool(parameters["pool_id"])
    if found is None:
        raise refuse("unknown_pool", f"There is no pool {parameters['pool_id']!r}.")
    headers = ((b"ETag", f'"{found.version}"'.encode()),)
    return Response(200, orjson.dumps(views.pool(found)), headers=headers)


async def pools(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /v1/pools."""
    del parameters
    query(request, ())
    app.overview.refresh(now=True)
    shown = sorted(app.overview.pools.values(), key=lambda pool: pool.pool_id)
    answer = {"pools": [views.pool(pool) for pool in shown], "plan_version": app.overview.plan_version}
    return Response(200, orjson.dumps(answer))


async def events(app: App, request: Request, parameters: Parameters) -> Response | StreamingResponse:
    """GET /v1/events."""
    del parameters
    values = query(request, EVENTS_QUERY)
    after = _first(values, "after")
    if after is None and (last := request.headers.get(b"last-event-id")):
        after = last.decode("ascii", "replace")
    cursor = feed.start(len(app.shards)) if after is None else feed.parse_cursor(after, len(app.shards))
    if cursor is None:
        raise refuse("invalid_request", "after is not a cursor that this system gave")
    limit = int(_first(values, "limit") or EVENTS_DEFAULT)
    wanted = frozenset(values["event"]) if "event" in values else None
    if wanted is not None and not wanted <= feed.NAMES:
        raise refuse("invalid_request", f"event must be one of {', '.join(sorted(feed.NAMES))}")
    if b"text/event-stream" in request.headers.get(b"accept", b""):
        headers = ((b"Cache-Control", b"no-store"),)
        return StreamingResponse(
            _stream(app, cursor, wanted), 200, b"text/event-stream; charset=utf-8", headers, endless=True
        )
    wait_until_ms = app.clock.monotonic_ms() + int(_first(values, "wait_ms") or 0)
    try:
        page = await _page(app, cursor, limit, wanted)
        while not page.events and app.clock.monotonic_ms() < wait_until_ms and not app.stop.is_set():
            if not feed.news(page.cursor, app.overview):
                await trio.sleep(FEED_LOOK_S)
            else:
                page = await _page(app, page.cursor, limit, wanted)
    except ShardNotPublishedError as error:
        raise refuse("shard_unavailable", str(error)) from None
    answer = {"events": page.events, "next_cursor": feed.cursor_text(page.cursor)}
    return Response(200, orjson.dumps(answer))


async def _page(app: App, cursor: feed.FeedCursor, limit: int, wanted: frozenset[str] | None) -> feed.Page:
    found = await trio.to_thread.run_sync(feed.read, app.data, cursor, limit)
    return feed.show(found, cursor, app.overview, wanted)


async def _stream(app: App, cursor: feed.FeedCursor, wanted: frozenset[str] | None) -> AsyncGenerator[bytes, None]:
    """Server-sent events: each with its cursor as id, so that a browser that connects again goes on where it was."""
    beat_at = trio.current_time() + FEED_BEAT_S
    yield b"retry: 1000\n\n"
    while True:
        try:
            page = await _page(app, cursor, EVENTS_MAX, wanted) if feed.news(cursor, app.overview) else None
        except ShardNotPublishedError:
            page = None
        if page is not None:
            cursor = page.cursor
            for event in page.events:
                data = orjson.dumps(event).decode()
                yield f"id: {event['cursor']}\nevent: {event['event']}\ndata: {data}\n\n".encode()
                beat_at = trio.current_time() + FEED_BEAT_S
        elif trio.current_time() >= beat_at:
            yield b": still here\n\n"
            beat_at = trio.current_time() + FEED_BEAT_S
        else:
            await trio.sleep(FEED_LOOK_S)
