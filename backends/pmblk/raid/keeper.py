"""The superblock of an array on all of its members: what is decided is there before it counts.

There are two kinds of change. A change of roles (`change_roles`, `fail`) is a new `events`: it is
written to all who stay, and once more as SETTLED; only then may anything be written that skips who
left (`pmblk.raid.assembly` has the other half of that rule). Any other change (`update`) is a new
`generation`, written once.

Who does not take its superblock is failed too, and the rest told. If the array cannot be without
it, the change is an OSError, for ever: nothing may count that the members cannot be told.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import trio
from msgspec.structs import replace

from pmblk.raid.buffers import aligned
from pmblk.raid.layout import survives
from pmblk.raid.member import Member, Request
from pmblk.raid.superblock import EMPTY, SLOT_OFFSETS, Entry, Flag, State, Superblock, encode

Out = Callable[[int, OSError], None]
Change = Callable[[Superblock], Superblock | None]
"""Makes the new superblock of the one in force; None: things have changed, and it is off. Nothing
else changes meanwhile, so seats are exchanged in it, too."""


class Seat(msgspec.Struct):
    """A member that has an entry. `slot_number`: which of its two superblocks is the older one."""

    member: Member
    slot_number: int


class Keeper:
    """`seats` are by the number of their entry. `out(number, error)`: that member was failed here,
    and is closed.

    `superblock` is what is in force, in the words of no particular member.
    """

    def __init__(self, superblock: Superblock, seats: Mapping[int, Seat], *, out: Out) -> None:
        self.superblock = superblock
        self.seats = dict(seats)
        self._out = out
        self._changing = trio.Lock()
        self._losing = False  # somebody was dropped, and the others are not told yet
        self._refusal: OSError | None = None

    def entry(self, number: int) -> Entry:
        return self.superblock.entries[number]

    # ---- changes

    async def update(self, change: Change) -> None:
        """What is no role; `change` makes the new superblock from that in force. Raises OSError."""
        async with self._changing:
            superblock = change(self.superblock)
            if superblock is not None:
                await self._put(_again(superblock))

    async def change_roles(self, change: Change) -> None:
        """`change` makes the new superblock of the one in force. Raises OSError."""
        async with self._changing:
            await self._settle_first()
            superblock = change(self.superblock)
            if superblock is not None:
                await self._settle(superblock)

    async def fail(self, number: int, error: OSError) -> None:
        """This member is out; the others know when this returns. Raises OSError."""
        async with self._changing:
            self.seats.pop(number, None)
            if self.entry(number).state is not State.FAULTY:
                await self._settle(_with_state(self.superblock, number, State.FAULTY))
            if self._refusal is not None:
                raise self._refusal

    async def told(self) -> None:
        """Everybody who was dropped here is known to be out. Raises OSError, for ever, when that
        cannot be: nothing that skipped them may count.
        """
        if self._losing:
            async with self._changing:
                pass
        self._check()

    async def settle_again(self) -> None:
        """The roles in force to all, who may not all know them: a change was cut off once."""
        async with self._changing:
            await self._settle_first()

    async def _settle_first(self) -> None:
        """As long as not all know the newest roles, another change would leave some two behind."""
        if self.superblock.events and Flag.SETTLED not in self.superblock.flags:
            await self._spread(_again(self.superblock))

    async def do(self, what: "Callable[[int, Seat], Any]") -> None:
        """Every member does it, spares too; who fails at it is out. Raises OSError."""
        seats = dict(self.seats)
        failures = await self._each(what)
        async with self._changing:
            there = {n: error for n, error in failures.items() if self.seats.get(n) is seats.get(n)}
            await self._lose(there)

    async def store(self, offset: int, view: memoryview, *, durable: bool) -> None:
        """The same bytes on every member that holds data, outside of the data. Raises OSError."""
        async with self._changing:
            await self._lose(await self._each_stores(offset, view, durable))

    async def _each_stores(
        self, offset: int, view: memoryview, durable: bool
    ) -> dict[int, OSError]:
        async def one(number: int, seat: Seat) -> None:
            if self.entry(number).state in (State.ACTIVE, State.REBUILDING):
                await seat.member.write((Request(offset, view),))
                if durable:
                    await seat.member.flush()

        return await self._each(one)

    # ---- the members, told

    async def _put(self, superblock: Superblock) -> None:
        self._check()
        self.superblock = superblock
        await self._lose(await self._write(superblock))

    async def _settle(self, superblock: Superblock) -> None:
        """New roles to all who stay, then once more as settled."""
        self._check()
        superblock = _again(
            superblock,
            events=self.superblock.events + 1,
            flags=superblock.flags & ~Flag.SETTLED,
        )
        superblock = _counted_out(superblock, before=self.superblock)
        if all(entry.state is State.ACTIVE for entry in superblock.slots):
            superblock = replace(superblock, whole_events=superblock.events)
        await self._spread(superblock)

    async def _spread(self, superblock: Superblock) -> None:
        self._check()
        self.superblock = superblock
        failures = await self._write(superblock)
        if not failures:
            self.superblock = _again(superblock, flags=superblock.flags | Flag.SETTLED)
            failures = await self._write(self.superblock)
        await self._lose(failures)

    async def _lose(self, failures: Mapping[int, OSError]) -> None:
        """Who failed to be told is out, and the others are told that."""
        if not failures:
            return
        superblock = self.superblock
        for number in failures:  # all of them can be let go, or none is
            if not self._can_lose(superblock, number):
                self._refusal = failures[number]
                raise failures[number]
            superblock = _with_state(superblock, number, State.FAULTY)
        self._losing = True
        for number, error in failures.items():
            self.seats.pop(number).member.close()
            self._out(number, error)
        await self._settle(superblock)
        self._losing = False

    def _can_lose(self, superblock: Superblock, number: int) -> bool:
        geometry = superblock.geometry
        lost = {
            slot
            for slot, entry in enumerate(superblock.slots)
            if entry.state is not State.ACTIVE or slot not in self.seats
        }
        return number >= geometry.members or survives(geometry, lost | {number})

    def _check(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    async def _write(self, superblock: Superblock) -> dict[int, OSError]:
        async def one(number: int, seat: Seat) -> None:
            own = replace(superblock, member=superblock.entries[number].member)
            block = aligned(encode(own))
            await seat.member.write((Request(SLOT_OFFSETS[seat.slot_number], block),))
            await seat.member.flush()
            seat.slot_number ^= 1

        return await self._each(one)

    async def _each(self, what: "Callable[[int, Seat], Any]") -> dict[int, OSError]:
        """All seats at once; what failed, by number."""
        failures: dict[int, OSError] = {}

        async def guarded(number: int, seat: Seat) -> None:
            try:
                await what(number, seat)
            except OSError as error:
                failures[number] = error

        async with trio.open_nursery() as nursery:
            for number, seat in self.seats.items():
                nursery.start_soon(guarded, number, seat)
        return failures


def _again(superblock: Superblock, **fields: Any) -> Superblock:
    return replace(
        superblock,
        generation=superblock.generation + 1,
        updated_ns=time.time_ns(),
        **fields,
    )


def _with_state(superblock: Superblock, number: int, state: State) -> Superblock:
    return with_entry(superblock, number, replace(superblock.entries[number], state=state))


def _counted_out(superblock: Superblock, *, before: Superblock) -> Superblock:
    """The same with when they left, of those who are faulty now: by that, who goes on alone after
    it is found out, whomever it forgets.
    """
    out = {entry.member for entry in before.entries if entry.state is State.FAULTY}
    entries = tuple(
        replace(entry, left_events=superblock.events)
        if entry.state is State.FAULTY and entry.member not in out
        else entry
        for entry in superblock.entries
    )
    return replace(superblock, entries=entries)


def with_entry(superblock: Superblock, number: int, entry: Entry) -> Superblock:
    """The same with another entry at that number, which may be the first behind the last."""
    entries = [*superblock.entries]
    entries[number : number + 1] = [entry]
    return replace(superblock, entries=tuple(entries))


def trimmed(superblock: Superblock) -> Superblock:
    """Without empty entries behind the slots, at the end."""
    entries = [*superblock.entries]
    while len(entries) > superblock.geometry.members and entries[-1].state is State.EMPTY:
        entries.pop()
    return replace(superblock, entries=tuple(entries))


def without(superblock: Superblock, member: uuid.UUID) -> Superblock:
    """The same with no entry of that member."""
    for number, entry in enumerate(superblock.entries):
        if entry.member == member:
            superblock = with_entry(superblock, number, EMPTY)
    return superblock
