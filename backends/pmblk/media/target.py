"""Where a namespace is saved to: a file or block device, written past the page cache (O_DIRECT).

What is written goes from the caller's memory to the device with no copy between: a view of a
mapped namespace is handed to the kernel as it is. So memory, offsets and lengths are whole blocks
of the device. The calls block; they are for worker threads.

Source: open(2), O_DIRECT; pwritev(2).
"""

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from pmblk.errors import MediaError
from pmblk.media.syscalls import sync_directory

IOV_MAX = 1024


class Target:
    """Made by `open_target`. What was there before stays, in a file, until `finish`."""

    def __init__(self, path: Path, fd: int, *, draft: Path | None) -> None:
        self.path = path
        self.is_file = draft is not None
        self._fd = fd
        self._draft = draft  # the file that takes the name of `path` in the end

    @property
    def device(self) -> int:
        """The number of the block device that is written to in the end."""
        status = os.fstat(self._fd)
        return status.st_rdev or status.st_dev

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        """All of the views, one after the other. Raises OSError."""
        rest = list(views)
        while rest:
            written = os.pwritev(self._fd, rest[:IOV_MAX], offset)
            offset += written
            while rest and written >= len(rest[0]):
                written -= len(rest.pop(0))
            if written:
                rest[0] = rest[0][written:]

    def finish(self, length: int) -> None:
        """The first `length` bytes are durable; a file has its name and that length.

        Raises OSError.
        """
        if self._draft is None:
            os.fsync(self._fd)
            return
        os.ftruncate(self._fd, length)
        os.fsync(self._fd)
        self._draft.replace(self.path)
        self._draft = None
        sync_directory(self.path.parent)

    def close(self) -> None:
        """Without `finish`, a file is as if it had never been begun."""
        if self._draft is not None:
            self._draft.unlink(missing_ok=True)
        os.close(self._fd)


def open_target(path: Path, *, needed_bytes: int) -> Target:
    """A block device of at least that size, or a file: a new one, or one in place of another.

    Raises MediaError, having changed nothing, for what is in use (mounted, or somebody's media), or
    is neither a file nor a block device.
    """
    flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC
    try:
        if path.is_block_device():
            fd = os.open(path, flags | os.O_EXCL)  # nobody has it mounted
            return _large_enough(path, fd, needed_bytes)
        _check_replaceable(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        fd = os.open(draft, flags | os.O_CREAT | os.O_EXCL, 0o600)
        return Target(path, fd, draft=draft)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MediaError(f"cannot write to {path}: {reason}", hint=_hint(error)) from error


def _check_replaceable(path: Path) -> None:
    """Nobody's media: those are locked by the daemon that serves them, and that may be us."""
    if not path.exists():
        return
    if not path.is_file():
        raise OSError(errno.EINVAL, "it is neither a file nor a block device")
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


def _large_enough(path: Path, fd: int, needed_bytes: int) -> Target:
    size = os.lseek(fd, 0, os.SEEK_END)
    if size < needed_bytes:
        os.close(fd)
        raise MediaError(
            f"{path} has {size} bytes, and {needed_bytes} are needed", hint="choose a larger device"
        )
    return Target(path, fd, draft=None)


def _hint(error: Exception) -> str:
    if not isinstance(error, OSError):
        return "mend the path"
    if error.errno in (errno.EBUSY, errno.EWOULDBLOCK):
        return "somebody uses it; choose another target"
    if error.errno == errno.EINVAL:
        return "its file system has no O_DIRECT; choose another one"
    return "mend the path or its rights"
