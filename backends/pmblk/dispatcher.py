"""One command against memory, on the spot: the guard, and what each opcode means.

Nothing here awaits. What cannot be finished now is refused with False and left as it was, and
`Namespace.complete` tries again when it may succeed.

Rules that live here and nowhere else:

1. Every command passes the guard: range, read-only, health. Media that have failed once
   (`pmblk.media.faults`) fail every command.
2. A write reserves its pages before it stores; a read never touches a hole (`pmblk.media`).
3. After a sync has failed, every later write fails: nothing can prove what is durable.
4. A deallocated range reads as zeroes, where the file system punches holes.
5. Pages that somebody holds are not punched; the command waits for them.
"""

from pmblk.counters import Counters
from pmblk.fences import Fences
from pmblk.media import Media
from pmblk.media.group_sync import GroupSync
from pmblk.nvme.command import (
    ALLOCATE,
    DATASET_MANAGEMENT,
    FAST_ONLY,
    FIRST_EXTENT,
    FLUSH,
    FUA,
    GET_LBA_STATUS,
    KEEP,
    PREALLOCATE,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Command,
    Hole,
    Segment,
)
from pmblk.nvme.status import Status, fault_of, from_oserror
from pmblk.ranges import Extent, merge_extents
from pmblk.representations.base import Lease, Representation
from pmblk.zeroing import INLINE_BYTES, Clearing, clear

EXTENTS_MAX = 1024  # one answer to GET_LBA_STATUS; the client asks again from its end


class Dispatcher:
    """Shared by the two halves of a `Namespace`; knows nothing of batches and waiting."""

    def __init__(self, media: Media, representation: Representation) -> None:
        self.media = media
        self.representation = representation
        self.counters = Counters()
        self.fences = Fences()
        self.sync = GroupSync(media.durability)
        self._handlers = {
            READ: self._read,
            WRITE: self._write,
            FLUSH: self._flush,
            WRITE_ZEROES: self._clear,
            DATASET_MANAGEMENT: self._clear,
            GET_LBA_STATUS: self._lba_status,
            PREFETCH: self._prefetch,
            PREALLOCATE: self._preallocate,
        }

    def attempt(self, command: Command) -> bool:
        """Finish the command now if it can be, and count it; False when it must wait."""
        if self.fences.standing and self.fences.overlap(command.offset, command.length):
            return False
        status = self.guard(command)
        if status:
            self.fail(command, status)
            return True
        try:
            done = self.perform(command)
        except OSError as error:
            self.fail_with(command, error)
            return True
        if done and not command.status:
            self.count(command)
        return done

    def guard(self, command: Command) -> Status:
        """Range, read-only and health."""
        opcode = command.opcode
        if self.media.health.fault is not None:
            return fault_of(opcode)
        if opcode == FLUSH:
            return Status.SUCCESS
        if command.length > self.media.size - command.offset:
            return Status.LBA_OUT_OF_RANGE
        if opcode in (WRITE, WRITE_ZEROES, DATASET_MANAGEMENT, PREALLOCATE):
            if self.media.read_only:
                return Status.NAMESPACE_WRITE_PROTECTED
            if self.sync.failure is not None:
                return Status.WRITE_FAULT
        return Status.SUCCESS

    def perform(self, command: Command) -> bool:
        """The command itself, past the guard. Raises OSError of the media."""
        if command.length == 0 and command.opcode != FLUSH:
            command.segments = []
            command.extents = []
            return True
        handler = self._handlers.get(command.opcode)
        if handler is None:
            self.fail(command, Status.INVALID_OPCODE)
            return True
        return handler(command)

    def fail(self, command: Command, status: Status) -> None:
        command.status = status
        self.counters.errors += 1

    def fail_with(self, command: Command, error: OSError) -> None:
        self.fail(command, from_oserror(error, otherwise=fault_of(command.opcode)))
        try:
            self.media.check()  # the error may be the first sign of a truncated file
        except OSError:
            pass  # it is noted

    def count(self, command: Command) -> None:
        """A command has succeeded."""
        self.counters.count(command)

    def way_to_clear(self, command: Command) -> Clearing:
        """How WRITE_ZEROES or a deallocation makes its range zero."""
        if command.flags & KEEP:
            return Clearing.KEEP
        if command.flags & ALLOCATE or not self.media.punches:
            return Clearing.FILL
        return Clearing.PUNCH

    def window(self, command: Command) -> memoryview | None:
        """Memory for the bytes of a write that are not received yet; None: let `attempt` see it."""
        if self.fences.standing or self._must_not_store(command):
            return None
        offset, length = command.offset + command.received, command.length - command.received
        try:
            self.media.reserve(offset, length)
            return self.representation.window(offset, length)
        except OSError:
            return None

    def _must_not_store(self, command: Command) -> bool:
        """The guard; for what has begun, only what can have changed since."""
        if not command.received or self.media.health.fault is not None:
            return self.guard(command) != Status.SUCCESS
        return self.sync.failure is not None or command.length > self.media.size - command.offset

    # ---- one opcode each

    def _write(self, command: Command) -> bool:
        offset, length = command.offset + command.received, command.length - command.received
        if length:
            payload = command.payload
            assert payload is not None
            assert len(payload) == length
            self.media.reserve(offset, length)
            if not self.representation.write(offset, payload):
                return False
        return self._persist_if_asked(command)

    def _read(self, command: Command) -> bool:
        """Holes are told apart; the memory between them is held piece by piece."""
        segments: list[Segment] = []
        leases: list[Lease] = []
        extents = self.media.allocation.extents(command.offset, command.length)
        for extent in merge_extents(extents):
            if extent.hole:
                segments.append(Hole(extent.length))
                continue
            try:
                lease = self.representation.hold(extent.offset, extent.length)
            except OSError:
                self.representation.release(leases)
                raise
            if lease is None:
                self.representation.release(leases)
                return False
            segments += lease.views
            leases.append(lease)
        command.segments = segments
        command.leases = leases
        return True

    def _flush(self, command: Command) -> bool:
        """A flush with nothing to wait for."""
        self.media.check()
        return self.media.read_only or (not self.representation.dirty() and self.sync.try_now())

    def _persist_if_asked(self, command: Command) -> bool:
        """FUA: the command's bytes to the media, and durable at once if that costs no wait."""
        if not command.flags & FUA:
            return True
        self.representation.write_back(command.offset, command.length)
        self.media.check()
        command.applied = not self.sync.try_now()
        return not command.applied

    def _clear(self, command: Command) -> bool:
        """WRITE_ZEROES and deallocation."""
        zeroing = command.opcode == WRITE_ZEROES
        way = self.way_to_clear(command)
        if zeroing and way is not Clearing.PUNCH and command.flags & FAST_ONLY:
            self.fail(command, Status.FAST_ZERO_NOT_POSSIBLE)
            return True
        if not zeroing and way is Clearing.FILL:
            return True  # deallocation is a hint, and this file system has no holes
        offset, length = command.offset, command.length
        punches = way is Clearing.PUNCH
        if length > INLINE_BYTES or (punches and self.representation.busy(offset, length)):
            return False
        clear(self.media, self.representation, offset, length, way)
        return self._persist_if_asked(command)

    def _preallocate(self, command: Command) -> bool:
        if command.length > INLINE_BYTES:
            return False
        self.media.reserve(command.offset, command.length)
        self.media.check()  # past the end of a file there is space too, and it is of no use
        return self._persist_if_asked(command)

    def _lba_status(self, command: Command) -> bool:
        limit = 1 if command.flags & FIRST_EXTENT else EXTENTS_MAX
        found: list[Extent] = []
        extents = self.media.allocation.extents(command.offset, command.length)
        for extent in merge_extents(extents):
            found.append(extent)
            if len(found) == limit:
                break
        command.extents = found
        return True

    def _prefetch(self, _command: Command) -> bool:
        return True  # persistent memory is as near as it gets
