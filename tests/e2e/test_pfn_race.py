"""Linus's objection to page frame numbers in the block layer, shown: who holds the page?

A reader holds memory that a discard takes away, another file gets it, and then the reader looks. On
a full tmpfs there is nothing to give the reader but SIGBUS, which makes it a media fault. With the
range lock, the discard waits.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.programs import program

pytestmark = pytest.mark.e2e

RACER = Path(__file__).with_name("pfn_racer.py")


@pytest.fixture
def small_tmpfs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pmblk-race-") as directory:
        program("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory)
        try:
            yield Path(directory)
        finally:
            program("umount", directory)


def _race(directory: Path, locking: str) -> tuple[int, list[str], str]:
    """How the process ended, what it said, and all of that in words."""
    child = subprocess.run(
        (sys.executable, str(RACER), str(directory), locking),
        capture_output=True,
        text=True,
        timeout=60,
    )
    end = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
    words = f"locking={locking} ended with {end} and said:\n{child.stdout}{child.stderr}"
    return child.returncode, child.stdout.splitlines(), words


def test_without_a_lock_the_reader_loses_the_memory_that_it_holds(small_tmpfs: Path) -> None:
    ended, said, words = _race(small_tmpfs, "none")
    assert said[:2] == ["held", "the discard is done"], words
    assert said[2].startswith("filled: "), words
    assert ended == 0, words
    assert said[3].startswith("found "), words
    assert said[4].startswith("the media have failed: "), words


def test_with_the_range_lock_the_discard_waits_and_the_bytes_are_intact(
    small_tmpfs: Path,
) -> None:
    ended, said, words = _race(small_tmpfs, "range")
    assert ended == 0, words
    assert said[:2] == ["held", "the discard waits"], words
    assert said[2].startswith("filled: "), words
    assert said[3:] == ["intact", "discarded"], words
