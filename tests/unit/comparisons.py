"""Made-up results of a comparison, for the tests of what is made of them."""

from collections.abc import Sequence

from pmblkd.compare.contenders import Contender, contenders
from pmblkd.compare.large_files import FILES_BYTES, large_file_contenders
from pmblkd.compare.matrix import BLOCKS_BYTES, ROWS, Row
from pmblkd.compare.results import IoFacts, LargeFileFacts, Results, Sample, Setup

SIZE = 1 << 30


def setup(**changes: object) -> Setup:
    facts = {
        "command": "pmblk compare config.toml",
        "date": "2026-01-01 12:00+00:00",
        "machine": "a processor, 2 CPUs, 4 GiB, Linux 6.1",
        "versions": ["pmblk 0.1.0", "fio 3.33"],
        "file_system": "tmpfs",
        "durability": "memory",
        "durability_reason": "tmpfs is memory",
        "file_bytes": SIZE,
        "size_bytes": SIZE // 64 * 63,
        "lba_bytes": 4096,
        "busy_poll_us": 30,
        "seconds": 1.0,
        "rounds": 3,
        **changes,
    }
    return Setup(**facts)  # type: ignore[arg-type]


def sample(row: Row, contender: Contender, number: int = 1, **changes: float) -> Sample:
    """A run of 10,000 I/Os in 1 s; the page cache copies."""
    transferred = 10_000 * row.block_bytes
    pages = transferred // 4096
    facts = {
        "ios": 10_000,
        "seconds": 1.0,
        "bytes_per_second": float(transferred),
        "latency_us_mean": 100.0,
        "latency_us_p50": 90.0,
        "latency_us_p99": 200.0,
        "latency_us_p999": 300.0,
        "server_seconds": 0.5,
        "client_seconds": 0.4,
        "others_share": 0.01,
        "commands": 10_000,
        "transferred_bytes": transferred,
        "bytes_copied": transferred if contender.kind == "page-cache" else 0,
        "descriptors": pages,
        "descriptor_bytes": pages * 16,
        "pins": pages,
        "prp_entries": pages,
        "sgl_descriptors": 10_000,
        "cache_hits": 0,
        "cache_misses": 0,
        "metadata_bytes": 16 << 20,
        "metadata_resident_bytes": 0,
        "metadata_device_bytes": 0,
        "build_seconds": 0.001,
        "pause_seconds": 0.0001,
        "flush_seconds": 0.0,
        **changes,
    }
    return Sample(row=row.name, contender=contender.name, round=number, **facts)  # type: ignore[arg-type]


def large_file(contender: Contender, file_bytes: int, **changes: object) -> LargeFileFacts:
    """A page table of 1/64, on the device where the name says so; an extent needs none."""
    on_device = "device" in contender.name
    table = 16 if contender.kind == "extent" else file_bytes // 64
    facts = {
        "reserve_bytes": table if on_device else 0,
        "metadata_bytes": table,
        "metadata_device_bytes": table if on_device else 0,
        "open_seconds": 0.002,
        "init_seconds": 0.001,
        "resident_bytes": 1 << 20,
        "peak_pool_bytes": 512 << 10 if contender.kind == "transient-page" else None,
        "ios": [
            IoFacts(
                block_bytes=block,
                descriptors=block // 4096,
                descriptor_bytes=block // 4096 * 16,
                prp_entries=block // 4096,
                sgl_descriptors=1,
            )
            for block in BLOCKS_BYTES
        ],
        **changes,
    }
    return LargeFileFacts(
        contender=contender.name,
        kind=contender.kind,
        file_bytes=file_bytes,
        **facts,  # type: ignore[arg-type]
    )


def results(
    *,
    rows: Sequence[Row] = ROWS,
    variants: bool = True,
    only: Sequence[str] = (),
    samples: Sequence[Sample] | None = None,
    large_files: Sequence[LargeFileFacts] | None = None,
    **setup_changes: object,
) -> Results:
    compared = contenders(SIZE, variants=variants, only=only)
    facts = setup(**setup_changes)
    made = [
        sample(row, one, number + 1, ios=10_000 + 100 * number + 1000 * index)
        for row in rows
        for index, one in enumerate(compared)
        for number in range(facts.rounds)
    ]
    opened = [
        large_file(one, size)
        for size in FILES_BYTES
        for one in large_file_contenders(only, variants=variants)
    ]
    return Results(
        setup=facts,
        contenders=compared,
        rows=list(rows),
        samples=list(made if samples is None else samples),
        large_files=list(opened if large_files is None else large_files),
    )
