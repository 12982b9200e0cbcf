"""Mappings of the mount's files: what a store reaches, when, and what the daemon hears of it.

With dax = "auto" and "fast" a mapping is one of the media; with "off" it is a page cache that
msync(2) writes back. Clients are processes of their own, told what to do over a pipe: each step is
done before the next one begins, so "at once" is what is shown here, and nothing has to be awaited.
"""

import contextlib
import errno
import itertools
import json
import mmap
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from nbd import Error as NbdError

from pmblk.media.durability import MAP_SHARED_VALIDATE, MAP_SYNC
from pmblkd.compare import fio
from tests.e2e.fuse_files import client, counters_of, opened, refused
from tests.e2e.mapping_client import Client, client_of
from tests.harness.daemon import Daemon, running, scratch
from tests.harness.file_systems import guarded, mounted, run
from tests.harness.programs import assert_no_complaints, program

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SIZE = 8 * MIB
HANG_SECONDS = 120
ROUNDS = 40
MAPS = ("auto-extent", "auto-struct-page", "fast-transient-page", "fast-pfn")
OFF = ("off-extent", "off-page-cache")
NAMESPACE = """
[[namespace]]
name = "{way}-{kind}"
path = "{dir}/{way}-{kind}.img"
size = 8388608
dax = "{way}"
representation = "{kind}"
"""
FRONT_ENDS = """
[nbd]
listen = ["unix:{dir}/nbd.sock"]

[fuse]
mountpoint = "{dir}/mnt"
engine = "kernel"
"""
RESERVED = """
[[namespace]]
name = "reserved"
path = "{dir}/reserved.img"
size = 8388608
reserve = true
"""


def namespace(name: str) -> str:
    way, _, kind = name.partition("-")
    return NAMESPACE.replace("{way}", way).replace("{kind}", kind)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    names = (*MAPS, *OFF, "auto-page-cache")
    config = "".join(namespace(name) for name in names) + RESERVED + FRONT_ENDS
    with running(config) as one, guarded(one, seconds=HANG_SECONDS):
        yield one
        assert_no_complaints(one)


def file_of(daemon: Daemon, name: str) -> Path:
    return daemon.directory / "mnt" / name


@contextlib.contextmanager
def mapping(daemon: Daemon, name: str) -> Iterator[Client]:
    """A client that has the whole file mapped."""
    with client_of(file_of(daemon, name)) as one:
        yield one.map(SIZE)


# ---- who sees what


Store = Callable[[int, bytes], object]
Load = Callable[[int, int], bytes]


@contextlib.contextmanager
def observers(daemon: Daemon, name: str) -> Iterator[dict[str, tuple[Store, Load]]]:
    """Everybody who can store to a namespace and load from it, by what they are."""
    with (
        mapping(daemon, name) as one,
        mapping(daemon, name) as other,
        client_of(file_of(daemon, name)) as reader,
        client(daemon, name) as nbd,
    ):
        yield {
            "a mapping": (one.store, one.load),
            "another mapping": (other.store, other.load),
            "read and write": (reader.write, reader.read),
            "NBD": (lambda at, data: nbd.pwrite(data, at), lambda at, n: bytes(nbd.pread(n, at))),
        }


@pytest.mark.parametrize("name", MAPS)
def test_whatever_one_stores_all_others_see_at_once(daemon: Daemon, name: str) -> None:
    """Every pair of them, both ways, at places and of lengths that know no pages."""
    chosen = random.Random(name)
    with observers(daemon, name) as everybody:
        for _ in range(ROUNDS):
            for writer, reader in itertools.permutations(everybody, 2):
                offset = chosen.randrange(SIZE - 10_000)
                data = chosen.randbytes(chosen.randrange(1, 10_000))
                everybody[writer][0](offset, data)
                assert everybody[reader][1](offset, len(data)) == data, (writer, reader, offset)


@pytest.mark.parametrize("name", OFF)
def test_without_dax_nbd_sees_a_store_after_msync_and_other_mappings_at_once(
    daemon: Daemon, name: str
) -> None:
    """And so does read(2). It comes last: the kernel writes back what it is asked for."""
    with (
        mapping(daemon, name) as one,
        mapping(daemon, name) as other,
        client_of(file_of(daemon, name)) as reader,
        client(daemon, name) as nbd,
    ):
        for offset in range(0, MIB, 123 * 1024):
            before = bytes(nbd.pread(5000, offset))
            after, later = os.urandom(5000), os.urandom(5000)
            one.store(offset, after)
            assert other.load(offset, 5000) == after
            assert bytes(nbd.pread(5000, offset)) == before
            one.msync()
            assert bytes(nbd.pread(5000, offset)) == after
            other.store(offset, later)
            assert bytes(nbd.pread(5000, offset)) == after
            assert reader.read(offset, 5000) == one.load(offset, 5000) == later


@pytest.mark.parametrize("name", OFF)
def test_without_dax_read_and_write_of_all_clients_agree(daemon: Daemon, name: str) -> None:
    file = file_of(daemon, name)
    with client_of(file) as one, client_of(file) as other, client(daemon, name) as nbd:
        for offset in range(2 * MIB, 3 * MIB, 77 * 1024):
            here, there = os.urandom(5000), os.urandom(5000)
            one.write(offset, here)
            assert other.read(offset, 5000) == here
            nbd.pwrite(there, offset)
            assert one.read(offset, 5000) == other.read(offset, 5000) == there


@pytest.mark.parametrize("name", OFF)
def test_without_dax_whoever_opens_the_file_anew_maps_what_was_written_since(
    daemon: Daemon, name: str
) -> None:
    """By NBD, of which the kernel hears nothing; what FUSE clients write it knows at once."""
    with (
        mapping(daemon, name) as one,
        client_of(file_of(daemon, name)) as writer,
        client(daemon, name) as nbd,
    ):
        for turn in range(20):
            offset = 5 * MIB + turn * 5000
            one.load(offset, 5000)  # it is in the page cache now
            there, here = os.urandom(5000), os.urandom(5000)
            nbd.pwrite(there, offset)
            with mapping(daemon, name) as other:
                assert other.load(offset, 5000) == there
            writer.write(offset, here)
            assert one.load(offset, 5000) == here


# ---- a mapping's life


@pytest.mark.parametrize("name", ["auto-extent", "fast-pfn"])
def test_a_mapping_outlives_its_descriptor(daemon: Daemon, name: str) -> None:
    with mapping(daemon, name) as one, client(daemon, name) as nbd:
        one.close()
        one.store(5 * MIB, b"past close")
        assert bytes(nbd.pread(10, 5 * MIB)) == b"past close"
        nbd.pwrite(b"from there", 5 * MIB)
        assert one.load(5 * MIB, 10) == b"from there"


@pytest.mark.parametrize("name", ["auto-struct-page", "fast-transient-page"])
def test_a_store_to_a_hole_gives_it_memory(daemon: Daemon, name: str) -> None:
    """A hole to NBD before it, data after it; and a hole again, by TRIM, under the mapping."""
    place, page = 6 * MIB, 4096
    with mapping(daemon, name) as one, client(daemon, name) as nbd:
        nbd.trim(MIB, place)
        assert one.load(place, page) == bytes(page)
        one.store(place + page, b"stored")
        assert bytes(nbd.pread(3 * page, place)) == bytes(page) + b"stored" + bytes(2 * page - 6)
        assert is_data(daemon, name, place + page)
        nbd.trim(MIB, place)
        assert not is_data(daemon, name, place + page)
        assert one.load(place + page, 6) == bytes(6)
        one.store(place + page, b"again!")
        assert bytes(nbd.pread(6, place + page)) == b"again!"


def is_data(daemon: Daemon, name: str, offset: int) -> bool:
    """By NBD's block status."""
    extents = json.loads(program("nbdinfo", "--map", "--json", daemon.uri(name)))
    (found,) = (
        extent
        for extent in extents
        if extent["offset"] <= offset < extent["offset"] + extent["length"]
    )
    return int(found["type"]) == 0


@pytest.mark.parametrize("name", [*MAPS, *OFF])
def test_nobody_gets_a_synchronous_mapping(daemon: Daemon, name: str) -> None:
    """MAP_SYNC is for the file system itself; FUSE does not pass it on."""
    with opened(file_of(daemon, name)) as fd, refused(errno.EOPNOTSUPP):
        mmap.mmap(fd, SIZE, flags=MAP_SHARED_VALIDATE | MAP_SYNC)


# ---- what the daemon hears of it


def did(daemon: Daemon, name: str, before: Mapping[str, int]) -> dict[str, int]:
    """What has been counted since, without zeroes and without what I/O would take as PRPs."""
    after = counters_of(daemon, name)
    return {
        key: count - before[key]
        for key, count in after.items()
        if count != before[key] and not key.startswith("prp")
    }


@pytest.mark.parametrize("name", ["auto-extent", "fast-transient-page", "off-extent"])
def test_the_daemon_counts_what_it_serves(daemon: Daemon, name: str) -> None:
    """Never a load or a store of the media; read and write unless they go past it."""
    counted = {"reads": 1, "read_bytes": 100, "writes": 1, "write_bytes": 200}
    with client_of(file_of(daemon, name)) as one:
        one.map(SIZE)
        before = counters_of(daemon, name)
        one.write(0, bytes(200))
        one.read(0, 100)
        assert did(daemon, name, before) == ({} if name.startswith("fast") else counted)
        before = counters_of(daemon, name)
        one.store(3 * MIB, b"x" * 5000)
        one.load(4 * MIB, 5000)
        if name.startswith("off"):  # two pages to be changed, two to be looked at
            assert counters_of(daemon, name)["reads"] > before["reads"]
        else:
            assert did(daemon, name, before) == {}
        before = counters_of(daemon, name)
        one.fsync()
        counted = did(daemon, name, before)
        assert counted.pop("flushes") == 1
        if name.startswith("off"):
            assert counted.pop("write_bytes") == 2 * 4096
            assert counted.pop("writes") in (1, 2)
        assert counted == {}


def test_poison_is_an_error_to_read_and_not_to_a_load(daemon: Daemon) -> None:
    name, page = "auto-struct-page", 4096
    with mapping(daemon, name) as one:
        one.store(0, b"good" + bytes(2 * page))
        daemon.poison(name, page, 1)
        with refused(errno.EIO):
            one.read(page, page)
        with refused(errno.EIO):
            one.write(page, b"a part of it")
        assert one.read(0, page)[:4] == b"good"
        assert one.load(page, 10) == bytes(10), "the media themselves are well"
        assert one.write(page, b"n" * page) == page
        assert one.read(page, page) == b"n" * page


def test_poison_is_nothing_to_a_client_past_the_daemon(daemon: Daemon) -> None:
    with client_of(file_of(daemon, "fast-pfn")) as one, client(daemon, "fast-pfn") as nbd:
        one.write(0, b"well")
        daemon.poison("fast-pfn", 0, 1)
        assert one.read(0, 4) == b"well"
        with pytest.raises(NbdError, match="Input/output error"):
            nbd.pread(4, 0)
        nbd.pwrite(bytes(4096), 0)


def test_without_dax_a_load_of_poison_is_a_bus_error(daemon: Daemon) -> None:
    daemon.poison("off-extent", 7 * MIB, 4096)
    with mapping(daemon, "off-extent") as one:
        with pytest.raises(AssertionError, match="the client has ended"):
            one.load(7 * MIB, 10)
        assert one.is_killed_by(signal.SIGBUS)
    with client(daemon, "off-extent") as nbd:
        nbd.pwrite(bytes(4096), 7 * MIB)
    with mapping(daemon, "off-extent") as one:
        assert one.load(7 * MIB, 10) == bytes(10)


REASONS = {
    "auto-extent": ("dax", ""),
    "fast-pfn": ("fast", ""),
    "off-extent": ("off", 'dax = "off"'),
    "auto-page-cache": ("off", "page-cache keeps copies of the media"),
    "reserved": ("off", "the end of its file is a page table, which a mapping would show"),
}


def test_the_list_says_how_each_file_is_mapped_and_why_not_otherwise(daemon: Daemon) -> None:
    listed = json.loads(program(*daemon.command("list", "--json")))
    said = {one["name"]: (one["fuse"]["dax"], one["fuse"]["dax_reason"]) for one in listed}
    assert said.items() >= REASONS.items()


# ---- a sync


@contextlib.contextmanager
def on_ext4() -> Iterator[tuple[Daemon, Path]]:
    """A daemon with its media on ext4, and the image below that, where synced bytes are."""
    with scratch() as directory:
        image = directory / "disk.img"
        image.write_bytes(b"")
        os.truncate(image, 128 * MIB)
        run("mkfs.ext4", "-q", "-F", "-b", "4096", str(image))
        device = Path(run("losetup", "--find", "--show", str(image)).strip())
        try:
            with mounted(device, directory / "disk"):
                names = ("auto-extent", "fast-extent", "off-extent")
                config = "".join(namespace(name) for name in names)
                config = config.replace("{dir}/", "{dir}/disk/") + FRONT_ENDS
                daemon = Daemon(directory, config.replace("{dir}", str(directory))).start()
                try:
                    with guarded(daemon, seconds=HANG_SECONDS):
                        yield daemon, image
                    assert_no_complaints(daemon)
                finally:
                    if daemon.running:
                        daemon.stop()
        finally:
            run("losetup", "--detach", str(device))


def holds(image: Path, pattern: bytes) -> bool:
    with opened(image, os.O_RDONLY) as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as content:
        return content.find(pattern) >= 0


def test_a_sync_by_a_client_syncs_what_the_media_lie_on() -> None:
    """fsync(2) asks the daemon, which syncs. msync(2) of the media does not need to ask it."""
    with on_ext4() as (daemon, image):
        for way, hears_msync in (("auto", 0), ("fast", 0), ("off", 1)):
            name = f"{way}-extent"
            assert daemon.report(name).durability == "file"
            with mapping(daemon, name) as one:
                for sync, flushes in ((one.fsync, 1), (one.msync, hears_msync)):
                    stored, written = os.urandom(4096), os.urandom(4096)
                    before = counters_of(daemon, name)["flushes"]
                    one.store(MIB + 4096, stored)
                    one.write(0, written)
                    sync()
                    assert counters_of(daemon, name)["flushes"] == before + flushes
                    assert holds(image, stored), (name, sync)
                    assert holds(image, written), (name, sync)


# ---- fio


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("auto-extent", "mmap"),
        ("fast-transient-page", "mmap"),
        ("off-page-cache", "mmap"),
        ("auto-struct-page", "libpmem"),
        ("fast-pfn", "libpmem"),
    ],
)
def test_fio_verifies_what_it_stored_to_a_mapping(
    daemon: Daemon, name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMEM_IS_PMEM_FORCE", "1")  # libpmem asks for MAP_SYNC otherwise
    before = counters_of(daemon, name)
    result = fio.run(
        [
            *(f"--filename={file_of(daemon, name)}", f"--size={SIZE}", f"--ioengine={engine}"),
            *("--rw=randwrite", "--bs=4k", "--iodepth=1", "--verify=crc32c"),
            *("--verify_fatal=1", "--verify_state_save=0", "--direct=1"),
        ],
        seconds=60,
    )
    assert result.write.ios == result.read.ios == SIZE // 4096
    if not name.startswith("off"):
        counted = did(daemon, name, before)
        # fio's libpmem fills the file before it begins, with write(2).
        filled = SIZE if name.startswith("auto") and engine == "libpmem" else 0
        assert (counted.get("reads", 0), counted.get("write_bytes", 0)) == (0, filled)
