"""Which processes map a file: only proc(5) knows, for a mapping outlives its descriptor."""

import contextlib
import os
from pathlib import Path


def processes_that_map(file: Path) -> list[int]:
    """Those that we may look at, without ourselves. Raises OSError when the file is not there."""
    status = file.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    # By device, or by path: btrfs shows one device here and another one in stat(2).
    ours = {(device, str(status.st_ino)), (str(file), str(status.st_ino))}
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        if int(maps.parts[2]) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
            if any(ours & _names(line) for line in maps.read_text().splitlines()):
                found.append(int(maps.parts[2]))
    return found


def _names(line: str) -> set[tuple[str, str]]:
    """What a line of maps calls its file: by device and inode, and by path and inode."""
    fields = line.split(maxsplit=5)
    return {(fields[3], fields[4]), (fields[-1], fields[4])}
