"""The builders against decoders that walk the bytes as a controller would, and known examples."""

import itertools
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pmblk.nvme.data_pointer import (
    PAGE_BYTES,
    PrpList,
    Run,
    Sgl,
    build_prps,
    build_sgl,
    merge,
    prp_entries,
    prp_list_pages,
    use_sgl,
)

KIB = 1 << 10
MIB = 1 << 20
DATA = 0x7F00_0000_0000
LIST = 0x1_0000_0000

run_lists = st.lists(st.builds(Run, st.integers(0, 100), st.integers(0, 20)), min_size=1)
dword_offsets = st.integers(0, PAGE_BYTES // 4 - 1).map(lambda dwords: dwords * 4)


@st.composite
def prp_runs(draw: st.DrawFn) -> list[Run]:
    """Runs that a PRP list can express: whole pages, but for the first's head and last's tail."""
    counts = draw(st.lists(st.one_of(st.integers(1, 4), st.integers(1, 1200)), min_size=1))
    runs = []
    for pages in counts:
        runs.append(Run(DATA + draw(st.integers(0, 1 << 20)) * PAGE_BYTES, pages * PAGE_BYTES))
    head = draw(dword_offsets)
    runs[0] = Run(runs[0].address + head, runs[0].length - head)
    tail = draw(st.integers(0, min(PAGE_BYTES, runs[-1].length) - 1))
    runs[-1] = Run(runs[-1].address, runs[-1].length - tail)
    return runs


def decode_prps(prps: PrpList, length: int, list_address: int) -> list[Run]:
    """What a controller that is asked for `length` bytes moves; it reads nothing but the bytes."""
    memory = {list_address + i * PAGE_BYTES: page for i, page in enumerate(prps.pages)}
    prp1, prp2 = struct.unpack("<QQ", prps.data_pointer)
    runs = [Run(prp1, min(length, PAGE_BYTES - prp1 % PAGE_BYTES))]
    left = length - runs[0].length
    if left <= PAGE_BYTES:
        assert bool(prp2) == (left > 0), "PRP2 is reserved when PRP1 suffices"
        entries, index = [prp2], 0
    else:
        entries, index = fetch(memory, prp2), 0
    while left:
        if index == 511 and left > PAGE_BYTES:
            entries, index = fetch(memory, entries[511]), 0
        assert entries[index] % PAGE_BYTES == 0, "PRP Offset Invalid"
        runs.append(Run(entries[index], min(left, PAGE_BYTES)))
        left -= runs[-1].length
        index += 1
    assert not memory, "the controller fetched every page of the list"
    assert not prps.pages or not any(entries[index:]), "unused entries are zero"
    assert len(runs) == prps.entries
    return runs


def fetch(memory: dict[int, bytes], address: int) -> list[int]:
    page = memory.pop(address)
    assert len(page) == PAGE_BYTES
    return list(struct.unpack("<512Q", page))


def decode_sgl(sgl: Sgl, segment_address: int) -> list[Run]:
    address, length, reserved, identifier = descriptor(sgl.data_pointer)
    assert not reserved
    if identifier == 0x00:
        assert not sgl.segment
        return [Run(address, length)]
    assert identifier == 0x30, "an SGL begins with a data block or its last segment"
    assert (address, length) == (segment_address, len(sgl.segment))
    runs = []
    for start in range(0, length, 16):
        address, block_bytes, reserved, identifier = descriptor(sgl.segment[start : start + 16])
        assert not reserved
        assert identifier == 0x00, "the last segment holds data blocks only"
        runs.append(Run(address, block_bytes))
    return runs


def descriptor(raw: bytes) -> tuple[int, int, int, int]:
    assert len(raw) == 16
    fields = (raw[:8], raw[8:12], raw[12:15], raw[15:])
    address, length, reserved, identifier = (int.from_bytes(f, "little") for f in fields)
    return address, length, reserved, identifier


def total(runs: list[Run]) -> int:
    return sum(run.length for run in runs)


def spread(runs: list[Run]) -> list[int]:
    return [address for run in runs for address in range(run.address, run.end)]


@given(run_lists)
def test_merged_runs_are_the_same_bytes_in_the_same_order(runs: list[Run]) -> None:
    merged = merge(runs)
    assert spread(merged) == spread(runs)
    assert all(run.length for run in merged)
    assert all(a.end != b.address for a, b in itertools.pairwise(merged))


@given(prp_runs())
@example([Run(DATA, 513 * PAGE_BYTES)])
@example([Run(DATA, 514 * PAGE_BYTES)])
@example([Run(DATA, 1024 * PAGE_BYTES)])
@example([Run(DATA, 1025 * PAGE_BYTES)])
def test_a_controller_finds_the_same_bytes_in_the_prp_list(runs: list[Run]) -> None:
    prps = build_prps(runs, list_address=LIST)
    assert merge(decode_prps(prps, total(runs), LIST)) == merge(runs)
    assert len(prps.pages) == prp_list_pages(prps.entries)


@given(st.lists(st.builds(Run, st.integers(0, 1 << 63), st.integers(0, 1 << 34)), min_size=1))
@example([Run(DATA, 1 << 40)])
def test_a_controller_finds_the_same_bytes_in_the_sgl(runs: list[Run]) -> None:
    if not total(runs):
        runs = [*runs, Run(DATA, 1)]
    sgl = build_sgl(runs, segment_address=LIST)
    assert decode_sgl(sgl, LIST) == sgl.descriptors
    assert merge(sgl.descriptors) == merge(runs)


@given(dword_offsets, st.integers(1, 6 * MIB))
@example(0, 513 * PAGE_BYTES)
@example(4, 513 * PAGE_BYTES - 4)
@example(4, 513 * PAGE_BYTES)
def test_the_formulas_count_what_the_built_list_holds(offset: int, length: int) -> None:
    prps = build_prps([Run(DATA + offset, length)], list_address=LIST)
    assert prp_entries(offset, length) == prps.entries
    assert prp_list_pages(prps.entries) == len(prps.pages)


@pytest.mark.parametrize(
    ("entries", "pages"),
    [
        (0, 0),
        (1, 0),
        (2, 0),
        (3, 1),
        (513, 1),
        (514, 2),
        (1024, 2),
        (1025, 3),
        (1535, 3),
        (1536, 4),
    ],
)
def test_a_full_list_page_takes_512_pointers_if_it_is_the_last_and_else_511(
    entries: int, pages: int
) -> None:
    assert prp_list_pages(entries) == pages
    if entries:
        prps = build_prps([Run(DATA, entries * PAGE_BYTES)], list_address=LIST)
        assert (prps.entries, len(prps.pages)) == (entries, pages)


def test_no_bytes_take_no_entries() -> None:
    assert prp_entries(512, 0) == 0


def test_one_page_is_prp1_alone() -> None:
    prps = build_prps([Run(DATA, 4 * KIB)], list_address=LIST)
    assert prps == PrpList(prp1=DATA, prp2=0, pages=[], entries=1)
    assert prps.data_pointer == bytes.fromhex("00000000007f0000 0000000000000000")


def test_two_pages_are_prp1_and_prp2() -> None:
    prps = build_prps([Run(DATA, 8 * KIB)], list_address=LIST)
    assert prps == PrpList(prp1=DATA, prp2=DATA + 4 * KIB, pages=[], entries=2)
    assert prps.data_pointer == bytes.fromhex("00000000007f0000 00100000007f0000")


def test_two_pages_apart_are_prp1_and_prp2_too() -> None:
    prps = build_prps([Run(DATA + 512, 3584), Run(DATA + MIB, 512)], list_address=LIST)
    assert prps == PrpList(prp1=DATA + 512, prp2=DATA + MIB, pages=[], entries=2)


def test_an_aligned_mebibyte_is_prp1_and_255_entries_in_one_list_page() -> None:
    prps = build_prps([Run(DATA, MIB)], list_address=LIST)
    assert (prps.prp1, prps.prp2, prps.entries) == (DATA, LIST, 256)
    [page] = prps.pages
    pointers = struct.unpack("<512Q", page)
    assert pointers[:255] == tuple(range(DATA + PAGE_BYTES, DATA + MIB, PAGE_BYTES))
    assert not any(pointers[255:])


def test_an_aligned_mebibyte_is_one_descriptor_inside_the_command() -> None:
    sgl = build_sgl([Run(DATA, MIB)], segment_address=LIST)
    assert sgl.descriptors == [Run(DATA, MIB)]
    assert sgl.segment == b""
    assert sgl.data_pointer == bytes.fromhex("00000000007f0000 00001000 000000 00")


def test_several_descriptors_are_one_last_segment() -> None:
    sgl = build_sgl([Run(DATA, 512), Run(DATA + MIB, 3)], segment_address=LIST)
    assert sgl.data_pointer == bytes.fromhex("0000000001000000 20000000 000000 30")
    assert sgl.segment == bytes.fromhex(
        "00000000007f0000 00020000 000000 0000001000007f0000 03000000 000000 00"
    )


def test_a_start_inside_a_page_costs_one_entry_more() -> None:
    assert prp_entries(0, 128 * KIB) == 32
    assert prp_entries(512, 128 * KIB) == 33
    assert build_prps([Run(DATA + 512, 128 * KIB)], list_address=LIST).entries == 33


def test_four_mebibytes_chain_two_list_pages() -> None:
    prps = build_prps([Run(DATA, 4 * MIB)], list_address=LIST)
    first, second = (struct.unpack("<512Q", page) for page in prps.pages)
    assert first[510:] == (DATA + 511 * PAGE_BYTES, LIST + PAGE_BYTES)
    assert second[0] == DATA + 512 * PAGE_BYTES
    assert second[511] == DATA + 1023 * PAGE_BYTES


def test_runs_that_touch_inside_a_page_are_one_run() -> None:
    halves = [Run(DATA, 512), Run(DATA + 512, 3584)]
    whole = [Run(DATA, 4096)]
    assert build_prps(halves, list_address=LIST) == build_prps(whole, list_address=LIST)
    assert build_sgl(halves, segment_address=LIST) == build_sgl(whole, segment_address=LIST)


@pytest.mark.parametrize(
    ("runs", "jump"),
    [
        ([Run(DATA, 512), Run(DATA + MIB, 4096)], f"from {DATA + 512:#x} to {DATA + MIB:#x}"),
        (
            [Run(DATA, 4096), Run(DATA + MIB + 512, 512)],
            f"from {DATA + 4096:#x} to {DATA + MIB + 512:#x}",
        ),
        ([Run(DATA, 4096), Run(0, 5000), Run(8192, 1)], "from 0x1388 to 0x2000"),
    ],
)
def test_a_gap_inside_a_page_is_for_an_sgl_and_refused_as_prps(runs: list[Run], jump: str) -> None:
    with pytest.raises(
        ValueError, match=f"{jump}, inside a page: a PRP list cannot express it, an SGL can"
    ):
        build_prps(runs, list_address=LIST)
    assert build_sgl(runs, segment_address=LIST).descriptors == runs


@pytest.mark.parametrize("offset", [1, 2, 3, 4095])
def test_prps_point_to_dwords_and_an_sgl_to_bytes(offset: int) -> None:
    with pytest.raises(ValueError, match="not aligned to 4 bytes"):
        build_prps([Run(DATA + offset, 512)], list_address=LIST)
    assert build_sgl([Run(DATA + offset, 512)], segment_address=LIST).data_pointer


def test_a_list_begins_on_a_page_and_a_segment_on_a_qword() -> None:
    with pytest.raises(ValueError, match="PRP list at 0x100000008 is not aligned to 4096 bytes"):
        build_prps([Run(DATA, MIB)], list_address=LIST + 8)
    with pytest.raises(ValueError, match="SGL segment at 0x100000004 is not aligned to 8 bytes"):
        build_sgl([Run(DATA, MIB)], segment_address=LIST + 4)


def test_memory_ends_at_64_bits() -> None:
    last_page = (1 << 64) - PAGE_BYTES
    assert build_prps([Run(last_page, PAGE_BYTES)], list_address=LIST).prp1 == last_page
    for run in (Run(last_page, PAGE_BYTES + 1), Run(-PAGE_BYTES, PAGE_BYTES), Run(0, -1)):
        with pytest.raises(ValueError, match="outside 64-bit memory"):
            build_prps([run], list_address=LIST)
        with pytest.raises(ValueError, match="outside 64-bit memory"):
            build_sgl([run], segment_address=LIST)
    with pytest.raises(ValueError, match=r"PRP list .* outside 64-bit memory"):
        build_prps([Run(DATA, 4 * MIB)], list_address=last_page)


@pytest.mark.parametrize("runs", [[], [Run(DATA, 0)]])
def test_no_bytes_have_no_data_pointer(runs: list[Run]) -> None:
    with pytest.raises(ValueError, match="no bytes"):
        build_prps(runs, list_address=LIST)
    with pytest.raises(ValueError, match="no bytes"):
        build_sgl(runs, segment_address=LIST)


def test_a_run_is_split_at_whole_pages_once_its_length_outgrows_32_bits() -> None:
    most = (1 << 32) - 1
    assert build_sgl([Run(0, most)], segment_address=LIST).descriptors == [Run(0, most)]
    pieces = build_sgl([Run(0, most + 1)], segment_address=LIST).descriptors
    assert pieces == [Run(0, most + 1 - PAGE_BYTES), Run(most + 1 - PAGE_BYTES, PAGE_BYTES)]


def test_an_sgl_is_used_from_an_average_of_the_threshold_on() -> None:
    assert use_sgl(MIB, 1)
    assert use_sgl(MIB, 32)
    assert not use_sgl(MIB, 33)
    assert not use_sgl(MIB, 256)
    assert use_sgl(MIB, 256, threshold_bytes=4 * KIB)


def test_the_average_run_is_rounded_up() -> None:
    assert use_sgl(64 * KIB - 1, 2)
    assert not use_sgl(64 * KIB - 2, 2)


def test_a_threshold_of_zero_means_never() -> None:
    assert not use_sgl(MIB, 1, threshold_bytes=0)


def test_no_runs_need_no_sgl() -> None:
    assert not use_sgl(0, 0)
