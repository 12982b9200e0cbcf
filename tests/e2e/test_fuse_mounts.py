"""The mount's life: a crash below it, a full medium below it, and places where it cannot be."""

import contextlib
import errno
import functools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pmblkd import fuse_connections, mounts
from tests.e2e.conftest import wait_for
from tests.e2e.test_fuse_files import opened, refused
from tests.harness.command_line import complaint, pmblk
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


# ---- dead mounts in the way


def test_a_dead_mount_that_somebody_works_in_does_not_stop_the_next_start() -> None:
    with running(CONFIG) as daemon:
        mountpoint = daemon.directory / "mnt"
        with subprocess.Popen(
            ["cat"], cwd=mountpoint, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as somebody:
            daemon.kill()
            daemon.start()
            assert sorted(os.listdir(mountpoint)) == ["data"]
            somebody.communicate(timeout=HANG_SECONDS)


@contextlib.contextmanager
def two_mounts() -> Iterator[tuple[Daemon, Daemon, Path]]:
    """A daemon's, and upon it another daemon's."""
    with running(CONFIG) as below, running(CONFIG) as above:
        mountpoint = below.directory / "mnt"
        run("mount", "--bind", str(above.directory / "mnt"), str(mountpoint))
        yield below, above, mountpoint


def test_dead_mounts_upon_dead_mounts_are_all_taken_away() -> None:
    with two_mounts() as (below, above, mountpoint):
        below.kill()
        above.kill()
        below.start()
        assert below.log.count("killed daemon's mount is in the way") == 2
        assert below.stop() == 0
        assert mounts.find(mountpoint) is None


def test_a_living_mount_below_a_dead_one_is_not_mounted_over() -> None:
    with two_mounts() as (below, above, mountpoint):
        above.kill()
        done = start_again(above, f"fuse.mountpoint={mountpoint}")
        assert done.returncode == 2
        line = done.stderr.splitlines()[-1]
        assert line.startswith(f"pmblk: {mountpoint} is a mountpoint in use (fuse.pmblk)")
        assert sorted(os.listdir(mountpoint)) == ["data"]
        assert below.stop() == 0, below.log


def test_a_mountpoint_below_a_dead_mount_is_one_line() -> None:
    with running(CONFIG) as dead, running(CONFIG) as daemon:
        dead.kill()
        assert daemon.stop() == 0
        mountpoint = dead.directory / "mnt"
        line = refusal(daemon, f"fuse.mountpoint={mountpoint}/data")
        assert f"lies below {mountpoint}, a mount that has lost its daemon" in line
        assert f"run: umount --lazy {mountpoint}" in line


def refusal(daemon: Daemon, *overrides: str) -> str:
    """The one line of a start that cannot be, in time."""
    return complaint(start_again(daemon, *overrides))


def start_again(daemon: Daemon, *overrides: str) -> "subprocess.CompletedProcess[str]":
    sets = [f"control.socket={daemon.directory}/another.sock", *overrides]
    words = [word for override in sets for word in ("--set", override)]
    return pmblk("serve", str(daemon.config), *words)


# ---- daemons that hang, and mounts that the kernel ends


@contextlib.contextmanager
def hung() -> Iterator[Daemon]:
    """It goes on afterwards, as if nothing had been."""
    with running(CONFIG) as daemon, guarded(daemon, seconds=HANG_SECONDS):
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            yield daemon
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert sorted(os.listdir(daemon.directory / "mnt")) == ["data"]


def test_beside_a_hung_daemon_a_start_and_a_detach_end_and_say_whom_to_end() -> None:
    """The same media: by their lock. The same mountpoint, or one below: by asking the mount."""
    with running(CONFIG) as another, hung() as daemon:
        assert another.stop() == 0
        mountpoint = daemon.directory / "mnt"
        assert f"data.img is in use by process {daemon.pid}" in refusal(daemon)
        with ThreadPoolExecutor() as pool:
            start = functools.partial(refusal, another)
            places = (f"fuse.mountpoint={place}" for place in (mountpoint, mountpoint / "data"))
            detached = pool.submit(pmblk, "detach", "--all", "--config", str(daemon.config))
            lines = [*pool.map(start, places)]
        done = detached.result()
        assert (done.returncode, done.stderr) == (1, "")
        for line in (*lines, done.stdout):
            assert f"process {daemon.pid}, which serves {mountpoint}, does not answer" in line
            assert f"kill -9 {daemon.pid}" in line
            assert "pmblk detach --all --force --config FILE" in line


@pytest.mark.parametrize("with_nbd", [False, True], ids=["fuse alone", "with nbd"])
def test_a_mount_that_the_kernel_ends_is_an_error_and_exports_live_on(with_nbd: bool) -> None:
    """A daemon with nothing left to serve fails, for its supervisor to start it again."""
    nbd = '[nbd]\nlisten = ["unix:{dir}/nbd.sock"]\n'
    assert nbd in CONFIG
    with running(CONFIG if with_nbd else CONFIG.replace(nbd, "")) as daemon:
        mount = mounts.find(daemon.directory / "mnt")
        assert mount is not None
        fuse_connections.abort(mount.minor)
        wait_for(lambda: "the kernel has ended the mount" in daemon.log)
        if with_nbd:
            assert int(run("nbdinfo", "--size", daemon.uri("data"))) == SIZE
            assert daemon.stop() == 0, daemon.log
        else:
            wait_for(lambda: not daemon.running)
            assert daemon.exit_status == 1
        assert mounts.find(daemon.directory / "mnt") is None


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
