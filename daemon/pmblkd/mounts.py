"""What is mounted where, and getting rid of a mount that a killed daemon left behind.

Nothing here touches a path below a FUSE mount in this process: a mount whose daemon hangs would
hang us too. Questions go to /proc/self/mountinfo or to a child with a time limit.
"""

import ctypes
import enum
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pmblk import PmblkError
from pmblkd import fuse_connections
from pmblkd.errors import WorkFailed
from pmblkd.programs import NotEnded, run

MNT_DETACH = 2
ANSWER_SECONDS = 5
DEAD_WORDS = ("not connected", "connection abort")  # ENOTCONN, ECONNABORTED

_libc = ctypes.CDLL(None, use_errno=True)
_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(msgspec.Struct, frozen=True):
    path: Path
    file_system: str  # "fuse.pmblk" for ours
    source: str
    minor: int  # of its device; for FUSE the number of the connection

    @property
    def number(self) -> str:
        """Of the device of a FUSE mount, as losetup(8) shows it: no block device has major 0."""
        return f"0:{self.minor}"


class State(enum.Enum):
    """Of a mount. A DEAD one has lost its daemon, a SILENT one has one that does not answer."""

    ALIVE = "alive"
    DEAD = "dead"
    SILENT = "silent"


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


def find_device(device: str) -> Mount | None:
    """A mount of that block device or of one of its partitions, if any."""
    return next(
        (mount for mount in _all() if re.fullmatch(rf"{device}(p\d+)?", mount.source)), None
    )


def state_of(mount: Mount) -> State:
    """Asked by a child; what is no FUSE mount is alive."""
    if not mount.file_system.startswith("fuse"):
        return State.ALIVE
    try:
        run("stat", "--file-system", str(mount.path), seconds=ANSWER_SECONDS)
    except NotEnded:
        return State.SILENT
    except WorkFailed as error:
        if any(words in error.message for words in DEAD_WORDS):
            return State.DEAD
    return State.ALIVE


def unmount(path: Path) -> None:
    """Take the mount off the tree at once; it ends when its last user does. Raises PmblkError."""
    if _libc.umount2(os.fsencode(path), MNT_DETACH) == 0:
        return
    reason = os.strerror(ctypes.get_errno())
    try:
        run("fusermount3", "-u", "-z", str(path), seconds=ANSWER_SECONDS)
    except PmblkError:
        raise PmblkError(
            f"cannot unmount {path}: {reason}", hint=f"run: umount --lazy {path}"
        ) from None


def is_dead(path: Path) -> bool:
    """Whether the topmost mount there has lost its daemon."""
    mount = find(path)
    return mount is not None and state_of(mount) is State.DEAD


def silence(mount: Mount) -> WorkFailed:
    """What there is to say of a SILENT mount, to be raised."""
    pids = fuse_connections.servers(mount.minor)
    owner = (
        f"process {pids[0]}, which serves {mount.path}," if pids else f"{mount.path}: its daemon"
    )
    end = f"end it (kill -9 {pids[0]})" if pids else "end it"
    return WorkFailed(
        f"{owner} does not answer",
        hint=f"{end}, or cut it off: pmblk detach --all --force --config FILE",
    )


def check_mountpoint(path: Path) -> None:
    """Raises PmblkError if `path` cannot be mounted on; a dead mount there is in nobody's way.

    A directory that is missing is fine when its parent is there: mounting makes it.
    """
    _check_above(path)
    mount = find(path)
    if mount is not None:
        state = state_of(mount)
        if state is State.DEAD:
            return
        if state is State.SILENT:
            raise silence(mount)
        raise PmblkError(
            f"{path} is a mountpoint in use ({mount.file_system})",
            hint=f"stop its owner, or run: umount {path}",
        )
    try:
        _check_directory(path)
    except OSError as error:
        raise PmblkError(f"cannot look at {path}: {error.strerror}") from error


def _check_directory(path: Path) -> None:
    if path.is_dir():
        if any(path.iterdir()):
            raise PmblkError(f"{path} is not empty", hint="name an empty directory")
    elif path.exists():
        raise PmblkError(f"{path} is not a directory", hint="name an empty directory")
    elif not path.parent.is_dir():
        raise PmblkError(f"no directory {path.parent}", hint="make it, or name another path")


def _check_above(path: Path) -> None:
    """Nobody may look at a path below a FUSE mount before it is known to answer."""
    for parent in reversed(path.parents):
        mount = find(parent)
        if mount is None:
            continue
        state = state_of(mount)
        if state is State.SILENT:
            raise silence(mount)
        if state is State.DEAD:
            raise PmblkError(
                f"{path} lies below {parent}, a mount that has lost its daemon",
                hint=f"run: umount --lazy {parent}",
            )
