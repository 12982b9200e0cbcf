"""Making a range zero: holes where pages can be given back, zeroes in memory where not.

Only whole pages are punched. A page that the range covers in part keeps its memory and gets zeroes
there, so a page that a representation holds dirty always has memory under it, and nothing outside
the range is looked at.
"""

import trio

from pmblk.media import Media
from pmblk.media.allocation import PAGE_BYTES
from pmblk.ranges import slices, whole_units
from pmblk.representations import Representation

INLINE_BYTES = 4 << 20  # punching 4 MiB of tmpfs takes about 1 ms, a thread hop 0.1 ms
SLICE_BYTES = 256 << 20  # a long punch is cut, so that a stop does not wait for all of it


class Zeroing:
    def __init__(self, media: Media, representation: Representation) -> None:
        self._media = media
        self._representation = representation

    def now(self, offset: int, length: int, *, allocate: bool) -> None:
        """In one go; for at most `INLINE_BYTES`. Raises OSError."""
        if allocate:
            self._in_memory(offset, length)
            return
        start, end = self._ends(offset, length)
        if start < end:
            self._representation.forget(start, end - start)
            self._media.punch(start, end - start)

    async def slowly(self, offset: int, length: int, *, allocate: bool) -> None:
        """Slice by slice: punched in a worker thread, or zeroed in memory with pauses between.

        The caller keeps everybody else out of the range. Raises OSError.
        """
        if allocate:
            for position, piece in slices(offset, length, slice_bytes=INLINE_BYTES):
                self._in_memory(position, piece)
                await trio.lowlevel.checkpoint()
            return
        start, end = self._ends(offset, length)
        for position, piece in slices(start, end - start, slice_bytes=SLICE_BYTES):
            self._representation.forget(position, piece)
            await trio.to_thread.run_sync(self._media.punch, position, piece)

    def _in_memory(self, offset: int, length: int) -> None:
        self._media.reserve(offset, length)
        self._representation.zero(offset, length)

    def _ends(self, offset: int, length: int) -> tuple[int, int]:
        """Zero the partial pages; what is left between them are whole pages."""
        start, end = whole_units(offset, length, unit=PAGE_BYTES, limit=self._media.size)
        self._zero_memory(offset, min(start, offset + length))
        self._zero_memory(max(end, start), offset + length)
        return start, max(end, start)

    def _zero_memory(self, start: int, end: int) -> None:
        """Zeroes where there is memory; a hole is zero as it is."""
        for extent in list(self._media.allocation.extents(start, end - start)):
            if not extent.hole:
                self._representation.zero(extent.offset, extent.length)
