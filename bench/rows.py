"""What is measured, what it should reach, and the arithmetic on it. Pure: no I/O, no clock."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from pmblkd.compare.spread import Spread, spread

OURS = "pmblk"
PEER = "nbdkit"  # the targets are against this one
SERVERS = (OURS, PEER, "qemu-nbd")
CEILING = "ceiling"  # answers and does nothing else: what the client can take

QD1_RATIO_MIN = 1.0
BUSY_RATIO_MIN = 1.5
CPU_RATIO_MAX = 0.6
FIRST_IO_SECONDS_MAX = 1.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One load. `awake`: no CPU may sleep meanwhile (see awake.py)."""

    block_kib: int
    rw: str
    queue_depth: int
    awake: bool = False

    @property
    def name(self) -> str:
        """What --rows matches."""
        block = f"{self.block_kib // 1024}m" if self.block_kib >= 1024 else f"{self.block_kib}k"
        return f"{block}-{self.rw}-qd{self.queue_depth}" + ("-awake" if self.awake else "")

    @property
    def ratio_min(self) -> float:
        """The least throughput, as a multiple of nbdkit's, that the project wants."""
        return QD1_RATIO_MIN if self.queue_depth == 1 else BUSY_RATIO_MIN

    @property
    def servers(self) -> tuple[str, ...]:
        """At depth 1 the client waits for each reply: there is no client's limit to find."""
        return SERVERS if self.queue_depth == 1 else (*SERVERS, CEILING)

    @property
    def cpu_ratio_max(self) -> float | None:
        """The most CPU time per I/O, as a multiple of nbdkit's; None: no target here."""
        return CPU_RATIO_MAX if self.block_kib == 4 and self.queue_depth == 32 else None


def _rows() -> tuple[Row, ...]:
    small, large = ("randread", "randwrite"), ("read", "write")
    return (
        *(Row(block_kib=4, rw=rw, queue_depth=depth) for depth in (1, 32, 128) for rw in small),
        *(Row(block_kib=size, rw=rw, queue_depth=8) for size in (128, 1024) for rw in large),
        *(Row(block_kib=4, rw=rw, queue_depth=1, awake=True) for rw in small),
    )


ROWS = _rows()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of fio: `ios` in `io_seconds`, and the CPU seconds that server and fio spent.

    `client_seconds` have fio's own start in them. Shares are of one CPU.
    """

    ios: int
    io_seconds: float
    server_seconds: float
    client_seconds: float
    others_share: float

    @property
    def server_share(self) -> float:
        return self.server_seconds / self.io_seconds

    @property
    def client_share(self) -> float:
        return self.client_seconds / self.io_seconds

    @property
    def iops(self) -> float:
        return self.ios / self.io_seconds

    @property
    def cpu_us(self) -> float:
        """Server CPU microseconds per I/O, all threads."""
        return self.server_seconds * 1e6 / self.ios


Samples = Mapping[str, Sequence[Sample]]  # of each server, in the order of the rounds
Results = Mapping[Row, Samples]
Figure = Callable[[Sample], float]

iops: Figure = attrgetter("iops")
cpu_us: Figure = attrgetter("cpu_us")
server_share: Figure = attrgetter("server_share")
client_share: Figure = attrgetter("client_share")


def of_server(samples: Samples, server: str, figure: Figure) -> Spread:
    return spread([figure(sample) for sample in samples[server]])


def ratio(samples: Samples, peer: str, figure: Figure, *, of: str = OURS) -> Spread:
    """Ours / the peer's, a round at a time: what the machine did in a round cancels out."""
    pairs = zip(samples[of], samples[peer], strict=True)
    return spread([_divide(figure(ours), figure(theirs)) for ours, theirs in pairs])


def others(results: Results) -> Spread:
    """The share of one CPU that other programs had during the runs."""
    return spread(
        [
            sample.others_share
            for samples in results.values()
            for server in samples.values()
            for sample in server
        ]
    )


def _divide(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else math.inf  # no tick of CPU time in a very short run
