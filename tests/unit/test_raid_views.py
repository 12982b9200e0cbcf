"""What people get to read about arrays: everybody who takes part, how far the work is, and why not.

Everything fits its terminal, also a narrow one.
"""

import uuid
from typing import Any

import pytest

from pmblk.raid.status import MemberStatus, SweepStatus
from pmblkd import raid_views
from pmblkd.raid_reports import (
    AssemblyReport,
    CreatedReport,
    DeviceReport,
    ExamineReport,
    RaidReport,
    StoppedReport,
)
from tests.unit.arrays import ARRAY, array_status

REBUILD = SweepStatus(kind="rebuild", position=420, end=1000, bytes_per_second=2.9)


def member(slot: int | None, place: str | None, state: str, **fields: Any) -> MemberStatus:
    number = uuid.UUID(int=1 if slot is None else slot + 2)
    return MemberStatus(slot=slot, place=place, member=number, state=state, **fields)


MEMBERS = (
    member(0, "/dev/shm/m0", "active"),
    member(1, "/dev/disk/by-id/" + "x" * 60, "rebuilding", checkpoint=512 << 20),
    member(2, "nbd://host/m2", "active", bad_blocks=1),
    member(3, None, "faulty", reason="it does not answer"),
    member(None, "/dev/shm/spare", "spare"),
)


def report(**changes: Any) -> RaidReport:
    return RaidReport(name="data", status=array_status(members=MEMBERS, **changes))


def fits(view: str, columns: int) -> str:
    assert all(len(line) <= columns for line in view.splitlines()), view
    assert all(line == line.rstrip() for line in view.splitlines())
    return view


@pytest.mark.parametrize("columns", [60, 80, 132])
def test_one_array_is_shown_with_everybody_who_takes_part(columns: int) -> None:
    view = fits(raid_views.array(report(state="degraded", sweep=REBUILD), columns=columns), columns)
    lines = view.splitlines()
    assert lines[0] == "data: RAID 5 (left-symmetric), degraded"
    assert f"    UUID {ARRAY} as array" in lines
    rows = [line.split() for line in lines if "  " in line.strip()]
    assert ["0", "active", "/dev/shm/m0"] in rows
    assert ["-", "spare", "/dev/shm/spare"] in rows
    assert ["2", "active", "nbd://host/m2", "1", "bad", "block"] in rows
    assert "50% is whole" in view
    (nowhere,) = (one for one in report().status.members if one.place is None)
    if columns > 60:  # where it is not folded
        assert str(nowhere.member) in view
        assert "it does not answer" in view


@pytest.mark.parametrize("columns", [60, 80])
def test_work_has_a_bar_with_its_part_its_speed_and_what_is_left(columns: int) -> None:
    view = fits(raid_views.array(report(sweep=REBUILD), columns=columns), columns)
    (line,) = [line for line in view.splitlines() if "rebuild " in line]
    words = line.split()
    assert words[0] == "rebuild"
    assert set(words[1]) <= set("━╸")
    assert words[2:] == ["42%", "2", "B/s", "3", "min", "20", "s", "left"]


def test_nobody_guesses_the_time_left_of_work_that_stands_still() -> None:
    still = SweepStatus(kind="resync", position=0, end=1000, bytes_per_second=0.0)
    view = raid_views.array(report(sweep=still), columns=80)
    assert "resync" in view
    assert "left\n" not in view


def test_what_the_last_scrub_found_is_said_or_that_it_found_nothing() -> None:
    found = SweepStatus(
        kind="check", position=5, end=5, bytes_per_second=1.0, findings=("row 7 does not fit",)
    )
    view = raid_views.array(report(scrub=found), columns=80)
    assert "last scrub (check), to its end; it found:\n        row 7 does not fit" in view
    half = SweepStatus(kind="repair", position=1, end=2, bytes_per_second=1.0)
    view = raid_views.array(report(scrub=half), columns=80)
    assert "last scrub (repair), 50% of the array; nothing found" in view


def test_what_protects_an_array_is_said_and_what_does_not() -> None:
    view = raid_views.array(report(write_hole="open", dirty_bytes=None), columns=80)
    assert "write hole open: no journal" in view
    assert "no bitmap: after a crash all of it is looked at" in view
    view = raid_views.array(report(level=0, layout="", dirty_bytes=None), columns=80)
    assert "write hole" not in view
    assert "bitmap" not in view
    assert "a checksum for each block" in raid_views.array(report(integrity=True), columns=80)


def test_all_arrays_are_a_few_lines_each() -> None:
    view = fits(raid_views.arrays([report(sweep=REBUILD), report()], columns=80), 80)
    assert view.count("RAID 5 (left-symmetric), 2 of 4 members, 1 spare") == 2
    assert "42%" in view
    assert raid_views.arrays([], columns=80) == "no array is in service"


def test_a_change_is_one_line() -> None:
    view = raid_views.changed(report(state="degraded"), "/m1 has failed")
    assert view == "data: /m1 has failed; degraded, 2 of 4 members, 1 spare"
    assert raid_views.stopped(StoppedReport(name="data", users=0)) == "data: stopped"
    assert "last user has left (1 user)" in raid_views.stopped(StoppedReport(name="data", users=1))


def test_a_new_array_says_what_it_is_and_what_was_made_for_it() -> None:
    created = CreatedReport(
        name="data",
        array=ARRAY,
        level=1,
        layout="",
        chunk_bytes=65536,
        size_bytes=1 << 30,
        clean=False,
        members=["/a", "/b"],
        spares=[],
        files=["/b"],
    )
    view = raid_views.created(created)
    assert view.splitlines()[0] == "data: RAID 1 over 2 members"
    assert "    /b: made" in view
    assert "made to fit when it is first served" in view


def examined(**changes: Any) -> ExamineReport:
    fields: dict[str, Any] = {
        "name": "data",
        "array": ARRAY,
        "level": 5,
        "layout": "left-symmetric",
        "chunk_bytes": 65536,
        "size_bytes": 2 << 30,
        "slots": ["/m0", None],
        "spares": [],
        "clean": True,
        "obstacles": [],
        "notes": [],
    }
    devices = [
        DeviceReport(place="/m0", name="data", array=ARRAY, slot=0, state="active", events=9),
        DeviceReport(place="/m1", problem="no superblock"),
    ]
    return ExamineReport(devices=devices, assembly=AssemblyReport(**{**fields, **changes}))


def test_what_devices_say_is_a_table_and_every_obstacle_has_its_line() -> None:
    obstacles = ["1 of 2 members is missing", "it was not stopped cleanly"]
    report = examined(obstacles=obstacles, clean=False, notes=["/m2: left out: it is stale"])
    view = fits(raid_views.examined(report, columns=80), 80)
    assert "/m0     data   0     active  9" in view
    assert "/m1: no superblock" in view
    assert view.splitlines()[-3:] == [
        "    it cannot start:",
        "        1 of 2 members is missing",
        "        it was not stopped cleanly",
    ]
    assert not report.can_start
    assert raid_views.examined(examined(), columns=80).endswith("    it can start")
    assert examined().can_start


def test_devices_of_no_array_say_so() -> None:
    report = ExamineReport(devices=[], assembly=None, reason="none of them is a member")
    assert raid_views.examined(report, columns=80) == "no array: none of them is a member"
    assert not report.can_start


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (200_000, "2 d 7 h")],
)
def test_a_duration_has_two_units_at_most(seconds: float, words: str) -> None:
    assert raid_views.duration(seconds) == words
