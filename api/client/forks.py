"""What a child process must not take over from its parent.

Rules
- A lock may be held by a thread that the child does not have, and a connection is the parent's. Whoever owns either is in
  `forked`, and puts it right before the child goes on.
- Membership is weak: being here keeps nothing alive.

Not promised: anything for trio, whose runs do not survive a fork.
"""

import os
import weakref
from typing import Protocol


class _AfterFork(Protocol):
    def after_fork(self) -> None: ...


forked: "weakref.WeakSet[_AfterFork]" = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(forked):
        each.after_fork()


os.register_at_fork(after_in_child=_after_fork)
