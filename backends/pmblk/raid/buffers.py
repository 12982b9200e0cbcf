"""Memory for member I/O: aligned for O_DIRECT and for ISA-L, seen as bytes and as numbers."""

import numpy as np

from pmblk.media.syscalls import anonymous
from pmblk.raid.member import MEMORY_ALIGNMENT
from pmblk.raid.parity import Bytes


def buffer(length: int) -> memoryview:
    """Zeroed memory that is aligned to a page; it lives as long as its views."""
    return memoryview(anonymous(length))


def numbers(view: memoryview) -> Bytes:
    """The same memory, for sums."""
    return np.frombuffer(view, dtype=np.uint8)


def aligned(view: "memoryview | bytes") -> memoryview:
    """The view itself where a device can take it, or else a copy."""
    whole = memoryview(view)
    if numbers(whole).ctypes.data % MEMORY_ALIGNMENT == 0:
        return whole
    copy = buffer(len(whole))
    copy[:] = whole
    return copy
