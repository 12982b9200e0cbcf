"""The write-intent bitmap: which regions of an array may be half written after a crash.

A region's bit is on the members before anything in it is written (`writing`), and taken back when
nobody has written there for a while. So after an unclean stop, or when a member comes back, only
the regions whose bits are set have to be looked at. Regions are of the array, not of members, so
that all levels are alike.

A mark goes through three states. *Marked*: the next store has it. *Durable*: a store that had it
has returned; only then a writer goes on. *In doubt*: it is from before this start, or a write in it
has failed; only `cleaned` takes that away. Stores take turns, and each one takes the marks of all
who wait by then along. What is taken back is no longer durable from before its store begins: who
comes meanwhile stores it anew.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence

import numpy as np
import trio

from pmblk.raid import bitmap
from pmblk.raid.buffers import buffer

Store = Callable[[int, memoryview], Awaitable[None]]


class Intents:
    """`store(offset, view)` puts blocks of the bitmap on every member, durably; offsets count from
    the start of the bitmap's area.

    `keeping`: no mark is taken back. So it has to be while a member is missing: the marks tell what
    it lacks when it comes back.
    """

    def __init__(self, *, size: int, region_bytes: int, store: Store) -> None:
        self.size = size
        self.region_bytes = region_bytes
        self.keeping = False
        self._store = store
        self._regions = -(-size // region_bytes)
        assert self._regions <= bitmap.REGIONS_MAX
        self._marked = np.zeros(self._regions, dtype=np.bool_)
        self._doubtful = np.zeros(self._regions, dtype=np.bool_)
        self._failed: set[int] = set()  # in doubt since this start
        self._durable = bytearray(self._regions)
        self._waiting: set[int] = set()  # marked for somebody, and in no store yet
        self._writers: dict[int, int] = {}  # in flight, by region
        self._recent: set[int] = set()  # written since the last look for what is idle
        self._unflushed: set[int] = set()  # written since the last flush that worked
        self._flushing: set[int] = set()  # what a flush under way makes durable
        self._generation = 0
        self._storing = trio.Lock()
        self._clearing = trio.Lock()

    def load(self, areas: Sequence[bytes]) -> None:
        """What the members say, united; what none of them can say counts as set.

        None of it is durable: a mark that only one member has goes when that one does.
        """
        marks = bitmap.union(areas, regions=self._regions, region_bytes=self.region_bytes)
        self._marked |= marks
        self._doubtful |= marks

    @contextlib.asynccontextmanager
    async def writing(self, ranges: Iterable[tuple[int, int]]) -> AsyncIterator[None]:
        """The ranges (offset, length) are marked, durably, as long as the body runs, and longer.

        Raises OSError, and the body does not run, when they cannot be marked. A body that raises
        leaves them in doubt.
        """
        regions = bitmap.regions_of(ranges, self.region_bytes)
        writers, durable = self._writers, self._durable
        for region in regions:
            writers[region] = writers.get(region, 0) + 1
        try:
            if not all(durable[region] for region in regions):
                await self._mark(regions)
            try:
                yield
            except BaseException:
                self._doubtful[list(regions)] = True
                self._failed |= regions
                raise
        finally:
            self._recent |= regions
            self._unflushed |= regions
            for region in regions:
                writers[region] -= 1
                if not writers[region]:
                    del writers[region]

    def doubt(self, ranges: Iterable[tuple[int, int]]) -> None:
        """A write there has failed: copies or parity may differ until a resync has been there."""
        regions = bitmap.regions_of(ranges, self.region_bytes)
        self._doubtful[list(regions)] = True
        self._failed |= regions

    @property
    def has_doubts(self) -> bool:
        """Whether a resync has to look at anything."""
        return bool(self._doubtful.any())

    @property
    def has_failed(self) -> bool:
        """Whether a write has failed since this start."""
        return bool(self._failed)

    async def mark_all(self) -> None:
        """Every region, durably, and in doubt. Raises OSError."""
        self._doubtful[:] = True
        await self._mark(range(self._regions))

    async def extend(self, size: int, *, doubtful: bool) -> None:
        """The array is going to be larger; `doubtful`: the new part is marked. Raises OSError."""
        regions = -(-size // self.region_bytes)
        assert size >= self.size
        assert regions <= bitmap.REGIONS_MAX
        added = regions - self._regions
        new = bitmap.regions_of([(self.size, size - self.size)], self.region_bytes)
        self.size, self._regions = size, regions
        none = np.zeros(added, dtype=np.bool_)
        self._marked = np.concatenate([self._marked, none])
        self._doubtful = np.concatenate([self._doubtful, none])
        self._durable += bytes(added)
        if doubtful:
            self._doubtful[list(new)] = True
            await self._mark(new)
        await self.store_all()

    async def store_all(self) -> None:
        """Every block, for a member that has missed some. Raises OSError."""
        async with self._storing:
            await self._put(range(self._regions))

    def dirty_ranges(self) -> list[tuple[int, int]]:
        """Offset and length of what is marked, joined, in order."""
        return bitmap.ranges_of(self._marked, region_bytes=self.region_bytes, size=self.size)

    async def cleaned(self, offset: int, length: int) -> None:
        """A resync has made these right, durably: marks that lie within, and that nobody writes,
        go. Raises OSError.

        Of a region that clients have written, only the doubt goes: its mark goes after a flush.
        Where a write has failed since this start, the doubt stays for the next one.
        """
        end = offset + length
        last = self._regions if end >= self.size else end // self.region_bytes
        within = slice(-(-offset // self.region_bytes), last)
        self._doubtful[within] = False
        self._doubtful[list(self._failed)] = True  # perhaps after the resync had passed
        async with self._storing:
            await self._take_back(np.flatnonzero(self._marked[within]) + within.start)

    async def clear_idle(self, flush: Callable[[], Awaitable[None]]) -> None:
        """Marks of regions that were not written since the last call go, after a flush.

        Raises OSError when the flush or the store does; what was not flushed stays marked.
        """
        async with self._clearing:
            recent, self._recent = self._recent, set()
            marked = np.flatnonzero(self._marked & ~self._doubtful).tolist()
            idle = [region for region in marked if region not in recent | self._writers.keys()]
            if self.keeping or not idle:
                return
            await self._flush(flush)
            async with self._storing:
                await self._take_back(idle)

    async def _flush(self, flush: Callable[[], Awaitable[None]]) -> None:
        """Afterwards `_unflushed` is what was written after the flush had begun."""
        self._flushing, self._unflushed = self._unflushed, set()
        try:
            await flush()
        except BaseException:
            self._unflushed |= self._flushing
            raise
        finally:
            self._flushing = set()

    # ---- stores, one at a time

    async def _mark(self, regions: Collection[int]) -> None:
        self._marked[list(regions)] = True
        self._waiting.update(region for region in regions if not self._durable[region])
        async with self._storing:
            if all(self._durable[region] for region in regions):
                return  # somebody else's store has had them
            taken, self._waiting = self._waiting, set()
            try:
                await self._put(taken)
            except BaseException:
                self._waiting |= taken
                raise
            for region in taken:
                self._durable[region] = True

    async def _take_back(self, regions: Iterable[int]) -> None:
        """Of these, whatever nobody writes, that is durable and not in doubt."""
        if self.keeping:
            return
        busy = self._unflushed | self._flushing | self._waiting | self._writers.keys()
        going = [int(one) for one in regions if int(one) not in busy and not self._doubtful[one]]
        if not going:
            return
        self._marked[going] = False
        for region in going:
            self._durable[region] = False
        await self._put(going)

    async def _put(self, regions: Iterable[int]) -> None:
        """The blocks of these, and what lies between them, in one store."""
        blocks = [*bitmap.blocks_of(regions)]
        first, last = blocks[0], blocks[-1]
        size = bitmap.BLOCK_BYTES
        self._generation += 1
        view = buffer((last + 1 - first) * size)
        for number in range(first, last + 1):
            start = (number - first) * size
            view[start : start + size] = bitmap.encode(
                self._marked,
                number,
                region_bytes=self.region_bytes,
                generation=self._generation,
            )
        await self._store(first * size, view)
