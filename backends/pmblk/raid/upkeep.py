"""The work that goes on behind an array's I/O: resync, rebuild, replacement, scrub.

One sweep runs at a time, the most urgent first: a reshape, a resync, then rebuilds, replacements,
and a scrub.
What a sweep has done is on the members now and then: the next start goes on from there. A slot
without a member takes the first spare there is.

Not here: what the sweeps do (`sweep`), and what people ask for (`running`).
"""

import errno
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio
from msgspec.structs import replace

from pmblk.raid.array import Array
from pmblk.raid.events import MemberSeated, SweepBegan, SweepEnded, Tell, WorkEnded
from pmblk.raid.intents import Intents
from pmblk.raid.keeper import Keeper, trimmed, with_entry
from pmblk.raid.replacing import Replacing
from pmblk.raid.reshaping import Reshape, TwoGeometries
from pmblk.raid.status import SweepStatus
from pmblk.raid.superblock import EMPTY, Entry, Flag, State, Superblock
from pmblk.raid.sweep import Pace, Sweep

RETRY_SECONDS = 10  # after work that could not go on
CLEAR_SECONDS = 5  # how long a region is left alone before its mark is taken back

Checkpoint = Callable[[int], Awaitable[None]]
Ranges = Sequence[tuple[int, int]]  # offset and length


class Scrub(msgspec.Struct, frozen=True):
    """What was asked for; `repair`: mend what does not fit."""

    repair: bool


class Upkeep:
    """One for an array in service."""

    def __init__(
        self, array: Array | TwoGeometries, keeper: Keeper, *, pace: Pace, tell: Tell
    ) -> None:
        self.unresolved = False  # a resync could not go on
        self.returned: dict[int, Ranges] = {}  # slot: all that it lacks
        self.replacements: dict[int, int] = {}  # slot: number of the entry that takes it over
        self.reshape: Reshape | None = None
        self.reshaped: Callable[[], Awaitable[None]] | None = None  # it has come to its end
        self.scrub: Scrub | None = None
        self.scrubbed: SweepStatus | None = None  # what the last one came to
        self.sweep: Sweep | Reshape | None = None
        self.refusal: OSError | None = None
        self.serve(array)
        self._keeper = keeper
        self.pace = pace
        self._tell = tell
        self._sweeping = trio.CancelScope()
        self._wanted = trio.Event()

    @property
    def resync(self) -> Ranges:
        """What may not fit since an unclean stop; parity is not to be trusted there."""
        return self.array.parity_in_doubt

    @resync.setter
    def resync(self, ranges: Ranges) -> None:
        self.array.parity_in_doubt = ranges

    def serve(self, array: Array | TwoGeometries) -> None:
        """Work on this one from now on; of `TwoGeometries` nothing but the reshape is done."""
        self.array = array
        self.devices = array.devices

    async def run(self) -> None:
        """Until it is cancelled."""
        async with trio.open_nursery() as nursery:
            if self.array.intents is not None:
                nursery.start_soon(self._clear_marks, self.array.intents)
            try:
                await self._work()
            except OSError as error:  # members cannot be told of a change: nothing changes any more
                self.refusal = error
                self._tell(WorkEnded(reason=error.strerror or str(error)))

    async def _clear_marks(self, intents: Intents) -> None:
        while True:
            await trio.sleep(CLEAR_SECONDS)
            try:
                if intents.has_failed:
                    await self._keeper.update(_doubted)
                await intents.clear_idle(self.array.flush)
            except OSError:
                pass  # who could not has left, or the array is lost; the marks stay

    def keep_marks_while_degraded(self) -> None:
        """A member that comes back needs to be told what it lacks."""
        if self.array.intents is not None:
            self.array.intents.keeping = bool(self.devices.missing or self.devices.rebuilt)

    def dropped(self, number: int) -> None:
        """The member of that entry has left."""
        self.returned.pop(number, None)
        for slot, taker in list(self.replacements.items()):
            if number in (slot, taker):
                self._call_off(slot)
        self.keep_marks_while_degraded()
        self.hurry()

    # ---- one after the other

    def wake(self) -> None:
        """There may be something to do."""
        self._wanted.set()
        self._wanted = trio.Event()

    def hurry(self) -> None:
        """There may be something to do that a scrub must not hold up: it ends where it is."""
        self.stop_scrub()
        self.wake()

    def stop_scrub(self) -> None:
        """What it has found stays."""
        self.scrub = None
        if self.sweep is not None and self.sweep.kind in ("check", "repair"):
            self.scrubbed = self.sweep.status()
            self._sweeping.cancel()

    async def _work(self) -> None:
        while True:
            wanted = self._wanted
            try:
                await self._seat_spares()
                self.sweep = self._next_sweep()
                if self.sweep is None:
                    await wanted.wait()
                    continue
                whole = await self._do(self.sweep)
            except OSError:
                await self._keeper.told()  # members can be told of changes: it may pass
                whole = False
            self.sweep = None
            if not whole:
                with trio.move_on_after(RETRY_SECONDS):
                    await wanted.wait()

    async def _do(self, sweep: Sweep | Reshape) -> bool:
        """False: it could not go on."""
        failure: OSError | None = None
        self._tell(SweepBegan(kind=sweep.kind, slot=sweep.slot))
        with trio.CancelScope() as self._sweeping:
            try:
                await sweep.run()
            except OSError as error:
                failure = error
        if failure is not None:
            await self._broken(sweep, failure)
        elif not self._sweeping.cancelled_caught:
            await self._finished(sweep)
        self._tell(
            SweepEnded(
                kind=sweep.kind,
                slot=sweep.slot,
                findings=sweep.status().findings,
                error="" if failure is None else failure.strerror or str(failure),
                stopped=self._sweeping.cancelled_caught,
            )
        )
        return failure is None

    def _next_sweep(self) -> Sweep | Reshape | None:
        array, pace = self.array, self.pace
        if isinstance(array, TwoGeometries):
            return self.reshape
        if self.resync and not self.unresolved:
            return Sweep(
                "resync", array, pace=pace, ranges=self.resync, checkpoint=self._resynced_to
            )
        for slot, chunks in array.devices.rebuilt.items():
            if array.devices.members[slot] is None:
                continue
            return Sweep(
                "rebuild",
                array,
                pace=pace,
                slot=slot,
                ranges=self.returned.get(slot),
                position=chunks * self.array.geometry.chunk_bytes,
                checkpoint=self._rebuilt_to(slot),
            )
        for slot in self.replacements:
            return Sweep("replace", array, pace=pace, slot=slot)
        if self.scrub is not None:
            return Sweep("repair" if self.scrub.repair else "check", array, pace=pace)
        return None

    async def _finished(self, sweep: Sweep | Reshape) -> None:
        if isinstance(sweep, Reshape):
            self.reshape = None
            assert self.reshaped is not None
            await self.reshaped()
        elif sweep.kind == "resync":
            await self._resynced()
        elif sweep.kind == "rebuild":
            await self._rebuilt(sweep)
        elif sweep.kind == "replace":
            await self._replaced(sweep)
        else:
            self.scrub = None
            self.scrubbed = sweep.status()

    async def _broken(self, sweep: Sweep | Reshape, error: OSError) -> None:
        """It cannot go on. What it worked on has left by then, or is given up."""
        if isinstance(sweep, Reshape):
            self.reshape = None  # the next start goes on
        elif sweep.kind == "resync":
            self.unresolved = True  # parity there stays in doubt, until the next start
        elif sweep.kind == "rebuild" and sweep.slot in self.devices.rebuilt:
            await self.devices.fail({sweep.slot: error})
        elif sweep.kind == "replace" and sweep.slot in self.replacements:
            number = self.replacements[sweep.slot]
            self._call_off(sweep.slot)
            self._keeper.seats[number].member.close()
            await self._keeper.fail(number, error)
        elif sweep.kind in ("check", "repair"):
            self.scrub = None
            self.scrubbed = sweep.status()

    # ---- resync

    async def _resynced_to(self, position: int) -> None:
        """All up to there fits, durably."""
        done = [(at, min(n, position - at)) for at, n in self.resync if at < position]
        rest = [(max(at, position), at + n) for at, n in self.resync if at + n > position]
        self.resync = tuple((at, end - at) for at, end in rest)
        if self.array.intents is not None:
            for offset, length in done:
                await self.array.intents.cleaned(offset, length)
        await self._keeper.update(lambda one: replace(one, resync_position=position))

    async def _resynced(self) -> None:
        await self._resynced_to(self.array.size)

    # ---- rebuild

    async def _seat_spares(self) -> None:
        """An empty slot takes the first spare there is."""
        if isinstance(self.array, TwoGeometries):
            return  # a rebuild would have to know both
        members = self.array.geometry.members
        for slot in sorted(self.devices.missing):
            spares = [
                number
                for number in sorted(self._keeper.seats)
                if number >= members
                and self._keeper.entry(number).state is State.SPARE
                and number not in self.replacements.values()
            ]
            if not spares:
                return
            await self.seat(spares[0], slot)

    async def seat(self, number: int, slot: int) -> None:
        """The member of that entry sits in the slot from now on, to be filled. Raises OSError."""
        seats = self._keeper.seats

        def change(superblock: Superblock) -> Superblock | None:
            if slot in seats or number not in seats:
                return None  # somebody was faster, or it has failed
            seats[slot] = seats.pop(number)
            before = superblock.entries[slot]
            taker = Entry(superblock.entries[number].member, State.REBUILDING)
            return with_entry(with_entry(superblock, number, before), slot, taker)

        await self.end_session()
        await self._keeper.change_roles(change)
        if slot in seats and slot in self.devices.missing:  # not failed by this very change
            self.take_in(slot)

    async def end_session(self) -> None:
        """Before a member comes into a slot: its journal has nothing of what was recorded for who
        sat there before. Raises OSError.
        """
        if self.array.journal is not None:
            await self.array.journal.renew()

    def take_in(self, slot: int) -> None:
        """Who sits there is written to from now on, and read where a rebuild has been."""
        member = self._keeper.seats[slot].member
        self.devices.rebuilt[slot] = 0
        self.devices.members[slot] = member
        self._tell(MemberSeated(slot=slot, place=member.place, returned=slot in self.returned))

    def _rebuilt_to(self, slot: int) -> Checkpoint:
        async def checkpoint(position: int) -> None:
            if slot in self.returned:
                return  # it is whole but for some ranges: a position says nothing

            def change(superblock: Superblock) -> Superblock | None:
                if slot not in self.devices.rebuilt:
                    return None
                entry = replace(superblock.entries[slot], checkpoint=position)
                return with_entry(superblock, slot, entry)

            await self._keeper.update(change)

        return checkpoint

    async def _rebuilt(self, sweep: Sweep) -> None:
        slot = sweep.slot
        assert slot is not None

        def change(superblock: Superblock) -> Superblock | None:
            if slot not in self.devices.rebuilt:
                return None  # it failed at the very end
            whole = Entry(superblock.entries[slot].member, State.ACTIVE)
            return with_entry(superblock, slot, whole)

        await self.array.flush()
        if self.array.intents is not None:
            await self.array.intents.store_all()  # it has missed marks, too
        await self._keeper.change_roles(change)
        self.devices.rebuilt.pop(slot, None)
        self.returned.pop(slot, None)
        self.keep_marks_while_degraded()

    # ---- a member that another one takes over from

    async def _replaced(self, sweep: Sweep) -> None:
        """Both hold the same now: the new one has the slot, and the old one leaves."""
        slot = sweep.slot
        assert slot is not None
        number = self.replacements.get(slot)
        member = self.devices.members[slot]
        if number is None or not isinstance(member, Replacing) or member.new_error is not None:
            return  # one of them failed at the very end
        await self.array.flush()
        await self.end_session()
        if not await member.hand_over():
            return
        seats = self._keeper.seats

        def change(superblock: Superblock) -> Superblock | None:
            if slot not in self.replacements:
                return None  # called off, or one of them has failed
            del self.replacements[slot]
            seats[slot] = seats.pop(number)
            whole = Entry(superblock.entries[number].member, State.ACTIVE)
            return trimmed(with_entry(with_entry(superblock, number, EMPTY), slot, whole))

        await self._keeper.change_roles(change)
        if self.devices.members[slot] is member:
            self.devices.members[slot] = member.new
            member.close()
        elif seats.get(slot) is None:
            member.new.close()  # it failed with the old one
        if self.array.intents is not None:
            await self.array.intents.store_all()  # spares get no marks

    def _call_off(self, slot: int) -> None:
        """The old one goes on alone; the new one is whatever became of it."""
        del self.replacements[slot]
        member = self.devices.members[slot]
        if isinstance(member, Replacing):
            member.give_up(OSError(errno.ENODEV, "the replacement was called off"))
            self.devices.members[slot] = member.old
        if self.sweep is not None and self.sweep.kind == "replace" and self.sweep.slot == slot:
            self._sweeping.cancel()


def _doubted(superblock: Superblock) -> Superblock | None:
    """A journal makes right what a crash cut off, but not a write that has failed."""
    if Flag.DOUBT in superblock.flags:
        return None
    return replace(superblock, flags=superblock.flags | Flag.DOUBT)
