"""Several runs of one thing as three figures. Pure. The benchmarks use it too."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    middle: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Median, least and most; of at least one value."""
    return Spread(median(values), min(values), max(values))
