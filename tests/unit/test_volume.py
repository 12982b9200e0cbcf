"""A namespace over an array: the guard, batches, durability, and what becomes of who is cancelled.

`test_front_end_contract` has what holds for every kind of namespace.
"""

import errno
import random

import pytest
import trio
import trio.testing

from pmblk import Command, PmblkError
from pmblk.namespace import in_memory, memory_of
from pmblk.nvme.command import (
    ALLOCATE,
    DATASET_MANAGEMENT,
    FAST_ONLY,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    PREALLOCATE,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from pmblk.nvme.status import Status
from pmblk.raid.buffers import numbers
from pmblk.volume import READ_BYTES_MAX, WRITE_BYTES_MAX, Volume, _affordable, _grouped, running_of
from tests.unit.arrays import CHUNK, FakeRunning
from tests.unit.conftest import MakeNamespace, content, write

STRIPE = 3 * CHUNK


def volume(*, read_only: bool = False, level: int = 5, members: int = 4) -> Volume:
    running = FakeRunning(level=level, members=members)
    return Volume("array", running, lba_bytes=4096, read_only=read_only)


def running_behind(device: Volume) -> FakeRunning:
    running = running_of(device)
    assert isinstance(running, FakeRunning)
    return running


async def run(device: Volume, *commands: Command) -> list[int]:
    """To the end, as one client's batch; the statuses."""
    waiting = device.execute(commands)
    while waiting:
        waiting = await device.complete(waiting)
    device.release(commands)
    return [command.status for command in commands]


async def read(device: Volume, offset: int, length: int) -> bytes:
    command = Command(READ, 0, offset, length)
    assert await run(device, command) == [0]
    return content(command)


# ---- what is answered at once


def test_what_asks_nothing_of_the_members_is_answered_at_once() -> None:
    device = volume()
    extents = Command(GET_LBA_STATUS, 0, 4096, 8192)
    assert not device.execute(
        [
            extents,
            Command(PREFETCH, 0, 0, 4096),
            Command(PREALLOCATE, 0, 0, 4096),
            Command(DATASET_MANAGEMENT, 0, 1, 4096),
        ]
    )
    assert extents.extents is not None
    assert [(one.offset, one.length, one.hole) for one in extents.extents] == [(4096, 8192, False)]
    assert running_behind(device).array.asked == []


def test_fast_zeroes_are_not_promised() -> None:
    zero = Command(WRITE_ZEROES, FAST_ONLY, 0, 4096)
    assert not volume().execute([zero])
    assert zero.status == Status.FAST_ZERO_NOT_POSSIBLE


# ---- memory


async def test_a_payload_that_waits_is_the_volume_s_own_and_aligned() -> None:
    device = volume()
    buffer = bytearray(b"mine" * 1024)
    commands = [
        Command(WRITE, 0, at, size, payload=memoryview(buffer)[:size])
        for at, size in ((0, 4096), (8192, 5), (16384, 4096))
    ]
    waiting = device.execute(commands)
    buffer[:] = b"next" * 1024
    for command in waiting:
        assert numbers(memoryview(command.payload or b"")).ctypes.data % 4096 == 0
    await device.complete(waiting)
    assert await read(device, 0, 4096) == b"mine" * 1024
    assert await read(device, 8192, 5) == b"minem"
    assert await read(device, 16384, 4096) == b"mine" * 1024


async def test_a_write_that_is_received_into_its_window_is_not_copied() -> None:
    device = volume()
    command = Command(WRITE, 0, 4096, 3 * 4096)
    for part in (b"a" * 5000, b"b" * 7288):
        window = device.window(command)
        assert window is not None
        window[: len(part)] = part
        device.received(command, len(part))
    own = command.leases[0]
    rest = device.window(command)
    assert rest is not None
    assert not len(rest)
    (waiting,) = device.execute([command])
    assert waiting.payload is own
    await device.complete([waiting])
    assert await read(device, 4096, 3 * 4096) == b"a" * 5000 + b"b" * 7288


async def test_a_write_whose_rest_came_another_way_is_whole() -> None:
    device = volume()
    command = Command(WRITE, 0, 0, 8192)
    window = device.window(command)
    assert window is not None
    window[:5000] = b"a" * 5000
    device.received(command, 5000)
    command.payload = b"b" * 3192
    assert await run(device, command) == [0]
    assert await read(device, 0, 8192) == b"a" * 5000 + b"b" * 3192


def test_no_window_where_a_write_would_be_refused() -> None:
    assert volume(read_only=True).window(Command(WRITE, 0, 0, 4096)) is None
    device = volume()
    assert device.window(Command(WRITE, 0, device.size - 1, 4096)) is None


# ---- batches


async def test_writes_of_one_turn_are_one_batch_and_full_stripes_read_nothing() -> None:
    """As the FUSE engine completes them: each in a task of its own."""
    device = volume()
    running = running_behind(device)
    pieces = [write(at, bytes([at // 4096 + 1]) * 4096) for at in range(0, STRIPE, 4096)]
    waiting = device.execute(pieces)
    async with trio.open_nursery() as nursery:
        for command in waiting:
            nursery.start_soon(device.complete, [command])
    assert running.array.asked == [("write", len(pieces))]
    assert sum(member.reads for member in running.members) == 0
    assert await read(device, 0, STRIPE) == b"".join(bytes(one.payload or b"") for one in pieces)


async def test_a_flush_and_fua_share_one_flush_after_the_writes_of_their_batch() -> None:
    device = volume()
    commands = [
        Command(FLUSH, 0, 0, 0),
        write(0, bytes(4096)),
        write(8192, bytes(4096), FUA),
        Command(WRITE_ZEROES, FUA, 65536, 4096),
        Command(FLUSH, 0, 0, 0),
    ]
    assert await run(device, *commands) == [0] * 5
    asked = running_behind(device).array.asked
    assert asked.count(("write", 2)) == 1
    flushes = [number for number, what in enumerate(asked) if what[0] == "flush"]
    assert len(flushes) == 2, "one for the batch, one for the zeroes, which took their own time"
    assert flushes[0] > asked.index(("write", 2))
    assert flushes[1] > asked.index(("zero", 4096))
    counters = device.counters
    assert (counters.writes, counters.zeroes, counters.flushes, counters.errors) == (2, 1, 2, 0)


async def test_what_comes_while_a_batch_is_under_way_does_not_wait_for_it() -> None:
    device = volume()
    array = running_behind(device).array
    array.gate = trio.Event()
    first, second = device.execute([write(0, b"a" * 4096), write(STRIPE, b"b" * 4096)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.complete, [first])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(device.complete, [second])
        await trio.testing.wait_all_tasks_blocked()
        assert array.asked == [("write", 1), ("write", 1)]
        array.gate.set()


async def test_who_is_cancelled_takes_nothing_of_the_others_along() -> None:
    """Whether it leads the batch or not: its writes are done too."""
    for cancelled in (0, 1):
        device = volume()
        array = running_behind(device).array
        array.gate = trio.Event()
        commands = [write(at, b"x" * 4096) for at in (0, 4096)]
        scopes = [trio.CancelScope() for _ in commands]
        ended: list[int] = []

        async def complete(
            number: int,
            device: Volume = device,
            commands: list[Command] = commands,
            scopes: list[trio.CancelScope] = scopes,
            ended: list[int] = ended,
        ) -> None:
            with scopes[number]:
                await device.complete(device.execute([commands[number]]))
            ended.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(complete, number)
            await trio.testing.wait_all_tasks_blocked()
            assert array.asked == [("write", 2)]
            scopes[cancelled].cancel()
            await trio.testing.wait_all_tasks_blocked()
            array.gate.set()
        assert sorted(ended) == [0, 1]
        assert [command.status for command in commands] == [0, 0]
        assert await read(device, 0, 8192) == b"x" * 8192


async def test_a_defect_in_a_batch_is_a_success_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    device = volume()

    async def defect(_writes: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(running_behind(device).array, "write", defect)
    one = write(0, bytes(4096))
    with pytest.raises(ZeroDivisionError):
        await device.complete(device.execute([one]))
    assert one.status == Status.WRITE_FAULT


async def test_reads_go_side_by_side() -> None:
    device = volume()
    array = running_behind(device).array
    array.gate = trio.Event()
    waiting = device.execute([Command(READ, 0, at, 4096) for at in (0, 4096, 65536)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.complete, waiting)
        await trio.testing.wait_all_tasks_blocked()
        assert array.asked == [("read", 4096)] * 3
        array.gate.set()


def test_what_is_read_at_once_and_written_at_once_is_bounded() -> None:
    half = READ_BYTES_MAX // 2
    reads = [Command(READ, 0, 0, length) for length in (half, half, 1)]
    assert _affordable(reads) == reads[:2]
    assert _affordable([Command(READ, 0, 0, 3 * half), *reads])[0].length == 3 * half
    assert len(_affordable([Command(READ, 0, 0, 3 * half), *reads])) == 1
    writes = [Command(WRITE, 0, 0, length) for length in (WRITE_BYTES_MAX, 1, 1)]
    assert [len(group) for group in _grouped(writes)] == [1, 2]


# ---- zeroes


async def test_zeroes_and_discards_go_to_the_members_and_a_part_of_a_block_is_left() -> None:
    device = volume()
    await run(device, write(0, b"x" * 65536))
    assert await run(device, Command(DATASET_MANAGEMENT, 0, 1, 3 * 4096)) == [0]
    assert running_behind(device).array.asked[-1] == ("zero", 2 * 4096)
    assert await read(device, 0, 65536) == b"x" * 4096 + bytes(8192) + b"x" * (65536 - 12288)
    assert await run(device, Command(WRITE_ZEROES, 0, 1, 5)) == [0]
    assert await read(device, 0, 7) == b"x" + bytes(5) + b"x"


async def test_zeroes_that_must_take_space_are_written() -> None:
    device = volume()
    await run(device, write(0, b"x" * 65536))
    assert await run(device, Command(WRITE_ZEROES, ALLOCATE, 100, 60000)) == [0]
    assert running_behind(device).array.asked[-1] == ("write", 1)
    assert await read(device, 0, 65536) == b"x" * 100 + bytes(60000) + b"x" * (65536 - 60100)


# ---- failures


async def test_what_cannot_be_read_or_written_fails_and_the_rest_does_not() -> None:
    device = volume(level=0, members=3)
    running = running_behind(device)
    await run(device, write(0, b"x" * STRIPE))
    running.members[1].gone = True
    lost, there = Command(READ, 0, CHUNK, 4096), Command(READ, 0, 0, 4096)
    assert await run(device, lost, there) == [Status.UNRECOVERED_READ_ERROR, 0]
    bad, good = write(CHUNK, bytes(4096)), write(2 * CHUNK, bytes(4096))
    assert await run(device, bad, good) == [Status.WRITE_FAULT, 0]
    assert await run(device, Command(WRITE_ZEROES, 0, CHUNK, 4096)) == [Status.WRITE_FAULT]
    assert await run(device, Command(FLUSH, 0, 0, 0)) == [Status.WRITE_FAULT]
    assert device.examine()
    with pytest.raises(OSError, match="more members have failed than it can be without"):
        await device.flush()


async def test_one_member_that_fails_is_no_error_of_the_volume() -> None:
    device = volume()
    await run(device, write(0, b"x" * STRIPE))
    running_behind(device).members[1].gone = True
    assert await read(device, 0, STRIPE) == b"x" * STRIPE
    assert await run(device, write(CHUNK, b"y" * CHUNK, FUA)) == [0]
    assert await read(device, CHUNK, CHUNK) == b"y" * CHUNK
    assert (device.failure(), device.examine()) == ("", False)


async def test_a_full_member_is_no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    device = volume()

    async def full(writes: list[tuple[int, memoryview]]) -> list[OSError]:
        return [OSError(errno.ENOSPC, "full") for _ in writes]

    monkeypatch.setattr(running_behind(device).array, "write", full)
    assert await run(device, write(0, bytes(4096))) == [Status.CAPACITY_EXCEEDED]


# ---- what only the other kind has


async def test_what_needs_memory_says_that_an_array_has_none(
    make_namespace: MakeNamespace,
) -> None:
    device, namespace = volume(), make_namespace()
    assert (in_memory(device), in_memory(namespace)) == (None, namespace)
    with pytest.raises(PmblkError, match="array is an array: it has no page table; "):
        memory_of(device, "page table")
    with pytest.raises(PmblkError, match="ns is no array"):
        running_of(namespace)


# ---- everything at once


async def test_histories_of_several_clients_agree_with_a_model() -> None:
    """Each client has a range of its own; their batches mix in the volume."""
    for seed in range(6):
        device = volume(level=random.Random(seed).choice([0, 1, 5, 10]))
        async with trio.open_nursery() as nursery:
            for client in range(4):
                nursery.start_soon(_client, device, client, random.Random(seed * 4 + client))


async def _client(device: Volume, client: int, chosen: random.Random) -> None:
    room = device.size // 4
    start = client * room
    model = bytearray(room)
    for _ in range(30):
        commands: list[Command] = []
        position = 0
        while (gap := chosen.randint(0, 9000)) + position < room - 1 and len(commands) < 6:
            offset = position + gap
            length = min(chosen.choice([1, 512, 4096, 20000]), room - offset)
            position = offset + length
            commands.append(_something(start + offset, length, chosen))
        commands.append(Command(FLUSH, 0, 0, 0))
        waiting = device.execute(commands)
        while waiting:
            waiting = await device.complete(waiting)
        for command in commands:
            assert command.status == 0
            _compare(command, model, command.offset - start)
        device.release(commands)


def _something(offset: int, length: int, chosen: random.Random) -> Command:
    flags = chosen.choice([0, FUA])
    opcode = chosen.choice([READ, READ, WRITE, WRITE, WRITE_ZEROES])
    if opcode == WRITE:
        return write(offset, chosen.randbytes(length), flags)
    return Command(opcode, flags, offset, length)


def _compare(command: Command, model: bytearray, at: int) -> None:
    if command.opcode == READ:
        assert content(command) == model[at : at + command.length]
    elif command.opcode == WRITE:
        model[at : at + command.length] = bytes(command.payload or b"")
    elif command.opcode == WRITE_ZEROES:
        model[at : at + command.length] = bytes(command.length)
