"""The calls about the service itself: is it alive, does it do its job, what can it do."""

import functools
from importlib import resources

import orjson

from api import problems, views
from api.app import App, Parameter, Parameters, query, refuse
from api.http1 import PROBLEMS, Request, Response
from api.openapi import document
from api.overview import HEARTBEAT_AGE_MS_MAX, ShardNotPublishedError
from engine.version import __version__
from readmodel.layout import STATE_SERVING

READYZ_QUERY = (Parameter("verbose", "Say it shard by shard.", pattern=r"|1|true|0|false"),)

_TEXT = b"text/plain; charset=utf-8"
_HTML = b"text/html; charset=utf-8"
_ASSET_TYPES = {".css": b"text/css; charset=utf-8", ".js": b"text/javascript; charset=utf-8"}
_STATES = {1: "starting", STATE_SERVING: "serving", 3: "stopping"}


async def livez(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /livez: this process answers."""
    del app, request, parameters
    return Response(200, b"ok\n", _TEXT)


def shards(app: App) -> list[views.Json]:
    """How each shard is doing, from what its worker shows."""
    found = []
    for shard in range(len(app.shards)):
        try:
            header = app.overview.header(shard)
        except ShardNotPublishedError:
            found.append(
                {
                    "shard": shard,
                    "ready": False,
                    "state": "loading",
                    "position": f"{shard}-0",
                    "heartbeat_age_ms": 0,
                    "counters": 0,
                    "epoch": 0,
                    "restarts": 0,
                }
            )
            continue
        age_ms = max(0, app.clock.monotonic_ms() - header.heartbeat_boottime_ms)
        found.append(
            {
                "shard": shard,
                "ready": age_ms <= HEARTBEAT_AGE_MS_MAX and header.state == STATE_SERVING,
                "state": _STATES.get(header.state, "unknown"),
                "position": f"{shard}-{header.position_seq}",
                "heartbeat_age_ms": age_ms,
                "counters": header.row_count,
                "epoch": header.epoch,
                "restarts": header.restart_count,
            }
        )
    return found


async def readyz(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /readyz: every shard takes reservations."""
    del parameters
    values = query(request, READYZ_QUERY)
    found = shards(app)
    ready = all(shard["ready"] for shard in found)
    if values.get("verbose", ["0"])[0] in ("0", "false"):
        return Response(200 if ready else 503, b"ok\n" if ready else b"not ready\n", _TEXT)
    lines = [
        f"shard {shard['shard']}: {'ok' if shard['ready'] else 'NOT READY'} ({shard['state']}, position "
        f"{shard['position']}, heartbeat {shard['heartbeat_age_ms']} ms ago)"
        for shard in found
    ]
    lines.append("ready" if ready else "not ready")
    return Response(200 if ready else 503, ("\n".join(lines) + "\n").encode(), _TEXT)


async def status(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /v1/status."""
    del parameters
    query(request, ())
    app.overview.refresh(now=True)
    found = shards(app)
    answer = {
        "ready": all(shard["ready"] for shard in found),
        "version": __version__,
        "shards": found,
        "pools": len(app.overview.pools),
        "plan_version": app.overview.plan_version,
    }
    return Response(200, orjson.dumps(answer))


async def openapi(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /openapi.json."""
    del app, request, parameters
    return Response(200, _openapi())


@functools.cache
def _openapi() -> bytes:
    from api.routes import ROUTES  # noqa: PLC0415 - the table names this module's handlers

    return orjson.dumps(document(ROUTES), option=orjson.OPT_INDENT_2)


async def docs(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /docs: the API for people."""
    del app, request, parameters
    return Response(200, _asset("docs.html"), _HTML)


async def root(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /."""
    del app, request, parameters
    return Response(307, headers=((b"Location", b"/docs"),))


@functools.cache
def _asset(name: str) -> bytes:
    return resources.files("api").joinpath("page", *name.split("/")).read_bytes()


ASSETS = frozenset({"swagger-ui.css", "swagger-ui-bundle.js", "docs.js"})
"""What /docs loads. A name that is not here is not looked for."""


async def asset(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /page/{name}."""
    del app, request
    name = parameters["name"]
    if name not in ASSETS:
        raise refuse("not_found")
    folder = "" if name == "docs.js" else "vendor/swagger-ui/"
    suffix = name[name.rindex(".") :]
    return Response(200, _asset(folder + name), _ASSET_TYPES[suffix], ((b"Cache-Control", b"max-age=3600"),))


async def problem(app: App, request: Request, parameters: Parameters) -> Response:
    """GET /problems/{problem}: what the `type` of a problem points to."""
    del app, request
    code = parameters["problem"].replace("-", "_")
    known = problems.CODES.get(code)
    if known is not None:
        answer = {"code": code, "status": known.status, "title": known.title, "advice": known.advice}
    elif code in PROBLEMS:
        answer = {"code": code, "status": PROBLEMS[code][0], "title": PROBLEMS[code][1], "advice": "See the detail."}
    else:
        raise refuse("not_found")
    return Response(200, orjson.dumps(answer))
