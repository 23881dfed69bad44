"""The configuration: every setting with its type, default, range and meaning, in one place.

Rules:
- Sources in order: defaults < file < command line. The result is frozen; the supervisor writes it, as JSON, into the
  runtime directory, and every child reads that: all processes of one start agree.
- An unknown key, a wrong type, a value out of range, or two bounds that contradict each other refuse the start. All
  problems are told at once, each with the full path of its key.
- A setting exists only here: `describe()` is the source of `slotkeeper config check --print` and of the documentation's
  test. Bounds that belong to the format of journal or API are in `engine.core.limits` and cannot be configured.

Not promised: a change at run time (restart for it), or that a directory or address named here can be used.
"""

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from engine.core.invariant import invariant
from engine.core.limits import LINES_MAX

DEADLINE_MS_MIN: Final = 10
"""Below this even an idle host cannot keep its word: one fsync and two hops between processes take some of it."""
DEADLINE_MS_MAX: Final = 60_000
FINISHED_KEEP_SECONDS_MIN: Final = 120
BODY_BYTES_FIXED: Final = 2_048
"""A reservation without its lines: order_ref, channel and key at their longest, with room for JSON escapes."""
BODY_BYTES_OF_LINE: Final = 192
"""One line at its longest: pool_id 64, slot_id 32, quantity 7, and the names around them, with room for spaces."""
API_PROCESSES_MAX: Final = 256
READY_SECONDS_MIN: Final = 10
"""More than a worker waits for a predecessor that is just dying (`engine.child.LOCK_PATIENCE_SECONDS`)."""
HOLD_SECONDS_LIMIT: Final = 365 * 86_400
"""A hold is a promise for somebody who is about to decide. Who needs a year means a confirmed reservation."""

invariant(
    FINISHED_KEEP_SECONDS_MIN * 1_000 >= 2 * DEADLINE_MS_MAX,
    "a key must be remembered for longer than a request and its retry can last",
)


class ConfigError(Exception):
    """The configuration cannot be used. `problems` holds one sentence for each thing to mend."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Address(NamedTuple):
    """Where to listen. Port 0 lets the kernel choose; `supervisor.json` in the runtime directory says which."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can connect."""
        return ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        """As `parse_address` reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def cores() -> int:
    """How many cores this process may use: `taskset` and cgroup cpusets are respected."""
    return len(os.sched_getaffinity(0))


def parse_address(text: str) -> Address:
    """Read HOST:PORT; the host is an IP address (version 6 in brackets) or `localhost`, which means 127.0.0.1.

    Raises `ValueError` with a text that continues "KEY: ". Other names are refused: whether such an address is
    loopback would depend on a resolver, and so would the protection that rests on it.
    """
    host, colon, port_text = text.rpartition(":")
    if not colon or not host:
        raise ValueError(f"{text!r} is not HOST:PORT, for example 127.0.0.1:7411 or [::1]:7411")
    if not (port_text.isascii() and port_text.isdigit() and int(port_text) <= 65_535):
        raise ValueError(f"{port_text!r} is not a port: 0 to 65535")
    in_brackets = host.startswith("[") and host.endswith("]")
    if host == "localhost":
        host = "127.0.0.1"
    try:
        ip = ipaddress.ip_address(host[1:-1] if in_brackets else host)
    except ValueError:
        raise ValueError(f"{host!r} is neither an IP address nor localhost") from None
    if (ip.version == 6) != in_brackets:
        raise ValueError(f"{text!r}: write IPv6 addresses, and only those, in brackets: [::1]:7411")
    return Address(str(ip), int(port_text))


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The listening socket and the processes behind it."""

    listen: Annotated[str, Meta(description="HOST:PORT to serve HTTP on; IPv6 in brackets; port 0 means any")] = (
        "127.0.0.1:7411"
    )
    allow_unauthenticated: Annotated[
        bool,
        Meta(description="serve other hosts although this version knows no API keys: whoever connects may do all"),
    ] = False
    api_processes: Annotated[
        int, Meta(ge=1, le=API_PROCESSES_MAX, description="processes that speak HTTP; by default one for each core")
    ] = msgspec.field(default_factory=cores)
    connections_max: Annotated[
        int, Meta(ge=1, le=100_000, description="open client connections of one api process; more wait to be accepted")
    ] = 4_096


class Api(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How requests are treated."""

    deadline_ms: Annotated[
        int,
        Meta(ge=DEADLINE_MS_MIN, le=DEADLINE_MS_MAX, description="the longest a request waits for its answer, in all"),
    ] = 1_000
    body_bytes_max: Annotated[
        int, Meta(ge=4_096, le=16 * 2**20, description="largest request body; a larger one is answered 413")
    ] = 65_536
    access_log_sample: Annotated[
        float, Meta(ge=0.0, le=1.0, description="share of successful requests that are logged; failures always are")
    ] = 0.0


class Reservations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one reservation may ask for, and how long it is remembered."""

    ttl_seconds_max: Annotated[
        int, Meta(ge=1, le=HOLD_SECONDS_LIMIT, description="largest ttl_seconds of a hold or an extension")
    ] = 86_400
    hold_seconds_max: Annotated[
        int, Meta(ge=1, le=HOLD_SECONDS_LIMIT, description="longest life of a hold, all extensions included")
    ] = 172_800
    finished_keep_seconds: Annotated[
        int,
        Meta(
            ge=FINISHED_KEEP_SECONDS_MIN,
            le=HOLD_SECONDS_LIMIT,
            description="how long finished reservations stay readable and their idempotency keys known",
        ),
    ] = 86_400
    lines_max: Annotated[int, Meta(ge=1, le=LINES_MAX, description="lines of one reservation")] = LINES_MAX


class JournalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of journal files and how often a snapshot shortens recovery."""

    segment_mb: Annotated[
        int, Meta(ge=1, le=16_384, description="size at which a journal segment is sealed and a new one begun")
    ] = 256
    checkpoint_mb: Annotated[
        int,
        Meta(ge=1, le=64, description="size of the write-ahead log at which it is moved into the segment"),
    ] = 4
    snapshot_every_events: Annotated[
        int, Meta(ge=1_000, le=100_000_000, description="events between two snapshots: what a start has to replay")
    ] = 200_000


class Overload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When to refuse at once instead of keeping a customer waiting."""

    queue_ms_max: Annotated[
        int, Meta(ge=1, le=DEADLINE_MS_MAX, description="a shard whose oldest command waits longer refuses new ones")
    ] = 250
    batch_commands_max: Annotated[
        int, Meta(ge=1, le=65_536, description="commands decided and made durable by one commit")
    ] = 8_192


class Runtime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files that live as long as the processes do, and the patience with processes."""

    directory: Annotated[
        str | None,
        Meta(
            description="sockets, shared memory and state files, on tmpfs; "
            "by default systemd's RUNTIME_DIRECTORY or else /dev/shm/slotkeeper-STORE"
        ),
    ] = None
    ready_seconds_max: Annotated[
        int,
        Meta(ge=READY_SECONDS_MIN, le=86_400, description="a process not ready by then is killed and started again"),
    ] = 300
    stop_seconds_max: Annotated[
        int, Meta(ge=1, le=600, description="a process that takes longer to stop is killed; api: after deadline_ms")
    ] = 20


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Log lines on standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="the least serious level that is written")
    ] = "info"
    format: Annotated[
        Literal["auto", "json", "console"],
        Meta(description="auto: console on a terminal, JSON elsewhere; under journald with a syslog prefix"),
    ] = "auto"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an operator may choose."""

    server: Server = msgspec.field(default_factory=Server)
    api: Api = msgspec.field(default_factory=Api)
    reservations: Reservations = msgspec.field(default_factory=Reservations)
    journal: JournalSettings = msgspec.field(default_factory=JournalSettings)
    overload: Overload = msgspec.field(default_factory=Overload)
    runtime: Runtime = msgspec.field(default_factory=Runtime)
    log: Log = msgspec.field(default_factory=Log)

    @property
    def address(self) -> Address:
        """`server.listen`, read."""
        return parse_address(self.server.listen)


class Setting(NamedTuple):
    """One key as documentation shows it; `default` is a value as TOML writes it, or words where it depends."""

    key: str
    type: str
    default: str
    range: str
    meaning: str


class _Leaf(NamedTuple):
    """One key as `load` reads it."""

    section: type[msgspec.Struct]
    annotation: Any
    type_name: str
    range: str
    default: str
    meaning: str


_DEFAULT_WORDS: Final = {"server.api_processes": "number of cores", "runtime.directory": "chosen at start"}
_TYPE_NAMES: Final = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _leaves() -> dict[str, _Leaf]:
    leaves = {}
    for section_name, section in get_type_hints(Config).items():
        hints = get_type_hints(section, include_extras=True)
        for field in msgspec.structs.fields(section):
            key = f"{section_name}.{field.name}"
            bare, meta = get_args(hints[field.name])
            options = get_args(bare)
            if get_origin(bare) is Literal:
                type_name, allowed = "string", ", ".join(_toml(option) for option in options)
            else:
                type_name = _TYPE_NAMES[options[0] if options else bare]
                allowed = f"{meta.ge} to {meta.le}" if meta.ge is not None else "any"
                allowed = "true, false" if bare is bool else allowed
            default = _DEFAULT_WORDS.get(key) or _toml(field.default)
            leaves[key] = _Leaf(section, hints[field.name], type_name, allowed, default, meta.description)
    return leaves


_LEAVES: Final = _leaves()


def describe() -> Iterator[Setting]:
    """Every setting, in the order of the sections."""
    for key, leaf in _LEAVES.items():
        yield Setting(key, leaf.type_name, leaf.default, leaf.range, leaf.meaning)


def value_of(config: Config, key: str) -> object:
    """The value behind a key of `describe()`."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def load(path: Path | None, overrides: Mapping[str, object] | None = None) -> Config:
    """Defaults, then the file at `path`, then `overrides` (full key -> value; None means "not given").

    Raises `ConfigError` with all problems found, each beginning with its source and the full path of the key.
    """
    values: dict[str, object] = {}
    problems: list[str] = []
    if path is not None:
        _take(str(path), _flatten(_read(path), problems, str(path)), values, problems)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    _take("command line", given, values, problems)
    if problems:
        raise ConfigError(problems)
    config = _build(values)
    problems = list(_contradictions(config))
    if problems:
        raise ConfigError(problems)
    return config


def encode(config: Config) -> bytes:
    """The effective configuration as JSON, indented for people."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"


def decode(document: bytes) -> Config:
    """What `encode` wrote. Raises `ConfigError`: the file was edited, or written by another version."""
    try:
        return msgspec.json.decode(document, type=Config)
    except msgspec.MsgspecError as error:
        raise ConfigError([f"the effective configuration is not what this version writes: {error}"]) from error


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from error


def _flatten(document: dict[str, object], problems: list[str], source: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    sections = get_type_hints(Config)
    for name, content in document.items():
        if isinstance(content, dict):
            if name not in sections and not content:
                problems.append(f"{source}: {name}: unknown section{_hint(name, sections)}")
            flat.update({f"{name}.{key}": value for key, value in content.items()})
        elif name in sections:
            problems.append(f"{source}: {name}: is a section, written [{name}], not a value")
        else:
            flat[name] = content
    return flat


def _take(source: str, given: Mapping[str, object], values: dict[str, object], problems: list[str]) -> None:
    for key, value in given.items():
        leaf = _LEAVES.get(key)
        if leaf is None:
            problems.append(f"{source}: {key}: unknown key{_hint(key, _LEAVES)}")
            continue
        try:
            values[key] = msgspec.convert(value, leaf.annotation)
        except msgspec.ValidationError:
            allowed = "" if leaf.range == "any" else f", allowed: {leaf.range}"
            shown = _toml(value) if isinstance(value, str | bool) else repr(value)
            problems.append(f"{source}: {key}: {shown} is not possible; it is {_article(leaf.type_name)}{allowed}")


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _hint(key: str, known: Mapping[str, object]) -> str:
    # The right name in a wrong section is a likelier slip than a similar full path.
    leaf_name = key.rpartition(".")[2]
    same_name = [other for other in known if other.rpartition(".")[2] == leaf_name]
    close = same_name or difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; `slotkeeper config check --print` lists all keys"


def _build(values: dict[str, object]) -> Config:
    sections: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return msgspec.convert(sections, Config)


def _contradictions(config: Config) -> Iterator[str]:
    """Relations between settings: each alone is in range, together they cannot work."""
    try:
        address = config.address
    except ValueError as error:
        yield f"server.listen: {error}"
    else:
        if not (address.is_loopback or config.server.allow_unauthenticated):
            yield f"server.listen: {unauthenticated_text(address)}"
    if config.overload.queue_ms_max >= config.api.deadline_ms:
        yield (
            f"overload.queue_ms_max: {config.overload.queue_ms_max} must be lower than api.deadline_ms "
            f"({config.api.deadline_ms}): a queue that old holds only requests whose time is up"
        )
    if config.reservations.hold_seconds_max < config.reservations.ttl_seconds_max:
        yield (
            f"reservations.hold_seconds_max: {config.reservations.hold_seconds_max} must be at least "
            f"reservations.ttl_seconds_max ({config.reservations.ttl_seconds_max}): a hold may live for its first ttl"
        )
    if config.journal.checkpoint_mb > config.journal.segment_mb:
        yield (
            f"journal.checkpoint_mb: {config.journal.checkpoint_mb} must be at most journal.segment_mb "
            f"({config.journal.segment_mb}): a segment is made of checkpoints"
        )
    body_bytes = BODY_BYTES_FIXED + config.reservations.lines_max * BODY_BYTES_OF_LINE
    if config.api.body_bytes_max < body_bytes:
        yield (
            f"api.body_bytes_max: {config.api.body_bytes_max} must be at least {body_bytes}, for a reservation of "
            f"reservations.lines_max ({config.reservations.lines_max}) lines"
        )
    directory = config.runtime.directory
    if directory is not None and not Path(directory).is_absolute():
        yield f'runtime.directory: "{directory}" must be an absolute path: other programs look there too'


def unauthenticated_text(address: object) -> str:
    """Why an address that other hosts can reach is refused, and what to do."""
    return (
        f"{address} can be reached from other hosts, and this version has no API keys (they come with a later one): "
        "whoever can connect could book, release and change capacity. Listen on 127.0.0.1 or [::1] behind a proxy "
        "that authenticates, or set server.allow_unauthenticated = true if the network itself is closed"
    )
