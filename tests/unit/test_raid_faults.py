"""Members that hang, failures that cannot be announced, and ranges that become zero."""

import contextlib
import errno
import random
import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pmblk.raid import array as array_module
from pmblk.raid.array import Array
from pmblk.raid.geometry import Geometry
from pmblk.raid.member import Hung, Member
from pmblk.raid.opening import open_member
from pmblk.raid.superblock import DATA_OFFSET
from tests.unit.raid_world import CHUNK, SHAPES, World, name
from tests.unit.sim_member import SimMember
from tests.unit.test_raid_nbd_member import Server

REDUNDANT = [shape for shape in SHAPES if shape["level"]]


async def full_world(seed: int, **shape: Any) -> World:
    world = World(seed, **shape)
    assert await world.write((0, world.array.size)) == [None]
    return world


# ---- hangs


@pytest.mark.parametrize("shape", REDUNDANT, ids=name)
async def test_a_member_that_hangs_is_out_and_its_memory_is_nobodys(shape: dict[str, Any]) -> None:
    world = await full_world(1, **shape)
    slot = 0 if shape["level"] == 1 else 2  # one that has data in any layout
    world.members[slot].hangs = True
    await world.check()
    assert world.announced == [slot]
    assert world.members[slot].closed
    assert world.members[slot].late, "it was asked"
    await world.check()


@pytest.mark.parametrize("shape", REDUNDANT, ids=name)
async def test_a_write_that_has_to_read_from_a_member_that_hangs_starts_over(
    shape: dict[str, Any],
) -> None:
    world = await full_world(2, **shape)
    world.members[0].hangs = True
    for offset in range(0, world.array.size - CHUNK, CHUNK):  # no whole blocks: all of them read
        assert await world.write((offset + 100, 1000), (offset + 5000, 200)) == [None, None]
        for member in world.members:
            member.scribble()
    await world.check()
    assert world.announced == [0]


async def test_a_write_that_hangs_is_a_write_that_failed() -> None:
    world = await full_world(3, level=5, members=4)
    world.members[1].hangs = True
    assert await world.write((0, world.geometry.stripe_bytes)) == [None]
    assert world.announced == [1]
    await world.check()


async def test_what_the_array_cannot_be_without_is_eio_until_it_is_back() -> None:
    world = await full_world(4, level=0, members=3)
    world.members[1].hangs = True
    with pytest.raises(OSError, match="m1 does not answer in 30 s") as caught:
        await world.array.read(0, world.array.size)
    assert caught.value.errno == errno.EIO
    for extent in ((CHUNK, 4096), (CHUNK + 100, 100)):  # the second one reads before it writes
        (error,) = await world.array.write([(extent[0], memoryview(bytes(extent[1])))])
        assert error is not None
        assert error.errno == errno.EIO
    with pytest.raises(OSError, match="does not answer") as caught:
        await world.array.zero(0, world.array.size)
    assert caught.value.errno == errno.EIO
    assert world.announced == []
    world.members[1].hangs = False
    assert await world.write((0, world.array.size)) == [None]
    await world.check()


async def test_two_that_hang_at_once_are_both_out() -> None:
    world = await full_world(5, level=6, members=6)
    world.members[0].hangs = world.members[3].hangs = True
    await world.check()
    assert sorted(world.announced) == [0, 3]


class Silent(SimMember):
    """Its reads do not come back; it is given up after half a minute."""

    async def read(self, requests: Any) -> None:
        self.late += [view for _, view in requests]
        with trio.move_on_after(30):
            await trio.sleep_forever()
        raise Hung(self.place, 30)


def silence(world: World, slot: int) -> None:
    member = world.members[slot]
    world.members[slot] = silent = Silent(member.size, world.chosen, name=member.place)
    silent.content = member.content
    world.array.devices.members[slot] = silent


async def test_others_go_on_while_one_waits_for_a_member_that_hangs(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = await full_world(6, level=5, members=4)
    silence(world, 0)
    began, seconds = trio.current_time(), []

    async def read(offset: int) -> None:
        await world.check(offset, CHUNK)
        seconds.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for chunk in range(9):
            nursery.start_soon(read, chunk * CHUNK)
    assert set(seconds) == {0, 30}
    assert world.announced == [0]


async def test_a_hang_that_is_noticed_late_does_not_fail_who_sits_in_the_slot_now(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = await full_world(7, level=1, members=2)
    silence(world, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.check)
        await trio.testing.wait_all_tasks_blocked()
        gone = OSError(errno.EIO, "a write fails meanwhile")
        assert not await world.array.devices.fail({0: gone})
        new = SimMember(world.members[1].size, world.chosen, name="new")
        new.content = world.members[1].content
        world.array.devices.members[0] = new
    assert world.array.devices.members[0] is new
    assert world.announced == [0]


@contextlib.asynccontextmanager
async def arrays_over(
    directory: Path, server: Server
) -> AsyncIterator[tuple[Array, list[Member], list[int]]]:
    """A mirror of a file and an export, and which slots were announced."""
    path = directory / "member"
    path.write_bytes(bytes(4 << 20))
    members = [
        await open_member(server.uri, timeout_seconds=0.2),
        await open_member(str(path)),
    ]
    announced: list[int] = []

    async def announce(slot: int, _error: OSError) -> None:
        announced.append(slot)

    geometry = Geometry(level=1, members=2, member_bytes=2 << 20)
    array = Array(geometry, members, data_offset=1 << 20, announce=announce)
    yield array, members, announced
    array.close()


async def test_a_server_that_stands_still_is_no_more_than_a_lost_member(directory: Path) -> None:
    server = Server(directory, "memory", "4M")
    try:
        async with arrays_over(directory, server) as (array, _, announced):
            content = random.Random(1).randbytes(1 << 20)
            assert await array.write([(4096, memoryview(content))]) == [None]
            await array.flush()
            server.process.send_signal(signal.SIGSTOP)
            assert bytes(await array.read(4096, 1 << 20)) == content
            assert announced == [0]
            assert await array.write([(0, memoryview(content))]) == [None]
            server.process.send_signal(signal.SIGCONT)
            assert bytes(await array.read(0, 1 << 20)) == content
    finally:
        server.stop()


@pytest.mark.parametrize("inline", [(), (0,), (0, 1, 2), (0, 1, 2, 3)])
async def test_members_that_are_memory_and_others_take_part_in_one_round(
    inline: tuple[int, ...],
) -> None:
    world = World(23, level=5, members=4)
    for slot in inline:
        world.members[slot].inline = True
    for _ in range(20):
        assert await world.write(*(world.extent() for _ in range(3))) == [None] * 3
        await world.check()
    world.members[3].hangs = world.members[3].refuses_writes = True
    assert await world.write((0, world.array.size)) == [None]
    await world.check()
    assert world.announced == [3]


# ---- announcements


async def test_an_announcement_is_finished_also_when_its_caller_is_cancelled() -> None:
    world = await full_world(8, level=1, members=2)
    announcing, go_on = trio.Event(), trio.Event()

    async def announce(slot: int, error: OSError) -> None:
        announcing.set()
        await go_on.wait()
        world.announced.append(slot)

    world.array.devices._announce = announce
    world.members[0].hangs = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.array.read, 0, 4096)
        await announcing.wait()
        nursery.cancel_scope.cancel()
        go_on.set()
    assert world.announced == [0]


async def deaf_world(seed: int, **shape: Any) -> World:
    """One whose members cannot be told that one of them fails."""
    world = await full_world(seed, **shape)

    async def announce(_slot: int, _error: OSError) -> None:
        raise OSError(errno.EIO, "nobody can be told")

    world.array.devices._announce = announce
    return world


@pytest.mark.parametrize(("level", "members"), [(1, 3), (5, 4), (6, 5), (10, 4)])
async def test_nothing_counts_once_a_failure_could_not_be_announced_but_reads_go_on(
    level: int, members: int
) -> None:
    world = await deaf_world(9, level=level, members=members)
    before = bytes(world.model)
    world.members[0].refuses_writes = True
    for _ in range(2):
        errors = await world.array.write([(0, memoryview(before[: world.geometry.stripe_bytes]))])
        assert [str(error) for error in errors] == ["[Errno 5] nobody can be told"]
    with pytest.raises(OSError, match="nobody can be told"):
        await world.array.zero(0, world.array.size)
    with pytest.raises(OSError, match="nobody can be told"):
        await world.array.flush()
    world.members[1].bad_blocks.clear()
    await world.check()


async def test_reads_go_on_without_a_member_that_hangs_when_nobody_can_be_told() -> None:
    world = await deaf_world(10, level=5, members=4)
    world.members[2].hangs = True
    await world.check()
    errors = await world.array.write([(0, memoryview(bytes(4096)))])
    assert [str(error) for error in errors] == ["[Errno 5] nobody can be told"]


async def test_a_bad_sector_is_read_around_when_nothing_can_be_written_any_more() -> None:
    for level, members in ((1, 3), (6, 5)):
        world = await deaf_world(11, level=level, members=members)
        world.members[0].refuses_writes = True
        assert await world.array.write([(0, memoryview(bytes(world.model[:4096])))]) != [None]
        world.members[1].bad_blocks.add(DATA_OFFSET // 4096)
        await world.check()
        assert world.members[1].bad_blocks, "not healed: no write is allowed"


# ---- zeroes


def plain_world(seed: int, **shape: Any) -> World:
    world = World(seed, **shape)
    for member in world.members:
        member.cannot_zero = False
    return world


@pytest.mark.parametrize("shape", SHAPES, ids=name)
async def test_what_is_made_zero_whole_is_neither_read_nor_written(shape: dict[str, Any]) -> None:
    world = plain_world(12, **shape)
    await world.write((0, world.array.size))
    world.amplification()
    await world.zero(0, world.array.size)
    assert world.amplification() == (0, 0)
    await world.check()
    for member in world.members:
        assert not member.content[DATA_OFFSET:].strip(b"\0") or shape["level"] == 10


async def test_chunks_of_a_member_are_made_zero_in_one_go() -> None:
    for shape in (
        {"level": 0, "members": 3},
        {"level": 1, "members": 2},
        {"level": 5, "members": 4},
        {"level": 10, "members": 4},
    ):
        world = plain_world(13, **shape)
        await world.zero(0, world.array.size)
        whole = [(DATA_OFFSET, world.geometry.member_chunks * CHUNK)]
        assert [member.zeroed for member in world.members] == [whole] * len(world.members)


async def test_a_large_range_is_made_zero_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_module, "ZERO_BYTES", 4 * CHUNK)
    for shape in ({"level": 6, "members": 5}, {"level": 0, "members": 2}):
        world = plain_world(14, **shape)
        await world.write((0, world.array.size))
        await world.zero(CHUNK // 2, world.array.size - CHUNK)
        await world.check()
        for member in world.members:
            assert all(length <= 4 * CHUNK for _, length in member.zeroed)


async def test_the_ends_of_a_range_are_written_and_nothing_around_it_changes() -> None:
    for shape in SHAPES:
        world = World(15, **shape)
        await world.write((0, world.array.size))
        for unit in (1, 512, 4096):
            stripe = world.geometry.stripe_bytes
            await world.zero(stripe - unit, stripe + 2 * unit)
            await world.check()
            await world.zero(unit, unit)
            await world.check()


async def test_members_that_only_write_are_written_to() -> None:
    world = plain_world(16, level=5, members=4)
    await world.write((0, world.array.size))
    world.members[1].cannot_zero = True
    world.amplification()
    await world.zero(0, world.array.size)
    assert world.amplification() == (0, world.geometry.member_bytes)
    await world.check()
    assert world.announced == []


async def test_a_member_that_is_being_rebuilt_is_made_zero_as_a_whole() -> None:
    for shape in ({"level": 1, "members": 2}, {"level": 5, "members": 4}):
        world = plain_world(17, **shape)
        await world.write((0, world.array.size))
        world.array.devices.rebuilt[1] = 2
        world.members[1].content[DATA_OFFSET + 2 * CHUNK :] = b"?" * (
            world.members[1].size - DATA_OFFSET - 2 * CHUNK
        )
        await world.zero(0, world.array.size)
        await world.check()
        assert not world.members[1].content[DATA_OFFSET:].strip(b"\0")


async def test_zeroes_heal_bad_sectors_and_do_without_who_is_missing() -> None:
    world = plain_world(18, level=6, members=5)
    await world.write((0, world.array.size))
    world.members[0].gone = True
    world.members[1].bad_blocks.add(DATA_OFFSET // 4096)
    await world.zero(0, world.array.size)
    assert world.announced == [0]
    assert not world.members[1].bad_blocks
    await world.check()


async def test_a_member_that_fails_at_zeroes_is_out_before_they_count() -> None:
    for switch in ("refuses_writes", "hangs", "gone"):
        world = plain_world(19, level=5, members=4)
        await world.write((0, world.array.size))
        setattr(world.members[2], switch, True)
        await world.zero(0, world.array.size)
        assert world.announced == [2]
        await world.check()


async def test_only_who_says_that_there_is_no_better_way_is_written_to() -> None:
    world = plain_world(19, level=5, members=4)
    await world.write((0, world.array.size))
    world.amplification()

    async def zero(_offset: int, _length: int) -> None:
        raise OSError(errno.EIO, "failed")

    world.members[2].zero = zero  # type: ignore[assignment, method-assign]
    await world.zero(0, world.array.size)
    assert world.announced == [2]
    assert world.amplification() == (0, 0)


async def test_zeroes_that_nobody_takes_are_an_error() -> None:
    world = plain_world(20, level=0, members=2)
    world.members[0].refuses_writes = True
    with pytest.raises(OSError, match="refused"):
        await world.array.zero(0, world.array.size)


async def test_zeroes_are_intended_as_writes_are() -> None:
    marked: list[tuple[int, int]] = []

    class Intents:
        @contextlib.asynccontextmanager
        async def writing(self, ranges: Iterable[tuple[int, int]]) -> AsyncIterator[None]:
            found = list(ranges)
            marked.extend(found)
            yield
            for offset, length in found:
                assert not world.members[0].content[DATA_OFFSET + offset :][:length].strip(b"\0")

    world = plain_world(21, level=1, members=2)
    await world.write((0, world.array.size))
    world.array.intents = Intents()  # type: ignore[assignment]
    await world.zero(100, 3 * CHUNK)
    assert marked == [(100, 3 * CHUNK)]
    await world.array.zero(0, 0)
    assert len(marked) == 1


async def test_whoever_is_cancelled_leaves_whole_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_module, "ZERO_BYTES", CHUNK)
    world = plain_world(22, level=5, members=4)
    await world.write((0, world.array.size))
    with trio.CancelScope() as scope:
        zero = world.members[0].zero

        async def cancelling(offset: int, length: int) -> None:
            scope.cancel()
            await zero(offset, length)

        world.members[0].zero = cancelling  # type: ignore[method-assign]
        await world.array.zero(0, world.array.size)
    assert scope.cancelled_caught
    stripe = world.geometry.stripe_bytes
    world.model[:stripe] = bytes(stripe)
    await world.check()
