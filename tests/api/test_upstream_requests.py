"""Requests to a worker that is scripted step by step: what travels, what is sent again, and what each caller hears.

The worker is a real unix socket; the clock that deadlines are read from is set by hand. `test_upstream.py` tells the same
truth by what a caller hears from a whole sequence of workers.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from api.upstream import RECONNECT_S_MIN, TooMany, Unanswered, Unsent, Upstream
from engine import service, wire
from engine.core import commands
from engine.core.outcomes import Outcome, Refused, ShardReply

PATIENCE_SECONDS = 30
REQUESTS_MAX = 4
DEADLINE_MS = 1_000

Message = tuple[int, int, commands.ShardCommand]
Heard = ShardReply | type[Exception]


class HandClock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.ms = 0

    def now_ms(self) -> int:
        return self.ms

    def monotonic_ms(self) -> int:
        return self.ms


class Peer:
    """One accepted connection, on the worker's side."""

    def __init__(self, connection: trio.SocketStream) -> None:
        self.connection = connection
        self._frames = wire.FrameReader()

    async def take(self) -> list[Message]:
        """The messages of the next frame."""
        while data := await self.connection.receive_some():
            for payload in self._frames.feed(data):
                return wire.shard_commands.decode(payload)
        raise EOFError

    async def answer(self, *replies: tuple[int, ShardReply]) -> None:
        await self.connection.send_all(wire.frame(replies))

    async def hang_up(self) -> None:
        await self.connection.aclose()


class Script:
    """The place of a worker, empty at first, and the upstream that asks it."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.clock = HandClock()
        self.heard: dict[int, Heard] = {}
        self.upstream: Upstream[ShardReply] = Upstream(
            directory / "worker.sock", wire.shard_replies.decode, self.clock, requests_max=REQUESTS_MAX
        )
        self._path = directory / "worker.sock"
        self._nursery = nursery
        self._changed = trio.Event()
        self._listener: trio.SocketListener | None = None
        self._peers: list[Peer] = []

    def listen(self) -> None:
        """A worker comes."""
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(service.bind(self._path)))

    async def leave(self) -> None:
        """It goes: its socket refuses."""
        if self._listener is not None:
            await self._listener.aclose()

    async def accept(self) -> Peer:
        assert self._listener is not None
        peer = Peer(await self._listener.accept())
        self._peers.append(peer)
        return peer

    async def close(self) -> None:
        await self.leave()
        for peer in self._peers:
            await peer.hang_up()

    def ask(self, number: int, *, again: bool = True, scope: trio.CancelScope | None = None) -> None:
        """A caller asks for reservation `number`, with DEADLINE_MS from now."""
        self._nursery.start_soon(self._ask, number, again, scope or trio.CancelScope())

    async def _ask(self, number: int, again: bool, scope: trio.CancelScope) -> None:
        deadline_ms = self.clock.ms + DEADLINE_MS
        with scope:
            try:
                self.heard[number] = await self.upstream.ask(commands.Look(number), deadline_ms, again=again)
            except (Unsent, Unanswered, TooMany) as error:
                self.heard[number] = type(error)
        self._changed.set()
        self._changed = trio.Event()

    async def hears(self, number: int) -> Heard:
        """What a caller hears."""
        while number not in self.heard:
            await self._changed.wait()
        return self.heard[number]

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def _script(directory: Path) -> AsyncIterator[Script]:
    with trio.fail_after(PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            script = Script(directory, nursery)
            nursery.start_soon(script.upstream.run)
            try:
                yield script
            finally:
                with trio.CancelScope(shield=True):
                    await script.leave()
                    # A connection that is just being made belongs to nobody for a moment.
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
                    await script.close()


def _reply(seq: int, outcome: Outcome = Outcome.UNKNOWN_RESERVATION) -> ShardReply:
    return Refused(seq, outcome)


def _asked(messages: list[Message]) -> dict[int, int]:
    """Reservation -> request id."""
    return {command.number: request_id for request_id, _, command in messages if isinstance(command, commands.Look)}


async def test_each_caller_hears_its_own_answer_in_whatever_order_they_come(tmp_path: Path) -> None:
    async with _script(tmp_path) as script:
        script.listen()
        peer = await script.accept()
        for number in (1, 2, 3):
            script.ask(number)
        asked: dict[int, int] = {}
        while len(asked) < 3:
            messages = await peer.take()
            assert all(deadline_ms == DEADLINE_MS for _, deadline_ms, _ in messages)
            asked |= _asked(messages)
        await peer.answer((asked[3], _reply(33)), (asked[1], _reply(11)))
        assert await script.hears(3) == _reply(33)
        assert await script.hears(1) == _reply(11)
        assert script.upstream.statistics() == (True, 1, 1)
        await peer.answer((asked[2], _reply(22)))
        assert await script.hears(2) == _reply(22)


async def test_requests_wait_for_a_worker_that_is_not_there_yet(tmp_path: Path) -> None:
    async with _script(tmp_path) as script:
        script.ask(1)
        script.ask(2, again=False)
        await script.until(lambda: script.upstream.statistics().in_flight == 2)
        script.listen()
        peer = await script.accept()
        asked = _asked(await peer.take())
        await peer.answer(*((request_id, _reply(number)) for number, request_id in asked.items()))
        assert [await script.hears(number) for number in (1, 2)] == [_reply(1), _reply(2)]


async def test_a_worker_that_goes_and_comes_back_is_a_pause(tmp_path: Path) -> None:
    async with _script(tmp_path) as script:
        script.listen()
        peer = await script.accept()
        script.ask(1)
        before = await peer.take()
        await script.leave()
        await peer.hang_up()
        script.ask(2)
        await script.until(lambda: script.upstream.statistics() == (False, 2, 1))
        script.listen()
        peer = await script.accept()
        # The same request with the same name and deadline, before what came later, and each once.
        after = await peer.take()
        assert after[:1] == before
        assert len(_asked(after)) == len(after) == 2
        await peer.answer(*((request_id, _reply(number)) for number, request_id in _asked(after).items()))
        assert [await script.hears(number) for number in (1, 2)] == [_reply(1), _reply(2)]
        assert script.upstream.statistics() == (True, 0, 2)


async def test_what_is_lost_several_times_is_sent_once_each_time(tmp_path: Path) -> None:
    async with _script(tmp_path) as script:
        script.listen()
        for number in (1, 2):
            script.ask(number)
        await script.until(lambda: script.upstream.statistics().in_flight == 2)
        for _ in range(3):
            await (await script.accept()).hang_up()
        peer = await script.accept()
        messages = await peer.take()
        assert sorted(_asked(messages)) == [1, 2]
        assert len(messages) == 2


async def test_a_worker_that_hangs_up_at_once_is_not_asked_without_a_pause(tmp_path: Path) -> None:
    async with _script(tmp_path) as script:
        script.listen()
        began = trio.current_time()
        for _ in range(5):
            await (await script.accept()).hang_up()
        assert trio.current_time() - began >= 4 * RECONNECT_S_MIN


@pytest.mark.parametrize("rubbish", [b"HTTP/1.1 400 Bad Request\r\n", b"\0\0\0\1\xc1", b"\0\0\0\2\x91\x01"])
async def test_a_worker_that_answers_rubbish_is_left_and_asked_anew(tmp_path: Path, rubbish: bytes) -> None:
    async with _script(tmp_path) as script:
        script.listen()
        peer = await script.accept()
        script.ask(1)
        before = await peer.take()
        await peer.connection.send_all(rubbish)
        peer = await script.accept()
        assert await peer.take() == before
        await peer.answer((before[0][0], _reply(1)))
        assert await script.hears(1) == _reply(1)


async def test_a_deadline_before_it_was_sent_means_that_nothing_was_done(tmp_path: Path) -> None:
    async with _script(tmp_path) as script:
        script.ask(1)
        await script.until(lambda: script.upstream.statistics().in_flight == 1)
        script.clock.ms = DEADLINE_MS - 1
        script.ask(2)
        await script.until(lambda: script.upstream.statistics().in_flight == 2)
        script.clock.ms = DEADLINE_MS
        assert await script.hears(1) is Unsent
        # What nobody waits for is not sent.
        script.listen()
        peer = await script.accept()
        assert list(_asked(await peer.take())) == [2]


async def test_a_deadline_after_it_was_sent_leaves_it_unknown(tmp_path: Path) -> None:
    async with _script(tmp_path) as script:
        script.listen()
        peer = await script.accept()
        script.ask(1)
        ((request_id, _, _),) = await peer.take()
        script.clock.ms = DEADLINE_MS
        assert await script.hears(1) is Unanswered
        # An answer that comes too late is nobody's.
        await peer.answer((request_id, _reply(1)))
        script.ask(2)
        asked = _asked(await peer.take())
        await peer.answer((asked[2], _reply(2)))
        assert await script.hears(2) == _reply(2)


async def test_a_deadline_after_it_was_sent_to_a_worker_that_is_gone_leaves_it_unknown(tmp_path: Path) -> None:
    async with _script(tmp_path) as script:
        script.listen()
        peer = await script.accept()
        script.ask(1)
        await peer.take()
        await script.leave()
        await peer.hang_up()
        await script.until(lambda: not script.upstream.statistics().connected)
        script.clock.ms = DEADLINE_MS
        assert await script.hears(1) is Unanswered


async def test_what_may_not_be_sent_again_is_unknown_at_once(tmp_path: Path) -> None:
    async with _script(tmp_path) as script:
        script.listen()
        peer = await script.accept()
        script.ask(1, again=False)
        await peer.take()
        await peer.hang_up()
        assert await script.hears(1) is Unanswered
        assert script.clock.ms == 0
        script.ask(2)
        peer = await script.accept()
        assert list(_asked(await peer.take())) == [2]


async def test_too_many_are_refused_at_once_and_nothing_is_sent(tmp_path: Path) -> None:
    async with _script(tmp_path) as script:
        for number in range(1, REQUESTS_MAX + 1):
            script.ask(number)
        await script.until(lambda: script.upstream.statistics().in_flight == REQUESTS_MAX)
        script.ask(99)
        assert await script.hears(99) is TooMany
        script.listen()
        peer = await script.accept()
        asked = _asked(await peer.take())
        assert sorted(asked) == list(range(1, REQUESTS_MAX + 1))
        await peer.answer((asked[1], _reply(1)))
        assert await script.hears(1) == _reply(1)
        script.ask(100)
        assert list(_asked(await peer.take())) == [100]


async def test_a_caller_that_gives_up_frees_its_place(tmp_path: Path) -> None:
    async with _script(tmp_path) as script:
        scope = trio.CancelScope()
        script.ask(1, scope=scope)
        await script.until(lambda: script.upstream.statistics().in_flight == 1)
        scope.cancel()
        await script.until(lambda: script.upstream.statistics().in_flight == 0)
        script.listen()
        peer = await script.accept()
        script.ask(2)
        asked = _asked(await peer.take())
        assert list(asked) == [2]
        await peer.answer((asked[2], _reply(2)))
        assert await script.hears(2) == _reply(2)
