"""FUSE connections by their number, which is the device number of their mount: who serves one, and
how to end it.

An aborted connection answers whatever was asked, and whatever will be, with an error; nobody waits
any more. Its mount stays, dead. Sources: the kernel's Documentation/filesystems/fuse.rst (control
file system), proc(5).
"""

import contextlib
import ctypes
import os
from pathlib import Path

from pmblk import PmblkError
from pmblk.media.syscalls import checked

CONTROL = Path("/sys/fs/fuse/connections")
DEVICE = Path("/dev/fuse")
FSCONFIG_CMD_CREATE = 6  # include/uapi/linux/mount.h
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1

_libc = ctypes.CDLL(None, use_errno=True)


def abort(number: int) -> None:
    """Everybody who waits for it gets an error. Raises PmblkError."""
    try:
        if (CONTROL / str(number)).is_dir():
            (CONTROL / str(number) / "abort").write_text("1")
        else:
            _abort_by_a_mount_of_our_own(number)
    except FileNotFoundError:
        return  # it has just ended
    except OSError as error:
        raise PmblkError(
            f"cannot abort the FUSE connection {number}: {error.strerror}",
            hint="it takes root; ending its daemon does the same",
        ) from error


def servers(number: int) -> list[int]:
    """The processes that have it open, as far as the kernel shows them (Linux 6.16 does)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
            if any(_has(entry, fd, number) for fd in os.listdir(entry / "fd")):
                found.append(int(entry.name))
    return found


def _has(process: Path, fd: str, number: int) -> bool:
    if os.readlink(process / "fd" / fd) != str(DEVICE):
        return False
    lines = (process / "fdinfo" / fd).read_text().splitlines()
    return ["fuse_connection:", str(number)] in [line.split() for line in lines]


def _abort_by_a_mount_of_our_own(number: int) -> None:
    """The control file system where nobody has mounted it: without a place, gone when closed."""
    context = checked(_libc.fsopen(b"fusectl", FSOPEN_CLOEXEC))
    try:
        checked(_libc.fsconfig(context, FSCONFIG_CMD_CREATE, None, None, 0))
        root = checked(_libc.fsmount(context, FSMOUNT_CLOEXEC, 0))
    finally:
        os.close(context)
    try:
        fd = os.open(f"{number}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=root)
    finally:
        os.close(root)
    try:
        os.write(fd, b"1")
    finally:
        os.close(fd)
