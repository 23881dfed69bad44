"""systemd's two small protocols: sockets handed to us at start, and messages about our state.

Rules:
- The environment variables are taken out when they are read: children must neither take our sockets for theirs nor
  speak in our name.
- Without systemd everything here is a no-op, and a message that cannot be sent is dropped: systemd's own timeouts
  notice a service that stays silent.

Not promised: the file descriptor store, and more than one socket.
"""

import os
import socket
from collections.abc import MutableMapping
from typing import Final

LISTEN_FDS_START: Final = 3
"""sd_listen_fds(3): inherited descriptors are numbered from here."""


class SystemdError(Exception):
    """What systemd handed over cannot be used. The text says what to change in the unit."""


def take_listener(environment: MutableMapping[str, str] | None = None) -> socket.socket | None:
    """The listening socket of socket activation, or None when there is none for this process.

    Raises `SystemdError` unless it is exactly one listening TCP socket.
    """
    environment = os.environ if environment is None else environment
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count:
        return None
    if count != "1":
        raise SystemdError(f"systemd handed over {count} sockets; the .socket unit must have one ListenStream=")
    os.set_inheritable(LISTEN_FDS_START, False)
    try:
        listener = socket.socket(fileno=LISTEN_FDS_START)
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise SystemdError(f"what systemd handed over is not a socket: {error}") from error
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or not listening:
        raise SystemdError("the .socket unit must have ListenStream= with an IP address and a port, and Accept=no")
    return listener


class Notifier:
    """Tells systemd how we are. Does nothing unless started by systemd with Type=notify."""

    def __init__(self, environment: MutableMapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._path = environment.pop("NOTIFY_SOCKET", "")
        watchdog_pid = environment.pop("WATCHDOG_PID", str(os.getpid()))
        watchdog_us = environment.pop("WATCHDOG_USEC", "")
        self.watchdog_seconds: float | None = None
        """How often to send WATCHDOG=1: half of what systemd tolerates, as sd_watchdog_enabled(3) advises."""
        if watchdog_us.isdigit() and watchdog_pid == str(os.getpid()):
            self.watchdog_seconds = int(watchdog_us) / 1_000_000 / 2

    def send(self, *assignments: str) -> None:
        """Send lines such as READY=1, STATUS=text, STOPPING=1, WATCHDOG=1 as one message."""
        if not self._path:
            return
        address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)
            try:
                channel.sendto("\n".join(assignments).encode(), address)
            except OSError:
                # systemd is restarting or its queue is full; the next message tells it again.
                return
