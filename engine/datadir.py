"""The data directory and the runtime directory: what lies where, who may use it, and how it comes to be.

    DIR/slotkeeper.json   metadata, written last: without it there is no data directory
    DIR/epoch             how many times a supervisor has started here
    DIR/supervisor.lock   flock of the running supervisor
    DIR/planning/         the planner's journal
    DIR/shard-00/ …       the journal of each shard

Rules:
- `init` makes everything else durable before the metadata appears (write aside, fsync, rename, fsync of the directory):
  a crash leaves either a data directory or leftovers that the next `init` recognises and finishes. It never touches a
  directory in which anything else lies.
- One supervisor at a time: it holds the flock for its life. The kernel drops it with the process, so it is never stale.
- The epoch grows, durably, before any worker of that start exists: (epoch, restart) of a journal row names one process.
- A lost epoch or shard directory is damage and stops the start. Nothing is guessed or made anew.

Not promised: network file systems (flock and fsync mean less there).
"""

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from uuid import UUID, uuid4

import msgspec

from engine.config import Config
from engine.core.limits import SHARDS_MAX

FORMAT: Final = 1
METADATA_NAME: Final = "slotkeeper.json"
EPOCH_NAME: Final = "epoch"
LOCK_NAME: Final = "supervisor.lock"
PLANNING_NAME: Final = "planning"
STORE_MARK_NAME: Final = "store_id"
"""In a runtime directory: whose it is."""

CONFIG_NAME: Final = "config.json"
"""In the runtime directory: the effective configuration, as `engine.config.encode` writes it."""
STATE_NAME: Final = "supervisor.json"
"""In the runtime directory: `engine.supervisor.SupervisorState`."""

LOCK_PATIENCE_SECONDS: Final = 1.0
"""A killed supervisor holds its flock until the kernel has taken it apart, and so does, for the instant between fork
and exec, a child that it was just starting."""
_LOCK_POLL_SECONDS: Final = 0.01

SOCKET_PATH_BYTES_MAX: Final = 107
"""sun_path of a unix socket is 108 bytes with its closing zero byte."""
_LONGEST_SOCKET_NAME: Final = "worker-000.sock"

_OWN_NAMES: Final = re.compile(
    r"shard-\d{2,3}|planning|epoch|supervisor\.lock|lost\+found|(epoch|slotkeeper\.json)\.part"
)


class DataDirectoryError(Exception):
    """A directory cannot be used. The text says which, why, and what to do. Nothing was changed."""


class Metadata(msgspec.Struct, frozen=True):
    """What a data directory is, fixed when it was made."""

    format: int
    store_id: str
    """A UUID: this very store. A copy that goes its own way needs another one."""
    shards: int
    created_at: str
    """RFC 3339, UTC."""


class DirectoryLock:
    """The flock of a data directory, held until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Let the next one in. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        """Nothing to do: it is held already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release."""
        self.release()


def shard_directory(directory: Path, shard: int) -> Path:
    """Where the journal of a shard lies."""
    return directory / f"shard-{shard:02d}"


def planning_directory(directory: Path) -> Path:
    """Where the planner's journal lies."""
    return directory / PLANNING_NAME


def init(directory: Path, shards: int, *, store_id: UUID | None = None, created_at: datetime | None = None) -> Metadata:
    """Make a data directory; it and its parents may be missing. On return it survives loss of power.

    Leftovers of an `init` that was interrupted are finished, with a new store id.
    Raises `DataDirectoryError` if anything else lies there, or `shards` is out of range.
    """
    if not 1 <= shards <= SHARDS_MAX:
        raise DataDirectoryError(f"{shards} shards are not possible, allowed: 1 to {SHARDS_MAX}")
    moment = created_at or datetime.now(UTC)
    metadata = Metadata(
        format=FORMAT,
        store_id=str(store_id or uuid4()),
        shards=shards,
        created_at=moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    )
    try:
        _make_directories(directory)
        _refuse_foreign_content(directory)
        with lock_directory(directory):
            # Again under the lock: another `init` may have finished meanwhile.
            _refuse_foreign_content(directory)
            for step in init_steps(directory, metadata):
                step()
    except OSError as error:
        raise DataDirectoryError(f"{directory}: cannot be made: {error.strerror} ({error.filename})") from error
    return metadata


def init_steps(directory: Path, metadata: Metadata) -> list[Callable[[], None]]:
    """What `init` does, in order; each may be the last before a crash. The last one makes it a data directory."""
    shards = [shard_directory(directory, shard) for shard in range(metadata.shards)]
    document = msgspec.json.format(msgspec.json.encode(metadata), indent=2) + b"\n"
    return [
        lambda: _remove_leftovers(directory),
        lambda: planning_directory(directory).mkdir(mode=0o700),
        *[lambda shard=shard: shard.mkdir(mode=0o700) for shard in shards],
        lambda: _write_durably(directory / EPOCH_NAME, b"0\n"),
        lambda: _fsync_directory(directory),
        lambda: _write_durably(directory / METADATA_NAME, document),
    ]


def load(directory: Path) -> Metadata:
    """What a data directory says of itself, checked against what lies in it.

    Raises `DataDirectoryError`: not a data directory, made by a newer version, or damaged.
    """
    path = directory / METADATA_NAME
    try:
        document = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataDirectoryError(_not_a_data_directory(directory)) from None
    except OSError as error:
        raise DataDirectoryError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        found_format = msgspec.json.decode(document, type=dict[str, msgspec.Raw])["format"]
        format_number = msgspec.json.decode(found_format, type=int)
    except (msgspec.MsgspecError, KeyError) as error:
        raise DataDirectoryError(_damaged(path, "it is not the JSON object that init writes")) from error
    if format_number > FORMAT:
        raise DataDirectoryError(
            f"{directory}: has format {format_number}, this version knows up to {FORMAT}: "
            "use the version of slotkeeper that last served it, or a newer one"
        )
    try:
        metadata = msgspec.json.decode(document, type=Metadata)
        UUID(metadata.store_id)
        datetime.fromisoformat(metadata.created_at)
    except (msgspec.MsgspecError, ValueError) as error:
        raise DataDirectoryError(_damaged(path, str(error))) from error
    if format_number < 1 or not 1 <= metadata.shards <= SHARDS_MAX:
        raise DataDirectoryError(_damaged(path, f"format {format_number} or {metadata.shards} shards cannot be"))
    _check_content(directory, metadata)
    return metadata


def lock_directory(directory: Path, *, patience_seconds: float = LOCK_PATIENCE_SECONDS) -> DirectoryLock:
    """Take the supervisor's lock, waiting up to `patience_seconds` for a process that is just dying. Blocks.

    Raises `DataDirectoryError` with the holder's process id.
    """
    path = directory / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DataDirectoryError(f"{path}: cannot be opened: {error.strerror}") from error
    give_up_at = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < give_up_at:
                time.sleep(_LOCK_POLL_SECONDS)
                continue
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise DataDirectoryError(
                f"{directory}: is in use by the supervisor with process id {holder or 'unknown'}; stop that one first"
            ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return DirectoryLock(descriptor)


def lock_holder(directory: Path) -> int | None:
    """The process id of the running supervisor, or None: for `status`, which must not believe old state files."""
    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else None
    else:
        return None
    finally:
        os.close(descriptor)


def next_epoch(directory: Path) -> int:
    """Count this start, durably, and return its number: 1 for the first. Call it with the lock held.

    Raises `DataDirectoryError` if the counter is damaged: to begin again at 1 would name two processes alike.
    """
    path = directory / EPOCH_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataDirectoryError(_damaged(path, f"it cannot be read: {error.strerror}")) from error
    if not re.fullmatch(rb"\d{1,15}\n", text):
        raise DataDirectoryError(_damaged(path, f"{text[:32]!r} is not a number of starts"))
    epoch = int(text) + 1
    try:
        _write_durably(path, b"%d\n" % epoch)
    except OSError as error:
        raise DataDirectoryError(f"{path}: cannot be written: {error.strerror}") from error
    return epoch


def runtime_directory(metadata: Metadata, config: Config) -> Path:
    """Make or take over the runtime directory, private to this user, without sockets of an earlier start.

    Call it with the data directory's lock held: the sockets that it removes must be nobody's.
    Raises `DataDirectoryError` if it is not ours: another user's, another store's, or a place where other things lie.
    """
    path = _runtime_path(metadata, config)
    if len(os.fsencode(path / _LONGEST_SOCKET_NAME)) > SOCKET_PATH_BYTES_MAX:
        raise DataDirectoryError(
            f"{path}: is too long for a runtime directory, since paths of sockets end at {SOCKET_PATH_BYTES_MAX} bytes: "
            "set runtime.directory to a shorter one"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            _check_owner(path)
        _take_over(path, metadata)
        path.chmod(0o700)
        for entry in path.iterdir():
            if stat.S_ISSOCK(entry.lstat().st_mode):
                entry.unlink()
    except OSError as error:
        raise DataDirectoryError(
            f"{path}: cannot be the runtime directory: {error.strerror}; set runtime.directory to another one"
        ) from error
    return path


def free_runtime(runtime: Path) -> None:
    """After an orderly stop: give the memory of the read models back and remove the sockets. What says how it ended stays."""
    for pattern in ("*.rm", "*.sock"):
        for path in runtime.glob(pattern):
            path.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file in one step for those who read it. For tmpfs: survives no loss of power."""
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content)
    aside.replace(path)


def _runtime_path(metadata: Metadata, config: Config) -> Path:
    if config.runtime.directory is not None:
        return Path(config.runtime.directory)
    # systemd separates several RuntimeDirectory= with colons; our units have one.
    from_systemd = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(from_systemd) if from_systemd else Path(f"/dev/shm/slotkeeper-{metadata.store_id[:12]}")  # noqa: S108 - owner and mark are checked


def _check_owner(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise DataDirectoryError(f"{path}: is not a directory; remove it or set runtime.directory to another place")
    if status.st_uid != os.geteuid():
        raise DataDirectoryError(
            f"{path}: belongs to the user with id {status.st_uid}, this process runs as {os.geteuid()}: "
            "run as that user, remove the directory, or set runtime.directory to another place"
        )


def _take_over(path: Path, metadata: Metadata) -> None:
    mark = path / STORE_MARK_NAME
    try:
        found = mark.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        # Not ours unless empty: this keeps a slip such as runtime.directory = "/tmp" from closing /tmp to all others.
        leftovers = {entry.name for entry in path.iterdir()} - {STORE_MARK_NAME + ".part"}
        if leftovers:
            raise DataDirectoryError(
                f"{path}: other things lie there ({min(leftovers)}); "
                "set runtime.directory to a directory of its own, empty or missing"
            ) from None
        replace_file(mark, f"{metadata.store_id}\n".encode())
        return
    if found != metadata.store_id:
        raise DataDirectoryError(
            f"{path}: is used by the store {found}, this one is {metadata.store_id}: "
            "give each store its own runtime.directory, or remove it if that store is gone"
        )


def _make_directories(directory: Path) -> None:
    """Make it and its missing parents, each durable in its own parent."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        # Parents get the usual mode: they may be meant for others too.
        path.mkdir(mode=0o700 if path == directory else 0o777, exist_ok=True)
        _fsync_directory(path.parent)
    if not directory.is_dir():
        raise DataDirectoryError(f"{directory}: is not a directory")


def _refuse_foreign_content(directory: Path) -> None:
    if (directory / METADATA_NAME).exists():
        raise DataDirectoryError(f"{directory}: is a data directory already; `slotkeeper serve` uses it as it is")
    for entry in sorted(directory.iterdir()):
        filled = entry.name.startswith(("shard-", PLANNING_NAME)) and (not entry.is_dir() or any(entry.iterdir()))
        if filled or not _OWN_NAMES.fullmatch(entry.name):
            raise DataDirectoryError(f"{directory}: is not empty ({entry.name} lies there); choose an empty directory")


def _remove_leftovers(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.name in (LOCK_NAME, "lost+found"):
            continue
        # rmdir refuses what is not empty: a journal cannot be lost here.
        if entry.is_dir():
            entry.rmdir()
        else:
            entry.unlink()


def _not_a_data_directory(directory: Path) -> str:
    if not directory.exists():
        return f"{directory}: does not exist; `slotkeeper init {directory}` makes a data directory"
    if not directory.is_dir():
        return f"{directory}: is not a directory"
    if any(directory.glob("shard-*/*")):
        return _damaged(directory / METADATA_NAME, "it is missing, and journals lie beside it")
    if planning_directory(directory).exists() or (directory / LOCK_NAME).exists():
        return f"{directory}: an init was interrupted here; `slotkeeper init {directory}` again finishes it"
    return f"{directory}: is not a data directory ({METADATA_NAME} is missing); `slotkeeper init` makes one"


def _check_content(directory: Path, metadata: Metadata) -> None:
    expected = {shard_directory(directory, shard).name for shard in range(metadata.shards)} | {PLANNING_NAME}
    found = {entry.name for entry in directory.iterdir() if re.fullmatch(r"shard-\d+|planning", entry.name)}
    if missing := sorted(expected - found):
        raise DataDirectoryError(_damaged(directory / missing[0], "it is missing"))
    if surplus := sorted(found - expected):
        raise DataDirectoryError(_damaged(directory / surplus[0], f"{METADATA_NAME} says {metadata.shards} shards"))


def _damaged(path: Path, what: str) -> str:
    return f"{path}: is damaged: {what}. Nothing was changed; restore it from a backup"


def _write_durably(path: Path, content: bytes) -> None:
    """Replace a file so that after a crash it holds the old content or the new one, and after the return the new one.

    Order: bytes aside, fsync (else the name could come to mean an empty file), rename, fsync of the directory.
    """
    aside = path.with_name(path.name + ".part")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    aside.replace(path)
    _fsync_directory(path.parent)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
