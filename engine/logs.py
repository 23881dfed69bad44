"""Log lines: one JSON object on one line of standard error, or coloured text where a person is watching.

Rules:
- Fields of every line: `at` (UTC), `level`, `event` (a short fixed sentence; what varies goes into fields), `role`, and
  `index` where a role has several processes; `request_id` inside `request(...)`.
- A level that is filtered costs one call of an empty method: nothing is formatted, no field is looked up.
- A line is one `write`, so that lines of several processes do not mix, and a line that cannot be written is counted and
  dropped: a full disk or a closed pipe behind standard error must not stop a reservation.
- Under journald each line opens with its syslog level (`<6>`), which journald takes off again.

Not promised: lines of libraries that use the standard `logging` module.
"""

import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import IO, Any, Final

import orjson
import structlog
from structlog.typing import FilteringBoundLogger, Processor

_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_SYSLOG: Final = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>", "critical": "<2>"}
_LINE_BYTES_MAX: Final = 16_384
"""Longer lines are cut by journald (LineMax is 48 K) and mixed by pipes; only a very deep traceback gets near it."""


class LineWriter:
    """structlog's last station: writes each rendered line to a file descriptor by one call."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.lines_lost = 0
        """Lines that could not be written."""

    def msg(self, line: str | bytes) -> None:
        """Write one line, or count it as lost."""
        data = line.encode("utf-8", "backslashreplace") if isinstance(line, str) else line
        try:
            os.write(self._descriptor, data + b"\n")
        except OSError:
            # There is no better place to tell it: this is the place where errors are told.
            self.lines_lost += 1

    debug = info = warning = error = critical = msg


def configure(
    *,
    level: str,
    log_format: str,
    role: str,
    index: int | None = None,
    stream: IO[Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> LineWriter:
    """Set up logging for this process; afterwards `get_logger()` anywhere. Call it once, before the first line.

    `level` and `log_format` as in the [log] section of the configuration. Raises `KeyError` for another level.
    """
    stream = sys.stderr if stream is None else stream
    environment = os.environ if environment is None else environment
    writer = LineWriter(stream.fileno())
    under_journald = _is_journal(stream.fileno(), environment.get("JOURNAL_STREAM", ""))
    console = log_format == "console" or (log_format == "auto" and os.isatty(stream.fileno()))
    fixed = {"role": role} if index is None else {"role": role, "index": index}

    def identify(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.update(fixed)
        return event

    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        identify,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
    ]
    if console:
        colors = os.isatty(stream.fileno()) and not environment.get("NO_COLOR")
        processors.append(structlog.dev.ConsoleRenderer(colors=colors, timestamp_key="at"))
    else:
        processors += [structlog.processors.format_exc_info, _render_json]
    if under_journald:
        processors.append(_prefix(processors.pop()))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_arguments: writer,
        cache_logger_on_first_use=True,
    )
    return writer


def get_logger(**fields: object) -> FilteringBoundLogger:
    """A logger; `fields` are on each of its lines. Best called after `configure`: one from before looks it up each time."""
    logger: FilteringBoundLogger = structlog.get_logger(**fields)
    # Bound, a filtered line costs 0.1 us; unbound, structlog assembles a logger for it first: 0.6 us.
    return logger.bind() if structlog.is_configured() else logger


@contextmanager
def request(request_id: str) -> Iterator[None]:
    """Lines written inside, by this task and by tasks it starts, carry the request's id."""
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        yield


def _is_journal(descriptor: int, journal_stream: str) -> bool:
    """Whether JOURNAL_STREAM (DEVICE:INODE) means this descriptor: it is inherited even where output was redirected."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return journal_stream == f"{status.st_dev}:{status.st_ino}"


def _render_json(_logger: object, _method: str, event: MutableMapping[str, Any]) -> bytes:
    line = orjson.dumps(event, default=repr, option=orjson.OPT_NON_STR_KEYS)
    if len(line) <= _LINE_BYTES_MAX:
        return line
    # Keep it one JSON object: shorten texts, never cut the rendered line.
    short = {key: value[:2_000] if isinstance(value, str) else value for key, value in event.items()}
    return orjson.dumps({**short, "shortened": True}, default=repr, option=orjson.OPT_NON_STR_KEYS)


def _prefix(render: Processor) -> Processor:
    def render_with_prefix(logger: Any, method: str, event: MutableMapping[str, Any]) -> bytes:
        prefix = _SYSLOG.get(str(event.get("level")), "<6>").encode()
        rendered = render(logger, method, event)
        line = rendered if isinstance(rendered, bytes) else str(rendered).encode("utf-8", "backslashreplace")
        # journald begins a new entry at each line break, so each line needs its level.
        return b"\n".join(prefix + part for part in line.split(b"\n"))

    return render_with_prefix
