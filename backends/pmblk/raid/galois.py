"""The field GF(2^8) of RAID6, for coefficients: a few numbers a stripe, never the data. Pure.

Addition is XOR. The polynomial is 0x11d and the generator 2, as in Linux and ISA-L, so parity made
here is parity there. Source: H. Peter Anvin, "The mathematics of RAID-6".
"""

from collections.abc import Sequence

POLYNOMIAL = 0x11D

Matrix = list[list[int]]


def _tables() -> tuple[list[int], list[int]]:
    powers, logarithms, value = [0] * 510, [0] * 256, 1
    for exponent in range(255):
        powers[exponent] = powers[exponent + 255] = value
        logarithms[value] = exponent
        value <<= 1
        if value & 0x100:
            value ^= POLYNOMIAL
    return powers, logarithms


_POWERS, _LOGARITHMS = _tables()


def power(exponent: int) -> int:
    """2 to that; exponents from 255 on come round again."""
    return _POWERS[exponent % 255]


def multiply(a: int, b: int) -> int:
    if not a or not b:
        return 0
    return _POWERS[_LOGARITHMS[a] + _LOGARITHMS[b]]


def inverse(a: int) -> int:
    """What times `a` is 1; `a` is not 0."""
    assert a
    return _POWERS[255 - _LOGARITHMS[a]]


def invert(matrix: Sequence[Sequence[int]]) -> Matrix:
    """The inverse of a square matrix, by Gauss and Jordan. ValueError when there is none."""
    size = len(matrix)
    rows = [[*row, *(int(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next((row for row in range(column, size) if rows[row][column]), None)
        if pivot is None:
            raise ValueError("the matrix has no inverse")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        factor = inverse(rows[column][column])
        rows[column] = [multiply(factor, value) for value in rows[column]]
        for row in range(size):
            factor = rows[row][column]
            if row != column and factor:
                rows[row] = [
                    value ^ multiply(factor, other)
                    for value, other in zip(rows[row], rows[column], strict=True)
                ]
    return [row[size:] for row in rows]
