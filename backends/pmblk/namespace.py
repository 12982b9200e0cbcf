"""A namespace: batches of commands from any front end, answered at once or completed later.

`execute` takes a batch and answers on the spot all that memory can answer. It returns the commands
that have to wait (a sync of the media, a long discard, an exhausted representation), and
`complete` waits for them. A front end therefore replies to most commands without leaving its stack
frame. What one command does is `pmblk.dispatcher`'s.

Rules that live here and nowhere else:

1. A FLUSH covers every command that was completed before `execute` saw it. FUA covers its own.
2. A discard or zeroing that takes its time fences its range: commands that overlap it wait, so no
   store can meet a page on its way out.
3. Nobody waits, for memory or for a fence, while holding memory: `complete` returns early, so that
   its caller sends what is finished and gives back what that holds. So there is no circle of
   waiters.
4. Pages that somebody holds are given back only when they are released: a discard fences what the
   representation calls the unit of lifetime, and waits.
5. Inside `quiesced` nothing runs, nothing is held, and all that was completed is durable.

Between two awaits everything here is atomic, since all of it runs on one event loop.
"""

import contextlib
import errno
import math
from collections.abc import AsyncIterator, Iterable, Sequence

import trio

from pmblk.dispatcher import Dispatcher
from pmblk.errors import PmblkError
from pmblk.media import Media
from pmblk.media.allocation import HOLE
from pmblk.nvme.command import (
    DATASET_MANAGEMENT,
    FLUSH,
    FUA,
    READ,
    WRITE,
    WRITE_ZEROES,
    Command,
    Hole,
)
from pmblk.nvme.data_pointer import prp_list_pages
from pmblk.pages import PAGE_BYTES, PAGE_SHIFT, span
from pmblk.ranges import slices
from pmblk.representations.base import Lease, Representation
from pmblk.zeroing import INLINE_BYTES, clear_in_slices

QUIESCE_SECONDS = 3  # less than the patience with a slow reader: a switch alone cuts nobody off

PIECE_COST_BYTES = 64 << 10  # what writing back a piece costs beside its bytes, in bytes

_NONE: tuple[Command, ...] = ()
_EVERYTHING = 1 << 63  # a range longer than any namespace will be


class Namespace:
    """`lba_bytes` is the reported block size; any byte range may be read and written."""

    def __init__(
        self, name: str, media: Media, representation: Representation, *, lba_bytes: int
    ) -> None:
        assert media.size % lba_bytes == 0, "open_media checks this"
        self.name = name
        self.media = media
        self.lba_bytes = lba_bytes
        self.size = media.size
        self.read_only = media.read_only
        self.changing = trio.Lock()  # for whoever exchanges the representation or the size
        self.starved = 0  # waits for a lease to be released
        self.starved_since = 0.0  # trio's clock, when the first of them began to
        self._dispatcher = Dispatcher(media, representation)
        self.counters = self._dispatcher.counters
        self._released = trio.Event()

    @property
    def representation(self) -> Representation:
        return self._dispatcher.representation

    def install(self, representation: Representation) -> None:
        """Another representation, or another one of media that were resized; only `quiesced`."""
        self._dispatcher.representation = representation
        self.size = self.media.size

    # ---- the path of every I/O: no await

    def execute(self, commands: Iterable[Command]) -> Sequence[Command]:
        """Set `status` (and what was read) of every command that needs no waiting; return the rest.

        A command that arrives with a status keeps it: its front end has judged it already. Read
        segments stay valid until the command is given to `release`.
        """
        waiting: list[Command] = []
        dispatcher = self._dispatcher
        representation = dispatcher.representation
        hold, write = representation.hold, representation.write
        known = self.media.allocation.known
        size = self.size
        calm = not dispatcher.fences
        writable = not self.read_only and dispatcher.sync.failure is None
        reads = read_bytes = writes = write_bytes = prp_entries = list_pages = 0
        for command in commands:
            if command.status:
                dispatcher.counters.errors += 1
                continue
            opcode = command.opcode
            offset = command.offset
            length = command.length
            # The two cases worth lines of their own: memory that is there is read or written.
            try:
                if calm and 0 < length <= size - offset:
                    first = offset >> PAGE_SHIFT
                    last = (offset + length - 1) >> PAGE_SHIFT
                    if known[first] if first == last else known.find(HOLE, first, last + 1) < 0:
                        done: bool | None = None
                        if opcode == READ:
                            lease = hold(offset, length)
                            done = lease is not None
                            if lease is not None:
                                command.segments = lease.views
                                command.leases = (lease,)
                                reads += 1
                                read_bytes += length
                        elif opcode == WRITE and writable and not command.flags:
                            payload = command.payload
                            if payload is not None and not command.received:
                                done = write(offset, payload)
                                if done:
                                    writes += 1
                                    write_bytes += length
                        if done:
                            prp_entries += last - first + 1
                            if last - first > 1:
                                list_pages += prp_list_pages(last - first + 1)
                            continue
                        if done is not None:  # refused: it has to wait
                            waiting.append(command)
                            continue
            except OSError as error:  # poison, or media in a page cache that refuse a store
                dispatcher.fail_with(command, error)
                continue
            if not dispatcher.attempt(command):
                waiting.append(command)
        counters = dispatcher.counters
        counters.reads += reads
        counters.read_bytes += read_bytes
        counters.writes += writes
        counters.write_bytes += write_bytes
        counters.prp_entries += prp_entries
        counters.prp_list_pages += list_pages
        return self._own_payloads(waiting) if waiting else _NONE

    def _own_payloads(self, waiting: list[Command]) -> list[Command]:
        """The front end's buffer is its own again after `execute`; what waits needs its bytes."""
        self.counters.waits += len(waiting)
        for command in waiting:
            if command.payload is not None and not command.applied:
                command.payload = bytes(command.payload)
        return waiting

    def release(self, commands: Iterable[Command]) -> None:
        """The replies have left: what these commands read may be looked at until the next await."""
        leases: list[Lease] = []
        for command in commands:
            if command.leases:
                leases += command.leases
                command.leases = ()
        self.representation.release(leases)
        if self.starved:
            self._released.set()
            self._released = trio.Event()

    def window(self, command: Command) -> memoryview | None:
        """Memory for a write's payload beyond its `received` bytes, to receive into without a copy.

        Valid until the caller's next await. None: the bytes must go through `execute`, which also
        knows the error if there is one.
        """
        return self._dispatcher.window(command)

    def received(self, command: Command, length: int) -> None:
        """The next `length` bytes of the command's payload are in its window."""
        place = command.offset + command.received
        self.representation.stored(place, length, continued=command.received > 0)
        command.received += length

    def poison(self, offset: int, length: int) -> None:
        """The pages that the range touches are bad until they are written as a whole.

        They get memory first: a hole has none that could fail. Raises PmblkError.
        """
        self.check_accessible(offset, length)
        try:
            if not self.read_only:
                self.media.reserve(offset, length)
            self.representation.poison(*span(offset, length))
        except OSError as error:
            raise PmblkError(f"{self.name}: {error.strerror}") from error

    def check_accessible(self, offset: int, length: int) -> None:
        """Raises PmblkError for a range that is not there, or that a discard is taking away."""
        if length < 1 or offset < 0 or length > self.size - offset:
            raise PmblkError(
                f"{self.name} has no {length} bytes at {offset}", hint=f"it has {self.size} bytes"
            )
        if self._dispatcher.fences.overlap(offset, length):
            raise PmblkError(
                f"{self.name} is changing the {length} bytes at {offset}", hint="try again"
            )

    # ---- the commands that wait

    async def complete(self, commands: Sequence[Command]) -> Sequence[Command]:
        """Finish one or more of what `execute` returned, in order; return those that still wait.

        The finished ones have their status. Send them, `release` them, and come again with the
        rest. All syncs that are wanted become one.
        """
        finished: list[Command] = []
        for command in commands:
            if command.opcode != FLUSH and not command.applied:
                may_wait = not any(one.segments for one in finished)
                if not await self._finish_slowly(command, may_wait=may_wait):
                    break
            finished.append(command)
        await self._sync_for(finished)
        return commands[len(finished) :]

    async def _finish_slowly(self, command: Command, *, may_wait: bool) -> bool:
        """All but the durability of a command; False: it needs memory, and `may_wait` forbids."""
        dispatcher = self._dispatcher
        while True:
            if not may_wait and dispatcher.fences.overlap(command.offset, command.length):
                return False
            await dispatcher.fences.lifted(command.offset, command.length)
            if dispatcher.attempt(command) or command.applied:
                return True
            if command.opcode in (WRITE_ZEROES, DATASET_MANAGEMENT):
                if not may_wait and self.representation.busy(command.offset, command.length):
                    return False
                await self._clear_slowly(command)
                return True
            if not may_wait:
                return False
            if command.length - command.received > self._io_bytes_max:
                await self._transfer_in_pieces(command)
                return True
            await self._lease_released()  # no await since the fences: only a lease can be missing

    @property
    def _io_bytes_max(self) -> float:
        limit = self.representation.io_bytes_max
        return math.inf if limit is None else limit

    async def _lease_released(self) -> None:
        released = self._released
        if not self.starved:
            self.starved_since = trio.current_time()
        self.starved += 1
        try:
            await released.wait()
        finally:
            self.starved -= 1

    async def _clear_slowly(self, command: Command) -> None:
        dispatcher = self._dispatcher
        offset, length = command.offset, command.length
        allocate = dispatcher.must_allocate(command)
        unit = (offset, length)
        if not allocate and self.representation.busy(offset, length):
            unit = self.representation.lifetime_unit(offset, length)
        try:
            with dispatcher.fences.around(*unit):
                while not allocate and self.representation.busy(offset, length):
                    await self._lease_released()
                await clear_in_slices(
                    self.media, self.representation, offset, length, allocate=allocate
                )
        except OSError as error:
            dispatcher.fail_with(command, error)
            return
        self._finished_slowly(command)

    async def _transfer_in_pieces(self, command: Command) -> None:
        """More than the representation can hold at once: through a buffer of the command's own."""
        reading = command.opcode == READ
        position, end = command.offset + command.received, command.offset + command.length
        buffer = bytearray(end - position) if reading else command.payload
        assert buffer is not None
        view = rest = memoryview(buffer)
        while rest:
            piece = await self._transfer_piece(command, position, rest)
            if not piece:
                return
            position += piece
            rest = rest[piece:]
        if reading:
            command.segments = [view]
        self._finished_slowly(command)

    async def _transfer_piece(self, command: Command, offset: int, rest: memoryview) -> int:
        """As much as can be held, between the start of `rest` and memory; its length.

        0 when it failed, and the command with it. The limit is asked for anew after each wait: the
        representation may be another one by then.
        """
        reading = command.opcode == READ
        dispatcher = self._dispatcher
        while True:
            await dispatcher.fences.lifted(offset, len(rest))
            window = rest
            if len(rest) > self._io_bytes_max:  # cut at a page: halves would be filled, or refused
                window = rest[: (offset + int(self._io_bytes_max) & -PAGE_BYTES) - offset]
            payload = None if reading else window
            piece = Command(command.opcode, 0, offset, len(window), payload=payload)
            status = dispatcher.guard(piece)
            if status:
                dispatcher.fail(command, status)
                return 0
            try:
                if dispatcher.perform(piece):
                    break
            except OSError as error:
                dispatcher.fail_with(command, error)
                return 0
            await self._lease_released()
        if reading:
            _copy_segments(piece, window)
        self.release((piece,))
        return len(window)

    def _finished_slowly(self, command: Command) -> None:
        """Done but for its durability, if that was asked for."""
        if not command.flags & FUA or command.opcode == READ:
            self._dispatcher.count(command)
            return
        try:
            self.representation.write_back(command.offset, command.length)
            command.applied = True
        except OSError as error:
            self._dispatcher.fail_with(command, error)

    async def _sync_for(self, finished: Iterable[Command]) -> None:
        """One flush for all: what the representation holds goes to the media, then one sync."""
        wanted = [
            command
            for command in finished
            if not command.status and (command.opcode == FLUSH or command.applied)
        ]
        if not wanted:
            return
        try:
            await self._persist()
        except OSError as error:
            for command in wanted:
                self._dispatcher.fail_with(command, error)
            return
        for command in wanted:
            self._dispatcher.count(command)

    async def _persist(self) -> None:
        """What the representation holds goes to the media, and then a sync. Raises OSError."""
        representation = self.representation
        spent = 0
        for offset, length in representation.dirty_extents():
            for start, piece in slices(offset, length, slice_bytes=INLINE_BYTES):
                if self.representation is not representation:
                    return  # exchanged since, and `quiesced` has persisted all of it
                representation.write_back(start, piece)
                spent += piece + PIECE_COST_BYTES
                if spent >= INLINE_BYTES:  # the others get their turn
                    await trio.lowlevel.checkpoint()
                    spent = 0
        await self._dispatcher.sync()

    @contextlib.asynccontextmanager
    async def quiesced(self) -> AsyncIterator[None]:
        """Inside, no command runs, nothing is held, and all that was completed is durable.

        Clients wait meanwhile. Raises PmblkError, with everything as it was, when a client does not
        take its replies in `QUIESCE_SECONDS` or the media cannot be synced.
        """
        fences = self._dispatcher.fences
        deadline = trio.current_time() + QUIESCE_SECONDS
        with trio.CancelScope(deadline=deadline) as limit:
            await fences.lifted(0, _EVERYTHING)
        if limit.cancelled_caught:
            raise PmblkError(
                f"{self.name}: a discard is under way since {QUIESCE_SECONDS} s", hint="try again"
            )
        with fences.around(0, _EVERYTHING):
            with trio.CancelScope(deadline=deadline):
                while self.representation.leases:
                    await self._lease_released()
            if self.representation.leases:
                raise PmblkError(
                    f"{self.name}: {self.representation.leases} reads are not taken by their "
                    f"clients in {QUIESCE_SECONDS} s",
                    hint="find the client that hangs, or try again",
                )
            try:
                await self._persist()
            except OSError as error:
                raise PmblkError(
                    f"{self.name} cannot be made durable: {error.strerror}",
                    hint="nothing was changed; look at its media",
                ) from error
            yield

    async def flush(self) -> None:
        """All that was completed is durable when this returns. Raises OSError."""
        flush = Command(FLUSH, 0, 0, 0)
        await self.complete(self.execute((flush,)))
        if flush.status:
            raise OSError(errno.EIO, f"namespace {self.name}: the flush failed")


def _copy_segments(command: Command, target: memoryview) -> None:
    position = 0
    for segment in command.segments or ():
        if isinstance(segment, Hole):
            position += segment.length
        else:
            target[position : position + len(segment)] = segment
            position += len(segment)
