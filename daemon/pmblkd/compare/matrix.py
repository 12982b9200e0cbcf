"""What each contender is put under: two paths, three block sizes, two depths, both ways. Pure.

Offsets are random at every block size. Neighbouring requests would be merged on the way (the block
layer above a loop device does), and then the I/Os were not of the size that the row says.
"""

import re
from typing import Literal

import msgspec

from pmblk import PmblkError

Path = Literal["nbd", "loop"]
Way = Literal["read", "write"]

PATH_TITLES = {"nbd": "NBD over a unix socket", "loop": "FUSE, loop device, O_DIRECT"}
BLOCKS_BYTES = (4 << 10, 128 << 10, 1 << 20)
QUEUE_DEPTHS = (1, 32)


class Row(msgspec.Struct, frozen=True):
    """One load."""

    path: Path
    way: Way
    block_bytes: int
    queue_depth: int

    @property
    def name(self) -> str:
        """What --rows matches: nbd-4k-read-qd1."""
        return f"{self.path}-{self.block.lower()}-{self.way}-qd{self.queue_depth}"

    @property
    def title(self) -> str:
        """Without the path, under whose heading it stands."""
        return f"{self.block} {self.way}, QD{self.queue_depth}"

    @property
    def block(self) -> str:
        return block_text(self.block_bytes)


def block_text(block_bytes: int) -> str:
    """As fio and everybody else writes it: 4K, 1M."""
    return f"{block_bytes >> 20}M" if block_bytes >= 1 << 20 else f"{block_bytes >> 10}K"


def _rows() -> tuple[Row, ...]:
    return tuple(
        Row(path, way, block_bytes, depth)
        for path in ("nbd", "loop")
        for way in ("read", "write")
        for block_bytes in BLOCKS_BYTES
        for depth in QUEUE_DEPTHS
    )


ROWS = _rows()


def rows(pattern: str, *, with_loop: bool) -> list[Row]:
    """The rows whose name the pattern is found in. Raises PmblkError when that is none."""
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise PmblkError(f"--rows: {pattern!r} is no pattern: {error}") from None
    found = [row for row in ROWS if wanted.search(row.name)]
    if not found:
        raise PmblkError(
            f"--rows: no row matches {pattern!r}", hint=f"there are {', '.join(_names())}"
        )
    possible = [row for row in found if with_loop or row.path != "loop"]
    if not possible:
        raise PmblkError(
            f"--rows: {pattern!r} matches rows of a loop device only",
            hint="be root, on a machine with /dev/fuse and loop devices",
        )
    return possible


def _names() -> list[str]:
    return [row.name for row in ROWS]
