"""A writer as a process of its own: `python -m tests.journal.writer_process DIR [--rows N] [--segment-bytes N]`.

Prints `open SEQ` once, then `SEQ` for each acknowledged row, `failed` and kills itself when an append fails, as a worker
does. After `--rows` rows it prints `idle` and waits until its standard input ends, then closes in order.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import trio

from engine.journal.sqlite import open_journal
from engine.ports import JournalWriteError
from tests.journal.journal_tools import body_of


def say(words: str) -> None:
    os.write(1, f"{words}\n".encode())


async def write(directory: Path, rows_max: int, segment_bytes_max: int) -> None:
    journal = await open_journal(directory, epoch=1, segment_bytes_max=segment_bytes_max, checkpoint_bytes=64 * 1024)
    say(f"open {journal.head.seq}")
    try:
        for _ in range(rows_max):
            seq = journal.head.seq + 1
            await journal.append(count=1, at_ms=1000 + seq, schema=1, body=body_of(seq, padding_bytes=seq % 5000))
            say(str(seq))
            await journal.maintain()
    except JournalWriteError:
        say("failed")
        os.kill(os.getpid(), signal.SIGKILL)
    say("idle")
    await trio.to_thread.run_sync(sys.stdin.read)
    await journal.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--segment-bytes", type=int, default=512 * 1024)
    arguments = parser.parse_args()
    trio.run(write, arguments.directory, arguments.rows, arguments.segment_bytes)


if __name__ == "__main__":
    main()
