"""Our NBD exports as the namespaces of an NVMe controller: Linux's own nvme driver is the client.

The daemon runs on the host, QEMU is its NBD client, the guest sees a disk.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.namespaces import MIB, allocated, copy_over_nbd, disk
from tests.harness import qemu
from tests.harness.daemon import Daemon, running, scratch
from tests.harness.file_systems import make, run
from tests.harness.programs import assert_no_complaints

pytestmark = pytest.mark.guest

NAMESPACES = """
[[namespace]]
name = "small"
path = "{media}/small.img"
size = "400MiB"
lba_size = 512

[[namespace]]
name = "large"
path = "{media}/large.img"
size = "400MiB"
lba_size = 4096

[nbd]
listen = ["unix:{dir}/nbd.sock"]
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with running(NAMESPACES.replace("{media}", "{dir}")) as daemon:
        yield daemon
        assert_no_complaints(daemon)


LIVES = """
for name in small large; do
    disk=$(nvme_disk $name)
    echo "$name has blocks of $(blockdev --getss $disk)"
    bash $harness/fs-life.sh KIND $disk
    mount $disk /mnt
    dd if=/dev/urandom of=/mnt/big bs=1M count=32 conv=fsync status=none
    pause $name-filled
    rm /mnt/big
    sync --file-system /mnt
    fstrim /mnt
    pause $name-trimmed
    umount /mnt
done
"""


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_file_system_lives_on_an_nvme_disk(daemon: Daemon, kind: str) -> None:
    """{kind} on NVMe over our NBD exports, blocks of 512 and of 4096 bytes."""
    disks = [disk(daemon, "small"), disk(daemon, "large")]
    with qemu.booted(LIVES.replace("KIND", kind), devices=disks) as guest:
        for name in ("small", "large"):
            with guest.paused(f"{name}-filled"):
                filled = allocated(daemon, name)
            with guest.paused(f"{name}-trimmed"):
                assert filled - allocated(daemon, name) >= 31 * MIB, "discard gave memory back"
        output = guest.wait()
    for name, block_bytes in (("small", 512), ("large", 4096)):
        assert f"{name} has blocks of {block_bytes}" in output
        counters = daemon.stats(name).namespace_counters
        assert counters.flushes > 0
        assert counters.deallocations > 0
        assert counters.errors == 0


COMMANDS = """
disk=$(nvme_disk large)
nvme id-ctrl --output-format=json $disk >/run/w/controller
nvme id-ns --output-format=json $disk >/run/w/namespace
dd if=/dev/urandom of=/run/w/random bs=1M count=32 status=none
dd if=/run/w/random of=$disk bs=1M oflag=direct status=none
pause written
nvme flush $disk --namespace-id=1
pause flushed
blkdiscard --length $((16 << 20)) $disk
pause discarded
blkdiscard --zeroout --offset $((16 << 20)) --length $((8 << 20)) $disk
pause zeroed
"""


def test_nvme_commands_reach_the_namespace(daemon: Daemon) -> None:
    """nvme-cli: identify, flush; write, discard and write-zeroes arrive as such."""
    with qemu.booted(COMMANDS, devices=[disk(daemon, "large")]) as guest:
        with guest.paused("written"):
            written = (guest.folder / "random").read_bytes()
            assert first_bytes(daemon, 32 * MIB) == written
            before = daemon.stats("large").namespace_counters
        with guest.paused("flushed"):
            assert daemon.stats("large").namespace_counters.flushes == before.flushes + 1
            filled = allocated(daemon, "large")
        with guest.paused("discarded"):
            assert filled - allocated(daemon, "large") == 16 * MIB
            after = daemon.stats("large").namespace_counters
            assert after.deallocated_bytes == before.deallocated_bytes + 16 * MIB
        with guest.paused("zeroed"):
            after = daemon.stats("large").namespace_counters
            assert after.zero_bytes == before.zero_bytes + 8 * MIB
            assert first_bytes(daemon, 32 * MIB) == bytes(24 * MIB) + written[24 * MIB :]
        guest.wait()
        controller = json.loads((guest.folder / "controller").read_text())
        namespace = json.loads((guest.folder / "namespace").read_text())
    assert controller["sn"].strip() == "large"
    assert controller["vwc"] & 1, "it has a volatile write cache"
    assert namespace["nsze"] * 4096 == 400 * MIB
    assert namespace["lbafs"][namespace["flbas"] & 0xF]["ds"] == 12


def first_bytes(daemon: Daemon, length: int) -> bytes:
    with copy_over_nbd(daemon, "large").open("rb") as file:
        return file.read(length)


def ext4_in(directory: Path) -> str:
    """A file system with a page cache, where FUA has to wait; `scratch` unmounts it."""
    image, where = directory / "image", directory / "mnt"
    image.touch()
    os.truncate(image, 1 << 30)
    make("ext4", image)
    where.mkdir()
    run("mount", "-o", "loop", str(image), str(where))
    return str(where)


WRITES = """
disk=$(nvme_disk large)
dd if=/dev/urandom of=$disk bs=4k count=50 oflag=direct status=none
pause written
mkfs.ext4 -q -b 4096 $disk
mount $disk /mnt
dd if=/dev/urandom of=/mnt/file bs=64k count=16 oflag=dsync status=none
umount /mnt
e2fsck -fn $disk
"""


def test_without_a_write_cache_every_write_is_durable_at_once() -> None:
    """NVMe with its write cache off: every write comes with FUA, and waits until it is synced."""
    with (
        scratch() as directory,
        running(NAMESPACES.replace("{media}", ext4_in(directory))) as daemon,
    ):
        disks = [disk(daemon, "large", write_cache=False)]
        before = daemon.stats("large").namespace_counters
        with qemu.booted(WRITES, devices=disks) as guest:
            with guest.paused("written"):
                after = daemon.stats("large").namespace_counters
                assert after.writes - before.writes == 50
                assert after.waits - before.waits == 50
                assert after.flushes == before.flushes
            guest.wait()
        after = daemon.stats("large").namespace_counters
        assert after.waits - before.waits >= after.writes - before.writes
        assert_no_complaints(daemon)
