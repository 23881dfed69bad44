"""Real writer processes, killed and let down by their disk. What was acknowledged is there afterwards."""

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from engine.journal.segments import list_segments
from engine.journal.sqlite import open_journal
from engine.journal.tail import JournalReader
from engine.journal.verify import verify_chain
from engine.ports import GENESIS
from tests.journal.journal_tools import end_writer, fill, start_writer

KILLS = 20
ACKNOWLEDGED_ROWS_MAX = 60


def acknowledged_until(writer: subprocess.Popen[bytes], rows: int) -> int:
    """Read acknowledgements until so many rows are acknowledged, or the writer falls silent; the last of them."""
    assert writer.stdout is not None
    last = 0
    while rows > 0:
        line = writer.stdout.readline()
        if not line.strip().isdigit():
            break
        last = int(line)
        rows -= 1
    return last


def rest_of(writer: subprocess.Popen[bytes], last: int) -> tuple[int, list[bytes]]:
    """What the pipe still holds of a writer that has ended: its last acknowledgement and its other words."""
    assert writer.stdout is not None
    words = []
    for line in writer.stdout:
        if line.strip().isdigit():
            last = int(line)
        elif line.endswith(b"\n"):
            words.append(line)
    return last, words


@pytest.mark.timeout(300)
def test_acknowledged_rows_survive_kill_9_at_any_moment(tmp_path: Path) -> None:
    directory = tmp_path / "shard-00"
    chance = random.Random(7)
    acknowledged = 0
    for _ in range(KILLS):
        writer = start_writer(directory, "--segment-bytes", "40000")
        try:
            assert writer.stdout is not None
            opened = writer.stdout.readline().split()
            assert opened[0] == b"open"
            assert int(opened[1]) >= acknowledged
            seen = acknowledged_until(writer, chance.randint(1, ACKNOWLEDGED_ROWS_MAX))
            writer.kill()
            writer.wait()
            acknowledged, _words = rest_of(writer, seen)
        finally:
            end_writer(writer)
        with JournalReader(directory) as reader:
            rows = list(reader.follow(None))
        assert rows[-1].end.seq >= acknowledged
    assert verify_chain(directory).problems == ()
    assert rows[-1].restart == KILLS - 1
    assert len(list_segments(directory)) > 1


@pytest.fixture(scope="module")
def failing_sync(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim, compiled."""
    compiler = shutil.which("cc")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have a C compiler (`cc`): without it failing disks are not tested")
        pytest.skip("no C compiler (`cc`) to build the shim that makes fdatasync fail")
    library = tmp_path_factory.mktemp("shim") / "failing_sync.so"
    source = Path(__file__).with_name("failing_sync.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


async def test_a_failing_fsync_ends_the_writer_and_loses_nothing_acknowledged(
    tmp_path: Path, failing_sync: Path
) -> None:
    directory = tmp_path / "shard-00"
    sign = tmp_path / "failing"
    writer = start_writer(directory, environment={"LD_PRELOAD": str(failing_sync), "FAILING_SYNC": str(sign)})
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"open 0\n"
        seen = acknowledged_until(writer, 20)
        sign.touch()
        assert writer.wait(30) == -signal.SIGKILL
        acknowledged, words = rest_of(writer, seen)
        assert words == [b"failed\n"]
        assert acknowledged >= 20
    finally:
        end_writer(writer)
    with JournalReader(directory) as reader:
        assert reader.head().seq >= acknowledged
    journal = await open_journal(directory, epoch=1)
    rows = list(journal.read(GENESIS))
    assert [row.seq for row in rows] == list(range(1, journal.head.seq + 1))
    # The row whose commit failed may be there or not: its outcome was unknown.
    assert journal.head.seq in (acknowledged, acknowledged + 1)
    await fill(journal, 3)
    await journal.close()
    assert verify_chain(directory).problems == ()


def test_a_disk_that_fails_from_the_start_is_said_to_fail(tmp_path: Path, failing_sync: Path) -> None:
    sign = tmp_path / "failing"
    sign.touch()
    process = start_writer(
        tmp_path / "shard-00", environment={"LD_PRELOAD": str(failing_sync), "FAILING_SYNC": str(sign)}
    )
    try:
        assert process.wait(30) == 1
        assert rest_of(process, 0) == (0, [])
    finally:
        end_writer(process)
