"""Starts after unclean stops, failed writes, broken members and cut-off creations."""

import contextlib
import errno
from typing import Any

import pytest
import trio
import trio.testing

from pmblk.errors import PmblkError
from pmblk.raid.creation import Wishes, create
from pmblk.raid.events import Event, MemberSeated
from pmblk.raid.labels import read_label
from pmblk.raid.running import RunningArray
from pmblk.raid.superblock import BAD_BLOCKS_OFFSET, BITMAP_OFFSET, Superblock
from tests.unit.crashing_member import Crashed
from tests.unit.refusing import Where, between, refusing
from tests.unit.sim_member import BLOCK
from tests.unit.test_raid_roles import put
from tests.unit.test_raid_running import CHUNK, ENOUGH, Machine, idle, states


async def superblock_of(machine: Machine, place: str) -> Superblock:
    machine.members[place].closed = False
    found = (await read_label(machine.members[place])).found
    assert isinstance(found, Superblock)
    return found


async def in_data_of(machine: Machine) -> Where:
    superblock = await superblock_of(machine, "m0")
    return between(superblock.data_offset, ENOUGH)


async def tear(machine: Machine, *places: str) -> None:
    """As if the power had failed when these had a write already, and the others had not."""
    start = (await superblock_of(machine, "m0")).data_offset
    for place in places:
        machine.members[place].content[start : start + BLOCK] = b"N" * BLOCK


async def assert_refused(machine: Machine, words: str, **how: Any) -> None:
    """It does not start, and says so."""
    with pytest.raises(PmblkError, match=words):
        async with machine.running(**how):
            pass


async def assert_all_fits(array: RunningArray) -> None:
    await idle(array)
    array.scrub(repair=False)
    await idle(array)
    scrub = array.status().scrub
    assert scrub is not None
    assert not scrub.findings


# ---- unclean stops


async def test_without_a_bitmap_each_unclean_stop_is_followed_by_a_whole_resync() -> None:
    machine = Machine(4, level=1, bitmap=False)
    await machine.create()
    async with machine.running(stop=False) as array:
        await machine.write(array, 5)
    async with machine.running(stop=False) as array:
        await idle(array)
        assert array.superblock.resync_position == array.size
        await machine.write(array, 5)
    await tear(machine, "m1", "m2")
    async with machine.running() as array:
        await assert_all_fits(array)


async def leave_amid_a_rebuild(machine: Machine, *, stop: bool) -> None:
    """It was in service, with m4 in the slot of m1, whose rebuild had just begun."""
    spare = machine.new_device()
    seated = trio.Event()

    def tell(event: Event) -> None:
        if isinstance(event, MemberSeated):
            seated.set()

    async with machine.running(stop=stop, tell=tell) as array:
        await machine.write(array, 20)
        await array.fail("m1")
        await array.add(spare)
        await seated.wait()
        assert states(array)[spare] == "rebuilding"
    machine.members["m1"].gone = True


async def test_parity_in_doubt_makes_up_no_member_that_is_being_rebuilt() -> None:
    machine = Machine(10, level=5, journal=False)
    await machine.create()
    await leave_amid_a_rebuild(machine, stop=False)
    await assert_refused(machine, r"not stopped cleanly, and members are .* not rebuilt")
    async with machine.running(force=True) as array:
        await assert_all_fits(array)
        await machine.check(array)


async def test_a_member_that_is_being_rebuilt_does_not_count_as_there() -> None:
    machine = Machine(10, level=5)
    await machine.create()
    await leave_amid_a_rebuild(machine, stop=True)
    machine.members["m0"].gone = True
    await assert_refused(machine, r"1 of 4 members .*, and 1 are not rebuilt yet", degraded=True)
    machine.members["m0"].gone = False
    async with machine.running() as array:
        await assert_all_fits(array)
        await machine.check(array)


# ---- doubts


async def test_a_write_that_has_failed_is_in_doubt_over_a_clean_stop() -> None:
    machine = Machine(12, level=10, layout="far")
    await machine.create()
    async with machine.running() as array:
        await machine.write(array, 5)
        await array.fail("m0")
        with refusing(machine.members["m1"], await in_data_of(machine)):  # it has to stay
            errors = await array.array.write([(CHUNK, memoryview(b"n" * CHUNK))])
        assert errors != [None]
        assert states(array)["m1"] == "active"
    async with machine.running(degraded=True) as array:
        await assert_all_fits(array)


@pytest.mark.parametrize("bitmap", [True, False])
async def test_a_resync_that_could_not_go_on_is_done_at_the_next_start(bitmap: bool) -> None:
    machine = Machine(12, level=1, bitmap=bitmap)
    await machine.create()
    async with machine.running(stop=False) as array:
        assert await put(machine, array, 0, b"1")
    await tear(machine, "m1")
    in_data = await in_data_of(machine)
    with contextlib.ExitStack() as stack:
        for member in machine.members.values():  # no bad sectors: those a resync gets over
            stack.enter_context(refusing(member, in_data, reads=True, code=errno.ETIMEDOUT))
        async with machine.running() as array:
            await idle(array)
            assert set(states(array).values()) == {"active"}
    async with machine.running() as array:
        await assert_all_fits(array)
        await machine.check(array)


# ---- members that cannot say all


async def test_one_bad_sector_in_one_bitmap_stops_no_start() -> None:
    machine = Machine(15, level=1)
    await machine.create()
    async with machine.running() as array:
        await machine.write(array, 5)
    machine.members["m2"].bad_blocks.add(BITMAP_OFFSET // BLOCK)
    async with machine.running() as array:
        assert set(states(array).values()) == {"active"}
        await machine.check(array)


async def test_a_member_whose_log_of_bad_blocks_cannot_be_read_counts_as_missing() -> None:
    machine = Machine(15, level=1)
    await machine.create()
    async with machine.running() as array:
        await machine.write(array, 5)
    machine.members["m2"].bad_blocks.add(BAD_BLOCKS_OFFSET // BLOCK)
    await assert_refused(machine, r"(?s)1 of 4 members are missing.*m2: bad sector")
    async with machine.running(degraded=True) as array:
        assert sorted(states(array).values()) == ["active", "active", "active", "faulty"]
        assert machine.members["m2"].closed
        await machine.check(array)


async def test_a_spare_is_seated_in_the_end_when_that_failed_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The work behind the I/O does not end with an error of a member that has to stay."""
    machine = Machine(17, level=5)
    await machine.create()
    async with machine.running() as array:
        await machine.write(array, 20)
        await array.fail("m1")
        start = array.superblock.journal_offset
        in_journal = between(start, start + array.superblock.journal_bytes)
        with refusing(machine.members["m0"], in_journal) as refused:
            await array.add(machine.new_device())
            for _ in range(1000):  # time for a second try, which is not to come so soon
                await trio.lowlevel.checkpoint()
            assert (len(refused), states(array)["m4"]) == (1, "spare")
        await trio.sleep(60)
        assert (states(array)["m4"], array.status().state) == ("active", "active")
        await machine.check(array)


# ---- creation


async def test_a_creation_that_was_cut_off_leaves_an_old_array_whole_or_not_at_all() -> None:
    outcomes: set[str] = set()
    for steps in range(0, 200, 3):
        machine = Machine(18, level=1)
        await machine.create()
        async with machine.running() as array:
            await machine.write(array, 3)
        machine.fuse.left = steps
        made = await _create_over(machine)
        machine.fuse.left = ENOUGH
        outcomes.add(await _what_starts(machine))
        if made:
            break
    assert outcomes == {"a, whole", "nothing", "new"}


async def _create_over(machine: Machine) -> bool:
    """False: the machine has crashed meanwhile."""
    wishes = Wishes(name="new", level=1, chunk_bytes=CHUNK, force=True)
    made = False
    try:
        await create(wishes, list(machine.members), open_member=machine.open)
        made = True
    except* Crashed:
        pass
    return made


async def _what_starts(machine: Machine) -> str:
    try:
        async with machine.running(degraded=True) as array:
            if array.name == "new":
                return "new"
            held = bytes(await array.array.read(0, array.size))
            return "a, whole" if held == bytes(machine.model) else "a, and not what it held"
    except PmblkError:
        return "nothing"


async def test_level_0_with_integrity_reads_what_was_never_written() -> None:
    machine = Machine(22, level=0, integrity=True)
    _fill(machine)
    await machine.create()
    async with machine.running() as array:
        assert await array.array.write([(512, memoryview(b"x" * 512))]) == [None]
        machine.model[512:1024] = b"x" * 512
        await machine.check(array)


@pytest.mark.parametrize("level", [1, 5])
async def test_checksums_of_what_members_hold_already_are_refused(level: int) -> None:
    machine = Machine(22, level=level, integrity=True, assume_clean=True)
    _fill(machine)
    before = [bytes(member.content) for member in machine.members.values()]
    with pytest.raises(PmblkError, match=r"are not known; leave out --assume-clean, or --integ"):
        await machine.create()
    assert [bytes(member.content) for member in machine.members.values()] == before


def _fill(machine: Machine) -> None:
    for member in machine.members.values():
        member.content[:] = machine.chosen.randbytes(member.size)
