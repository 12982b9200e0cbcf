"""In the guest: file systems on arrays over the kernel's NBD client, while members fail.

    python -m tests.uml.raid

`tests.e2e.test_raid_file_systems` has a test for every case.
"""

from functools import partial

from tests.harness import array_life
from tests.harness.arrays import MIB, loop_device, nbd_export
from tests.harness.cases import perform
from tests.harness.file_systems import run
from tests.uml.devices import attached

# The guest's memory holds all members; xfs has 300 MiB or more.
CASES = (("ext4", 5, nbd_export, 64 * MIB), ("xfs", 6, loop_device, 176 * MIB))


def main() -> None:
    run("modprobe", "--all", "nbd", "loop", "crc32c_generic", "fuse")
    for kind, level, broken, size in CASES:
        act = partial(array_life.live, kind, level, broken, attached, member_bytes=size)
        # A member that breaks is a loop device of the same kernel, which says so.
        perform(f"{kind} on level {level}", act, kernel_may_complain=broken is loop_device)


if __name__ == "__main__":
    main()
