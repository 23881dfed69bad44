"""The contract of `engine.ports.Journal`, held by the real journal and by its twin alike."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import pytest
import trio

from engine.core.invariant import InvariantError
from engine.journal.memory import MemoryDisk, open_memory_journal
from engine.journal.segments import list_segments
from engine.journal.sqlite import open_journal
from engine.ports import (
    GENESIS,
    GENESIS_HASH,
    Journal,
    JournalCorruptError,
    JournalError,
    JournalLockedError,
    JournalRow,
    Position,
)
from tests.journal.journal_tools import body_of


class World(Protocol):
    """A place that outlives the journals opened on it."""

    async def open(self, *, epoch: int = 1, restart: int | None = None) -> Journal: ...

    def lose_last_row(self) -> None: ...

    def alter_row(self, seq: int) -> None: ...


class SqliteWorld:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    async def open(self, *, epoch: int = 1, restart: int | None = None) -> Journal:
        return await open_journal(self.directory, epoch=epoch, restart=restart)

    def lose_last_row(self) -> None:
        self._execute("DELETE FROM batch WHERE seq = (SELECT max(seq) FROM batch)")

    def alter_row(self, seq: int) -> None:
        self._execute(f"UPDATE batch SET body = replace(body, 'held', 'hold') WHERE seq = {seq}")

    def _execute(self, sql: str) -> None:
        import sqlite3

        connection = sqlite3.connect(list_segments(self.directory)[-1], isolation_level=None)
        connection.execute(sql)
        connection.close()


class MemoryWorld:
    def __init__(self) -> None:
        self.disk = MemoryDisk()

    async def open(self, *, epoch: int = 1, restart: int | None = None) -> Journal:
        return open_memory_journal(self.disk, epoch=epoch, restart=restart)

    def lose_last_row(self) -> None:
        del self.disk.rows[-1]

    def alter_row(self, seq: int) -> None:
        for index, row in enumerate(self.disk.rows):
            if row.seq == seq:
                values = {name: getattr(row, name) for name in JournalRow.__dataclass_fields__}
                self.disk.rows[index] = JournalRow(**{**values, "body": row.body.replace(b"held", b"hold")})


@pytest.fixture(params=["sqlite", "memory"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return SqliteWorld(tmp_path / "shard-00") if request.param == "sqlite" else MemoryWorld()


async def append(journal: Journal, count: int = 1) -> JournalRow:
    seq = journal.head.seq + 1
    return await journal.append(count=count, at_ms=1000 + seq, schema=1, body=body_of(seq, count))


async def test_a_new_journal_is_empty(world: World) -> None:
    journal = await world.open()
    assert journal.head == GENESIS
    assert list(journal.read(GENESIS)) == []
    await journal.close()


async def test_an_append_returns_the_row_and_moves_the_head(world: World) -> None:
    journal = await world.open(epoch=7)
    first = await append(journal, count=3)
    second = await append(journal)
    assert (first.seq, first.count, first.epoch, first.restart, first.prev_hash) == (1, 3, 7, 0, GENESIS_HASH)
    assert (second.seq, second.prev_hash) == (4, first.hash)
    assert first.end == Position(3, first.hash)
    assert journal.head == second.end
    assert first.body == body_of(1, 3)
    await journal.close()


async def test_both_kinds_of_journal_make_the_same_rows(tmp_path: Path) -> None:
    rows = []
    for world in (SqliteWorld(tmp_path / "shard-00"), MemoryWorld()):
        journal = await world.open()
        rows.append([await append(journal, count) for count in (1, 2, 3)])
        await journal.close()
    assert rows[0] == rows[1]


async def test_reading_gives_the_rows_after_a_position(world: World) -> None:
    journal = await world.open()
    rows = [await append(journal, count) for count in (2, 1, 4)]
    await journal.close()
    journal = await world.open()
    assert journal.head == rows[-1].end
    assert list(journal.read(GENESIS)) == rows
    assert list(journal.read(rows[0].end)) == rows[1:]
    assert list(journal.read(rows[2].end)) == []
    await journal.close()


@pytest.mark.parametrize(
    ("position_of", "what"),
    [
        (lambda rows: Position(rows[1].end.seq, b"?" * 16), "not in this journal"),
        (lambda rows: Position(rows[0].seq, rows[0].hash), "not in this journal"),
        (lambda rows: Position(99, rows[-1].hash), "not in this journal"),
    ],
    ids=["another hash", "inside a row", "after the end"],
)
async def test_a_position_of_another_history_is_refused(
    world: World, position_of: Callable[[list[JournalRow]], Position], what: str
) -> None:
    journal = await world.open()
    rows = [await append(journal, 2) for _ in range(3)]
    with pytest.raises(JournalCorruptError, match=what):
        list(journal.read(position_of(rows)))
    await journal.close()


@pytest.mark.parametrize(
    ("epoch", "restart", "expected"),
    [(5, None, (5, 3)), (6, None, (6, 0)), (5, 2, (5, 2)), (5, 9, (5, 9)), (8, 4, (8, 4))],
)
async def test_epoch_and_restart_go_on(
    world: World, epoch: int, restart: int | None, expected: tuple[int, int]
) -> None:
    journal = await world.open(epoch=5, restart=2)
    await append(journal)
    await journal.close()
    journal = await world.open(epoch=epoch, restart=restart)
    row = await append(journal)
    assert (row.epoch, row.restart) == expected
    assert len(list(journal.read(GENESIS))) == 2
    await journal.close()


@pytest.mark.parametrize(("epoch", "restart"), [(4, None), (4, 9), (5, 1)])
async def test_epoch_and_restart_never_go_back(world: World, epoch: int, restart: int | None) -> None:
    journal = await world.open(epoch=5, restart=2)
    await append(journal)
    await journal.close()
    with pytest.raises(JournalError, match="gone back"):
        await world.open(epoch=epoch, restart=restart)
    journal = await world.open(epoch=5)
    await journal.close()


async def test_a_restart_without_a_row_counts_from_the_last_row(world: World) -> None:
    for _ in range(2):
        journal = await world.open(epoch=1)
        await journal.close()
    journal = await world.open(epoch=1)
    assert (await append(journal)).restart == 0
    await journal.close()


async def test_time_never_goes_back(world: World) -> None:
    journal = await world.open()
    await journal.append(count=1, at_ms=50, schema=1, body=body_of(1))
    with pytest.raises(InvariantError, match="time"):
        await journal.append(count=1, at_ms=49, schema=1, body=body_of(2))
    await journal.append(count=1, at_ms=50, schema=1, body=body_of(2))
    await journal.close()


async def test_a_second_holder_is_refused_until_the_first_has_closed(world: World) -> None:
    journal = await world.open()
    with pytest.raises(JournalLockedError, match="open for writing"):
        await world.open()
    await append(journal)
    await journal.close()
    journal = await world.open()
    assert journal.head.seq == 1
    await journal.close()


async def test_close_is_idempotent_and_final(world: World) -> None:
    journal = await world.open()
    await append(journal)
    await journal.close()
    await journal.close()
    refused: list[Callable[[], Awaitable[object]]] = [lambda: append(journal), journal.maintain]
    for call in refused:
        with pytest.raises(JournalError, match="closed"):
            await call()
    with pytest.raises(JournalError, match="closed"):
        list(journal.read(GENESIS))


async def test_maintain_changes_nothing_that_can_be_read(world: World) -> None:
    journal = await world.open()
    row = await append(journal)
    await journal.maintain()
    assert list(journal.read(GENESIS)) == [row]
    await journal.close()


async def test_an_append_runs_to_its_end_in_a_cancelled_scope(world: World) -> None:
    journal = await world.open()
    row = None
    with trio.CancelScope() as scope:
        scope.cancel()
        row = await append(journal)
    assert row is not None
    assert journal.head == row.end
    assert list(journal.read(GENESIS)) == [row]
    await journal.close()


async def test_a_lost_end_is_named(world: World) -> None:
    journal = await world.open()
    for _ in range(3):
        await append(journal)
    await journal.close()
    world.lose_last_row()
    with pytest.raises(JournalCorruptError, match="events 3 to 3 are missing"):
        await world.open()


async def test_an_altered_row_is_named(world: World) -> None:
    journal = await world.open()
    for _ in range(3):
        await append(journal)
    await journal.close()
    world.alter_row(2)
    journal = await world.open()
    with pytest.raises(JournalCorruptError, match=r"at event 2: .*altered"):
        list(journal.read(GENESIS))
    await journal.close()


async def test_the_twin_loses_what_was_staged_and_not_synced() -> None:
    disk = MemoryDisk()
    journal = open_memory_journal(disk, epoch=1)
    kept = await append(journal)
    for seq in (2, 3):
        journal.stage(count=1, at_ms=1000 + seq, schema=1, body=body_of(seq))
    assert journal.head == kept.end
    journal.crash()
    with pytest.raises(JournalError, match="crashed"):
        journal.sync()
    journal = open_memory_journal(disk, epoch=1)
    assert list(journal.read(GENESIS)) == [kept]


async def test_the_twin_may_keep_what_was_staged_since_that_is_unknown() -> None:
    disk = MemoryDisk()
    journal = open_memory_journal(disk, epoch=1)
    staged = [journal.stage(count=1, at_ms=1000 + seq, schema=1, body=body_of(seq)) for seq in (1, 2, 3)]
    journal.crash(staged_rows_kept=2)
    journal = open_memory_journal(disk, epoch=1)
    assert list(journal.read(GENESIS)) == staged[:2]
