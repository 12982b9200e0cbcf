"""From a path to media: made, opened, checked, locked and mapped, or refused with a reason.

`create` makes a sparse file, `open_media` takes one, `inspect` says whether it would. One process
that writes has a file, or any number that read, by a lock that ends with the process.

Not here: what is done with the memory after that (`pmblk.media.pmem`). Sources: flock(2), proc(5).
"""

import errno
import fcntl
import os
import stat
from pathlib import Path

from pmblk.errors import MediaError
from pmblk.media import reserve, syscalls
from pmblk.media.durability import map_and_detect
from pmblk.media.pmem import Media
from pmblk.units import format_size


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
        lock(path, fd, shared=read_only)
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


def lock(path: Path, fd: int, *, shared: bool) -> None:
    """One owner that writes, or any number that read; the lock ends with the process.

    Raises MediaError that names the owner, and OSError where nothing can be locked.
    """
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
