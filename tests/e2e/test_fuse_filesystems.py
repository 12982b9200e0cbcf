"""ext4, xfs and btrfs over a loop device on a FUSE file: a whole life, and a daemon killed amid it.

On both engines and each way that the bytes of the file can go (`tests.e2e.fuse_files`). Only the
kernel engine discards: with `punch` memory is given back, without it is zeroed and kept.

Where a check has a seed, the test's output shows it.
"""

import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmblkd.compare import fio
from tests.e2e.fuse_files import WAYS, client, opened
from tests.harness import fsync_writer
from tests.harness.daemon import Daemon, running
from tests.harness.file_systems import (
    TREE,
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
    setting,
)
from tests.harness.programs import assert_no_complaints, wait_for

pytestmark = pytest.mark.e2e

MIB = 1 << 20
LARGE_MIB = 40
HANG_SECONDS = 90
WRITER_SECONDS = 30
ROUNDS = 2
CONFIG = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = "400MiB"
representation = "REPRESENTATION"
dax = "DAX"

[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
engine = "ENGINE"
punch = PUNCH
"""
FIO = (
    *("--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--size=24m", "--fsync=64"),
    *("--direct=1", "--ioengine=libaio", "--iodepth=8"),
    *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
)


@contextlib.contextmanager
def served(
    representation: str = "extent", *, way: str = "auto", punch: bool = False
) -> Iterator[Daemon]:
    words = {
        "REPRESENTATION": representation,
        "ENGINE": WAYS[way].engine,
        "DAX": WAYS[way].dax,
        "PUNCH": str(punch).lower(),
    }
    text = CONFIG
    for word, value in words.items():
        text = text.replace(word, value)
    with running(text) as daemon, guarded(daemon, seconds=HANG_SECONDS):
        yield daemon


# ---- a whole life


@pytest.mark.parametrize(
    ("kind", "way", "representation", "punch"),
    [
        ("ext4", "pyfuse3", "page-cache", False),
        ("ext4", "off", "transient-page", True),
        ("ext4", "auto", "extent", False),
        ("ext4", "fast", "struct-page", True),
        ("xfs", "pyfuse3", "struct-page", False),
        ("xfs", "off", "page-cache", False),
        ("xfs", "auto", "pfn", True),
        ("xfs", "fast", "extent", False),
        ("btrfs", "pyfuse3", "pfn", False),
        ("btrfs", "off", "page-cache", True),
        ("btrfs", "auto", "transient-page", False),
        ("btrfs", "fast", "transient-page", True),
    ],
)
def test_a_file_system_keeps_what_was_written(
    kind: str, way: str, representation: str, punch: bool
) -> None:
    """Every kind on each way, each way with and without punching, every representation."""
    with (
        served(representation, way=way, punch=punch) as daemon,
        attached(daemon, "data") as device,
    ):
        directory = daemon.directory / "fs"
        make(kind, device)
        with mounted(device, directory):
            copy_tree(directory)
            fio.run([f"--directory={directory}", *FIO], seconds=60)
            run("sync", "--file-system", str(directory))
            before = checksums(directory)
            if WAYS[way].discards:
                trim(daemon, directory, punch=punch)
        check(kind, device)
        forget_cached(device)
        with mounted(device, directory):
            assert checksums(directory) == before
        tree = {f"{TREE.name}/{name}": digest for name, digest in checksums(TREE).items()}
        assert tree.items() <= before.items()
        check(kind, device)
        assert_no_complaints(daemon)


def trim(daemon: Daemon, directory: Path, *, punch: bool) -> None:
    """Fill a file, remove it and fstrim: its memory comes back with `punch`, and stays without.

    xfs frees what was removed when it finds the time, so fstrim may come too early.
    """
    large = directory / "large"
    large.write_bytes(random.randbytes(MIB) * LARGE_MIB)
    run("sync", "--file-system", str(directory))
    full = allocated(daemon)
    large.unlink()
    run("sync", "--file-system", str(directory))

    def freed() -> int:
        run("fstrim", str(directory))
        return full - allocated(daemon)

    if punch:
        wait_for(lambda: freed() > (LARGE_MIB - 4) * MIB)
    else:
        assert freed() <= 0


def allocated(daemon: Daemon) -> int:
    return daemon.report("data").allocated_bytes


# ---- the loop device


@pytest.mark.parametrize(
    ("way", "representation", "punch"),
    [
        ("off", "page-cache", True),
        ("off", "page-cache", False),
        ("auto", "extent", True),
        ("fast", "struct-page", False),
    ],
)
def test_what_is_discarded_reads_as_zeroes_and_what_is_zeroed_has_memory(
    way: str, representation: str, punch: bool
) -> None:
    """8 MiB are written, 2 discarded, 2 zeroed, and so is what has never been written."""
    with (
        served(representation, way=way, punch=punch) as daemon,
        attached(daemon, "data") as device,
    ):
        content = random.randbytes(MIB) * 8
        with opened(device) as fd:
            os.pwrite(fd, content, 0)
            os.fsync(fd)
        assert allocated(daemon) == 8 * MIB
        run("blkdiscard", "--offset", str(MIB), "--length", str(2 * MIB), str(device))
        assert allocated(daemon) == (6 if punch else 8) * MIB
        run("blkdiscard", "--offset", str(100 * MIB), "--length", str(100 * MIB), str(device))
        assert allocated(daemon) == (6 if punch else 8) * MIB, "a hole stays one"
        run("blkdiscard", "--zeroout", "-o", str(5 * MIB), "-l", str(2 * MIB), str(device))
        run("blkdiscard", "--zeroout", "-o", str(16 * MIB), "-l", str(2 * MIB), str(device))
        assert allocated(daemon) == (8 if punch else 10) * MIB, "zeroes have memory"
        cleared = [*range(1, 3), *range(5, 7)]
        expected = b"".join(
            bytes(MIB) if place in cleared else content[:MIB] for place in range(8)
        ) + bytes(12 * MIB)
        with opened(device) as fd:
            assert os.pread(fd, 20 * MIB, 0) == expected
        with client(daemon, "data") as handle:
            assert bytes(handle.pread(20 * MIB, 0)) == expected


@pytest.mark.parametrize("is_mounted", [False, True], ids=["idle", "mounted"])
def test_a_device_that_a_killed_daemon_left_is_no_obstacle(is_mounted: bool) -> None:
    with served() as daemon, contextlib.ExitStack() as stack:
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


@pytest.mark.parametrize(
    ("way", "representation"),
    [("pyfuse3", "page-cache"), ("off", "page-cache"), ("auto", "extent"), ("fast", "struct-page")],
)
def test_nothing_that_was_fsynced_is_lost_when_the_daemon_is_killed(
    way: str, representation: str
) -> None:
    """Past the daemon writes go on after its end, but no fsync does: nothing more is promised."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    promises: list[str] = []
    with served(representation, way=way) as daemon:
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
