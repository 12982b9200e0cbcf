"""NVMe status values, as one integer: status code type << 8 | status code.

Source: NVM Express Base Specification 2.0, figures 94 to 97, and the NVM Command Set
Specification 1.0. SUCCESS is 0, so `if command.status:` reads as "if it failed".
"""

import enum
import errno

from pmblk.nvme.command import GET_LBA_STATUS, PREFETCH, READ


class Status(enum.IntEnum):
    SUCCESS = 0x000
    # Generic command status (type 0)
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    NAMESPACE_WRITE_PROTECTED = 0x020
    LBA_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    # Command specific (type 1)
    FAST_ZERO_NOT_POSSIBLE = 0x1C0  # vendor range: NVMe has no word for "do it fast or not at all"
    # Media and data integrity errors (type 2)
    WRITE_FAULT = 0x280
    UNRECOVERED_READ_ERROR = 0x281


_FROM_ERRNO = {
    errno.ENOSPC: Status.CAPACITY_EXCEEDED,
    errno.EDQUOT: Status.CAPACITY_EXCEEDED,
    errno.EFBIG: Status.CAPACITY_EXCEEDED,
}


def fault_of(opcode: int) -> Status:
    """What a command fails with that its media cannot do."""
    reading = opcode in (READ, GET_LBA_STATUS, PREFETCH)
    return Status.UNRECOVERED_READ_ERROR if reading else Status.WRITE_FAULT


def from_oserror(error: OSError, *, otherwise: Status) -> Status:
    """The status of a command whose media answered `error`."""
    return _FROM_ERRNO.get(error.errno or 0, otherwise)
