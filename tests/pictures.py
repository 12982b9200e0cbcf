"""The pictures of layouts in docs/raid.md, drawn by the code that places the data.

    python -m tests.pictures

A comment says what the block of code behind it shows: some arrays, from left to right.

    <!-- picture: 10 near 4 x2 rows=3 | 10 far 4 x2 rows=4 -->

That is level, layout (a dash where there is none), members, copies (level 10), rows of the members.
"""

import re
from pathlib import Path

from pmblk.raid.geometry import CHUNK_BYTES_MIN, Geometry
from pmblk.raid.picture import beside, picture

DOCUMENT = Path(__file__).parents[1] / "docs/raid.md"
BLOCK = re.compile(r"(<!-- picture: (.+?) -->\n\n```\n).*?(^```$)", re.M | re.S)
WORDS = re.compile(r"(\d+) ([\w-]+) (\d+)(?: x(\d+))? rows=(\d+)")


def redrawn(text: str) -> str:
    """The document with the pictures as they have to be."""
    return BLOCK.sub(lambda found: found[1] + drawn(found[2]) + found[3], text)


def drawn(words: str) -> str:
    """The picture that a comment asks for. Raises ValueError for one that nobody can draw."""
    geometries = [shape(one) for one in words.split(" | ")]
    columns = [(title(geometry), picture(geometry)) for geometry in geometries]
    return "".join(f"{line}\n" for line in beside(columns))


def shape(words: str) -> Geometry:
    found = WORDS.fullmatch(words.strip())
    if found is None:
        raise ValueError(f"{words!r} is no shape")
    level, layout, members, copies, rows = found.groups()
    return Geometry(
        level=int(level),  # type: ignore[arg-type]  # Geometry checks both
        layout="" if layout == "-" else layout,  # type: ignore[arg-type]
        members=int(members),
        copies=int(copies or 2),
        member_bytes=int(rows) * CHUNK_BYTES_MIN,
        chunk_bytes=CHUNK_BYTES_MIN,
    )


def title(geometry: Geometry) -> str:
    copies = f", {geometry.copies} copies" if geometry.level == 10 else ""
    return f"{geometry.layout or f'level {geometry.level}'}{copies}"


def shown(text: str) -> list[Geometry]:
    """Everything that a picture of the document shows."""
    return [shape(one) for found in BLOCK.finditer(text) for one in found[2].split(" | ")]


if __name__ == "__main__":
    DOCUMENT.write_text(redrawn(DOCUMENT.read_text()))
