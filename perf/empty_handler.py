"""The ceiling: POST requests answered with an empty JSON object on the HTTP layer of Slotkeeper, and on less than that.

    python perf/empty_handler.py serve [--processes N] [--port P] [--variant layer|bare]
    python perf/empty_handler.py compare [--seconds S] [--rounds R]

`serve` runs N processes that share one inherited listening socket, prints `LISTENING host:port` once all of them serve,
and ends on SIGTERM or SIGINT. `compare` drives both variants with `wrk -t1 -c32`, one process each, in turns, and prints
JSON: what wrk counted, and what the server's own CPU time was for each request, which a wrong or strained clock of wrk
cannot flatter.

Variant `layer` is `api.server`: strict parsing, timeouts, bounds, statistics. Variant `bare` is the least that answers
wrk at all: trio, httptools, one constant answer; it trusts everybody, and is there so that a figure can be read as a ratio.

Not promised: that two runs on a busy machine agree. Only the ratio within one run means something.
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httptools
import trio

from api import http1, server

CONNECTIONS = 32
_WRK_SCRIPT = """
wrk.method = "POST"
wrk.body = "{}"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Idempotency-Key"] = "0123456789abcdef"
"""
_BARE_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


async def _until_closed(lifeline: int, stop: trio.Event) -> None:
    """The parent holds the other end of this pipe and never writes: end of file means that it has gone."""
    await trio.lowlevel.wait_readable(lifeline)
    stop.set()


async def _serve_layer(listener: socket.socket) -> None:
    answer = http1.Response(200, b"{}")

    async def handler(_: http1.Request) -> http1.Response:
        return answer

    def on_error(error: Exception, _: http1.Request | None) -> None:
        print(f"error: {error!r}", file=sys.stderr)

    stop = trio.Event()
    limits = server.ServerLimits(requests_per_connection_max=1 << 40, drain_seconds=0.1, abort_seconds=0.1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_until_closed, sys.stdin.fileno(), stop)
        await nursery.start(_start_layer, listener, handler, limits, stop, on_error)
        print("READY", flush=True)


async def _start_layer(
    listener: socket.socket,
    handler: server.Handler,
    limits: server.ServerLimits,
    stop: trio.Event,
    on_error: server.OnError,
    *,
    task_status: trio.TaskStatus[server.Server],
) -> None:
    await server.serve(listener, handler, limits=limits, stop=stop, on_error=on_error, task_status=task_status)


class _Bare:
    """Counts complete messages, which is all the bare variant wants to know."""

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.complete_count = 0

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name] = value

    def on_body(self, body: bytes) -> None:
        self.body = body

    def on_message_complete(self) -> None:
        self.headers = {}
        self.complete_count += 1


async def _converse_bare(client: trio.socket.SocketType) -> None:
    messages = _Bare()
    parser = httptools.HttpRequestParser(messages)
    with client, suppress(OSError):  # wrk ends by resetting what is in flight
        while data := await client.recv(16 * 1024):
            parser.feed_data(data)
            if messages.complete_count:
                await client.send(_BARE_ANSWER * messages.complete_count)
                messages.complete_count = 0


async def _serve_bare(listener: socket.socket) -> None:
    stop = trio.Event()
    source = trio.socket.from_stdlib_socket(listener)
    async with trio.open_nursery() as nursery:

        async def accept_for_ever() -> None:
            while True:
                client, _ = await source.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                nursery.start_soon(_converse_bare, client)

        nursery.start_soon(_until_closed, sys.stdin.fileno(), stop)
        nursery.start_soon(accept_for_ever)
        print("READY", flush=True)
        await stop.wait()
        nursery.cancel_scope.cancel()


_VARIANTS = {"layer": _serve_layer, "bare": _serve_bare}


class _Children:
    """N processes on one listening socket. Used with `with`: they are gone at its end."""

    def __init__(self, variant: str, process_count: int, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.host, self.port = self._listener.getsockname()[:2]
        fd = self._listener.fileno()
        arguments = [sys.executable, __file__, "child", "--variant", variant, "--fd", str(fd)]
        self._processes = [
            subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd])
            for _ in range(process_count)
        ]

    def __enter__(self) -> Self:
        for process in self._processes:
            if _pipe(process.stdout).readline() != b"READY\n":
                raise RuntimeError("a serving process did not start; its words are above")
        return self

    def cpu_seconds(self) -> float:
        """User and system time of all serving processes so far."""
        ticks = 0
        for process in self._processes:
            fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime, see proc(5)
        return ticks / os.sysconf("SC_CLK_TCK")

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            _pipe(process.stdin).close()
        for process in self._processes:
            process.wait(10)
            _pipe(process.stdout).close()
        self._listener.close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise RuntimeError("the process was started without this pipe")
    return pipe


def _drive(port: int, seconds: int) -> tuple[int, float]:
    """Requests answered, and answered for each second, as wrk counts them."""
    script = Path(os.environ.get("TMPDIR", "/tmp")) / f"slotkeeper-empty-post-{os.getpid()}.lua"
    script.write_text(_WRK_SCRIPT, encoding="utf-8")
    try:
        url = f"http://127.0.0.1:{port}/v1/reservations"
        arguments = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", str(script), url]
        words = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    finally:
        script.unlink()
    if "Non-2xx" in words or "Socket errors" in words:
        raise RuntimeError(f"not every request was answered well:\n{words}")
    match = re.search(r"(\d+) requests in .*?Requests/sec:\s+([0-9.]+)", words, re.DOTALL)
    if match is None:
        raise RuntimeError(f"wrk said something unexpected:\n{words}")
    return int(match[1]), float(match[2])


def _compare(seconds: int, rounds: int) -> None:
    figures: dict[str, list[float]] = {variant: [] for variant in _VARIANTS}
    cpu_us_each: dict[str, list[float]] = {variant: [] for variant in _VARIANTS}
    for _ in range(rounds):
        for variant, results in figures.items():
            with _Children(variant, 1, 0) as children:
                cpu_seconds = children.cpu_seconds()
                request_count, requests_per_second = _drive(children.port, seconds)
                cpu_us = (children.cpu_seconds() - cpu_seconds) * 1e6 / request_count
                results.append(requests_per_second)
                cpu_us_each[variant].append(cpu_us)
    medians = {variant: statistics.median(results) for variant, results in figures.items()}
    print(
        json.dumps(
            {
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "connections": CONNECTIONS,
                "seconds": seconds,
                "requests_per_second": {
                    variant: [round(one) for one in results] for variant, results in figures.items()
                },
                "server_cpu_us_per_request": {
                    variant: round(statistics.median(results), 2) for variant, results in cpu_us_each.items()
                },
                "median": {variant: round(median) for variant, median in medians.items()},
                "layer_to_bare": round(medians["layer"] / medians["bare"], 3),
            },
            indent=2,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an empty POST handler, or measure it.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    serve = verbs.add_parser("serve", help="serve until SIGTERM")
    serve.add_argument("--processes", type=int, default=1)
    serve.add_argument("--port", type=int, default=0)
    serve.add_argument("--variant", choices=sorted(_VARIANTS), default="layer")
    compare = verbs.add_parser("compare", help="measure both variants in turns")
    compare.add_argument("--seconds", type=int, default=3)
    compare.add_argument("--rounds", type=int, default=3)
    child = verbs.add_parser("child", help="one serving process (started by the other verbs)")
    child.add_argument("--variant", choices=sorted(_VARIANTS), required=True)
    child.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.verb == "child":
        # A Ctrl-C at the terminal reaches every process; the parent decides, and the lifeline tells.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        trio.run(_VARIANTS[arguments.variant], socket.socket(fileno=arguments.fd))
    elif arguments.verb == "serve":
        signals = {signal.SIGTERM, signal.SIGINT}
        with _Children(arguments.variant, arguments.processes, arguments.port) as children:
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            print(f"LISTENING {children.host}:{children.port}", flush=True)
            signal.sigwait(signals)
    else:
        _compare(arguments.seconds, arguments.rounds)


if __name__ == "__main__":
    main()
