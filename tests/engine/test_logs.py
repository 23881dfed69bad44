"""Log lines, read back from a real pipe, as journald or a file would get them."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import structlog
import trio

from engine import logs

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def pipe() -> Iterator[tuple[IO[bytes], Callable[[], bytes]]]:
    """A stream to log to, and how to read what arrived."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with os.fdopen(write_end, "wb") as stream, os.fdopen(read_end, "rb", buffering=0) as reader:
        yield stream, lambda: reader.read() or b""


Pipe = tuple[IO[bytes], Callable[[], bytes]]


def set_up(stream: IO[bytes], level: str = "info", log_format: str = "auto", **environment: str) -> logs.LineWriter:
    return logs.configure(
        level=level, log_format=log_format, role="worker", index=1, stream=stream, environment=environment
    )


def test_a_line_is_a_json_object_with_the_fields_everybody_has(pipe: Pipe) -> None:
    stream, written = pipe
    set_up(stream)
    logs.get_logger(shard=1).info("caught up", seq=17, path=Path("/x"))
    data = written()
    assert data.endswith(b"}\n")
    line = json.loads(data)
    assert line.pop("at").endswith("Z")
    assert line == {
        "event": "caught up",
        "level": "info",
        "role": "worker",
        "index": 1,
        "shard": 1,
        "seq": 17,
        "path": "PosixPath('/x')",
    }


async def test_lines_of_a_request_carry_its_id_also_in_its_tasks(pipe: Pipe) -> None:
    stream, written = pipe
    set_up(stream)
    logger = logs.get_logger()

    async def task(text: str) -> None:
        logger.info(text)

    with logs.request("7f3c"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task, "inside")
    logger.info("outside")
    inside, outside = (json.loads(line) for line in written().splitlines())
    assert inside["request_id"] == "7f3c"
    assert "request_id" not in outside


def test_filtered_levels_do_nothing(pipe: Pipe) -> None:
    class Explosive:
        def __repr__(self) -> str:
            raise AssertionError("formatted although filtered")

    stream, written = pipe
    set_up(stream, level="warning")
    logger = logs.get_logger()
    logger.debug("x", value=Explosive())
    logger.info("x", value=Explosive())
    assert written() == b""
    logger.warning("y")
    assert json.loads(written())["event"] == "y"


def test_an_exception_stays_on_its_line(pipe: Pipe) -> None:
    stream, written = pipe
    set_up(stream)
    try:
        int("two\nlines")
    except ValueError:
        logs.get_logger().exception("failed")
    (line,) = written().splitlines()
    assert "ValueError: invalid literal" in json.loads(line)["exception"]


def test_a_huge_line_is_shortened_and_stays_json(pipe: Pipe) -> None:
    stream, written = pipe
    set_up(stream)
    logs.get_logger().info("big", text="x" * 100_000)
    line = json.loads(written())
    assert line["shortened"] is True
    assert len(line["text"]) == 2_000


def test_under_journald_each_line_opens_with_its_level(pipe: Pipe) -> None:
    stream, written = pipe
    status = os.fstat(stream.fileno())
    set_up(stream, level="debug", JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}")
    logger = logs.get_logger()
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    logger.error("d")
    lines = written().splitlines()
    assert [line[:4] for line in lines] == [b"<7>{", b"<6>{", b"<4>{", b"<3>{"]
    assert json.loads(lines[1][3:])["event"] == "b"


def test_a_journal_that_is_not_where_we_write_gets_no_prefix(pipe: Pipe) -> None:
    stream, written = pipe
    set_up(stream, JOURNAL_STREAM="1:2")
    logs.get_logger().info("x")
    assert written().startswith(b"{")


def test_console_lines_are_for_people_and_prefixed_one_by_one_under_journald(pipe: Pipe) -> None:
    stream, written = pipe
    status = os.fstat(stream.fileno())
    set_up(stream, log_format="console", JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}")
    try:
        int("no")
    except ValueError:
        logs.get_logger().exception("failed", seq=1)
    lines = written().splitlines()
    assert len(lines) > 2
    assert all(line.startswith(b"<3>") for line in lines)
    assert b"\x1b" not in b"".join(lines)


def test_a_terminal_gets_console_lines() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "wb", buffering=0) as stream, os.fdopen(master, "rb", buffering=0) as reader:
        set_up(stream)
        logs.get_logger().info("hello", seq=1)
        line = reader.read(4_096)
        assert b"hello" in line
        assert b"\x1b[" in line
        set_up(stream, NO_COLOR="1")
        logs.get_logger().info("hello", seq=1)
        assert b"\x1b[" not in reader.read(4_096)
        set_up(stream, log_format="json")
        logs.get_logger().info("hello", seq=1)
        assert reader.read(4_096).startswith(b"{")


def test_a_line_that_cannot_be_written_is_counted_and_stops_nothing() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as stream:
        writer = set_up(stream)
        logs.get_logger().error("nobody hears this")
        assert writer.lines_lost == 1


def test_the_default_is_standard_error() -> None:
    program = "from engine import logs; logs.configure(level='info', log_format='auto', role='api'); "
    program += "logs.get_logger().info('here')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, cwd=ROOT)
    assert done.stdout == b""
    line = json.loads(done.stderr.splitlines()[-1].removeprefix(b"<6>"))
    assert line["role"] == "api"
    assert "index" not in line
