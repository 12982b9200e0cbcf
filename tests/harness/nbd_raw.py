"""A tiny NBD client on a socket. Written from doc/proto.md, not from our server: it checks it.

It sends whatever it is told, right or wrong, and is strict about what comes back: magic numbers,
known cookies, structured replies wherever the protocol wants them, chunks that cover a read once.
Nothing here waits for ever: every socket has a time limit (TimeoutError).
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

SECONDS = 20
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << bit for bit in range(5))
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY = 1, 2, 3, 5, 6, 7, 8
LIST_META_CONTEXT, SET_META_CONTEXT = 9, 10
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = (2**31 + n for n in (1, 3, 6, 9))
UINT32_MAX, UINT64_MAX = 2**32 - 1, 2**64 - 1

_CHUNK_NONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS, _CHUNK_ERROR = 0, 1, 2, 5, 0x8001


class OptionReply(NamedTuple):
    kind: int
    data: bytes


class Reply(NamedTuple):
    """`extents` is the answer to BLOCK_STATUS, as (length, state)."""

    cookie: int
    error: int
    data: bytes = b""
    extents: tuple[tuple[int, int], ...] = ()


def string(text: str) -> bytes:
    return struct.pack(">I", len(text.encode())) + text.encode()


def option(number: int, data: bytes = b"", *, magic: bytes = b"IHAVEOPT") -> bytes:
    return magic + struct.pack(">II", number, len(data)) + data


def request(
    kind: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 1,
    magic: int = 0x25609513,
) -> bytes:
    """A request's header; a WRITE's payload is the caller's."""
    return struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, length)


class Client:
    """A connection; `structured` is set once that was negotiated. Use it with `with`."""

    def __init__(self, address: Path | tuple[str, int], *, seconds: float = SECONDS) -> None:
        family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(seconds)
        self.structured = False
        self._next_cookie = 1
        self._pending: dict[int, tuple[int, int, int]] = {}  # cookie -> kind, offset, length
        try:
            self.sock.connect(str(address) if isinstance(address, Path) else address)
        except OSError:
            self.sock.close()
            raise

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly so much; AssertionError when the stream ends before."""
        data = bytearray(length)
        view, have = memoryview(data), 0
        while have < length:
            count = self.sock.recv_into(view[have:])
            assert count, f"the server closed after {have} of {length} bytes"
            have += count
        return bytes(data)

    def closed(self) -> bool:
        """Whether the server ends the connection, without sending anything, in time."""
        return self.drain() == 0

    def drain(self) -> int:
        """Read until the server ends the connection; how many bytes that were."""
        total = 0
        try:
            while count := len(self.sock.recv(1 << 20)):
                total += count
        except (ConnectionResetError, BrokenPipeError):
            pass  # it ended before it had read all of ours
        return total

    # ---- handshake

    def greet(self, flags: int = 3) -> "Client":
        assert self.receive(18) == b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
        self.send(struct.pack(">I", flags))
        return self

    def ask_option(self, number: int, data: bytes = b"") -> list[OptionReply]:
        """Send an option; its replies up to the last."""
        self.send(option(number, data))
        return self.option_replies(number)

    def option_replies(self, number: int) -> list[OptionReply]:
        replies: list[OptionReply] = []
        while not replies or replies[-1].kind in (REP_SERVER, REP_INFO, REP_META_CONTEXT):
            magic, about, kind, length = struct.unpack(">QIII", self.receive(20))
            assert magic == 0x3E889045565A9
            assert about == number
            replies.append(OptionReply(kind, self.receive(length)))
        return replies

    def go(self, name: str = "", *, structured: bool = False, context: bool = False) -> "Client":
        """From the greeting to the transmission; `context` selects base:allocation."""
        self.greet()
        if structured or context:
            assert self.ask_option(STRUCTURED_REPLY) == [(REP_ACK, b"")]
            self.structured = True
        if context:
            query = string(name) + struct.pack(">I", 1) + string("base:allocation")
            assert len(self.ask_option(SET_META_CONTEXT, query)) == 2
        replies = self.ask_option(GO, string(name) + struct.pack(">H", 0))
        assert replies[-1] == (REP_ACK, b"")
        return self

    # ---- transmission

    def request(
        self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> int:
        """Send a request (and `data` behind it); its cookie. `reply` knows it."""
        self.send(self.packed(kind, offset, length, flags=flags) + data)
        return self._next_cookie - 1

    def packed(self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0) -> bytes:
        """The header of a request that the caller sends; `reply` knows it."""
        cookie, self._next_cookie = self._next_cookie, self._next_cookie + 1
        self._pending[cookie] = (kind, offset, length)
        return request(kind, offset, length, flags=flags, cookie=cookie)

    def ask(
        self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> Reply:
        """Send a request and wait for its reply, with nothing else outstanding."""
        assert not self._pending
        self.request(kind, offset, length, flags=flags, data=data)
        return self.reply()

    def read(self, offset: int, length: int) -> bytes:
        reply = self.ask(READ, offset, length)
        assert reply.error == 0
        return reply.data

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> int:
        """The error, 0 for none."""
        return self.ask(WRITE, offset, len(data), flags=flags, data=data).error

    def reply(self) -> Reply:
        """The next whole reply; its chunks must not be mixed with those of another."""
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == 0x67446698:
            return self._simple()
        assert magic == 0x668E33EF, f"reply magic {magic:#x}"
        assert self.structured, "a chunk, and nobody asked for structured replies"
        return self._chunks()

    def _simple(self) -> Reply:
        error, cookie = struct.unpack(">IQ", self.receive(12))
        kind, _, length = self._pending.pop(cookie)
        if self.structured:
            assert kind != READ, "with structured replies a READ has no simple one"
            assert kind != BLOCK_STATUS or error, "BLOCK_STATUS succeeded in a simple reply"
        data = self.receive(length) if kind == READ and not error else b""
        return Reply(cookie, error, data)

    def _chunks(self) -> Reply:
        flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        command, offset, wanted = self._pending.pop(cookie)
        content = bytearray()
        covered = error = 0
        extents: list[tuple[int, int]] = []
        while True:
            payload = self.receive(length)
            if kind in (_CHUNK_DATA, _CHUNK_HOLE):
                content = content or bytearray(wanted)
            if kind == _CHUNK_DATA:
                (position,) = struct.unpack_from(">Q", payload)
                content[position - offset : position - offset + length - 8] = payload[8:]
                covered += length - 8
            elif kind == _CHUNK_HOLE:
                covered += struct.unpack(">QI", payload)[1]
            elif kind == _CHUNK_STATUS:
                extents += struct.iter_unpack(">II", payload[4:])
            elif kind == _CHUNK_ERROR:
                (error,) = struct.unpack_from(">I", payload)
                assert error, "an error chunk without an error"
            else:
                assert kind == _CHUNK_NONE, f"chunk type {kind}"
            if flags & 1:
                break
            magic, flags, kind, again, length = struct.unpack(">IHHQI", self.receive(20))
            assert (magic, again) == (0x668E33EF, cookie)
        if command == READ and not error:
            assert len(content) == covered == wanted, "the chunks cover the read exactly once"
        return Reply(cookie, error, b"" if error else bytes(content), tuple(extents))


@contextlib.contextmanager
def connected(
    address: Path | tuple[str, int],
    name: str = "",
    *,
    structured: bool = False,
    context: bool = False,
) -> Iterator[Client]:
    """A client in transmission; it says DISC in the end, and the server closes."""
    with Client(address) as client:
        client.go(name, structured=structured, context=context)
        yield client
        client.send(request(DISC))
        assert client.closed()


def check_health(address: Path | tuple[str, int], name: str) -> None:
    """A healthy client is served, and what it writes (to the third page) is there."""
    noise = os.urandom(4096)
    with connected(address, name, structured=True) as client:
        assert client.write(8192, noise, flags=FUA) == 0
        assert client.read(8192, 4096) == noise
