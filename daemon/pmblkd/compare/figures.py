"""Figures of a run: how each follows from a sample, its unit, and how it is written. Pure.

What is "per I/O" is per block of the row's size that the engine transferred, not per request of
the client: a front end may cut requests, and fio may end between two of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pmblkd.compare.matrix import Row
from pmblkd.compare.results import Sample
from pmblkd.compare.spread import Spread, spread


@dataclass(frozen=True)
class Figure:
    """One figure. `of` takes the sample and the row that it is of."""

    title: str
    unit: str
    of: Callable[[Sample, Row], float]

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def spread(self, samples: Sequence[Sample], row: Row) -> Spread:
        return spread([self.of(sample, row) for sample in samples])


def _blocks(sample: Sample, row: Row) -> float:
    """How many blocks of the row's size were transferred; a run without any is an error of fio."""
    return max(1.0, sample.transferred_bytes / row.block_bytes)


IOPS = Figure("IOPS", "I/O per s", lambda sample, _: sample.ios / sample.seconds)
BANDWIDTH = Figure("Bandwidth", "MB/s", lambda sample, _: sample.bytes_per_second / 1e6)
P50 = Figure("p50", "µs", lambda sample, _: sample.latency_us_p50)
P99 = Figure("p99", "µs", lambda sample, _: sample.latency_us_p99)
P999 = Figure("p99.9", "µs", lambda sample, _: sample.latency_us_p999)
CPU = Figure("Server CPU per I/O", "µs", lambda sample, _: sample.server_seconds * 1e6 / sample.ios)
COPIED = Figure(
    "Bytes copied per byte",
    "",
    lambda sample, _: sample.bytes_copied / max(1, sample.transferred_bytes),
)
DESCRIPTORS = Figure(
    "Descriptors per I/O", "", lambda sample, row: sample.descriptors / _blocks(sample, row)
)
DESCRIPTOR_BYTES = Figure(
    "Descriptor bytes per I/O",
    "B",
    lambda sample, row: sample.descriptor_bytes / _blocks(sample, row),
)
PINS = Figure("Pins per I/O", "", lambda sample, row: sample.pins / _blocks(sample, row))
PRPS = Figure(
    "PRP entries per I/O", "", lambda sample, row: sample.prp_entries / _blocks(sample, row)
)
SGLS = Figure(
    "SGL descriptors per I/O",
    "",
    lambda sample, row: sample.sgl_descriptors / _blocks(sample, row),
)
COMMANDS = Figure(
    "Commands per I/O", "", lambda sample, row: sample.commands / _blocks(sample, row)
)

FLUSH = Figure("Flush after it", "ms", lambda sample, _: sample.flush_seconds * 1e3)

SPEED = (IOPS, BANDWIDTH, P50, P99, P999, CPU)
COST = (COPIED, DESCRIPTORS, DESCRIPTOR_BYTES, PINS, PRPS, SGLS, COMMANDS)


# ---- how they are written


def digits(value: float) -> str:
    """Three of them, and none that is not there: 0, 0.0125, 1.5, 31.2, 4096, 163,000."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    places = 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:.{places}f}".rstrip("0").rstrip(".")
    return text if text not in ("0", "-0") else f"{value:.1e}"


def fixed(value: float) -> str:
    """Three digits for a measured value, which nobody knows better: 5.00, 31.0, 79,700."""
    if value == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{min(max(places, 0), 2)}f}"


def with_range(values: Spread) -> str:
    """5.25 (5.10 to 5.40)."""
    return f"{fixed(values.middle)} ({fixed(values.least)} to {fixed(values.most)})"


def seconds_text(seconds: float) -> str:
    """In the unit that people use: 340 µs, 2.5 ms, 3.1 s."""
    if seconds >= 1:
        return f"{fixed(seconds)} s"
    return f"{fixed(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{fixed(seconds * 1e6)} µs"


def exact_size(size_bytes: int) -> str:
    """Like `format_size`, with as many decimals as it takes for round sizes: 6.25 GiB, 12.5 MiB."""
    value, names = float(size_bytes), iter(("B", "KiB", "MiB", "GiB", "TiB", "PiB"))
    name = next(names)
    while value >= 1024:
        value, name = value / 1024, next(names)
    return f"{value:.2f}".rstrip("0").rstrip(".") + f" {name}"
