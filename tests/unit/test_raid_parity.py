"""Parity and recovery: any loss within the redundancy is made up, by ISA-L as by numpy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmblk.raid import galois, parity
from pmblk.raid.geometry import Geometry, layouts_of
from pmblk.raid.layout import NONE, Stripe, Stripes
from pmblk.raid.parity import Bytes, combine, combine_by_numpy
from pmblk.raid.recovery import Recipe, TooManyLost, recipe

LENGTH = 128


def slow_multiply(a: int, b: int) -> int:
    """By the definition: polynomials over GF(2), modulo 0x11d."""
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(15, 7, -1):
        if product >> bit & 1:
            product ^= galois.POLYNOMIAL << bit - 8
    return product


def test_the_field_is_that_of_the_polynomial() -> None:
    for a, b in itertools.product(range(256), repeat=2):
        assert galois.multiply(a, b) == slow_multiply(a, b)
    assert all(galois.multiply(a, galois.inverse(a)) == 1 for a in range(1, 256))
    assert [galois.power(exponent) for exponent in (0, 1, 8, 254, 255)] == [1, 2, 0x1D, 142, 1]


def test_a_matrix_times_its_inverse_is_one() -> None:
    matrix = [[1, 1, 1], [1, 2, 4], [0, 0, 7]]
    found = galois.invert(matrix)
    for i, j in itertools.product(range(3), repeat=2):
        total = 0
        for k in range(3):
            total ^= galois.multiply(matrix[i][k], found[k][j])
        assert total == int(i == j)
    with pytest.raises(ValueError, match="no inverse"):
        galois.invert([[1, 2], [1, 2]])


def test_isa_l_is_installed_here() -> None:
    assert parity.implementation() == "isa-l", "libisal2 is a package of the project's set-up"


def blocks(count: int, length: int, *, seed: int, shift: int = 0) -> list[Bytes]:
    """Random blocks, each `shift` bytes past an aligned address."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        memory = np.zeros(length + 2 * parity.ALIGNMENT, dtype=np.uint8)
        start = -memory.ctypes.data % parity.ALIGNMENT + shift
        block = memory[start : start + length]
        block[:] = random.integers(0, 256, length, dtype=np.uint8)
        found.append(block)
    return found


@given(
    rows=st.integers(1, 3),
    sources=st.integers(1, 9),
    length=st.sampled_from([1, 31, 32, 33, 64, 4096]),
    shift=st.sampled_from([0, 1, 16]),
    kind=st.sampled_from(["any", "ones", "pq"]),
    data=st.data(),
)
def test_isa_l_and_numpy_agree(
    rows: int, sources: int, length: int, shift: int, kind: str, data: st.DataObject
) -> None:
    if kind == "ones":
        factors = [[1] * sources for _ in range(rows)]
    elif kind == "pq":
        factors = [[1] * sources, [galois.power(exponent) for exponent in range(sources)]]
    else:
        row = st.lists(st.integers(0, 255), min_size=sources, max_size=sources)
        factors = data.draw(st.lists(row, min_size=rows, max_size=rows))
    seed = data.draw(st.integers(0, 1 << 30))
    inputs = blocks(sources, length, seed=seed, shift=shift)
    before = [bytes(block) for block in inputs]
    ours, reference = (blocks(len(factors), length, seed=seed + 1, shift=shift) for _ in range(2))
    combine(factors, inputs, ours)
    combine_by_numpy(factors, inputs, reference)
    assert [bytes(block) for block in ours] == [bytes(block) for block in reference]
    assert [bytes(block) for block in inputs] == before


def test_the_numpy_way_is_that_of_the_definition() -> None:
    first, second = blocks(2, 16, seed=1)
    (out,) = blocks(1, 16, seed=2)
    combine_by_numpy([[3, 7]], [first, second], [out])
    assert list(out) == [
        slow_multiply(3, int(a)) ^ slow_multiply(7, int(b))
        for a, b in zip(first, second, strict=True)
    ]


# ---- what is lost


def filled(stripe: Stripe, members: int, *, seed: int) -> list[Bytes]:
    """A whole stripe by slot, its parity made by the definition of P and Q."""
    chunks = blocks(members, LENGTH, seed=seed)
    data = [chunks[slot] for slot in stripe.data]
    combine_by_numpy([[1] * len(data)], data, [chunks[stripe.p]])
    if stripe.q != NONE:
        powers = [galois.power(exponent) for exponent in stripe.powers]
        combine_by_numpy([powers], data, [chunks[stripe.q]])
    return chunks


@pytest.mark.parametrize("level", [4, 5, 6])
def test_every_loss_within_the_redundancy_is_made_up(level: int) -> None:
    for members, layout in itertools.product(range(4, 9), layouts_of(level)):
        geometry = Geometry(
            level=level,  # type: ignore[arg-type]
            members=members,
            member_bytes=4096,
            chunk_bytes=4096,
            layout=layout,  # type: ignore[arg-type]
        )
        for row in range(members):
            stripe = Stripes(geometry)[row]
            whole = filled(stripe, members, seed=row)
            for count in range(1, geometry.parities + 1):
                for lost in itertools.combinations(range(members), count):
                    found = made_up(recipe(stripe, lost=lost, wanted=lost), whole)
                    for slot in lost:
                        assert bytes(found[slot]) == bytes(whole[slot]), (layout, row, lost)


def made_up(made_of: Recipe, whole: list[Bytes]) -> dict[int, Bytes]:
    outputs = blocks(len(made_of.rows), LENGTH, seed=0)
    sources = [whole[slot] for slot in made_of.sources]
    combine(list(made_of.rows.values()), sources, outputs)
    return dict(zip(made_of.rows, outputs, strict=True))


def test_one_lost_chunk_is_a_plain_xor_and_needs_no_q() -> None:
    geometry = Geometry(
        level=6, members=6, member_bytes=4096, chunk_bytes=4096, layout="left-symmetric"
    )
    stripe = Stripes(geometry)[0]
    lost = stripe.data[1]
    found = recipe(stripe, lost=[lost], wanted=[lost])
    assert stripe.q not in found.sources
    assert set(found.rows[lost]) == {1}


def test_what_is_not_lost_is_its_own_only_source() -> None:
    geometry = Geometry(
        level=5, members=4, member_bytes=4096, chunk_bytes=4096, layout="left-symmetric"
    )
    stripe = Stripes(geometry)[1]
    slot = stripe.data[2]
    assert recipe(stripe, lost=[], wanted=[slot]) == Recipe((slot,), {slot: (1,)})


@pytest.mark.parametrize(("level", "lost"), [(5, (0, 1)), (6, (0, 1, 2))])
def test_one_loss_too_many_is_said(level: int, lost: tuple[int, ...]) -> None:
    geometry = Geometry(
        level=level,  # type: ignore[arg-type]
        members=5,
        member_bytes=4096,
        chunk_bytes=4096,
        layout="left-symmetric",
    )
    with pytest.raises(TooManyLost, match=f"{len(lost)} chunks of 5 are lost"):
        recipe(Stripes(geometry)[0], lost=lost, wanted=lost)
