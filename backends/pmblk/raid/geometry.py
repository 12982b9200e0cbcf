"""The shape of an array: level, members, chunk, layout, and what follows from them. Pure.

Words as md has them: a *member* is one device in a *slot*; a *chunk* is the part of a stripe on one
member; a *stripe* is one row of chunks over all members. Sizes are bytes; a chunk's number on a
member counts from the start of the member's data area. Sources: md(4), mdadm(8).

Not here: which chunk lies where (`pmblk.raid.layout`).
"""

from typing import Literal, get_args

import msgspec

Level = Literal[0, 1, 4, 5, 6, 10]
Rotation = Literal[
    "left-asymmetric",
    "right-asymmetric",
    "left-symmetric",
    "right-symmetric",
    "parity-first",
    "parity-last",
]
Copying = Literal["near", "far", "offset"]
Layout = Rotation | Copying | Literal[""]

LEVELS: tuple[int, ...] = get_args(Level)
ROTATIONS: tuple[str, ...] = get_args(Rotation)
COPYINGS: tuple[str, ...] = get_args(Copying)
MEMBERS_MIN = {0: 1, 1: 2, 4: 3, 5: 3, 6: 4, 10: 2}
MEMBERS_MAX = 64
CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 4 << 10, 1 << 20
CHUNK_BYTES_DEFAULT = 64 << 10


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """`layout` is a rotation for levels 5 and 6, a way of copying for 10, and "" for the others.

    `member_bytes` is the data area of each member; what is no whole chunk of it is not used.
    `copies` counts those of each chunk at level 10. A shape that cannot be is a ValueError that
    begins with the field's name.
    """

    level: Level
    members: int
    member_bytes: int
    chunk_bytes: int = CHUNK_BYTES_DEFAULT
    layout: Layout = ""
    copies: int = 2

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level {self.level} is none of {', '.join(map(str, LEVELS))}")
        least = MEMBERS_MIN[self.level]
        if not least <= self.members <= MEMBERS_MAX:
            raise ValueError(f"members {self.members}: level {self.level} takes {least} to 64")
        chunk = self.chunk_bytes
        if not CHUNK_BYTES_MIN <= chunk <= CHUNK_BYTES_MAX or chunk & (chunk - 1):
            raise ValueError(f"chunk_bytes {chunk} is no power of two from 4 KiB to 1 MiB")
        self._check_layout()
        if self.chunks < 1:
            raise ValueError(f"member_bytes {self.member_bytes} is less than a chunk of {chunk}")

    def _check_layout(self) -> None:
        if self.layout not in layouts_of(self.level):
            choices = ", ".join(layouts_of(self.level)) or "none"
            raise ValueError(f'layout "{self.layout}" is not for level {self.level}: {choices}')
        if self.level == 10 and not 2 <= self.copies <= self.members:
            raise ValueError(f"copies {self.copies}: 2 to as many as there are members")

    @property
    def parities(self) -> int:
        """Chunks of parity in a stripe: P, and Q."""
        return {4: 1, 5: 1, 6: 2}.get(self.level, 0)

    @property
    def data_members(self) -> int:
        """Chunks of data in a stripe, at the levels that have parity; all members at level 0."""
        return self.members - self.parities

    @property
    def redundancy(self) -> int:
        """How many members may be lost, whichever they are."""
        if self.level == 1:
            return self.members - 1
        return self.copies - 1 if self.level == 10 else self.parities

    @property
    def member_chunks(self) -> int:
        return self.member_bytes // self.chunk_bytes

    @property
    def chunks(self) -> int:
        """Chunks of data in the whole array (md's raid10_size for level 10)."""
        if self.level == 1:
            return self.member_chunks
        if self.level != 10:
            return self.member_chunks * self.data_members
        if self.layout == "near":
            return self.member_chunks * self.members // self.copies
        return self.member_chunks // self.copies * self.members

    @property
    def size(self) -> int:
        """What the array holds, in bytes."""
        return self.chunks * self.chunk_bytes

    @property
    def stripe_bytes(self) -> int:
        """User bytes of a full stripe: a write of one, aligned, needs no reads."""
        if self.level == 1:
            return self.chunk_bytes
        if self.level == 10:
            return self.chunk_bytes * self.members // self.copies
        return self.chunk_bytes * self.data_members


def layouts_of(level: int) -> tuple[str, ...]:
    """What `layout` may be; the first is the default."""
    if level in (5, 6):
        return ("left-symmetric", *(one for one in ROTATIONS if one != "left-symmetric"))
    return COPYINGS if level == 10 else ("",)
