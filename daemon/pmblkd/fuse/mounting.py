"""Mounting /dev/fuse: by mount(2) where we may, by fusermount3 where only that may.

Sources: mount(2), fusermount3(1), and the kernel's Documentation/filesystems/fuse.rst for the mount
options. Unmounting, and getting rid of what a killed daemon left, is `pmblkd.mounts`.
"""

import array
import ctypes
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pmblk import PmblkError
from pmblk.media.syscalls import checked
from pmblkd.fuse_connections import DEVICE

SUBTYPE = "pmblk"
HELPER_SECONDS = 10

# sys/mount.h; what a file of a namespace could do with set-user-id bits or as a device is nothing.
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME = 1, 2, 4, 8, 1024
OPTIONS = {"ro": MS_RDONLY, "noexec": MS_NOEXEC, "noatime": MS_NOATIME}

_libc = ctypes.CDLL(None, use_errno=True)


def mount(mountpoint: Path, *, allow_other: bool, options: Sequence[str]) -> int:
    """A non-blocking descriptor of /dev/fuse that is mounted there. Raises PmblkError."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PmblkError(
            f"cannot open {DEVICE}: {error.strerror}", hint="load the fuse module, or as root"
        ) from error
    try:
        _mount_ourselves(fd, mountpoint, allow_other=allow_other, options=options)
        return fd
    except PermissionError:
        os.close(fd)
    except OSError as error:
        os.close(fd)
        raise PmblkError(f"cannot mount on {mountpoint}: {error.strerror}") from error
    return _mount_by_helper(mountpoint, allow_other=allow_other, options=options)


def _mount_ourselves(
    fd: int, mountpoint: Path, *, allow_other: bool, options: Sequence[str]
) -> None:
    """Raises OSError; PermissionError without CAP_SYS_ADMIN."""
    flags = MS_NOSUID | MS_NODEV
    for option in options:
        flags |= OPTIONS[option]
    words = [f"fd={fd}", "rootmode=40555", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
    words.append("default_permissions")  # the kernel looks at owner and mode, not we
    if allow_other:
        words.append("allow_other")
    target = os.fsencode(mountpoint)
    data = ",".join(words).encode()
    checked(_libc.mount(b"pmblk", target, b"fuse." + SUBTYPE.encode(), flags, data))


def _mount_by_helper(mountpoint: Path, *, allow_other: bool, options: Sequence[str]) -> int:
    words = ["fsname=pmblk", f"subtype={SUBTYPE}", "default_permissions", "nosuid", "nodev"]
    words += [*options, *(["allow_other"] if allow_other else [])]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", ",".join(words), "--", str(mountpoint)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "LC_ALL": "C", "_FUSE_COMMFD": str(theirs.fileno())},
                capture_output=True,
                text=True,
                timeout=HELPER_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            raise PmblkError(
                f"cannot mount on {mountpoint}: it takes root, or fusermount3",
                hint="install fuse3",
            ) from None
        except subprocess.TimeoutExpired:
            raise PmblkError(f"fusermount3 did not end in {HELPER_SECONDS} s") from None
        if done.returncode != 0:
            raise PmblkError(f"cannot mount on {mountpoint}: {done.stderr.strip()}")
        theirs.close()  # else nobody would ever tell us that nothing comes
        fd = _receive_descriptor(ours)
    os.set_blocking(fd, False)
    return fd


def _receive_descriptor(sock: socket.socket) -> int:
    descriptors = array.array("i")
    _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(descriptors.itemsize))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: descriptors.itemsize])
    if not descriptors:
        raise PmblkError("fusermount3 gave no descriptor", hint="is it the one of fuse3?")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
