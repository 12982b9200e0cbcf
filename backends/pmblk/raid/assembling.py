"""From the places of some devices to an array in service, or to every reason why not.

Who may sit where is `pmblk.raid.assembly`'s; here the devices are opened, asked, and given what an
array keeps on each of them.
"""

import uuid
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from pmblk.errors import PmblkError
from pmblk.raid.areas import end_of, headroom_offset, summed_bytes
from pmblk.raid.assembly import Assembly, Candidate, NoArray
from pmblk.raid.assembly import assemble as judge
from pmblk.raid.bad_blocks import remembering
from pmblk.raid.checksummed import checksummed
from pmblk.raid.events import Tell, nobody
from pmblk.raid.keeper import Seat
from pmblk.raid.labels import Label, read_label
from pmblk.raid.member import Member
from pmblk.raid.running import RunningArray
from pmblk.raid.superblock import Flag, Superblock
from pmblk.raid.sweep import Pace

Opener = Callable[[str], Awaitable[Member]]


class Survey(msgspec.Struct, frozen=True):
    """Devices that are open, with what they say; and those that could not be asked, and why."""

    members: dict[str, Member]
    labels: dict[str, Label]
    problems: dict[str, str]

    def judge(self, *, array: uuid.UUID | None, degraded: bool, force: bool) -> Assembly:
        """Raises PmblkError when there is nothing to assemble."""
        candidates = [Candidate(place, label.found) for place, label in self.labels.items()]
        try:
            return judge(candidates, array=array, degraded=degraded, force=force)
        except NoArray as error:
            raise PmblkError("\n  ".join([f"no array: {error}", *self.lines()])) from None

    def leave_out(self, place: str, error: Exception) -> None:
        """It cannot be used after all."""
        reason = error.strerror if isinstance(error, OSError) else ""
        self.problems[place] = reason or str(error)
        del self.labels[place]

    def lines(self) -> list[str]:
        """One for each device that could not be asked."""
        return [f"{place}: {problem}" for place, problem in sorted(self.problems.items())]

    def close(self, *, but: Sequence[str | None] = ()) -> None:
        for place, member in self.members.items():
            if place not in but:
                member.close()


async def survey(places: Sequence[str], *, open_member: Opener) -> Survey:
    """Ask all of them. A device that does not answer is a problem of the survey, not an error."""
    members: dict[str, Member] = {}
    labels: dict[str, Label] = {}
    problems: dict[str, str] = {}
    for place in dict.fromkeys(places):
        try:
            members[place] = await open_member(place)
            label = await read_label(members[place])
            _check_size(members[place], label)
            labels[place] = label
        except PmblkError as error:
            problems[place] = str(error)
        except OSError as error:
            problems[place] = error.strerror or str(error)
    return Survey(members, labels, problems)


def _check_size(member: Member, label: Label) -> None:
    """Raises PmblkError: what is not there any more would be read as nothing, or as zeroes."""
    if isinstance(label.found, Superblock) and member.size < end_of(label.found):
        raise PmblkError(
            f"it was cut short: {member.size} bytes of {end_of(label.found)} are left",
            hint="put a new one of that size in its place, and add it",
        )


async def assemble(
    places: Sequence[str],
    *,
    open_member: Opener,
    array: uuid.UUID | None = None,
    degraded: bool = False,
    force: bool = False,
    pace: Pace | None = None,
    tell: Tell = nobody,
) -> RunningArray:
    """The array, started. Raises PmblkError with a line for each reason why it cannot be.

    `tell` hears of all that happens to it.
    """
    found = await survey(places, open_member=open_member)
    try:
        while True:
            assembly = found.judge(array=array, degraded=degraded, force=force)
            if assembly.obstacles:
                raise PmblkError(_explained(assembly, found))
            seats = await _seats(assembly, found)
            if seats is not None:
                break
        running = RunningArray(
            assembly.newest, seats, opener=open_member, wrap=wrap, pace=pace, tell=tell
        )
        await running.start(dirty=assembly.dirty)
    except OSError as error:
        found.close()
        raise PmblkError(
            f"cannot start the array: {error.strerror or error}",
            hint="look at its members with pmblk raid examine, and leave away the one that fails",
        ) from error
    except BaseException:
        found.close()
        raise
    found.close(but=[*assembly.slots, *assembly.spares])
    return running


def _explained(assembly: Assembly, found: Survey) -> str:
    name, array = assembly.newest.name, assembly.newest.array
    lines = [f"cannot start {name} ({array}):", *assembly.obstacles, *assembly.notes]
    return "\n  ".join([*lines, *found.lines()])


async def _seats(assembly: Assembly, found: Survey) -> dict[int, Seat] | None:
    """By the number of their entry; None: somebody is left out now, so judge again."""
    numbers = {entry.member: number for number, entry in enumerate(assembly.newest.entries)}
    seats = {}
    for place in (*assembly.slots, *assembly.spares):
        if place is None:
            continue
        label = found.labels[place]
        assert isinstance(label.found, Superblock), "others are left out"
        try:
            member = await wrap(found.members[place], assembly.newest)
        except (PmblkError, OSError) as error:
            found.leave_out(place, error)
            return None
        seats[numbers[label.found.member]] = Seat(member, label.stale_slot)
    return seats


async def wrap(member: Member, superblock: Superblock) -> Member:
    """A member, with its log of bad blocks and its checksums. Raises PmblkError, OSError."""
    start = headroom_offset(superblock)
    found: Member = await remembering(member, data_offset=start)
    if Flag.INTEGRITY in superblock.flags:
        found = await checksummed(
            found,
            data_offset=start,
            member_bytes=summed_bytes(superblock),
            checksums_offset=superblock.checksums_offset,
        )
    return found
