"""A daemon that is killed or hangs at a bad moment: whoever waits for it gets an error, in time.

Every scene has the same crowd at work: a file system that is written and synced, one that is
unmounted, fio and mkfs on loop devices, reads and page faults of files, `pmblk attach` and
`detach`. Then the daemon is killed, or stopped as if it hung; more come and ask; all of them have
to end. What ends them is the end of the connection: with the daemon, by the kernel's time-out for
a request, or by `pmblk detach --all --force`. Then a new daemon serves what was there.
"""

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmblkd import loop, mounts
from tests.harness import fsync_writer
from tests.harness.command_line import detach_all
from tests.harness.daemon import PMBLK, Daemon, scratch
from tests.harness.file_systems import ProgramError, attached, check, drop_loop, guarded, make, run
from tests.harness.programs import wait_for

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SIZES = {
    "files": 64 * MIB + 4096 * (os.getpid() % 1000),
    "leaving": 64 * MIB + 4096 * (os.getpid() % 1000),
    "disk": 32 * MIB + 4096 * (os.getpid() % 1000),
    "fresh": 32 * MIB + 4096 * (os.getpid() % 1000),
    "pages": 16 * MIB + 4096 * (os.getpid() % 1000),
    "coming": 8 * MIB + 4096 * (os.getpid() % 1000),
}
NAMESPACE = """
[[namespace]]
name = "NAME"
path = "{dir}/NAME.img"
size = SIZE
dax = "off"
"""
FUSE = """
[fuse]
mountpoint = "{dir}/mnt"
engine = "ENGINE"
request_timeout_seconds = TIMEOUT
"""
HANG_SECONDS = 120
START_SECONDS = 30
END_SECONDS = 15  # after the connection's end; the commands of pmblk are slow to begin
TIMEOUT_SECONDS = 1
TIMEOUT_CHECK_SECONDS = 15  # how often the kernel looks; it may take two looks
TIMEOUT_LINUX = (6, 14)

FAULTS = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
pages = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
while True:
    for offset in range(0, len(pages), 4096):
        pages[offset]
    pages.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    open(sys.argv[2], "w").close()
"""


class Crowd:
    """Programs at work, by name. In the end all of them are to have ended by themselves."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._at_work: dict[str, subprocess.Popen[bytes]] = {}

    def repeat(self, name: str, command: str) -> None:
        """A shell's command, again and again until it fails."""
        self.start(name, "sh", "-c", f"while {command}; do : >{self.sign(name)}; done")

    def start(self, name: str, *command: str) -> None:
        with (self.directory / f"{name}.said").open("w") as said:
            self._at_work[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def said(self, name: str) -> list[str]:
        return (self.directory / f"{name}.said").read_text().splitlines()

    def sign(self, name: str) -> Path:
        return self.directory / f"{name}.at-work"

    def await_work(self, *names: str) -> None:
        wait_for(lambda: all(self.sign(name).exists() for name in names), seconds=START_SECONDS)

    def await_end(self, *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while late := [name for name, one in self._at_work.items() if one.poll() is None]:
            assert time.monotonic() < deadline, f"not ended in {seconds} s: {', '.join(late)}"
            time.sleep(0.02)

    def kill(self) -> None:
        for process in self._at_work.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(END_SECONDS)


@contextlib.contextmanager
def served(engine: str, *, timeout_seconds: int = 0) -> Iterator[Daemon]:
    with scratch() as directory:
        text = "".join(
            NAMESPACE.replace("NAME", name).replace("SIZE", str(size))
            for name, size in SIZES.items()
        ) + FUSE.replace("ENGINE", engine).replace("TIMEOUT", str(timeout_seconds))
        daemon = Daemon(directory, text.replace("{dir}", str(directory)))
        try:
            daemon.start()
            with guarded(daemon, seconds=HANG_SECONDS):
                yield daemon
        finally:
            if daemon.running:
                daemon.kill()
            _clear(daemon)


def _clear(daemon: Daemon) -> None:
    for name in ("files", "leaving", "coming"):
        mountpoint = daemon.directory / f"{name}.fs"
        while mounts.find(mountpoint) is not None:
            mounts.unmount(mountpoint)
    for device in devices(daemon):
        drop_loop(device)


def devices(daemon: Daemon) -> list[Path]:
    return loop.devices_below(daemon.directory / "mnt", SIZES)


@contextlib.contextmanager
def crowd_at_work(daemon: Daemon) -> Iterator[Crowd]:
    crowd = Crowd(daemon.directory)
    try:
        _begin(crowd, daemon)
        yield crowd
    finally:
        if daemon.running:
            os.kill(daemon.pid, signal.SIGKILL)  # else the crowd could not be killed
        crowd.kill()


def _begin(crowd: Crowd, daemon: Daemon) -> None:
    """All of it is going on when this returns."""
    directory, mnt = daemon.directory, daemon.directory / "mnt"
    for name in ("files", "leaving"):
        device = attach(daemon, name)
        make("ext4", device)
        (directory / f"{name}.fs").mkdir()
        run("mount", str(device), str(directory / f"{name}.fs"))
    writer = (sys.executable, fsync_writer.__file__, str(directory / "files.fs"), "1")
    crowd.start("writer", *writer)
    disk, fresh = attach(daemon, "disk"), attach(daemon, "fresh")
    mkfs = "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0"
    crowd.repeat("mkfs", f"PATH=$PATH:/usr/sbin {mkfs} {fresh}")
    crowd.repeat("fio", _fio(disk, seconds=0.2))
    crowd.repeat("reader", f"dd if={mnt}/pages of=/dev/null bs=1M iflag=direct")
    crowd.repeat("ls", f"ls -l {mnt}")
    at = f"--socket {daemon.socket}"
    crowd.repeat("attacher", f"{PMBLK} attach coming {at} && {PMBLK} detach coming {at}")
    crowd.start("faults", sys.executable, "-c", FAULTS, f"{mnt}/pages", str(crowd.sign("faults")))
    crowd.await_work("mkfs", "fio", "reader", "ls", "attacher", "faults")
    (directory / "leaving.fs" / "dirty").write_bytes(b"d" * 4 * MIB)
    crowd.start("long fio", "sh", "-c", _fio(disk, seconds=HANG_SECONDS))


def _fio(device: Path, *, seconds: float) -> str:
    return (
        f"fio --name=disk --filename={device} --rw=randrw --bs=64k --direct=1 --ioengine=libaio"
        f" --iodepth=16 --time_based --runtime={int(seconds * 1000)}ms --size=16m"
    )


def come_and_ask(crowd: Crowd, daemon: Daemon) -> None:
    """Those who come when it has happened."""
    mnt = daemon.directory / "mnt"
    crowd.start("umount", "umount", str(daemon.directory / "leaving.fs"))
    crowd.start("sync", "sync", "--file-system", str(daemon.directory / "files.fs"))
    crowd.start("stat", "stat", "--file-system", str(mnt))
    crowd.start("cat", "cat", str(mnt / "pages"))
    crowd.start("list", *daemon.command("list"))
    crowd.start("attach", *daemon.command("attach", "coming"))
    crowd.start("detach", *daemon.command("detach", "--all"))


def attach(daemon: Daemon, name: str) -> Path:
    return Path(run(*daemon.command("attach", name)).strip())


def recover(daemon: Daemon, crowd: Crowd) -> None:
    """A new daemon serves the same files, and the file systems are whole."""
    promises = crowd.said("writer")
    assert any(line.startswith("kept") for line in promises)
    for name in ("files", "leaving"):
        with contextlib.suppress(ProgramError):  # one of them was being unmounted
            run("umount", str(daemon.directory / f"{name}.fs"))
    daemon.start()
    assert devices(daemon) == []
    mnt = daemon.directory / "mnt"
    assert sorted(os.listdir(mnt)) == sorted(SIZES)
    assert (mnt / "pages").stat().st_size == SIZES["pages"]
    for name in ("files", "leaving"):
        with attached(daemon, name) as device:
            mountpoint = daemon.directory / f"{name}.fs"
            run("mount", str(device), str(mountpoint))  # replays the journal
            if name == "files":
                assert fsync_writer.lost(mountpoint, promises) == []
            run("umount", str(mountpoint))
            check("ext4", device)
    assert daemon.stop() == 0, daemon.log


# ---- what ends them


@pytest.mark.parametrize("engine", ["kernel", "pyfuse3"])
def test_when_the_daemon_is_killed_everybody_has_an_error_at_once(engine: str) -> None:
    with served(engine) as daemon, crowd_at_work(daemon) as crowd:
        daemon.kill()
        come_and_ask(crowd, daemon)
        crowd.await_end(seconds=END_SECONDS)
        recover(daemon, crowd)


def test_when_the_daemon_hangs_the_kernel_ends_its_mount_in_time() -> None:
    """Where the kernel cannot (before Linux 6.14), the command does."""
    with (
        served("kernel", timeout_seconds=TIMEOUT_SECONDS) as daemon,
        crowd_at_work(daemon) as crowd,
    ):
        os.kill(daemon.pid, signal.SIGSTOP)
        come_and_ask(crowd, daemon)
        if linux() < TIMEOUT_LINUX:
            detach_all(daemon, "--force")
        crowd.await_end(seconds=TIMEOUT_SECONDS + 2 * TIMEOUT_CHECK_SECONDS + END_SECONDS)
        daemon.kill()
        recover(daemon, crowd)


def test_when_the_daemon_hangs_a_command_ends_its_mount() -> None:
    """With pyfuse3, which knows of no time-out, nothing else does."""
    with served("pyfuse3") as daemon, crowd_at_work(daemon) as crowd:
        mountpoint = str(daemon.directory / "mnt")
        os.kill(daemon.pid, signal.SIGSTOP)
        come_and_ask(crowd, daemon)
        _, said = detach_all(daemon, "--force")
        assert said["aborted"] == [mountpoint]
        crowd.await_end(seconds=END_SECONDS)
        run("umount", str(daemon.directory / "files.fs"))
        status, said = detach_all(daemon)
        assert (status, said["unmounted"]) == (0, [mountpoint])
        assert devices(daemon) == []
        daemon.kill()
        recover(daemon, crowd)


def linux() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    assert match is not None
    return int(match[1]), int(match[2])
