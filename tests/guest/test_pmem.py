"""Our namespace's file as a guest's persistent memory (an NVDIMM), and as its NVMe disk besides.

What the guest stores there goes to memory that the daemon has mapped too: no request tells it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.namespaces import MIB, copy_over_nbd, dax_file, disk
from tests.harness import qemu
from tests.harness.daemon import Daemon, running
from tests.harness.file_systems import run
from tests.harness.programs import assert_no_complaints

pytestmark = pytest.mark.guest

PROGRAMS = Path(__file__).parent
CONFIG = """
[[namespace]]
name = "pmem"
path = "{dir}/pmem.img"
size = "512MiB"
lba_size = 512

[[namespace]]
name = "other"
path = "{dir}/other.img"
size = "128MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with running(CONFIG) as daemon:
        yield daemon
        assert_no_complaints(daemon)


DAX = f"""
dax_devices
DISCARD=no bash $harness/fs-life.sh KIND /dev/pmem0 dax=always
mount -o dax=always /dev/pmem0 /mnt
grep -q ' /mnt .*dax=always' /proc/mounts
python3 {PROGRAMS}/map_sync.py /mnt/mapped {16 * MIB}
python3 {PROGRAMS}/map_sync.py /run/mapped {MIB} && exit 1
fio="fio --directory=/mnt --size=16m --bs=4k --rw=randwrite --verify=crc32c --verify_fatal=1
    --do_verify=1 --verify_state_save=0 --thread --minimal --output=/run/fio"
$fio --name=stores --ioengine=mmap --fsync=32
$fio --name=libpmem --ioengine=libpmem --iodepth=1 --direct=1 --sync=1
$fio --name=direct --ioengine=psync --direct=1
disk=$(nvme_disk other)
truncate -s 64M /mnt/buffers
fio --name=from-dax --filename=$disk --size=32m --bs=64k --rw=write --direct=1 --ioengine=libaio \\
    --iodepth=4 --mem=mmapshared:/mnt/buffers --verify=crc32c --verify_fatal=1 --do_verify=1 \\
    --verify_state_save=0 --minimal --output=/run/fio
dd if=/mnt/mapped of=$disk bs=1M oflag=direct status=none
cmp --bytes={16 * MIB} /mnt/mapped $disk
(cd /mnt && find . -type f -print0 | sort -z | xargs -0 md5sum) >/run/w/sums
umount /mnt
dax_offset >/run/w/offset
"""


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_dax_file_system_lives_in_our_file(daemon: Daemon, kind: str) -> None:
    """{kind} -o dax on /dev/pmem0, our file: MAP_SYNC, mmap, libpmem, O_DIRECT; read over NBD."""
    devices: list[qemu.Device] = [qemu.Nvdimm(file=dax_file(daemon, "pmem")), disk(daemon, "other")]
    with qemu.booted(DAX.replace("KIND", kind), devices=devices) as guest:
        output = guest.wait()
        offset = int((guest.folder / "offset").read_text())
        sums = guest.folder / "sums"
        assert len(sums.read_text().splitlines()) > 100
        assert "MAP_SYNC is taken" in output
        assert "MAP_SYNC is refused" in output, "on tmpfs: the program can tell"
        image = copy_over_nbd(daemon, "pmem")
        where = daemon.directory / "image"
        where.mkdir()
        run("mount", "-o", f"ro,loop,offset={offset}", str(image), str(where))
        try:
            run("sh", "-c", f"cd {where} && md5sum --quiet --check {sums}")
            mapped = (where / "mapped").read_bytes()
        finally:
            run("umount", str(where))
    with copy_over_nbd(daemon, "other").open("rb") as other:
        assert other.read(16 * MIB) == mapped, "O_DIRECT from the mapping to the other device"


KINDS = ("extent", "struct-page", "transient-page", "pfn")
VIEWS = """
dax_devices
disk=$(nvme_disk pmem)
skip=$(($(dax_offset) / 1048576))
# view DEVICE FIRST: four MiB of it, past all caches, from this MiB on
view() { dd if=$1 bs=1M skip=$2 count=4 iflag=direct status=none; }
for kind in KINDS; do
    pause $kind
    dd if=/dev/urandom of=/run/first bs=1M count=4 status=none
    dd if=/dev/urandom of=/run/second bs=1M count=4 status=none
    dd if=/run/first of=/dev/pmem0 bs=1M seek=8 oflag=direct status=none
    view $disk $((skip + 8)) | cmp - /run/first
    dd if=/run/second of=$disk bs=1M seek=$((skip + 8)) oflag=direct status=none
    view /dev/pmem0 8 | cmp - /run/second
    dd if=/run/second of=$disk bs=1M seek=$((skip + 16)) oflag=direct status=none
    view /dev/pmem0 16 | cmp - /run/second
    blkdiscard --offset $(((skip + 8) << 20)) --length $((4 << 20)) $disk
    view /dev/pmem0 8 | cmp --bytes=$((4 << 20)) - /dev/zero
    dd if=/run/first of=/dev/pmem0 bs=1M seek=8 oflag=direct status=none
    view $disk $((skip + 8)) | cmp - /run/first
    echo "$kind has one content"
done
"""


def test_pmem_and_nvme_disk_of_one_namespace_have_one_content(daemon: Daemon) -> None:
    """One namespace as /dev/pmem0 and as NVMe disk: what one view writes, the other reads."""
    devices: list[qemu.Device] = [qemu.Nvdimm(file=dax_file(daemon, "pmem")), disk(daemon, "pmem")]
    with qemu.booted(VIEWS.replace("KINDS", " ".join(KINDS)), devices=devices) as guest:
        for kind in KINDS:
            with guest.paused(kind):
                daemon.switch("pmem", kind)
        output = guest.wait()
    for kind in KINDS:
        assert f"{kind} has one content" in output
