"""md and device mapper beside us: our namespaces as RAID members, and as caches before others."""

import sys
from pathlib import Path

import pytest

from tests.guest.namespaces import MIB, copy_over_nbd, dax_file, disk
from tests.harness import qemu
from tests.harness.daemon import running
from tests.harness.programs import assert_no_complaints

pytestmark = pytest.mark.guest

PMBLK = Path(sys.executable).with_name("pmblk")
MEMBERS = ("one", "two", "three", "four")
CONFIG = "".join(
    f"""
[[namespace]]
name = "{name}"
path = "/dev/shm/{name}.img"
size = "32MiB"
"""
    for name in MEMBERS
)

START = f"""
modprobe nbd nbds_max=8
modprobe -a raid456 dm-writecache
export MDADM_NO_UDEV=1
echo 1000000 >/proc/sys/dev/raid/speed_limit_min
dax_devices
mkfs.ext4 -q -b 4096 /dev/pmem0
mkdir /run/dax
mount -o dax=always /dev/pmem0 /run/dax
cat >/run/pmblk.toml <<'END'
{CONFIG}
[[namespace]]
name = "cache"
path = "/run/dax/cache.img"
size = "32MiB"
[nbd]
listen = ["unix:/run/nbd.sock"]
[control]
socket = "/run/control.sock"
END
{PMBLK} serve /run/pmblk.toml 2>/run/log &
await /run/nbd.sock
disks=()
for name in {" ".join(MEMBERS)} cache; do
    disks+=(/dev/nbd${{#disks[@]}})
    nbd-client -unix /run/nbd.sock "${{disks[-1]}}" -name $name -block-size 4096 >/dev/null
done
members=("${{disks[@]:0:4}}")
cache=${{disks[4]}}

# Every byte of the device, in blocks that say what they are.
fill() {{
    fio --name=fill --filename=$1 --rw=write --bs=64k --direct=1 --ioengine=libaio --iodepth=4 \\
        --verify=crc32c --do_verify=0 --verify_state_save=0 --minimal --output=/run/fio
}}
verify() {{
    fio --name=verify --filename=$1 --rw=read --bs=64k --direct=1 --ioengine=libaio --iodepth=4 \\
        --verify=crc32c --verify_fatal=1 --minimal --output=/run/fio
    echo "verified $2"
}}
idle() {{ until [ "$(cat /sys/block/md0/md/sync_action)" = idle ]; do sleep 0.2; done; }}
check() {{
    echo check >/sys/block/md0/md/sync_action
    idle
    echo "$1: mismatches $(cat /sys/block/md0/md/mismatch_cnt)"
}}
"""

RAID = """
mdadm --create /dev/md0 --run --homehost=any --level=5 --chunk=64 --raid-devices=4 "${members[@]}"
await /dev/md0
idle
fill /dev/md0
fio --name=load --filename=/dev/md0 --rw=randwrite --bs=64k --direct=1 --ioengine=libaio \\
    --iodepth=4 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --size=32m \\
    --minimal --output=/run/fio.load &
load=$!
mdadm /dev/md0 --fail "${members[1]}"
wait $load
mdadm /dev/md0 --remove "${members[1]}"
verify /dev/md0 "without a member"
echo "degraded $(cat /sys/block/md0/md/degraded)"
blkdiscard --force "${members[1]}"
mdadm /dev/md0 --add "${members[1]}"
until [ "$(cat /sys/block/md0/md/degraded)" = 0 ]; do sleep 0.2; done
idle
check "after the rebuild"
verify /dev/md0 "after the rebuild"
"""

CACHED = """
size=$(blockdev --getsz /dev/md0)
dmsetup create cached --table "0 $size writecache s /dev/md0 $cache 4096 0"
dmsetup mknodes
verify /dev/mapper/cached "above the cache"
dd if=/dev/urandom of=/run/random bs=1M count=8 status=none
dd if=/run/random of=/dev/mapper/cached bs=1M seek=64 oflag=direct conv=fsync status=none
dd if=/dev/md0 bs=1M skip=64 count=8 iflag=direct status=none | cmp - /run/random &&
    echo "it caches nothing" && exit 1
dmsetup message cached 0 flush
dmsetup remove cached
dd if=/dev/md0 bs=1M skip=64 count=8 iflag=direct status=none | cmp - /run/random
check "behind the cache"
mdadm --stop /dev/md0
for disk in "${disks[@]}"; do nbd-client -d $disk; done
kill %1
wait %1
grep -E 'level=(warning|error)' /run/log || echo "log clean"
"""


def test_a_raid5_of_namespaces_survives_a_member() -> None:
    """raid5 of our exports (nbd): a member fails under load, is rebuilt; dm-writecache above."""
    output = qemu.run(
        START + RAID + CACHED, devices=[qemu.MemoryAsPmem(size="256M")], memory="2G", seconds=400
    )
    lines = output.splitlines()
    for expected in (
        "verified without a member",
        "degraded 1",
        "after the rebuild: mismatches 0",
        "verified after the rebuild",
        "verified above the cache",
        "behind the cache: mismatches 0",
        "log clean",
    ):
        assert expected in lines, output


BOTH = """
[[namespace]]
name = "cache"
path = "{dir}/cache.img"
size = "256MiB"

[[namespace]]
name = "origin"
path = "{dir}/origin.img"
size = "256MiB"

[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
"""

WRITECACHE = """
dax_devices
modprobe dm-writecache
disk=$(nvme_disk origin)
size=$(blockdev --getsz $disk)
dmsetup create cached --table "0 $size writecache p $disk /dev/pmem0 4096 0"
dmsetup mknodes
DISCARD=no bash $harness/fs-life.sh ext4 /dev/mapper/cached
dd if=/dev/urandom of=/run/w/random bs=1M count=16 status=none
dd if=/run/w/random of=/dev/mapper/cached bs=1M oflag=direct conv=fsync status=none
pause cached
dmsetup message cached 0 flush
dmsetup remove cached
"""


def test_our_file_is_the_write_cache_of_our_disk() -> None:
    """dm-writecache: our file is its pmem, our export on NVMe behind; a flush loses nothing."""
    with running(BOTH) as daemon:
        devices: list[qemu.Device] = [
            qemu.Nvdimm(file=dax_file(daemon, "cache")),
            disk(daemon, "origin"),
        ]
        with qemu.booted(WRITECACHE, devices=devices) as guest:
            with guest.paused("cached"):
                written = (guest.folder / "random").read_bytes()
                assert copy_over_nbd(daemon, "origin").read_bytes()[: 16 * MIB] != written
                assert written[:4096] in copy_over_nbd(daemon, "cache").read_bytes()
            guest.wait()
        assert copy_over_nbd(daemon, "origin").read_bytes()[: 16 * MIB] == written
        assert_no_complaints(daemon)
