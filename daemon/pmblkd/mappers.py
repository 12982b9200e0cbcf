"""Which processes map a file: only proc(5) knows, for a mapping outlives its descriptor.

A client that maps a file of our mount past the daemon (`pmblkd.fuse.passthrough`) maps the media,
but proc(5) shows the mount's device and inode for it and never the media's: the kernel keeps the
path that was opened (backing_file_open in fs/backing-file.c, Linux 6.9). So whoever asks has to say
what else the file is known as.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

SETTLE_SECONDS = 0.5  # what a process closes as it ends is closed a little after we hear of it


class MappedAs(msgspec.Struct, frozen=True):
    """A file of a mount, as proc(5) shows its mappings: `file` is its inode, or its name there."""

    device: str
    file: str


def on_mount(minor: int, file: str) -> MappedAs:
    """A file of a mount without a block device, whose device number has major 0."""
    return MappedAs(f"00:{minor:02x}", file)


def who_maps_media(
    path: Path, status: os.stat_result, *, is_open: bool | None, mapped_as: MappedAs | None
) -> list[int]:
    """The processes whose stores may go to the media, by whichever file they map them.

    `is_open`: whether others have the media open or mapped, as far as it can be told. `mapped_as`
    is their file on a mount, if there is one. Whoever maps that has pages of the mount, and not of
    the media, unless the media are open too.
    """
    if is_open is False:
        return []
    return processes_that_map(path, status, also=() if mapped_as is None else (mapped_as,))


def stays_open(is_open_elsewhere: Callable[[], bool | None]) -> bool:
    """Whether others have a file open or mapped, and go on to; False if it cannot be told."""
    end = time.monotonic() + SETTLE_SECONDS
    while is_open_elsewhere():
        if time.monotonic() > end:
            return True
        time.sleep(0.01)
    return False


def processes_that_map(
    path: Path, status: os.stat_result, *, also: Collection[MappedAs] = ()
) -> list[int]:
    """Those that we may look at, without ourselves.

    `status` is that of the file itself: its name may be gone, or another file's by now.
    """
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    inode = str(status.st_ino)
    # By device, or by path: btrfs shows one device here and another one in stat(2).
    wanted = {MappedAs(device, inode), MappedAs(str(path.resolve()), inode), *also}
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        if int(maps.parts[2]) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
            # Lines end at newlines only: other bytes are part of some file's name.
            lines = maps.read_bytes().decode(errors="replace").split("\n")
            if any(not wanted.isdisjoint(_names(line)) for line in lines if line):
                found.append(int(maps.parts[2]))
    return found


def _names(line: str) -> tuple[MappedAs, ...]:
    """What a line of maps calls its file: by device, by path, and by device and name."""
    fields = line.split(maxsplit=5)
    device, inode, path = fields[3], fields[4], fields[-1]
    name = path.rpartition("/")[2]
    return MappedAs(device, inode), MappedAs(path, inode), MappedAs(device, name)
