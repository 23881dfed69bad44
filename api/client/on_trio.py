"""The face for trio: `AsyncClient`, for the tasks of one run.

Rules
- As in `blocking`, with tasks for threads. Tasks change places only at an await, so nothing here needs a lock.
- A call that is cancelled closes its connection, since its answer may still come.

Not promised: use in several runs of trio, or from threads.
"""

import copy
import datetime as dt
import random
from collections import Counter as Tally
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Generic, Protocol, Self

import trio

from api.client import calls, listings
from api.client.answers import (
    Available,
    Counter,
    CounterPlan,
    CutoffRule,
    Event,
    Imported,
    LineLike,
    Pool,
    Reservation,
    Slot,
    Status,
)
from api.client.budget import RETRY_BUDGET, RetryBudget
from api.client.calls import Call, T_co
from api.client.exchange import RECEIVE_BYTES, Address, Answered, Ending, Exchange, NotConnected
from api.client.idle import Kept, is_stale
from api.client.listings import PAGE_SIZE, ItemT, Page, Walk, When
from api.client.protocol import Try, insist
from api.client.settings import Settings, settings_with
from api.client.statistics import Statistics, statistics_of


class AsyncClock(Protocol):
    """Time for `AsyncClient`, in seconds."""

    def now(self) -> float:
        """Never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class _TrioClock:
    def now(self) -> float:
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class _AsyncConnections:
    """The connections of a trio client: as `blocking._Connections`, for the tasks of one run."""

    def __init__(self, address: Address, settings: Settings, clock: AsyncClock) -> None:
        self._address = address
        self._settings = settings
        self._clock = clock
        self._idle: list[Kept[trio.socket.SocketType]] = []
        self._free = trio.Semaphore(settings.connections_max, max_value=settings.connections_max)
        self._tally: Tally[str] = Tally()
        self._is_closed = False

    def count(self, name: str) -> None:
        """One more of these."""
        self._tally[name] += 1

    def statistics(self) -> Statistics:
        """How it is doing."""
        return statistics_of(self._tally, len(self._idle))

    async def attempt(self, step: Try) -> Ending:
        """Try once."""
        acquired = False
        with trio.move_on_after(max(0.0, step.until - self._clock.now())):
            await self._free.acquire()
            acquired = True
        if not acquired:
            return NotConnected(f"all {self._settings.connections_max} connections were in use")
        try:
            return await self._attempt(step)
        finally:
            self._free.release()

    async def _attempt(self, step: Try) -> Ending:
        connection = self._take(fresh=step.fresh)
        reused = connection is not None
        if connection is None:
            seconds = min(self._settings.connect_seconds, step.until - self._clock.now())
            try:
                with trio.fail_after(max(seconds, 0.001)):
                    connection = (await trio.open_tcp_stream(self._address.host, self._address.port)).socket
            except trio.TooSlowError:
                return NotConnected("no connection: timed out")
            except OSError as error:
                return NotConnected(f"no connection: {error}")
            self.count("connections")
        keep = False
        try:
            exchange = Exchange(step.request, reused=reused, answer_bytes_max=self._settings.answer_bytes_max)
            ending = await self._exchange(connection, exchange, step)
            keep = isinstance(ending, Answered) and ending.keep_alive
            return ending
        finally:
            # A call that was cancelled closes, too: its answer may still come.
            if keep and not self._is_closed:
                self._idle.append(Kept(connection, self._clock.now()))
            else:
                connection.close()

    async def _exchange(self, connection: trio.socket.SocketType, exchange: Exchange, step: Try) -> Ending:
        seconds = min(step.until - self._clock.now(), step.answer_seconds)
        try:
            with trio.fail_after(max(seconds, 0.001)):
                try:
                    while exchange.unsent:
                        exchange.sent(await connection.send(exchange.unsent))
                except ConnectionError:
                    pass  # as in the blocking face
                while True:
                    ending = exchange.received(await connection.recv(RECEIVE_BYTES))
                    if ending is not None:
                        return ending
        except trio.TooSlowError:
            return exchange.timed_out()
        except OSError as error:
            return exchange.ended(str(error))

    def _take(self, *, fresh: bool) -> trio.socket.SocketType | None:
        """As `blocking._Connections._take`."""
        if self._is_closed:
            raise RuntimeError("the client is closed")
        while self._idle:
            kept = self._idle.pop()
            old = self._clock.now() - kept.since > self._settings.idle_seconds_max
            if not (fresh or old or is_stale(kept.socket.fileno())):
                return kept.socket
            kept.socket.close()
            if fresh:
                break
        return None

    def close(self) -> None:
        """Close what is idle; what is in use closes itself."""
        self._is_closed = True
        for kept in self._idle:
            kept.socket.close()
        self._idle = []


class AsyncPages(Generic[ItemT]):
    """As `Pages`, for `async for`."""

    def __init__(self, run: Callable[[Call[Page[ItemT]]], Awaitable[Page[ItemT]]], walk: Walk[ItemT]) -> None:
        self._run = run
        self._walk = walk

    @property
    def cursor(self) -> str | None:
        """As `Pages.cursor`."""
        return self._walk.cursor

    @property
    def as_of(self) -> dt.datetime | None:
        """As `Pages.as_of`."""
        return self._walk.as_of

    def __aiter__(self) -> AsyncIterator[ItemT]:
        """Itself."""
        return self

    async def __anext__(self) -> ItemT:
        """The next item. Raises SlotkeeperError, and goes on when asked again."""
        while (item := self._walk.item()) is None:
            call = self._walk.wanted()
            if call is None:
                raise StopAsyncIteration
            self._walk.turn(await self._run(call))
        return item


class AsyncClient:
    """The face for trio: the methods of `Client`, for the tasks of one run of trio.

    A call that is cancelled has no answer and raises no error of ours: give it a `key` of your own where you cancel calls.
    """

    def __init__(
        self,
        url: str,
        settings: Settings = Settings(),  # noqa: B008 - it is frozen
        *,
        budget: RetryBudget = RETRY_BUDGET,
        chance: Callable[[], float] = random.random,
        clock: AsyncClock | None = None,
    ) -> None:
        """As `Client`."""
        self._address = Address.of(url)
        self._settings = settings
        self._budget = budget
        self._chance = chance
        self._clock = clock or _TrioClock()
        self._connections = _AsyncConnections(self._address, settings, self._clock)

    def with_options(
        self, *, deadline_seconds: float | None = None, request_id: str | None = None, traceparent: str | None = None
    ) -> Self:
        """As `Client.with_options`."""
        view = copy.copy(self)
        view._settings = settings_with(self._settings, deadline_seconds, request_id, traceparent)  # noqa: SLF001 - a copy of ours
        return view

    def statistics(self) -> Statistics:
        """What it has met."""
        return self._connections.statistics()

    def close(self) -> None:
        """Close all connections. Calls that are running end as they would."""
        self._connections.close()

    async def __aenter__(self) -> Self:
        """Itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        self.close()

    async def _run(self, call: Call[T_co]) -> T_co:
        connections = self._connections
        steps = insist(
            call, self._settings, self._address, self._budget, self._clock.now, self._chance, connections.count
        )
        ending: Ending | None = None
        while True:
            try:
                step = steps.send(ending)
            except StopIteration as done:
                answer: T_co = done.value
                return answer
            if isinstance(step, Try):
                ending = await connections.attempt(step)
            else:
                await self._clock.sleep(step.seconds)
                ending = None

    # Reservations

    async def hold(
        self,
        lines: Iterable[LineLike],
        *,
        order_ref: str = "",
        channel: str = "",
        ttl_seconds: int,
        key: str | None = None,
    ) -> Reservation:
        """As `Client.hold`."""
        return await self._run(calls.hold(lines, order_ref, channel, ttl_seconds, key))

    async def reserve(
        self,
        lines: Iterable[LineLike],
        *,
        order_ref: str = "",
        channel: str = "",
        key: str | None = None,
    ) -> Reservation:
        """As `Client.reserve`."""
        return await self._run(calls.reserve(lines, order_ref, channel, key))

    async def confirm(
        self, reservation_id: str, lines: Iterable[LineLike] | None = None, *, key: str | None = None
    ) -> Reservation:
        """As `Client.confirm`."""
        return await self._run(calls.confirm(reservation_id, lines, key))

    async def release(self, reservation_id: str, *, reason: str = "", key: str | None = None) -> Reservation:
        """As `Client.release`."""
        return await self._run(calls.release(reservation_id, reason, key))

    async def extend(self, reservation_id: str, ttl_seconds: int, *, key: str | None = None) -> Reservation:
        """As `Client.extend`."""
        return await self._run(calls.extend(reservation_id, ttl_seconds, key))

    async def move(self, reservation_id: str, lines: Iterable[LineLike], *, key: str | None = None) -> Reservation:
        """As `Client.move`."""
        return await self._run(calls.move(reservation_id, lines, key))

    async def fulfil(self, reservation_id: str, *, key: str | None = None) -> Reservation:
        """As `Client.fulfil`."""
        return await self._run(calls.fulfil(reservation_id, key))

    async def reservation(self, reservation_id: str) -> Reservation:
        """As `Client.reservation`."""
        return await self._run(calls.reservation(reservation_id))

    # What is left

    def availability(
        self,
        *,
        pool_id: str | Sequence[str] | None = None,
        capacity_type: str | None = None,
        zone: str | None = None,
        starts_from: When | None = None,
        starts_to: When | None = None,
        quantity: int | None = None,
        min_position: str | None = None,
        page_size: int = PAGE_SIZE,
    ) -> AsyncPages[Available]:
        """As `Client.availability`."""
        return AsyncPages(
            self._run,
            listings.availability(
                pool_id=pool_id,
                capacity_type=capacity_type,
                zone=zone,
                starts_from=starts_from,
                starts_to=starts_to,
                quantity=quantity,
                min_position=min_position,
                page_size=page_size,
            ),
        )

    def slots(
        self,
        *,
        pool_id: str | Sequence[str] | None = None,
        capacity_type: str | None = None,
        zone: str | None = None,
        starts_from: When | None = None,
        starts_to: When | None = None,
        page_size: int = PAGE_SIZE,
    ) -> AsyncPages[Slot]:
        """As `Client.slots`."""
        return AsyncPages(
            self._run,
            listings.slots(
                pool_id=pool_id,
                capacity_type=capacity_type,
                zone=zone,
                starts_from=starts_from,
                starts_to=starts_to,
                page_size=page_size,
            ),
        )

    def counters(
        self,
        *,
        pool_id: str | Sequence[str] | None = None,
        capacity_type: str | None = None,
        zone: str | None = None,
        starts_from: When | None = None,
        starts_to: When | None = None,
        min_position: str | None = None,
        page_size: int = PAGE_SIZE,
    ) -> AsyncPages[Counter]:
        """As `Client.counters`."""
        return AsyncPages(
            self._run,
            listings.counters(
                pool_id=pool_id,
                capacity_type=capacity_type,
                zone=zone,
                starts_from=starts_from,
                starts_to=starts_to,
                min_position=min_position,
                page_size=page_size,
            ),
        )

    async def counter(self, pool_id: str, slot_id: str, *, min_position: str | None = None) -> Counter:
        """As `Client.counter`."""
        return await self._run(calls.counter(pool_id, slot_id, min_position))

    # Planning

    async def pools(self) -> tuple[Pool, ...]:
        """As `Client.pools`."""
        return await self._run(calls.pools())

    async def pool(self, pool_id: str) -> Pool:
        """As `Client.pool`."""
        return await self._run(calls.pool(pool_id))

    async def put_pool(
        self,
        pool_id: str,
        *,
        capacity_type: str,
        unit: str,
        time_zone: str,
        zone: str = "",
        cutoff: CutoffRule | None = None,
        reason: str = "",
        if_match: int | None = None,
    ) -> Pool:
        """As `Client.put_pool`."""
        return await self._run(
            calls.put_pool(
                pool_id,
                if_match,
                cutoff,
                capacity_type=capacity_type,
                unit=unit,
                time_zone=time_zone,
                zone=zone,
                reason=reason,
            )
        )

    async def put_counter(
        self,
        pool_id: str,
        slot_id: str,
        *,
        base: int,
        overbook: int = 0,
        buffer: int = 0,
        closed: bool = False,
        reason: str = "",
        if_match: int | None = None,
    ) -> Counter:
        """As `Client.put_counter`."""
        return await self._run(
            calls.put_counter(
                pool_id,
                slot_id,
                if_match,
                base=base,
                overbook=overbook,
                buffer=buffer,
                closed=closed,
                reason=reason,
            )
        )

    async def import_counters(
        self,
        counters: Iterable[CounterPlan],
        *,
        reason: str = "",
        deadline_seconds: float = calls.IMPORT_DEADLINE_SECONDS,
    ) -> Imported:
        """As `Client.import_counters`."""
        return await self._run(calls.import_counters(counters, reason, deadline_seconds))

    # Feed and service

    def events(self, after: str | None = None, *, page_size: int = PAGE_SIZE) -> AsyncPages[Event]:
        """As `Client.events`."""
        return AsyncPages(self._run, listings.events(after, page_size))

    async def status(self) -> Status:
        """As `Client.status`."""
        return await self._run(calls.status())
