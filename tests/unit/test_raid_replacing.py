"""A member is replaced while clients read and write, and while either of the two fails."""

import errno
from typing import Any

import pytest
import trio
import trio.testing

from pmblk.raid.bad_blocks import remembering
from pmblk.raid.buffers import buffer
from pmblk.raid.member import Request
from pmblk.raid.replacing import Replacing
from pmblk.raid.superblock import DATA_OFFSET
from pmblk.raid.sweep import Pace, Sweep
from tests.unit.late_member import LateMember
from tests.unit.raid_world import CHUNK, SHAPES, World, name
from tests.unit.sim_member import SimMember

BLOCK = 4096


def replacing(world: World, slot: int) -> Replacing:
    old = world.members[slot]
    new = SimMember(old.size, world.chosen, name=f"new{slot}")
    new.content[DATA_OFFSET:] = world.chosen.randbytes(new.size - DATA_OFFSET)
    both = world.array.devices.members[slot] = Replacing(old, new)
    return both


def sweep(world: World, slot: int, **options: Any) -> Sweep:
    pace = Pace(bytes_per_second_min=0)
    return Sweep("replace", world.array, pace=pace, slot=slot, batch_bytes=3 * CHUNK, **options)


async def hand_over(world: World, slot: int, both: Replacing) -> None:
    assert await both.hand_over()
    exchange(world, slot, both)


def exchange(world: World, slot: int, both: Replacing) -> None:
    """When the roles have changed."""
    assert isinstance(both.new, SimMember)
    world.array.devices.members[slot] = world.members[slot] = both.new
    both.close()
    assert isinstance(both.old, SimMember)
    assert both.old.closed
    assert not both.new.closed


async def clients(world: World) -> None:
    for _ in range(20):
        extents = [world.extent() for _ in range(world.chosen.choice([1, 1, 3]))]
        assert await world.write(*extents) == [None] * len(extents)
        offset, length = world.extent()
        found = await world.array.read(offset, length)
        assert bytes(found) == bytes(world.model[offset : offset + length])


@pytest.mark.parametrize("shape", SHAPES, ids=name)
async def test_the_new_one_holds_all_whatever_clients_wrote_meanwhile(
    shape: dict[str, Any],
) -> None:
    for seed in range(2):
        world = World(seed, **shape)
        await world.write((0, world.array.size))
        slot = world.chosen.randrange(world.geometry.members)
        both = replacing(world, slot)
        work = sweep(world, slot)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients, world)
            nursery.start_soon(work.run)
        assert work.position == work.end
        assert slot not in world.array.devices.rebuilt
        await hand_over(world, slot, both)
        world.assert_whole()


async def test_what_the_old_one_cannot_read_comes_from_the_others() -> None:
    for shape in ({"level": 5, "members": 4}, {"level": 1, "members": 2}):
        world = World(3, **shape)
        await world.write((0, world.array.size))
        world.members[1].bad_blocks = {DATA_OFFSET // BLOCK, DATA_OFFSET // BLOCK + 11}
        both = replacing(world, 1)
        work = sweep(world, 1)
        await work.run()
        assert work.findings.healed == 2
        await hand_over(world, 1, both)
        await world.check()


async def test_what_nobody_can_read_is_lost_on_the_new_one_too() -> None:
    world = World(4, level=0, members=2)
    await world.write((0, world.array.size))
    world.members[1].bad_blocks = {DATA_OFFSET // BLOCK + 2}
    both = replacing(world, 1)
    log = both.new = await remembering(both.new, data_offset=DATA_OFFSET)
    work = sweep(world, 1)
    await work.run()
    assert work.findings.lost == 1
    assert log.count == 1
    with pytest.raises(OSError, match="is lost"):
        await log.read((Request(DATA_OFFSET, buffer(4 * BLOCK)),))


async def test_a_new_one_that_fails_is_dropped_and_the_slot_does_not_notice() -> None:
    world = World(5, level=5, members=4)
    await world.write((0, world.array.size))
    both = replacing(world, 2)
    assert isinstance(both.new, SimMember)
    both.new.refuses_writes = True
    assert await world.write((0, CHUNK * 3)) == [None]
    assert both.new_error is not None
    both.new.refuses_writes = False
    with pytest.raises(OSError, match="refused"):
        await sweep(world, 2).run()
    await world.array.flush()
    assert world.announced == []
    await world.check()


async def test_a_new_one_that_fails_under_the_sweep_ends_it() -> None:
    world = World(6, level=1, members=2)
    await world.write((0, world.array.size))
    both = replacing(world, 0)
    assert isinstance(both.new, SimMember)
    both.new.gone = True
    with pytest.raises(OSError, match="gone") as caught:
        await sweep(world, 0).run()
    assert caught.value.errno == errno.ENODEV
    assert both.position == 0
    assert world.announced == []
    await world.check()


async def test_an_old_one_that_fails_takes_the_slot_with_it_and_leaves_the_new_one() -> None:
    world = World(7, level=5, members=4)
    await world.write((0, world.array.size))
    both = replacing(world, 2)
    world.members[2].refuses_writes = True
    assert await world.write((0, world.array.size)) == [None]
    assert world.announced == [2]
    assert world.members[2].closed
    assert isinstance(both.new, SimMember)
    assert not both.new.closed
    with pytest.raises(OSError, match="has left"):
        await sweep(world, 2).run()
    await world.check()


async def test_position_says_how_far_the_new_one_is_whole() -> None:
    world = World(8, level=6, members=5)
    await world.write((0, world.array.size))
    both = replacing(world, 3)
    saved: list[int] = []

    async def checkpoint(position: int) -> None:
        saved.append(position)
        assert both.position == DATA_OFFSET + position
        content = slice(DATA_OFFSET, both.position)
        assert isinstance(both.new, SimMember)
        assert both.new.content[content] == world.members[3].content[content]

    await sweep(world, 3, checkpoint=checkpoint, checkpoint_seconds=0).run()
    assert saved == [*range(3 * CHUNK, 12 * CHUNK + 1, 3 * CHUNK), 12 * CHUNK]


async def test_the_superblock_of_each_is_its_own_and_zeroes_go_to_both() -> None:
    world = World(9, level=1, members=2)
    both = replacing(world, 0)
    old, new = world.members[0], both.new
    assert isinstance(new, SimMember)
    view = buffer(BLOCK)
    view[:4] = b"mine"
    await both.write((Request(4096, view), Request(DATA_OFFSET, view)))
    assert bytes(old.content[4096:4100]) == b"mine"
    assert not any(new.content[4096:8192])
    assert bytes(new.content[DATA_OFFSET : DATA_OFFSET + 4]) == b"mine"
    await both.zero(DATA_OFFSET, BLOCK)
    await both.zero(4096, BLOCK)
    for member in (old, new):
        assert not any(member.content[: DATA_OFFSET + BLOCK])


# ---- the exchange


async def late_world(seed: int, slot: int = 0) -> tuple[World, Replacing, LateMember]:
    """A mirror of which the new one holds all, and takes its time."""
    world = World(seed, level=1, members=2)
    await world.write((0, world.array.size))
    both = replacing(world, slot)
    both.new = new = LateMember(both.old.size, world.chosen, name="new")
    await sweep(world, slot).run()
    return world, both, new


async def test_the_new_one_takes_over_only_when_it_has_what_is_being_written() -> None:
    for refuses in (False, True):
        world, both, new = await late_world(10)
        said: list[bool] = []

        async def ask(both: Replacing = both, said: list[bool] = said) -> None:
            said.append(await both.hand_over())

        async with trio.open_nursery() as nursery:
            new.hold(nursery)
            nursery.start_soon(world.write, (0, CHUNK))
            await new.entered.wait()
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(world.write, (3 * CHUNK, CHUNK))
            await trio.testing.wait_all_tasks_blocked()
            assert said == []
            assert world.members[0].content != world.members[1].content, "one write waits"
            new.refuses_writes = refuses
            new.go_on.set()
        assert said == [not refuses]
        assert world.announced == []
        if not refuses:
            exchange(world, 0, both)
            world.assert_whole()
        await world.check()


async def test_whoever_is_cancelled_while_it_waits_hands_nothing_over() -> None:
    world, both, new = await late_world(11)
    async with trio.open_nursery() as nursery:
        new.hold(nursery)
        nursery.start_soon(world.write, (0, CHUNK))
        await new.entered.wait()
        with trio.move_on_after(0):
            await both.hand_over()
        await both.old.flush()
        new.go_on.set()
    assert not both.handed_over
    assert await world.write((0, CHUNK)) == [None]


@pytest.mark.parametrize("which", ["old", "new"])
async def test_what_either_fails_at_while_roles_change_is_the_failure_of_the_slot(
    which: str,
) -> None:
    for fails in ("write", "flush", "zero"):
        world, both, new = await late_world(12)
        assert await both.hand_over()
        (world.members[0] if which == "old" else new).refuses_writes = True
        if fails == "write":
            assert await world.write((0, CHUNK)) == [None]
        elif fails == "flush":
            await world.array.flush()
        else:
            await world.zero(0, CHUNK)
        assert world.announced == [0]
        await world.check()


async def test_a_change_that_is_called_off_leaves_the_old_one_as_it_was() -> None:
    world, both, new = await late_world(13)
    assert await both.hand_over()
    await world.write((0, CHUNK))
    both.give_up(OSError(errno.ENODEV, "called off"))
    world.array.devices.members[0] = both.old
    new.refuses_writes = True
    await world.write((0, CHUNK), (4 * CHUNK, CHUNK))
    assert world.announced == []
    world.assert_whole()


async def test_a_write_that_is_under_way_when_roles_have_changed_is_one_of_the_new_member() -> None:
    for refuses in (False, True):
        world, both, new = await late_world(14)
        assert await both.hand_over()
        async with trio.open_nursery() as nursery:
            new.hold(nursery)
            nursery.start_soon(world.write, (0, CHUNK))
            await new.entered.wait()
            exchange(world, 0, both)
            new.refuses_writes = refuses
            new.go_on.set()
        assert world.announced == ([0] if refuses else [])
        world.assert_whole()
        await world.check()


@pytest.mark.parametrize("change", ["begins", "ends", "is called off"])
async def test_a_round_that_was_planned_before_a_change_is_done_by_who_sits_there_then(
    change: str,
) -> None:
    world, both, _ = await late_world(15)
    devices = world.array.devices
    if change == "begins":
        devices.members[0] = both.old
    elif change == "ends":
        assert await both.hand_over()
    changed: list[int] = []

    def is_inline(_slot: int) -> bool:
        """Asked between the plan of a round and its tasks."""
        if not changed:
            changed.append(1)
            if change == "ends":
                exchange(world, 0, both)
            else:
                devices.members[0] = both if change == "begins" else both.old
        return False

    devices._is_inline = is_inline  # type: ignore[method-assign, assignment]
    assert await world.write((0, CHUNK)) == [None]
    assert changed
    assert world.announced == []
    world.assert_whole()


async def test_an_old_one_that_fails_as_its_replacement_begins_is_out() -> None:
    """The write went to it alone, and is no longer anybody's when it fails."""
    world, both, _ = await late_world(16)
    late = LateMember(both.old.size, world.chosen, name="old")
    late.content[:] = world.members[0].content
    world.members[0] = world.array.devices.members[0] = both.old = both.inner = late
    async with trio.open_nursery() as nursery:
        late.hold(nursery)
        nursery.start_soon(world.write, (0, CHUNK))
        await late.entered.wait()
        world.array.devices.members[0] = both
        late.refuses_writes = True
        late.go_on.set()
    assert world.announced == [0]
    await world.check()


@pytest.mark.parametrize(
    "shape", [{"level": 1, "members": 2}, {"level": 5, "members": 4}, {"level": 6, "members": 5}]
)
async def test_whoever_fails_around_the_exchange_no_written_byte_is_lost(
    shape: dict[str, Any],
) -> None:
    outcomes = set()
    for seed in range(40):
        world = World(seed, **shape)
        await world.write((0, world.array.size))
        slot = world.chosen.randrange(world.geometry.members)
        both = replacing(world, slot)
        await sweep(world, slot).run()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients, world)
            nursery.start_soon(someone_fails, world, world.chosen.choice([both.old, both.new]))
            await some_turns(world)
            if await both.hand_over():
                await some_turns(world)  # the roles change
                if world.array.devices.members[slot] is both:
                    exchange(world, slot, both)
        there = world.array.devices.members[slot]
        outcomes.add("new" if there is both.new else "old" if there is both else "out")
        assert set(world.announced) <= {slot}
        world.assert_whole()
        await world.check()
    assert outcomes == {"old", "new", "out"}


async def some_turns(world: World) -> None:
    for _ in range(world.chosen.randrange(30)):
        await trio.lowlevel.checkpoint()


async def someone_fails(world: World, member: Any) -> None:
    await some_turns(world)
    if not member.closed:
        member.refuses_writes = True
