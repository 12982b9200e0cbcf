"""Where a namespace is saved to: a file or block device, written past the page cache (O_DIRECT).

What is written goes from the caller's memory to the device with no copy between: a view of a
mapped namespace is handed to the kernel as it is. So memory, offsets and lengths are whole blocks
of the device. The calls block; they are for worker threads.

Source: open(2), O_DIRECT; pwritev(2).
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from pmblk.errors import MediaError

IOV_MAX = 1024


class Target:
    """Made by `open_target`. A file is as long as what was written when it is finished."""

    def __init__(self, path: Path, fd: int, *, is_file: bool) -> None:
        self.path = path
        self.is_file = is_file
        self._fd = fd

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
        """The first `length` bytes are durable; a file is that long. Raises OSError."""
        if self.is_file:
            os.ftruncate(self._fd, length)
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def open_target(path: Path, *, needed_bytes: int) -> Target:
    """A block device of at least that size, or a file: a new one, or one that is emptied.

    Raises MediaError, having changed nothing, for what is in use: mounted, or somebody's media.
    """
    flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC
    try:
        if path.is_block_device():
            fd = os.open(path, flags | os.O_EXCL)  # nobody has it mounted
            return _large_enough(path, fd, needed_bytes)
        return Target(path, _open_file(path, flags), is_file=True)
    except OSError as error:
        raise MediaError(f"cannot write to {path}: {error.strerror}", hint=_hint(error)) from error


def _open_file(path: Path, flags: int) -> int:
    """Locked and empty. Media are locked by the daemon that serves them, and that may be us."""
    is_new = not path.exists()
    with contextlib.ExitStack() as undo:
        if is_new:
            undo.callback(path.unlink, missing_ok=True)
        fd = os.open(path, flags | os.O_CREAT, 0o600)
        undo.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        undo.pop_all()
        return fd


def _large_enough(path: Path, fd: int, needed_bytes: int) -> Target:
    size = os.lseek(fd, 0, os.SEEK_END)
    if size < needed_bytes:
        os.close(fd)
        raise MediaError(
            f"{path} has {size} bytes, and {needed_bytes} are needed", hint="choose a larger device"
        )
    return Target(path, fd, is_file=False)


def _hint(error: OSError) -> str:
    if error.errno in (errno.EBUSY, errno.EWOULDBLOCK):
        return "somebody uses it; choose another target"
    if error.errno == errno.EINVAL:
        return "its file system has no O_DIRECT; choose another one"
    return "mend the path or its rights"
