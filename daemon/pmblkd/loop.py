"""Loop devices: one added for each attachment, found by their backing file, removed again.

A device is found in /sys/block by the path of its file. Whatever touches the file, whose file
system may be a mount with a dead or a hung daemon, is done by a child with a time limit. Sources:
loop(4), losetup(8).
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pmblk import PmblkError
from pmblkd import mounts
from pmblkd.errors import WorkFailed
from pmblkd.programs import NotEnded, run

ANSWER_SECONDS = 5
LOCK_SECONDS = 60  # longer than any one attach or detach
SETTLE_SECONDS = 3
CONTROL = Path("/dev/loop-control")
DEVICES = Path("/sys/block")
LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81  # include/uapi/linux/loop.h


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """One attach or detach at a time on this machine, of loop and nbd devices alike.

    Raises WorkFailed when another one does not end.
    """
    fd = os.open(DEVICES, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(fd)
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise WorkFailed(
                    f"another attach or detach has not ended in {LOCK_SECONDS} s"
                ) from None
        time.sleep(0.02)  # flock(2) has no time limit


def devices_on(is_ours: Callable[[Path], bool]) -> list[Path]:
    """The loop devices whose backing file, by its path, is one of ours."""
    return [device for device, backing in _backings() if is_ours(backing)]


def devices_below(mountpoint: Path, sizes: Mapping[str, int]) -> list[Path]:
    """Those on files of a mount there, also of one that is buried or was taken off the tree.

    `sizes` are the namespaces' by name: what is left of the path of a file when its mount has left
    the tree is its name, below the root. So another daemon's namesake of that size is found too.
    """

    def has_left(device: Path, backing: Path) -> bool:
        size = sizes.get(backing.name)
        return backing.parent == Path("/") and size == size_of(device) and not backing.exists()

    return [
        device
        for device, backing in _backings()
        if backing.is_relative_to(mountpoint) or has_left(device, backing)
    ]


def _backings() -> Iterator[tuple[Path, Path]]:
    for entry in sorted(DEVICES.glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):  # detached meanwhile
            yield Path("/dev") / entry.parts[3], _backing(entry)


def _backing(entry: Path) -> Path:
    """The path of its file in `backing_file`, without the word that it is gone. Raises OSError."""
    return Path(entry.read_text().rstrip("\n").removesuffix(" (deleted)"))


def is_on(number: int, mountpoint: Path) -> bool:
    """Whether a block device, by its number, is a loop device on a file below the mountpoint.

    One of its partitions is, too. What is stacked on top of such devices is not found out.
    """
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for place in (entry, entry.resolve().parent):
        with contextlib.suppress(OSError):
            return _backing(place / "loop/backing_file").is_relative_to(mountpoint)
    return False


def file_name(device: Path) -> str:
    """Of its backing file; empty when it is detached."""
    return next((backing.name for one, backing in _backings() if one == device), "")


def size_of(device: Path) -> int:
    """In bytes; 0 when it is detached."""
    try:
        return int((DEVICES / device.name / "size").read_text()) * 512
    except OSError:
        return 0


def file_system_of(device: Path) -> str:
    """Of its file, as major:minor; empty when that has lost its daemon, a second ago or more.

    The driver asks the file system. Raises NotEnded if that hangs.
    """
    columns = ("--noheadings", "--output", "BACK-MAJ:MIN")
    try:
        return run("losetup", *columns, str(device), seconds=ANSWER_SECONDS).strip()
    except NotEnded:
        raise
    except WorkFailed:
        return ""  # it is detached meanwhile


def can_be_read(device: Path) -> bool:
    """Whether its first block can be had, past every cache."""
    arguments = (f"if={device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct")
    try:
        run("dd", *arguments, seconds=ANSWER_SECONDS)
    except WorkFailed:
        return False
    return True


def use_of(device: Path) -> tuple[str, str] | None:
    """What has the device for longer: how, and what to do about it. Openers are not looked for."""
    mount = mounts.find_device(str(device))
    if mount is not None:
        return f"is mounted on {mount.path}", f"run: umount {mount.path}"
    holders = [path.name for path in (DEVICES / device.name / "holders").glob("*")]
    if holders:
        return f"is part of {holders[0]}", f"stop /dev/{holders[0]} first"
    for above in devices_on(lambda backing: backing == device):
        return f"is the file of {above}", f"run: losetup --detach {above}"
    if str(device) in _swaps():
        return "is swap space", f"run: swapoff {device}"
    return None


def _swaps() -> list[str]:
    try:
        lines = Path("/proc/swaps").read_text().splitlines()[1:]
    except OSError:
        return []  # a kernel without
    return [line.split()[0] for line in lines]


def users_of(device: Path) -> str:
    """The processes that have it open, as far as we may look, in words that end a sentence."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.readlink(link) == str(device):
                found.append(link.parts[2])
    return f" by process {found[0]}" if found else ""


def attach(
    file: Path, *, block_bytes: int, read_only: bool, discards: bool, direct: bool = True
) -> Path:
    """A new loop device on `file`; discard is off unless the file can do it.

    `direct`: I/O past the page cache of the file, which must take blocks that small then.
    """
    device = _add()
    arguments = [f"--direct-io={'on' if direct else 'off'}", "--sector-size", str(block_bytes)]
    if read_only:
        arguments.append("--read-only")
    try:
        run("losetup", *arguments, str(device), str(file))
        if not discards:
            _switch_discard_off(device)
    except NotEnded:
        raise  # the device is losetup's until the mount ends; then `pmblk detach` finds it
    except PmblkError:
        _remove(device)
        raise
    return device


def detach(device: Path) -> None:
    """Detach and remove; the device must not be in use. Raises WorkFailed."""
    run("losetup", "--detach", str(device))
    if not settled(device):
        raise WorkFailed(
            f"{device} is still in use{users_of(device)}", hint="it goes when that lets go"
        )
    _remove(device)


def settled(device: Path) -> bool:
    """The kernel detaches when the last user lets go, and udev probes what is new."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (DEVICES / device.name / "loop").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def abandon(device: Path) -> None:
    """Detach a device whose file is gone, now or, if it is in use, when its last user lets go."""
    run("losetup", "--detach", str(device))
    _remove(device)


def _add() -> Path:
    """A loop device that nobody had before."""
    try:
        with CONTROL.open() as control:
            return Path(f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_ADD, -1)}")
    except OSError as error:
        raise PmblkError(
            f"cannot add a loop device: {error.strerror}", hint="it takes root and the loop driver"
        ) from error


def _remove(device: Path) -> None:
    """Unless somebody has it: then the kernel says EBUSY, and it stays."""
    with contextlib.suppress(OSError), CONTROL.open() as control:
        fcntl.ioctl(control, LOOP_CTL_REMOVE, int(device.name.removeprefix("loop")))


def _switch_discard_off(device: Path) -> None:
    """By a child: the kernel first waits for every I/O that is under way."""
    setting = DEVICES / device.name / "queue/discard_max_bytes"
    try:
        run("sh", "-c", 'echo 0 >"$0"', str(setting), seconds=ANSWER_SECONDS)
    except NotEnded:
        raise
    except WorkFailed as error:
        run("losetup", "--detach", str(device))
        raise WorkFailed(f"cannot switch discard off on {device}: {error.message}") from error
