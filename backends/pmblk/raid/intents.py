"""The write-intent bitmap: which regions of an array may be half written after a crash.

A region's bit is on the members before anything in it is written (`writing`), and taken back when
nobody has written there for a while. So after an unclean stop, or when a member comes back, only
the regions whose bits are set have to be looked at. Regions are of the array, not of members, so
that all levels are alike.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

Store = Callable[[int, memoryview], Awaitable[None]]


class Intents:
    """`store(offset, view)` puts blocks of the bitmap on every member, durably; offsets count from
    the start of the bitmap's area.
    """

    def __init__(self, *, size: int, region_bytes: int, store: Store) -> None:
        self.size = size
        self.region_bytes = region_bytes
        self._store = store

    def load(self, areas: Sequence[bytes]) -> None:
        """What the members say, united; what none of them can say counts as set."""
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def writing(self, ranges: Iterable[tuple[int, int]]) -> AsyncIterator[None]:
        """The ranges (offset, length) are marked, durably, as long as the body runs, and longer."""
        raise NotImplementedError
        yield

    async def mark_all(self) -> None:
        """Every region, durably."""
        raise NotImplementedError

    def dirty_ranges(self) -> list[tuple[int, int]]:
        """Offset and length of what is marked, joined, in order."""
        raise NotImplementedError

    async def cleaned(self, offset: int, length: int) -> None:
        """A resync has made these right: marks that lie within, and that nobody writes, go."""
        raise NotImplementedError

    async def clear_idle(self, flush: Callable[[], Awaitable[None]]) -> None:
        """Marks of regions that were not written since the last call go, after a flush."""
        raise NotImplementedError
