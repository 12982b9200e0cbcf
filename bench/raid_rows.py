"""What is measured on arrays, and what it should reach. Pure: no I/O, no clock."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bench.samples import Samples
from bench.targets import Target

RAID0, RAID5, DEGRADED = "raid0 of 5", "raid5 of 4 + 1", "raid5, one missing"
CONTENDERS = (RAID0, RAID5, DEGRADED)
SWEEPS = ("rebuild", "check")
WRITE_RATIO_MIN = 0.60
DEGRADED_RATIO_MIN = 0.50
SWEEP_BYTES_PER_SECOND_MIN = 1e9

Work = Literal["read", "write", "randread", "randwrite", "rebuild", "check"]


@dataclass(frozen=True)
class Cost:
    """Bytes that the members read and write, for each byte of the user's."""

    read: float
    written: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One load. `batch`: how many are handed over together, as by a client of that queue depth.

    `cost_max`: what a byte may cost the members; None: no target here.
    """

    work: Work
    block_kib: int
    contenders: tuple[str, ...]
    batch: int = 1
    targets: tuple[Target, ...] = ()
    cost_max: Cost | None = None

    @property
    def name(self) -> str:
        """What --rows matches."""
        if self.is_sweep:
            return self.work
        block = f"{self.block_kib // 1024}m" if self.block_kib >= 1024 else f"{self.block_kib}k"
        return f"{block}-{self.work}-qd{self.batch}"

    @property
    def is_sweep(self) -> bool:
        """All of an array, or of a member, again and again."""
        return self.work in SWEEPS

    @property
    def bytes_per_second_min(self) -> float | None:
        """The least that RAID5 should move; None: no target here."""
        return SWEEP_BYTES_PER_SECOND_MIN if self.is_sweep else None


def _rows() -> tuple[Row, ...]:
    written = Target(of=RAID5, to=RAID0, ratio_min=WRITE_RATIO_MIN)
    degraded = Target(of=DEGRADED, to=RAID5, ratio_min=DEGRADED_RATIO_MIN)
    # 4 + 1: the old block and the old parity are read, the new ones written.
    modify = Cost(2, 2)
    return (
        Row(work="write", block_kib=1024, contenders=(RAID0, RAID5), targets=(written,)),
        Row(work="read", block_kib=1024, contenders=CONTENDERS, targets=(degraded,)),
        Row(work="randread", block_kib=4, contenders=CONTENDERS),
        *(
            Row(work="randwrite", block_kib=4, batch=n, contenders=(RAID0, RAID5), cost_max=modify)
            for n in (1, 32)
        ),
        Row(work="rebuild", block_kib=1024, contenders=(RAID5,)),
        Row(work="check", block_kib=1024, contenders=(RAID5,)),
    )


ROWS = _rows()

Results = Mapping[Row, Samples]
Costs = Mapping[Row, Mapping[str, Cost]]
