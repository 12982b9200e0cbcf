"""A namespace in service: opened whole or not at all, entered, drained, closed and unlocked."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pmblk import Command, PmblkError
from pmblk.media import open_media
from pmblk.nvme.command import WRITE
from pmblkd.config import NamespaceConfig
from pmblkd.registry import Registry, Served, open_served
from tests.unit.conftest import memory

SIZE = 1 << 20
KINDS = [
    "extent",
    {"kind": "extent", "fragments": 8},
    {"kind": "page-cache", "arena": "1MiB"},
    "pfn",
    "transient-page",
    "struct-page",
    {"kind": "struct-page", "memmap": "device"},
    {"kind": "struct-page", "init": "eager", "compound": "2MiB"},
]


def config(directory: Path, name: str = "a", **changes: Any) -> NamespaceConfig:
    fields: dict[str, Any] = {"name": name, "path": f"{directory}/{name}.img", "size": SIZE}
    return NamespaceConfig(**{**fields, **changes})


def opened(directory: Path, name: str = "a", **changes: Any) -> tuple[Registry, Served]:
    registry = Registry()
    served = open_served(config(directory, name, **changes))
    registry.add(served)
    return registry, served


# ---- opening


def test_a_namespace_has_the_size_of_its_file_or_63_64_of_it_with_a_reserve(
    directory: Path,
) -> None:
    registry, served = opened(directory)
    _, reserved = opened(directory, "b", reserve=True)
    assert served.namespace.size == SIZE
    assert reserved.namespace.size == SIZE * 63 // 64
    registry.close_all()


def test_a_page_table_on_the_device_implies_the_reserve(directory: Path) -> None:
    one = config(directory, representation={"kind": "struct-page", "memmap": "device"})
    assert one.with_reserve
    assert not one.reserve
    served = open_served(one)
    assert memory(served).media.reserve_bytes == SIZE // 64
    served.close()


def test_what_cannot_be_opened_leaves_no_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PmblkError("no memory")

    monkeypatch.setattr("pmblkd.registry.make", refuse)
    with pytest.raises(PmblkError, match="no memory"):
        open_served(config(directory))
    assert not list(directory.iterdir())


def test_a_start_that_fails_takes_back_the_files_that_it_made_and_no_others(
    directory: Path,
) -> None:
    (directory / "old.img").write_bytes(bytes(SIZE))
    registry, _ = opened(directory, "new")
    registry.add(open_served(config(directory, "old")))
    registry.abandon()
    assert [path.name for path in directory.iterdir()] == ["old.img"]
    assert not list(registry)


# ---- finding


def test_a_name_that_is_not_there_is_guessed(directory: Path) -> None:
    registry, _ = opened(directory, "data")
    with pytest.raises(PmblkError, match='no namespace dat; did you mean "data"'):
        registry.named("dat")
    registry.close_all()


async def test_a_number_never_means_another_namespace(directory: Path) -> None:
    registry, first = opened(directory)
    first.draining = True
    await registry.close(first)
    registry.add(open_served(config(directory)))
    assert registry.named("a").number != first.number
    assert registry.numbered(first.number) is None
    registry.close_all()


# ---- users


def test_nobody_enters_a_namespace_that_drains(directory: Path) -> None:
    registry, served = opened(directory)
    with served.used():
        served.draining = True
        assert served.users == 1
        with pytest.raises(PmblkError, match="a is draining"), served.used():
            pass
    assert served.users == 0
    assert list(registry.live()) == []
    assert list(registry) == [served]
    registry.close_all()


async def test_the_last_user_to_leave_ends_the_wait(directory: Path) -> None:
    registry, served = opened(directory)
    done: list[str] = []

    async def wait() -> None:
        await served.unused()
        done.append("unused")

    served.enter()
    served.enter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        served.leave()
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        served.leave()
    assert done == ["unused"]
    registry.close_all()


# ---- closing


@pytest.mark.parametrize("representation", KINDS, ids=str)
async def test_what_is_closed_is_flushed_unlocked_and_can_be_opened_again(
    directory: Path, representation: Any
) -> None:
    registry, served = opened(directory, representation=representation)
    write = Command(WRITE, 0, 4096, 5, payload=b"hello")
    assert not served.namespace.execute((write,))
    served.namespace.release((write,))
    served.draining = True
    await registry.close(served)
    media = open_media(served.config.file, with_reserve=served.config.with_reserve)
    assert bytes(media.view[4096:4101]) == b"hello"
    media.close()
    assert list(registry) == []


async def test_a_view_that_is_still_out_keeps_no_lock(directory: Path) -> None:
    registry, served = opened(directory)
    view = memory(served).media.view[:4096]
    served.draining = True
    await registry.close(served)
    open_media(served.config.file).close()
    assert len(view) == 4096


async def test_what_cannot_be_flushed_is_closed_all_the_same(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    registry, served = opened(directory)
    monkeypatch.setattr(served.namespace, "flush", fail)
    served.draining = True
    with pytest.raises(OSError, match="Input/output error"):
        await registry.close(served)
    assert served.closed
    assert list(registry) == []
