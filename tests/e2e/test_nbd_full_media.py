"""A file system without room under a sparse namespace: an error, and nothing else is lost."""

import contextlib
import errno
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.harness import nbd_raw as raw
from tests.harness.daemon import Daemon, scratch
from tests.harness.programs import assert_no_complaints, program

pytestmark = pytest.mark.e2e

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB
BLOCK = 4 * KIB
KINDS = {
    "extent": '"extent"',
    "page-cache": '{ kind = "page-cache", arena = "1MiB" }',
    "struct-page": '"struct-page"',
    "transient-page": '{ kind = "transient-page", pool_pages = 256 }',
    "pfn": '"pfn"',
}
LEVELS = {"tmpfs": "memory", "ext4": "file", "ext4-1k": "file"}


@contextlib.contextmanager
def _mounted(file_system: str) -> Iterator[Path]:
    """A scratch directory with a file system of about 8 MiB at `mnt`."""
    with scratch() as directory:
        mountpoint = directory / "mnt"
        mountpoint.mkdir()
        if file_system == "tmpfs":
            program("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mountpoint))
        else:
            image = directory / "image"
            block = "1024" if file_system == "ext4-1k" else "4096"
            program("truncate", "--size=12M", str(image))
            program("mkfs.ext4", "-q", "-b", block, str(image))
            program("mount", "-o", "loop", str(image), str(mountpoint))
        yield directory


@pytest.fixture(params=[f"{fs} {kind}" for fs in LEVELS for kind in KINDS])
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """64 MiB on 8."""
    file_system, kind = request.param.split()
    with _mounted(file_system) as directory:
        config = f"""
[[namespace]]
name = "ns"
path = "{directory}/mnt/ns.img"
size = {SIZE}
representation = {KINDS[kind]}
[nbd]
listen = ["unix:{directory}/nbd.sock"]
"""
        started = Daemon(directory, config).start()
        assert started.list()[0]["durability"] == LEVELS[file_system]
        try:
            yield started
            assert_no_complaints(started)
            assert started.stop() == 0
        finally:
            if started.running:
                started.kill()


def _occupied(daemon: Daemon) -> int:
    """Bytes of the media file, once the file system has made up its mind (delayed allocation)."""
    media = daemon.directory / "mnt" / "ns.img"
    fd = os.open(media, os.O_RDONLY)
    try:
        os.fsync(fd)
        return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)


def _fill(
    client: raw.Client, source: random.Random, places: Sequence[int], length: int
) -> dict[int, bytes]:
    """`length` bytes at each place, until there is no space; what was taken."""
    taken: dict[int, bytes] = {}
    for offset in places:
        content = source.randbytes(length)
        error = client.write(offset, content)
        if error:
            assert error == errno.ENOSPC
            return taken
        taken[offset] = content
    raise AssertionError("8 MiB took 64")


def _assert_whole(client: raw.Client, taken: dict[int, bytes]) -> None:
    """What was taken reads back, and everything else is zero."""
    for start in range(0, SIZE, 8 * MIB):
        expected = bytearray(8 * MIB)
        for offset in range(start, start + 8 * MIB, BLOCK):
            content = taken.get(offset, b"")
            expected[offset - start : offset - start + len(content)] = content
        assert client.read(start, 8 * MIB) == expected, f"from {start}"


@pytest.mark.parametrize(("order", "length"), [("random", BLOCK), ("ascending", 100)])
def test_a_full_file_system_refuses_writes_and_loses_nothing(
    daemon: Daemon, order: str, length: int
) -> None:
    """Ascending, because the kernel then reads ahead and works on many pages at once."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    source = random.Random(seed)
    with raw.connected(daemon.directory / "nbd.sock", structured=True) as client:
        places = [*range(0, SIZE, BLOCK)]
        if order == "random":
            source.shuffle(places)
        taken = _fill(client, source, places, length)
        assert len(taken) > 1000
        _assert_whole(client, taken)
        holes = source.sample([*set(range(0, SIZE, BLOCK)) - set(taken)], 100)
        for offset in holes:
            _refuse(client, offset)
        for offset in source.sample([*taken], 200):
            taken[offset] = source.randbytes(length)
            flags = source.choice((0, raw.FUA))
            assert client.write(offset, taken[offset], flags=flags) == 0, "it has its space"
        assert client.ask(raw.FLUSH).error == 0
        occupied = _occupied(daemon)
        _assert_whole(client, taken)
        assert _occupied(daemon) <= occupied, "reading a hole allocated"

        assert client.ask(raw.TRIM, 0, SIZE // 2).error == 0
        kept = {offset: content for offset, content in taken.items() if offset >= SIZE // 2}
        _assert_whole(client, kept)
        assert _occupied(daemon) < occupied * 3 // 4
        for offset in holes:
            kept[offset] = source.randbytes(length)
            assert client.write(offset, kept[offset], flags=raw.FUA) == 0, "there is room again"
        _assert_whole(client, kept)


def _refuse(client: raw.Client, offset: int) -> None:
    """Whatever needs space finds none; a last page somewhere may still be had."""
    assert client.write(offset, b"N" * MIB) == errno.ENOSPC
    zeroes = client.ask(raw.WRITE_ZEROES, offset, MIB, flags=raw.NO_HOLE)
    assert zeroes.error == errno.ENOSPC
