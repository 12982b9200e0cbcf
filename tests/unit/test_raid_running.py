"""Arrays in service: members fail, come back, are replaced; machines crash; nothing is lost."""

import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from pmblk.errors import PmblkError
from pmblk.raid.assembling import assemble
from pmblk.raid.creation import Wishes, create
from pmblk.raid.member import Member
from pmblk.raid.running import RunningArray
from pmblk.raid.sweep import Pace
from tests.unit.crashing_member import Crashed, CrashingMember, Fuse

ENOUGH = 1 << 60
MEBIBYTE = 1 << 20
SIZE = 7 * MEBIBYTE
CHUNK = 16384
LEVELS: list[dict[str, Any]] = [
    {"level": 1},
    {"level": 4},
    {"level": 5},
    {"level": 5, "journal": False},
    {"level": 6},
    {"level": 10, "layout": "near"},
    {"level": 10, "layout": "far"},
    {"level": 10, "layout": "offset"},
    {"level": 6, "integrity": True},
    {"level": 10, "layout": "far", "integrity": True},
]


def name(shape: dict[str, Any]) -> str:
    return "-".join(str(value) for value in shape.values())


class Machine:
    """Devices, an array on them, and what it should hold. A crash takes the array, not these."""

    def __init__(self, seed: int, **wishes: Any) -> None:
        self.chosen = random.Random(seed)
        self.fuse = Fuse(ENOUGH)
        self.members: dict[str, CrashingMember] = {}
        for _ in range(4):
            self.new_device()
        self.wishes = {"name": "a", "chunk_bytes": CHUNK, **wishes}
        self.model = bytearray()

    def new_device(self, size: int = SIZE) -> str:
        place = f"m{len(self.members)}"
        self.members[place] = CrashingMember(size, self.fuse, name=place)
        return place

    async def open(self, place: str) -> Member:
        member = self.members[place]
        if member.gone:
            raise PmblkError(f"{place} is gone")
        member.closed = False
        return member

    async def create(self, **more: Any) -> None:
        wishes: Any = Wishes(**{**self.wishes, **more})
        made = await create(wishes, list(self.members), open_member=self.open)
        self.model = bytearray(made.geometry.size)

    @contextlib.asynccontextmanager
    async def running(self, *, stop: bool = True, **how: Any) -> AsyncIterator[RunningArray]:
        """In service, with its work in the background; stopped cleanly at the end, or not."""
        array = await assemble(list(self.members), open_member=self.open, pace=Pace(0, 0), **how)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(array.run)
            yield array
            nursery.cancel_scope.cancel()
        if stop:
            await array.stop()

    async def write(self, array: RunningArray, count: int = 1) -> None:
        for _ in range(count):
            length = self.chosen.choice([512, 4096, CHUNK, 5 * CHUNK])
            offset = self.chosen.randrange((array.size - length) // 512) * 512
            data = self.chosen.randbytes(length)
            if self.chosen.random() < 0.1:
                data = bytes(length)
                await array.array.zero(offset, length)
            else:
                assert await array.array.write([(offset, memoryview(data))]) == [None]
            self.model[offset : offset + length] = data

    async def check(self, array: RunningArray) -> None:
        assert bytes(await array.array.read(0, array.size)) == bytes(self.model)


async def idle(array: RunningArray) -> None:
    """Until nothing is left to do in the background."""
    with trio.fail_after(60):
        while True:
            await trio.testing.wait_all_tasks_blocked()
            status = array.status()
            if status.sweep is None:
                return
            await trio.sleep(0.01)


def states(array: RunningArray) -> dict[str | None, str]:
    return {one.place: one.state for one in array.status().members}


@pytest.mark.parametrize("shape", LEVELS, ids=name)
async def test_a_stopped_array_starts_clean_with_all_it_held(shape: dict[str, Any]) -> None:
    machine = Machine(1, **shape)
    await machine.create()
    async with machine.running() as array:
        await machine.write(array, 20)
    async with machine.running() as array:
        assert array.status().sweep is None
        await machine.check(array)
    assert all(member.closed for member in machine.members.values())


@pytest.mark.parametrize("shape", LEVELS, ids=name)
async def test_after_a_crash_what_was_marked_is_made_to_fit(shape: dict[str, Any]) -> None:
    machine = Machine(2, **shape)
    await machine.create()
    async with machine.running(stop=False) as array:
        await machine.write(array, 5)
    for member in machine.members.values():
        member.reads = 0
    async with machine.running() as array:
        await idle(array)
        await machine.check(array)
        array.scrub(repair=False)
        await idle(array)
        scrub = array.status().scrub
        assert scrub is not None
        assert not scrub.findings
    async with machine.running() as array:
        assert array.status().sweep is None


@pytest.mark.parametrize("shape", LEVELS, ids=name)
async def test_a_spare_takes_over_and_any_other_member_can_be_lost_then(
    shape: dict[str, Any],
) -> None:
    machine = Machine(3, **shape)
    await machine.create()
    spare = machine.new_device()
    async with machine.running() as array:
        await array.add(spare)
        await machine.write(array, 20)
        machine.members["m1"].gone = True
        await machine.write(array, 20)
        await idle(array)
        assert states(array)[spare] == "active"
        assert states(array)["m1"] == "faulty"
        assert array.status().state == "active"
        await machine.write(array, 5)
    machine.members["m2"].gone = True
    async with machine.running(degraded=True) as array:
        assert states(array)[None] == "faulty"  # nobody knows where it is
        await machine.check(array)
        gone = next(one for one in array.status().members if one.slot == 2)
        await array.remove(str(gone.member))
        assert next(one for one in array.status().members if one.slot == 2).state == "empty"


async def test_a_member_that_comes_back_gets_only_what_it_lacks(
    autojump_clock: trio.testing.MockClock,
) -> None:
    machine = Machine(4, level=5)
    await machine.create()
    async with machine.running() as array:
        await machine.write(array, 20)
        await trio.sleep(30)  # until nothing is marked
        await array.fail("m1")
        offset, data = 0, machine.chosen.randbytes(CHUNK)
        await array.array.write([(offset, memoryview(data))])
        machine.model[offset : offset + CHUNK] = data
        back = machine.members["m1"]
        back.writes = 0
        await array.add("m1")
        await idle(array)
        assert states(array)["m1"] == "active"
        assert 0 < back.writes <= MEBIBYTE + 128 * 4096  # a region, and words about it
        await machine.check(array)
    machine.members["m0"].gone = True
    async with machine.running(degraded=True) as array:
        await machine.check(array)


async def test_a_member_that_left_while_marks_could_go_is_rebuilt_as_a_whole() -> None:
    machine = Machine(5, level=5)
    await machine.create()
    async with machine.running() as array:
        await machine.write(array, 20)
        await array.fail("m1")
        await machine.write(array, 20)
        await array.add(machine.new_device())
        await idle(array)  # whole again, without it
        await machine.write(array, 20)
        await array.add("m1")
        assert states(array)["m1"] == "spare"
        await array.fail("m0")
        await idle(array)
        assert states(array)["m1"] == "active"
        await machine.check(array)


async def test_a_replaced_member_serves_until_the_new_one_holds_all() -> None:
    machine = Machine(6, level=5)
    await machine.create()
    new = machine.new_device()
    async with machine.running() as array:
        await machine.write(array, 20)
        await array.replace("m2", new)
        assert states(array)[new] == "replacing"
        await machine.write(array, 5)
        await idle(array)
        assert states(array)[new] == "active"
        assert "m2" not in states(array)
        await machine.write(array, 5)
    machine.members["m0"].gone = True
    async with machine.running(degraded=True) as array:
        assert states(array)[new] == "active"
        await machine.check(array)


async def test_a_replacement_that_fails_leaves_the_old_member_alone() -> None:
    machine = Machine(7, level=5)
    await machine.create()
    new = machine.new_device()
    async with machine.running() as array:
        await machine.write(array, 5)
        await array.replace("m2", new)
        machine.members[new].gone = True
        await machine.write(array, 5)
        await idle(array)
        assert states(array)["m2"] == "active"
        assert states(array)[new] == "faulty"
        await machine.check(array)
        await array.remove(new)
        assert new not in states(array)


@pytest.mark.parametrize("shape", LEVELS, ids=name)
async def test_a_crash_at_any_point_of_a_rebuild_loses_nothing(shape: dict[str, Any]) -> None:
    for seed in range(6):
        machine = Machine(seed, **shape)
        await machine.create()
        machine.new_device()
        with contextlib.suppress(BaseExceptionGroup):
            async with machine.running(stop=False) as array:
                await machine.write(array, 10)
                await array.array.flush()
                machine.fuse.left = machine.chosen.randrange(200)
                try:
                    await array.fail("m1")
                    await array.add("m4")
                    await idle(array)
                except* Crashed:
                    pass
        machine.fuse.left = ENOUGH
        async with machine.running(degraded=True, force=True) as array:
            await machine.check(array)
            await idle(array)
            if "m4" not in states(array):
                await array.add("m4")
                await idle(array)
            await machine.check(array)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda array: array.fail("mx"), r"mx is no member of a; its members: m0, m1, m2, m3"),
        (lambda array: array.remove("m1"), r"m1 is in use; fail it first"),
        (lambda array: array.add("m1"), r"m1 is in the array already"),
        (lambda array: array.replace("mx", "m1"), r"mx is no member"),
        (lambda array: array.replace("m1", "m2"), r"m2 is no spare"),
    ],
)
async def test_what_cannot_be_asked_for_is_refused_with_what_to_do(what: Any, words: str) -> None:
    machine = Machine(8, level=5)
    await machine.create()
    async with machine.running() as array:
        with pytest.raises(PmblkError, match=words):
            await what(array)
        assert set(states(array).values()) == {"active"}


async def test_the_last_member_that_is_needed_cannot_be_failed() -> None:
    machine = Machine(9, level=5)
    await machine.create()
    async with machine.running() as array:
        await array.fail("m1")
        with pytest.raises(PmblkError, match="cannot be without m2"):
            await array.fail("m2")
        with pytest.raises(PmblkError, match="m1 has failed already"):
            await array.fail("m1")
        await machine.check(array)


async def test_a_device_that_is_too_small_is_no_spare() -> None:
    machine = Machine(10, level=5)
    await machine.create()
    async with machine.running() as array:
        with pytest.raises(PmblkError, match=r"m4 is too small: \d+ bytes of \d+"):
            await array.add(machine.new_device(SIZE - MEBIBYTE))
        assert machine.members["m4"].closed


async def test_marks_go_when_nobody_writes_and_stay_while_a_member_is_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    machine = Machine(11, level=5)
    await machine.create()
    async with machine.running() as array:
        await machine.write(array)
        assert array.status().dirty_bytes
        await trio.sleep(30)
        assert array.status().dirty_bytes == 0
        await array.fail("m1")
        await machine.write(array)
        await trio.sleep(30)
        assert array.status().dirty_bytes


@pytest.mark.parametrize("shape", LEVELS, ids=name)
async def test_histories_of_failures_and_crashes(shape: dict[str, Any]) -> None:
    """Everything at random; after every start all that was acknowledged is there."""
    for seed in range(5):
        machine = Machine(100 + seed, **shape)
        await machine.create()
        for _ in range(4):
            async with machine.running(
                stop=machine.chosen.random() < 0.5, degraded=True, force=True
            ) as array:
                await machine.check(array)
                for _ in range(6):
                    await _something_happens(machine, array)
                await machine.check(array)


async def _something_happens(machine: Machine, array: RunningArray) -> None:
    chosen = machine.chosen
    what = chosen.randrange(6)
    if what < 2:
        await machine.write(array, 5)
    elif what == 2 and array.status().state == "active":
        await array.fail(
            chosen.choice([p for p, s in states(array).items() if p and s == "active"])
        )
    elif what == 3 and array.status().state == "degraded":
        faulty = [place for place, state in states(array).items() if place and state == "faulty"]
        back = chosen.random() < 0.5 and faulty
        await array.add(chosen.choice(faulty) if back else machine.new_device())
    elif what == 4:
        await idle(array)
    else:
        await array.array.flush()


async def test_a_member_that_was_cut_short_is_not_taken_for_what_it_was() -> None:
    """Its lost end must not be read: not at a start, and not when it comes back."""
    machine = Machine(31, level=5)
    await machine.create()
    async with machine.running() as array:
        await machine.write(array, 10)
        await array.fail("m1")
        cut = machine.members["m1"]
        cut.size -= 3 * MEBIBYTE
        with pytest.raises(PmblkError, match="m1 is too small: 4194304 bytes of"):
            await array.add("m1")
        assert states(array)["m1"] == "faulty"
    machine.members["m2"].size -= 3 * MEBIBYTE
    with pytest.raises(PmblkError, match=r"m2: it was cut short: 4194304 bytes of \d+ are left"):
        await assemble(list(machine.members), open_member=machine.open)
