"""Saving a namespace: device I/O straight from the memory that a representation holds."""

import os
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pmblk import Command, PmblkError
from pmblk.media.target import open_target
from pmblk.nvme.command import DATASET_MANAGEMENT, WRITE
from pmblk.representations import parse_options
from pmblk.saving import save
from pmblk.switching import resize, switch
from tests.unit.conftest import MakeNamespace

SIZE = 3 << 20
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("page-cache", {"arena": "1MiB"}),
    ("struct-page", {}),
    ("struct-page", {"compound": "2MiB"}),
    ("struct-page", {"memmap": "device"}),
    ("transient-page", {"pool_pages": 256}),
    ("pfn", {}),
    ("extent", {}),
    ("extent", {"fragments": 100}),
]


def target_file(directory: Path) -> Path:
    return directory / "target.img"


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
async def test_every_kind_is_saved_byte_for_byte_and_only_page_cache_copies(
    make_namespace: MakeNamespace, directory: Path, kind: str, options: dict[str, Any]
) -> None:
    namespace = make_namespace(SIZE, kind=kind, options=options)
    content = os.urandom(namespace.size)
    for offset in range(0, namespace.size, 16 << 10):
        payload = content[offset : offset + (16 << 10)]
        assert not namespace.execute([Command(WRITE, 0, offset, len(payload), payload=payload)])
    target = open_target(target_file(directory), needed_bytes=namespace.size)
    saved = await save(namespace, target)
    target.close()
    assert target_file(directory).read_bytes() == content
    assert saved.written_bytes == namespace.size
    assert (saved.copied_bytes > 0) == (kind == "page-cache")
    assert namespace.representation.leases == 0


async def test_holes_stay_holes_in_a_file(make_namespace: MakeNamespace, directory: Path) -> None:
    namespace = make_namespace(SIZE)
    namespace.execute([Command(WRITE, 0, 0, 8192, payload=b"a" * 8192)])
    namespace.execute([Command(DATASET_MANAGEMENT, 0, 4096, 4096)])
    target = open_target(target_file(directory), needed_bytes=SIZE)
    saved = await save(namespace, target)
    target.close()
    assert saved.hole_bytes == SIZE - 4096
    assert saved.written_bytes == 4096
    status = target_file(directory).stat()
    assert (status.st_size, status.st_blocks * 512) == (SIZE, 4096)
    assert target_file(directory).read_bytes() == b"a" * 4096 + bytes(SIZE - 4096)


async def test_poisoned_memory_is_not_saved(make_namespace: MakeNamespace, directory: Path) -> None:
    namespace = make_namespace(SIZE)
    namespace.poison(1 << 20, 4096)
    target = open_target(target_file(directory), needed_bytes=SIZE)
    with pytest.raises(PmblkError, match="cannot be read between 1048576 and 2097152"):
        await save(namespace, target)
    target.close()
    assert namespace.representation.leases == 0


def test_media_that_are_served_are_no_target(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace(SIZE)
    namespace.execute([Command(WRITE, 0, 0, 1, payload=b"a")])
    with pytest.raises(PmblkError, match="somebody uses it"):
        open_target(namespace.media.path, needed_bytes=SIZE)
    assert bytes(namespace.media.view[:1]) == b"a"


def test_a_target_in_no_directory_is_refused(directory: Path) -> None:
    with pytest.raises(PmblkError, match="No such file"):
        open_target(directory / "none" / "file", needed_bytes=1)


async def test_a_save_that_fails_leaves_what_was_there(
    make_namespace: MakeNamespace, directory: Path
) -> None:
    target_file(directory).write_bytes(b"the copy of yesterday")
    namespace = make_namespace(SIZE)
    namespace.poison(1 << 20, 4096)
    target = open_target(target_file(directory), needed_bytes=SIZE)
    with pytest.raises(PmblkError, match="cannot be read"):
        await save(namespace, target)
    target.close()
    assert target_file(directory).read_bytes() == b"the copy of yesterday"
    assert sorted(path.name for path in directory.iterdir()) == ["media.img", "target.img"]


def test_a_fifo_is_no_target(directory: Path) -> None:
    os.mkfifo(target_file(directory))
    with pytest.raises(PmblkError, match="neither a file nor a block device"):
        open_target(target_file(directory), needed_bytes=1)


def test_a_path_with_a_nul_is_no_target(directory: Path) -> None:
    with pytest.raises(PmblkError, match="cannot write"):
        open_target(Path(f"{directory}/a\0b"), needed_bytes=1)


async def test_what_a_namespace_grows_meanwhile_is_not_in_the_copy(
    make_namespace: MakeNamespace, directory: Path
) -> None:
    namespace = make_namespace(SIZE)
    target = open_target(target_file(directory), needed_bytes=SIZE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(save, namespace, target)
        await trio.testing.wait_all_tasks_blocked()  # its first piece is being written
        await resize(namespace, 2 * SIZE)
    target.close()
    assert target_file(directory).stat().st_size == SIZE


async def test_a_switch_to_a_smaller_limit_meanwhile_is_no_harm(
    make_namespace: MakeNamespace, directory: Path
) -> None:
    namespace = make_namespace(16 << 20)
    content = os.urandom(16 << 20)
    namespace.execute([Command(WRITE, 0, 0, len(content), payload=content)])
    target = open_target(target_file(directory), needed_bytes=len(content))
    options = parse_options("transient-page", {"pool_pages": 256})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(save, namespace, target)
        await trio.testing.wait_all_tasks_blocked()  # its first piece is being written
        await switch(namespace, "transient-page", options)
    target.close()
    assert target_file(directory).read_bytes() == content
