"""Where things lie on a member: decided once, when its array is made. Pure.

    0          superblock, bitmap, log of bad blocks (`pmblk.raid.superblock`)
    1 MiB      journal, if there is one
    then       headroom: a chunk of the largest size for each time that the array is grown
    data_offset  the data: whole chunks
    then       a CRC-32C for each block of headroom and data, if there is integrity

A reshape moves the data to the front, into the headroom; so that has checksums from the start.

Sizes and offsets are bytes.
"""

import msgspec

from pmblk.raid.superblock import DATA_OFFSET, Superblock

BLOCK_BYTES = 4096
CHECKSUM_BYTES = 4
MEBIBYTE = 1 << 20
JOURNAL_PART = 32  # of a member, that part, within these bounds
JOURNAL_BYTES_MIN, JOURNAL_BYTES_MAX = MEBIBYTE, 64 * MEBIBYTE
JOURNAL_CHUNKS_MIN = 4
HEADROOM_BYTES = 2 * MEBIBYTE


class Areas(msgspec.Struct, frozen=True, kw_only=True):
    """A field is 0 for what there is not."""

    journal_offset: int
    journal_bytes: int
    data_offset: int
    member_bytes: int
    checksums_offset: int


class TooSmall(ValueError):
    """No chunk of data fits; the words say how much is needed."""


def divide(smallest_bytes: int, *, chunk_bytes: int, journal: bool, integrity: bool) -> Areas:
    """The areas of every member, by the size of the smallest. Raises TooSmall."""
    journal_bytes = _journal_bytes(smallest_bytes, chunk_bytes) if journal else 0
    data_offset = DATA_OFFSET + journal_bytes + HEADROOM_BYTES
    member_bytes = data_bytes_for(
        smallest_bytes,
        data_offset=data_offset,
        chunk_bytes=chunk_bytes,
        sums_from=DATA_OFFSET + journal_bytes if integrity else None,
    )
    if not member_bytes:
        sums = checksums_bytes(HEADROOM_BYTES + chunk_bytes)
        needed = data_offset + chunk_bytes + integrity * sums
        raise TooSmall(f"{smallest_bytes} bytes are too few: at least {needed} are needed")
    return Areas(
        journal_offset=DATA_OFFSET if journal else 0,
        journal_bytes=journal_bytes,
        data_offset=data_offset,
        member_bytes=member_bytes,
        checksums_offset=data_offset + member_bytes if integrity else 0,
    )


def data_bytes_for(
    smallest_bytes: int, *, data_offset: int, chunk_bytes: int, sums_from: int | None
) -> int:
    """What members of that size have room for, in whole chunks. `sums_from`: what lies behind it
    has checksums; None: nothing has.
    """
    room = smallest_bytes - data_offset
    if sums_from is not None:  # with a whole block of checksums for what is left over
        unit = BLOCK_BYTES + CHECKSUM_BYTES
        summed = (smallest_bytes - sums_from - BLOCK_BYTES) // unit * BLOCK_BYTES
        room = summed - (data_offset - sums_from)
    return max(0, room) // chunk_bytes * chunk_bytes


def headroom_offset(superblock: Superblock) -> int:
    """The data may move to the front up to there; from there on, all has checksums."""
    return DATA_OFFSET + superblock.journal_bytes


def summed_bytes(superblock: Superblock) -> int:
    """How much has checksums."""
    end = max(superblock.data_offset, superblock.reshape_offset) + superblock.geometry.member_bytes
    return end - headroom_offset(superblock)


def end_of(superblock: Superblock) -> int:
    """What a member has to have at least."""
    if superblock.checksums_offset:
        return superblock.checksums_offset + checksums_bytes(summed_bytes(superblock))
    return headroom_offset(superblock) + summed_bytes(superblock)


def checksums_bytes(member_bytes: int) -> int:
    """What the checksums of so many bytes of data take, in whole blocks."""
    sums = -(-member_bytes // BLOCK_BYTES) * CHECKSUM_BYTES
    return -(-sums // BLOCK_BYTES) * BLOCK_BYTES


def _journal_bytes(smallest_bytes: int, chunk_bytes: int) -> int:
    wanted = max(smallest_bytes // JOURNAL_PART, JOURNAL_CHUNKS_MIN * chunk_bytes)
    bounded = min(max(wanted, JOURNAL_BYTES_MIN), JOURNAL_BYTES_MAX)
    return bounded // MEBIBYTE * MEBIBYTE
