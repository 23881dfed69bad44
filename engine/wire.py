"""Frames between the processes of one host: a length, then MessagePack, many messages in each.

    4 bytes   length of the payload, big endian
    payload   to a server:   [[request_id, deadline_ms, command], ...]
              to a client:   [[request_id, reply], ...]

Commands and replies are the structs of the core. `deadline_ms` is CLOCK_BOOTTIME, the same for all processes of a host; a
server that meets a command after its deadline answers `deadline_passed` and does nothing.

Rules: a frame over FRAME_BYTES_MAX or one that does not decode ends the connection, it never ends the process.
Not promised: anything about peers of another version; all processes of a host start from one installation.
"""

from collections.abc import Iterator

import msgspec

from engine.core.commands import PlannerCommand, ShardCommand
from engine.core.outcomes import PlannerReply, ShardReply

FRAME_BYTES_MAX = 32 * 1024 * 1024
"""The largest message is an import of 200,000 counters, about 20 MB."""

RECEIVE_BYTES = 256 * 1024
_LENGTH_BYTES = 4

encoder = msgspec.msgpack.Encoder()
shard_commands = msgspec.msgpack.Decoder(list[tuple[int, int, ShardCommand]])
planner_commands = msgspec.msgpack.Decoder(list[tuple[int, int, PlannerCommand]])
shard_replies = msgspec.msgpack.Decoder(list[tuple[int, ShardReply]])
planner_replies = msgspec.msgpack.Decoder(list[tuple[int, PlannerReply]])


class FrameError(Exception):
    """The peer sent something that is no frame."""


def frame(messages: object) -> bytes:
    """Messages as one frame, ready to send."""
    payload = encoder.encode(messages)
    return len(payload).to_bytes(_LENGTH_BYTES, "big") + payload


class FrameReader:
    """Bytes in, payloads out. Keeps at most one incomplete frame."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The payloads completed by `data`. Raises FrameError."""
        rest = self._rest
        rest += data
        while len(rest) >= _LENGTH_BYTES:
            size = int.from_bytes(rest[:_LENGTH_BYTES], "big")
            if size > FRAME_BYTES_MAX:
                raise FrameError(f"a frame of {size} bytes is longer than {FRAME_BYTES_MAX}")
            end = _LENGTH_BYTES + size
            if len(rest) < end:
                break
            # Taken out before it is handed out: a caller that stops at the first payload must not get it again.
            payload = bytes(rest[_LENGTH_BYTES:end])
            del rest[:end]
            yield payload
