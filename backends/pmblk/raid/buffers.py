"""Memory for member I/O: aligned for O_DIRECT and for ISA-L, seen as bytes and as numbers.

New memory costs a page fault for each 4 KiB, more than the copy that it is for. So memory that is
filled as a whole anyway (`scratch`) is used again, and only when no view of it is left anywhere: a
thread that hangs has one, and so has whoever sends a reply.
"""

import mmap
import weakref

import numpy as np

from pmblk.media.syscalls import anonymous
from pmblk.raid.member import MEMORY_ALIGNMENT
from pmblk.raid.parity import Bytes

SCRATCH_BYTES_MAX = 1 << 20  # longer ones are rare, and their page faults no larger part of it
FREE_BYTES_MAX = 16 << 20  # of each size, which are powers of two


def buffer(length: int) -> memoryview:
    """Zeroed memory that is aligned to a page; it lives as long as its views."""
    return memoryview(anonymous(length))


def scratch(length: int) -> memoryview:
    """The same, but it holds anything: for what is filled to the last byte before it is used."""
    if not 0 < length <= SCRATCH_BYTES_MAX:
        return buffer(length)
    return _pool.lend(length)[:length]


class _Loan(weakref.ref[Bytes]):
    """Of the array that stands for the memory: every view of the memory keeps it alive."""

    pages: mmap.mmap


class _Pool:
    """Free memory by size. What comes back may come on any thread, in the middle of anything."""

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}
        self._loans: dict[int, _Loan] = {}  # by id: a reference to an array has no hash

    def lend(self, length: int) -> memoryview:
        """At least so many bytes."""
        size = max(MEMORY_ALIGNMENT, 1 << (length - 1).bit_length())
        try:
            pages = self._free[size].pop()
        except (KeyError, IndexError):
            pages = anonymous(size)
        array = numbers(pages)
        loan = _Loan(array, self._take_back)
        loan.pages = pages
        self._loans[id(loan)] = loan
        return array.data

    def _take_back(self, loan: "weakref.ref[Bytes]") -> None:
        assert isinstance(loan, _Loan)
        del self._loans[id(loan)]
        size = len(loan.pages)
        free = self._free.setdefault(size, [])
        if len(free) < FREE_BYTES_MAX // size:
            free.append(loan.pages)


_pool = _Pool()


def numbers(view: "memoryview | mmap.mmap") -> Bytes:
    """The same memory, for sums."""
    return np.frombuffer(view, dtype=np.uint8)


def aligned(view: "memoryview | bytes") -> memoryview:
    """The view itself where a device can take it, or else a copy."""
    whole = memoryview(view)
    if numbers(whole).ctypes.data % MEMORY_ALIGNMENT == 0:
        return whole
    copy = scratch(len(whole))
    copy[:] = whole
    return copy
