"""Our arrays and md's of the same shape hold the same bytes in the same places, parity too.

Linux's md is the client of images, and we are before and after: what it wrote we read, with every
loss of members that the shape allows; what we wrote it reads, and its check finds no mismatch.
"""

import itertools
import os
import random
from collections.abc import Iterator

import pytest
import trio

from pmblk.raid.geometry import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, Geometry, Level, layouts_of
from pmblk.raid.layout import survives
from tests.guest import md
from tests.guest.md import Machine, Shape

pytestmark = pytest.mark.guest

MIB = 1 << 20
BLOCK_BYTES = 4096
DISKS = 6
IMAGE_BYTES = 16 * MIB
DATA_OFFSETS = range(1 * MIB, 3 * MIB, BLOCK_BYTES)
MEMBER_CHUNKS_MAX = 40  # so that small chunks make a small array: it is read many times
MEMBER_BYTES_MAX = 12 * MIB
BATCH = 8  # of our writes
GUEST_SECONDS = 300
CHUNKS = [CHUNK_BYTES_MIN << n for n in range(9)]
assert CHUNKS[-1] == CHUNK_BYTES_MAX

SEED = int(os.environ.get("PMBLK_SEED") or random.randrange(1 << 20))
chosen = random.Random(SEED)


def shape(level: Level, members: int, layout: str = "", copies: int = 2) -> Shape:
    chunk_bytes = chosen.choice(CHUNKS)
    return Shape(
        level=level, members=members, layout=layout, copies=copies, chunk_bytes=chunk_bytes
    )


SHAPES = [
    shape(0, 3),
    shape(1, 3),
    shape(4, 4),
    *(shape(5, chosen.randint(3, DISKS), layout) for layout in layouts_of(5)),
    *(shape(6, chosen.randint(4, DISKS), layout) for layout in layouts_of(6)),
    *(
        shape(10, members, layout, copies)
        for layout, copies, members in (
            ("near", 2, 4),
            ("near", 2, 5),
            ("near", 3, 4),
            ("near", 3, 5),
            ("far", 2, 4),
            ("far", 2, 3),
            ("far", 3, 5),
            ("offset", 2, 4),
            ("offset", 2, 5),
            ("offset", 3, 4),
        )
    ),
]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with md.machine(DISKS, image_bytes=IMAGE_BYTES, seconds=GUEST_SECONDS) as machine:
        yield machine


MADE_BY_MD = """
mdadm --stop --scan
mdadm --create /dev/md0 --run --homehost=any --metadata=1.2 WORDS DISKS
[ LEVEL = 0 ] || settled
dd if=/run/w/pattern of=/dev/md0 bs=1M oflag=direct status=none
[ LEVEL = 0 ] || settled
blockdev --getsize64 /dev/md0
mdadm --stop /dev/md0
"""

WRITTEN_BY_US = """
mdadm --assemble /dev/md0 DISKS
cmp /run/w/pattern /dev/md0
if [ LEVEL != 0 ]; then
    settled
    echo check >$md/sync_action
    settled
    echo "mismatches: $(cat $md/mismatch_cnt)"
fi
mdadm --stop /dev/md0
mdadm --zero-superblock DISKS
"""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_md_and_we_hold_the_same_bytes_in_the_same_places(machine: Machine, shape: Shape) -> None:
    """{shape}: we read what md wrote, after every loss; md reads and checks what we wrote."""
    print(f"PMBLK_SEED={SEED}")
    seeded = random.Random(f"{SEED} {shape}")
    data_offset = seeded.choice(DATA_OFFSETS)
    geometry = shape.geometry(_member_bytes(shape, data_offset, seeded))
    pattern = seeded.randbytes(geometry.size)
    (machine.folder / "pattern").write_bytes(pattern)
    words = [*shape.mdadm(), f"--data-offset={data_offset >> 10}"]
    if shape.level:
        words.append(f"--size={geometry.member_bytes >> 10}")
    said = machine.run(_script(MADE_BY_MD, machine, shape).replace("WORDS", " ".join(words)))
    assert str(geometry.size) in said.splitlines(), "the array has the same size"
    trio.run(_read_after_every_loss, machine, geometry, data_offset, pattern)

    pattern = seeded.randbytes(geometry.size)
    (machine.folder / "pattern").write_bytes(pattern)
    trio.run(_write_all, machine, geometry, data_offset, pattern, seeded)
    said = machine.run(_script(WRITTEN_BY_US, machine, shape))
    assert not shape.level or "mismatches: 0" in said.splitlines(), said


def _script(template: str, machine: Machine, shape: Shape) -> str:
    disks = " ".join(machine.disks[: shape.members])
    return template.replace("DISKS", disks).replace("LEVEL", str(shape.level))


def _member_bytes(shape: Shape, data_offset: int, seeded: random.Random) -> int:
    """Any whole number of chunks; level 0 always takes all that there is."""
    if not shape.level:
        return IMAGE_BYTES - data_offset
    most = min(MEMBER_CHUNKS_MAX, MEMBER_BYTES_MAX // shape.chunk_bytes)
    return seeded.randint(most // 2, most) * shape.chunk_bytes


async def _read_after_every_loss(
    machine: Machine, geometry: Geometry, data_offset: int, pattern: bytes
) -> None:
    images = machine.images[: geometry.members]
    losses = 0
    for count in range(geometry.members):
        for missing in itertools.combinations(range(geometry.members), count):
            if not survives(geometry, missing):
                continue
            losses += 1
            with md.array(geometry, images, data_offset=data_offset, missing=missing) as ours:
                found = await ours.read(0, geometry.size)
            assert found == pattern, f"without {missing}: {_differs(found, pattern)}"
    assert losses > geometry.redundancy


def _differs(found: memoryview, pattern: bytes) -> str:
    blocks = range(0, len(pattern), BLOCK_BYTES)
    wrong = [at for at in blocks if found[at : at + BLOCK_BYTES] != pattern[at : at + BLOCK_BYTES]]
    return f"{len(wrong)} of {len(blocks)} blocks, the first at {wrong[0]}"


async def _write_all(
    machine: Machine, geometry: Geometry, data_offset: int, pattern: bytes, seeded: random.Random
) -> None:
    """In pieces of a block to some stripes, in any order: parity is made in every way there is."""
    images = machine.images[: geometry.members]
    pieces = []
    position = 0
    while position < geometry.size:
        most = seeded.choice([4 * BLOCK_BYTES, geometry.chunk_bytes, 3 * geometry.stripe_bytes])
        length = seeded.randint(1, max(1, most // BLOCK_BYTES)) * BLOCK_BYTES
        pieces.append((position, memoryview(pattern)[position : position + length]))
        position += length
    seeded.shuffle(pieces)
    with md.array(geometry, images, data_offset=data_offset) as ours:
        for first in range(0, len(pieces), BATCH):
            assert set(await ours.write(pieces[first : first + BATCH])) == {None}
