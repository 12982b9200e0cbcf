"""Page structs, dirty bits and descriptors against simple models; few pages and many alike."""

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmblk import page_runs
from pmblk.pages import PAGE_BYTES
from pmblk.representations import descriptors
from pmblk.representations.descriptors import bvecs, pfns
from pmblk.representations.dirty_map import DirtyMap
from pmblk.representations.page_table import (
    DIRTY,
    HWPOISON,
    REFERENCED,
    STRUCT_BYTES,
    PageTable,
)
from pmblk.representations.table_memory import for_structs

STRUCTS = 100
runs = st.tuples(st.integers(0, STRUCTS - 1), st.integers(1, STRUCTS)).map(
    lambda run: (run[0], min(run[1], STRUCTS - run[0]))
)
bits = st.sampled_from([DIRTY, HWPOISON, REFERENCED, DIRTY | HWPOISON])


@given(st.lists(st.tuples(st.sampled_from(["pin", "unpin", "set", "clear"]), runs, bits)))
def test_a_run_of_structs_is_changed_and_its_neighbours_are_not(
    history: list[tuple[str, tuple[int, int], int]],
) -> None:
    memory = for_structs(STRUCTS)
    table = PageTable(memory)
    references, flags = [0] * STRUCTS, [0] * STRUCTS
    for what, (first, count), chosen in history:
        span = range(first, first + count)
        if what == "pin":
            table.pin(first, count)
            for at in span:
                references[at] += 1
        elif what == "unpin":
            table.unpin(first, count)
            for at in span:
                references[at] -= 1
        elif what == "set":
            table.set_flags(first, count, chosen)
            for at in span:
                flags[at] |= chosen
        else:
            table.clear_flags(first, count, chosen)
            for at in span:
                flags[at] &= ~chosen
        assert table.pinned(first, count) == any(references[at] for at in span)
        assert table.any_flags(first, count, chosen) == any(flags[at] & chosen for at in span)
        assert table.with_flags(first, count, chosen).tolist() == [
            at for at in span if flags[at] & chosen
        ]
    assert table.refcounts.tolist() == references
    assert table.flags.tolist() == flags
    assert not table.index.any()


def test_a_struct_has_its_fields_where_linux_has_them() -> None:
    memory = for_structs(3)
    table = PageTable(memory)
    table.set_one(1, index=0x1122, flags=DIRTY, refcount=7)
    raw = ctypes.string_at(table.address + STRUCT_BYTES, STRUCT_BYTES)
    assert (raw[0:8], raw[32:40], raw[52:56]) == (
        DIRTY.to_bytes(8, "little"),
        (0x1122).to_bytes(8, "little"),
        (7).to_bytes(4, "little"),
    )
    assert table.index_of(1) == 0x1122
    assert [table.unpin_one(1) for _ in range(7)] == [6, 5, 4, 3, 2, 1, 0]
    assert memory[:STRUCT_BYTES] == memory[2 * STRUCT_BYTES :] == bytes(STRUCT_BYTES)


# ---- dirty bits

CHUNK = 4096 * 8
MAP_PAGES = 2 * CHUNK + 100
borders = st.one_of(
    st.integers(0, MAP_PAGES - 1),
    st.integers(CHUNK - 20, CHUNK + 20),
    st.integers(2 * CHUNK - 20, MAP_PAGES - 1),
)
dirty_runs = st.tuples(borders, st.one_of(st.integers(1, 40), st.integers(1, MAP_PAGES))).map(
    lambda run: (run[0], min(run[1], MAP_PAGES - run[0]))
)


@given(st.lists(st.tuples(st.booleans(), dirty_runs), max_size=15))
def test_dirty_bits_are_those_of_a_set_of_pages(
    history: list[tuple[bool, tuple[int, int]]],
) -> None:
    dirty_map = DirtyMap(MAP_PAGES)
    model = np.zeros(MAP_PAGES, bool)
    for mark, (first, count) in history:
        (dirty_map.mark if mark else dirty_map.clear)(first, count)
        model[first : first + count] = mark
        assert dirty_map or not model.any()
    found = [
        page
        for offset, length in dirty_map.extents()
        for page in range(offset // PAGE_BYTES, (offset + length) // PAGE_BYTES)
    ]
    assert found == np.flatnonzero(model).tolist()
    assert bool(dirty_map) == bool(model.any()), "who has looked at all of it knows"
    assert dirty_map.dirty_bytes() == int(model.sum()) * PAGE_BYTES


def test_to_clear_what_is_clean_takes_no_memory() -> None:
    dirty_map = DirtyMap(100 << 20)
    dirty_map.clear(0, 100 << 20)
    assert dirty_map.resident_bytes() == 0
    dirty_map.mark(50 << 20, 1)
    dirty_map.clear(0, 100 << 20)
    assert dirty_map.resident_bytes() == 4096
    assert not dirty_map


@given(st.sets(st.integers(0, 60)))
def test_page_numbers_become_ranges_that_do_not_touch(numbers: set[int]) -> None:
    extents = page_runs.extents(np.array(sorted(numbers), np.int64))
    found = [
        page
        for offset, length in extents
        for page in range(offset // PAGE_BYTES, (offset + length) // PAGE_BYTES)
    ]
    assert found == sorted(numbers)
    ends = [offset + length for offset, length in extents]
    assert all(end < following for end, (following, _) in zip(ends[:-1], extents[1:], strict=True))


# ---- descriptors


def _both_forms(
    monkeypatch: pytest.MonkeyPatch, build: Any, *arguments: Any
) -> tuple[list[Any], list[Any]]:
    forms = []
    for scalar_pages in (1 << 20, 0):
        monkeypatch.setattr(descriptors, "SCALAR_PAGES", scalar_pages)
        built = build(*arguments)
        forms.append(built if isinstance(built, list) else built.tolist())
    return forms[0], forms[1]


@pytest.mark.parametrize("head", [0, 1, 4095])
@pytest.mark.parametrize("tail", [0, 1, 4095])
@pytest.mark.parametrize("whole", [1, 2, 15, 16, 17, 255, 1000])
@pytest.mark.parametrize("form", ["range", "list"])
def test_the_vector_and_the_scalar_form_are_the_same_bio_vecs(
    monkeypatch: pytest.MonkeyPatch, head: int, tail: int, whole: int, form: str
) -> None:
    offset = 7 * PAGE_BYTES + head
    length = whole * PAGE_BYTES - head + tail
    count = whole + bool(tail)
    named = range(1 << 40, (1 << 40) + count * STRUCT_BYTES, STRUCT_BYTES)
    structs = named if form == "range" else [*reversed(named)]
    scalar, vector = _both_forms(monkeypatch, bvecs, offset, length, structs)
    assert scalar == vector
    assert [page for page, _, _ in scalar] == list(structs)
    assert sum(piece for _, piece, _ in scalar) == length
    assert all(place + piece <= PAGE_BYTES for _, piece, place in scalar)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 256])
def test_the_vector_and_the_scalar_form_are_the_same_pfns(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    scalar, vector = _both_forms(monkeypatch, pfns, 99, count)
    assert scalar == vector == list(range(99, 99 + count))
