"""How many retries a process may make.

Rules
- Retries are a share of calls, and a small reserve that refills with time: clients must not multiply the load of a server
  that is in trouble.
- Clients of one process share one budget, unless they are given their own.

Not promised: a bound over several processes; each has its own.
"""

import threading
import time
from collections.abc import Callable

from api.client.forks import forked
from engine.core.invariant import invariant


class RetryBudget:
    """How many retries a process may make: a share of its calls, and a small reserve that refills with time.

    It keeps clients from multiplying the load of a server that is in trouble. Retries never exceed
    share * calls + reserve + reserve_per_second * seconds. Safe for threads.
    """

    def __init__(
        self,
        *,
        share: float = 0.1,
        reserve: float = 20.0,
        reserve_per_second: float = 0.5,
        saved_max: float = 100.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`saved_max` bounds what quiet times can save up for a storm."""
        invariant(0 <= reserve <= saved_max, "the reserve can be saved")
        self._share = share
        self._reserve = reserve
        self._reserve_per_second = reserve_per_second
        self._saved_max = saved_max
        self._now = now
        self._saved = reserve
        self._refilled_at = now()
        self._lock = threading.Lock()
        forked.add(self)

    def count_call(self) -> None:
        """A call was made: it brings its share of a retry."""
        with self._lock:
            self._saved = min(self._saved_max, self._saved + self._share)

    def take(self) -> bool:
        """Whether one more retry may be made. It counts as made."""
        with self._lock:
            now = self._now()
            if self._saved < self._reserve:
                # Time restores the reserve only: what is above it has to be earned by calls.
                refilled = self._saved + (now - self._refilled_at) * self._reserve_per_second
                self._saved = min(self._reserve, refilled)
            self._refilled_at = now
            if self._saved < 1:
                return False
            self._saved -= 1
            return True

    def after_fork(self) -> None:
        """In a child process: a thread that held the lock is not there any more."""
        self._lock = threading.Lock()


RETRY_BUDGET = RetryBudget()
"""Of this process. Clients share it unless they are given their own."""
