"""Two supervisors on one data directory: the second refuses with a clear text, and the first does not notice."""

import subprocess
from pathlib import Path

import trio

from perf.engine import Engine
from perf.load import Client

REFUSAL_SECONDS_MAX = 30


def test_the_second_supervisor_refuses(tmp_path: Path) -> None:
    with Engine(tmp_path / "data") as engine:
        before = engine.children()
        command = [word.replace(f":{engine.address.port}", ":0") for word in engine.command()]
        second = subprocess.run(command, capture_output=True, text=True, timeout=REFUSAL_SECONDS_MAX, check=False)
        assert second.returncode != 0
        assert f"is in use by the supervisor with process id {engine.pid}" in second.stderr
        assert engine.children() == before

        async def ask() -> int:
            client = Client(engine.address)
            answer = await client.ask("GET", "/readyz")
            client.close()
            return answer.status

        assert trio.run(ask) == 200
