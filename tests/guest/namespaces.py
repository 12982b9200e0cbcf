"""What a guest is given of a daemon's namespaces, and what is asked about them from outside."""

from pathlib import Path

from tests.harness import qemu
from tests.harness.daemon import Daemon
from tests.harness.programs import program

MIB = 1 << 20


def disk(daemon: Daemon, name: str, *, write_cache: bool = True) -> qemu.NvmeOverNbd:
    """The namespace as an NVMe disk, with blocks of its size and its name as serial number."""
    return qemu.NvmeOverNbd(
        socket=daemon.directory / "nbd.sock",
        export=name,
        block_bytes=daemon.report(name).lba_bytes,
        write_cache=write_cache,
    )


def dax_file(daemon: Daemon, name: str) -> Path:
    """The file that is the namespace, for others to map: below the mount, where the kernel can.

    Before Linux 6.9 no mapping of a FUSE file is a mapping of the media; then it is these.
    """
    report = daemon.report(name)
    assert report.fuse is not None
    if report.fuse.dax == "dax":
        return Path(report.fuse.path)
    assert "Linux 6.9" in report.fuse.dax_reason, report
    return Path(report.path)


def allocated(daemon: Daemon, name: str) -> int:
    """How many bytes of memory it has now."""
    return daemon.report(name).allocated_bytes


def copy_over_nbd(daemon: Daemon, name: str) -> Path:
    """A file with what an NBD client reads now."""
    target = daemon.directory / f"{name}.copy"
    program("nbdcopy", daemon.uri(name), str(target))
    return target
