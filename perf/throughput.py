"""How many reservations a second go in over HTTP, become durable and are answered, beside the same HTTP layer empty.

    python perf/throughput.py [--rounds R] [--seconds S] [--connections C] [--shards N] [--api N] [--json FILE]

Three sides take turns, so that all meet the same weather; wrk sends over 64 connections:
- `reservations`: each request is a reservation, confirmed at once, of one unit of a counter drawn from 500, with an
  Idempotency-Key of its own;
- `pairs`: the same of one unit each of two counters that lie on different shards, drawn from 500 such pairs (not with one
  shard, which has none);
- `empty`: `perf/empty_handler.py serve`, the same HTTP layer, as many processes, an empty JSON object for an answer.
Medians and spreads are over the rounds. Beside what wrk counts stands the CPU time of each role's processes for each request,
which says where time goes. What a turn left to be told between shards is told in the next side's time: some thousands of small
messages at most.

The promise is that reservations come to at least half of the empty handler's rate; pairs are measured beside reservations, and
nothing is promised of them. Without wrk this program says so and exits 0: nothing was measured.

Not promised: that wrk's latencies are those of customers. It waits for an answer before it asks again, so it hides
queueing; and on the same cores it takes its share of them.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import orjson
import trio

from engine.core.sharding import shard_of_counter
from perf.engine import Engine, cpu_seconds, surroundings
from perf.load import Address, Client

COUNTERS = 500
POOLS = 10
CAPACITY = 1_000_000_000
"""More than a run can take: here nothing is refused."""
FIRST_DATE = "2030-01-01"
WRK_THREADS = 2
ROUND_SECONDS_SPARE = 30
SCRIPT_NAME = "reservations.lua"

_SCRIPT = """
local threads = 0
function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init(args)
  math.randomseed(os.time() * 1000 + number)
  run, sent = args[1], 0
  statuses = {}
  counters = {}
  for line in io.lines(args[2]) do counters[#counters + 1] = line end
  headers = { ["Content-Type"] = "application/json" }
end

function request()
  sent = sent + 1
  headers["Idempotency-Key"] = run .. "-" .. number .. "-" .. sent
  return wrk.format("POST", "/v1/reservations", headers, counters[math.random(#counters)])
end

function done(summary, latency, requests)
  io.write(string.format(
    "RESULT {\\"requests\\":%d,\\"microseconds\\":%d,\\"p50_us\\":%d,\\"p99_us\\":%d,\\"max_us\\":%d," ..
    "\\"errors\\":{\\"connect\\":%d,\\"read\\":%d,\\"write\\":%d,\\"status\\":%d,\\"timeout\\":%d}}\\n",
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency.max,
    summary.errors.connect, summary.errors.read, summary.errors.write, summary.errors.status, summary.errors.timeout))
end
"""


class Round(NamedTuple):
    """One turn of one side."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    cpu_us_per_request: dict[str, float]
    """By role; a role's processes together."""


def _counter_names() -> list[tuple[str, str]]:
    year, month, first = (int(part) for part in FIRST_DATE.split("-"))
    per_pool = COUNTERS // POOLS
    return [
        (
            f"throughput-{pool}",
            f"{year}-{month:02d}-{first + slot // 12:02d}T{slot % 12 * 2:02d}:00-{slot % 12 * 2 + 1:02d}:00",
        )
        for pool in range(POOLS)
        for slot in range(per_pool)
    ]


def _bodies(reservations: list[list[tuple[str, str]]]) -> str:
    """One request body a line, each for one unit of each of its counters."""
    return "".join(
        orjson.dumps(
            {
                "order_ref": "SO-4711",
                "lines": [{"pool_id": pool_id, "slot_id": slot_id, "quantity": 1} for pool_id, slot_id in counters],
            }
        ).decode()
        + "\n"
        for counters in reservations
    )


def _pairs(shards: int) -> list[list[tuple[str, str]]]:
    """Each counter, followed by the next one of another shard. Empty with one shard."""
    names = _counter_names()
    owners = [shard_of_counter(*name, shards) for name in names]
    pairs = []
    for place, name in enumerate(names):
        following = (*range(place + 1, len(names)), *range(place))
        other = next((names[far] for far in following if owners[far] != owners[place]), None)
        if other is not None:
            pairs.append([name, other])
    return pairs


async def _seed(address: Address) -> None:
    client = Client(address)
    try:
        for pool_id in sorted({pool_id for pool_id, _ in _counter_names()}):
            pool = {"capacity_type": "logistics", "unit": "stop", "time_zone": "UTC"}
            answer = await client.ask("PUT", f"/v1/pools/{pool_id}", orjson.dumps(pool))
            if answer.status not in (200, 201):
                raise RuntimeError(f"a pool was not taken: {answer}")
        rows = [{"pool_id": pool_id, "slot_id": slot_id, "base": CAPACITY} for pool_id, slot_id in _counter_names()]
        answer = await client.ask("POST", "/v1/counters:import", orjson.dumps({"counters": rows}))
        if answer.status != 200:
            raise RuntimeError(f"the counters were not taken: {answer}")
    finally:
        client.close()


def _drive(port: int, run: str, bodies: Path, connections: int, seconds: int) -> dict[str, Any]:
    """What wrk counted. Raises RuntimeError where not every request was answered well."""
    command = [
        "wrk",
        f"-t{WRK_THREADS}",
        f"-c{connections}",
        f"-d{seconds}s",
        "-s",
        str(bodies.with_name(SCRIPT_NAME)),
        f"http://127.0.0.1:{port}",
        "--",
        run,
        str(bodies),
    ]
    words = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=seconds + ROUND_SECONDS_SPARE
    ).stdout
    match = re.search(r"^RESULT (.*)$", words, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"wrk said something unexpected:\n{words}")
    result: dict[str, Any] = json.loads(match[1])
    if any(result["errors"].values()):
        raise RuntimeError(f"not every request was answered well:\n{words}")
    return result


def _round(result: dict[str, Any], cpu: dict[str, float]) -> Round:
    requests = result["requests"]
    return Round(
        round(requests * 1e6 / result["microseconds"], 1),
        result["p50_us"] / 1_000,
        result["p99_us"] / 1_000,
        result["max_us"] / 1_000,
        {role: round(seconds * 1e6 / requests, 2) for role, seconds in cpu.items()},
    )


def _cpu_by_role(pids: dict[str, list[int]]) -> dict[str, float]:
    return {role: sum(cpu_seconds(pid) for pid in role_pids) for role, role_pids in pids.items()}


def _engine_pids(engine: Engine) -> dict[str, list[int]]:
    pids: dict[str, list[int]] = {"supervisor": [engine.pid]}
    for child in engine.children():
        pids.setdefault(child.role, []).append(child.pid)
    return pids


class _Empty:
    """`perf/empty_handler.py serve`, and the processes under it."""

    def __init__(self, stack: ExitStack, processes: int) -> None:
        program = Path(__file__).with_name("empty_handler.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program), "serve", "--processes", str(processes)], stdout=subprocess.PIPE
        )
        stack.callback(self._stop)
        output = self._process.stdout
        line = b"" if output is None else output.readline()
        if not line.startswith(b"LISTENING "):
            raise RuntimeError("the empty handler did not start; its words are above")
        self.port = int(line.rpartition(b":")[2])
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text(encoding="ascii")
        self.pids = {"api": [int(pid) for pid in children.split()]}

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()


def _summary(rounds: list[Round]) -> dict[str, Any]:
    rates = [one.requests_per_second for one in rounds]
    median = statistics.median(rates)
    return {
        "requests_per_second": {
            "median": round(median),
            "lowest": round(min(rates)),
            "highest": round(max(rates)),
            "spread_percent": round(100 * (max(rates) - min(rates)) / median, 1),
        },
        "p50_ms": round(statistics.median(one.p50_ms for one in rounds), 3),
        "p99_ms": round(statistics.median(one.p99_ms for one in rounds), 3),
        "max_ms": max(one.max_ms for one in rounds),
        "cpu_us_per_request": {
            role: round(statistics.median(one.cpu_us_per_request[role] for one in rounds), 2)
            for role in rounds[0].cpu_us_per_request
        },
        "rounds": [one._asdict() for one in rounds],
    }


def measure(*, rounds: int, seconds: int, connections: int, shards: int, api: int) -> dict[str, Any]:
    """All sides in turns. Returns the report."""
    report = surroundings()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slotkeeper-throughput-")))
        (directory / SCRIPT_NAME).write_text(_SCRIPT, encoding="ascii")
        single, pair = directory / "single.jsonl", directory / "pairs.jsonl"
        single.write_text(_bodies([[name] for name in _counter_names()]), encoding="ascii")
        pair.write_text(_bodies(_pairs(shards)), encoding="ascii")
        engine = stack.enter_context(Engine(directory / "data", shards=shards, api_processes=api))
        trio.run(_seed, engine.address)
        pids = _engine_pids(engine)
        empty = _Empty(stack, len(pids["api"]))
        report |= {
            "connections": connections,
            "seconds": seconds,
            "processes": {role: len(role_pids) for role, role_pids in pids.items()},
        }
        sides = {
            "reservations": (engine.address.port, pids, single),
            "pairs": (engine.address.port, pids, pair),
            "empty": (empty.port, empty.pids, single),
        }
        if shards == 1:
            del sides["pairs"]
        measured: dict[str, list[Round]] = {side: [] for side in sides}
        for number in range(rounds):
            for side, (port, side_pids, bodies) in sides.items():
                before = _cpu_by_role(side_pids)
                result = _drive(port, f"{os.getpid()}-{side}-{number}", bodies, connections, seconds)
                after = _cpu_by_role(side_pids)
                one = _round(result, {role: after[role] - before[role] for role in after})
                measured[side].append(one)
                print(
                    f"round {number + 1} {side:12} {one.requests_per_second:9,.0f}/s  p50 {one.p50_ms:.2f} ms  "
                    f"p99 {one.p99_ms:.2f} ms  cpu us/request "
                    + " ".join(f"{role} {cpu:.1f}" for role, cpu in one.cpu_us_per_request.items()),
                    flush=True,
                )
    report |= {side: _summary(side_rounds) for side, side_rounds in measured.items()}
    report["ratio"] = _ratio(measured["reservations"], measured["empty"])
    if "pairs" in measured:
        report["ratio_of_pairs"] = _ratio(measured["pairs"], measured["reservations"])
    return report


def _ratio(rounds: list[Round], of_rounds: list[Round]) -> dict[str, float]:
    """The rate of one side as a share of another's, round by round."""
    ratios = [one.requests_per_second / other.requests_per_second for one, other in zip(rounds, of_rounds, strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure reservations beside an empty handler.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--api", type=int, default=2, help="api processes, and processes of the empty handler")
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        print("wrk is not installed: nothing was measured. Debian has it as the package wrk.")
        return
    report = measure(
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        connections=arguments.connections,
        shards=arguments.shards,
        api=arguments.api,
    )
    for side in ("reservations", "pairs", "empty"):
        if side not in report:
            continue
        rates = report[side]["requests_per_second"]
        print(
            f"{side:12} median {rates['median']:,}/s (from {rates['lowest']:,} to {rates['highest']:,}), "
            f"p50 {report[side]['p50_ms']} ms, p99 {report[side]['p99_ms']} ms, max {report[side]['max_ms']} ms"
        )
    _say_ratio("reservations to empty", report["ratio"], "promised: 0.5")
    if "ratio_of_pairs" in report:
        _say_ratio("pairs to reservations", report["ratio_of_pairs"], "nothing is promised")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _say_ratio(what: str, ratio: dict[str, float], promise: str) -> None:
    print(f"{what}: median {ratio['median']} (from {ratio['lowest']} to {ratio['highest']}); {promise}")


if __name__ == "__main__":
    main()
