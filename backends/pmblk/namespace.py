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
6. Media that failed (`pmblk.media.faults`) fail every command that was under way, for what it read
   may be made up and what it wrote gone; and the guard fails all that come after it.

Between two awaits everything here is atomic, since all of it runs on one event loop.
"""

import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence

import trio

from pmblk.block_device import NONE, BlockDevice
from pmblk.dispatcher import Dispatcher
from pmblk.errors import PmblkError
from pmblk.media import Media
from pmblk.media.allocation import HOLE
from pmblk.nvme.command import READ, WRITE, Command
from pmblk.nvme.data_pointer import prp_list_pages
from pmblk.nvme.status import fault_of
from pmblk.pages import PAGE_BYTES, PAGE_SHIFT, span
from pmblk.representations.base import Lease, Representation
from pmblk.waiting import Completer

QUIESCE_SECONDS = 3  # less than the patience with a slow reader: a switch alone cuts nobody off

# What to do about failed media: they serve nothing more, whatever becomes of the file.
RESTORE = "stop the daemon, restore the file, check what is on it, and start again"

_EVERYTHING = 1 << 63  # a range longer than any namespace will be


class Namespace(BlockDevice):
    """A namespace in memory."""

    remedy = RESTORE
    size = 0  # an attribute, since the path of every I/O asks for it

    def __init__(
        self, name: str, media: Media, representation: Representation, *, lba_bytes: int
    ) -> None:
        assert media.size % lba_bytes == 0, "open_media checks this"
        self.name = name
        self.media = media
        self.lba_bytes = lba_bytes
        self.size = media.size
        self.read_only = media.read_only
        self.health = media.health
        self.changing = trio.Lock()  # for whoever exchanges the representation or the size
        self._dispatcher = Dispatcher(media, representation)
        self._completer = Completer(self._dispatcher)
        self.counters = self._dispatcher.counters

    @property
    def representation(self) -> Representation:
        return self._dispatcher.representation

    @property
    def description(self) -> str:
        return f"persistent memory as {self.representation.kind}"

    @property
    def durability(self) -> tuple[str, str]:
        return self.media.durability.level, self.media.durability.reason

    def allocated_bytes(self) -> int:
        return self.media.allocated_bytes()

    @property
    def starved(self) -> int:
        """How many commands, or changes, wait for a lease to be released."""
        return self._completer.starved

    @property
    def starved_since(self) -> float:
        return self._completer.starved_since

    def install(self, representation: Representation) -> None:
        """Another representation, or another one of media that were resized; only `quiesced`."""
        self._dispatcher.representation = representation
        self.size = self.media.size

    # ---- the path of every I/O: no await

    def execute(self, commands: Sequence[Command]) -> Sequence[Command]:
        waiting: list[Command] = []
        dispatcher = self._dispatcher
        representation = dispatcher.representation
        known = self.media.allocation.known
        size = self.size
        calm = not dispatcher.fences.standing
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
                            lease = representation.hold(offset, length)
                            if lease is None:
                                done = False
                            else:
                                done = True
                                command.segments = lease.views
                                command.leases = (lease,)
                                reads += 1
                                read_bytes += length
                        elif opcode == WRITE and writable and not command.flags:
                            payload = command.payload
                            if command.received == length:  # it was received into memory
                                done = True
                            elif payload is not None and not command.received:
                                done = representation.write(offset, payload)
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
        if self.health.fault is not None:
            self._fail(commands)
            return NONE
        counters = dispatcher.counters
        if reads:
            counters.reads += reads
            counters.read_bytes += read_bytes
        if writes:
            counters.writes += writes
            counters.write_bytes += write_bytes
        counters.prp_entries += prp_entries
        if list_pages:
            counters.prp_list_pages += list_pages
        return self._own_payloads(waiting) if waiting else NONE

    def _fail(self, commands: Sequence[Command]) -> None:
        """The media have failed under these commands, or before: all that succeeded did not."""
        for command in commands:
            command.segments = command.extents = None
            if not command.status:
                self._dispatcher.fail(command, fault_of(command.opcode))
        self.release(commands)

    def _own_payloads(self, waiting: list[Command]) -> list[Command]:
        """The front end's buffer is its own again after `execute`; what waits needs its bytes."""
        self.counters.waits += len(waiting)
        for command in waiting:
            if command.payload is not None and not command.applied:
                command.payload = bytes(command.payload)
        return waiting

    def release(self, commands: Iterable[Command]) -> None:
        leases: list[Lease] = []
        for command in commands:
            if command.leases:
                leases += command.leases
                command.leases = ()
        self._dispatcher.representation.release(leases)
        if self._completer.starved:
            self._completer.released()

    @property
    def has_windows(self) -> bool:
        return self.representation.has_windows

    def window(self, command: Command) -> memoryview | None:
        return self._dispatcher.window(command)

    def received(self, command: Command, length: int) -> None:
        place = command.offset + command.received
        continued = command.received > 0
        self._dispatcher.representation.stored(place, length, continued=continued)
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
        """Raises PmblkError for a range that is not there, or that a discard is taking away.

        And for all of a namespace that has failed.
        """
        if self.examine():
            raise PmblkError(f"{self.name} has failed: {self.failure()}", hint=RESTORE)
        if length < 1 or offset < 0 or length > self.size - offset:
            raise PmblkError(
                f"{self.name} has no {length} bytes at {offset}", hint=f"it has {self.size} bytes"
            )
        if self._dispatcher.fences.overlap(offset, length):
            raise PmblkError(
                f"{self.name} is changing the {length} bytes at {offset}", hint="try again"
            )

    # ---- media that fail

    def failure(self) -> str:
        """Looks at no file."""
        fault = self.health.fault
        return "" if fault is None else fault.reason(self.media.path)

    def examine(self, views: Iterable[memoryview] = ()) -> bool:
        """With a look at the length of the media's file.

        A load from each page that a system call refused meets the same fault here, where it is
        noted.
        """
        try:
            self.media.check()
            for view in views:
                bytes(view[::PAGE_BYTES]), bytes(view[-1:])
        except OSError:
            pass  # it is noted
        return self.health.fault is not None

    # ---- the commands that wait, and changes of the namespace itself

    async def complete(self, commands: Sequence[Command]) -> Sequence[Command]:
        """All syncs that are wanted become one."""
        rest = await self._completer.complete(commands)
        if self.health.fault is not None:
            self._fail(commands[: len(commands) - len(rest)])
        return rest

    @contextlib.asynccontextmanager
    async def quiesced(self) -> AsyncIterator[None]:
        """Inside, no command runs, nothing is held, and all that was completed is durable.

        Clients wait meanwhile. Raises PmblkError, with everything as it was, when a client does not
        take its replies in `QUIESCE_SECONDS` or the media cannot be synced.
        """
        with self._dispatcher.fences.around(0, _EVERYTHING) as older:
            with trio.move_on_after(QUIESCE_SECONDS):
                for fence in older:
                    await fence.lifted.wait()
                while self.representation.leases:
                    await self._completer.lease_released()
            if not all(fence.lifted.is_set() for fence in older):
                raise PmblkError(
                    f"{self.name}: a discard is under way since {QUIESCE_SECONDS} s",
                    hint="try again",
                )
            if self.representation.leases:
                raise PmblkError(
                    f"{self.name}: {self.representation.leases} reads are not taken by their "
                    f"clients in {QUIESCE_SECONDS} s",
                    hint="find the client that hangs, or try again",
                )
            try:
                await self._completer.persist()
            except OSError as error:
                raise PmblkError(
                    f"{self.name} cannot be made durable: {error.strerror}",
                    hint="nothing was changed; look at its media",
                ) from error
            yield

    def close(self) -> None:
        """Unmap and unlock."""
        if not self.representation.leases:
            self.representation.close()
        self.media.close()


def in_memory(device: BlockDevice) -> Namespace | None:
    """The device itself where it lies in memory; None for an array."""
    return device if isinstance(device, Namespace) else None


def memory_of(device: BlockDevice, wanted: str) -> Namespace:
    """The device itself where it lies in memory. Raises PmblkError: an array has no `wanted`."""
    namespace = in_memory(device)
    if namespace is None:
        raise PmblkError(
            f"{device.name} is an array: it has no {wanted}",
            hint="only a namespace whose file is mapped has; see pmblk raid for arrays",
        )
    return namespace
