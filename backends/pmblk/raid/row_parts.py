"""Parts of rows with their bytes: what a read or a write of levels 4, 5 and 6 is cut into. Pure."""

from collections.abc import Sequence

import msgspec

from pmblk.raid.buffers import scratch
from pmblk.raid.plan import Piece, Segment

BLOCK_BYTES = 4096
"""What is read to fill up a write that is no whole block."""


class Part(msgspec.Struct, frozen=True):
    """A piece of a row with its bytes; `write` is the number of the write that it belongs to."""

    piece: Piece
    view: memoryview
    write: int


def within(part: Part | None, start: int, end: int) -> memoryview | None:
    """Those bytes of its chunk, if all of them are in the part."""
    if part is None or not part.piece.start <= start < end <= part.piece.end:
        return None
    return part.view[start - part.piece.start : end - part.piece.start]


def lay(layers: list[dict[int, list[Part]]], row: int, part: Part) -> None:
    """Into the last layer where it meets nothing, so that later writes come after earlier ones."""
    piece = part.piece
    start, end = piece.start & -BLOCK_BYTES, -(-piece.end // BLOCK_BYTES) * BLOCK_BYTES
    depth = 0
    for number, layer in enumerate(layers):
        for other in layer.get(row, ()):
            meets = (
                other.piece.index == piece.index
                and other.piece.start < end
                and start < -(-other.piece.end // BLOCK_BYTES) * BLOCK_BYTES
            )
            if meets:
                depth = number + 1
    if depth == len(layers):
        layers.append({})
    layers[depth].setdefault(row, []).append(part)


def bytes_of(parts: Sequence[Part], index: int, segment: Segment) -> memoryview:
    """What is new of a chunk in a segment; one part covers all of it, or several touch in it."""
    pieces = sorted(
        (part for part in parts if part.piece.index == index), key=lambda one: one.piece.start
    )
    found = [
        part.view[max(0, segment.start - part.piece.start) : segment.end - part.piece.start]
        for part in pieces
        if part.piece.start < segment.end and segment.start < part.piece.end
    ]
    if len(found) == 1:
        return found[0]
    whole, position = scratch(segment.length), 0
    for view in found:
        whole[position : position + len(view)] = view
        position += len(view)
    return whole
