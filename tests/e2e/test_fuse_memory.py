"""The circle of memory: the daemon needs some, to write what has to be written to get some.

A program fills a file system on a loop device on the daemon's file, in a group that is short of
memory. Where the daemon is in the same group and needs memory for a write, the kernel has it wait
for dirty pages of the group, which only the daemon can write. That takes control groups of version
1 (version 2 does not wait there), and is what docs/operations.md tells how to keep out of.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmblkd import fuse_connections, mounts
from tests.e2e.conftest import wait_for
from tests.harness.daemon import Daemon, running
from tests.harness.file_systems import drop_loop, guarded, make, mounted, run

pytestmark = pytest.mark.e2e

Writer = subprocess.Popen[bytes]

MIB = 1 << 20
SIZE = 300 * MIB
LIMIT = 100 * MIB
WRITTEN = 200 * MIB
HANG_SECONDS = 60
WRITE_SECONDS = 20
STUCK_SECONDS = 4  # what goes well takes less than one
END_SECONDS = 10
CONFIG = f"""
[[namespace]]
name = "data"
path = "{{dir}}/data.img"
size = {SIZE}
dax = "off"

[fuse]
mountpoint = "{{dir}}/mnt"
engine = "kernel"
punch = PUNCH
request_timeout_seconds = 0
"""


@contextlib.contextmanager
def written(*, punch: bool, daemon_within: bool) -> Iterator[tuple[Daemon, Writer]]:
    """A daemon, and the program that fills its file system in a group short of memory."""
    with (
        running(CONFIG.replace("PUNCH", str(punch).lower())) as daemon,
        guarded(daemon, seconds=HANG_SECONDS),
        short_of_memory() as group,
    ):
        run("fallocate", "--length", str(SIZE), str(daemon.directory / "mnt/data"))
        device = Path(run(*daemon.command("attach", "data")).strip())
        try:
            make("ext4", device)  # discards everything first
            assert ((daemon.directory / "data.img").stat().st_blocks * 512 >= SIZE) == (not punch)
            with mounted(device, daemon.directory / "fs") as directory:
                if daemon_within:
                    (group / "cgroup.procs").write_text(str(daemon.pid))
                with fills(directory, group) as writer:
                    yield daemon, writer
        finally:
            drop_loop(device)
            daemon.kill()


@contextlib.contextmanager
def short_of_memory() -> Iterator[Path]:
    """A control group with `LIMIT` bytes."""
    group = _hierarchy() / f"pmblk-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        yield group
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def _hierarchy() -> Path:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if "cgroup" in fields and "memory" in fields[-1].split(","):
            return Path(fields[4])
    raise AssertionError("no memory control groups of version 1")


@contextlib.contextmanager
def fills(directory: Path, group: Path) -> Iterator[Writer]:
    command = f"dd if=/dev/zero of={directory}/file bs=1M count={WRITTEN // MIB} conv=fsync"
    with subprocess.Popen(
        ["sh", "-c", f"echo $$ >{group}/cgroup.procs && exec {command}"],
        stderr=subprocess.DEVNULL,
    ) as writer:
        try:
            yield writer
        finally:
            writer.kill()


@pytest.mark.parametrize(
    ("punch", "daemon_within"),
    [(False, True), (True, False)],
    ids=["the media keep their memory", "the daemon is in another group"],
)
def test_what_is_written_goes_on_when_its_writer_is_short_of_memory(
    punch: bool, daemon_within: bool
) -> None:
    with written(punch=punch, daemon_within=daemon_within) as (_, writer):
        assert writer.wait(WRITE_SECONDS) == 0


def test_with_holes_and_in_one_group_all_wait_until_somebody_cuts_the_daemon_off() -> None:
    """Why there is a slice of its own, and why a punched hole keeps its memory by default."""
    with written(punch=True, daemon_within=True) as (daemon, writer):
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(STUCK_SECONDS)
        assert state(daemon.pid) == "D"
        mount = mounts.find(daemon.directory / "mnt")
        assert mount is not None
        fuse_connections.abort(mount.minor)
        assert writer.wait(END_SECONDS) == 1


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
