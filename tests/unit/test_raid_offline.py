"""Looking at the members of an array that nobody serves, and making the files of a new one."""

import random
import types
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from pmblk import PmblkError
from pmblk.raid.geometry import Geometry
from pmblk.raid.member import Member
from pmblk.raid.superblock import SLOT_OFFSETS, Entry, Flag, State, Superblock, encode
from pmblkd.raid_offline import Plan, create, examine
from tests.unit.arrays import ARRAY
from tests.unit.sim_member import SimMember

GEOMETRY = Geometry(level=5, members=3, member_bytes=1 << 20, layout="left-symmetric")
IDS = [uuid.UUID(int=number) for number in range(1, 5)]


def superblock(number: int, **changes: Any) -> Superblock:
    fields: dict[str, Any] = {
        "array": ARRAY,
        "member": IDS[number],
        "name": "data",
        "created_ns": 1,
        "updated_ns": 2,
        "events": 5,
        "generation": 9,
        "geometry": GEOMETRY,
        "entries": (
            *(Entry(one, State.ACTIVE) for one in IDS[:3]),
            Entry(IDS[3], State.SPARE),
        ),
        "flags": Flag.SETTLED,
    }
    return Superblock(**{**fields, **changes})


class Devices:
    """Devices in memory by their place; `opened` counts those that nobody has closed."""

    def __init__(self, **found: Superblock | None) -> None:
        self.members: dict[str, SimMember] = {}
        for name, block in found.items():
            member = SimMember(1 << 21, random.Random(1), name=f"/{name}")
            if block is not None:
                at = SLOT_OFFSETS[0]
                encoded = encode(block)
                member.content[at : at + len(encoded)] = encoded
            self.members[f"/{name}"] = member

    async def open(self, place: str) -> Member:
        await trio.lowlevel.checkpoint()
        if place not in self.members:
            raise PmblkError(f"cannot open {place}", hint="mend the path")
        return self.members[place]


async def test_members_make_up_an_array_that_can_start() -> None:
    devices = Devices(**{f"m{number}": superblock(number) for number in range(4)})
    report = await examine(["/m3", "/m2", "/m1", "/m0", "/m0"], devices.open)
    assert [(one.place, one.slot, one.state) for one in report.devices] == [
        ("/m3", None, "spare"),
        ("/m2", 2, "active"),
        ("/m1", 1, "active"),
        ("/m0", 0, "active"),
    ]
    found = report.assembly
    assert found is not None
    assert (found.slots, found.spares) == (["/m0", "/m1", "/m2"], ["/m3"])
    assert (found.level, found.size_bytes, found.clean) == (5, 2 << 20, True)
    assert report.can_start
    assert all(member.closed for member in devices.members.values())


async def test_what_is_missing_cannot_be_opened_or_read_is_said_of_each() -> None:
    devices = Devices(m0=superblock(0, flags=Flag.DIRTY | Flag.SETTLED), empty=None, bad=None)
    devices.members["/bad"].gone = True
    report = await examine(["/m0", "/empty", "/bad", "/none"], devices.open)
    problems = {one.place: one.problem for one in report.devices}
    assert problems["/m0"] == ""
    assert "no superblock" in problems["/empty"]
    assert problems["/bad"] == "gone"
    assert problems["/none"] == "cannot open /none; mend the path"
    found = report.assembly
    assert found is not None
    assert not found.clean
    assert any("2 of 3 members are missing" in line for line in found.obstacles)
    assert not report.can_start


async def test_devices_of_no_array_or_of_two_are_no_array() -> None:
    report = await examine(["/empty"], Devices(empty=None).open)
    assert report.assembly is None
    assert "none of these devices is a member" in report.reason
    two = Devices(m0=superblock(0), m1=superblock(1, array=uuid.UUID(int=8), name="other"))
    report = await examine(["/m0", "/m1"], two.open)
    assert not report.can_start
    assert "several arrays" in report.reason


# ---- making


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """As the engine's."""

    name: str
    level: int
    layout: str | None
    chunk_bytes: int
    copies: int
    integrity: bool
    journal: bool
    bitmap: bool
    assume_clean: bool
    force: bool
    array: uuid.UUID | None


class Creation(types.ModuleType):
    """Stands in for `pmblk.raid.creation`: says what it was asked, and makes nothing."""

    def __init__(self) -> None:
        super().__init__("creation")
        self.Wishes = Wishes
        self.asked: list[Any] = []
        self.refusal: PmblkError | None = None

    async def create(
        self, wishes: Wishes, places: list[str], *, spares: list[str], open_member: Any
    ) -> Superblock:
        self.asked.append((wishes, places, spares))
        if self.refusal is not None:
            raise self.refusal
        return superblock(0, flags=Flag.DIRTY)


@pytest.fixture
def creation(monkeypatch: pytest.MonkeyPatch) -> Creation:
    made = Creation()
    monkeypatch.setattr("pmblkd.raid_offline.creation", made)
    return made


def plan(directory: Path, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "name": "data",
        "members": [f"{directory}/m0", f"{directory}/m1", "nbd://host/m2"],
        "spares": [f"{directory}/s0"],
        "size": 1 << 20,
        "level": 5,
        "layout": None,
        "chunk_bytes": 65536,
        "copies": 2,
        "integrity": True,
        "journal": True,
        "bitmap": True,
        "assume_clean": False,
        "force": False,
        "array": ARRAY,
    }
    return Plan(**{**fields, **changes})


async def test_files_that_are_missing_are_made_and_those_that_are_there_stay(
    creation: Creation, directory: Path
) -> None:
    (directory / "m0").write_bytes(b"there")
    report = await create(plan(directory), Devices().open)
    assert report.files == [f"{directory}/m1", f"{directory}/s0"]
    assert (directory / "m1").stat().st_size == 1 << 20
    assert (directory / "m1").stat().st_blocks == 0
    assert (directory / "m0").read_bytes() == b"there"
    ((wishes, places, spares),) = creation.asked
    assert (wishes.name, wishes.integrity, wishes.array) == ("data", True, ARRAY)
    assert (places, spares) == (plan(directory).members, [f"{directory}/s0"])
    assert (report.array, report.level, report.clean) == (ARRAY, 5, False)


async def test_what_cannot_be_made_leaves_no_file(creation: Creation, directory: Path) -> None:
    creation.refusal = PmblkError("a member of another array")
    with pytest.raises(PmblkError, match="a member of another array"):
        await create(plan(directory), Devices().open)
    assert list(directory.iterdir()) == []
    with pytest.raises(PmblkError, match=r"cannot make .*/no/m1: No such file"):
        await create(
            plan(directory, members=[f"{directory}/m0", f"{directory}/no/m1"]), Devices().open
        )
    assert list(directory.iterdir()) == []
    assert len(creation.asked) == 1


async def test_a_file_that_is_missing_needs_a_size(creation: Creation, directory: Path) -> None:
    with pytest.raises(PmblkError, match=r"there is no .*/m0; give a --size"):
        await create(plan(directory, size=None), Devices().open)
    assert creation.asked == []
