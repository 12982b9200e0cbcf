"""Data on their way to the geometry of more members, while clients read and write them.

The data area of the new geometry begins one chunk before that of the old one, in the headroom, and
is filled from its start, a window of rows at a time. Up to `position` all bytes are where the new
geometry says, the others where the old one does. A window: clients are kept out of it, it is read
by the old geometry and written by the new one, that is made durable, and then the position is.

Why no byte is overwritten before it has moved, and a crash at any point finds all of them: let the
new data area begin h chunks before the old one, the old geometry have d data chunks in a row, and
the new one e > d. New row r lies where old row r - h does. With p rows moved, durably, the bytes
that have not begin in old row floor(p e / d). A window of new rows p to q overwrites old rows below
q - h, so it does no harm as long as q - h <= floor(p e / d). That is at least h rows for p = 0, and
more the further it gets (`rows_at_once`). After a crash the window is moved again: of the old rows
that it needs none has changed, and no client has written to it meanwhile.

The journal names offsets of devices, so its session ends before a window is moved: of what the
window overwrites, nothing can be replayed. While this lasts it takes full stripes with their bytes,
since a row's number has two meanings.

Parity of the new rows is made of their data, so what did not fit before fits afterwards.
"""

import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal

import trio

from pmblk.raid.array import Array
from pmblk.raid.bad_blocks import bad_blocks_of
from pmblk.raid.buffers import buffer
from pmblk.raid.devices import Devices
from pmblk.raid.geometry import Geometry
from pmblk.raid.intents import Intents
from pmblk.raid.journaling import Journaling
from pmblk.raid.layout import NONE, Stripes, copies, survives
from pmblk.raid.status import SweepStatus
from pmblk.raid.sweep import Pace, Speed
from pmblk.ranges import slices

BLOCK_BYTES = 4096
WINDOW_BYTES = 8 << 20  # of each member: clients that want it wait so long
STEP_BYTES = 1 << 20  # of each member: what is in memory
ZERO_BYTES = 16 << 20  # of the array: a client that makes zeroes holds up a window no longer

Range = tuple[int, int]  # offset, length
Checkpoint = Callable[[int], Awaitable[None]]


def rows_at_once(before: Geometry, after: Geometry, *, moved: int, headroom_rows: int) -> int:
    """How many new rows may be written when so many have moved."""
    needed = moved * after.data_members // before.data_members  # first old row that is needed
    return needed + headroom_rows - moved


class TwoGeometries:
    """Has the face of an array. `before` and `after` are over views of the same devices."""

    def __init__(self, before: Array, after: Array, *, position: int) -> None:
        self.before = before
        self.after = after
        self.position = position
        self.geometry = before.geometry
        self.size = before.size
        self.operations = 0
        self._window: Range = (0, 0)
        self._opened = trio.Event()
        self._inside: dict[object, Sequence[Range]] = {}
        self._left = trio.Event()

    def begin(self) -> None:
        """The new members have their slots: whoever of all of them fails has failed for both."""
        self.geometry = self.after.geometry
        self.before.devices.judge_by(self.geometry)
        if self.journal is not None:
            self.journal.use(self.devices)

    @property
    def parity_in_doubt(self) -> Sequence[Range]:
        """As that of an array: both geometries have the same bytes."""
        return self.after.parity_in_doubt

    @parity_in_doubt.setter
    def parity_in_doubt(self, ranges: Sequence[Range]) -> None:
        self.before.parity_in_doubt = self.after.parity_in_doubt = ranges

    @property
    def devices(self) -> Devices:
        return self.after.devices

    @property
    def intents(self) -> Intents | None:
        return self.after.intents

    @property
    def journal(self) -> Journaling | None:
        return self.after.journal

    # ---- clients

    async def read(self, offset: int, length: int) -> memoryview:
        """As that of an array."""
        whole = buffer(max(length, 1))[:length]
        async with self._at([(offset, length)]):
            below = min(max(self.position - offset, 0), length)
            if below:
                whole[:below] = await self.after.read(offset, below)
            if below < length:
                whole[below:] = await self.before.read(offset + below, length - below)
        return whole

    async def write(self, writes: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
        """As that of an array."""
        errors: list[OSError | None] = []
        async with self._at([(offset, len(view)) for offset, view in writes]):
            with trio.CancelScope(shield=True):
                errors = await self._write(writes)
        return errors

    async def _write(self, writes: Sequence[tuple[int, memoryview]]) -> list[OSError | None]:
        """On both sides, in the order given; one that crosses the position is two."""
        errors: list[OSError | None] = [None] * len(writes)
        sides: dict[bool, list[tuple[int, int, memoryview]]] = {True: [], False: []}
        for number, (offset, view) in enumerate(writes):
            below = min(max(self.position - offset, 0), len(view))
            if below:
                sides[True].append((number, offset, view[:below]))
            if below < len(view):
                sides[False].append((number, offset + below, view[below:]))
        for moved, parts in sides.items():
            array = self.after if moved else self.before
            found = await array.write([(at, view) for _, at, view in parts]) if parts else []
            for (number, _, _), error in zip(parts, found, strict=True):
                errors[number] = errors[number] or error
        return errors

    async def zero(self, offset: int, length: int) -> None:
        """As that of an array."""
        for start, piece in slices(offset, length, slice_bytes=ZERO_BYTES):
            async with self._at([(start, piece)]):
                below = min(max(self.position - start, 0), piece)
                if below:
                    await self.after.zero(start, below)
                if below < piece:
                    await self.before.zero(start + below, piece - below)

    async def flush(self) -> None:
        """As that of an array."""
        await self.after.flush()

    def close(self) -> None:
        self.after.close()

    @contextlib.asynccontextmanager
    async def _at(self, ranges: Sequence[Range]) -> AsyncIterator[None]:
        """No window meets these while the body runs, so the position stays on one side of each."""
        self.operations += 1
        while _meet(ranges, self._window):
            await self._opened.wait()
        token = object()
        self._inside[token] = ranges
        try:
            yield
        finally:
            del self._inside[token]
            self._left.set()

    # ---- who moves the data

    @contextlib.asynccontextmanager
    async def window(self, offset: int, length: int) -> AsyncIterator[None]:
        """No client is in there while the body runs."""
        assert self._window == (0, 0), "one at a time"
        self._window, self._opened = (offset, length), trio.Event()
        try:
            while any(_meet(ranges, self._window) for ranges in self._inside.values()):
                self._left = trio.Event()
                await self._left.wait()
            yield
        finally:
            self._window = (0, 0)
            self._opened.set()


def _meet(ranges: Sequence[Range], window: Range) -> bool:
    start, length = window
    return any(at < start + length and start < at + n for at, n in ranges)


class Reshape:
    """Moves all that has not moved yet, and makes the rest of the larger array zero.

    `headroom_rows`: so many chunks before the old data the new ones begin. `checkpoint(position)`
    makes the position durable. Positions are bytes of the larger array.
    """

    kind: Literal["reshape"] = "reshape"
    slot: None = None

    def __init__(
        self,
        array: TwoGeometries,
        *,
        headroom_rows: int,
        pace: Pace,
        checkpoint: Checkpoint,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        assert headroom_rows > 0
        self._array = array
        self._before, self._after = array.before.geometry, array.after.geometry
        self._headroom_rows = headroom_rows
        self._pace = pace
        self._checkpoint = checkpoint
        self._window_rows = max(1, window_bytes // self._after.chunk_bytes)
        self._step_rows = max(1, STEP_BYTES // self._after.chunk_bytes)
        # Without a journal, since the position is what a crash goes back to; and with locks of
        # its own, since nobody else is where it writes.
        self._target = Array.over(array.after.devices)
        self._operations = array.operations
        self._speed = Speed()

    @property
    def _row_bytes(self) -> int:
        return self._after.chunk_bytes * self._after.data_members

    def status(self) -> SweepStatus:
        position = self._array.position
        return SweepStatus(
            kind=self.kind,
            position=position,
            end=self._after.size,
            bytes_per_second=self._speed.at(position),
        )

    async def run(self) -> None:
        """To the end. Raises OSError if it cannot go on; what is moved stays moved."""
        self._speed.sample(self._array.position)
        while self._array.position < self._after.size:
            started, first = trio.current_time(), self._array.position
            await trio.lowlevel.checkpoint()
            with trio.CancelScope(shield=True):
                await self._move_window()
            busy = self._array.operations != self._operations
            self._operations = self._array.operations
            limit = self._pace.limit(busy=busy)
            if limit:
                await trio.sleep_until(started + (self._array.position - first) / limit)
            self._speed.sample(self._array.position)

    async def _move_window(self) -> None:
        """As many rows as may be; the position is behind them, durably."""
        first = self._array.position // self._row_bytes
        allowed = rows_at_once(
            self._before, self._after, moved=first, headroom_rows=self._headroom_rows
        )
        last = min(first + min(allowed, self._window_rows), self._after.member_chunks)
        assert first < last, "there is headroom"
        start, end = first * self._row_bytes, last * self._row_bytes
        async with self._array.window(start, end - start):
            if self._array.journal is not None:
                await self._array.journal.renew()
            for row in range(first, last, self._step_rows):
                await self._move(row, min(row + self._step_rows, last))
            await self._target.flush()
            await self._checkpoint(end)
            self._array.position = end

    async def _move(self, first: int, last: int) -> None:
        """These new rows: what the old geometry has of them, and zeroes behind that."""
        start, end = first * self._row_bytes, last * self._row_bytes
        there = min(max(self._before.size - start, 0), end - start)
        if not there:
            await self._target.zero(start, end - start)
            return
        view = buffer(end - start)
        lost = await self._read(start, view[:there])
        (error,) = await self._target.write([(start, view)])
        if error is not None:
            raise error
        for offset in lost:
            await self._lose(offset)

    # ---- what is lost stays lost

    async def _read(self, start: int, view: memoryview) -> list[int]:
        """By the old geometry; offsets of the blocks that nobody has any more."""
        try:
            view[:] = await self._array.before.read(start, len(view))
        except OSError:
            return await self._read_blocks(start, view)
        return []

    async def _read_blocks(self, start: int, view: memoryview) -> list[int]:
        lost = []
        for position in range(0, len(view), BLOCK_BYTES):
            part = view[position : position + BLOCK_BYTES]
            try:
                part[:] = await self._array.before.read(start + position, len(part))
            except OSError:
                devices = self._array.devices
                if not survives(devices.geometry, devices.missing):
                    raise  # a member is gone that may come back
                lost.append(start + position)
        return lost

    async def _lose(self, offset: int) -> None:
        """This block of the array will be read as an error, and never made up for."""
        devices = self._array.devices
        chunk, start = divmod(offset, self._after.chunk_bytes)
        if self._after.parities:
            row, index = divmod(chunk, self._after.data_members)
            stripe = Stripes(self._after)[row]
            places = [(slot, row) for slot in (stripe.data[index], stripe.p, stripe.q)]
        else:
            places = [(place.slot, place.chunk) for place in copies(self._after, chunk)]
        for slot, row in places:
            if slot == NONE or devices.members[slot] is None:
                continue
            log = bad_blocks_of(devices.members[slot])
            if log is None:
                raise OSError(errno.EIO, f"{BLOCK_BYTES} bytes at {offset} are lost")
            await log.lose(devices.place(row, start), BLOCK_BYTES)
