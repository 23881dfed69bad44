"""Places where a test can end the process, at an exact step of its work.

`SLOTKEEPER_FAILPOINT="after_append:kill:7"` kills the process with SIGKILL when it passes the place named `after_append` for
the seventh time. Without the variable, passing a place costs one comparison. Not for operators: the variable is read once,
at import, and nothing sets it but the tests of crash recovery.
"""

import os
import signal

_SPEC = os.environ.get("SLOTKEEPER_FAILPOINT", "")
_NAME, _, _REST = _SPEC.partition(":")
_ACTION, _, _COUNT = _REST.partition(":")
_passes_left = int(_COUNT or "1")

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def failpoint(name: str) -> None:
    """Do here what the environment asks for, if anything."""
    if name != _NAME:
        return
    global _passes_left  # noqa: PLW0603 - one countdown for the process
    _passes_left -= 1
    if _passes_left == 0:
        os.kill(os.getpid(), _SIGNALS[_ACTION])
