"""How hard the property tests try.

An ordinary run draws the same examples each time, so that no test fails by chance on somebody else's change. With
SLOTKEEPER_TESTS_LONG set, each run draws new ones, and many more.
"""

import os

from hypothesis import HealthCheck, settings

LONG_RUN_FACTOR = 30
"""Makes the whole folder run for a few minutes."""


def tries(count: int) -> settings:
    """Settings for `count` examples in an ordinary run."""
    long = "SLOTKEEPER_TESTS_LONG" in os.environ
    return settings(
        max_examples=count * LONG_RUN_FACTOR if long else count,
        derandomize=not long,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
