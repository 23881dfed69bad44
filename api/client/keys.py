"""Making Idempotency-Keys.

Rules
- A key is made once for a call, before its first send; every try carries the same.

Not promised: that keys made within one millisecond, or on machines whose clocks differ, sort by the time they were made.
"""

import os
import time
import uuid


def fresh_key() -> str:
    """A new Idempotency-Key: a UUID of version 7, so that keys sort by the time they were made."""
    at_ms = time.time_ns() // 1_000_000
    chance = int.from_bytes(os.urandom(10), "big")
    number = (
        (at_ms & (1 << 48) - 1) << 80 | 0x7 << 76 | (chance >> 62 & 0xFFF) << 64 | 0b10 << 62 | chance & (1 << 62) - 1
    )
    return str(uuid.UUID(int=number))
