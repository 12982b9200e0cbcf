"""One representation on one sparse file, in a process that has done nothing else.

    python -m pmblkd.compare.large_file_child '{"file": ..., "kind": ..., "options": {...}, ...}'

Writes the facts as JSON. A process of its own for each, because resident memory does not shrink
back, and because the first to import numpy would pay for all.
"""

import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from pmblk import Namespace, PmblkError
from pmblk.description import describe
from pmblk.media import open_media
from pmblk.media.syscalls import available_memory_bytes
from pmblk.pages import PAGE_BYTES
from pmblk.representations import Lease, Representation, make, needs_reserve, parse_options
from pmblk.representations.page_table import STRUCT_BYTES
from pmblk.units import format_size
from pmblkd.compare.matrix import BLOCKS_BYTES
from pmblkd.compare.results import IoFacts, LargeFileFacts

HELD_IOS, HELD_BYTES = 32, 1 << 20
MEMORY_SHARE = 2  # an eager table may take half of what is free


class Order(msgspec.Struct):
    """What is to be opened; `name` is the contender's."""

    file: str
    name: str
    kind: str
    options: dict[str, Any]


def facts(order: Order) -> LargeFileFacts:
    """What there is to know; where the representation is not to be had, why."""
    file = Path(order.file)
    options = parse_options(order.kind, order.options)
    known = LargeFileFacts(contender=order.name, kind=order.kind, file_bytes=file.stat().st_size)
    if reason := _too_large(known.file_bytes, options):
        return msgspec.structs.replace(known, skipped=reason)
    resident = _resident_bytes()
    begun = time.perf_counter()
    try:
        media = open_media(file, lba_bytes=PAGE_BYTES, with_reserve=needs_reserve(options))
        opened = time.perf_counter()
        representation = make(order.kind, media, options)
    except PmblkError as error:
        return msgspec.structs.replace(known, skipped=error.message)
    made = time.perf_counter()
    resident = _resident_bytes() - resident
    counters = representation.counters()
    media.reserve(0, HELD_IOS * HELD_BYTES)
    return msgspec.structs.replace(
        known,
        reserve_bytes=media.reserve_bytes,
        metadata_bytes=counters.metadata_bytes,
        metadata_resident_bytes=counters.metadata_resident_bytes,
        metadata_device_bytes=counters.metadata_device_bytes,
        open_seconds=made - begun,
        init_seconds=made - opened,
        resident_bytes=max(0, resident),
        ios=_ios(Namespace("large", media, representation, lba_bytes=PAGE_BYTES)),
        peak_pool_bytes=_peak_pool_bytes(representation),
    )


def _too_large(file_bytes: int, options: Representation.Options) -> str:
    """Why an eager page table is not even tried: it would push everybody else out of memory."""
    needed = file_bytes // PAGE_BYTES * STRUCT_BYTES
    available = available_memory_bytes()
    if getattr(options, "init", "lazy") != "eager" or needed * MEMORY_SHARE <= available:
        return ""
    return f"it takes {format_size(needed)}, of {format_size(available)} that are free"


def _ios(namespace: Namespace) -> list[IoFacts]:
    found = []
    for block_bytes in BLOCKS_BYTES:
        seen = describe(namespace, 0, block_bytes)
        found.append(
            IoFacts(
                block_bytes=block_bytes,
                descriptors=seen.descriptors,
                descriptor_bytes=seen.descriptor_bytes,
                prp_entries=seen.prps.entries if seen.prps else 0,
                sgl_descriptors=len(seen.sgl.descriptors) if seen.sgl else 0,
            )
        )
    return found


def _peak_pool_bytes(representation: Representation) -> int | None:
    """Structs in use while as many reads are held as a deep queue has; None without a pool."""
    if representation.kind != "transient-page":
        return None
    leases: list[Lease] = []
    for index in range(HELD_IOS):
        lease = representation.hold(index * HELD_BYTES, HELD_BYTES)
        assert lease is not None, "the default pool has room for them"
        leases.append(lease)
    representation.release(leases)
    return representation.counters().peak_pins * STRUCT_BYTES


def _resident_bytes() -> int:
    """Of this process, all kinds of memory (proc(5), smaps_rollup)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has an Rss line")


if __name__ == "__main__":
    order = msgspec.json.decode(sys.argv[1], type=Order)
    sys.stdout.buffer.write(msgspec.json.encode(facts(order)))
