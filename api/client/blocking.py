"""The face that blocks: `Client`, for threads.

Rules
- It owns sockets, locks and the clock, and does what `protocol` says.
- At most `connections_max` connections, used and idle together. A call that finds none free waits for one, within its
  deadline.
- A connection is kept only after a whole answer over it that allows so.

Not promised: that calls of several threads get their turn in the order they came.
"""

import copy
import datetime as dt
import random
import socket
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, Self

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
from api.client.forks import forked
from api.client.idle import Kept, is_stale
from api.client.listings import PAGE_SIZE, ItemT, Page, Walk, When
from api.client.protocol import Try, insist
from api.client.settings import Settings, settings_with
from api.client.statistics import Statistics, statistics_of


class Clock(Protocol):
    """Time for `Client`, in seconds."""

    def now(self) -> float:
        """Never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class _MonotonicClock:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class _Connections:
    """The connections of a blocking client: at most `connections_max`, used and idle together. Safe for threads."""

    def __init__(self, address: Address, settings: Settings, clock: Clock) -> None:
        self._address = address
        self._settings = settings
        self._clock = clock
        self._idle: list[Kept[socket.socket]] = []
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(settings.connections_max)
        self._tally: Tally[str] = Tally()
        self._is_closed = False
        forked.add(self)

    def count(self, name: str) -> None:
        """One more of these."""
        with self._lock:
            self._tally[name] += 1

    def statistics(self) -> Statistics:
        """How it is doing."""
        with self._lock:
            return statistics_of(self._tally, len(self._idle))

    def attempt(self, step: Try) -> Ending:
        """Try once."""
        if not self._free.acquire(timeout=max(0.0, step.until - self._clock.now())):
            return NotConnected(f"all {self._settings.connections_max} connections were in use")
        try:
            return self._attempt(step)
        finally:
            self._free.release()

    def _attempt(self, step: Try) -> Ending:
        connection = self._take(fresh=step.fresh)
        reused = connection is not None
        if connection is None:
            seconds = min(self._settings.connect_seconds, step.until - self._clock.now())
            try:
                connection = socket.create_connection((self._address.host, self._address.port), max(seconds, 0.001))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                return NotConnected(f"no connection: {error}")
            self.count("connections")
        keep = False
        try:
            exchange = Exchange(step.request, reused=reused, answer_bytes_max=self._settings.answer_bytes_max)
            ending = self._exchange(connection, exchange, step)
            keep = isinstance(ending, Answered) and ending.keep_alive
            return ending
        finally:
            if keep:
                self._keep(connection)
            else:
                connection.close()

    def _exchange(self, connection: socket.socket, exchange: Exchange, step: Try) -> Ending:
        ends_at = min(step.until, self._clock.now() + step.answer_seconds)
        try:
            try:
                while exchange.unsent:
                    connection.settimeout(max(ends_at - self._clock.now(), 0.001))
                    exchange.sent(connection.send(exchange.unsent))
            except ConnectionError:
                pass  # it may have answered before it hung up, such as that the body is too large
            while True:
                connection.settimeout(max(ends_at - self._clock.now(), 0.001))
                ending = exchange.received(connection.recv(RECEIVE_BYTES))
                if ending is not None:
                    return ending
        except TimeoutError:
            return exchange.timed_out()
        except OSError as error:
            return exchange.ended(str(error))

    def _take(self, *, fresh: bool) -> socket.socket | None:
        """An idle connection that still stands, the last used first. Who wants a fresh one takes the place of an idle one."""
        while True:
            with self._lock:
                if self._is_closed:
                    raise RuntimeError("the client is closed")
                if not self._idle:
                    return None
                kept = self._idle.pop()
            old = self._clock.now() - kept.since > self._settings.idle_seconds_max
            if not (fresh or old or is_stale(kept.socket.fileno())):
                return kept.socket
            kept.socket.close()
            if fresh:
                return None

    def _keep(self, connection: socket.socket) -> None:
        with self._lock:
            if not self._is_closed:
                self._idle.append(Kept(connection, self._clock.now()))
                return
        connection.close()

    def close(self) -> None:
        """Close what is idle; what is in use closes itself."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for kept in idle:
            kept.socket.close()

    def after_fork(self) -> None:
        """In a child process: connections are the parent's, and so are threads that held a lock."""
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(self._settings.connections_max)
        idle, self._idle = self._idle, []
        for kept in idle:
            kept.socket.close()


class Pages(Generic[ItemT]):
    """An iterator over the items of all pages, which are asked for one by one as they are needed."""

    def __init__(self, run: Callable[[Call[Page[ItemT]]], Page[ItemT]], walk: Walk[ItemT]) -> None:
        self._run = run
        self._walk = walk

    @property
    def cursor(self) -> str | None:
        """Goes on after the last page that was handed out to its end: what was handed out since comes again."""
        return self._walk.cursor

    @property
    def as_of(self) -> dt.datetime | None:
        """How old the page is. None before the first, and for events."""
        return self._walk.as_of

    def __iter__(self) -> Iterator[ItemT]:
        """Itself."""
        return self

    def __next__(self) -> ItemT:
        """The next item. Raises SlotkeeperError, and goes on when asked again."""
        while (item := self._walk.item()) is None:
            call = self._walk.wanted()
            if call is None:
                raise StopIteration
            self._walk.turn(self._run(call))
        return item


class Client:
    """The blocking face. Safe for threads; so many calls run at once as there are connections, more wait for their turn.

    Every method raises SlotkeeperError: NotExecuted, OutcomeUnknown, or Refused with a class for its code; and ValueError for
    arguments that cannot be sent. Methods that change a reservation take a `key`; without one they make a fresh one.
    """

    def __init__(
        self,
        url: str,
        settings: Settings = Settings(),  # noqa: B008 - it is frozen
        *,
        budget: RetryBudget = RETRY_BUDGET,
        chance: Callable[[], float] = random.random,
        clock: Clock | None = None,
    ) -> None:
        """`url` is http://HOST:PORT, with a path where a proxy wants one. `chance` is at least 0 and below 1."""
        self._address = Address.of(url)
        self._settings = settings
        self._budget = budget
        self._chance = chance
        self._clock = clock or _MonotonicClock()
        self._connections = _Connections(self._address, settings, self._clock)

    def with_options(
        self, *, deadline_seconds: float | None = None, request_id: str | None = None, traceparent: str | None = None
    ) -> Self:
        """The same client, with these for its calls: connections, budget and statistics are shared. Raises ValueError."""
        view = copy.copy(self)
        view._settings = settings_with(self._settings, deadline_seconds, request_id, traceparent)  # noqa: SLF001 - a copy of ours
        return view

    def statistics(self) -> Statistics:
        """What it has met."""
        return self._connections.statistics()

    def close(self) -> None:
        """Close all connections. Calls that are running end as they would."""
        self._connections.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _run(self, call: Call[T_co]) -> T_co:
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
                ending = connections.attempt(step)
            else:
                self._clock.sleep(step.seconds)
                ending = None

    # Reservations

    def hold(
        self,
        lines: Iterable[LineLike],
        *,
        order_ref: str = "",
        channel: str = "",
        ttl_seconds: int,
        key: str | None = None,
    ) -> Reservation:
        """Take units of one or several counters for a time, all or nothing.

        Raises InsufficientCapacity, SlotClosed, PastCutoff, UnknownPool, UnknownSlot.
        """
        return self._run(calls.hold(lines, order_ref, channel, ttl_seconds, key))

    def reserve(
        self,
        lines: Iterable[LineLike],
        *,
        order_ref: str = "",
        channel: str = "",
        key: str | None = None,
    ) -> Reservation:
        """Take units, confirmed at once. Raises what `hold` raises."""
        return self._run(calls.reserve(lines, order_ref, channel, key))

    def confirm(
        self, reservation_id: str, lines: Iterable[LineLike] | None = None, *, key: str | None = None
    ) -> Reservation:
        """Make a hold permanent; with lines, keep those and give the rest back. Raises HoldExpired when it is too late."""
        return self._run(calls.confirm(reservation_id, lines, key))

    def release(self, reservation_id: str, *, reason: str = "", key: str | None = None) -> Reservation:
        """Give the units back."""
        return self._run(calls.release(reservation_id, reason, key))

    def extend(self, reservation_id: str, ttl_seconds: int, *, key: str | None = None) -> Reservation:
        """Let a hold live longer, counted from now. Raises ExtensionCapReached."""
        return self._run(calls.extend(reservation_id, ttl_seconds, key))

    def move(self, reservation_id: str, lines: Iterable[LineLike], *, key: str | None = None) -> Reservation:
        """Exchange all lines for these in one step. Raises what `hold` raises; then the old lines are kept."""
        return self._run(calls.move(reservation_id, lines, key))

    def fulfil(self, reservation_id: str, *, key: str | None = None) -> Reservation:
        """The delivery was made."""
        return self._run(calls.fulfil(reservation_id, key))

    def reservation(self, reservation_id: str) -> Reservation:
        """The reservation as it is. Raises UnknownReservation."""
        return self._run(calls.reservation(reservation_id))

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
    ) -> Pages[Available]:
        """What is left, slot by slot; with `min_position` (that of your own reservation, say) not before it is shown."""
        return Pages(
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
    ) -> Pages[Slot]:
        """Slots for shoppers: open or not, no numbers."""
        return Pages(
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
    ) -> Pages[Counter]:
        """Everything about counters, for planners."""
        return Pages(
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

    def counter(self, pool_id: str, slot_id: str, *, min_position: str | None = None) -> Counter:
        """One counter. Raises UnknownPool, UnknownSlot."""
        return self._run(calls.counter(pool_id, slot_id, min_position))

    # Planning

    def pools(self) -> tuple[Pool, ...]:
        """All pools."""
        return self._run(calls.pools())

    def pool(self, pool_id: str) -> Pool:
        """One pool. Raises UnknownPool."""
        return self._run(calls.pool(pool_id))

    def put_pool(
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
        """Define a pool or change it. `if_match` is the plan_version that was read; raises PlanConflict where it is old."""
        return self._run(
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

    def put_counter(
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
        """Define a counter or change it, as a whole: what is left out has its default. `if_match` as for `put_pool`."""
        return self._run(
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

    def import_counters(
        self,
        counters: Iterable[CounterPlan],
        *,
        reason: str = "",
        deadline_seconds: float = calls.IMPORT_DEADLINE_SECONDS,
    ) -> Imported:
        """Define many counters, all or nothing. It has a deadline of its own."""
        return self._run(calls.import_counters(counters, reason, deadline_seconds))

    # Feed and service

    def events(self, after: str | None = None, *, page_size: int = PAGE_SIZE) -> Pages[Event]:
        """The feed of everything that happened, from a cursor on to its end at the time. Keep its `cursor` to go on."""
        return Pages(self._run, listings.events(after, page_size))

    def status(self) -> Status:
        """How the system is doing, shard by shard."""
        return self._run(calls.status())
