"""The one table from an NVMe status to what the front ends say: an errno, as FUSE and NBD know it.

NBD's error numbers are the errno values of Linux, restricted to a set (doc/proto.md, "Error
values"), and every value below is in that set.
"""

import errno
from collections.abc import Mapping
from types import MappingProxyType

from pmblk.nvme.command import WRITE, WRITE_ZEROES
from pmblk.nvme.status import Status

_ERRNO: Mapping[int, int] = MappingProxyType(
    {
        Status.INVALID_OPCODE: errno.EINVAL,
        Status.INVALID_FIELD: errno.EINVAL,
        Status.NAMESPACE_WRITE_PROTECTED: errno.EPERM,
        Status.LBA_OUT_OF_RANGE: errno.EINVAL,
        Status.CAPACITY_EXCEEDED: errno.ENOSPC,
        Status.FAST_ZERO_NOT_POSSIBLE: errno.EOPNOTSUPP,
        Status.WRITE_FAULT: errno.EIO,
        Status.UNRECOVERED_READ_ERROR: errno.EIO,
    }
)


def errno_of(status: int, opcode: int) -> int:
    """The errno of a failed command. Past the end, a write finds no space and the rest is wrong."""
    if status == Status.LBA_OUT_OF_RANGE and opcode in (WRITE, WRITE_ZEROES):
        return errno.ENOSPC
    return _ERRNO.get(status, errno.EIO)
