"""`extent`: one {address, length} for each contiguous run, whatever its size.

A namespace that is mapped whole is one run, so any I/O is one descriptor, no byte is copied and
nothing is kept for a page: a lease is a slice of the mapping and one count on its extent. The price
is that the extent is also the unit of lifetime: while one reader holds a byte of it, none of it can
be given back. What is written is written back at once, so there is no dirty state to remember.

`fragments = N` cuts the namespace into N extents of equal size, as a device that is mapped in
pieces would have them; an I/O over a border is split there.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

from pmblk.media import Media
from pmblk.pages import PAGE_BYTES, PAGE_SHIFT
from pmblk.ranges import overlap, whole_units
from pmblk.representations.base import (
    Lease,
    Representation,
    RepresentationCounters,
    poison_error,
)

DESCRIPTOR_BYTES = 16  # address, length
FRAGMENTS_MAX = 1 << 20


class ExtentRepresentation(Representation):
    class Options(Representation.Options, frozen=True, forbid_unknown_fields=True):
        """`fragments`: how many extents the namespace is made of; each has whole pages."""

        fragments: int = 1

        def __post_init__(self) -> None:
            if not 1 <= self.fragments <= FRAGMENTS_MAX:
                raise ValueError(f"fragments {self.fragments} is not in 1 to {FRAGMENTS_MAX}")

    kind = "extent"

    @classmethod
    def over(cls, media: Media, options: Any) -> "ExtentRepresentation":
        return cls(media, options) if options.fragments == 1 else FragmentedExtents(media, options)

    def __init__(self, media: Media, options: Options) -> None:
        super().__init__(media, options)
        self._view = media.view
        self._store = media.store
        self._follow = media.stored if media.durability.follows_stores else None
        self._poison: list[tuple[int, int]] = []  # bad extents (offset, length), sorted, apart
        self._released = self._writes = self._peak = 0
        self.has_windows = media.stores_to_view

    # ---- holding: one count for the one extent

    def hold(self, offset: int, length: int) -> Lease | None:
        if self.has_poison:
            self._refuse_poisoned(offset, length)
        self.leases += 1
        return Lease([self._view[offset : offset + length]])

    def release(self, leases: Sequence[Lease]) -> None:
        # Between two releases the count only grows, so here is where its peaks are.
        if self.leases > self._peak:
            self._peak = self.leases
        self.leases -= len(leases)
        self._released += len(leases)

    def busy(self, offset: int, length: int) -> bool:
        return self.leases > 0

    def lifetime_unit(self, offset: int, length: int) -> tuple[int, int]:
        return 0, self.media.size

    # ---- writing

    def write(self, offset: int, payload: "memoryview | bytes") -> bool:
        if self.has_poison:
            self._refuse_half_poisoned(offset, len(payload))
        self._store(offset, payload)
        self._writes += 1
        if self.has_poison:
            self._heal(offset, len(payload))
        return True

    def stored(self, offset: int, length: int, *, continued: bool) -> None:
        if self._follow is not None:
            self._follow(offset, length)
        if not continued:
            self._writes += 1

    # ---- poison: extents again, a bad one for each run of bad pages

    def poison(self, first: int, count: int) -> None:
        offset, length = first << PAGE_SHIFT, count << PAGE_SHIFT
        if self._is_bad(offset, length):
            self._cut_out(offset, offset + length)
        insort(self._poison, (offset, length))
        self.has_poison = True

    def poisoned(self) -> list[int]:
        return [
            page
            for offset, length in self._poison
            for page in range(offset >> PAGE_SHIFT, (offset + length) >> PAGE_SHIFT)
        ]

    def _heal(self, offset: int, length: int) -> None:
        start, end = whole_units(offset, length, unit=PAGE_BYTES, limit=self.media.size)
        end = -(-end // PAGE_BYTES) * PAGE_BYTES
        if start < end and self._is_bad(start, end - start):
            self._cut_out(start, end)
            self.has_poison = bool(self._poison)

    def _cut_out(self, start: int, end: int) -> None:
        left: list[tuple[int, int]] = []
        for offset, length in self._poison:
            if offset < start:
                left.append((offset, min(length, start - offset)))
            if offset + length > end:
                begin = max(offset, end)
                left.append((begin, offset + length - begin))
        self._poison = left

    def _refuse_poisoned(self, offset: int, length: int) -> None:
        if self._is_bad(offset, length):
            raise poison_error(offset, length)

    def _is_bad(self, offset: int, length: int) -> bool:
        """The last bad extent that starts before the end of the range is the one to look at."""
        index = bisect_left(self._poison, (offset + length, 0))
        return bool(index) and overlap(offset, length, *self._poison[index - 1])

    # ---- what it cost

    def built(self) -> tuple[int, int]:
        built = self._released + self.leases + self._writes
        return built, built * DESCRIPTOR_BYTES

    def costs(self) -> RepresentationCounters:
        pins = self._released + self.leases
        built, descriptor_bytes = self.built()
        return RepresentationCounters(
            descriptors_built=built,
            descriptor_bytes=descriptor_bytes,
            metadata_bytes=self.resident_bytes(),
            pins=pins,
            unpins=self._released,
            peak_pins=max(self._peak, self.leases),
            iovecs=pins,
            sgl_descriptors=built,
            poisoned_bytes=len(self.poisoned()) * PAGE_BYTES,
        )

    def resident_bytes(self) -> int:
        return DESCRIPTOR_BYTES


class FragmentedExtents(ExtentRepresentation):
    """Several extents: a table of their starts, a count for each, and I/Os that are cut."""

    def __init__(self, media: Media, options: ExtentRepresentation.Options) -> None:
        super().__init__(media, options)
        pages = -(-media.size // PAGE_BYTES)
        count = min(options.fragments, pages)
        self._starts = [index * pages // count * PAGE_BYTES for index in range(count)]
        self._ends = [*self._starts[1:], media.size]
        self._holders = [0] * count
        self._pins = self._unpins = self._splits = self._iovecs = self._stored = 0

    def _touched(self, offset: int, length: int) -> range:
        first = bisect_left(self._starts, offset + 1) - 1
        return range(first, bisect_left(self._starts, offset + length, first))

    def hold(self, offset: int, length: int) -> Lease | None:
        if self.has_poison:
            self._refuse_poisoned(offset, length)
        touched = self._touched(offset, length)
        end = offset + length
        views = []
        for index in touched:
            self._holders[index] += 1
            start = max(offset, self._starts[index])
            views.append(self._view[start : min(end, self._ends[index])])
        self.leases += 1
        self._pins += len(touched)
        self._iovecs += len(touched)
        self._splits += len(touched) - 1
        return Lease(views, touched.start, len(touched))

    def release(self, leases: Sequence[Lease]) -> None:
        self._peak = max(self._peak, self._pins - self._unpins)
        self.leases -= len(leases)
        for lease in leases:
            self._unpins += lease.count
            for index in range(lease.first, lease.first + lease.count):
                self._holders[index] -= 1

    def busy(self, offset: int, length: int) -> bool:
        return any(self._holders[index] for index in self._touched(offset, length))

    def lifetime_unit(self, offset: int, length: int) -> tuple[int, int]:
        touched = self._touched(offset, length)
        start = self._starts[touched.start]
        return start, self._ends[touched.stop - 1] - start

    def write(self, offset: int, payload: "memoryview | bytes") -> bool:
        super().write(offset, payload)
        self._count_stored(offset, len(payload), continued=False)
        return True

    def stored(self, offset: int, length: int, *, continued: bool) -> None:
        super().stored(offset, length, continued=continued)
        self._count_stored(offset, length, continued=continued)

    def _count_stored(self, offset: int, length: int, *, continued: bool) -> None:
        """The extents that are new to this write; all but its first are cuts."""
        touched = self._touched(offset, length)
        new = len(touched)
        if continued and offset != self._starts[touched.start]:
            new -= 1
        self._stored += new
        self._splits += new if continued else new - 1

    def built(self) -> tuple[int, int]:
        built = self._pins + self._stored
        return built, built * DESCRIPTOR_BYTES

    def resident_bytes(self) -> int:
        return len(self._starts) * DESCRIPTOR_BYTES

    def costs(self) -> RepresentationCounters:
        counters = super().costs()
        counters.sgl_descriptors = counters.descriptors_built
        counters.pins, counters.unpins = self._pins, self._unpins
        counters.peak_pins = max(self._peak, self._pins - self._unpins)
        counters.splits, counters.iovecs = self._splits, self._iovecs
        return counters
