"""The real clock: wall time for what people read, boot time for deadlines.

CLOCK_BOOTTIME counts while a machine sleeps and is the same for every process of a host, so a deadline can be handed from
one process to another. Wall time may jump; the journal's times never go back all the same (`ledger.apply`).
"""

import time


class SystemClock:
    """Implements `ports.Clock`."""

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01T00:00:00Z."""
        return time.time_ns() // 1_000_000

    def monotonic_ms(self) -> int:
        """Milliseconds of CLOCK_BOOTTIME."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
