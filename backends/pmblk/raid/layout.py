"""Which chunk lies on which member, and the way back: md's placement, level by level. Pure.

Two shapes cover all levels. Where there are copies (0, 1, 10), a chunk of the array is one or more
chunks of members: `copies` and `chunk_at`. Where there is parity (4, 5, 6), a stripe is a row of
chunks with roles: `Stripes`. Chunks are counted from 0, on members from the start of the data area.

Sources: `raid5_compute_sector` and `raid6_idx_to_slot` in Linux's drivers/md/raid5.c,
`__raid10_find_phys` in raid10.c; md(4) for the names.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import msgspec

from pmblk.raid.geometry import Geometry

NONE = -1


class Place(NamedTuple):
    """A chunk of a member."""

    slot: int
    chunk: int


# ---- copies: levels 0, 1 and 10


def copies(geometry: Geometry, chunk: int) -> list[Place]:
    """Where a chunk of the array lies, every copy of it; the first is read when all are well."""
    assert 0 <= chunk < geometry.chunks
    if geometry.level == 0:
        return [Place(chunk % geometry.members, chunk // geometry.members)]
    if geometry.level == 1:
        return [Place(slot, chunk) for slot in range(geometry.members)]
    assert geometry.level == 10
    return _near(geometry, chunk) if geometry.layout == "near" else _far(geometry, chunk)


def _near(geometry: Geometry, chunk: int) -> list[Place]:
    """Copies side by side, in the same row or running on into the next."""
    first = chunk * geometry.copies
    places = (divmod(first + copy, geometry.members) for copy in range(geometry.copies))
    return [Place(slot, row) for row, slot in places]


def _far(geometry: Geometry, chunk: int) -> list[Place]:
    """Rows as at level 0; each further copy is a slot on, and a row or a section further down."""
    row, slot = divmod(chunk, geometry.members)
    if geometry.layout == "offset":
        row, step = row * geometry.copies, 1
    else:
        step = _far_section(geometry)
    return [
        Place((slot + copy) % geometry.members, row + copy * step)
        for copy in range(geometry.copies)
    ]


def _far_section(geometry: Geometry) -> int:
    """Chunks of a member in each of its sections of a far layout."""
    return geometry.member_chunks // geometry.copies


def chunk_at(geometry: Geometry, place: Place) -> int | None:
    """Which chunk of the array lies there; None: nothing does."""
    slot, row = place
    members = geometry.members
    if not 0 <= row < geometry.member_chunks:
        return None
    if geometry.level == 1:
        return row
    if geometry.level == 0:
        chunk = row * members + slot
    elif geometry.layout == "near":
        chunk = (row * members + slot) // geometry.copies
    else:
        per = geometry.copies if geometry.layout == "offset" else _far_section(geometry)
        if geometry.layout == "offset":
            row, copy = divmod(row, per)
        else:
            copy, row = divmod(row, per)
            if copy >= geometry.copies:
                return None
        chunk = row * members + (slot - copy) % members
    return chunk if chunk < geometry.chunks else None


def rows_of(geometry: Geometry, chunk: int, count: int) -> list[tuple[int, int]]:
    """Where chunks of the array lie on members: first chunk and number, copy by copy.

    Not all of what is named has to be theirs.
    """
    assert 0 < count <= geometry.chunks - chunk
    if geometry.parities:
        first, last = chunk // geometry.data_members, (chunk + count - 1) // geometry.data_members
        return [(first, last - first + 1)]
    # Copy by copy, the chunks of the array lie in rows that only go up.
    ends = zip(copies(geometry, chunk), copies(geometry, chunk + count - 1), strict=True)
    return [(start.chunk, end.chunk - start.chunk + 1) for start, end in ends]


def survives(geometry: Geometry, missing: Collection[int]) -> bool:
    """Whether every block of the array can still be had without the members in these slots."""
    if len(missing) <= geometry.redundancy:
        return True
    if geometry.level != 10:
        return False
    # Which slots hold a chunk comes round again after as many chunks as there are members.
    return all(
        any(slot not in missing for slot, _ in copies(geometry, chunk))
        for chunk in range(min(geometry.chunks, geometry.members))
    )


# ---- parity: levels 4, 5 and 6


class Stripe(msgspec.Struct, frozen=True):
    """The roles of the slots in one row.

    `data` are the slots by the number of the data chunk in the stripe; `p` and `q` are slots, or
    `NONE`. `powers` are by the same number: Q is the sum of 2**power times the chunk.
    """

    data: tuple[int, ...]
    p: int
    q: int
    powers: tuple[int, ...]

    def role(self, slot: int) -> int:
        """The data chunk's number that lies in the slot; `NONE`: parity does."""
        return self.data.index(slot) if slot in self.data else NONE


class Stripes:
    """The rows of an array with parity. They repeat after as many as there are members."""

    def __init__(self, geometry: Geometry) -> None:
        assert geometry.parities
        self._rows = [_stripe(geometry, row) for row in range(geometry.members)]

    def __getitem__(self, row: int) -> Stripe:
        return self._rows[row % len(self._rows)]


def _stripe(geometry: Geometry, row: int) -> Stripe:
    p = _parity_slot(geometry, row)
    q = NONE if geometry.parities < 2 else (p + 1) % geometry.members
    data = _data_slots(geometry, p, q)
    return Stripe(data, p, q, _powers(data, q, geometry.members))


def _parity_slot(geometry: Geometry, row: int) -> int:
    members, layout = geometry.members, geometry.layout
    if layout == "parity-first":
        return 0
    if geometry.level == 4 or layout == "parity-last":
        return geometry.data_members
    turn = row % members
    return turn if layout.startswith("right") else members - 1 - turn


def _data_slots(geometry: Geometry, p: int, q: int) -> tuple[int, ...]:
    """Symmetric layouts go on behind the parity and wrap around; the others count from slot 0."""
    members = geometry.members
    if geometry.layout.endswith("-symmetric"):
        behind = p + geometry.parities
        return tuple((behind + chunk) % members for chunk in range(geometry.data_members))
    return tuple(slot for slot in range(members) if slot not in (p, q))


def _powers(data: Sequence[int], q: int, members: int) -> tuple[int, ...]:
    """md counts the powers from the slot behind Q on, whatever the order of the data."""
    if q == NONE:
        return (0,) * len(data)
    order = sorted(data, key=lambda slot: (slot - q - 1) % members)
    return tuple(order.index(slot) for slot in data)
