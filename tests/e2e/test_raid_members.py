"""Block devices as members of arrays: sectors of both sizes, claims, and what is given back."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from pmblk.errors import PmblkError
from pmblk.raid.array import Array
from pmblk.raid.buffers import buffer
from pmblk.raid.geometry import Geometry
from pmblk.raid.member import Member, Request
from pmblk.raid.opening import open_member
from tests.harness.programs import program

pytestmark = pytest.mark.e2e

SIZE = 16 << 20


@contextlib.contextmanager
def loop_device(file: Path, sector_bytes: int) -> Iterator[str]:
    device = program(
        *("losetup", "--find", "--show", "--sector-size", str(sector_bytes), str(file))
    ).strip()
    try:
        yield device
    finally:
        program("losetup", "--detach", device)


@pytest.fixture(params=[512, 4096])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    with loop_device(path, request.param) as device:
        yield device


def sector_bytes(device: str) -> int:
    return int(Path(f"/sys/block/{Path(device).name}/queue/logical_block_size").read_text())


def filled(length: int, seed: int = 0) -> memoryview:
    view = buffer(length)
    view[:] = random.Random(seed).randbytes(length)
    return view


async def test_a_block_device_is_read_and_written_past_the_page_cache(
    device: str, tmp_path: Path
) -> None:
    member = await open_member(device)
    assert (member.size, member.block_bytes) == (SIZE, sector_bytes(device))
    content = filled(2 << 20)
    await member.write([Request(4096, content[:4096]), Request(8192, content[8192:])])
    await member.flush()
    found = buffer(2 << 20)
    await member.read(
        [Request(4096, found[: 1 << 20]), Request(4096 + (1 << 20), found[1 << 20 :])]
    )
    assert found[:4096] == content[:4096]
    assert found[4096:] == content[8192:].tobytes() + bytes(4096)
    small = buffer(member.block_bytes)
    await member.read([Request(member.size - member.block_bytes, small)])
    if member.block_bytes > 512:
        with pytest.raises(OSError, match="Invalid argument"):  # so it was O_DIRECT
            await member.read([Request(512, buffer(4096)[:512])])
    member.close()


async def test_zeroes_give_the_space_of_a_block_device_back(device: str, tmp_path: Path) -> None:
    member = await open_member(device)
    await member.write([Request(0, filled(SIZE))])
    await member.flush()
    before = (tmp_path / "file").stat().st_blocks
    await member.zero(1 << 20, SIZE - (2 << 20))
    await member.flush()
    found = buffer(SIZE)
    await member.read([Request(0, found)])
    assert not bytes(found[1 << 20 : -(1 << 20)]).strip(b"\0")
    assert found[: 1 << 20] == filled(SIZE)[: 1 << 20]
    assert (tmp_path / "file").stat().st_blocks < before / 2
    member.close()


async def test_a_block_device_has_one_owner(device: str) -> None:
    member = await open_member(device)
    with pytest.raises(PmblkError, match=f"{device} is in use: a member of another array"):
        await open_member(device)
    watcher = await open_member(device, read_only=True)
    await watcher.read([Request(0, buffer(4096))])
    watcher.close()
    member.close()
    (await open_member(device)).close()


async def test_a_mounted_device_is_refused_and_its_mount_named(device: str, tmp_path: Path) -> None:
    program("mkfs.ext4", "-q", device)
    mount = tmp_path / "mnt"
    mount.mkdir()
    program("mount", device, str(mount))
    try:
        with pytest.raises(PmblkError, match=f"in use: mounted at {mount}; free it first"):
            await open_member(device)
    finally:
        program("umount", str(mount))
    (await open_member(device)).close()


async def test_a_device_without_media_is_refused() -> None:
    device = program("losetup", "--find").strip()
    with pytest.raises(PmblkError, match=f"{device} is empty|No such file"):
        await open_member(device)


async def test_an_array_over_devices_of_both_kinds_and_a_file(tmp_path: Path) -> None:
    files = [tmp_path / f"file{number}" for number in range(3)]
    for file in files:
        file.write_bytes(bytes(SIZE))
    with loop_device(files[0], 512) as first, loop_device(files[1], 4096) as second:
        members: list[Member | None] = [
            await open_member(place) for place in (first, second, str(files[2]))
        ]
        announced: list[int] = []

        async def announce(slot: int, _error: OSError) -> None:
            announced.append(slot)

        geometry = Geometry(level=5, members=3, member_bytes=8 << 20, layout="left-symmetric")
        array = Array(geometry, members, data_offset=1 << 20, announce=announce)
        content = random.Random(2).randbytes(array.size)
        with trio.fail_after(60):
            assert await array.write([(0, memoryview(content))]) == [None]
            assert await array.write([(777, memoryview(b"odd"))]) == [None]
            await array.zero(1 << 20, 2 << 20)
            await array.flush()
            expected = bytearray(content)
            expected[777:780] = b"odd"
            expected[1 << 20 : 3 << 20] = bytes(2 << 20)
            assert bytes(await array.read(0, array.size)) == expected
        await array.devices.fail({0: OSError("gone")})
        assert bytes(await array.read(0, array.size)) == expected
        assert announced == [0]
        array.close()
