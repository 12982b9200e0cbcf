"""From a path or a URI to an open member that is ours alone, or a reason why not, with a hint.

A block device is claimed (O_EXCL): nobody has mounted it, and nobody else claims it, another array
least of all. A regular file is locked as the media of a namespace are, so that no two arrays, and
no array and namespace, ever share one. Both end with the process. Who only reads claims nothing,
and may look at a member in service.

Sources: open(2), flock(2), proc(5), sysfs(5).
"""

import errno
import os
import stat
import threading
from pathlib import Path
from urllib.parse import urlsplit

import trio

from pmblk.errors import PmblkError
from pmblk.media import syscalls
from pmblk.media.opening import lock
from pmblk.raid.file_member import BLOCK_BYTES, IN_MEMORY, FileMember, go_direct
from pmblk.raid.geometry import CHUNK_BYTES_MIN
from pmblk.raid.member import Member
from pmblk.raid.nbd_member import connect
from pmblk.raid.superblock import DATA_OFFSET
from pmblk.units import format_size

SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
SIZE_MIN = DATA_OFFSET + CHUNK_BYTES_MIN
BAD_PLACE = f"name an absolute path, or a URI: {', '.join(f'{one}://' for one in SCHEMES)}"


async def open_member(
    place: str, *, read_only: bool = False, timeout_seconds: float = 30.0
) -> Member:
    """Open it; the member is the caller's. Raises PmblkError with what to do; changes nothing.

    `timeout_seconds` is the patience with each batch later on, and with the opening as a whole.
    """
    member: Member
    if "://" in place:
        _check_uri(place)
        member = await connect(place, read_only=read_only, timeout_seconds=timeout_seconds)
    elif place.startswith("/"):
        member = await _open_in_time(Path(place), read_only, timeout_seconds)
    else:
        raise PmblkError(f"{place!r} is no place for a member", hint=BAD_PLACE)
    if member.size < SIZE_MIN:
        member.close()
        raise PmblkError(
            f"{place} has {format_size(member.size)}: too small for a member",
            hint=f"it needs more than {format_size(SIZE_MIN)}",
        )
    return member


def _check_uri(place: str) -> None:
    try:
        scheme = urlsplit(place).scheme
    except ValueError as error:
        raise PmblkError(f"{place} is no URI: {error}", hint=BAD_PLACE) from error
    if scheme not in SCHEMES:
        raise PmblkError(f"{place}: nobody here speaks {scheme or 'that'}", hint=BAD_PLACE)


async def _open_in_time(path: Path, read_only: bool, timeout_seconds: float) -> FileMember:
    """In a thread: opening and trying a device may take as long as it likes."""
    attempt = _Attempt()
    try:
        with trio.move_on_after(timeout_seconds):
            return await trio.to_thread.run_sync(
                attempt.open, path, read_only, timeout_seconds, abandon_on_cancel=True
            )
    except trio.Cancelled:
        attempt.give_up()
        raise
    attempt.give_up()
    raise PmblkError(
        f"{path} does not answer in {timeout_seconds:g} s", hint="is the device there, and well?"
    )


class _Attempt:
    """Opens on a thread; what comes too late is closed again by whoever notices last."""

    def __init__(self) -> None:
        self._changes = threading.Lock()
        self._late = False
        self._opened: FileMember | None = None

    def open(self, path: Path, read_only: bool, timeout_seconds: float) -> FileMember:
        member = _open_file(path, read_only=read_only, timeout_seconds=timeout_seconds)
        with self._changes:
            self._opened = member
            late = self._late
        if late:
            member.close()  # twice does no harm
        return member

    def give_up(self) -> None:
        """Nobody waits any more."""
        with self._changes:
            self._late = True
            opened = self._opened
        if opened is not None:
            opened.close()


def _open_file(path: Path, *, read_only: bool, timeout_seconds: float) -> FileMember:
    try:
        mode = os.stat(path).st_mode
        _check_kind(path, mode)
        claim = os.O_EXCL if stat.S_ISBLK(mode) and not read_only else 0
        access = os.O_RDONLY if read_only else os.O_RDWR
        fd = os.open(path, access | claim | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _refusal(path, error) from error
    try:
        _check_kind(path, os.fstat(fd).st_mode)
        if not read_only and not claim:
            lock(path, fd, shared=False)
        if os.lseek(fd, 0, os.SEEK_END) == 0:
            raise PmblkError(f"{path} is empty", hint=f"make it larger: truncate -s 1G {path}")
        if syscalls.file_system(fd) not in IN_MEMORY or claim:
            go_direct(fd)
        member = FileMember(str(path), fd, timeout_seconds=timeout_seconds)
        if member.block_bytes > BLOCK_BYTES:
            raise PmblkError(
                f"{path} has blocks of {member.block_bytes} bytes",
                hint=f"a member needs blocks of {BLOCK_BYTES} bytes or less",
            )
    except OSError as error:
        os.close(fd)
        raise _refusal(path, error) from error
    except BaseException:
        os.close(fd)
        raise
    return member


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise PmblkError(f"{path} is a directory", hint="name a file or a block device")
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise PmblkError(
            f"{path} is neither a regular file nor a block device", hint="name one of those"
        )


def _refusal(path: Path, error: Exception) -> PmblkError:
    if not isinstance(error, OSError):
        return PmblkError(f"cannot open {path!r}: {error}", hint="mend the path")
    if error.errno == errno.EBUSY:
        return PmblkError(
            f"{path} is in use: {_users(path)}", hint="free it first; it was not touched"
        )
    return PmblkError(f"cannot open {path}: {error.strerror}", hint=_hint(path, error))


def _hint(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"mend the path, or make the file: truncate -s 1G {path}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "mend its rights, or run as a user who has them"
    if error.errno == errno.EROFS:
        return "it can only be read; choose another one"
    return "is the device there, and well?"


def _users(path: Path) -> str:
    """Who has claimed a block device, as far as the system tells."""
    number = os.stat(path).st_rdev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[2] == device:
                return f"mounted at {fields[4]}"
        holders = sorted(one.name for one in Path(f"/sys/dev/block/{device}/holders").iterdir())
        if holders:
            return f"it is a part of {', '.join(holders)}"
    except OSError:
        pass
    return "a member of another array, mounted, or claimed by another program"
