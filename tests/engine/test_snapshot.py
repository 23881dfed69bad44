"""Snapshots: the state of one instant, whatever goes on; and files that are not whole are passed over."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from engine import snapshot
from engine import worker as working
from engine.core import columns, commands
from engine.core.ledger import Ledger
from engine.journal.memory import MemoryDisk, open_memory_journal
from engine.ports import Position
from engine.snapshot import MAGIC, Frozen, SnapshotError, SnapshotFile, load, load_newest, newest_first
from tests.core.shard import EVENING, MORNING, NIGHT, Shard, fingerprint, key, pick, planned_shard, replayed, van
from tests.engine.engine_tools import BOUNDS, hold, until, worker_in_memory

HASH = bytes(range(16))
KEYS = [key(f"key-{number}") for number in range(1, 400)]


def busy_shard(seed: int, steps: int) -> Shard:
    """A shard with reservations in every status, with one line and many, some forgotten."""
    shard = planned_shard()
    shard.watched = False
    shard.plan("van-north", NIGHT, 1_000)
    shard.plan("pick-dc1", MORNING, 1_000)
    work_on(shard, random.Random(seed), steps)
    return shard


def work_on(shard: Shard, chance: random.Random, steps: int) -> None:
    for _ in range(steps):
        numbers = [
            chunk.number[row]
            for chunk in shard.ledger.reservations.chunks()
            for row in range(chunk.size)
            if chunk.status[row] in (columns.HELD, columns.CONFIRMED)
        ]
        number = chance.choice(numbers) if numbers else 1
        shard.now_ms += chance.randrange(2_000)
        match chance.randrange(9):
            case 0:
                shard.confirm(number)
            case 1:
                shard.release(number)
            case 2:
                shard.move(number, van(chance.randrange(1, 9), NIGHT), pick(1), van(1, EVENING))
            case 3:
                shard.fulfil(number)
            case 4:
                shard.extend(number, chance.randrange(100_000))
            case 5 if chance.randrange(10) == 0:
                shard.now_ms += 86_400_000 // 50
            case _:
                lines = [van(chance.randrange(1, 4), NIGHT), pick(chance.randrange(1, 4))][: chance.randrange(1, 3)]
                shard.hold(*lines, ttl_ms=chance.randrange(1_000, 400_000))


def write(directory: Path, state: Ledger, between: Callable[[], None] = lambda: None) -> Path:
    """Take a snapshot, with other work between its sections."""
    frozen = Frozen(state)
    file = SnapshotFile(directory, frozen.seq)
    between()
    for section in frozen.sections(Position(frozen.seq, HASH)):
        file.add(section)
        between()
    return file.finish()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and sections without many reservations."""
    monkeypatch.setattr(columns, "CHUNK_ROWS", 8)
    monkeypatch.setattr(snapshot, "COUNTERS_IN_SECTION", 2)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_loaded_is_the_state_of_the_freeze_while_work_went_on(
    tmp_path: Path, seed: int, small_chunks: None
) -> None:
    shard = busy_shard(seed, 150)
    expected = fingerprint(shard.ledger, KEYS)
    chance = random.Random(seed)
    rows = len(shard.rows)

    def between() -> None:
        work_on(shard, chance, chance.randrange(4))
        if chance.randrange(6) == 0:
            shard.now_ms += 2 * 86_400_000
            shard.forget_all()
        if chance.randrange(4) == 0:
            shard.plan("van-north", f"2026-12-{chance.randrange(2, 29):02d}T18:00-20:00", 5)

    path = write(tmp_path, shard.ledger, between)
    assert len(shard.rows) > rows + 10, "work went on"
    loaded, position = load(path)
    assert fingerprint(loaded, KEYS) == expected
    assert position == Position(expected["seq"], HASH)
    # What is loaded is as good as the original: the rest of the journal leads both to the same end.
    assert fingerprint(replayed(shard.rows[rows:], loaded), KEYS) == fingerprint(shard.ledger, KEYS)


def test_recovery_from_every_snapshot_equals_full_replay(tmp_path: Path, small_chunks: None) -> None:
    shard = planned_shard()
    shard.watched = False
    shard.plan("van-north", NIGHT, 1_000)
    chance = random.Random(5)
    taken = []
    for _ in range(25):
        work_on(shard, chance, 7)
        taken.append((len(shard.rows), write(tmp_path, shard.ledger).read_bytes()))
    expected = fingerprint(shard.ledger, KEYS)
    assert fingerprint(replayed(shard.rows), KEYS) == expected
    for rows, content in taken:
        path = tmp_path / "one.snap"
        path.write_bytes(content)
        state, _ = load(path)
        assert fingerprint(state, KEYS) == fingerprint(replayed(shard.rows[:rows]), KEYS)
        assert fingerprint(replayed(shard.rows[rows:], state), KEYS) == expected


def test_an_empty_shard_has_a_snapshot(tmp_path: Path) -> None:
    state, position = load(write(tmp_path, Ledger()))
    assert position == Position(0, HASH)
    assert fingerprint(state) == fingerprint(Ledger())


# --- files that are not whole -------------------------------------------------------------------------------------------


def sealed(body: bytes) -> bytes:
    """A file with a checksum that is right."""
    return body + hashlib.blake2b(body, digest_size=32).digest()


def test_every_damaged_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    content = write(tmp_path, busy_shard(1, 12).ledger).read_bytes()
    path = tmp_path / "snapshot-0000000000000000009.snap"
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(SnapshotError):
            load(path)
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(SnapshotError):
            load(path)
    path.write_bytes(content)
    load(path)


def sections_of(content: bytes) -> list[bytes]:
    body, sections = content[len(MAGIC) : -32], []
    while body:
        size = int.from_bytes(body[:4], "big")
        sections.append(body[4 : 4 + size])
        body = body[4 + size :]
    return sections


def joined(sections: list[bytes]) -> bytes:
    return sealed(MAGIC + b"".join(len(section).to_bytes(4, "big") + section for section in sections))


def without_a_column(content: bytes) -> bytes:
    *before, last = sections_of(content)
    block = msgspec.msgpack.decode(last)
    del block["digest"]
    return joined([*before, msgspec.msgpack.encode(block)])


def with_a_short_column(content: bytes) -> bytes:
    *before, last = sections_of(content)
    block = msgspec.msgpack.decode(last)
    block["digest"] = block["digest"][:-3]
    return joined([*before, msgspec.msgpack.encode(block)])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: b"PK\x03\x04" * 50,
        lambda content: sealed(MAGIC.replace(b"1", b"2") + content[len(MAGIC) : -32]),
        lambda content: sealed(MAGIC),
        lambda content: sealed(MAGIC + b"\0\0\0\x01\xc1"),
        lambda content: joined(sections_of(content)[:-1]),
        lambda content: joined([*sections_of(content), sections_of(content)[-1]]),
        without_a_column,
        with_a_short_column,
    ],
    ids=[
        "empty",
        "foreign",
        "future",
        "no head",
        "bad head",
        "a block less",
        "a block more",
        "no column",
        "short column",
    ],
)
def test_what_is_no_snapshot_of_this_version_is_passed_over(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    shard = busy_shard(2, 30)
    good = fingerprint(shard.ledger, KEYS)
    write(tmp_path, shard.ledger)
    work_on(shard, random.Random(2), 30)
    bad = write(tmp_path, shard.ledger)
    bad.write_bytes(spoil(bad.read_bytes()))
    state, position, warnings = load_newest(tmp_path)
    assert fingerprint(state, KEYS) == good
    assert position == Position(good["seq"], HASH)
    assert len(warnings) == 1
    assert str(bad) in warnings[0]


def test_without_a_readable_snapshot_the_whole_journal_is_replayed(tmp_path: Path) -> None:
    path = write(tmp_path, busy_shard(2, 30).ledger)
    path.write_bytes(b"")
    (tmp_path / "snapshot-9999999999999999999.snap").mkdir()
    state, position, warnings = load_newest(tmp_path)
    assert (state.seq, position, len(warnings)) == (0, None, 2)


def test_only_two_are_kept(tmp_path: Path) -> None:
    shard = busy_shard(3, 10)
    written = []
    for _ in range(4):
        written.append(write(tmp_path, shard.ledger))
        work_on(shard, random.Random(3), 10)
    assert newest_first(tmp_path) == [written[3], written[2]]
    assert {path.name for path in tmp_path.iterdir()} == {written[3].name, written[2].name}


def test_what_a_killed_worker_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    left = SnapshotFile(tmp_path, 77)
    left.add(b"half")
    left._file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-0000000000000000077.tmp"]
    journal = open_memory_journal(MemoryDisk(), epoch=1)
    assert working.recover(journal, tmp_path).warnings == []
    assert list(tmp_path.iterdir()) == []


# --- a full disk --------------------------------------------------------------------------------------------------------


def fill_disk(directory: Path, seqs: range) -> None:
    """Snapshots of these positions meet a device that is full."""
    for seq in seqs:
        (directory / f"snapshot-{seq:019d}.tmp").symlink_to("/dev/full")


def unfinished(directory: Path) -> list[Path]:
    return list(directory.glob("*.tmp"))


def empty_disk(directory: Path) -> None:
    for path in unfinished(directory):
        path.unlink()


@pytest.mark.parametrize("rows", [1, 40], ids=["at the end", "in the middle"])
async def test_a_full_disk_costs_the_snapshot_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """What fits into the file's buffer fails when it is finished, more fails while sections are still to come."""
    monkeypatch.setattr(columns, "CHUNK_ROWS", 64)
    disk = MemoryDisk()
    async with worker_in_memory(tmp_path, disk=disk, bounds=BOUNDS._replace(snapshot_every_events=10)) as running:
        client = await running.planned(base=10_000)
        fill_disk(tmp_path, range(2_000))
        for place in range(rows):
            held = await client.wait(await client.send(*(hold(f"{place} {each}") for each in range(10))))
            assert len(held) == 10
            await until(lambda: not running.worker._snapshot_running)
        assert len(unfinished(tmp_path)) == 2_000 - rows, "each attempt removed its own"
        assert running.worker.statistics().snapshots == 0
        empty_disk(tmp_path)
        for place in range(10):
            assert not isinstance(await client.hold(f"after {place}"), commands.Command)
        await until(lambda: running.worker.statistics().snapshots == 1)
        expected = fingerprint(replayed(disk.rows))
        (path,) = newest_first(tmp_path)
        state, position = load(path)
        assert fingerprint(replayed([row for row in disk.rows if row.seq > position.seq], state)) == expected
