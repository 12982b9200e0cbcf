"""Arrays that grow while they are in use: no byte is lost, whatever fails, at whatever moment."""

import contextlib
from typing import Any

import pytest
import trio

from pmblk.errors import PmblkError
from pmblk.raid.running import RunningArray
from tests.unit.test_raid_running import (
    CHUNK,
    ENOUGH,
    LEVELS,
    MEBIBYTE,
    Machine,
    idle,
    name,
    states,
)

PLAIN = [one for one in LEVELS if "integrity" not in one and one.get("layout") != "far"]
ROOM = [{"level": 0}, *PLAIN]


def enlarge(machine: Machine, *, by: int = MEBIBYTE) -> None:
    """As `truncate` does, outside of the array."""
    for member in machine.members.values():
        member.content += bytes(machine.chosen.randbytes(by))


def follow(machine: Machine, array: RunningArray) -> None:
    """The model is as large as the array; what is new is zero."""
    machine.model += bytes(array.size - len(machine.model))


@contextlib.asynccontextmanager
async def clients(machine: Machine, array: RunningArray) -> Any:
    """They write as long as the body runs."""
    over = False

    async def write() -> None:
        while not over:
            follow(machine, array)
            await machine.write(array)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        yield
        over = True


async def assert_all_fits(machine: Machine, array: RunningArray) -> None:
    await machine.check(array)
    if array.geometry.redundancy:
        array.scrub(repair=False)
        await idle(array)
        scrub = array.status().scrub
        assert scrub is not None
        assert not scrub.findings


# ---- by what the members have got


@pytest.mark.parametrize("cannot_zero", [False, True])
@pytest.mark.parametrize("integrity", [False, True])
@pytest.mark.parametrize("shape", ROOM, ids=name)
async def test_an_array_takes_what_its_members_have_got(
    shape: dict[str, Any], integrity: bool, cannot_zero: bool
) -> None:
    machine = Machine(1, **shape, integrity=integrity)
    await machine.create()
    for member in machine.members.values():
        member.cannot_zero = cannot_zero
    async with machine.running() as array:
        await machine.write(array, 20)
        before = array.size
        enlarge(machine)
        async with clients(machine, array):
            await array.grow(size=None, add=())
        assert array.size > before
        await idle(array)
        machine.model[before:] = await array.array.read(before, array.size - before)
        await machine.write(array, 20)
        await assert_all_fits(machine, array)
    async with machine.running() as array:
        assert array.size == len(machine.model)
        await assert_all_fits(machine, array)


@pytest.mark.parametrize("integrity", [False, True])
@pytest.mark.parametrize("shape", ROOM, ids=name)
async def test_a_crash_while_it_takes_them_leaves_an_array_of_either_size(
    shape: dict[str, Any], integrity: bool
) -> None:
    steps = 0
    while True:
        machine = Machine(steps, **shape, integrity=integrity)
        await machine.create()
        with contextlib.suppress(BaseExceptionGroup):
            async with machine.running(stop=False) as array:
                await machine.write(array, 3)
                sizes = [array.size]
                enlarge(machine, by=3 * CHUNK + 16384)
                machine.fuse.left = steps
                await array.grow(size=None, add=())
                sizes.append(array.size)
        done, machine.fuse.left = machine.fuse.left > 0, ENOUGH
        async with machine.running() as array:
            assert len(sizes) == 1 or array.size == sizes[1]
            follow(machine, array)
            await idle(array)
            await assert_all_fits(machine, array)
            with contextlib.suppress(PmblkError):  # there is no more room
                await array.grow(size=None, add=())
            assert array.size > sizes[0]
            follow(machine, array)
            await machine.write(array, 3)
            await assert_all_fits(machine, array)
        if done:
            return
        steps += 1 + steps // 3


@pytest.mark.parametrize("shape", PLAIN, ids=name)
async def test_a_member_that_fails_while_it_takes_them_is_out(shape: dict[str, Any]) -> None:
    machine = Machine(3, **shape)
    await machine.create()
    async with machine.running() as array:
        before = array.size
        enlarge(machine)
        machine.members["m1"].refuses_writes = True
        await array.grow(size=None, add=())
        assert states(array)["m1"] == "faulty"
        assert array.size > before
        follow(machine, array)
        await machine.write(array, 10)
        machine.members["m1"].refuses_writes = False
        await array.add("m1")
        assert states(array)["m1"] != "faulty"
        await idle(array)
        await assert_all_fits(machine, array)


async def test_a_size_is_as_much_as_is_asked_for_and_no_more() -> None:
    machine = Machine(4, level=5)
    await machine.create()
    async with machine.running() as array:
        enlarge(machine)
        await array.grow(size=array.size + 1, add=())
        follow(machine, array)
        assert array.size == 3 * CHUNK + array.geometry.stripe_bytes * (
            array.geometry.member_chunks - 1
        )
        with pytest.raises(PmblkError, match="an array cannot shrink"):
            await array.grow(size=array.size - 1, add=())
        with pytest.raises(PmblkError, match=r"m\d has room for .* are in use; make every member"):
            await array.grow(size=array.size + 4 * MEBIBYTE, add=())
        await array.grow(size=array.size, add=())
        await assert_all_fits(machine, array)


async def test_an_array_whose_members_are_as_they_were_says_so() -> None:
    machine = Machine(5, level=5)
    await machine.create()
    async with machine.running() as array:
        with pytest.raises(PmblkError, match="has room for"):
            await array.grow(size=None, add=())


async def test_far_copies_and_arrays_that_are_not_whole_do_not_grow() -> None:
    machine = Machine(6, level=10, layout="far")
    await machine.create()
    async with machine.running() as array:
        enlarge(machine)
        with pytest.raises(PmblkError, match="far copies cannot use more"):
            await array.grow(size=None, add=())
        await array.fail("m1")
        with pytest.raises(PmblkError, match="lacks a member cannot grow"):
            await array.grow(size=None, add=())


async def test_checksums_that_would_meet_themselves_are_refused() -> None:
    machine = Machine(7, level=1, integrity=True, chunk_bytes=4096)
    await machine.create()
    async with machine.running() as array:
        enlarge(machine, by=CHUNK)
        with pytest.raises(PmblkError, match="make every member larger by"):
            await array.grow(size=array.size + 4096, add=())
        await machine.check(array)


# ---- another mirror


async def test_mirrors_are_added_and_any_other_can_be_lost_then() -> None:
    machine = Machine(8, level=1)
    await machine.create()
    async with machine.running() as array:
        await array.add(machine.new_device())
        await machine.write(array, 20)
        async with clients(machine, array):
            await array.grow(size=None, add=[machine.new_device(), "m4", machine.new_device()])
        assert array.geometry.members == 7
        await idle(array)
        assert set(states(array).values()) == {"active"}
        await assert_all_fits(machine, array)
    for number in range(6):
        machine.members[f"m{number}"].gone = True
    async with machine.running(degraded=True) as array:
        await machine.check(array)


async def test_a_spare_that_was_there_first_keeps_waiting_when_another_becomes_a_mirror() -> None:
    machine = Machine(9, level=1)
    await machine.create()
    first, second = machine.new_device(), machine.new_device()
    async with machine.running() as array:
        await array.add(first)
        await array.grow(size=None, add=[second])
        await idle(array)
        assert states(array)[first] == "spare"
        assert states(array)[second] == "active"
        await array.fail("m0")
        await idle(array)
        assert states(array)[first] == "active"
        await machine.check(array)


async def test_a_crash_at_any_step_of_adding_a_mirror_loses_nothing() -> None:
    steps = 0
    while True:
        machine = Machine(steps, level=1)
        await machine.create()
        new = machine.new_device()
        with contextlib.suppress(BaseExceptionGroup):
            async with machine.running(stop=False) as array:
                await machine.write(array, 3)
                machine.fuse.left = steps
                await array.grow(size=None, add=[new])
        done, machine.fuse.left = machine.fuse.left > 0, ENOUGH
        async with machine.running(degraded=True) as array:
            await machine.check(array)
            await idle(array)
            if array.geometry.members == 4:
                await array.grow(size=None, add=[new])
            await idle(array)
            assert states(array)[new] == "active"
            await assert_all_fits(machine, array)
        if done:
            return
        steps += 1
