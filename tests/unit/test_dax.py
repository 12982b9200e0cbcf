"""Which way the bytes of an open file go, and how to the kernel it is said."""

import os
from pathlib import Path
from typing import Any

import pytest

from pmblkd.config import Dax
from pmblkd.fuse.dax import Way, choose
from tests.unit.conftest import MakeNamespace

DIRECT_IO, PARALLEL_DIRECT_WRITES, PASSTHROUGH = 1 << 0, 1 << 6, 1 << 7  # uapi/linux/fuse.h
WITHOUT_COPIES: list[tuple[str, dict[str, Any]]] = [
    ("struct-page", {}),
    ("struct-page", {"compound": "2MiB"}),
    ("transient-page", {}),
    ("pfn", {}),
    ("extent", {}),
    ("extent", {"fragments": 4}),
]


@pytest.mark.parametrize(("kind", "options"), WITHOUT_COPIES, ids=str)
@pytest.mark.parametrize(
    ("dax", "way"), [("auto", Way.DAX), ("fast", Way.FAST), ("off", Way.DAEMON)]
)
def test_media_without_copies_beside_them_can_be_mapped_if_the_config_lets(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any], dax: Dax, way: Way
) -> None:
    chosen, reason = choose(dax, make_namespace(kind=kind, options=options))
    assert chosen is way
    assert reason == ('dax = "off"' if dax == "off" else "")


@pytest.mark.parametrize("dax", ["auto", "fast", "off"])
def test_what_is_beside_the_media_is_never_mapped(make_namespace: MakeNamespace, dax: Dax) -> None:
    way, reason = choose(dax, make_namespace(kind="page-cache"))
    assert way is Way.DAEMON
    assert dax == "off" or reason == "page-cache keeps copies of the media"


@pytest.mark.parametrize("dax", ["auto", "fast"])
def test_media_that_failed_are_shown_to_no_new_client(
    make_namespace: MakeNamespace, dax: Dax
) -> None:
    namespace = make_namespace()
    os.truncate(namespace.media.path, 4096)
    assert namespace.examine()
    assert choose(dax, namespace) == (Way.DAEMON, "its media have failed")


@pytest.mark.parametrize("dax", ["auto", "fast"])
def test_a_page_table_on_the_device_is_not_shown_to_clients(
    make_namespace: MakeNamespace, dax: Dax
) -> None:
    namespace = make_namespace(kind="struct-page", options={"memmap": "device"})
    way, reason = choose(dax, namespace)
    assert way is Way.DAEMON
    assert "page table" in reason


def test_a_read_only_namespace_can_be_mapped_for_reading(
    make_namespace: MakeNamespace, directory: Path
) -> None:
    """Who opens it for writing is refused at the opening."""
    (directory / "media.img").write_bytes(bytes(1 << 20))
    assert choose("auto", make_namespace(read_only=True))[0] is Way.DAX


def test_only_the_fast_way_takes_read_and_write_from_the_daemon() -> None:
    """Direct I/O is what brings them to it, also where the file is passed through."""
    assert Way.DAEMON.open_flags == DIRECT_IO | PARALLEL_DIRECT_WRITES
    assert Way.DAX.open_flags == DIRECT_IO | PARALLEL_DIRECT_WRITES | PASSTHROUGH
    assert Way.FAST.open_flags == PASSTHROUGH
    assert [way.value for way in Way] == ["off", "dax", "fast"]
