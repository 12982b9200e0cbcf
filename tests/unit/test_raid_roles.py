"""Members that leave, come back, and are replaced, at the worst moment for it."""

import contextlib
import itertools

import pytest
import trio
import trio.testing

from pmblk.errors import PmblkError
from pmblk.raid.events import Event, MemberSeated, SweepBegan
from pmblk.raid.keeper import Keeper, Seat
from pmblk.raid.labels import read_label
from pmblk.raid.running import RunningArray
from tests.unit.crashing_member import Crashed
from tests.unit.refusing import holding, in_bad_blocks, in_bitmap, in_superblock, refusing
from tests.unit.test_raid_keeper import ENOUGH, World
from tests.unit.test_raid_running import CHUNK, MEBIBYTE, Machine, idle, states

FAR = 2 * MEBIBYTE  # in another region of the bitmap than the start


async def put(machine: Machine, array: RunningArray, offset: int, letter: bytes) -> bool:
    """A chunk of that letter; whether it was acknowledged."""
    data = letter * CHUNK
    if await array.array.write([(offset, memoryview(data))]) != [None]:
        return False
    machine.model[offset : offset + CHUNK] = data
    return True


def leave_only(machine: Machine, *places: str) -> None:
    """These devices are there, and no other."""
    for place, member in machine.members.items():
        member.gone = place not in places


# ---- replaced members


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("failed", [None, "m0"])
async def test_who_has_taken_over_is_whole_at_the_next_start(
    failed: str | None, stop: bool
) -> None:
    """What the journal has of the member before it is not held against it."""
    machine = Machine(1, level=5)
    await machine.create()
    new = machine.new_device()
    async with machine.running(stop=stop) as array:
        await machine.write(array, 20)
        if failed is not None:
            await array.fail(failed)
            await machine.write(array, 3)
        await array.replace("m2", new)
        await idle(array)
        assert states(array)[new] == "active"
    async with machine.running() as array:
        assert states(array)[new] == "active"
        await machine.check(array)


async def test_who_has_taken_over_has_the_marks_too() -> None:
    """So that it can tell a member that comes back what that lacks, when nobody else can."""
    machine = Machine(3, level=1)
    await machine.create()
    new = machine.new_device()
    async with machine.running() as array:
        assert await put(machine, array, FAR, b"1")
        await array.replace("m0", new)
        await idle(array)
        for place in ("m1", "m2", "m3"):
            await array.fail(place)
        assert await put(machine, array, FAR, b"2")  # its mark is durable already
    leave_only(machine, new)
    async with machine.running(degraded=True) as array:
        machine.members["m1"].gone = False
        await array.add("m1")
        await idle(array)
        assert states(array)["m1"] == "active"
        await array.fail(new)
        await machine.check(array)


async def test_a_member_that_fails_while_its_successor_is_prepared_does_not_come_back() -> None:
    machine = Machine(20, level=6)
    await machine.create()
    new = machine.new_device()
    prepared = trio.Event()
    async with machine.running() as array:
        await machine.write(array, 5)
        with holding(machine.members[new], in_bad_blocks, until=prepared, reads=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_replace_too_late, array, new)
                await trio.testing.wait_all_tasks_blocked()
                await array.fail("m1")
                await machine.write(array, 5)
                prepared.set()
        await idle(array)
        assert (states(array)["m1"], states(array)[new]) == ("faulty", "active")
        await array.fail("m0")
        await machine.check(array)


async def _replace_too_late(array: RunningArray, new: str) -> None:
    with pytest.raises(PmblkError, match="m1 has failed meanwhile; m4 is a spare now"):
        await array.replace("m1", new)


# ---- members that come back


async def test_a_member_that_was_written_to_alone_comes_back_as_a_spare() -> None:
    """The marks of the others do not say what it was given without them."""
    machine = Machine(2, level=1)
    await machine.create()
    async with machine.running() as array:
        await machine.write(array, 5)
    leave_only(machine, "m1", "m2", "m3")
    async with machine.running(degraded=True) as array:
        assert await put(machine, array, 0, b"B")
    leave_only(machine, "m0")
    async with machine.running(degraded=True) as array:
        assert await array.array.write([(FAR, memoryview(b"X" * CHUNK))]) == [None]
    leave_only(machine, "m1", "m2", "m3")
    async with machine.running(degraded=True) as array:
        machine.members["m0"].gone = False
        await array.add("m0")
        await idle(array)
        assert states(array)["m0"] == "active"
        for place in ("m1", "m2", "m3"):
            await array.fail(place)
        await machine.check(array)


async def test_a_spare_that_is_seated_while_a_member_comes_back_is_filled_as_a_whole(
    autojump_clock: trio.testing.MockClock,
) -> None:
    machine = Machine(8, level=6)
    await machine.create()
    spare = machine.new_device()
    seated = trio.Event()

    def tell(event: Event) -> None:
        if isinstance(event, MemberSeated):
            seated.set()

    async with machine.running(tell=tell) as array:
        await machine.write(array, 20)
        await trio.sleep(30)  # until nothing is marked
        await array.fail("m1")
        with holding(machine.members["m1"], in_bad_blocks, until=seated, reads=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(array.add, "m1")  # too late for its slot
                await trio.testing.wait_all_tasks_blocked()
                await array.add(spare)
        await idle(array)
        assert (states(array)["m1"], states(array)[spare]) == ("spare", "active")
        await array.remove("m1")
        for place in ("m0", "m2"):
            await array.fail(place)
        await machine.check(array)


async def test_a_member_that_fails_as_it_comes_back_is_out_and_no_work_is_begun_for_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    machine = Machine(9, level=5)
    await machine.create()
    told: list[Event] = []
    async with machine.running(tell=told.append) as array:
        assert await put(machine, array, 0, b"1")
        await array.fail("m1")
        with (
            refusing(machine.members["m1"], in_superblock),
            pytest.raises(PmblkError, match="m1 failed at once"),
        ):
            await array.add("m1")
        await trio.sleep(60)
        assert states(array)["m1"] == "faulty"
        assert not any(isinstance(event, SweepBegan) for event in told)
        await array.add("m1")
        await idle(array)
        assert states(array)["m1"] == "active"
        await array.fail("m0")
        await machine.check(array)


async def test_a_copy_of_a_member_is_refused_and_that_member_stays() -> None:
    machine = Machine(11, level=5)
    await machine.create()
    async with machine.running() as array:
        await machine.write(array, 5)
        copy = machine.new_device()
        machine.members[copy].content[:] = machine.members["m1"].content
        with pytest.raises(PmblkError, match=r"m4 says that it is m1: one is a copy.*erase"):
            await array.add(copy)
        assert machine.members[copy].closed
        assert set(states(array).items()) == {(f"m{n}", "active") for n in range(4)}
        await machine.check(array)


async def test_who_went_on_alone_and_removed_the_others_is_a_split_brain() -> None:
    machine = Machine(16, level=1)
    await machine.create()
    async with machine.running() as array:
        await machine.write(array, 5)
    leave_only(machine, "m1", "m2", "m3")
    async with machine.running(degraded=True) as array:
        for _ in range(3):  # they have seen more changes than the other half will
            await array.fail("m1")
            await array.add("m1")
            await idle(array)
        await machine.write(array, 5)
    leave_only(machine, "m0")
    async with machine.running(degraded=True) as array:
        await machine.write(array, 5)
        for other in [one for one in array.status().members if one.state == "faulty"]:
            await array.remove(str(other.member))
    leave_only(machine, *machine.members)
    with pytest.raises(PmblkError, match="split brain: m0 went on without m1, m2, m3"):
        async with machine.running(degraded=True):
            pass


# ---- members that leave


async def test_a_write_without_a_member_counts_only_when_the_others_know() -> None:
    """Also when it was not that write which the member was lost in."""
    machine = Machine(6, level=1)
    await machine.create()
    known = trio.Event()
    answers: list[bool] = []

    async def write(offset: int, letter: bytes) -> None:
        answers.append(await put(machine, array, offset, letter))

    async with machine.running() as array:
        assert await put(machine, array, 0, b"1")
        with contextlib.ExitStack() as stack:
            stack.enter_context(refusing(machine.members["m0"], in_bitmap))
            for place in ("m1", "m2", "m3"):
                stack.enter_context(holding(machine.members[place], in_superblock, until=known))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, FAR, b"z")  # needs a mark, and m0 does not take it
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(write, 0, b"2")
                await trio.testing.wait_all_tasks_blocked()
                early = [*answers]
                known.set()
        assert (early, answers) == ([], [True, True])
        assert states(array)["m0"] == "faulty"


async def test_no_write_counts_any_more_once_a_change_of_roles_could_not_be_told() -> None:
    machine = Machine(6, level=1)
    await machine.create()
    async with machine.running(stop=False) as array:
        assert await put(machine, array, 0, b"1")
        await array.add(machine.new_device())
        with contextlib.ExitStack() as stack:
            for member in machine.members.values():
                stack.enter_context(refusing(member, in_superblock))
            with pytest.raises(PmblkError, match="refused"):
                await array.remove("m4")
        assert not await put(machine, array, 0, b"2")


async def test_two_crashes_amid_changes_of_roles_leave_nobody_behind() -> None:
    for crashes in itertools.product(range(1, 9), repeat=2):
        world = await World(level=5).settled()
        for steps in crashes:
            await _change_and_crash(world, steps)
        found = await world.assembled()
        assert (found.obstacles, found.slots) == ((), ("m0", "m1", "m2", "m3")), crashes


async def _change_and_crash(world: World, steps: int) -> None:
    """What a start does, up to there."""
    found = await world.assembled()
    seats = {
        number: Seat(member, (await read_label(member)).stale_slot)
        for number, member in enumerate(world.members)
    }
    keeper = Keeper(found.newest, seats, out=lambda _number, _error: None)
    world.fuse.left = steps
    try:
        await keeper.change_roles(lambda one: one)
    except* Crashed:
        pass
    world.fuse.left = ENOUGH


async def test_a_member_that_was_missing_at_the_start_is_removed_by_its_uuid() -> None:
    machine = Machine(24, level=5)
    await machine.create()
    machine.members["m1"].gone = True
    async with machine.running(degraded=True) as array:
        spare = machine.new_device()
        await array.add(spare)
        await idle(array)
        assert states(array)[spare] == "active"
        (gone,) = [one for one in array.status().members if one.state == "faulty"]
        assert (gone.slot, gone.place) == (None, None)
        await array.remove(str(gone.member))
        assert gone.member not in {one.member for one in array.status().members}
    async with machine.running() as array:
        assert set(states(array).values()) == {"active"}
