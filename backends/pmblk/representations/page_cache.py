"""`page-cache`: every I/O goes through 4 KiB frames in DRAM and is copied once each way.

The frames live in an arena of fixed size. A page that is read or written in part is filled from
the media first; a written page is dirty until it is written back. When the arena is full, CLOCK
looks for a frame that nobody holds and nobody used since the hand last passed (Corbato 1968), and
writes it back if it is dirty. If every frame is held, the I/O waits: that is back-pressure, not
an error. Each frame has a page struct: its page, who holds it, whether it was used lately.

A frame is in one of three states: free; cached (in `_frame_of`, maybe dirty, maybe pinned); or
orphaned: its page was forgotten while a lease was out. An orphan keeps its bytes for the lease and
becomes free with the last unpin.
"""

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pmblk import page_runs, pages
from pmblk.media import Media
from pmblk.media.syscalls import resident_bytes
from pmblk.page_runs import SCALAR_PAGES
from pmblk.pages import PAGE_BYTES
from pmblk.representations.base import Lease, Representation, RepresentationCounters
from pmblk.representations.descriptors import BVEC_BYTES, bvecs
from pmblk.representations.page_table import (
    HALVES,
    REFCOUNT_HALF,
    REFERENCED,
    STRUCT_BYTES,
    WORDS,
    PageTable,
)
from pmblk.representations.table_memory import for_structs
from pmblk.units import parse_size

_NO_PAGE = -1


class PageCacheRepresentation(Representation):
    class Options(Representation.Options, frozen=True, forbid_unknown_fields=True):
        """`arena`: the DRAM for frames; at least 1 MiB, in whole pages."""

        arena: str | int = "64MiB"

        def __post_init__(self) -> None:
            arena_bytes = parse_size(self.arena)
            if arena_bytes < 1 << 20 or arena_bytes % PAGE_BYTES:
                raise ValueError(f"arena {self.arena} is not at least 1MiB in whole 4 KiB pages")

    kind = "page-cache"
    keeps_copies = True
    io_bytes_max: int

    def __init__(self, media: Media, options: Options) -> None:
        super().__init__(media, options)
        arena_bytes = parse_size(options.arena)
        self._frames = arena_bytes // PAGE_BYTES
        self.io_bytes_max = arena_bytes // 4  # unaligned ends and other holders need frames too
        self._memory = mmap.mmap(-1, arena_bytes)
        self._arena = memoryview(self._memory)
        self._table_memory = for_structs(self._frames)
        self._table = PageTable(self._table_memory)
        self._frame_of: dict[int, int] = {}  # page -> frame
        self._page_of = [_NO_PAGE] * self._frames
        self._dirty: set[int] = set()  # pages
        self._free = list(range(self._frames - 1, -1, -1))
        self._hand = 0
        self._orphans = 0  # frames without a page that somebody still holds
        self._hits = self._misses = self._write_backs = self._waits = self._copied = 0
        self._pins = self._unpins = self._peak = self._iovecs = self._runs = 0
        self._filled = 0  # structs of frames, so far

    # ---- holding: frames, each pinned

    def hold(self, offset: int, length: int) -> Lease | None:
        if length > self.io_bytes_max:
            return None
        frames = self._pinned_frames(offset, length, fill=True)
        if frames is None:
            return None
        views = self._views(offset, length, frames)
        self.leases += 1
        self._iovecs += len(views)
        return Lease(views, descriptors=(frames, self._bvecs(offset, length, frames)))

    def release(self, leases: Sequence[Lease]) -> None:
        self._peak = max(self._peak, self._pins - self._unpins)
        self.leases -= len(leases)
        for lease in leases:
            self._unpin(lease.descriptors[0])

    def busy(self, offset: int, length: int) -> bool:
        """Never: a lease holds frames, and the pages of the media are free to go."""
        return False

    def _pinned_frames(self, offset: int, length: int, *, fill: bool) -> list[int] | None:
        """The frames of the range, each with a reference more; None, and no reference: too few.

        `fill`: with what the pages hold; without it, pages that the range covers in part only.
        """
        first, count = pages.span(offset, length)
        if count > SCALAR_PAGES:
            cached = list(map(self._frame_of.get, range(first, first + count)))
            if None not in cached:
                return self._pin_cached(cached)
        frames: list[int] = []
        references = self._table.half_items
        try:
            for position, piece in pages.pieces(offset, length):
                fill_it = fill or (piece < PAGE_BYTES and not self._is_whole(position, piece))
                frame = self._cached(position // PAGE_BYTES, fill=fill_it)
                if frame is None:
                    self._waits += 1
                    self._drop(frames, offset, length, filled=fill)
                    return None
                references[frame * HALVES + REFCOUNT_HALF] += 1
                frames.append(frame)
        except OSError:
            self._drop(frames, offset, length, filled=fill)
            raise
        self._pins += len(frames)
        return frames

    def _pin_cached(self, frames: Any) -> list[int]:
        """Many hits at once."""
        at = np.array(frames)
        self._table.refcounts[at] += 1
        self._table.flags[at] |= np.uint64(REFERENCED)
        self._hits += len(frames)
        self._pins += len(frames)
        found: list[int] = frames
        return found

    def _drop(self, frames: list[int], offset: int, length: int, *, filled: bool) -> None:
        """Undo `_pinned_frames`: whole pages that never got their bytes are dropped."""
        for frame, (position, piece) in zip(frames, pages.pieces(offset, length), strict=False):
            left = self._table.unpin_one(frame)
            page = position // PAGE_BYTES
            if filled or left or page in self._dirty or not self._is_whole(position, piece):
                continue
            self._forget_page(page)

    def _is_whole(self, position: int, piece: int) -> bool:
        """Whether a piece is all of its page; the end of the media may cut the last one short."""
        return position % PAGE_BYTES == 0 and piece == min(PAGE_BYTES, self.media.size - position)

    def _views(self, offset: int, length: int, frames: list[int]) -> list[memoryview]:
        """The range in the arena; frames that are neighbours there make one view."""
        arena = self._arena
        head, tail = offset % PAGE_BYTES, -(offset + length) % PAGE_BYTES
        runs = page_runs.runs(frames)
        self._runs += len(runs)
        if len(runs) == 1:
            (first, last) = runs[0]
            return [arena[first * PAGE_BYTES + head : (last + 1) * PAGE_BYTES - tail]]
        views = [arena[first * PAGE_BYTES : (last + 1) * PAGE_BYTES] for first, last in runs]
        views[0] = views[0][head:]
        views[-1] = views[-1][: len(views[-1]) - tail]
        return views

    def _bvecs(self, offset: int, length: int, frames: list[int]) -> Any:
        """The bio_vecs of an I/O, which name the structs of its frames."""
        address = self._table.address
        if len(frames) > SCALAR_PAGES:
            return bvecs(offset, length, np.array(frames) * STRUCT_BYTES + address)
        return bvecs(offset, length, [address + frame * STRUCT_BYTES for frame in frames])

    def _unpin(self, frames: list[int]) -> None:
        self._unpins += len(frames)
        if len(frames) > SCALAR_PAGES and not self._orphans:
            self._table.refcounts[np.array(frames)] -= 1
            return
        for frame in frames:
            if not self._table.unpin_one(frame) and self._page_of[frame] == _NO_PAGE:
                self._free.append(frame)
                self._orphans -= 1

    # ---- writing: into frames

    def write(self, offset: int, payload: "memoryview | bytes") -> bool:
        """Taken whole or not at all: the frames are found and pinned before a byte is copied."""
        length = len(payload)
        if length > self.io_bytes_max:
            return False
        if self.has_poison:
            self._refuse_half_poisoned(offset, length)
        frames = self._pinned_frames(offset, length, fill=False)
        if frames is None:
            return False
        self._bvecs(offset, length, frames)  # dropped: the copy is done before it is needed
        taken = 0
        for view in self._views(offset, length, frames):
            view[:] = payload[taken : taken + len(view)]
            taken += len(view)
        first, count = pages.span(offset, length)
        self._dirty.update(range(first, first + count))
        self._copied += length
        self._unpin(frames)
        if self.has_poison:
            self._heal(offset, length)
        return True

    # ---- what is dirty

    def dirty(self) -> bool:
        return bool(self._dirty)

    def dirty_extents(self) -> Iterator[tuple[int, int]]:
        return iter(page_runs.extents(sorted(self._dirty)))

    def write_back(self, offset: int, length: int) -> None:
        for page in self._pages_of(self._dirty, offset, length):
            self._write_back_page(page)

    def forget(self, offset: int, length: int) -> None:
        """Whole pages are dropped; of a page that is covered in part, the part becomes zeroes."""
        super().forget(offset, length)
        for page in self._pages_of(self._frame_of, offset, length):
            start = max(offset, page * PAGE_BYTES)
            end = min(offset + length, (page + 1) * PAGE_BYTES)
            if self._is_whole(start, end - start):
                self._forget_page(page)
            else:
                base = self._frame_of[page] * PAGE_BYTES - page * PAGE_BYTES
                self._arena[base + start : base + end] = bytes(end - start)
                self._dirty.add(page)

    def poison(self, first: int, count: int) -> None:
        """What a frame holds of a bad page is dropped with it, written or not."""
        super().poison(first, count)
        for page in range(first, first + count):
            if page in self._frame_of:
                self._forget_page(page)

    @staticmethod
    def _pages_of(known: "dict[int, int] | set[int]", offset: int, length: int) -> list[int]:
        """The known pages that the range touches, sorted; looks through the shorter of the two."""
        first, count = pages.span(offset, length)
        touched = range(first, first + count)
        if len(known) < count:
            return sorted(page for page in known if page in touched)
        return [page for page in touched if page in known]

    # ---- frames

    def _cached(self, page: int, *, fill: bool) -> int | None:
        """The frame of `page`, filled from the media if asked; None when every frame is held."""
        frame = self._frame_of.get(page)
        if frame is not None:
            self._hits += 1
            self._table.word_items[frame * WORDS] |= REFERENCED
            return frame
        self._misses += 1
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
        self._table.set_one(frame, index=page, flags=REFERENCED)
        self._filled += 1
        return frame

    def _fill(self, frame: int, page: int) -> None:
        """Copy the page in, zeroes for what has no memory: a fill must not allocate."""
        offset = page * PAGE_BYTES
        length = min(PAGE_BYTES, self.media.size - offset)
        if self.has_poison:
            self._refuse_poisoned(offset, length)
        base = frame * PAGE_BYTES - offset
        for extent in self.media.allocation.extents(offset, length):
            start, end = extent.offset, extent.offset + extent.length
            source = bytes(extent.length) if extent.hole else self.media.view[start:end]
            self._arena[base + start : base + end] = source
        self._copied += length

    def _evict(self) -> int | None:
        """CLOCK: two rounds suffice, the first clears every mark of use."""
        flags, references = self._table.word_items, self._table.half_items
        for _ in range(2 * self._frames):
            frame = self._hand
            self._hand = (self._hand + 1) % self._frames
            if references[frame * HALVES + REFCOUNT_HALF]:
                continue
            if flags[frame * WORDS] & REFERENCED:
                flags[frame * WORDS] &= ~REFERENCED
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
        self._write_backs += 1
        self._copied += length

    def _forget_page(self, page: int) -> None:
        frame = self._frame_of.pop(page)
        self._page_of[frame] = _NO_PAGE
        self._dirty.discard(page)
        if self._table.half_items[frame * HALVES + REFCOUNT_HALF]:
            self._orphans += 1
        else:
            self._free.append(frame)

    # ---- what it cost

    def built(self) -> tuple[int, int]:
        return self._pins, self._pins * BVEC_BYTES + self._filled * STRUCT_BYTES

    def resident_bytes(self) -> int:
        return resident_bytes(self._table_memory)

    def costs(self) -> RepresentationCounters:
        built, descriptor_bytes = self.built()
        return RepresentationCounters(
            bytes_copied=self._copied,
            descriptors_built=built,
            descriptor_bytes=descriptor_bytes,
            metadata_bytes=self._table.bytes,
            pins=self._pins,
            unpins=self._unpins,
            peak_pins=max(self._peak, self._pins - self._unpins),
            merges=self._pins - self._runs,
            iovecs=self._iovecs,
            sgl_descriptors=self._runs,
            pool_waits=self._waits,
            cache_hits=self._hits,
            cache_misses=self._misses,
            cache_write_backs=self._write_backs,
            cached_bytes=len(self._frame_of) * PAGE_BYTES,
            dirty_bytes=len(self._dirty) * PAGE_BYTES,
            poisoned_bytes=len(self.poisoned()) * PAGE_BYTES,
        )
