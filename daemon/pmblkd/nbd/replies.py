"""Replies of the NBD transmission phase, without I/O: completed commands become buffers.

The second half of the hot path (`requests` is the first): a batch of completions becomes one
vector of buffers for one `sendmsg`, and what was read goes out as views of the memory itself,
behind a header each.

Rules that live here: how data, holes, extents and errors travel. Without structured replies every
command has a simple one; with them READ and BLOCK_STATUS are structured, errors too, and the rest
stays simple, which the protocol allows. Source: doc/proto.md of the NBD project, "Structured
reply types".
"""

from collections.abc import Iterable, Sequence
from struct import Struct

from pmblk.media import ZEROES
from pmblk.nvme.command import CONTIGUOUS, GET_LBA_STATUS, READ, Command, Hole, Segment
from pmblk.nvme.status import Status
from pmblk.ranges import slices
from pmblkd.nbd import wire
from pmblkd.statuses import errno_of

Buffer = bytes | memoryview

# The two headers that most replies are, packed with their constant first half as one integer.
_SUCCESS = Struct(">QQ")
_SUCCESS_PREFIX = wire.SIMPLE_REPLY_MAGIC << 32
_DATA = Struct(">QQIQ")
_DATA_PREFIX = wire.CHUNK_MAGIC << 32 | wire.CHUNK_DONE << 16 | wire.REPLY_OFFSET_DATA
_MORE_DATA_PREFIX = wire.CHUNK_MAGIC << 32 | wire.REPLY_OFFSET_DATA


class ReplyEncoder:
    """`structured`: whether the handshake negotiated structured replies."""

    def __init__(self, *, structured: bool) -> None:
        self._structured = structured

    def encode(self, commands: Iterable[Command]) -> list[Buffer]:
        """The replies, in order. What the commands read must stay held until they are sent."""
        out: list[Buffer] = []
        append = out.append
        structured = self._structured
        success, data = _SUCCESS.pack, _DATA.pack
        for command in commands:
            opcode = command.opcode
            if command.status:
                append(self._error(command))
            elif opcode == READ:
                segments = command.segments
                assert segments is not None
                if len(segments) == 1 and type(segments[0]) is memoryview:
                    if structured:
                        length = command.length + 8
                        append(data(_DATA_PREFIX, command.cookie, length, command.offset))
                    else:
                        append(success(_SUCCESS_PREFIX, command.cookie))
                    append(segments[0])
                elif structured:
                    self._structured_read(command, segments, out)
                else:
                    append(success(_SUCCESS_PREFIX, command.cookie))
                    _append_plain(segments, out)
            elif opcode == GET_LBA_STATUS:
                append(_block_status(command))
            else:
                append(success(_SUCCESS_PREFIX, command.cookie))
        return out

    def _error(self, command: Command) -> bytes:
        error = errno_of(command.status, command.opcode)
        if not self._structured or command.opcode not in (READ, GET_LBA_STATUS):
            return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, command.cookie)
        message = Status(command.status).name.lower().replace("_", " ").encode()
        length = 6 + len(message)
        header = _chunk(wire.REPLY_ERROR, command.cookie, length)
        return header + wire.ERROR.pack(error, len(message)) + message

    @staticmethod
    def _structured_read(command: Command, segments: Sequence[Segment], out: list[Buffer]) -> None:
        """A read of several segments: holes apart, unless the client wants one chunk."""
        if not segments:
            out.append(_chunk(wire.REPLY_NONE, command.cookie, 0))
        elif command.flags & CONTIGUOUS:
            out.append(_DATA.pack(_DATA_PREFIX, command.cookie, command.length + 8, command.offset))
            _append_plain(segments, out)
        else:
            _append_chunks(command, segments, out)


def _chunk(kind: int, cookie: int, length: int, flags: int = wire.CHUNK_DONE) -> bytes:
    return wire.CHUNK.pack(wire.CHUNK_MAGIC, flags, kind, cookie, length)


def _append_plain(segments: Sequence[Segment], out: list[Buffer]) -> None:
    """The bytes themselves, holes as zeroes."""
    for segment in segments:
        if isinstance(segment, Hole):
            for _, piece in slices(0, segment.length, slice_bytes=len(ZEROES)):
                out.append(ZEROES[:piece])
        else:
            out.append(segment)


def _append_chunks(command: Command, segments: Sequence[Segment], out: list[Buffer]) -> None:
    """A chunk for each run: neighbouring views share one, every hole has its own."""
    offset = command.offset
    end = offset + command.length
    for views, hole_length in _runs(segments):
        length = hole_length or sum(map(len, views))
        last = offset + length == end
        if hole_length:
            flags = wire.CHUNK_DONE if last else 0
            header = _chunk(wire.REPLY_OFFSET_HOLE, command.cookie, wire.HOLE.size, flags)
            out.append(header + wire.HOLE.pack(offset, length))
        else:
            prefix = _DATA_PREFIX if last else _MORE_DATA_PREFIX
            out.append(_DATA.pack(prefix, command.cookie, length + 8, offset))
            out.extend(views)
        offset += length


def _runs(segments: Sequence[Segment]) -> list[tuple[list[memoryview], int]]:
    """Neighbouring views together, each hole alone: (views, 0) or ([], hole length)."""
    runs: list[tuple[list[memoryview], int]] = []
    for segment in segments:
        if isinstance(segment, Hole):
            runs.append(([], segment.length))
        elif runs and runs[-1][0]:
            runs[-1][0].append(segment)
        else:
            runs.append(([segment], 0))
    return runs


def _block_status(command: Command) -> bytes:
    extents = [
        wire.BLOCK_STATUS_EXTENT.pack(
            extent.length, wire.STATE_HOLE | wire.STATE_ZERO if extent.hole else 0
        )
        for extent in command.extents or ()
    ]
    header = _chunk(wire.REPLY_BLOCK_STATUS, command.cookie, 4 + 8 * len(extents))
    return header + wire.UINT32.pack(wire.BASE_ALLOCATION_ID) + b"".join(extents)
