"""What is lost of a stripe, as a sum of what is left: coefficients, not data. Pure.

Every chunk of a stripe, parity too, is a linear combination of its data chunks over GF(2^8). So
with as many chunks left as there is data, each lost one is a combination of those.
"""

from collections.abc import Collection, Mapping

import msgspec

from pmblk.raid import galois
from pmblk.raid.layout import NONE, Stripe


class Recipe(msgspec.Struct, frozen=True):
    """`rows[slot]` are the coefficients of the lost chunk in `slot`, one for each of `sources`."""

    sources: tuple[int, ...]
    rows: Mapping[int, tuple[int, ...]]


class TooManyLost(Exception):
    """More chunks of a stripe are missing than its redundancy makes up for."""


def recipe(stripe: Stripe, *, lost: Collection[int], wanted: Collection[int]) -> Recipe:
    """How to make the chunks in the slots `wanted` without touching those in `lost`.

    P is preferred to Q, so that one lost chunk is a plain XOR. Raises TooManyLost.
    """
    order = (*stripe.data, *(slot for slot in (stripe.p, stripe.q) if slot != NONE))
    left = [slot for slot in order if slot not in lost]
    needed = len(stripe.data)
    if len(left) < needed:
        raise TooManyLost(f"{len(order) - len(left)} chunks of {len(order)} are lost")
    sources = left[:needed]
    # data = inverse x sources, and every wanted chunk is a row of the data.
    inverse = galois.invert([_generator(stripe, slot) for slot in sources])
    rows = {slot: _times(_generator(stripe, slot), inverse) for slot in wanted}
    return _without_zeroes(sources, rows)


def _generator(stripe: Stripe, slot: int) -> list[int]:
    """The chunk in the slot as a combination of the data chunks, in their order."""
    if slot == stripe.p:
        return [1] * len(stripe.data)
    if slot == stripe.q:
        return [galois.power(exponent) for exponent in stripe.powers]
    return [int(slot == one) for one in stripe.data]


def _times(row: list[int], matrix: galois.Matrix) -> tuple[int, ...]:
    sums = [0] * len(matrix)
    for factor, others in zip(row, matrix, strict=True):
        if factor:
            sums = [
                total ^ galois.multiply(factor, other)
                for total, other in zip(sums, others, strict=True)
            ]
    return tuple(sums)


def _without_zeroes(sources: list[int], rows: dict[int, tuple[int, ...]]) -> Recipe:
    """Nobody reads a chunk to multiply it by 0."""
    used = [i for i in range(len(sources)) if any(row[i] for row in rows.values())]
    return Recipe(
        tuple(sources[i] for i in used),
        {slot: tuple(row[i] for i in used) for slot, row in rows.items()},
    )
