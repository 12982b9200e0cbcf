"""An array: a range of bytes over members, with the redundancy of its level.

`read`, `write`, `zero` and `flush` are all that a namespace needs of it. Members are given open,
and are the array's from then on.

A write that has begun is finished, also when nobody wants it any more: half of one would leave a
stripe whose parity does not fit its data. What bounds it is the patience with a member.
"""

import contextlib
import errno
from collections.abc import Iterable, Sequence

import trio

from pmblk.raid.buffers import buffer, scratch
from pmblk.raid.devices import Announce, Devices
from pmblk.raid.geometry import Geometry
from pmblk.raid.intents import Intents
from pmblk.raid.journaling import Journaling
from pmblk.raid.locks import RowLocks
from pmblk.raid.member import Hung, Member
from pmblk.raid.mirrors import Mirrors
from pmblk.raid.rows import Rows
from pmblk.ranges import slices

BLOCK_BYTES = 4096
TURN_BYTES = 64 << 10  # a turn for others costs 3 us, a third of what 4 KiB of memory take
ZERO_BYTES = 64 << 20  # of each member, made zero at once
ZERO_CHUNKS_MAX = 1024  # and so many locks are held for it
WRITE_BYTES = 4 << 20  # zeroes written at once, where that has to be


class Array:
    """`members` are by slot; None is missing. `announce`: see `Devices`.

    `intents` know which regions are being written; None: nobody keeps a bitmap. `journal` is the
    offset and length of its area on every member, at the levels with parity; its `replay` comes
    before anything is read or written.
    """

    def __init__(
        self,
        geometry: Geometry,
        members: Sequence[Member | None],
        *,
        data_offset: int,
        announce: Announce,
        intents: Intents | None = None,
        journal: tuple[int, int] | None = None,
    ) -> None:
        devices = Devices(geometry, members, data_offset=data_offset, announce=announce)
        journaling = None
        if journal is not None:
            assert geometry.parities, "copies have no write hole that reads would make up"
            offset, length_bytes = journal
            journaling = Journaling(devices, offset=offset, length_bytes=length_bytes)
        self._set_up(devices, intents, journaling)

    @classmethod
    def over(
        cls,
        devices: Devices,
        *,
        intents: Intents | None = None,
        journal: Journaling | None = None,
    ) -> "Array":
        """One more over the same members, by another geometry."""
        array = cls.__new__(cls)
        array._set_up(devices, intents, journal)
        return array

    def _set_up(
        self, devices: Devices, intents: Intents | None, journal: Journaling | None
    ) -> None:
        geometry = devices.geometry
        self.geometry = geometry
        self.size = geometry.size
        self.devices = devices
        self.intents = intents
        self.journal = journal
        self._under_way = 0
        self._idle = trio.Event()
        self._level = (
            Rows(self.devices, journal=self.journal) if geometry.parities else Mirrors(self.devices)
        )
        self._parity_in_doubt: Sequence[tuple[int, int]] = ()
        self.operations = 0  # of clients: who works in the background stands back for them
        # What is made zero as a whole: a stripe where there is parity, elsewhere a chunk.
        self._unit_bytes = geometry.stripe_bytes if geometry.parities else geometry.chunk_bytes
        chunks = max(1, min(ZERO_CHUNKS_MAX, ZERO_BYTES // geometry.chunk_bytes))
        self._slice_bytes = chunks * self._unit_bytes

    async def read(self, offset: int, length: int) -> memoryview:
        """The bytes, in memory that is the caller's. Raises OSError (EIO) for what is lost.

        Others have a turn, unless it is short and all of it is a copy of memory.
        """
        assert 0 <= offset <= offset + length <= self.size
        if not length:
            return memoryview(b"")
        first, last = offset & -BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES
        self.operations += 1
        if length >= TURN_BYTES:
            await trio.lowlevel.checkpoint()
        self._under_way += 1
        try:
            while True:
                target = scratch(last - first)
                try:
                    await self._level.read(first, target)
                except Hung:
                    continue  # that member is out by now, and may still scribble into the memory
                return target[offset - first : offset - first + length]
        finally:
            self._ended()

    async def write(self, writes: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
        """Offsets and bytes, in the order given where they overlap; what became of each.

        What is written together is planned together: neighbours become full stripes.
        """
        assert all(0 <= offset <= offset + len(view) <= self.size for offset, view in writes)
        self.operations += 1
        self._under_way += 1
        try:
            with trio.CancelScope(shield=True):
                try:
                    async with self._intended([(offset, len(view)) for offset, view in writes]):
                        errors = await self._written(writes)
                except OSError as error:  # of the mark, for `_written` returns its own
                    return [error] * len(writes)  # nothing was written, so nothing is in doubt
                self._doubt_what_failed(writes, errors)
            return errors
        finally:
            self._ended()

    def _ended(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()

    async def drained(self) -> None:
        """Nothing that was asked of it is under way; to be called when nobody asks any more."""
        while self._under_way:
            self._idle = trio.Event()
            await self._idle.wait()

    async def _written(self, writes: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
        while True:
            try:
                return await self._level.write(writes)
            except Hung:
                continue  # as with a read; what was written already is written again
            except OSError as error:  # one that hangs has to stay, or none can be announced
                return [error] * len(writes)

    async def zero(self, offset: int, length: int) -> None:
        """The range reads as zeroes, and gives its space back where the members can do that.

        Raises OSError; parts of the range may be zero then. Done in slices: whoever is cancelled
        leaves behind a range that is zero up to some place.
        """
        assert 0 <= offset <= offset + length <= self.size
        self.operations += 1
        self._under_way += 1
        try:
            await self._zero_slices(offset, offset + length)
        finally:
            self._ended()

    async def _zero_slices(self, offset: int, end: int) -> None:
        while offset < end:
            after = min(end, offset // self._slice_bytes * self._slice_bytes + self._slice_bytes)
            with trio.CancelScope(shield=True):
                async with self._intended([(offset, after - offset)]):
                    await self._zeroed(offset, after - offset)
            await trio.lowlevel.checkpoint()
            offset = after

    async def _zeroed(self, offset: int, length: int) -> None:
        while True:
            try:
                await self._zero_slice(offset, offset + length)
            except Hung:
                continue
            return

    async def _zero_slice(self, start: int, end: int) -> None:
        """Whole stripes are made zero, and what is left at the ends is written.

        While somebody is missing the journal takes no stripe without its bytes: all are written.
        """
        unit = self._unit_bytes
        first, last = -(-start // unit), end // unit
        middle = (start, end)
        if first < last and not (self.journal is not None and self.devices.degraded):
            try:
                await self._level.zero(first, last)
                middle = (last * unit, end)
                await self._write_zeroes(start, first * unit)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
        await self._write_zeroes(*middle)

    async def _write_zeroes(self, start: int, end: int) -> None:
        for offset, length in slices(start, end - start, slice_bytes=WRITE_BYTES):
            for error in await self._level.write([(offset, buffer(length))]):
                if error is not None:
                    raise error

    def extend(self, geometry: Geometry) -> None:
        """More of each member, or another mirror: no chunk moves, so whatever is under way goes on.

        Of `devices.members` there are as many already.
        """
        self.geometry = self.devices.geometry = geometry
        self.size = geometry.size
        self._level.extend(geometry)

    @property
    def parity_in_doubt(self) -> Sequence[tuple[int, int]]:
        """Offsets and lengths of what a resync still owes: parity may not fit its data there.

        A write there makes parity anew: a change of what did not fit would not fit either, and what
        was just written would come out as something else once its member is lost.
        """
        return self._parity_in_doubt

    @parity_in_doubt.setter
    def parity_in_doubt(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._parity_in_doubt = ranges
        if isinstance(self._level, Rows):
            self._level.doubts.set(ranges)

    @property
    def locks(self) -> RowLocks:
        """Of rows where there is parity, else of chunks of the array: a sweep takes them too."""
        return self._level.locks

    def _doubt_what_failed(
        self, writes: Sequence[tuple[int, memoryview]], errors: Sequence[OSError | None]
    ) -> None:
        """Copies may differ there, or parity may not fit, until a resync has been there."""
        if self.intents is not None and any(errors):
            self.intents.doubt(
                (offset, len(view))
                for (offset, view), error in zip(writes, errors, strict=True)
                if error is not None
            )

    def _intended(
        self, ranges: Iterable[tuple[int, int]]
    ) -> contextlib.AbstractAsyncContextManager[None, bool | None]:
        return contextlib.nullcontext() if self.intents is None else self.intents.writing(ranges)

    async def flush(self) -> None:
        """All that was written is durable on every member that is in. Raises OSError.

        A member that cannot say so is failed: what it lacks the others make up for.
        """
        failures = await self.devices.flush()
        for slot in await self.devices.fail(failures):
            raise failures[slot]

    def close(self) -> None:
        """Let the members go."""
        for member in self.devices.members:
            if member is not None:
                member.close()
