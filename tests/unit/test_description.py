"""What a representation says of one I/O: the addresses are the bytes, the lists are right."""

import ctypes
from typing import Any

import pytest

from pmblk.description import describe
from pmblk.errors import PmblkError
from pmblk.nvme.data_pointer import prp_entries
from tests.unit.conftest import MakeNamespace, hold, write

PAGE = 4096
SIZE = 4 << 20
KINDS: list[tuple[str, dict[str, Any], int]] = [
    ("page-cache", {}, 16),
    ("struct-page", {}, 16),
    ("struct-page", {"compound": "2MiB"}, 16),
    ("struct-page", {"memmap": "device"}, 16),
    ("transient-page", {}, 80),
    ("pfn", {}, 8),
    ("extent", {}, 16),
    ("extent", {"fragments": 100}, 16),
]
EVERY_KIND = pytest.mark.parametrize(("kind", "options", "each"), KINDS, ids=str)


@EVERY_KIND
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, PAGE), (0, 128 << 10), (1 << 20, 1 << 20), (77 * PAGE + 512, 300_032), (4100, 8)],
)
def test_the_addresses_are_where_the_bytes_are(
    make_namespace: MakeNamespace,
    kind: str,
    options: dict[str, Any],
    each: int,
    offset: int,
    length: int,
) -> None:
    namespace = make_namespace(SIZE, kind=kind, options=options)
    payload = bytes(at % 251 for at in range(length))
    assert not namespace.execute([write(offset, payload)])
    said = describe(namespace, offset, length)
    runs = [ctypes.string_at(run.address, run.length) for run in said.runs]
    assert b"".join(runs) == payload
    assert said.sgl is not None
    by_sgl = [ctypes.string_at(run.address, run.length) for run in said.sgl.descriptors]
    assert b"".join(by_sgl) == payload
    assert said.prps is not None, said.prp_refusal
    assert said.prps.entries == prp_entries(offset % PAGE, length)
    assert ctypes.string_at(said.prps.prp1, 8) == payload[:8]
    assert said.descriptor_bytes == said.descriptors * each
    assert (said.hole_bytes, said.offset, said.length) == (0, offset, length)
    assert namespace.representation.leases == 0
    namespace.representation.close()


@pytest.mark.parametrize(
    ("kind", "options", "descriptors"),
    [
        ("struct-page", {}, 256),
        ("struct-page", {"compound": "2MiB"}, 1),
        ("transient-page", {}, 256),
        ("pfn", {}, 256),
        ("extent", {}, 1),
        ("extent", {"fragments": 4}, 2),
    ],
)
def test_1_mib_takes_as_many_descriptors_as_the_kind_says(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any], descriptors: int
) -> None:
    namespace = make_namespace(SIZE, kind=kind, options=options)
    namespace.media.reserve(0, SIZE)
    said = describe(namespace, (SIZE // 8) if kind == "extent" else 0, 1 << 20)
    assert said.descriptors == descriptors
    assert said.linux_uses_sgl
    assert said.sgl is not None
    assert len(said.sgl.descriptors) == 1
    assert said.sgl.segment == b""


@EVERY_KIND
def test_holes_have_no_memory_to_describe(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any], each: int
) -> None:
    namespace = make_namespace(SIZE, kind=kind, options=options)
    hole = describe(namespace, 0, 1 << 20)
    assert (hole.hole_bytes, hole.descriptors, hole.runs) == (1 << 20, 0, [])
    assert (hole.prps, hole.sgl, hole.linux_uses_sgl) == (None, None, False)
    assert "hole" in hole.prp_refusal
    assert not namespace.execute([write(PAGE, b"a" * PAGE), write(5 * PAGE, b"b" * PAGE)])
    allocated = namespace.media.allocated_bytes()
    mixed = describe(namespace, 0, 8 * PAGE)
    assert mixed.hole_bytes == 6 * PAGE
    assert mixed.descriptors * each == mixed.descriptor_bytes
    assert [ctypes.string_at(run.address, 1) for run in mixed.runs] == [b"a", b"b"]
    assert namespace.media.allocated_bytes() == allocated
    namespace.representation.close()


@EVERY_KIND
def test_a_bad_page_cannot_be_described(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any], each: int
) -> None:
    namespace = make_namespace(SIZE, kind=kind, options=options)
    assert not namespace.execute([write(0, b"x" * PAGE), write(3 * PAGE, b"x" * 2 * PAGE)])
    namespace.poison(4 * PAGE, PAGE)
    with pytest.raises(PmblkError, match="poisoned"):
        describe(namespace, 0, 8 * PAGE)
    assert namespace.representation.leases == 0
    assert describe(namespace, 3 * PAGE, PAGE).descriptor_bytes == each
    namespace.representation.close()


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (-1, 4), (0, SIZE + 1), (SIZE, 1), (0, -4), (1 << 70, 1)]
)
def test_a_range_that_is_not_there_is_refused(
    make_namespace: MakeNamespace, offset: int, length: int
) -> None:
    with pytest.raises(PmblkError, match=f"it has {SIZE} bytes"):
        describe(make_namespace(SIZE), offset, length)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("page-cache", {"arena": "1MiB"}), ("transient-page", {"pool_pages": 256})],
)
def test_more_than_can_be_held_is_refused_and_holds_nothing(
    make_namespace: MakeNamespace, kind: str, options: dict[str, Any]
) -> None:
    namespace = make_namespace(SIZE, kind=kind, options=options)
    namespace.media.reserve(0, SIZE)
    with pytest.raises(PmblkError, match="cannot hold 1048576 bytes"):
        describe(namespace, 0, 1 << 20)
    held = [hold(namespace, part << 18, 1 << 18) for part in range(4)]
    with pytest.raises(PmblkError, match="when less is in flight"):
        describe(namespace, 2 << 20, PAGE)
    assert namespace.representation.leases == 4
    namespace.release(held)


def test_a_range_on_its_way_out_cannot_be_described(make_namespace: MakeNamespace) -> None:
    """A page cache would keep what it holds, and show it again when it is gone."""
    namespace = make_namespace(SIZE, kind="page-cache")
    namespace.media.reserve(0, PAGE)
    with namespace._dispatcher.fences.around(0, 1 << 20):
        with pytest.raises(PmblkError, match="try again"):
            describe(namespace, 0, PAGE)
        assert namespace.representation.counters().cached_bytes == 0
    describe(namespace, 0, PAGE)


def test_a_byte_off_a_dword_has_no_prps_and_says_why(make_namespace: MakeNamespace) -> None:
    namespace = make_namespace(SIZE)
    namespace.media.reserve(0, PAGE)
    said = describe(namespace, 1, 8)
    assert said.prps is None
    assert "not aligned to 4 bytes" in said.prp_refusal
