"""Read from memory that was discarded meanwhile. A process of its own, for it is SIGBUS.

Usage: pfn_racer.py DIRECTORY LOCKING, with a small tmpfs at DIRECTORY. Says each step on a line.
"""

import sys
from pathlib import Path

import trio

from pmblk import Command, Namespace
from pmblk.media import create, open_media
from pmblk.nvme.command import DATASET_MANAGEMENT, READ, WRITE
from pmblk.representations import make, parse_options

LENGTH = 1 << 20
HELD = b"held" * (LENGTH // 4)


def say(what: str) -> None:
    print(what, flush=True)


def fill(path: Path) -> int:
    """Another file takes all the memory that is left; how much that was."""
    taken = 0
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                taken += file.write(b"other" * 4096)
        except OSError as error:
            say(f"filled: {taken} bytes, then {error.strerror}")
    return taken


async def race(directory: Path, locking: str) -> None:
    create(directory / "ns.img", 4 * LENGTH)
    media = open_media(directory / "ns.img")
    representation = make("pfn", media, parse_options("pfn", {"locking": locking}))
    namespace = Namespace("ns", media, representation, lba_bytes=512)
    read = Command(READ, 0, LENGTH, LENGTH)
    discard = Command(DATASET_MANAGEMENT, 0, LENGTH, LENGTH)
    assert not namespace.execute([Command(WRITE, 0, LENGTH, LENGTH, payload=HELD), read])
    say("held")
    waiting = namespace.execute([discard])
    say("the discard waits" if waiting else "the discard is done")
    fill(directory / "other")
    assert read.segments is not None
    found = b"".join(bytes(segment) for segment in read.segments if isinstance(segment, memoryview))
    say("intact" if found == HELD else f"found {found[:8]!r} instead of {HELD[:8]!r}")
    if namespace.failure():
        say(f"the media have failed: {namespace.failure()}")
    namespace.release([read])
    if waiting:
        await namespace.complete(waiting)
    hole = next(iter(media.allocation.extents(LENGTH, LENGTH)))
    say("discarded" if not discard.status and hole.hole and hole.length == LENGTH else "kept")


if __name__ == "__main__":
    trio.run(race, Path(sys.argv[1]), sys.argv[2])
