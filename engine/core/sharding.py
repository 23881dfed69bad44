"""Which shard owns what, and the names of reservations and positions.

A counter's shard follows from a 16-bit hash of its pool and slot, a reservation's home from the hash of its first line,
which its id carries. So every id routes without a search, and still does when a data directory is rebuilt with another
number of shards: the hash stays, only the modulus changes. Python's `hash()` differs between processes and is never used.
"""

import zlib

from engine.core.limits import SEQ_MAX

HASH_BITS = 16
HASH_MASK = (1 << HASH_BITS) - 1


def counter_hash(pool_id: str, slot_id: str) -> int:
    """16 bits that depend on nothing but the two names. CRC-32, spread by a multiplication (Knuth 6.4)."""
    return (zlib.crc32(f"{pool_id}\0{slot_id}".encode()) * 0x9E3779B1 & 0xFFFFFFFF) >> 16


def shard_of_hash(hashed: int, shards: int) -> int:
    """The owner among `shards` shards."""
    return hashed % shards


def shard_of_counter(pool_id: str, slot_id: str, shards: int) -> int:
    """The owner of a counter."""
    return counter_hash(pool_id, slot_id) % shards


def reservation_number(seq: int, hashed: int) -> int:
    """The number of the reservation that event `seq` makes: rising with seq, unique in a data directory."""
    return seq << HASH_BITS | hashed


def shard_of_number(number: int, shards: int) -> int:
    """The home of a reservation."""
    return (number & HASH_MASK) % shards


def reservation_id(number: int) -> str:
    """The public, opaque form of a number: `r` and lower-case hex."""
    return f"r{number:x}"


def parse_reservation_id(text: str) -> int | None:
    """The number of a public id, or None where the text can be none."""
    if len(text) < 6 or len(text) > 17 or text[0] != "r" or text[1] == "0":
        return None
    digits = text[1:]
    if not all(character in "0123456789abcdef" for character in digits):
        return None
    number = int(digits, 16)
    return number if number >> HASH_BITS <= SEQ_MAX else None


def position_text(shard: int, seq: int) -> str:
    """`SHARD-SEQ`, opaque to clients."""
    return f"{shard}-{seq}"


def parse_position(text: str) -> tuple[int, int] | None:
    """Shard and seq of a position, or None where the text can be none."""
    shard, dash, seq = text.partition("-")
    if not dash or not shard.isascii() or not seq.isascii() or not shard.isdigit() or not seq.isdigit():
        return None
    if len(shard) > 3 or len(seq) > 15:
        return None
    return int(shard), int(seq)
