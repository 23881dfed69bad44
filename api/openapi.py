"""OpenAPI 3.1, generated from the route table and the message types that serve the requests.

Nothing is written twice: a route that is not in the table cannot be called, and one that is there is documented. Each
operation names every status it can answer, among them those that arise before routing.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from api import messages
from api.app import Parameter, Route
from api.http1 import PROBLEMS
from api.problems import CODES
from engine.version import __version__

Json = dict[str, Any]

ALWAYS = ("invalid_request", "uri_too_long", "headers_too_large", "overloaded")
"""Codes that any call may answer."""

WITH_BODY = ("body_too_large", "unsupported_media_type", "forbidden")
"""Codes that any call with a body may answer."""

DESCRIPTION = """\
Slotkeeper says yes or no when an order wants some of a slot's capacity. It never overbooks, and it keeps every
reservation it has acknowledged.

Send a fresh `Idempotency-Key` with each new reservation and the same one with each retry. A refusal carries a stable
`code` and says in `outcome` whether anything was done: `not_executed`, or `outcome_unknown`, after which the same
request with the same key is safe.
"""

KEY = Parameter(
    "Idempotency-Key",
    "Names this request. The same key with the same body takes effect once, however often it is sent.",
    example="order-4711-1",
)
IF_MATCH = Parameter("If-Match", "The plan_version that was read: 412 where it has changed since.", example='"17"')


def document(routes: Iterable[Route]) -> Json:
    """The OpenAPI document."""
    routes = tuple(routes)
    types: list[type[msgspec.Struct]] = [messages.Problem]
    for route in routes:
        types += [kind for kind in (route.request, *route.answers.values()) if kind is not None]
    types = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    reference = dict(zip(types, schemas, strict=True))
    paths: Json = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, reference)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Slotkeeper",
            "version": __version__,
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in dict.fromkeys(route.tag for route in routes)],
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(route: Route, reference: dict[type[msgspec.Struct], Json]) -> Json:
    operation: Json = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "tags": [route.tag],
        "responses": _responses(route, reference),
    }
    parameters = [_path_parameter(name) for name in _names(route.path)]
    parameters += [_parameter(parameter, "query") for parameter in route.query]
    parameters += [_parameter(parameter, "header") for parameter in route.headers]
    if route.keyed:
        parameters.append(_parameter(KEY, "header") | {"required": True})
    if parameters:
        operation["parameters"] = parameters
    if route.request is not None:
        content: Json = {"schema": reference[route.request]}
        if route.example is not None:
            content["example"] = route.example
        operation["requestBody"] = {
            "required": not route.request_optional,
            "content": {"application/json": content},
        }
    return operation


def _names(path: str) -> list[str]:
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


_PATH_EXAMPLES = {
    "pool_id": ("van-north", "A pool."),
    "slot_id": ("2026-12-01T18:00-20:00", "Local date, start and end in the pool's time zone."),
    "reservation_id": ("re0301beef", "A reservation."),
    "name": ("docs.js", "A file of the page."),
    "problem": ("insufficient-capacity", "The last part of a problem's type."),
}


def _path_parameter(name: str) -> Json:
    example, description = _PATH_EXAMPLES[name]
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": {"type": "string", "minLength": 1},
        "example": example,
    }


def _parameter(parameter: Parameter, where: str) -> Json:
    schema: Json = {"type": "string"}
    example: Any = parameter.example
    if parameter.integer is not None:
        schema = {"type": "integer", "minimum": parameter.integer[0], "maximum": parameter.integer[1]}
        example = int(parameter.example) if parameter.example is not None else None
    elif parameter.pattern is not None:
        schema["pattern"] = f"^({parameter.pattern})$"
    elif where == "header":
        schema |= {"minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"}
    shown: Json = {"name": parameter.name, "in": where, "description": parameter.description, "schema": schema}
    if parameter.repeated:
        shown |= {"schema": {"type": "array", "items": schema}, "explode": True}
        example = None
    if example is not None:
        shown["example"] = example
    return shown


def _responses(route: Route, reference: dict[type[msgspec.Struct], Json]) -> Json:
    responses: Json = {}
    for status, kind in route.answers.items():
        if kind is None:
            responses[str(status)] = {"description": "Done."}
        else:
            description = (kind.__doc__ or "").strip().splitlines()[0]
            responses[str(status)] = {
                "description": description,
                "content": {"application/json": {"schema": reference[kind]}},
            }
    by_status: dict[int, list[str]] = {}
    for code in (*route.codes, *ALWAYS, *(WITH_BODY if route.request is not None else ())):
        status = CODES[code].status if code in CODES else PROBLEMS[code][0]
        by_status.setdefault(status, []).append(code)
    for status, codes in sorted(by_status.items()):
        text = " or ".join(f"`{code}`" for code in dict.fromkeys(codes))
        shown = responses.setdefault(str(status), {"description": ""})
        shown["description"] = f"{shown['description']} {text}".strip()
        shown.setdefault("content", {})["application/problem+json"] = {"schema": reference[messages.Problem]}
    return responses
