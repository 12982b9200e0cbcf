"""`page-cache`: every I/O goes through 4 KiB frames in DRAM and is copied once each way.

The frames live in an arena of fixed size. A page that is read or written in part is filled from
the media first; a written page is dirty until it is written back. When the arena is full, CLOCK
looks for a frame that nobody holds and nobody used since the hand last passed (Corbato 1968), and
writes it back if it is dirty. If every frame is held, the I/O waits: that is back-pressure, not
an error.

A frame is in one of three states: free; cached (in `_frame_of`, maybe dirty, maybe pinned); or
orphaned: its page was forgotten while a lease was out. An orphan keeps its bytes for the lease and
becomes free with the last unpin.
"""

import mmap
from collections.abc import Sequence

from pmblk.media import Media
from pmblk.ranges import round_out, slices
from pmblk.representations.base import Lease, Representation
from pmblk.units import parse_size

PAGE_BYTES = 4096
_NO_PAGE = -1


class _FrameLease(Lease):
    """Views of frames, and which frames they are."""

    __slots__ = ("frames",)

    def __init__(self, views: list[memoryview], frames: list[int]) -> None:
        super().__init__(views)
        self.frames = frames


class PageCacheRepresentation(Representation):
    class Options(Representation.Options, frozen=True, forbid_unknown_fields=True):
        """`arena`: the DRAM for frames; at least 1 MiB, in whole pages."""

        arena: str | int = "64MiB"

        def __post_init__(self) -> None:
            arena_bytes = parse_size(self.arena)
            if arena_bytes < 1 << 20 or arena_bytes % PAGE_BYTES:
                raise ValueError(f"arena {self.arena} is not at least 1MiB in whole 4 KiB pages")

    kind = "page-cache"
    io_bytes_max: int

    def __init__(self, media: Media, options: Options) -> None:
        super().__init__(media, options)
        arena_bytes = parse_size(options.arena)
        self._frames = arena_bytes // PAGE_BYTES
        self.io_bytes_max = arena_bytes // 4  # unaligned ends and other holders need frames too
        self._arena = memoryview(mmap.mmap(-1, arena_bytes))
        self._frame_of: dict[int, int] = {}  # page -> frame
        self._page_of = [_NO_PAGE] * self._frames
        self._pins = [0] * self._frames
        self._used = bytearray(self._frames)
        self._dirty: set[int] = set()  # pages
        self._free = list(range(self._frames - 1, -1, -1))
        self._hand = 0
        self.hits = self.misses = self.write_backs = 0

    def hold(self, offset: int, length: int) -> Lease | None:
        if length > self.io_bytes_max:
            return None
        views: list[memoryview] = []
        frames: list[int] = []
        try:
            for position, piece in _pages(offset, length):
                frame = self._cached(position // PAGE_BYTES, fill=True)
                if frame is None:
                    self._unpin(frames)
                    return None
                self._pins[frame] += 1
                frames.append(frame)
                start = frame * PAGE_BYTES + position % PAGE_BYTES
                views.append(self._arena[start : start + piece])
        except OSError:
            self._unpin(frames)
            raise
        self.leases += 1
        return _FrameLease(views, frames)

    def release(self, leases: Sequence[Lease]) -> None:
        super().release(leases)
        for lease in leases:
            assert isinstance(lease, _FrameLease)
            self._unpin(lease.frames)

    def write(self, offset: int, payload: "memoryview | bytes") -> bool:
        """Copies page by page; a page is taken whole or not at all, and a refusal takes none.

        To refuse before anything was taken, the frames are found and pinned first.
        """
        if len(payload) > self.io_bytes_max:
            return False
        frames: list[int] = []
        try:
            for position, piece in _pages(offset, len(payload)):
                frame = self._cached(position // PAGE_BYTES, fill=piece < PAGE_BYTES)
                if frame is None:
                    self._drop_unfilled(frames, offset, len(payload))
                    return False
                self._pins[frame] += 1
                frames.append(frame)
        except OSError:
            self._drop_unfilled(frames, offset, len(payload))
            raise
        taken = 0
        for frame, (position, piece) in zip(frames, _pages(offset, len(payload)), strict=True):
            start = frame * PAGE_BYTES + position % PAGE_BYTES
            self._arena[start : start + piece] = payload[taken : taken + piece]
            self._dirty.add(position // PAGE_BYTES)
            taken += piece
        self.bytes_copied += taken
        self._unpin(frames)
        return True

    def _drop_unfilled(self, frames: list[int], offset: int, length: int) -> None:
        """Undo the first half of `write`: whole pages that never got their bytes are dropped."""
        for frame, (position, piece) in zip(frames, _pages(offset, length), strict=False):
            self._pins[frame] -= 1
            page = position // PAGE_BYTES
            if piece == PAGE_BYTES and page not in self._dirty and not self._pins[frame]:
                self._forget_page(page)

    def dirty(self) -> bool:
        return bool(self._dirty)

    def dirty_extents(self) -> list[tuple[int, int]]:
        extents: list[tuple[int, int]] = []
        for page in sorted(self._dirty):
            offset = page * PAGE_BYTES
            if extents and sum(extents[-1]) == offset:
                extents[-1] = (extents[-1][0], extents[-1][1] + PAGE_BYTES)
            else:
                extents.append((offset, PAGE_BYTES))
        return extents

    def write_back(self, offset: int, length: int) -> None:
        for page in self._pages_of(self._dirty, offset, length):
            self._write_back_page(page)

    def forget(self, offset: int, length: int) -> None:
        """Whole pages are dropped; of a page that is covered in part, the part becomes zeroes."""
        for page in self._pages_of(self._frame_of, offset, length):
            start = max(offset, page * PAGE_BYTES)
            end = min(offset + length, (page + 1) * PAGE_BYTES)
            if end - start == PAGE_BYTES:
                self._forget_page(page)
            else:
                base = self._frame_of[page] * PAGE_BYTES - page * PAGE_BYTES
                self._arena[base + start : base + end] = bytes(end - start)
                self._dirty.add(page)

    @staticmethod
    def _pages_of(known: "dict[int, int] | set[int]", offset: int, length: int) -> list[int]:
        """The known pages that the range touches, sorted; looks through the shorter of the two."""
        first, span = round_out(offset, length, unit=PAGE_BYTES)
        pages = range(first // PAGE_BYTES, (first + span) // PAGE_BYTES)
        if len(known) < len(pages):
            return sorted(page for page in known if page in pages)
        return [page for page in pages if page in known]

    def _cached(self, page: int, *, fill: bool) -> int | None:
        """The frame of `page`, filled from the media if asked; None when every frame is held."""
        frame = self._frame_of.get(page)
        if frame is not None:
            self.hits += 1
            self._used[frame] = 1
            return frame
        self.misses += 1
        frame = self._free.pop() if self._free else self._evict()
        if frame is None:
            return None
        if fill:
            try:
                self._fill(frame, page)
            except OSError:
                self._free.append(frame)
                raise
        self._frame_of[page] = frame
        self._page_of[frame] = page
        self._used[frame] = 1
        return frame

    def _fill(self, frame: int, page: int) -> None:
        """Copy the page in, zeroes for what has no memory: a fill must not allocate."""
        offset = page * PAGE_BYTES
        length = min(PAGE_BYTES, self.media.size - offset)
        base = frame * PAGE_BYTES - offset
        for extent in self.media.allocation.extents(offset, length):
            start, end = extent.offset, extent.offset + extent.length
            source = bytes(extent.length) if extent.hole else self.media.view[start:end]
            self._arena[base + start : base + end] = source
        self.bytes_copied += length

    def _evict(self) -> int | None:
        """CLOCK: two rounds suffice, the first clears every `used` mark."""
        for _ in range(2 * self._frames):
            frame = self._hand
            self._hand = (self._hand + 1) % self._frames
            if self._pins[frame]:
                continue
            if self._used[frame]:
                self._used[frame] = 0
                continue
            page = self._page_of[frame]
            if page in self._dirty:
                self._write_back_page(page)
            del self._frame_of[page]
            self._page_of[frame] = _NO_PAGE
            return frame
        return None

    def _write_back_page(self, page: int) -> None:
        """The page was reserved when it was written; still dirty if the media refuse the store."""
        offset = page * PAGE_BYTES
        length = min(PAGE_BYTES, self.media.size - offset)
        start = self._frame_of[page] * PAGE_BYTES
        self.media.store(offset, self._arena[start : start + length])
        self._dirty.discard(page)
        self.write_backs += 1
        self.bytes_copied += length

    def _forget_page(self, page: int) -> None:
        frame = self._frame_of.pop(page)
        self._page_of[frame] = _NO_PAGE
        self._dirty.discard(page)
        if not self._pins[frame]:
            self._free.append(frame)

    def _unpin(self, frames: list[int]) -> None:
        for frame in frames:
            self._pins[frame] -= 1
            if not self._pins[frame] and self._page_of[frame] == _NO_PAGE:
                self._free.append(frame)


def _pages(offset: int, length: int) -> "list[tuple[int, int]]":
    """The range cut at page boundaries, as (offset, length)."""
    head = min(length, -offset % PAGE_BYTES)
    pieces = [(offset, head)] if head else []
    pieces += slices(offset + head, length - head, slice_bytes=PAGE_BYTES)
    return pieces
