"""libpmem through ctypes: cache-line write-back for memory that is persistent by itself.

Source: libpmem(7), pmem_flush(3). Only what MAP_SYNC mappings need; the library is optional and
its absence is part of the durability report.
"""

import ctypes
import functools


class LibPmem:
    """`flush` writes back the cache lines of a range; `drain` waits for every flush before it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.pmem_flush.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        library.pmem_flush.restype = None
        library.pmem_drain.argtypes = ()
        library.pmem_drain.restype = None
        library.pmem_has_auto_flush.restype = ctypes.c_int
        self.flush = library.pmem_flush
        self.drain = library.pmem_drain
        self.caches_are_persistent: bool = library.pmem_has_auto_flush() == 1


@functools.cache
def load() -> LibPmem | None:
    """libpmem, or None where it is not installed."""
    try:
        return LibPmem(ctypes.CDLL("libpmem.so.1"))
    except OSError:
        return None
