"""The data directory: made whole or not at all, locked by one, counted durably; the runtime directory: private."""

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import msgspec
import pytest

from engine import datadir
from engine.config import Config, load
from engine.datadir import DataDirectoryError, Metadata

STORE = UUID("6f1d2c3b-0000-4000-8000-123456789abc")
OTHER = UUID("00000000-0000-4000-8000-000000000001")
MOMENT = datetime(2026, 12, 1, 17, 30, tzinfo=UTC)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    datadir.init(directory, 2, store_id=STORE, created_at=MOMENT)
    return directory


def config_with(directory: Path) -> Config:
    return load(None, {"runtime.directory": str(directory)})


# --- init and load --------------------------------------------------------------------------------------------------


def test_init_makes_what_load_reads(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b" / "data"
    made = datadir.init(directory, 3, store_id=STORE, created_at=MOMENT)
    assert made == Metadata(1, str(STORE), 3, "2026-12-01T17:30:00.000Z")
    assert datadir.load(directory) == made
    assert sorted(entry.name for entry in directory.iterdir()) == [
        "epoch",
        "planning",
        "shard-00",
        "shard-01",
        "shard-02",
        "slotkeeper.json",
        "supervisor.lock",
    ]
    assert datadir.shard_directory(directory, 2).is_dir()
    assert datadir.planning_directory(directory).is_dir()


def test_each_store_has_an_id_of_its_own(tmp_path: Path) -> None:
    first, second = datadir.init(tmp_path / "a", 1), datadir.init(tmp_path / "b", 1)
    assert UUID(first.store_id) != UUID(second.store_id)
    datetime.fromisoformat(first.created_at)


STEPS = 2 + 3 + 3
"""Of an init with three shards."""


@pytest.mark.parametrize("done", range(STEPS))
def test_an_interrupted_init_is_no_data_directory_and_the_next_one_finishes_it(tmp_path: Path, done: int) -> None:
    metadata = Metadata(datadir.FORMAT, str(OTHER), 3, "2026-12-01T17:30:00.000Z")
    steps = datadir.init_steps(tmp_path, metadata)
    assert len(steps) == STEPS
    for step in steps[:done]:
        step()
    (tmp_path / "slotkeeper.json.part").write_bytes(b'{"format"')
    with pytest.raises(DataDirectoryError, match="init"):
        datadir.load(tmp_path)
    made = datadir.init(tmp_path, 2, store_id=STORE, created_at=MOMENT)
    assert datadir.load(tmp_path) == made, "also with fewer shards than the interrupted one"


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "notes.part", "shard-00/segment", "planning/x", "shard-x/y"])
def test_init_refuses_a_directory_with_other_things_and_touches_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    with pytest.raises(DataDirectoryError, match="is not empty"):
        datadir.init(tmp_path, 1)
    assert path.read_text() == "precious"
    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == [path]


def test_init_refuses_a_data_directory(data: Path) -> None:
    with pytest.raises(DataDirectoryError, match="is a data directory already"):
        datadir.init(data, 2)
    assert datadir.load(data).store_id == str(STORE)


def test_init_accepts_a_fresh_mount_point(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    datadir.init(tmp_path, 1)
    assert (tmp_path / "lost+found").is_dir()


@pytest.mark.parametrize("shards", [0, -1, 257])
def test_init_refuses_impossible_numbers_of_shards(tmp_path: Path, shards: int) -> None:
    with pytest.raises(DataDirectoryError, match="allowed: 1 to 256"):
        datadir.init(tmp_path / "data", shards)
    assert not (tmp_path / "data").exists()


def test_init_says_why_a_directory_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirectoryError, match="Not a directory"):
        datadir.init(tmp_path / "file" / "data", 1)
    with pytest.raises(DataDirectoryError, match="is not a directory"):
        datadir.init(tmp_path / "file", 1)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "does not exist; `slotkeeper init"),
        (lambda path: path.mkdir(), "is not a data directory"),
        (lambda path: path.write_text(""), "is not a directory"),
    ],
)
def test_load_refuses_what_is_no_data_directory(tmp_path: Path, make: Callable[[Path], object], text: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(DataDirectoryError, match=text):
        datadir.load(tmp_path / "data")


GOOD = {"format": 1, "store_id": str(STORE), "shards": 2, "created_at": "2026-12-01T17:30:00.000Z"}


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (b"", "is damaged"),
        (b"[]", "is damaged"),
        (b'{"format":"x"}', "is damaged"),
        (msgspec.json.encode(GOOD)[:-5], "is damaged"),
        (msgspec.json.encode({**GOOD, "format": 0}), "is damaged: format 0"),
        (msgspec.json.encode({**GOOD, "shards": 0}), "is damaged"),
        (msgspec.json.encode({**GOOD, "shards": 3}), "shard-02: is damaged: it is missing"),
        (msgspec.json.encode({**GOOD, "shards": 1}), "shard-01: is damaged: slotkeeper.json says 1 shards"),
        (msgspec.json.encode({**GOOD, "store_id": "me"}), "is damaged"),
        (msgspec.json.encode({**GOOD, "created_at": "yesterday"}), "is damaged"),
        (msgspec.json.encode({"format": 2, "anything": "else"}), "has format 2, this version knows up to 1"),
    ],
)
def test_load_refuses_damaged_and_newer_metadata(data: Path, document: bytes, text: str) -> None:
    (data / "slotkeeper.json").write_bytes(document)
    with pytest.raises(DataDirectoryError, match=text):
        datadir.load(data)


def test_load_tells_lost_metadata_from_an_empty_directory(data: Path) -> None:
    (datadir.shard_directory(data, 0) / "segment").write_text("journal")
    (data / "slotkeeper.json").unlink()
    with pytest.raises(DataDirectoryError, match=r"is missing, and journals lie beside it.*backup"):
        datadir.load(data)


# --- lock and epoch -------------------------------------------------------------------------------------------------


def test_the_lock_is_for_one_and_names_its_holder(data: Path) -> None:
    assert datadir.lock_holder(data) is None
    with datadir.lock_directory(data):
        assert datadir.lock_holder(data) == os.getpid()
        with pytest.raises(DataDirectoryError, match=f"process id {os.getpid()}"):
            datadir.lock_directory(data, patience_seconds=0)
    assert datadir.lock_holder(data) is None
    datadir.lock_directory(data, patience_seconds=0).release()


def test_the_lock_waits_for_a_process_that_dies(data: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from engine import datadir
lock = datadir.lock_directory(Path({str(data)!r}))
print("locked", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        assert datadir.lock_holder(data) == holder.pid
        holder.send_signal(signal.SIGKILL)
        # Not waited for: the lock itself must wait.
        datadir.lock_directory(data, patience_seconds=30).release()


def test_a_lock_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataDirectoryError, match="cannot be opened"):
        datadir.lock_directory(tmp_path / "missing")
    assert datadir.lock_holder(tmp_path / "missing") is None


def test_the_lock_is_not_inherited(data: Path) -> None:
    with datadir.lock_directory(data) as lock:
        assert not os.get_inheritable(lock._descriptor)


def test_epochs_count_starts(data: Path) -> None:
    assert [datadir.next_epoch(data) for _ in range(3)] == [1, 2, 3]
    # What a crash in the middle of writing leaves is not the counter.
    (data / "epoch.part").write_text("")
    assert datadir.next_epoch(data) == 4


@pytest.mark.parametrize("content", [b"", b"3", b"-1\n", b"3\n4\n", b"\0\0\n", None])
def test_a_damaged_epoch_is_not_guessed(data: Path, content: bytes | None) -> None:
    path = data / "epoch"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(DataDirectoryError, match="epoch: is damaged"):
        datadir.next_epoch(data)


# --- runtime directory ----------------------------------------------------------------------------------------------


def test_the_runtime_directory_is_private_and_loses_old_sockets_only(data: Path, tmp_path: Path) -> None:
    metadata, config = datadir.load(data), config_with(tmp_path / "deep" / "run")
    path = datadir.runtime_directory(metadata, config)
    assert path == tmp_path / "deep" / "run"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path / "worker-00.sock"))
    (path / "shard-00.model").write_text("mapped by others")
    path.chmod(0o755)
    assert datadir.runtime_directory(metadata, config) == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert sorted(entry.name for entry in path.iterdir()) == ["shard-00.model", "store_id"]


def test_where_the_runtime_directory_is_by_default(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = datadir.load(data)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    assert datadir._runtime_path(metadata, load(None)) == Path("/dev/shm/slotkeeper-6f1d2c3b-000")
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path / 'first'}:{tmp_path / 'second'}")
    assert datadir.runtime_directory(metadata, load(None)) == tmp_path / "first"
    assert datadir.runtime_directory(metadata, config_with(tmp_path / "own")) == tmp_path / "own"


def test_a_runtime_directory_of_another_store_is_refused(data: Path, tmp_path: Path) -> None:
    metadata, config = datadir.load(data), config_with(tmp_path / "run")
    datadir.runtime_directory(metadata, config)
    other = msgspec.structs.replace(metadata, store_id=str(OTHER))
    with pytest.raises(DataDirectoryError, match=f"is used by the store {STORE}"):
        datadir.runtime_directory(other, config)


def test_a_directory_with_other_things_does_not_become_a_runtime_directory(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "shared"
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    (place / "socket-of-somebody").write_text("")
    with pytest.raises(DataDirectoryError, match="other things lie there"):
        datadir.runtime_directory(datadir.load(data), config_with(place))
    assert stat.S_IMODE(place.stat().st_mode) == 0o755
    assert (place / "socket-of-somebody").exists()


def test_a_link_or_a_file_is_refused(data: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(DataDirectoryError, match="is not a directory"):
            datadir.runtime_directory(datadir.load(data), config_with(tmp_path / name))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
def test_a_directory_of_another_user_is_refused(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.mkdir()
    os.chown(place, 12_345, 12_345)
    with pytest.raises(DataDirectoryError, match="belongs to the user with id 12345"):
        datadir.runtime_directory(datadir.load(data), config_with(place))


def test_a_path_too_long_for_sockets_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataDirectoryError, match="too long"):
        datadir.runtime_directory(datadir.load(data), config_with(tmp_path / ("x" * 100)))
    assert not (tmp_path / ("x" * 100)).exists()


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with path.open() as reader:
        datadir.replace_file(path, b"new")
        assert reader.read() == "old", "who has it open keeps the old content"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
