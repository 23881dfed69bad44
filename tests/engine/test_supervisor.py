"""The supervisor: its decisions as a table, its work with real processes.

Nothing here sleeps: processes tell what they do in lines on one pipe that all of them inherit, and EOF on that pipe
means that no process is left.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import msgspec
import pytest
import trio

from engine import datadir
from engine.config import Address
from engine.supervisor import (
    USUAL_POLICY,
    Decision,
    ExitFacts,
    ListenError,
    RestartPolicy,
    SupervisorState,
    open_listener,
)
from engine.systemd import Notifier, SystemdError, take_listener

PROGRAM = Path(__file__).with_name("supervisor_program.py")
ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 30
"""Only a hanging test meets it; the machine may be busy."""

CRASH, KILLED, NOT_STARTED = 1, -signal.SIGKILL, None


# --- decisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exit_code", "healthy_ms", "failures_before", "expected"),
    [
        pytest.param(CRASH, 0, 0, Decision("restart", 0, 1), id="the first failure is mended at once"),
        pytest.param(KILLED, 0, 0, Decision("restart", 0, 1), id="a signal is a failure like any other"),
        pytest.param(0, 500, 0, Decision("restart", 0, 1), id="so is an end that nobody asked for"),
        pytest.param(NOT_STARTED, 0, 0, Decision("restart", 0, 1), id="and a start that failed"),
        pytest.param(CRASH, 0, 1, Decision("restart", 100, 2), id="the second waits"),
        pytest.param(CRASH, 0, 2, Decision("restart", 200, 3), id="the third waits twice as long"),
        pytest.param(CRASH, 0, 6, Decision("restart", 3_200, 7), id="the last below the cap"),
        pytest.param(CRASH, 0, 7, Decision("restart", 5_000, 8), id="the cap"),
        pytest.param(CRASH, 0, 10_000, Decision("restart", 5_000, 10_001), id="the cap, for ever"),
        pytest.param(CRASH, 29_999, 7, Decision("restart", 5_000, 8), id="not healthy for long enough"),
        pytest.param(CRASH, 30_000, 7, Decision("restart", 0, 1), id="healthy: a first failure again"),
        pytest.param(78, 0, 0, Decision("halt", 0, 1), id="halted on purpose"),
        pytest.param(78, 60_000, 5, Decision("halt", 0, 1), id="halted after a long life"),
    ],
)
def test_restart_policy(exit_code: int | None, healthy_ms: int, failures_before: int, expected: Decision) -> None:
    assert USUAL_POLICY.after_exit(ExitFacts(exit_code, healthy_ms, failures_before)) == expected


def test_a_row_of_failures_never_waits_less_than_the_one_before() -> None:
    policy = RestartPolicy()
    failures, delays = 0, []
    for _ in range(50):
        decision = policy.after_exit(ExitFacts(CRASH, 0, failures))
        failures = decision.failures
        delays.append(decision.delay_ms)
    assert delays == sorted(delays)
    assert delays[-1] == policy.delay_ms_max


# --- real processes -------------------------------------------------------------------------------------------------


class Running:
    """A supervisor under test and what its family says."""

    def __init__(self, process: trio.Process, runtime: Path) -> None:
        self.process = process
        self.runtime = runtime
        self.lines: list[str] = []
        self._rest = b""

    async def next_line(self) -> str | None:
        """The next line of anybody, None when no process is left."""
        assert self.process.stdout is not None
        while b"\n" not in self._rest:
            chunk = await self.process.stdout.receive_some(4_096)
            if not chunk:
                return None
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        self.lines.append(line.decode())
        return self.lines[-1]

    async def until(self, *openings: str) -> Self:
        """Read on until each of `openings` has begun a line, in any order."""
        missing = set(openings)
        while missing:
            line = await self.next_line()
            assert line is not None, f"ended before {missing} of {self.lines}"
            missing = {opening for opening in missing if not line.startswith(opening)}
        return self

    async def until_nobody_is_left(self) -> None:
        """Read to EOF: supervisor and children are gone."""
        while await self.next_line() is not None:
            pass

    def words(self, opening: str) -> list[str]:
        """The words of the latest line with this opening."""
        return next(line for line in reversed(self.lines) if line.startswith(opening)).split()

    def state(self) -> SupervisorState:
        """What the state file says."""
        return msgspec.json.decode((self.runtime / datadir.STATE_NAME).read_bytes(), type=SupervisorState)

    async def until_log(self, **fields: object) -> dict[str, object]:
        """Read on to a log line with these fields."""
        while True:
            line = await self.next_line()
            assert line is not None, f"ended before {fields} of {self.lines}"
            entry = json.loads(line) if line.startswith("{") else {}
            if fields.items() <= entry.items():
                return dict(entry)

    async def until_everything_is_started(self) -> None:
        """Wait for the supervisor's own word."""
        await self.until_log(event="everything is started", role="supervisor")


class Store:
    """A data directory and how to serve it."""

    def __init__(self, path: Path, shards: int) -> None:
        self.data = path / "data"
        self.runtime = path / "run"
        self.config = path / "config.toml"
        datadir.init(self.data, shards)
        self.configure()

    def configure(self, stop_seconds: int = 10) -> None:
        self.config.write_text(
            f"""
            [server]
            listen = "127.0.0.1:0"
            api_processes = 1
            [runtime]
            directory = "{self.runtime}"
            stop_seconds_max = {stop_seconds}
            """
        )

    @asynccontextmanager
    async def serving(
        self,
        behaviour: dict[str, str] | None = None,
        *,
        ready_seconds: float | None = None,
        environment: dict[str, str] | None = None,
        wrapper: tuple[str, ...] = (),
        pass_fds: tuple[int, ...] = (),
    ) -> AsyncIterator[Running]:
        process = await trio.lowlevel.open_process(
            [*wrapper, sys.executable, str(PROGRAM), str(self.data), str(self.config)],
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SLOTKEEPER_TEST_BEHAVIOUR": json.dumps(behaviour or {}),
                "SLOTKEEPER_TEST_READY_SECONDS": str(ready_seconds or ""),
                **(environment or {}),
            },
        )
        running = Running(process, self.runtime)
        try:
            with trio.fail_after(PATIENCE_SECONDS):
                yield running
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()
                # Not a single process of this test outlives it.
                with trio.fail_after(PATIENCE_SECONDS):
                    await running.until_nobody_is_left()


def title_of(pid: int) -> str:
    """What `ps` shows of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()


async def freeze(pid: int) -> None:
    """Stop a process and wait until each of its threads has stopped; nothing tells it, so look again and again."""
    os.kill(pid, signal.SIGSTOP)
    while {text.rpartition(")")[2].split()[0] for text in thread_states(pid)} != {"T"}:
        await trio.lowlevel.checkpoint()


def thread_states(pid: int) -> list[str]:
    """/proc/PID/task/*/stat."""
    return [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]


EVERYBODY = ("ready planner 0", "ready worker 0", "ready worker 1", "ready api 0")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, shards=2)


async def test_starts_everything_and_stops_in_order(store: Store) -> None:
    async with store.serving() as running:
        await running.until_everything_is_started()
        state = running.state()
        assert [(c.role, c.index, c.state, c.restarts, c.last_end) for c in state.children] == [
            ("planner", 0, "ready", 0, None),
            ("worker", 0, "ready", 0, None),
            ("worker", 1, "ready", 0, None),
            ("api", 0, "ready", 0, None),
        ]
        assert state.pid == running.process.pid
        assert state.epoch == 1
        assert [running.words(f"up {c.role} {c.index}")[3] for c in state.children] == [
            str(c.pid) for c in state.children
        ]
        assert datadir.lock_holder(store.data) == running.process.pid
        running.process.terminate()
        await running.until_nobody_is_left()
        assert await running.process.wait() == 0
    stops = [line.removeprefix("stopped ") for line in running.lines if line.startswith("stopped")]
    assert stops[:2] == ["api 0", "planner 0"]
    assert sorted(stops[2:]) == ["worker 0", "worker 1"]
    assert running.state().state == "stopped"
    assert {c.state for c in running.state().children} == {"stopped"}
    # api processes start only after planner and workers are ready
    first_api = running.lines.index("spawn api 0")
    assert {"ready planner 0", "ready worker 0", "ready worker 1"} <= set(running.lines[: first_api + 1])
    assert datadir.lock_holder(store.data) is None


async def test_interrupt_from_the_terminal_stops_in_order_too(store: Store) -> None:
    async with store.serving() as running:
        await running.until(*EVERYBODY)
        running.process.send_signal(signal.SIGHUP)
        running.process.send_signal(signal.SIGINT)
        await running.until_nobody_is_left()
        assert await running.process.wait() == 0


async def test_a_child_gets_its_own_pipes_and_nothing_else(store: Store) -> None:
    async with store.serving() as running:
        await running.until(*EVERYBODY)
    for name in ("planner 0", "worker 0", "worker 1", "api 0"):
        line = next(line for line in running.lines if line.startswith(f"up {name}"))
        numbers = [int(number) for number in line.split()[6].split(",")]
        options = json.loads(line[line.index("[") : line.index("]") + 1].replace("'", '"'))
        given = [int(value) for key, value in zip(options[::2], options[1::2], strict=True) if key.endswith("-fd")]
        assert numbers == sorted(given), name


async def test_processes_carry_their_titles(store: Store) -> None:
    async with store.serving() as running:
        await running.until(*EVERYBODY)
        pids = {running.words(f"up {name}")[3]: name for name in ("planner 0", "worker 0", "worker 1", "api 0")}
        titles = {name: title_of(int(pid)) for pid, name in pids.items()}
        assert titles == {
            "planner 0": "slotkeeper: planner",
            "worker 0": "slotkeeper: worker 0",
            "worker 1": "slotkeeper: worker 1",
            "api 0": "slotkeeper: api 0",
        }
        assert title_of(running.process.pid) == "slotkeeper: supervisor"


async def test_a_killed_worker_comes_back_at_once_and_the_others_stay(store: Store) -> None:
    async with store.serving() as running:
        await running.until_everything_is_started()
        others = {c.pid for c in running.state().children if (c.role, c.index) != ("worker", 1)}
        os.kill(int(running.words("up worker 1")[3]), signal.SIGKILL)
        await running.until("up worker 1")
        await running.until_log(event="ready", child="worker 1")
        child = running.state().children[2]
        assert (child.restarts, child.last_end) == (1, "killed by SIGKILL")
        assert running.words("up worker 1")[4:6] == ["1", "1"], "epoch and restart"
        assert others <= {c.pid for c in running.state().children}


async def test_a_child_that_fails_during_the_start_delays_it_only(store: Store) -> None:
    async with store.serving({"worker 0": "crash_once"}) as running:
        await running.until_everything_is_started()
        assert running.state().children[1].restarts == 1
        assert running.state().children[1].last_end == "exit code 1"


async def test_a_child_that_always_fails_is_kept_apart(store: Store) -> None:
    async with store.serving({"planner 0": "crash"}) as running:
        entry = await running.until_log(child="planner", delay_ms=200)
        assert entry["end"] == "exit code 1"
        assert running.state().children[0].state == "backing_off"
        running.process.terminate()
        await running.until_nobody_is_left()
        assert await running.process.wait() == 0
    assert running.state().children[0].restarts >= 3
    assert "spawn api 0" not in running.lines


@pytest.mark.parametrize("behaviour", ["halt", "corrupt"])
async def test_a_halted_child_is_not_started_again_and_the_others_serve(store: Store, behaviour: str) -> None:
    async with store.serving({"worker 1": behaviour}) as running:
        await running.until_everything_is_started()
        child = running.state().children[2]
        assert (child.state, child.restarts, child.pid, child.last_end) == ("halted", 0, None, "exit code 78")
        running.process.terminate()
        await running.until_nobody_is_left()
        assert await running.process.wait() == 0
    assert [line for line in running.lines if line == "spawn worker 1"] == ["spawn worker 1"]


async def test_a_child_that_does_not_become_ready_is_killed_and_started_again(store: Store) -> None:
    async with store.serving({"worker 0": "never_ready"}, ready_seconds=0.5) as running:
        await running.until_log(event="killed: it did not become ready in time", child="worker 0")
        entry = await running.until_log(event="ended unexpectedly, starting it again", child="worker 0")
        assert (entry["end"], entry["failures"]) == ("killed by SIGKILL", 1)
        await running.until("up worker 0")


async def test_a_program_that_cannot_be_started_is_a_failure_like_any_other(store: Store) -> None:
    async with store.serving({"planner 0": "no_such_program"}) as running:
        entry = await running.until_log(child="planner", failures=2)
        assert entry["end"] == "could not be started: No such file or directory"
        running.process.terminate()
        await running.until_nobody_is_left()
        assert await running.process.wait() == 0


async def test_a_child_that_does_not_stop_is_killed(store: Store) -> None:
    store.configure(stop_seconds=1)
    async with store.serving({"worker 1": "deaf"}) as running:
        await running.until(*EVERYBODY)
        running.process.terminate()
        await running.until_nobody_is_left()
        assert await running.process.wait() == 0
    assert running.state().children[2].last_end == "killed by SIGKILL"
    assert running.state().children[1].last_end == "exit code 0"


async def test_a_second_signal_does_not_wait(store: Store) -> None:
    store.configure(stop_seconds=600)
    async with store.serving({"planner 0": "deaf"}) as running:
        await running.until(*EVERYBODY)
        running.process.terminate()
        await running.until("stopped api 0")
        running.process.terminate()
        await running.until_nobody_is_left()
        assert await running.process.wait() == 0
    assert running.state().children[0].last_end == "killed by SIGKILL"


CUTS = ["spawn planner 0", "spawn worker 0", "spawn worker 1", "up planner 0", "up worker 1", "spawn api 0", "up api 0"]


@pytest.mark.parametrize("cut", [*CUTS, "ready api 0"])
async def test_a_killed_supervisor_leaves_no_orphan_in_any_phase_and_the_next_one_starts(
    store: Store, cut: str
) -> None:
    async with store.serving() as running:
        await running.until(cut)
        running.process.kill()
        # At once, while children of the old one may still be dying or even just beginning.
        async with store.serving() as after:
            await after.until_everything_is_started()
            assert after.state().epoch == 2
            assert {c.restarts for c in after.state().children} == {0}
            await running.until_nobody_is_left()


@pytest.mark.parametrize("behaviour", ["hang", "hold_interpreter_lock", "deaf"])
async def test_a_hanging_child_dies_with_its_supervisor(store: Store, behaviour: str) -> None:
    async with store.serving({"worker 0": behaviour}) as running:
        await running.until("busy worker 0", "ready api 0")
        running.process.kill()
        await running.until_nobody_is_left()


async def test_a_frozen_child_dies_with_its_supervisor(store: Store) -> None:
    async with store.serving() as running:
        await running.until(*EVERYBODY)
        await freeze(int(running.words("up worker 0")[3]))
        running.process.kill()
        await running.until_nobody_is_left()


async def test_a_second_supervisor_refuses_and_names_the_first(store: Store) -> None:
    async with store.serving() as running:
        await running.until_everything_is_started()
        before = running.state()
        async with store.serving() as second:
            await second.until("refused DataDirectoryError")
            assert await second.process.wait() == 2
        assert f"process id {running.process.pid}" in second.lines[-1]
        assert running.state() == before
        assert (store.data / "epoch").read_text() == "1\n"


async def test_a_restarted_api_process_loses_no_queued_connection(store: Store) -> None:
    async with store.serving() as running:
        await running.until(*EVERYBODY)
        host, _, port = running.state().listen.rpartition(":")
        old = running.words("up api 0")[3]
        # Stopped, it accepts nothing: these connections wait in the socket's queue while it is killed.
        await freeze(int(old))
        streams = [await trio.open_tcp_stream(host, int(port)) for _ in range(20)]
        os.kill(int(old), signal.SIGKILL)
        answers = {(await stream.receive_some(64)).decode() for stream in streams}
        for stream in streams:
            await stream.aclose()
        await running.until("ready api 0")
        assert answers == {running.words("up api 0")[3]}


# --- the listening socket and systemd -------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_listener_accepts_and_is_not_inheritable(host: str) -> None:
    with open_listener(Address(host, 0), backlog=8) as listener:
        assert not listener.get_inheritable()
        with socket.create_connection(listener.getsockname()[:2]):
            pass


def test_an_address_in_use_says_what_to_do() -> None:
    with open_listener(Address("127.0.0.1", 0), backlog=8) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(ListenError, match=r"another process listens there.*--listen"):
            open_listener(address, backlog=8)


async def test_tells_systemd_how_it_is(store: Store, tmp_path: Path) -> None:
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        await channel.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "20000000"}
        async with store.serving({"worker 1": "halt"}, environment=environment) as running:
            messages: list[str] = []
            while not messages or not messages[-1].startswith("READY=1"):
                messages.append((await channel.recv(4_096)).decode())
            assert messages[-1] == "READY=1\nSTATUS=worker 1 halted"
            assert "WATCHDOG=1" in messages
            running.process.terminate()
            while messages[-1] != "STOPPING=1":
                messages.append((await channel.recv(4_096)).decode())
            await running.until_nobody_is_left()


async def test_takes_the_socket_of_systemd(store: Store) -> None:
    with open_listener(Address("127.0.0.1", 0), backlog=8) as listener:
        address = str(Address(*listener.getsockname()[:2]))
        # What systemd does between fork and exec: descriptor 3, and the process id in LISTEN_PID.
        number = listener.fileno()
        start = f'exec 3<&{number} {number}<&-; export LISTEN_PID=$$; exec "$@"'
        async with store.serving(
            wrapper=("bash", "-c", start, "bash"), environment={"LISTEN_FDS": "1"}, pass_fds=(number,)
        ) as running:
            await running.until_everything_is_started()
            assert running.state().listen == address
            stream = await trio.open_tcp_stream("127.0.0.1", listener.getsockname()[1])
            assert (await stream.receive_some(64)).decode() == running.words("up api 0")[3]
            await stream.aclose()


async def test_refuses_a_socket_of_systemd_that_other_hosts_can_reach(store: Store) -> None:
    with open_listener(Address("0.0.0.0", 0), backlog=8) as listener:
        number = listener.fileno()
        start = f'exec 3<&{number} {number}<&-; export LISTEN_PID=$$; exec "$@"'
        async with store.serving(
            wrapper=("bash", "-c", start, "bash"), environment={"LISTEN_FDS": "1"}, pass_fds=(number,)
        ) as running:
            await running.until("refused ListenError the .socket unit: 0.0.0.0:")
    assert "has no API keys" in running.lines[-1]


def test_without_systemd_nothing_is_taken_or_sent() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "OTHER": "stays"}
    assert take_listener(environment) is None
    notifier = Notifier(environment)
    notifier.send("READY=1")
    assert notifier.watchdog_seconds is None
    assert environment == {"OTHER": "stays"}, "children must not take them for theirs"


def test_two_sockets_of_systemd_are_refused() -> None:
    with pytest.raises(SystemdError, match="handed over 2 sockets"):
        take_listener({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"})


def test_a_silent_systemd_is_no_error(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).send("READY=1")
