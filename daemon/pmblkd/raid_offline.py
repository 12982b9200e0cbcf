"""What is done to the members of an array that nobody serves: looking at them, and making one.

No daemon takes part. Looking opens members for reading only, so it may look at those in service.
"""

import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pmblk import PmblkError
from pmblk.raid import creation
from pmblk.raid.assembly import Assembly, Candidate, NoArray, assemble
from pmblk.raid.geometry import Layout, Level
from pmblk.raid.labels import read_label
from pmblk.raid.member import Member
from pmblk.raid.superblock import Flag, Superblock, SuperblockError
from pmblkd.errors import WorkFailed
from pmblkd.raid_reports import AssemblyReport, CreatedReport, DeviceReport, ExamineReport

Opener = Callable[[str], Awaitable[Member]]


# ---- looking


async def examine(places: Sequence[str], open_member: Opener) -> ExamineReport:
    """`open_member` opens for reading. What cannot be opened or read is a problem, no error."""
    devices: list[DeviceReport] = []
    candidates: list[Candidate] = []
    for place in dict.fromkeys(places):
        try:
            found = await _label(place, open_member)
        except PmblkError as error:
            devices.append(DeviceReport(place=place, problem=str(error)))
        except OSError as error:
            devices.append(DeviceReport(place=place, problem=error.strerror or str(error)))
        else:
            devices.append(_device(place, found))
            candidates.append(Candidate(place, found))
    try:
        assembly = assemble(candidates)
    except NoArray as error:
        return ExamineReport(devices=devices, assembly=None, reason=str(error))
    return ExamineReport(devices=devices, assembly=_assembly(assembly))


async def _label(place: str, open_member: Opener) -> "Superblock | SuperblockError":
    member = await open_member(place)
    try:
        return (await read_label(member)).found
    finally:
        member.close()


def _device(place: str, found: "Superblock | SuperblockError") -> DeviceReport:
    if isinstance(found, SuperblockError):
        return DeviceReport(place=place, problem=str(found))
    number = found.entry_of_itself
    is_slot = number is not None and number < found.geometry.members
    return DeviceReport(
        place=place,
        name=found.name,
        array=found.array,
        slot=number if is_slot else None,
        state="no role" if number is None else found.entries[number].state.name.lower(),
        events=found.events,
    )


def _assembly(assembly: Assembly) -> AssemblyReport:
    newest = assembly.newest
    geometry = newest.geometry
    return AssemblyReport(
        name=newest.name,
        array=newest.array,
        level=geometry.level,
        layout=geometry.layout,
        chunk_bytes=geometry.chunk_bytes,
        size_bytes=geometry.size,
        slots=list(assembly.slots),
        spares=list(assembly.spares),
        clean=not assembly.dirty,
        obstacles=list(assembly.obstacles),
        notes=list(assembly.notes),
    )


# ---- making


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be made. `size`: files that are missing are made, sparse, with so many bytes.

    The other fields are those of `pmblk.raid.creation`'s wishes.
    """

    name: str
    members: Sequence[str]
    spares: Sequence[str]
    size: int | None
    level: Level
    layout: Layout | None
    chunk_bytes: int
    copies: int
    integrity: bool
    journal: bool
    bitmap: bool
    assume_clean: bool
    force: bool
    array: Any  # UUID, or None for a new one


async def create(plan: Plan, open_member: Opener) -> CreatedReport:
    """The array is on its members when this returns. Raises PmblkError; then files that were made
    for it are gone.
    """
    fields = msgspec.structs.asdict(plan)
    wishes = {name: fields[name] for name in creation.Wishes.__struct_fields__}
    files = list(_make_files([*plan.members, *plan.spares], plan.size))
    try:
        superblock: Superblock = await creation.create(
            creation.Wishes(**wishes), plan.members, spares=plan.spares, open_member=open_member
        )
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
    geometry = superblock.geometry
    return CreatedReport(
        name=superblock.name,
        array=superblock.array,
        level=geometry.level,
        layout=geometry.layout,
        chunk_bytes=geometry.chunk_bytes,
        size_bytes=geometry.size,
        clean=Flag.DIRTY not in superblock.flags,
        members=list(plan.members),
        spares=list(plan.spares),
        files=[str(file) for file in files],
    )


def _make_files(places: Sequence[str], size: int | None) -> Iterator[Path]:
    """All of them or none. Raises PmblkError."""
    paths = [Path(place) for place in dict.fromkeys(places) if place.startswith("/")]
    missing = [path for path in paths if not os.path.lexists(path)]
    if not missing:
        return
    if size is None:
        raise PmblkError(f"there is no {missing[0]}", hint="give a --size to make it a file")
    made: list[Path] = []
    try:
        for path in missing:
            with path.open("xb") as file:
                made.append(path)
                file.truncate(size)
    except OSError as error:
        for file_made in made:
            file_made.unlink(missing_ok=True)
        raise WorkFailed(
            f"cannot make {path}: {error.strerror}", hint="nothing was made"
        ) from error
    yield from made
