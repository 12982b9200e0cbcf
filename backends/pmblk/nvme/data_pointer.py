"""The data pointer of one I/O, as the bytes that a controller would read: a PRP list or an SGL.

In go the memory runs of the I/O, in order; out come the 16 bytes of the command's DPTR field and
the list that they point to, if any. Nothing is sent to a device, so an address is any number that
tells bytes apart: an offset in the media does as well. How long an I/O may be (MDTS) is the
caller's business, and so is CDW0.PSDT, which tells a controller which of the two it got. Pure.

Sources: NVM Express Base Specification 2.0, sections 4.1.1 (Physical Region Page Entry and List)
and 4.1.2 (Scatter Gather List); the choice between the two is that of Linux's
drivers/nvme/host/pci.c. Integers in the structures are little endian.
"""

import itertools
import struct
from collections.abc import Iterable, Iterator

import msgspec

PAGE_BYTES = 4096  # CC.MPS = 0, which is what Linux sets
ENTRY_BYTES = 8
DESCRIPTOR_BYTES = 16

# The types of SGL descriptor that are written. A chain of segments would need SEGMENT (2h) too;
# here, as in Linux, all descriptors lie in one contiguous segment: the first is the last.
DATA_BLOCK = 0x0
LAST_SEGMENT = 0x3

_PRP_PAIR = struct.Struct("<QQ")
_DESCRIPTOR = struct.Struct("<QI3xB")  # address, length, reserved, type << 4 | subtype
assert _PRP_PAIR.size == _DESCRIPTOR.size == DESCRIPTOR_BYTES

_ENTRIES_PER_PAGE = PAGE_BYTES // ENTRY_BYTES
_DESCRIPTOR_LENGTH_MAX = (1 << 32) - 1
# A longer run is cut at whole pages, not at that odd number: a controller may insist on dwords
# in address and length (Identify Controller, SGLS).
_SPLIT_BYTES = (1 << 32) - PAGE_BYTES


class Run(msgspec.Struct, frozen=True, gc=False):
    """Contiguous memory; bytes."""

    address: int
    length: int

    @property
    def end(self) -> int:
        return self.address + self.length


class PrpList(msgspec.Struct, frozen=True, gc=False):
    """A data pointer made of PRP entries.

    `pages` are the list's pages as the controller fetches them: whole, unused entries zero; none
    when PRP1 and PRP2 suffice. `entries` counts what points to data: PRP1 counts, a pointer to a
    list page does not. `prp2` is 0 (the field is reserved) when PRP1 suffices.
    """

    prp1: int
    prp2: int
    pages: list[bytes]
    entries: int

    @property
    def data_pointer(self) -> bytes:
        return _PRP_PAIR.pack(self.prp1, self.prp2)


class Sgl(msgspec.Struct, frozen=True, gc=False):
    """A data pointer made of SGL descriptors.

    `segment` is `descriptors` as bytes, 16 for each; empty when there is one descriptor, which is
    then `data_pointer` itself.
    """

    descriptors: list[Run]
    segment: bytes
    data_pointer: bytes


def merge(runs: Iterable[Run]) -> list[Run]:
    """The same bytes in the same order: neighbours that touch become one, empty runs vanish."""
    merged: list[Run] = []
    for run in runs:
        if not run.length:
            continue
        if merged and merged[-1].end == run.address:
            merged[-1] = Run(merged[-1].address, merged[-1].length + run.length)
        else:
            merged.append(run)
    return merged


def prp_entries(offset_in_page: int, length: int) -> int:
    """How many PRP entries point to `length` bytes that begin at 0 <= `offset_in_page` < 4096."""
    assert 0 <= offset_in_page < PAGE_BYTES, offset_in_page
    return -(-(offset_in_page + length) // PAGE_BYTES) if length else 0


def prp_list_pages(entries: int) -> int:
    """How many list pages that many PRP entries take, with PRP1 the first of them.

    Every list page but the last gives up an entry to the pointer to the next.
    """
    return -(-(entries - 2) // (_ENTRIES_PER_PAGE - 1)) if entries > 2 else 0


def build_prps(runs: Iterable[Run], *, list_address: int) -> PrpList:
    """The PRP entries of the runs; neighbours that touch count as one run.

    The list pages lie one after the other from `list_address`, which is page aligned. (A list may
    begin at any qword, and Linux's short ones do; whole pages keep `prp_list_pages` a formula.)

    Raises ValueError for runs that a PRP list cannot express: an entry has no length, it reaches
    to the end of its page, and only the first may begin inside one. So too for an address off a
    dword: the specification says that bits 1:0 shall be zero but asks no controller to check. One
    may answer PRP Offset Invalid, another drop the bits and move other bytes than meant.
    """
    runs = _checked(runs, alignment=4)
    _check_shape(runs)
    pointers = [
        page for run in runs for page in range(run.address & -PAGE_BYTES, run.end, PAGE_BYTES)
    ]
    pointers[0] = runs[0].address
    list_bytes = prp_list_pages(len(pointers)) * PAGE_BYTES
    _check_address(list_address, list_bytes, alignment=PAGE_BYTES, what="PRP list")

    prp1, *others = pointers
    if len(others) > 1:
        pages = list(_list_pages(others, list_address))
        return PrpList(prp1, list_address, pages, len(pointers))
    return PrpList(prp1, others[0] if others else 0, [], len(pointers))


def build_sgl(runs: Iterable[Run], *, segment_address: int) -> Sgl:
    """The SGL of the runs; neighbours that touch count as one run.

    `segment_address` is qword aligned, else ValueError; data may lie anywhere (a controller that
    needs it dword aligned says so in SGLS). A run longer than a descriptor's 32 bits is split.
    """
    descriptors = [piece for run in _checked(runs, alignment=1) for piece in _split(run)]
    segment = b"".join(_DESCRIPTOR.pack(d.address, d.length, DATA_BLOCK << 4) for d in descriptors)
    _check_address(segment_address, len(segment), alignment=8, what="SGL segment")
    if len(descriptors) == 1:
        return Sgl(descriptors, b"", segment)
    pointer = _DESCRIPTOR.pack(segment_address, len(segment), LAST_SEGMENT << 4)
    return Sgl(descriptors, segment, pointer)


def use_sgl(length: int, segments: int, *, threshold_bytes: int = 32 << 10) -> bool:
    """Whether Linux would describe `length` bytes in `segments` runs by an SGL, if it may choose.

    It does when the average run, rounded up, reaches the threshold (its parameter `sgl_threshold`;
    0 means never). Left out are two exceptions of nvme_map_data. Runs that a PRP list cannot
    express get an SGL whatever the average (since Linux 6.19; before, the block layer splits the
    I/O there). A single run gets PRP1 and PRP2 if these suffice, else an SGL, threshold or not.
    """
    if threshold_bytes == 0 or segments == 0:
        return False
    return -(-length // segments) >= threshold_bytes


def _checked(runs: Iterable[Run], *, alignment: int) -> list[Run]:
    merged = merge(runs)
    if not merged:
        raise ValueError("no bytes, so there is nothing for a data pointer to point to")
    for run in merged:
        _check_address(run.address, run.length, alignment=alignment, what="data")
    return merged


def _check_address(address: int, length: int, *, alignment: int, what: str) -> None:
    if address % alignment:
        raise ValueError(f"{what} at {address:#x} is not aligned to {alignment} bytes")
    if length < 0 or not 0 <= address <= (1 << 64) - length:
        raise ValueError(f"{what} at {address:#x}, {length} bytes, is outside 64-bit memory")


def _check_shape(runs: list[Run]) -> None:
    for run, following in itertools.pairwise(runs):
        if run.end % PAGE_BYTES or following.address % PAGE_BYTES:
            raise ValueError(
                f"the data jumps from {run.end:#x} to {following.address:#x}, inside a page: "
                "a PRP list cannot express it, an SGL can"
            )


def _list_pages(pointers: list[int], list_address: int) -> Iterator[bytes]:
    start = 0
    while len(pointers) - start > _ENTRIES_PER_PAGE:  # the page's last entry leads to the next page
        stop = start + _ENTRIES_PER_PAGE - 1
        list_address += PAGE_BYTES
        yield struct.pack(f"<{_ENTRIES_PER_PAGE}Q", *pointers[start:stop], list_address)
        start = stop
    rest = pointers[start:]
    yield struct.pack(f"<{len(rest)}Q", *rest).ljust(PAGE_BYTES, b"\0")


def _split(run: Run) -> Iterator[Run]:
    address, length = run.address, run.length
    while length > _DESCRIPTOR_LENGTH_MAX:
        yield Run(address, _SPLIT_BYTES)
        address += _SPLIT_BYTES
        length -= _SPLIT_BYTES
    yield Run(address, length)
