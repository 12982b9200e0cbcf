"""Arrays that grow while they are in use: no byte is lost, whatever fails, at whatever moment."""

import contextlib
from typing import Any

import pytest
import trio

from pmblk.errors import PmblkError
from pmblk.raid.geometry import Geometry
from pmblk.raid.reshaping import TwoGeometries, rows_at_once
from pmblk.raid.running import RunningArray
from tests.unit.test_raid_running import (
    CHUNK,
    ENOUGH,
    LEVELS,
    MEBIBYTE,
    SIZE,
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
        steps += 1 + steps // 2


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
        steps += 1 + steps // 4


# ---- more members: data move to them

WIDER: list[dict[str, Any]] = [
    {"level": 0},
    {"level": 4},
    {"level": 5},
    {"level": 5, "journal": False},
    {"level": 5, "layout": "right-asymmetric", "integrity": True},
    {"level": 6},
]


class Writer:
    """Writes all the time; a write that a crash cuts off may have happened, sector by sector."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.cut_off: tuple[int, bytes] | None = None

    async def run(self, array: RunningArray) -> None:
        machine = self.machine
        while isinstance(array.array, TwoGeometries):
            length = machine.chosen.choice([512, 4096, CHUNK, 5 * CHUNK])
            offset = machine.chosen.randrange((len(machine.model) - length) // 512) * 512
            data = machine.chosen.randbytes(length)
            self.cut_off = offset, data
            assert await array.array.write([(offset, memoryview(data))]) == [None]
            machine.model[offset : offset + length] = data
            self.cut_off = None

    async def settle(self, array: RunningArray) -> None:
        """After a crash: what the last write has come to."""
        if self.cut_off is None:
            return
        offset, data = self.cut_off
        found = bytes(await array.array.read(offset, len(data)))
        for at in range(0, len(data), 512):
            old = self.machine.model[offset + at : offset + at + 512]
            assert found[at : at + 512] in (old, data[at : at + 512])
        self.machine.model[offset : offset + len(data)] = found
        self.cut_off = None


async def filled(machine: Machine, array: RunningArray) -> None:
    machine.model[:] = machine.chosen.randbytes(array.size)
    assert await array.array.write([(0, memoryview(bytes(machine.model)))]) == [None]


async def reshaped(array: RunningArray) -> None:
    """Until the data have moved."""
    with trio.fail_after(60):
        while isinstance(array.array, TwoGeometries):
            await trio.sleep(0.001)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", WIDER, ids=name)
async def test_data_move_to_more_members_while_clients_write(
    shape: dict[str, Any], count: int
) -> None:
    machine = Machine(10, **shape)
    await machine.create()
    told: list[int] = []
    async with machine.running() as array:
        array.resized = lambda: told.append(array.size)
        await filled(machine, array)
        before = array.geometry
        new = [machine.new_device() for _ in range(count)]
        async with clients(machine, array):
            await array.grow(size=None, add=new)
            assert array.size == before.size
            sweep = array.status().sweep
            assert sweep is None or sweep.kind == "reshape"
            with pytest.raises(PmblkError, match="it grows already"):
                await array.grow(size=None, add=())
            await reshaped(array)
        assert array.geometry.members == before.members + count
        assert told == [array.size]
        assert array.size == before.size // before.data_members * array.geometry.data_members
        follow(machine, array)
        await assert_all_fits(machine, array)
        await machine.write(array, 20)
    if array.geometry.redundancy:
        machine.members["m0"].gone = True
    async with machine.running(degraded=True) as array:
        await machine.check(array)


@pytest.mark.parametrize("shape", WIDER, ids=name)
async def test_a_crash_at_any_step_of_moving_data_loses_nothing(shape: dict[str, Any]) -> None:
    """Clients write meanwhile; at each start, too, the machine crashes until one comes through."""
    seed, steps = 0, 0
    while steps < 400:
        machine = Machine(seed, **shape)
        writer = Writer(machine)
        await machine.create()
        new = machine.new_device()
        with contextlib.suppress(BaseExceptionGroup):
            async with machine.running(stop=False) as array:
                await filled(machine, array)
                machine.fuse.left = steps
                await array.grow(size=None, add=[new])
                await writer.run(array)
        for crash in range(3):
            machine.fuse.left = machine.chosen.randrange(1, 200) if crash < 2 else ENOUGH
            with contextlib.suppress(BaseExceptionGroup):
                async with machine.running(stop=False) as array:
                    left, machine.fuse.left = machine.fuse.left, ENOUGH
                    await writer.settle(array)
                    await machine.check(array)
                    machine.fuse.left = left
                    await writer.run(array)
        machine.fuse.left = ENOUGH
        async with machine.running() as array:
            await writer.settle(array)
            await idle(array)
            if array.geometry.members == 4:
                await array.grow(size=None, add=[new])
                await reshaped(array)
            follow(machine, array)
            await assert_all_fits(machine, array)
        seed, steps = seed + 1, 2 * steps + 1


@pytest.mark.parametrize("shape", [one for one in WIDER if one["level"]], ids=name)
async def test_a_member_that_is_lost_while_data_move_is_made_up_for(shape: dict[str, Any]) -> None:
    for seed in range(4):
        machine = Machine(seed, **shape)
        await machine.create()
        async with machine.running() as array:
            await filled(machine, array)
            new, spare = machine.new_device(), machine.new_device()
            await array.add(spare)
            await array.grow(size=None, add=[new])
            async with clients(machine, array):
                await trio.sleep(0.01 * seed)
                machine.members[machine.chosen.choice(["m0", "m3", new])].gone = True
                await machine.write(array, 3)
                await reshaped(array)
            await idle(array)
            assert array.status().state == "active"
            assert states(array)[spare] == "active"
            follow(machine, array)
            await assert_all_fits(machine, array)


async def test_a_member_that_left_while_data_moved_is_rebuilt_as_a_whole() -> None:
    """What moved without it is marked nowhere."""
    machine = Machine(16, level=5)
    await machine.create()
    async with machine.running() as array:
        await filled(machine, array)
        await array.grow(size=None, add=[machine.new_device()])
        machine.members["m0"].gone = True
        await reshaped(array)
        assert states(array)["m0"] == "faulty"
        machine.members["m0"].gone = False
        await array.add("m0")
        await idle(array)
        assert array.status().state == "active"
        follow(machine, array)
        await assert_all_fits(machine, array)


async def test_a_stop_in_the_middle_goes_on_at_the_next_start() -> None:
    machine = Machine(11, level=5)
    await machine.create()
    async with machine.running() as array:
        await filled(machine, array)
        await array.grow(size=None, add=[machine.new_device()])
        while not array.superblock.reshape_position:
            await trio.sleep(0)
    async with machine.running() as array:
        position = array.superblock.reshape_position
        assert 0 < position < array.size
        await machine.check(array)
        await machine.write(array, 10)
        await reshaped(array)
        follow(machine, array)
        await assert_all_fits(machine, array)


async def test_without_room_in_front_of_the_data_no_member_is_added() -> None:
    machine = Machine(12, level=0, chunk_bytes=1 << 20)
    await machine.create()
    async with machine.running() as array:
        for _ in range(2):
            await array.grow(size=None, add=[machine.new_device()])
            await reshaped(array)
        follow(machine, array)
        spare = machine.new_device()
        with pytest.raises(PmblkError, match="no room left in front of the data"):
            await array.grow(size=None, add=[spare])
        await machine.check(array)
        assert array.geometry.members == 6


async def test_who_cannot_be_a_member_is_not_added_and_nothing_moves() -> None:
    machine = Machine(13, level=5)
    await machine.create()
    async with machine.running() as array:
        with pytest.raises(PmblkError, match="too small"):
            await array.grow(size=None, add=[machine.new_device(SIZE - MEBIBYTE)])
        with pytest.raises(PmblkError, match="is no spare"):
            await array.grow(size=None, add=["m1"])
        with pytest.raises(PmblkError, match="two steps"):
            await array.grow(size=array.size, add=["m1"])
        assert array.geometry.members == 4
    machine = Machine(14, level=10)
    await machine.create()
    async with machine.running() as array:
        with pytest.raises(PmblkError, match="level 10 gets no more members"):
            await array.grow(size=None, add=[machine.new_device()])


async def test_what_was_lost_before_it_moved_stays_an_error() -> None:
    machine = Machine(15, level=5)
    await machine.create()
    async with machine.running() as array:
        await filled(machine, array)
        row = array.superblock.data_offset // 4096
        for place in ("m0", "m1"):
            machine.members[place].bad_blocks.add(row)
        await array.grow(size=None, add=[machine.new_device()])
        await reshaped(array)
        lost = []
        for offset in range(0, len(machine.model), 4096):
            try:
                found = await array.array.read(offset, 4096)
            except OSError:
                lost.append(offset)
            else:
                assert bytes(found) == machine.model[offset : offset + 4096]
        assert 1 <= len(lost) <= 2


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 4), (3, 64), (63, 64), (1, 2)])
def test_no_window_overwrites_what_has_not_moved(before: int, after: int) -> None:
    """Row by row, for the smallest headroom; new row r lies where old row r - 1 does."""
    old, new = (
        Geometry(level=0, members=members, member_bytes=64 << 20, chunk_bytes=CHUNK)
        for members in (before, after)
    )
    moved = 0
    while moved * after < old.member_chunks * before:
        count = rows_at_once(old, new, moved=moved, headroom_rows=1)
        assert count >= 1
        last_overwritten = moved + count - 2
        first_needed = moved * after // before
        assert last_overwritten < first_needed
        moved += count
