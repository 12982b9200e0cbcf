"""Lost blocks are errors until they are written, whatever a crash leaves of their log."""

import errno
import random
from collections.abc import Sequence

import pytest
import trio

from pmblk.errors import PmblkError
from pmblk.raid.bad_block_log import HALF_BYTES, RANGES_MAX, decode, encode, newest
from pmblk.raid.bad_blocks import BadBlocks, bad_blocks_of, forget, remembering
from pmblk.raid.buffers import buffer
from pmblk.raid.checksummed import Checksummed
from pmblk.raid.member import Request
from pmblk.raid.superblock import BAD_BLOCKS_BYTES, BAD_BLOCKS_OFFSET, DATA_OFFSET
from tests.unit.sim_member import SimMember

BLOCK = 4096
SIZE = DATA_OFFSET + (1 << 20)


def sim() -> SimMember:
    return SimMember(SIZE, random.Random(1), name="m0")


async def loaded(member: SimMember) -> BadBlocks:
    return await remembering(member, data_offset=DATA_OFFSET)


async def readable(member: BadBlocks) -> set[int]:
    """Blocks of the data area."""
    found = set()
    for block in range(DATA_OFFSET // BLOCK, SIZE // BLOCK):
        try:
            await member.read((Request(block * BLOCK, buffer(BLOCK)),))
        except OSError:
            continue
        found.add(block - DATA_OFFSET // BLOCK)
    return found


ALL = set(range((SIZE - DATA_OFFSET) // BLOCK))


def at(block: int) -> int:
    return DATA_OFFSET + block * BLOCK


async def test_what_is_lost_is_an_error_that_names_it_also_after_a_restart() -> None:
    device = sim()
    member = await loaded(device)
    assert await readable(member) == ALL
    await member.lose(at(3) + 100, BLOCK)  # parts of two blocks
    await member.lose(at(9), 2 * BLOCK)
    for again in (member, await loaded(device)):
        assert await readable(again) == ALL - {3, 4, 9, 10}
        assert again.count == 4
        with pytest.raises(OSError, match=f"m0: what was at byte {at(4)} is lost") as caught:
            await again.read((Request(at(4), buffer(5 * BLOCK)),))
        assert caught.value.errno == errno.EIO


async def test_a_write_or_zeroes_end_it_and_a_flush_makes_that_last() -> None:
    device = sim()
    member = await loaded(device)
    await member.lose(at(0), 6 * BLOCK)
    await member.write((Request(at(1), buffer(BLOCK)), Request(at(4), buffer(BLOCK))))
    await member.zero(at(5), 4 * BLOCK)
    assert await readable(member) == ALL - {0, 2, 3}
    assert await readable(await loaded(device)) == ALL - set(range(6)), "nobody flushed"
    await member.flush()
    assert await readable(await loaded(device)) == ALL - {0, 2, 3}
    assert member.count == 3


async def test_a_write_of_a_part_of_a_block_does_not_end_it() -> None:
    device = sim()
    member = await loaded(device)
    await member.lose(at(2), BLOCK)
    member._has_again(at(2) + 512, BLOCK - 512)
    assert member.count == 1


async def test_data_are_durable_before_the_log_forgets() -> None:
    """And what was lost meanwhile does not make it forget sooner."""
    device = sim()
    member = await loaded(device)
    await member.lose(at(0), 2 * BLOCK)
    await member.write((Request(at(0), buffer(BLOCK)),))
    await member.lose(at(7), BLOCK)
    assert await readable(await loaded(device)) == ALL - {0, 1, 7}
    order: list[str] = []
    flush, write = device.flush, device.write

    async def flushed() -> None:
        order.append("flush")
        await flush()

    async def written(requests: Sequence[Request]) -> None:
        order.append("log")
        await write(requests)

    device.flush, device.write = flushed, written  # type: ignore[method-assign]
    await member.flush()
    assert order == ["flush", "log", "flush", "log", "flush"]


async def test_what_is_written_during_a_flush_stays_on_the_log_until_the_next_one() -> None:
    device = sim()
    member = await loaded(device)
    await member.lose(at(0), 2 * BLOCK)
    await member.write((Request(at(0), buffer(BLOCK)),))
    flush = device.flush

    async def flushed() -> None:
        device.flush = flush  # type: ignore[method-assign]
        await flush()
        await member.write((Request(at(1), buffer(BLOCK)),))

    device.flush = flushed  # type: ignore[method-assign]
    await member.flush()
    assert await readable(member) == ALL
    assert await readable(await loaded(device)) == ALL - {1}
    await member.flush()
    assert await readable(await loaded(device)) == ALL


async def test_a_full_log_takes_no_more_and_keeps_what_it_has() -> None:
    device = sim()
    blocks = {2 * number for number in range(RANGES_MAX)}
    assert decode(encode(blocks, 7)) == (blocks, 7)
    member = BadBlocks(device, data_offset=DATA_OFFSET, blocks=blocks, sequence=0)
    with pytest.raises(OSError, match="too much is lost") as caught:
        await member.lose(at(2 * RANGES_MAX + 1), BLOCK)
    assert caught.value.errno == errno.ENOSPC
    assert member.count == RANGES_MAX


async def test_every_torn_write_of_the_log_leaves_what_was_said_before_or_after() -> None:
    """The log of a first loss, of a second one, and of blocks that were written again."""
    device = sim()
    for step in range(3):
        member = await loaded(device)
        before = set(member._blocks)
        writes = await recorded(device, member, step)
        after = set(member._blocks)
        assert before != after
        image = bytearray(writes[0][0])
        for content, offset, data in writes:
            for length in range(0, len(data) + 1, 512):
                image[:] = content
                image[offset : offset + length] = data[:length]
                area = bytes(image[BAD_BLOCKS_OFFSET : BAD_BLOCKS_OFFSET + BAD_BLOCKS_BYTES])
                assert newest(area)[0] in (before, after)
        assert (await loaded(device))._blocks == after


async def recorded(
    device: SimMember, member: BadBlocks, step: int
) -> list[tuple[bytes, int, bytes]]:
    """What the device held before each write of the log, and the write."""
    writes: list[tuple[bytes, int, bytes]] = []
    write = device.write

    async def recording(requests: Sequence[Request]) -> None:
        for offset, view in requests:
            if offset < DATA_OFFSET:
                writes.append((bytes(device.content), offset, bytes(view)))
        await write(requests)

    device.write = recording  # type: ignore[method-assign]
    if step < 2:
        await member.lose(at(10 * step), 3 * BLOCK)
    else:
        await member.write((Request(at(1), buffer(BLOCK)),))
        await member.flush()
    device.write = write  # type: ignore[method-assign]
    assert len(writes) == 2
    return writes


async def test_one_half_that_goes_bad_loses_nothing_and_both_are_a_clear_error() -> None:
    device = sim()
    await (await loaded(device)).lose(at(0), BLOCK)
    for half in range(2):
        saved = bytes(device.content)
        device.content[BAD_BLOCKS_OFFSET + half * HALF_BYTES + 70] ^= 1
        assert (await loaded(device)).count == 1
        device.content[:] = saved
    for half in range(2):
        device.content[BAD_BLOCKS_OFFSET + half * HALF_BYTES + 70] ^= 1
    with pytest.raises(PmblkError, match="m0: the log of its lost blocks cannot be used"):
        await loaded(device)
    await forget(device)
    assert (await loaded(device)).count == 0


async def test_losses_and_flushes_side_by_side_lose_none() -> None:
    device = sim()
    member = await loaded(device)

    async def work(first: int) -> None:
        for block in range(first, first + 20, 2):
            await member.lose(at(block), BLOCK)
            if block % 3 == 0:
                await member.write((Request(at(block), buffer(BLOCK)),))
                await member.flush()

    async with trio.open_nursery() as nursery:
        for first in (0, 20, 40):
            nursery.start_soon(work, first)
    await member.flush()
    gone = {block for block in range(0, 60, 2) if block % 3}
    assert await readable(member) == ALL - gone
    assert await readable(await loaded(device)) == ALL - gone


async def test_the_log_is_found_within_what_is_around_it() -> None:
    device = sim()
    member = await loaded(device)
    around = Checksummed(
        member, data_offset=DATA_OFFSET, member_bytes=BLOCK, checksums_offset=at(1)
    )
    assert bad_blocks_of(around) is member
    assert bad_blocks_of(device) is None
    around.close()
    assert device.closed
