"""Attaching: what the device is like, and that nobody is ever given a dead one."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmblk import PmblkError
from pmblkd import attach, fuse_connections, mounts
from pmblkd.errors import WorkFailed
from pmblkd.reports import FuseReport
from tests.e2e.attaching import CONFIG, DATA_BYTES, HANG_SECONDS, MIB, attach_it, devices, served
from tests.e2e.fuse_files import WAYS
from tests.harness.command_line import answer, complaint, pmblk
from tests.harness.daemon import Daemon, scratch
from tests.harness.file_systems import (
    ProgramError,
    attached,
    drop_loop,
    make,
    mounted,
    run,
    setting,
)
from tests.unit.reports import namespace_report

pytestmark = pytest.mark.e2e

# ---- the device


@pytest.mark.parametrize(
    ("way", "name", "block"),
    [
        ("pyfuse3", "small", "512"),
        ("off", "data", "4096"),
        ("auto", "data", "4096"),
        ("auto", "small", "512"),
        ("fast", "data", "4096"),
    ],
)
def test_a_device_has_our_block_size_direct_io_and_the_engine_s_discard(
    way: str, name: str, block: str
) -> None:
    engine, dax = WAYS[way]
    with served(engine, dax) as daemon, attached(daemon, name) as device:
        assert setting(device, "queue/logical_block_size") == block
        assert setting(device, "loop/dio") == "1"
        assert setting(device, "loop/backing_file") == f"{daemon.directory}/mnt/{name}"
        assert setting(device, "ro") == "0"
        discard = setting(device, "queue/discard_max_bytes")
        assert (discard != "0") == WAYS[way].discards
        shown = run("lsblk", "--noheadings", "--bytes", "--output", "LOG-SEC,DISC-MAX", str(device))
        assert shown.split() == [block, discard]
        make("ext4", device)


def test_a_read_only_namespace_is_a_read_only_device() -> None:
    with served() as daemon, attached(daemon, "fixed") as device:
        assert setting(device, "ro") == "1"
        assert device.read_bytes() == bytes(range(256)) * 4096
        with pytest.raises(ProgramError, match=r"not permitted|Read-only|Permission"):
            run("dd", "if=/dev/zero", f"of={device}", "bs=4096", "count=1", "oflag=direct")


@pytest.mark.parametrize("dax", ["fast", "off"])
def test_a_discard_reaches_the_media_through_the_kernel_engine(dax: str) -> None:
    with served("kernel", dax) as daemon, attached(daemon, "data") as device:
        media = daemon.directory / "data.img"
        source = daemon.directory / "source"
        source.write_bytes(b"x" * 2 * MIB)
        run("dd", f"if={source}", f"of={device}", "bs=1M", "oflag=direct")
        assert media.read_bytes()[: 2 * MIB] == source.read_bytes()
        run("blkdiscard", "--offset", str(MIB), "--length", str(MIB), str(device))
        assert media.read_bytes()[: 2 * MIB] == b"x" * MIB + bytes(MIB)


def test_a_discard_is_refused_where_the_engine_would_lose_it() -> None:
    with (
        served("pyfuse3") as daemon,
        attached(daemon, "data") as device,
        pytest.raises(ProgramError, match="not supported"),
    ):
        run("blkdiscard", str(device))


def test_small_blocks_work_also_where_the_disk_below_has_none() -> None:
    """With `dax = "fast"` the kernel hands them to the media, on a disk with blocks of 4096."""
    with scratch() as directory, disk_of_large_blocks(directory) as disk:
        text = CONFIG.replace("{dir}/small.img", f"{disk}/small.img")
        (directory / "fixed.img").write_bytes(bytes(MIB))
        for old, new in (("ENGINE", "kernel"), ("DAX", "fast"), ("SIZE", str(DATA_BYTES))):
            text = text.replace(old, new)
        daemon = Daemon(directory, text.replace("{dir}", str(directory))).start()
        try:
            with attached(daemon, "small") as device:
                assert setting(device, "loop/dio") == "0"
                run("dd", "if=/dev/urandom", f"of={device}", "bs=512", "count=3", "oflag=direct")
        finally:
            daemon.stop()
        assert any((disk / "small.img").read_bytes()[1024:1536])


@contextlib.contextmanager
def disk_of_large_blocks(directory: Path) -> Iterator[Path]:
    file = directory / "disk.img"
    run("truncate", "--size", "64M", str(file))
    arguments = ("--find", "--show", "--sector-size", "4096", str(file))
    device = Path(run("losetup", *arguments).strip())
    try:
        make("ext4", device)
        with mounted(device, directory / "disk") as disk:
            yield disk
    finally:
        drop_loop(device)


# ---- always the same one, and never a dead one


def test_attachments_at_the_same_time_are_one_device() -> None:
    with served() as daemon:
        crowd = [
            subprocess.Popen(daemon.command("attach", "data"), stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        said = {one.communicate(timeout=HANG_SECONDS)[0] for one in crowd}
        assert [one.returncode for one in crowd] == [0] * len(crowd)
        (device,) = devices(daemon)
        assert said == {f"{device}\n"}
        assert attach_it(daemon, "data") == device
        assert answer(daemon, "detach", "data") == f"{device}\n"
        assert answer(daemon, "detach", "data") == "data is not attached\n"


def test_a_device_on_a_dead_mount_below_the_present_one_is_not_handed_out() -> None:
    """Its path is that of the living file."""
    with served() as dead, served() as daemon:
        left = attach_it(dead, "data")
        dead.kill()
        mountpoint = dead.directory / "mnt"
        run("mount", "--bind", str(daemon.directory / "mnt"), str(mountpoint))
        namespace = namespace_report(
            name="data",
            fuse=FuseReport(
                path=f"{mountpoint}/data",
                engine="kernel",
                discards=True,
                dax="dax",
                dax_reason="",
            ),
        )
        device = attach.attach(namespace, via="loop")
        try:
            assert setting(device, "loop/backing_file") == setting(left, "loop/backing_file")
            assert device != left
            make("ext4", device)
            assert attach.attach(namespace, via="loop") == device
        finally:
            drop_loop(device)


def test_nothing_is_attached_when_the_mount_has_ended() -> None:
    with served() as daemon:
        mount = mounts.find(daemon.directory / "mnt")
        assert mount is not None
        namespace = daemon.report("data")
        os.kill(daemon.pid, signal.SIGSTOP)  # it would go, with its mount
        fuse_connections.abort(mount.minor)
        with pytest.raises(WorkFailed, match=r"the kernel has ended the mount on .*/mnt"):
            attach.attach(namespace, via="loop")
        mounts.unmount(mount.path)
        with pytest.raises(PmblkError, match=r"nothing is mounted on .*/mnt any more"):
            attach.attach(namespace, via="loop")
        assert devices(daemon) == []
        daemon.kill()


# ---- devices that outlive their daemon


def test_the_next_start_takes_away_what_was_attached() -> None:
    with served() as daemon:
        device = attach_it(daemon, "data")
        daemon.kill()
        daemon.start()
        assert devices(daemon) == []
        assert f"device={device}" in daemon.log
        with attached(daemon, "data") as another:
            make("ext4", another)


def test_no_daemon_serves_media_that_a_mounted_device_still_writes_to() -> None:
    """Two file systems would write to them: this one, and one on what is attached anew."""
    with served("kernel", "fast") as daemon:
        device = attach_it(daemon, "data")
        make("ext4", device)
        with mounted(device, daemon.directory / "fs") as directory:
            daemon.kill()
            write_past_every_daemon(device)
            done = pmblk("check", str(daemon.config), "--set", f"control.socket={daemon.socket}")
            line = complaint(done)
            assert f"{device} still writes to the media past every daemon" in line
            assert f"is mounted on {directory}; run: umount {directory}" in line
            with pytest.raises(AssertionError, match="still writes to the media"):
                daemon.start()
            mounts.unmount(daemon.directory / "mnt")  # it is known by its name too
            with pytest.raises(AssertionError, match="still writes to the media"):
                daemon.start()
        daemon.start()
        assert devices(daemon) == []


def write_past_every_daemon(device: Path) -> None:
    run("dd", f"if={device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct")


def test_no_daemon_serves_media_that_a_program_still_writes_to() -> None:
    with served("kernel", "fast") as daemon:
        device = attach_it(daemon, "data")
        daemon.kill()
        fd = os.open(device, os.O_RDWR)
        try:
            with pytest.raises(AssertionError, match=f"is open by process {os.getpid()}"):
                daemon.start()
        finally:
            os.close(fd)
        daemon.start()
        assert devices(daemon) == []


@pytest.mark.parametrize("dax", ["auto", "off"])
def test_a_dead_device_that_is_mounted_does_not_stop_the_next_start(dax: str) -> None:
    """It fails every write, and goes when it is unmounted."""
    with served("kernel", dax) as daemon:
        left = attach_it(daemon, "data")
        make("ext4", left)
        with mounted(left, daemon.directory / "fs"):
            daemon.kill()
            daemon.start()
            assert "dead, but in use" in daemon.log
            another = attach_it(daemon, "data")
            assert another != left
        assert set(answer(daemon, "detach", "data").split()) == {str(left), str(another)}
