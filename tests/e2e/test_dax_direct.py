"""O_DIRECT to and from a buffer that is itself mapped persistent memory.

The buffer is a mapping of one namespace's media, the device is another namespace behind a loop
device: get_user_pages on the mapping, a bio, the driver; no copy in between. The media are mapped
by their own file, or by their file on the daemon's mount, which is the same memory. The recipe with
fio is in docs/dax.md.
"""

import contextlib
import json
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmblkd.compare import fio
from tests.harness.daemon import Daemon, running
from tests.harness.file_systems import attached, guarded
from tests.harness.programs import assert_no_complaints, program

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SIZE = 16 * MIB
CONFIG = f"""
[[namespace]]
name = "dax"
path = "{{dir}}/dax.img"
size = {SIZE}
dax = "DAX"

[[namespace]]
name = "device"
path = "{{dir}}/device.img"
size = {SIZE}
representation = "REPRESENTATION"

[nbd]
listen = ["unix:{{dir}}/nbd.sock"]

[fuse]
mountpoint = "{{dir}}/mnt"
"""
KINDS = ('"page-cache"', '"struct-page"', '"transient-page"', '"pfn"', '"extent"')
SMALL_ARENA = '{ kind = "page-cache", arena = "1MiB" }'


MAPPED = (  # what is mapped, what its dax is, and how the other namespace is represented
    ("mnt/dax", "auto", '"page-cache"'),
    ("mnt/dax", "fast", '"struct-page"'),
    ("mnt/dax", "auto", '"transient-page"'),
    ("dax.img", "off", '"pfn"'),
    ("mnt/dax", "fast", '"extent"'),
)


@contextlib.contextmanager
def served(kind: str, dax: str = "auto") -> Iterator[tuple[Daemon, Path]]:
    with (
        running(CONFIG.replace('"REPRESENTATION"', kind).replace("DAX", dax)) as daemon,
        guarded(daemon, seconds=60),
        attached(daemon, "device") as device,
    ):
        yield daemon, device
        assert_no_complaints(daemon)


def read_over_nbd(daemon: Daemon, name: str) -> bytes:
    target = daemon.directory / f"{name}.copy"
    program("nbdcopy", daemon.uri(name), str(target))
    return target.read_bytes()


def write_over_nbd(daemon: Daemon, name: str, content: bytes) -> None:
    source = daemon.directory / f"{name}.source"
    source.write_bytes(content)
    program("nbdcopy", str(source), daemon.uri(name))


@contextlib.contextmanager
def mapped(file: Path) -> Iterator[memoryview]:
    """The file's own memory, shared, as a DAX application has it."""
    fd = os.open(file, os.O_RDWR)
    try:
        with mmap.mmap(fd, 0) as mapping, memoryview(mapping) as view:
            yield view
    finally:
        os.close(fd)


@pytest.mark.parametrize(("file", "dax", "kind"), MAPPED)
def test_direct_io_moves_bytes_between_two_namespaces(file: str, dax: str, kind: str) -> None:
    """From the mapping of one to the other and back, seen over NBD on both sides."""
    content = random.Random(1).randbytes(SIZE)
    with served(kind, dax) as (daemon, device):
        write_over_nbd(daemon, "dax", content)
        fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        try:
            with mapped(daemon.directory / file) as view:
                for offset in range(0, SIZE, MIB):
                    assert os.pwritev(fd, [view[offset : offset + MIB]], offset) == MIB
                assert read_over_nbd(daemon, "device") == content
                half = SIZE // 2  # and back, the halves exchanged
                for offset in range(0, SIZE, MIB):
                    there = (offset + half) % SIZE
                    assert os.preadv(fd, [view[there : there + MIB]], offset) == MIB
        finally:
            os.close(fd)
        assert read_over_nbd(daemon, "dax") == content[half:] + content[:half]


@pytest.mark.parametrize(("path", "dax", "kind"), MAPPED)
def test_fio_with_its_buffers_in_mapped_memory_verifies(path: str, dax: str, kind: str) -> None:
    """The recipe: fio's buffers are the mapping, so they hold its last block when it has ended."""
    with served(kind, dax) as (daemon, device):
        file = daemon.directory / path
        common = (f"--filename={device}", "--direct=1", "--ioengine=libaio", "--bs=1m")
        buffers = f"--mem=mmapshared:{file}"
        fio.run(
            [
                *(*common, buffers, "--rw=write", f"--size={SIZE}", "--iodepth=4"),
                *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
            ],
            seconds=60,
        )
        assert file.stat().st_size == SIZE, "fio cut the file off"
        fio.run([*common, buffers, "--rw=read", f"--size={SIZE}", "--iodepth=1"], seconds=60)
        last = read_over_nbd(daemon, "device")[-MIB:]
        assert any(last)
        assert read_over_nbd(daemon, "dax").startswith(last)


@pytest.mark.parametrize("kind", [*KINDS, SMALL_ARENA])
def test_the_daemon_writes_to_a_device_straight_from_the_mapping(kind: str) -> None:
    """`pmblk save` to a loop device of another file: what is held goes there as it is."""
    content = random.Random(2).randbytes(SIZE)
    with served(kind) as (daemon, _), loop_device(daemon.directory / "target.img") as target:
        write_over_nbd(daemon, "device", content)
        saved = json.loads(program(*daemon.command("save", "device", str(target), "--json")))
        assert saved["written_bytes"] == SIZE
        assert (daemon.directory / "target.img").read_bytes() == content
        if kind == SMALL_ARENA:
            assert saved["copied_bytes"] > 0, "into the frames"
        else:
            assert saved["copied_bytes"] == 0, "frames and mappings go to the device as they are"
        assert (copied(daemon) > 0) == ("page-cache" in kind), "the writes before were copied"


def test_what_is_served_is_no_target() -> None:
    """Neither the file of another namespace, nor its media, nor a device of the daemon's own."""
    with served('"extent"') as (daemon, device):
        for target in (daemon.directory / "mnt/dax", daemon.directory / "dax.img", device):
            with pytest.raises(AssertionError, match=r"cannot write to|this very daemon"):
                program(*daemon.command("save", "device", str(target)), seconds=20)
        assert not any(read_over_nbd(daemon, "dax"))


@contextlib.contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    file.write_bytes(bytes(SIZE))
    device = program("losetup", "--find", "--show", "--direct-io=on", str(file)).strip()
    try:
        yield Path(device)
    finally:
        program("losetup", "--detach", device)


def copied(daemon: Daemon) -> int:
    stats = json.loads(program(*daemon.command("stats", "device", "--json")))
    return int(stats["representation_counters"]["bytes_copied"])
