"""Makes the golden journal of the present format: `python -m tests.journal.make_golden TARGET`.

A golden journal is made once, when a format is new, and is never made again: `golden/format-N` must load for ever. Run this
only to make the one of a new format, into a new folder. It has sealed segments, an open one, several epochs and restarts,
one row with several events, and text that is not ASCII; test_golden.py says what must be found in it.
"""

import argparse
from pathlib import Path

import orjson
import trio

from engine.journal.sqlite import open_journal

SHARD = "shard-00"
AT_MS = 1_796_083_200_000
"""2026-12-01T00:00:00Z: a fixed time, so that the rows and hashes are the same whenever this is run."""

TERMS = ((1, None), (1, None), (2, None), (2, 7))
"""Epoch and restart of each writer in turn."""

ROWS_PER_WRITER = 6


def golden_body(seq: int, count: int) -> bytes:
    return orjson.dumps(
        [
            ["held" if (seq + index) % 2 else "released", f"SO-{seq + index}", "Übergröße " * 20]
            for index in range(count)
        ]
    )


async def make(target: Path) -> None:
    for epoch, restart in TERMS:
        journal = await open_journal(
            target / SHARD, epoch=epoch, restart=restart, segment_bytes_max=25 * 1024, checkpoint_bytes=8 * 1024
        )
        for index in range(ROWS_PER_WRITER):
            seq, count = journal.head.seq + 1, 1 + index % 3
            await journal.append(count=count, at_ms=AT_MS + 250 * seq, schema=1, body=golden_body(seq, count))
            await journal.maintain()
        await journal.close()
    (target / SHARD / "lock").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    trio.run(make, parser.parse_args().target)


if __name__ == "__main__":
    main()
