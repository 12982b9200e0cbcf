"""Which pages of a sparse file are known to have memory under them. Pure but for lseek.

A store through a mapping to a page that the file system cannot provide kills the process with
SIGBUS, and on tmpfs even a load allocates. So every page is looked up here first: a write to an
unknown page reserves it (ENOSPC becomes a status), a read of a hole is answered with zeroes and
allocates nothing.

One byte a page, in anonymous memory that costs nothing until it is touched: a byte array would
cost 100 MiB to open 400 GiB, a bit map would need shifts on the path of every I/O. A known page
stays known until it is discarded; an unknown one may be data (the file came to us like this, or a
client mapped it) or a hole, and lseek(2) with SEEK_DATA and SEEK_HOLE tells. On tmpfs that walks
over every page up to the hole, so all of the run that was walked over is remembered, not only what
was asked for: else each read of a file that others have filled would walk again.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator

from pmblk.media import syscalls
from pmblk.pages import PAGE_BYTES, PAGE_SHIFT
from pmblk.ranges import Extent

HOLE = b"\x00"  # in the map: perhaps a hole, nobody has looked yet
_KNOWN_RUN = b"\x01" * 65536


class AllocationMap:
    """`fd` and `size` (bytes) of the file; the map never outlives the file descriptor."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._pages = (size + PAGE_BYTES - 1) >> PAGE_SHIFT
        self._changes = threading.Lock()  # a long punch runs in a thread of its own
        self._punching = 0
        self._punches = 0
        # 1: memory is there; `Namespace.execute` looks itself.
        self.known = syscalls.anonymous(max(self._pages, 1))

    def take_over(self, other: "AllocationMap") -> None:
        """Know what the map of the same file at another size knows; its last page may differ."""
        pages = min(self._size, other._size) >> PAGE_SHIFT
        for position in range(0, pages, len(_KNOWN_RUN)):
            run = min(pages - position, len(_KNOWN_RUN))
            if other.known.find(b"\x01", position, position + run) >= 0:  # else it stays untouched
                self.known[position : position + run] = other.known[position : position + run]

    def covers(self, offset: int, length: int) -> bool:
        """Whether every page of the range is known. `length` is at least 1."""
        first = offset >> PAGE_SHIFT
        last = (offset + length - 1) >> PAGE_SHIFT
        if first == last:
            return bool(self.known[first])
        return self.known.find(HOLE, first, last + 1) < 0

    def mark(self, offset: int, length: int) -> None:
        """The pages that the range touches have memory under them."""
        position = offset >> PAGE_SHIFT
        end = (offset + length + PAGE_BYTES - 1) >> PAGE_SHIFT
        while position < end:
            run = min(end - position, len(_KNOWN_RUN))
            self.known[position : position + run] = _KNOWN_RUN[:run]
            position += run

    def forget(self, offset: int, length: int) -> None:
        """The pages that the range touches may be holes from now on."""
        position = offset >> PAGE_SHIFT
        end = (offset + length + PAGE_BYTES - 1) >> PAGE_SHIFT
        # Only where something is known: the rest of the map may have no memory, and needs none.
        while (known := self.known.find(b"\x01", position, end)) >= 0:
            position = min(end, known + len(_KNOWN_RUN))
            self.known[known:position] = bytes(position - known)

    @contextlib.contextmanager
    def punched(self, offset: int, length: int) -> Iterator[None]:
        """Inside, the range becomes a hole. Nothing is learned meanwhile of what lies around.

        Forgets before the punch: one that fails half way must not leave holes that count as memory.
        """
        with self._changes:
            self._punching += 1
            self.forget(offset, length)
        try:
            yield
        finally:
            with self._changes:
                self._punching -= 1
                self._punches += 1

    def unknown(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Runs of unknown pages that the range touches, as (offset, length) in whole pages."""
        position = offset >> PAGE_SHIFT
        end = (offset + length + PAGE_BYTES - 1) >> PAGE_SHIFT
        while (first := self.known.find(HOLE, position, end)) >= 0:
            known = self.known.find(b"\x01", first, end)
            position = end if known < 0 else known
            yield first << PAGE_SHIFT, (position - first) << PAGE_SHIFT

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The range as data and holes, in order, without gaps; data that is found is remembered."""
        position, end = offset, offset + length
        while position < end:
            found = self._known_end(position, end)
            if found > position:
                yield Extent(position, found - position, hole=False)
                position = found
                continue
            # A known page may still be a hole to lseek: reserved, and not yet written.
            extent = self._ask(position, self._next_known(position, end))
            yield extent
            position += extent.length

    def _known_end(self, position: int, end: int) -> int:
        """Where the run of known pages that starts at `position` ends, at most `end`."""
        first = position >> PAGE_SHIFT
        unknown = self.known.find(HOLE, first, (end + PAGE_BYTES - 1) >> PAGE_SHIFT)
        return end if unknown < 0 else max(position, min(end, unknown << PAGE_SHIFT))

    def _next_known(self, position: int, end: int) -> int:
        """Where the next known page starts, at most `end`."""
        first = position >> PAGE_SHIFT
        known = self.known.find(b"\x01", first, (end + PAGE_BYTES - 1) >> PAGE_SHIFT)
        return end if known < 0 else min(end, known << PAGE_SHIFT)

    def _ask(self, position: int, end: int) -> Extent:
        """One extent from the file system, at most up to `end`; data that is found is remembered.

        What is found past `end` may be on its way out: nothing is fenced there.
        """
        punches = self._punches
        data = self._data_from(position)
        if data > position:
            return Extent(position, min(data, end) - position, hole=True)
        hole = min(os.lseek(self._fd, position, os.SEEK_HOLE), self._size)
        extent = Extent(position, min(hole, end) - position, hole=False)
        with self._changes:
            calm = not self._punching and self._punches == punches
            self._mark_whole_pages(position, hole - position if calm else extent.length)
        return extent

    def _data_from(self, position: int) -> int:
        """Where the next data begin; past the end when there are none."""
        try:
            return os.lseek(self._fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            self._refuse_truncated()
            return 1 << 63

    def _refuse_truncated(self) -> None:
        """Past the end of a file there are no holes. Raises OSError (EIO)."""
        file_bytes = os.lseek(self._fd, 0, os.SEEK_END)
        if file_bytes < self._size:
            raise OSError(errno.EIO, f"the file was truncated to {file_bytes} bytes")

    def _mark_whole_pages(self, offset: int, length: int) -> None:
        """A page that is data only in part (file system blocks below 4 KiB) stays unknown."""
        first, end = offset & -PAGE_BYTES, offset + length
        if first < offset and not self._is_data(first, offset):
            first += PAGE_BYTES
        if end < self._size:
            end &= -PAGE_BYTES
        if end > first:
            self.mark(first, end - first)

    def _is_data(self, start: int, end: int) -> bool:
        """Whether there is no hole between the two."""
        return self._data_from(start) == start and os.lseek(self._fd, start, os.SEEK_HOLE) >= end
