"""A real child process for the tests of supervisor and child: does what SLOTKEEPER_TEST_BEHAVIOUR says.

It tells what it does in lines on standard output, which the supervisor passes through: the test waits for them, and
EOF on that pipe means that no process is left.
"""

import ctypes
import fcntl
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import trio

from engine.child import ChildArguments, ChildContext, HaltError, die, run_child, wait_for_lock
from engine.core.invariant import invariant
from engine.datadir import shard_directory
from engine.ports import JournalCorruptError, JournalLockedError, JournalWriteError


def tell(*words: object) -> None:
    """One line, in one write, so that lines of several processes do not mix."""
    os.write(1, (" ".join(str(word) for word in words) + "\n").encode())


async def lock_shard(path: Path) -> int:
    """Stands for opening a journal: the same flock, the same error."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise JournalLockedError(f"{path} is locked") from None
    return descriptor


def inherited() -> str:
    """Which descriptors this process was given, as far as they are pipes or sockets."""
    numbers = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue
        if int(entry.name) > 2 and target.startswith(("pipe:", "socket:", "/")):
            numbers.append(int(entry.name))
    return ",".join(str(number) for number in sorted(numbers))


AT_START = inherited()


async def main(context: ChildContext) -> None:
    """Behave."""
    arguments = context.arguments
    name = f"{arguments.role} {arguments.index}"
    behaviour = json.loads(os.environ.get("SLOTKEEPER_TEST_BEHAVIOUR", "{}")).get(name, "good")
    tell("up", name, os.getpid(), arguments.epoch, arguments.restart, AT_START, arguments.to_argv()[2:])
    if behaviour == "halt":
        raise HaltError("a person is needed")
    if behaviour == "corrupt":
        raise JournalCorruptError("row 7 is missing")
    if behaviour == "crash" or (behaviour == "crash_once" and arguments.restart == 0):
        raise OSError("something unexpected")
    if behaviour == "never_ready":
        await context.stop.wait()
        return
    if behaviour == "write_error":
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_to_write)
            nursery.start_soon(trio.sleep_forever)
    if behaviour == "die":
        try:
            die("the disk said no")
        finally:
            tell("cleaned up")
    if behaviour == "invariant":
        invariant(behaviour != "invariant", "two and two are four")
    lock = -1
    if arguments.role == "worker":
        lock = await wait_for_lock(lambda: lock_shard(shard_directory(arguments.data, arguments.index)))
    if arguments.role == "api" and arguments.listen_fd is not None:
        listener = trio.socket.from_stdlib_socket(socket.socket(fileno=arguments.listen_fd))
        async with trio.open_nursery() as nursery:
            context.ready()
            tell("ready", name)
            nursery.start_soon(answer, listener)
            await context.stop.wait()
            nursery.cancel_scope.cancel()
        tell("stopped", name)
        return
    context.ready()
    tell("ready", name)
    if behaviour == "hang":
        tell("busy", name)
        time.sleep(600)  # noqa: ASYNC251 - the loop must hang
    if behaviour == "hold_interpreter_lock":
        # PyDLL keeps the lock during calls, and nobody may ask for it between these two.
        sys.setswitchinterval(600)
        libc = ctypes.PyDLL(None)
        line = f"busy {name}\n".encode()
        libc.write(1, line, len(line))
        libc.sleep(600)
    if behaviour == "deaf":
        with trio.open_signal_receiver(signal.SIGTERM):
            tell("busy", name)
            await trio.sleep_forever()
    await context.stop.wait()
    if lock >= 0:
        os.close(lock)
    tell("stopped", name)


async def fail_to_write() -> None:
    """A task deep in a nursery meets a failed commit."""
    raise JournalWriteError("disk I/O error")


async def answer(listener: trio.socket.SocketType) -> None:
    """Say the process id to whoever connects."""
    while True:
        connection, _ = await listener.accept()
        with connection:
            await connection.send(str(os.getpid()).encode())


if __name__ == "__main__":
    run_child(main, ChildArguments.from_argv(sys.argv[1:]))
