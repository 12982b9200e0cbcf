"""What a write to a stripe has to read, compute and write: the fewest bytes, decided here. Pure.

Writes that fall into one row are planned together, so neighbours of a batch become a full stripe.
A row is cut into segments over which the same chunks are written. In each one the new parity is
one sum over what was read before and what is new, whatever the way:

- *full*: every data chunk is new, nothing is read;
- *reconstruct*: the other data chunks are read, and parity is made anew;
- *modify*: the old data and the old parity are read, and the difference is added.

The one that reads fewer bytes is taken, reconstruct where they read as many (as md does). Parity
that may not fit its data (no resync has been there since an unclean stop, or ever) would not fit
after *modify* either: there it is made anew, if that can be done. Members that are missing are
neither read nor written; what a sum needs of them is made from all the others. Those that are only
unreadable here are still written: that is what heals them.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import msgspec

from pmblk.raid import galois
from pmblk.raid.layout import NONE, Stripe
from pmblk.raid.recovery import Recipe, TooManyLost, recipe


class Piece(msgspec.Struct, frozen=True, order=True, gc=False):
    """A part of a data chunk that is written: bytes `start` to `end` of the chunk."""

    index: int  # of the data chunk in its stripe
    start: int
    end: int


class Segment(msgspec.Struct, frozen=True):
    """Bytes `start` to `end` of every chunk of a row.

    `reads` are slots whose old bytes are needed, `written` the indices of the new data chunks, and
    `parity[slot]` the coefficients of its new bytes: one for each of `reads`, then one for each of
    `written`. `stores` are the slots that new data go to: those of `written` that are not missing.
    """

    start: int
    end: int
    way: str
    written: tuple[int, ...]
    reads: tuple[int, ...]
    stores: tuple[int, ...]
    parity: Mapping[int, tuple[int, ...]]

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def read_bytes(self) -> int:
        return self.length * len(self.reads)

    @property
    def write_bytes(self) -> int:
        return self.length * (len(self.stores) + len(self.parity))


def cut(
    offset: int, length: int, *, chunk_bytes: int, data_members: int
) -> Iterator[tuple[int, Piece]]:
    """A range of the array as (row, piece), in order."""
    end = offset + length
    while offset < end:
        chunk, start = divmod(offset, chunk_bytes)
        row, index = divmod(chunk, data_members)
        part = min(chunk_bytes - start, end - offset)
        yield row, Piece(index, start, start + part)
        offset += part


def plan(
    stripe: Stripe,
    pieces: Iterable[Piece],
    *,
    missing: Collection[int] = (),
    unreadable: Collection[int] = (),
    trust_parity: bool = True,
) -> list[Segment]:
    """The segments of one row, in order; pieces of one chunk do not overlap.

    `trust_parity`: it fits the data.

    Raises TooManyLost when the row cannot be kept whole: more is missing than its redundancy, or
    what is needed cannot be read.
    """
    parities = 1 + (stripe.q != NONE)
    lost = sum(slot in missing for slot in (*stripe.data, stripe.p, stripe.q))
    if lost > parities:
        raise TooManyLost(f"{lost} chunks of {len(stripe.data) + parities} are lost")
    blind = {*missing, *unreadable}
    return [
        _segment(stripe, start, end, written, missing, blind, trust_parity)
        for start, end, written in _rows(pieces)
    ]


def _rows(pieces: Iterable[Piece]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Start, end and the chunks that are written there, wherever any is."""
    edges: dict[int, list[tuple[int, bool]]] = {}
    for piece in pieces:
        assert piece.start < piece.end
        edges.setdefault(piece.start, []).append((piece.index, True))
        edges.setdefault(piece.end, []).append((piece.index, False))
    written: set[int] = set()
    start = 0
    for edge in sorted(edges):
        changed = set(written)
        for index, begins in sorted(edges[edge], key=lambda one: one[1]):  # ends before begins
            assert (index in changed) != begins, "pieces of one chunk overlap"
            (changed.add if begins else changed.remove)(index)
        if changed == written:
            continue
        if written:
            yield start, edge, tuple(sorted(written))
        written, start = changed, edge


def _segment(
    stripe: Stripe,
    start: int,
    end: int,
    written: tuple[int, ...],
    missing: Collection[int],
    blind: Collection[int],
    trust_parity: bool,
) -> Segment:
    stores = tuple(stripe.data[i] for i in written if stripe.data[i] not in missing)
    targets = [slot for slot in (stripe.p, stripe.q) if slot != NONE and slot not in missing]
    if not targets:
        return Segment(start, end, "plain", written, (), stores, {})
    modified = _modify(stripe, written, targets, blind)
    try:
        sums, way = _reconstruct(stripe, written, targets, blind), "reconstruct"
    except TooManyLost:
        if modified is None:
            raise
        sums, way = modified, "modify"
    if trust_parity and modified is not None and len(modified[0]) < len(sums[0]):
        sums, way = modified, "modify"
    if len(written) == len(stripe.data):
        way = "full"
    return Segment(start, end, way, written, sums[0], stores, sums[1])


_Sums = tuple[tuple[int, ...], dict[int, tuple[int, ...]]]  # what is read, and `parity`


def _reconstruct(
    stripe: Stripe, written: Sequence[int], targets: Sequence[int], blind: Collection[int]
) -> _Sums:
    """Every data chunk is needed: the new ones are here, of the others a missing one is made."""
    others = [i for i in range(len(stripe.data)) if i not in written]
    left = [i for i in others if stripe.data[i] not in blind]
    gone = [stripe.data[i] for i in others if stripe.data[i] in blind]
    made = recipe(stripe, lost=blind, wanted=gone) if gone else Recipe((), {})
    reads = tuple(dict.fromkeys([*(stripe.data[i] for i in left), *made.sources]))
    parity = {}
    for target in targets:
        factors = dict.fromkeys(reads, 0)
        for i in left:
            factors[stripe.data[i]] ^= factor_of(stripe, target, i)
        for slot in gone:
            ours = factor_of(stripe, target, stripe.data.index(slot))
            for source, theirs in zip(made.sources, made.rows[slot], strict=True):
                factors[source] ^= galois.multiply(ours, theirs)
        new = [factor_of(stripe, target, i) for i in written]
        parity[target] = (*factors.values(), *new)
    return reads, parity


def _modify(
    stripe: Stripe, written: Sequence[int], targets: Sequence[int], blind: Collection[int]
) -> _Sums | None:
    """The old data and parity; None when some of it cannot be read."""
    slots = tuple(stripe.data[i] for i in written)
    if any(slot in blind for slot in (*slots, *targets)):
        return None
    reads = (*slots, *targets)
    parity = {}
    for target in targets:
        factors = tuple(factor_of(stripe, target, i) for i in written)
        parity[target] = (*factors, *(int(target == other) for other in targets), *factors)
    return reads, parity


def factor_of(stripe: Stripe, parity: int, index: int) -> int:
    """What the data chunk is multiplied by in that parity."""
    return 1 if parity == stripe.p else galois.power(stripe.powers[index])
