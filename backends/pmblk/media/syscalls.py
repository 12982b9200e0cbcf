"""The few system calls that Python's os module does not have. ctypes releases the GIL in each.

Sources: fallocate(2), statfs(2), mincore(2), fcntl(2).
"""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
from pathlib import Path

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
MAP_NORESERVE = 0x4000  # the mmap module has no name for it

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)

_FILE_SYSTEM_NAMES = {
    0x01021994: "tmpfs",
    0x958458F6: "hugetlbfs",
    0x858458F6: "ramfs",
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x794C7630: "overlayfs",
    0x6969: "nfs",
    0x65735546: "fuse",
}


def checked(result: int) -> int:
    """What a function of a ctypes library with `use_errno` returned. Raises OSError for -1."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), again after a signal. Raises OSError."""
    while True:
        try:
            checked(_libc.fallocate(fd, mode, offset, length))
            return
        except InterruptedError:
            continue


def punch_hole(fd: int, offset: int, length: int) -> None:
    """The range reads as zeroes from now on, and its whole blocks are given back."""
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def reserve(fd: int, offset: int, length: int) -> None:
    """Memory stands under the whole range from now on; what it held, it holds. ENOSPC if full."""
    fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, length)


def can_punch(fd: int, size: int) -> bool:
    """Whether the file system punches holes; asked past the end of the file, where nothing is."""
    try:
        punch_hole(fd, size, 4096)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True


def can_reserve(fd: int) -> bool:
    """Whether the file system reserves space; asked by reserving the first block of the file."""
    try:
        reserve(fd, 0, 1)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    return True


def is_open_elsewhere(fd: int) -> bool | None:
    """Whether anybody else has the file open or mapped; None if it cannot be told.

    The kernel grants a write lease only to whoever has the file alone, by whatever name others come
    to it, and mappings whose descriptors are closed count; older kernels without IMA do not count
    those who only read. Ours is given back at once. Whoever opens the file in between waits that
    long; we would be told by SIGURG, which is ignored (SIGIO would kill).
    """
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def file_system(fd: int) -> str:
    """The name of the file system that holds `fd`, or its magic number in hex."""
    buffer = ctypes.create_string_buffer(256)
    checked(_libc.fstatfs(fd, buffer))
    magic: int = struct.unpack_from("q", buffer)[0] & 0xFFFFFFFF
    return _FILE_SYSTEM_NAMES.get(magic, f"{magic:#x}")


def anonymous(length: int) -> mmap.mmap:
    """Zeroed memory that costs nothing until it is written to. Raises OSError.

    Private, since a page of shared memory is allocated by reading it.
    """
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


def resident_bytes(mapping: mmap.mmap) -> int:
    """How much of an anonymous mapping has memory under it."""
    length = len(mapping)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    pages = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
    checked(_libc.mincore(address, length, pages))
    return pages.raw.count(1) * mmap.PAGESIZE


def available_memory_bytes() -> int:
    """What the kernel thinks it could still hand out (proc(5), MemAvailable)."""
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("no MemAvailable: Linux 3.14 or later is needed")


def sync_directory(directory: Path) -> None:
    """The names in it are durable. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
