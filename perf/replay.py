"""Replays a year of real grocery orders over HTTP and proves what the engine made of them.

    python perf/replay.py [--orders N] [--twice] [--url http://HOST:PORT] [--connections C] [--shards S] [--json FILE]

The orders are those of perf/data: 155,848 baskets of 457 stores in 2017. Each is one reservation of a van stop in the pool
of its store (`van-367`) and of its pick lines in a warehouse pool (`pick-dc1` to `pick-dc3`; a store's warehouse follows from
a CRC of its name), both in the two-hour slot (UTC) in which it was placed; with two shards about half of them lie on both.
Dates move by whole weeks, so that Sunday 2017-01-01 becomes Sunday 2027-01-03, or as many weeks later as it takes for all
slots to lie in the future.

Limits are made from January to November, for each pool, weekday and two-hour slot: a van pool gets the most orders seen on
one day (48 weeks make that its 98th percentile), a warehouse the 95th percentile of the lines picked, days without orders
included; never less than 1. So the warehouses refuse a little all year, and both refuse more in December. Counters exist
where an order asks for one. `--orders N` replays the last N orders: December, where refusals are.

What is proven, each failure being named and the exit code 1
- each counter's used units are the sum over acknowledged reservations, and within the limit;
- the feed tells each acknowledged reservation once, with all its lines, and no other of this replay; what lies on another
  shard than its home is confirmed there too, and settled;
- the data directory passes `slotkeeper verify` (where the engine is started here);
- `--twice`: the same requests with the same keys, all sent again, make no reservation and change no used units.

An order may be refused because of units that another one holds while it waits for a shard that then refuses it: a moment
later it would fit. So before `--twice` sends everything again it asks once more for what was refused, one order at a time.
Who is accepted then must share a counter with a refused order over two shards. After that a refusal is final, since nothing
gives units back, and the second pass is proven without exception. It may record demand once more, as a `refused` event, where
an order is turned away by another of its two shards than before.

Keys follow from the order's number, so a replay that was interrupted can be started again against the same engine.

Not promised: an open arrival process. C connections send as fast as answers come: the rate is what the engine takes, and the
latency is that of a full pipe, the client's own share included.
"""

import argparse
import csv
import datetime as dt
import gzip
import json
import math
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import orjson
import trio

from engine.core.sharding import shard_of_counter
from perf import load
from perf.engine import Engine, surroundings
from perf.load import Address, Client, GaveUpError

DATA = Path(__file__).resolve().parent / "data" / "grocery-orders-2017.csv.gz"
FIRST_DAY = dt.date(2017, 1, 1)
LIMITS_UNTIL = dt.date(2017, 11, 30)
"""Limits are made from the days up to here."""
WEEKS_MIN = 522
"""From Sunday 2017-01-01 to Sunday 2027-01-03."""
DAYS_AHEAD_MIN = 7
SLOT_HOURS = 2
WAREHOUSES = 3
PICK_QUANTILE = 0.95
IMPORT_ROWS = 20_000
"""Counters of one import request: about 2 MB."""
PAGE = 1_000
CHANNEL = "replay"
PROGRESS_SECONDS = 1.0
QUIET_SECONDS_MAX = 60.0
"""Until all shards know what became of each reservation, reading everything included: a second, on a quiet machine."""
QUIET_POLL_SECONDS = 0.25
LISTED_MAX = 20
"""Problems printed; the rest is counted."""

CounterName = tuple[str, str]
"""(pool_id, slot_id)"""
Tell = Callable[[str], None]


class Order(NamedTuple):
    """One order, moved to its new date."""

    order_ref: str
    day: dt.date
    """In 2017."""
    hour: int
    """At which its slot starts."""
    slot_id: str
    van_pool: str
    pick_pool: str
    pick_lines: int

    @property
    def van(self) -> CounterName:
        """The counter of its van stop."""
        return self.van_pool, self.slot_id

    @property
    def pick(self) -> CounterName:
        """The counter of its pick lines."""
        return self.pick_pool, self.slot_id

    @property
    def lines(self) -> dict[CounterName, int]:
        """What it asks for. The first line is at home."""
        return {self.van: 1, self.pick: self.pick_lines}

    def lines_elsewhere(self, shards: int) -> dict[CounterName, int]:
        """The lines that do not lie on its home."""
        home = shard_of_counter(*self.van, shards)
        return {name: units for name, units in self.lines.items() if shard_of_counter(*name, shards) != home}


# --- orders and limits: pure ------------------------------------------------------------------------------------------


def weeks_to_move(today: dt.date) -> int:
    """By how many weeks dates move so that all slots lie in the future."""
    ahead = today + dt.timedelta(days=DAYS_AHEAD_MIN) - FIRST_DAY
    return max(WEEKS_MIN, math.ceil(ahead / dt.timedelta(weeks=1)))


def load_orders(weeks: int) -> list[Order]:
    """The year's orders in the order of their placing."""
    move = dt.timedelta(weeks=weeks)
    orders = []
    with gzip.open(DATA, "rt", encoding="ascii", newline="") as lines:
        for row in csv.DictReader(lines):
            placed_at = row["placed_at"]
            day = dt.date.fromisoformat(placed_at[:10])
            hour = int(placed_at[11:13]) // SLOT_HOURS * SLOT_HOURS
            slot_id = f"{day + move}T{hour:02d}:00-{(hour + SLOT_HOURS) % 24:02d}:00"
            store = row["store_id"]
            warehouse = zlib.crc32(store.encode()) % WAREHOUSES + 1
            orders.append(
                Order(
                    row["order_ref"],
                    day,
                    hour,
                    slot_id,
                    f"van-{store}",
                    f"pick-dc{warehouse}",
                    int(row["pick_lines"]),
                )
            )
    return orders


def make_limits(orders: list[Order]) -> Counter[tuple[str, int, int]]:
    """The limit of each (pool, weekday, hour) that had an order in the first eleven months; elsewhere it is 1."""
    demand: defaultdict[tuple[str, int, int], Counter[dt.date]] = defaultdict(Counter)
    for order in orders:
        if order.day <= LIMITS_UNTIL:
            weekday = order.day.weekday()
            demand[order.van_pool, weekday, order.hour][order.day] += 1
            demand[order.pick_pool, weekday, order.hour][order.day] += order.pick_lines
    days = (LIMITS_UNTIL - FIRST_DAY).days + 1
    days_of_weekday = Counter((FIRST_DAY + dt.timedelta(days=day)).weekday() for day in range(days))
    limits: Counter[tuple[str, int, int]] = Counter()
    for key, units_of_day in demand.items():
        pool_id, weekday, _ = key
        quantile = PICK_QUANTILE if pool_id.startswith("pick-") else 1.0
        limits[key] = max(1, _nearest_rank(list(units_of_day.values()), days_of_weekday[weekday], quantile))
    return limits


def _nearest_rank(units: list[int], days: int, quantile: float) -> int:
    """The quantile over `days` days, of which those not in `units` had 0."""
    place = math.ceil(quantile * days) - 1 - (days - len(units))
    return sorted(units)[place] if place >= 0 else 0


def make_counters(orders: list[Order], limits: Counter[tuple[str, int, int]]) -> dict[CounterName, int]:
    """The limit of each counter that the orders ask for."""
    counters = {}
    for order in orders:
        for name in (order.van, order.pick):
            counters[name] = max(1, limits[name[0], order.day.weekday(), order.hour])
    return counters


# --- one order over HTTP ----------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What became of one order."""

    reservation: str | None
    """None where it was refused."""

    @property
    def accepted(self) -> bool:
        """Whether it has a reservation."""
        return self.reservation is not None


class UnexpectedError(Exception):
    """An answer that cannot be in a replay."""


REFUSED = Result(None)


async def reserve(client: Client, order: Order) -> Result:
    """Make the reservation of an order. Raises GaveUpError, UnexpectedError."""
    lines = [
        {"pool_id": pool_id, "slot_id": slot_id, "quantity": quantity}
        for (pool_id, slot_id), quantity in order.lines.items()
    ]
    body = orjson.dumps({"order_ref": order.order_ref, "channel": CHANNEL, "lines": lines})
    answer = await client.ask("POST", "/v1/reservations", body, f"replay-{order.order_ref}")
    if answer.status in (200, 201):
        made = orjson.loads(answer.body)
        if made["status"] == "confirmed" and named_lines(made["lines"]) == order.lines:
            return Result(made["reservation_id"])
    elif answer.status == 409 and orjson.loads(answer.body)["code"] == "insufficient_capacity":
        return REFUSED
    raise UnexpectedError(f"order {order.order_ref}: {answer.status} {answer.body.decode(errors='replace')}")


def named_lines(lines: list[dict[str, Any]]) -> dict[CounterName, int]:
    """Lines as the API tells them."""
    return {(line["pool_id"], line["slot_id"]): line["quantity"] for line in lines}


# --- capacity, counters, feed -----------------------------------------------------------------------------------------


async def _good(client: Client, method: str, target: str, body: bytes = b"") -> Any:
    answer = await client.ask(method, target, body)
    if answer.status not in (200, 201):
        raise UnexpectedError(f"{method} {target}: {answer.status} {answer.body.decode(errors='replace')}")
    return orjson.loads(answer.body)


async def seed(client: Client, counters: dict[CounterName, int], tell: Tell) -> None:
    """Define pools and counters. Harmless to repeat."""
    pools = sorted({pool_id for pool_id, _ in counters})
    for done, pool_id in enumerate(pools, 1):
        is_van = pool_id.startswith("van-")
        pool = {
            "capacity_type": "logistics" if is_van else "warehouse",
            "unit": "stop" if is_van else "pick_line",
            "zone": pool_id.partition("-")[2],
            "time_zone": "UTC",
            "reason": "replay",
        }
        await _good(client, "PUT", f"/v1/pools/{pool_id}", orjson.dumps(pool))
        tell(f"{done:,} of {len(pools):,} pools")
    rows = [
        {"pool_id": pool_id, "slot_id": slot_id, "base": base} for (pool_id, slot_id), base in sorted(counters.items())
    ]
    for start in range(0, len(rows), IMPORT_ROWS):
        part = rows[start : start + IMPORT_ROWS]
        await _good(client, "POST", "/v1/counters:import", orjson.dumps({"counters": part, "reason": "replay"}))
        tell(f"{start + len(part):,} of {len(rows):,} counters")


async def shard_count(client: Client) -> int:
    """How many shards the engine has."""
    return len((await _good(client, "GET", "/v1/status"))["shards"])


async def read_counters(client: Client, pools: set[str]) -> dict[CounterName, dict[str, Any]]:
    """Every counter of these pools, as the planners see it."""
    found = {}
    for pool_id in sorted(pools):
        target = f"/v1/counters?pool_id={pool_id}&limit={PAGE}"
        cursor = ""
        while True:
            page = await _good(client, "GET", target + cursor)
            for counter in page["counters"]:
                found[pool_id, counter["slot_id"]] = counter
            if page["next_cursor"] is None:
                break
            cursor = f"&cursor={page['next_cursor']}"
    return found


class Feed:
    """Reads the feed on from where it had got."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._cursor: str | None = None
        self.events: list[dict[str, Any]] = []
        """All that was read, of all shards."""

    async def read(self, tell: Tell) -> list[dict[str, Any]]:
        """The events since the last call."""
        start = len(self.events)
        while True:
            after = "" if self._cursor is None else f"&after={self._cursor}"
            page = await _good(self._client, "GET", f"/v1/events?limit={PAGE}{after}")
            if not page["events"]:
                return self.events[start:]
            self._cursor = page["next_cursor"]
            self.events += page["events"]
            tell(f"{len(self.events):,} events")


# --- a pass over all orders -------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """What one pass over the orders found."""

    results: dict[str, Result]
    """By order_ref; an order that is missing here is among the errors."""
    errors: list[str]
    seconds: float
    latencies_ms: list[float]
    """Of each request, from its first byte to its settled answer, retries and their pauses included."""
    client: load.Statistics


class _Timed(Client):
    """A client that keeps how long each answer took."""

    latencies_ms: list[float]

    async def ask(self, method: str, target: str, body: bytes = b"", key: str | None = None) -> load.Answer:
        start = time.perf_counter()
        answer = await super().ask(method, target, body, key)
        self.latencies_ms.append((time.perf_counter() - start) * 1_000)
        return answer


async def replay(address: Address, orders: list[Order], *, connections: int, tell: Tell) -> Pass:
    """Send every order once."""
    results: dict[str, Result] = {}
    errors: list[str] = []
    latencies_ms: list[float] = []
    clients: list[Client] = []
    waiting = iter(orders)
    start = time.perf_counter()

    async def send() -> None:
        client = _Timed(address)
        client.latencies_ms = latencies_ms
        clients.append(client)
        for order in waiting:
            try:
                results[order.order_ref] = await reserve(client, order)
            except (GaveUpError, UnexpectedError) as error:
                errors.append(str(error))
        client.close()

    async def show_progress() -> None:
        while True:
            await trio.sleep(PROGRESS_SECONDS)
            done, seconds = len(results), time.perf_counter() - start
            refused = sum(not result.accepted for result in results.values())
            tell(
                f"{done:,} of {len(orders):,} orders, {done / seconds:,.0f}/s, {refused:,} refused, {len(errors)} errors"
            )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(show_progress)
        async with trio.open_nursery() as senders:
            for _ in range(connections):
                senders.start_soon(send)
        nursery.cancel_scope.cancel()
    seconds = time.perf_counter() - start
    return Pass(results, errors, seconds, latencies_ms, load.merge([client.statistics() for client in clients]))


# --- proofs -----------------------------------------------------------------------------------------------------------


def units_of(orders: list[Order], results: dict[str, Result]) -> Counter[CounterName]:
    """The units of each counter that acknowledged reservations take."""
    units: Counter[CounterName] = Counter()
    for order in orders:
        result = results.get(order.order_ref)
        if result is not None and result.accepted:
            units.update(order.lines)
    return units


def check_counters(
    orders: list[Order],
    results: dict[str, Result],
    limits: dict[CounterName, int],
    found: dict[CounterName, dict[str, Any]],
) -> Iterator[str]:
    """Every counter against the record of acknowledged reservations."""
    units = units_of(orders, results)
    for name, limit in limits.items():
        counter = found.get(name)
        if counter is None:
            yield f"{name[0]} {name[1]}: the counter is missing"
        elif (counter["used"], counter["limit"]) != (units[name], limit):
            yield (
                f"{name[0]} {name[1]}: used {counter['used']} of {counter['limit']}, "
                f"acknowledged {units[name]} of {limit}"
            )
        elif counter["used"] > limit:
            yield f"{name[0]} {name[1]}: used {counter['used']} of {limit}"


def check_feed(
    orders: list[Order], results: dict[str, Result], events: list[dict[str, Any]], shards: int
) -> Iterator[str]:
    """The feed, from its start, against the record of acknowledged reservations."""
    made: defaultdict[str, list[dict[CounterName, int]]] = defaultdict(list)
    elsewhere: defaultdict[str, dict[CounterName, int]] = defaultdict(dict)
    settled: Counter[str] = Counter()
    for event in events:
        data = event["data"]
        if event["event"] in ("confirmed_at_once", "held") and data["channel"] == CHANNEL:
            made[data["reservation_id"]].append(named_lines(data["lines"]))
        elif event["event"] == "part_synced" and data["status"] == "confirmed":
            elsewhere[data["reservation_id"]].update(named_lines(data["lines"]))
        elif event["event"] == "parts_settled":
            settled[data["reservation_id"]] += 1
    order_of = {
        result.reservation: order
        for order in orders
        if (result := results.get(order.order_ref)) is not None and result.reservation is not None
    }
    for reservation in sorted(made.keys() - order_of.keys()):
        yield f"{reservation}: in the feed, and not acknowledged"
    for reservation, order in order_of.items():
        parts = order.lines_elsewhere(shards)
        if made[reservation] != [order.lines]:
            yield f"{reservation}: acknowledged with {order.lines}, the feed tells {made[reservation]}"
        elif elsewhere[reservation] != parts:
            yield f"{reservation}: on other shards are {elsewhere[reservation]}, {parts} were acknowledged"
        elif settled[reservation] != bool(parts):
            yield f"{reservation}: settled {settled[reservation]} times, with {parts} on other shards"


def check_asked_again(
    orders: list[Order], first: dict[str, Result], again: dict[str, Result], shards: int
) -> Iterator[str]:
    """Who is accepted after a refusal was in the way of another one for a moment, or shared a counter with such a one."""
    refused = [order for order in orders if first.get(order.order_ref) == REFUSED]
    tried = {name for order in refused if order.lines_elsewhere(shards) for name in order.lines}
    for order in refused:
        if again.get(order.order_ref, REFUSED).accepted and not tried & order.lines.keys():
            yield f"order {order.order_ref}: refused, then accepted, and no attempt can have been in its way"


def check_twice(first: dict[str, Result], second: dict[str, Result], events: list[dict[str, Any]]) -> Iterator[str]:
    """The second pass and its events against the first: nothing changed."""
    for ref in sorted(first.keys() | second.keys()):
        if first.get(ref) != second.get(ref):
            yield f"order {ref}: {first.get(ref)} the first time, {second.get(ref)} the second"
    for event in events:
        if event["event"] != "refused" or first.get(event["data"]["order_ref"]) != REFUSED:
            yield f"{event['position']} {event['event']}: the second pass may not have made it: {event['data']}"


# --- the program ------------------------------------------------------------------------------------------------------


def _percentile(values: list[float], quantile: float) -> float:
    """Of sorted values."""
    return round(values[min(len(values) - 1, int(quantile * len(values)))], 3) if values else 0.0


def summary(orders: list[Order], done: Pass, shards: int) -> dict[str, Any]:
    """The figures of a pass."""
    refused = [
        order for order in orders if order.order_ref in done.results and not done.results[order.order_ref].accepted
    ]
    latencies_ms = sorted(done.latencies_ms)
    return {
        "orders": len(orders),
        "accepted": len(done.results) - len(refused),
        "refused": len(refused),
        "refused_by_month": dict(sorted(Counter(f"{order.day:%Y-%m}" for order in refused).items())),
        "over_shards": sum(bool(order.lines_elsewhere(shards)) for order in orders),
        "errors": len(done.errors),
        "seconds": round(done.seconds, 3),
        "orders_per_second": round(len(orders) / done.seconds, 1),
        "requests_per_second": round(done.client.requests / done.seconds, 1),
        "request_ms_p50": _percentile(latencies_ms, 0.5),
        "request_ms_p99": _percentile(latencies_ms, 0.99),
        "request_ms_max": _percentile(latencies_ms, 1.0),
        "client": done.client._asdict(),
    }


def _teller(what: str) -> Tell:
    """Shows progress: one line that is written over on a terminal, none elsewhere."""

    def tell(text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{what}: {text}")
            sys.stderr.flush()

    return tell


def _say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    print(text, flush=True)


async def run(
    address: Address, orders: list[Order], limits: dict[CounterName, int], *, connections: int, twice: bool
) -> dict[str, Any]:
    """Seed, replay, and prove all that can be proven over HTTP. Returns the report; `problems` is empty when all is well."""
    client = Client(address)
    report: dict[str, Any] = {}
    problems: list[str] = []
    try:
        start = time.perf_counter()
        await seed(client, limits, _teller("capacity"))
        shards = await shard_count(client)
        report |= {"shards": shards, "counters": len(limits), "seed_seconds": round(time.perf_counter() - start, 3)}
        _say(f"{len(limits):,} counters defined in {report['seed_seconds']} s")

        first = await replay(address, orders, connections=connections, tell=_teller("replay"))
        report["first"] = summary(orders, first, shards)
        problems += first.errors
        _say_pass("replayed", report["first"])

        pools = {pool_id for pool_id, _ in limits}
        feed = Feed(client)
        results = first.results

        async def prove() -> list[str]:
            """News travels between shards after the answer: what is wrong may come right, within a bound."""
            give_up_at = trio.current_time() + QUIET_SECONDS_MAX
            while True:
                await feed.read(_teller("feed"))
                found = [*check_feed(orders, results, feed.events, shards)]
                found += check_counters(orders, results, limits, await read_counters(client, pools))
                if not found or trio.current_time() > give_up_at:
                    return found
                await trio.sleep(QUIET_POLL_SECONDS)

        problems += await prove()
        _say("counters and feed compared with what was acknowledged")

        if twice:
            refused = [order for order in orders if results.get(order.order_ref) == REFUSED]
            again = await replay(address, refused, connections=1, tell=_teller("refused ones"))
            problems += again.errors
            problems += check_asked_again(orders, results, again.results, shards)
            results = results | again.results
            report["accepted_when_asked_again"] = sum(result.accepted for result in again.results.values())
            problems += await prove()
            _say(
                f"asked again one at a time, {report['accepted_when_asked_again']} of {len(refused):,} refused ones fit"
            )

            second = await replay(address, orders, connections=connections, tell=_teller("again"))
            problems += second.errors
            start_of_second = len(feed.events)
            problems += await prove()
            events = feed.events[start_of_second:]
            problems += check_twice(results, second.results, events)
            report["second"] = summary(orders, second, shards) | {
                "events": dict(Counter(event["event"] for event in events))
            }
            _say_pass("replayed again", report["second"])
            _say(f"  new events: {report['second']['events'] or 'none'}")
    finally:
        client.close()
    report["problems"] = problems
    return report


def _say_pass(what: str, figures: dict[str, Any]) -> None:
    months = ", ".join(f"{month} {count:,}" for month, count in figures["refused_by_month"].items()) or "none"
    _say(
        f"{what} {figures['orders']:,} orders in {figures['seconds']} s: {figures['orders_per_second']:,} orders/s, "
        f"{figures['requests_per_second']:,} requests/s\n"
        f"  {figures['over_shards']:,} over two shards; "
        f"accepted {figures['accepted']:,}, refused {figures['refused']:,} ({months}), errors {figures['errors']}\n"
        f"  request p50 {figures['request_ms_p50']} ms, p99 {figures['request_ms_p99']} ms, max {figures['request_ms_max']} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay a year of grocery orders and prove the outcome.")
    parser.add_argument("--url", help="an engine that runs already, as http://HOST:PORT; without it one is started")
    parser.add_argument("--orders", type=int, help="only the last so many orders")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--shards", type=int, default=2, help="of the engine that is started")
    parser.add_argument("--twice", action="store_true", help="replay again with the same keys: nothing may change")
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()

    weeks = weeks_to_move(dt.datetime.now(dt.UTC).date())
    year = load_orders(weeks)
    orders = year if arguments.orders is None else year[-arguments.orders :]
    limits = make_counters(orders, make_limits(year))
    report: dict[str, Any] = surroundings() | {"weeks_moved": weeks, "connections": arguments.connections}

    with ExitStack() as stack:
        engine = None
        if arguments.url is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slotkeeper-replay-")))
            engine = stack.enter_context(Engine(directory / "data", shards=arguments.shards))
            address = engine.address
        else:
            url = urlsplit(arguments.url)
            address = Address(url.hostname or "127.0.0.1", url.port or 80)
        report |= trio.run(_run_main, address, orders, limits, arguments.connections, arguments.twice)
        if engine is not None:
            engine.stop()
            start = time.perf_counter()
            verified, words = engine.verify()
            report |= {"verified": verified, "verify_seconds": round(time.perf_counter() - start, 3)}
            if not verified:
                report["problems"].append(f"verify: {words}")
            _say(f"slotkeeper verify: {'all proven' if verified else 'NOT proven'} in {report['verify_seconds']} s")

    problems = report["problems"]
    for problem in problems[:LISTED_MAX]:
        print(f"PROBLEM {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} problems", file=sys.stderr)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if problems else 0)


async def _run_main(
    address: Address, orders: list[Order], limits: dict[CounterName, int], connections: int, twice: bool
) -> dict[str, Any]:
    return await run(address, orders, limits, connections=connections, twice=twice)


if __name__ == "__main__":
    main()
