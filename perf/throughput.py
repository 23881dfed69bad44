"""How many single reservations a second go in over HTTP, become durable and are answered, beside the same HTTP layer empty.

    python perf/throughput.py [--rounds R] [--seconds S] [--connections C] [--shards N] [--api N] [--json FILE]

Each request is a reservation, confirmed at once, of one unit of a counter drawn from 500, with an Idempotency-Key of its own.
wrk sends them over 64 connections. The other side is `perf/empty_handler.py serve`: the same HTTP layer, as many processes,
an empty JSON object for an answer. The two take turns, so that both meet the same weather; medians and spreads are over the
rounds. Beside what wrk counts stands the CPU time of each role's processes for each request, which says where time goes.

The promise is a ratio of at least one half. Without wrk this program says so and exits 0: nothing was measured.

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

from perf.engine import Engine, cpu_seconds, surroundings
from perf.load import Address, Client

COUNTERS = 500
POOLS = 10
CAPACITY = 1_000_000_000
"""More than a run can take: here nothing is refused."""
FIRST_DATE = "2030-01-01"
WRK_THREADS = 2
ROUND_SECONDS_SPARE = 30

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


def _drive(port: int, run: str, directory: Path, connections: int, seconds: int) -> dict[str, Any]:
    """What wrk counted. Raises RuntimeError where not every request was answered well."""
    command = [
        "wrk",
        f"-t{WRK_THREADS}",
        f"-c{connections}",
        f"-d{seconds}s",
        "-s",
        str(directory / "reservations.lua"),
        f"http://127.0.0.1:{port}",
        "--",
        run,
        str(directory / "bodies.jsonl"),
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
    """Both sides in turns. Returns the report."""
    report = surroundings()
    measured: dict[str, list[Round]] = {"reservations": [], "empty": []}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slotkeeper-throughput-")))
        (directory / "reservations.lua").write_text(_SCRIPT, encoding="ascii")
        bodies = [
            orjson.dumps(
                {"order_ref": "SO-4711", "lines": [{"pool_id": pool_id, "slot_id": slot_id, "quantity": 1}]}
            ).decode()
            for pool_id, slot_id in _counter_names()
        ]
        (directory / "bodies.jsonl").write_text("\n".join(bodies) + "\n", encoding="ascii")
        engine = stack.enter_context(Engine(directory / "data", shards=shards, api_processes=api))
        trio.run(_seed, engine.address)
        pids = _engine_pids(engine)
        empty = _Empty(stack, len(pids["api"]))
        report |= {
            "connections": connections,
            "seconds": seconds,
            "processes": {role: len(role_pids) for role, role_pids in pids.items()},
        }
        sides = {"reservations": (engine.address.port, pids), "empty": (empty.port, empty.pids)}
        for number in range(rounds):
            for side, (port, side_pids) in sides.items():
                before = _cpu_by_role(side_pids)
                result = _drive(port, f"{os.getpid()}-{number}", directory, connections, seconds)
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
    of_empty = [
        full.requests_per_second / bare.requests_per_second
        for full, bare in zip(measured["reservations"], measured["empty"], strict=True)
    ]
    report["ratio"] = {
        "median": round(statistics.median(of_empty), 3),
        "lowest": round(min(of_empty), 3),
        "highest": round(max(of_empty), 3),
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure single reservations beside an empty handler.")
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
    for side in ("reservations", "empty"):
        rates = report[side]["requests_per_second"]
        print(
            f"{side:12} median {rates['median']:,}/s (from {rates['lowest']:,} to {rates['highest']:,}), "
            f"p50 {report[side]['p50_ms']} ms, p99 {report[side]['p99_ms']} ms, max {report[side]['max_ms']} ms"
        )
    ratio = report["ratio"]
    print(f"ratio        median {ratio['median']} (from {ratio['lowest']} to {ratio['highest']}); promised: 0.5")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
