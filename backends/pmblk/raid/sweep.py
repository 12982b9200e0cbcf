"""Work over a whole array, or a whole member of it, while clients go on.

- `rebuild`: the member in `slot` is filled from the others. `devices.rebuilt[slot]` says how far
  it is; the caller has it there before the member is, and takes it out at the end, when it makes
  the member active. With `ranges` the member came back and lacks only these: it stays 0 until then.
- `replace`: the same from the member that is to be replaced (`pmblk.raid.replacing`).
- `resync`: after an unclean stop, parity and copies are made to fit the data, or the first copy.
- `check`: all is read and compared, and what does not fit is counted and named.
- `repair`: and mended.

Every one of them makes up for what cannot be read, and writes it back. What can be neither read nor
made is lost: it is named, and a member that is filled will not read there (`BadBlocks`).

A batch is done under the locks that clients take for the same rows or chunks, and is finished once
it has begun. Not here: what one batch is (`row_sweeps`, `mirror_sweeps`).
"""

import collections
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from pmblk.raid.array import Array
from pmblk.raid.batches import Work
from pmblk.raid.findings import Findings
from pmblk.raid.member import Hung
from pmblk.raid.mirror_sweeps import MirrorSweeps
from pmblk.raid.row_sweeps import RowSweeps
from pmblk.raid.status import SweepKind, SweepStatus

BATCH_BYTES = 1 << 20
"""Of each member: all of a batch should stay in the processor's caches."""
CHECKPOINT_SECONDS = 8.0
SPEED_SECONDS = 5.0

Checkpoint = Callable[[int], Awaitable[None]]


class Pace(msgspec.Struct, frozen=True):
    """Bytes of position a second. At most `max`; 0: as fast as it goes. While clients do I/O, at
    most `min`, which is kept up whatever they do; 0: they do not slow it down.
    """

    bytes_per_second_max: int = 0
    bytes_per_second_min: int = 10 << 20

    def limit(self, busy: bool) -> int:
        """0: none."""
        limits = (self.bytes_per_second_max, self.bytes_per_second_min if busy else 0)
        return min((limit for limit in limits if limit), default=0)


class Speed:
    """Of a position, over the last seconds."""

    def __init__(self) -> None:
        self._samples: collections.deque[tuple[float, int]] = collections.deque()

    def sample(self, position: int) -> None:
        now, samples = trio.current_time(), self._samples
        if not samples or now - samples[-1][0] >= SPEED_SECONDS / 20:
            samples.append((now, position))
        while len(samples) > 1 and now - samples[1][0] >= SPEED_SECONDS:
            samples.popleft()

    def at(self, position: int) -> float:
        """Bytes a second, now that it is there."""
        if not self._samples:
            return 0.0
        since, first = self._samples[0]
        seconds = trio.current_time() - since
        return (position - first) / seconds if seconds > 0 else 0.0


class Sweep:
    """`position` and `end` are bytes of the member for rebuild and replace, else of the array.

    `ranges` (offset, length) are bytes of the array. `checkpoint(position)` is awaited when all up
    to there is durable: now and then, and at the end. An error of it ends the sweep.
    """

    def __init__(
        self,
        kind: SweepKind,
        array: Array,
        *,
        pace: Pace,
        slot: int | None = None,
        ranges: Sequence[tuple[int, int]] | None = None,
        position: int = 0,
        checkpoint: Checkpoint | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        assert (slot is not None) == (kind in ("rebuild", "replace"))
        self.kind: SweepKind = kind
        self.slot = slot
        self.pace = pace
        self.findings = Findings()
        self._array = array
        self._checkpoint = checkpoint
        self._checkpoint_seconds = checkpoint_seconds
        work = RowSweeps if array.geometry.parities else MirrorSweeps
        self._work: Work = work(
            kind,
            array.devices,
            locks=array.locks,
            slot=slot,
            whole=ranges is None,
            batch_bytes=batch_bytes,
            findings=self.findings,
        )
        self.end = self._work.units * self._work.unit_bytes
        self.position = min(position, self.end)
        self._todo = self._units(ranges)
        self._operations = array.operations  # of clients, up to the last batch
        self._speed = Speed()
        if kind == "rebuild":
            assert slot is not None
            array.devices.rebuilt.setdefault(slot, self._first_unit if ranges is None else 0)

    @property
    def _first_unit(self) -> int:
        return self.position // self._work.unit_bytes

    def _units(self, ranges: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
        """What is left to do, in order and joined."""
        if ranges is None:
            return [(self._first_unit, self._work.units)]
        found = sorted(pair for offset, n in ranges if n for pair in self._work.units_of(offset, n))
        joined: list[tuple[int, int]] = []
        for first, last in found:
            first = max(first, self._first_unit)
            if joined and first <= joined[-1][1]:
                first, last = joined[-1][0], max(last, joined.pop()[1])
            if first < last:
                joined.append((first, last))
        return joined

    def status(self) -> SweepStatus:
        return SweepStatus(
            kind=self.kind,
            position=self.position,
            end=self.end,
            bytes_per_second=self._speed.at(self.position),
            findings=self.findings.lines(),
        )

    # ---- the way

    async def run(self) -> None:
        """To the end. Raises OSError if it cannot go on; what is done is done."""
        saved = trio.current_time()
        for first, last in self._todo:
            self.position = max(self.position, first * self._work.unit_bytes)
            self._speed.sample(self.position)
            while first < last:
                step = min(self._work.batch_units, last - first)
                await self._batch(first, first + step)
                first += step
                if trio.current_time() - saved >= self._checkpoint_seconds:
                    await self._save()
                    saved = trio.current_time()
        self.position = self.end
        await self._save()

    async def _batch(self, first: int, last: int) -> None:
        """One batch, and the rest of the time that it should take."""
        started = trio.current_time()
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            await self._step(first, last)
        self.position = last * self._work.unit_bytes
        limit = self.pace.limit(busy=self._array.operations != self._operations)
        self._operations = self._array.operations
        if limit:
            wanted = (last - first) * self._work.unit_bytes / limit
            await trio.sleep_until(started + wanted)
        self._speed.sample(self.position)

    async def _step(self, first: int, last: int) -> None:
        while True:
            try:
                await self._work.step(first, last)
            except Hung:  # that member is out, and has our memory: once more without it
                self._work.space.forget()
            else:
                return

    async def _save(self) -> None:
        await self._array.flush()
        if self._checkpoint is not None:
            await self._checkpoint(self.position)
