"""Writers of fsynced files, each with its promises in a file, and the check of what they promise.

For the guest. `tests.harness.fsync_writer` is the program, and says what a promise is.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.harness import fsync_writer


class FilesLost(AssertionError):
    """Which files do not hold what was promised of them."""


def start(directory: Path, seed: int, promises: Path) -> "subprocess.Popen[bytes]":
    """It appends its lines to `promises`, each on its way to the disk before the next is begun."""
    fd = os.open(promises, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_SYNC, 0o600)
    try:
        return subprocess.Popen(
            [sys.executable, fsync_writer.__file__, str(directory), str(seed)], stdout=fd
        )
    finally:
        os.close(fd)


def lines(promises: Path) -> list[str]:
    return promises.read_text().splitlines() if promises.exists() else []


def take_back(promises: Path, *, after: int) -> None:
    """Only the first `after` lines still promise anything; the warnings of later ones stay."""
    said = lines(promises)
    later = [line for line in said[after:] if line.startswith("begun")]
    promises.write_text("".join(f"{line}\n" for line in [*said[:after], *later]))


def kept(promises: Path) -> int:
    """How many files have been promised to be there."""
    return sum(line.startswith("kept") for line in lines(promises))


def keeps_all(directory: Path, promises: Path) -> str:
    """What was checked. Raises FilesLost."""
    lost = fsync_writer.lost(directory, lines(promises))
    if lost:
        raise FilesLost(f"{len(lost)} files are lost, {kept(promises)} were fsynced: {lost[:5]}")
    return f"{kept(promises)} fsynced files are there"
