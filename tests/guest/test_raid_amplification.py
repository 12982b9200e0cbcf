"""What a byte that is written costs in bytes that the members read and write: ours beside md's.

Both do the same writes, at the same offsets, on a raid5 of four data members and parity, without a
bitmap and without a journal. No 4 KiB of a member is met twice by the random ones, so md's stripe
cache is of no help to it, and its superblocks are not written meanwhile. What is left is how a
write is planned.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import trio

from tests.guest import md
from tests.guest.md import Machine, Shape

pytestmark = pytest.mark.guest

MIB = 1 << 20
BLOCK_BYTES = 4096
SHAPE = Shape(level=5, members=5, layout="left-symmetric", chunk_bytes=64 << 10)
IMAGE_BYTES, DATA_OFFSET = 16 * MIB, 1 * MIB
GEOMETRY = SHAPE.geometry(IMAGE_BYTES - DATA_OFFSET)
RANDOM_WRITES = 1000
GUEST_SECONDS = 200


@dataclass(frozen=True, kw_only=True)
class Load:
    """`theory`: bytes that the members read and write for a byte that is written."""

    name: str
    offsets: Sequence[int]
    block_bytes: int
    queue_depth: int
    theory: tuple[float, float]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Cost:
    """For a byte that is written."""

    read: float
    written: float

    def __str__(self) -> str:
        return f"{self.read:.2f} + {self.written:.2f}"


def random_offsets(seed: int) -> list[int]:
    """Of blocks that share no row of blocks with each other."""
    chosen = random.Random(seed)
    chunk_blocks = GEOMETRY.chunk_bytes // BLOCK_BYTES
    lines = chosen.sample(range(GEOMETRY.member_chunks * chunk_blocks), RANDOM_WRITES)
    offsets = []
    for line in lines:
        row, start = divmod(line, chunk_blocks)
        chunk = row * GEOMETRY.data_members + chosen.randrange(GEOMETRY.data_members)
        offsets.append(chunk * GEOMETRY.chunk_bytes + start * BLOCK_BYTES)
    return offsets


LOADS = [
    *(
        Load(
            name=f"4 KiB random writes, QD{depth}",
            offsets=random_offsets(depth),
            block_bytes=BLOCK_BYTES,
            queue_depth=depth,
            theory=(2, 2),
        )
        for depth in (1, 16)
    ),
    Load(
        name="1 MiB sequential writes, QD1",
        offsets=range(0, GEOMETRY.size - MIB + 1, MIB),
        block_bytes=MIB,
        queue_depth=1,
        theory=(0, 1.25),
    ),
]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with md.machine(SHAPE.members, image_bytes=IMAGE_BYTES, seconds=GUEST_SECONDS) as machine:
        yield machine


BY_MD = f"""
mdadm --create /dev/md0 --run --homehost=any --metadata=1.2 --assume-clean \\
    {" ".join(SHAPE.mdadm())} --data-offset={DATA_OFFSET >> 10} DISKS
settled
echo 0 >$md/safe_mode_delay
dd if=/dev/zero of=/dev/md0 bs=4k count=1 oflag=direct conv=fsync status=none
sectors() {{ awk -v what=$1 '{{ read += $3; written += $7 }} END {{
    print what, read * 512, written * 512 }}' /sys/block/vd[a-e]/stat; }}
blockdev --getsize64 /dev/md0
sectors before
fio --name=replay --read_iolog=/run/w/iolog --replay_no_stall=1 --direct=1 --ioengine=libaio \\
    --iodepth=DEPTH --minimal --output=/run/fio
sectors after
mdadm --stop /dev/md0
mdadm --zero-superblock DISKS
"""


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_the_members_do_no_more_than_those_of_md(
    machine: Machine, load: Load, record_property: Callable[[str, object], None]
) -> None:
    """{load}: what a byte costs."""
    theirs = _by_md(machine, load)
    ours = trio.run(_by_us, machine, load)
    record_property("title", f"raid5 of 4 + 1, {load}: members read + write {ours}, md's {theirs}")
    assert (ours.read, ours.written) == load.theory
    assert ours.read <= theirs.read
    assert ours.written <= theirs.written


def _by_md(machine: Machine, load: Load) -> Cost:
    writes = [f"/dev/md0 write {offset} {load.block_bytes}" for offset in load.offsets]
    lines = ["fio version 2 iolog", "/dev/md0 add", "/dev/md0 open", *writes, "/dev/md0 close"]
    (machine.folder / "iolog").write_text("\n".join(lines) + "\n")
    script = BY_MD.replace("DEPTH", str(load.queue_depth))
    said = machine.run(script.replace("DISKS", " ".join(machine.disks)))
    assert str(GEOMETRY.size) in said.splitlines(), said
    words = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line}
    before, after = (tuple(map(int, words[when])) for when in ("before", "after"))
    return _cost(load, after[0] - before[0], after[1] - before[1])


async def _by_us(machine: Machine, load: Load) -> Cost:
    """As many at once as the queue is deep, as a front end hands them over: in one batch."""
    block = memoryview(random.Random(0).randbytes(load.block_bytes))
    with md.array(GEOMETRY, machine.images, data_offset=DATA_OFFSET) as ours:
        for first in range(0, len(load.offsets), load.queue_depth):
            batch = [(offset, block) for offset in load.offsets[first : first + load.queue_depth]]
            assert set(await ours.write(batch)) == {None}
        return _cost(load, ours.devices.read_bytes, ours.devices.write_bytes)


def _cost(load: Load, read_bytes: int, write_bytes: int) -> Cost:
    written = len(load.offsets) * load.block_bytes
    return Cost(read_bytes / written, write_bytes / written)
