"""`struct-page`: a page struct of 64 bytes for every 4 KiB of the device, as long as it is open.

Everything about a page is written in its struct: who holds it (a reference count), whether it is
dirty, whether its memory is bad. A lease is one reference on each page. The price is the table:
1/64 of the device, 6.25 GiB for 400 GiB.

`memmap` says where the table lies: "dram", or "device", in the reserve of the file
(`pmblk.media.reserve`). `init` says when its memory is taken: "lazy", as pages are used, or
"eager", all at the start, as the kernel does. `compound = "2MiB"` keeps one reference count, one
dirty and one poison mark for each 2 MiB, in the head struct; of the eight pages that the structs of
2 MiB fill, two stay, as the kernel leaves when it folds equal tails, so the table is a quarter.

Dirty pages and held ones are found again by a coarse index of 2 MiB sections, as the tags of
Linux's page tree: most structs of a large device have no memory, and a look at them must not give
them any.
Sources: Documentation/mm/vmemmap_dedup.rst, include/linux/page-flags.h.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pmblk import page_runs, pages
from pmblk.media import Media
from pmblk.media.syscalls import resident_bytes
from pmblk.pages import PAGE_BYTES
from pmblk.ranges import round_out
from pmblk.representations import table_memory
from pmblk.representations.base import Lease, Representation, RepresentationCounters, beyond
from pmblk.representations.descriptors import BVEC_BYTES, bvecs
from pmblk.representations.page_table import (
    DIRTY,
    HWPOISON,
    RESERVED,
    STRUCT_BYTES,
    PageTable,
)

SECTION_PAGES = 512
SECTION_BYTES = SECTION_PAGES * PAGE_BYTES  # 2 MiB
SECTION_STRUCTS_KEPT = 128  # of 512, when compound: two pages of structs of eight


class StructPageRepresentation(Representation):
    class Options(Representation.Options, frozen=True, forbid_unknown_fields=True):
        """`memmap`: where the table lies; `init`: when it takes memory; `compound`: its grain."""

        memmap: Literal["dram", "device"] = "dram"
        init: Literal["lazy", "eager"] = "lazy"
        compound: Literal["none", "2MiB"] = "none"

    kind = "struct-page"
    section_structs = SECTION_PAGES  # in the table, for each section
    unit_bytes = PAGE_BYTES  # what one struct stands for

    @classmethod
    def over(cls, media: Media, options: Any) -> "StructPageRepresentation":
        chosen = CompoundStructPage if options.compound == "2MiB" else cls
        return chosen(media, options)

    def __init__(self, media: Media, options: Options) -> None:
        super().__init__(media, options)
        self._pages = -(-media.size // PAGE_BYTES)
        structs = self._structs_needed()
        eager = options.init == "eager"
        self._on_device = options.memmap == "device"
        self._memory = (
            table_memory.on_device(media, structs, eager=eager)
            if self._on_device
            else table_memory.in_dram(media, structs, eager=eager)
        )
        self._table = PageTable(self._memory)
        if eager:
            self._table.fill_flags(RESERVED)
        sections = -(-self._pages // SECTION_PAGES)
        self._dirty_sections = bytearray(sections)
        self._held_sections = bytearray(sections)  # those that may be held
        self._view = media.view
        self._store = media.store_only
        self._pins = self._unpins = self._peak = 0
        self._built = self._holds = self._writes = 0
        self.has_windows = media.stores_to_view

    # ---- which structs, and what names them to a block layer

    def _structs_needed(self) -> int:
        return self._pages

    def _structs(self, first: int, count: int) -> Sequence[tuple[int, int]]:
        """The runs of structs (first, count) that stand for a run of pages."""
        return ((first, count),)

    def _bvecs(self, offset: int, length: int, first: int, count: int) -> Any:
        start = self._table.address + first * STRUCT_BYTES
        structs = range(start, start + count * STRUCT_BYTES, STRUCT_BYTES)
        return bvecs(offset, length, structs)

    def _describe(self, offset: int, length: int) -> tuple[int, int, Any]:
        """First page, count, and the bio_vecs; the structs have memory after it. Raises OSError."""
        first, count = pages.span(offset, length)
        if self._on_device:
            self._reserve_structs(first, count)
        vector = self._bvecs(offset, length, first, count)
        self._built += len(vector)
        return first, count, vector

    def _reserve_structs(self, first: int, count: int) -> None:
        """Memory on the device for the structs of these pages. Raises OSError.

        For whole sections, since dirty ones are looked through as a whole; and on tmpfs a load from
        a hole allocates, or is SIGBUS.
        """
        unit = self.section_structs * STRUCT_BYTES
        for start, structs in self._structs(first, count):
            place, span = round_out(start * STRUCT_BYTES, structs * STRUCT_BYTES, unit=unit)
            self.media.reserve(self.media.size + place, min(span, self._table.bytes - place))

    # ---- holding: a reference on each page

    def hold(self, offset: int, length: int) -> Lease | None:
        if self.has_poison:
            self._refuse_poisoned(offset, length)
        first, count, vector = self._describe(offset, length)
        self._pin(first, count)
        _mark(self._held_sections, first, count)
        self.leases += 1
        self._holds += 1
        return Lease([self._view[offset : offset + length]], first, count, vector)

    def release(self, leases: Sequence[Lease]) -> None:
        self._peak = max(self._peak, self._pins - self._unpins)
        self.leases -= len(leases)
        for lease in leases:
            self._unpin(lease.first, lease.count)

    def busy(self, offset: int, length: int) -> bool:
        if not self.leases:
            return False
        first, count = pages.span(offset, length)
        for section in _marked(self._held_sections, first, count):
            start = max(first, section * SECTION_PAGES)
            end = min(first + count, (section + 1) * SECTION_PAGES)
            if any(self._table.pinned(*run) for run in self._structs(start, end - start)):
                return True
            if end - start == SECTION_PAGES:
                self._held_sections[section] = 0
        return False

    def _pin(self, first: int, count: int) -> None:
        for start, structs in self._structs(first, count):
            self._table.pin(start, structs)
            self._pins += structs

    def _unpin(self, first: int, count: int) -> None:
        for start, structs in self._structs(first, count):
            self._table.unpin(start, structs)
            self._unpins += structs

    # ---- writing, and the dirty marks

    def write(self, offset: int, payload: "memoryview | bytes") -> bool:
        length = len(payload)
        if self.has_poison:
            self._refuse_half_poisoned(offset, length)
        first, count, _dropped = self._describe(offset, length)  # the store needs no bio_vecs
        self._pin(first, count)
        try:
            self._store(offset, payload)
        finally:
            self._unpin(first, count)
        self._mark_dirty(first, count)
        self._writes += 1
        if self.has_poison:
            self._heal(offset, length)
        return True

    def window(self, offset: int, length: int) -> memoryview | None:
        if self._on_device:  # `stored` cannot fail any more
            self._reserve_structs(*pages.span(offset, length))
        return super().window(offset, length)

    def stored(self, offset: int, length: int, *, continued: bool) -> None:
        self._mark_dirty(*pages.span(offset, length))
        if continued:
            offset, length = beyond(offset, length, unit=self.unit_bytes)
        if length:
            self._describe(offset, length)
        self._writes += not continued

    def _mark_dirty(self, first: int, count: int) -> None:
        for start, structs in self._structs(first, count):
            self._table.set_flags(start, structs, DIRTY)
        _mark(self._dirty_sections, first, count)

    def dirty(self) -> bool:
        return 1 in self._dirty_sections

    def dirty_extents(self) -> Iterator[tuple[int, int]]:
        for section in _marked(self._dirty_sections, 0, self._pages):
            yield from self._dirty_in(section)
            if not self._dirty_in(section):
                self._dirty_sections[section] = 0

    def _dirty_in(self, section: int) -> list[tuple[int, int]]:
        first = section * SECTION_PAGES
        count = min(SECTION_PAGES, self._pages - first)
        return page_runs.extents(self._table.with_flags(first, count, DIRTY))

    def write_back(self, offset: int, length: int) -> None:
        first, count = pages.span(offset, length)
        self.media.write_back_pages(first, count)
        self._mark_clean(first, count)

    def forget(self, offset: int, length: int) -> None:
        super().forget(offset, length)
        gone = pages.whole(offset, length, limit=self.media.size)
        if gone:
            self._mark_clean(gone.start, len(gone))

    def _mark_clean(self, first: int, count: int) -> None:
        """Only in dirty sections: the other structs may have no memory, and need none.

        The mark of the section stays until `dirty_extents` has found nothing there.
        """
        for section in _marked(self._dirty_sections, first, count):
            start = max(first, section * SECTION_PAGES)
            end = min(first + count, (section + 1) * SECTION_PAGES)
            self._table.clear_flags(start, end - start, DIRTY)

    # ---- poison: a mark in the struct; the list is for those who want all of them

    def poison(self, first: int, count: int) -> None:
        if self._on_device:
            self._reserve_structs(first, count)
        super().poison(first, count)
        for start, structs in self._structs(first, count):
            self._table.set_flags(start, structs, HWPOISON)

    def _heal(self, offset: int, length: int) -> None:
        for page in self._bad_in(pages.whole(offset, length, limit=self.media.size)):
            self._table.clear_flags(page, 1, HWPOISON)
        super()._heal(offset, length)

    def _refuse_poisoned(self, offset: int, length: int) -> None:
        first, count = pages.span(offset, length)
        if self._on_device:
            self._reserve_structs(first, count)
        if any(self._table.any_flags(*run, HWPOISON) for run in self._structs(first, count)):
            super()._refuse_poisoned(offset, length)

    # ---- what it cost

    def built(self) -> tuple[int, int]:
        return self._built, self._built * BVEC_BYTES

    def resident_bytes(self) -> int:
        return 0 if self._on_device else resident_bytes(self._memory)

    def costs(self) -> RepresentationCounters:
        built, descriptor_bytes = self.built()
        runs = self._holds + self._writes
        return RepresentationCounters(
            descriptors_built=built,
            descriptor_bytes=descriptor_bytes,
            metadata_bytes=self._table.bytes,
            metadata_device_bytes=self._table.bytes if self._on_device else 0,
            pins=self._pins,
            unpins=self._unpins,
            peak_pins=max(self._peak, self._pins - self._unpins),
            merges=self._built - runs,
            iovecs=self._holds,
            sgl_descriptors=runs,
            dirty_bytes=min(self._dirty_sections.count(1) * SECTION_BYTES, self.media.size),
            poisoned_bytes=len(self.poisoned()) * PAGE_BYTES,
        )

    def close(self) -> None:
        super().close()
        if self._on_device:
            self.media.reserve_user = ""


class CompoundStructPage(StructPageRepresentation):
    """One head struct for each 2 MiB: fewer descriptors and references, and coarser marks.

    A flush writes back 2 MiB where one page is dirty, and while one page is held none of its 2 MiB
    can be given back. Bad pages are still single ones: the head says that there are some, the list
    says which.
    """

    section_structs = SECTION_STRUCTS_KEPT
    unit_bytes = SECTION_BYTES

    def _structs_needed(self) -> int:
        return -(-self._pages // SECTION_PAGES) * SECTION_STRUCTS_KEPT

    def _structs(self, first: int, count: int) -> Sequence[tuple[int, int]]:
        sections = range(first // SECTION_PAGES, (first + count - 1) // SECTION_PAGES + 1)
        return [(section * SECTION_STRUCTS_KEPT, 1) for section in sections]

    def _bvecs(self, offset: int, length: int, first: int, count: int) -> Any:
        """One for each 2 MiB, with an offset inside them."""
        vector, end = [], offset + length
        for struct, _ in self._structs(first, count):
            stop = min(end, offset - offset % SECTION_BYTES + SECTION_BYTES)
            address = self._table.address + struct * STRUCT_BYTES
            vector.append((address, stop - offset, offset % SECTION_BYTES))
            offset = stop
        return vector

    def lifetime_unit(self, offset: int, length: int) -> tuple[int, int]:
        return round_out(offset, length, unit=SECTION_BYTES)

    def _dirty_in(self, section: int) -> list[tuple[int, int]]:
        if not self._table.any_flags(section * SECTION_STRUCTS_KEPT, 1, DIRTY):
            return []
        offset = section * SECTION_BYTES
        return [(offset, min(SECTION_BYTES, self.media.size - offset))]

    def write_back(self, offset: int, length: int) -> None:
        """All of each 2 MiB, whatever the range: there is one mark for them."""
        start, span = round_out(offset, length, unit=SECTION_BYTES)
        span = min(span, self.media.size - start)
        self.media.write_back_pages(*pages.span(start, span))
        for struct, _ in self._structs(*pages.span(start, span)):
            self._table.clear_flags(struct, 1, DIRTY)
            self._dirty_sections[struct // SECTION_STRUCTS_KEPT] = 0

    def _mark_clean(self, first: int, count: int) -> None:
        """A 2 MiB whose pages are all gone is clean; one that lost only some may not be."""
        for section in _marked(self._dirty_sections, first, count):
            whole = section * SECTION_PAGES, min((section + 1) * SECTION_PAGES, self._pages)
            if first <= whole[0] and whole[1] <= first + count:
                self._table.clear_flags(section * SECTION_STRUCTS_KEPT, 1, DIRTY)
                self._dirty_sections[section] = 0

    def _heal(self, offset: int, length: int) -> None:
        healed = self._bad_in(pages.whole(offset, length, limit=self.media.size))
        Representation._heal(self, offset, length)
        for section in {page // SECTION_PAGES for page in healed}:
            first = section * SECTION_PAGES
            if not self._bad_in(range(first, first + SECTION_PAGES)):
                self._table.clear_flags(section * SECTION_STRUCTS_KEPT, 1, HWPOISON)


# ---- a byte for each section: whether to look there


def _mark(sections: bytearray, first: int, count: int) -> None:
    """Those that a run of pages touches."""
    section, last = first // SECTION_PAGES, (first + count - 1) // SECTION_PAGES
    while section <= last:
        sections[section] = 1
        section += 1


def _marked(sections: bytearray, first: int, count: int) -> Iterator[int]:
    """The marked ones that a run of pages touches, in order."""
    end = (first + count - 1) // SECTION_PAGES + 1
    section = sections.find(1, first // SECTION_PAGES, end)
    while section >= 0:
        yield section
        section = sections.find(1, section + 1, end)
