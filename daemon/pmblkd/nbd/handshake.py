"""The NBD handshake as a state machine: bytes in, bytes out, no I/O.

Rules that live here:

1. Every option is answered; one that is not known gets ERR_UNSUP and the stream stays in sync.
2. INFO and GO answer alike; only a GO that succeeds (or EXPORT_NAME) ends the haggling.
3. SET_META_CONTEXT replaces the selection even when it fails, and counts only for the export that
   GO names in the end.
4. EXPORT_NAME and a malformed message have no way to report an error: the connection closes.
5. Everything has a limit: an option's data, and the options of one connection.

States: GREETED -> HAGGLING -> READY (transmission may start) or CLOSED. Source: doc/proto.md of
the NBD project, "Handshake" and "Option types".
"""

import enum
from collections.abc import Callable, Iterator, Mapping

import msgspec

from pmblkd.nbd import wire
from pmblkd.nbd.wire import Info, Opt, Rep, TransmissionFlag

OPTION_BYTES_MAX = 64 << 10
OPTIONS_MAX = 1000


class Export(msgspec.Struct, frozen=True):
    """What the handshake says of one export. Sizes in bytes."""

    name: str
    description: str
    size: int
    read_only: bool
    preferred_block: int
    minimum_block: int = 1  # persistent memory is byte-addressable
    maximum_payload: int = wire.PAYLOAD_BYTES_MAX

    def transmission_flags(self, *, structured: bool) -> int:
        flag = TransmissionFlag
        flags = flag.HAS_FLAGS | flag.SEND_FLUSH | flag.SEND_FUA | flag.CAN_MULTI_CONN
        flags |= flag.SEND_CACHE
        if self.read_only:
            flags |= flag.READ_ONLY
        else:
            flags |= flag.SEND_TRIM | flag.SEND_WRITE_ZEROES | flag.SEND_FAST_ZERO
        if structured:
            flags |= flag.SEND_DF
        return int(flags)


class State(enum.Enum):
    GREETED = enum.auto()
    HAGGLING = enum.auto()
    READY = enum.auto()
    CLOSED = enum.auto()


class _Refused(Exception):
    """An option that is answered with an error reply."""

    def __init__(self, reply: Rep, message: str) -> None:
        self.reply = reply
        self.message = message


class Handshake:
    """`exports` by name; `default` is the name that the empty name stands for.

    Send `greeting()`, then call `receive` with what arrives and send what it returns, until
    `state` is READY or CLOSED. READY: `export`, `structured` and `allocation_context` are what was
    negotiated, and `leftover` holds the first bytes of the transmission.
    """

    def __init__(self, exports: Mapping[str, Export], *, default: str) -> None:
        self.state = State.GREETED
        self.export: Export | None = None
        self.structured = False
        self.allocation_context = False
        self.leftover = b""
        self.reason = ""
        self._exports = exports
        self._default = default
        self._buffer = bytearray()
        self._no_zeroes = False
        self._options = 0
        self._context_export: str | None = None
        self._handlers: Mapping[int, Callable[[bytes], Iterator[bytes]]] = {
            Opt.EXPORT_NAME: self._export_name,
            Opt.ABORT: self._abort,
            Opt.LIST: self._list,
            Opt.INFO: self._info,
            Opt.GO: self._go,
            Opt.STRUCTURED_REPLY: self._structured_reply,
            Opt.LIST_META_CONTEXT: self._list_meta_context,
            Opt.SET_META_CONTEXT: self._set_meta_context,
        }

    def greeting(self) -> bytes:
        return wire.GREETING.pack(
            wire.INIT_MAGIC, wire.OPTION_MAGIC, wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES
        )

    def receive(self, data: "bytes | memoryview") -> bytes:
        """Take in what arrived, in any pieces; what is to be sent comes back."""
        self._buffer += data
        out: list[bytes] = []
        while self.state in (State.GREETED, State.HAGGLING):
            step = self._client_flags() if self.state is State.GREETED else self._option()
            if step is None:
                break
            out.append(step)
        if self.state is State.READY:
            self.leftover = bytes(self._buffer)
            self._buffer.clear()
        return b"".join(out)

    def _close(self, reason: str) -> bytes:
        self.state = State.CLOSED
        self.reason = reason
        return b""

    def _client_flags(self) -> bytes | None:
        if len(self._buffer) < wire.CLIENT_FLAGS.size:
            return None
        (flags,) = wire.CLIENT_FLAGS.unpack_from(self._buffer)
        del self._buffer[: wire.CLIENT_FLAGS.size]
        if flags & ~(wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES):
            return self._close(f"client flags {flags:#x} were not offered")
        self._no_zeroes = bool(flags & wire.FLAG_NO_ZEROES)
        self.state = State.HAGGLING
        return b""

    def _option(self) -> bytes | None:
        """One option, if it is there in whole."""
        if len(self._buffer) < wire.OPTION.size:
            return None
        magic, option, length = wire.OPTION.unpack_from(self._buffer)
        if magic != wire.OPTION_MAGIC:
            return self._close("an option without its magic number")
        if length > OPTION_BYTES_MAX or self._options == OPTIONS_MAX:
            self._close(f"option {option}: {length} bytes of data, after {self._options} options")
            return _reply(option, Rep.ERR_TOO_BIG, b"too much to be a handshake")
        end = wire.OPTION.size + length
        if len(self._buffer) < end:
            return None
        self._options += 1
        data = bytes(self._buffer[wire.OPTION.size : end])
        del self._buffer[:end]
        return self._answer(option, data)

    def _answer(self, option: int, data: bytes) -> bytes:
        handler = self._handlers.get(option)
        if handler is None:
            return _reply(option, Rep.ERR_UNSUP, b"not supported")
        try:
            return b"".join(handler(data))
        except _Refused as refusal:
            if option == Opt.EXPORT_NAME:
                return self._close(f"EXPORT_NAME has no error reply: {refusal.message}")
            return _reply(option, refusal.reply, refusal.message.encode())

    # ---- one option each: yield the replies, raise _Refused for an error reply

    def _export_name(self, data: bytes) -> Iterator[bytes]:
        export = self._known(_text(data))
        flags = export.transmission_flags(structured=self.structured)
        yield wire.EXPORT_NAME_REPLY.pack(export.size, flags)
        if not self._no_zeroes:
            yield wire.EXPORT_NAME_PADDING
        self._choose(export)

    def _abort(self, data: bytes) -> Iterator[bytes]:
        self._close("the client said ABORT")
        yield _reply(Opt.ABORT, Rep.ACK)

    def _list(self, data: bytes) -> Iterator[bytes]:
        _expect_empty(data)
        for name, export in self._exports.items():
            encoded = name.encode()
            entry = wire.UINT32.pack(len(encoded)) + encoded + export.description.encode()
            yield _reply(Opt.LIST, Rep.SERVER, entry)
        yield _reply(Opt.LIST, Rep.ACK)

    def _info(self, data: bytes) -> Iterator[bytes]:
        name, wanted = _parse_info(data)
        yield from self._describe(Opt.INFO, self._known(name), wanted)

    def _go(self, data: bytes) -> Iterator[bytes]:
        name, wanted = _parse_info(data)
        export = self._known(name)
        yield from self._describe(Opt.GO, export, wanted)
        self._choose(export)

    def _describe(self, option: Opt, export: Export, wanted: set[int]) -> Iterator[bytes]:
        flags = export.transmission_flags(structured=self.structured)
        infos = [wire.INFO_EXPORT.pack(Info.EXPORT, export.size, flags)]
        if Info.NAME in wanted:
            infos.append(wire.INFO_TYPE.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted:
            infos.append(wire.INFO_TYPE.pack(Info.DESCRIPTION) + export.description.encode())
        if Info.BLOCK_SIZE in wanted:
            sizes = (export.minimum_block, export.preferred_block, export.maximum_payload)
            infos.append(wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        for info in infos:
            yield _reply(option, Rep.INFO, info)
        yield _reply(option, Rep.ACK)

    def _structured_reply(self, data: bytes) -> Iterator[bytes]:
        _expect_empty(data)
        self.structured = True
        yield _reply(Opt.STRUCTURED_REPLY, Rep.ACK)

    def _list_meta_context(self, data: bytes) -> Iterator[bytes]:
        self._need_structured()
        name, queries = _parse_meta_context(data)
        self._known(name)
        if not queries or "base:" in queries or wire.BASE_ALLOCATION in queries:
            yield self._context(Opt.LIST_META_CONTEXT, 0)
        yield _reply(Opt.LIST_META_CONTEXT, Rep.ACK)

    def _set_meta_context(self, data: bytes) -> Iterator[bytes]:
        self._context_export = None
        self._need_structured()
        name, queries = _parse_meta_context(data)
        export = self._known(name)
        if wire.BASE_ALLOCATION in queries:
            self._context_export = export.name
            yield self._context(Opt.SET_META_CONTEXT, wire.BASE_ALLOCATION_ID)
        yield _reply(Opt.SET_META_CONTEXT, Rep.ACK)

    @staticmethod
    def _context(option: Opt, identifier: int) -> bytes:
        data = wire.UINT32.pack(identifier) + wire.BASE_ALLOCATION.encode()
        return _reply(option, Rep.META_CONTEXT, data)

    # ---- what the options share

    def _known(self, name: str) -> Export:
        export = self._exports.get(name or self._default)
        if export is None:
            raise _Refused(Rep.ERR_UNKNOWN, f'no export "{name}"')
        return export

    def _need_structured(self) -> None:
        if not self.structured:
            raise _Refused(Rep.ERR_INVALID, "negotiate structured replies first")

    def _choose(self, export: Export) -> None:
        self.export = export
        self.allocation_context = self._context_export == export.name
        self.state = State.READY


def _reply(option: int, reply: Rep, data: bytes = b"") -> bytes:
    return wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def _expect_empty(data: bytes) -> None:
    if data:
        raise _Refused(Rep.ERR_INVALID, "this option takes no data")


def _text(data: bytes) -> str:
    """A string of the protocol: UTF-8, no NUL, at most 4096 bytes."""
    if len(data) > wire.STRING_BYTES_MAX or b"\0" in data:
        raise _Refused(Rep.ERR_INVALID, "a string is at most 4096 bytes and has no NUL")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _Refused(Rep.ERR_INVALID, "a string is UTF-8") from None


class _Reader:
    """Takes fields off the data of an option; an overrun is ERR_INVALID."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._data):
            raise _Refused(Rep.ERR_INVALID, "a length runs over the end of the option")
        piece = self._data[self._position : end]
        self._position = end
        return piece

    def integer(self, length: int) -> int:
        return int.from_bytes(self.take(length), "big")

    def string(self) -> str:
        return _text(self.take(self.integer(4)))

    def finish(self) -> None:
        if self._position != len(self._data):
            raise _Refused(Rep.ERR_INVALID, "more data than the option has fields")


def _parse_info(data: bytes) -> tuple[str, set[int]]:
    """INFO and GO: the export's name and the information types that are asked for."""
    reader = _Reader(data)
    name = reader.string()
    wanted = {reader.integer(2) for _ in range(reader.integer(2))}
    reader.finish()
    return name, wanted


def _parse_meta_context(data: bytes) -> tuple[str, list[str]]:
    """LIST_META_CONTEXT and SET_META_CONTEXT: the export's name and the queries."""
    reader = _Reader(data)
    name = reader.string()
    queries = [reader.string() for _ in range(reader.integer(4))]
    reader.finish()
    return name, queries
