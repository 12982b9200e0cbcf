"""What is compared under which loads, the arithmetic on it, and how figures are written."""

import math
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmblk import PmblkError
from pmblk.representations import KINDS, parse_options
from pmblk.units import parse_size
from pmblkd.compare import children, figures, svg
from pmblkd.compare.contenders import ARENA_BYTES_MAX, arena_bytes, contenders, rotated
from pmblkd.compare.limits import misses
from pmblkd.compare.matrix import ROWS, rows
from pmblkd.compare.spread import spread
from tests.unit.comparisons import SIZE, large_file, sample

# ---- contenders


def test_every_kind_is_compared_by_default() -> None:
    assert [one.name for one in contenders(SIZE, variants=False)] == list(KINDS)


def test_variants_stand_behind_their_kind_and_have_names_of_their_own() -> None:
    names = [one.name for one in contenders(SIZE, variants=True)]
    assert len(set(names)) == len(names)
    assert names.index("struct-page memmap=device") == names.index("struct-page") + 1
    assert {"struct-page compound=2MiB", "pfn locking=none", "extent fragments=1024"} < set(names)


def test_every_contender_has_options_that_its_kind_takes() -> None:
    for one in contenders(SIZE, variants=True):
        parse_options(one.kind, one.options)


def test_only_leaves_the_others_out() -> None:
    names = [one.name for one in contenders(SIZE, variants=True, only=["pfn"])]
    assert names == ["pfn", "pfn locking=none"]


def test_a_kind_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(PmblkError, match=r"no representation pnf.*known are page-cache"):
        contenders(SIZE, variants=False, only=["pnf"])


@given(st.integers(64 << 20, 64 << 40))
def test_the_arena_is_a_small_part_of_what_is_worked_on(size: int) -> None:
    arena = arena_bytes(size)
    assert arena <= min(ARENA_BYTES_MAX, size // 8)
    (page_cache,) = contenders(size, variants=False, only=["page-cache"])
    assert parse_size(page_cache.options["arena"]) == arena


def test_in_as_many_rounds_everybody_is_first_once() -> None:
    these = contenders(SIZE, variants=False)
    firsts = [rotated(these, index)[0].name for index in range(len(these))]
    assert sorted(firsts) == sorted(one.name for one in these)
    assert all(len(rotated(these, index)) == len(these) for index in range(7))


# ---- rows


def test_there_is_a_row_for_each_path_way_block_and_depth() -> None:
    assert len(ROWS) == len({row.name for row in ROWS}) == 2 * 2 * 3 * 2


def test_rows_are_chosen_by_a_pattern() -> None:
    assert [row.name for row in rows("^nbd-4k-.*qd1$", with_loop=True)] == [
        "nbd-4k-read-qd1",
        "nbd-4k-write-qd1",
    ]


def test_without_loop_devices_their_rows_are_left_out() -> None:
    assert {row.path for row in rows("", with_loop=False)} == {"nbd"}


@pytest.mark.parametrize(
    ("pattern", "with_loop", "words"),
    [
        ("16k", True, "no row matches '16k'"),
        ("(", True, "is no pattern"),
        ("loop", False, "of a loop device only"),
    ],
)
def test_a_pattern_that_leaves_nothing_is_refused(
    pattern: str, with_loop: bool, words: str
) -> None:
    with pytest.raises(PmblkError, match=words.replace("(", r"\(")):
        rows(pattern, with_loop=with_loop)


# ---- figures


def test_costs_are_per_block_that_was_transferred() -> None:
    row = next(row for row in ROWS if row.block_bytes == 1 << 20)
    (one,) = contenders(SIZE, variants=False, only=["struct-page"])
    run = sample(row, one)
    assert figures.DESCRIPTORS.of(run, row) == 256
    assert figures.DESCRIPTOR_BYTES.of(run, row) == 4096
    assert figures.SGLS.of(run, row) == 1
    assert figures.CPU.of(run, row) == 50
    assert figures.IOPS.of(run, row) == 10_000


@given(st.lists(st.floats(0, 1e9), min_size=1))
def test_a_median_lies_between_the_least_and_the_most(values: list[float]) -> None:
    found = spread(values)
    assert min(values) == found.least <= found.middle <= found.most == max(values)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0125, "0.013"), (1.5, "1.5"), (31.2, "31.2"), (4096, "4,096"), (1e-5, "1.0e-05")],
)
def test_counts_are_written_without_digits_that_are_not_there(value: float, text: str) -> None:
    assert figures.digits(value) == text


@given(st.floats(1e-9, 1e12))
def test_what_is_written_is_near_what_was_meant(value: float) -> None:
    for form in (figures.digits, figures.fixed):
        written = float(form(value).replace(",", ""))
        assert math.isclose(written, value, rel_tol=0.06, abs_tol=0.0051)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (16, "16 B"),
        (400 << 30 >> 6, "6.25 GiB"),
        (128 << 20, "128 MiB"),
        (13107200, "12.5 MiB"),
        (6 << 40 >> 6, "96 GiB"),
    ],
)
def test_round_sizes_are_written_in_full(size: int, text: str) -> None:
    assert figures.exact_size(size) == text


def test_limits_hold_for_the_large_device_and_the_kinds_without_a_table() -> None:
    extent, struct_page = (
        contenders(SIZE, variants=False, only=[kind])[0] for kind in ("extent", "struct-page")
    )
    slow, large = {"open_seconds": 0.2}, {"resident_bytes": 60 << 20}
    assert misses(large_file(extent, 400 << 30)) == []
    assert misses(large_file(extent, 400 << 30, **slow)) == ["extent opened in 200 ms"]
    assert misses(large_file(extent, 400 << 30, **large)) == ["extent took 60 MiB"]
    assert misses(large_file(extent, 8 << 30, **slow)) == []
    assert misses(large_file(struct_page, 400 << 30, **slow)) == []


# ---- drawing


@given(st.floats(1e-6, 1e9))
def test_an_axis_reaches_over_what_it_shows(most: float) -> None:
    ticks = svg.nice_ticks(most)
    assert ticks[0] == 0
    assert ticks[-1] >= most * 0.99
    assert 2 <= len(ticks) <= 7


@given(st.floats(1e-3, 1e9), st.floats(1, 1e6))
def test_a_logarithmic_axis_reaches_around_what_it_shows(least: float, factor: float) -> None:
    ticks = svg.log_ticks(least, least * factor)
    assert len(ticks) >= 2
    assert ticks[0] <= least * 1.01
    assert ticks[-1] >= least * factor * 0.99


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_labels_never_lie_on_each_other_and_keep_their_order(wanted: list[float]) -> None:
    places = svg.spaced(wanted, 15)
    ordered = sorted(places)
    assert all(after - before >= 14.99 for before, after in pairwise(ordered))
    by_wish = sorted(range(len(wanted)), key=lambda index: wanted[index])
    assert all(places[a] <= places[b] for a, b in pairwise(by_wish))


def test_words_in_a_drawing_are_escaped() -> None:
    assert "&lt;b&gt;&amp;" in svg.text(0, 0, "<b>&")


# ---- children


def _child(script: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )


def test_a_child_says_what_it_has_to_say() -> None:
    assert children.output_of(_child("print(1)"), seconds=30, check=lambda: None) == b"1\n"


def test_a_child_that_takes_too_long_is_gone() -> None:
    child = _child("import time; time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired):
        children.output_of(child, seconds=0.1, check=lambda: None)
    assert child.poll() is not None


def test_a_check_that_raises_ends_the_child() -> None:
    child, begun = _child("import time; time.sleep(60)"), time.monotonic()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        children.output_of(child, seconds=50, check=stop)
    assert child.poll() is not None
    assert time.monotonic() - begun < 30
