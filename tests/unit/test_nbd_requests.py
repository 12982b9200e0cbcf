import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmblk import Command
from pmblk.nvme.command import (
    ALLOCATE,
    CONTIGUOUS,
    DATASET_MANAGEMENT,
    FAST_ONLY,
    FIRST_EXTENT,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from pmblk.nvme.status import Status
from pmblkd.nbd.requests import BATCH_MAX, BUFFER_BYTES, ProtocolError, RequestStream
from tests.unit import nbd_client as client

C_READ, C_WRITE, C_DISC, C_FLUSH, C_TRIM, C_CACHE, C_ZEROES, C_STATUS = range(8)
F_FUA, F_NO_HOLE, F_DF, F_REQ_ONE, F_FAST = (1 << bit for bit in range(5))


def feed(stream: RequestStream, data: bytes, cuts: list[int] | None = None) -> list[Command]:
    """Everything that comes out, payloads copied out of the buffer before it is used again."""
    found: list[Command] = []
    turn = 0
    while data:
        buffer = stream.receive_buffer()
        assert len(buffer) > 0
        count = min(len(buffer), len(data), cuts[turn % len(cuts)] if cuts else len(data))
        turn += 1
        buffer[:count] = data[:count]
        stream.received(count)
        data = data[count:]
        while batch := stream.next_batch():
            assert len(batch) <= BATCH_MAX
            for command in batch:
                if command.payload is not None:
                    command.payload = bytes(command.payload)
                found.append(command)
    return found


def decode(kind: int, *, flags: int = 0, offset: int = 0, length: int = 0) -> Command:
    stream = RequestStream(allocation_context=True)
    data = bytes(length) if kind == C_WRITE else b""
    (command,) = feed(stream, client.request(kind, 7, offset, length, flags=flags, data=data))
    assert command.cookie == 7
    return command


@pytest.mark.parametrize(
    ("kind", "flags", "opcode", "meaning"),
    [
        (C_READ, 0, READ, 0),
        (C_READ, F_DF | F_FUA, READ, CONTIGUOUS),
        (C_WRITE, F_FUA, WRITE, FUA),
        (C_TRIM, F_FUA, DATASET_MANAGEMENT, FUA),
        (C_CACHE, F_FUA, PREFETCH, 0),
        (C_ZEROES, 0, WRITE_ZEROES, 0),
        (C_ZEROES, F_FUA | F_NO_HOLE | F_FAST, WRITE_ZEROES, FUA | ALLOCATE | FAST_ONLY),
        (C_STATUS, F_REQ_ONE, GET_LBA_STATUS, FIRST_EXTENT),
    ],
)
def test_types_and_flags_become_opcodes_and_flags(
    kind: int, flags: int, opcode: int, meaning: int
) -> None:
    command = decode(kind, flags=flags, offset=4096, length=512)
    assert (command.opcode, command.flags) == (opcode, meaning)
    assert (command.offset, command.length, command.status) == (4096, 512, 0)


def test_a_flush_has_neither_offset_nor_length() -> None:
    assert decode(C_FLUSH).status == 0
    assert decode(C_FLUSH, flags=F_FUA).opcode == FLUSH
    assert decode(C_FLUSH, offset=1).status == Status.INVALID_FIELD
    assert decode(C_FLUSH, length=1).status == Status.INVALID_FIELD


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (C_READ, F_NO_HOLE),
        (C_READ, F_REQ_ONE),
        (C_WRITE, F_DF),
        (C_TRIM, F_FAST),
        (C_CACHE, F_DF),
        (C_STATUS, F_DF),
        (C_ZEROES, F_DF),
        (C_READ, 1 << 15),
        (8, 0),
        (0xFFFF, 0),
    ],
)
def test_unknown_types_and_flags_are_invalid_and_the_stream_stays_in_sync(
    kind: int, flags: int
) -> None:
    data = b"p" * 512 if kind == C_WRITE else b""
    stream = RequestStream(allocation_context=True)
    first, second = feed(
        stream,
        client.request(kind, 1, 0, 512, flags=flags, data=data) + client.request(C_READ, 2, 0, 1),
    )
    assert first.status == Status.INVALID_FIELD
    assert (second.cookie, second.status) == (2, 0)


def test_block_status_needs_a_context_and_a_length() -> None:
    with_context = RequestStream(allocation_context=True)
    without = RequestStream(allocation_context=False)
    assert feed(with_context, client.request(C_STATUS, 1, 0, 4096))[0].status == 0
    assert feed(with_context, client.request(C_STATUS, 1, 0, 0))[0].status != 0
    assert feed(without, client.request(C_STATUS, 1, 0, 4096))[0].status == Status.INVALID_FIELD


def test_a_read_beyond_the_payload_limit_is_invalid() -> None:
    assert decode(C_READ, length=32 << 20).status == 0
    assert decode(C_READ, length=(32 << 20) + 1).status == Status.INVALID_FIELD
    assert decode(C_READ, length=2**32 - 1).status == Status.INVALID_FIELD


def test_trim_zero_and_status_may_be_as_long_as_they_like() -> None:
    for kind in (C_TRIM, C_ZEROES, C_STATUS, C_CACHE):
        assert decode(kind, length=2**32 - 1).status == 0


def test_a_32_mib_write_is_taken_and_its_buffer_given_back() -> None:
    stream = RequestStream(allocation_context=True)
    data = random.Random(1).randbytes(32 << 20)
    (command,) = feed(stream, client.request(C_WRITE, 1, 0, len(data), data=data))
    assert command.payload == data
    assert len(stream.receive_buffer()) == BUFFER_BYTES


def test_a_longer_write_is_refused_and_drained() -> None:
    stream = RequestStream(allocation_context=True)
    data = bytes((32 << 20) + 1)
    first, second = feed(
        stream,
        client.request(C_WRITE, 1, 0, len(data), data=data) + client.request(C_READ, 2, 0, 1),
    )
    assert (first.status, first.payload) == (Status.INVALID_FIELD, None)
    assert (second.cookie, second.status) == (2, 0)


def test_a_huge_write_is_refused_before_its_payload_arrives() -> None:
    stream = RequestStream(allocation_context=True)
    (command,) = feed(stream, client.request(C_WRITE, 1, 0, 2**32 - 1))
    assert command.status == Status.INVALID_FIELD


def test_nothing_after_disc_is_looked_at() -> None:
    stream = RequestStream(allocation_context=True)
    commands = feed(
        stream,
        client.request(C_READ, 1, 0, 1) + client.request(C_DISC) + client.request(C_READ, 2, 0, 1),
    )
    assert [command.cookie for command in commands] == [1]
    assert stream.disconnecting


def test_what_came_before_a_wrong_magic_is_answered_first() -> None:
    stream = RequestStream(allocation_context=True)
    data = client.request(C_READ, 1, 0, 1) + client.request(C_READ, 2, 0, 1) + bytes(28)
    stream.receive_buffer()[: len(data)] = data
    stream.received(len(data))
    assert [command.cookie for command in stream.next_batch()] == [1, 2]
    with pytest.raises(ProtocolError):
        stream.next_batch()


def test_a_batch_asks_for_no_more_than_its_budget() -> None:
    """Nobody holds the event loop with a small packet of large requests."""
    reads = b"".join(client.request(C_READ, n, 0, 32 << 20) for n in range(100))
    statuses = b"".join(client.request(C_STATUS, n, 0, 4096) for n in range(100))
    for data, largest in ((reads, 1), (statuses, 8)):
        stream = RequestStream(allocation_context=True)
        stream.receive_buffer()[: len(data)] = data
        stream.received(len(data))
        sizes = []
        while batch := stream.next_batch():
            sizes.append(len(batch))
        assert (sum(sizes), max(sizes)) == (100, largest)


def test_a_refused_read_or_status_keeps_its_opcode_for_the_shape_of_its_reply() -> None:
    assert decode(C_READ, flags=F_NO_HOLE).opcode == READ
    assert decode(C_STATUS, flags=F_DF).opcode == GET_LBA_STATUS
    assert decode(C_WRITE, flags=F_DF, length=4).opcode == WRITE


def test_a_wrong_magic_is_a_protocol_error() -> None:
    stream = RequestStream(allocation_context=True)
    with pytest.raises(ProtocolError, match="0x11223344"):
        feed(stream, b"\x11\x22\x33\x44" + bytes(24))


def test_many_small_requests_come_in_bounded_batches_and_in_order() -> None:
    stream = RequestStream(allocation_context=True)
    data = b"".join(client.request(C_READ, cookie, 0, 1) for cookie in range(5000))
    assert [command.cookie for command in feed(stream, data)] == list(range(5000))


def feed_in_bulk(stream: RequestStream, data: bytes, cuts: list[int]) -> list[Command]:
    """As `feed`, but large writes are taken as the connection takes them."""
    found: list[Command] = []
    turn = 0
    while data:
        buffer = stream.receive_buffer()
        count = min(len(buffer), len(data), cuts[turn % len(cuts)])
        turn += 1
        buffer[:count] = data[:count]
        stream.received(count)
        data = data[count:]
        while batch := stream.next_batch():
            for command in batch:
                command.payload = None if command.payload is None else bytes(command.payload)
            found += batch
        if (bulk := stream.bulk_write) is not None:
            payload = bytes(stream.take_bulk_payload())
            rest = bulk.length - len(payload)
            bulk.payload, data = payload + data[:rest], data[rest:]
            found.append(bulk)
    return found


@given(
    st.lists(
        st.tuples(
            st.sampled_from([C_READ, C_WRITE, C_FLUSH]), st.sampled_from([16, 70_000, 300_000])
        ),
        max_size=8,
    ),
    st.lists(st.integers(1, 200_000), min_size=1, max_size=8),
)
def test_large_writes_taken_in_bulk_leave_the_stream_in_sync(
    some: list[tuple[int, int]], cuts: list[int]
) -> None:
    data = b""
    for cookie, (kind, length) in enumerate(some):
        payload = random.Random(cookie).randbytes(length) if kind == C_WRITE else b""
        length = 0 if kind == C_FLUSH else length
        data += client.request(kind, cookie, 0, length, data=payload)
    whole = feed(RequestStream(allocation_context=True), data)
    assert feed_in_bulk(RequestStream(allocation_context=True), data, cuts) == whole


def test_after_a_bulk_write_little_more_than_a_header_is_received() -> None:
    """So that the next payload can go straight into memory too."""
    stream = RequestStream(allocation_context=True)
    request = client.request(C_WRITE, 1, 0, 1 << 20, data=bytes(1 << 20))
    assert feed_in_bulk(stream, request, [5000])[0].payload == bytes(1 << 20)
    assert len(stream.receive_buffer()) <= 4096
    feed(stream, client.request(C_READ, 2, 0, 1))
    assert len(stream.receive_buffer()) == BUFFER_BYTES


def test_a_small_or_refused_write_is_never_taken_in_bulk() -> None:
    for kind, length in ((C_WRITE, 4096), (C_WRITE, 33 << 20), (C_READ, 1 << 20)):
        stream = RequestStream(allocation_context=True)
        feed(stream, client.request(kind, 1, 0, length))
        assert stream.bulk_write is None


requests = st.lists(
    st.tuples(
        st.sampled_from([C_READ, C_WRITE, C_FLUSH, C_TRIM, C_ZEROES, C_STATUS, 9]),
        st.one_of(st.integers(0, 300), st.integers(0, 9000)),
        st.integers(0, 2**64 - 1),
        st.sampled_from([0, F_FUA, F_DF]),
    ),
    max_size=12,
)


@given(requests, st.lists(st.integers(1, 9000), min_size=1, max_size=10), st.binary(max_size=40))
def test_any_split_of_the_stream_gives_the_same_requests(
    some: list[tuple[int, int, int, int]], cuts: list[int], leftover_from: bytes
) -> None:
    """Also when the handshake left the first bytes over."""
    data = b""
    for cookie, (kind, length, offset, flags) in enumerate(some):
        payload = random.Random(cookie).randbytes(length) if kind == C_WRITE else b""
        data += client.request(kind, cookie, offset, length, flags=flags, data=payload)
    whole = feed(RequestStream(allocation_context=True), data)
    over = len(leftover_from)
    split = RequestStream(allocation_context=True, leftover=data[:over])
    first = [
        Command(c.opcode, c.flags, c.offset, c.length, c.cookie,
                payload=None if c.payload is None else bytes(c.payload), status=c.status)
        for c in iter(split.next_batch())
    ]  # fmt: skip
    assert first + feed(split, data[over:], cuts) == whole
    assert len(whole) == len(some)


@given(st.binary(min_size=28, max_size=300))
def test_no_bytes_do_worse_than_a_protocol_error(junk: bytes) -> None:
    stream = RequestStream(allocation_context=True)
    try:
        feed(stream, junk)
    except ProtocolError:
        pass
