"""Making an array: a crash leaves none, or one that is whole; nobody's member is taken."""

import errno
from typing import Any

import pytest
import trio

from pmblk.errors import PmblkError
from pmblk.raid import areas
from pmblk.raid.assembling import assemble
from pmblk.raid.assembly import Assembly, Candidate, NoArray
from pmblk.raid.assembly import assemble as judge
from pmblk.raid.creation import Wishes, create
from pmblk.raid.labels import read_label
from pmblk.raid.member import Member
from pmblk.raid.superblock import Flag, Superblock
from tests.unit.crashing_member import Crashed, CrashingMember, Fuse

ENOUGH = 1_000_000
MEBIBYTE = 1 << 20


class Machine:
    """Devices by their places, under one fuse."""

    def __init__(self, count: int, *, size: int = 16 * MEBIBYTE) -> None:
        self.fuse = Fuse(ENOUGH)
        self.members = {
            f"m{n}": CrashingMember(size, self.fuse, name=f"m{n}") for n in range(count)
        }

    async def open(self, place: str) -> Member:
        member = self.members[place]
        member.closed = False
        return member

    async def create(self, *, spares: int = 0, **wishes: Any) -> Superblock:
        places = list(self.members)
        first = len(places) - spares
        return await create(
            Wishes(**{"name": "a", "level": 5, "chunk_bytes": 65536, **wishes}),
            places[:first],
            spares=places[first:],
            open_member=self.open,
        )

    async def judged(self) -> Assembly | None:
        """What a start would make of it; None where it finds no array."""
        found = []
        for place, member in self.members.items():
            member.closed = False
            found.append(Candidate(place, (await read_label(member)).found))
        try:
            return judge(found)
        except NoArray:
            return None


async def test_what_is_made_can_start_at_once() -> None:
    machine = Machine(5)
    made = await machine.create(spares=1, level=6, integrity=True)
    found = await machine.judged()
    assert found is not None
    assert (found.obstacles, found.slots, found.spares) == ((), ("m0", "m1", "m2", "m3"), ("m4",))
    assert not found.dirty
    assert Flag.INTEGRITY | Flag.JOURNAL in made.flags
    assert all(member.closed is False for member in machine.members.values())  # by `judged`


@pytest.mark.parametrize("level", [1, 5, 10])
async def test_a_crash_leaves_no_array_or_a_whole_one(level: int) -> None:
    outcomes = []
    for steps in range(200):
        machine = Machine(4)
        machine.fuse.left = steps
        made = False
        try:
            await machine.create(level=level)
            made = True
        except* Crashed:
            pass
        machine.fuse.left = ENOUGH
        found = await machine.judged()
        if found is not None and not found.obstacles:
            assert None not in found.slots
            outcomes.append("array")
        else:
            assert found is None or "never finished" in found.obstacles[0]
            outcomes.append("none")
            await machine.create(level=level)  # and the same members can be had again
        if made:
            break
    assert outcomes[-1] == "array"
    assert {"array", "none"} == set(outcomes)
    assert outcomes == sorted(outcomes, reverse=True), "once there, it stays"


async def test_members_that_cannot_be_zeroed_make_a_dirty_array_with_every_mark_set() -> None:
    machine = Machine(3)

    async def refuse(_offset: int, _length: int) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.EOPNOTSUPP, "no")

    machine.members["m1"].zero = refuse  # type: ignore[method-assign, assignment]
    await machine.create()
    found = await machine.judged()
    assert found is not None
    assert found.dirty
    running = await assemble(list(machine.members), open_member=machine.open)
    assert running.status().dirty_bytes == running.size


async def test_a_member_of_another_array_is_refused_unless_forced() -> None:
    machine = Machine(3)
    first = await machine.create(name="first")
    with pytest.raises(PmblkError, match=r"m0 is a member of first .*--force"):
        await machine.create(name="second")
    found = await machine.judged()
    assert found is not None
    assert found.newest.array == first.array
    assert (await machine.create(name="second", force=True)).array != first.array


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"level": 6}, "members 3: level 6 takes 4 to 64"),
        ({"layout": "near"}, 'layout "near" is not for level 5'),
        ({"chunk_bytes": 5000}, "chunk_bytes 5000 is no power of two"),
        ({"level": 10, "copies": 4}, "copies 4"),
        ({"name": "x" * 65}, "too long a name"),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_is_written(
    wishes: dict[str, Any], words: str
) -> None:
    machine = Machine(3)
    with pytest.raises(PmblkError, match=words):
        await machine.create(**wishes)
    assert not any(any(member.content) for member in machine.members.values())


async def test_a_member_that_is_too_small_is_named_with_what_is_needed() -> None:
    machine = Machine(3)
    machine.members["m1"] = CrashingMember(MEBIBYTE, machine.fuse, name="m1")
    with pytest.raises(PmblkError, match=r"m1: 1048576 bytes are too few: at least \d+"):
        await machine.create()


async def test_one_device_cannot_be_two_members() -> None:
    machine = Machine(2)
    with pytest.raises(PmblkError, match="m0 is named twice"):
        await create(Wishes(name="a", level=1), ["m0", "m0"], open_member=machine.open)


@pytest.mark.parametrize("integrity", [False, True])
@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize("chunk_bytes", [4096, 65536, MEBIBYTE])
def test_areas_do_not_overlap_and_fit(integrity: bool, journal: bool, chunk_bytes: int) -> None:
    for size in (9 * MEBIBYTE, 10 * MEBIBYTE + 4096, 100 * MEBIBYTE, 3 << 40):
        found = areas.divide(size, chunk_bytes=chunk_bytes, journal=journal, integrity=integrity)
        assert found.data_offset >= found.journal_offset + found.journal_bytes
        assert found.member_bytes % chunk_bytes == 0
        end = found.data_offset + found.member_bytes
        if integrity:
            assert found.checksums_offset == end
            end += areas.checksums_bytes(found.member_bytes)
        assert end <= size
        assert size - end < chunk_bytes * 2 + 8192, "what is left over is less than two chunks"
        smallest = found.data_offset + chunk_bytes + integrity * areas.checksums_bytes(chunk_bytes)
        if found.member_bytes == chunk_bytes:
            with pytest.raises(areas.TooSmall, match=str(smallest)):
                areas.divide(
                    smallest - 1, chunk_bytes=chunk_bytes, journal=journal, integrity=integrity
                )
