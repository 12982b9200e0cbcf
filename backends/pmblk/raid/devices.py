"""The members of an array by slot: who is there, who is whole up to where, and rounds of I/O.

A round is one batch to each member that takes part, all at once. What failed comes back by slot:
whether that is made up for, healed, or the end of a member, is for the level to say.
"""

import errno
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import trio

from pmblk.raid.geometry import Geometry
from pmblk.raid.layout import survives
from pmblk.raid.member import Member, Request

Failures = dict[int, OSError]
Announce = Callable[[int, OSError], Awaitable[None]]


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
        self.read_bytes = 0
        self.write_bytes = 0
        self._data_offset = data_offset
        self._announce = announce
        self._failing = trio.Lock()

    @property
    def missing(self) -> set[int]:
        return {slot for slot, member in enumerate(self.members) if member is None}

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
        """Of slots that are there. What failed."""
        failures = await self._round(requests, "read")
        self.read_bytes += _bytes_of(requests, failures)
        return failures

    async def write(self, requests: Mapping[int, Sequence[Request]]) -> Failures:
        failures = await self._round(requests, "write")
        self.write_bytes += _bytes_of(requests, failures)
        return failures

    async def flush(self, slots: Collection[int] | None = None) -> Failures:
        """Of these slots, or of all members that are in."""
        if slots is None:
            slots = [slot for slot, member in enumerate(self.members) if member is not None]
        return await self._round(dict.fromkeys(slots, ()), "flush")

    async def _round(self, requests: Mapping[int, Sequence[Request]], what: str) -> Failures:
        failures: Failures = {}

        async def one(slot: int, member: Member) -> None:
            try:
                if what == "flush":
                    await member.flush()
                else:
                    await (member.read if what == "read" else member.write)(requests[slot])
            except OSError as error:
                failures[slot] = error

        async with trio.open_nursery() as nursery:
            for slot in requests:
                member = self.members[slot]
                if member is None:  # it failed since the round was planned
                    failures[slot] = OSError(errno.ENODEV, "the member is gone")
                else:
                    nursery.start_soon(one, slot, member)
        return failures

    # ---- the end of a member

    async def fail(self, failures: Mapping[int, OSError]) -> set[int]:
        """These members are out, durably, unless the array cannot be without them.

        Returns the slots that are still in: what they failed at is an error of the array. To be
        called after every round of writes, also with no failure: it waits for an announcement that
        is under way, and nothing that skipped the failed member may count before it. After a crash
        in between, that member would be taken for whole.
        """
        stay = set()
        async with self._failing:
            for slot, error in failures.items():
                member = self.members[slot]
                if member is None:
                    continue
                if not survives(self.geometry, self._lost_with(slot)):
                    stay.add(slot)
                    continue
                self.members[slot] = None
                self.rebuilt.pop(slot, None)
                member.close()
                await self._announce(slot, error)
        return stay

    def _lost_with(self, slot: int) -> Collection[int]:
        """Slots that would not be whole if this one went too."""
        return self.missing | set(self.rebuilt) | {slot}


def _bytes_of(requests: Mapping[int, Sequence[Request]], failures: Failures) -> int:
    return sum(
        len(request.view)
        for slot, batch in requests.items()
        if slot not in failures
        for request in batch
    )
