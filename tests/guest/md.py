"""md in a guest, beside ours: disks that are images, arrays of one shape in both, jobs one by one.

A boot takes longer than most of what is done with an array, so the machine stays up: `Machine.run`
hands it a script and waits. The images are files on tmpfs. Between two jobs, when md has let them
go, the host may read and write them.
"""

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from pmblk.raid.array import Array
from pmblk.raid.geometry import Copying, Geometry, Level, Rotation
from pmblk.raid.member import Member, Request
from tests.harness import qemu
from tests.harness.guests import GuestFailed

BLOCK_BYTES = 4096
POLL_SECONDS = 0.02
JOB_SECONDS = 60


# ---- shapes


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of an array, in our words. `str` is how a test's line names it."""

    level: Level
    members: int
    chunk_bytes: int
    layout: Rotation | Copying | str = ""
    copies: int = 2

    def geometry(self, member_bytes: int) -> Geometry:
        return Geometry(
            level=self.level,
            members=self.members,
            member_bytes=member_bytes,
            chunk_bytes=self.chunk_bytes,
            layout=self.layout,  # type: ignore[arg-type]  # Geometry checks it
            copies=self.copies,
        )

    def mdadm(self) -> list[str]:
        """In the words of `mdadm --create`. A mirror has no chunks there."""
        words = [f"--level={self.level}", f"--raid-devices={self.members}"]
        if self.level != 1:
            words.append(f"--chunk={self.chunk_bytes >> 10}")
        if self.layout:
            words.append(f"--layout={self._layout()}")
        return words

    def _layout(self) -> str:
        return f"{self.layout[0]}{self.copies}" if self.level == 10 else self.layout

    def __str__(self) -> str:
        layout = f" {self._layout()}" if self.layout else ""
        chunk = "" if self.level == 1 else f", {self.chunk_bytes >> 10} KiB chunks"
        return f"raid{self.level}{layout} of {self.members}{chunk}"


# ---- the machine


@dataclass(frozen=True, kw_only=True)
class Disk:
    """An image as a virtio disk: the first is /dev/vda."""

    file: Path

    def arguments(self, name: str) -> list[str]:
        return [
            *("-drive", f"if=none,id={name},format=raw,discard=unmap,file={self.file}"),
            *("-device", f"virtio-blk-pci,drive={name}"),
        ]

    def kernel_arguments(self) -> list[str]:
        return []


START = """
modprobe -a virtio_blk raid0 raid1 raid10 raid456
export MDADM_NO_UDEV=1
echo 1000000 >/proc/sys/dev/raid/speed_limit_min
md=/sys/block/md0/md

# settled: all members are whole, and md has nothing more to do.
settled() {
    local start degraded action
    while true; do
        read -r start <$md/resync_start
        read -r degraded <$md/degraded
        read -r action <$md/sync_action
        [ "$start $degraded $action" != "none 0 idle" ] || return 0
        sleep 0.05
    done
}
number=0
while true; do
    until [ -e /run/w/job-$number ]; do sleep 0.05; done
    set +e
    (set -e; . /run/w/job-$number) >/run/w/said-$number 2>&1
    echo $? >/run/w/ending
    set -e
    mv /run/w/ending /run/w/ended-$number
    number=$((number + 1))
done
"""


class Machine:
    """One that runs jobs. `images` are its disks, `disks` their names in it, in the same order."""

    def __init__(self, guest: qemu.Guest, images: Sequence[Path]) -> None:
        self.folder = guest.folder
        self.images = list(images)
        self.disks = [f"/dev/vd{chr(ord('a') + number)}" for number in range(len(images))]
        self._guest = guest
        self._jobs = 0

    def run(self, script: str, *, seconds: float = JOB_SECONDS) -> str:
        """What it said. Raises GuestFailed with that when it failed or is not done in time."""
        number, self._jobs = self._jobs, self._jobs + 1
        ended, said = (self.folder / f"{name}-{number}" for name in ("ended", "said"))
        draft = self.folder / "draft"
        draft.write_text(script)
        draft.rename(self.folder / f"job-{number}")
        deadline = time.monotonic() + seconds
        while not ended.exists():
            if not self._guest.running or time.monotonic() > deadline:
                words = said.read_text() if said.exists() else self._guest.output
                raise GuestFailed(f"this job did not end:\n{script}\n{words}")
            time.sleep(POLL_SECONDS)
        if ended.read_text().strip() != "0":
            raise GuestFailed(f"this job failed:\n{script}\n{said.read_text()}")
        return said.read_text()


@contextlib.contextmanager
def machine(disks: int, *, image_bytes: int, seconds: int) -> Iterator[Machine]:
    """A guest with so many disks of so many bytes, and md; gone with its images at the end."""
    with tempfile.TemporaryDirectory(prefix="pmblk-md-", dir="/dev/shm") as name:
        images = [Path(name) / f"disk{number}" for number in range(disks)]
        for image in images:
            image.touch()
            os.truncate(image, image_bytes)
        devices = [Disk(file=image) for image in images]
        with qemu.booted(START, devices=devices, seconds=seconds) as guest:
            yield Machine(guest, images)


# ---- our array over the same images


class ImageMember(Member):
    """An image, as a part of this program's memory."""

    def __init__(self, image: Path) -> None:
        self.place = str(image)
        self.size = image.stat().st_size
        self.block_bytes = BLOCK_BYTES
        with image.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.size)

    async def read(self, requests: Sequence[Request]) -> None:
        await trio.lowlevel.checkpoint()
        for offset, view in requests:
            view[:] = self._memory[offset : offset + len(view)]

    async def write(self, requests: Sequence[Request]) -> None:
        await trio.lowlevel.checkpoint()
        for offset, view in requests:
            self._memory[offset : offset + len(view)] = view

    async def flush(self) -> None:
        """It is what QEMU reads, as soon as it is stored."""
        await trio.lowlevel.checkpoint()

    async def zero(self, offset: int, length: int) -> None:
        await trio.lowlevel.checkpoint()
        self._memory[offset : offset + length] = bytes(length)

    def close(self) -> None:
        self._memory.close()


@contextlib.contextmanager
def array(
    geometry: Geometry, images: Sequence[Path], *, data_offset: int, missing: Sequence[int] = ()
) -> Iterator[Array]:
    """Over the images as md left them. None of its members may fail."""

    async def announce(slot: int, error: OSError) -> None:
        raise AssertionError(f"member {slot} failed: {error}")

    members = [None if slot in missing else ImageMember(image) for slot, image in enumerate(images)]
    ours = Array(geometry, members, data_offset=data_offset, announce=announce)
    try:
        yield ours
    finally:
        ours.close()
