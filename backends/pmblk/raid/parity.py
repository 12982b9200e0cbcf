"""Sums of blocks over GF(2^8): parity, its update, and what is lost. One operation does all.

`combine` makes each output from the sources and a row of coefficients. With ones it is P; with
powers of 2 it is Q; with 1, 1, 1 over (old parity, old data, new data) it is an update of P; with a
recipe of `pmblk.raid.recovery` it is a lost chunk.

ISA-L does it at memory bandwidth; where it is not installed numpy does, and `IMPLEMENTATION` says
which. Each is checked against the other in the tests. Source: ISA-L's raid.h and erasure_code.h.
"""

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pmblk.raid import galois

Bytes = npt.NDArray[np.uint8]
Rows = Sequence[Sequence[int]]

ALIGNMENT = 32  # of addresses and lengths, for ISA-L's xor_gen and pq_gen
TABLE_BYTES = 32  # of ec_init_tables, for each coefficient


def combine(rows: Rows, sources: Sequence[Bytes], outputs: Sequence[Bytes]) -> None:
    """outputs[i] = sum over j of rows[i][j] * sources[j].

    All arrays have one length, which is not 0, and are contiguous; an output is no source. Both
    belong to the caller, and nothing of them is kept.
    """
    assert len(rows) == len(outputs)
    assert all(len(row) == len(sources) for row in rows)
    length = len(outputs[0])
    assert length
    assert all(len(array) == length for array in (*sources, *outputs))
    isal = _isal()
    if isal is None:
        combine_by_numpy(rows, sources, outputs)
    else:
        isal.combine(rows, sources, outputs)


def implementation() -> str:
    """What computes: "isa-l" or "numpy"."""
    return "numpy" if _isal() is None else "isa-l"


# ---- numpy


def combine_by_numpy(rows: Rows, sources: Sequence[Bytes], outputs: Sequence[Bytes]) -> None:
    """The reference, and the fallback."""
    for row, output in zip(rows, outputs, strict=True):
        output[:] = 0
        for factor, source in zip(row, sources, strict=True):
            if factor == 1:
                np.bitwise_xor(output, source, out=output)
            elif factor:
                np.bitwise_xor(output, _products(factor)[source], out=output)


@functools.lru_cache(maxsize=256)
def _products(factor: int) -> Bytes:
    """What every byte times `factor` is."""
    return np.array([galois.multiply(factor, value) for value in range(256)], dtype=np.uint8)


# ---- ISA-L


class _Isal:
    def __init__(self, library: ctypes.CDLL) -> None:
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        self._xor_gen = library.xor_gen
        self._xor_gen.argtypes = (integer, integer, pointer)
        self._pq_gen = library.pq_gen
        self._pq_gen.argtypes = (integer, integer, pointer)
        self._init_tables = library.ec_init_tables
        self._init_tables.argtypes = (integer, integer, pointer, pointer)
        self._init_tables.restype = None
        self._encode = library.ec_encode_data
        self._encode.argtypes = (integer, integer, integer, pointer, pointer, pointer)
        self._encode.restype = None
        self._tables = functools.lru_cache(maxsize=1024)(self._make_tables)

    def combine(self, rows: Rows, sources: Sequence[Bytes], outputs: Sequence[Bytes]) -> None:
        count, length = len(sources), len(outputs[0])
        addresses = [array.ctypes.data for array in (*sources, *outputs)]
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        if length % ALIGNMENT == 0 and not any(address % ALIGNMENT for address in addresses):
            if len(rows) == 1 and count >= 2 and set(rows[0]) == {1}:
                _must_work(self._xor_gen(count + 1, length, pointers))
                return
            if len(rows) == 2 and count >= 2 and _is_pq(rows):
                _must_work(self._pq_gen(count + 2, length, pointers))
                return
        tables = self._tables(tuple(map(tuple, rows)))
        behind = ctypes.byref(pointers, count * ctypes.sizeof(ctypes.c_void_p))
        self._encode(length, count, len(rows), tables, pointers, behind)

    def _make_tables(self, rows: tuple[tuple[int, ...], ...]) -> "ctypes.Array[ctypes.c_char]":
        coefficients = bytes(factor for row in rows for factor in row)
        tables = ctypes.create_string_buffer(TABLE_BYTES * len(coefficients))
        self._init_tables(len(rows[0]), len(rows), coefficients, tables)
        return tables


def _is_pq(rows: Rows) -> bool:
    """P, and Q with its powers in the order of the sources."""
    return set(rows[0]) == {1} and all(
        factor == galois.power(exponent) for exponent, factor in enumerate(rows[1])
    )


def _must_work(result: int) -> None:
    assert result == 0, "ISA-L refuses only wrong counts and alignments"


@functools.cache
def _isal() -> _Isal | None:
    try:
        return _Isal(ctypes.CDLL("libisal.so.2"))
    except OSError:
        return None
