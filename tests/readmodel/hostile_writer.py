"""A writer that does its worst, as a process of its own: `hostile_writer.py DIRECTORY rage SEED` or `… die STORES`.

`rage` publishes as fast as it can, stops between two stores for random times, publishes blocks, grows, and starts
over in a new generation with the rows in another order. `die` performs that many stores of a publish of row 1 and kills itself.
All values of a row are functions of one number, so a torn row shows. Ends when its parent does.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np

from readmodel import layout
from readmodel.publisher import Publisher

NAME = "shard-07"
POOLS = 8
SLOTS_OF_POOL = 8
COUNTERS = [(pool, f"slot-{slot}".encode()) for pool in range(POOLS) for slot in range(SLOTS_OF_POOL)]
DAY_MS = 86_400_000


def values_of(number: int, pool: int) -> tuple[int, ...]:
    """Values that all follow from one number; different in each word and in each pool."""
    return tuple(number * (word + 1) + pool for word in range(layout.VALUES))


def is_whole(values: tuple[int, ...], pool: int) -> bool:
    """Whether values are those of one number."""
    return values == values_of(values[0] - pool, pool)


def fill(publisher: Publisher, order: list[int]) -> None:
    """Append all counters and go live."""
    for index in order:
        pool, slot_id = COUNTERS[index]
        publisher.append(pool, slot_id, pool * DAY_MS, pool * DAY_MS + 1, values_of(1, pool))
    publisher.set_position(1, 1)
    publisher.heartbeat(1)
    publisher.switch()


def stores_of_publish(publisher: Publisher, row: int, values: tuple[int, ...]) -> Iterator[None]:
    """The stores of `Publisher.publish`, one for each step, with the copy of the values cut in two."""
    words = publisher._words
    word = layout.HEADER_WORDS + row * layout.ROW_WORDS
    odd = words[word] + 1
    body = layout.BODY.pack(odd, *values)
    start = word * layout.WORD_SIZE
    half = layout.BODY.size // 2
    words[word] = odd
    yield
    publisher._map[start : start + half] = body[:half]
    yield
    publisher._map[start + half : start + len(body)] = body[half:]
    yield
    words[word + layout.CHECK_WORD] = layout.check_of_body(body)
    yield
    words[word] = odd + 1


def rage(directory: str, chance: random.Random) -> None:
    """Never returns while the parent lives."""
    parent = os.getppid()
    number = 1
    for restart_count in range(1_000_000):
        publisher = Publisher(directory, NAME, epoch=1, restart_count=restart_count, row_capacity=1)
        order = list(range(len(COUNTERS)))
        chance.shuffle(order)
        fill(publisher, order)
        if restart_count == 0:
            sys.stdout.write("READY\n")
            sys.stdout.flush()
        pools = [COUNTERS[index][0] for index in order]
        for _ in range(3_000):
            if os.getppid() != parent:
                return
            number += 1
            row = chance.randrange(len(order))
            dice = chance.random()
            if dice < 0.2:
                for _store in stores_of_publish(publisher, row, values_of(number, pools[row])):
                    resume_at_ns = time.perf_counter_ns() + chance.randrange(30_000)
                    while time.perf_counter_ns() < resume_at_ns:
                        pass
            elif dice < 0.4:
                rows = np.array(chance.sample(range(len(order)), 16), dtype=np.int64)
                publisher.publish_many(rows, np.array([values_of(number, pools[at]) for at in rows]))
            else:
                for _ in range(20):
                    number += 1
                    publisher.publish(row, values_of(number, pools[row]))
            publisher.set_position(number, number)
        publisher.close()


def die(directory: str, steps: int) -> None:
    """Kill this process in the middle of a publish."""
    publisher = Publisher(directory, NAME, epoch=1, restart_count=0)
    fill(publisher, list(range(len(COUNTERS))))
    stores = stores_of_publish(publisher, 1, values_of(2, COUNTERS[1][0]))
    for _ in range(steps):
        next(stores)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[2] == "rage":
        rage(sys.argv[1], random.Random(int(sys.argv[3])))
    else:
        die(sys.argv[1], int(sys.argv[3]))
