"""The superblock on all members: what is decided is there before it counts, whatever fails."""

import uuid

import pytest

from pmblk.raid.assembly import Assembly, Candidate, assemble
from pmblk.raid.buffers import aligned
from pmblk.raid.geometry import Geometry
from pmblk.raid.keeper import Keeper, Seat
from pmblk.raid.labels import erase_label, read_label
from pmblk.raid.superblock import DATA_OFFSET, Absent, Entry, Flag, State, Superblock
from tests.unit.crashing_member import Crashed, CrashingMember, Fuse

ENOUGH = 10_000  # steps
MEMBERS = 4


class World:
    """Some members whose superblocks are settled, and who keeps them."""

    def __init__(self, *, level: int = 6, spares: int = 0) -> None:
        self.fuse = Fuse(ENOUGH)
        chunk = 4096
        geometry = Geometry(
            level=level,  # type: ignore[arg-type]
            members=MEMBERS,
            member_bytes=chunk,
            chunk_bytes=chunk,
            layout="left-symmetric" if level in (5, 6) else "",
        )
        count = MEMBERS + spares
        size = DATA_OFFSET + chunk
        self.members = [CrashingMember(size, self.fuse, name=f"m{n}") for n in range(count)]
        states = [State.ACTIVE] * MEMBERS + [State.SPARE] * spares
        self.out: list[int] = []
        superblock = Superblock(
            array=uuid.UUID(int=99),
            member=uuid.UUID(int=0),
            name="a",
            created_ns=0,
            updated_ns=0,
            events=0,
            generation=0,
            geometry=geometry,
            entries=tuple(
                Entry(uuid.UUID(int=number + 1), state) for number, state in enumerate(states)
            ),
        )
        seats = {number: Seat(member, 0) for number, member in enumerate(self.members)}
        self.keeper = Keeper(superblock, seats, out=lambda number, _error: self.out.append(number))

    async def settled(self) -> "World":
        await self.keeper.change_roles(lambda one: one)
        return self

    async def assembled(self, *, without: "set[int] | None" = None) -> Assembly:
        """What another start would make of it."""
        candidates = []
        for number, member in enumerate(self.members):
            member.closed = False
            if number not in (without or ()):
                label = await read_label(member)
                candidates.append(Candidate(member.place, label.found))
        return assemble(candidates, degraded=True)


async def test_a_change_is_on_every_member_and_settled() -> None:
    world = await World(spares=1).settled()
    for number, member in enumerate(world.members):
        found = (await read_label(member)).found
        assert isinstance(found, Superblock)
        assert found.member == uuid.UUID(int=number + 1)
        assert (found.events, Flag.SETTLED in found.flags) == (1, True)


async def test_an_update_changes_no_roles() -> None:
    world = await World().settled()
    before = world.keeper.superblock
    await world.keeper.update(lambda one: one)
    found = (await read_label(world.members[0])).found
    assert isinstance(found, Superblock)
    assert found.age == (before.events, before.generation + 1)


async def test_a_failed_member_never_comes_back_once_that_is_told() -> None:
    for steps in range(40):
        world = await World().settled()
        world.fuse.left = steps
        world.members[1].refuses_writes = True
        told = False
        try:
            await world.keeper.fail(1, OSError("failed"))
            told = True
        except* Crashed:
            pass
        world.fuse.left = ENOUGH
        for alone in range(MEMBERS):  # also when one more is missing at the next start
            found = await world.assembled(without={alone})
            assert not (told and found.slots[1] == "m1")
            whole = [slot for slot in range(MEMBERS) if slot not in (1, alone)]
            assert all(found.slots[slot] == f"m{slot}" for slot in whole)
        if told:
            return
    pytest.fail("it was never told")


async def test_who_cannot_be_told_is_out_too_and_the_rest_know_both() -> None:
    world = await World().settled()
    world.members[2].refuses_writes = True
    await world.keeper.fail(1, OSError("failed"))
    assert world.out == [2]
    assert world.members[2].closed
    found = await world.assembled()
    assert found.slots == ("m0", None, None, "m3")
    assert Flag.SETTLED in found.newest.flags


async def test_a_change_that_nobody_can_be_told_of_is_an_error_for_ever() -> None:
    world = await World(level=5).settled()
    world.members[2].refuses_writes = True
    for _ in range(2):
        with pytest.raises(OSError, match="refused"):
            await world.keeper.fail(1, OSError("failed"))
        world.members[2].refuses_writes = False
    with pytest.raises(OSError, match="refused"):
        await world.keeper.update(lambda one: one)
    assert not world.members[2].closed


async def test_a_spare_that_cannot_be_told_just_leaves() -> None:
    world = await World(spares=1).settled()
    world.members[4].refuses_writes = True
    await world.keeper.update(lambda one: one)
    assert world.out == [4]
    assert (await world.assembled()).spares == ()


async def test_whole_events_stand_still_while_a_member_is_out() -> None:
    world = await World().settled()
    assert world.keeper.superblock.whole_events == 1
    await world.keeper.fail(0, OSError("failed"))
    assert (world.keeper.superblock.events, world.keeper.superblock.whole_events) == (2, 1)


async def test_bytes_for_all_go_to_those_who_hold_data() -> None:
    world = await World(spares=1).settled()
    await world.keeper.store(0, aligned(b"x" * 4096), durable=True)
    assert [bytes(member.content[:1]) for member in world.members] == [b"x"] * 4 + [b"\0"]


async def test_an_erased_label_is_gone() -> None:
    world = await World().settled()
    await erase_label(world.members[0])
    assert isinstance((await read_label(world.members[0])).found, Absent)
