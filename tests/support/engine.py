"""A real engine for tests: supervisor, planner, workers and api processes in a directory of their own.

Rules
- Nothing sleeps. The supervisor tells each change over the socket that systemd would give it, and `wait_until` looks at
  `supervisor.json` after each; the end of a process is told by its pidfd, the end of all of them by the end of their
  common standard error.
- All processes of an engine are one session: `pids_alive` finds every one of them, also one that nobody reports, and
  nothing but these is ever killed.
- `close` leaves nothing behind: no process, no runtime directory.

Not promised: use from several threads, except `request`, `raw`, `connect` and `errors`.
"""

import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from engine import config as configuration
from engine import datadir
from engine.child import Role
from engine.supervisor import ChildState, SupervisorState

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60.0
"""Only a test that hangs meets it; the machine may be busy."""
LOOK_SECONDS_MAX = 0.25
"""A missed message costs no more than this: after it `wait_until` looks without one."""

Place = tuple[Role, int]


class EngineError(Exception):
    """The engine did not do what the test rests on. The text ends with what it logged."""


class Answer(NamedTuple):
    """An HTTP response, read to its end. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The stable code of a problem; None for anything else."""
        if self.headers.get("content-type") != "application/problem+json":
            return None
        code: str = self.json()["code"]
        return code


class Engine:
    """One data directory and the processes that serve it. Between `stop` and `start` the data stay."""

    def __init__(
        self,
        directory: Path,
        *,
        shards: int = 2,
        api_processes: int = 2,
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`settings` are those of `engine.config`, such as {"api.deadline_ms": 500}; `environment` adds to ours."""
        self.data = directory / "data"
        self.runtime = Path(f"/dev/shm/slotkeeper-test-{uuid.uuid4().hex[:12]}")
        self.shards = shards
        self.environment = dict(environment or {})
        self.log: list[str] = []
        """What the processes wrote to standard error, line by line, from all starts."""
        self.address = ("127.0.0.1", 0)
        """Where it listens. A restart keeps the port."""
        self._directory = directory
        self._settings: dict[str, object] = {
            "server.api_processes": api_processes,
            "runtime.directory": str(self.runtime),
            "log.format": "json",
            **(settings or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._notices: socket.socket | None = None
        self._log_reader: threading.Thread | None = None
        datadir.init(self.data, shards)

    def __enter__(self) -> Self:
        """Start."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and leave nothing behind."""
        self.close()

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Start the supervisor and wait until all its children are ready."""
        self.launch()
        self.wait_until(lambda state: state.state == "ready" and _all_ready(state), seconds)

    def launch(self) -> None:
        """Start the supervisor and wait for nothing but its listening socket's address."""
        if self._process is not None:
            raise EngineError("it runs already")
        config_path = self._directory / "config.json"
        config = configuration.load(None, {"server.listen": "{}:{}".format(*self.address), **self._settings})
        config_path.write_bytes(configuration.encode(config))
        # In the abstract namespace: a path below pytest's directories can be longer than a socket's name may be.
        notify_name = f"slotkeeper-test-{uuid.uuid4().hex}"
        self._notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notices.bind("\0" + notify_name)
        # A state of an earlier start must not be taken for one of this.
        (self.runtime / datadir.STATE_NAME).unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.serve", str(self.data), str(config_path)],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": f"@{notify_name}", **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._log_reader = threading.Thread(target=self._read_log, args=(self._process,), daemon=True)
        self._log_reader.start()
        host, _, port = self.wait_until(lambda state: True).listen.rpartition(":")
        self.address = (host, int(port))

    def stop(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Stop in order, and check that it was one: exit code 0 and no process left."""
        process = self._running()
        process.terminate()
        try:
            exit_code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise self._error(f"the supervisor did not stop within {seconds} s") from None
        self._await_end(seconds)
        if exit_code:
            raise self._error(f"the supervisor stopped with exit code {exit_code}")

    def crash(self, seconds: float = PATIENCE_SECONDS) -> None:
        """SIGKILL the supervisor, and wait for the end of its children, which follow it."""
        process = self._running()
        process.kill()
        process.wait(seconds)
        self._await_end(seconds)

    def restart(self) -> None:
        """Stop in order, and start again at the same address."""
        self.stop()
        self.start()

    def restart_after_crash(self) -> None:
        """SIGKILL the supervisor, and start again at the same address."""
        self.crash()
        self.start()

    def close(self) -> None:
        """End everything, in whatever state it is. Idempotent."""
        try:
            if self._process is not None:
                for pid in [self._process.pid, *self.pids_alive()]:
                    _signal(pid, signal.SIGKILL)
                self._process.wait(PATIENCE_SECONDS)
                self._await_end(PATIENCE_SECONDS)
        finally:
            shutil.rmtree(self.runtime, ignore_errors=True)

    @property
    def is_running(self) -> bool:
        """Whether the supervisor was started and not stopped."""
        return self._process is not None

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise EngineError("it does not run")
        return self._process

    def _await_end(self, seconds: float) -> None:
        """Wait until no process of the session is left."""
        if self._log_reader is None or self._process is None or self._notices is None:
            raise EngineError("it does not run")
        # The standard error of all of them is one pipe: its end means that none of them lives.
        self._log_reader.join(seconds)
        if self._log_reader.is_alive():
            raise self._error(f"processes are left: {self.pids_alive()}")
        # A process closes its files some moments before it has ended.
        for pid in self.pids_alive():
            with suppress(ProcessLookupError), _pidfd(pid) as descriptor:
                _await_exit(descriptor, pid)
        self._notices.close()
        self._process = None

    def _read_log(self, process: "subprocess.Popen[bytes]") -> None:
        stream = process.stderr
        if stream is not None:
            with stream:
                for line in stream:
                    self.log.append(line.decode(errors="replace").rstrip("\n"))

    def _error(self, text: str) -> EngineError:
        return EngineError("\n".join([text, *self.log[-30:]]))

    # --- what it says of itself -----------------------------------------------------------------------------------------

    def state(self) -> SupervisorState:
        """`supervisor.json`."""
        document = (self.runtime / datadir.STATE_NAME).read_bytes()
        return msgspec.json.decode(document, type=SupervisorState)

    def child(self, role: Role, index: int = 0) -> ChildState:
        """What the supervisor says of a child."""
        return _child(self.state(), role, index)

    def pid(self, role: Role, index: int = 0) -> int:
        """The process that fills a place now."""
        pid = self.child(role, index).pid
        if pid is None:
            raise self._error(f"{role} {index} has no process now")
        return pid

    def pids(self) -> dict[Place, int | None]:
        """All children's processes."""
        return {(child.role, child.index): child.pid for child in self.state().children}

    @property
    def supervisor_pid(self) -> int:
        """The supervisor's process."""
        return self._running().pid

    def pids_alive(self) -> list[int]:
        """Every process of this engine's session that is no zombie, whether or not the supervisor knows it."""
        if self._process is None:
            return []
        return [pid for pid, (state, session) in _processes() if session == self._process.pid and state != "Z"]

    def errors(self) -> list[str]:
        """Log lines of level error or above, and those that no logger wrote: tracebacks."""
        return [line for line in list(self.log) if not line.startswith("{") or _level(line) in ("error", "critical")]

    def wait_until(
        self, holds: Callable[[SupervisorState], bool], seconds: float = PATIENCE_SECONDS
    ) -> SupervisorState:
        """Wait until the supervisor's state is as wanted, and return it. Raises EngineError when it does not become so."""
        process, notices = self._running(), self._notices
        if notices is None:
            raise EngineError("it does not run")
        give_up_at = time.monotonic() + seconds
        while True:
            try:
                state = self.state()
            except FileNotFoundError:
                pass
            else:
                if holds(state):
                    return state
            if process.poll() is not None:
                raise self._error(f"the supervisor ended with exit code {process.returncode}")
            left = give_up_at - time.monotonic()
            if left <= 0:
                raise self._error(f"the supervisor's state did not become as wanted within {seconds} s")
            notices.settimeout(min(left, LOOK_SECONDS_MAX))
            try:
                notices.recv(4096)
            except TimeoutError:
                continue

    # --- what tests do to it --------------------------------------------------------------------------------------------

    def kill(self, role: Role, index: int = 0, number: int = signal.SIGKILL) -> int:
        """Send a signal to a child and return its pid. After SIGKILL the process is gone when this returns."""
        pid = self.pid(role, index)
        with _pidfd(pid) as descriptor:
            signal.pidfd_send_signal(descriptor, number)
            if number == signal.SIGKILL:
                _await_exit(descriptor, pid)
        return pid

    def replace(self, role: Role, index: int = 0) -> int:
        """SIGKILL a child and wait until its successor is ready; returns the successor's pid."""
        self.kill(role, index)
        return self.wait_ready(role, index)

    def wait_ready(self, role: Role, index: int = 0, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait until a child that lives is ready; returns its pid."""

        def ready(state: SupervisorState) -> bool:
            child = _child(state, role, index)
            return child.state == "ready" and child.pid is not None and _state_of(child.pid) not in (None, "Z")

        pid = _child(self.wait_until(ready, seconds), role, index).pid
        return pid or 0

    @contextmanager
    def frozen(self, role: Role, index: int = 0) -> Iterator[int]:
        """A child that is stopped within the block, and goes on after it."""
        pid = self.pid(role, index)
        _signal(pid, signal.SIGSTOP)
        try:
            _await_stopped(pid)
            yield pid
        finally:
            _signal(pid, signal.SIGCONT)

    @contextmanager
    def frozen_supervisor(self) -> Iterator[None]:
        """A supervisor that starts nobody again within the block."""
        pid = self.supervisor_pid
        _signal(pid, signal.SIGSTOP)
        try:
            _await_stopped(pid)
            yield
        finally:
            _signal(pid, signal.SIGCONT)

    # --- asking ---------------------------------------------------------------------------------------------------------

    def connect(self, seconds: float = PATIENCE_SECONDS) -> http.client.HTTPConnection:
        """A connection to one of the api processes, whichever takes it."""
        return http.client.HTTPConnection(*self.address, timeout=seconds)

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """One request, over a connection of its own unless one is given. `body` is JSON, unless it is bytes."""
        sent = dict(headers or {})
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if content is not None:
            sent.setdefault("Content-Type", "application/json")
        if key is not None:
            sent["Idempotency-Key"] = key
        ours = connection or self.connect()
        try:
            ours.request(method, path, content, sent)
            return _answer(ours.getresponse())
        finally:
            if connection is None:
                ours.close()

    def raw(self, data: bytes, method: str = "GET") -> Answer:
        """Bytes as they are, over a connection of their own; the first response to them."""
        with socket.create_connection(self.address, PATIENCE_SECONDS) as connection:
            connection.sendall(data)
            response = http.client.HTTPResponse(connection, method=method)
            response.begin()
            return _answer(response)


def _answer(response: http.client.HTTPResponse) -> Answer:
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def _child(state: SupervisorState, role: Role, index: int) -> ChildState:
    for child in state.children:
        if (child.role, child.index) == (role, index):
            return child
    raise EngineError(f"there is no {role} {index}")


def _all_ready(state: SupervisorState) -> bool:
    return all(child.state == "ready" for child in state.children)


def _level(line: str) -> str:
    try:
        level: str = json.loads(line).get("level", "")
    except ValueError:
        return "error"
    return level


# --- processes ------------------------------------------------------------------------------------------------------


def _processes() -> Iterator[tuple[int, tuple[str, int]]]:
    """Every process of this machine: pid, state and session."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                # The name stands in parentheses and may hold anything: the last one ends it.
                # Then: state, parent, process group, session.
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            yield int(entry.name), (fields[0], int(fields[3]))


def _state_of(pid: int) -> str | None:
    """The letter of a process's state (proc(5)), None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _await_exit(descriptor: int, pid: int) -> None:
    """Wait for the end of a process: its descriptor becomes readable."""
    readable, _, _ = select.select([descriptor], [], [], PATIENCE_SECONDS)
    if not readable:
        raise EngineError(f"process {pid} did not end")


def _await_stopped(pid: int) -> None:
    """Wait until all threads of a process stand still: the signal is delivered when each next enters the kernel."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up_at:
        states = [
            Path(task.path, "stat").read_text().rpartition(")")[2].split()[0]
            for task in os.scandir(f"/proc/{pid}/task")
        ]
        if all(state == "T" for state in states):
            return
        os.sched_yield()
    raise EngineError(f"process {pid} did not stop")
