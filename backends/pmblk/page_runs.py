"""Sorted numbers of pages or frames as runs of neighbours. Pure.

Plain Python for few numbers and numpy for many, whose calls cost 0.8 us whatever their length.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pmblk.pages import PAGE_BYTES

SCALAR_PAGES = 16  # up to so many, plain ints are faster (Python 3.11)


def runs(numbers: Any) -> list[tuple[int, int]]:
    """The numbers, a sequence or an array, as (first, last) of what follows one on the other."""
    if len(numbers) > SCALAR_PAGES:
        array = np.asarray(numbers)
        borders = np.flatnonzero(np.diff(array) != 1)
        firsts = array[np.concatenate(([0], borders + 1))].tolist()
        lasts = array[np.concatenate((borders, [len(array) - 1]))].tolist()
        return list(zip(firsts, lasts, strict=True))
    return _few_runs(numbers)


def _few_runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in map(int, numbers):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def extents(numbers: Any) -> list[tuple[int, int]]:
    """Sorted page numbers as byte ranges (offset, length), neighbours joined."""
    return [(first * PAGE_BYTES, (last - first + 1) * PAGE_BYTES) for first, last in runs(numbers)]
