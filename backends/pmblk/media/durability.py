"""What a completed write needs before it survives a power cut: found out, never assumed.

Three levels. `pmem`: the mapping took MAP_SYNC, so stores reach persistent memory itself once
their cache lines are written back. `memory`: the file lives in DRAM; nothing to do, and power
takes it. `file`: the page cache stands between; msync or fdatasync.

Sources: mmap(2) on MAP_SYNC, libpmem(7), fsync(2).
"""

import abc
import ctypes
import mmap
import os
from typing import ClassVar

from pmblk.media import libpmem, syscalls

MAP_SHARED_VALIDATE = 0x03
MAP_SYNC = 0x80000
IN_MEMORY = frozenset({"tmpfs", "hugetlbfs", "ramfs"})


class Durability(abc.ABC):
    """One level over one mapping.

    `stored` runs after every store and must be cheap; `sync` may block, and then runs off the
    event loop (`sync_blocks`). A level that needs no call after a store says so in
    `follows_stores`.
    """

    level: ClassVar[str]
    follows_stores: ClassVar[bool] = False

    def __init__(self, reason: str) -> None:
        self.reason = reason

    @property
    @abc.abstractmethod
    def sync_blocks(self) -> bool:
        """Whether `sync` has anything to wait for right now."""

    @abc.abstractmethod
    def sync(self) -> None:
        """All that was stored before this call is durable after it. Raises OSError."""

    def stored(self, offset: int, length: int) -> None:
        """A store to the mapping was made."""

    def layout_changed(self) -> None:
        """Blocks were reserved or given back: metadata that no cache-line flush makes durable."""


class InMemory(Durability):
    level = "memory"
    sync_blocks = False

    def sync(self) -> None:
        pass


class PageCached(Durability):
    level = "file"
    sync_blocks = True

    def __init__(self, reason: str, *, fd: int) -> None:
        super().__init__(reason)
        self._fd = fd

    def sync(self) -> None:
        """fdatasync writes the dirty pages of shared mappings too, as msync would."""
        os.fdatasync(self._fd)


class PersistentMemory(Durability):
    """Lines are written back at each store, so a flush is one fence and there is no dirty state.

    Only a change of the file's layout needs the file system, and only the next sync pays for it.
    """

    level = "pmem"
    follows_stores = True

    def __init__(self, reason: str, *, fd: int, address: int, library: libpmem.LibPmem) -> None:
        super().__init__(reason)
        self._fd = fd
        self._address = address
        self._library = library
        self._layout_dirty = False

    @property
    def sync_blocks(self) -> bool:
        return self._layout_dirty

    def sync(self) -> None:
        self._library.drain()
        if self._layout_dirty:
            self._layout_dirty = False
            try:
                os.fdatasync(self._fd)
            except OSError:
                self._layout_dirty = True
                raise

    def stored(self, offset: int, length: int) -> None:
        self._library.flush(self._address + offset, length)

    def layout_changed(self) -> None:
        self._layout_dirty = True


def map_and_detect(fd: int, size: int, *, read_only: bool) -> tuple[mmap.mmap, Durability]:
    """Map the file and find out which level it has. Raises OSError when it cannot be mapped."""
    protection = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
    file_system = syscalls.file_system(fd)
    if file_system in IN_MEMORY:
        mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)
        return mapping, InMemory(f"{file_system} is DRAM: nothing to flush, lost with power")
    try:
        mapping = mmap.mmap(fd, size, flags=MAP_SHARED_VALIDATE | MAP_SYNC, prot=protection)
    except OSError:
        refusal = f"{file_system} refuses MAP_SYNC (no DAX): fdatasync"
    else:
        library = libpmem.load()
        if library is not None:
            caches = "caches included" if library.caches_are_persistent else "clwb and fence"
            reason = f"{file_system} with DAX took MAP_SYNC: {caches}"
            address = _address(mapping, read_only=read_only)
            return mapping, PersistentMemory(reason, fd=fd, address=address, library=library)
        mapping.close()
        refusal = f"{file_system} takes MAP_SYNC, but libpmem1 is not installed: fdatasync"
    mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)
    return mapping, PageCached(refusal, fd=fd)


def _address(mapping: mmap.mmap, *, read_only: bool) -> int:
    """The mapping's address; 0 for a read-only one, which is never synced."""
    if read_only:
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
