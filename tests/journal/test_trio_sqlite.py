"""What is relied on of aiosqlite's private methods, which trio_sqlite.py overrides."""

import gc
import sqlite3
import threading
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from engine.journal import trio_sqlite
from engine.journal.trio_sqlite import TrioConnection, connect


def connector(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("CREATE TABLE IF NOT EXISTS word (text TEXT)")
    return connection


def count_words(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        [(words,)] = connection.execute("SELECT count(*) FROM word").fetchall()
    finally:
        connection.close()
    return int(words)


async def test_the_methods_of_aiosqlite_work_on_trio(tmp_path: Path) -> None:
    async with TrioConnection(partial(connector, tmp_path / "a.sqlite")) as connection:
        await connection.execute_insert("INSERT INTO word VALUES (?)", ("one",))
        async with connection.execute("SELECT text FROM word") as cursor:
            assert list(await cursor.fetchall()) == [("one",)]
        assert await connection.run(lambda raw: raw.total_changes) == 1


async def test_calls_run_in_the_threads_order(tmp_path: Path) -> None:
    connection = await connect(partial(connector, tmp_path / "a.sqlite"))
    seen: list[str] = []
    gate = threading.Event()

    def wait_at_gate(_raw: sqlite3.Connection) -> None:
        gate.wait(10)
        seen.append("first")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run, wait_at_gate)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(connection.run, lambda _raw: seen.append("second"))
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert seen == ["first", "second"]
    await connection.close()


async def test_a_cancelled_waiter_still_gets_the_outcome_of_its_commit(tmp_path: Path) -> None:
    connection = await connect(partial(connector, tmp_path / "a.sqlite"))
    gate = threading.Event()
    outcome: list[str] = []

    def insert_after_gate(raw: sqlite3.Connection) -> str:
        gate.wait(10)
        raw.execute("INSERT INTO word VALUES ('committed')").close()
        return "committed"

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def insert() -> None:
                outcome.append(await connection.run(insert_after_gate))

            nursery.start_soon(insert)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            gate.set()
    assert scope.cancel_called
    assert outcome == ["committed"]
    await connection.close()
    assert count_words(tmp_path / "a.sqlite") == 1


async def test_exceptions_of_the_thread_come_through(tmp_path: Path) -> None:
    async with TrioConnection(partial(connector, tmp_path / "a.sqlite")) as connection:
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            await connection.run(lambda raw: raw.execute("SELECT * FROM nowhere"))
        assert await connection.run(lambda _raw: "the thread lives on") == "the thread lives on"


async def test_a_connector_that_fails_leaves_no_thread() -> None:
    threads = threading.active_count()

    def refuse() -> sqlite3.Connection:
        raise sqlite3.OperationalError("refused")

    connection = TrioConnection(refuse)
    with pytest.raises(sqlite3.OperationalError, match="refused"):
        await connection
    connection._thread.join(10)
    assert threading.active_count() == threads


async def test_close_is_idempotent_and_a_second_caller_waits_for_the_first(tmp_path: Path) -> None:
    connection = await connect(partial(connector, tmp_path / "a.sqlite"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.close)
        nursery.start_soon(connection.close)
    await connection.close()
    connection._thread.join(10)
    assert not connection._thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        await connection.run(lambda raw: raw.total_changes)


async def test_close_in_a_cancelled_scope_closes(tmp_path: Path) -> None:
    connection = await connect(partial(connector, tmp_path / "a.sqlite"))
    with trio.CancelScope() as scope:
        scope.cancel()
        await connection.close()
    connection._thread.join(10)
    assert not connection._thread.is_alive()


async def test_an_abandoned_connection_is_kept_open_by_itself(tmp_path: Path) -> None:
    connection = await connect(partial(connector, tmp_path / "a.sqlite"))
    raw = connection._conn
    connection.abandon()
    del connection
    gc.collect()
    kept = trio_sqlite._abandoned.pop()
    assert await kept.run(lambda same: same is raw)
    await kept.close()


async def test_a_forgotten_connection_warns(tmp_path: Path) -> None:
    connection = await connect(partial(connector, tmp_path / "a.sqlite"))
    with pytest.warns(ResourceWarning, match="neither closed nor abandoned"):
        connection.__del__()
    await connection.close()
