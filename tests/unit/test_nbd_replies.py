import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmblk import Command, Status
from pmblk.nvme.command import (
    CONTIGUOUS,
    DATASET_MANAGEMENT,
    FLUSH,
    GET_LBA_STATUS,
    READ,
    WRITE,
    WRITE_ZEROES,
    Hole,
    Segment,
)
from pmblk.ranges import Extent
from pmblkd.nbd.replies import ReplyEncoder
from pmblkd.statuses import errno_of
from tests.unit import nbd_client as client

NBD_ERRORS = {1, 5, 12, 22, 28, 75, 95, 108}


def encode(*commands: Command, structured: bool) -> list[client.Reply]:
    buffers = ReplyEncoder(structured=structured).encode(commands)
    lengths = {command.cookie: command.length for command in commands if command.opcode == READ}
    return client.replies(b"".join(buffers), lengths)


def read(segments: list[Segment], *, flags: int = 0, offset: int = 1000) -> Command:
    length = sum(s.length if isinstance(s, Hole) else len(s) for s in segments)
    return Command(READ, flags, offset, length, cookie=9, segments=segments)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("opcode", [WRITE, FLUSH, DATASET_MANAGEMENT, WRITE_ZEROES])
def test_success_without_data_is_a_simple_reply(opcode: int, structured: bool) -> None:
    (reply,) = encode(Command(opcode, 0, 0, 0, cookie=2**64 - 1), structured=structured)
    assert reply == client.Reply(2**64 - 1, -1, 0, True, b"")


@pytest.mark.parametrize("opcode", [READ, WRITE, FLUSH, GET_LBA_STATUS])
@pytest.mark.parametrize("status", list(Status)[1:])
@pytest.mark.parametrize("structured", [True, False])
def test_every_failure_has_an_error_that_nbd_knows(
    opcode: int, status: Status, structured: bool
) -> None:
    (reply,) = encode(Command(opcode, 0, 0, 1, cookie=3, status=status), structured=structured)
    assert (reply.cookie, reply.done) == (3, True)
    assert reply.error in NBD_ERRORS
    assert reply.error == errno_of(status, opcode)
    if structured and opcode in (READ, GET_LBA_STATUS):
        assert reply.kind == 0x8001
        (length,) = struct.unpack_from(">H", reply.data, 4)
        assert len(reply.data) == 6 + length > 6, "with words for people"


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        (WRITE, errno.ENOSPC),
        (WRITE_ZEROES, errno.ENOSPC),
        (READ, errno.EINVAL),
        (DATASET_MANAGEMENT, errno.EINVAL),
        (GET_LBA_STATUS, errno.EINVAL),
    ],
)
def test_past_the_end_a_write_finds_no_space_and_the_rest_is_invalid(
    opcode: int, expected: int
) -> None:
    assert errno_of(Status.LBA_OUT_OF_RANGE, opcode) == expected


def test_read_data_goes_out_as_the_view_itself() -> None:
    view = memoryview(b"data")
    for structured in (True, False):
        buffers = ReplyEncoder(structured=structured).encode([read([view])])
        assert buffers[1] is view


def test_a_structured_read_tells_holes_apart() -> None:
    segments: list[Segment] = [memoryview(b"ab"), memoryview(b"cd"), Hole(5), memoryview(b"e")]
    first, hole, last = encode(read(segments), structured=True)
    assert (first.kind, first.done, first.data) == (1, False, struct.pack(">Q", 1000) + b"abcd")
    assert (hole.kind, hole.done, hole.data) == (2, False, struct.pack(">QI", 1004, 5))
    assert (last.kind, last.done, last.data) == (1, True, struct.pack(">Q", 1009) + b"e")


def test_do_not_fragment_means_one_chunk_with_zeroes() -> None:
    (reply,) = encode(read([Hole(3), memoryview(b"x")], flags=CONTIGUOUS), structured=True)
    assert (reply.kind, reply.done, reply.data[8:]) == (1, True, b"\0\0\0x")


def test_a_simple_read_has_zeroes_for_holes() -> None:
    (reply,) = encode(read([Hole(3 << 20), memoryview(b"x")]), structured=False)
    assert reply.data == bytes(3 << 20) + b"x"


@pytest.mark.parametrize("structured", [True, False])
def test_a_read_of_nothing_is_answered(structured: bool) -> None:
    (reply,) = encode(read([]), structured=structured)
    assert (reply.cookie, reply.error, reply.done, reply.data) == (9, 0, True, b"")
    assert reply.kind == (0 if structured else -1)


def test_block_status_has_the_context_and_the_extents() -> None:
    extents = [Extent(0, 4096, hole=False), Extent(4096, 8192, hole=True)]
    command = Command(GET_LBA_STATUS, 0, 0, 12288, cookie=4, extents=extents)
    (reply,) = encode(command, structured=True)
    assert (reply.kind, reply.done) == (5, True)
    assert struct.unpack(">IIIII", reply.data) == (1, 4096, 0, 8192, 3)


runs = st.lists(st.tuples(st.booleans(), st.integers(1, 200)), min_size=1, max_size=8)


@given(runs, st.sampled_from([0, CONTIGUOUS]))
def test_the_chunks_of_a_read_cover_it_once_and_only_the_last_says_done(
    some: list[tuple[bool, int]], flags: int
) -> None:
    segments: list[Segment] = [
        Hole(length) if hole else memoryview(bytes([65 + index]) * length)
        for index, (hole, length) in enumerate(some)
    ]
    command = read(segments, flags=flags)
    chunks = encode(command, structured=True)
    position, content = command.offset, b""
    for chunk in chunks:
        (offset,) = struct.unpack_from(">Q", chunk.data)
        assert offset == position
        data = chunk.data[8:] if chunk.kind == 1 else bytes(struct.unpack(">I", chunk.data[8:])[0])
        content += data
        position += len(data)
    expected = b"".join(bytes(s.length) if isinstance(s, Hole) else bytes(s) for s in segments)
    assert content == expected
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
