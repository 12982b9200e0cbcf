"""The commands that `Namespace.execute` could not answer: what each waits for, and its end.

A flush waits for a sync of the media, a long discard or zeroing for itself, a discard of held
memory for its readers, anything for a fence, and an I/O for memory that the representation lacks.

Between two awaits everything here is atomic, since all of it runs on one event loop.
"""

import math
from collections.abc import Iterable, Sequence

import trio

from pmblk.dispatcher import Dispatcher
from pmblk.media.syscalls import anonymous
from pmblk.nvme.command import (
    DATASET_MANAGEMENT,
    FLUSH,
    FUA,
    PREALLOCATE,
    READ,
    WRITE_ZEROES,
    Command,
    Hole,
)
from pmblk.pages import PAGE_BYTES
from pmblk.ranges import slices
from pmblk.representations.base import Representation
from pmblk.zeroing import INLINE_BYTES, Clearing, clear_in_slices

PIECE_COST_BYTES = 64 << 10  # what writing back a piece costs beside its bytes, in bytes


class Completer:
    """One for a namespace. `starved`: how many wait for a lease to be released, right now."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.starved = 0
        self.starved_since = 0.0  # trio's clock, when the first of them began to
        self._dispatcher = dispatcher
        self._released = trio.Event()

    @property
    def _representation(self) -> Representation:
        return self._dispatcher.representation

    def released(self) -> None:
        """Leases were given back: whoever waits for one tries again."""
        if self.starved:
            self._released.set()
            self._released = trio.Event()

    async def complete(self, commands: Sequence[Command]) -> Sequence[Command]:
        """See `Namespace.complete`."""
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
                if not may_wait and self._representation.busy(command.offset, command.length):
                    return False
                await self._clear_slowly(command)
                return True
            if command.opcode == PREALLOCATE:
                await self._preallocate_slowly(command)
                return True
            if not may_wait:
                return False
            if command.length - command.received > self._io_bytes_max:
                await self._transfer_in_pieces(command)
                return True
            await self.lease_released()  # no await since the fences: only a lease can be missing

    @property
    def _io_bytes_max(self) -> float:
        limit = self._representation.io_bytes_max
        return math.inf if limit is None else limit

    async def lease_released(self) -> None:
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
        way = dispatcher.way_to_clear(command)
        punches = way is Clearing.PUNCH
        unit = (offset, length)
        if punches and self._representation.busy(offset, length):
            unit = self._representation.lifetime_unit(offset, length)
        try:
            with dispatcher.fences.around(*unit):
                while punches and self._representation.busy(offset, length):
                    await self.lease_released()
                    dispatcher.media.check()  # a page table on failed media knows nothing
                await clear_in_slices(
                    self._dispatcher.media, self._representation, offset, length, way
                )
        except OSError as error:
            dispatcher.fail_with(command, error)
            return
        self._finished_slowly(command)

    async def _preallocate_slowly(self, command: Command) -> None:
        """A fence keeps discards out, or what is reserved could be gone before it is marked."""
        dispatcher = self._dispatcher
        try:
            with dispatcher.fences.around(command.offset, command.length):
                for offset, length in slices(
                    command.offset, command.length, slice_bytes=INLINE_BYTES
                ):
                    dispatcher.media.reserve(offset, length)
                    dispatcher.media.check()
                    await trio.lowlevel.checkpoint()
        except OSError as error:
            dispatcher.fail_with(command, error)
            return
        self._finished_slowly(command)

    async def _transfer_in_pieces(self, command: Command) -> None:
        """More than the representation can hold at once: through a buffer of the command's own."""
        reading = command.opcode == READ
        position, end = command.offset + command.received, command.offset + command.length
        # Page aligned: whoever reads may go on to a device with it (O_DIRECT).
        buffer = anonymous(end - position) if reading else command.payload
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
            await self.lease_released()
        if reading:
            _copy_segments(piece, window)
        self._representation.release(piece.leases)
        self.released()
        return len(window)

    def _finished_slowly(self, command: Command) -> None:
        """Done but for its durability, if that was asked for."""
        if not command.flags & FUA or command.opcode == READ:
            self._dispatcher.count(command)
            return
        try:
            self._representation.write_back(command.offset, command.length)
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
            await self.persist()
        except OSError as error:
            for command in wanted:
                self._dispatcher.fail_with(command, error)
            return
        for command in wanted:
            self._dispatcher.count(command)

    async def persist(self) -> None:
        """What the representation holds goes to the media, and then a sync. Raises OSError."""
        representation = self._representation
        spent = 0
        for offset, length in representation.dirty_extents():
            for start, piece in slices(offset, length, slice_bytes=INLINE_BYTES):
                representation.write_back(start, piece)
                spent += piece + PIECE_COST_BYTES
                if spent >= INLINE_BYTES:  # the others get their turn
                    await trio.lowlevel.checkpoint()
                    spent = 0
                    if self._representation is not representation:
                        return  # exchanged since, and `quiesced` has persisted all of it
        await self._dispatcher.sync()
        self._dispatcher.media.check()


def _copy_segments(command: Command, target: memoryview) -> None:
    position = 0
    for segment in command.segments or ():
        if isinstance(segment, Hole):
            position += segment.length
        else:
            target[position : position + len(segment)] = segment
            position += len(segment)
