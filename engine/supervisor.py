"""The supervisor: starts, watches, restarts and stops all other processes, and does nothing on the path of a request.

Rules:
- It owns the one listening socket; all api processes inherit it, so a restart of one loses no queued connection.
- Start: the planner and all workers; when each is ready or halted, the api processes; when each is ready or halted,
  READY=1. Stop: api processes (they drain), planner, workers, each with a bound and then SIGKILL.
- When to start a child again is decided by `RestartPolicy`, a pure function. Exit 78 halts one child; the others go on.
- A child has a lifeline and a ready pipe (`engine.child`). Their far ends exist nowhere else: no other child inherits
  them, so EOF on a lifeline means exactly that this process is gone.
- The state of every child is in `supervisor.json`, replaced at each change.
- (epoch, restart) never repeats: the epoch is counted durably at each start of the supervisor, the restart number of
  a child grows within it, in memory, and whoever loses that memory gets a new epoch.

Not promised: to notice a child that lives and does not work. It watches exits and readiness, not progress.
"""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
import setproctitle
import trio

from engine import config as configuration
from engine import datadir, logs, systemd
from engine.child import EXIT_HALTED, READY_LINE, ChildArguments, Role, process_title
from engine.config import Address, Config
from engine.datadir import Metadata
from engine.version import __version__

LISTEN_BACKLOG: Final = 4_096
"""Connections that wait while api processes restart; the kernel lowers it to net.core.somaxconn."""

ArgvFactory = Callable[[ChildArguments], list[str]]
ChildPhase = Literal["waiting", "starting", "ready", "backing_off", "halted", "stopping", "stopped"]


class ListenError(Exception):
    """The listening socket cannot be had. The text says what to do."""


class ExitFacts(NamedTuple):
    """What is known when a child has ended although nobody asked it to."""

    exit_code: int | None
    """Negative: killed by that signal. None: it could not even be started."""
    healthy_ms: int
    """For how long it had been ready; 0 if it never was."""
    failures_before: int
    """Failures in a row before this one."""


class Decision(NamedTuple):
    """What to do about it."""

    action: Literal["restart", "halt"]
    delay_ms: int
    failures: int
    """Failures in a row, this one included."""


class RestartPolicy(NamedTuple):
    """When a child that ended is started again. Pure: facts in, decision out."""

    delay_ms_first: int = 100
    """Of the second restart in a row; each further one waits twice as long."""
    delay_ms_max: int = 5_000
    healthy_ms_min: int = 30_000
    """Who was ready for so long has recovered: its next failure is a first one."""

    def after_exit(self, facts: ExitFacts) -> Decision:
        """The first failure is mended at once, since most are single; a row of them must not eat the host."""
        failures = 1 if facts.healthy_ms >= self.healthy_ms_min else facts.failures_before + 1
        if facts.exit_code == EXIT_HALTED:
            return Decision("halt", 0, failures)
        if failures == 1:
            return Decision("restart", 0, failures)
        # 2**32 ms is far beyond any maximum; without the bound the number would grow for ever.
        doublings = min(failures - 2, 32)
        return Decision("restart", min(self.delay_ms_first << doublings, self.delay_ms_max), failures)


USUAL_POLICY: Final = RestartPolicy()


class ChildState(msgspec.Struct, frozen=True):
    """One child as `supervisor.json` shows it."""

    role: Role
    index: int
    pid: int | None
    state: ChildPhase
    restarts: int
    """Starts after the first, in this epoch."""
    since_ms: int
    """When it came into this state."""
    last_end: str | None
    """How its last process ended, in words; None while the first lives."""


class SupervisorState(msgspec.Struct, frozen=True):
    """`supervisor.json`. After a crash it is old: `datadir.lock_holder` says whether a supervisor lives."""

    state: Literal["starting", "ready", "stopping", "stopped"]
    """"ready" since each child was once ready or halted; what each is now stands in `children`."""
    pid: int
    epoch: int
    store_id: str
    version: str
    listen: str
    """Where it really listens, also when port 0 was asked for."""
    started_ms: int
    children: list[ChildState]


class _Child:
    """A child's place: the processes that fill it come and go."""

    def __init__(self, role: Role, index: int, now_ms: int) -> None:
        self.role: Role = role
        self.index = index
        self.phase: ChildPhase = "waiting"
        self.since_ms = now_ms
        self.restarts = 0
        self.last_end: str | None = None
        self.process: trio.Process | None = None
        self.ready_at: float | None = None
        self.begun = False
        self.settled = trio.Event()
        """Ready or halted for the first time."""
        self.stop = trio.Event()
        self.ended = trio.Event()
        """Stopped, and no process is left."""


def engine_argv(arguments: ChildArguments) -> list[str]:
    """The command line of a real child."""
    return [sys.executable, "-m", "engine", "child", *arguments.to_argv()]


def serve(data: Path, config: Config, *, argv_for: ArgvFactory = engine_argv) -> int:
    """Be the supervisor of a data directory until SIGTERM or SIGINT; returns the exit code, 0.

    Order: lock (so that nothing below is shared with another supervisor), listening socket, runtime directory, epoch,
    children. Raises `DataDirectoryError`, `ListenError` or `SystemdError`: nothing was started.
    """
    data = data.resolve()
    setproctitle.setproctitle(process_title("supervisor", 0))
    logs.configure(level=config.log.level, log_format=config.log.format, role="supervisor")
    notifier = systemd.Notifier()
    metadata = datadir.load(data)
    with datadir.lock_directory(data), _listener(config) as listener:
        runtime = datadir.runtime_directory(metadata, config)
        epoch = datadir.next_epoch(data)
        datadir.replace_file(runtime / datadir.CONFIG_NAME, configuration.encode(config))
        supervisor = Supervisor(
            data=data,
            runtime=runtime,
            config=config,
            metadata=metadata,
            epoch=epoch,
            listener=listener,
            notifier=notifier,
            argv_for=argv_for,
        )
        trio.run(supervisor.run)
        datadir.free_runtime(runtime)
    return 0


class Supervisor:
    """The processes of one start. `run` it once."""

    def __init__(
        self,
        *,
        data: Path,
        runtime: Path,
        config: Config,
        metadata: Metadata,
        epoch: int,
        listener: socket.socket,
        notifier: systemd.Notifier,
        argv_for: ArgvFactory = engine_argv,
        policy: RestartPolicy = USUAL_POLICY,
    ) -> None:
        self._data = data
        self._runtime = runtime
        self._config = config
        self._metadata = metadata
        self._epoch = epoch
        self._listener = listener
        self._notifier = notifier
        self._argv_for = argv_for
        self._policy = policy
        self._log = logs.get_logger()
        self._started_ms = _now_ms()
        self._state: Literal["starting", "ready", "stopping", "stopped"] = "starting"
        self._stopping = trio.Event()
        self._hurry = trio.Event()
        counts: dict[Role, int] = {"planner": 1, "worker": metadata.shards, "api": config.server.api_processes}
        self._children = {
            role: [_Child(role, index, self._started_ms) for index in range(count)] for role, count in counts.items()
        }

    def statistics(self) -> SupervisorState:
        """What `supervisor.json` shows."""
        return SupervisorState(
            state=self._state,
            pid=os.getpid(),
            epoch=self._epoch,
            store_id=self._metadata.store_id,
            version=__version__,
            listen=str(Address(*self._listener.getsockname()[:2])),
            started_ms=self._started_ms,
            children=[
                ChildState(
                    role=child.role,
                    index=child.index,
                    pid=None if child.process is None else child.process.pid,
                    state=child.phase,
                    restarts=child.restarts,
                    since_ms=child.since_ms,
                    last_end=child.last_end,
                )
                for children in self._children.values()
                for child in children
            ],
        )

    async def run(self) -> None:
        """Start everything, keep it running, and return after an ordered stop."""
        self._log.info(
            "supervisor started",
            data=str(self._data),
            runtime=str(self._runtime),
            epoch=self._epoch,
            listen=str(Address(*self._listener.getsockname()[:2])),
            version=__version__,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(self._obey_signals)
            nursery.start_soon(self._feed_watchdog)
            async with trio.open_nursery() as starting:
                starting.start_soon(self._start_all, nursery)
                await self._stopping.wait()
                starting.cancel_scope.cancel()
            await self._stop_all()
            nursery.cancel_scope.cancel()

    # --- start and stop ---------------------------------------------------------------------------------------------

    async def _start_all(self, nursery: trio.Nursery) -> None:
        self._publish()
        # Workers wait for their planner by themselves; an api process without a worker could only refuse.
        for roles in (("planner", "worker"), ("api",)):
            children = [child for role in roles for child in self._children[role]]
            for child in children:
                child.begun = True
                nursery.start_soon(self._keep, child)
            for child in children:
                await child.settled.wait()
        self._state = "ready"
        self._publish()
        self._notifier.send("READY=1", self._status())
        self._log.info("everything is started", seconds=round((_now_ms() - self._started_ms) / 1_000, 3))

    async def _stop_all(self) -> None:
        self._state = "stopping"
        self._publish()
        self._notifier.send("STOPPING=1")
        self._log.info("stopping")
        seconds = self._config.runtime.stop_seconds_max
        # Requests that were taken are answered: the api's bound begins after the last of their deadlines.
        await self._stop_role("api", seconds + self._config.api.deadline_ms / 1_000)
        await self._stop_role("planner", seconds)
        await self._stop_role("worker", seconds)
        self._state = "stopped"
        self._publish()
        self._log.info("stopped")

    async def _stop_role(self, role: Role, seconds: float) -> None:
        children = [child for child in self._children[role] if child.begun]
        for child in children:
            child.stop.set()
            if child.process is not None:
                self._enter(child, "stopping")
                child.process.terminate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._kill_late, children, seconds)
            for child in children:
                await child.ended.wait()
            nursery.cancel_scope.cancel()

    async def _kill_late(self, children: list[_Child], seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._hurry.wait()
        for child in children:
            if child.process is not None:
                self._log.warning("killed: it did not stop in time", **_name(child), seconds=seconds)
                child.process.kill()

    async def _obey_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP:
                    self._log.warning("SIGHUP ignored: a changed configuration needs a restart")
                elif self._stopping.is_set():
                    # Who asks twice does not want to wait.
                    self._hurry.set()
                else:
                    self._stopping.set()

    async def _feed_watchdog(self) -> None:
        if self._notifier.watchdog_seconds is None:
            return
        while True:
            self._notifier.send("WATCHDOG=1")
            await trio.sleep(self._notifier.watchdog_seconds)

    # --- one child --------------------------------------------------------------------------------------------------

    async def _keep(self, child: _Child) -> None:
        """Fill the place of a child until it is told to stop."""
        failures = 0
        while not child.stop.is_set():
            child.ready_at = None
            exit_code, healthy_ms = await self._run_once(child)
            if child.stop.is_set():
                break
            decision = self._policy.after_exit(ExitFacts(exit_code, healthy_ms, failures))
            failures = decision.failures
            if decision.action == "halt":
                self._enter(child, "halted")
                child.settled.set()
                self._log.error(
                    "halted, and not started again: mend what it wrote above this line, then restart slotkeeper",
                    **_name(child),
                )
                await child.stop.wait()
                break
            child.restarts += 1
            if decision.delay_ms:
                self._enter(child, "backing_off")
            self._log.error(
                "ended unexpectedly, starting it again",
                **_name(child),
                end=child.last_end,
                failures=failures,
                delay_ms=decision.delay_ms,
            )
            if decision.delay_ms:
                with trio.move_on_after(decision.delay_ms / 1_000):
                    await child.stop.wait()
        self._enter(child, "stopped")
        child.ended.set()

    async def _run_once(self, child: _Child) -> tuple[int | None, int]:
        """Start a process, see it become ready, and wait for its end. Returns exit code and milliseconds of health."""
        self._enter(child, "starting")
        with ExitStack() as ours:
            try:
                process, ready = await self._spawn(child, ours)
            except OSError as error:
                # No memory, processes or descriptors left: as good as a child that ended, and mended by waiting.
                child.last_end = f"could not be started: {error.strerror}"
                return None, 0
            child.process = process
            self._publish()
            if child.stop.is_set():
                # The order to stop came while it was being started; it has not begun anything.
                process.kill()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._await_ready, child, process, ready)
                exit_code = await process.wait()
                nursery.cancel_scope.cancel()
        child.process = None
        child.last_end = _end_in_words(exit_code)
        healthy_ms = 0 if child.ready_at is None else int((trio.current_time() - child.ready_at) * 1_000)
        return exit_code, healthy_ms

    async def _spawn(self, child: _Child, ours: ExitStack) -> tuple[trio.Process, trio.lowlevel.FdStream]:
        """Start the process. Our ends of its pipes are closed with `ours`, its ends before this returns."""
        with ExitStack() as theirs:
            # os.pipe() makes close-on-exec descriptors: what is not in pass_fds stays here, also while several
            # children are started at once.
            lifeline_read, lifeline_write = os.pipe()
            theirs.callback(os.close, lifeline_read)
            ours.callback(os.close, lifeline_write)
            ready_read, ready_write = os.pipe()
            theirs.callback(os.close, ready_write)
            ready = trio.lowlevel.FdStream(ready_read)
            ours.callback(ready.close)
            listen_fd = self._listener.fileno() if child.role == "api" else None
            arguments = ChildArguments(
                role=child.role,
                index=child.index,
                data=self._data,
                runtime=self._runtime,
                epoch=self._epoch,
                restart=child.restarts,
                lifeline_fd=lifeline_read,
                ready_fd=ready_write,
                listen_fd=listen_fd,
            )
            process = await trio.lowlevel.open_process(
                self._argv_for(arguments),
                stdin=subprocess.DEVNULL,
                pass_fds=[fd for fd in (lifeline_read, ready_write, listen_fd) if fd is not None],
                # A group of its own: Ctrl-C in the terminal is for us alone, we order the stop.
                process_group=0,
            )
        return process, ready

    async def _await_ready(self, child: _Child, process: trio.Process, ready: trio.lowlevel.FdStream) -> None:
        seconds = self._config.runtime.ready_seconds_max
        with trio.move_on_after(seconds):
            received = b""
            while READY_LINE not in received:
                chunk = await ready.receive_some(64)
                if not chunk:
                    # It closed the pipe: mostly because it ends, which `process.wait` sees and cancels this.
                    await trio.sleep_forever()
                received = received[-len(READY_LINE) :] + chunk
            if child.phase == "starting":
                child.ready_at = trio.current_time()
                self._enter(child, "ready")
                child.settled.set()
                self._log.info("ready", **_name(child), pid=process.pid)
            return
        self._log.error("killed: it did not become ready in time", **_name(child), seconds=seconds)
        process.kill()

    # --- what others see --------------------------------------------------------------------------------------------

    def _enter(self, child: _Child, phase: ChildPhase) -> None:
        child.phase = phase
        child.since_ms = _now_ms()
        self._publish()
        if self._state == "ready":
            self._notifier.send(self._status())

    def _publish(self) -> None:
        document = msgspec.json.format(msgspec.json.encode(self.statistics()), indent=2) + b"\n"
        try:
            datadir.replace_file(self._runtime / datadir.STATE_NAME, document)
        except OSError as error:
            # A full tmpfs blinds `slotkeeper status`; it is no reason to end what still works.
            self._log.error("the state file cannot be written", error=error.strerror)

    def _status(self) -> str:
        others = [
            f"{child.role} {child.index} {child.phase}"
            for children in self._children.values()
            for child in children
            if child.phase != "ready"
        ]
        return f"STATUS={', '.join(others) or 'all processes are ready'}"


def _listener(config: Config) -> socket.socket:
    listener = systemd.take_listener()
    if listener is None:
        return open_listener(config.address, backlog=LISTEN_BACKLOG)
    address = Address(*listener.getsockname()[:2])
    if not (address.is_loopback or config.server.allow_unauthenticated):
        listener.close()
        raise ListenError(f"the .socket unit: {configuration.unauthenticated_text(address)}")
    return listener


def open_listener(address: Address, *, backlog: int) -> socket.socket:
    """A listening TCP socket, close-on-exec. Raises `ListenError`."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {error.strerror}") from error
    try:
        # Without it a restart fails for a minute, for as long as old connections are in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(tuple(address))
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        what_to_do = {
            errno.EADDRINUSE: "another process listens there; stop it, or choose another address with --listen",
            errno.EADDRNOTAVAIL: "this host has no such address; choose another one with --listen",
            errno.EACCES: "ports below 1024 need a privilege; choose a higher one, or use the systemd socket unit",
        }.get(error.errno or 0, "choose another address with --listen")
        raise ListenError(f"cannot listen on {address}: {error.strerror}: {what_to_do}") from error
    return listener


def _name(child: _Child) -> dict[str, object]:
    return {"child": process_title(child.role, child.index).removeprefix("slotkeeper: ")}


def _end_in_words(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
