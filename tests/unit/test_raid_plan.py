"""The write plan: what it reads and writes is the theory's, and the stripe is whole afterwards."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmblk.raid import galois
from pmblk.raid.geometry import Geometry, layouts_of
from pmblk.raid.layout import NONE, Stripe, Stripes
from pmblk.raid.parity import Bytes, combine, combine_by_numpy
from pmblk.raid.plan import Piece, Segment, cut, plan
from pmblk.raid.recovery import TooManyLost, recipe

CHUNK = 64
BLOCK = 8


def stripe_of(level: int, members: int, layout: str = "", row: int = 0) -> Stripe:
    fields: dict[str, Any] = {"level": level, "layout": layout or layouts_of(level)[0]}
    return Stripes(Geometry(members=members, member_bytes=4096, chunk_bytes=4096, **fields))[row]


def one_block(stripe: Stripe, missing: Sequence[int] = ()) -> Segment:
    (segment,) = plan(stripe, [Piece(0, 0, BLOCK)], missing=missing)
    return segment


# ---- the theory


@pytest.mark.parametrize(
    ("level", "members", "way", "reads", "writes"),
    [
        (5, 3, "reconstruct", 1, 2),  # the other data chunk
        (5, 4, "reconstruct", 2, 2),  # a tie: as md does
        (5, 5, "modify", 2, 2),  # old data and P
        (5, 8, "modify", 2, 2),
        (6, 4, "reconstruct", 1, 3),
        (6, 6, "reconstruct", 3, 3),  # a tie
        (6, 8, "modify", 3, 3),  # old data, P and Q
    ],
)
def test_a_small_write_costs_what_the_theory_says(
    level: int, members: int, way: str, reads: int, writes: int
) -> None:
    segment = one_block(stripe_of(level, members))
    assert segment.way == way
    assert segment.read_bytes == reads * BLOCK
    assert segment.write_bytes == writes * BLOCK


@pytest.mark.parametrize("level", [4, 5, 6])
def test_a_full_stripe_reads_nothing(level: int) -> None:
    stripe = stripe_of(level, 6)
    (segment,) = plan(stripe, [Piece(i, 0, CHUNK) for i in range(len(stripe.data))])
    assert (segment.way, segment.reads) == ("full", ())
    assert segment.write_bytes == 6 * CHUNK


def test_neighbours_that_fill_a_stripe_are_one_full_stripe() -> None:
    stripe = stripe_of(5, 4)
    halves = [Piece(i, start, start + CHUNK // 2) for i in range(3) for start in (0, CHUNK // 2)]
    (segment,) = plan(stripe, halves)
    assert (segment.start, segment.end, segment.way) == (0, CHUNK, "full")


def test_a_missing_parity_costs_no_reads() -> None:
    stripe = stripe_of(5, 5)
    segment = one_block(stripe, missing=[stripe.p])
    assert (segment.way, segment.reads, segment.parity) == ("plain", (), {})
    assert segment.stores == (stripe.data[0],)


def test_a_write_to_a_missing_chunk_goes_into_the_parity() -> None:
    stripe = stripe_of(5, 5)
    segment = one_block(stripe, missing=[stripe.data[0]])
    assert segment.way == "reconstruct"
    assert segment.stores == ()
    assert set(segment.reads) == set(stripe.data[1:])


def test_one_loss_too_many_is_refused() -> None:
    stripe = stripe_of(5, 5)
    with pytest.raises(TooManyLost):
        one_block(stripe, missing=[0, 1])


def test_a_range_is_cut_at_chunks_and_rows() -> None:
    assert list(cut(CHUNK - 8, 2 * CHUNK, chunk_bytes=CHUNK, data_members=2)) == [
        (0, Piece(0, CHUNK - 8, CHUNK)),
        (0, Piece(1, 0, CHUNK)),
        (1, Piece(0, 0, CHUNK - 8)),
    ]


# ---- carried out, the stripe is whole and holds what was written


def made_whole(stripe: Stripe, members: int, seed: int) -> list[Bytes]:
    random = np.random.default_rng(seed)
    chunks = [random.integers(0, 256, CHUNK, dtype=np.uint8) for _ in range(members)]
    data = [chunks[slot] for slot in stripe.data]
    combine_by_numpy([[1] * len(data)], data, [chunks[stripe.p]])
    if stripe.q != NONE:
        powers = [galois.power(exponent) for exponent in stripe.powers]
        combine_by_numpy([powers], data, [chunks[stripe.q]])
    return chunks


def carry_out(
    stripe: Stripe,
    chunks: list[Bytes],
    segment: Segment,
    new: dict[int, Bytes],
    *,
    believed: list[Bytes],
) -> None:
    """On the members' `chunks`; `believed` is what reads of them give."""
    rows = slice(segment.start, segment.end)
    terms = [believed[slot][rows] for slot in segment.reads]
    terms += [new[index][rows] for index in segment.written]
    if segment.parity:
        outputs = [chunks[slot][rows] for slot in segment.parity]
        combine(list(segment.parity.values()), terms, outputs)
    for index in segment.written:
        if stripe.data[index] in segment.stores:
            chunks[stripe.data[index]][rows] = new[index][rows]


def drawn_pieces(stripe: Stripe, data: st.DataObject) -> list[Piece]:
    edges = st.sets(st.integers(0, CHUNK // BLOCK), min_size=2, max_size=4)
    pieces = []
    for index in data.draw(st.sets(st.integers(0, len(stripe.data) - 1), min_size=1)):
        cuts = sorted(data.draw(edges))
        pieces += [
            Piece(index, start * BLOCK, end * BLOCK)
            for start, end in itertools.pairwise(cuts)
            if data.draw(st.booleans()) or (start, end) == tuple(cuts[:2])
        ]
    return pieces


def new_data(stripe: Stripe, seed: int) -> dict[int, Bytes]:
    return {
        index: np.random.default_rng(seed + index).integers(0, 256, CHUNK, dtype=np.uint8)
        for index in range(len(stripe.data))
    }


@given(
    level=st.sampled_from([4, 5, 6]),
    members=st.integers(4, 8),
    row=st.integers(0, 7),
    data=st.data(),
)
def test_whatever_is_written_and_missing_the_stripe_holds_it(
    level: int, members: int, row: int, data: st.DataObject
) -> None:
    stripe = stripe_of(level, members, data.draw(st.sampled_from(layouts_of(level))), row)
    parities = 1 + (level == 6)
    slots = st.sets(st.integers(0, members - 1), max_size=parities)
    missing = data.draw(slots)
    unreadable = data.draw(slots.filter(lambda one: len(missing | one) <= parities))
    pieces = drawn_pieces(stripe, data)
    seed = data.draw(st.integers(0, 1 << 30))
    chunks = made_whole(stripe, members, seed)
    model = [chunks[slot].copy() for slot in stripe.data]
    believed = [chunk.copy() for chunk in chunks]
    for slot in missing | unreadable:
        believed[slot][:] = 0xEE
    new = new_data(stripe, seed + 1)
    segments = plan(stripe, pieces, missing=missing, unreadable=unreadable)
    for piece in pieces:
        model[piece.index][piece.start : piece.end] = new[piece.index][piece.start : piece.end]
    for segment in segments:
        assert not missing & {*segment.stores, *segment.parity}
        assert not (missing | unreadable) & set(segment.reads)
        assert segment.length % BLOCK == 0
        carry_out(stripe, chunks, segment, new, believed=believed)
    made = recipe(stripe, lost=missing, wanted=range(members))
    outputs = [np.zeros(CHUNK, dtype=np.uint8) for _ in made.rows]
    combine(list(made.rows.values()), [chunks[slot] for slot in made.sources], outputs)
    whole = dict(zip(made.rows, outputs, strict=True))
    for index, slot in enumerate(stripe.data):
        assert bytes(whole[slot]) == bytes(model[index])
    for slot in set(range(members)) - missing:
        assert bytes(whole[slot]) == bytes(chunks[slot]), "parity fits the data"
    covered = sum(segment.length * len(segment.written) for segment in segments)
    assert covered == sum(piece.end - piece.start for piece in pieces)


@given(
    level=st.sampled_from([4, 5, 6]),
    members=st.integers(4, 8),
    row=st.integers(0, 7),
    data=st.data(),
)
def test_where_parity_may_not_fit_it_fits_whatever_is_written(
    level: int, members: int, row: int, data: st.DataObject
) -> None:
    stripe = stripe_of(level, members, data.draw(st.sampled_from(layouts_of(level))), row)
    parities = [slot for slot in (stripe.p, stripe.q) if slot != NONE]
    missing = data.draw(st.sets(st.sampled_from(parities)))
    pieces = drawn_pieces(stripe, data)
    seed = data.draw(st.integers(0, 1 << 30))
    chunks = made_whole(stripe, members, seed)
    for slot in parities:
        chunks[slot] ^= np.random.default_rng(seed + 1).integers(1, 256, CHUNK, dtype=np.uint8)
    believed = [chunk.copy() for chunk in chunks]
    new = new_data(stripe, seed + 2)
    for segment in plan(stripe, pieces, missing=missing, trust_parity=False):
        assert segment.way != "modify"
        assert not set(segment.reads) & set(parities)
        carry_out(stripe, chunks, segment, new, believed=believed)
        rows = slice(segment.start, segment.end)
        made = recipe(stripe, lost=parities, wanted=parities)
        outputs = [np.zeros(segment.length, dtype=np.uint8) for _ in made.rows]
        combine(list(made.rows.values()), [chunks[slot][rows] for slot in made.sources], outputs)
        for slot, output in zip(made.rows, outputs, strict=True):
            assert slot in missing or bytes(chunks[slot][rows]) == bytes(output)


def test_with_data_missing_there_is_no_choice_but_to_believe_the_parity() -> None:
    stripe = stripe_of(5, 5)
    missing = [stripe.data[1]]
    believing, doubting = (
        plan(stripe, [Piece(1, 0, BLOCK)], missing=missing, trust_parity=trust)
        for trust in (True, False)
    )
    assert believing == doubting
