"""What the tests of the journal share: bodies, small journals, images of a directory as a crash leaves it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import orjson

from engine.journal.sqlite import SqliteJournal
from engine.ports import JournalRow

ROOT = Path(__file__).resolve().parents[2]


def body_of(seq: int, count: int = 1, padding_bytes: int = 0) -> bytes:
    """A body as the codec makes it: an array of events, each an array that begins with its name."""
    return orjson.dumps([["held", seq + index, "x" * padding_bytes] for index in range(count)])


async def fill(journal: SqliteJournal, rows: int, *, count: int = 1, padding_bytes: int = 0) -> list[JournalRow]:
    """Append rows, with upkeep after each as the worker does it."""
    appended = []
    for _ in range(rows):
        seq = journal.head.seq + 1
        appended.append(
            await journal.append(count=count, at_ms=1000 + seq, schema=1, body=body_of(seq, count, padding_bytes))
        )
        await journal.maintain()
    return appended


def settle(journal: SqliteJournal) -> None:
    """Wait until the watermark says what the journal says."""
    watermark = journal._watermark
    assert watermark is not None
    assert watermark.wait_settled(10)


def image_of(directory: Path, target: Path, *, with_shm: bool = True) -> Path:
    """The files as a kill at this moment would leave them, in a directory of the same name under `target`."""
    image = target / directory.name
    shutil.copytree(directory, image, ignore=None if with_shm else shutil.ignore_patterns("*-shm"))
    return image


def contents_of(directory: Path) -> dict[str, bytes]:
    """Every file but the lock, whose text is the last holder's pid."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock"}


def start_writer(directory: Path, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A real writer process; see writer_process.py for what it prints."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.journal.writer_process", str(directory), *options],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )


def end_writer(writer: subprocess.Popen[bytes]) -> None:
    """Kill a writer as `kill -9` does, and give its pipes back."""
    writer.kill()
    writer.wait()
    for pipe in (writer.stdin, writer.stdout):
        if pipe is not None:
            pipe.close()
