"""An array in service: its members and superblocks, and what people ask of it.

`start` settles who is in, `run` does the work behind the I/O until it is cancelled, `stop` ends it
cleanly. Whatever is refused is a PmblkError with what to do, and has changed nothing.

Not here: reads and writes (`array`), the work behind them (`upkeep`), members that people change
(`roster`), who may sit where at the start (`assembly`), how it is opened (`assembling`).
"""

import uuid
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from pmblk.errors import PmblkError
from pmblk.raid.array import Array
from pmblk.raid.bad_blocks import bad_blocks_of
from pmblk.raid.buffers import buffer
from pmblk.raid.checksummed import checksummed_of
from pmblk.raid.events import Event, MemberFailed, MemberNeeded, StateChanged, Tell, nobody
from pmblk.raid.geometry import Geometry
from pmblk.raid.growing import (
    Growing,
    check_quiet,
    geometry_served,
    more_members,
    resumed,
)
from pmblk.raid.intents import Intents
from pmblk.raid.keeper import Keeper, Seat, with_entry
from pmblk.raid.layout import rows_of, survives
from pmblk.raid.member import Request
from pmblk.raid.replaying import JournalReplay
from pmblk.raid.reshaping import TwoGeometries
from pmblk.raid.roster import Opener, Roster, Wrapper, told
from pmblk.raid.status import ArrayStatus, MemberStatus
from pmblk.raid.superblock import (
    BITMAP_BYTES,
    BITMAP_OFFSET,
    Entry,
    Flag,
    State,
    Superblock,
)
from pmblk.raid.sweep import Pace
from pmblk.raid.upkeep import Scrub, Upkeep


class RunningArray:
    """`seats` are by the number of their entry: members that are open, and wrapped; the array's
    from now on. `opener` opens one more by its place, and `wrap` gives it what an array keeps on
    each (bad blocks, checksums). `tell` hears of all that happens to it, from its start on.
    """

    def __init__(
        self,
        superblock: Superblock,
        seats: Mapping[int, Seat],
        *,
        opener: Opener,
        wrap: Wrapper,
        pace: Pace | None = None,
        tell: Tell = nobody,
    ) -> None:
        geometry = superblock.geometry
        self.name = superblock.name
        self.uuid = superblock.array
        self._tell = tell
        self._state_told = "active"
        self._needed_told: set[uuid.UUID] = set()
        self._keeper = Keeper(superblock, seats, out=self._dropped)
        self._intents = self._make_intents(superblock)
        array = Array(
            geometry,
            [seats[slot].member if slot in seats else None for slot in range(geometry.members)],
            data_offset=superblock.data_offset,
            announce=self._announce,
            intents=self._intents,
            journal=_journal_area(superblock),
        )
        reshaping = Flag.RESHAPING in superblock.flags
        self.array: Array | TwoGeometries = resumed(array, superblock) if reshaping else array
        self._devices = self.array.devices
        self._devices.watchers.needed = self._needed
        self._devices.watchers.told = self._keeper.told
        self.resized: Callable[[], None] = lambda: None
        self._upkeep = Upkeep(self.array, self._keeper, pace=pace or Pace(), tell=self._happened)
        self._roster = Roster(
            self._keeper, self._upkeep, opener=opener, wrap=wrap, drop=self._dropped
        )
        self._growing = Growing(self.array, self._keeper, self._upkeep, serve=self._serve)

    def _make_intents(self, superblock: Superblock) -> Intents | None:
        if not superblock.bitmap_chunk_bytes:
            return None

        async def store(offset: int, view: memoryview) -> None:
            await self._keeper.store(BITMAP_OFFSET + offset, view, durable=True)

        return Intents(
            size=geometry_served(superblock).size,
            region_bytes=superblock.bitmap_chunk_bytes,
            store=store,
        )

    @property
    def geometry(self) -> Geometry:
        return self.array.geometry

    @property
    def size(self) -> int:
        return self.array.size

    @property
    def superblock(self) -> Superblock:
        """What is in force, in the words of no particular member."""
        return self._keeper.superblock

    def _serve(self, array: Array | TwoGeometries) -> None:
        size = self.array.size
        self.array = self._growing.array = array
        self._devices = array.devices
        self._upkeep.serve(array)
        if array.size != size:
            self.resized()

    # ---- the life of it

    async def start(self, *, dirty: bool) -> None:
        """Settle who is in, and what an unclean stop has left. Raises OSError.

        `dirty`: it was not stopped cleanly. Nobody reads or writes before this has returned.
        """
        await self._settle_roles()
        for slot, entry in enumerate(self.superblock.slots):
            if entry.state is State.REBUILDING and slot in self._keeper.seats:
                done = entry.checkpoint // self.geometry.chunk_bytes
                self._devices.rebuilt[slot] = done
        self._tell_state()
        if self._intents is not None:
            self._intents.load(await self._bitmaps())
        self._upkeep.keep_marks_while_degraded()
        if dirty:
            self._distrust()
        if self.array.journal is not None:
            await self._take_up(await self.array.journal.replay())
        if dirty:
            self._upkeep.resync = self._doubtful()
        if self._intents is not None and not self._upkeep.resync:
            await self._intents.cleaned(0, self.size)
        if isinstance(self.array, TwoGeometries):
            self._growing.go_on(self.array)

    def _distrust(self) -> None:
        """A crash may have come between data and their checksums, where anything was written."""
        if isinstance(self.array, TwoGeometries):  # and in the window that was being moved
            self._distrust_ranges([(0, member.size) for member in self._devices.members if member])
            return
        marked = [(0, self.size)] if self._intents is None else self._intents.dirty_ranges()
        chunk_bytes = self.geometry.chunk_bytes
        ranges = [
            (self._devices.place(first), count * chunk_bytes)
            for offset, length in marked
            for first, count in rows_of(
                self.geometry,
                offset // chunk_bytes,
                -(-(offset + length) // chunk_bytes) - offset // chunk_bytes,
            )
        ]
        self._distrust_ranges(ranges)

    def _distrust_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        for member in self._devices.members:
            known = checksummed_of(member)
            if known is not None:
                known.distrust(ranges)

    async def _take_up(self, replayed: JournalReplay) -> None:
        """What the journal could not mend is an error from now on, and never made up."""
        for slot, offset, length in replayed.lost:
            known = bad_blocks_of(self._devices.members[slot])
            if known is not None:  # or it was let go of meanwhile
                await known.lose(offset, length)

    async def _settle_roles(self) -> None:
        """Whoever is missing is counted out, durably, before anything is written without it."""
        missing = [
            slot
            for slot, entry in enumerate(self.superblock.slots)
            if slot not in self._keeper.seats and entry.state in (State.ACTIVE, State.REBUILDING)
        ]

        def change(superblock: Superblock) -> Superblock:
            for slot in missing:
                faulty = replace(superblock.entries[slot], state=State.FAULTY)
                superblock = with_entry(superblock, slot, faulty)
            if Flag.JOURNAL not in superblock.flags:  # nobody knows what was written below it
                superblock = replace(superblock, resync_position=0)
            return replace(superblock, flags=superblock.flags | Flag.DIRTY)

        for slot in missing:
            self._left(slot, "it was missing at the start")
        if Flag.SETTLED not in self.superblock.flags:
            await self._keeper.settle_again()
        if missing:
            await self._keeper.change_roles(change)
        else:
            await self._keeper.update(change)

    async def _bitmaps(self) -> list[bytes]:
        """Of every member that holds data."""
        found = []
        for number, seat in self._keeper.seats.items():
            if self._keeper.entry(number).state is State.ACTIVE:
                view = buffer(BITMAP_BYTES)
                try:
                    await seat.member.read((Request(BITMAP_OFFSET, view),))
                    found.append(bytes(view))
                except OSError:
                    found.append(b"\xff" * BITMAP_BYTES)  # it cannot say: the others may
        return found

    def _doubtful(self) -> tuple[tuple[int, int], ...]:
        """Where copies or parity may not fit after an unclean stop: offsets and lengths.

        A journal leaves nothing in doubt but what was never made right since the array was made,
        and writes that have failed.
        """
        if not self.geometry.redundancy:
            return ()
        marks = self.array.journal is None or Flag.DOUBT in self.superblock.flags
        if self._intents is not None and marks:
            return tuple(self._intents.dirty_ranges())
        done = self.superblock.resync_position
        return ((done, self.size - done),) if done < self.size else ()

    async def run(self) -> None:
        """The work behind the I/O, until it is cancelled."""
        await self._upkeep.run()

    async def stop(self) -> None:
        """All is durable, and says so; the members are closed. `run` has been cancelled.

        Raises OSError, and closes all the same: the next start will see an unclean stop.
        """
        try:
            await self.array.flush()
            await self._upkeep.end_session()
            if self._intents is not None:
                await self._intents.clear_idle(self.array.flush)
                await self._intents.clear_idle(self.array.flush)  # none was written since
            await self._keeper.update(self._stopped)
        finally:
            self.close()

    def _stopped(self, superblock: Superblock) -> Superblock:
        """Clean, unless something is left for a resync."""
        doubts = self._upkeep.unresolved or (self._intents is not None and self._intents.has_doubts)
        flags = superblock.flags & ~Flag.DOUBT
        if doubts:
            flags |= Flag.DOUBT
        if not (doubts or self._upkeep.resync):
            flags &= ~Flag.DIRTY
        return replace(superblock, flags=flags)

    def close(self) -> None:
        """Let the members go, as they are."""
        for seat in self._keeper.seats.values():
            seat.member.close()

    # ---- members that leave

    async def _announce(self, slot: int, error: OSError) -> None:
        """Of `Devices`, which has let go of it: nothing may skip it before this returns."""
        self._dropped(slot, error)
        await self._keeper.fail(slot, error)

    def _dropped(self, number: int, error: OSError) -> None:
        self._left(number, error.strerror or str(error))
        if number < self.geometry.members:
            self._devices.members[number] = None
            self._devices.rebuilt.pop(number, None)
        self._upkeep.dropped(number)
        self._tell_state()

    # ---- what is told

    def _happened(self, event: Event) -> None:
        self._tell(event)
        self._tell_state()

    def _tell_state(self) -> None:
        state = self._state()
        if state != self._state_told:
            self._state_told = state
            self._needed_told.clear()
            self._tell(StateChanged(state=state))

    def _left(self, number: int, reason: str) -> None:
        slot, place = self._seat_of(number)
        self._roster.reasons[self._keeper.entry(number).member] = reason
        self._tell(MemberFailed(slot=slot, place=place, reason=reason))

    def _needed(self, slot: int, error: OSError) -> None:
        """Of `Devices`, at every such round: the first one is told."""
        member = self._keeper.entry(slot).member
        if member not in self._needed_told:
            self._needed_told.add(member)
            _, place = self._seat_of(slot)
            reason = error.strerror or str(error)
            self._tell(MemberNeeded(slot=slot, place=place, reason=reason))

    def _seat_of(self, number: int) -> tuple[int | None, str]:
        """Slot and place of an entry."""
        member = self._keeper.entry(number).member
        slot = number if number < self.geometry.members else None
        return slot, self._roster.places.get(member, str(member))

    # ---- what people ask for

    async def fail(self, place: str) -> None:
        """This member is out, as if it had failed."""
        await self._roster.fail(place)

    async def remove(self, place: str) -> None:
        """A spare, or a member that has failed, is the array's no more."""
        await self._roster.remove(place)

    async def add(self, place: str) -> None:
        """A spare; a member that comes back takes its slot again, and only what it lacks."""
        await self._roster.add(place)

    async def replace(self, old: str, new: str) -> None:
        """The new one takes the slot of the old one, which serves until both hold the same."""
        await self._roster.replace(old, new)

    def scrub(self, *, repair: bool) -> None:
        """Read all of it, and see whether it fits; `repair`: mend what does not."""
        if not self.geometry.redundancy and not Flag.INTEGRITY & self.superblock.flags:
            raise PmblkError(
                "level 0 without checksums has nothing to compare",
                hint="arrays made with --integrity can be scrubbed at any level",
            )
        if self._upkeep.scrub is not None:
            raise PmblkError("a scrub is under way", hint="stop it first (--stop)")
        self._upkeep.scrub = Scrub(repair)
        self._upkeep.wake()

    def stop_scrub(self) -> None:
        """What it has found so far stays."""
        self._upkeep.stop_scrub()

    async def grow(self, *, size: int | None, add: Sequence[str]) -> None:
        """To a size, or to all that the members have room for; or over more members."""
        if add and size is not None:
            raise PmblkError("a size and more members are two steps", hint="name one of them")
        if not add:
            await told(self.name, self._growing.enlarge(size))
            return
        if self.geometry.level == 10:
            raise PmblkError(
                "level 10 gets no more members: its copies would have to change places",
                hint="make a larger array, and copy what is on this one",
            )
        more_members(self.geometry, len(add))
        check_quiet(self.superblock, self._upkeep)
        numbers = [await self._roster.spare(place) for place in add]
        begin = self._growing.mirror if self.geometry.level == 1 else self._growing.reshape
        await told(self.name, begin(numbers))

    # ---- what it tells

    def status(self) -> ArrayStatus:
        """Now."""
        superblock, geometry, upkeep = self.superblock, self.geometry, self._upkeep
        flags = superblock.flags
        return ArrayStatus(
            name=self.name,
            array=self.uuid,
            level=geometry.level,
            layout=geometry.layout,
            chunk_bytes=geometry.chunk_bytes,
            size_bytes=self.size,
            member_bytes=geometry.member_bytes,
            state=self._state(),
            events=superblock.events,
            write_hole="journal" if Flag.JOURNAL in flags else "open",
            integrity=Flag.INTEGRITY in flags,
            bitmap_chunk_bytes=superblock.bitmap_chunk_bytes,
            dirty_bytes=self._marked_bytes(),
            members=tuple(
                self._member_status(number, entry)
                for number, entry in enumerate(superblock.entries)
                if entry.state is not State.EMPTY or number < geometry.members
            ),
            sweep=upkeep.sweep.status() if upkeep.sweep is not None else None,
            scrub=upkeep.scrubbed,
            member_read_bytes=self._devices.read_bytes,
            member_write_bytes=self._devices.write_bytes,
        )

    def _state(self) -> str:
        missing = self._devices.missing | set(self._devices.rebuilt)
        if not missing:
            return "active"
        return "degraded" if survives(self.geometry, missing) else "failed"

    def _marked_bytes(self) -> int | None:
        if self._intents is None:
            return None
        return sum(length for _, length in self._intents.dirty_ranges())

    def _member_status(self, number: int, entry: Entry) -> MemberStatus:
        seat = self._keeper.seats.get(number)
        state = entry.state.name.lower()
        if number in self._upkeep.replacements.values():
            state = "replacing"
        checkpoint = entry.checkpoint
        if number in self._devices.rebuilt:
            checkpoint = self._devices.rebuilt[number] * self.geometry.chunk_bytes
        return MemberStatus(
            slot=number if number < self.geometry.members else None,
            place=self._roster.places.get(entry.member),
            member=entry.member,
            state=state,
            checkpoint=checkpoint,
            bad_blocks=_bad_blocks(seat),
            errors=self._devices.errors[number] if seat is not None else 0,
            reason=self._roster.reasons.get(entry.member, ""),
        )


def _bad_blocks(seat: Seat | None) -> int:
    known = None if seat is None else bad_blocks_of(seat.member)
    return 0 if known is None else known.count


def _journal_area(superblock: Superblock) -> tuple[int, int] | None:
    if Flag.JOURNAL not in superblock.flags:
        return None
    return superblock.journal_offset, superblock.journal_bytes
