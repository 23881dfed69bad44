r"""What every child of the supervisor does from its first moment to its last.

The contract, seen from the child:
- It is started as `python -m engine child ROLE INDEX --data … --runtime … --epoch … --restart … --lifeline-fd …
  --ready-fd … [--listen-fd …]`; `ChildArguments` writes and reads exactly that.
- Lifeline: a pipe whose write end only the supervisor has. It reads EOF when the supervisor is gone, whatever killed it;
  the child then ends at once, without a clean-up: the journal is made for that, and the next supervisor must not wait.
- Ready: it writes `READY\n` when it does its job.
- SIGTERM: stop in order, exit 0. SIGINT is ignored: in a terminal the supervisor gets it too and orders the stop.
- Exit 78 (EX_CONFIG): halted on purpose, a person is needed; the supervisor does not start it again.

Two things watch the lifeline, and either suffices. A daemon thread blocks in `read`, so it works while the trio loop
hangs. The kernel itself sends SIGKILL on EOF (F_SETSIG), so it works while C code holds the interpreter lock and while
the process is stopped: a frozen worker must not keep its journal locked against the next one. Never PR_SET_PDEATHSIG:
that signal follows the thread that started the child, and trio starts children from a thread that ends.

Errors: a broken invariant or a failed append kills the process by SIGKILL, without any clean-up, since closing SQLite
would checkpoint what must not be. Code that meets one calls `die`; `run_child` does so for what arrives here, but then
`finally` blocks have already run.

Not promised: that two children of different starts never overlap. The journal's flock decides who may write, and
`wait_for_lock` waits for the one that is just dying.
"""

import faulthandler
import fcntl
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal, NoReturn, TypeVar, get_args

import setproctitle
import trio

from engine.config import READY_SECONDS_MIN, ConfigError
from engine.core.invariant import InvariantError, invariant
from engine.datadir import DataDirectoryError
from engine.ports import JournalCorruptError, JournalError, JournalLockedError, JournalWriteError

Role = Literal["planner", "worker", "api"]

EXIT_HALTED: Final = 78
"""EX_CONFIG of sysexits.h: starting again would end the same way."""
EXIT_FAILED: Final = 1
EXIT_ORPHANED: Final = 75
"""EX_TEMPFAIL: nobody is left to read it but a test."""
READY_LINE: Final = b"READY\n"

LOCK_PATIENCE_SECONDS: Final = 5.0
"""A predecessor dies by its lifeline within a fraction of a second, but the kernel first frees its memory, gigabytes
perhaps. Who holds the lock longer than this is not dying."""
LOCK_POLL_SECONDS: Final = 0.02

invariant(LOCK_PATIENCE_SECONDS < READY_SECONDS_MIN, "a child that waits for a lock must not count as hanging")

T = TypeVar("T")


class HaltError(Exception):
    """Stop this child on purpose, exit 78: the text tells the operator what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class ChildArguments:
    """What the supervisor tells a child. `epoch` counts starts of the supervisor, `restart` those of this child since."""

    role: Role
    index: int
    data: Path
    runtime: Path
    epoch: int
    restart: int
    lifeline_fd: int
    ready_fd: int
    listen_fd: int | None = None

    def to_argv(self) -> list[str]:
        """The words after `child`."""
        words = [self.role, str(self.index)]
        for name in [field.name for field in fields(self)][2:]:
            value = getattr(self, name)
            if value is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return words

    @classmethod
    def from_argv(cls, words: Sequence[str]) -> "ChildArguments":
        """Read what `to_argv` wrote. Raises `ValueError`: somebody started a child by hand."""
        try:
            role, index, *rest = words
            values = {name.removeprefix("--").replace("-", "_"): value for name, value in _pairs(rest)}
            paths = {name: Path(values.pop(name)) for name in ("data", "runtime")}
            numbers = {name: int(value) for name, value in values.items()}
            # KeyError for a word that is no role, as for an option that is missing.
            role = {name: name for name in get_args(Role)}[role]
            return cls(role, int(index), **paths, **numbers)  # type: ignore[arg-type]  # the call checks the names
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"not the arguments of a child process: {list(words)}: {error}") from error


class ChildContext:
    """What a child's main function gets: its arguments, when to stop, and how to say that it is ready."""

    def __init__(self, arguments: ChildArguments) -> None:
        self.arguments = arguments
        self.stop: Final = trio.Event()
        """Set by SIGTERM: finish what was begun, take nothing new, return."""
        self._ready_fd = arguments.ready_fd

    def ready(self) -> None:
        """Tell the supervisor that this child does its job from now on. Idempotent."""
        if self._ready_fd >= 0:
            os.write(self._ready_fd, READY_LINE)
            os.close(self._ready_fd)
            self._ready_fd = -1


async def wait_for_lock(take: Callable[[], Awaitable[T]], *, patience_seconds: float = LOCK_PATIENCE_SECONDS) -> T:
    """Call `take` (which opens a journal) until it no longer raises `JournalLockedError`, and return its result.

    Raises the last `JournalLockedError` when the patience is over, and at once whatever else `take` raises.
    """
    give_up_at = trio.current_time() + patience_seconds
    while True:
        try:
            return await take()
        except JournalLockedError:
            if trio.current_time() >= give_up_at:
                raise
        await trio.sleep(LOCK_POLL_SECONDS)


def process_title(role: str, index: int) -> str:
    """What `ps` shows; other programs look for it. There is one planner, so it has no number."""
    return f"slotkeeper: {role}" if role in ("planner", "supervisor") else f"slotkeeper: {role} {index}"


def die(text: str) -> NoReturn:
    """Say `text` on standard error and end this process by SIGKILL: no `finally`, no close, no flush of anything."""
    # By os.write, as sys.stderr may be locked by a thread that will never run again.
    try:
        os.write(2, f"{setproctitle.getproctitle()}: {text}; killing this process\n".encode("utf-8", "replace"))
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
    raise InvariantError("SIGKILL to oneself does not return")


def watch_lifeline(descriptor: int) -> None:
    """End this process when `descriptor` reads EOF, from now on and also if it does so already."""
    os.set_inheritable(descriptor, False)
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    # The kernel tells of changes only: an EOF from before must be looked for.
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if poll.poll(0):
        os._exit(EXIT_ORPHANED)
    threading.Thread(target=_block_on_lifeline, args=(descriptor,), name="lifeline", daemon=True).start()


def run_child(main: Callable[[ChildContext], Awaitable[None]], arguments: ChildArguments) -> NoReturn:
    """Be this child: watch the lifeline, take the title, run `main` under trio, and exit as the contract says.

    Order: the lifeline first, because from then on no error of ours can leave an orphan.
    """
    watch_lifeline(arguments.lifeline_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for descriptor in (arguments.ready_fd, arguments.listen_fd):
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
    setproctitle.setproctitle(process_title(arguments.role, arguments.index))
    faulthandler.enable()
    try:
        trio.run(_run_main, main, arguments)
    except BaseException as error:  # noqa: BLE001 - the last stop of every error of this process
        sys.exit(_exit_code(error))
    sys.exit(0)


async def _run_main(main: Callable[[ChildContext], Awaitable[None]], arguments: ChildArguments) -> None:
    context = ChildContext(arguments)
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_sigterm, context.stop)
        await main(context)
        nursery.cancel_scope.cancel()


async def _stop_on_sigterm(stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _number in signals:
            stop.set()


def _block_on_lifeline(descriptor: int) -> None:
    # Nobody writes to a lifeline: whatever ends the read means that the supervisor is gone.
    try:
        os.read(descriptor, 1)
    finally:
        os._exit(EXIT_ORPHANED)


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(words[::2], words[1::2], strict=True)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _exit_code(error: BaseException) -> int:
    """Tell the error on standard error; of several the gravest decides. Does not return for those that kill."""
    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, InvariantError | JournalWriteError):
            die(f"{_kind(leaf)}: {leaf}")
    title = setproctitle.getproctitle()
    for leaf in leaves:
        if isinstance(leaf, JournalCorruptError | HaltError | DataDirectoryError | ConfigError):
            sys.stderr.write(f"{title}: halted: {leaf}\n")
            return EXIT_HALTED
    for leaf in leaves:
        if isinstance(leaf, JournalError):
            sys.stderr.write(f"{title}: {leaf}\n")
            return EXIT_FAILED
    sys.stderr.write(f"{title}: unexpected error\n{''.join(traceback.format_exception(error))}")
    return EXIT_FAILED


def _kind(error: BaseException) -> str:
    return "broken invariant" if isinstance(error, InvariantError) else "the outcome of a write is unknown"
