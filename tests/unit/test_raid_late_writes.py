"""A write of a member that is under way when its caller is cancelled lands over nothing newer."""

import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from pmblk.raid.areas import checksums_bytes
from pmblk.raid.bad_block_log import HALF_BYTES, decode
from pmblk.raid.bad_blocks import remembering
from pmblk.raid.buffers import buffer
from pmblk.raid.checksummed import Checksummed
from pmblk.raid.journal import MARK_SLOTS, decode_mark, mark_offset
from pmblk.raid.member import Request
from pmblk.raid.superblock import BAD_BLOCKS_OFFSET, DATA_OFFSET
from tests.unit import write_hole_world
from tests.unit.late_member import LateMember
from tests.unit.raid_world import World

BLOCK = 4096
Work = Callable[[], Awaitable[Any]]


async def cancelled_in_a_write(member: LateMember, first: Work, then: Work) -> None:
    """`first` is cancelled while the member writes for it; what it writes lands after `then` has
    gone as far as it can.
    """
    scope = trio.CancelScope()

    async def cancellable() -> None:
        with scope:
            await first()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            member.hold(nursery)
            nursery.start_soon(cancellable)
            await member.entered.wait()
            scope.cancel()
            nursery.start_soon(then)
            await trio.testing.wait_all_tasks_blocked()
            member.go_on.set()


def late(size: int = DATA_OFFSET + (1 << 20)) -> LateMember:
    return LateMember(size, random.Random(1), name="m0")


@pytest.mark.parametrize("shape", [{"level": 1, "members": 2}, {"level": 5, "members": 4}])
async def test_a_block_that_a_cancelled_read_healed_holds_what_was_written_after_it(
    shape: dict[str, Any],
) -> None:
    world = World(1, **shape)
    await world.write((0, world.array.size))
    old = world.members[0]
    member = LateMember(old.size, world.chosen, name="late")
    member.content = old.content
    member.bad_blocks = {DATA_OFFSET // BLOCK}
    world.members[0] = world.array.devices.members[0] = member

    async def write() -> None:
        assert await world.write((0, BLOCK)) == [None]
        await world.array.flush()

    await cancelled_in_a_write(member, lambda: world.array.read(0, BLOCK), write)
    await world.check()
    world.assert_whole()


SUMS_OFFSET = DATA_OFFSET + BLOCK


def around(member: LateMember) -> Checksummed:
    """For one block of data."""
    return Checksummed(
        member, data_offset=DATA_OFFSET, member_bytes=BLOCK, checksums_offset=SUMS_OFFSET
    )


async def test_a_checksum_that_a_cancelled_read_stores_is_no_older_than_its_block() -> None:
    member, view = late(), buffer(BLOCK)
    checked = around(member)
    member.content[DATA_OFFSET] = 1
    checked.distrust([(DATA_OFFSET, BLOCK)])
    await cancelled_in_a_write(
        member,
        lambda: checked.read((Request(DATA_OFFSET, buffer(BLOCK)),)),
        lambda: checked.write((Request(DATA_OFFSET, view),)),
    )
    await around(member).read((Request(DATA_OFFSET, view),))
    assert bytes(view) == bytes(BLOCK)


async def test_a_copy_of_checksums_that_is_cancelled_is_no_older_than_the_checksums() -> None:
    member, view = late(), buffer(BLOCK)
    checked = around(member)
    view[0] = 1
    copy_offset = SUMS_OFFSET + checksums_bytes(BLOCK)
    await cancelled_in_a_write(
        member,
        lambda: checked.copy_sums(copy_offset),
        lambda: checked.write((Request(DATA_OFFSET, view),)),
    )
    sums, copied = (bytes(member.content[at : at + BLOCK]) for at in (SUMS_OFFSET, copy_offset))
    assert sums == copied != bytes(BLOCK)


async def test_a_log_of_lost_blocks_that_a_cancelled_flush_stores_forgets_no_later_loss() -> None:
    member = late()
    log = await remembering(member, data_offset=DATA_OFFSET)
    await log.lose(DATA_OFFSET, BLOCK)
    await log.write((Request(DATA_OFFSET, buffer(BLOCK)),))
    await cancelled_in_a_write(member, log.flush, lambda: log.lose(DATA_OFFSET + BLOCK, BLOCK))
    for half in range(2):
        start = BAD_BLOCKS_OFFSET + half * HALF_BYTES
        found, _ = decode(bytes(member.content[start : start + HALF_BYTES]))
        assert found == {DATA_OFFSET // BLOCK + 1}


async def test_a_mark_of_a_journal_lands_over_no_later_one() -> None:
    world = write_hole_world.World(1, level=5, members=4)
    await world.start()
    journal = world.array.journal
    assert journal is not None
    member = late(len(world.members[0].content))
    world.array.devices.members[0] = member

    async def renew() -> None:
        for _ in range(MARK_SLOTS):
            await journal.renew()

    await cancelled_in_a_write(member, journal.renew, renew)
    assert journal._mark is not None
    start = write_hole_world.JOURNAL[0] + mark_offset(journal._mark.session)
    assert decode_mark(bytes(member.content[start : start + BLOCK])) == journal._mark
