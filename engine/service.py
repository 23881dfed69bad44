"""Commands in, replies out, over a unix socket: what workers and the planner have in common.

A connection is read by one task, which hands each frame to the owner's `take` as it arrives; `take` never waits. Replies are
written at once where the socket takes them and by a task of the connection where it does not.

Rules
- Everything is bounded: a peer that does not read its replies is cut off at OUTBOX_BYTES_MAX; it will connect again.
- A peer that sends no frames is cut off with a line in the log; it cannot end the process.

Not promised: that a reply reaches a peer that went away. It asks again with the same key.
"""

import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog
import trio

from engine import wire

OUTBOX_BYTES_MAX = 64 * 1024 * 1024
CONNECTIONS_MAX = 512
"""Api processes, the planner and a few command-line tools connect: far fewer than this."""
BACKLOG = 128
ACCEPT_PAUSE_S = 0.1
"""After accept failed: nobody is served sooner by asking at once."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("service")

RECEIVE_ERRORS = (OSError, wire.FrameError, msgspec.DecodeError, UnicodeDecodeError)


class Connection:
    """One peer."""

    def __init__(self, peer: socket.socket) -> None:
        self._socket = peer
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._writable = trio.Event()
        self.closed = False

    def send(self, data: bytes) -> None:
        """Send a frame, or keep it for the writer task. Never waits."""
        if self.closed:
            return
        if not self._outbox:
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.close()
                return
            if sent == len(data):
                return
            data = data[sent:]
        self._outbox.append(data)
        self._outbox_bytes += len(data)
        if self._outbox_bytes > OUTBOX_BYTES_MAX:
            log.warning("a peer does not read its replies and is cut off", bytes_waiting=self._outbox_bytes)
            self.close()
            return
        self._writable.set()

    async def write_rest(self) -> None:
        """The writer task: sends what `send` could not."""
        while not self.closed:
            await self._writable.wait()
            self._writable = trio.Event()
            while self._outbox and not self.closed:
                try:
                    await trio.lowlevel.wait_writable(self._socket)
                    sent = self._socket.send(self._outbox[0])
                except BlockingIOError:
                    continue
                except trio.ClosedResourceError:
                    return  # closed by `send` or by the reader: that is its news to tell
                except OSError:
                    self.close()
                    return
                self._outbox_bytes -= sent
                if sent == len(self._outbox[0]):
                    self._outbox.popleft()
                else:
                    self._outbox[0] = self._outbox[0][sent:]

    async def receive(self) -> bytes:
        """The next bytes; empty when the peer is gone or was cut off."""
        while not self.closed:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(wire.RECEIVE_BYTES)
            except BlockingIOError:
                continue
        return b""

    def close(self) -> None:
        """Cut the peer off. Idempotent."""
        if not self.closed:
            self.closed = True
            self._writable.set()
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


def bind(path: Path) -> socket.socket:
    """A listening unix socket at `path`, in place of what a process before left there."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    temporary = path.with_suffix(".new")
    with suppress(FileNotFoundError):
        temporary.unlink()
    listener.bind(str(temporary))
    temporary.chmod(0o600)
    listener.listen(BACKLOG)
    temporary.replace(path)
    return listener


async def connect(path: Path) -> socket.socket:
    """A connected, non-blocking unix socket. Raises OSError."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.setblocking(False)
    try:
        peer.connect(str(path))
        await trio.lowlevel.checkpoint()
    except BaseException:
        peer.close()
        raise
    return peer


async def serve(listener: socket.socket, take: Callable[[Connection, bytes], None]) -> None:
    """Accept peers and hand their frames to `take` until cancelled."""
    connections: set[Connection] = set()

    async def read(connection: Connection) -> None:
        reader = wire.FrameReader()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.write_rest)
            try:
                while data := await connection.receive():
                    for payload in reader.feed(data):
                        take(connection, payload)
            except trio.ClosedResourceError:
                pass  # cut off by `send`
            except RECEIVE_ERRORS as error:
                log.warning("a connection was cut off", error=str(error))
            finally:
                connection.close()
                connections.discard(connection)
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    peer, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError as error:  # no file or no memory left: those connected go on, newcomers wait
                    log.warning("a connection could not be accepted", error=str(error))
                    await trio.sleep(ACCEPT_PAUSE_S)
                    continue
                peer.setblocking(False)
                if len(connections) >= CONNECTIONS_MAX:
                    log.warning("too many connections", connections=len(connections))
                    peer.close()
                    continue
                connection = Connection(peer)
                connections.add(connection)
                nursery.start_soon(read, connection)
    finally:
        listener.close()
