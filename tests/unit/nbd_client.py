"""The client's half of the NBD wire, written from the protocol document and not from our server."""

import struct
from typing import NamedTuple

IHAVEOPT = b"IHAVEOPT"
ACK, SERVER, INFO, META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = (2**31 + n for n in (1, 3, 6, 9))


def flags(value: int = 3) -> bytes:
    return struct.pack(">I", value)


def option(number: int, data: bytes = b"") -> bytes:
    return IHAVEOPT + struct.pack(">II", number, len(data)) + data


def string(text: str) -> bytes:
    return struct.pack(">I", len(text.encode())) + text.encode()


def info(number: int, name: str, *wanted: int) -> bytes:
    types = b"".join(struct.pack(">H", one) for one in wanted)
    return option(number, string(name) + struct.pack(">H", len(wanted)) + types)


def meta(number: int, name: str, *queries: str) -> bytes:
    data = string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))
    return option(number, data)


class OptionReply(NamedTuple):
    option: int
    kind: int
    data: bytes


def option_replies(stream: bytes) -> list[OptionReply]:
    replies = []
    while stream:
        magic, number, kind, length = struct.unpack_from(">QIII", stream)
        assert magic == 0x3E889045565A9
        replies.append(OptionReply(number, kind, stream[20 : 20 + length]))
        stream = stream[20 + length :]
    return replies


def request(
    kind: int,
    cookie: int = 0,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    data: bytes = b"",
) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length) + data


class Reply(NamedTuple):
    """One simple reply (kind -1) or one chunk."""

    cookie: int
    kind: int
    error: int
    done: bool
    data: bytes


def replies(stream: bytes, read_lengths: dict[int, int]) -> list[Reply]:
    """Decode; `read_lengths` by cookie: a simple reply does not say how much data follows."""
    found = []
    while stream:
        (magic,) = struct.unpack_from(">I", stream)
        if magic == 0x67446698:
            error, cookie = struct.unpack_from(">IQ", stream, 4)
            length = 0 if error else read_lengths.get(cookie, 0)
            found.append(Reply(cookie, -1, error, True, stream[16 : 16 + length]))
            stream = stream[16 + length :]
        else:
            assert magic == 0x668E33EF, hex(magic)
            chunk_flags, kind, cookie, length = struct.unpack_from(">HHQI", stream, 4)
            payload = stream[20 : 20 + length]
            assert len(payload) == length
            error = struct.unpack_from(">I", payload)[0] if kind & 0x8000 else 0
            found.append(Reply(cookie, kind, error, bool(chunk_flags & 1), payload))
            stream = stream[20 + length :]
    return found
