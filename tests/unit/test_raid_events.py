"""What happens to an array is told once: by the engine, and by the daemon's log."""

import pytest

from pmblk.raid.events import (
    Event,
    MemberFailed,
    MemberNeeded,
    MemberSeated,
    StateChanged,
    SweepBegan,
    SweepEnded,
    WorkEnded,
)
from pmblkd import array_log
from tests.unit.conftest import LogRecord
from tests.unit.test_raid_running import Machine, idle


async def test_the_loss_of_a_member_its_spare_and_the_rebuild_are_told_in_their_order() -> None:
    machine, told = Machine(3, level=5), list[Event]()
    await machine.create()
    async with machine.running(tell=told.append) as array:
        await machine.write(array, 10)
        await idle(array)
        assert told == [], "an array that is well has nothing to tell"
        await array.add(machine.new_device())
        await array.fail("m1")
        await idle(array)
        await machine.check(array)
    assert told == [
        MemberFailed(slot=1, place="m1", reason="failed by command"),
        StateChanged(state="degraded"),
        MemberSeated(slot=1, place="m4", returned=False),
        SweepBegan(kind="rebuild", slot=1),
        SweepEnded(kind="rebuild", slot=1, findings=()),
        StateChanged(state="active"),
    ]


async def test_a_member_that_comes_back_is_told_to_be_back() -> None:
    machine, told = Machine(3, level=6), list[Event]()
    await machine.create()
    async with machine.running(tell=told.append) as array:
        await array.fail("m2")
        await machine.write(array, 5)
        await array.add("m2")
        await idle(array)
        assert not any(member.reason for member in array.status().members)
    assert MemberSeated(slot=2, place="m2", returned=True) in told
    assert told[-2:] == [
        SweepEnded(kind="rebuild", slot=2, findings=()),
        StateChanged(state="active"),
    ]


async def test_a_member_that_is_missing_at_the_start_is_told_and_so_is_what_that_means() -> None:
    machine, told = Machine(4, level=5), list[Event]()
    await machine.create()
    machine.members["m0"].gone = True
    async with machine.running(tell=told.append, degraded=True) as array:
        uuid = str(array.superblock.entries[0].member)
    assert told == [
        MemberFailed(slot=0, place=uuid, reason="it was missing at the start"),
        StateChanged(state="degraded"),
    ]


async def test_a_scrub_tells_what_it_has_found() -> None:
    machine, told = Machine(5, level=5), list[Event]()
    await machine.create()
    async with machine.running(tell=told.append) as array:
        await machine.write(array, 20)
        member = machine.members["m1"]
        member.content[array.superblock.data_offset] ^= 1
        array.scrub(repair=True)
        await idle(array)
    *_, began, ended = told
    assert began == SweepBegan(kind="repair", slot=None)
    assert isinstance(ended, SweepEnded)
    assert ended.findings
    assert (ended.error, ended.stopped) == ("", False)


async def test_a_member_that_the_array_cannot_be_without_is_told_once() -> None:
    machine, told = Machine(6, level=0), list[Event]()
    await machine.create()
    async with machine.running(tell=told.append, stop=False) as array:
        machine.members["m0"].gone = True
        for _ in range(3):
            with pytest.raises(OSError, match=r"."):
                await array.array.read(0, array.size)
        array.close()
    assert told == [MemberNeeded(slot=0, place="m0", reason="gone")]


@pytest.mark.parametrize(
    ("event", "words", "level"),
    [
        (MemberFailed(slot=1, place="/m", reason="r"), "array member failed", "warning"),
        (
            MemberNeeded(slot=1, place="/m", reason="r"),
            "array cannot be without a member that fails",
            "error",
        ),
        (MemberSeated(slot=1, place="/m", returned=False), "spare takes over", "info"),
        (MemberSeated(slot=1, place="/m", returned=True), "array member is back", "info"),
        (SweepBegan(kind="rebuild", slot=2), "array rebuild begins", "info"),
        (SweepEnded(kind="check", slot=None, findings=()), "array check ended", "info"),
        (SweepEnded(kind="check", slot=None, findings=("2 lost",)), "array check ended", "warning"),
        (
            SweepEnded(kind="repair", slot=None, findings=(), stopped=True),
            "array repair stopped",
            "info",
        ),
        (
            SweepEnded(kind="rebuild", slot=1, findings=(), error="gone"),
            "array rebuild failed",
            "warning",
        ),
        (StateChanged(state="degraded"), "array is degraded", "warning"),
        (StateChanged(state="active"), "array is whole", "info"),
        (WorkEnded(reason="r"), "array cannot tell its members of a change", "error"),
    ],
)
def test_bad_news_are_warnings_in_the_log_and_good_news_are_none(
    event: Event, words: str, level: str, logged: LogRecord
) -> None:
    array_log.tell("pool", event)
    record = logged.expect(words)
    assert (record["name"], record["level"]) == ("pool", level)
    assert logged == []


def test_the_log_has_the_findings_of_a_scrub(logged: LogRecord) -> None:
    array_log.tell("pool", SweepEnded(kind="check", slot=None, findings=("1 block", "/m at 7")))
    assert logged.expect("array check ended")["findings"] == ["1 block", "/m at 7"]
