"""The bytes of the read model: one row for each counter, one header for each file, and the words that prove a copy whole.

Files (one read model = one name, one writer)
- `NAME.rm` is the pointer: a header alone, whose `moved_to_generation` says which generation is live (0: none yet). It is
  made once and never replaced while readers of this layout may have it mapped, so looking for news is one load.
- `NAME.GENERATION.rm` holds a header and `row_capacity` rows. It appears under its name only when it is complete.
- Numbers are little-endian int64, aligned to 8 bytes; a row is three cache lines and a publish touches the first two.

How a row is read whole without a lock
- `version` is even at rest, odd while the row is written, and 0 in a row never written, which counts as odd. A reader takes
  the version, copies, takes the version again, and keeps the copy only if both are the same even number.
- `check` is the residue of version and values modulo a prime. A torn copy that passes the versions (stores seen out of order
  on a weakly ordered processor, where Python has no fences) fails it, but for one in 2**27. The residue weighs each
  word differently: a plain sum or XOR would not notice one unit that went from `held` to `confirmed`.
- Pool, slot and instants of a row never change once it is visible (a slot's instants are resolved when it is defined);
  `identity_check` covers those alone, so they are verified once and may be cached for ever.

Not promised: anything against a process of the same user that writes or truncates the files. The directory is private.
"""

import mmap
import os
import re
import stat
import struct
import sys
import uuid
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int64]
"""2-D: one line for each row, one column for each 8-byte word."""


class ReadModelError(Exception):
    """Something is wrong with a read model. The text names the file and says what to do."""


class NotPublishedError(ReadModelError):
    """No writer has published under this name yet. Nothing is damaged: ask the worker, or try again."""


class LayoutError(ReadModelError):
    """A file is not what its name says: foreign, truncated, or inconsistent."""


class LayoutVersionError(LayoutError):
    """A file of another version of this layout: its reader or its writer must be restarted with the same release."""


class TornRowError(ReadModelError):
    """A row stayed half-written for as long as a reader waits: its writer is dead or stopped. Ask the worker."""


class SupersededError(ReadModelError):
    """Another writer has made its own generation the live one. This writer must stop."""


class FullError(ReadModelError):
    """The read model holds ROWS_MAX rows."""


MAGIC: Final = int.from_bytes(b"SLOTREAD", "little")
LAYOUT_VERSION: Final = 1

WORD_SIZE: Final = 8
CACHE_LINE_SIZE: Final = 64
SLOT_ID_SIZE: Final = 32

ROWS_MAX: Final = 2**24
"""3.2 GB in one file; four times the counters one shard may have. Row numbers fit 32 bits in a reader's index."""

POOL_CODE_MAX: Final = 2**31 - 1

GIVE_UP_MS: Final = 10
"""A writer is between odd and even for less than a microsecond, or as long as it is descheduled: a time slice is 3 ms."""

NO_CUTOFF: Final = -(2**63)
"""`cutoff_at_ms` of a counter without a cut-off."""

RETIRED: Final = -1
"""`moved_to_generation` of a pointer file that was replaced by one of another layout version."""

STATE_STARTING, STATE_SERVING, STATE_STOPPING = 1, 2, 3

# --- rows

VALUE_FIELDS: Final = (
    "limit",
    "base",
    "overbook",
    "buffer",
    "held",
    "confirmed",
    "fulfilled",
    "refused",
    "flags",
    "cutoff_at_ms",
    "seq",
    "plan_version",
)
"""What a publish writes, in this order. `flags` are the caller's bits; `seq` is the journal seq of the last change."""

VALUES: Final = len(VALUE_FIELDS)
VERSION_WORD: Final = 0
CHECK_WORD: Final = 1 + VALUES
IDENTITY_WORD: Final = CHECK_WORD + 1
KEY_WORDS: Final = 1 + SLOT_ID_SIZE // WORD_SIZE
"""pool_code and slot_id: what a row is found by."""
IDENTITY_WORDS: Final = KEY_WORDS + 2
"""The key, starts_at_ms and ends_at_ms."""
STARTS_WORD: Final = IDENTITY_WORD + KEY_WORDS
IDENTITY_CHECK_WORD: Final = IDENTITY_WORD + IDENTITY_WORDS

ROW_WORDS: Final = -(-(IDENTITY_CHECK_WORD + 1) * WORD_SIZE // CACHE_LINE_SIZE) * CACHE_LINE_SIZE // WORD_SIZE
ROW_SIZE: Final = ROW_WORDS * WORD_SIZE

_ROW_FIELDS: Final = (
    ("version", VERSION_WORD),
    *((name, 1 + index) for index, name in enumerate(VALUE_FIELDS)),
    ("check", CHECK_WORD),
    ("pool_code", IDENTITY_WORD),
    ("slot_id", IDENTITY_WORD + 1),
    ("starts_at_ms", STARTS_WORD),
    ("ends_at_ms", STARTS_WORD + 1),
    ("identity_check", IDENTITY_CHECK_WORD),
)

ROW: Final = np.dtype(
    {
        "names": [name for name, _ in _ROW_FIELDS],
        "formats": [f"S{SLOT_ID_SIZE}" if name == "slot_id" else "<i8" for name, _ in _ROW_FIELDS],
        "offsets": [word * WORD_SIZE for _, word in _ROW_FIELDS],
        "itemsize": ROW_SIZE,
    }
)
"""A row as numpy sees it. numpy drops the zero bytes that pad `slot_id`."""

BODY: Final = struct.Struct(f"<{1 + VALUES}q")
"""version and values: what `check` covers."""

IDENTITY: Final = struct.Struct(f"<q{SLOT_ID_SIZE}sqq")
KEY: Final = struct.Struct(f"<q{SLOT_ID_SIZE}s")

# --- header

HEADER_FIELDS: Final = {
    # The first line is set once and read when a file is opened. Magic, layout version and moved_to_generation
    # keep their places in every layout version, so that old and new releases can tell each other apart.
    "magic": 0,
    "layout_version": 1,
    "moved_to_generation": 2,
    "row_size": 3,
    "row_capacity": 4,
    "generation": 5,
    "epoch": 6,
    "restart_count": 7,
    # The second line changes rarely.
    "boot_id_high": 8,
    "boot_id_low": 9,
    "writer_pid": 10,
    "state": 11,
    "pools_generation": 12,
    "plan_version": 13,
    "row_count": 14,
    # The third line changes with every commit.
    "heartbeat_boottime_ms": 16,
    "position_seq": 17,
    "published_at_ms": 18,
}
"""Name and word of each header field. Each word stands for itself: none is only true together with another."""

HEADER_WORDS: Final = 24
HEADER_SIZE: Final = HEADER_WORDS * WORD_SIZE

HEADER: Final = np.dtype(
    {
        "names": list(HEADER_FIELDS),
        "formats": ["<i8"] * len(HEADER_FIELDS),
        "offsets": [word * WORD_SIZE for word in HEADER_FIELDS.values()],
        "itemsize": HEADER_SIZE,
    }
)

MAGIC_AT: Final = HEADER_FIELDS["magic"]
LAYOUT_VERSION_AT: Final = HEADER_FIELDS["layout_version"]
MOVED_TO_GENERATION_AT: Final = HEADER_FIELDS["moved_to_generation"]
ROW_SIZE_AT: Final = HEADER_FIELDS["row_size"]
ROW_CAPACITY_AT: Final = HEADER_FIELDS["row_capacity"]
GENERATION_AT: Final = HEADER_FIELDS["generation"]
EPOCH_AT: Final = HEADER_FIELDS["epoch"]
RESTART_COUNT_AT: Final = HEADER_FIELDS["restart_count"]
BOOT_ID_HIGH_AT: Final = HEADER_FIELDS["boot_id_high"]
BOOT_ID_LOW_AT: Final = HEADER_FIELDS["boot_id_low"]
WRITER_PID_AT: Final = HEADER_FIELDS["writer_pid"]
STATE_AT: Final = HEADER_FIELDS["state"]
POOLS_GENERATION_AT: Final = HEADER_FIELDS["pools_generation"]
PLAN_VERSION_AT: Final = HEADER_FIELDS["plan_version"]
ROW_COUNT_AT: Final = HEADER_FIELDS["row_count"]
HEARTBEAT_AT: Final = HEADER_FIELDS["heartbeat_boottime_ms"]
POSITION_SEQ_AT: Final = HEADER_FIELDS["position_seq"]
PUBLISHED_AT: Final = HEADER_FIELDS["published_at_ms"]

# --- check words
#
# A residue was chosen because it is cheap on both sides: CPython takes it of a whole body in one big-integer step (170 ns,
# where thirteen multiplications in Python take 320), numpy as a weighted sum of 32-bit halves (17 ns a row).

CHECK_PRIME: Final = 2**27 - 39
SPAN_PRIME: Final = 2**27 - 79
KEY_HASH_SHIFT: Final = 32
KEY_HASH_MASK: Final = 2**27 - 1
_IDENTITY_MARK: Final = 1 << 62
"""Keeps the identity check of a real row from being 0, which is what a row not yet written holds."""

_HALVES_MAX: Final = 2 * (1 + VALUES)
_CHECK_WEIGHTS: Final = np.array([pow(2, 32 * half, CHECK_PRIME) for half in range(_HALVES_MAX)], dtype=np.uint64)
_SPAN_WEIGHTS: Final = np.array([pow(2, 32 * half, SPAN_PRIME) for half in range(_HALVES_MAX)], dtype=np.uint64)


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise LayoutError(text)


_require(sys.byteorder == "little", "the read model needs a little-endian processor: byte-swapped stores may tear")
_require(ROW_SIZE % CACHE_LINE_SIZE == 0 and HEADER_SIZE % CACHE_LINE_SIZE == 0, "rows must not share cache lines")
_require((CHECK_WORD + 1) * WORD_SIZE <= 2 * CACHE_LINE_SIZE, "a publish must touch two cache lines only")
_require(BODY.size == CHECK_WORD * WORD_SIZE, "check must follow the body")
_require(IDENTITY.size == IDENTITY_WORDS * WORD_SIZE and KEY.size == KEY_WORDS * WORD_SIZE, "words and structs differ")
_require(_HALVES_MAX * (2**32 - 1) * (CHECK_PRIME - 1) + CHECK_PRIME < 2**64, "weighted sums must fit 64 bits")
_require(2 * ROWS_MAX < CHECK_PRIME, "a key's hash must spread over a whole index")


def check_of_body(body: bytes) -> int:
    """The check word of a packed BODY that carries the *odd* version under which it is written."""
    return int.from_bytes(body, "little") % CHECK_PRIME


def _weighted(words: Words, weights: NDArray[np.uint64]) -> NDArray[np.uint64]:
    halves = words.view(np.uint32)
    sums: NDArray[np.uint64] = np.einsum("ij,j->i", halves, weights[: halves.shape[1]])
    return sums


def checks_of_bodies(bodies: Words) -> Words:
    """`check_of_body` for many: shape (rows, 1 + VALUES), each with its odd version."""
    return (_weighted(bodies, _CHECK_WEIGHTS) % np.uint64(CHECK_PRIME)).astype(np.int64)


def expected_checks(copies: Words) -> Words:
    """The check words that whole copies carry: shape (rows, ROW_WORDS), even versions, so one less than was written."""
    sums = _weighted(copies[:, :CHECK_WORD], _CHECK_WEIGHTS) + np.uint64(CHECK_PRIME - 1)
    return (sums % np.uint64(CHECK_PRIME)).astype(np.int64)


def key_hash(key: bytes) -> int:
    """The hash of a packed KEY, below 2**27."""
    return int.from_bytes(key, "little") % CHECK_PRIME


def identity_check(identity: bytes) -> int:
    """The check word of a packed IDENTITY: never 0, and it carries the key's hash in its upper half."""
    span = int.from_bytes(identity, "little") % SPAN_PRIME
    return _IDENTITY_MARK | key_hash(identity[: KEY.size]) << KEY_HASH_SHIFT | span


def identity_checks(identities: Words) -> Words:
    """`identity_check` for many: shape (rows, IDENTITY_WORDS)."""
    keys = (_weighted(identities[:, :KEY_WORDS], _CHECK_WEIGHTS) % np.uint64(CHECK_PRIME)).astype(np.int64)
    spans = (_weighted(identities, _SPAN_WEIGHTS) % np.uint64(SPAN_PRIME)).astype(np.int64)
    return _IDENTITY_MARK | keys << KEY_HASH_SHIFT | spans


# --- files

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def checked_name(name: str) -> str:
    """A name of a read model. No dot, so that no name's pointer can look like another name's generation."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is no name of a read model: lower-case letters, digits and dashes, at most 64")
    return name


def pointer_path(directory: Path, name: str) -> Path:
    """The file that says which generation is live."""
    return directory / f"{name}.rm"


def generation_path(directory: Path, name: str, generation: int) -> Path:
    """The file that holds the rows of a generation."""
    return directory / f"{name}.{generation}.rm"


def generations_in(directory: Path, name: str) -> list[int]:
    """The generations that have a file, lowest first."""
    pattern = re.compile(re.escape(name) + r"\.([1-9][0-9]{0,17})\.rm", re.ASCII)
    return sorted(int(match[1]) for entry in directory.iterdir() if (match := pattern.fullmatch(entry.name)))


def file_size(row_capacity: int) -> int:
    """Bytes of a file with that many rows."""
    return HEADER_SIZE + row_capacity * ROW_SIZE


def map_file(path: Path, *, writable: bool) -> mmap.mmap:
    """Map an existing file and prove that its header and its size fit this layout.

    Raises FileNotFoundError, LayoutError or LayoutVersionError; the text names the file.
    """
    descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise LayoutError(f"{path} is not a regular file: remove it and restart the worker")
        if status.st_size < HEADER_SIZE:
            raise LayoutError(
                f"{path} is truncated: {status.st_size} bytes, a header has {HEADER_SIZE}; remove it and restart the worker"
            )
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    try:
        _check_header(path, status.st_size, struct.unpack_from(f"<{HEADER_WORDS}q", mapped))
    except LayoutError:
        mapped.close()
        raise
    return mapped


def _check_header(path: Path, size: int, header: tuple[int, ...]) -> None:
    if header[MAGIC_AT] != MAGIC:
        raise LayoutError(f"{path} is not a read model: move it away and restart the worker")
    if header[LAYOUT_VERSION_AT] != LAYOUT_VERSION:
        raise LayoutVersionError(
            f"{path} has layout version {header[LAYOUT_VERSION_AT]}, this release knows {LAYOUT_VERSION}: "
            "restart workers and api processes with the same release"
        )
    if header[ROW_SIZE_AT] != ROW_SIZE:
        raise LayoutError(
            f"{path} has rows of {header[ROW_SIZE_AT]} bytes, not {ROW_SIZE}: remove it, restart the worker"
        )
    row_capacity = header[ROW_CAPACITY_AT]
    if not 0 <= row_capacity <= ROWS_MAX or size != file_size(row_capacity):
        raise LayoutError(
            f"{path} is truncated or damaged: {size} bytes for a capacity of {row_capacity} rows; "
            "remove it and restart the worker"
        )
    if not 0 <= header[ROW_COUNT_AT] <= row_capacity:
        raise LayoutError(
            f"{path} is damaged: {header[ROW_COUNT_AT]} rows in a capacity of {row_capacity}; "
            "remove it and restart the worker"
        )


def boot_id() -> bytes:
    """16 bytes that differ for each start of the kernel: a heartbeat of another boot says nothing."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()).bytes
