"""The reserve of a file: how it is marked, and when it is taken for one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmblk import MediaError
from pmblk.media import create, open_media, reserve

SIZE = 4 << 20


@pytest.fixture
def fd(directory: Path) -> Iterator[int]:
    create(directory / "a", SIZE)
    opened = os.open(directory / "a", os.O_RDWR)
    yield opened
    os.close(opened)


def test_a_reserve_that_was_taken_is_known_again(fd: int) -> None:
    assert not reserve.is_taken(fd, SIZE)
    assert reserve.can_be_taken(fd, SIZE)
    reserve.take(fd, SIZE)
    assert reserve.is_taken(fd, SIZE)
    assert not reserve.can_be_taken(fd, SIZE)
    assert os.pread(fd, 64, SIZE - 64) == reserve._info(SIZE)


@pytest.mark.parametrize("at", range(reserve.INFO_BYTES))
def test_an_info_block_with_a_wrong_byte_is_none(fd: int, at: int) -> None:
    reserve.take(fd, SIZE)
    position = SIZE - reserve.INFO_BYTES + at
    byte = os.pread(fd, 1, position)[0]
    os.pwrite(fd, bytes([byte ^ 0x40]), position)
    assert not reserve.is_taken(fd, SIZE)
    os.pwrite(fd, bytes([byte]), position)
    assert reserve.is_taken(fd, SIZE)


def test_an_info_block_of_another_size_is_none(fd: int) -> None:
    """The file has grown: what lies at its end now is no reserve, and neither is the old one."""
    reserve.take(fd, SIZE)
    os.ftruncate(fd, 2 * SIZE)
    assert not reserve.is_taken(fd, 2 * SIZE)
    os.pwrite(fd, reserve._info(SIZE), 2 * SIZE - reserve.INFO_BYTES)
    assert not reserve.is_taken(fd, 2 * SIZE)


@pytest.mark.parametrize(
    ("at", "free"), [(0, True), (SIZE - SIZE // 64 - 1, True), (SIZE - 4096, False)]
)
def test_data_before_the_last_64th_do_not_matter(fd: int, at: int, free: bool) -> None:
    os.pwrite(fd, b"x", at)
    assert reserve.can_be_taken(fd, SIZE) == free


@pytest.mark.parametrize("size", [4096, reserve.FILE_UNIT_BYTES - 4096, SIZE + 4096])
def test_a_file_whose_64th_is_no_whole_page_has_no_reserve(directory: Path, size: int) -> None:
    create(directory / "b", size)
    with pytest.raises(MediaError, match="no whole number of pages"):
        open_media(directory / "b", with_reserve=True)
    assert (directory / "b").stat().st_blocks == 0


def test_the_smallest_file_with_a_reserve(directory: Path) -> None:
    create(directory / "b", reserve.FILE_UNIT_BYTES)
    media = open_media(directory / "b", with_reserve=True)
    assert (media.size, media.reserve_bytes) == (63 * 4096, 4096)
    media.close()


def test_a_corrupted_info_block_is_data_and_the_file_is_refused(directory: Path) -> None:
    """To take it for free space would zero what a client may have written there."""
    create(directory / "b", SIZE)
    open_media(directory / "b", with_reserve=True).close()
    with open(directory / "b", "r+b") as file:
        file.seek(SIZE - 1)
        file.write(b"\xff")
    with pytest.raises(MediaError, match="has data in its last 1/64"):
        open_media(directory / "b", with_reserve=True)


def test_read_only_media_keep_the_reserve_that_they_have_and_get_none(directory: Path) -> None:
    create(directory / "b", SIZE)
    with pytest.raises(MediaError, match="read-only"):
        open_media(directory / "b", with_reserve=True, read_only=True)
    open_media(directory / "b", with_reserve=True).close()
    media = open_media(directory / "b", with_reserve=True, read_only=True)
    assert media.size == SIZE - SIZE // 64
    media.close()
