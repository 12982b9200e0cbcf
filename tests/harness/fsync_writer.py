"""A program that writes files with fsync, and the check that nothing it was promised got lost.

    python fsync_writer.py DIRECTORY SEED

Its threads write until the device fails. A line on standard output is a promise or a warning:

    begun NAME VERSION LENGTH     from here on the file may have this content
    kept NAME VERSION LENGTH      ... and from here on no older one: fsync returned
    grown NAME LENGTH             the appended file has at least that many bytes: fdatasync returned

A file's content follows from its version, so the check needs the lines and the directory only.
Standard library only: it runs beside the daemon, from any interpreter.
"""

import hashlib
import os
import random
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

THREADS = 2
FILES = 200  # names that a thread writes in turn, each again and again
LENGTHS = (100, 4096, 20_000, 70_000)
APPEND_BYTES = 1000

Say = Callable[[str], None]
Version = tuple[str, int]  # what it is made of, and its length


def content(version: str, length: int) -> bytes:
    """`length` bytes that nothing else but this version has."""
    blocks = range(length // 64 + 1)
    return b"".join(hashlib.sha512(f"{version}/{i}".encode()).digest() for i in blocks)[:length]


# ---- writing


def write(directory: Path, seed: int, say: Say) -> None:
    threads = [
        threading.Thread(target=_write_until_it_fails, args=(directory, seed, number, say))
        for number in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _write_until_it_fails(directory: Path, seed: int, number: int, say: Say) -> None:
    chosen = random.Random(seed * THREADS + number)
    log = f"log.{seed}.{number}"
    round_ = 0
    try:
        with (directory / log).open("ab", buffering=0) as stream:
            while True:
                name = f"file.{seed}.{number}.{round_ % FILES}"
                _replace(directory, name, f"{name}.{round_}", chosen.choice(LENGTHS), say)
                _append(stream.fileno(), log, round_ * APPEND_BYTES, say)
                round_ += 1
    except OSError:
        return  # the device is gone, as the test wants it


def _replace(directory: Path, name: str, version: str, length: int, say: Say) -> None:
    """The way to replace a file that survives a crash: write, fsync, rename, fsync."""
    new = directory / f"{name}.new"
    with new.open("wb", buffering=0) as stream:
        stream.write(content(version, length))
        os.fsync(stream.fileno())
    say(f"begun {name} {version} {length}")
    new.rename(directory / name)
    _sync_directory(directory)
    say(f"kept {name} {version} {length}")


def _append(fd: int, name: str, offset: int, say: Say) -> None:
    os.write(fd, content(name, offset + APPEND_BYTES)[offset:])
    os.fdatasync(fd)
    say(f"grown {name} {offset + APPEND_BYTES}")


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- checking


def lost(directory: Path, lines: Iterable[str]) -> list[str]:
    """What the lines promise and the directory does not hold."""
    allowed: dict[str, list[Version]] = {}
    grown: dict[str, int] = {}
    for line in lines:
        verb, name, *rest = line.split()
        if verb == "grown":
            grown[name] = int(rest[0])
        elif verb == "kept":
            allowed[name] = [(rest[0], int(rest[1]))]
        else:
            # Only once a version was kept is the file sure to be there at all.
            allowed.setdefault(name, [("", 0)]).append((rest[0], int(rest[1])))
    return [
        *_lost_files(directory, allowed),
        *_lost_ends(directory, grown),
    ]


def _lost_files(directory: Path, allowed: dict[str, list[Version]]) -> Iterable[str]:
    for name, versions in allowed.items():
        path = directory / name
        if not path.exists():
            if ("", 0) not in versions:
                yield f"{name} is missing"
        elif path.read_bytes() not in [content(*version) for version in versions]:
            yield f"{name} has {path.stat().st_size} bytes, and none of {versions}"


def _lost_ends(directory: Path, grown: dict[str, int]) -> Iterable[str]:
    for name, length in grown.items():
        path = directory / name
        if not path.exists():
            yield f"{name} is missing"
            continue
        # A little more may be there: appended, but fdatasync had not returned.
        got = path.read_bytes()
        if got[:length] != content(name, length):
            yield f"{name} has {len(got)} bytes, and not the first {length} that were kept"


def main() -> None:
    def say(line: str) -> None:
        os.write(sys.stdout.fileno(), f"{line}\n".encode())  # one write: threads do not mix

    write(Path(sys.argv[1]), int(sys.argv[2]), say)


if __name__ == "__main__":
    main()
