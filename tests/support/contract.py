"""An engine's API as its own description promises it: every answer that a test gets is compared with the route table.

`Api.request` raises AssertionError for an answer whose status the operation does not document, or whose body is not of the
documented type (also where it has members that are not documented). It does so for a problem that is none, too: wrong content
type, a code that is not in the tables, a status that is not the code's, 503 without Retry-After, an `outcome` that cannot be.
"""

import datetime as dt
import http.client
import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec

from api import http1, messages, problems
from api.app import Route
from api.openapi import ALWAYS, WITH_BODY
from api.routes import ROUTES
from engine.core.sharding import shard_of_counter
from tests.support.engine import Answer, Engine

DAY = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=30)
"""Slots must lie in the future to be bookable. One day for a whole run, chosen once."""

_names = itertools.count(1)


class Api:
    """Calls of an engine, checked, and the usual things to call it with."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        status: int | None = None,
        code: str | None = None,
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """One request. `status` and `code` are what the test expects, where it expects only one thing."""
        answer = self.engine.request(method, path, body, key=key, headers=headers, connection=connection)
        check(method, path, answer)
        if code is not None:
            assert answer.code == code, answer
        elif status is not None:
            assert answer.status == status, answer
        return answer

    def get(self, path: str, **expected: Any) -> Any:
        """The JSON of a 200."""
        expected.setdefault("status", 200)
        return self.request("GET", path, **expected).json()

    # --- things to call it with -----------------------------------------------------------------------------------------

    def pool(self, pool_id: str | None = None, **members: object) -> str:
        """A new pool in Europe/Berlin."""
        pool_id = pool_id or fresh("pool")
        body = {"capacity_type": "logistics", "unit": "stop", "time_zone": "Europe/Berlin", **members}
        self.request("PUT", f"/v1/pools/{pool_id}", body, status=201)
        return pool_id

    def counter(self, base: int = 10, *, pool_id: str | None = None, slot: str | None = None, **members: object) -> str:
        """The path of a new counter of a new pool."""
        pool_id = pool_id or self.pool()
        path = f"/v1/pools/{pool_id}/slots/{slot or slot_id()}"
        self.request("PUT", path, {"base": base, **members}, status=201)
        return path

    def hold(
        self, *lines: dict[str, Any], ttl_seconds: int | None = 600, key: str | None = None, **more: object
    ) -> Any:
        """A new reservation, as the API shows it."""
        body: dict[str, Any] = {"lines": list(lines), **more}
        if ttl_seconds is not None:
            body["ttl_seconds"] = ttl_seconds
        return self.request("POST", "/v1/reservations", body, key=key or fresh("key"), status=201).json()

    def slots_of_one_shard(self, pool_id: str, count: int, shard: int | None = None) -> list[str]:
        """Names of slots whose counters belong to one shard."""
        shards = self.engine.shards
        every = (slot_id(day, hour) for day in itertools.count() for hour in range(0, 24, 2))
        shard = shard_of_counter(pool_id, slot_id(), shards) if shard is None else shard
        return list(
            itertools.islice((slot for slot in every if shard_of_counter(pool_id, slot, shards) == shard), count)
        )


def fresh(word: str) -> str:
    """A name that no other test of this run has."""
    return f"{word}-{next(_names)}"


def slot_id(day: int = 0, hour: int = 18) -> str:
    """A slot of two hours, so many days after DAY."""
    return f"{DAY + dt.timedelta(days=day)}T{hour:02d}:00-{(hour + 2) % 24:02d}:00"


def line(counter: str, quantity: int = 1) -> dict[str, Any]:
    """A line for the counter with this path."""
    _, _, _, pool_id, _, slot = counter.split("/")
    return {"pool_id": pool_id, "slot_id": slot, "quantity": quantity}


# --- the contract ---------------------------------------------------------------------------------------------------


def check(method: str, path: str, answer: Answer) -> None:
    """Compare an answer with what is documented. Raises AssertionError."""
    route = _route("GET" if method == "HEAD" else method, path.partition("?")[0])
    content_type = answer.headers.get("content-type", "")
    if answer.status >= 400 and (route is not None or content_type != "text/plain; charset=utf-8"):
        check_problem(answer)
    if route is None:
        return
    assert answer.status in _statuses(route), f"{route.method} {route.path} does not document {answer.status}: {answer}"
    kind = route.answers.get(answer.status)
    if kind is not None and method != "HEAD" and answer.status < 400:
        assert content_type == "application/json", answer
        _check_type(kind, answer.body)


def check_problem(answer: Answer) -> None:
    """Compare a refusal with RFC 9457 and our tables. Raises AssertionError."""
    assert answer.headers["content-type"] == "application/problem+json", answer
    if not answer.body:  # HEAD
        return
    problem = answer.json()
    code = problem["code"]
    assert code in problems.CODES or code in http1.PROBLEMS, answer
    status = problems.CODES[code].status if code in problems.CODES else http1.PROBLEMS[code][0]
    assert (answer.status, problem["status"]) == (status, status), answer
    assert problem["type"] == f"/problems/{code.replace('_', '-')}", answer
    assert problem["outcome"] == ("outcome_unknown" if code == "outcome_unknown" else "not_executed"), answer
    assert problem["detail"], answer
    assert status < 500 or (status == 503 and 1 <= int(answer.headers["retry-after"]) <= 3), answer
    _check_type(messages.Problem, answer.body)


def _check_type(kind: type[msgspec.Struct], body: bytes) -> None:
    """That a body is of a type, bounds and patterns included, and has nothing more in it."""
    decoded = msgspec.json.decode(body, type=kind)
    assert _rid_of_nulls(msgspec.to_builtins(decoded)) == _rid_of_nulls(msgspec.json.decode(body)), (
        f"not all documented: {body!r}"
    )


def _rid_of_nulls(value: Any) -> Any:
    """Objects without members that are null: whether an optional member is null or absent is the type's business."""
    if isinstance(value, dict):
        return {name: _rid_of_nulls(member) for name, member in value.items() if member is not None}
    if isinstance(value, list):
        return [_rid_of_nulls(member) for member in value]
    return value


@cache
def _route(method: str, path: str) -> Route | None:
    parts = path.split("/")
    for route in ROUTES:
        wanted = route.path.split("/")
        if route.method != method or len(wanted) != len(parts):
            continue
        if all(given if each.startswith("{") else each == given for each, given in zip(wanted, parts, strict=True)):
            return route
    return None


def _statuses(route: Route) -> frozenset[int]:
    codes = (*route.codes, *ALWAYS, *(WITH_BODY if route.request is not None else ()))
    return frozenset(route.answers) | {
        problems.CODES[code].status if code in problems.CODES else http1.PROBLEMS[code][0] for code in codes
    }
