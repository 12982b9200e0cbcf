"""The kernel's own NBD client, in a User-mode Linux guest (the host's kernel may have none)."""

import sys
from pathlib import Path

from tests.harness import uml

PMBLK = Path(sys.executable).with_name("pmblk")

START = f"""
pmblk={PMBLK}
cat >/run/pmblk.toml <<END
[[namespace]]
name = "ns1"
path = "/dev/shm/ns1.img"
size = "128MiB"
[[namespace]]
name = "ns2"
path = "/dev/shm/ns2.img"
size = "4MiB"
lba_size = 512
[nbd]
listen = ["unix:/run/nbd.sock"]
END
modprobe nbd nbds_max=2
$pmblk serve /run/pmblk.toml 2>/run/log &
for _ in $(seq 300); do [ -S /run/nbd.sock ] && break; sleep 0.1; done
"""

LIFE = """
device=$($pmblk attach ns1 --via nbd)
echo "device $device again $($pmblk attach ns1 --via nbd)"
echo "second $($pmblk attach ns2 --via nbd)"
echo "blocks $(blockdev --getss "$device") $(blockdev --getsize64 "$device")"
mkfs.ext4 -q -b 4096 "$device"
mkdir /run/m
modprobe -q crc32c_generic || true
mount "$device" /run/m
dd if=/dev/urandom of=/run/m/big bs=1M count=32 conv=fsync status=none
used=$(stat -c %b /dev/shm/ns1.img)
rm /run/m/big
sync
fstrim /run/m
echo "trimmed $((used - $(stat -c %b /dev/shm/ns1.img)))"
cp -a /usr/include/linux /run/m/tree
(cd /run/m && find . -type f -print0 | sort -z | xargs -0 md5sum) >/run/before
$pmblk detach ns1 2>&1 | sed 's/^/refused: /' || true
umount /run/m
e2fsck -fn "$device" >/dev/null 2>&1 && echo "fsck clean"
mount "$device" /run/m
(cd /run/m && find . -type f -print0 | sort -z | xargs -0 md5sum) >/run/after
cmp /run/before /run/after && echo "files same"
umount /run/m
echo "detached $($pmblk detach ns1)"
echo "the rest $($pmblk detach --all)"
$pmblk attach ns1 --via nbd
echo "by config $($pmblk detach --all --config /run/pmblk.toml)"
echo "size $(cat /sys/block/nbd0/size)"
grep -E 'level=(warning|error)' /run/log || echo "log clean"
"""


def test_the_kernel_s_client_attaches_and_a_file_system_lives_on_it() -> None:
    output = uml.run(START + LIFE, seconds=180)
    lines = output.splitlines()
    for expected in (
        "device /dev/nbd0 again /dev/nbd0",
        "second /dev/nbd1",
        f"blocks 4096 {128 << 20}",
        "fsck clean",
        "files same",
        "detached /dev/nbd0",
        "the rest /dev/nbd1",
        "by config /dev/nbd0",
        "size 0",
        "log clean",
    ):
        assert expected in lines, output
    trimmed = next(line for line in lines if line.startswith("trimmed "))
    assert int(trimmed.split()[1]) * 512 > 16 << 20, "TRIM gave memory back to tmpfs"
    assert any("refused: pmblk: /dev/nbd0 is mounted on /run/m" in line for line in lines), output
