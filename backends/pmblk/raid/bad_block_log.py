"""The log of bad blocks, byte by byte: what of a member is lost until it is written again. Pure.

The area has two halves, and each holds a whole log. Both are written, one after the other, so a
torn write leaves the other one whole; when nothing is being written they say the same, so a half
that went bad is no loss either. Half 0 is first: where it is blank, no log was ever written.

A half: magic, CRC-32C, version, sequence number, count; from 64 on, that many ranges of blocks.
Integers are little-endian.
"""

import struct
from collections.abc import Collection

from pmblk.checksum import crc32c
from pmblk.raid.findings import spans
from pmblk.raid.superblock import BAD_BLOCKS_BYTES

MAGIC = b"PMBLKBB1"
VERSION = 1
HALF_BYTES = BAD_BLOCKS_BYTES // 2

_HEAD = struct.Struct("<8sIIQQ")  # magic, crc, version, sequence, count
_RANGE = struct.Struct("<QQ")  # first block of 4 KiB on the device, blocks
_RANGES_OFFSET = 64
_CRC_OFFSET = 8
RANGES_MAX = (HALF_BYTES - _RANGES_OFFSET) // _RANGE.size

assert _HEAD.size == 32 <= _RANGES_OFFSET
assert _RANGE.size == 16
assert HALF_BYTES == 32 << 10


class LogError(ValueError):
    """Not a log that this version can use; the words say why."""


class Full(Exception):
    """More ranges than there is room for."""


def encode(blocks: Collection[int], sequence: int) -> bytes:
    """A half. Raises Full."""
    ranges = spans(sorted(blocks))
    if len(ranges) > RANGES_MAX:
        raise Full(f"{len(ranges)} ranges; there is room for {RANGES_MAX}")
    half = bytearray(HALF_BYTES)
    _HEAD.pack_into(half, 0, MAGIC, 0, VERSION, sequence, len(ranges))
    for number, (first, last) in enumerate(ranges):
        place = _RANGES_OFFSET + number * _RANGE.size
        _RANGE.pack_into(half, place, first, last - first)
    struct.pack_into("<I", half, _CRC_OFFSET, crc32c(bytes(half)))
    return bytes(half)


def decode(half: bytes) -> tuple[set[int], int]:
    """The blocks, and the sequence number. Raises LogError."""
    assert len(half) == HALF_BYTES
    magic, crc, version, sequence, count = _HEAD.unpack_from(half)
    if magic != MAGIC:
        raise LogError("no log")
    if crc32c(half[:_CRC_OFFSET] + bytes(4) + half[_CRC_OFFSET + 4 :]) != crc:
        raise LogError("its checksum is wrong")
    if version != VERSION:
        raise LogError(f"version {version}; this program knows version {VERSION}")
    if count > RANGES_MAX:
        raise LogError(f"{count} ranges, where {RANGES_MAX} have room")
    blocks: set[int] = set()
    for number in range(count):
        first, length = _RANGE.unpack_from(half, _RANGES_OFFSET + number * _RANGE.size)
        blocks.update(range(first, first + length))
    return blocks, sequence


def newest(area: bytes) -> tuple[set[int], int]:
    """What the area says; blank is nothing, with sequence number 0. Raises LogError."""
    halves = area[:HALF_BYTES], area[HALF_BYTES:]
    if not any(halves[1]) and not _is_whole(halves[0]):
        return set(), 0  # blank, or the first log of all was torn: it never counted
    found: list[tuple[set[int], int]] = []
    problem = LogError("no log")
    for half in halves:
        try:
            found.append(decode(half))
        except LogError as error:
            problem = error
    if not found:
        raise problem
    return max(found, key=lambda one: one[1])


def _is_whole(half: bytes) -> bool:
    try:
        decode(half)
    except LogError:
        return False
    return True
