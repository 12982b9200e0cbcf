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

    `stored` runs after every store and must be cheap; a level that needs no call after a store
    says so in `follows_stores`. `fence` runs on the thread that stored. `sync` may block, and runs
    on any thread, when `sync_blocks`; otherwise a fence is all there is to do.
    """

    level: ClassVar[str]
    follows_stores: ClassVar[bool] = False

    def __init__(self, reason: str) -> None:
        self.reason = reason

    @property
    @abc.abstractmethod
    def sync_blocks(self) -> bool:
        """Whether durability needs `sync` right now."""

    @abc.abstractmethod
    def sync(self) -> None:
        """All that was stored and fenced before this call is durable after it. Raises OSError."""

    def fence(self) -> None:
        """The stores of this thread so far are ordered before whatever follows."""

    def stored(self, offset: int, length: int) -> None:
        """A store to the mapping was made."""

    def layout_changed(self) -> None:
        """Blocks were reserved or given back: metadata that no cache-line flush makes durable."""

    def moved_to(self, _other: "Durability") -> None:
        """The file was mapped anew, with that level; whoever has this object keeps using it."""


class InMemory(Durability):
    level = "memory"
    sync_blocks = False

    def sync(self) -> None:
        raise AssertionError("never blocks, so nobody has to sync")


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
    """Lines are written back at each store, or before a flush by who remembers what is dirty.

    So a flush is one fence, and there is no dirty state here.
    Only a change of the file's layout needs the file system, and only the next sync pays for it.
    """

    level = "pmem"
    follows_stores = True

    def __init__(self, reason: str, *, fd: int, address: int, library: libpmem.LibPmem) -> None:
        super().__init__(reason)
        self._fd = fd
        self._address = address
        self._library = library
        self._layout_changes = 0
        self._layout_synced = 0  # changes that are durable; behind until fdatasync has returned

    @property
    def sync_blocks(self) -> bool:
        return self._layout_changes != self._layout_synced

    def sync(self) -> None:
        changes = self._layout_changes
        os.fdatasync(self._fd)
        self._layout_synced = changes

    def fence(self) -> None:
        self._library.drain()

    def stored(self, offset: int, length: int) -> None:
        self._library.flush(self._address + offset, length)

    def layout_changed(self) -> None:
        self._layout_changes += 1

    def moved_to(self, other: Durability) -> None:
        assert isinstance(other, PersistentMemory)
        self._address = other._address


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
