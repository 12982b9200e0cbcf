"""File systems on namespaces: attach, make, mount, check, compare. Every program has a time limit.

For the demo and the end-to-end tests. Everything here runs beside the daemon, never in it. When a
daemon hangs, whoever waits for its mount cannot even be killed: `guarded` ends the daemon then, and
all of them get an error.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from pmblkd import loop
from tests.harness.daemon import Daemon

PROGRAM_SECONDS = 60
GIVE_UP_SECONDS = 5  # for what was killed to be gone
TREE = Path("/usr/include/linux")  # a thousand small files that every machine with gcc has

_MAKE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ext4": ("mkfs.ext4", "-q", "-F"),
        "xfs": ("mkfs.xfs", "-q", "-f"),
        "btrfs": ("mkfs.btrfs", "-q", "-f"),
    }
)
_CHECK: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ext4": ("e2fsck", "-f", "-n"),
        "xfs": ("xfs_repair", "-n"),
        "btrfs": ("btrfs", "check", "--readonly"),
    }
)
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class ProgramError(Exception):
    """A program failed, or did not end in time: which, and what it said."""


def run(*command: str, seconds: float = PROGRAM_SECONDS) -> str:
    """Its standard output. Raises ProgramError; leaves no process behind, interrupted or not."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # ^C is for the caller to act on
        env={**os.environ, "LC_ALL": "C", "PATH": _PATH},
    )
    with process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise ProgramError(f"{' '.join(command)} did not end in {seconds:g} s") from None
        finally:
            _end(process)
    if process.returncode != 0:
        said = " ".join((errors.strip() or output.strip()).split())[-400:]
        raise ProgramError(f"{' '.join(command)}: exit status {process.returncode}: {said}")
    return output


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(GIVE_UP_SECONDS)


@contextlib.contextmanager
def guarded(daemon: Daemon, *, seconds: float) -> Iterator[None]:
    """SIGKILL for the daemon when the block takes longer than that."""
    with killing(lambda: [daemon.pid] if daemon.running else [], seconds=seconds):
        yield


@contextlib.contextmanager
def killing(alive: Callable[[], Sequence[int]], *, seconds: float) -> Iterator[None]:
    """SIGKILL for those of the processes that are alive when the block takes longer than that."""

    def kill() -> None:
        for pid in alive():
            os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def attached(daemon: Daemon, name: str) -> Iterator[Path]:
    """The namespace as a block device, by the command line; detached at the end."""
    device = Path(run(*daemon.command("attach", name)).strip())
    try:
        yield device
    except BaseException:
        drop_loop(device)
        raise
    run(*daemon.command("detach", name))


def drop_loop(device: Path) -> None:
    """Detach and remove a loop device of ours without the daemon, which may be dead."""
    with contextlib.suppress(ProgramError):
        run("losetup", "--detach", str(device))
    number = int(device.name.removeprefix("loop"))
    deadline = time.monotonic() + GIVE_UP_SECONDS
    with loop.CONTROL.open() as control:
        while time.monotonic() < deadline:
            try:
                fcntl.ioctl(control, loop.LOOP_CTL_REMOVE, number)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    return  # ENODEV: it is gone
            time.sleep(0.02)  # whoever looks at it, udev for one, will let go


def setting(device: Path, name: str) -> str:
    """What /sys/block says of a device. Raises OSError."""
    return (Path("/sys/block") / device.name / name).read_text().strip()


def make(kind: str, device: Path) -> None:
    run(*_MAKE[kind], str(device))


def check(kind: str, device: Path) -> None:
    """Look for damage, mend nothing. Raises ProgramError with the checker's words."""
    run(*_CHECK[kind], str(device))


@contextlib.contextmanager
def mounted(device: Path, directory: Path) -> Iterator[Path]:
    """The device's file system at `directory`, which is made and removed."""
    directory.mkdir()
    try:
        run("mount", str(device), str(directory))
        try:
            yield directory
        except BaseException:
            _unmount_anyhow(directory)
            raise
        run("umount", str(directory))
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _unmount_anyhow(directory: Path) -> None:
    try:
        run("umount", str(directory))
    except ProgramError:
        with contextlib.suppress(ProgramError):
            run("umount", "--lazy", str(directory))


def copy_tree(directory: Path) -> None:
    run("cp", "-a", str(TREE), str(directory))
    run("sync", "--file-system", str(directory))


def forget_cached(device: Path) -> None:
    """What the kernel caches of this device; other work on the machine is left alone."""
    run("blockdev", "--flushbufs", str(device))


def checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of each file below, by relative path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def leftovers(directory: Path) -> list[str]:
    """What still is there of a scratch directory: itself, mounts, devices, processes."""
    text = str(directory)
    found = [f"the directory {text}"] if directory.exists() else []
    mountinfo = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [f"the mount {line.split()[4]}" for line in mountinfo if text in line]
    devices = run("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE").splitlines()
    found += [f"the device {line.split()[0]}" for line in devices if text in line]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if text in path.read_bytes().decode(errors="replace"):
                found.append(f"the process {path.parent.name}")
    return found
