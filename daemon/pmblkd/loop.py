"""Loop devices: one added for each attachment, found by their backing file, removed again.

A device is found in /sys/block by the path of its file. The file itself is never touched, for its
file system may be a mount whose daemon is gone. Sources: loop(4), losetup(8).
"""

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pmblk import PmblkError
from pmblkd.errors import WorkFailed

PROGRAM_SECONDS = 30
SETTLE_SECONDS = 5
CONTROL = Path("/dev/loop-control")
LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81  # include/uapi/linux/loop.h


def run(program: str, *arguments: str) -> str:
    """The program's output. Raises WorkFailed with its words, or when it takes too long."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=PROGRAM_SECONDS,
            check=False,
            env={**os.environ, "LC_ALL": "C", "PATH": path},
        )
    except FileNotFoundError:
        raise PmblkError(f"{program} is not installed", hint=f"install {program}") from None
    except subprocess.TimeoutExpired:
        raise WorkFailed(
            f"{program} did not end in {PROGRAM_SECONDS} s", hint="is the daemon alive?"
        ) from None
    if done.returncode != 0:
        words = done.stderr.strip() or f"exit status {done.returncode}"
        raise WorkFailed(words if words.startswith(program) else f"{program}: {words}")
    return done.stdout


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """One attach or detach at a time on this machine. Raises PmblkError without root."""
    try:
        control = CONTROL.open()
    except OSError as error:
        raise PmblkError(
            f"cannot open {CONTROL}: {error.strerror}", hint="it takes root and the loop driver"
        ) from error
    with control:
        fcntl.flock(control, fcntl.LOCK_EX)
        yield


def devices_on(is_ours: Callable[[Path], bool]) -> list[Path]:
    """The loop devices whose backing file, by its path, is one of ours."""
    found = []
    for entry in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        try:
            backing = entry.read_text().rstrip("\n").removesuffix(" (deleted)")
        except OSError:
            continue  # detached meanwhile
        if is_ours(Path(backing)):
            found.append(Path("/dev") / entry.parts[3])
    return found


def is_on(number: int, mountpoint: Path) -> bool:
    """Whether a block device, by its number, is a loop device on a file below the mountpoint.

    One of its partitions is, too. What is stacked on top of such devices is not found out.
    """
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for place in (entry, entry.resolve().parent):
        with contextlib.suppress(OSError):
            backing = Path((place / "loop/backing_file").read_text().rstrip("\n"))
            return backing.is_relative_to(mountpoint)
    return False


def attach(file: Path, *, block_bytes: int, read_only: bool, discards: bool) -> Path:
    """A new loop device on `file`, with direct I/O; discard is off unless the file can do it."""
    device = _add()
    arguments = ["--direct-io=on", "--sector-size", str(block_bytes)]
    if read_only:
        arguments.append("--read-only")
    try:
        run("losetup", *arguments, str(device), str(file))
        if not discards:
            _switch_discard_off(device)
    except PmblkError:
        _remove(device)
        raise
    return device


def detach(device: Path) -> None:
    """Detach and remove; the device must not be in use. Raises WorkFailed."""
    run("losetup", "--detach", str(device))
    deadline = time.monotonic() + SETTLE_SECONDS
    # The kernel detaches when the last user lets go, and udev probes what is new.
    while (Path("/sys/block") / device.name / "loop").exists():
        if time.monotonic() > deadline:
            raise WorkFailed(f"{device} is still in use", hint="close what has it open")
        time.sleep(0.02)
    _remove(device)


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
    setting = Path("/sys/block") / device.name / "queue/discard_max_bytes"
    try:
        setting.write_text("0")
    except OSError as error:
        run("losetup", "--detach", str(device))
        raise WorkFailed(f"cannot switch discard off on {device}: {error.strerror}") from error
