"""Persistent-memory media: a regular file, mapped whole, owned by one process.

`create` makes a sparse file, `open_media` opens, locks and maps one. `Media` is what the
representations store to and load from. It promises that no store and no load meets a page that the
file system cannot provide, as long as callers `reserve` before they `store` and ask `allocation`
before they load from `view`; `pmblk.dispatcher` does both. A store to media in a page cache can
still fail, with an OSError. What fails all the same (the file is truncated, its memory is bad) is
noted in `health`, and final (`pmblk.media.faults`).

Not here: ranges, read-only rules and status codes (`pmblk.namespace`), and when to sync.
"""

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path

from pmblk.errors import MediaError
from pmblk.media import faults, reserve, syscalls
from pmblk.media.allocation import AllocationMap
from pmblk.media.durability import Durability, map_and_detect
from pmblk.pages import PAGE_SHIFT
from pmblk.ranges import slices
from pmblk.units import format_size

ZEROES = memoryview(bytes(1 << 20))

Store = Callable[[int, "memoryview | bytes"], None]


class Media:
    """An open, locked, mapped file. Made by `open_media`.

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


def create(path: Path, size: int) -> None:
    """Make a sparse file of `size` bytes, durably. Raises MediaError; leaves nothing when it does.

    An existing file is never touched: FileExistsError becomes a MediaError too.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MediaError(
            f"cannot create {path}: {error.strerror}", hint="make the directory, or mend its rights"
        ) from error
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
        syscalls.sync_directory(path.parent)
    except BaseException as error:
        path.unlink()
        if not isinstance(error, OSError):
            raise
        raise MediaError(
            f"cannot make {path} {format_size(size)} long: {error.strerror}",
            hint="choose a smaller size or another file system",
        ) from error
    finally:
        os.close(fd)


def open_media(
    path: Path,
    *,
    size: int | None = None,
    lba_bytes: int = 512,
    read_only: bool = False,
    with_reserve: bool = False,
) -> Media:
    """Open, lock and map the file, which has `size` bytes if that is given, and whole blocks.

    `with_reserve`: its last 1/64 is a reserve, or becomes one if nothing was ever written there.

    Raises MediaError, having changed nothing, for a file that is missing, not regular, of another
    size, owned by another process, or on a file system that cannot reserve space.
    """
    fd = _open_locked(
        path, size=size, lba_bytes=lba_bytes, read_only=read_only, with_reserve=with_reserve
    )
    try:
        actual = os.fstat(fd).st_size
        if not read_only:
            _check_reservable(path, fd)
        if with_reserve and not reserve.is_taken(fd, actual):
            reserve.take(fd, actual)
        mapping, durability = map_and_detect(fd, actual, read_only=read_only)
        return Media(
            path,
            fd,
            read_only=read_only,
            mapping=mapping,
            durability=durability,
            reserve_bytes=reserve.reserve_bytes(actual) if with_reserve else 0,
        )
    except OSError as error:
        os.close(fd)
        raise MediaError(
            f"cannot map {path}: {error.strerror}", hint="can its file system map files?"
        ) from error
    except MediaError:
        os.close(fd)
        raise


def _check_reservable(path: Path, fd: int) -> None:
    """A store must never find the file system full: that would be SIGBUS, and the end."""
    if not syscalls.can_reserve(fd):
        raise MediaError(
            f"{path}: {syscalls.file_system(fd)} cannot reserve space for a sparse file",
            hint="put the file on tmpfs, hugetlbfs, ext4, xfs or btrfs",
        )


def inspect(
    path: Path, *, size: int | None, lba_bytes: int, read_only: bool, with_reserve: bool = False
) -> None:
    """Whether `open_media` would accept the file; changes nothing. Raises MediaError."""
    os.close(
        _open_locked(
            path, size=size, lba_bytes=lba_bytes, read_only=read_only, with_reserve=with_reserve
        )
    )


def _open_locked(
    path: Path, *, size: int | None, lba_bytes: int, read_only: bool, with_reserve: bool
) -> int:
    try:
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise MediaError(
            f"cannot open {path}: {error.strerror}", hint="mend the path or the file's rights"
        ) from error
    try:
        _check_file(path, fd, size, lba_bytes)
        _lock(path, fd, shared=read_only)
        if with_reserve:
            _check_reserve(path, fd, read_only=read_only)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_file(path: Path, fd: int, size: int | None, lba_bytes: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path} is not a regular file", hint="name a file, or a path to create")
    if status.st_size == 0:
        raise MediaError(f"{path} is empty", hint="remove it, and give a size to create it anew")
    if size is not None and status.st_size != size:
        raise MediaError(
            f"{path} is {status.st_size} bytes long, not {size}",
            hint="leave the size out to take the file as it is, or name another file",
        )
    if status.st_size % lba_bytes:
        raise MediaError(
            f"{path} has {status.st_size} bytes, no multiple of {lba_bytes}",
            hint="choose an lba_size of 512, or name another file",
        )


def _check_reserve(path: Path, fd: int, *, read_only: bool) -> None:
    size = os.fstat(fd).st_size
    if reserve.is_taken(fd, size):
        return
    if size < reserve.FILE_UNIT_BYTES or size % reserve.FILE_UNIT_BYTES:
        raise MediaError(
            f"{path} has {size} bytes: 1/64 of it is no whole number of pages",
            hint="a page table on the device needs a multiple of 256KiB",
        )
    if read_only:
        raise MediaError(
            f"{path} has no reserve for a page table, and is read-only",
            hint='choose memmap = "dram"',
        )
    if not reserve.can_be_taken(fd, size):
        raise MediaError(
            f"{path} has data in its last 1/64, where the page table would go",
            hint='copy it to a file that is 1/63 larger, or choose memmap = "dram"',
        )


def _lock(path: Path, fd: int, *, shared: bool) -> None:
    """One owner that writes, or any number that read; the lock ends with the process."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        owner = _lock_owner(fd)
        raise MediaError(
            f"{path} is in use by {owner}", hint="stop that one first; the data was not touched"
        ) from None


def _lock_owner(fd: int) -> str:
    """The process that holds the lock, from /proc/locks; "another process" where it cannot tell."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if device in fields and "FLOCK" in fields and "->" not in fields:
                return f"process {fields[4]}"
    except OSError:
        pass
    return "another process"
