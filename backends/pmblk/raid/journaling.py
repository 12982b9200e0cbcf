"""The journal of stripes at work: what is going to be written is on the members before it is.

A crash in the middle of a round of writes leaves a stripe whose parity fits neither its old nor its
new data, and if a member is missing then, what it held comes out wrong: the write hole. So a round
is recorded first (`pmblk.raid.journal` has the records, and why that is right), made durable, and
only then carried out in place. Whoever waits while others are being recorded is recorded together
with all who wait: one write and one flush a member for all of them.

The log fills up from its start. When there is no room, when a record was given up, or when somebody
else sits in a slot, the session ends (`renew`): all writes in place come to their end, all members
are flushed, and the next mark declares all of the log void. One flush frees everything.

A full stripe is recorded without its bytes: a start finds out by their checksums whether all of it
has arrived. Where a member is missing it has its bytes recorded like the others, since a stripe
that was torn could not be mended then.

Not here: what a start does with the journal (`pmblk.raid.replaying`). Heals of bad sectors and
rebuilds need no journal: they write what the rest of the row says, which stays what it is.
"""

import errno
import os
from collections.abc import Collection, Iterable, Mapping, Sequence

import trio

from pmblk.raid.buffers import buffer
from pmblk.raid.devices import Devices
from pmblk.raid.journal import (
    BLOCK_BYTES,
    LOG_OFFSET,
    NONCE_BYTES,
    Mark,
    Write,
    encode_into,
    encode_mark,
    header_bytes_for,
    mark_offset,
    record_bytes_for,
)
from pmblk.raid.member import Member, Request
from pmblk.raid.replaying import JournalReplay, Replaying

BLOCKS_MAX = 1 << 16
"""Of a member, in a session: what a start may have to check (256 MiB), and to keep in memory."""

Batch = Mapping[int, Sequence[Request]]


class Ticket:
    """A round of writes that waits to be recorded, or has been. `bare`: offsets of full stripes.

    One that `is_renewal` is recorded by nobody: who comes after it waits for a new session.
    """

    def __init__(self, batch: Batch, bare: Collection[int], *, is_renewal: bool = False) -> None:
        self.is_renewal = is_renewal
        self.writes = {
            slot: [Write(offset, view, offset in bare) for offset, view in requests]
            for slot, requests in batch.items()
        }
        self.done = False
        self.error: OSError | None = None


class Journaling:
    """`offset` and `length_bytes` are the journal's area on each of `devices`.

    `replay` comes before anything else. `payload_bytes_max`: of a round, to one member.
    """

    def __init__(self, devices: Devices, *, offset: int, length_bytes: int) -> None:
        self.log_bytes = length_bytes - LOG_OFFSET
        chunk_bytes = devices.geometry.chunk_bytes
        # A header for as many pieces and blocks as there can be: one of each to a block.
        self.payload_bytes_max = self.log_bytes // 2 // chunk_bytes * chunk_bytes
        blocks = self.payload_bytes_max // BLOCK_BYTES
        assert self.payload_bytes_max, "a chunk fits"
        assert header_bytes_for(blocks, blocks) <= self.log_bytes - self.payload_bytes_max
        self._devices = devices
        self._offset = offset
        self._mark: Mark | None = None
        self._sequence = 0
        self._ends: dict[int, int] = {}  # of the log, by slot
        self._blocks: dict[int, int] = {}  # recorded in this session, by slot
        self._known: dict[int, Member] = {}  # who has the mark
        self._void = True  # the session has to end before anything is recorded
        self._queue: list[Ticket] = []
        self._recording = trio.Lock()
        self._in_place = 0  # rounds that are recorded and not carried out yet
        self._all_in_place = trio.Event()

    def use(self, devices: Devices) -> None:
        """The same members, and maybe more, under another geometry."""
        self._devices = devices

    async def replay(self) -> JournalReplay:
        """What was recorded and may not be in place is put there. Raises OSError.

        Nobody reads or writes the array before this has returned. A crash in it, and doing it
        again, does no harm. If something is lost, the journal stays as it is until the first write,
        so that the loss can be put down before it is forgotten.
        """
        assert self._mark is None, "once"
        replaying = Replaying(self._devices, offset=self._offset, log_bytes=self.log_bytes)
        found = await replaying.run()
        self._mark = replaying.mark
        if replaying.logged and not found.lost:
            await self.renew()
        return found

    async def record(self, batch: Batch, bare: Collection[int] = ()) -> Ticket:
        """Returns when the batch may be written in place. Raises OSError: it must not be.

        `bare` are offsets on the devices: what is written there is a full stripe on all of them.
        Every ticket has to be given back to `written`.
        """
        ticket = Ticket(batch, bare)
        self._queue.append(ticket)
        try:
            async with self._recording:
                if not ticket.done:
                    await self._record_some()
        except BaseException:  # whoever asked is gone
            self._forsake(ticket)
            raise
        if ticket.error is not None:
            raise ticket.error
        return ticket

    def written(self, _ticket: Ticket) -> None:
        """The round is carried out, and members that failed in it are out."""
        self._in_place -= 1
        if not self._in_place:
            self._all_in_place.set()

    async def renew(self) -> None:
        """The log is void: all that it says is in place, durably. Raises OSError.

        To be called when a member comes into a slot, before anything that it gets there counts: its
        log may have records of this session, from before it left.
        """
        # In the queue, too: a round behind it that somebody before it has recorded would wait for
        # its turn, and so for this, which waits until all that is recorded is in place.
        turn = Ticket({}, (), is_renewal=True)
        self._queue.append(turn)
        try:
            async with self._recording:
                await self._renew()
        finally:
            self._queue.remove(turn)

    # ---- recording, one group at a time

    def _forsake(self, ticket: Ticket) -> None:
        if ticket in self._queue:
            self._queue.remove(ticket)
        elif ticket.done and ticket.error is None:  # it is recorded, and will not be in place
            self._void = True
            self.written(ticket)

    async def _record_some(self) -> None:
        """As many of the queue as fit, and its first at least."""
        tickets = self._take()
        error: OSError | None = OSError(errno.EIO, "the record was given up")
        try:
            await self._record(_together(tickets))
            self._in_place += len(tickets)
            self._all_in_place = trio.Event()
            error = None
        except OSError as found:
            error = found
        finally:
            for ticket in tickets:
                ticket.done, ticket.error = True, error

    def _take(self) -> list[Ticket]:
        taken: list[Ticket] = []
        sums: dict[int, int] = {}
        while self._queue and not self._queue[0].is_renewal:
            for slot, writes in self._queue[0].writes.items():
                length = sum(len(write.content) for write in writes)
                sums[slot] = sums.get(slot, 0) + length
            if taken and max(sums.values(), default=0) > self.payload_bytes_max:
                break
            taken.append(self._queue.pop(0))
        return taken

    async def _record(self, writes: Mapping[int, list[Write]]) -> None:
        """One transaction; from the start again when somebody else took a slot meanwhile."""
        while True:
            there = self._of_those_who_are_there(writes)
            if self._void or not self._goes_on_with(there):
                await self._renew()
                there = self._of_those_who_are_there(writes)
            if any(record_bytes_for(part) > self.log_bytes for part in there.values()):
                raise OSError(errno.EOPNOTSUPP, "somebody is missing now: it is too much to record")
            self._void = True  # until all of it is durable
            self._sequence += 1
            failures = await self._devices.write(self._records(there))
            failures |= await self._devices.flush(there.keys() - failures.keys())
            await self._must(failures)
            members = self._devices.members
            if all(members[slot] in (None, self._known[slot]) for slot in there):
                self._void = False
                return

    def _of_those_who_are_there(self, writes: Mapping[int, list[Write]]) -> dict[int, list[Write]]:
        """With all of their bytes when somebody is missing."""
        missing = self._devices.missing
        there = {slot: part for slot, part in writes.items() if slot not in missing}
        if self._devices.degraded:
            there = {
                slot: [Write(offset, content, False) for offset, content, _ in part]
                for slot, part in there.items()
            }
        return there

    def _goes_on_with(self, writes: Mapping[int, Sequence[Write]]) -> bool:
        return all(
            self._known.get(slot) is self._devices.members[slot]
            and self._ends[slot] + record_bytes_for(part) <= self.log_bytes
            and self._blocks[slot] + _blocks_of(part) <= BLOCKS_MAX
            for slot, part in writes.items()
        )

    def _records(self, writes: Mapping[int, Sequence[Write]]) -> dict[int, list[Request]]:
        """The writes that put them into the logs, which are longer then."""
        assert self._mark is not None
        requests = {}
        for slot, part in writes.items():
            view = buffer(record_bytes_for(part))
            encode_into(
                view,
                part,
                sequence=self._sequence,
                nonce=self._mark.nonce,
                slot=slot,
                participants=writes.keys(),
            )
            place = self._offset + LOG_OFFSET + self._ends[slot]
            requests[slot] = [Request(place, view)]
            self._ends[slot] += len(view)
            self._blocks[slot] += _blocks_of(part)
            assert self._ends[slot] <= self.log_bytes
        return requests

    # ---- sessions

    async def _renew(self) -> None:
        """Everything recorded is in place, durably, before the next mark is written.

        A mark that has begun is finished: it must not land over a later one.
        """
        assert self._mark is not None, "replayed"
        self._void = True
        while self._in_place:
            await self._all_in_place.wait()
        await self._must(await self._devices.flush())
        self._mark = Mark(self._mark.session + 1, os.urandom(NONCE_BYTES))
        members = {
            slot: member for slot, member in enumerate(self._devices.members) if member is not None
        }
        view = buffer(BLOCK_BYTES)
        view[:] = encode_mark(self._mark)
        place = Request(self._offset + mark_offset(self._mark.session), view)
        with trio.CancelScope(shield=True):
            failures = await self._devices.write({slot: [place] for slot in members})
            failures |= await self._devices.flush(members.keys() - failures.keys())
            await self._must(failures)
        self._known = members
        self._ends = dict.fromkeys(members, 0)
        self._blocks = dict.fromkeys(members, 0)
        self._sequence = 0
        self._void = False

    async def _must(self, failures: Mapping[int, OSError]) -> None:
        for slot in await self._devices.fail(failures):
            raise failures[slot]


def _together(tickets: Iterable[Ticket]) -> dict[int, list[Write]]:
    writes: dict[int, list[Write]] = {}
    for ticket in tickets:
        for slot, part in ticket.writes.items():
            writes.setdefault(slot, []).extend(part)
    return writes


def _blocks_of(writes: Iterable[Write]) -> int:
    return sum(len(write.content) for write in writes) // BLOCK_BYTES
