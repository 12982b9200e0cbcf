"""ext4, xfs and btrfs over a loop device on a FUSE file: a whole life, and a daemon killed amid it.

Where a check has a seed, the test's output shows it.
"""

import contextlib
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmblkd.compare import fio
from tests.e2e import fsync_writer
from tests.e2e.conftest import wait_for
from tests.harness.daemon import Daemon, running
from tests.harness.file_systems import (
    TREE,
    ProgramError,
    attached,
    check,
    checksums,
    copy_tree,
    drop_loop,
    forget_cached,
    guarded,
    make,
    mounted,
    run,
)

pytestmark = pytest.mark.e2e

HANG_SECONDS = 90
WRITER_SECONDS = 30
ROUNDS = 2
CONFIG = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = "400MiB"
representation = "REPRESENTATION"

[fuse]
mountpoint = "{dir}/mnt"
"""
FIO = (
    *("--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--size=24m", "--fsync=64"),
    *("--direct=1", "--ioengine=libaio", "--iodepth=8"),
    *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
)


@contextlib.contextmanager
def served(representation: str) -> Iterator[Daemon]:
    with (
        running(CONFIG.replace("REPRESENTATION", representation)) as daemon,
        guarded(daemon, seconds=HANG_SECONDS),
    ):
        yield daemon


def setting(device: Path, name: str) -> str:
    return (Path("/sys/block") / device.name / name).read_text().strip()


# ---- a whole life


@pytest.mark.parametrize(
    ("kind", "representation"),
    [
        ("ext4", "extent"),
        ("ext4", "page-cache"),
        ("xfs", "extent"),
        ("btrfs", "page-cache"),
        ("ext4", "struct-page"),
        ("xfs", "transient-page"),
        ("btrfs", "pfn"),
    ],
)
def test_a_file_system_keeps_what_was_written(kind: str, representation: str) -> None:
    with served(representation) as daemon, attached(daemon, "data") as device:
        directory = daemon.directory / "fs"
        make(kind, device)
        with mounted(device, directory):
            copy_tree(directory)
            fio.run([f"--directory={directory}", *FIO], seconds=60)
            run("sync", "--file-system", str(directory))
            before = checksums(directory)
        check(kind, device)
        forget_cached(device)
        with mounted(device, directory):
            assert checksums(directory) == before
        tree = {f"{TREE.name}/{name}": digest for name, digest in checksums(TREE).items()}
        assert tree.items() <= before.items()
        check(kind, device)


# ---- the loop device


def test_the_loop_device_has_our_block_size_direct_io_and_no_discard() -> None:
    with served("extent") as daemon, attached(daemon, "data") as device:
        assert setting(device, "queue/logical_block_size") == "4096"
        assert setting(device, "loop/dio") == "1"
        assert setting(device, "queue/discard_max_bytes") == "0"
        assert setting(device, "loop/backing_file") == f"{daemon.directory}/mnt/data"
        shown = run("lsblk", "--noheadings", "--output", "LOG-SEC,DISC-MAX", str(device))
        assert shown.split() == ["4096", "0B"]


def test_a_discard_is_refused_rather_than_lost() -> None:
    with (
        served("extent") as daemon,
        attached(daemon, "data") as device,
        pytest.raises(ProgramError, match="not supported"),
    ):
        run("blkdiscard", str(device))


def test_a_detached_loop_device_is_gone() -> None:
    with served("extent") as daemon:
        with attached(daemon, "data") as device:
            assert Path("/sys/block", device.name).exists()
        assert f"{daemon.directory}/mnt" not in run("losetup", "--list")


@pytest.mark.parametrize("is_mounted", [False, True], ids=["idle", "mounted"])
def test_a_device_that_a_killed_daemon_left_is_no_obstacle(is_mounted: bool) -> None:
    with served("extent") as daemon, contextlib.ExitStack() as stack:
        directory = daemon.directory / "fs"
        left = Path(run(*daemon.command("attach", "data")).strip())
        try:
            make("ext4", left)
            if is_mounted:
                stack.enter_context(mounted(left, directory))
            daemon.kill()
            daemon.start()
            stack.close()
            run(*daemon.command("detach", "data"))
            wait_for(lambda: not is_left(left, daemon))
        except BaseException:
            drop_loop(left)
            raise
        with attached(daemon, "data") as device, mounted(device, directory):
            (directory / "file").write_text("works")


def is_left(device: Path, daemon: Daemon) -> bool:
    """Whether the loop device is there: on our file, by its path before or after the unmount, or
    empty. Somebody else may have the number by now, with a file of his."""
    if not Path("/sys/block", device.name).exists():
        return False
    try:
        backing = setting(device, "loop/backing_file")
    except OSError:
        return True
    return backing.startswith((str(daemon.directory), "/data"))


# ---- a crash


def test_the_check_for_lost_files_finds_each_kind_of_loss(tmp_path: Path) -> None:
    promises = ["begun a v1 100", "kept a v1 100", "begun a v2 100", "grown log 2000"]
    (tmp_path / "log").write_bytes(fsync_writer.content("log", 2000))
    for version in ("v1", "v2"):
        (tmp_path / "a").write_bytes(fsync_writer.content(version, 100))
        assert fsync_writer.lost(tmp_path, promises) == []
    kept = [*promises, "kept a v2 100"]
    (tmp_path / "a").write_bytes(fsync_writer.content("v1", 100))
    assert len(fsync_writer.lost(tmp_path, kept)) == 1  # an older version is back
    (tmp_path / "a").unlink()
    assert fsync_writer.lost(tmp_path, kept) == ["a is missing"]
    (tmp_path / "log").write_bytes(fsync_writer.content("log", 1999))
    assert len(fsync_writer.lost(tmp_path, kept)) == 2
    assert fsync_writer.lost(tmp_path, ["begun b v1 100"]) == []  # nobody said that it is kept


@pytest.mark.parametrize("representation", ["extent", "page-cache", "struct-page"])
def test_nothing_that_was_fsynced_is_lost_when_the_daemon_is_killed(representation: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    promises: list[str] = []
    with served(representation) as daemon:
        with attached(daemon, "data") as device:
            make("ext4", device)
        for number in range(ROUNDS):
            promises += _crash(daemon, seed + number, kept=chosen.randrange(20, 120))
            daemon.start()
            _check(daemon, promises)


def _crash(daemon: Daemon, seed: int, *, kept: int) -> list[str]:
    """Kill the daemon when so many files are kept; what was promised until the writer ended."""
    device = Path(run(*daemon.command("attach", "data")).strip())
    directory = daemon.directory / "fs"
    try:
        with mounted(device, directory):
            lines = _write_and_kill(daemon, directory, seed, kept=kept)
    finally:
        drop_loop(device)
    assert sum(line.startswith("kept") for line in lines) >= kept
    return lines


def _write_and_kill(daemon: Daemon, directory: Path, seed: int, *, kept: int) -> list[str]:
    lines = []
    left = kept
    with _writer(directory, seed) as output:
        for line in output:
            lines.append(line)
            left -= line.startswith("kept")
            if left == 0 and daemon.running:
                daemon.kill()
    return lines


@contextlib.contextmanager
def _writer(directory: Path, seed: int) -> Iterator[Iterator[str]]:
    """The writer's lines; it ends when the device fails, or when its time is over."""
    command = [sys.executable, fsync_writer.__file__, str(directory), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        limit = threading.Timer(WRITER_SECONDS, process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            yield process.stdout
        finally:
            limit.cancel()
            process.kill()
    assert process.returncode == 0, f"the writer ended with {process.returncode}"


def _check(daemon: Daemon, promises: list[str]) -> None:
    directory = daemon.directory / "fs"
    with attached(daemon, "data") as device:
        with mounted(device, directory):  # replays the journal
            assert fsync_writer.lost(directory, promises) == []
        check("ext4", device)
