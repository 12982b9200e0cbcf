"""Superblocks of members that are not running yet: read, and erased."""

import msgspec

from pmblk.raid.buffers import buffer
from pmblk.raid.member import Member, Request
from pmblk.raid.superblock import (
    BLOCK_BYTES,
    SLOT_OFFSETS,
    Absent,
    Superblock,
    SuperblockError,
    newest,
)


class Label(msgspec.Struct, frozen=True):
    """What a device says of itself; `stale_slot` is where its next superblock goes."""

    found: "Superblock | SuperblockError"
    stale_slot: int = 0


async def read_label(member: Member) -> Label:
    """Whatever is there. Raises OSError when it cannot be read."""
    first, last = SLOT_OFFSETS
    if member.size < last + BLOCK_BYTES:
        return Label(Absent(f"no superblock: {member.size} bytes have no room for one"))
    view = buffer(2 * BLOCK_BYTES)
    assert last == first + BLOCK_BYTES
    await member.read((Request(first, view),))
    try:
        found, number = newest((bytes(view[:BLOCK_BYTES]), bytes(view[BLOCK_BYTES:])))
    except SuperblockError as error:
        return Label(error)
    return Label(found, 1 - number)


async def erase_label(member: Member) -> None:
    """Both superblocks are gone. Raises OSError."""
    await member.write((Request(SLOT_OFFSETS[0], buffer(2 * BLOCK_BYTES)),))
    await member.flush()
