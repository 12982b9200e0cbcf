"""What file operations mean, without any FUSE library."""

import errno
import os
import re
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from pmblk import Namespace
from pmblkd.fuse.files import ROOT_INODE, Files
from tests.unit.conftest import MakeNamespace, memory, registered

SIZE = 1 << 20


@pytest.fixture
def files(make_namespace: MakeNamespace) -> Files:
    read_only = make_namespace(name="ro.img")
    read_only.name, read_only.read_only, read_only.media.read_only = "ro", True, True
    return Files(registered(make_namespace(), read_only))


def refused(code: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=re.escape(os.strerror(code)))


def test_the_directory_lists_every_namespace(files: Files) -> None:
    assert list(files.entries()) == [("ns", 2), ("ro", 3)]
    assert stat.S_ISDIR(files.attributes(ROOT_INODE).mode)


def test_a_file_is_as_long_as_its_namespace_and_as_full_as_its_media(files: Files) -> None:
    attributes = files.lookup(ROOT_INODE, "ns")
    assert (attributes.size, attributes.inode) == (SIZE, 2)
    assert attributes.allocated <= 4096
    assert stat.S_IMODE(attributes.mode) == 0o600
    assert stat.S_IMODE(files.lookup(ROOT_INODE, "ro").mode) == 0o400


def test_what_is_not_there_is_not_found(files: Files) -> None:
    with pytest.raises(OSError, match="No such file"):
        files.lookup(ROOT_INODE, "nope")
    with pytest.raises(OSError, match="No such file"):
        files.attributes(99)


async def test_what_is_written_is_read(files: Files) -> None:
    assert await files.write(2, 1000, b"hello") == 5
    assert bytes(await files.read(2, 998, 9)) == b"\0\0hello\0\0"
    await files.sync(2)


async def test_a_read_over_a_hole_and_data_is_whole(files: Files) -> None:
    await files.write(2, 8192, b"x" * 4096)
    assert bytes(await files.read(2, 4096, 12288)) == bytes(4096) + b"x" * 4096 + bytes(4096)


async def test_a_read_is_short_at_the_end_and_empty_past_it(files: Files) -> None:
    assert len(await files.read(2, SIZE - 10, 100)) == 10
    assert len(await files.read(2, SIZE, 100)) == 0
    assert len(await files.read(2, SIZE + 5, 100)) == 0


async def test_a_write_is_short_at_the_end_and_finds_no_space_past_it(files: Files) -> None:
    assert await files.write(2, SIZE - 10, b"x" * 100) == 10
    with pytest.raises(OSError, match="No space left"):
        await files.write(2, SIZE, b"x")


async def test_a_read_only_file_opens_for_reading_only(files: Files) -> None:
    files.open(3, os.O_RDONLY)
    for flags in (os.O_WRONLY, os.O_RDWR):
        with refused(errno.EROFS):
            files.open(3, flags)
    with refused(errno.EPERM):
        await files.write(3, 0, b"x")


def test_users_are_counted_from_open_to_release(files: Files) -> None:
    files.open(2, os.O_RDWR)
    files.open(3, os.O_RDONLY)
    with refused(errno.EROFS):
        files.open(3, os.O_RDWR)
    assert files.users == 2
    files.release(2)
    assert files.users == 1


async def test_a_file_that_drains_is_gone_but_for_those_who_have_it_open(files: Files) -> None:
    files.open(2, os.O_RDWR)
    served = files.served(2)
    served.draining = True
    assert [name for name, _ in files.entries()] == ["ro"]
    with refused(errno.ENOENT):
        files.lookup(ROOT_INODE, "ns")
    with refused(errno.ENOENT):
        files.open(2, os.O_RDONLY)
    assert await files.write(2, 0, b"hello") == 5
    assert files.attributes(2).size == SIZE
    files.release(2)
    assert served.users == 0


def test_no_file_is_emptied_at_its_opening(files: Files) -> None:
    with refused(errno.EPERM):
        files.open(2, os.O_RDWR | os.O_TRUNC)


def test_a_size_can_be_set_to_what_it_is_and_to_nothing_else(files: Files) -> None:
    files.resize(2, SIZE)
    with refused(errno.EPERM):
        files.resize(2, 0)


async def test_every_lease_is_given_back(
    files: Files, make_namespace: Callable[..., Namespace]
) -> None:
    await files.write(2, 0, b"x" * 4096)
    await files.read(2, 0, 8192)
    assert memory(files.served(2)).representation.leases == 0


def test_when_the_mount_is_gone_nobody_has_a_file_open(files: Files) -> None:
    for inode in (2, 2, 3):
        files.open(inode, os.O_RDONLY)
    files.release(2)
    files.disconnected()
    assert files.users == 0
    assert [served.users for served in files._registry] == [0, 0]
