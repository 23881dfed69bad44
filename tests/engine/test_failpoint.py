"""What the words of SLOTKEEPER_FAILPOINT do to a process; tests/chaos uses them on a whole engine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
from engine.failpoints import failpoint
for number in range(1, 6):
    for place in ("before", "here", "after"):
        failpoint(place)
    print(number, flush=True)
"""


def start(words: str | None) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "SLOTKEEPER_FAILPOINT"}
    if words is not None:
        environment["SLOTKEEPER_FAILPOINT"] = words
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("words", "rounds", "code"),
    [
        (None, 5, 0),
        ("", 5, 0),
        ("elsewhere:kill", 5, 0),
        ("here:kill", 0, -signal.SIGKILL),
        ("here:kill:1", 0, -signal.SIGKILL),
        ("here:kill:3", 2, -signal.SIGKILL),
        ("here:kill:6", 5, 0),
    ],
)
def test_a_process_dies_at_the_pass_that_was_named(words: str | None, rounds: int, code: int) -> None:
    with start(words) as process:
        output, errors = process.communicate(timeout=60)
    assert errors == ""
    assert output.split() == [str(number) for number in range(1, rounds + 1)]
    assert process.returncode == code


def test_a_process_stops_and_goes_on() -> None:
    with start("here:stop:2") as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=60)
    assert output.split() == ["2", "3", "4", "5"]
    assert process.returncode == 0


def test_with_a_file_only_the_first_process_dies(tmp_path: Path) -> None:
    mark = tmp_path / "died"
    codes = []
    for _ in range(3):
        with start(f"here:kill:2:{mark}") as process:
            process.communicate(timeout=60)
            codes.append(process.returncode)
        if len(codes) == 1:
            assert mark.read_text() == f"{process.pid}\n"
    assert codes == [-signal.SIGKILL, 0, 0]


def test_words_that_mean_nothing_are_refused_at_once() -> None:
    with start("here:kill:often") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "often" in errors
