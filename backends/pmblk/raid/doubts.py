"""Which rows have parity that may not fit their data, until a resync has been there. Pure."""

import bisect
from collections.abc import Iterable


class Doubts:
    """Of an array with stripes of so many bytes."""

    def __init__(self, stripe_bytes: int) -> None:
        self._stripe_bytes = stripe_bytes
        self._runs: list[tuple[int, int]] = []  # first row, and how far all up to there go

    def set(self, ranges: Iterable[tuple[int, int]]) -> None:
        """These ranges of the array (offset, length), and no others."""
        self._runs, end = [], 0
        for offset, length in sorted(ranges):
            end = max(end, -(-(offset + length) // self._stripe_bytes))
            self._runs.append((offset // self._stripe_bytes, end))

    def __contains__(self, row: int) -> bool:
        before = bisect.bisect_right(self._runs, row, key=lambda one: one[0])
        return before > 0 and row < self._runs[before - 1][1]
