"""What is mounted where, and getting rid of a mount that a killed daemon left behind.

Nothing here touches a path below a FUSE mount in this process: a mount whose daemon hangs would
hang us too. Questions go to /proc/self/mountinfo or to a child with a time limit.
"""

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pmblk import PmblkError

MNT_DETACH = 2
ANSWER_SECONDS = 5

_libc = ctypes.CDLL(None, use_errno=True)
_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(msgspec.Struct, frozen=True):
    path: Path
    file_system: str  # "fuse.pmblk" for ours
    source: str
    minor: int  # of its device; for FUSE the number of the connection


def _all() -> Iterator[Mount]:
    """In the order of mounting (proc(5), mountinfo)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = [_OCTAL.sub(lambda match: chr(int(match[1], 8)), field) for field in line.split()]
        dash = fields.index("-")
        minor = int(fields[2].partition(":")[2])
        yield Mount(Path(fields[4]), fields[dash + 1], fields[dash + 2], minor)


def find(path: Path) -> Mount | None:
    """The topmost mount at exactly `path`, if any."""
    found = None
    for mount in _all():
        if mount.path == path:
            found = mount
    return found


def find_source(source: str) -> Mount | None:
    """A mount of that device, if any."""
    return next((mount for mount in _all() if mount.source == source), None)


def is_stale(mount: Mount) -> bool:
    """Whether a FUSE mount has lost its daemon; one that does not answer in time has not."""
    if not mount.file_system.startswith("fuse"):
        return False
    try:
        answer = subprocess.run(
            ["stat", "--file-system", str(mount.path)],
            capture_output=True,
            timeout=ANSWER_SECONDS,
            env={"LC_ALL": "C", "PATH": os.environ.get("PATH", "/usr/bin:/bin")},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return b"not connected" in answer.stderr


def unmount(path: Path) -> None:
    """Take the mount off the tree at once; it ends when its last user does. Raises PmblkError."""
    if _libc.umount2(os.fsencode(path), MNT_DETACH) == 0:
        return
    reason = os.strerror(ctypes.get_errno())
    helper = subprocess.run(
        ["fusermount3", "-u", "-z", str(path)],
        capture_output=True,
        timeout=ANSWER_SECONDS,
        check=False,
    )
    if helper.returncode != 0:
        raise PmblkError(f"cannot unmount {path}: {reason}", hint=f"run: umount --lazy {path}")


def check_mountpoint(path: Path) -> bool:
    """Whether `path` can be mounted on, without changing anything; True if a stale mount is there.

    A directory that is missing is fine when its parent is there: mounting makes it.
    """
    mount = find(path)
    if mount is not None:
        if is_stale(mount):
            return True
        raise PmblkError(
            f"{path} is a mountpoint in use ({mount.file_system})",
            hint=f"stop its owner, or run: umount {path}",
        )
    if path.is_dir():
        if any(path.iterdir()):
            raise PmblkError(f"{path} is not empty", hint="name an empty directory")
        return False
    if path.exists():
        raise PmblkError(f"{path} is not a directory", hint="name an empty directory")
    if not path.parent.is_dir():
        raise PmblkError(f"no directory {path.parent}", hint="make it, or name another path")
    return False
