"""Who is in an array, as people change it: members are failed, removed, added and replaced.

Whatever is refused is a PmblkError with what to do, and has changed nothing.
"""

import errno
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pmblk.errors import PmblkError
from pmblk.raid.areas import BLOCK_BYTES, end_of
from pmblk.raid.array import Array
from pmblk.raid.creation import blank, blank_journal
from pmblk.raid.devices import Devices
from pmblk.raid.geometry import Geometry
from pmblk.raid.intents import Intents
from pmblk.raid.keeper import Keeper, Seat, trimmed, with_entry, without
from pmblk.raid.labels import Label, read_label
from pmblk.raid.member import Member
from pmblk.raid.replacing import Replacing
from pmblk.raid.reshaping import TwoGeometries
from pmblk.raid.superblock import EMPTY, ENTRIES_MAX, Entry, State, Superblock
from pmblk.raid.upkeep import Upkeep

T = TypeVar("T")
Opener = Callable[[str], Awaitable[Member]]
Wrapper = Callable[[Member, Superblock], Awaitable[Member]]
Drop = Callable[[int, OSError], None]


class Roster:
    """`places` are where members were found, `reasons` why they are faulty, by member.

    `opener` opens one more by its place, and `wrap` gives it what an array keeps on each (bad
    blocks, checksums). `drop(number, error)`: that member is let go of.
    """

    def __init__(
        self, keeper: Keeper, upkeep: Upkeep, *, opener: Opener, wrap: Wrapper, drop: Drop
    ) -> None:
        superblock = keeper.superblock
        self.places = {
            superblock.entries[number].member: seat.member.place
            for number, seat in keeper.seats.items()
        }
        self.reasons: dict[uuid.UUID, str] = {}
        self._keeper = keeper
        self._upkeep = upkeep
        self._open = opener
        self._wrap = wrap
        self._drop = drop

    @property
    def _name(self) -> str:
        return self._keeper.superblock.name

    @property
    def _geometry(self) -> Geometry:
        return self._upkeep.array.geometry

    @property
    def _superblock(self) -> Superblock:
        return self._keeper.superblock

    @property
    def _devices(self) -> Devices:
        return self._upkeep.devices

    @property
    def _intents(self) -> Intents | None:
        return self._upkeep.array.intents

    async def fail(self, place: str) -> None:
        """This member is out, as if it had failed."""
        number = self._number_of(place)
        error = OSError(errno.EIO, "failed by command")
        if number not in self._keeper.seats:
            raise PmblkError(f"{place} has failed already", hint="see pmblk raid status")
        if number >= self._geometry.members:
            self._keeper.seats[number].member.close()
            self._drop(number, error)
            await told(self._name, self._keeper.fail(number, error))
        elif await told(self._name, self._devices.fail({number: error})):
            raise PmblkError(
                f"the array cannot be without {place}", hint="add a spare, and wait for its rebuild"
            )

    async def remove(self, place: str) -> None:
        """A spare, or a member that has failed, is the array's no more."""
        number = self._number_of(place)
        entry = self._keeper.entry(number)
        if entry.state in (State.ACTIVE, State.REBUILDING):
            raise PmblkError(
                f"{place} is in use", hint="fail it first, or have it replaced by another one"
            )
        if number in self._upkeep.replacements.values():
            raise PmblkError(f"{place} takes over from a member", hint="fail it first")

        def change(superblock: Superblock) -> Superblock:
            seat = self._keeper.seats.pop(number, None)
            if seat is not None:
                seat.member.close()
            return trimmed(with_entry(superblock, number, EMPTY))

        await told(self._name, self._keeper.change_roles(change))
        self.places.pop(entry.member, None)
        self.reasons.pop(entry.member, None)

    async def add(self, place: str) -> None:
        """A spare; a member that comes back takes its slot again, and only what it lacks."""
        if any(seat.member.place == place for seat in self._keeper.seats.values()):
            raise PmblkError(f"{place} is in the array already", hint="see pmblk raid status")
        member = await self._open(place)
        try:
            label = await told(self._name, read_label(member))
            needed = end_of(self._superblock)
            if member.size < needed:  # also one that comes back, and was cut short meanwhile
                raise PmblkError(
                    f"{place} is too small: {member.size} bytes of {needed}",
                    hint="find a larger one",
                )
            found = label.found
            if isinstance(found, Superblock):
                if found.array != self._superblock.array:
                    raise PmblkError(
                        f"{place} is a member of another array ({found.name}, {found.array})",
                        hint="if nobody needs that: dd if=/dev/zero bs=4096 seek=1 count=2"
                        f" conv=notrunc of={place}",
                    )
                self._refuse_copy(place, found)
                slot = self._slot_to_return_to(found)
                if slot is not None and await self._take_back(slot, member, label.stale_slot):
                    return
            await self._add_spare(place, member, label)
        except BaseException:
            member.close()
            raise

    def _refuse_copy(self, place: str, found: Superblock) -> None:
        for number, entry in enumerate(self._superblock.entries):
            if entry.member == found.member and number in self._keeper.seats:
                raise PmblkError(
                    f"{place} says that it is {self.places.get(entry.member)}: one is a copy, or "
                    "both are the same device",
                    hint="erase its superblock, if it is another device",
                )

    def _slot_to_return_to(self, found: Superblock) -> int | None:
        """Where its bytes still are what the array holds, but for what is marked since."""
        for slot, entry in enumerate(self._superblock.slots):
            if entry.member == found.member and entry.state is State.FAULTY:
                knows = found.events >= self._superblock.whole_events and not self._went_alone(
                    found
                )
                was_whole = found.entries[slot] == Entry(found.member, State.ACTIVE)
                knows = knows and isinstance(self._upkeep.array, Array)  # what moves is not marked
                return slot if self._intents is not None and knows and was_whole else None
        return None

    def _went_alone(self, found: Superblock) -> bool:
        """It counts somebody out who is here: it was written to without them."""
        theirs = {entry.member: entry.state for entry in found.entries}
        return any(
            entry.state is State.ACTIVE and theirs.get(entry.member) is not State.ACTIVE
            for entry in self._superblock.slots
        )

    async def _take_back(self, slot: int, member: Member, stale_slot: int) -> bool:
        """False: a spare has the slot by now."""
        assert self._intents is not None
        await told(self._name, blank_journal(member, self._superblock))
        await told(self._name, self._upkeep.end_session())
        wrapped = await self._wrap(member, self._superblock)
        entry = Entry(self._keeper.entry(slot).member, State.REBUILDING)

        def change(superblock: Superblock) -> Superblock | None:
            if slot in self._keeper.seats:
                return None
            self._keeper.seats[slot] = Seat(wrapped, stale_slot)
            self._upkeep.returned[slot] = ()
            return with_entry(superblock, slot, entry)

        await told(self._name, self._keeper.change_roles(change))
        seat = self._keeper.seats.get(slot)
        if seat is None:
            raise PmblkError(f"{member.place} failed at once", hint="see pmblk raid status")
        if seat.member is not wrapped:
            return False
        self.places[entry.member] = member.place
        self.reasons.pop(entry.member, None)
        self._upkeep.take_in(slot)
        self._upkeep.returned[slot] = tuple(self._intents.dirty_ranges())
        self._upkeep.hurry()
        return True

    async def _add_spare(self, place: str, member: Member, label: Label) -> None:
        superblock = self._superblock
        if member.block_bytes > BLOCK_BYTES:
            raise PmblkError(
                f"{place} has blocks of {member.block_bytes} bytes",
                hint=f"members have blocks of {BLOCK_BYTES} bytes at most",
            )
        entry = Entry(uuid.uuid4(), State.SPARE)
        await told(self._name, blank(member, superblock))
        wrapped = await self._wrap(member, superblock)

        def change(superblock: Superblock) -> Superblock | None:
            if isinstance(label.found, Superblock):  # what it was here before is over
                superblock = without(superblock, label.found.member)
            number = superblock.free_entry
            if number == ENTRIES_MAX:
                return None
            self._keeper.seats[number] = Seat(wrapped, label.stale_slot)
            return with_entry(superblock, number, entry)

        await told(self._name, self._keeper.change_roles(change))
        if all(one.member != entry.member for one in self._superblock.entries):
            raise PmblkError("the array has no room for one more spare", hint="remove one first")
        self.places[entry.member] = place
        self._upkeep.hurry()

    async def replace(self, old: str, new: str) -> None:
        """The new one takes the slot of the old one, which serves until both hold the same."""
        slot = self._number_of(old)
        before = self._devices.members[slot] if slot < self._geometry.members else None
        if isinstance(self._upkeep.array, TwoGeometries):
            raise PmblkError("it grows", hint="wait for the end: pmblk raid status")
        if before is None or slot in self._devices.rebuilt or slot in self._upkeep.replacements:
            raise PmblkError(
                f"{old} is no whole member", hint="a spare takes the slot of one that has failed"
            )
        number = await self.spare(new)
        if self._devices.members[slot] is not before or slot in self._devices.rebuilt:
            raise PmblkError(f"{old} has failed meanwhile", hint=f"{new} is a spare now")
        seat = self._keeper.seats[number]
        self._devices.members[slot] = Replacing(before, seat.member)
        self._upkeep.replacements[slot] = number
        self._upkeep.hurry()

    async def spare(self, place: str) -> int:
        """The number of its entry; it is added if it is none of ours yet. Raises PmblkError."""
        if all(seat.member.place != place for seat in self._keeper.seats.values()):
            await self.add(place)
        number = self._number_of(place)
        if self._keeper.entry(number).state is not State.SPARE:
            raise PmblkError(f"{place} is no spare", hint="name a spare, or a device to add")
        return number

    def _number_of(self, place: str) -> int:
        """Of its entry. Raises PmblkError."""
        for number, entry in enumerate(self._superblock.entries):
            if entry.state is not State.EMPTY and place in (
                self.places.get(entry.member),
                str(entry.member),  # for one whose place nobody knows: it was missing at the start
            ):
                return number
        places = ", ".join(sorted(self.places.values()))
        raise PmblkError(f"{place} is no member of {self._name}", hint=f"its members: {places}")


async def told(name: str, work: Awaitable[T]) -> T:
    """Errors of members, in words for people. Raises PmblkError."""
    try:
        return await work
    except OSError as error:
        reason = error.strerror or str(error)
        raise PmblkError(f"{name}: {reason}", hint="see pmblk raid status") from error
