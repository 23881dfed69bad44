"""The OpenAPI document is valid, names every operation, and tells the truth: what it describes is sent, answers are compared.

Schemathesis makes requests from the document, valid and broken ones, the same ones in every run.
"""

from typing import Any

import hypothesis
import openapi_spec_validator
import pytest
import schemathesis
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.app import Route
from api.openapi import document
from api.routes import ROUTES
from engine.core.sharding import parse_position
from tests.support.contract import Api, fresh
from tests.support.engine import Engine

EXAMPLES_MAX = 15
"""Of each operation and mode: all of them take under a minute."""
CHECKED: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def described(engine: Engine) -> dict[str, Any]:
    api = Api(engine)
    # So that what the examples name is there.
    api.pool("van-north")
    api.counter(1_000, pool_id="van-north", slot="2026-12-01T18:00-20:00")
    found: dict[str, Any] = api.get("/openapi.json")
    return found


def test_the_document_is_valid_openapi(described: dict[str, Any]) -> None:
    openapi_spec_validator.validate(described)
    assert described["openapi"] == "3.1.0"
    assert described == document(ROUTES)


def test_every_operation_has_a_name_of_its_own_and_an_example(described: dict[str, Any]) -> None:
    operations = [operation for path in described["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names) == len(ROUTES)
    for operation in operations:
        assert operation["summary"]
        assert operation["tags"]
        if "requestBody" in operation:
            assert "example" in operation["requestBody"]["content"]["application/json"]
        assert all(status["description"] for status in operation["responses"].values())


def test_every_example_is_of_its_type(api: Api) -> None:
    for route in ROUTES:
        if route.request is None:
            continue
        path = route.path
        for name, value in (
            ("pool_id", fresh("pool")),
            ("slot_id", "2027-12-01T18:00-20:00"),
            ("reservation_id", "r0301beef"),
        ):
            path = path.replace(f"{{{name}}}", value)
        answer = api.request(route.method, path, route.example, key=fresh("key"))
        # What it names need not exist; it must be understood.
        assert answer.code not in ("invalid_request", "invalid_slot", "unsupported_media_type"), answer


# Only what has a type can be broken: a path that is any text, or no parameter at all, cannot.
@pytest.mark.parametrize(
    ("route", "mode"),
    [
        pytest.param(route, mode, id=f"{route.method} {route.path} {mode.value}")
        for route in ROUTES
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        if mode is GenerationMode.POSITIVE or route.request or route.query or route.headers
    ],
)
def test_answers_are_as_described(
    engine: Engine, described: dict[str, Any], route: Route, mode: GenerationMode
) -> None:
    host, port = engine.address
    schema = schemathesis.openapi.from_dict(described)
    schema.config.update(base_url=f"http://{host}:{port}")
    operation = schema[route.path][route.method]

    @hypothesis.seed(1)
    @hypothesis.settings(
        max_examples=EXAMPLES_MAX,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case[Any]) -> None:
        query = case.query
        if parse_position(str(query.get("min_position"))) is not None:
            # It was not reached yet, so the answer would be 503 at the deadline, and rightly: test_reads.py has that.
            del query["min_position"]
        case.call_and_validate(checks=CHECKED)

    ask()
