"""Rebuild, resync, check and repair against a model, with clients and failures around them."""

from typing import Any

import pytest
import trio
import trio.testing

from pmblk.raid.layout import survives
from pmblk.raid.sweep import Pace, Sweep
from tests.unit.raid_world import CHUNK, SHAPES, World, name
from tests.unit.sim_member import SimMember

FAST = Pace(bytes_per_second_min=0)
REDUNDANT = [shape for shape in SHAPES if shape["level"]]
WITH_PARITY = [shape for shape in SHAPES if shape["level"] in (4, 5, 6)]


def sweep(world: World, kind: Any, **options: Any) -> Sweep:
    options.setdefault("pace", FAST)
    options.setdefault("batch_bytes", 3 * CHUNK)
    return Sweep(kind, world.array, **options)


def put_new(world: World, slot: int) -> SimMember:
    """A member full of something else in that slot, to be rebuilt."""
    new = SimMember(world.members[slot].size, world.chosen, name=f"new{slot}")
    new.content[:] = world.chosen.randbytes(len(new.content))
    world.members[slot] = new
    world.array.devices.rebuilt[slot] = 0
    world.array.devices.members[slot] = new
    return new


def lose(world: World, slot: int) -> None:
    world.members[slot].gone = True
    world.array.devices.members[slot] = None


async def check_redundancy(world: World) -> None:
    """A full check by the sweep finds nothing, and every single loss is made up for."""
    found = sweep(world, "check")
    await found.run()
    assert found.status().findings == ()
    members = world.array.devices.members
    for slot in range(world.geometry.members):
        if survives(world.geometry, {slot}):
            saved, members[slot] = members[slot], None
            await world.check()
            members[slot] = saved


async def clients(world: World, batches: int = 25) -> None:
    for _ in range(batches):
        extents = [world.extent() for _ in range(world.chosen.choice([1, 1, 3]))]
        assert await world.write(*extents) == [None] * len(extents)
        offset, length = world.extent()
        found = await world.array.read(offset, length)
        assert bytes(found) == bytes(world.model[offset : offset + length])


@pytest.mark.parametrize("shape", REDUNDANT, ids=name)
async def test_a_rebuilt_member_is_whole_whatever_clients_wrote_meanwhile(
    shape: dict[str, Any],
) -> None:
    for seed in range(3):
        world = World(seed, **shape)
        await world.write((0, world.array.size))
        slot = world.chosen.randrange(world.geometry.members)
        lose(world, slot)
        await clients(world, 5)
        put_new(world, slot)
        work = sweep(world, "rebuild", slot=slot)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients, world)
            nursery.start_soon(work.run)
        assert work.position == work.end == world.geometry.member_chunks * CHUNK
        assert world.array.devices.rebuilt.pop(slot) == world.geometry.member_chunks
        await world.check()
        await check_redundancy(world)
