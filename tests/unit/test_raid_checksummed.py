"""Checksums of a member: lies are found, writes are never lost, and crashes are no lies."""

import errno
import random
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from pmblk.raid.areas import checksums_bytes
from pmblk.raid.buffers import buffer
from pmblk.raid.checksummed import Checksummed, sums_of
from pmblk.raid.layout import Stripes
from pmblk.raid.member import Request
from pmblk.raid.superblock import DATA_OFFSET
from pmblk.raid.sweep import Pace, Sweep
from tests.unit.raid_world import CHUNK, World
from tests.unit.sim_member import SimMember

BLOCK = 4096
DATA_BYTES = 9 << 20  # three blocks of checksums
SUMS_OFFSET = DATA_OFFSET + DATA_BYTES


def request(offset: int, length: int, chosen: random.Random | None = None) -> Request:
    """Of the data area; with random bytes to write, or empty memory to read into."""
    view = buffer(length)
    if chosen is not None:
        view[:] = chosen.randbytes(length)
    return Request(DATA_OFFSET + offset, view)


class Bench:
    def __init__(self, seed: int = 0, *, data_bytes: int = DATA_BYTES, cache: int = 2) -> None:
        self.chosen = random.Random(seed)
        size = DATA_OFFSET + data_bytes + checksums_bytes(data_bytes)
        self.sim = SimMember(size, self.chosen, name="m0")
        self.member = self.again(data_bytes, cache)
        self.model = bytearray(data_bytes)

    def again(self, data_bytes: int = DATA_BYTES, cache: int = 2) -> Checksummed:
        """As after a restart."""
        return Checksummed(
            self.sim,
            data_offset=DATA_OFFSET,
            member_bytes=data_bytes,
            checksums_offset=DATA_OFFSET + data_bytes,
            cache_blocks=cache,
        )

    async def write(self, offset: int, length: int) -> None:
        one = request(offset, length, self.chosen)
        await self.member.write((one,))
        self.model[offset : offset + length] = one.view

    async def read(self, offset: int, length: int, member: Checksummed | None = None) -> None:
        one = request(offset, length)
        await (member or self.member).read((one,))
        assert bytes(one.view) == bytes(self.model[offset : offset + length])

    def extent(self, *, within: int = DATA_BYTES, start: int = 0) -> tuple[int, int]:
        """Often around the ends of what a block of checksums is for."""
        near = self.chosen.choice([0, 4 << 20, 8 << 20, self.chosen.randrange(within)])
        offset = max(0, min(near - self.chosen.randrange(16 * BLOCK), within - BLOCK)) & -BLOCK
        offset = start + offset % within
        return offset, min(self.chosen.randint(1, 16) * BLOCK, start + within - offset)


async def test_a_new_sparse_member_reads_as_zeroes() -> None:
    bench = Bench()
    await bench.read(0, DATA_BYTES)
    assert not sums_of(buffer(3 * BLOCK)).any()


async def test_what_is_written_is_read_also_after_a_restart() -> None:
    for seed in range(3):
        bench = Bench(seed)
        for _ in range(60):
            offset, length = bench.extent()
            if bench.chosen.random() < 0.2:
                await bench.member.zero(DATA_OFFSET + offset, length)
                bench.model[offset : offset + length] = bytes(length)
            elif bench.chosen.random() < 0.5:
                await bench.write(offset, length)
            else:
                await bench.read(offset, length)
        await bench.read(0, DATA_BYTES)
        await bench.read(0, DATA_BYTES, bench.again())
        assert bench.member.mismatches == 0


async def test_a_flipped_bit_is_an_error_that_names_it_until_it_is_written() -> None:
    bench = Bench(1)
    await bench.write(0, 1 << 20)
    at = DATA_OFFSET + 7 * BLOCK
    bench.sim.content[at + 100] ^= 4
    for member in (bench.member, bench.again()):
        with pytest.raises(OSError, match=f"m0: byte {at} is not what was written") as caught:
            await bench.read(0, 1 << 20, member)
        assert caught.value.errno == errno.EILSEQ
        assert member.mismatches == 1
        await bench.read(0, 7 * BLOCK, member)
        await bench.read(8 * BLOCK, BLOCK, member)
    await bench.write(7 * BLOCK, BLOCK)
    await bench.read(0, 1 << 20)


async def test_a_misdirected_write_is_found_in_both_places() -> None:
    bench = Bench(2)
    await bench.write(0, 4 * BLOCK)
    content = bench.sim.content
    block = content[DATA_OFFSET : DATA_OFFSET + BLOCK]
    content[DATA_OFFSET + 2 * BLOCK : DATA_OFFSET + 3 * BLOCK] = block
    with pytest.raises(OSError, match=f"byte {DATA_OFFSET + 2 * BLOCK}"):
        await bench.read(0, 4 * BLOCK)


async def test_what_is_not_data_goes_straight_through() -> None:
    bench = Bench(3)
    one = Request(4096, buffer(BLOCK))
    one.view[:5] = b"hello"
    await bench.member.write((one,))
    bench.sim.content[4100] ^= 1
    other = Request(4096, buffer(BLOCK))
    await bench.member.read((other,))
    assert bytes(other.view[:5]) == bytes(bench.sim.content[4096:4101]) != b"hello"
    await bench.member.zero(4096, BLOCK)
    assert not any(bench.sim.content[4096:8192])


async def test_writes_that_share_a_block_of_checksums_lose_none() -> None:
    bench = Bench(4)
    offsets = [number * BLOCK for number in bench.chosen.sample(range(1024), 40)]
    async with trio.open_nursery() as nursery:
        for offset in offsets:
            nursery.start_soon(bench.write, offset, BLOCK)
            nursery.start_soon(bench.write, offset + (4 << 20), BLOCK)
    await bench.read(0, DATA_BYTES, bench.again())


async def test_a_read_beside_a_write_of_the_same_block_is_no_lie() -> None:
    bench = Bench(5)

    async def read() -> None:
        for _ in range(50):
            await bench.member.read((request(0, 16 * BLOCK),))

    async def write() -> None:
        for _ in range(50):
            await bench.write(bench.chosen.randrange(16) * BLOCK, BLOCK)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read)
            nursery.start_soon(write)
    assert bench.member.mismatches == 0
    await bench.read(0, DATA_BYTES, bench.again())


async def test_the_checksums_that_are_kept_are_bounded() -> None:
    bench = Bench(6, cache=1)
    for offset in (0, 4 << 20, 8 << 20, 0):
        await bench.write(offset, 2 * BLOCK)
        assert len(bench.member._cache) == 1
    await bench.read(0, DATA_BYTES)
    assert len(bench.member._cache) == 1


# ---- crashes


class Torn(Exception):
    pass


async def torn_write(bench: Bench, one: Request, blocks: Sequence[bool]) -> None:
    """A batch of which only these 4 KiB blocks reach the device, in the order of its requests."""
    before = bytes(bench.sim.content)
    after = bytearray(before)
    left = list(blocks)

    async def write(requests: Sequence[Request]) -> None:
        await trio.lowlevel.checkpoint()
        for offset, view in requests:
            for start in range(0, len(view), BLOCK):
                if left.pop(0):
                    after[offset + start : offset + start + BLOCK] = view[start : start + BLOCK]
        bench.sim.content[:] = after
        raise Torn

    bench.sim.write = write  # type: ignore[method-assign]
    with pytest.raises(Torn):
        await bench.member.write((one,))
    del bench.sim.write


@pytest.mark.parametrize("mask", range(8))
async def test_after_a_crash_what_was_being_written_is_read_as_it_is_and_trusted_again(
    mask: int,
) -> None:
    bench = Bench(7, data_bytes=1 << 20)
    await bench.write(0, 1 << 20)
    one = request(3 * BLOCK, 2 * BLOCK, bench.chosen)
    await torn_write(bench, one, [bool(mask >> bit & 1) for bit in range(3)])
    bench.model[:] = bench.sim.content[DATA_OFFSET : DATA_OFFSET + (1 << 20)]
    bench.member = member = bench.again(1 << 20)
    member.distrust([(DATA_OFFSET + 2 * BLOCK, 5 * BLOCK)])
    await bench.read(0, 1 << 20)  # as a resync does
    assert member.mismatches == 0
    assert not member._distrusted
    await bench.read(0, 1 << 20, bench.again(1 << 20))
    bench.sim.content[DATA_OFFSET + 3 * BLOCK] ^= 1
    with pytest.raises(OSError, match="not what was written"):
        await bench.read(3 * BLOCK, BLOCK)


async def test_doubt_does_not_reach_beyond_its_ranges_and_ends_with_a_write() -> None:
    bench = Bench(8)
    await bench.write(0, 8 * BLOCK)
    bench.sim.content[DATA_OFFSET + 4 * BLOCK] ^= 1
    bench.member.distrust([(0, DATA_OFFSET + 4 * BLOCK), (DATA_OFFSET + 5 * BLOCK, BLOCK)])
    with pytest.raises(OSError, match=f"byte {DATA_OFFSET + 4 * BLOCK}"):
        await bench.read(0, 8 * BLOCK)
    bench.member.distrust([(DATA_OFFSET, DATA_BYTES)])
    await bench.write(0, 4 << 20)
    await bench.member.zero(DATA_OFFSET + (4 << 20), DATA_BYTES - (4 << 20))
    assert not bench.member._distrusted


async def test_a_failed_write_leaves_either_version_and_no_error() -> None:
    bench = Bench(9)
    await bench.write(0, 4 * BLOCK)
    bench.sim.refuses_writes = True
    with pytest.raises(OSError, match="refused"):
        await bench.member.write([request(n * BLOCK, BLOCK, bench.chosen) for n in range(4)])
    bench.sim.refuses_writes = False
    await bench.member.read((request(0, 4 * BLOCK),))
    assert bench.member.mismatches == 0


class HalfZeroed(SimMember):
    """Zeroes a part of what it is to zero, and fails; or all of it, and takes no write then."""

    done = 1.0
    refuses_sums = False

    async def zero(self, offset: int, length: int) -> None:
        await super().zero(offset, int(length * self.done) // BLOCK * BLOCK)
        if not self.refuses_sums:
            raise OSError(errno.EIO, "not all of it")

    async def write(self, requests: Sequence[Request]) -> None:
        if self.refuses_sums:
            raise OSError(errno.EIO, "no sums")
        await super().write(requests)


@pytest.mark.parametrize(("done", "refuses_sums"), [(0.0, False), (0.5, False), (1.0, True)])
async def test_zeroing_that_failed_leaves_either_version_and_no_error(
    done: float, refuses_sums: bool
) -> None:
    bench = Bench(11)
    bench.sim = sim = HalfZeroed(bench.sim.size, bench.chosen, name="m0")
    bench.member = bench.again()
    for offset, length in ((0, 8 * BLOCK), ((4 << 20) - 4 * BLOCK, 8 * BLOCK)):
        await bench.write(offset, length)
        sim.done, sim.refuses_sums = done, refuses_sums
        with pytest.raises(OSError, match="no sums" if refuses_sums else "not all of it"):
            await bench.member.zero(DATA_OFFSET + offset, length)
        sim.refuses_sums = False
        view = buffer(length)
        for _ in range(2):
            await bench.member.read((Request(DATA_OFFSET + offset, view),))
        await bench.again().read((Request(DATA_OFFSET + offset, view),))
        zeroed = int(length * done)
        assert not bytes(view[:zeroed]).strip(b"\0")
        assert bytes(view[zeroed:]) == bytes(bench.model[offset + zeroed : offset + length])
    assert bench.member.mismatches == 0


async def test_where_nothing_can_be_zeroed_nothing_is_in_doubt() -> None:
    bench = Bench(12)
    await bench.write(0, 4 * BLOCK)
    bench.sim.cannot_zero = True
    with pytest.raises(OSError, match="no way but writing"):
        await bench.member.zero(DATA_OFFSET, 4 * BLOCK)
    await bench.read(0, 4 * BLOCK)
    bench.sim.content[DATA_OFFSET] ^= 1
    with pytest.raises(OSError, match="is not what was written"):
        await bench.read(0, BLOCK)


# ---- under an array


@pytest.mark.parametrize(("level", "members"), [(1, 2), (5, 4), (6, 5), (10, 4)])
async def test_an_array_makes_up_for_a_lie_and_a_check_names_it(level: int, members: int) -> None:
    world = World(10, level=level, members=members, checksums=True)
    await world.write((0, world.array.size))
    at = DATA_OFFSET + CHUNK + 4096
    world.members[1].content[at + 5] ^= 8
    checked = Sweep("check", world.array, pace=Pace())
    await checked.run()
    assert checked.status().findings == (
        "1 unreadable blocks made up for",
        f"4096 bytes made up for: m1 at byte {at}",
    )
    read = Stripes(world.geometry)[0].data[0] if world.geometry.parities else 0
    world.members[read].content[DATA_OFFSET + 77] ^= 1
    await world.check()
    again = Sweep("check", world.array, pace=Pace())
    await again.run()
    assert again.status().findings == ()
    assert world.announced == []
