"""What is measured on FUSE files, and what it should reach. Pure: no I/O, no clock."""

from collections.abc import Mapping
from dataclasses import dataclass

from bench.samples import Samples
from bench.targets import Target

RAW = "tmpfs"  # the file itself, without any server
FAST, AUTO, OFF = "fast", "auto", "off"  # pmblk's kernel engine, by the namespace's `dax`
PYFUSE3 = "pyfuse3"
QEMU, NBDFUSE = "qemu-storage-daemon", "nbdfuse"
CONTENDERS = (RAW, FAST, AUTO, OFF, PYFUSE3, QEMU, NBDFUSE)
IO_URING = "io_uring"
# A mapping of the others is one of copies in the page cache, or is refused.
MAPPERS = (RAW, FAST, AUTO)
ATTACHED = (RAW, FAST, AUTO, PYFUSE3)
FIRST_IO = (FAST, AUTO, PYFUSE3)  # from `pmblk attach` on

FAST_RATIO_MIN = 0.95
LOOP_RATIO_MIN = 0.85
MAPPED_RATIO_MIN = 0.95
QEMU_RATIO_MIN = 1.3
NBDFUSE_RATIO_MIN = 3.0
LARGE_BYTES_PER_SECOND_MIN = 4e9
CPU_US_MAX = 7.0
FIRST_IO_SECONDS_MAX = 0.5


@dataclass(frozen=True, kw_only=True)
class Row:
    """One load. `engine` is fio's; `on_loop`: on a loop device over the file."""

    engine: str
    block_kib: int
    rw: str
    queue_depth: int = 1
    on_loop: bool = False

    @property
    def name(self) -> str:
        """What --rows matches."""
        block = f"{self.block_kib // 1024}m" if self.block_kib >= 1024 else f"{self.block_kib}k"
        place = "loop-" if self.on_loop else ""
        return f"{place}{self.engine}-{block}-{self.rw}-qd{self.queue_depth}"

    @property
    def is_mapped(self) -> bool:
        """Loads and stores, which make no request."""
        return self.engine == "mmap"

    @property
    def is_small_and_busy(self) -> bool:
        """Where it counts what a request costs: a kernel has nothing else to do meanwhile."""
        return self.engine == "libaio" and self.block_kib == 4 and not self.on_loop

    @property
    def contenders(self) -> tuple[str, ...]:
        if self.on_loop:
            return ATTACHED
        return MAPPERS if self.is_mapped else CONTENDERS

    @property
    def targets(self) -> tuple[Target, ...]:
        if self.on_loop:
            return (Target(of=FAST, to=RAW, ratio_min=LOOP_RATIO_MIN),)
        if self.is_mapped:
            return tuple(
                Target(of=name, to=RAW, ratio_min=MAPPED_RATIO_MIN) for name in (FAST, AUTO)
            )
        fast = Target(of=FAST, to=RAW, ratio_min=FAST_RATIO_MIN)
        if not self.is_small_and_busy:
            return (fast,)
        return (
            fast,
            Target(of=AUTO, to=QEMU, ratio_min=QEMU_RATIO_MIN),
            Target(of=AUTO, to=NBDFUSE, ratio_min=NBDFUSE_RATIO_MIN),
        )

    @property
    def bytes_per_second_min(self) -> float | None:
        """The least that AUTO should move; None: no target here."""
        return LARGE_BYTES_PER_SECOND_MIN if self.block_kib >= 1024 else None

    @property
    def cpu_us_max(self) -> float | None:
        """The most CPU time that AUTO should take for a request; None: no target here."""
        return CPU_US_MAX if self.is_small_and_busy else None


def _rows() -> tuple[Row, ...]:
    small, large = ("randread", "randwrite"), ("read", "write")
    return (
        *(Row(engine="psync", block_kib=4, rw=rw) for rw in large),
        *(Row(engine="libaio", block_kib=4, rw=rw, queue_depth=32) for rw in small),
        *(Row(engine=IO_URING, block_kib=4, rw=rw, queue_depth=32) for rw in small),
        *(Row(engine="libaio", block_kib=128, rw=rw, queue_depth=8) for rw in large),
        *(Row(engine="libaio", block_kib=1024, rw=rw, queue_depth=4) for rw in large),
        *(Row(engine="mmap", block_kib=4, rw=rw) for rw in small),
        *(Row(engine="libaio", block_kib=4, rw=rw, queue_depth=32, on_loop=True) for rw in small),
    )


ROWS = _rows()

Results = Mapping[Row, Samples]
