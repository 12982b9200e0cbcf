"""The journal at work: groups, sessions, members that fail, leave and come back, and its cost."""

import errno
import random
from typing import Any

import pytest
import trio
import trio.testing

from pmblk.raid.array import Array
from pmblk.raid.geometry import Geometry
from pmblk.raid.journal import decode_mark, mark_offset
from pmblk.raid.member import Request
from tests.unit.sim_member import SimMember
from tests.unit.write_hole_world import BLOCK, CHUNK, DATA_OFFSET, JOURNAL, ROWS, World

LEVEL_5 = {"level": 5, "members": 5}


async def made(seed: int = 1, **shape: Any) -> World:
    world = World(seed, **(shape or LEVEL_5))
    await world.start()
    return world


async def again(world: World) -> World:
    """After a crash in which no cache was lost."""
    world.images = [bytes(member.content) for member in world.members]
    await world.start()
    return world


def counted(world: World) -> tuple[int, int]:
    """Bytes written and flushes, of all members, since the last call."""
    found = sum(m.writes for m in world.members), sum(m.flushes for m in world.members)
    for member in world.members:
        member.writes = member.flushes = 0
    return found


# ---- what it costs


async def test_a_small_write_is_written_twice_with_a_header_for_each_member() -> None:
    """24 KiB of member writes for 4 KiB, where it is 8 KiB without a journal."""
    world = await made()
    await world.write(0, BLOCK)  # which begins the session
    counted(world)
    await world.write(4 * CHUNK, BLOCK)
    data_and_parity = 2
    assert counted(world) == (data_and_parity * (BLOCK + 2 * BLOCK), data_and_parity)


async def test_a_full_stripe_is_recorded_without_its_bytes() -> None:
    world = await made()
    await world.write(0, BLOCK)
    counted(world)
    await world.write(0, world.geometry.stripe_bytes)
    assert counted(world)[0] == 5 * (CHUNK + BLOCK)


async def test_a_full_stripe_of_a_degraded_array_is_recorded_with_its_bytes() -> None:
    """A torn one could not be mended."""
    world = await made()
    world.array.devices.members[0] = None
    await world.write(0, BLOCK)
    counted(world)
    await world.write(0, world.geometry.stripe_bytes)
    assert counted(world)[0] == 4 * (2 * CHUNK + BLOCK)


async def test_whoever_waits_meanwhile_is_recorded_together() -> None:
    world = await made()
    await world.write(0, BLOCK)
    counted(world)
    stripe = world.geometry.stripe_bytes
    async with trio.open_nursery() as nursery:
        for row in range(ROWS):
            nursery.start_soon(world.write, row * stripe, BLOCK)
    _, flushes = counted(world)
    assert flushes <= 2 + 5, "the first, and one for each member for all others"


async def test_zeroes_are_recorded_as_full_stripes() -> None:
    """Or an older record of what was there would come over them."""
    world = await made()
    await world.write(0, BLOCK)
    await world.write(world.geometry.stripe_bytes, world.geometry.stripe_bytes)
    for size in (world.geometry.stripe_bytes, world.array.size):
        await world.array.zero(0, size)
        world.promise.writing(0, bytes(size))
        world.promise.flushed()
        world = await again(world)
        assert await world.broken() == []
        await world.write(BLOCK, CHUNK)


# ---- sessions


async def test_a_log_that_is_full_is_begun_anew() -> None:
    world = await made()
    journal = world.array.journal
    assert journal is not None
    marks = set()
    for _ in range(40):
        await world.write(0, BLOCK)
        assert journal._mark is not None
        marks.add(journal._mark)
    assert 3 < len(marks) < 12
    assert len({mark.nonce for mark in marks}) == len(marks)
    world = await again(world)
    assert await world.broken() == []


async def test_more_than_the_log_holds_is_written_in_parts() -> None:
    world = await made(level=5, members=3)
    journal = world.array.journal
    assert journal is not None
    assert journal.payload_bytes_max < ROWS * CHUNK
    world.array.devices.members[1] = None
    await world.write(BLOCK, world.array.size - 2 * BLOCK)
    assert await world.broken() == []


async def test_a_session_ends_only_when_all_is_in_place() -> None:
    world = await made()
    journal = world.array.journal
    assert journal is not None
    ticket = await journal.record({0: [Request(DATA_OFFSET, memoryview(bytes(BLOCK)))]})
    done = trio.Event()

    async def renew() -> None:
        await journal.renew()
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(renew)
        await trio.testing.wait_all_tasks_blocked()
        assert not done.is_set()
        journal.written(ticket)
        await done.wait()


async def test_a_session_ends_between_writes_that_were_asked_for_before_and_after_that() -> None:
    """The last one is not recorded with the first: it would wait for its turn, and all for it."""
    world = await made()
    journal = world.array.journal
    assert journal is not None
    await world.write(0, BLOCK)
    stripe = world.geometry.stripe_bytes
    with trio.fail_after(10):
        # The lock is held as while another one is recorded.
        async with trio.open_nursery() as nursery, journal._recording:
            nursery.start_soon(world.write, 0, BLOCK)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(journal.renew)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(world.write, stripe, BLOCK)
            await trio.testing.wait_all_tasks_blocked()
    world = await again(world)
    assert await world.broken() == []


async def test_the_old_log_is_left_alone_until_the_new_mark_is_durable() -> None:
    world = await made()
    journal = world.array.journal
    assert journal is not None
    for _ in range(3):
        await journal.renew()
        assert journal._mark is not None
        start = JOURNAL[0] + mark_offset(journal._mark.session)
        for member in world.members:
            assert decode_mark(bytes(member.durable[start : start + BLOCK])) == journal._mark


async def test_a_member_that_comes_back_brings_no_old_record_along() -> None:
    """Its log has records of this very session, and what they say is over."""
    world = await made()
    await world.write(0, BLOCK)
    slot = next(n for n, one in enumerate(world.members) if any(one.content[DATA_OFFSET:]))
    world.array.devices.members[slot] = None
    world.lost.add(slot)
    await world.write(0, BLOCK)
    await world.flush()
    await world.take_back(slot)
    world = await again(world)
    assert await world.broken() == []


async def test_whoever_else_sits_in_a_slot_begins_a_session_by_writing() -> None:
    world = await made()
    journal, devices = world.array.journal, world.array.devices
    assert journal is not None
    await world.write(0, BLOCK)
    before = journal._mark
    await world.write(BLOCK, BLOCK)
    assert journal._mark == before
    copy = SimMember(world.members[0].size, random.Random(2))
    copy.content[:] = world.members[0].content
    devices.members[0] = copy
    await world.write(0, world.geometry.stripe_bytes)
    assert journal._mark != before


async def test_a_start_that_finds_an_old_mark_on_somebody_goes_by_the_newest() -> None:
    world = await made()
    await world.write(0, BLOCK)
    await world.flush()
    stale = bytes(world.members[2].content[: sum(JOURNAL)])
    await world.write(BLOCK, BLOCK)
    journal = world.array.journal
    assert journal is not None
    await journal.renew()
    world.images = [bytes(member.content) for member in world.members]
    world.images[2] = stale + world.images[2][len(stale) :]
    found = await world.start()
    assert found is not None
    assert found.replayed == 0
    assert await world.broken() == []


# ---- members that fail


@pytest.mark.parametrize("level", [5, 6])
async def test_who_does_not_take_a_record_is_out_and_the_write_goes_on(level: int) -> None:
    world = await made(level=level, members=5)
    await world.write(0, world.array.size)
    world.members[1].refuses_writes = True
    await world.write(0, world.array.size)
    assert world.lost == {1}
    assert await world.broken() == []
    world = await again(world)
    assert await world.broken() == []


async def test_a_write_whose_record_cannot_be_kept_is_an_error_and_never_replayed() -> None:
    """Later parity does not know of it."""
    world = await made(level=5, members=3)
    await world.write(0, world.array.size)
    await world.flush()
    world.array.devices.members[0] = None
    world.lost.add(0)
    world.members[1].refuses_writes = True  # and nobody can be without it
    refused = False
    row = 2 * world.geometry.stripe_bytes  # its parity is missing: each block is on one member
    for offset in range(row, row + world.geometry.stripe_bytes, BLOCK):
        data = world.chosen.randbytes(BLOCK)
        (error,) = await world.array.write([(offset, memoryview(data))])
        assert error is not None or not refused, "no write comes after one that was given up"
        refused = error is not None
        if not refused:
            world.promise.writing(offset, data)
            world.promise.flushed()
    assert refused
    assert world.lost == {0}
    world.members[1].refuses_writes = False
    assert await world.broken() == []
    await world.write(0, BLOCK)
    await world.write(2 * CHUNK, BLOCK)
    world = await again(world)
    assert await world.broken() == []


async def test_a_write_that_is_forsaken_while_it_waits_is_never_replayed() -> None:
    world = await made()
    journal = world.array.journal
    assert journal is not None
    await journal.renew()
    batch = {0: [Request(DATA_OFFSET, memoryview(b"x" * BLOCK))]}
    with trio.CancelScope() as scope:
        scope.cancel()
        await journal.record(batch)
    assert scope.cancelled_caught
    ticket = await journal.record(batch)
    journal.written(ticket)
    with trio.fail_after(10):
        await journal.renew()
    world = await again(world)
    assert await world.broken() == []


# ---- starts


async def test_a_start_replays_what_is_recorded_and_does_so_once() -> None:
    world = await made()
    await world.write(0, BLOCK)
    for member in world.members:  # nothing has arrived in place
        member.content[DATA_OFFSET:] = bytes(ROWS * CHUNK)
    world.images = [bytes(member.content) for member in world.members]
    found = await world.start()
    assert found is not None
    assert (found.replayed, found.ignored, found.blocks, found.lost) == (1, 0, 2, ())
    assert await world.broken() == []
    world.images = [bytes(member.content) for member in world.members]
    found = await world.start()
    assert found is not None
    assert found.replayed == 0


async def torn_full_stripe(level: int, slots: set[int], *, members: int = 5) -> World:
    """The first stripe was recorded, and has not arrived on these."""
    world = await made(level=level, members=members)
    await world.write(0, world.array.size)
    await world.flush()
    olds = [bytes(member.content) for member in world.members]
    await world.write(0, world.geometry.stripe_bytes)
    for slot in slots:
        row = slice(DATA_OFFSET, DATA_OFFSET + CHUNK)
        world.members[slot].content[row] = olds[slot][row]
    world.images = [bytes(member.content) for member in world.members]
    return world


@pytest.mark.parametrize(("level", "slots"), [(5, {2}), (5, {4}), (6, {0, 3}), (6, {1})])
async def test_a_full_stripe_that_has_almost_arrived_is_completed(
    level: int, slots: set[int]
) -> None:
    world = await torn_full_stripe(level, slots)
    expected = bytes(world.promise.content)
    found = await world.start()
    assert found is not None
    assert (found.mended, found.lost) == (CHUNK // BLOCK, ())
    assert bytes(await world.array.read(0, world.array.size)) == expected


@pytest.mark.parametrize("slots", [{0, 1}, {0, 1, 4}, {1, 2, 3}])
async def test_the_parity_of_a_torn_full_stripe_is_made_anew(slots: set[int]) -> None:
    world = await torn_full_stripe(5, slots)
    found = await world.start()
    assert found is not None
    assert found.mended == CHUNK // BLOCK
    assert await world.broken() == []
    for lost in world.losses():
        assert await world.same_without(lost)


async def test_what_a_lost_member_held_of_a_torn_full_stripe_is_an_error_until_it_is_written() -> (
    None
):
    world = await torn_full_stripe(5, {1, 2})
    world.lost = {0}
    found = await world.start()
    assert found is not None
    assert [(one.offset, one.length) for one in found.lost] == [(DATA_OFFSET, CHUNK)]
    blocks = await world._blocks()
    assert blocks.count(None) == CHUNK // BLOCK
    assert await world.broken() == []
    world.images = [bytes(member.content) for member in world.members]
    world.bad_blocks = [set(member.bad_blocks) for member in world.members]
    found = await world.start()
    assert found is not None
    assert found.lost, "it is found again, until somebody writes"
    await world.write(0, world.geometry.stripe_bytes)
    assert None not in await world._blocks()


async def test_a_durable_full_stripe_that_was_written_to_since_is_whole() -> None:
    """The checksums of its blocks that are still its own count, one by one."""
    world = await made()
    await world.write(0, world.geometry.stripe_bytes)
    await world.write(0, BLOCK)
    await world.write(CHUNK, 512)
    world.images = [bytes(member.content) for member in world.members]
    for lost in list(world.losses()):
        world.lost = set(lost)
        found = await world.start()
        assert found is not None
        assert (found.mended, found.lost) == (0, ())
        assert await world.broken() == []


@pytest.mark.parametrize("how", ["damaged", "unreadable"])
async def test_a_member_whose_journal_is_damaged_is_out(how: str) -> None:
    world = await made()
    await world.write(0, world.geometry.stripe_bytes)
    await world.write(0, world.geometry.stripe_bytes)
    log = JOURNAL[0] + 2 * BLOCK
    world.images = [bytes(member.content) for member in world.members]
    if how == "unreadable":
        world.bad_blocks[3] = {log // BLOCK}
    else:
        image = bytearray(world.images[3])
        image[log + 100] ^= 1
        world.images[3] = bytes(image)
    await world.start()
    assert world.lost == {3}
    assert await world.broken() == []


async def test_an_array_that_cannot_be_without_a_damaged_journal_does_not_start() -> None:
    world = await made()
    await world.write(0, world.geometry.stripe_bytes)
    world.images = [bytes(member.content) for member in world.members]
    world.bad_blocks[3] = {JOURNAL[0] // BLOCK}
    world.lost = {0}
    with pytest.raises(OSError, match="bad sector") as caught:
        await world.start()
    assert caught.value.errno == errno.EIO


async def test_a_journal_is_no_part_of_an_array_with_copies() -> None:
    geometry = Geometry(level=1, members=2, member_bytes=CHUNK, chunk_bytes=CHUNK)
    with pytest.raises(AssertionError, match="copies"):
        Array(
            geometry,
            [SimMember(1 << 20, random.Random(1)) for _ in range(2)],
            data_offset=DATA_OFFSET,
            announce=None,  # type: ignore[arg-type]
            journal=JOURNAL,
        )
