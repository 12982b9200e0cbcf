"""Changes to a namespace while clients have its file open and map the media.

It grows, leaves, is switched, and its `dax` changes, all live. What a client has mapped stays
coherent with all others, or the change is refused: a representation that keeps copies of the media
cannot be had together with a mapping of them.
"""

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmblk import PmblkError
from tests.e2e.fuse_files import client, counters_of, opened, refused
from tests.e2e.mapping_client import Client, client_of
from tests.harness.daemon import Daemon, running
from tests.harness.file_systems import guarded, run
from tests.harness.programs import assert_no_complaints, wait_for

pytestmark = pytest.mark.e2e

PAGE = 4096
MIB = 1 << 20
SIZE = 8 * MIB
HANG_SECONDS = 90
OTHER = """
[[namespace]]
name = "other"
path = "{dir}/other.img"
size = "1MiB"
"""
DATA = """
[[namespace]]
name = "data"
path = "{dir}/data.img"
size = SIZE
dax = "DAX"
"""
FRONT_ENDS = """
[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
engine = "ENGINE"
"""


def config(dax: str = "auto", *, size: int = SIZE, engine: str = "kernel") -> str:
    return (
        OTHER
        + DATA.replace("SIZE", str(size)).replace("DAX", dax)
        + FRONT_ENDS.replace("ENGINE", engine)
    )


@contextlib.contextmanager
def served(dax: str = "auto", *, engine: str = "kernel") -> Iterator[tuple[Daemon, Path]]:
    with (
        running(config(dax, engine=engine)) as daemon,
        guarded(daemon, seconds=HANG_SECONDS),
    ):
        yield daemon, daemon.directory / "mnt" / "data"


def way(daemon: Daemon, name: str = "data") -> str:
    served = daemon.report(name).fuse
    assert served is not None
    return served.dax


def assert_coherent(mapper: Client, daemon: Daemon, offset: int) -> None:
    """What is stored on one side is loaded on the other, both ways."""
    here, there = os.urandom(100), os.urandom(100)
    with client(daemon, "data") as nbd:
        mapper.store(offset, here)
        assert bytes(nbd.pread(100, offset)) == here
        nbd.pwrite(there, offset)
        assert mapper.load(offset, 100) == there


# ---- it grows


@pytest.mark.parametrize(
    ("engine", "dax"),
    [("pyfuse3", "off"), ("kernel", "off"), ("kernel", "auto"), ("kernel", "fast")],
)
def test_a_file_that_grows_is_larger_at_once_to_those_who_have_it_open(
    engine: str, dax: str
) -> None:
    """To fstat and lseek both, though the kernel may keep a size for a second."""
    with served(dax, engine=engine) as (daemon, file), client_of(file) as one:
        for step in range(1, 4):
            assert (one.size(), one.end()) == (step * SIZE, step * SIZE)
            report = daemon.reload(config(dax, size=(step + 1) * SIZE, engine=engine))
            assert report.grown == ["data"]
            assert one.end() == (step + 1) * SIZE
            assert one.size() == (step + 1) * SIZE
            assert one.read((step + 1) * SIZE - 10, 100) == bytes(10)
            assert one.write((step + 1) * SIZE - 4, b"last") == 4
        assert_no_complaints(daemon)


@pytest.mark.parametrize("dax", ["auto", "fast"])
def test_the_part_by_which_a_file_grew_can_be_mapped_and_the_old_mapping_lives_on(
    dax: str,
) -> None:
    with served(dax) as (daemon, file), client_of(file) as old, client_of(file) as new:
        old.map(SIZE)
        old.store(0, b"before")
        daemon.reload(config(dax, size=2 * SIZE))
        assert old.load(0, 6) == b"before"
        assert_coherent(old, daemon, SIZE - PAGE)
        for mapper in (new, old):
            mapper.map(2 * SIZE)
            assert_coherent(mapper, daemon, 2 * SIZE - PAGE)
        assert_no_complaints(daemon)


def test_what_was_written_past_the_end_is_no_part_of_what_the_file_grows_by() -> None:
    with served("fast") as (daemon, file), client_of(file) as one:
        one.write(SIZE + PAGE, b"not yours")
        daemon.reload(config("fast", size=2 * SIZE))
        assert one.read(SIZE + PAGE, 9) == bytes(9)
        with client(daemon, "data") as nbd:
            assert bytes(nbd.pread(SIZE, SIZE)) == bytes(SIZE)
        assert "wrote past the end" in daemon.log


# ---- it leaves


@pytest.mark.parametrize("dax", ["auto", "fast"])
def test_a_namespace_that_leaves_serves_its_mappers_to_the_end(dax: str) -> None:
    with served(dax) as (daemon, file):
        with client_of(file) as one, opened(file) as fd:
            one.map(SIZE)
            report = daemon.reload((OTHER + FRONT_ENDS).replace("ENGINE", "kernel"))
            assert report.draining == ["data"]
            with refused(errno.ENOENT):
                file.stat()
            one.store(0, b"to the end")
            assert one.read(0, 10) == b"to the end"
            one.fsync()
            os.pwrite(fd, b"by a descriptor", PAGE)
            assert one.load(PAGE, 15) == b"by a descriptor"
            left = daemon.report("data")
            assert (left.users, left.draining) == (2, True)
        wait_for(lambda: [each["name"] for each in daemon.list()] == ["other"])
        assert (daemon.directory / "data.img").read_bytes()[:10] == b"to the end"
        assert_no_complaints(daemon)


def test_a_mapping_outlives_the_namespace_and_the_daemon_does_not_mind() -> None:
    """Its last open is closed, so the namespace is; the mapping is the mapper's alone now."""
    with served() as (daemon, file), client_of(file) as one:
        one.map(SIZE)
        one.close()
        daemon.reload((OTHER + FRONT_ENDS).replace("ENGINE", "kernel"))
        wait_for(lambda: [each["name"] for each in daemon.list()] == ["other"])
        one.store(0, b"still here")
        one.msync()
        assert (daemon.directory / "data.img").read_bytes()[:10] == b"still here"
        report = daemon.reload(config())
        assert report.added == ["data"]
        assert_coherent(one, daemon, PAGE)
        assert_no_complaints(daemon)


# ---- it is switched


@pytest.mark.parametrize("dax", ["auto", "fast"])
def test_no_copies_are_kept_of_media_that_a_client_has_open_or_mapped(dax: str) -> None:
    with served(dax) as (daemon, file):
        with client_of(file) as one, client_of(file) as other:
            with pytest.raises(PmblkError, match="2 open files may map them"):
                daemon.switch("data", "page-cache")
            one.map(SIZE)
            one.close()
            other.close()
            wait_for(lambda: users(daemon) == 0)
            with pytest.raises(PmblkError, match=f"process {one.pid} maps them"):
                daemon.switch("data", "page-cache")
            assert_coherent(one, daemon, PAGE)
            assert way(daemon) == ("dax" if dax == "auto" else dax)
            one.unmap()
            daemon.switch("data", "page-cache")
            assert way(daemon) == "off"
        with opened(file) as fd, client(daemon, "data") as nbd:
            os.pwrite(fd, b"a copy", 0)
            assert bytes(nbd.pread(6, 0)) == b"a copy"
        assert_no_complaints(daemon)


def users(daemon: Daemon) -> int:
    return daemon.report("data").users


def test_a_reload_to_a_kind_that_keeps_copies_is_refused_too_and_done_later() -> None:
    text = config() + "\n"
    cached = text.replace('dax = "auto"', 'dax = "auto"\nrepresentation = "page-cache"')
    with served() as (daemon, file):
        with client_of(file) as one:
            (refusal,) = daemon.reload(cached).refused
            assert refusal.key == "namespace.data.representation"
            assert "may map them" in refusal.reason
            one.map(SIZE)
            assert_coherent(one, daemon, 0)
        wait_for(lambda: users(daemon) == 0)
        assert [one.name for one in daemon.reload().switched] == ["data"]


@pytest.mark.parametrize("dax", ["auto", "fast"])
def test_a_mapping_stays_coherent_while_all_other_kinds_take_over(dax: str) -> None:
    kinds = ("struct-page", "transient-page", "pfn", "extent")
    with served(dax) as (daemon, file), client_of(file) as one:
        one.map(SIZE)
        for turn in range(3):
            for number, kind in enumerate(kinds):
                place = (turn * len(kinds) + number) * 3 * PAGE
                one.store(place, kind.encode())
                daemon.switch("data", kind)
                assert one.load(place, len(kind)) == kind.encode()
                assert_coherent(one, daemon, place + PAGE)
        assert_no_complaints(daemon)


# ---- its way changes


def test_another_dax_is_for_the_next_opens() -> None:
    """And for those only once the file is open no more: all opens of a file go one way."""
    with served("off") as (daemon, file):
        for dax, shown in (("auto", "dax"), ("fast", "fast"), ("off", "off"), ("fast", "fast")):
            before = way(daemon)
            with client_of(file) as one:
                assert daemon.reload(config(dax)).changed == ["namespace.data.dax"]
                assert way(daemon) == before
                with client_of(file) as other:
                    one.write(0, b"the same way")
                    assert other.read(0, 12) == b"the same way"
                    for each in (one, other):
                        assert is_mapped(each, daemon) == (before != "off")
            wait_for(lambda: users(daemon) == 0)
            assert way(daemon) == shown
            with client_of(file) as next_one:
                assert is_mapped(next_one, daemon) == (shown != "off")
                assert is_counted(next_one, daemon) == (shown != "fast")
            wait_for(lambda: users(daemon) == 0)
        assert_no_complaints(daemon)


def is_mapped(one: Client, daemon: Daemon) -> bool:
    """Whether a mapping of it is one of the media."""
    pattern = os.urandom(16)
    with client(daemon, "data") as nbd:
        one.map(SIZE)
        one.store(3 * PAGE, pattern)
        seen = bytes(nbd.pread(16, 3 * PAGE)) == pattern
        one.unmap()
    return seen


def is_counted(one: Client, daemon: Daemon) -> bool:
    before = counters_of(daemon, "data")["writes"]
    one.write(0, b"counted?")
    return counters_of(daemon, "data")["writes"] > before


# ---- the daemon or its mount ends


@pytest.mark.parametrize("dax", ["auto", "fast"])
def test_a_mapping_outlives_a_killed_daemon_and_meets_the_next_one(dax: str) -> None:
    """Past the daemon so do read and write. An fsync does not: it says that nobody is there.

    No kind that keeps copies can be had before he is gone.
    """
    with served(dax) as (daemon, file), client_of(file) as one:
        one.map(SIZE)
        daemon.kill()
        one.store(0, b"nobody is there")
        with refused(errno.ENOTCONN):
            one.fsync()
        if dax == "fast":
            one.write(PAGE, b"nor here")
            assert one.read(PAGE, 8) == b"nor here"
        else:
            with refused(errno.ENOTCONN):
                one.write(PAGE, b"nor here")
        daemon.start()
        assert_coherent(one, daemon, 2 * PAGE)
        with opened(file) as fd:
            assert os.pread(fd, 15, 0) == b"nobody is there"
        wait_for(lambda: users(daemon) == 0)
        # Its mount is gone, so nothing says what it is that he maps; that he does is known.
        with pytest.raises(PmblkError, match="open or mapped"):
            daemon.switch("data", "page-cache")
        one.unmap()
        with contextlib.suppress(OSError):
            one.close()
        daemon.switch("data", "page-cache")


def test_without_dax_a_mapping_ends_with_the_daemon() -> None:
    """What was not synced is lost, and msync says so. The next page is a bus error."""
    with served("off") as (daemon, file), client_of(file) as one:
        one.map(SIZE)
        one.store(0, b"kept")
        one.msync()
        one.store(PAGE, b"lost")
        daemon.kill()
        with refused(errno.EIO, errno.ENOTCONN):
            one.msync()
        with pytest.raises(AssertionError, match="the client has ended"):
            one.load(4 * MIB, 1)
        assert one.is_killed_by(signal.SIGBUS)
        daemon.start()
        with opened(file) as fd:
            assert os.pread(fd, 2 * PAGE, 0) == b"kept".ljust(2 * PAGE, b"\0")


def test_opens_of_a_mount_that_was_ended_from_outside_keep_nobody_out() -> None:
    """Aborted by the kernel's own control files: no release will come. A mapping lives on."""
    with served() as (daemon, file), client_of(file) as one:
        one.map(SIZE)
        connection = os.minor(file.stat().st_dev)
        with fuse_control() as control:
            (control / str(connection) / "abort").write_text("1")
        wait_for(lambda: "no files any more" in daemon.log)
        with pytest.raises(PmblkError, match=f"process {one.pid} maps them"):
            daemon.switch("data", "page-cache")
        assert_coherent(one, daemon, 0)
        one.unmap()
        with pytest.raises(PmblkError, match="others have its file open"):
            daemon.switch("data", "page-cache")  # he could still map it
        with contextlib.suppress(OSError):
            one.close()  # it closes, and says that nobody is there any more
        daemon.switch("data", "page-cache")


@contextlib.contextmanager
def fuse_control() -> Iterator[Path]:
    """Where the kernel lists its connections; mounted if it is not."""
    control = Path("/sys/fs/fuse/connections")
    ours = not any(control.iterdir())
    if ours:
        run("mount", "-t", "fusectl", "pmblk-test", str(control))
    try:
        yield control
    finally:
        if ours:
            run("umount", str(control))
