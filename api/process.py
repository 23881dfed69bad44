"""An api process: one of several that share the listening socket.

It holds a connection to each worker and to the planner, maps the read model, and serves HTTP until it is told to stop; then it
answers what it has, closes idle connections in order, and ends.
"""

import socket
import traceback

import structlog
import trio

from api import http1
from api.app import App
from api.overview import Overview
from api.planning import IMPORT_BODY_BYTES_MAX
from api.routes import PLAIN_ROUTES, ROUTES
from api.server import ServerLimits, serve
from api.upstream import Upstream
from engine import wire
from engine.child import ChildContext
from engine.clock import SystemClock
from engine.config import Config
from engine.core.outcomes import PlannerReply, ShardReply
from engine.datadir import Metadata

log: structlog.stdlib.BoundLogger = structlog.get_logger("api")


def _on_error(error: Exception, request: http1.Request | None) -> None:
    where = "a connection" if request is None else f"{request.method} {request.path}"
    log.error("unexpected error", where=where, error="".join(traceback.format_exception(error)))


def body_bytes_max(config: Config, method: str, path: str) -> int:
    """The largest body of a route."""
    if method == "POST" and path == "/v1/counters:import":
        return IMPORT_BODY_BYTES_MAX
    return config.api.body_bytes_max


async def run(context: ChildContext, metadata: Metadata, config: Config) -> None:
    """Be api process number `context.arguments.index`."""
    arguments = context.arguments
    clock = SystemClock()
    shards: list[Upstream[ShardReply]] = [
        Upstream(arguments.runtime / f"worker-{shard:02d}.sock", wire.shard_replies.decode, clock)
        for shard in range(metadata.shards)
    ]
    planner: Upstream[PlannerReply] = Upstream(arguments.runtime / "planner.sock", wire.planner_replies.decode, clock)
    app = App(
        config=config,
        data=arguments.data,
        shards=shards,
        planner=planner,
        overview=Overview(arguments.runtime, metadata.shards, clock),
        clock=clock,
        stop=context.stop,
        routes=ROUTES + PLAIN_ROUTES,
    )
    limits = ServerLimits(
        parser=http1.ParserLimits(body_bytes_max=config.api.body_bytes_max),
        connections_max=config.server.connections_max,
        drain_seconds=max(1.0, 2 * config.api.deadline_ms / 1000),
    )
    if arguments.listen_fd is None:
        raise ValueError("an api process needs --listen-fd")
    listener = socket.socket(fileno=arguments.listen_fd)
    async with trio.open_nursery() as nursery:
        for shard in shards:
            nursery.start_soon(shard.run)
        nursery.start_soon(planner.run)
        context.ready()
        await serve(
            listener,
            app.handle,
            limits=limits,
            stop=context.stop,
            on_error=_on_error,
            body_bytes_max=lambda method, path: body_bytes_max(config, method, path),
        )
        nursery.cancel_scope.cancel()
