"""Places where a test can end the process, at an exact step of its work.

`SLOTKEEPER_FAILPOINT="after_append:kill:7"` kills the process with SIGKILL when it passes the place named `after_append` for
the seventh time. The variable reaches all processes of an engine and their successors, each with a countdown of its own: so
workers die again and again. `"after_append:kill:7:/tmp/x/died"` does it once in all: whoever is first to create that file
acts, and the file holds its process id. Without the variable, passing a place costs one comparison.

A place may count only when a condition holds, which is looked at only where the environment names the place.

Not for operators: the variable is read once, at import, and nothing sets it but the tests of crash recovery.
"""

import os
import signal
from collections.abc import Callable

_SPEC = os.environ.get("SLOTKEEPER_FAILPOINT", "")
_NAME, _, _REST = _SPEC.partition(":")
_ACTION, _, _REST = _REST.partition(":")
_COUNT, _, _ONCE_FILE = _REST.partition(":")
_passes_left = int(_COUNT or "1")

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def failpoint(name: str, applies: Callable[[], bool] | None = None) -> None:
    """Do here what the environment asks for, if anything."""
    if name != _NAME or (applies is not None and not applies()):
        return
    global _passes_left  # noqa: PLW0603 - one countdown for the process
    _passes_left -= 1
    if _passes_left == 0 and _is_first():
        os.kill(os.getpid(), _SIGNALS[_ACTION])


def _is_first() -> bool:
    """Whether this process is the one that acts: without a file each is, with one whoever creates it."""
    if not _ONCE_FILE:
        return True
    try:
        descriptor = os.open(_ONCE_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    os.write(descriptor, b"%d\n" % os.getpid())
    os.close(descriptor)
    return True
