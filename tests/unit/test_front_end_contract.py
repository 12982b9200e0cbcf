"""What every front end relies on, for every kind of namespace: in memory, and over an array.

Commands go as a front end sends them: executed, completed where they wait, released.
"""

import itertools
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmblk import BlockDevice, Command
from pmblk.media import create
from pmblk.nvme.command import (
    ALLOCATE,
    DATASET_MANAGEMENT,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    KEEP,
    PREALLOCATE,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from pmblk.nvme.status import Status
from pmblk.volume import Volume
from tests.unit import nbd_client as client
from tests.unit.arrays import FakeRunning
from tests.unit.conftest import MakeNamespace, content
from tests.unit.test_nbd_connection import go, receive_exactly, serving

EXAMPLES = int(os.environ.get("PMBLK_EXAMPLES", "25"))
KINDS = ("extent", "page-cache", "array")
EVERY_RANGED = (
    *(READ, WRITE, WRITE_ZEROES, DATASET_MANAGEMENT),
    *(GET_LBA_STATUS, PREFETCH, PREALLOCATE),
)
CHANGES = (WRITE, WRITE_ZEROES, DATASET_MANAGEMENT, PREALLOCATE)
PAST_THE_END = [(0, 1), (-1, 2), (None, 1), (None, 2**32 - 1)]  # from the end on; None: 2^64 - 1

MakeDevice = Callable[..., BlockDevice]


@pytest.fixture(params=KINDS)
def make_device(
    request: pytest.FixtureRequest, make_namespace: MakeNamespace, directory: Path
) -> MakeDevice:
    """Makes one of a kind, all zeroes, of 768 KiB."""

    numbers = itertools.count()  # hypothesis makes many of one fixture

    def make(*, read_only: bool = False) -> BlockDevice:
        if request.param == "array":
            return Volume("ns", FakeRunning(), lba_bytes=512, read_only=read_only)
        size = FakeRunning().size
        if read_only:  # its file has to be there
            create(directory / "read-only.img", size)
            return make_namespace(size, kind=request.param, name="read-only.img", read_only=True)
        return make_namespace(size, kind=request.param, name=f"{next(numbers)}.img")

    return make


def command(opcode: int, offset: int = 0, length: int = 4096, flags: int = 0) -> Command:
    payload = b"x" * min(length, 1 << 20) if opcode == WRITE else None
    return Command(opcode, flags, offset, length, payload=payload)


async def finish(device: BlockDevice, *commands: Command) -> list[int]:
    """As a connection does, and their statuses. What was read stays to be looked at."""
    waiting = device.execute(commands)
    while waiting:
        waiting = await device.complete(waiting)
    return [one.status for one in commands]


async def run(device: BlockDevice, *commands: Command) -> list[int]:
    try:
        return await finish(device, *commands)
    finally:
        device.release(commands)


async def read(device: BlockDevice, offset: int, length: int) -> bytes:
    one = command(READ, offset, length)
    assert await finish(device, one) == [0]
    found = content(one)
    device.release([one])
    return found


# ---- the guard


@pytest.mark.parametrize(("opcode", "span"), list(itertools.product(EVERY_RANGED, PAST_THE_END)))
async def test_every_command_past_the_end_is_out_of_range(
    make_device: MakeDevice, opcode: int, span: tuple[int | None, int]
) -> None:
    device = make_device()
    offset = 2**64 - 1 if span[0] is None else device.size + span[0]
    assert await run(device, command(opcode, offset, span[1])) == [Status.LBA_OUT_OF_RANGE]
    assert device.counters.errors == 1


@pytest.mark.parametrize("opcode", EVERY_RANGED)
async def test_every_command_of_length_zero_succeeds_and_does_nothing(
    make_device: MakeDevice, opcode: int
) -> None:
    one = command(opcode, 0, 0)
    device = make_device()
    assert not device.execute([one])
    assert one.status == 0


@pytest.mark.parametrize("opcode", CHANGES)
async def test_nothing_changes_a_read_only_namespace(make_device: MakeDevice, opcode: int) -> None:
    device = make_device(read_only=True)
    assert await run(device, command(opcode)) == [Status.NAMESPACE_WRITE_PROTECTED]
    assert await run(device, command(FLUSH, 0, 0)) == [0]
    assert await read(device, 0, 4096) == bytes(4096)


async def test_a_command_judged_by_its_front_end_is_left_alone(make_device: MakeDevice) -> None:
    refused = Command(0xFF, 0, 0, 0, status=Status.INVALID_FIELD)
    assert await run(make_device(), refused) == [Status.INVALID_FIELD]


async def test_an_unknown_opcode_is_refused(make_device: MakeDevice) -> None:
    assert await run(make_device(), command(0x77)) == [Status.INVALID_OPCODE]


# ---- the data


async def test_payloads_are_the_front_end_s_again_after_execute(make_device: MakeDevice) -> None:
    device = make_device()
    buffer = bytearray(b"mine" * 1024)
    one = Command(WRITE, FUA, 100, 4096, payload=memoryview(buffer))
    waiting = device.execute([one])
    buffer[:] = b"next" * 1024
    while waiting:
        waiting = await device.complete(waiting)
    assert await read(device, 100, 4096) == b"mine" * 1024


async def test_a_write_can_be_received_into_windows_where_there_are_some(
    make_device: MakeDevice,
) -> None:
    device = make_device()
    one = Command(WRITE, 0, 8192, 8192)
    if not device.has_windows:
        assert device.window(one) is None
        return
    for part in (b"a" * 4096, b"b" * 1000):
        window = device.window(one)
        assert window is not None
        assert len(window) == 8192 - one.received
        window[: len(part)] = part
        device.received(one, len(part))
    one.payload = b"c" * 3096  # the rest came another way
    assert await run(device, one) == [0]
    assert await read(device, 8192, 8192) == b"a" * 4096 + b"b" * 1000 + b"c" * 3096
    assert (device.counters.writes, device.counters.write_bytes) == (1, 8192)


async def test_what_was_done_is_counted_once(make_device: MakeDevice) -> None:
    device = make_device()
    commands = [command(opcode) for opcode in EVERY_RANGED]
    assert await run(device, *commands, command(FLUSH, 0, 0)) == [0] * 8
    await device.flush()
    counters = device.counters
    assert (counters.reads, counters.read_bytes) == (1, 4096)
    assert (counters.writes, counters.write_bytes) == (1, 4096)
    assert (counters.zeroes, counters.zero_bytes) == (1, 4096)
    assert (counters.deallocations, counters.deallocated_bytes) == (1, 4096)
    assert (counters.flushes, counters.errors, counters.prp_entries) == (2, 0, 2)


ranges = st.tuples(
    st.one_of(st.integers(0, 786_431), st.integers(0, 191).map(lambda page: page * 4096)),
    st.one_of(st.integers(1, 20_000), st.sampled_from([512, 4096, 65536, 786_432])),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just(WRITE), ranges, st.sampled_from([0, FUA])),
        st.tuples(st.just(READ), ranges, st.just(0)),
        st.tuples(st.just(WRITE_ZEROES), ranges, st.sampled_from([0, FUA, ALLOCATE, KEEP])),
        st.tuples(st.just(DATASET_MANAGEMENT), ranges, st.just(0)),
        st.tuples(st.just(PREALLOCATE), ranges, st.sampled_from([0, FUA])),
        st.tuples(st.just(FLUSH), st.just((0, 0)), st.just(0)),
        st.tuples(st.just(GET_LBA_STATUS), ranges, st.just(0)),
    ),
    max_size=20,
)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=steps, seed=st.integers(0, 1000))
def test_any_history_holds_the_bytes_of_a_model(
    make_device: MakeDevice, history: list[tuple[int, tuple[int, int], int]], seed: int
) -> None:
    trio.run(_follow, make_device(), history, random.Random(seed))


async def _follow(
    device: BlockDevice,
    history: list[tuple[int, tuple[int, int], int]],
    chosen: random.Random,
) -> None:
    model = bytearray(device.size)
    for opcode, (offset, length), flags in history:
        length = min(length, device.size - offset)
        payload = chosen.randbytes(length) if opcode == WRITE else None
        one = Command(opcode, flags, offset, length, payload=payload)
        assert await finish(device, one) == [0]
        if opcode == READ:
            assert content(one) == model[offset : offset + length]
        elif payload is not None:
            model[offset : offset + length] = payload
        elif opcode == WRITE_ZEROES:
            model[offset : offset + length] = bytes(length)
        elif opcode == DATASET_MANAGEMENT:
            first, end = -(-offset // 4096) * 4096, (offset + length) // 4096 * 4096
            model[first:end] = bytes(max(0, end - first))
            edges = await _discarded(device, offset, length)
            model[offset : offset + length] = edges
            assert not any(edges[first - offset : max(first, end) - offset])
        elif opcode == GET_LBA_STATUS:
            assert sum(extent.length for extent in one.extents or ()) == length
        device.release([one])
    assert await read(device, 0, device.size) == model


async def _discarded(device: BlockDevice, offset: int, length: int) -> bytes:
    """A discard is a hint: what it leaves of a part of a block is its own affair."""
    return await read(device, offset, length)


# ---- over NBD


async def test_a_connection_writes_and_reads_it_also_in_bulk(make_device: MakeDevice) -> None:
    device = make_device()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    data = random.Random(1).randbytes(300_000)
    with trio.socket.from_stdlib_socket(theirs) as sock:
        async with serving(device, ours):
            await go(sock)
            stream = trio.SocketStream(sock)
            for kind, offset, length, payload in (
                (1, 4096, len(data), data),  # bulk: received into a window
                (1, 5000, 10, b"0123456789"),
                (3, 0, 0, b""),
            ):
                await stream.send_all(client.request(kind, 7, offset, length, data=payload))
                assert await receive_exactly(sock, 16) == client_reply(7)
            await stream.send_all(client.request(0, 8, 4096, len(data)))
            assert await receive_exactly(sock, 16) == client_reply(8)
            expected = data[:904] + b"0123456789" + data[914:]
            assert await receive_exactly(sock, len(data)) == expected
            await stream.send_all(client.request(2))


def client_reply(cookie: int) -> bytes:
    return (0x67446698).to_bytes(4, "big") + bytes(4) + cookie.to_bytes(8, "big")
