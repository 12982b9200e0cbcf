"""`pfn`: page frame numbers, 8 bytes a page under I/O, and nothing that stands for the page.

A number can be copied and computed with, but it holds nothing: whoever has a PFN must know by other
means that the page is still there. So the lifetime rule is an external lock: a lease locks its
range, and a page in a locked range is not given back. Dirty pages are marked in a bitmap on the
side, bad ones in a list.

`locking = "none"` leaves the lock out. That is the objection to PFNs in the block layer made into
an option: a discard then takes pages away that a reader still sends from.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from pmblk import pages
from pmblk.media import Media
from pmblk.pages import PAGE_BYTES
from pmblk.representations.base import Lease, Representation, RepresentationCounters, beyond
from pmblk.representations.descriptors import PFN_BYTES, pfns
from pmblk.representations.dirty_map import DirtyMap


class PfnRepresentation(Representation):
    class Options(Representation.Options, frozen=True, forbid_unknown_fields=True):
        """`locking`: "range" keeps discards away from ranges that are read, "none" does not."""

        locking: Literal["range", "none"] = "range"

    kind = "pfn"

    def __init__(self, media: Media, options: Options) -> None:
        super().__init__(media, options)
        self._view = media.view
        self._store = media.store_only
        self._dirty = DirtyMap(-(-media.size // PAGE_BYTES))
        self._locks: set[Lease] | None = set() if options.locking == "range" else None
        self._pins = self._unpins = self._peak = 0
        self._holds = self._writes = self._written = 0
        self.has_windows = media.stores_to_view

    # ---- holding: numbers, and a lock on the range

    def hold(self, offset: int, length: int) -> Lease | None:
        first, count = pages.span(offset, length)
        if self.has_poison:
            self._refuse_poisoned(offset, length)
        lease = Lease([self._view[offset : offset + length]], first, count, pfns(first, count))
        if self._locks is not None:
            self._locks.add(lease)
        self.leases += 1
        self._holds += 1
        self._pins += count
        return lease

    def release(self, leases: Sequence[Lease]) -> None:
        self._peak = max(self._peak, self._pins - self._unpins)
        self.leases -= len(leases)
        if self._locks is not None:
            self._locks.difference_update(leases)
        for lease in leases:
            self._unpins += lease.count

    def busy(self, offset: int, length: int) -> bool:
        first, count = pages.span(offset, length)
        return any(
            lock.first < first + count and first < lock.first + lock.count
            for lock in self._locks or ()
        )

    # ---- writing, and remembering it

    def write(self, offset: int, payload: "memoryview | bytes") -> bool:
        length = len(payload)
        if self.has_poison:
            self._refuse_half_poisoned(offset, length)
        first, count = pages.span(offset, length)
        pfns(first, count)  # dropped: the store is done before anybody could want them
        self._store(offset, payload)
        self._dirty.mark(first, count)
        self._writes += 1
        self._written += count
        if self.has_poison:
            self._heal(offset, length)
        return True

    def stored(self, offset: int, length: int, *, continued: bool) -> None:
        self._dirty.mark(*pages.span(offset, length))
        if continued:
            offset, length = beyond(offset, length, unit=PAGE_BYTES)
        if length:
            first, count = pages.span(offset, length)
            pfns(first, count)
            self._written += count
        self._writes += not continued

    def dirty(self) -> bool:
        return bool(self._dirty)

    def dirty_extents(self) -> Iterator[tuple[int, int]]:
        return self._dirty.extents()

    def write_back(self, offset: int, length: int) -> None:
        first, count = pages.span(offset, length)
        self.media.write_back_pages(first, count)
        self._dirty.clear(first, count)

    def forget(self, offset: int, length: int) -> None:
        super().forget(offset, length)
        gone = pages.whole(offset, length, limit=self.media.size)
        if gone:
            self._dirty.clear(gone.start, len(gone))

    # ---- what it cost

    def built(self) -> tuple[int, int]:
        built = self._pins + self._written
        return built, built * PFN_BYTES

    def resident_bytes(self) -> int:
        return self._dirty.resident_bytes()

    def costs(self) -> RepresentationCounters:
        built, descriptor_bytes = self.built()
        runs = self._holds + self._writes
        return RepresentationCounters(
            descriptors_built=built,
            descriptor_bytes=descriptor_bytes,
            metadata_bytes=self._dirty.bytes,
            pins=self._pins,
            unpins=self._unpins,
            peak_pins=max(self._peak, self._pins - self._unpins),
            merges=built - runs,
            iovecs=self._holds,
            sgl_descriptors=runs,
            dirty_bytes=self._dirty.dirty_bytes(),
            poisoned_bytes=len(self.poisoned()) * PAGE_BYTES,
        )
