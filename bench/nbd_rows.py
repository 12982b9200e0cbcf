"""What is measured over NBD, and what it should reach. Pure: no I/O, no clock."""

from collections.abc import Mapping
from dataclasses import dataclass

from bench.samples import Samples

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

Results = Mapping[Row, Samples]
