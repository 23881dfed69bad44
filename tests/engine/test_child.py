"""What a child does by itself: real processes of `child_program.py`, without a supervisor."""

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from engine import datadir
from engine.child import (
    EXIT_FAILED,
    EXIT_HALTED,
    EXIT_ORPHANED,
    LOCK_PATIENCE_SECONDS,
    LOCK_POLL_SECONDS,
    ChildArguments,
    Role,
    process_title,
    wait_for_lock,
)
from engine.ports import JournalCorruptError, JournalLockedError

PROGRAM = Path(__file__).with_name("child_program.py")
ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 30


class Child:
    """A child under test: its pipes as the supervisor would hold them."""

    def __init__(self, process: subprocess.Popen[bytes], lifeline: int, ready: int) -> None:
        self.process = process
        self.lifeline = lifeline
        self.ready = ready

    def cut_lifeline(self) -> None:
        os.close(self.lifeline)
        self.lifeline = -1

    def until_ready(self) -> bytes:
        assert select.select([self.ready], [], [], PATIENCE_SECONDS)[0]
        return os.read(self.ready, 64)

    def until_busy(self) -> None:
        assert self.process.stdout is not None
        while not self.process.stdout.readline().startswith(b"busy"):
            pass

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        # The signal is on its way; wait until the process has really stopped.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, out.decode(), err.decode()


@contextmanager
def child(
    data: Path, behaviour: str = "good", role: Role = "worker", index: int = 1, *, orphan: bool = False
) -> Iterator[Child]:
    lifeline_read, lifeline_write = os.pipe()
    ready_read, ready_write = os.pipe()
    arguments = ChildArguments(role, index, data, data.parent, 3, 4, lifeline_read, ready_write)
    if orphan:
        os.close(lifeline_write)
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments.to_argv()],
        pass_fds=[lifeline_read, ready_write],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SLOTKEEPER_TEST_BEHAVIOUR": json.dumps({f"{role} {index}": behaviour}),
        },
    )
    os.close(lifeline_read)
    os.close(ready_write)
    running = Child(process, -1 if orphan else lifeline_write, ready_read)
    try:
        yield running
    finally:
        # Before anything waits for it: a child that should have died and did not must not hang the test too.
        process.kill()
        process.communicate()
        os.close(ready_read)
        if running.lifeline >= 0:
            os.close(running.lifeline)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    datadir.init(tmp_path / "data", 2)
    return tmp_path / "data"


def test_arguments_survive_the_command_line() -> None:
    for arguments in (
        ChildArguments("api", 3, Path("/a b"), Path("/run/x"), 7, 0, 5, 6, 9),
        ChildArguments("planner", 0, Path("/d"), Path("/r"), 1, 2, 3, 4),
    ):
        assert ChildArguments.from_argv(arguments.to_argv()) == arguments
    assert ChildArguments("planner", 0, Path("/d"), Path("/r"), 1, 2, 3, 4).to_argv() == [
        *["planner", "0", "--data", "/d", "--runtime", "/r", "--epoch", "1", "--restart", "2"],
        *["--lifeline-fd", "3", "--ready-fd", "4"],
    ]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["worker"],
        ["boss", "0"],
        ["worker", "0"],
        ["worker", "0", "--data"],
        ["worker", "0", "--colour", "1"],
        ["worker", "x", "--data", "/d"],
    ],
)
def test_other_words_are_no_arguments(words: list[str]) -> None:
    with pytest.raises(ValueError, match="not the arguments of a child"):
        ChildArguments.from_argv(words)


def test_titles() -> None:
    assert [process_title("worker", 1), process_title("api", 0), process_title("planner", 0)] == [
        "slotkeeper: worker 1",
        "slotkeeper: api 0",
        "slotkeeper: planner",
    ]


def test_a_child_is_ready_carries_its_title_and_stops_in_order(data: Path) -> None:
    with child(data) as running:
        assert running.until_ready() == b"READY\n"
        assert Path(f"/proc/{running.process.pid}/cmdline").read_bytes().startswith(b"slotkeeper: worker 1\0")
        assert running.until_ready() == b"", "it closes the pipe behind it"
        running.process.send_signal(signal.SIGINT)
        running.process.terminate()
        code, out, err = running.end()
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "stopped worker 1", "SIGINT did not interrupt the stop"


@pytest.mark.parametrize("behaviour", ["good", "hang", "deaf", "hold_interpreter_lock"])
def test_a_cut_lifeline_ends_a_child_whatever_it_does(data: Path, behaviour: str) -> None:
    with child(data, behaviour) as running:
        if behaviour == "good":
            running.until_ready()
        else:
            running.until_busy()
        running.cut_lifeline()
        code, out, _ = running.end()
    assert code in (EXIT_ORPHANED, -signal.SIGKILL), "the thread or the kernel, whoever is first"
    assert "stopped" not in out


def test_a_cut_lifeline_ends_a_frozen_child(data: Path) -> None:
    with child(data) as running:
        running.until_ready()
        running.freeze()
        running.cut_lifeline()
        assert running.end()[0] == -signal.SIGKILL


def test_a_child_whose_supervisor_is_gone_before_it_begins_does_nothing(data: Path) -> None:
    with child(data, orphan=True) as running:
        assert running.end()[:2] == (EXIT_ORPHANED, "")


@pytest.mark.parametrize(
    ("behaviour", "code", "text"),
    [
        ("halt", EXIT_HALTED, r"slotkeeper: worker 1: halted: a person is needed\n"),
        ("corrupt", EXIT_HALTED, r"slotkeeper: worker 1: halted: row 7 is missing\n"),
        (
            "invariant",
            -signal.SIGKILL,
            r"slotkeeper: worker 1: broken invariant: two and two are four; killing this process\n",
        ),
        (
            "write_error",
            -signal.SIGKILL,
            r"slotkeeper: worker 1: the outcome of a write is unknown: disk I/O error; killing this process\n",
        ),
        ("die", -signal.SIGKILL, r"slotkeeper: worker 1: the disk said no; killing this process\n"),
        ("crash", EXIT_FAILED, r"(?s)slotkeeper: worker 1: unexpected error\n.*Traceback.*OSError: something unexp.*"),
    ],
)
def test_how_a_child_ends_by_its_errors(data: Path, behaviour: str, code: int, text: str) -> None:
    with child(data, behaviour) as running:
        found, out, err = running.end()
    assert found == code
    assert re.fullmatch(text, err), err
    assert "cleaned up" not in out, "after die() no finally block runs"


async def test_waiting_for_a_lock_ends_when_it_is_free(autojump_clock: MockClock) -> None:
    answers: Iterator[JournalLockedError | str] = iter([JournalLockedError("x"), JournalLockedError("x"), "journal"])

    async def take() -> str:
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    started = trio.current_time()
    assert await wait_for_lock(take) == "journal"
    assert trio.current_time() - started == pytest.approx(2 * LOCK_POLL_SECONDS)


async def test_waiting_for_a_lock_is_bounded(autojump_clock: MockClock) -> None:
    async def take() -> None:
        raise JournalLockedError("shard-00 is locked")

    started = trio.current_time()
    with pytest.raises(JournalLockedError, match="shard-00"):
        await wait_for_lock(take)
    waited = trio.current_time() - started
    assert LOCK_PATIENCE_SECONDS <= waited <= LOCK_PATIENCE_SECONDS + 2 * LOCK_POLL_SECONDS


async def test_other_errors_are_not_waited_for(autojump_clock: MockClock) -> None:
    async def take() -> None:
        raise JournalCorruptError("row 7")

    with pytest.raises(JournalCorruptError):
        await wait_for_lock(take)
