"""Clients that map the media, and who keeps copies of them: never both at once."""

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from pmblk import Namespace, PmblkError
from pmblk.media import Media
from pmblkd import mappers
from pmblkd.config import Dax
from pmblkd.fuse.dax import Way
from pmblkd.fuse.mappings import kept_out
from pmblkd.fuse.passthrough import Passthrough
from pmblkd.mappers import MappedAs, on_mount, processes_that_map
from pmblkd.registry import Served
from tests.unit.conftest import MakeNamespace, memory, registered
from tests.unit.fuse_kernel import BackingFiles

SIZE = 1 << 20
DEVICE, MINOR = 77, 0xFFFFF  # no mount of this machine is likely to have that one
MAP_THE_FILE = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapping = mmap.mmap(file.fileno(), 0)
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> BackingFiles:
    return BackingFiles(monkeypatch)


@pytest.fixture
def backings(kernel: BackingFiles) -> Passthrough:
    one = Passthrough()
    one.attach(DEVICE, minor=MINOR, refusal="")
    return one


@pytest.fixture
def serve(make_namespace: MakeNamespace) -> Callable[..., Served]:
    """A namespace in service, number 1; `dax` as the config has it."""

    def serve_one(dax: Dax = "auto", **options: Any) -> Served:
        (served,) = registered(make_namespace(**options))
        set_dax(served, dax)
        return served

    return serve_one


def set_dax(served: Served, dax: Dax) -> None:
    served.config = msgspec.structs.replace(served.config, dax=dax)


@contextmanager
def mapped(path: Path) -> Iterator[int]:
    """The process that maps the file meanwhile."""
    child = subprocess.Popen(
        [sys.executable, "-c", MAP_THE_FILE, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == b"mapped\n"
        yield child.pid
        child.stdin.close()
        assert child.wait(10) == 0


# ---- kept out while a representation keeps copies


async def test_a_switch_to_copies_is_refused_while_a_file_is_open_that_way(
    serve: Callable[..., Served], backings: Passthrough
) -> None:
    served = serve()
    backings.open(served)
    with pytest.raises(PmblkError, match="page-cache keeps copies of the media, and 1 open files"):
        async with kept_out(served, "page-cache"):
            raise AssertionError("let through")
    assert not served.dax_kept_out
    backings.close(served)
    async with kept_out(served, "page-cache"):
        assert served.dax_kept_out


async def test_an_open_that_goes_through_the_daemon_is_in_nobody_s_way(
    serve: Callable[..., Served], backings: Passthrough
) -> None:
    served = serve("off")
    backings.open(served)
    async with kept_out(served, "page-cache"):
        assert backings.open(served)[0] is Way.DAEMON


@pytest.mark.parametrize("kind", ["extent", "pfn", "struct-page", "transient-page"])
async def test_kinds_without_copies_keep_nobody_out(
    serve: Callable[..., Served], backings: Passthrough, kind: str
) -> None:
    served = serve()
    backings.open(served)
    with mapped(memory(served).media.path):
        async with kept_out(served, kind):
            assert backings.open(served)[0] is Way.DAX


async def test_opens_during_a_switch_go_through_the_daemon_and_later_ones_with_them(
    serve: Callable[..., Served], backings: Passthrough
) -> None:
    served = serve()
    async with kept_out(served, "page-cache"):
        assert backings.describe(served) == (
            Way.DAEMON,
            "it is being switched to a kind that keeps copies",
        )
        assert backings.open(served) == (Way.DAEMON, 0)
    assert backings.open(served) == (Way.DAEMON, 0)
    backings.close(served)
    backings.close(served)
    assert backings.open(served)[0] is Way.DAX, "the switch did not come about, so it may again"


async def test_two_switches_at_a_time_keep_clients_out_until_both_are_over(
    serve: Callable[..., Served], backings: Passthrough
) -> None:
    served = serve()
    async with kept_out(served, "page-cache"):
        async with kept_out(served, "page-cache"):
            pass
        assert backings.describe(served)[0] is Way.DAEMON
    assert backings.describe(served)[0] is Way.DAX


async def test_a_switch_is_refused_while_a_process_maps_the_file_and_not_after(
    serve: Callable[..., Served],
) -> None:
    """Whoever it is: a client of a daemon that was killed has never opened a file of this one."""
    served = serve()
    with (
        mapped(memory(served).media.path) as pid,
        pytest.raises(PmblkError, match=f"process {pid} maps them"),
    ):
        async with kept_out(served, "page-cache"):
            raise AssertionError("let through")
    async with kept_out(served, "page-cache"):
        assert served.dax_kept_out


async def test_the_file_is_known_though_its_name_is_gone_or_another_s(
    serve: Callable[..., Served],
) -> None:
    served = serve()
    path = memory(served).media.path
    with mapped(path) as pid:
        path.unlink()
        for _ in range(2):
            with pytest.raises(PmblkError, match=f"process {pid} maps them"):
                async with kept_out(served, "page-cache"):
                    raise AssertionError("let through")
            path.write_bytes(bytes(SIZE))
    with mapped(path):
        async with kept_out(served, "page-cache"):
            assert served.dax_kept_out


async def test_a_client_is_found_by_the_file_of_the_mount_that_it_maps(
    serve: Callable[..., Served], backings: Passthrough, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel shows the mount's device and inode, never the media that are mapped."""
    served = serve()
    assert served.mapped_as is None
    backings.open(served)
    backings.close(served)
    assert served.mapped_as == MappedAs(f"00:{MINOR:02x}", "2")
    wanted: list[Any] = []

    def find(_path: Path, _status: object, *, also: Any) -> list[int]:
        wanted.extend(also)
        return [4321]

    monkeypatch.setattr(mappers, "processes_that_map", find)
    with (
        memory(served).media.path.open("rb"),  # as the mapping has it
        pytest.raises(PmblkError, match="process 4321 maps them"),
    ):
        async with kept_out(served, "page-cache"):
            raise AssertionError("let through")
    assert wanted == [served.mapped_as]


async def test_a_client_whose_mapping_goes_through_the_daemon_is_in_nobody_s_way(
    serve: Callable[..., Served], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks like one that maps the media, but nobody has those open.

    Where that cannot be told, it is taken for one.
    """
    served = serve()
    other = directory / "other.img"
    other.write_bytes(bytes(SIZE))
    status = other.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    served.mapped_as = MappedAs(device, str(status.st_ino))
    with mapped(other) as pid:
        async with kept_out(served, "page-cache"):
            assert served.dax_kept_out
        monkeypatch.setattr(memory(served).media, "is_open_elsewhere", lambda: None)
        with pytest.raises(PmblkError, match=f"process {pid} maps them"):
            async with kept_out(served, "page-cache"):
                raise AssertionError("let through")


async def test_clients_stay_kept_out_when_the_search_is_cancelled(
    serve: Callable[..., Served],
) -> None:
    served = serve()
    with trio.CancelScope() as scope:
        scope.cancel()
        async with kept_out(served, "page-cache"):
            raise AssertionError("let through")
    assert scope.cancelled_caught
    assert not served.dax_kept_out


# ---- who maps a file, as proc(5) tells


def test_who_maps_a_file_is_found_by_every_name_of_it(directory: Path) -> None:
    path = directory / f"media-{os.getpid()}.img"  # nobody else maps one of that name
    path.write_bytes(bytes(SIZE))
    (directory / "link").symlink_to(path)
    other = directory / "other.img"
    other.write_bytes(bytes(SIZE))
    status = path.stat()
    with mapped(path) as pid:
        assert processes_that_map(path, status) == [pid]
        assert processes_that_map(directory / "link", status) == [pid]
        assert processes_that_map(other, other.stat()) == []
        same_file = MappedAs(f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", "")
        by_inode = msgspec.structs.replace(same_file, file=str(status.st_ino))
        by_name = msgspec.structs.replace(same_file, file=path.name)
        assert processes_that_map(other, other.stat(), also=[by_inode]) == [pid]
        assert processes_that_map(other, other.stat(), also=[by_name]) == [pid]
    assert processes_that_map(path, status) == []


def test_a_file_on_a_mount_has_a_device_without_a_major_number() -> None:
    assert on_mount(40, "2") == MappedAs("00:28", "2")
    assert on_mount(5, "ns") == MappedAs("00:05", "ns")
    assert on_mount(300, "2") == MappedAs("00:12c", "2")


@pytest.mark.parametrize(
    "name", ["new\nline", "form\x0cfeed", "\x1c", "\u2028", os.fsdecode(b"\xff")]
)
def test_no_name_of_a_mapped_file_is_in_the_way(directory: Path, name: str) -> None:
    """Whatever others map on this machine is shown in the same lines."""
    odd, path = directory / name, directory / "media.img"
    for one in (odd, path):
        one.write_bytes(bytes(SIZE))
    with mapped(odd) as pid:
        assert processes_that_map(path, path.stat()) == []
        assert processes_that_map(odd, odd.stat()) == [pid]


def test_we_do_not_count_ourselves(make_namespace: MakeNamespace) -> None:
    namespace: Namespace = make_namespace()
    assert processes_that_map(namespace.media.path, namespace.media.status()) == []


def test_every_line_of_our_own_maps_is_understood() -> None:
    for line in Path("/proc/self/maps").read_text().splitlines():
        by_device, by_path, by_name = mappers._names(line)
        assert re.fullmatch("[0-9a-f]{2,}:[0-9a-f]{2,}", by_device.device)
        assert by_device.file == by_path.file
        assert by_device.file.isdecimal()
        assert "/" not in by_name.file


# ---- whether anybody has the media open at all


def test_who_opens_the_file_while_we_ask_does_not_end_us(
    make_media: Callable[..., Media], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells us with a signal, whose usual number would."""
    media = make_media()
    ask, opened = fcntl.fcntl, []

    def open_meanwhile(fd: int, what: int, number: int) -> int:
        answer = ask(fd, what, number)
        if (what, number) == (fcntl.F_SETLEASE, fcntl.F_WRLCK):
            with pytest.raises(BlockingIOError):
                os.open(media.path, os.O_RDONLY | os.O_NONBLOCK)
            opened.append(fd)
        return answer

    monkeypatch.setattr(fcntl, "fcntl", open_meanwhile)
    assert not media.is_open_elsewhere()
    assert len(opened) == 1
    monkeypatch.undo()
    media.path.open("rb").close()
