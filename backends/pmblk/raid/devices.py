"""The members of an array by slot: who is there, who is whole up to where, and rounds of I/O.

A round is one batch to each member that takes part, all at once. What failed comes back by slot:
whether that is made up for, healed, or the end of a member, is for the level to say.
"""

import contextlib
import copy
import errno
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeGuard

import trio

from pmblk.raid.bad_blocks import bad_blocks_of
from pmblk.raid.buffers import buffer
from pmblk.raid.geometry import Geometry
from pmblk.raid.layout import survives
from pmblk.raid.member import Hung, Member, Request
from pmblk.raid.poison import Poison
from pmblk.raid.replacing import goes_on, holders_of

Failures = dict[int, OSError]
Announce = Callable[[int, OSError], Awaitable[None]]
Needed = Callable[[int, OSError], None]
Range = tuple[int, int]  # offset, length
_Result = tuple[int, Member | None, OSError]

ZEROES_BYTES = 1 << 20  # written at once, where zeroes have to be written


class Gone(OSError):
    """What was asked of a member that has left: its failure was dealt with, or is being."""

    def __init__(self) -> None:
        super().__init__(errno.ENODEV, "the member is gone")


class Watchers:
    """Who is asked and told by `Devices`; None: nobody.

    `needed(slot, error)` is told of every round that failed where nobody can make up for it.
    `told()` waits until members that others than `fail` have let go of are announced as well.
    """

    def __init__(self) -> None:
        self.needed: Needed | None = None
        self.told: Callable[[], Awaitable[None]] | None = None


class Devices:
    """`announce(slot, error)` makes it durable, on all who stay, that a member failed.

    `rebuilt[slot]` is the number of chunks that a rebuild has filled; who is not in it is whole.
    """

    def __init__(
        self,
        geometry: Geometry,
        members: Sequence[Member | None],
        *,
        data_offset: int,
        announce: Announce,
    ) -> None:
        assert len(members) == geometry.members
        self.geometry = geometry
        self.members = list(members)
        self.rebuilt: dict[int, int] = {}
        self.reshaping = False  # data are on their way between two geometries
        self._judged: Geometry | None = None
        self._moved: Counter[str] = Counter()  # bytes
        self._data_offset = data_offset
        self._announce = announce
        self._failing = trio.Lock()
        self.errors: Counter[int] = Counter()  # rounds that failed, by slot, of who is in it
        self.watchers = Watchers()
        self._poison = Poison()
        self._refusals: list[OSError] = []

    def under(self, geometry: Geometry, *, data_offset: int) -> "Devices":
        """The same members under another geometry: who has left the one has left the other, too."""
        other = copy.copy(self)
        other.geometry, other._data_offset = geometry, data_offset
        return other

    def judge_by(self, geometry: Geometry) -> None:
        """Whether a member may be lost, this one says: it has more of them."""
        self._judged = geometry

    @property
    def read_bytes(self) -> int:
        return self._moved["read"]

    @property
    def write_bytes(self) -> int:
        return self._moved["written"]

    @property
    def missing(self) -> set[int]:
        members = self.members[: self.geometry.members]
        return {slot for slot, member in enumerate(members) if member is None}

    @property
    def degraded(self) -> bool:
        """Whether somebody is missing, or not whole yet, or data are on their way: the journal has
        all bytes of a stripe then.
        """
        return self.reshaping or bool(self.rebuilt) or None in self.members

    def unreadable(self, chunk: int) -> set[int]:
        """Slots whose chunk of that number nobody can read: missing, or not rebuilt yet."""
        return self.missing | {slot for slot, end in self.rebuilt.items() if chunk >= end}

    def place(self, chunk: int, start: int = 0) -> int:
        """Where a chunk lies on each member's device, in bytes."""
        return self._data_offset + chunk * self.geometry.chunk_bytes + start

    def row_at(self, offset: int) -> int:
        """The number of the chunk that lies there on each member's device."""
        return (offset - self._data_offset) // self.geometry.chunk_bytes

    # ---- rounds

    async def read(self, requests: Mapping[int, Sequence[Request]]) -> Failures:
        """Of slots that are there. What failed.

        Raises Hung when a member did not answer, and is out: it may still scribble into the memory
        of this round, so nothing of that may be used, and the operation starts over with new
        memory. EIO when the array cannot be without that member.
        """
        results = await self._round(
            requests, lambda slot, member: self._read(member, requests[slot])
        )
        hung = {slot: error for slot, _, error in results if isinstance(error, Hung)}
        failures = self._failures(results)
        if hung:
            await self._lose_hung({slot: failures[slot] for slot in hung})
            raise next(iter(hung.values()))
        self._moved["read"] += _bytes_of(requests, failures)
        return failures

    async def write(self, requests: Mapping[int, Sequence[Request]]) -> Failures:
        """Raises OSError when a failed member could not be announced: see `fail`.

        Whoever may be cancelled shields it: a thread goes on with what nobody waits for any more,
        and its bytes would land over what is written after the locks have been let go.
        """
        self._check()
        results = await self._round(
            requests, lambda slot, member: self._write(member, requests[slot])
        )
        failures = self._failures(results)
        self._moved["written"] += _bytes_of(requests, failures)
        return failures

    async def heal(self, requests: Mapping[int, Sequence[Request]]) -> None:
        """Write back what a read has made from redundancy. The read is right in any case.

        Done to its end, whoever is cancelled meanwhile.
        """
        with trio.CancelScope(shield=True):
            try:
                await self.fail(await self.write(requests))
            except OSError:
                pass  # no failed member can be announced any more: every write will say so

    async def zero(self, ranges: Mapping[int, Sequence[Range]]) -> Failures:
        """Ranges of members, in bytes, become zeroes; written where a member has no better way."""
        self._check()
        return self._failures(
            await self._round(ranges, lambda slot, member: self._zero(member, ranges[slot]))
        )

    async def flush(self, slots: Collection[int] | None = None) -> Failures:
        """Of these slots, or of all members that are in."""
        if slots is None:
            slots = [slot for slot, member in enumerate(self.members) if member is not None]
        return self._failures(await self._round(slots, lambda _, member: member.flush()))

    async def _read(self, member: Member, requests: Sequence[Request]) -> None:
        if self._poison:
            self._poison.check(holders_of(member)[0], requests)
        await member.read(requests)

    async def _write(self, member: Member, requests: Sequence[Request]) -> None:
        await member.write(requests)
        for one in holders_of(member) if self._poison else ():
            self._poison.take_off(one, ranges_of(requests))

    async def _zero(self, member: Member, ranges: Sequence[Range]) -> None:
        await _zero(member, ranges)
        for one in holders_of(member) if self._poison else ():
            self._poison.take_off(one, ranges)

    async def _round(
        self, slots: Collection[int], what: Callable[[int, Member], Awaitable[None]]
    ) -> list[_Result]:
        """What failed: the slot, the member who was in it, and the error."""
        results: list[_Result] = []
        planned = {slot: self.members[slot] for slot in slots}  # whoever comes later may lack it

        async def one(slot: int) -> None:
            member = self.members[slot]
            if not _goes_on(member, planned[slot]):  # it failed since the round was planned
                results.append((slot, None, Gone()))
                return
            try:
                await what(slot, member)
            except OSError as error:
                results.append((slot, member, error))

        if len(slots) == 1 or all(map(self._is_inline, slots)):
            # Copies of memory wait for nothing, and a task for each costs more than they do.
            for slot in slots:
                await one(slot)
            return results
        async with trio.open_nursery() as nursery:
            for slot in slots:
                nursery.start_soon(one, slot)
        return results

    def _is_inline(self, slot: int) -> bool:
        member = self.members[slot]
        return member is None or member.inline

    def _failures(self, results: Iterable[_Result]) -> Failures:
        """By slot. Who has left the slot since failed before, and who sits there now has not."""
        failures: Failures = {}
        for slot, member, error in results:
            if not _goes_on(self.members[slot], member):
                failures[slot] = Gone()
                continue
            self.errors[slot] += 1
            if self.watchers.needed is not None and not survives(
                self.geometry, self._lost_with(slot)
            ):
                self.watchers.needed(slot, error)
            if isinstance(error, Hung):  # to the array's users it is an error like any other
                failures[slot] = OSError(errno.EIO, error.strerror)
            else:
                failures[slot] = error
        return failures

    # ---- the end of a member

    async def fail(self, failures: Mapping[int, OSError]) -> set[int]:
        """These members are out, durably, unless the array cannot be without them.

        Returns the slots that are still in: what they failed at is an error of the array. To be
        called after every round of writes, also with no failure: it waits for an announcement that
        is under way, and nothing that skipped the failed member may count before it. After a crash
        in between, that member would be taken for whole.

        Raises OSError when an announcement has failed, now or ever: no write may count any more.
        """
        stay = set()
        async with self._failing:
            for slot, error in failures.items():
                member = self.members[slot]
                if member is None or isinstance(error, Gone):
                    continue
                if not survives(self._judged or self.geometry, self._lost_with(slot)):
                    stay.add(slot)
                    continue
                await self._put_out(slot, member, error)
            self._check()
        if self.watchers.told is not None:
            await self.watchers.told()
        return stay

    async def fail_and_lose(
        self, failures: Failures, at: Callable[[int], Sequence[Range]]
    ) -> set[int]:
        """As `fail`, after writes to `at(slot)` that nobody may make anything of who is missing.

        Who has to stay holds old bytes there, or new ones, which fit the rest of their row or not.
        """
        stay = {slot for slot, error in failures.items() if not isinstance(error, Gone)}
        try:
            stay = await self.fail(failures)
        finally:  # also when nobody can be told: reads go on
            for slot in stay:
                member, ranges = self.members[slot], at(slot)
                for one in holders_of(member) if member is not None and ranges else ():
                    await self._lose(one, ranges)
        return stay

    async def _lose(self, member: Member, ranges: Sequence[Range]) -> None:
        """Nobody knows what it holds there: reads fail until it is written again.

        On the member's log of lost blocks, if it has one that takes them; else for this run.
        """
        self._poison.add(member, ranges)
        log = bad_blocks_of(member)
        if log is not None:
            with contextlib.suppress(OSError):
                await log.lose_all(ranges)
                self._poison.take_off(member, ranges)

    async def _put_out(self, slot: int, member: Member, error: OSError) -> None:
        """Nobody uses it from now on, and the others are told, whoever is cancelled meanwhile.

        What bounds the shield is the patience with the members that are told.
        """
        self.members[slot] = None
        self.rebuilt.pop(slot, None)
        del self.errors[slot]
        member.close()
        if self._refusals:
            return
        with trio.CancelScope(shield=True):
            try:
                await self._announce(slot, error)
            except OSError as refusal:
                self._refusals.append(refusal)

    async def _lose_hung(self, hung: Failures) -> None:
        """Reads go on without them, announced or not. Raises EIO where they cannot."""
        try:
            stay = await self.fail(hung)
        except OSError:  # every write will say so
            stay = {slot for slot in hung if self.members[slot] is not None}
            stay -= {slot for slot in stay if isinstance(hung[slot], Gone)}
        for slot in stay:
            raise hung[slot]

    def _check(self) -> None:
        """Whether failed members can be announced. Raises OSError, for ever, once one was not."""
        for refusal in self._refusals:
            raise refusal

    def _lost_with(self, slot: int) -> Collection[int]:
        """Slots that would not be whole if this one went too."""
        missing = {other for other, member in enumerate(self.members) if member is None}
        return missing | set(self.rebuilt) | {slot}


def _goes_on(successor: Member | None, member: Member | None) -> TypeGuard[Member]:
    """Whether who sits there does what the other one was to do."""
    if successor is member:
        return member is not None
    return successor is not None and member is not None and goes_on(successor, member)


def ranges_of(requests: Sequence[Request]) -> list[Range]:
    return [(offset, len(view)) for offset, view in requests]


def _bytes_of(requests: Mapping[int, Sequence[Request]], failures: Failures) -> int:
    return sum(
        len(request.view)
        for slot, batch in requests.items()
        if slot not in failures
        for request in batch
    )


async def _zero(member: Member, ranges: Sequence[Range]) -> None:
    for offset, length in ranges:
        try:
            await member.zero(offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            await _write_zeroes(member, offset, length)


async def _write_zeroes(member: Member, offset: int, length: int) -> None:
    zeroes = buffer(min(length, ZEROES_BYTES))  # never written to, so no memory is under it
    for position in range(offset, offset + length, ZEROES_BYTES):
        piece = min(ZEROES_BYTES, offset + length - position)
        await member.write((Request(position, zeroes[:piece]),))
