"""A namespace: the guard and the dispatch of every I/O, whatever the front end.

`execute` takes a batch of commands and answers on the spot all that memory can answer: range,
alignment and read-only rules first, then the representation. It returns the commands that have to
wait (a sync of the media, a long discard, an exhausted representation), and `complete` waits for
them. A front end therefore replies to most commands without leaving its stack frame.

Rules that live here and nowhere else:

1. A write reserves its pages before it stores; a read never touches a hole (`pmblk.media`).
2. A discard or zeroing longer than `INLINE_BYTES` takes its time (`pmblk.zeroing`). Meanwhile its
   range is fenced: commands that overlap it wait, so no store can meet a page on its way out.
3. A FLUSH covers every command that was completed before `execute` saw it. FUA covers its own.
4. After a sync has failed, every later write and flush fails: nothing can prove what is durable.

Between two awaits everything here is atomic, since all of it runs on one event loop.
"""

import errno
from collections.abc import Iterable, Sequence

import msgspec
import trio

from pmblk.fences import Fences
from pmblk.media.group_sync import GroupSync
from pmblk.media.pmem import Media
from pmblk.nvme.command import (
    ALLOCATE,
    CONTIGUOUS,
    DATASET_MANAGEMENT,
    FAST_ONLY,
    FIRST_EXTENT,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Command,
    Hole,
    Segment,
)
from pmblk.nvme.status import Status, from_oserror
from pmblk.ranges import Extent, merge_extents, slices
from pmblk.representations.base import Lease, Representation
from pmblk.zeroing import INLINE_BYTES, Zeroing

EXTENTS_MAX = 4096  # one answer to GET_LBA_STATUS; the client asks again from its end

_DONE: tuple[Command, ...] = ()


class Counters(msgspec.Struct):
    """Plain ints, added to on the I/O path and read when somebody asks (NVMe: SMART log)."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    write_bytes: int = 0
    zeroed_bytes: int = 0
    flushes: int = 0
    errors: int = 0
    waits: int = 0


class Namespace:
    """`lba_bytes` is the reported block size; any byte range may be read and written."""

    def __init__(
        self, name: str, media: Media, representation: Representation, *, lba_bytes: int
    ) -> None:
        assert media.size % lba_bytes == 0, "the config checks this"
        self.name = name
        self.media = media
        self.representation = representation
        self.lba_bytes = lba_bytes
        self.size = media.size
        self.read_only = media.read_only
        self.counters = Counters()
        self._covers = media.allocation.covers
        self._fences = Fences()
        self._zeroing = Zeroing(media, representation)
        self._sync = GroupSync(media.durability.sync)
        self._released = trio.Event()
        self.starved = 0  # commands that wait for a lease to be released

    # ---- the path of every I/O: no await

    def execute(self, commands: Iterable[Command]) -> Sequence[Command]:
        """Set `status` (and what was read) of every command that needs no waiting; return the rest.

        A command that arrives with a status keeps it: its front end has judged it already. Read
        segments stay valid until the command is given to `release`.
        """
        waiting: list[Command] | None = None
        covers = self._covers
        hold = self.representation.hold
        write = self.representation.write
        size = self.size
        calm = not self._fences
        writable = not self.read_only and self._sync.failure is None
        reads = read_bytes = writes = write_bytes = 0
        for command in commands:
            if command.status:
                self.counters.errors += 1
                continue
            opcode = command.opcode
            offset = command.offset
            length = command.length
            # The two cases worth lines of their own: memory that is there is read or written.
            if opcode == READ:
                if calm and 0 < length <= size - offset and covers(offset, length):
                    lease = hold(offset, length)
                    if lease is not None:
                        command.segments = command.lease = lease
                        reads += 1
                        read_bytes += length
                        continue
            elif opcode == WRITE and calm and writable and not command.flags:
                payload = command.payload
                if (
                    payload is not None
                    and 0 < length <= size - offset
                    and covers(offset, length)
                    and write(offset, payload)
                ):
                    writes += 1
                    write_bytes += length
                    continue
            if not self._try(command):
                if waiting is None:
                    waiting = []
                waiting.append(command)
        counters = self.counters
        counters.reads += reads
        counters.read_bytes += read_bytes
        counters.writes += writes
        counters.write_bytes += write_bytes
        return _DONE if waiting is None else self._own_payloads(waiting)

    def release(self, commands: Iterable[Command]) -> None:
        """The replies have left: the segments of these commands are not looked at any more."""
        leases: list[Lease] = []
        for command in commands:
            lease = command.lease
            if lease is not None:
                command.lease = None
                if type(lease) is tuple:
                    leases += lease
                else:
                    leases.append(lease)
        self.representation.release(leases)
        if self.starved:
            self._released.set()
            self._released = trio.Event()

    def window(self, command: Command, done: int) -> memoryview | None:
        """Memory for a write's payload from its byte `done` on, to receive into without a copy.

        Valid until the caller's next await. None: the bytes must go through `execute`, which also
        knows the error if there is one. When all of the payload is there, `execute` the command
        without it.
        """
        if self._fences or self._guard(command):
            return None
        offset, length = command.offset + done, command.length - done
        try:
            self.media.reserve(offset, length)
        except OSError:
            return None
        return self.representation.window(offset, length)

    def received(self, offset: int, length: int) -> None:
        """These bytes of a window have been filled."""
        self.media.durability.stored(offset, length)

    def _own_payloads(self, waiting: list[Command]) -> list[Command]:
        """The front end's buffer is its own again after `execute`; what waits needs its bytes."""
        self.counters.waits += len(waiting)
        for command in waiting:
            if command.payload is not None and not command.applied:
                command.payload = bytes(command.payload)
        return waiting

    def _try(self, command: Command) -> bool:
        """Finish the command now if it can be; False when it must wait."""
        if self._fences and self._fences.overlap(command.offset, command.length):
            return False
        status = self._guard(command)
        if status:
            command.status = status
            self.counters.errors += 1
            return True
        try:
            return self._dispatch(command)
        except OSError as error:
            self._fail(command, error)
            return True

    def _guard(self, command: Command) -> Status:
        """Range, read-only and health; every command passes here, whatever sent it."""
        opcode = command.opcode
        if opcode == FLUSH:
            return Status.SUCCESS
        if command.length > self.size - command.offset:
            return Status.LBA_OUT_OF_RANGE
        if opcode in (WRITE, WRITE_ZEROES, DATASET_MANAGEMENT):
            if self.read_only:
                return Status.NAMESPACE_WRITE_PROTECTED
            if self._sync.failure is not None:
                return Status.WRITE_FAULT
        return Status.SUCCESS

    def _dispatch(self, command: Command) -> bool:
        opcode = command.opcode
        if command.length == 0 and opcode != FLUSH:
            command.segments = []
            command.extents = []
            return True
        if opcode == WRITE:
            return self._write(command)
        if opcode == READ:
            return self._read(command)
        if opcode == FLUSH:
            return self._flush_now()
        if opcode in (WRITE_ZEROES, DATASET_MANAGEMENT):
            return self._clear(command)
        if opcode == GET_LBA_STATUS:
            command.extents = self._lba_status(command)
            return True
        if opcode == PREFETCH:
            return True  # persistent memory is as near as it gets
        command.status = Status.INVALID_OPCODE
        return True

    def _fail(self, command: Command, error: OSError) -> None:
        reading = command.opcode in (READ, GET_LBA_STATUS)
        command.status = from_oserror(
            error, otherwise=Status.UNRECOVERED_READ_ERROR if reading else Status.WRITE_FAULT
        )
        self.counters.errors += 1

    # ---- one command each, still without an await

    def _write(self, command: Command) -> bool:
        payload = command.payload
        if payload is None:  # it was received into a window
            return self._written(command)
        assert len(payload) == command.length
        limit = self.representation.io_bytes_max
        if limit is not None and command.length > limit:
            return False
        if not self._covers(command.offset, command.length):
            self.media.reserve(command.offset, command.length)
        if not self.representation.write(command.offset, payload):
            return False
        return self._written(command)

    def _written(self, command: Command) -> bool:
        self.counters.writes += 1
        self.counters.write_bytes += command.length
        return not command.flags & FUA or self._persist_now(command)

    def _read(self, command: Command) -> bool:
        """A read with holes in it, or one that is too large to hold at once."""
        limit = self.representation.io_bytes_max
        if limit is not None and command.length > limit:
            return False
        segments: list[Segment] = []
        leases: list[Lease] = []
        extents = self.media.allocation.extents(command.offset, command.length)
        for extent in merge_extents(extents):
            if extent.hole:
                segments.append(Hole(extent.length))
                continue
            lease = self.representation.hold(extent.offset, extent.length)
            if lease is None:
                self.representation.release(leases)
                return False
            segments += lease
            leases.append(lease)
        command.segments = segments
        command.lease = tuple(leases)
        self.counters.reads += 1
        self.counters.read_bytes += command.length
        return True

    def _flush_now(self) -> bool:
        """A flush with nothing to wait for."""
        if self._must_sync():
            return False
        self.media.durability.sync()
        self.counters.flushes += 1
        return True

    def _must_sync(self) -> bool:
        return (
            self.media.durability.sync_blocks
            or self.representation.dirty()
            or self._sync.failure is not None
        ) and not self.read_only

    def _persist_now(self, command: Command) -> bool:
        """FUA after the store: its bytes to the media, and durable at once if that is free."""
        self.representation.write_back(command.offset, command.length)
        if self.media.durability.sync_blocks:
            command.applied = True
            return False
        self.media.durability.sync()
        return True

    def _clear(self, command: Command) -> bool:
        """WRITE_ZEROES and deallocation, which this device answers with zeroes too."""
        zeroing = command.opcode == WRITE_ZEROES
        allocate = self._must_allocate(command)
        if zeroing and allocate and command.flags & FAST_ONLY:
            command.status = Status.FAST_ZERO_NOT_POSSIBLE
            return True
        if not zeroing and allocate:
            return True  # deallocation is a hint, and this file system has no holes
        if command.length > INLINE_BYTES:
            return False
        self._zeroing.now(command.offset, command.length, allocate=allocate)
        self.counters.zeroed_bytes += command.length
        return not command.flags & FUA or self._persist_now(command)

    def _must_allocate(self, command: Command) -> bool:
        return bool(command.flags & ALLOCATE) or not self.media.punches

    def _lba_status(self, command: Command) -> list[Extent]:
        limit = 1 if command.flags & FIRST_EXTENT else EXTENTS_MAX
        found: list[Extent] = []
        extents = self.media.allocation.extents(command.offset, command.length)
        for extent in merge_extents(extents):
            found.append(extent)
            if len(found) == limit:
                break
        return found

    # ---- the commands that wait

    async def complete(self, commands: Sequence[Command]) -> None:
        """Finish what `execute` returned; every command has its status afterwards.

        All syncs that are wanted become one.
        """
        to_sync: list[Command] = []
        for command in commands:
            if command.opcode != FLUSH and not command.applied:
                await self._finish_slowly(command)
            if not command.status and (command.opcode == FLUSH or command.applied):
                to_sync.append(command)
        if to_sync:
            await self._sync_for(to_sync)

    async def _finish_slowly(self, command: Command) -> None:
        """All but the durability of a command."""
        limit = self.representation.io_bytes_max
        while True:
            await self._fences.lifted(command.offset, command.length)
            if self._try(command) or command.applied:
                return
            if command.opcode in (WRITE_ZEROES, DATASET_MANAGEMENT):
                await self._clear_slowly(command)
                return
            if limit is not None and command.length > limit:
                await self._transfer_in_pieces(command, limit)
                return
            await self._lease_released()  # no await since the fences: only a lease can be missing

    async def _lease_released(self) -> None:
        released = self._released
        self.starved += 1
        try:
            await released.wait()
        finally:
            self.starved -= 1

    async def _clear_slowly(self, command: Command) -> None:
        offset, length = command.offset, command.length
        try:
            with self._fences.around(offset, length):
                allocate = self._must_allocate(command)
                await self._zeroing.slowly(offset, length, allocate=allocate)
        except OSError as error:
            self._fail(command, error)
            return
        self.counters.zeroed_bytes += length
        if command.flags & FUA:
            self.representation.write_back(offset, length)
            command.applied = True

    async def _transfer_in_pieces(self, command: Command, limit: int) -> None:
        """More than the representation can hold at once: through a buffer of the command's own."""
        reading = command.opcode == READ
        buffer = bytearray(command.length) if reading else command.payload
        assert buffer is not None
        view = memoryview(buffer)
        for offset, length in slices(command.offset, command.length, slice_bytes=limit):
            window = view[offset - command.offset :][:length]
            part = Command(
                command.opcode,
                command.flags & CONTIGUOUS,
                offset,
                length,
                payload=None if reading else window,
            )
            await self._finish_slowly(part)
            if reading and not part.status:
                self._copy_segments(part, window)
            self.release((part,))
            if part.status:
                command.status = part.status
                return
        if reading:
            command.segments = [view]
        elif command.flags & FUA:
            self.representation.write_back(command.offset, command.length)
            command.applied = True

    @staticmethod
    def _copy_segments(command: Command, target: memoryview) -> None:
        position = 0
        for segment in command.segments or ():
            if isinstance(segment, Hole):
                position += segment.length
            else:
                target[position : position + len(segment)] = segment
                position += len(segment)

    async def _sync_for(self, commands: list[Command]) -> None:
        """One flush for all: what the representation holds goes to the media, then one sync."""
        try:
            for offset, length in self.representation.dirty_extents():
                for piece in slices(offset, length, slice_bytes=INLINE_BYTES):
                    self.representation.write_back(*piece)
                    await trio.lowlevel.checkpoint()
            await self._sync()
        except OSError as error:
            for command in commands:
                self._fail(command, error)
            return
        self.counters.flushes += sum(command.opcode == FLUSH for command in commands)

    async def flush(self) -> None:
        """All that was completed is durable when this returns. Raises OSError."""
        flush = Command(FLUSH, 0, 0, 0)
        await self.complete(self.execute((flush,)))
        if flush.status:
            raise OSError(errno.EIO, f"namespace {self.name}: the flush failed")
