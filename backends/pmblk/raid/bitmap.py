"""The write-intent bitmap on members, byte by byte, and the arithmetic of its regions. Pure.

The area is 16 blocks of 4 KiB. Each has a header and then a bit for each of its regions, so that
each is written, torn and judged by itself:

    0   magic, CRC-32C of the block, its number, generation, bytes of a region
    32  32,512 bits, the lowest of each byte first

What counts is the union of all members: one that missed a store shows a mark too few, or one too
many. A block that no member has whole marks all of its regions, unless it is zero on every one of
them: then nobody has written it since the array was made.

Sizes and offsets are bytes.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pmblk.checksum import crc32c
from pmblk.raid.superblock import BITMAP_BYTES

MAGIC = b"PMBLKBM1"
BLOCK_BYTES = 4096
BLOCKS = BITMAP_BYTES // BLOCK_BYTES
# magic, crc, number, generation, region bytes
_HEADER = struct.Struct("<8sIIQQ")
_CRC_OFFSET = 8
REGIONS_PER_BLOCK = (BLOCK_BYTES - _HEADER.size) * 8
REGIONS_MAX = BLOCKS * REGIONS_PER_BLOCK
REGION_BYTES_MIN, REGION_BYTES_DEFAULT_MAX = 1 << 20, 64 << 20
REGIONS_WANTED = 4096
ANY = 0  # for the bytes of a region: the block is good for all of them

assert BLOCKS * BLOCK_BYTES == BITMAP_BYTES
assert _HEADER.size == 32
assert REGIONS_PER_BLOCK == 32512

Marks = npt.NDArray[np.bool_]


def region_bytes_for(size: int) -> int:
    """How large the regions of an array of that size are by default.

    A power of two, so that 4,096 regions are enough: a writer that stays near sets few bits, and
    after a crash a resync looks at a small part. But not below 1 MiB (nothing is won: a resync
    does that in no time), and not above 64 MiB, which is md's default, before the bitmap is full.
    """
    wanted = -(-size // REGIONS_WANTED)
    needed = -(-size // REGIONS_MAX)
    least = max(min(wanted, REGION_BYTES_DEFAULT_MAX), needed, REGION_BYTES_MIN)
    return 1 << (least - 1).bit_length()


def regions_of(ranges: Iterable[tuple[int, int]], region_bytes: int) -> set[int]:
    """The regions that ranges (offset, length) touch."""
    touched: set[int] = set()
    for offset, length in ranges:
        if length:
            touched.update(range(offset // region_bytes, (offset + length - 1) // region_bytes + 1))
    return touched


def ranges_of(marks: Marks, *, region_bytes: int, size: int) -> list[tuple[int, int]]:
    """Offset and length of what is marked, joined, in order."""
    edges = np.flatnonzero(np.diff(marks, prepend=False, append=False)) * region_bytes
    pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [(start, min(end, size) - start) for start, end in pairs]


def encode(marks: Marks, number: int, *, region_bytes: int, generation: int) -> bytes:
    """A block of the area, of the marks of all regions of the array."""
    start = number * REGIONS_PER_BLOCK
    bits = np.packbits(marks[start : start + REGIONS_PER_BLOCK], bitorder="little").tobytes()
    block = bytearray(BLOCK_BYTES)
    _HEADER.pack_into(block, 0, MAGIC, 0, number, generation, region_bytes)
    block[_HEADER.size : _HEADER.size + len(bits)] = bits
    struct.pack_into("<I", block, _CRC_OFFSET, crc32c(bytes(block)))
    return bytes(block)


def decode(block: bytes, number: int, *, region_bytes: int) -> Marks | None:
    """The marks of the regions of that block; None: it is torn, damaged or not ours."""
    magic, crc, found, _, unit = _HEADER.unpack_from(block)
    whole = block[:_CRC_OFFSET] + bytes(4) + block[_CRC_OFFSET + 4 :]
    if magic != MAGIC or crc32c(whole) != crc:
        return None
    if found != number or unit not in (region_bytes, ANY):
        return None
    bits = np.frombuffer(block, dtype=np.uint8, offset=_HEADER.size)
    return np.unpackbits(bits, bitorder="little").astype(np.bool_)


def union(areas: Sequence[bytes], *, regions: int, region_bytes: int) -> Marks:
    """What the areas of all members say together, for each region of the array."""
    assert regions <= REGIONS_MAX
    assert all(len(area) == BITMAP_BYTES for area in areas)
    marks = np.zeros(BLOCKS * REGIONS_PER_BLOCK, dtype=np.bool_)
    for number in range(-(-regions // REGIONS_PER_BLOCK)):
        start = number * BLOCK_BYTES
        blocks = [area[start : start + BLOCK_BYTES] for area in areas]
        part = marks[number * REGIONS_PER_BLOCK : (number + 1) * REGIONS_PER_BLOCK]
        _unite(part, blocks, number, region_bytes)
    return marks[:regions]


def _unite(part: Marks, blocks: Sequence[bytes], number: int, region_bytes: int) -> None:
    found = [decode(block, number, region_bytes=region_bytes) for block in blocks]
    whole = [marks for marks in found if marks is not None]
    for marks in whole:
        part |= marks
    if not whole and (not blocks or any(any(block) for block in blocks)):
        part[:] = True


def blocks_of(regions: Iterable[int]) -> Iterator[int]:
    """The blocks that hold the bits of these regions, each once, in order."""
    yield from sorted({region // REGIONS_PER_BLOCK for region in regions})


AREA_ALL_SET = b"".join(
    encode(np.ones(REGIONS_MAX, dtype=np.bool_), number, region_bytes=ANY, generation=0)
    for number in range(BLOCKS)
)
"""An area that marks everything, whatever the size of the array and of its regions."""
