"""The mount's life: a crash below it, a full medium below it, and places where it cannot be."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pmblkd import mounts
from tests.e2e.test_fuse_files import opened, refused
from tests.harness.daemon import PMBLK, Daemon, running, scratch
from tests.harness.file_systems import guarded, run

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SIZE = 32 * MIB
HANG_SECONDS = 60
CONFIG = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = "32MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
"""


@contextlib.contextmanager
def tmpfs(directory: Path, *, size: int) -> Iterator[Path]:
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "pmblk-test", str(directory))
    try:
        yield directory
    finally:
        run("umount", str(directory))


# ---- stops and crashes


def test_a_stop_takes_the_mount_the_directory_and_the_sockets_away() -> None:
    with running(CONFIG) as daemon:
        mountpoint = daemon.directory / "mnt"
        assert mounts.find(mountpoint) is not None
        assert daemon.stop() == 0, daemon.log
        assert mounts.find(mountpoint) is None
        left = {path.name for path in daemon.directory.iterdir()}
        assert left == {"data.img", "pmblk.toml", "daemon.log", "notify.sock"}


def test_a_stop_leaves_a_mountpoint_that_was_there_before() -> None:
    with scratch() as directory:
        (directory / "mnt").mkdir()
        daemon = Daemon(directory, CONFIG.replace("{dir}", str(directory))).start()
        assert daemon.stop() == 0, daemon.log
        assert (directory / "mnt").is_dir()
        assert mounts.find(directory / "mnt") is None


def test_a_stop_does_not_wait_for_files_that_are_still_open() -> None:
    with running(CONFIG) as daemon:
        fd = os.open(daemon.directory / "mnt" / "data", os.O_RDWR)
        os.pwrite(fd, b"kept", 0)
        assert daemon.stop() == 0, daemon.log
        with refused(errno.ENOTCONN):
            os.pread(fd, 4, 0)
        assert "files are open" in daemon.log
        with contextlib.suppress(OSError):
            os.close(fd)  # close(2) says that nobody is there any more, and closes
        assert (daemon.directory / "data.img").read_bytes()[:4] == b"kept"


def test_a_mount_that_a_killed_daemon_left_does_not_stop_the_next_start() -> None:
    with running(CONFIG) as daemon:
        file = daemon.directory / "mnt" / "data"
        with opened(file) as fd:
            os.pwrite(fd, b"before the crash", 0)
        daemon.kill()
        with refused(errno.ENOTCONN):
            file.stat()
        daemon.start()
        with guarded(daemon, seconds=HANG_SECONDS), opened(file) as fd:
            assert os.pread(fd, 16, 0) == b"before the crash"
        assert "killed daemon's mount is in the way" in daemon.log
        assert daemon.stop() == 0, daemon.log
        assert mounts.find(daemon.directory / "mnt") is None


def test_the_exports_live_on_when_somebody_unmounts_the_directory() -> None:
    with running(CONFIG) as daemon:
        run("umount", str(daemon.directory / "mnt"))
        assert int(run("nbdinfo", "--size", daemon.uri("data"))) == SIZE
        assert daemon.stop() == 0, daemon.log


# ---- a full medium


def test_a_full_medium_is_enospc_to_the_writer_and_the_daemon_lives_on() -> None:
    with scratch() as directory, tmpfs(directory / "small", size=8 * MIB) as small:
        text = CONFIG.replace("{dir}/data.img", f"{small}/data.img")
        daemon = Daemon(directory, text.replace("{dir}", str(directory))).start()
        try:
            with (
                guarded(daemon, seconds=HANG_SECONDS),
                opened(directory / "mnt" / "data") as fd,
            ):
                written = fill(fd)
                assert 6 * MIB <= written <= 8 * MIB
                assert os.pread(fd, MIB, written - MIB) == b"f" * MIB
                assert os.pread(fd, MIB, 16 * MIB) == bytes(MIB)
                assert os.pwrite(fd, b"g" * MIB, 0) == MIB  # there is memory under it already
                os.fsync(fd)
            assert daemon.stop() == 0, daemon.log
        finally:
            if daemon.running:
                daemon.stop()


def fill(fd: int) -> int:
    """Write whole mebibytes until there is no space; how many bytes went in."""
    for written in range(0, SIZE, MIB):
        try:
            os.pwrite(fd, b"f" * MIB, written)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return written
            raise
    return SIZE


# ---- places where no mount can be


def _in_use(mountpoint: Path) -> None:
    mountpoint.mkdir()
    run("mount", "-t", "tmpfs", "pmblk-test", str(mountpoint))


def _not_empty(mountpoint: Path) -> None:
    mountpoint.mkdir()
    (mountpoint / "precious").touch()


BAD_PLACES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "in use": (_in_use, "mnt", "is a mountpoint in use (tmpfs)"),
    "not empty": (_not_empty, "mnt", "is not empty"),
    "a file": (Path.touch, "mnt", "is not a directory"),
    "below a missing directory": (lambda _: None, "missing/mnt", "no directory"),
}


@pytest.mark.parametrize("place", BAD_PLACES)
def test_a_bad_mountpoint_is_one_line_and_nothing_is_made(place: str) -> None:
    prepare, name, complaint = BAD_PLACES[place]
    with scratch() as directory:
        config = directory / "pmblk.toml"
        text = CONFIG.replace("{dir}/mnt", f"{{dir}}/{name}")
        config.write_text(text.replace("{dir}", str(directory)))
        prepare(directory / name)
        before = listing(directory)
        done = subprocess.run(
            [PMBLK, "serve", str(config), "--set", f"control.socket={directory}/control.sock"],
            capture_output=True,
            text=True,
            timeout=15,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"pmblk: {config}: fuse.mountpoint: ")
        assert complaint in line
        assert listing(directory) == before


def listing(directory: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in directory.rglob("*"))
