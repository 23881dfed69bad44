"""Real engines for all tests. See tests/support/engine.py."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.support.contract")

from tests.support.engine import Engine  # noqa: E402 - after the registration

PATIENT_DEADLINE_MS = 20_000
"""For tests in which nobody waits in vain: the machine may be busy."""


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for all tests that harm nobody. It must have come through all of them without a restart or an error."""
    settings = {"api.deadline_ms": PATIENT_DEADLINE_MS}
    with Engine(tmp_path_factory.mktemp("engine"), settings=settings) as running:
        pids = running.pids()
        yield running
        assert running.pids() == pids
        running.stop()
        assert running.errors() == []


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Starts engines of a test's own, to be killed. Arguments are those of Engine."""
    with ExitStack() as stack:

        def make(**arguments: Any) -> Engine:
            directory = tmp_path / f"engine-{len(list(tmp_path.iterdir()))}"
            directory.mkdir()
            arguments["settings"] = {"api.deadline_ms": PATIENT_DEADLINE_MS, **arguments.get("settings", {})}
            return stack.enter_context(Engine(directory, **arguments))

        yield make


@pytest.fixture
def own_engine(make_engine: Callable[..., Engine]) -> Engine:
    """An engine of a test's own, to be killed: two shards, two api processes."""
    return make_engine()
