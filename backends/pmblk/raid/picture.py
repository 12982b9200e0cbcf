"""Where things lie, drawn as text: a row of chunks a line, a slot a column. Pure.

    left-symmetric
        0   1   2   3
    0   D0  D1  D2  P
    1   D4  D5  P   D3

D and the number of a chunk of the array; P and Q are the parity of the row; a dot is a chunk that
is not used.
"""

from collections.abc import Sequence

from pmblk.raid.geometry import Geometry
from pmblk.raid.layout import Place, Stripes, chunk_at

UNUSED = "."
GAP = 2  # columns between two cells
WIDE_GAP = 4  # between two pictures


def picture(geometry: Geometry, *, rows_max: int | None = None) -> list[str]:
    """The first rows of the members' data areas, below the numbers of the slots.

    Lines end without blanks. A picture of more rows than there are has those that there are.
    """
    rows = geometry.member_chunks
    if rows_max is not None:
        rows = min(rows, rows_max)
    cells = [["", *map(str, range(geometry.members))]]
    cells += [[str(row), *row_of(geometry, row)] for row in range(rows)]
    width = max(len(cell) for line in cells for cell in line) + GAP
    return ["".join(cell.ljust(width) for cell in line).rstrip() for line in cells]


def row_of(geometry: Geometry, row: int) -> list[str]:
    """What lies in that row, by slot."""
    if not geometry.parities:
        chunks = (chunk_at(geometry, Place(slot, row)) for slot in range(geometry.members))
        return [UNUSED if chunk is None else f"D{chunk}" for chunk in chunks]
    stripe = Stripes(geometry)[row]
    cells = {stripe.p: "P", stripe.q: "Q"}
    for index, slot in enumerate(stripe.data):
        cells[slot] = f"D{row * geometry.data_members + index}"
    return [cells[slot] for slot in range(geometry.members)]


def beside(pictures: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Pictures with their titles above them, from left to right."""
    columns = [[title, *lines] for title, lines in pictures]
    height = max(map(len, columns))
    padded = [[*lines, *[""] * (height - len(lines))] for lines in columns]
    widths = [max(map(len, lines)) + WIDE_GAP for lines in padded]
    return [
        "".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in zip(*padded, strict=True)
    ]
