"""Time the read model with pyperf: publish, bulk publish, row, find, and selections over 500,000 counters in one file.

    python perf/bench_readmodel.py [--fast] [-o result.json]

Each pyperf process builds its own file on tmpfs, which takes 0.3 s. Bulk publishes and selections are given for the whole
call: divide by the rows in the name. No writer is active while reading: torn rows are the business of the tests.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyperf

sys.path.insert(0, str(Path(__file__).parents[1]))

from readmodel import layout
from readmodel.publisher import Publisher
from readmodel.reader import Reader

COUNTERS = 500_000
SLOTS_OF_POOL = 1_000
VALUES = (41, 40, 2, 1, 3, 30, 0, 5, 0, 1_764_603_000_000, 918_270, 17)


def fill(publisher: Publisher) -> None:
    """COUNTERS counters, pool by pool, with slots two hours apart."""
    rows = np.arange(COUNTERS)
    slots = rows % SLOTS_OF_POOL
    slot_ids = np.array([b"2026-12-01T%012d" % slot for slot in range(SLOTS_OF_POOL)])[slots]
    starts_at_ms = 1_764_000_000_000 + slots * 7_200_000
    values = np.tile(np.array(VALUES, dtype=np.int64), (COUNTERS, 1))
    publisher.append_many(rows // SLOTS_OF_POOL, slot_ids, starts_at_ms, starts_at_ms + 7_200_000, values)
    publisher.set_position(1, 1)
    publisher.switch()


def main() -> None:
    """Run the suite."""
    runner = pyperf.Runner()
    runner.metadata["description"] = f"read model of {COUNTERS} counters, rows of {layout.ROW_SIZE} bytes"
    directory = tempfile.mkdtemp(prefix="bench-readmodel-", dir="/dev/shm")
    try:
        publisher = Publisher(directory, "bench", epoch=1, restart_count=0, row_capacity=COUNTERS)
        fill(publisher)
        reader = Reader(directory, "bench")
        some = np.random.default_rng(1).permutation(COUNTERS)[:10_000]
        values = np.tile(np.array(VALUES, dtype=np.int64), (len(some), 1))
        slot_id = b"2026-12-01T%012d" % 5
        found = reader.find(77, slot_id)
        if found is None:
            raise SystemExit("the counter looked for is missing: the read model is broken")
        hour_ms = 3_600_000
        first_ms = 1_764_000_000_000

        runner.bench_func("publish", publisher.publish, found, VALUES)
        runner.bench_func("publish_many_10k", publisher.publish_many, some, values)
        runner.bench_func("refresh", reader.refresh)
        runner.bench_func("row", reader.row, found)
        runner.bench_func("find", reader.find, 77, slot_id)
        runner.bench_func("find_miss", reader.find, 77, b"no such slot")
        runner.bench_func("select_500_of_pool", reader.select, [77], None, None, 500)
        runner.bench_func("select_500_by_start", reader.select, None, first_ms, first_ms + hour_ms, 500)
        runner.bench_func("select_50k_of_50_pools", reader.select, range(50), None, None, 50_000)
        runner.bench_func("select_500k", reader.select, None, None, None, COUNTERS)
        publisher.close()
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
