"""What a comparison found out: the types of `results.json`, and nothing that is made of them.

Sizes are bytes, times are in the unit that the name ends with. Every run of fio is kept. A field
that is added is no break; one that changes raises `VERSION`.
"""

from pathlib import Path

import msgspec

from pmblk import PmblkError
from pmblkd.compare.contenders import Contender
from pmblkd.compare.matrix import Row

VERSION = 1


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A record; JSON objects have its fields as keys."""


class Setup(Table, frozen=True):
    """What was compared, where and how.

    `loop_refusal`: why there are no rows of a loop device. `left_out`: contenders that could not
    be had here, and why.
    """

    command: str
    date: str
    machine: str
    versions: list[str]
    file_system: str
    durability: str
    durability_reason: str
    file_bytes: int
    size_bytes: int
    lba_bytes: int
    busy_poll_us: int
    seconds: float
    rounds: int
    loop_refusal: str = ""
    left_out: list[str] = []


class Sample(Table, frozen=True):
    """One run of fio against one contender.

    Latency is the client's, CPU time is the daemon's (all its threads, user and system). The
    counters are the engine's, from before the run to after it. CPU time and counters have the flush
    in them that follows a write; the rate and the latencies do not.
    """

    row: str
    contender: str
    round: int
    ios: int
    seconds: float
    bytes_per_second: float
    latency_us_mean: float
    latency_us_p50: float
    latency_us_p99: float
    latency_us_p999: float
    server_seconds: float
    client_seconds: float
    others_share: float  # of one CPU: what neither the daemon nor fio used
    commands: int  # that the engine carried out
    transferred_bytes: int  # that they read or wrote
    bytes_copied: int
    descriptors: int
    descriptor_bytes: int
    pins: int
    prp_entries: int
    sgl_descriptors: int
    cache_hits: int
    cache_misses: int
    metadata_bytes: int
    metadata_resident_bytes: int
    metadata_device_bytes: int
    build_seconds: float
    pause_seconds: float
    flush_seconds: float = 0.0  # after a write, for what the representation had kept back


class IoFacts(Table, frozen=True):
    """What one read of `block_bytes` takes, in the representation's words and in NVMe's two."""

    block_bytes: int
    descriptors: int
    descriptor_bytes: int
    prp_entries: int
    sgl_descriptors: int


class LargeFileFacts(Table, frozen=True):
    """A representation on a sparse file of `file_bytes`, opened in a fresh process.

    `skipped` says why there are no figures. `reserve_bytes` are what the file keeps for a page
    table, so that the device is `file_bytes - reserve_bytes` long. `open_seconds` are for the file
    and the representation, `init_seconds` for the representation alone, and `resident_bytes` are
    the memory by which the process has grown. `peak_pool_bytes`: structs in use with 32 reads of
    1 MiB held at once; None for kinds without a pool.
    """

    contender: str
    kind: str
    file_bytes: int
    skipped: str = ""
    reserve_bytes: int = 0
    metadata_bytes: int = 0
    metadata_resident_bytes: int = 0
    metadata_device_bytes: int = 0
    open_seconds: float = 0.0
    init_seconds: float = 0.0
    resident_bytes: int = 0
    peak_pool_bytes: int | None = None
    ios: list[IoFacts] = []

    @property
    def share(self) -> float:
        """Of the file: what its page table takes away from it, or what it takes of DRAM."""
        return (self.reserve_bytes or self.metadata_bytes) / self.file_bytes

    def io(self, block_bytes: int) -> IoFacts:
        return next(io for io in self.ios if io.block_bytes == block_bytes)


class Results(Table, frozen=True):
    setup: Setup
    contenders: list[Contender]
    rows: list[Row]
    samples: list[Sample]
    large_files: list[LargeFileFacts] = msgspec.field(name="devices")  # what a reader calls them
    version: int = VERSION

    def of(self, row: Row, contender: Contender) -> list[Sample]:
        """The runs of one row and one contender, in the order of the rounds."""
        wanted = row.name, contender.name
        return [sample for sample in self.samples if (sample.row, sample.contender) == wanted]

    def of_path(self, path: str) -> list[Row]:
        return [row for row in self.rows if row.path == path]


def encode(results: Results) -> bytes:
    return msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"


class _Header(msgspec.Struct):
    version: int


def load(file: Path) -> Results:
    """The results in a file of this version. Raises PmblkError."""
    try:
        data = file.read_bytes()
        found = msgspec.json.decode(data, type=_Header).version
        if found != VERSION:
            raise PmblkError(
                f"{file} is of version {found}, this program knows {VERSION}",
                hint="compare anew, or read it with the program that wrote it",
            )
        return msgspec.json.decode(data, type=Results)
    except OSError as error:
        raise PmblkError(f"cannot read {file}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise PmblkError(f"{file} holds no results: {error}") from error
