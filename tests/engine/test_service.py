"""Sockets: nothing waits in `send`, nothing is lost or doubled, and a place is taken over from a process that died."""

import hashlib
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from engine import service, wire
from engine.service import Connection
from tests.engine.engine_tools import PATIENCE_SECONDS, until


@asynccontextmanager
async def served(path: Path, take: Callable[[Connection, bytes], None]) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.serve, service.bind(path), take)
        yield nursery
        nursery.cancel_scope.cancel()


def pair() -> tuple[Connection, socket.socket]:
    mine, other = socket.socketpair()
    mine.setblocking(False)
    other.setblocking(False)
    return Connection(mine), other


async def read_all(peer: socket.socket) -> bytes:
    data = bytearray()
    with trio.fail_after(PATIENCE_SECONDS):
        while True:
            await trio.lowlevel.wait_readable(peer)
            try:
                part = peer.recv(100_000)
            except ConnectionResetError:
                break
            if not part:
                break
            data += part
    return bytes(data)


async def test_what_the_socket_does_not_take_is_sent_later_whole_and_in_order() -> None:
    connection, other = pair()
    sent = [bytes([number]) * (50_000 + number) for number in range(100)]
    received = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.write_rest)
        for data in sent:
            connection.send(data)  # never waits: nobody has read yet
        assert connection._outbox_bytes > 4_000_000

        async def close_when_sent() -> None:
            await until(lambda: connection._outbox_bytes == 0)
            connection.close()

        nursery.start_soon(close_when_sent)
        received = await read_all(other)
    assert hashlib.sha256(received).digest() == hashlib.sha256(b"".join(sent)).digest()
    other.close()


async def test_a_peer_that_does_not_read_is_cut_off_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "OUTBOX_BYTES_MAX", 100_000)
    connection, other = pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.write_rest)
        await trio.testing.wait_all_tasks_blocked()
        while not connection.closed:
            connection.send(bytes(10_000))
            assert connection._outbox_bytes <= 100_000 + 10_000
            await trio.lowlevel.checkpoint()
    connection.send(b"more")
    assert len(await read_all(other)) % 10_000 != 1
    other.close()


async def test_closing_twice_and_sending_afterwards_is_harmless() -> None:
    connection, other = pair()
    connection.close()
    connection.close()
    connection.send(b"nothing")
    assert await read_all(other) == b""
    other.close()


async def test_a_peer_that_is_gone_closes_the_connection_at_the_next_send() -> None:
    connection, other = pair()
    other.close()
    connection.send(b"hello")
    assert connection.closed


async def test_a_socket_replaces_the_one_a_killed_process_left(tmp_path: Path) -> None:
    path = tmp_path / "worker-00.sock"
    service.bind(path).close()
    with pytest.raises(ConnectionRefusedError):
        await service.connect(path)
    (tmp_path / "worker-00.new").write_bytes(b"left by one that died a moment earlier")
    echoed = []
    async with served(path, lambda connection, payload: echoed.append(payload)):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert [each.name for each in tmp_path.iterdir()] == [path.name]  # noqa: ASYNC240 - a directory of one
        peer = await service.connect(path)
        peer.send(wire.frame(5))
        await until(lambda: echoed == [b"\x05"])
        peer.close()


async def test_nobody_listens_before_the_socket_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await service.connect(tmp_path / "worker-00.sock")


async def test_frames_of_many_peers_arrive_whole_and_in_the_order_of_each(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    found: dict[Connection, list[bytes]] = {}

    def take(connection: Connection, payload: bytes) -> None:
        found.setdefault(connection, []).append(payload)

    stream = b"".join(wire.frame(number) for number in range(100))

    async def talk(step_bytes: int) -> None:
        peer = await service.connect(path)
        for start in range(0, len(stream), step_bytes):
            peer.send(stream[start : start + step_bytes])
            await trio.lowlevel.checkpoint()
        peer.close()

    async with served(path, take), trio.open_nursery() as talking:
        for step_bytes in (1, 3, 7, 1_000):
            talking.start_soon(talk, step_bytes)
        await until(lambda: sum(map(len, found.values())) == 400)
    payloads = [wire.encoder.encode(number) for number in range(100)]
    assert list(found.values()) == [payloads] * 4
