"""The reserve: the last 1/64 of a media file, kept for a table of page structs on the device.

64 bytes for each 4 KiB page are exactly 1/64, so the reserve of a file holds the structs of all
pages before it, and at its very end an info block that says so (as `ndctl create-namespace
--map=dev` does). The config decides whether a file is served with its reserve, so a client that
writes an info block at the end of its device gains nothing. The size of a served namespace never
depends on the representation that serves it: a live switch does not move the end of the device.
The table itself is scratch space and starts from zeroes.

Info block, 64 bytes, little endian: magic (8), version (4), zero (4), bytes of the file (8), bytes
of the reserve (8), zero (28), CRC-32 of all before it (4).
"""

import errno
import os
import struct
import zlib

SHARE = 64
FILE_UNIT_BYTES = 64 * 4096  # so that reserve and data are whole pages

MAGIC = b"PMBLKRSV"
VERSION = 1
_INFO = struct.Struct("<8sI4xQQ28x")
_CRC = struct.Struct("<I")
INFO_BYTES = _INFO.size + _CRC.size
assert INFO_BYTES == 64


def reserve_bytes(file_bytes: int) -> int:
    return file_bytes // SHARE


def is_taken(fd: int, file_bytes: int) -> bool:
    """Whether the file says that its last 1/64 is a reserve. Raises OSError."""
    if file_bytes < FILE_UNIT_BYTES or file_bytes % FILE_UNIT_BYTES:
        return False
    return os.pread(fd, INFO_BYTES, file_bytes - INFO_BYTES) == _info(file_bytes)


def can_be_taken(fd: int, file_bytes: int) -> bool:
    """Whether nothing was ever written to the last 1/64."""
    try:
        os.lseek(fd, file_bytes - reserve_bytes(file_bytes), os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return True
    return False


def take(fd: int, file_bytes: int) -> None:
    """Write the info block, durably. Raises OSError."""
    os.pwrite(fd, _info(file_bytes), file_bytes - INFO_BYTES)
    os.fsync(fd)


def _info(file_bytes: int) -> bytes:
    body = _INFO.pack(MAGIC, VERSION, file_bytes, reserve_bytes(file_bytes))
    return body + _CRC.pack(zlib.crc32(body))
