"""Persistent-memory media: a regular file, mapped whole, owned by one process.

`Media` is what the representations store to and load from. It promises that no store and no load
meets a page that the file system cannot provide, as long as callers `reserve` before they `store`
and ask `allocation` before they load from `view`; `pmblk.dispatcher` does both. A store to media in
a page cache can still fail, with an OSError. What fails all the same (the file is truncated, its
memory is bad) is noted in `health`, and final (`pmblk.media.faults`).

Not here: which files are taken (`pmblk.media.opening`), ranges, read-only rules and status codes
(`pmblk.namespace`), and when to sync.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

from pmblk.media import faults, syscalls
from pmblk.media.allocation import AllocationMap
from pmblk.media.durability import Durability, map_and_detect
from pmblk.pages import PAGE_SHIFT
from pmblk.ranges import slices

ZEROES = memoryview(bytes(1 << 20))

Store = Callable[[int, "memoryview | bytes"], None]


class Media:
    """An open, locked, mapped file. Made by `pmblk.media.opening`.

    `view` are the `size` bytes of data; slices of it may be handed out and are valid until `close`
    or `resize`. `reserve_view` is what the file keeps for a page table (`pmblk.media.reserve`).
    Once `health.fault` is set, nothing that was read or stored since can be trusted.
    """

    def __init__(
        self,
        path: Path,
        fd: int,
        *,
        read_only: bool,
        mapping: mmap.mmap,
        durability: Durability,
        reserve_bytes: int = 0,
    ) -> None:
        self.path = path
        self.reserve_bytes = reserve_bytes
        self.read_only = read_only
        self.durability = durability
        self.reserve_user = ""  # the representation that has its page table there
        self.health = faults.Health(fd)
        self._fd = fd
        self._map(mapping)
        self.punches = not read_only and _punches_safely(fd, self.file_bytes)
        self.store: Store = self._choose_store()
        self.store_only: Store = self._write if durability.level == "file" else self._store
        if durability.level == "memory":
            self._recall_full_file()

    def _map(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._unwatch = faults.watch(self.health, mapping, read_only=self.read_only)
        self.file_bytes = len(mapping)
        self.size = self.file_bytes - self.reserve_bytes
        self.view = memoryview(mapping)[: self.size]
        self.reserve_view = memoryview(mapping)[self.size :]
        self.allocation = AllocationMap(self._fd, self.file_bytes)

    def _recall_full_file(self) -> None:
        """Mark a file in memory without holes as known, rather than ask for its pages one by one.

        The block count alone is no proof (blocks may lie past the end), but it says cheaply when
        there is no point in letting lseek walk over all pages.
        """
        if self.allocated_bytes() < self.file_bytes:
            return
        if os.lseek(self._fd, 0, os.SEEK_HOLE) >= self.file_bytes:
            self.allocation.mark(0, self.file_bytes)

    def _choose_store(self) -> Store:
        if self.durability.level == "file":
            return self._write
        return self._store_and_follow if self.durability.follows_stores else self._store

    @property
    def stores_to_view(self) -> bool:
        """Whether stores may go to `view` itself; where not, only `store` is safe."""
        return self.durability.level != "file"

    def _write(self, offset: int, data: "memoryview | bytes") -> None:
        """Through a system call: in a page cache a store faults a whole folio in.

        A folio may be far larger than a page and reach over pages that are not reserved (seen on
        Linux 6.18, ext4 and xfs), which is SIGBUS on a full file system. This is ENOSPC.
        A file that was truncated would grow again by this, with zeroes for what it lost.
        """
        self.check()
        while data:
            written = os.pwrite(self._fd, data, offset)
            data = memoryview(data)[written:]
            offset += written

    def _store(self, offset: int, data: "memoryview | bytes") -> None:
        self.view[offset : offset + len(data)] = data

    def _store_and_follow(self, offset: int, data: "memoryview | bytes") -> None:
        self.view[offset : offset + len(data)] = data
        self.durability.stored(offset, len(data))

    def stored(self, offset: int, length: int) -> None:
        """Somebody stored to `view` itself, or with `store_only`: write the cache lines back."""
        self.durability.stored(offset, length)

    def write_back_pages(self, first: int, count: int) -> None:
        """`stored` for whole pages; the last one may be cut short by the end."""
        offset = first << PAGE_SHIFT
        self.durability.stored(offset, min(count << PAGE_SHIFT, self.size - offset))

    def reserve(self, offset: int, length: int) -> None:
        """Every page that the range touches has memory under it. Raises OSError (ENOSPC, ...).

        Whole pages, also where the file system's blocks are smaller: a store faults a page in, and
        needs every block of it. Nobody asks lseek first: what is there already costs fallocate
        little, while lseek walks over every page of a preallocated file on tmpfs.
        """
        if self.allocation.covers(offset, length):
            return
        for start, span in self.allocation.unknown(offset, length):
            syscalls.reserve(self._fd, start, min(span, self.file_bytes - start))
            self.durability.layout_changed()
            self.allocation.mark(start, span)

    def punch(self, offset: int, length: int) -> None:
        """The range reads as zeroes and gives its whole pages back. Needs `punches`.

        The layout counts as changed only afterwards, or a sync that runs meanwhile would cover it.
        """
        try:
            with self.allocation.punched(offset, length):
                syscalls.punch_hole(self._fd, offset, length)
        finally:
            self.durability.layout_changed()
        self.check()  # past the end of a file there is nothing to punch, and no error

    def fill_with_zeroes(self, offset: int, length: int) -> None:
        """Store zeroes over a range that is reserved."""
        for position, piece in slices(offset, length, slice_bytes=len(ZEROES)):
            self.store(position, ZEROES[:piece])

    def check(self) -> None:
        """Raises OSError (EIO) once the media have failed, or when the file is too short.

        What a truncated file lost of its last page cannot be had by waiting for a fault.
        """
        health = self.health
        if health.fault is None:
            file_bytes = os.lseek(self._fd, 0, os.SEEK_END)  # half of what fstat costs
            if file_bytes >= self.file_bytes:
                return
            health.fault = faults.Fault(file_bytes, 0, file_bytes, self.file_bytes)
        raise OSError(errno.EIO, health.fault.reason(self.path))

    def stored_elsewhere(self) -> None:
        """Somebody else stores to the file, or may have: the next sync has to reach all of it."""
        self.durability.layout_changed()

    def cut_excess(self) -> int:
        """Cut off what somebody else wrote past the end of the file; how many bytes that were.

        A read-only file is its owner's to make longer. Raises OSError.
        """
        if self.read_only:
            return 0
        excess = os.fstat(self._fd).st_size - self.file_bytes
        if excess <= 0:
            return 0
        os.ftruncate(self._fd, self.file_bytes)
        return excess

    def open_again(self) -> int:
        """Another descriptor of the file, the caller's to close, that does not hold our lock.

        Whoever is given one of ours keeps the lock with it, past our end.
        """
        flags = os.O_RDONLY if self.read_only else os.O_RDWR
        return os.open(f"/proc/self/fd/{self._fd}", flags | os.O_CLOEXEC)

    def is_open_elsewhere(self) -> bool | None:
        """Whether anybody but us has the file open or mapped; None if it cannot be told.

        One that was given a descriptor by `open_again` counts, until it is closed.
        """
        return syscalls.is_open_elsewhere(self._fd)

    def status(self) -> os.stat_result:
        """Of the file itself, whatever has become of its name."""
        return os.fstat(self._fd)

    def allocated_bytes(self) -> int:
        """What the file occupies, as its file system counts it."""
        return self.status().st_blocks * 512

    def resize(self, size: int) -> None:
        """Serve the first `size` bytes from now on; `view` is another one afterwards.

        The file grows if it has to; what is added is a hole. It is not cut before `trim`, so until
        then the old size can be had back with all its bytes. Nobody holds a view of the old
        mapping. Raises OSError, and then nothing has changed. Not for a file with a reserve.
        """
        assert not self.reserve_bytes
        self.check()
        before = os.fstat(self._fd).st_size
        if size > before:
            os.ftruncate(self._fd, size)
        try:
            mapping, durability = map_and_detect(self._fd, size, read_only=self.read_only)
        except OSError:
            os.ftruncate(self._fd, before)
            raise
        self.durability.moved_to(durability)
        old = self.allocation
        self._map(mapping)
        self.allocation.take_over(old)
        self.durability.layout_changed()

    def trim(self) -> None:
        """Give up what the file has past `size`. Raises OSError."""
        self.check()
        os.ftruncate(self._fd, self.file_bytes)

    def close(self) -> None:
        """Unmap and unlock. Views that are still out keep the mapping, not the lock, alive."""
        self._unwatch()
        try:
            self.view.release()
            self.reserve_view.release()
            self._mapping.close()
        except BufferError:
            pass
        # Said, because a mapping that stays keeps a descriptor of its own, and the lock with it.
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)


def _punches_safely(fd: int, size: int) -> bool:
    """hugetlbfs punches too, but shows no hole afterwards, so nothing would be reserved anew."""
    return syscalls.file_system(fd) != "hugetlbfs" and syscalls.can_punch(fd, size)
