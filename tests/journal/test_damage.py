"""Damage to the files of a journal is named, or it altered nothing. Never a silently different or shorter history."""

import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from engine.journal.segments import create_segment, list_segments, segment_name, wal_of
from engine.journal.sqlite import open_journal
from engine.journal.tail import JournalReader
from engine.journal.verify import verify_chain
from engine.ports import GENESIS, JournalCorruptError, JournalRow
from tests.journal.journal_tools import fill, image_of, settle

FLIPS = 250
FLIPS_SLOW = 8000
FRAME_STEP_BYTES = 512


class Made(NamedTuple):
    """A journal as a kill leaves it: sealed segments, and an open one with a -wal that is partly folded in."""

    image: Path
    rows: list[JournalRow]


async def make_image(directory: Path, target: Path, *, rows_at_end: int = 6) -> Made:
    journal = await open_journal(directory, epoch=1, segment_bytes_max=28 * 1024, checkpoint_bytes=8 * 1024)
    rows = []
    while journal.statistics().seals < 2:
        rows += await fill(journal, 1, count=2, padding_bytes=400)
    rows += await fill(journal, 4, padding_bytes=100)
    await journal._checkpoint()
    rows += await fill(journal, rows_at_end, padding_bytes=300)
    settle(journal)
    image = image_of(directory, target)
    await journal.close()
    return Made(image, rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    base = tmp_path_factory.mktemp("made")
    made = trio.run(make_image, base / "shard-00", base / "image")
    assert len(list_segments(made.image)) == 3
    assert wal_of(list_segments(made.image)[-1]).stat().st_size > 0
    assert verify_chain(made.image).problems == ()
    return made


def read_all(directory: Path) -> list[JournalRow]:
    with JournalReader(directory) as reader:
        return list(reader.follow(None))


async def open_and_read(directory: Path) -> list[JournalRow]:
    """What a starting worker does. Raises what it would stop with."""
    journal = await open_journal(directory, epoch=1)
    try:
        return list(journal.read(GENESIS))
    finally:
        await journal.close()


def start_and_read(directory: Path) -> list[JournalRow]:
    return trio.run(open_and_read, directory)


def outcomes(image: Path, rows: list[JournalRow]) -> list[str]:
    """Read a damaged copy in the three ways there are: `same` or `named` for each, anything else fails."""
    found = []
    report = verify_chain(image)
    found.append("named" if report.problems else "same")
    assert report.problems or (report.head, report.rows) == (rows[-1].end, len(rows))
    for read in (read_all, start_and_read):
        try:
            read_rows = read(image)
        except JournalCorruptError:
            found.append("named")
        else:
            assert read_rows == rows
            found.append("same")
    return found


def flip(path: Path, offset: int, bit: int) -> None:
    mode = path.stat().st_mode
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        [octet] = file.read(1)
        file.seek(offset)
        file.write(bytes([octet ^ (1 << bit)]))
    path.chmod(mode)


def flip_many(made: Made, tmp_path: Path, seed: int, flips: int) -> dict[str, int]:
    chance = random.Random(seed)
    files = [path for path in sorted(made.image.iterdir()) if path.name.endswith((".sqlite", "-wal", "watermark"))]
    assert len(files) == 5
    tally: dict[str, int] = {}
    for number in range(flips):
        source = files[number % len(files)]
        size_bytes = source.stat().st_size
        # Every third flip among the headers, where a file says what it is.
        offset = chance.randrange(min(200, size_bytes)) if number % 3 == 0 else chance.randrange(size_bytes)
        bit = chance.randrange(8)
        copy = tmp_path / "flip" / made.image.name
        shutil.copytree(made.image, copy)
        flip(copy / source.name, offset, bit)
        try:
            found = outcomes(copy, made.rows)
        except BaseException as error:
            error.add_note(f"flipped bit {bit} of byte {offset} of {source.name}")
            raise
        for outcome in found:
            tally[outcome] = tally.get(outcome, 0) + 1
        if found[1] == "named":
            assert found[0] == "named", f"verify missed bit {bit} of byte {offset} of {source.name}"
        shutil.rmtree(copy.parent)
    return tally


def test_a_flipped_bit_anywhere_is_named_or_changes_nothing(made: Made, tmp_path: Path) -> None:
    tally = flip_many(made, tmp_path, seed=1, flips=FLIPS)
    assert tally["named"] > FLIPS / 3, "the damage reaches rows"
    assert tally["same"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(2, 6))
def test_many_flipped_bits(made: Made, tmp_path: Path, seed: int) -> None:
    flip_many(made, tmp_path, seed=seed, flips=FLIPS_SLOW // 4)


@pytest.mark.parametrize("with_shm", [True, False])
async def test_a_tail_torn_after_the_last_acknowledged_frame_recovers(tmp_path: Path, *, with_shm: bool) -> None:
    directory = tmp_path / "shard-00"
    journal = await open_journal(directory, epoch=1)
    rows = await fill(journal, 4, padding_bytes=200)
    settle(journal)
    before = image_of(directory, tmp_path / "before", with_shm=with_shm)
    unacknowledged = await fill(journal, 1, padding_bytes=9000)
    after = image_of(directory, tmp_path / "after")
    await journal.close()
    wal_name = wal_of(list_segments(before)[0]).name
    acknowledged_bytes = (before / wal_name).stat().st_size
    frames = (after / wal_name).read_bytes()
    assert len(frames) > acknowledged_bytes + 8 * FRAME_STEP_BYTES
    heads = set()
    for size_bytes in range(acknowledged_bytes, len(frames) + FRAME_STEP_BYTES, FRAME_STEP_BYTES):
        image = tmp_path / "torn" / directory.name
        shutil.copytree(before, image)
        (image / wal_name).write_bytes(frames[:size_bytes])
        seen = read_all(image)
        assert seen in (rows, rows + unacknowledged)
        assert await open_and_read(image) == seen
        assert verify_chain(image).problems == ()
        heads.add(seen[-1].seq)
        shutil.rmtree(image.parent)
    assert heads == {4, 5}


@pytest.mark.parametrize("with_shm", [True, False])
async def test_a_cut_inside_the_acknowledged_region_is_named(tmp_path: Path, *, with_shm: bool) -> None:
    directory = tmp_path / "shard-00"
    journal = await open_journal(directory, epoch=1)
    await fill(journal, 4, padding_bytes=200)
    settle(journal)
    whole = image_of(directory, tmp_path / "whole", with_shm=with_shm)
    await journal.close()
    wal_name = wal_of(list_segments(whole)[0]).name
    frames = (whole / wal_name).read_bytes()
    for size_bytes in range(0, len(frames), FRAME_STEP_BYTES):
        image = tmp_path / "cut" / directory.name
        shutil.copytree(whole, image)
        (image / wal_name).write_bytes(frames[:size_bytes])
        with pytest.raises(JournalCorruptError, match=r"events \d to 4 are missing: the watermark"):
            read_all(image)
        with pytest.raises(JournalCorruptError, match=r"events \d to 4 are missing: the watermark"):
            await open_journal(image, epoch=1)
        assert len((image / wal_name).read_bytes()) == size_bytes, "nothing was changed"
        assert any("are missing" in problem.what for problem in verify_chain(image).problems)
        shutil.rmtree(image.parent)


def remove(index: int) -> Callable[[Path], None]:
    def damage(image: Path) -> None:
        path = list_segments(image)[index]
        path.unlink()
        wal_of(path).unlink(missing_ok=True)

    return damage


def remove_all_segments(image: Path) -> None:
    for path in list_segments(image):
        path.unlink()
        wal_of(path).unlink(missing_ok=True)


def remove_watermark(image: Path) -> None:
    (image / "watermark").unlink()


def destroy_watermark(image: Path) -> None:
    (image / "watermark").write_bytes(bytes(8192))


def copy_under_another_name(image: Path) -> None:
    shutil.copy2(list_segments(image)[0], image / segment_name(5))


def rename_segment(image: Path) -> None:
    list_segments(image)[1].rename(image / segment_name(first_free(image)))


def first_free(image: Path) -> int:
    return int(list_segments(image)[1].name[:19]) + 1


def cut_a_sealed_segment(image: Path) -> None:
    path = list_segments(image)[1]
    os.truncate(path, path.stat().st_size - 4096)


def empty_a_sealed_segment(image: Path) -> None:
    os.truncate(list_segments(image)[0], 0)


def segment_of_another_history(image: Path) -> None:
    """The second segment of a journal with the same numbers and other times."""
    other = image.parent / "other" / image.name

    async def make() -> None:
        journal = await open_journal(other, epoch=1, segment_bytes_max=28 * 1024, checkpoint_bytes=8 * 1024)
        while journal.statistics().seals < 2:
            seq = journal.head.seq + 1
            await journal.append(count=2, at_ms=5000 + seq, schema=1, body=b'[["held"],["held"]]'.ljust(900))
            await journal.maintain()
        await journal.close()

    trio.run(make)
    # The same name and first event, so that only the hash can tell.
    target = list_segments(image)[1]
    source = list_segments(other)[1]
    target.unlink()
    shutil.copyfile(source, target)
    connection = sqlite3.connect(target, isolation_level=None)
    connection.execute("UPDATE meta SET value = ? WHERE name = 'first_seq'", (int(target.name[:19]),))
    connection.close()
    target.chmod(0o444)
    shutil.rmtree(other.parent)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (remove(0), "events 1 to .* are missing: no segment holds them"),
        (remove(1), "are missing: no segment holds them"),
        (remove(2), "are missing: the watermark says"),
        (remove_all_segments, "are missing: the watermark says"),
        (remove_watermark, "the watermark is missing"),
        (destroy_watermark, "both slots of the watermark are damaged"),
        (copy_under_another_name, "the file is named for event 5 but was made for event 1"),
        (rename_segment, "no segment holds them|was made for"),
        (cut_a_sealed_segment, "SQLite cannot read the file|are missing"),
        (empty_a_sealed_segment, "SQLite cannot read the file"),
        (segment_of_another_history, "another history"),
    ],
    ids=lambda value: getattr(value, "__qualname__", "") if callable(value) else "",
)
def test_what_is_missing_or_mixed_is_named(
    made: Made, tmp_path: Path, damage: Callable[[Path], None], what: str
) -> None:
    image = tmp_path / "copy" / made.image.name
    shutil.copytree(made.image, image)
    damage(image)
    problems = verify_chain(image).problems
    assert problems
    assert any(re.search(what, str(problem)) for problem in problems), problems
    if damage is copy_under_another_name:  # read from the beginning nobody comes across it
        assert read_all(image) == start_and_read(image) == made.rows
        return
    for read in (read_all, start_and_read):
        with pytest.raises(JournalCorruptError, match=what):
            read(image)


def test_a_fork_that_ends_where_the_journal_does_not_is_named(made: Made, tmp_path: Path) -> None:
    """A second open segment that begins inside the last one, as a restore into a live directory would leave it."""
    image = tmp_path / "copy" / made.image.name
    shutil.copytree(made.image, image)
    inside = made.rows[-3]
    create_segment(image, inside.end)
    for read in (read_all, start_and_read):
        with pytest.raises(JournalCorruptError, match=r"already holds|are missing"):
            read(image)
    assert any("already holds" in problem.what for problem in verify_chain(image).problems)
