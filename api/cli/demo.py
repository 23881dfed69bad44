"""`slotkeeper demo`: an engine with something in it, and what to try next.

Order: data directory, engine as a child process, pools and slots by the HTTP API as anybody would define them, some standing
orders, then the printed commands. Afterwards it stays, tells when a process of the engine is killed and is back, and stops the
engine on Ctrl-C. What it made in temporary places is removed; a directory given with --data is kept, and can be used again.

Rules
- It serves only what it made: a data directory with other pools in it is refused, untouched.
- The engine has a process group of its own: Ctrl-C in the terminal reaches this process alone, which orders the stop.

Not promised: that the engine stops when this process is killed by SIGKILL. Then stop `slotkeeper: supervisor` by SIGTERM.
"""

import datetime as dt
import errno
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
import zoneinfo
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

import click

from api.cli import demo_data
from api.cli.client import Service
from api.cli.exits import Exit, Failure
from engine import config as configuration
from engine import datadir
from engine.config import Address, cores
from engine.core.sharding import shard_of_counter

SHARDS_MAX: Final = 4
"""More processes than this only make a demo start later."""
START_SECONDS_MAX: Final = 60.0
"""Usually two or three; a loaded machine is no failure."""
STOP_SECONDS_MAX: Final = 60.0
"""The supervisor itself kills what has not stopped after a shorter time."""
_LOOK_SECONDS: Final = 0.05
_LOG_LINES_SHOWN: Final = 20


class _Places(NamedTuple):
    """Where things lie."""

    data: Path
    kept: bool
    """The data directory was given, and stays."""
    runtime: Path
    log: Path
    config: Path


@click.command()
@click.option(
    "--data",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep the data in DIR, and use it again next time.  [default: a temporary directory]",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="Where to serve.  [default: 127.0.0.1:7411, or any free port where that one is taken]",
)
@click.option("--no-open", is_flag=True, help="Do not open a browser, even where there is a desktop.")
def demo(data: Path | None, listen: str | None, *, no_open: bool) -> None:
    """Run an engine with two weeks of slots to try things on.

    It prints commands to copy and stays in the foreground until Ctrl-C.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_arguments: stop.set())
    began = time.monotonic()
    with ExitStack() as stack:
        places = _make_places(stack, data)
        _write_config(places, listen)
        engine = stack.enter_context(_engine(places))
        url = _wait_until_ready(engine, places, stop)
        if url is None:
            return
        slot = _seed(url, places)
        _say(url, places, slot, time.monotonic() - began)
        if not no_open and sys.stdout.isatty() and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            webbrowser.open(f"{url}/docs")
        _watch(engine, places, stop)


def _make_places(stack: ExitStack, data: Path | None) -> _Places:
    """Directories, and a data directory where there is none. What is temporary goes with the stack."""
    temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slotkeeper-demo-")))
    # On tmpfs like any runtime directory, but not in the place that the store's id names: that one would stay.
    parent = Path("/dev/shm") if Path("/dev/shm").is_dir() else temporary  # noqa: S108 - a new directory of mode 0700
    runtime = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slotkeeper-demo-", dir=parent)))
    directory = temporary / "data" if data is None else data
    if not (directory / datadir.METADATA_NAME).exists():
        try:
            datadir.init(directory, min(cores(), SHARDS_MAX))
        except datadir.DataDirectoryError as error:
            raise Failure(Exit.UNUSABLE, str(error)) from None
    return _Places(directory, data is not None, runtime, temporary / "engine.log", temporary / "demo.toml")


def _write_config(places: _Places, listen: str | None) -> None:
    """The configuration of the engine. Raises `Failure` if `listen` cannot be."""
    address = listen or _usual_address()
    lines = [
        f"server.listen = {json.dumps(address)}",
        f"server.api_processes = {min(cores(), SHARDS_MAX)}",
        f"runtime.directory = {json.dumps(str(places.runtime))}",
        # What is lost and found again is told by `_watch`; the log is for what goes wrong.
        'log.level = "warning"',
    ]
    places.config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        configuration.load(places.config)
    except configuration.ConfigError as error:
        raise Failure(Exit.UNUSABLE, "\n".join(error.problems)) from None


def _usual_address() -> str:
    address = configuration.load(None).address
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(tuple(address))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise Failure(Exit.SYSTEM, f"cannot listen on {address}: {error.strerror}") from None
            return str(Address(address.host, 0))
    return str(address)


@contextmanager
def _engine(places: _Places) -> Iterator[subprocess.Popen[bytes]]:
    """The engine as a child; stopped, in order, at the end."""
    words = [sys.executable, "-m", "engine", "serve", "--data", str(places.data), "--config", str(places.config)]
    with places.log.open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - our own program
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            click.echo("\nStopping …")
            process.terminate()
            try:
                process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if places.kept:
            click.echo(f"The data is in {places.data}. Look: {_program()} verify {shlex.quote(str(places.data))}")


def _wait_until_ready(engine: subprocess.Popen[bytes], places: _Places, stop: threading.Event) -> str | None:
    """The URL when everything serves; None when it is to stop before. Raises `Failure`."""
    give_up_at = time.monotonic() + START_SECONDS_MAX
    while not stop.wait(_LOOK_SECONDS):
        if engine.poll() is not None:
            raise Failure(_exit_of(engine), f"the engine did not start:\n{_log_end(places)}")
        if time.monotonic() > give_up_at:
            raise Failure(
                Exit.TRY_AGAIN, f"the engine was not ready after {START_SECONDS_MAX:.0f} seconds:\n{_log_end(places)}"
            )
        state = _state(places)
        if state is None or state["state"] != "ready":
            continue
        if any(child["state"] == "halted" for child in state["children"]):
            raise Failure(Exit.UNUSABLE, f"a process of the engine halted:\n{_log_end(places)}")
        url = f"http://{state['listen']}"
        with Service(url) as service:
            if service.ask("GET", "/v1/status").document.get("ready") is True:
                return url
    return None


def _exit_of(engine: subprocess.Popen[bytes]) -> Exit:
    with suppress(ValueError):
        return Exit(engine.returncode or Exit.REFUSED)
    return Exit.REFUSED


def _log_end(places: _Places) -> str:
    lines = places.log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES_SHOWN:]) or "(its log is empty)"


def _state(places: _Places) -> dict[str, Any] | None:
    """What the supervisor says of its children."""
    try:
        state: dict[str, Any] = json.loads((places.runtime / datadir.STATE_NAME).read_bytes())
    except FileNotFoundError:
        return None
    return state


def _seed(url: str, places: _Places) -> tuple[str, str]:
    """Pools, slots and, in a new data directory, standing orders. Returns the counter to show."""
    today = dt.datetime.now(zoneinfo.ZoneInfo(demo_data.POOLS[0].time_zone)).date()
    with Service(url) as service:
        found = {pool["pool_id"] for pool in service.get("/v1/pools")["pools"]}
        if foreign := sorted(found - {pool.pool_id for pool in demo_data.POOLS}):
            raise Failure(
                Exit.UNUSABLE,
                f"{places.data}: has pools that are not of the demo ({foreign[0]}): nothing was changed. "
                f"Serve it with `{_program()} serve --data {places.data}`, or give the demo a directory of its own",
            )
        for pool in demo_data.POOLS:
            _send(service, "PUT", f"/v1/pools/{pool.pool_id}", demo_data.pool_body(pool))
        rows = demo_data.counters(today)
        _send(service, "POST", "/v1/counters:import", {"counters": rows, "reason": "demo"})
        if not found:
            for order in demo_data.standing_orders(today):
                body = {"order_ref": "standing orders", "channel": "subscription", "lines": [order._asdict()]}
                _send(service, "POST", "/v1/reservations", body, key=f"demo {order.pool_id} {order.slot_id}")
    return demo_data.shown_slot(today)


def _send(service: Service, method: str, path: str, body: Mapping[str, object], key: str | None = None) -> None:
    service.checked(service.ask(method, path, json.dumps(body).encode(), key=key))


def _say(url: str, places: _Places, slot: tuple[str, str], seconds: float) -> None:
    pool_id, slot_id = slot
    state = _state(places) or {}
    workers = {child["index"]: child["pid"] for child in state.get("children", []) if child["role"] == "worker"}
    shard = shard_of_counter(pool_id, slot_id, len(workers))
    order = secrets.token_hex(2)
    line = {"pool_id": pool_id, "slot_id": slot_id, "quantity": 1}
    body = json.dumps({"order_ref": f"SO-{order}", "ttl_seconds": 600, "lines": [line]})
    date = slot_id[:10]
    query = urlencode({"pool_id": pool_id, "from": date, "to": dt.date.fromisoformat(date) + dt.timedelta(days=1)})
    kept = "" if places.kept else "  (removed at the end; --data DIR keeps it)"
    curl = "" if shutil.which("curl") else "\n   (curl is not installed here: apt-get install curl, or try it in /docs)"
    click.echo(
        f"""
Slotkeeper is ready after {seconds:.1f} s: {url}
  the API, to read and to try:  {url}/docs
  data:  {places.data}{kept}

1. Hold a van stop. Send it twice: its key makes it take effect once.{curl}

   curl -s {url}/v1/reservations -H 'Idempotency-Key: order-{order}' -H 'Content-Type: application/json' -d '{body}'

2. See what is left that day:

   curl -s '{url}/v1/availability?{query}'

3. Kill the worker that owns this slot, and ask again at once. It is back in a moment, with everything it had acknowledged:

   kill -9 {workers.get(shard)}

4. Have it proven from the journals that nothing was lost and no counter ever passed its limit:

   {_program()} verify {shlex.quote(str(places.data))}

Ctrl-C stops it.
"""
    )


def _program() -> str:
    """How somebody in this shell calls this command."""
    beside = Path(sys.executable).with_name("slotkeeper")
    if shutil.which("slotkeeper"):
        return "slotkeeper"
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m engine"
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))


def _watch(engine: subprocess.Popen[bytes], places: _Places, stop: threading.Event) -> None:
    """Tell when a process of the engine ended and is back. Raises `Failure` when the engine itself ends."""
    seen = _children(places)
    gone: dict[str, int] = {}
    while not stop.wait(_LOOK_SECONDS):
        if engine.poll() is not None:
            raise Failure(_exit_of(engine), f"the engine has ended ({engine.returncode}):\n{_log_end(places)}")
        now = _children(places)
        for name, child in now.items():
            before = seen.get(name, child)
            if child["restarts"] != before["restarts"]:
                click.echo(f"{name}: {child['last_end']}")
                gone.setdefault(name, child["since_ms"])
            if child["state"] == "ready" and name in gone:
                ms = child["since_ms"] - gone.pop(name)
                after = f" after {ms} ms" if ms else ""
                click.echo(f"{name}: back{after} as process {child['pid']}")
            if child["state"] == "halted" != before["state"]:
                click.echo(f"{name}: halted:\n{_log_end(places)}", err=True)
        seen = now


def _children(places: _Places) -> dict[str, dict[str, Any]]:
    state = _state(places)
    return {f"{child['role']} {child['index']}": child for child in (state or {"children": []})["children"]}
