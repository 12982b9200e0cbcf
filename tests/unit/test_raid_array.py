"""Arrays against a model, for every level: random writes, reads, failures and bad sectors."""

import errno
from collections.abc import Sequence
from typing import Any

import pytest
import trio
import trio.testing

from pmblk.raid import buffers
from pmblk.raid.intents import Intents
from pmblk.raid.layout import Stripes
from pmblk.raid.superblock import DATA_OFFSET
from tests.unit.raid_world import (
    CHUNK,
    SHAPES,
    World,
    lose_a_member,
    name,
    spoil_a_block,
)


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an array forgets to fill shows."""
    lend = buffers._Pool.lend

    def dirty(pool: buffers._Pool, length: int) -> memoryview:
        view = lend(pool, length)
        view[:] = b"\xdd" * len(view)
        return view

    monkeypatch.setattr(buffers._Pool, "lend", dirty)


@pytest.mark.parametrize("shape", SHAPES, ids=name)
async def test_what_is_written_is_read_also_with_every_loss_that_is_allowed(
    shape: dict[str, Any],
) -> None:
    for seed in range(4):
        world = World(seed, **shape)
        for _ in range(60):
            await _something_happens(world)
        await world.check()


async def _something_happens(world: World) -> None:
    chosen = world.chosen
    what = chosen.randrange(21)
    if what < 10:
        batch = [world.extent() for _ in range(chosen.choice([1, 1, 2, 5]))]
        assert await world.write(*batch) == [None] * len(batch)
    elif what < 16:
        await world.check(*world.extent())
    elif what == 16:
        await world.array.flush()
    elif what == 20:
        await world.zero(*world.extent())
    elif what == 17:
        lose_a_member(world)
    elif what == 18:
        spoil_a_block(world)
    else:
        await _two_at_once(world)


async def _two_at_once(world: World) -> None:
    """Two batches that touch the same rows, and not the same bytes, side by side."""
    size = world.array.size // 2
    left = [(offset, min(n, size - offset)) for offset, n in _within(world, size)]
    right = [(size + offset, min(n, size - offset)) for offset, n in _within(world, size)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.write, *left)
        nursery.start_soon(world.write, *right)


def _within(world: World, size: int) -> Sequence[tuple[int, int]]:
    return [(offset, n) for offset, n in (world.extent() for _ in range(4)) if offset < size]


@pytest.mark.parametrize("shape", SHAPES, ids=name)
async def test_all_that_is_lost_is_eio_and_the_rest_goes_on(shape: dict[str, Any]) -> None:
    """One loss more than the redundancy: nothing is made up, and what is whole is read."""
    world = World(5, **shape)
    await world.write((0, world.array.size))
    for member in world.members[: world.geometry.redundancy + 1]:
        member.gone = True
    whole = lost = 0
    for offset in range(0, world.array.size, 4096):
        try:
            found = await world.array.read(offset, 4096)
        except OSError:
            lost += 1
        else:
            assert bytes(found) == bytes(world.model[offset : offset + 4096])
            whole += 1
    assert lost
    assert whole or world.geometry.level == 1


async def test_a_bad_sector_is_healed_by_reading_it() -> None:
    for level, members in ((1, 2), (5, 4)):
        world = World(1, level=level, members=members)
        await world.write((0, world.array.size))
        world.members[0].bad_blocks.add(DATA_OFFSET // 4096)
        await world.check()
        assert not world.members[0].bad_blocks
        assert world.announced == []


@pytest.mark.parametrize(
    "shape", [{"level": 5, "members": 4}, {"level": 1, "members": 2}], ids=name
)
async def test_bad_sectors_in_different_blocks_of_one_row_are_no_loss(
    shape: dict[str, Any],
) -> None:
    world = World(2, **shape)
    assert await world.write((0, world.array.size)) == [None]
    first = DATA_OFFSET // 4096
    world.members[0].bad_blocks.add(first)
    world.members[1].bad_blocks.add(first + 1)
    await world.check()
    assert not world.members[0].bad_blocks
    assert not world.announced


async def test_a_member_that_refuses_a_write_is_announced_before_the_write_counts() -> None:
    for shape in (
        {"level": 1, "members": 2},
        {"level": 5, "members": 4},
        {"level": 6, "members": 5},
    ):
        world = World(2, **shape)
        world.members[1].refuses_writes = True
        assert await world.write((0, world.array.size)) == [None]
        assert world.announced == [1]
        assert world.members[1].closed
        await world.check()


@pytest.mark.parametrize(("level", "members"), [(1, 3), (5, 4)])
async def test_nothing_that_skips_a_failed_member_counts_before_that_is_announced(
    level: int, members: int
) -> None:
    """After a crash in between, the member that missed it would be taken for whole."""
    world = World(8, level=level, members=members)
    announcing, go_on = trio.Event(), trio.Event()

    async def announce(_slot: int, _error: OSError) -> None:
        announcing.set()
        await go_on.wait()

    world.array.devices._announce = announce
    world.members[1].refuses_writes = True
    done: list[str] = []

    async def write(offset: int) -> None:
        assert await world.write((offset, world.geometry.stripe_bytes)) == [None]
        done.append("written")

    async def flush() -> None:
        await world.array.flush()
        done.append("flushed")

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, 0)
            await announcing.wait()
            nursery.start_soon(write, world.geometry.stripe_bytes)
            nursery.start_soon(flush)
            await trio.testing.wait_all_tasks_blocked()
            assert done == []
            go_on.set()
    assert sorted(done) == ["flushed", "written", "written"]


async def test_a_write_that_no_member_takes_is_an_error() -> None:
    world = World(3, level=1, members=2)
    for member in world.members:
        member.refuses_writes = True
    (error,) = await world.write((0, 4096))
    assert error is not None
    assert len(world.announced) == 1, "the last one stays: it has what there is"


async def test_a_member_that_cannot_flush_is_out() -> None:
    world = World(4, level=5, members=4)
    await world.write((0, 4096))
    world.members[2].refuses_writes = True
    await world.array.flush()
    assert world.announced == [2]
    stripe = World(4, level=0, members=2)
    stripe.members[0].refuses_writes = True
    with pytest.raises(OSError, match="refused"):
        await stripe.array.flush()


@pytest.mark.parametrize(
    ("level", "members", "reads", "writes"),
    [(5, 5, 2, 2), (6, 8, 3, 3), (1, 3, 0, 3), (0, 3, 0, 1)],
)
async def test_a_small_write_moves_what_the_theory_says(
    level: int, members: int, reads: int, writes: int
) -> None:
    world = World(6, level=level, members=members)
    await world.write((4096, 4096))
    assert world.amplification() == (reads * 4096, writes * 4096)


async def test_neighbours_of_one_batch_are_full_stripes() -> None:
    world = World(7, level=5, members=5)
    stripe = world.geometry.stripe_bytes
    await world.write(*((offset, 4096) for offset in range(0, stripe, 4096)))
    assert world.amplification() == (0, stripe + CHUNK)


@pytest.mark.parametrize(("level", "lost"), [(4, 1), (5, 1), (6, 1), (6, 2)])
async def test_a_long_degraded_read_reads_no_more_than_a_whole_one(level: int, lost: int) -> None:
    world = World(1, level=level, members=6)
    await world.write((0, world.array.size))
    for slot in range(1, 1 + lost):
        await world.array.devices.fail({slot: OSError(errno.EIO, "gone")})
    world.amplification()
    await world.check()
    assert world.amplification() == (world.array.size, 0)


async def test_a_part_of_a_degraded_row_takes_only_those_bytes_of_the_others() -> None:
    world = World(1, level=5, members=4)
    await world.write((0, world.array.size))
    await world.array.devices.fail({1: OSError(errno.EIO, "gone")})
    world.amplification()
    found = await world.array.read(0, CHUNK + 4096)  # slot 0, and half of the chunk in slot 1
    assert found == world.model[: CHUNK + 4096]
    assert world.amplification() == (CHUNK + 2 * 4096, 0)


async def test_what_is_missing_is_never_made_from_half_a_write() -> None:
    world = World(1, level=5, members=4)
    await world.write((0, world.array.size))
    await world.array.devices.fail({1: OSError(errno.EIO, "gone")})
    missing = slice(CHUNK, 2 * CHUNK)  # of the first row: slots 0 and 2 have the other chunks
    for turn in range(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.write, (0, CHUNK))
            for _ in range(turn % 10):
                await trio.lowlevel.checkpoint()
            found = await world.array.read(CHUNK, CHUNK)
            assert found == world.model[missing]


@pytest.mark.parametrize(("level", "members"), [(4, 6), (5, 6), (6, 8)])
async def test_what_is_written_where_parity_is_in_doubt_survives_a_loss(
    level: int, members: int
) -> None:
    """No resync has been there: parity is anything."""
    for chunk in range(7):
        world = World(9 + chunk, level=level, members=members)
        for member in world.members:
            member.content[DATA_OFFSET:] = world.chosen.randbytes(12 * CHUNK)
        row = world.geometry.stripe_bytes
        world.array.parity_in_doubt = [(3 * row, 100), (7 * row + 5, row), (row, row)]
        assert world.array.parity_in_doubt == [(3 * row, 100), (7 * row + 5, row), (row, row)]
        extents = [(number * row + chunk % (members - 2) * 4096, 4096) for number in (1, 3, 7, 8)]
        assert await world.write(*extents) == [None] * 4
        for offset, length in extents:
            number, start = divmod(offset, row)
            slot = Stripes(world.geometry)[number].data[start // CHUNK]
            world.array.devices.members[slot] = None
            await world.check(offset, length)
            world.array.devices.members[slot] = world.members[slot]


async def test_a_small_write_costs_more_only_while_parity_is_in_doubt() -> None:
    world = World(1, level=5, members=6)
    row = world.geometry.stripe_bytes
    for ranges, offset, members_read in (
        ([(0, row)], 0, 4),
        ([(0, row)], row, 2),
        ([(2 * row, 1), (0, 2 * row)], row, 4),
        ([(2 * row, 1), (0, 2 * row)], 2 * row, 4),
        ([(2 * row, 1), (0, 2 * row)], 3 * row, 2),
        ([(2 * row, row)], row, 2),
        ([], 0, 2),
    ):
        world.array.parity_in_doubt = ranges
        world.amplification()
        await world.write((offset, 4096))
        assert world.amplification() == (members_read * 4096, 2 * 4096)


async def test_a_write_that_cannot_be_marked_is_an_error_and_writes_nothing() -> None:
    async def store(_offset: int, _view: memoryview) -> None:
        raise OSError(errno.EIO, "nobody takes the mark")

    for shape in ({"level": 1, "members": 2}, {"level": 5, "members": 4}):
        world = World(1, **shape)
        await world.write((0, world.array.size))
        intents = Intents(size=world.array.size, region_bytes=CHUNK, store=store)
        world.array.intents = intents
        errors = await world.write((0, 512), (CHUNK, 4096))
        assert [str(error) for error in errors] == ["[Errno 5] nobody takes the mark"] * 2
        await world.check()
        world.assert_whole()
        assert not intents.has_failed


async def test_whatever_a_client_asks_for_is_seen_by_the_work_in_the_background() -> None:
    world = World(1, level=5, members=4)
    seen = [world.array.operations]
    for ask in (world.write((0, CHUNK)), world.array.read(0, CHUNK), world.zero(0, CHUNK)):
        await ask
        seen.append(world.array.operations)
    assert seen == sorted(set(seen)), "each of them counts"
