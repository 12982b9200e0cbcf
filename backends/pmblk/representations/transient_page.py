"""`transient-page`: a page struct for a page only while it is under I/O, from a bounded pool.

An I/O takes a struct for each page that has none yet and a reference on it; the last reference
returns the struct. So the memory for structs is bounded by what is in flight, and the price is paid
for each I/O: look the pages up, take, fill and return their structs. When the pool is empty the I/O
waits, which is back-pressure and never an error.

A struct that is gone remembers nothing. What is written is therefore written back before the
struct is returned, and bad pages are kept in a list, from which a new struct gets its mark.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from pmblk import pages
from pmblk.media import Media
from pmblk.media.syscalls import resident_bytes
from pmblk.page_runs import SCALAR_PAGES
from pmblk.pages import PAGE_BYTES
from pmblk.representations.base import Lease, Representation, RepresentationCounters, beyond
from pmblk.representations.descriptors import BVEC_BYTES, bvecs
from pmblk.representations.page_table import STRUCT_BYTES, PageTable
from pmblk.representations.table_memory import for_structs

POOL_PAGES_MIN = 256  # 1 MiB in flight


class TransientPageRepresentation(Representation):
    class Options(Representation.Options, frozen=True, forbid_unknown_fields=True):
        """`pool_pages`: how many pages can be under I/O at once."""

        pool_pages: int = 16384

        def __post_init__(self) -> None:
            if not POOL_PAGES_MIN <= self.pool_pages <= 1 << 24:
                raise ValueError(f"pool_pages {self.pool_pages} is not in {POOL_PAGES_MIN} to 2^24")

    kind = "transient-page"
    io_bytes_max: int

    def __init__(self, media: Media, options: Options) -> None:
        super().__init__(media, options)
        self.io_bytes_max = options.pool_pages * PAGE_BYTES // 4  # others need structs too
        self._memory = for_structs(options.pool_pages)
        self._pool = PageTable(self._memory)
        self._free = list(range(options.pool_pages - 1, -1, -1))
        self._struct_of: dict[int, int] = {}  # page under I/O -> its struct
        self._view = media.view
        self._store = media.store
        self._pins = self._unpins = self._peak = self._structs_peak = 0
        self._holds = self._writes = self._waits = 0
        self._filled = 0  # structs, so far
        self.has_windows = media.stores_to_view

    # ---- holding: structs taken and returned

    def hold(self, offset: int, length: int) -> Lease | None:
        if length > self.io_bytes_max:
            return None
        if self.has_poison:
            self._refuse_poisoned(offset, length)
        lease = self._describe(offset, length)
        if lease is not None:
            lease.views.append(self._view[offset : offset + length])
            self.leases += 1
            self._holds += 1
        return lease

    def release(self, leases: Sequence[Lease]) -> None:
        self.leases -= len(leases)
        for lease in leases:
            self._return(lease)

    def busy(self, offset: int, length: int) -> bool:
        first, count = pages.span(offset, length)
        touched = range(first, first + count)
        if len(self._struct_of) < count:
            return any(page in touched for page in self._struct_of)
        return not self._struct_of.keys().isdisjoint(touched)

    def _describe(self, offset: int, length: int) -> Lease | None:
        """A reference on the struct of every page; None, and nothing taken, when too few are left.

        `Lease.descriptors` are the structs and the bio_vecs that name them.
        """
        first, count = pages.span(offset, length)
        touched = range(first, first + count)
        if self._struct_of.keys().isdisjoint(touched):
            if len(self._free) < count:
                self._waits += 1
                return None
            structs = self._free[-count:]
            del self._free[-count:]
            self._struct_of.update(zip(touched, structs, strict=True))
            self._fill(structs, first)
        else:
            found = self._share(touched)
            if found is None:
                self._waits += 1
                return None
            structs = found
        self._pins += count
        addresses = self._addresses(structs)
        return Lease([], first, count, (structs, bvecs(offset, length, addresses)))

    def _fill(self, structs: list[int], first: int) -> None:
        """Make new structs the pages' own, with one reference each."""
        pool = self._pool
        self._filled += len(structs)
        if len(structs) > SCALAR_PAGES:
            at = np.array(structs)
            pool.refcounts[at] = 1
            pool.index[at] = np.arange(first, first + len(structs))
            return
        for index, struct in enumerate(structs, first):
            pool.set_one(struct, index=index, refcount=1)

    def _share(self, touched: range) -> list[int] | None:
        """Some pages have a struct already: another I/O is on them."""
        missing = sum(page not in self._struct_of for page in touched)
        if len(self._free) < missing:
            return None
        structs = []
        for page in touched:
            struct = self._struct_of.get(page)
            if struct is None:
                struct = self._struct_of[page] = self._free.pop()
                self._filled += 1
                self._pool.set_one(struct, index=page, refcount=1)
            else:
                self._pool.pin(struct, 1)
            structs.append(struct)
        return structs

    def _addresses(self, structs: list[int]) -> Any:
        base = self._pool.address
        if len(structs) > SCALAR_PAGES:
            return np.array(structs) * STRUCT_BYTES + base
        return [base + struct * STRUCT_BYTES for struct in structs]

    def _return(self, lease: Lease) -> None:
        """Drop a reference on each struct; the last one frees it."""
        structs = lease.descriptors[0]
        pool = self._pool
        # Between two returns the counts only grow, so here is where their peaks are.
        self._peak = max(self._peak, self._pins - self._unpins)
        self._structs_peak = max(self._structs_peak, len(self._struct_of))
        self._unpins += lease.count
        if lease.count > SCALAR_PAGES:
            at = np.array(structs)
            pool.refcounts[at] -= 1
            if not pool.refcounts[at].any():
                touched = range(lease.first, lease.first + lease.count)
                deque(map(self._struct_of.pop, touched), maxlen=0)
                self._free += reversed(structs)
                return
            last = [struct for struct in structs if pool.refcounts[struct] == 0]
        else:
            last = [struct for struct in structs if pool.unpin_one(struct) == 0]
        for struct in last:
            del self._struct_of[pool.index_of(struct)]
            self._free.append(struct)

    # ---- writing

    def write(self, offset: int, payload: "memoryview | bytes") -> bool:
        length = len(payload)
        if length > self.io_bytes_max:
            return False
        if self.has_poison:
            self._refuse_half_poisoned(offset, length)
        lease = self._describe(offset, length)
        if lease is None:
            return False
        try:
            self._store(offset, payload)
        finally:
            self._return(lease)
        self._writes += 1
        if self.has_poison:
            self._heal(offset, length)
        return True

    def window(self, offset: int, length: int) -> memoryview | None:
        if len(self._free) < length // PAGE_BYTES + 2:
            return None
        return super().window(offset, length)

    def stored(self, offset: int, length: int, *, continued: bool) -> None:
        self.media.stored(offset, length)
        if continued:
            offset, length = beyond(offset, length, unit=PAGE_BYTES)
        if length:
            lease = self._describe(offset, length)
            assert lease is not None, "window saw to it, and nobody else ran since"
            self._return(lease)
        self._writes += not continued

    # ---- what it cost

    def built(self) -> tuple[int, int]:
        return self._pins, self._pins * BVEC_BYTES + self._filled * STRUCT_BYTES

    def resident_bytes(self) -> int:
        return resident_bytes(self._memory)

    def costs(self) -> RepresentationCounters:
        runs = self._holds + self._writes
        built, descriptor_bytes = self.built()
        return RepresentationCounters(
            descriptors_built=built,
            descriptor_bytes=descriptor_bytes,
            metadata_bytes=self._pool.bytes,
            pins=self._pins,
            unpins=self._unpins,
            peak_pins=max(self._peak, self._pins - self._unpins),
            merges=built - runs,
            iovecs=self._holds,
            sgl_descriptors=runs,
            pool_waits=self._waits,
            pool_peak_bytes=max(self._structs_peak, len(self._struct_of)) * STRUCT_BYTES,
            poisoned_bytes=len(self.poisoned()) * PAGE_BYTES,
        )
