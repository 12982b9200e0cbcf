"""What a sweep has found: counts, and the first few in words. Pure.

Counts are blocks of 4 KiB on one member.
"""

from collections.abc import Sequence

LINES_MAX = 20
BLOCK_BYTES = 4096


class Findings:
    """`mismatched`: redundancy that did not fit. `healed`: could not be read, and were made up and
    rewritten. `lost`: could neither be read nor made. `mended`: rewritten to make it fit.
    """

    def __init__(self) -> None:
        self.mismatched = self.healed = self.lost = self.mended = 0
        self._lines: list[str] = []
        self._more = 0

    def note(self, line: str) -> None:
        if len(self._lines) < LINES_MAX:
            self._lines.append(line)
        else:
            self._more += 1

    def lines(self) -> tuple[str, ...]:
        """The totals, then the first ones; nothing when there is nothing."""
        totals = [
            f"{count} {word}"
            for count, word in (
                (self.mismatched, "blocks do not fit"),
                (self.mended, "blocks made to fit"),
                (self.healed, "unreadable blocks made up for"),
                (self.lost, "blocks lost"),
            )
            if count
        ]
        if not totals:
            return ()
        more = [f"and {self._more} more"] if self._more else []
        return (", ".join(totals), *self._lines, *more)


def spans(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges: first, and the one behind the last."""
    found: list[tuple[int, int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1] = found[-1][0], block + 1
        else:
            found.append((block, block + 1))
    return found
