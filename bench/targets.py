"""Targets of a benchmark, and their lines in its report: load, target, what was reached. Pure."""

from dataclasses import dataclass

from bench.report import Load, rate, two_places, verdict, with_spread
from bench.samples import Samples, iops, of_server, ratio


@dataclass(frozen=True)
class Target:
    """`of` reaches at least `ratio_min` times the throughput of `to`."""

    of: str
    to: str
    ratio_min: float


def ratio_cells(title: str, samples: Samples, target: Target) -> list[str]:
    reached = ratio(samples, iops, of=target.of, to=target.to)
    return [
        title,
        f"{target.of} ≥ {target.ratio_min:g} x {target.to}",
        with_spread(reached, two_places),
        verdict(reached.middle >= target.ratio_min),
    ]


def bytes_cells(title: str, load: Load, samples: Samples, *, of: str, least: float) -> list[str]:
    """`least`: bytes a second."""
    reached = of_server(samples, of, iops)
    return [
        title,
        f"{of} ≥ {least / 1e9:g} GB/s",
        with_spread(reached, rate(load)),
        verdict(reached.middle * load.block_kib * 1024 >= least),
    ]
