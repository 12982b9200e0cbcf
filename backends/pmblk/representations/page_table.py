"""Page structs of 64 bytes, packed in one piece of memory: what Linux calls the memory map.

A struct has the fields of Linux's `struct page` that a block path uses, at the places where x86-64
has them: flags, an index, the reference count. One module for everybody who keeps page structs:
one for every page of the device, one for every page under I/O, or one for every frame of a cache.

Up to `SCALAR_PAGES` structs are gone through with plain ints, more with numpy: a numpy call costs
about 0.8 us whatever its length, a struct 0.06 us, so they meet at 16 (Python 3.11).

Source: include/linux/mm_types.h and page-flags.h of Linux 6.14, x86-64 with everything configured.
"""

import ctypes
from typing import Any

import numpy as np

from pmblk.page_runs import SCALAR_PAGES

STRUCT_BYTES = 64

PAGE = np.dtype(
    {
        "names": ["flags", "index", "refcount"],
        "formats": ["<u8", "<u8", "<i4"],
        "offsets": [0, 32, 52],
        "itemsize": STRUCT_BYTES,
    }
)
assert PAGE.itemsize == STRUCT_BYTES

REFERENCED = 1 << 2
DIRTY = 1 << 4
RESERVED = 1 << 13
HWPOISON = 1 << 21

WORDS = STRUCT_BYTES // 8  # a struct's flags are word_items[at * WORDS]
HALVES = STRUCT_BYTES // 4  # its references are half_items[at * HALVES + REFCOUNT_HALF]
REFCOUNT_HALF = 52 // 4
_INDEX_WORD = 32 // 8


class PageTable:
    """`memory` is a writable buffer of whole structs, all zero at first."""

    def __init__(self, memory: Any) -> None:
        words = memoryview(memory)
        self.bytes = len(words)
        self.count = len(words) // STRUCT_BYTES
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        # For few structs: items by index.
        self.word_items = words.cast("Q")
        self.half_items = words.cast("i")
        # For many: the same memory, a field at a time.
        structs = np.frombuffer(memory, dtype=PAGE)
        self.flags = structs["flags"]
        self.index = structs["index"]
        self.refcounts = structs["refcount"]

    # ---- one struct

    def set_one(self, at: int, *, index: int, flags: int = 0, refcount: int = 0) -> None:
        """Make a struct at rest somebody's."""
        self.word_items[at * WORDS] = flags
        self.word_items[at * WORDS + _INDEX_WORD] = index
        self.half_items[at * HALVES + REFCOUNT_HALF] = refcount

    def index_of(self, at: int) -> int:
        return self.word_items[at * WORDS + _INDEX_WORD]

    def unpin_one(self, at: int) -> int:
        """Drop a reference; how many are left."""
        place = at * HALVES + REFCOUNT_HALF
        left = self.half_items[place] - 1
        self.half_items[place] = left
        return left

    # ---- a run of structs

    def pin(self, first: int, count: int) -> None:
        if count > SCALAR_PAGES:
            self.refcounts[first : first + count] += 1
            return
        refcounts = self.half_items
        start = first * HALVES + REFCOUNT_HALF
        for at in range(start, start + count * HALVES, HALVES):
            refcounts[at] += 1

    def unpin(self, first: int, count: int) -> None:
        if count > SCALAR_PAGES:
            self.refcounts[first : first + count] -= 1
            return
        refcounts = self.half_items
        start = first * HALVES + REFCOUNT_HALF
        for at in range(start, start + count * HALVES, HALVES):
            refcounts[at] -= 1

    def pinned(self, first: int, count: int) -> bool:
        """Whether anybody holds one of them."""
        return bool(self.refcounts[first : first + count].any())

    def set_flags(self, first: int, count: int, bits: int) -> None:
        if count > SCALAR_PAGES:
            self.flags[first : first + count] |= np.uint64(bits)
            return
        flags = self.word_items
        for at in range(first * WORDS, (first + count) * WORDS, WORDS):
            flags[at] |= bits

    def clear_flags(self, first: int, count: int, bits: int) -> None:
        mask = ~bits & 0xFFFF_FFFF_FFFF_FFFF
        if count > SCALAR_PAGES:
            self.flags[first : first + count] &= np.uint64(mask)
            return
        flags = self.word_items
        for at in range(first * WORDS, (first + count) * WORDS, WORDS):
            flags[at] &= mask

    def any_flags(self, first: int, count: int, bits: int) -> bool:
        """Whether one of them has one of the bits."""
        if count > SCALAR_PAGES:
            return bool(np.bitwise_or.reduce(self.flags[first : first + count]) & np.uint64(bits))
        flags = self.word_items
        return any(flags[at] & bits for at in range(first * WORDS, (first + count) * WORDS, WORDS))

    def with_flags(self, first: int, count: int, bits: int) -> Any:
        """The structs of the run that have one of the bits: an array of their numbers."""
        return np.flatnonzero(self.flags[first : first + count] & np.uint64(bits)) + first

    def fill_flags(self, bits: int) -> None:
        """Give every struct these flags, and with that memory."""
        self.flags[:] = bits
