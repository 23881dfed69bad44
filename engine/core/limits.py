"""Every bound of the core in one place, with its reason, and how the bounds relate.

Full means refuse: code that meets one of these says so to the caller, it never grows past it.
Bounds an operator may change are in `engine.config`; these are part of the journal's and the API's format.
"""

from engine.core.invariant import invariant

QUANTITY_MAX = 1_000_000
"""Units one line may ask for. With LINES_MAX it keeps the sum of a reservation on one counter within 32 bits."""

LINES_MAX = 20
"""Lines of one reservation: an order takes from a van pool and a few warehouse pools, not from hundreds."""

UNITS_MAX = 2**53
"""Base, overbook and buffer of a counter: the largest integer that every JSON reader keeps exact."""

POOL_ID_CHARS_MAX = 64
SLOT_ID_CHARS_MAX = 32
LABEL_CHARS_MAX = 64
"""capacity_type, unit, zone."""
ORDER_REF_CHARS_MAX = 128
CHANNEL_CHARS_MAX = 32
REASON_CHARS_MAX = 500
IDEMPOTENCY_KEY_CHARS_MAX = 255

SHARDS_MAX = 256
"""Far above the cores of one host; 16 bits of a counter's hash spread evenly over it."""

POOLS_MAX = 100_000
COUNTERS_OF_SHARD_MAX = 4_000_000
"""At about 1 KB each in all processes together this is 4 GB: more counters want more shards."""

SEQ_MAX = 2**47 - 1
"""A reservation number is seq << 16 | hash in a signed 64-bit column."""

REFUSED_KEYS_MAX = 65_536
"""Keys of refused requests kept for each shard, oldest forgotten first, so that a retry is counted once."""

EXPIRED_IN_EVENT_MAX = 16_384
"""Holds that one `expired` event frees, with arrays, in a few milliseconds. The worker puts other work between such steps: a
million holds that expire in one second stall it for about 50 ms at the longest (perf/mass_expiry.py)."""

FORGOTTEN_IN_EVENT_MAX = 16_384
"""Finished records that one `forgotten` event looks through."""

COUNTERS_IN_EVENT_MAX = 2_000
"""Counters that one `counters_defined` event carries: about 120 kB of JSON."""

invariant(QUANTITY_MAX * LINES_MAX < 2**31, "quantities of one reservation must fit 32-bit columns")
invariant(SEQ_MAX << 16 | 0xFFFF < 2**63, "reservation numbers must fit 64-bit columns")
invariant(UNITS_MAX * 3 < 2**63, "base + overbook + used must not overflow a 64-bit column")
