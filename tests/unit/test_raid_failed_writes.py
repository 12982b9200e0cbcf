"""A write that fails on a member that has to stay: nothing is made of what that one holds then."""

import errno
from collections.abc import Sequence
from typing import Any

import pytest

from pmblk.raid.bad_blocks import bad_blocks_of, remembering
from pmblk.raid.layout import Stripes
from pmblk.raid.member import Request
from pmblk.raid.replacing import Replacing
from pmblk.raid.superblock import DATA_OFFSET
from tests.unit.raid_world import CHUNK, World, name
from tests.unit.sim_member import SimMember

BLOCK = 4096
SHAPES: list[dict[str, Any]] = [
    {"level": 4, "members": 4},
    {"level": 5, "members": 4},
    {"level": 6, "members": 6},
]


class Refusing(SimMember):
    """May take no data, or nothing at all; of a batch that it refuses some is done."""

    refuses_data = False
    refuses_log = False

    async def write(self, requests: Sequence[Request]) -> None:
        data = [request for request in requests if request.offset >= DATA_OFFSET]
        if (self.refuses_data and data) or (self.refuses_log and not data):
            await super().write(requests[: self._chosen.randint(0, len(requests) - 1)])
            raise OSError(errno.EIO, "not this time")
        await super().write(requests)

    async def zero(self, offset: int, length: int) -> None:
        if self.refuses_data:
            raise OSError(errno.EIO, "not this time")
        await super().zero(offset, length)


async def written(seed: int, shape: dict[str, Any], *, logs: bool) -> tuple[World, list[Refusing]]:
    """All of it; nobody is missing."""
    world = World(seed, **shape)
    members = [Refusing(one.size, world.chosen, name=one.place) for one in world.members]
    world.members[:] = members
    for slot, one in enumerate(members):
        seated = await remembering(one, data_offset=DATA_OFFSET) if logs else one
        world.array.devices.members[slot] = seated
    assert await world.write((0, world.array.size)) == [None]
    return world, members


def lose_all_that_may_be_lost(world: World, stays: int) -> None:
    others = [slot for slot in range(world.geometry.members) if slot != stays]
    for slot in world.chosen.sample(others, world.geometry.redundancy):
        world.members[slot].gone = True
        world.array.devices.members[slot] = None


async def count_errors(world: World, but: range) -> int:
    """Of blocks; all others, outside of these bytes, hold what they should."""
    errors = 0
    for offset in range(0, world.array.size, BLOCK):
        try:
            found = await world.array.read(offset, BLOCK)
        except OSError:
            errors += 1
            continue
        assert offset in but or bytes(found) == bytes(world.model[offset : offset + BLOCK])
    return errors


async def fail_some_writes(seed: int, shape: dict[str, Any], **refuses: bool) -> tuple[World, int]:
    """The world, and the number of blocks that are errors afterwards."""
    logs = refuses.pop("logs")
    world, members = await written(seed, shape, logs=logs)
    slot = world.chosen.randrange(len(members))
    lose_all_that_may_be_lost(world, slot)
    for switch, on in refuses.items():
        setattr(members[slot], switch, on)
    row = world.geometry.stripe_bytes
    if seed % 3:
        length = world.chosen.choice([BLOCK, CHUNK, 2 * CHUNK])
        offset = world.chosen.randrange((2 * row - length) // BLOCK) * BLOCK
        await world.write((offset, length))
    else:
        offset, length = 0, 2 * row
        with pytest.raises(OSError, match="not this time"):
            await world.zero(offset, length)
    for switch in refuses:
        setattr(members[slot], switch, False)
    errors = await count_errors(world, range(offset, offset + length))
    assert world.announced == []
    return world, errors


async def rewritten(world: World) -> None:
    """As whole rows: then nothing is lost any more."""
    assert await world.write((0, world.array.size)) == [None]
    await world.check()


@pytest.mark.parametrize("logs", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
async def test_what_is_missing_is_an_error_and_never_made_up_after_a_failed_write(
    shape: dict[str, Any], logs: bool
) -> None:
    total = 0
    for seed in range(30):
        world, errors = await fail_some_writes(seed, shape, logs=logs, refuses_data=True)
        total += errors
        await rewritten(world)
        await world.array.flush()
        for member in world.array.devices.members:
            log = bad_blocks_of(member)
            assert log is None or log.count == 0
    assert total > 20


@pytest.mark.parametrize("shape", SHAPES, ids=name)
async def test_it_is_an_error_also_when_the_log_does_not_take_it(shape: dict[str, Any]) -> None:
    total = 0
    for seed in range(15):
        world, errors = await fail_some_writes(
            seed, shape, logs=True, refuses_data=True, refuses_log=True
        )
        total += errors
        await rewritten(world)
    assert total > 10


async def test_it_is_an_error_after_the_next_start_too() -> None:
    total = 0
    for seed in range(15):
        world, errors = await fail_some_writes(seed, SHAPES[1], logs=True, refuses_data=True)
        again = World(seed, **SHAPES[1])
        again.model, again.members = world.model, world.members
        for slot, member in enumerate(world.members):
            again.array.devices.members[slot] = (
                None if member.gone else await remembering(member, data_offset=DATA_OFFSET)
            )
        assert await count_errors(again, range(2 * again.geometry.stripe_bytes)) == errors
        total += errors
    assert total > 5


async def test_where_the_parity_is_what_is_missing_the_data_stay_readable() -> None:
    world, members = await written(1, {"level": 5, "members": 4}, logs=True)
    stripe = Stripes(world.geometry)[0]
    world.array.devices.members[stripe.p] = None
    members[stripe.data[0]].refuses_data = True
    before = bytes(world.model[:BLOCK])
    errors = await world.array.write([(0, memoryview(b"n" * BLOCK))])
    assert [str(error) for error in errors] == ["[Errno 5] not this time"]
    assert bytes(await world.array.read(0, BLOCK)) in (before, b"n" * BLOCK)
    await world.check(BLOCK, world.array.size - BLOCK)


async def test_nothing_is_made_up_when_nobody_can_be_told_of_the_failure() -> None:
    world, members = await written(2, {"level": 6, "members": 6}, logs=False)

    async def announce(_slot: int, _error: OSError) -> None:
        raise OSError(errno.EIO, "nobody can be told")

    world.array.devices._announce = announce
    stripe = Stripes(world.geometry)[0]
    world.array.devices.members[stripe.data[3]] = None
    for slot in (stripe.data[0], stripe.p):
        members[slot].refuses_data = True
    assert await world.array.write([(0, memoryview(b"n" * BLOCK))]) != [None]
    for slot in (stripe.data[0], stripe.p):
        members[slot].refuses_data = False
    await count_errors(world, range(BLOCK))


async def test_a_member_that_is_being_replaced_has_a_log_of_its_own() -> None:
    world, members = await written(3, {"level": 5, "members": 4}, logs=True)
    stripe = Stripes(world.geometry)[0]
    old = world.array.devices.members[stripe.p]
    assert old is not None
    new = SimMember(old.size, world.chosen, name="new")
    world.array.devices.members[stripe.p] = Replacing(old, new)
    world.array.devices.members[stripe.data[2]] = None
    members[stripe.p].refuses_data = True
    assert await world.write((0, BLOCK)) != [None]
    log = bad_blocks_of(old)
    assert log is not None
    assert log.count == 1
    with pytest.raises(OSError, match="row 0: 2 chunks of 4 are lost"):
        await world.array.read(2 * CHUNK, BLOCK)
