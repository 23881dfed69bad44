"""A whole engine in processes of its own, for the load generators and for the tests that kill parts of it.

The engine is started as an operator would, by `slotkeeper serve`, on a port that the kernel chooses; what it says goes to a
log file beside its data. `supervisor.json` of its runtime directory tells which processes it consists of.

Rules
- Everything that this module starts it also ends, and `Engine.clean` removes the runtime directory.
- Waiting is for a condition, polled, with a bound.

Not promised: any use beside loopback.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from engine import datadir
from engine.version import __version__
from perf.load import Address

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 60.0
GONE_SECONDS_MAX = 10.0
POLL_SECONDS = 0.01


class EngineError(Exception):
    """The engine did not do what was waited for. Carries the end of its log."""


class Child(NamedTuple):
    """One process of the engine."""

    role: str
    number: int
    pid: int
    state: str


class Engine:
    """One data directory and the engine on it. `start` may be called again after `stop` or `kill`: the port stays."""

    def __init__(
        self,
        data: Path,
        *,
        shards: int = 2,
        api_processes: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.data = data
        self._api_processes = api_processes
        self.log = data.with_name(data.name + ".log")
        self.environment: dict[str, str] = dict(environment or {})
        """Added to that of this process at the next start."""
        if not (data / datadir.METADATA_NAME).exists():
            datadir.init(data, shards)
        self._metadata = datadir.load(data)
        self._address = Address("127.0.0.1", 0)
        self._supervisor: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> Address:
        """Where it listens, since the first start."""
        return self._address

    @property
    def pid(self) -> int:
        """The supervisor's."""
        if self._supervisor is None:
            raise EngineError("the engine has not been started")
        return self._supervisor.pid

    @property
    def runtime(self) -> Path:
        """Its runtime directory."""
        return Path(f"/dev/shm/slotkeeper-{self._metadata.store_id[:12]}")

    def command(self) -> list[str]:
        """The command line of the supervisor."""
        listen = f"{self._address.host}:{self._address.port}"
        api = [] if self._api_processes is None else ["--api", str(self._api_processes)]
        return [sys.executable, "-m", "engine", "serve", "--data", str(self.data), "--listen", listen, *api]

    def spawn(self) -> None:
        """Start the supervisor, without waiting for anything."""
        # A service manager's runtime directory would not be this engine's.
        environment = {name: value for name, value in os.environ.items() if name != "RUNTIME_DIRECTORY"}
        with self.log.open("ab") as log:
            self._supervisor = subprocess.Popen(
                self.command(),
                cwd=ROOT,
                env=environment | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C for the program that uses this is not one for the engine: it is stopped in order.
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until every process of this start has been ready once. Raises EngineError."""
        self.wait_until(self._is_ready, READY_SECONDS_MAX, "the engine to become ready")
        host, _, port = str(self.state()["listen"]).rpartition(":")
        self._address = Address(host, int(port))

    def start(self) -> Self:
        """Start it and wait until it serves."""
        self.spawn()
        self.wait_ready()
        return self

    def _is_ready(self) -> bool:
        if self._supervisor is not None and self._supervisor.poll() is not None:
            raise EngineError(f"the engine ended with {self._supervisor.returncode}:\n{self.log_tail()}")
        state = self.state()
        return state.get("pid") == self.pid and state["state"] == "ready"

    def state(self) -> dict[str, object]:
        """`supervisor.json`, empty where there is none yet."""
        try:
            state: dict[str, object] = json.loads((self.runtime / datadir.STATE_NAME).read_bytes())
        except FileNotFoundError:
            return {}
        return state

    def children(self, role: str | None = None) -> list[Child]:
        """The living children as the supervisor sees them, of one role or of all."""
        children = self.state().get("children", [])
        if not isinstance(children, list):
            raise EngineError(f"supervisor.json lists no children: {children!r}")
        return [
            Child(child["role"], child["index"], child["pid"], child["state"])
            for child in children
            if child["pid"] is not None and role in (None, child["role"])
        ]

    def all_ready(self) -> bool:
        """Whether each process of the engine is ready now."""
        children = self.state().get("children")
        return isinstance(children, list) and all(child["state"] == "ready" for child in children)

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll a condition. Raises EngineError with the end of the log when the time is up."""
        give_up_at = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > give_up_at:
                raise EngineError(f"waited {seconds} s in vain for {what}:\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return "(no log)"

    def stop(self) -> None:
        """Stop it in order. Raises EngineError where it does not, or not with exit code 0."""
        if self._supervisor is None:
            return
        supervisor, self._supervisor = self._supervisor, None
        supervisor.terminate()
        try:
            exit_code = supervisor.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.wait()
            raise EngineError(f"the engine did not stop within {STOP_SECONDS_MAX} s:\n{self.log_tail()}") from None
        if exit_code != 0:
            raise EngineError(f"the engine stopped with exit code {exit_code}:\n{self.log_tail()}")

    def verify(self) -> tuple[bool, str]:
        """`slotkeeper verify`: whether all is proven, and what it said. The engine need not run."""
        command = [sys.executable, "-m", "engine", "verify", str(self.data)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode == 0, done.stdout + done.stderr

    def kill(self) -> list[Child]:
        """SIGKILL to the supervisor alone. Returns the children it had; their lifelines end them."""
        children = self.children()
        if self._supervisor is not None:
            self._supervisor.kill()
            self._supervisor.wait()
            self._supervisor = None
        return children

    def clean(self) -> None:
        """End it, whatever its state, and remove its runtime directory."""
        children = self.kill()
        for child in children:
            self.wait_until(lambda pid=child.pid: not is_alive(pid), GONE_SECONDS_MAX, f"{child} to end")  # type: ignore[misc]  # a default binds the pid of this turn
        shutil.rmtree(self.runtime, ignore_errors=True)

    def __enter__(self) -> Self:
        """Start it."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it and clean up; after an error do not insist on an ordered stop."""
        try:
            if error is None:
                self.stop()
        finally:
            self.clean()


def is_alive(pid: int) -> bool:
    """Whether a process runs. A zombie, which only waits for its parent to read how it ended, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2][1] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_child(child: Child) -> None:
    """SIGKILL to a child. One that has just ended by itself is no error."""
    try:
        os.kill(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime, see proc(5)


def surroundings() -> dict[str, object]:
    """What a figure depends on beside the code: kept with each result."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    model = next(
        (line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit or None,
        "slotkeeper": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("trio", "httptools", "msgspec", "numpy", "orjson", "aiosqlite")},
        "kernel": platform.release(),
        "cpu": model,
        "cores": os.cpu_count(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
