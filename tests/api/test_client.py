"""The client, both faces, against a server that fails by script and against a real engine whose processes are killed.

Every row of the tables runs through both faces. A pause of the client moves its clock and takes no time; what is real are the
sockets. `ScriptedServer` follows its script request by request and keeps what it was sent.
"""

import contextlib
import datetime as dt
import inspect
import io
import itertools
import json
import pickle
import queue
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from api import client as client_module
from api import http1, problems
from api.client import (
    CLASS_OF_CODE,
    PAUSE_SECONDS_MAX,
    PAUSE_SECONDS_MIN,
    AlreadyConfirmed,
    AsyncClient,
    Client,
    Counter,
    CounterPlan,
    CutoffRule,
    HoldNotConfirmed,
    IdempotencyKeyReused,
    InsufficientCapacity,
    InvalidRequest,
    Line,
    NotExecuted,
    OutcomeUnknown,
    PlanConflict,
    Pool,
    Refused,
    Reservation,
    RetryBudget,
    Settings,
    SlotClosed,
    SlotkeeperError,
    Statistics,
    UnknownPool,
    UnknownReservation,
    UnknownSlot,
    fresh_key,
    pause_seconds,
)
from engine.child import Role
from engine.core.sharding import shard_of_counter
from tests.support.contract import DAY, Api, fresh, slot_id
from tests.support.engine import PATIENCE_SECONDS, ROOT, Engine

# --- faces ------------------------------------------------------------------------------------------------------------


class Ask:
    """A call, to be made by either face. An argument that is a function is called with the outcomes before it."""

    def __init__(self, method: str, *arguments: Any, **named: Any) -> None:
        self._method = method
        self._arguments = arguments
        self._named = named

    def of(self, client: Client | AsyncClient, outcomes: list[Any]) -> Any:
        """Make the call."""

        def known(argument: Any) -> Any:
            return argument(outcomes) if callable(argument) else argument

        arguments = [known(argument) for argument in self._arguments]
        return getattr(client, self._method)(*arguments, **{name: known(value) for name, value in self._named.items()})


@dataclass
class Run:
    """What became of some calls, one after the other, by one client."""

    outcomes: list[Any]
    """Answers and SlotkeeperErrors; of iterators, lists."""
    pauses: list[float]
    statistics: Statistics


class Clock:
    """Real time, in which pauses take none."""

    def __init__(self, on_pause: Callable[[], None]) -> None:
        self.pauses: list[float] = []
        self._skipped = 0.0
        self._on_pause = on_pause

    def now(self) -> float:
        return time.monotonic() + self._skipped

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self._skipped += seconds
        self._on_pause()


class AsyncClock(Clock):
    async def sleep(self, seconds: float) -> None:  # type: ignore[override]  # the other face's clock
        super().sleep(seconds)
        await trio.lowlevel.checkpoint()


def plenty() -> RetryBudget:
    """A budget that no test spends by accident."""
    return RetryBudget(reserve=1_000, saved_max=1_000)


def blocking(url: str, *asks: Ask, settings: Settings, budget: RetryBudget, on_pause: Callable[[], None]) -> Run:
    clock = Clock(on_pause)
    outcomes: list[Any] = []
    with Client(url, settings, budget=budget, clock=clock) as client:
        for ask in asks:
            try:
                answer = ask.of(client, outcomes)
                outcomes.append(list(answer) if hasattr(answer, "__next__") else answer)
            except SlotkeeperError as error:
                outcomes.append(error)
        return Run(outcomes, clock.pauses, client.statistics())


def on_trio(url: str, *asks: Ask, settings: Settings, budget: RetryBudget, on_pause: Callable[[], None]) -> Run:
    async def main() -> Run:
        clock = AsyncClock(on_pause)
        outcomes: list[Any] = []
        async with AsyncClient(url, settings, budget=budget, clock=clock) as client:
            for ask in asks:
                try:
                    answer = ask.of(client, outcomes)
                    if hasattr(answer, "__anext__"):
                        outcomes.append([item async for item in answer])
                    else:
                        outcomes.append(await answer)
                except SlotkeeperError as error:
                    outcomes.append(error)
            return Run(outcomes, clock.pauses, client.statistics())

    return trio.run(main)


Face = Callable[..., Run]


@pytest.fixture(params=[blocking, on_trio])
def face(request: pytest.FixtureRequest) -> Face:
    """A face. Called with the address and calls, and with settings, a budget and what to do at pauses if need be."""

    def run(url: str, *asks: Ask, **more: Any) -> Run:
        arguments = {"settings": Settings(), "budget": plenty(), "on_pause": lambda: None, **more}
        found: Run = request.param(url, *asks, **arguments)
        return found

    return run


# --- a server that fails by script ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HangUp:
    """Close a connection that was just made."""


@dataclass(frozen=True)
class ReadAndHangUp:
    """Read the request and close."""


@dataclass(frozen=True)
class Say:
    """Read the request and send these bytes."""

    data: bytes
    closes: bool = False


@dataclass(frozen=True)
class Stall:
    """Read the request and say nothing until the client goes."""


Step = HangUp | ReadAndHangUp | Say | Stall


@dataclass
class Seen:
    """A request that arrived as a whole."""

    connection: int
    line: str
    headers: dict[str, str]
    body: bytes


class ScriptedServer:
    """Follows a script; its last step repeats for ever. One thread for each connection."""

    def __init__(self, *script: Step, listening: bool = True) -> None:
        self.requests: list[Seen] = []
        self.connections = 0
        self.has_request = threading.Event()
        self._script = list(script)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._is_listening = False
        if listening:
            self.listen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections. Idempotent."""
        if self._is_listening:
            self._is_listening = False
            # Closing alone would leave accept() waiting.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()

    def listen(self) -> None:
        """Until then connections are refused. Idempotent."""
        if not self._is_listening:
            self._is_listening = True
            self._listener.listen()
            self._start(self._accept)

    def interject(self, data: bytes) -> None:
        """Send over the connection that is open."""
        (connection,) = self._open
        connection.sendall(data)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if isinstance(self._script[0], HangUp):
                self._next()
                connection.close()
                continue
            with self._lock:
                self._open.append(connection)
            self._start(self._serve, connection, self.connections)

    def _next(self) -> Step:
        with self._lock:
            return self._script.pop(0) if len(self._script) > 1 else self._script[0]

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            with connection.makefile("rb") as stream:
                while (seen := self._read(stream, number)) is not None:
                    self.requests.append(seen)
                    self.has_request.set()
                    match self._next():
                        case Say(data, closes):
                            connection.sendall(data)
                            if closes:
                                return
                        case Stall():
                            assert connection.recv(1) == b""
                            return
                        case _:
                            return
        except ConnectionError:
            pass  # the client went; what it heard is its own test
        finally:
            with self._lock:
                self._open.remove(connection)
            connection.close()

    def _read(self, stream: Any, number: int) -> Seen | None:
        line = stream.readline()
        if not line:
            return None
        headers = {}
        while (header := stream.readline()) not in (b"\r\n", b""):
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        return Seen(number, line.decode().strip(), headers, stream.read(int(headers.get("content-length", 0))))


def http(status: int, body: object, *headers: str) -> bytes:
    """An answer. `body` is JSON unless it is bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Words", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


def problem(code: str, status: int = 503, outcome: str = "not_executed", *headers: str, **members: object) -> Say:
    body = {"type": "/problems/x", "title": "T", "status": status, "code": code, "outcome": outcome, "detail": "why"}
    return Say(http(status, {**body, **members}, "Content-Type: application/problem+json", *headers))


RESERVATION = {
    "reservation_id": "r1",
    "status": "held",
    "order_ref": "SO-1",
    "channel": "web",
    "lines": [{"pool_id": "van", "slot_id": "2027-12-01T18:00-20:00", "quantity": 1, "weight_kg": 3}],
    "expires_at": "2026-11-23T22:05:08.790Z",
    "created_at": "2026-11-23T21:55:08.790Z",
    "updated_at": "2026-11-23T21:55:08.790Z",
    "version": 1,
    "position": "0-4",
    "durability": 1,
    "member_of_a_newer_server": {"of": ["any", "shape"]},
}
POOL = {
    "pool_id": "van",
    "capacity_type": "logistics",
    "unit": "stop",
    "zone": "",
    "time_zone": "Europe/Berlin",
    "cutoff": None,
    "plan_version": 4,
}
SHORT = {
    "pool_id": "van",
    "slot_id": "2027-12-01T18:00-20:00",
    "quantity": 1,
    "available": 0,
    "status": "full",
    "cutoff_at": "2027-12-01T15:30:00.000Z",
}

YES = Say(http(201, RESERVATION))
POOL_YES = Say(http(200, POOL))
NO_SHARD = problem("shard_unavailable")
UNKNOWN = problem("outcome_unknown", outcome="outcome_unknown")
FULL = problem(
    "insufficient_capacity",
    409,
    lines=[SHORT],
    alternatives=[{"pool_id": "van", "slot_id": "2027-12-02T18:00-20:00", "available": 7}],
    position="0-9",
)
LINES = [("van", "2027-12-01T18:00-20:00", 1)]

HOLD = Ask("hold", LINES, order_ref="SO-1", channel="web", ttl_seconds=600)
LOOK = Ask("reservation", "r1")
PUT = Ask("put_pool", "van", capacity_type="logistics", unit="stop", time_zone="Europe/Berlin")
PUT_IF = Ask("put_pool", "van", capacity_type="logistics", unit="stop", time_zone="Europe/Berlin", if_match=3)

# --- one call, by script ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A script, and what one call makes of it."""

    ask: Ask
    script: tuple[Step, ...]
    outcome: type
    tries: int | None = None
    """None: as many as the deadline lets."""
    maybe_executed: bool = False


OK = Reservation
ROWS = {
    "answered": Row(HOLD, (YES,), OK, 1),
    "answered in chunks": Row(
        HOLD,
        (
            Say(
                b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n"
                + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (json.dumps(RESERVATION).encode(),))
                + b"0\r\n\r\n"
            ),
        ),
        OK,
        1,
    ),
    "answered after an interim answer": Row(HOLD, (Say(b"HTTP/1.1 100 Continue\r\n\r\n" + YES.data),), OK, 1),
    "dropped before it is read": Row(HOLD, (HangUp(), YES), OK, 2),
    "dropped after it is read": Row(HOLD, (ReadAndHangUp(), YES), OK, 2),
    "dropped in the head": Row(HOLD, (Say(YES.data[:20], closes=True), YES), OK, 2),
    "dropped in the body": Row(HOLD, (Say(YES.data[:-5], closes=True), YES), OK, 2),
    "dropped at every point": Row(
        HOLD, (HangUp(), ReadAndHangUp(), Say(YES.data[:9], closes=True), Say(YES.data[:-1], closes=True), YES), OK, 5
    ),
    "dropped for ever": Row(HOLD, (ReadAndHangUp(),), OutcomeUnknown, None, maybe_executed=True),
    "not executed, then": Row(HOLD, (NO_SHARD, problem("overloaded"), YES), OK, 3),
    "not executed for ever": Row(HOLD, (NO_SHARD,), NotExecuted),
    "unknown, then": Row(HOLD, (UNKNOWN, UNKNOWN, YES), OK, 3),
    "unknown for ever": Row(HOLD, (UNKNOWN,), OutcomeUnknown, None, maybe_executed=True),
    "unknown once, not executed for ever": Row(HOLD, (UNKNOWN, NO_SHARD), OutcomeUnknown, None, maybe_executed=True),
    "dropped once, not executed for ever": Row(
        HOLD, (ReadAndHangUp(), NO_SHARD), OutcomeUnknown, None, maybe_executed=True
    ),
    "refused": Row(HOLD, (FULL,), InsufficientCapacity, 1),
    "not executed, then refused": Row(HOLD, (NO_SHARD, FULL), InsufficientCapacity, 2),
    "dropped, then refused": Row(HOLD, (ReadAndHangUp(), FULL), InsufficientCapacity, 2, maybe_executed=True),
    "unknown, then refused": Row(HOLD, (UNKNOWN, FULL), InsufficientCapacity, 2, maybe_executed=True),
    "a failing handler, then": Row(HOLD, (problem("internal_error", 500, "outcome_unknown"), YES), OK, 2),
    "a failing handler for ever": Row(
        HOLD, (problem("internal_error", 500, "outcome_unknown"),), OutcomeUnknown, None, maybe_executed=True
    ),
    "a proxy without a server": Row(HOLD, (Say(http(502, b"<html>")), YES), OK, 2),
    "a proxy without a server for ever": Row(
        HOLD, (Say(http(503, b"<html>")),), OutcomeUnknown, None, maybe_executed=True
    ),
    "a proxy that refuses": Row(HOLD, (Say(http(404, b"<html>")),), Refused, 1),
    "too many requests": Row(HOLD, (problem("over_its_share", 429),), Refused, 1),
    "another version of HTTP": Row(HOLD, (problem("version_not_supported", 505),), InvalidRequest, 1),
    "a redirect": Row(HOLD, (Say(http(307, b"", "Location: /elsewhere")),), Refused, 1),
    "not HTTP": Row(HOLD, (Say(b"SSH-2.0-OpenSSH_9.2\r\n"),), OutcomeUnknown, 1, maybe_executed=True),
    "not JSON": Row(HOLD, (Say(http(201, b"{")),), OutcomeUnknown, 1, maybe_executed=True),
    "not a reservation": Row(HOLD, (Say(http(201, {"status": "held"})),), OutcomeUnknown, 1, maybe_executed=True),
    "larger than the bound": Row(
        HOLD, (Say(http(201, {**RESERVATION, "more": "x" * 40_000})),), OutcomeUnknown, 1, maybe_executed=True
    ),
    "a problem of another shape": Row(HOLD, (problem("slot_closed", 409, lines="none"),), SlotClosed, 1),
    "reading: answered": Row(LOOK, (Say(http(200, RESERVATION)),), OK, 1),
    "reading: dropped, then": Row(LOOK, (ReadAndHangUp(), Say(http(200, RESERVATION))), OK, 2),
    "reading: dropped for ever": Row(LOOK, (ReadAndHangUp(),), NotExecuted),
    "reading: not HTTP": Row(LOOK, (Say(b"220 mail ready\r\n"),), NotExecuted, 1),
    "put: answered": Row(PUT, (POOL_YES,), Pool, 1),
    "put: dropped, then": Row(PUT, (ReadAndHangUp(), POOL_YES), Pool, 2),
    "put: unknown, then": Row(PUT, (UNKNOWN, POOL_YES), Pool, 2),
    "put if: dropped": Row(PUT_IF, (ReadAndHangUp(), POOL_YES), OutcomeUnknown, 1, maybe_executed=True),
    "put if: unknown": Row(PUT_IF, (UNKNOWN, POOL_YES), OutcomeUnknown, 1, maybe_executed=True),
    "put if: dropped in the answer": Row(
        PUT_IF, (Say(POOL_YES.data[:-1], closes=True), POOL_YES), OutcomeUnknown, 1, maybe_executed=True
    ),
    "put if: not executed, then": Row(PUT_IF, (NO_SHARD, POOL_YES), Pool, 2),
    "put if: not executed, then unknown": Row(
        PUT_IF, (NO_SHARD, UNKNOWN, POOL_YES), OutcomeUnknown, 2, maybe_executed=True
    ),
    "put if: conflict": Row(PUT_IF, (problem("plan_conflict", 412),), PlanConflict, 1),
}


@pytest.mark.parametrize("name", ROWS)
def test_script(face: Face, name: str) -> None:
    row = ROWS[name]
    settings = Settings(answer_bytes_max=20_000)
    with ScriptedServer(*row.script) as server:
        run = face(server.url, row.ask, settings=settings)
    outcome: object = run.outcomes[0]
    assert type(outcome) is row.outcome, outcome
    tries = run.statistics.tries
    if row.tries is None:
        # The deadline ended it: one more pause would have passed it.
        assert tries > 3
        assert settings.deadline_seconds - PAUSE_SECONDS_MAX < sum(run.pauses) < settings.deadline_seconds
    else:
        assert tries == row.tries
    assert len(run.pauses) == run.statistics.retries == tries - 1
    hung_up = sum(isinstance(step, HangUp) for step in row.script)
    assert len(server.requests) == tries - hung_up
    keys = {seen.headers.get("idempotency-key") for seen in server.requests}
    assert len(keys) == 1
    assert len({seen.body for seen in server.requests}) == 1
    if isinstance(outcome, SlotkeeperError):
        assert outcome.maybe_executed is row.maybe_executed
        assert outcome.tries == tries
        assert {outcome.key} == keys
    elif isinstance(outcome, Reservation):
        assert {outcome.key} == (keys if row.ask is HOLD else {None})


@pytest.mark.parametrize("code", [*problems.CODES, *http1.PROBLEMS])
def test_every_code_has_a_class(face: Face, code: str) -> None:
    status = problems.CODES[code].status if code in problems.CODES else http1.PROBLEMS[code][0]
    outcome = "outcome_unknown" if code in ("outcome_unknown", "internal_error") else "not_executed"
    with ScriptedServer(problem(code, status, outcome)) as server:
        (error,) = face(server.url, HOLD).outcomes
    assert type(error) is CLASS_OF_CODE[code]
    assert error.code == code
    assert isinstance(error, Refused) == (status not in (500, 503))
    assert (len(server.requests) == 1) == isinstance(error, Refused)


def test_no_class_is_without_a_code() -> None:
    def below(kind: type[SlotkeeperError]) -> Iterator[type[SlotkeeperError]]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    assert {*below(Refused), NotExecuted, OutcomeUnknown} == set(CLASS_OF_CODE.values())


def test_what_a_refusal_says(face: Face) -> None:
    with ScriptedServer(FULL) as server:
        (error,) = face(server.url, HOLD).outcomes
    assert str(error) == "insufficient_capacity: why"
    assert (error.status, error.position, error.reservation) == (409, "0-9", None)
    (short,) = error.lines
    assert (short.available, short.status) == (0, "full")
    assert short.cutoff_at == dt.datetime(2027, 12, 1, 15, 30, tzinfo=dt.UTC)
    assert [each.available for each in error.alternatives] == [7]


def test_a_code_that_is_not_known_is_a_refusal(face: Face) -> None:
    with ScriptedServer(problem("slot_haunted", 409, "not_executed", "Retry-After: 7")) as server:
        (error,) = face(server.url, HOLD).outcomes
    assert type(error) is Refused
    assert (error.code, error.retry_after_seconds) == ("slot_haunted", 7)


def test_errors_can_be_pickled() -> None:
    error = InsufficientCapacity("why", code="insufficient_capacity", key="k", tries=2, maybe_executed=True, status=409)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is InsufficientCapacity
    assert vars(again) == vars(error)


def test_answers_are_frozen_and_their_instants_aware(face: Face) -> None:
    with ScriptedServer(YES) as server:
        (held,) = face(server.url, HOLD).outcomes
    assert held.lines == (Line("van", "2027-12-01T18:00-20:00", 1),)
    assert held.expires_at == dt.datetime(2026, 11, 23, 22, 5, 8, 790_000, tzinfo=dt.UTC)
    with pytest.raises(AttributeError):
        held.status = "confirmed"


# --- pauses -----------------------------------------------------------------------------------------------------------


def test_pauses_are_below_a_doubling_ceiling_with_a_cap() -> None:
    longest = [pause_seconds(retry, None, lambda: 1.0) for retry in range(40)]
    assert longest[:4] == [PAUSE_SECONDS_MIN * factor for factor in (1, 2, 4, 8)]
    assert longest == sorted(longest)
    assert set(longest[6:]) == {PAUSE_SECONDS_MAX}
    assert pause_seconds(5, None, lambda: 0.0) == 0.0
    assert pause_seconds(0, 3.0, lambda: 0.5) == 3.0 + PAUSE_SECONDS_MIN / 2


def test_retry_after_is_waited_for(face: Face) -> None:
    told = problem("overloaded", 503, "not_executed", "Retry-After: 2")
    with ScriptedServer(told, told, YES) as server:
        run = face(server.url, HOLD)
    assert isinstance(run.outcomes[0], Reservation)
    assert [2 <= pause < 2.2 for pause in run.pauses] == [True, True]


@pytest.mark.parametrize(("outcome", "kind"), [("not_executed", NotExecuted), ("outcome_unknown", OutcomeUnknown)])
def test_nobody_waits_for_what_comes_after_the_deadline(face: Face, outcome: str, kind: type) -> None:
    with ScriptedServer(problem("overloaded", 503, outcome, "Retry-After: 60")) as server:
        run = face(server.url, HOLD)
    assert type(run.outcomes[0]) is kind
    assert run.pauses == []


def test_the_retry_budget_ends_retries(face: Face) -> None:
    budget = RetryBudget(reserve=2, share=0, reserve_per_second=0)
    with ScriptedServer(NO_SHARD) as server:
        run = face(server.url, HOLD, HOLD, budget=budget)
    assert [type(error) for error in run.outcomes] == [NotExecuted, NotExecuted]
    assert [error.tries for error in run.outcomes] == [3, 1]
    assert run.statistics.budget_spent == 2
    assert "retry budget" in str(run.outcomes[1])


@given(st.lists(st.one_of(st.just("call"), st.just("retry"), st.floats(0, 100)), max_size=200))
def test_retries_stay_within_the_budget(steps: list[str | float]) -> None:
    now, calls, retries = 0.0, 0, 0
    budget = RetryBudget(share=0.25, reserve=3, reserve_per_second=0.5, saved_max=5, now=lambda: now)
    for step in steps:
        if step == "call":
            calls += 1
            budget.count_call()
        elif step == "retry":
            retries += budget.take()
        elif isinstance(step, float):
            now += step
    assert retries <= 0.25 * calls + 3 + 0.5 * now


def test_the_retry_budget_of_a_process_is_shared() -> None:
    signature = inspect.signature(Client)
    assert signature.parameters["budget"].default is client_module.RETRY_BUDGET
    assert inspect.signature(AsyncClient).parameters["budget"].default is client_module.RETRY_BUDGET


# --- connections ------------------------------------------------------------------------------------------------------


def test_connections_are_kept(face: Face) -> None:
    with ScriptedServer(YES) as server:
        run = face(server.url, HOLD, HOLD, HOLD)
    assert [seen.connection for seen in server.requests] == [1, 1, 1]
    assert run.statistics.connections_idle == 1


def test_connection_close_is_honoured(face: Face) -> None:
    closing = Say(http(201, RESERVATION, "Connection: close"))
    with ScriptedServer(closing) as server:
        run = face(server.url, HOLD, HOLD)
    assert [seen.connection for seen in server.requests] == [1, 2]
    assert (run.pauses, run.statistics.stale, run.statistics.connections_idle) == ([], 0, 0)


def test_a_connection_that_was_closed_while_idle_costs_nothing(face: Face) -> None:
    with ScriptedServer(Say(YES.data, closes=True), YES) as server:
        run = face(server.url, HOLD, HOLD)
    assert [type(outcome) for outcome in run.outcomes] == [Reservation, Reservation]
    assert run.pauses == []


def test_a_kept_connection_that_is_closed_under_a_request_is_replaced_at_once(face: Face) -> None:
    with ScriptedServer(YES, ReadAndHangUp(), YES) as server:
        run = face(server.url, HOLD, HOLD)
    assert [type(outcome) for outcome in run.outcomes] == [Reservation, Reservation]
    assert run.pauses == []
    assert run.statistics.stale == 1
    assert [seen.connection for seen in server.requests] == [1, 1, 2]
    assert server.requests[1].headers == server.requests[2].headers


def test_only_one_connection_is_replaced_at_once(face: Face) -> None:
    with ScriptedServer(YES, ReadAndHangUp()) as server:
        run = face(server.url, HOLD, HOLD)
    assert type(run.outcomes[1]) is OutcomeUnknown
    assert run.statistics.stale == 1
    assert len(run.pauses) == run.outcomes[1].tries - 2 > 3


def test_what_replaces_a_kept_connection_is_no_kept_one() -> None:
    with ScriptedServer(YES, ReadAndHangUp(), YES) as server, Client(server.url, budget=plenty()) as client:
        client.reserve(LINES)
        other = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        client._connections._keep(other)
        client.reserve(LINES)
        assert [seen.connection for seen in server.requests] == [1, 2, 3]
        assert client.statistics().connections_idle == 1


def test_a_lost_try_over_a_kept_connection_may_have_been_executed(face: Face) -> None:
    with ScriptedServer(YES, ReadAndHangUp(), NO_SHARD) as server:
        run = face(server.url, HOLD, HOLD)
    assert type(run.outcomes[1]) is OutcomeUnknown


def test_what_must_not_be_repeated_goes_over_a_fresh_connection(face: Face) -> None:
    with ScriptedServer(POOL_YES) as server:
        run = face(server.url, PUT, PUT, PUT_IF, PUT_IF, settings=Settings(connections_max=1))
    assert [type(outcome) for outcome in run.outcomes] == [Pool] * 4
    assert [seen.connection for seen in server.requests] == [1, 1, 2, 3]
    assert server.requests[2].headers["if-match"] == '"3"'


def test_nobody_listens_and_then_somebody_does(face: Face) -> None:
    with ScriptedServer(YES, listening=False) as server:
        pauses = itertools.count(1)
        run = face(server.url, HOLD, on_pause=lambda: server.listen() if next(pauses) == 3 else None)
    assert isinstance(run.outcomes[0], Reservation)
    assert len(run.pauses) == 3


def test_nobody_listens(face: Face) -> None:
    with ScriptedServer(YES, listening=False) as server:
        (error,) = face(server.url, HOLD).outcomes
    assert type(error) is NotExecuted
    assert not error.maybe_executed
    assert "no connection" in error.detail
    assert error.key


QUICK = Settings(answer_seconds=0.2)
"""Real time: a test in which somebody waits for nothing. What comes after is answered whenever it comes."""


def test_a_stalled_answer_is_asked_for_again(face: Face) -> None:
    with ScriptedServer(Stall(), YES) as server:
        run = face(server.url, HOLD, settings=QUICK)
    assert isinstance(run.outcomes[0], Reservation)
    assert run.statistics.tries >= 2
    assert len({seen.headers["idempotency-key"] for seen in server.requests}) == 1


def test_stalled_for_ever(face: Face) -> None:
    budget = RetryBudget(reserve=1, share=0, reserve_per_second=0)
    with ScriptedServer(Stall()) as server:
        run = face(server.url, HOLD, PUT_IF, LOOK, settings=QUICK, budget=budget)
    unknown, unrepeated, unread = run.outcomes
    assert (type(unknown), unknown.tries) == (OutcomeUnknown, 2)
    assert (type(unrepeated), unrepeated.tries) == (OutcomeUnknown, 1)
    assert (type(unread), unread.tries) == (NotExecuted, 1)


def test_a_kept_connection_that_stalls_is_no_stale_one(face: Face) -> None:
    budget = RetryBudget(reserve=0, share=0, reserve_per_second=0)
    with ScriptedServer(YES, Stall()) as server:
        run = face(server.url, HOLD, HOLD, settings=Settings(answer_seconds=0.5), budget=budget)
    assert run.statistics.stale == 0
    assert type(run.outcomes[-1]) is OutcomeUnknown


@pytest.mark.parametrize("lingers", [True, False])
def test_a_request_that_is_refused_while_it_is_sent(face: Face, lingers: bool) -> None:
    """A server may answer before it has read all, and hang up: the answer counts, however much was sent."""
    plans = [CounterPlan("van", slot_id(), 1)] * 200_000  # larger than the buffers of the kernel
    refusal = problem("body_too_large", 413, "not_executed", "Connection: close")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1_000)
            connection.sendall(refusal.data)
            connection.shutdown(socket.SHUT_WR)
            while lingers and connection.recv(65_536):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    run = face(f"http://127.0.0.1:{listener.getsockname()[1]}", Ask("import_counters", plans))
    thread.join(PATIENCE_SECONDS)
    listener.close()
    (error,) = run.outcomes
    assert type(error) is InvalidRequest, error
    assert (error.code, error.tries) == ("body_too_large", 1)


@pytest.mark.parametrize("unasked", [http(408, b""), b"HTTP/1.1 408 Requ"])
def test_an_answer_that_nobody_asked_for_is_nobodys(face: Face, unasked: bytes) -> None:
    with ScriptedServer(Say(YES.data + unasked), YES) as server:
        behind = face(server.url, HOLD, HOLD)
    with ScriptedServer(YES) as server:

        def meanwhile(_: object) -> str:
            server.interject(unasked)
            return "my-key"

        idle = face(server.url, HOLD, Ask("reserve", LINES, key=meanwhile))
    for run in behind, idle:
        assert [type(outcome) for outcome in run.outcomes] == [Reservation, Reservation]
        assert (run.statistics.connections, run.statistics.tries) == (2, 2)


LONE = Settings(connections_max=1, deadline_seconds=0.2, answer_seconds=PATIENCE_SECONDS)


def test_all_connections_are_in_use_blocking() -> None:
    errors: list[SlotkeeperError] = []
    with ScriptedServer(Stall()) as server, Client(server.url, LONE, budget=plenty()) as client:
        patient = client.with_options(deadline_seconds=PATIENCE_SECONDS)

        def ask() -> None:
            try:
                patient.put_pool("van", capacity_type="a", unit="b", time_zone="UTC", if_match=1)
            except SlotkeeperError as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        assert server.has_request.wait(PATIENCE_SECONDS)
        with pytest.raises(NotExecuted, match="all 1 connections were in use"):
            client.reserve(LINES)
        server.close()
        thread.join(PATIENCE_SECONDS)
    assert [type(error) for error in errors] == [OutcomeUnknown]


async def test_all_connections_are_in_use_on_trio() -> None:
    with ScriptedServer(Stall()) as server:
        async with AsyncClient(server.url, LONE, budget=plenty()) as client, trio.open_nursery() as nursery:
            patient = client.with_options(deadline_seconds=PATIENCE_SECONDS)
            nursery.start_soon(patient.reservation, "r1")
            assert await trio.to_thread.run_sync(server.has_request.wait, PATIENCE_SECONDS)
            with pytest.raises(NotExecuted, match="all 1 connections were in use"):
                await client.reserve(LINES)
            # A call that is cancelled closes its connection: what comes over it would be taken for the next call's answer.
            nursery.cancel_scope.cancel()
        assert client.statistics().connections_idle == 0


def test_threads_share_a_client() -> None:
    with ScriptedServer(YES) as server, Client(server.url, Settings(connections_max=3), budget=plenty()) as client:
        keys: list[str | None] = []

        def ask() -> None:
            keys.extend([client.reserve(LINES).key for _ in range(20)])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert len(set(keys)) == 160
        statistics = client.statistics()
    assert statistics.calls == 160
    assert statistics.connections == statistics.connections_idle == server.connections <= 3


def test_a_child_process_makes_connections_of_its_own() -> None:
    program = """
import os, sys
from api.client import Client
with Client(sys.argv[1]) as client:
    client.reservation("r1")
    child = os.fork()
    client.reservation("r1")
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    with ScriptedServer(Say(http(200, RESERVATION))) as server:
        subprocess.run([sys.executable, "-c", program, server.url], cwd=ROOT, check=True, timeout=PATIENCE_SECONDS)
    assert sorted(seen.connection for seen in server.requests) == [1, 1, 2]


def test_a_closed_client_asks_nobody(face: Face) -> None:
    with ScriptedServer(YES) as server:
        client = Client(server.url)
        client.close()
        with pytest.raises(RuntimeError):
            client.reserve(LINES)
    assert server.requests == []


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_names_of_a_request_are_passed_on() -> None:
    with ScriptedServer(YES) as server, Client(server.url + "/behind/a/proxy/") as client:
        traced = client.with_options(
            request_id="order-4711", traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        )
        traced.reserve(LINES, key="my-key")
        client.reserve(LINES)
        assert client.statistics().calls == 2
    first, second = server.requests
    assert first.line == "POST /behind/a/proxy/v1/reservations HTTP/1.1"
    assert first.headers["host"] == server.url.removeprefix("http://")
    assert first.headers["x-request-id"] == "order-4711"
    assert first.headers["traceparent"].endswith("-01")
    assert first.headers["idempotency-key"] == "my-key"
    assert json.loads(first.body)["lines"] == [{"pool_id": "van", "slot_id": "2027-12-01T18:00-20:00", "quantity": 1}]
    assert "x-request-id" not in second.headers
    assert second.headers["idempotency-key"] != "my-key"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda client: client.reserve(LINES, key="a\r\nX-Evil: 1"),
        lambda client: client.reserve(LINES, key=""),
        lambda client: client.reserve(LINES, key="k" * 256),
        lambda client: client.with_options(request_id="a b"),
        lambda client: client.with_options(traceparent="00-\n"),
        lambda client: client.with_options(deadline_seconds=0),
        lambda client: client.release("../pools"),
        lambda client: client.reservation(".."),
        lambda client: client.counter("van", ""),
        lambda client: client.availability(starts_from=dt.datetime(2027, 1, 1)),  # noqa: DTZ001 - what is refused
        lambda client: Client("https://slotkeeper"),
        lambda client: Client("slotkeeper:7411"),
        lambda client: Client("http://user@slotkeeper"),
        lambda client: Client("http://slotkeeper/a b"),
    ],
)
def test_what_cannot_be_sent_is_an_error_of_the_caller(wrong: Callable[[Client], object]) -> None:
    reasons = r"must|cannot|no address|no time zone"
    with ScriptedServer(YES) as server, Client(server.url) as client, pytest.raises(ValueError, match=reasons):
        wrong(client)
    assert server.requests == []


def test_keys_are_fresh_and_sort_by_time() -> None:
    keys = [fresh_key() for _ in range(1_000)]
    assert len(set(keys)) == 1_000
    assert {uuid.UUID(key).version for key in keys} == {7}
    assert {uuid.UUID(key).variant for key in keys} == {uuid.RFC_4122}
    times = [key[:13] for key in keys]
    assert times == sorted(times)


def test_both_faces_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, str]:
        found = {}
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            if not name.startswith("_"):
                signature = str(inspect.signature(method)).replace("api.client.AsyncPages", "api.client.Pages")
                found[name] = signature
        return found

    assert methods(Client) == methods(AsyncClient)


# --- a real engine ----------------------------------------------------------------------------------------------------


def url_of(engine: Engine) -> str:
    return "http://{}:{}".format(*engine.address)


def reservation_id(index: int) -> Callable[[list[Any]], str]:
    """That of an earlier outcome."""
    return lambda outcomes: str(outcomes[index].reservation_id)


def test_the_life_of_a_reservation(face: Face, engine: Engine) -> None:
    pool_id, key = fresh("van"), fresh_key()
    slot = slot_id()
    hold = Ask("hold", [Line(pool_id, slot, 3)], order_ref="SO-1", channel="web", ttl_seconds=600, key=key)
    made, counter, held, again, extended, confirmed, fulfilled, at_once, released, read = face(
        url_of(engine),
        Ask("put_pool", pool_id, capacity_type="logistics", unit="stop", time_zone="Europe/Berlin", zone="north"),
        Ask("put_counter", pool_id, slot, base=5, overbook=1, buffer=2, reason="new"),
        hold,
        hold,
        Ask("extend", reservation_id(2), 900),
        Ask("confirm", reservation_id(2), [(pool_id, slot, 2)]),
        Ask("fulfil", reservation_id(2)),
        Ask("reserve", [(pool_id, slot, 1)], order_ref="SO-2"),
        Ask("release", reservation_id(7), reason="cancelled"),
        Ask("reservation", reservation_id(2)),
    ).outcomes
    assert isinstance(made, Pool)
    assert isinstance(counter, Counter)
    assert (counter.limit, counter.service_date, counter.starts_at.utcoffset()) == (4, DAY, dt.timedelta(0))
    assert (held.status, held.key) == ("held", key)
    assert again == held
    assert extended.expires_at > held.expires_at
    assert (confirmed.status, confirmed.lines) == ("confirmed", (Line(pool_id, slot, 2),))
    assert fulfilled.status == "fulfilled"
    assert (at_once.status, at_once.expires_at) == ("confirmed", None)
    assert released.status == "released"
    assert (read.status, read.key) == ("fulfilled", None)


def test_a_move_is_one_step(face: Face, engine: Engine) -> None:
    pool_id = fresh("van")
    first, second, *_ = slots_of_one_shard(engine, pool_id, 2)
    plans = [CounterPlan(pool_id, slot, base) for slot, base in ((first, 2), (second, 1))]
    _, imported, held, moved, full, kept = face(
        url_of(engine),
        Ask("put_pool", pool_id, capacity_type="logistics", unit="stop", time_zone="UTC"),
        Ask("import_counters", plans, reason="two slots"),
        Ask("reserve", [(pool_id, first, 1)]),
        Ask("move", reservation_id(2), [(pool_id, second, 1)]),
        Ask("move", reservation_id(2), [(pool_id, second, 2)]),
        Ask("reservation", reservation_id(2)),
    ).outcomes
    assert (imported.counters, imported.created) == (2, 2)
    assert moved.lines == kept.lines == (Line(pool_id, second, 1),)
    assert moved.reservation_id == held.reservation_id
    assert isinstance(full, InsufficientCapacity)


def slots_of_one_shard(engine: Engine, pool_id: str, count: int) -> list[str]:
    return Api(engine).slots_of_one_shard(pool_id, count)


def test_refusals_of_a_real_engine(face: Face, engine: Engine) -> None:
    pool_id, key = fresh("van"), fresh_key()
    first, second = slot_id(0), slot_id(1)
    outcomes = face(
        url_of(engine),
        Ask("put_pool", pool_id, capacity_type="a", unit="b", time_zone="UTC", cutoff=CutoffRule(minutes_before=90)),
        Ask("put_counter", pool_id, first, base=1),
        Ask("put_counter", pool_id, second, base=9),
        Ask("reserve", [(pool_id, first, 1)], key=key),
        Ask("reserve", [(pool_id, first, 1)]),
        Ask("confirm", reservation_id(3)),
        Ask("reserve", [(pool_id, first, 2)], key=key),
        Ask("hold", [(pool_id, second, 1)], ttl_seconds=60),
        Ask("fulfil", reservation_id(7)),
        Ask("reserve", [(fresh("none"), first, 1)]),
        Ask("counter", pool_id, slot_id(7)),
        Ask("reservation", "nonsense"),
        Ask("put_counter", pool_id, first, base=4, if_match=0),
        Ask("put_counter", pool_id, first, base=4, if_match=lambda done: done[1].plan_version),
        Ask("put_counter", pool_id, first, base=4, closed=True),
        Ask("reserve", [(pool_id, first, 1)]),
        Ask("reserve", [(pool_id, first, 0)]),
    ).outcomes
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds[4:] == [
        InsufficientCapacity,
        AlreadyConfirmed,
        IdempotencyKeyReused,
        Reservation,
        HoldNotConfirmed,
        UnknownPool,
        UnknownSlot,
        UnknownReservation,
        PlanConflict,
        Counter,
        Counter,
        SlotClosed,
        InvalidRequest,
    ]
    full = outcomes[4]
    assert (full.lines[0].available, full.lines[0].status) == (0, "full")
    assert [each.slot_id for each in full.alternatives] == [second]
    assert outcomes[5].reservation.reservation_id == outcomes[3].reservation_id


def test_listings_turn_their_pages(face: Face, engine: Engine) -> None:
    pool_id = fresh("van")
    slots = [slot_id(day) for day in range(5)]
    selection: dict[str, Any] = {"pool_id": pool_id, "page_size": 2}
    days = {
        "starts_from": DAY + dt.timedelta(days=1),
        "starts_to": dt.datetime.combine(DAY, dt.time(22), dt.UTC) + dt.timedelta(days=3),
    }
    _, _, taken, available, free, shown, planned, between, pools, pool, status = face(
        url_of(engine),
        Ask("put_pool", pool_id, capacity_type="a", unit="b", time_zone="UTC", zone="north"),
        Ask("import_counters", [CounterPlan(pool_id, slot, index) for index, slot in enumerate(slots)]),
        Ask("reserve", [(pool_id, slots[4], 1)]),
        Ask("availability", **selection, min_position=lambda done: done[2].position),
        Ask("availability", **selection, quantity=2),
        Ask("slots", **selection),
        Ask("counters", **selection, zone="north", capacity_type="a"),
        Ask("counters", **{**selection, "pool_id": [pool_id]}, **days),
        Ask("pools"),
        Ask("pool", pool_id),
        Ask("status"),
    ).outcomes
    assert [each.slot_id for each in available] == slots
    assert [each.available for each in available] == [0, 1, 2, 3, 3]
    assert available[4].position == taken.position
    assert [each.slot_id for each in free] == slots[2:]
    assert [each.open for each in shown] == [False, True, True, True, True]
    assert [each.base for each in planned] == [0, 1, 2, 3, 4]
    assert [each.slot_id for each in between] == slots[1:4]
    assert pool in pools
    assert status.ready
    assert len(status.shards) == engine.shards


def test_the_feed_goes_on_from_its_cursor(engine: Engine) -> None:
    pool_id = fresh("van")
    with Client(url_of(engine)) as client:
        client.put_pool(pool_id, capacity_type="a", unit="b", time_zone="UTC")
        client.put_counter(pool_id, slot_id(), base=100)
        before = client.events(page_size=1_000)
        seen = {event.position for event in before}
        made = [client.reserve([(pool_id, slot_id(), 1)], order_ref=f"SO-{number}") for number in range(5)]
        events = client.events(before.cursor, page_size=2)
        first = [next(events) for _ in range(3)]
        # The third is of the second page, which is not done with: who goes on from here sees it again.
        rest = client.events(events.cursor, page_size=2)
        again = list(rest)
        assert again[0] == first[2]
        assert [event.position for event in [*first[:2], *again]] == [each.position for each in made]
        assert [event.data["order_ref"] for event in again] == ["SO-2", "SO-3", "SO-4"]
        assert not seen & {event.position for event in again}
        assert list(client.events(rest.cursor)) == []
        assert first[0].at.utcoffset() == dt.timedelta(0)


async def test_the_feed_goes_on_from_its_cursor_on_trio(engine: Engine) -> None:
    async with AsyncClient(url_of(engine)) as client:
        events = client.events(page_size=1_000)
        seen = [event.position async for event in events]
        assert len(seen) == len(set(seen)) > 0
        assert [event async for event in client.events(events.cursor)] == []


def test_a_page_that_failed_is_asked_for_again() -> None:
    page = {"events": [{"position": "0-1", "event": "held", "at": "2026-11-23T22:05:08.790Z", "data": {}}]}
    script = (Say(http(200, {**page, "next_cursor": "1"})), FULL, Say(http(200, {"events": [], "next_cursor": "1"})))
    with ScriptedServer(*script) as server, Client(server.url) as client:
        events = client.events()
        assert next(events).position == "0-1"
        with pytest.raises(Refused):
            next(events)
        assert (list(events), events.cursor) == ([], "1")
    assert [seen.line.split()[1].partition("after=")[2] for seen in server.requests] == ["", "1", "1"]


# --- a real engine whose processes are killed -------------------------------------------------------------------------

CALLERS = 6
KILLS: tuple[tuple[Role, int], ...] = (
    ("worker", shard_of_counter("van", slot_id(), 2)),
    ("api", 0),
    ("api", 1),
)
CALLS_BEFORE = CALLS_AFTER = 36
"""Allowed before each kill, which meets some of them, and after it, which meet a process that is gone."""
CALLS = len(KILLS) * (CALLS_BEFORE + CALLS_AFTER)
UNITS = 150
"""Fewer than are asked for, so that the last ones are fought for."""
INSISTENT = Settings(deadline_seconds=PATIENCE_SECONDS, connections_max=4)
MORTAL = {"api.deadline_ms": 300, "overload.queue_ms_max": 250}
"""Callers see what happens: the server does not wait for a successor as long as it takes."""


class TellingClock(Clock):
    """Real pauses, and who waits for one hears of it."""

    def sleep(self, seconds: float) -> None:
        self._on_pause()
        time.sleep(seconds)


class AsyncTellingClock(Clock):
    async def sleep(self, seconds: float) -> None:  # type: ignore[override]  # the other face's clock
        self._on_pause()
        await trio.sleep(seconds)


def test_processes_are_killed_under_the_blocking_face(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(settings=MORTAL)
    answered: queue.Queue[tuple[str, object]] = queue.Queue()
    allowed = threading.Semaphore(0)
    paused = threading.Event()
    outcomes: dict[str, object] = {}
    with Client(url_of(engine), INSISTENT, budget=plenty(), clock=TellingClock(paused.set)) as client:
        lines = one_counter(client)

        def call() -> None:
            for _ in range(CALLS // CALLERS):
                allowed.acquire()
                key = fresh_key()
                try:
                    answered.put((key, client.reserve(lines, order_ref=key, key=key)))
                except Exception as error:  # noqa: BLE001 - judged by settle
                    answered.put((key, error))

        threads = [threading.Thread(target=call) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        for role, index in KILLS:
            allowed.release(CALLS_BEFORE)
            outcomes.update(answered.get(timeout=2 * PATIENCE_SECONDS) for _ in range(3))
            if role == "worker":
                with engine.frozen_supervisor():
                    engine.kill(role, index)
                    paused.clear()
                    allowed.release(CALLS_AFTER)
                    assert paused.wait(PATIENCE_SECONDS)
            else:
                engine.kill(role, index)
                allowed.release(CALLS_AFTER)
            engine.wait_ready(role, index)
        for thread in threads:
            thread.join(2 * PATIENCE_SECONDS)
        while not answered.empty():
            outcomes.update([answered.get_nowait()])
        assert client.statistics().retries > 0
        settle(client, lines, outcomes)
    engine.stop()


def test_processes_are_killed_under_the_face_for_trio(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(settings=MORTAL)
    outcomes: dict[str, object] = {}

    async def main(lines: list[Line]) -> None:
        to_killer, answered = trio.open_memory_channel[None](CALLS)
        allowed = trio.Semaphore(0)
        paused = trio.Event()

        def tell() -> None:
            paused.set()

        async with (
            AsyncClient(url_of(engine), INSISTENT, budget=plenty(), clock=AsyncTellingClock(tell)) as client,
            trio.open_nursery() as nursery,
        ):

            async def call() -> None:
                for _ in range(CALLS // CALLERS):
                    await allowed.acquire()
                    key = fresh_key()
                    try:
                        outcomes[key] = await client.reserve(lines, order_ref=key, key=key)
                    except SlotkeeperError as error:
                        outcomes[key] = error
                    to_killer.send_nowait(None)

            def allow(count: int) -> None:
                for _ in range(count):
                    allowed.release()

            for _ in range(CALLERS):
                nursery.start_soon(call)
            for role, index in KILLS:
                allow(CALLS_BEFORE)
                for _ in range(3):
                    await answered.receive()
                if role == "worker":
                    with engine.frozen_supervisor():
                        await trio.to_thread.run_sync(engine.kill, role, index)
                        paused = trio.Event()
                        allow(CALLS_AFTER)
                        with trio.fail_after(PATIENCE_SECONDS):
                            await paused.wait()
                else:
                    await trio.to_thread.run_sync(engine.kill, role, index)
                    allow(CALLS_AFTER)
                await trio.to_thread.run_sync(engine.wait_ready, role, index)
        assert client.statistics().retries > 0

    with Client(url_of(engine), INSISTENT, budget=plenty()) as client:
        lines = one_counter(client)
        trio.run(main, lines)
        settle(client, lines, outcomes)
    engine.stop()


def one_counter(client: Client) -> list[Line]:
    client.put_pool("van", capacity_type="logistics", unit="stop", time_zone="UTC")
    client.put_counter("van", slot_id(), base=UNITS)
    return [Line("van", slot_id(), 1)]


def settle(client: Client, lines: list[Line], outcomes: dict[str, object]) -> None:
    """Every call ended in an answer or a true exception; each key took one unit or none; no unit was given twice."""
    taken: dict[str, str] = {}
    for key, outcome in outcomes.items():
        assert isinstance(outcome, Reservation | InsufficientCapacity | OutcomeUnknown | NotExecuted), outcome
        was_executed: Reservation | None = None
        with contextlib.suppress(InsufficientCapacity):
            was_executed = client.reserve(lines, order_ref=key, key=key)
        if isinstance(outcome, Reservation):
            assert was_executed is not None
            assert was_executed.reservation_id == outcome.reservation_id
        elif not outcome.maybe_executed:
            # Nothing was done, so asking again found no room.
            assert was_executed is None
        if was_executed is not None:
            taken[key] = was_executed.reservation_id
    assert len(outcomes) == CALLS
    assert len(set(taken.values())) == len(taken) == UNITS
    counter = client.counter("van", lines[0].slot_id)
    assert (counter.confirmed, counter.used, counter.available) == (UNITS, UNITS, 0)


# --- the page about it ------------------------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "client.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_code_of_the_page_does_what_it_says(engine: Engine) -> None:
    """Every block of Python runs, one after the other; a block of text that follows is what it prints."""
    pool_id = fresh("van-north")
    text = PAGE.read_text()
    for word, real in (
        ("http://127.0.0.1:7411", url_of(engine)),
        ("2027-12-01", str(DAY)),
        ("van-north", pool_id),
        ("pick-dc1", fresh("pick-dc1")),
    ):
        text = text.replace(word, real)
    with Client(url_of(engine)) as client:
        client.put_pool(pool_id, capacity_type="logistics", unit="stop", time_zone="Europe/Berlin")
        for hour, base in ((18, 40), (20, 60)):
            client.put_counter(pool_id, slot_id(0, hour), base=base)
    names: dict[str, Any] = {"__name__": "page"}
    blocks = BLOCK.findall(text)
    try:
        for index, (kind, code) in enumerate(blocks):
            if kind == "python":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(code, f"{PAGE.name}, block {index}", "exec"), names)
                expected = blocks[index + 1][1] if index + 1 < len(blocks) and blocks[index + 1][0] == "text" else ""
                assert printed.getvalue() == expected, code
    finally:
        for each in names.values():
            if isinstance(each, Client):
                each.close()
    assert sum(kind == "python" for kind, _ in blocks) >= 6


def test_the_page_names_every_exception_and_setting() -> None:
    text = PAGE.read_text()
    names = [*(kind.__name__ for kind in CLASS_OF_CODE.values()), *Settings.__dataclass_fields__]
    assert {name for name in names if f"`{name}`" not in text} == set()
