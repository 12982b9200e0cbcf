"""An array in service becomes larger: by what its members have got, by a mirror, by more members.

No chunk moves for the first two, so clients just go on. What is to hold data is made ready first,
on every member; then one change of the superblock counts it in. A crash before that change leaves
the array as it was, a crash behind it the larger one.

Checksums lie behind the data, where the data are going to be. So they are copied first, to where
they will be, and are kept at both places until a superblock of its own names the new one.

More members at the levels without copies are a reshape: it begins and ends here, with a superblock
that says so, and `pmblk.raid.reshaping` moves the data.
"""

import bisect
import errno
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from pmblk.errors import PmblkError
from pmblk.raid import areas, bitmap
from pmblk.raid.array import Array
from pmblk.raid.checksummed import Checksummed, checksummed_of
from pmblk.raid.creation import write_zeroes
from pmblk.raid.devices import Devices
from pmblk.raid.geometry import MEMBERS_MAX, Geometry
from pmblk.raid.keeper import Keeper, Seat, with_entry
from pmblk.raid.reshaping import Reshape, TwoGeometries
from pmblk.raid.superblock import Entry, Flag, State, Superblock
from pmblk.raid.upkeep import Upkeep
from pmblk.units import format_size


class Growing:
    """One for an array in service. Of its methods none runs beside another.

    `array` is what clients use: `serve(array)` has them use another one.
    """

    def __init__(
        self,
        array: Array | TwoGeometries,
        keeper: Keeper,
        upkeep: Upkeep,
        *,
        serve: Callable[[Array | TwoGeometries], None],
    ) -> None:
        self.array = array
        self._keeper = keeper
        self._upkeep = upkeep
        self._serve = serve

    @property
    def _array(self) -> Array:
        assert isinstance(self.array, Array), "it does not grow already"
        return self.array

    @property
    def _superblock(self) -> Superblock:
        return self._keeper.superblock

    # ---- more of each member

    async def enlarge(self, size: int | None) -> None:
        """To at least that size; None: to all there is room for. Raises PmblkError, OSError."""
        before = self._superblock.geometry
        check_quiet(self._superblock, self._upkeep)
        if before.layout == "far":
            raise PmblkError(
                "an array with far copies cannot use more of its members: half of all data would "
                "have to move",
                hint="make a larger array, and copy what is on this one",
            )
        geometry = replace(before, member_bytes=await self._member_bytes(size))
        if geometry == before:
            return
        check_regions(self._superblock, geometry)
        if self._superblock.checksums_offset:
            await self._make_room_for_sums(geometry)
        fits = await self._make_zero(before, geometry)
        if self._array.intents is not None:
            await self._array.intents.extend(geometry.size, doubtful=not fits)
        await self._keeper.change_roles(lambda one: _enlarged(one, geometry, fits=fits))
        self._array.extend(geometry)
        if not fits:
            self._upkeep.resync = ((before.size, geometry.size - before.size),)
            self._upkeep.hurry()

    async def _member_bytes(self, size: int | None) -> int:
        """What is to be used of each member. Raises PmblkError, also if there is too little."""
        superblock, geometry = self._superblock, self._superblock.geometry
        await self._keeper.do(lambda _, seat: seat.member.refresh())
        smallest = min((seat.member for seat in self._keeper.seats.values()), key=lambda m: m.size)
        summed = superblock.checksums_offset != 0
        room = areas.data_bytes_for(
            smallest.size,
            data_offset=superblock.data_offset,
            chunk_bytes=geometry.chunk_bytes,
            sums_from=areas.headroom_offset(superblock) if summed else None,
        )
        wanted = room if size is None else _needed_bytes(geometry, size)
        if wanted > room or (size is None and room <= geometry.member_bytes):
            raise PmblkError(
                f"{smallest.place} has room for {format_size(room)} of data, and "
                f"{format_size(geometry.member_bytes)} are in use",
                hint="make every member larger, spares too, or add another one (--add)",
            )
        return wanted

    async def _make_room_for_sums(self, geometry: Geometry) -> None:
        """Those of the new part, behind it; the area is where it is, or moves as a whole.

        Raises PmblkError, OSError.
        """
        before = self._superblock
        summed = areas.summed_bytes(replace(before, geometry=geometry))
        length = areas.checksums_bytes(summed)
        old = areas.checksums_bytes(areas.summed_bytes(before))
        offset = areas.headroom_offset(before) + summed
        smallest_bytes = min(seat.member.size for seat in self._keeper.seats.values())
        if offset <= before.checksums_offset <= smallest_bytes - length:
            offset = before.checksums_offset  # as after a crash at this very place
        elif offset < before.checksums_offset + old:
            raise PmblkError(
                "the checksums would not move far enough to make room for themselves",
                hint=f"make every member larger by {format_size(2 * old)} at least",
            )
        moves = offset != before.checksums_offset

        async def copy(_: int, seat: Seat) -> None:
            sums = _sums_of(seat)
            if length > old:
                await write_zeroes(sums.inner, offset + old, length - old)
            if moves:
                await sums.copy_sums(offset)
            await sums.flush()

        await self._keeper.do(copy)
        if moves:
            await self._keeper.update(lambda one: replace(one, checksums_offset=offset))
        await self._keeper.do(lambda _, seat: _sums_of(seat).extend(offset, summed))

    async def _make_zero(self, before: Geometry, after: Geometry) -> bool:
        """The new part, on every member; whether copies and parity fit there now.

        With checksums zeroes are written where a member has no better way: they would not fit
        anything else.
        """
        start = self._superblock.data_offset + before.member_bytes
        length = after.member_bytes - before.member_bytes
        summed = bool(self._superblock.checksums_offset)
        cannot: list[int] = []

        async def zero(number: int, seat: Seat) -> None:
            try:
                if summed:
                    await write_zeroes(seat.member, start, length)
                else:
                    await seat.member.zero(start, length)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                cannot.append(number)
            await seat.member.flush()

        await self._keeper.do(zero)
        # Where copies did not fill the last rows, what is there has never been written.
        rows = before.chunks * before.copies, before.member_chunks * before.members
        filled = before.level != 10 or rows[0] == rows[1]
        return not before.redundancy or (filled and not cannot)

    # ---- another mirror

    async def mirror(self, numbers: Sequence[int]) -> None:
        """The spares of these entries get slots of their own, behind the others, to be filled.

        Raises PmblkError, OSError.
        """
        check_quiet(self._superblock, self._upkeep)
        before = self._superblock.geometry
        geometry = more_members(before, len(numbers))
        devices = self._array.devices

        def change(superblock: Superblock) -> Superblock:
            check_spares(self._keeper, numbers)
            devices.members.extend([None] * len(numbers))
            self._array.extend(geometry)
            superblock = seated(superblock, self._keeper, numbers, State.REBUILDING)
            return replace(superblock, geometry=geometry)

        await self._keeper.change_roles(change)
        for slot in range(before.members, geometry.members):
            if slot in self._keeper.seats and slot in devices.missing:
                self._upkeep.take_in(slot)
        self._upkeep.keep_marks_while_degraded()
        self._upkeep.hurry()

    # ---- more members, and data that move to them

    async def reshape(self, numbers: Sequence[int]) -> None:
        """The spares of these entries are members from now on, and data begin to move.

        Raises PmblkError, and then nothing has changed, and OSError.
        """
        superblock, before = self._superblock, self._array
        check_quiet(superblock, self._upkeep)
        geometry = more_members(superblock.geometry, len(numbers))
        check_regions(superblock, geometry)
        offset = superblock.data_offset - geometry.chunk_bytes
        if offset < areas.headroom_offset(superblock):
            raise PmblkError(
                "there is no room left in front of the data to move them to",
                hint="make a larger array, and copy what is on this one",
            )
        before.devices.reshaping = True
        both = _two(before, before.devices.under(geometry, data_offset=offset), position=0)
        try:
            await self._begin(both, numbers)
        except PmblkError:
            before.devices.reshaping = False
            self._serve(before)
            raise
        self.go_on(both)

    async def _begin(self, both: TwoGeometries, numbers: Sequence[int]) -> None:
        """With nobody in it: no round that is under way knows only of the old geometry."""
        keeper, devices, geometry = self._keeper, both.devices, both.after.geometry
        slots = range(self._superblock.geometry.members, geometry.members)

        def change(superblock: Superblock) -> Superblock:
            check_spares(keeper, numbers)
            old = superblock
            superblock = seated(superblock, keeper, numbers, State.ACTIVE)
            devices.members.extend(keeper.seats[slot].member for slot in slots)
            both.begin()
            return replace(
                superblock,
                geometry=geometry,
                data_offset=old.data_offset - geometry.chunk_bytes,
                flags=old.flags | Flag.RESHAPING,
                reshape_position=0,
                reshape_members=old.geometry.members,
                reshape_offset=old.data_offset,
            )

        async with both.window(0, both.size):
            self._serve(both)
            await both.before.drained()
            if both.journal is not None:
                await both.journal.renew()
            await keeper.change_roles(change)

    def go_on(self, both: TwoGeometries) -> None:
        """Move what has not moved yet, in the background."""
        superblock = self._superblock
        distance = superblock.reshape_offset - superblock.data_offset

        async def checkpoint(position: int) -> None:
            await self._keeper.update(lambda one: replace(one, reshape_position=position))

        async def end() -> None:
            await self._end(both)

        self._upkeep.reshape = Reshape(
            both,
            headroom_rows=distance // superblock.geometry.chunk_bytes,
            pace=self._upkeep.pace,
            checkpoint=checkpoint,
        )
        self._upkeep.reshaped = end
        self._upkeep.hurry()

    async def _end(self, both: TwoGeometries) -> None:
        """All has moved: the array is as large as its geometry says. Raises OSError."""
        if both.intents is not None:
            await both.intents.extend(both.after.size, doubtful=False)

        def change(superblock: Superblock) -> Superblock:
            done = superblock.resync_position
            return replace(
                superblock,
                flags=superblock.flags & ~Flag.RESHAPING,
                resync_position=both.after.size if done >= both.size else done,
                reshape_position=0,
                reshape_members=0,
                reshape_offset=0,
                whole_events=superblock.events + 1,  # who left before has nothing that moved
            )

        await self._keeper.change_roles(change)
        both.devices.reshaping = False
        self._serve(both.after)


def resumed(after: Array, superblock: Superblock) -> TwoGeometries:
    """What an earlier start had begun, over the array of the new geometry."""
    after.devices.reshaping = True
    before = after.devices.under(geometry_served(superblock), data_offset=superblock.reshape_offset)
    both = TwoGeometries(
        Array.over(before, intents=after.intents, journal=after.journal),
        after,
        position=superblock.reshape_position,
    )
    both.begin()
    return both


def _two(before: Array, devices: Devices, *, position: int) -> TwoGeometries:
    after = Array.over(devices, intents=before.intents, journal=before.journal)
    return TwoGeometries(before, after, position=position)


def geometry_served(superblock: Superblock) -> Geometry:
    """What clients see: until all data have moved, that of the members there were."""
    if Flag.RESHAPING not in superblock.flags:
        return superblock.geometry
    return replace(superblock.geometry, members=superblock.reshape_members)


def _sums_of(seat: Seat) -> Checksummed:
    sums = checksummed_of(seat.member)
    assert sums is not None, "every member has them"
    return sums


def _enlarged(superblock: Superblock, geometry: Geometry, *, fits: bool) -> Superblock:
    done, size = superblock.resync_position, superblock.geometry.size
    if fits and done >= size:
        done = geometry.size
    return replace(
        superblock,
        geometry=geometry,
        resync_position=done if fits else min(done, size),
        whole_events=superblock.events + 1,  # who left before has nothing of the new part
    )


def _needed_bytes(geometry: Geometry, size: int) -> int:
    """Of each member, for an array of that size. Raises PmblkError for less than there is."""
    if size < geometry.size:
        raise PmblkError(
            f"an array cannot shrink: it holds {format_size(geometry.size)}",
            hint="name a larger size",
        )
    chunk_bytes = geometry.chunk_bytes
    counts = range(geometry.member_chunks, -(-size // chunk_bytes) * geometry.copies + 1)
    found = bisect.bisect_left(
        counts, size, key=lambda n: replace(geometry, member_bytes=n * chunk_bytes).size
    )
    return counts[min(found, len(counts) - 1)] * chunk_bytes


# ---- what both ways of growing ask


def check_quiet(superblock: Superblock, upkeep: Upkeep) -> None:
    """All is whole, and nothing that would have to know of two geometries. Raises PmblkError."""
    if Flag.RESHAPING in superblock.flags:
        raise PmblkError("it grows already", hint="wait for the end: pmblk raid status")
    if any(entry.state is not State.ACTIVE for entry in superblock.slots):
        raise PmblkError(
            "an array that lacks a member cannot grow", hint="wait for its rebuild, or add a spare"
        )
    if upkeep.resync or upkeep.replacements:
        what = "a resync" if upkeep.resync else "a replacement"
        raise PmblkError(f"{what} is under way", hint="wait for its end: pmblk raid status")


def check_regions(superblock: Superblock, geometry: Geometry) -> None:
    """The bitmap has room. Raises PmblkError."""
    most = bitmap.REGIONS_MAX * superblock.bitmap_chunk_bytes
    if superblock.bitmap_chunk_bytes and geometry.size > most:
        raise PmblkError(
            f"its bitmap has room for regions of {format_size(most)}, not of "
            f"{format_size(geometry.size)}",
            hint="grow it to no more than that",
        )


def check_spares(keeper: Keeper, numbers: Sequence[int]) -> None:
    """They are there yet. Raises PmblkError."""
    if not set(numbers) <= keeper.seats.keys():
        raise PmblkError("a spare has failed", hint="see pmblk raid status")


def more_members(geometry: Geometry, count: int) -> Geometry:
    """Raises PmblkError."""
    if geometry.members + count > MEMBERS_MAX:
        raise PmblkError("too many members", hint=f"an array has {MEMBERS_MAX} at most")
    return replace(geometry, members=geometry.members + count)


def seated(
    superblock: Superblock, keeper: Keeper, numbers: Sequence[int], state: State
) -> Superblock:
    """The spares of these entries sit in the slots behind the last one, and who was there, a spare
    too, where they were. To be called in a change: seats are exchanged with the entries.
    """
    seats, moved = keeper.seats, {number: number for number in numbers}
    for slot, wanted in enumerate(numbers, start=superblock.geometry.members):
        number = moved[wanted]
        entries = superblock.entries
        taker, other = Entry(entries[number].member, state), entries[slot]
        if number != slot:
            superblock = with_entry(superblock, number, other)
            mine, theirs = seats.pop(number), seats.pop(slot, None)
            seats[slot] = mine
            if theirs is not None:
                seats[number] = theirs
            moved = {key: number if value == slot else value for key, value in moved.items()}
        superblock = with_entry(superblock, slot, taker)
    return superblock
