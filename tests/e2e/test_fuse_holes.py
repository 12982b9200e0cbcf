"""Holes in the files of the mount: who sees them, who makes them, who fills them.

The kernel engine alone delivers lseek(2) and fallocate(2); libfuse's files are all data.
"""

import contextlib
import errno
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.fuse_files import opened, refused
from tests.harness.daemon import Daemon, running
from tests.harness.file_systems import guarded
from tests.harness.programs import assert_no_complaints, program

pytestmark = pytest.mark.e2e

PAGE = 4096
MIB = 1 << 20
SIZE = 16 * MIB
HANG_SECONDS = 90
NAMES = ("off-page-cache", "off-extent", "auto-extent", "auto-pfn", "fast-struct-page")
NAMESPACE = """
[[namespace]]
name = "{name}"
path = "{dir}/{name}.img"
size = 16777216
dax = "{dax}"
representation = "{kind}"
"""
FRONT_ENDS = """
[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
engine = "{engine}"
punch = {punch}
"""
Extents = list[tuple[int, int, bool]]  # offset, length, whether it is a hole


@contextlib.contextmanager
def served(*names: str, engine: str = "kernel", punch: bool = True) -> Iterator[Daemon]:
    config = ""
    for name in names:
        dax, _, kind = name.partition("-")
        one = NAMESPACE.replace("{name}", name).replace("{dax}", dax)
        config += one.replace("{kind}", kind)
    config += FRONT_ENDS.replace("{engine}", engine).replace("{punch}", str(punch).lower())
    with running(config) as daemon, guarded(daemon, seconds=HANG_SECONDS):
        yield daemon
        assert_no_complaints(daemon)


@pytest.fixture(scope="module", params=[True, False], ids=["punch", "keep"])
def punch(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def daemon(punch: bool) -> Iterator[Daemon]:
    with served(*NAMES, punch=punch) as one:
        yield one


def file_of(daemon: Daemon, name: str) -> Path:
    return daemon.directory / "mnt" / name


def allocated(daemon: Daemon, name: str) -> int:
    return daemon.report(name).allocated_bytes


def by_lseek(file: Path) -> Extents:
    """The file from its beginning to its end, as SEEK_DATA and SEEK_HOLE tell it."""
    found: Extents = []
    with opened(file, os.O_RDONLY) as fd:
        position, size = 0, os.fstat(fd).st_size
        while position < size:
            data = _data_or_end(fd, position, size)
            if data > position:
                found.append((position, data - position, True))
            if data < size:
                position = os.lseek(fd, data, os.SEEK_HOLE)
                found.append((data, position - data, False))
            else:
                position = size
    return found


def _data_or_end(fd: int, position: int, size: int) -> int:
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size


def by_nbd(daemon: Daemon, name: str) -> Extents:
    extents = json.loads(program("nbdinfo", "--map", "--json", daemon.uri(name)))
    return [(one["offset"], one["length"], one["type"] != 0) for one in extents]


# ---- where they are


@pytest.mark.parametrize("name", NAMES)
def test_lseek_and_block_status_agree_about_every_hole(daemon: Daemon, name: str) -> None:
    """Pages are written here and there, through the mount; the rest of the file has none."""
    file = file_of(daemon, name)
    chosen = random.Random(name)
    pages = sorted(chosen.sample(range(SIZE // PAGE), 40))
    with opened(file) as fd:
        os.posix_fallocate(fd, 0, PAGE)
        for page in pages:
            os.pwrite(fd, b"d" * PAGE, page * PAGE)
        found = by_lseek(file)
        assert found == by_nbd(daemon, name)
        data = [(at, length) for at, length, hole in found if not hole]
        for page in pages:
            assert any(at <= page * PAGE < at + length for at, length in data), page
        assert sum(length for at, length, hole in found) == SIZE
        assert all(one[2] != other[2] for one, other in itertools.pairwise(found))
        with refused(errno.ENXIO):
            os.lseek(fd, SIZE, os.SEEK_DATA)
        with refused(errno.ENXIO):
            os.lseek(fd, SIZE, os.SEEK_HOLE)


def test_to_libfuse_a_file_is_all_data() -> None:
    with served("off-extent", engine="pyfuse3") as daemon:
        assert by_lseek(file_of(daemon, "off-extent")) == [(0, SIZE, False)]
        with pytest.raises(AssertionError, match="not supported"):
            program("fallocate", f"--length={PAGE}", str(file_of(daemon, "off-extent")))
        assert by_nbd(daemon, "off-extent") == [(0, SIZE, True)]


# ---- programs that keep them


Copy = Callable[[Path, Path], None]


def _cp(file: Path, target: Path) -> None:
    program("cp", "--sparse=auto", str(file), str(target))


def _dd(file: Path, target: Path) -> None:
    program("dd", f"if={file}", f"of={target}", "bs=4k", "conv=sparse", "status=none")


def _qemu_img(file: Path, target: Path) -> None:
    program("qemu-img", "convert", "-f", "raw", "-O", "raw", str(file), str(target))


@pytest.mark.parametrize("name", ["off-page-cache", "auto-extent", "fast-struct-page"])
@pytest.mark.parametrize("copy", [_cp, _dd, _qemu_img])
def test_a_copy_of_a_file_keeps_its_holes(daemon: Daemon, name: str, copy: Copy) -> None:
    file, target = file_of(daemon, name), daemon.directory / "copy"
    with opened(file) as fd:
        os.pwrite(fd, os.urandom(MIB), 3 * MIB)
    copy(file, target)
    content = file.read_bytes()
    assert target.read_bytes() == content
    # What is zeroed and kept is data here, and may be a hole there.
    assert target.stat().st_blocks * 512 <= allocated(daemon, name) < SIZE // 2
    target.unlink()


@pytest.mark.parametrize("name", ["off-page-cache", "auto-pfn", "fast-struct-page"])
def test_a_copy_to_a_file_keeps_the_holes_of_its_source(
    daemon: Daemon, name: str, punch: bool
) -> None:
    source, file = daemon.directory / "source", file_of(daemon, name)
    with source.open("wb") as stream:
        stream.truncate(SIZE)
        stream.seek(5 * MIB)
        stream.write(os.urandom(MIB))
    program("fallocate", "--punch-hole", "--offset=0", f"--length={SIZE}", str(file))
    before = allocated(daemon, name)
    program(*("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw"), str(source), str(file))
    assert file.read_bytes() == source.read_bytes()
    assert allocated(daemon, name) <= before + MIB
    if punch:
        assert allocated(daemon, name) == MIB
    source.unlink()


# ---- fallocate(1)


@pytest.mark.parametrize("name", NAMES)
def test_fallocate_gives_memory_punches_and_zeroes(daemon: Daemon, name: str, punch: bool) -> None:
    """Each at places and of lengths that are no pages, and seen over NBD as well."""
    file, content = file_of(daemon, name), bytearray(os.urandom(8 * MIB))
    with opened(file) as fd:
        assert os.pwrite(fd, content, 0) == len(content)

    def fallocate(mode: str, offset: int, length: int) -> int:
        before = allocated(daemon, name)
        program("fallocate", mode, f"--offset={offset}", f"--length={length}", str(file))
        return allocated(daemon, name) - before

    program("fallocate", "--punch-hole", f"--offset={8 * MIB}", f"--length={8 * MIB}", str(file))
    assert fallocate("--keep-size", 0, 8 * MIB) == 0, "it has its memory, and keeps its content"
    freed = fallocate("--punch-hole", MIB + 100, MIB)
    assert freed == (-(MIB - PAGE) if punch else 0), "whole pages only"
    content[MIB + 100 : 2 * MIB + 100] = bytes(MIB)
    assert fallocate("--zero-range", 3 * MIB + 100, MIB) == 0
    content[3 * MIB + 100 : 4 * MIB + 100] = bytes(MIB)
    if punch:
        assert fallocate("--keep-size", 12 * MIB, MIB) == MIB
        assert fallocate("--zero-range", 13 * MIB, MIB) == MIB
        assert fallocate("--punch-hole", 12 * MIB, 4 * MIB) == -2 * MIB
    assert file.read_bytes() == content + bytes(8 * MIB)
    over_nbd = daemon.directory / "over-nbd"
    program("nbdcopy", daemon.uri(name), str(over_nbd))
    assert over_nbd.read_bytes() == content + bytes(8 * MIB)


@pytest.mark.parametrize("name", NAMES)
def test_fallocate_that_would_change_the_size_or_the_order_is_refused(
    daemon: Daemon, name: str
) -> None:
    file = file_of(daemon, name)
    for mode, status in (
        (("--length", str(SIZE + PAGE)), "No space left on device"),
        (("--keep-size", "--length", str(SIZE + PAGE)), "No space left on device"),
        (("--collapse-range", "--length", str(PAGE)), "not supported"),
        (("--insert-range", "--offset", "0", "--length", str(PAGE)), "not supported"),
        (("--zero-range", "--length", str(SIZE + PAGE)), "No space left on device"),
    ):
        with pytest.raises(AssertionError, match=status):
            program("fallocate", *mode, str(file))
    # A hole may reach past the end, where there is nothing.
    program("fallocate", "--punch-hole", f"--offset={SIZE - PAGE}", f"--length={MIB}", str(file))
    assert file.stat().st_size == SIZE
    assert (daemon.directory / f"{name}.img").stat().st_size == SIZE
