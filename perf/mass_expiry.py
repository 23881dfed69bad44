"""How long a worker is deaf while a million holds expire in the same second.

    python perf/mass_expiry.py [--holds N] [--json FILE]

One worker of its own, with a journal on the disk, in this process: it starts with N holds on 500 counters that are all due
in the same second, the clock is set there, and a task beside it notes the longest time between two of its turns in the event
loop: so long would any other command have waited to be looked at. A second figure is the time until all are free.

The promise is that no stall is over STALL_MS_MAX, however many holds expire; the exit code says whether it was kept.

Not promised: the same on a busy machine. A stall of the operating system counts as one of the worker.
"""

import argparse
import gc
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trio

from engine.core import events, ledger
from engine.core.slots import resolve
from engine.journal.sqlite import open_journal
from engine.ports import Clock
from engine.worker import Bounds, Worker
from perf.engine import surroundings
from readmodel.publisher import Publisher

STALL_MS_MAX = 100
COUNTERS = 500
ZONE = "Europe/Berlin"
SLOT_DATE_MS = resolve("2030-01-01T00:00-01:00", ZONE).starts_at_ms
NOW_MS = SLOT_DATE_MS - 86_400_000
DUE_MS = NOW_MS + 900_000
GIVE_UP_SECONDS = 600


class SetClock(Clock):
    """A wall clock that is set by hand; the monotonic one is real."""

    def __init__(self) -> None:
        self.wall_ms = NOW_MS

    def now_ms(self) -> int:
        return self.wall_ms

    def monotonic_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000


class Measured(NamedTuple):
    """What was found."""

    holds: int
    stall_ms: float
    """The longest time between two turns of the event loop."""
    idle_ms: float
    """The same before anything expired: what this machine adds."""
    seconds: float
    """From the second in which all were due until the last one was free and durable."""
    commits: int


def full_ledger(holds: int) -> ledger.Ledger:
    """A shard with so many holds, spread over counters, all due within one second."""
    state = ledger.Ledger()
    ledger.apply(state, events.TermStarted(1, 1), NOW_MS)
    ledger.apply(state, events.PoolDefined(1, 0, "van-north", ZONE, None, []), NOW_MS)
    days = [f"2030-{1 + day // 28 % 12:02d}-{1 + day % 28:02d}T{day // 336:02d}:00-23:00" for day in range(COUNTERS)]
    plans = [(0, slot_id, holds, 0, 0, False, *resolve(slot_id, ZONE), 2**42) for slot_id in days]
    ledger.apply(state, events.CountersDefined(2, plans), NOW_MS)
    for place in range(holds):
        key = hashlib.blake2b(b"%d" % place, digest_size=16).hexdigest()
        held = events.Held([(place % COUNTERS, 1)], DUE_MS + place % 1000, f"SO-{place}", "web", key, 1)
        ledger.apply(state, held, NOW_MS)
    state.touched.clear()
    return state


class _Turns:
    """Notes the longest time between two turns."""

    def __init__(self) -> None:
        self.longest_ms = 0.0

    async def watch(self) -> None:
        before_ns = time.perf_counter_ns()
        while True:
            await trio.lowlevel.checkpoint()
            now_ns = time.perf_counter_ns()
            self.longest_ms = max(self.longest_ms, (now_ns - before_ns) / 1e6)
            before_ns = now_ns


async def measure(holds: int, directory: Path) -> Measured:
    """Let them expire."""
    clock = SetClock()
    state = full_ledger(holds)
    journal = await open_journal(directory, epoch=1)
    # The state came without a journal: numbers of events in this one begin with 1.
    state.seq = state.epoch = state.restart = 0
    publisher = Publisher(directory, "shard-00", epoch=1, restart_count=0)
    worker = Worker(
        state=state,
        journal=journal,
        publisher=publisher,
        clock=clock,
        rules=ledger.Rules(),
        bounds=Bounds(8_192, 250, 10**12),
        directory=directory,
        snapshot_seq=0,
        shard=0,
        peers={},
    )
    worker.start_term(journal.epoch, journal.restart)
    worker.publish_all()
    await worker.commit_first()
    gc.freeze()  # as in the worker's own process, where `engine.child` does it
    turns = _Turns()
    with trio.fail_after(GIVE_UP_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run)
            nursery.start_soon(turns.watch)
            await trio.sleep(0.5)
            idle_ms, turns.longest_ms = turns.longest_ms, 0.0
            clock.wall_ms = DUE_MS + 1_000
            began = time.monotonic()
            counters = state.counters
            while any(counters.held) or journal.head.seq < state.seq:  # noqa: ASYNC110 - the worker tells nobody
                await trio.sleep(0.005)
            seconds = time.monotonic() - began
            nursery.cancel_scope.cancel()
    publisher.close()
    await journal.close()
    return Measured(
        holds, round(turns.longest_ms, 1), round(idle_ms, 1), round(seconds, 2), worker.statistics().commits
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--holds", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mass-expiry-") as directory:
        found = trio.run(measure, arguments.holds, Path(directory))
    kept = found.stall_ms <= STALL_MS_MAX
    sys.stdout.write(
        f"{found.holds:,} holds expired in {found.seconds} s and {found.commits} commits; longest stall "
        f"{found.stall_ms} ms (idle: {found.idle_ms} ms), {'within' if kept else 'OVER'} {STALL_MS_MAX} ms\n"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"measured": found._asdict(), **surroundings()}, indent=2))
    raise SystemExit(not kept)


if __name__ == "__main__":
    main()
