"""aiosqlite on trio: one SQLite connection, owned by one thread, awaited from trio.

aiosqlite hands every call to the connection's own thread and awaits an asyncio future. Under trio that raises
`TypeError`. `TrioConnection` overrides the three methods that make futures (`_execute`, `_connect`, `stop`) so that they
make one which trio can wait for; the thread, its queue and all other methods of aiosqlite stay as they are.

Rules:
- A wait is never abandoned. What was handed to the thread happens, so its outcome is delivered even to a cancelled task;
  the cancellation is felt at that task's next checkpoint. A journal must not lose the outcome of a commit.
- `run` is one hop: the function gets the `sqlite3.Connection` in its thread and may do several statements there.
- `close` is shielded from cancellation and idempotent. `abandon` is for a connection whose last commit failed: SQLite's own
  close would checkpoint, so the connection is kept as it is until the process dies.

Not promised: more than one trio run for a connection. Private methods of aiosqlite are overridden; the version is pinned
below 0.23 for that reason and `tests/journal/test_trio_sqlite.py` guards what is relied on.
"""

import sqlite3
import warnings
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Final, Self, TypeVar

import aiosqlite
import trio

Result = TypeVar("Result")

_abandoned: Final[list["TrioConnection"]] = []
"""Connections that must never be closed. The reference keeps the garbage collector from closing them."""


class _TrioFuture:
    """What aiosqlite's thread expects of a future and of its event loop, over trio. One task waits, once."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._waiter: trio.lowlevel.Task | None = None
        self._done = False
        self._result: Any = None
        self._exception: BaseException | None = None

    def get_loop(self) -> "_TrioFuture":
        return self

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        """Called in the connection's thread."""
        try:
            self._token.run_sync_soon(partial(callback, *args))
        except trio.RunFinishedError:
            # Nobody is left to be told. Raising would end the thread in the middle of its queue.
            return

    def done(self) -> bool:
        return self._done

    def set_result(self, result: Any) -> None:
        self._result = result
        self._finish()

    def set_exception(self, exception: BaseException) -> None:
        self._exception = exception
        self._finish()

    def _finish(self) -> None:
        self._done = True
        if self._waiter is not None:
            trio.lowlevel.reschedule(self._waiter)

    async def wait(self) -> Any:
        """The outcome, whatever happens to the waiter's cancel scope."""
        if not self._done:
            self._waiter = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(lambda _raise_cancel: trio.lowlevel.Abort.FAILED)
        if self._exception is not None:
            raise self._exception
        return self._result

    def __await__(self) -> Generator[Any, None, Any]:
        return self.wait().__await__()


class TrioConnection(aiosqlite.Connection):
    """An `aiosqlite.Connection` for trio. Made by `connect`."""

    def __init__(self, connector: Callable[[], sqlite3.Connection]) -> None:
        super().__init__(connector, iter_chunk_size=64)
        # A process whose main thread has died must end and give up its journal's lock, not wait for this thread.
        self._thread.daemon = True
        self._closed: trio.Event | None = None
        self._is_abandoned = False

    def __del__(self) -> None:
        if self._connection is not None and not self._is_abandoned:
            warnings.warn(f"{self!r} was neither closed nor abandoned", ResourceWarning, stacklevel=1, source=self)

    async def __aenter__(self) -> Self:
        await self
        return self

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._running or self._connection is None:
            raise ValueError("this connection is closed")
        future = _TrioFuture()
        self._tx.put_nowait((future, partial(fn, *args, **kwargs)))  # type: ignore[arg-type]  # trio's future
        return await future.wait()

    async def _connect(self) -> "TrioConnection":
        if self._connection is None:
            future = _TrioFuture()
            self._tx.put_nowait((future, self._connector))  # type: ignore[arg-type]  # trio's future
            try:
                self._connection = await future.wait()
            except BaseException:
                await self.stop().wait()
                raise
        return self

    def stop(self) -> _TrioFuture:  # type: ignore[override]  # trio's future
        """End the thread after what is queued, closing the connection."""
        self._running = False

        def close_and_stop() -> object:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            return aiosqlite.core._STOP_RUNNING_SENTINEL  # noqa: SLF001 - the sign on which the thread ends

        future = _TrioFuture()
        self._tx.put_nowait((future, close_and_stop))  # type: ignore[arg-type]  # trio's future
        return future

    async def run(self, function: Callable[[sqlite3.Connection], Result]) -> Result:
        """Call `function` with the raw connection in the connection's thread: one hop, not cancellable."""
        if self._connection is None:
            raise ValueError("this connection is closed")
        result: Result = await self._execute(function, self._connection)
        return result

    async def close(self) -> None:
        """Close the connection and end its thread. Idempotent, shielded; a second caller waits for the first."""
        with trio.CancelScope(shield=True):
            if self._closed is not None:
                await self._closed.wait()
            elif self._connection is not None:
                self._closed = trio.Event()
                try:
                    await super().close()
                finally:
                    self._closed.set()

    def abandon(self) -> None:
        """Never close this connection: its last commit failed, and closing would write. The process is to die."""
        self._is_abandoned = True
        _abandoned.append(self)


async def connect(connector: Callable[[], sqlite3.Connection]) -> TrioConnection:
    """Open a connection in a thread of its own. The caller closes it in a `finally`, or abandons it."""
    connection = TrioConnection(connector)
    await connection
    return connection
